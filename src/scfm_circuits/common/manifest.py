"""What profiles use from elsewhere, and what it must be: data/manifest.yml; where gene sets are."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from scfm_circuits import InputError

ROOT = Path(os.environ.get("SCFM_ROOT", Path(__file__).resolve().parents[3]))


def entry(kind: str, name: str) -> dict[str, Any] | None:
    """The entry of that name among `cells`, `models`, `dictionaries` or `gene_sets`; None if there
    is none. Models are called as `model_name` says."""
    return _listed().get((kind, name))


def names(kind: str) -> list[str]:
    """All names of that kind, as `entry` takes them."""
    return [name for of, name in _listed() if of == kind]


def _listed() -> dict[tuple[str, str], dict[str, Any]]:
    path = ROOT / "data" / "manifest.yml"
    return _entries(path, path.stat().st_mtime_ns if path.is_file() else 0)


@cache
def _entries(path: Path, _changed: int) -> dict[tuple[str, str], dict[str, Any]]:
    if not path.is_file():
        return {}
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return {(kind, model_name(one["name"], one.get("subfolder", ""))): one
            for kind, some in content.items() for one in some}


def model_name(name: str, subfolder: str) -> str:
    """What a model of a folder in its repository is called among `models`."""
    return f"{name}/{subfolder}" if subfolder else name


def by_hand(name: str) -> str:
    """Which files of a model are to be put where by hand, and from where; empty if none are."""
    listed = entry("models", name)
    if listed is None or "by_hand" not in listed:
        return ""
    *files, last = listed["files"]
    return (f"fetch {', '.join(files)} and {last} from {listed['by_hand']} in a browser, as that "
            f"host gives no file to a program, and put them into {ROOT / name}")


def check_model(name: str, config: Any, tokenizer_entries: int) -> None:
    """InputError if a model of the manifest is not what its entry says; others pass.

    name: as of `model_name`. config: the model's own configuration.
    """
    listed = entry("models", name)
    if listed is None:
        return
    wrong = [f"`{key}` is {getattr(config, key, None)!r} instead of {value!r}"
             for key, value in listed["config"].items() if getattr(config, key, None) != value]
    if tokenizer_entries != listed.get("tokenizer_entries", tokenizer_entries):
        wrong.append(f"the tokenizer has {tokenizer_entries:,} entries instead of "
                     f"{listed['tokenizer_entries']:,}")
    if wrong:
        raise InputError(f"The model {name!r} is not the one in data/manifest.yml: "
                         f"{'; '.join(wrong)}. Check `model_revision` and `tokenizer` in the "
                         "profile, or remove the model from the Hugging Face cache.")


def gene_set_folders(named: str | Path | None) -> dict[Path, str]:
    """The folders where gene sets are looked for before the cache, each with who names it.

    named: the folder in the profile. A relative folder starts at the root, where notebooks run.
    """
    origins = {"the profile": named, "SCFM_GENE_SETS": os.environ.get("SCFM_GENE_SETS")}
    return {ROOT / os.path.expanduser(folder): origin for origin, folder in origins.items()
            if folder}


def cache_folder() -> Path:
    """Where is kept what all profiles share: SCFM_CACHE or `~/.cache/scfm-circuits`."""
    return ROOT / os.path.expanduser(os.environ.get("SCFM_CACHE") or "~/.cache/scfm-circuits")


def gene_set_cache() -> Path:
    """Where downloaded gene sets are kept."""
    return cache_folder() / "gene-sets"
