"""The terms of gene lists in full: all terms of one list, the best of many, one term for many.

Where `over_representation` keeps a summary of each list, these keep terms. All three
read the same result of a list (`_scored`), so they cannot disagree.
"""

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from scfm_circuits import InputError
from scfm_circuits.enrichment import kernels
from scfm_circuits.enrichment.background import (
    Background,
    Encoded,
    Family,
    encode_lists,
    prepare_background,
)
from scfm_circuits.enrichment.gene_sets import GeneSets
from scfm_circuits.enrichment.significance import FloatArray, IntArray

Odds = Literal["gseapy", "enrichr"]


class _Hits(NamedTuple):
    """The terms hit by a list, smallest p first, ties in the library's order; (n_hit,) arrays."""

    terms: IntArray
    overlap: IntArray
    size: IntArray
    """Term size within the background."""
    n: IntArray
    """Length of the list, the same for all its terms."""
    log_p: FloatArray
    p: FloatArray
    q: FloatArray


def term_table(
    genes: Collection[str],
    library: GeneSets,
    *,
    background: int | Collection[str] | Background | None,
    family: Family = "hit",
    odds: Odds = "gseapy",
) -> pd.DataFrame:
    """All terms hit by one list, sorted by p (ties in the library's order).

    Columns: Term, Overlap ("2/96"), n_overlap, term_size (within the background), P-value, Adjusted
    P-value, Odds Ratio, Combined Score (-ln p times odds ratio), Genes (";"-joined, in the order of
    the query).

    Args:
        genes: symbols of the list, in the order wanted in the Genes column.
        library: the gene sets.
        background: see `prepare_background`.
        family: BH over terms "hit" by the list, or over "all".
        odds: "gseapy" adds 0.5 to each cell of the 2 x 2 table (gseapy >= 1.1.1); "enrichr" is the
            server's x d / max(b c, 1), recovered from its published outputs.

    Raises:
        InputError: as `over_representation`.
    """
    table = top_terms([genes], library, background=background, family=family, odds=odds, k=None)
    return table.drop(columns=["list", "rank"])


def top_terms(
    lists: Sequence[Collection[str]] | Encoded,
    library: GeneSets,
    *,
    background: int | Collection[str] | Background | None,
    family: Family,
    odds: Odds,
    k: int | None = 5,
) -> pd.DataFrame:
    """The k terms of smallest p of every list: `term_table(...).head(k)` of each, but fast.

    Columns: list (its position), rank (from 1), then those of `term_table`. A list without a hit
    has no row. Genes are in the order of the query, or of the ids if the lists are encoded.

    Args:
        lists: gene symbols per list, or lists encoded with the same background.
        library, background, family, odds: see `term_table`.
        k: rows per list at most; None for every term hit.

    Raises:
        InputError: k below 1, or as `over_representation`.
    """
    if odds not in ("gseapy", "enrichr"):
        raise InputError(f"The odds ratio is {odds!r}; use 'gseapy' or 'enrichr'.")
    if k is not None and k < 1:
        raise InputError(f"The number of terms per list is {k}; use at least 1.")
    encoded, universe = checked_lists(lists, library, background, family)
    found = [_scored(encoded, i, universe, family, k) for i in range(encoded.n_query.size)]
    table = _columns(found, universe, odds)
    table["Genes"] = [_shared(_genes(encoded, i), term, library)
                      for i, hits in enumerate(found) for term in hits.terms]
    rows = np.array([hits.terms.size for hits in found], dtype=np.int64)
    table.insert(0, "list", np.repeat(np.arange(rows.size), rows))
    table.insert(1, "rank", np.arange(len(table)) - np.repeat(np.cumsum(rows) - rows, rows) + 1)
    return table


def term_fdr(
    lists: Sequence[Collection[str]] | Encoded,
    library: GeneSets,
    term: str,
    *,
    background: int | Collection[str] | Background | None,
    family: Family,
) -> FloatArray:
    """BH-adjusted p of one named term for every list, (n_lists,); 1 for a list that misses it.

    Args:
        lists: gene symbols per list, or lists encoded with the same background.
        term: name of the term, as the library has it.
        library, background, family: see `term_table`.

    Raises:
        InputError: the library has no such term, or as `over_representation`.
    """
    if term not in library.terms:
        raise InputError(
            f"{library.name} has no term {term[:80]!r}; give a term's name as the library has it."
        )
    wanted = library.terms.index(term)
    encoded, universe = checked_lists(lists, library, background, family)
    q = np.ones(encoded.n_query.size)
    for i in range(q.size):
        hits = _scored(encoded, i, universe, family)
        q[i] = hits.q[hits.terms == wanted].min(initial=1.0)
    return q


def checked_lists(
    lists: Sequence[Collection[str]] | Encoded,
    library: GeneSets,
    background: int | Collection[str] | Background | None,
    family: Family,
) -> tuple[Encoded, Background]:
    """The lists encoded, and their background, after the checks that every test needs.

    Raises:
        InputError: an unknown family, lists of another background, a list longer than the
            background, or as `prepare_background` and `encode_lists`.
    """
    if family not in ("hit", "all"):
        raise InputError(f"The BH family is {family!r}; use 'hit' or 'all'.")
    universe = prepare_background(library, background)
    encoded = lists if isinstance(lists, Encoded) else encode_lists(lists, library, universe)
    if isinstance(lists, Encoded) and not universe.known[encoded.ids].all():
        raise InputError(
            f"The lists were encoded with another background than the {universe.total:,} genes "
            "given here; encode them again."
        )
    longest = int(encoded.n_query.max(initial=0))
    if longest > universe.total:
        raise InputError(
            f"A gene list has {longest:,} genes, more than the background's {universe.total:,}; "
            "give the number of genes that the lists could have been drawn from."
        )
    return encoded, universe


def impossible_list(i: int, universe: Background) -> InputError:
    """The error for list `i`, which with one of its terms has more genes than the background."""
    return InputError(
        f"The background of {universe.total:,} genes is too small: list {i} and one of its "
        f"terms in {universe.library.name} have more distinct genes than that; give the number of "
        "genes that the lists could have been drawn from."
    )


def _genes(encoded: Encoded, i: int) -> IntArray:
    return encoded.ids[encoded.indptr[i] : encoded.indptr[i + 1]]


def _scored(
    encoded: Encoded, i: int, universe: Background, family: Family, k: int | None = None
) -> _Hits:
    """The k best of the terms hit by list `i`; all if None."""
    genes, indptr = _genes(encoded, i), universe.gene_indptr
    of_genes = [universe.gene_terms[a:b] for a, b in zip(
        indptr[genes].tolist(), indptr[genes + 1].tolist(), strict=True)]
    counts = np.bincount(np.concatenate([np.zeros(0, np.int64), *of_genes]),
                         minlength=universe.sizes.size)
    terms = np.flatnonzero(counts)
    overlap = counts[terms]
    size, n = universe.sizes[terms], int(encoded.n_query[i])
    log_p = kernels.log_upper_tails(overlap, size, n, universe.total, *universe.log_factorials)
    if np.isnan(log_p).any():
        raise impossible_list(i, universe)
    p = np.exp(log_p)
    order = np.argsort(p, kind="stable")
    q = _adjusted(p[order], universe.n_terms if family == "all" else terms.size)
    order = order[:k]
    columns = (terms[order], overlap[order], size[order], np.full(order.size, n), log_p[order])
    return _Hits(*columns, p[order], q[:k])


def _adjusted(ascending: FloatArray, n_tests: int) -> FloatArray:
    """Benjamini-Hochberg over these sorted p and as many of 1 as make `n_tests`.

    scipy's false_discovery_control would sort once more, which is much of the time of a short list.
    """
    scaled = ascending * (n_tests / np.arange(1, ascending.size + 1))
    return np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)


def _shared(genes: IntArray, term: int, library: GeneSets) -> str:
    """The symbols of those of the genes that are in a term, in the list's order."""
    members = library.term_genes[library.term_indptr[term] : library.term_indptr[term + 1]]
    return ";".join(library.genes[gene] for gene in genes[np.isin(genes, members)])


def _columns(found: Sequence[_Hits], universe: Background, odds: Odds) -> pd.DataFrame:
    """The columns of `term_table` but the genes, list after list."""
    none = np.zeros(0, dtype=np.int64)
    joined = [np.concatenate(parts) for parts in zip(*found, strict=True)] if found else [none] * 7
    terms, x, size, n, log_p, p, q = joined
    ratio = _odds_ratio(x, size, n, universe.total, odds)
    return pd.DataFrame({
        "Term": [universe.library.terms[i] for i in terms],
        "Overlap": [f"{a}/{b}" for a, b in zip(x, size, strict=True)],
        "n_overlap": x,
        "term_size": size,
        "P-value": p,
        "Adjusted P-value": q,
        "Odds Ratio": ratio,
        "Combined Score": -log_p * ratio,
    })


def _odds_ratio(x: IntArray, size: IntArray, n: IntArray, total: int, odds: Odds) -> FloatArray:
    """Odds ratio of the 2 x 2 table [[x, c], [b, d]] as gseapy or the Enrichr server has it."""
    b, c, d = size - x, n - x, total - size - n + x
    if odds == "gseapy":
        return (x + 0.5) * (d + 0.5) / ((b + 0.5) * (c + 0.5))
    return x * d / np.maximum(b * c, 1)
