"""Gene symbols of a `var` table: where they are, and what names cannot stand in a sentence."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from scfm_circuits import InputError

if TYPE_CHECKING:
    import pandas as pd

ENSEMBL = re.compile(r"^ENS[A-Z]*G\d{6,}", re.IGNORECASE)
"""The beginning of a gene's Ensembl identifier, of any species."""
SYMBOL_COLUMNS = ("gene_name-new", "feature_name", "gene_symbol", "gene_symbols", "symbol",
                  "symbols", "hgnc_symbol", "gene_name", "gene_names", "gene_short_name", "name",
                  "names")
"""Columns of `var` that are known to hold gene symbols, in any case, the surest first. The first is
the Heart Cell Atlas's own."""

_VERSIONED = re.compile(r"([A-Z]{1,3}\d{5,9}|[A-Z0-9]+\.[A-Z]?\d+[A-Z]\d+)$")
"""What a version follows: an accession (AC012345) or the address of a clone (RP11.291B21)."""


def symbol_columns(variables: "pd.DataFrame") -> list[str]:
    """The columns of a var table that are known to hold gene symbols, the surest first."""
    return [column for name in SYMBOL_COLUMNS for column in variables.columns
            if isinstance(column, str) and column.lower() == name]


def possible_symbols(variables: "pd.DataFrame", column: str | None) -> list[str]:
    """A column's entries, or for None the index's, in capitals if they may be gene symbols.

    Otherwise nothing: one is missing or not one word, most are identifiers, or there are too few
    different ones.
    """
    entries = variables.index.to_series() if column is None else variables[column]
    if entries.isna().any() or entries.dtype.kind in "biufcmM":
        return []
    words = [str(entry).strip().upper() for entry in entries]
    if any(word in ("", "NAN", "NONE", "<NA>") or re.search(r"\s", word) for word in words):
        return []
    # Something like `biotype` has few values for many genes.
    several = column is None or len(words) < 20 or len(set(words)) > len(words) / 2
    foreign = sum(bool(ENSEMBL.match(word)) or word.isdigit() for word in words)
    return words if several and foreign <= len(words) / 2 else []


def gene_symbols(variables: "pd.DataFrame", column: str | None, where: str
                 ) -> tuple[list[str], list[str]]:
    """Upper-case symbols of all columns; refuses Ensembl identifiers and empty names."""
    if column is None:
        raw = variables.index.to_series().astype(str)
    elif column in variables.columns:
        raw = variables[column].astype(str)
    else:
        known = ", ".join(map(str, variables.columns)) or "none"
        raise InputError(f"{where} has no var column {column!r} for gene symbols; the columns are "
                         f"{known}; set `symbol_column` in the profile.")
    decisions = [f"Symbols are taken from the var column {column}."] if column else []
    if _mostly_ensembl(raw):
        usable = [name for name in symbol_columns(variables)
                  if not _mostly_ensembl(variables[name].astype(str))]
        if usable:
            # If none is whole, what the first one lacks is told below.
            found = next((name for name in usable if possible_symbols(variables, name)), usable[0])
            decisions = [f"{column or 'The var index'} holds Ensembl identifiers; symbols are "
                         f"taken from the var column {found}."]
            column = found
            raw = variables[column].astype(str)
    symbols = [symbol.strip().upper() for symbol in raw]
    missing = sum(symbol in ("", "NAN", "NONE", "<NA>") for symbol in symbols)
    if missing:
        raise InputError(f"{where} has {missing:,} genes without a symbol in "
                         f"{column or 'the var index'}; fill them or set `symbol_column`.")
    if any(re.search(r"\s", symbol) for symbol in symbols):
        bad = next(symbol for symbol in symbols if re.search(r"\s", symbol))
        raise InputError(f"{where} has a gene symbol with a space in it ({bad!r}); a sentence "
                         "separates genes by spaces, so rename it.")
    if _mostly_ensembl(symbols):
        known = ", ".join(map(str, variables.columns)) or "none"
        raise InputError(f"{where} names its genes by Ensembl identifiers, not symbols; set "
                         f"`symbol_column` in the profile to a var column with symbols "
                         f"(columns: {known}).")
    # An identifier among symbols is a gene without one; its version is not part of its name.
    return [symbol.split(".")[0] if ENSEMBL.match(symbol) else symbol for symbol in symbols
            ], decisions


def _mostly_ensembl(names: Iterable[str]) -> bool:
    """Whether more than half of the names are Ensembl identifiers."""
    found = [bool(ENSEMBL.match(name)) for name in names]
    return sum(found) > len(found) / 2


def hyphens_restored(symbols: list[str]) -> tuple[list[str], list[str]]:
    """Symbols that R wrote with points for hyphens, with hyphens again: (symbols, decisions).

    Each point becomes a hyphen but for one before the version of a clone or accession, and one
    before a number with which R made a symbol unique: the rest has no point and is a symbol too.
    symbols: in capitals. Source: R's `make.names` and `make.unique`.
    """
    known = set(symbols)
    found = []
    for symbol in symbols:
        head, _, tail = symbol.rpartition(".")
        numbered = "." not in head and head in known
        kept = tail.isdigit() and (numbered or _VERSIONED.match(head))
        found.append(f"{head.replace('.', '-')}.{tail}" if kept else symbol.replace(".", "-"))
    n_changed = sum(a != b for a, b in zip(symbols, found, strict=True))
    example = next((f", such as {a} to {b}" for a, b in zip(symbols, found, strict=True)
                    if a != b), "")
    return found, [f"In {n_changed:,} symbols a point that R had put for a hyphen was put back"
                   f"{example}."]


def merge_duplicates(symbols: list[str], rule: str, where: str
                     ) -> tuple[list[str], sp.csr_matrix | None, list[str]]:
    """Repeated symbols refused, numbered, or joined: (symbols, join, decisions).

    join: None, or (n_columns, n_symbols); expression times it adds up columns of one symbol.
    """
    unique, inverse, counts = np.unique(symbols, return_inverse=True, return_counts=True)
    if len(unique) == len(symbols):
        return symbols, None, []
    repeated = unique[counts > 1]
    if rule == "error":
        named = ", ".join(repeated[:3])
        raise InputError(f"{where} has {len(repeated):,} gene symbols more than once (such as "
                         f"{named}); set `duplicate_symbols: sum` in the profile to add them up.")
    if rule == "unique":
        import pandas as pd
        from anndata.utils import make_index_unique

        return (make_index_unique(pd.Index(symbols)).tolist(), None,
                [f"{len(repeated):,} repeated symbols were numbered (A, A-1, ...)."])
    join = sp.csr_matrix((np.ones(len(symbols), np.float32), (np.arange(len(symbols)), inverse)))
    return unique.tolist(), join, [f"{len(repeated):,} repeated symbols were added up."]
