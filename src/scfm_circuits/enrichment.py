"""Over-representation of gene lists in gene-set libraries, for all features at once.

The paper's section "Interpretation pipeline" and Table 4 say GSEA; what the web service it names
computes is over-representation: is the overlap x of a list of n genes with a term of K genes larger
than a random list's, drawn from N background genes? p = P(X >= x), hypergeometric, one-sided, then
Benjamini-Hochberg (BH) per list and library.

Two choices decide the outcome and are stated with every result: the background, and the BH family
("hit": only terms that share a gene with the list, as Enrichr and gseapy do; "all": every term).

Phases: `prepare_background` fixes library, background and size limits; `encode_lists` turns symbols
into ids; `over_representation` tests all lists; `term_table` gives one list's terms in full.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numba
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm_circuits import InputError, enrichment_kernels
from scfm_circuits.enrichment_inputs import (
    Background,
    Encoded,
    Family,
    encode_ids,
    encode_lists,
    prepare_background,
)
from scfm_circuits.enrichment_nulls import (
    Ragged,
    benjamini_hochberg,
    empirical_p,
    frequency_matched_null,
    ragged,
    symbols_of,
    token_preserving_null,
    uniform_null,
    wilson_interval,
)
from scfm_circuits.gene_sets import GeneSets, gene_sets_from_dict, load_library, read_gmt

__all__ = [
    "RULES",
    "Background",
    "Encoded",
    "GeneSets",
    "OverRepresentation",
    "Ragged",
    "Rule",
    "benjamini_hochberg",
    "empirical_p",
    "encode_ids",
    "encode_lists",
    "frequency_matched_null",
    "gene_sets_from_dict",
    "load_library",
    "over_representation",
    "prepare_background",
    "ragged",
    "read_gmt",
    "symbols_of",
    "term_table",
    "token_preserving_null",
    "uniform_null",
    "wilson_interval",
]

IntArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.floating[Any]]
Odds = Literal["gseapy", "enrichr"]

_TABLE_COLUMNS = (
    "Term",
    "Overlap",
    "n_overlap",
    "term_size",
    "P-value",
    "Adjusted P-value",
    "Odds Ratio",
    "Combined Score",
    "Genes",
)


@dataclass(frozen=True)
class Rule:
    """A named way to test: background, BH family and odds ratio."""

    name: str
    background: int | Literal["corpus", "library"]
    """A number of genes, the genes of the corpus, or the union of the library."""
    family: Family
    """BH over the terms hit by the list, or over all terms of the library."""
    odds: Odds
    """gseapy's odds ratio (0.5 added to each cell) or the Enrichr server's."""
    statement: str
    """One sentence for every table and caption."""

    def background_for(
        self, corpus_genes: Collection[str] | None = None
    ) -> int | Collection[str] | None:
        """The `background` argument that this rule means, given the symbols of the corpus.

        Raises:
            InputError: the rule needs the corpus's genes and got none.
        """
        if self.background == "library":
            return None
        if self.background != "corpus":
            return self.background
        if not corpus_genes:
            raise InputError(
                f"The rule {self.name!r} needs the genes of the corpus as background; pass them."
            )
        return corpus_genes


RULES: Mapping[str, Rule] = {
    "enrichr": Rule(
        "enrichr", 20_000, "hit", "enrichr",
        "Hypergeometric test against a background of 20,000 genes, Benjamini-Hochberg over the "
        "terms hit by the list, as the Enrichr server does (unknown symbols count as drawn).",
    ),
    "corpus": Rule(
        "corpus", "corpus", "all", "gseapy",
        "Hypergeometric test against the genes that occur in the corpus, Benjamini-Hochberg over "
        "all terms of the library that contain one of them.",
    ),
    "gseapy": Rule(
        "gseapy", "library", "hit", "gseapy",
        "Hypergeometric test against all genes of the library, Benjamini-Hochberg over the terms "
        "hit by the list, as gseapy.enrich does by default.",
    ),
}  # fmt: skip


class OverRepresentation(NamedTuple):
    """Result of each list, arrays of shape (n_lists,). Lists without a hit stay, with p = q = 1."""

    n_genes: IntArray
    """Distinct genes of the list that count as drawn (within the background, if it is a set)."""
    n_matched: IntArray
    """Of these, genes known to the library; `n_genes - n_matched` symbols matched nothing."""
    n_hit: IntArray
    """Terms that share at least one gene with the list."""
    n_significant: IntArray
    """Terms with q < alpha."""
    min_p: FloatArray
    """Smallest p of the list."""
    min_q: FloatArray
    """Smallest BH-adjusted p of the list."""
    best_term: IntArray
    """Index into `library.terms` of the smallest p, the first of a tie; -1 without a hit."""


def over_representation(
    lists: Sequence[Collection[str]] | Encoded,
    library: GeneSets,
    *,
    background: int | Collection[str] | Background | None,
    family: Family = "hit",
    alpha: float = 0.05,
    engine: Literal["fused", "plain"] = "fused",
    threads: int | None = None,
) -> OverRepresentation:
    """Test every list against every term: one-sided hypergeometric, BH per list.

    Memory beyond the encoded lists and the result does not grow with their number. The first call
    of a process takes some seconds to compile unless the machine code is already on disk.

    Args:
        lists: gene symbols per list (any order), or lists encoded with the same background.
        library: the gene sets.
        background: see `prepare_background`.
        family: BH over terms "hit" by the list, or over "all" terms that have a background gene.
        alpha: level below which q counts as significant.
        engine: "fused" (compiled), or "plain" (numpy and scipy, slow, the same numbers).
        threads: threads of the fused engine; by default all cores, or NUMBA_NUM_THREADS.

    Raises:
        InputError: a background that cannot hold a list, or as `prepare_background` and
            `encode_lists`.
    """
    if family not in ("hit", "all"):
        raise InputError(f"The BH family is {family!r}; use 'hit' or 'all'.")
    if not 0 < alpha < 1:
        raise InputError(f"alpha is {alpha}; use a level between 0 and 1, such as 0.05.")
    if engine not in ("fused", "plain"):
        raise InputError(f"The engine is {engine!r}; use 'fused' or 'plain'.")
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
    run = {"fused": _fused, "plain": _plain}[engine]
    result = run(encoded, universe, universe.n_terms if family == "all" else 0, alpha, threads)
    if np.isnan(result.min_p).any():
        i = int(np.isnan(result.min_p).argmax())
        raise InputError(
            f"The background of {universe.total:,} genes is too small: list {i} and one of its "
            f"terms in {library.name} have more distinct genes than that; give the number of genes "
            "that the lists could have been drawn from."
        )
    return result


def _empty_result(encoded: Encoded) -> OverRepresentation:
    n = encoded.n_query.size
    matched = np.diff(encoded.indptr)
    return OverRepresentation(
        encoded.n_query, matched, np.zeros(n, np.int64), np.zeros(n, np.int64),
        np.ones(n), np.ones(n), np.full(n, -1, np.int64),
    )  # fmt: skip


def _fused(
    encoded: Encoded, universe: Background, n_tests: int, alpha: float, threads: int | None
) -> OverRepresentation:
    """The compiled engine, lists dealt out over threads by length so that each has its share."""
    result = _empty_result(encoded)
    available = threads or numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    n_threads = max(1, min(available, encoded.n_query.size // 64))
    by_length = np.argsort(encoded.n_query, kind="stable")
    terms, (table, unit) = universe.term_index, universe.log_factorials
    setting = enrichment_kernels.Setting(universe.total, table, unit, n_tests, alpha)

    def work(share: int) -> None:
        enrichment_kernels.score_lists(
            by_length[share::n_threads].copy(), encoded, terms, setting,
            enrichment_kernels.scratch(terms), result,
        )  # fmt: skip

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(work, range(n_threads)))
    return result


def _plain(
    encoded: Encoded, universe: Background, n_tests: int, alpha: float, threads: int | None
) -> OverRepresentation:
    """The same numbers by numpy and scipy, one list at a time."""
    result = _empty_result(encoded)
    for i, n in enumerate(encoded.n_query):
        genes = encoded.ids[encoded.indptr[i] : encoded.indptr[i + 1]]
        hit, overlaps = _overlaps(genes, universe)
        if not hit.size:
            continue
        p = _scipy_tails(overlaps, universe.sizes[hit], int(n), universe.total)
        padding = np.ones(max(n_tests - hit.size, 0))
        q = benjamini_hochberg(np.concatenate([p, padding])) if not np.isnan(p).any() else p
        result.n_hit[i] = hit.size
        result.n_significant[i] = np.count_nonzero(q < alpha)
        result.min_p[i], result.min_q[i] = p.min(), q.min()
        result.best_term[i] = hit[p.argmin()]
    return result


def _overlaps(genes: IntArray, universe: Background) -> tuple[IntArray, IntArray]:
    """Terms hit by one list of gene ids, and the overlap with each."""
    indptr = universe.gene_indptr
    parts = [universe.gene_terms[indptr[gene] : indptr[gene + 1]] for gene in genes]
    terms = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    overlaps = np.bincount(terms, minlength=universe.sizes.size)
    hit = np.flatnonzero(overlaps)
    return hit, overlaps[hit]


def _scipy_tails(overlaps: IntArray, sizes: IntArray, n: int, total: int) -> FloatArray:
    from scipy.stats import hypergeom

    p = hypergeom.sf(overlaps - 1, total, sizes, n)
    return np.where(overlaps < n + sizes - total, np.nan, p)


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
    the query). `attrs["statement"]` states background and BH family, `attrs["unmatched"]` the
    symbols the library does not know.

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
    if odds not in ("gseapy", "enrichr"):
        raise InputError(f"The odds ratio is {odds!r}; use 'gseapy' or 'enrichr'.")
    universe = prepare_background(library, background)
    encoded = encode_lists([genes], library, universe)
    # Checks the list against the background before anything is divided by it.
    over_representation(encoded, library, background=universe, family=family)
    n, total = int(encoded.n_query[0]), universe.total
    hit, x = _overlaps(encoded.ids, universe)
    size = universe.sizes[hit]
    log_p = enrichment_kernels.log_upper_tails(x, size, n, total, *universe.log_factorials)
    p = np.exp(log_p)
    padding = np.ones(universe.n_terms - hit.size if family == "all" else 0)
    ratio = _odds_ratio(x, size, n, total, odds)
    table = pd.DataFrame(
        dict(
            zip(
                _TABLE_COLUMNS,
                (
                    [library.terms[i] for i in hit],
                    [f"{a}/{b}" for a, b in zip(x, size, strict=True)],
                    x, size, p,
                    benjamini_hochberg(np.concatenate([p, padding]))[: hit.size],
                    ratio,
                    -log_p * ratio,
                    _hit_genes(encoded.ids, hit, universe),
                ),
                strict=True,
            )
        )
    )  # fmt: skip
    table = table.sort_values("P-value", kind="stable", ignore_index=True)
    known = library.index
    table.attrs["statement"] = universe.statement(family)
    table.attrs["unmatched"] = [symbol for symbol in genes if symbol.strip().upper() not in known]
    return table


def _odds_ratio(x: IntArray, size: IntArray, n: int, total: int, odds: Odds) -> FloatArray:
    """Odds ratio of the 2 x 2 table [[x, c], [b, d]] as gseapy or the Enrichr server has it."""
    b, c, d = size - x, n - x, total - size - n + x
    if odds == "gseapy":
        return (x + 0.5) * (d + 0.5) / ((b + 0.5) * (c + 0.5))
    return x * d / np.maximum(b * c, 1)


def _hit_genes(ids: IntArray, hit: IntArray, universe: Background) -> list[str]:
    """The list's genes in each term hit, joined by ";" in the order of the list."""
    members: dict[int, list[str]] = {int(term): [] for term in hit}
    for gene in ids:
        start, stop = universe.gene_indptr[gene], universe.gene_indptr[gene + 1]
        for term in universe.gene_terms[start:stop]:
            members[int(term)].append(universe.library.genes[gene])
    return [";".join(symbols) for symbols in members.values()]
