"""Over-representation of gene lists in gene-set libraries, for all features at once.

The paper's section "Interpretation pipeline" and Table 4 say GSEA; what the web service it names
computes is over-representation: is the overlap x of a list of n genes with a term of K genes larger
than a random list's, drawn from N background genes? p = P(X >= x), hypergeometric, one-sided, then
Benjamini-Hochberg (BH) per list and library.

Two choices decide the outcome and are stated with every result: the background, and the BH family
("hit": only terms that share a gene with the list, as Enrichr and gseapy do; "all": every term).

Phases: `prepare_background` fixes library, background and size limits; `encode_lists` turns symbols
into ids; `over_representation` tests all lists; `term_table` gives one list's terms in full,
`top_terms` the best terms of every list.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numba
import numpy as np
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
from scfm_circuits.enrichment_tables import (
    Odds,
    checked_lists,
    impossible_list,
    overlaps,
    term_fdr,
    term_table,
    top_terms,
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
    "term_fdr",
    "term_table",
    "token_preserving_null",
    "top_terms",
    "uniform_null",
    "wilson_interval",
]

IntArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.floating[Any]]


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
    if not 0 < alpha < 1:
        raise InputError(f"alpha is {alpha}; use a level between 0 and 1, such as 0.05.")
    if engine not in ("fused", "plain"):
        raise InputError(f"The engine is {engine!r}; use 'fused' or 'plain'.")
    encoded, universe = checked_lists(lists, library, background, family)
    run = {"fused": _fused, "plain": _plain}[engine]
    result = run(encoded, universe, universe.setting(family, alpha), threads)
    if np.isnan(result.min_p).any():
        raise impossible_list(int(np.isnan(result.min_p).argmax()), universe)
    return result


def _empty_result(encoded: Encoded) -> OverRepresentation:
    n = encoded.n_query.size
    matched = np.diff(encoded.indptr)
    return OverRepresentation(
        encoded.n_query, matched, np.zeros(n, np.int64), np.zeros(n, np.int64),
        np.ones(n), np.ones(n), np.full(n, -1, np.int64),
    )  # fmt: skip


def _fused(
    encoded: Encoded, universe: Background, setting: enrichment_kernels.Setting,
    threads: int | None,
) -> OverRepresentation:
    """The compiled engine, lists dealt out over threads by length so that each has its share."""
    result = _empty_result(encoded)
    available = threads or numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    n_threads = max(1, min(available, encoded.n_query.size // 64))
    by_length = np.argsort(encoded.n_query, kind="stable")
    terms = universe.term_index

    def work(share: int) -> None:
        enrichment_kernels.score_lists(
            by_length[share::n_threads].copy(), encoded, terms, setting,
            enrichment_kernels.scratch(terms), result,
        )  # fmt: skip

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(work, range(n_threads)))
    return result


def _plain(
    encoded: Encoded, universe: Background, setting: enrichment_kernels.Setting,
    threads: int | None,
) -> OverRepresentation:
    """The same numbers by numpy and scipy, one list at a time."""
    result = _empty_result(encoded)
    for i, n in enumerate(encoded.n_query):
        genes = encoded.ids[encoded.indptr[i] : encoded.indptr[i + 1]]
        hit, overlap = overlaps(genes, universe)
        if not hit.size:
            continue
        p = _scipy_tails(overlap, universe.sizes[hit], int(n), universe.total)
        padding = np.ones(max(setting.n_tests - hit.size, 0))
        q = benjamini_hochberg(np.concatenate([p, padding])) if not np.isnan(p).any() else p
        result.n_hit[i] = hit.size
        result.n_significant[i] = np.count_nonzero(q < setting.alpha)
        result.min_p[i], result.min_q[i] = p.min(), q.min()
        result.best_term[i] = hit[p.argmin()]
    return result


def _scipy_tails(overlaps: IntArray, sizes: IntArray, n: int, total: int) -> FloatArray:
    from scipy.stats import hypergeom

    p = hypergeom.sf(overlaps - 1, total, sizes, n)
    return np.where(overlaps < n + sizes - total, np.nan, p)
