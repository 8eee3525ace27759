"""Compiled inner loops of over-representation analysis.

How p-values are computed: the one-sided hypergeometric tail P(X >= x) depends only on the triple
(overlap x, term size K, list length n) for a background of N genes. Its first summand comes from a
table of log-factorials kept as integers (fixed point), so the large terms log N!, log (N-K)!, ...
cancel exactly; the other summands follow by their ratio. The smaller of the two tails is summed.

How many lists are tested at once (`score_lists`), phases per list:
1. count overlaps by walking each gene's terms, remembering the terms touched;
2. group the touched terms into cells, one per (term size, overlap): all terms of a cell share a p;
3. look up or compute each cell's p (kept while the list length stays the same);
4. Benjamini-Hochberg over the sorted cells instead of over all terms.

The kernels release the GIL; `over_representation` runs them on several threads, each with its
own share of the lists, so results do not depend on the number of threads.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scfm_circuits.common.compiled import compiled

_FRACTION_BITS = 62
SORT_BINS = 1024
_BINS_PER_E_FOLD = 64.0


class TermIndex(NamedTuple):
    """The terms of each gene, and the cells of equal p that terms fall into.

    Cells are ordered by overlap, then term size: most terms have overlaps of 1 to 3, so the cells
    in use lie side by side.
    """

    gene_indptr: NDArray[np.integer[Any]]
    """Where each gene's terms start in `gene_terms`, (n_genes + 1,)."""
    gene_terms: NDArray[np.integer[Any]]
    """Term ids, gene by gene."""
    size_class: NDArray[np.integer[Any]]
    """Rank of each term's size among the distinct sizes, (n_terms,)."""
    first_cell: NDArray[np.integer[Any]]
    """A term with overlap x is in cell `first_cell[x] + size_class`, (largest size + 1,)."""
    cell_class: NDArray[np.integer[Any]]
    """Size class of each cell, (n_cells,)."""
    cell_overlap: NDArray[np.integer[Any]]
    """Overlap x of each cell, (n_cells,)."""
    class_size: NDArray[np.integer[Any]]
    """Term size K of each class, (n_classes,)."""
    class_indptr: NDArray[np.integer[Any]]
    """Where each class's terms start in `class_terms`, (n_classes + 1,)."""
    class_terms: NDArray[np.integer[Any]]
    """Term ids class by class, ascending within a class, (n_terms,)."""


class Scratch(NamedTuple):
    """Working arrays of one thread; term and cell counts are back at zero between lists."""

    touched: NDArray[np.int32]
    """Terms hit by the list; one place more than there are terms."""
    overlap: NDArray[np.int32]
    """Overlap of each term with the list, (n_terms,)."""
    cells: NDArray[np.int32]
    """Cells in use; one place more than there are cells."""
    ordered: NDArray[np.int32]
    """The same cells sorted by p."""
    members: NDArray[np.int32]
    """Terms of the list in each cell, (n_cells,)."""
    cell_length: NDArray[np.int32]
    """List length that `cell_p` and `cell_bin` were computed for, (n_cells,)."""
    cell_p: NDArray[np.float64]
    """P-value of each cell, (n_cells,)."""
    cell_bin: NDArray[np.int32]
    """Sorting bin of each cell, ascending with p, (n_cells,)."""
    bin_end: NDArray[np.int32]
    """Where the cells of each bin end, (SORT_BINS,)."""


def scratch(terms: TermIndex) -> Scratch:
    """Working arrays for one call of `score_lists`."""
    n_terms, n_cells = terms.size_class.size, terms.cell_class.size
    return Scratch(
        touched=np.empty(n_terms + 1, np.int32),
        overlap=np.zeros(n_terms, np.int32),
        cells=np.empty(n_cells + 1, np.int32),
        ordered=np.empty(n_cells, np.int32),
        members=np.zeros(n_cells, np.int32),
        cell_length=np.full(n_cells, -1, np.int32),
        cell_p=np.empty(n_cells, np.float64),
        cell_bin=np.empty(n_cells, np.int32),
        bin_end=np.empty(SORT_BINS, np.int32),
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
    """Phase 1: add each gene to its terms' overlaps; returns how many terms were touched."""
    hits = 0
    for gene in genes:
        for term in terms.gene_terms[terms.gene_indptr[gene] : terms.gene_indptr[gene + 1]]:
            # No branch: written always, kept (by moving on) only if the term is new.
            work.touched[hits] = term
            hits += work.overlap[term] == 0
            work.overlap[term] += 1
    return hits


@compiled
def _group_terms(hits, terms, work):  # type: ignore[no-untyped-def]
    """Phase 2: count the touched terms of each cell; returns how many cells there are."""
    n_cells = 0
    for term in work.touched[:hits]:
        cell = terms.first_cell[work.overlap[term]] + terms.size_class[term]
        work.cells[n_cells] = cell
        n_cells += work.members[cell] == 0
        work.members[cell] += 1
    return n_cells


@compiled
def _look_up_tails(n_cells, n, terms, setting, work):  # type: ignore[no-untyped-def]
    """Phase 3: p and sorting bin of the cells in use; returns whether all are possible."""
    possible = True
    for cell in work.cells[:n_cells]:
        if work.cell_length[cell] != n:
            x, size = terms.cell_overlap[cell], terms.class_size[terms.cell_class[cell]]
            log_p = log_upper_tail(x, size, n, setting.total, setting.table, setting.unit)
            step = SORT_BINS - 1.0 if math.isnan(log_p) else -log_p * _BINS_PER_E_FOLD
            work.cell_bin[cell] = SORT_BINS - 1 - int(min(step, SORT_BINS - 1.0))
            work.cell_p[cell] = math.exp(log_p)
            work.cell_length[cell] = n
        possible = possible and not math.isnan(work.cell_p[cell])
    return possible


@compiled
def _sort_cells(n_cells, work):  # type: ignore[no-untyped-def]
    """Sort the cells in use by p: into bins first, then by insertion within and between bins."""
    cells, ordered, bin_end = work.cells[:n_cells], work.ordered, work.bin_end
    bin_end[:] = 0
    for cell in cells:
        bin_end[work.cell_bin[cell]] += 1
    running = 0
    for b in range(SORT_BINS):
        running += bin_end[b]
        bin_end[b] = running
    for cell in cells:
        b = work.cell_bin[cell]
        bin_end[b] -= 1
        ordered[bin_end[b]] = cell
    for j in range(1, n_cells):
        cell = ordered[j]
        p = work.cell_p[cell]
        while j > 0 and work.cell_p[ordered[j - 1]] > p:
            ordered[j] = ordered[j - 1]
            j -= 1
        ordered[j] = cell


@compiled
def _adjusted(n_cells, n_tests, alpha, work):  # type: ignore[no-untyped-def]
    """Phase 4, Benjamini-Hochberg: smallest q, and number of terms with q < alpha.

    All terms of a cell share its p, hence the last rank of their tie.
    """
    smallest = 1.0
    significant = 0
    rank = 0
    for cell in work.ordered[:n_cells]:
        rank += work.members[cell]
        q = work.cell_p[cell] * n_tests / rank
        smallest = min(smallest, q)
        if q < alpha:
            significant = rank
    return smallest, significant


@compiled
def _first_best(n_cells, terms, work):  # type: ignore[no-untyped-def]
    """First term (in the library's order) of the lowest p: a walk through its size class."""
    best = work.overlap.size
    for cell in work.ordered[:n_cells]:
        if work.cell_p[cell] > work.cell_p[work.ordered[0]]:
            break
        c = terms.cell_class[cell]
        for term in terms.class_terms[terms.class_indptr[c] : terms.class_indptr[c + 1]]:
            if work.overlap[term] == terms.cell_overlap[cell]:
                best = min(best, term)
                break
    return best


@compiled
def score_lists(order, lists, terms, setting, work, result):  # type: ignore[no-untyped-def]
    """Test the lists whose positions `order` holds (best sorted by length), filling `result`.

    `lists` has `indptr`, `ids` (unique within a list) and `n_query`; `result` has arrays of shape
    (n_lists,). `min_p` becomes NaN for a list that cannot have come from `setting.total` genes.
    """
    for i in order:
        genes = lists.ids[lists.indptr[i] : lists.indptr[i + 1]]
        hits = _count_overlaps(genes, terms, work)
        result.n_hit[i] = hits
        n_cells = _group_terms(hits, terms, work)
        if not _look_up_tails(n_cells, lists.n_query[i], terms, setting, work):
            result.min_p[i] = math.nan
        elif hits > 0:
            _sort_cells(n_cells, work)
            n_tests = setting.n_tests or hits
            smallest, significant = _adjusted(n_cells, n_tests, setting.alpha, work)
            result.min_p[i] = work.cell_p[work.ordered[0]]
            result.best_term[i] = _first_best(n_cells, terms, work)
            result.min_q[i], result.n_significant[i] = smallest, significant
        for term in work.touched[:hits]:
            work.overlap[term] = 0
        for cell in work.cells[:n_cells]:
            work.members[cell] = 0


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

    One pass over the terms touched is enough, without cells: a term can only be significant if it
    is below the line of all terms touched, and few are.
    """
    candidates = np.empty(work.overlap.size + 1)
    for i in order:
        n = lists.n_query[i]
        hits = _count_overlaps(lists.ids[lists.indptr[i] : lists.indptr[i + 1]], terms, work)
        n_tests = setting.n_tests or hits
        smallest, kept, possible = 1.0, 0, True
        for term in work.touched[:hits]:
            cell = terms.first_cell[work.overlap[term]] + terms.size_class[term]
            work.overlap[term] = 0
            if work.cell_length[cell] != n:
                x, size = terms.cell_overlap[cell], terms.class_size[terms.cell_class[cell]]
                log_p = log_upper_tail(x, size, n, setting.total, setting.table, setting.unit)
                work.cell_p[cell] = math.exp(log_p)
                work.cell_length[cell] = n
            p = work.cell_p[cell]
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
