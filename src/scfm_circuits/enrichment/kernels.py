"""Compiled inner loops of over-representation analysis.

How p-values are computed: the one-sided hypergeometric tail P(X >= x) depends only on the triple
(overlap x, term size K, list length n) for a background of N genes. Its first summand comes from a
table of log-factorials kept as integers (fixed point), so the large terms log N!, log (N-K)!, ...
cancel exactly; the other summands follow by their ratio. The smaller of the two tails is summed.

How many lists are tested at once (`score_lists`, and `count_lists` for nulls), phases per list:
1. count overlaps by walking each gene's terms, remembering the terms hit;
2. put each hit term into its cell, one per (overlap, term size): all terms of a cell share a p,
   which is computed once and kept while the list length stays the same;
3. Benjamini-Hochberg over the sorted cells instead of over all terms, or (nulls) by counting alone.

The kernels release the GIL; `over_representation` runs them on several threads, each with its
own share of the lists, so results do not depend on the number of threads.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scfm_circuits.common.compiled import compiled

_FRACTION_BITS = 62


class TermIndex(NamedTuple):
    """The terms of each gene, and the size of each term."""

    gene_indptr: NDArray[np.integer[Any]]
    """Where each gene's terms start in `gene_terms`, (n_genes + 1,)."""
    gene_terms: NDArray[np.integer[Any]]
    """Term ids, gene by gene."""
    size_class: NDArray[np.integer[Any]]
    """Rank of each term's size among the distinct sizes, (n_terms,)."""
    class_size: NDArray[np.integer[Any]]
    """The distinct sizes K, ascending, (n_classes,)."""


class Scratch(NamedTuple):
    """Working arrays of one thread; overlaps and members are back at zero between lists."""

    hit: NDArray[np.int32]
    """Terms hit by the list; one place more than there are terms."""
    overlap: NDArray[np.int32]
    """Overlap of each term with the list, (n_terms,)."""
    cell: NDArray[np.int32]
    """Cell of each term in `hit`, overlap * n_classes + size class, (n_terms,)."""
    p: NDArray[np.float64]
    """P-value of each cell, (n_cells,). Most terms have overlaps of 1 to 3, so the cells in use lie
    side by side."""
    length: NDArray[np.int32]
    """List length that `p` was computed for, 0 for none, (n_cells,)."""
    members: NDArray[np.int32]
    """Terms of the list in each cell, (n_cells,)."""


def scratch(terms: TermIndex) -> Scratch:
    """Working arrays for one call of `score_lists` or `count_lists`."""
    n_terms, n_classes = terms.size_class.size, terms.class_size.size
    n_cells = (int(terms.class_size[-1]) + 1) * n_classes
    return Scratch(
        hit=np.empty(n_terms + 1, np.int32),
        overlap=np.zeros(n_terms, np.int32),
        cell=np.empty(n_terms, np.int32),
        p=np.empty(n_cells, np.float64),
        length=np.zeros(n_cells, np.int32),
        members=np.zeros(n_cells, np.int32),
    )


class Setting(NamedTuple):
    """What all lists of a call share."""

    total: int
    """Background genes N."""
    table: NDArray[np.int64]
    """Log-factorials up to N, see `log_factorial_table`."""
    unit: float
    """Value of one unit of `table`."""
    n_tests: int
    """Number of tests for Benjamini-Hochberg; 0 for the number of terms hit."""
    alpha: float
    """Level below which q counts as significant."""


def log_factorial_table(n_max: int) -> tuple[NDArray[np.int64], float]:
    """Natural log of k! for k = 0..n_max as fixed-point integers, and the value of one unit.

    The unit is chosen so that any hypergeometric log-probability fits into 64 bits. The sums may
    wrap around on the way, which is harmless: integer arithmetic is exact modulo 2**64.
    """
    # No hypergeometric probability is below 1 / binom(N, N/2) > 2**-N.
    integer_bits = int(max(n_max, 1) * math.log(2.0)).bit_length()
    shift = min(_FRACTION_BITS - integer_bits, 52)
    logs = np.log(np.arange(1, n_max + 1, dtype=np.float64))
    table = np.zeros(n_max + 1, dtype=np.int64)
    np.cumsum(np.rint(np.ldexp(logs, shift)).astype(np.int64), out=table[1:])
    return table, 2.0**-shift


@compiled
def _log_pmf(x, size, n, total, table, unit):  # type: ignore[no-untyped-def]
    """Log of the hypergeometric probability of exactly x hits."""
    return unit * (
        (table[size] - table[x] - table[size - x])
        + (table[total - size] - table[n - x] - table[total - size - n + x])
        - (table[total] - table[n] - table[total - n])
    )


@compiled
def log_upper_tail(x, size, n, total, table, unit):  # type: ignore[no-untyped-def]
    """Log of P(X >= x) for n draws from `total` genes of which `size` are in the term.

    NaN where such an overlap is impossible (a background smaller than term and list together).
    """
    low = max(0, n + size - total)
    high = min(n, size)
    if x < low or x > high:
        return math.nan
    if x == low:
        return 0.0
    # float: the products below overflow no integer type whatever the background
    mean = float(n) * size / total
    rest = total - size - n
    term = 1.0
    terms = 1.0
    if x > mean:
        for k in range(x, high):
            term *= (float(size - k) * (n - k)) / (float(k + 1) * (rest + k + 1))
            terms += term
            if term < 1e-17 * terms:
                break
        return min(0.0, _log_pmf(x, size, n, total, table, unit) + math.log(terms))
    for k in range(x - 1, low, -1):
        term *= (float(k) * (rest + k)) / (float(size - k + 1) * (n - k + 1))
        terms += term
        if term < 1e-17 * terms:
            break
    return math.log1p(-math.exp(_log_pmf(x - 1, size, n, total, table, unit)) * terms)


@compiled
def log_upper_tails(overlaps, sizes, n, total, table, unit):  # type: ignore[no-untyped-def]
    """`log_upper_tail` of one list for arrays of overlaps and term sizes."""
    logs = np.empty(overlaps.size)
    for i in range(overlaps.size):
        logs[i] = log_upper_tail(overlaps[i], sizes[i], n, total, table, unit)
    return logs


@compiled
def _count_overlaps(genes, terms, work):  # type: ignore[no-untyped-def]
    """Phase 1: add each gene to its terms' overlaps; returns how many terms were hit."""
    hits = 0
    for gene in genes:
        for term in terms.gene_terms[terms.gene_indptr[gene] : terms.gene_indptr[gene + 1]]:
            # Each term is written to the next free place, but only a new one takes that place: a
            # known one is written over. An `if` would be faster to read and slower to run, as the
            # processor cannot guess it. Behind the last term there is a place for such a one.
            work.hit[hits] = term
            hits += work.overlap[term] == 0
            work.overlap[term] += 1
    return hits


@compiled
def _find_cells(genes, n, terms, setting, work):  # type: ignore[no-untyped-def]
    """Phases 1 and 2 of a list of length n: the hit terms and their cells; returns their number."""
    hits = _count_overlaps(genes, terms, work)
    n_classes = terms.class_size.size
    for i in range(hits):
        term = work.hit[i]
        x, size_class = work.overlap[term], terms.size_class[term]
        cell = x * n_classes + size_class
        work.overlap[term] = 0
        work.cell[i] = cell
        if work.length[cell] != n:
            log_p = log_upper_tail(x, terms.class_size[size_class], n, setting.total,
                                   setting.table, setting.unit)
            work.p[cell] = math.exp(log_p)
            work.length[cell] = n
    return hits


@compiled
def _sorted_cells(hits, work):  # type: ignore[no-untyped-def]
    """The cells in use, by p, and how many terms each has."""
    last = 0
    for cell in work.cell[:hits]:
        work.members[cell] += 1
        last = max(last, cell)
    used = np.flatnonzero(work.members[: last + 1])
    # Of one overlap p ascends with size, so these are a few sorted runs: quick work for merging.
    cells = used[np.argsort(work.p[used], kind="mergesort")]
    members = work.members[cells]
    work.members[used] = 0
    return cells, members


@compiled
def _adjusted(p, members, n_tests, alpha):  # type: ignore[no-untyped-def]
    """Phase 3, Benjamini-Hochberg: smallest q, and number of terms with q < alpha.

    All terms of a cell share its p, hence the last rank of their tie.
    """
    smallest = 1.0
    significant = 0
    rank = 0
    for i in range(p.size):
        rank += members[i]
        q = p[i] * n_tests / rank
        smallest = min(smallest, q)
        if q < alpha:
            significant = rank
    return smallest, significant


@compiled
def score_lists(order, lists, terms, setting, work, result):  # type: ignore[no-untyped-def]
    """Test the lists whose positions `order` holds (best sorted by length), filling `result`.

    `lists` has `indptr`, `ids` (unique within a list) and `n_query`; `result` has arrays of shape
    (n_lists,). `min_p` becomes NaN for a list that cannot have come from `setting.total` genes.
    """
    for i in order:
        genes = lists.ids[lists.indptr[i] : lists.indptr[i + 1]]
        hits = _find_cells(genes, lists.n_query[i], terms, setting, work)
        result.n_hit[i] = hits
        if hits == 0:
            continue
        cells, members = _sorted_cells(hits, work)
        p = work.p[cells]
        result.min_p[i] = p[0]
        if np.isnan(p).any():
            result.min_p[i] = math.nan
            continue
        # The first in the library's order of those that tie.
        best = work.overlap.size
        for k in range(hits):
            if work.p[work.cell[k]] == p[0]:
                best = min(best, work.hit[k])
        result.best_term[i] = best
        n_tests = setting.n_tests or hits
        result.min_q[i], result.n_significant[i] = _adjusted(p, members, n_tests, setting.alpha)


@compiled
def _count_significant(candidates, n_tests, alpha):  # type: ignore[no-untyped-def]
    """Benjamini-Hochberg without sorting: number of terms with q < alpha.

    The largest r with r terms at p * n_tests / r < alpha is the fixed point that is reached from
    above by counting the terms below the line of the last count.
    """
    significant = candidates.size
    while significant > 0:
        below = 0
        for p in candidates:
            below += p * n_tests / significant < alpha
        if below == significant:
            break
        significant = below
    return significant


@compiled
def count_lists(order, lists, terms, setting, work, min_p, n_significant):  # type: ignore[no-untyped-def]
    """`score_lists` for nulls: only each list's smallest p and number of significant terms.

    Nothing is sorted: a term can only be significant if it is below the line of all terms hit, and
    few are.
    """
    candidates = np.empty(work.hit.size)
    for i in order:
        genes = lists.ids[lists.indptr[i] : lists.indptr[i + 1]]
        hits = _find_cells(genes, lists.n_query[i], terms, setting, work)
        n_tests = setting.n_tests or hits
        smallest, kept, possible = 1.0, 0, True
        for cell in work.cell[:hits]:
            p = work.p[cell]
            possible = possible and not math.isnan(p)
            smallest = min(smallest, p)
            candidates[kept] = p
            kept += p * n_tests / hits < setting.alpha
        min_p[i] = smallest if possible else math.nan
        n_significant[i] = _count_significant(candidates[:kept], n_tests, setting.alpha)


@compiled
def compact_lists(indptr, symbols, counts, gene, ids, n_query):  # type: ignore[no-untyped-def]
    """Drop repeats within each list and translate symbol ids to the library's gene ids.

    `counts` says which symbols count as drawn, `gene` gives their gene id or -1. Fills `ids` (from
    its start) and `n_query`; returns the new indptr.
    """
    seen = np.full(counts.size, -1, np.int64)
    starts = np.zeros(indptr.size, np.int64)
    written = 0
    for i in range(indptr.size - 1):
        for symbol in symbols[indptr[i] : indptr[i + 1]]:
            if seen[symbol] == i or not counts[symbol]:
                continue
            seen[symbol] = i
            n_query[i] += 1
            if gene[symbol] >= 0:
                ids[written] = gene[symbol]
                written += 1
        starts[i + 1] = written
    return starts
