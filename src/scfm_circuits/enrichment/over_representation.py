"""Over-representation of gene lists in gene-set libraries, for all features at once.

The paper's section "Interpretation pipeline" and Table 4 say GSEA; what the web service it names
computes is over-representation: is the overlap x of a list of n genes with a term of K genes larger
than a random list's, drawn from N background genes? p = P(X >= x), hypergeometric, one-sided, then
Benjamini-Hochberg (BH) per list and library.

Two choices decide the outcome, and a `Rule` states them: the background, and the BH family ("hit":
only terms that share a gene with the list, as Enrichr and gseapy do; "all": every term).

Phases: `prepare_background` fixes library and background; `encode_lists` turns symbols into ids;
`over_representation` tests all lists; `term_table` gives one list's terms in full, `top_terms` the
best terms of every list.
"""

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numba
import numpy as np

from scfm_circuits import InputError
from scfm_circuits.enrichment import kernels
from scfm_circuits.enrichment.background import Background, Encoded, Family
from scfm_circuits.enrichment.gene_sets import GeneSets
from scfm_circuits.enrichment.significance import FloatArray, IntArray
from scfm_circuits.enrichment.terms import checked_lists, impossible_list


class OverRepresentation(NamedTuple):
    """Result of each list, arrays of shape (n_lists,). Lists without a hit stay, with p = q = 1."""

    n_genes: IntArray
    """Distinct genes of the list that count as drawn (within the background, if it is a set)."""
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
        threads: by default as many as there are cores, or NUMBA_NUM_THREADS.

    Raises:
        InputError: a background that cannot hold a list, or as `prepare_background` and
            `encode_lists`.
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha is {alpha}; use a level between 0 and 1, such as 0.05.")
    encoded, universe = checked_lists(lists, library, background, family)
    n = encoded.n_query.size
    result = OverRepresentation(encoded.n_query, np.zeros(n, np.int64), np.zeros(n, np.int64),
                                np.ones(n), np.ones(n), np.full(n, -1, np.int64))
    setting, terms = universe.setting(family, alpha), universe.term_index
    available = threads or numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    n_threads = max(1, min(available, n // 64))
    # Dealt out by length, so that each thread has its share of the long ones.
    by_length = np.argsort(encoded.n_query, kind="stable")

    def work(share: int) -> None:
        kernels.score_lists(by_length[share::n_threads].copy(), encoded, terms, setting,
                            kernels.scratch(terms), result)

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(work, range(n_threads)))
    if np.isnan(result.min_p).any():
        raise impossible_list(int(np.isnan(result.min_p).argmax()), universe)
    return result
