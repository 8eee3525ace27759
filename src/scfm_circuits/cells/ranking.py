"""The most expressed genes of every cell, in order: what a cell sentence is made of.

Cell2Sentence (Levine et al. 2024) shuffles a cell's expressed genes and sorts them by expression
with a stable sort, so ties come in random order. Here a tie is decided by a hash of the seed, the
cell's row in its file and the gene: as random, but a cell's sentence depends neither on the cells
read beside it nor on the order in which they are read. Only the k largest are ever put in order.
"""

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import scipy.sparse as sp

from scfm_circuits.common.compiled import compiled, n_threads

_BLOCK = 512


def top_genes(expression: sp.csr_matrix, rows: np.ndarray, k: int, seed: int) -> np.ndarray:
    """(n_cells, k) int32 ids of the most expressed genes, most expressed first; -1: no more.

    expression: (n_cells, n_genes) sparse rows of values above zero. rows: (n_cells,) the cells'
    rows in their file. Cells are ranked in parallel threads.
    """
    n = expression.shape[0]
    found = np.full((n, k), -1, np.int32)
    indptr = np.ascontiguousarray(expression.indptr, np.int64)
    genes = np.ascontiguousarray(expression.indices, np.int32)
    values = np.ascontiguousarray(expression.data, np.float32)
    numbers = np.asarray(rows, np.uint64)

    def rank(start: int) -> None:
        stop = min(start + _BLOCK, n)
        _rank(indptr[start : stop + 1], genes, values, numbers[start:stop], np.uint64(seed),
              found[start:stop])

    with ThreadPoolExecutor(n_threads()) as threads:
        list(threads.map(rank, range(0, n, _BLOCK)))
    return found


@numba.njit(inline="always")
def _mixed(x):  # type: ignore[no-untyped-def]
    """SplitMix64's finaliser: every bit of the result depends on every bit given."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(inline="always")
def _sift(values, ties, genes, place, size):  # type: ignore[no-untyped-def]
    """Move what stands at `place` down a heap whose least (value, tie) is on top."""
    value, tie, gene = values[place], ties[place], genes[place]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        other = child + 1
        if other < size:
            # Without a branch, which the processor could not foretell.
            child += (values[other] < values[child]) | (
                (values[other] == values[child]) & (ties[other] < ties[child]))
        if value < values[child] or (value == values[child] and tie <= ties[child]):
            break
        values[place], ties[place], genes[place] = values[child], ties[child], genes[child]
        place = child
    values[place], ties[place], genes[place] = value, tie, gene


@numba.njit(inline="always")
def _floor(values, best):  # type: ignore[no-untyped-def]
    """A bound that at least k of `values` reach, if there are more than k, else -inf.

    values: (n,). best: (k,), overwritten: the values are dealt out to its k places in turn, each
    keeps its largest, and the least of these k is the bound.
    """
    k = len(best)
    if len(values) <= k:
        return np.float32(-np.inf)
    best[:] = values[:k]
    for start in range(k, len(values) - k + 1, k):
        dealt = values[start : start + k]
        for place in range(k):
            best[place] = max(best[place], dealt[place])
    return best.min()


@compiled
def _rank(indptr, genes, values, rows, seed, found):  # type: ignore[no-untyped-def]
    k = found.shape[1]
    golden = np.uint64(0x9E3779B97F4A7C15)
    kept, ties = np.empty(k, np.float32), np.empty(k, np.uint64)
    for cell in range(len(rows)):
        base = _mixed(_mixed(seed + golden) + (rows[cell] + np.uint64(1)) * golden)
        chosen = found[cell]
        size = 0
        # A gene below it is not among the k: most are passed over while the heap is filled.
        floor = _floor(values[indptr[cell] : indptr[cell + 1]], kept)
        for i in range(indptr[cell], indptr[cell + 1]):
            if values[i] < floor:
                continue
            tie = _mixed(base + (np.uint64(genes[i]) + np.uint64(1)) * golden)
            if size < k:
                kept[size], ties[size], chosen[size] = values[i], tie, genes[i]
                size += 1
                if size == k:
                    for place in range(k // 2 - 1, -1, -1):
                        _sift(kept, ties, chosen, place, k)
                    floor = kept[0]
            elif values[i] > floor or tie > ties[0]:
                kept[0], ties[0], chosen[0] = values[i], tie, genes[i]
                _sift(kept, ties, chosen, 0, k)
                floor = kept[0]
        if size < k:
            for place in range(size // 2 - 1, -1, -1):
                _sift(kept, ties, chosen, place, size)
        # The least goes to the end, again and again: what is left is in falling order.
        for last in range(size - 1, 0, -1):
            kept[0], kept[last] = kept[last], kept[0]
            ties[0], ties[last] = ties[last], ties[0]
            chosen[0], chosen[last] = chosen[last], chosen[0]
            _sift(kept, ties, chosen, 0, last)
