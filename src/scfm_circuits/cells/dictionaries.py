"""The dictionaries of models that have genes as tokens: read from JSON or, guarded, a pickle.

Geneformer publishes its dictionaries as pickles. A pickle can run any code, so only dictionaries,
texts and numbers are taken from one: numpy's scalars are rebuilt here, and any other global name
in the file ends the reading.
"""

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scfm_circuits import InputError
from scfm_circuits.common import manifest
from scfm_circuits.common.encodings import (
    BINNED,
    ENSEMBL,
    GENE_TOKENS,
    MARKS,
    OWN_DICTIONARY,
)
from scfm_circuits.common.files import digest, first_line
from scfm_circuits.common.labels import listed
from scfm_circuits.common.profile import Profile, located

FILES = ("token_dictionary", "gene_medians", "gene_mapping")
"""Profile fields that name a dictionary."""
_PLAIN = re.compile(r"[<>=|]?[iuf][1248]")
_BROKEN = (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError,
           AttributeError, ImportError, OverflowError, MemoryError, RecursionError)
"""What a damaged or hostile pickle makes the unpickler raise."""


class GeneTokens(NamedTuple):
    """A model's genes, by Ensembl identifier (scGPT's by symbol, in capitals), and its special
    tokens, by name.

    genes, special: token ids. medians: of every gene, above zero; none under `binned`. names: from
    symbols, aliases and retired identifiers, in capitals, to Ensembl identifiers; may be empty.
    """

    genes: dict[str, int]
    special: dict[str, int]
    medians: dict[str, float]
    names: dict[str, str]


def read_gene_tokens(profile: Profile) -> GeneTokens:
    """The dictionaries that the profile names, checked against its encoding and each other.

    Raises InputError for a file that is missing or broken, holds something else, or is of another
    version.
    """
    tokens, medians, names = (_dictionary(profile, field) for field in FILES)
    by_symbol = profile.encoding == BINNED
    special = {key: token for key, token in tokens.items()
               if (key.startswith("<") if by_symbol else not ENSEMBL.match(key))}
    genes = {key.upper() if by_symbol else key: token for key, token in tokens.items()
             if key not in special}
    if not genes:
        raise _wrong(profile, FILES[0], "it names no gene by an Ensembl identifier",
                     "give the model's own token dictionary")
    if sorted(tokens.values()) != list(range(len(tokens))):
        raise _wrong(profile, FILES[0], f"its {len(tokens):,} tokens are not the numbers from 0 to "
                     f"{len(tokens) - 1:,}, each once", "give the model's own token dictionary")
    _check_version(profile, special)
    lacking = [] if by_symbol else [gene for gene in genes if not medians.get(gene, 0) > 0]
    if lacking:
        raise _wrong(profile, FILES[1], f"{len(lacking):,} of the {len(genes):,} genes that have a "
                     f"token, such as {lacking[0]}, have no median above zero in it, so the two "
                     "are of different versions", "give the medians that came with the tokens")
    return GeneTokens(genes, special, medians, names)


def _check_version(profile: Profile, special: Mapping[str, int]) -> None:
    """InputError unless a dictionary has the special tokens of the profile's encoding."""
    wanted = GENE_TOKENS[profile.encoding]
    missing = [name for name in wanted.special if name not in special]
    foreign = sorted(MARKS & {*special} - {*wanted.special})
    if not missing and not foreign:
        return
    fits = [name for name, one in GENE_TOKENS.items()
            if {*one.special} <= {*special} and not MARKS & {*special} - {*one.special}]
    what = (f"it has no token {missing[0]}, which" if missing else
            f"it has a token {foreign[0]}, which none")
    raise _wrong(profile, FILES[0], f"{what} `encoding: {profile.encoding}` has, so it is of "
                 "another version", f"set `encoding: {fits[0]}`" if fits else
                 "give the dictionary of that version")


def dictionary_file(profile: Profile, field: str) -> Path | None:
    """The file of one of `FILES`, which need not exist; None for a field that is not set, or one
    that is made here.

    A name of data/manifest.yml is a file in the cache, where `make data` puts it.
    """
    name = getattr(profile, field)
    if name in (None, OWN_DICTIONARY):
        return None
    listed = manifest.entry("dictionaries", name)
    return (located(field, name) if listed is None else
            manifest.cache_folder() / "dictionaries" / listed["file"])


def files_stamp(profile: Profile) -> dict[str, str]:
    """A short hash of each dictionary that the profile names; what is made from them depends on
    it. One that cannot be read is told of when it is read."""
    files = {field: dictionary_file(profile, field) for field in FILES}
    return {field: digest(path.read_bytes()) for field, path in files.items()
            if path is not None and path.is_file()}


def _dictionary(profile: Profile, field: str) -> dict[str, Any]:
    """One checked dictionary; nothing for a field that is not set."""
    path = dictionary_file(profile, field)
    if path is None:
        return {}
    if not path.is_file():
        mend = ("fetch it once with a network (`make data` with this profile)"
                if manifest.entry("dictionaries", getattr(profile, field)) is not None else
                manifest.by_hand(profile.model)
                or "give the path of the model's dictionary, or a name of data/manifest.yml")
        raise InputError(f"Profile field `{field}` is {getattr(profile, field)!r}, but there is no "
                         f"file {path}; {mend}.")
    try:
        found = (_unpickled(path) if path.suffix in (".pkl", ".pickle") else
                 json.loads(path.read_text(encoding="utf-8")))
    except (OSError, *_BROKEN) as error:  # a UnicodeDecodeError is a ValueError
        raise _wrong(profile, field, f"it cannot be read ({first_line(error)})",
                     "fetch it again, or give it as JSON") from None
    kind, what = {"token_dictionary": (int, "whole numbers"), "gene_medians": (float, "numbers"),
                  "gene_mapping": (str, "texts")}[field]
    if not isinstance(found, dict) or not found:
        raise _wrong(profile, field, "it holds no dictionary", "give the model's own")
    for key, value in found.items():
        fits = isinstance(value, (int, float) if kind is float else kind)
        if kind is float and fits:
            fits = bool(np.isfinite(value))
        if not fits or isinstance(value, bool) or not isinstance(key, str):
            raise _wrong(profile, field, f"it should hold texts and, for each, {what}, and for "
                         f"{listed([key])} it has {listed([value])}", "give the model's own")
    if field == "gene_mapping":
        return {key.upper(): value.upper() for key, value in found.items()}
    return found


def _wrong(profile: Profile, field: str, what: str, mend: str) -> InputError:
    return InputError(f"The dictionary {getattr(profile, field)!r} (`{field}` in the profile) "
                      f"cannot be used: {what}; {mend}.")


# --- pickles -------------------------------------------------------------------------------------


class _Numbers:
    """In the place of `numpy.dtype`: the type of a number, and nothing that can be set but the
    order of its bytes."""

    def __init__(self, name: str, *_: object) -> None:
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            raise pickle.UnpicklingError(f"it holds numbers of the type {str(name)[:40]!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def _scalar(kind: _Numbers, content: bytes) -> int | float:
    """In the place of numpy's maker of scalars: a Python number."""
    if not isinstance(kind, _Numbers) or not isinstance(content, bytes):
        raise pickle.UnpicklingError("it holds something else than numbers")
    [value] = np.frombuffer(content, kind.dtype)
    return value.item()


def _latin(text: str, encoding: str) -> bytes:
    """In the place of `_codecs.encode`, by which protocol 2 writes bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError("it holds something else than numbers")
    return text.encode("latin1")


class _Guarded(pickle.Unpickler):
    """Takes dictionaries, texts and numbers from a pickle; any other name in it ends the reading.

    Lists and tuples have no name, so `_dictionary` refuses them by what they hold.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "dtype"):
            return _Numbers
        if name == "scalar" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _scalar
        if (module, name) == ("_codecs", "encode"):
            return _latin
        raise pickle.UnpicklingError(f"it asks for {module}.{name}"[:100] + ", and only texts and "
                                     "numbers are taken from a pickle")


def _unpickled(path: Path) -> Any:
    with open(path, "rb") as file:
        return _Guarded(file).load()
