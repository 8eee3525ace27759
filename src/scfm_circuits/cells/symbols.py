"""Gene symbols of a `var` table: where they are, and what names cannot stand in a sentence.

A gene without a name, or with a space in it, is left out if few are (`MOST_LEFT_OUT`): `""` stands
for it until the columns are joined.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from scfm_circuits import InputError
from scfm_circuits.common.encodings import ENSEMBL
from scfm_circuits.common.labels import listed, normal_label

if TYPE_CHECKING:
    import pandas as pd

SYMBOL_COLUMNS = ("gene_name-new", "feature_name", "gene_symbol", "gene_symbols", "symbol",
                  "symbols", "hgnc_symbol", "gene_name", "gene_names", "gene_short_name", "name",
                  "names")
"""Columns of `var` that are known to hold gene symbols, in any case, the surest first. The first is
the Heart Cell Atlas's own."""

MOST_LEFT_OUT = 0.1
"""Share of the genes, or of the cells, up to which those that cannot be used are left out; of more
the file is refused, as something else must be wrong with it."""
_MONTH = "(JAN|FEB|MAR|APR|MAY|JUN|JUL|AUG|SEP|OCT|NOV|DEC)"
_DATE = re.compile(rf"X?\d{{1,2}}[-.]{_MONTH}(-\d\d(\d\d)?)?|{_MONTH}-\d\d"
                   r"|\d{4}-\d\d-\d\d( 00:00:00)?|\d{1,2}/\d{1,2}/\d\d(\d\d)?|\d\.\d+E\+\d\d")
"""What spreadsheets make of MARCHF1, SEPTIN2 or 2310009E13RIK, and R of that (X1.MAR)."""
_POINTED = re.compile(r"(HLA|MT|NKX\d|KRTAP\d+)\.[A-Z0-9.]+$")
"""What R makes of symbols of families in which every one has a hyphen."""
_VERSIONED = re.compile(r"([A-Z]{1,3}\d{5,9}|[A-Z0-9]+\.[A-Z]?\d+[A-Z]\d+)$")
"""What a version follows: an accession (AC012345) or the address of a clone (RP11.291B21)."""


def symbol_columns(variables: "pd.DataFrame") -> list[str]:
    """The columns of a var table that are known to hold gene symbols, the surest first."""
    return [column for name in SYMBOL_COLUMNS for column in variables.columns
            if isinstance(column, str) and column.lower() == name]


def possible_symbols(variables: "pd.DataFrame", column: str | None,
                     most_out: float = MOST_LEFT_OUT) -> list[str]:
    """A column's entries, or for None the index's, in capitals if they may be gene symbols.

    Those that cannot stand in a sentence are not among them. Nothing, if they are more than the
    share `most_out`, most are identifiers, or there are too few different ones.
    """
    entries = variables.index.to_series() if column is None else variables[column]
    if entries.dtype.kind in "biufcmM":
        return []
    words = [word for word in map(_word, entries) if word]
    if len(entries) - len(words) > most_out * len(entries):
        return []
    # Something like `biotype` has few values for many genes.
    several = column is None or len(words) < 20 or len(set(words)) > len(words) / 2
    foreign = sum(bool(ENSEMBL.match(word)) or word.isdigit() for word in words)
    return words if several and foreign <= len(words) / 2 else []


def gene_symbols(variables: "pd.DataFrame", column: str | None, where: str, *,
                 or_identifiers: bool = False) -> tuple[list[str], list[str]]:
    """Upper-case symbols of all columns, `""` for a gene that is left out, and decisions.

    or_identifiers: where there are none, Ensembl identifiers are given in their place. InputError
    for identifiers otherwise, and where many genes have no symbol.
    """
    if column is None:
        raw = variables.index.to_series().astype(str)
    elif column in variables.columns:
        raw = variables[column].astype(str)
    else:
        known = listed(variables.columns)
        raise InputError(f"{where} has no var column {column!r} for gene symbols; the columns are "
                         f"{known}; set `symbol_column` in the profile.")
    decisions = [f"Symbols are taken from the var column {normal_label(column)}."] if column else []
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
    symbols = [_word(symbol) for symbol in raw]
    decisions += _left_out(list(raw), symbols, column or "the var index", where) + _warnings(raw)
    if _mostly_ensembl(symbols) and not or_identifiers:
        known = listed(variables.columns)
        raise InputError(f"{where} names its genes by Ensembl identifiers, not symbols; set "
                         f"`symbol_column` in the profile to a var column with symbols "
                         f"(columns: {known}).")
    # An identifier among symbols is a gene without one; its version is not part of its name.
    return [symbol.split(".")[0] if ENSEMBL.match(symbol) else symbol for symbol in symbols
            ], decisions


def _word(entry: object) -> str:
    """An entry in capitals; `""` if it is no name or has a space, which separates genes."""
    word = str(entry).strip().upper()
    return "" if word in ("NAN", "NA", "NONE", "<NA>") or re.search(r"\s", word) else word


def _left_out(raw: list[str], symbols: list[str], source: str, where: str) -> list[str]:
    """A sentence on genes without a symbol, if there are any; InputError if there are many."""
    spaced = [one for one, symbol in zip(raw, symbols, strict=True)
              if not symbol and re.search(r"\s", one.strip())]
    n_out = symbols.count("")
    if not n_out:
        return []
    why = [f"{n_out - len(spaced):,} without a name"] * (n_out > len(spaced))
    why += [f"{len(spaced):,} with a space in it, such as {spaced[0]!r}"] if spaced else []
    if n_out > MOST_LEFT_OUT * len(symbols):
        raise InputError(f"{where} has {n_out:,} of {len(symbols):,} genes without a symbol of one "
                         f"word in {source} ({' and '.join(why)}); fill them or set "
                         "`symbol_column`.")
    return [f"{n_out:,} of {len(symbols):,} genes were left out, as {source} has no symbol of one "
            f"word for them ({' and '.join(why)})."]


def _warnings(raw: Iterable[str]) -> list[str]:
    """Sentences on symbols that are read and will match no gene set, or one of another species."""
    names = [name.strip() for name in raw if not ENSEMBL.match(name.strip())]
    dates = [name for name in names if _DATE.fullmatch(name.upper())]
    found = []
    if dates:
        found.append(f"Warning: {len(dates):,} gene symbols are dates or numbers, such as "
                     f"{dates[0]!r}, which a spreadsheet makes of genes such as MARCHF1 and "
                     "SEPTIN2; no gene set knows them, so restore them in the file from the "
                     "genes' identifiers.")
    # Human symbols have small letters only in `C1orf112`, and some kinds of RNA in their names.
    small = [name for name in names if re.search(r"[a-z]", re.sub(r"(?<=\d)orf(?=\d)", "", name))]
    if len(small) > MOST_LEFT_OUT * len(names):
        found.append(f"Warning: {len(small):,} of {len(names):,} gene symbols have small letters, "
                     f"such as {small[0]!r}, as those of a mouse or another species have; they are "
                     "read in capitals, and of human gene sets only genes of the same name will be "
                     "found, so map them to human genes or give gene sets of the species.")
    return found


def _mostly_ensembl(names: Iterable[str]) -> bool:
    """Whether more than half of the names are Ensembl identifiers."""
    found = [bool(ENSEMBL.match(name)) for name in names]
    return sum(found) > len(found) / 2


def hyphens_missing(symbols: Iterable[str]) -> list[str]:
    """A sentence if symbols of families that have a hyphen (HLA-A, MT-ND1) have a point instead.

    symbols: in capitals.
    """
    found = [symbol for symbol in symbols if _POINTED.match(symbol)]
    return [f"Warning: {len(found):,} gene symbols have a point where gene sets have a hyphen, "
            f"such as {found[0]}, so R wrote them; set `symbol_rule: r_names` in the profile."
            ] if found else []


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

    symbols: of all columns, `""` for one that is left out. join: None, or (n_columns, n_symbols);
    expression times it leaves columns out and adds up those of one symbol.
    """
    kept = [column for column, symbol in enumerate(symbols) if symbol]
    names = [symbols[column] for column in kept]
    unique, inverse, counts = np.unique(names, return_inverse=True, return_counts=True)
    repeated, place, decisions = unique[counts > 1], np.arange(len(names)), []
    if len(repeated) and rule == "error":
        named = ", ".join(repeated[:3])
        raise InputError(f"{where} has {len(repeated):,} gene symbols more than once (such as "
                         f"{named}); set `duplicate_symbols: sum` in the profile to add them up.")
    if len(repeated) and rule == "unique":
        import pandas as pd
        from anndata.utils import make_index_unique

        names = make_index_unique(pd.Index(names)).tolist()
        decisions = [f"{len(repeated):,} repeated symbols were numbered (A, A-1, ...)."]
    elif len(repeated):
        names, place = unique.tolist(), inverse
        decisions = [f"{len(repeated):,} repeated symbols were added up."]
    if len(names) == len(symbols):
        return names, None, decisions
    join = sp.csr_matrix((np.ones(len(kept), np.float32), (kept, place)),
                         shape=(len(symbols), len(names)))
    return names, join, decisions
