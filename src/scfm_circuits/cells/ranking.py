"""The most expressed genes of every cell, in order: what a cell sentence is made of.

Values that give no order, as they are scaled or no numbers, are refused.

Cell2Sentence (Levine et al. 2024) shuffles a cell's expressed genes and sorts them by expression
with a stable sort, so ties come in random order. Here a tie is decided by a hash of the seed, the
cell's row in its file and the gene: as random, but a cell's sentence depends neither on the cells
read beside it nor on the order in which they are read. Only the k largest, and what ties with the
last one, are sorted.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import scipy.sparse as sp

from scfm_circuits import InputError
from scfm_circuits.common.compiled import compiled, n_threads

_BLOCK = 512
SAMPLED = 200_000
"""Values of a matrix that are looked at, in three blocks."""
_SCALED = 0.01
"""Share of negative values above which they are not errors: centring makes about half negative."""


def values_kind(matrix: Any) -> str:
    """Whether samples of a matrix's values are counts, normalised, or nothing to rank genes by."""
    stored = matrix
    if hasattr(matrix, "group"):  # sparse in the file: what is not stored is zero
        stored = matrix.group["data"]
    elif hasattr(matrix, "nnz"):  # sparse in memory
        stored = matrix.data
    per_row = max(1, math.prod(stored.shape[1:]))
    rows, n = max(1, SAMPLED // 3 // per_row), stored.shape[0]
    starts, size = ([0], n) if n <= 3 * rows else ([0, (n - rows) // 2, n - rows], rows)
    values = np.concatenate([np.ravel(stored[start : start + size]) for start in starts])
    odd = ~(np.isfinite(values) & (values >= 0))
    if odd.any():
        few = ("; so few are errors rather than scaling: mend them"
               if odd.mean() <= _SCALED else "")
        return (f"unusable, as {odd.sum():,} of {len(values):,} values looked at are below zero or "
                f"not finite, such as {values[odd][0]:.6g}{few}")
    if not np.array_equal(values, np.rint(values)):
        return "normalised"
    return "zeros and ones" if len(values) and values.max() <= 1 else "counts"


def checked_rows(values: Any, rows: np.ndarray, where: str, join: sp.csr_matrix | None
                 ) -> sp.csr_matrix:
    """Some rows' values as sparse rows, symbols joined by `join`; refuses NaN, infinite and
    negative values."""
    with np.errstate(over="ignore"):  # becomes infinite
        sparse = sp.csr_matrix(values, dtype=np.float32)
    if not np.isfinite(sparse.data).all():
        found = first_odd(sparse, ~np.isfinite(sparse.data), rows)
        raise InputError(f"{where} has expression values that are NaN, infinite or above "
                         f"{np.finfo(np.float32).max:.1g} ({found}); choose another `matrix` or "
                         "replace them.")
    below = sparse.data < 0
    if below.any():
        why = ("so it was scaled or centred per gene, which destroys the ranking; set `matrix` to "
               "counts or log-normalised values" if below.mean() > _SCALED else
               "too few for values that were scaled; set them to zero if they are errors of "
               "rounding, or `matrix` to counts or log-normalised values")
        raise InputError(f"{where} has negative expression values "
                         f"({first_odd(sparse, below, rows)}), {why}.")
    sparse.sum_duplicates()
    sparse.eliminate_zeros()
    if join is not None:
        sparse = sp.csr_matrix(sparse @ join)
    sparse.sort_indices()
    return sparse


def first_odd(part: sp.csr_matrix, odd: np.ndarray, rows: np.ndarray) -> str:
    """How many of the values of some rows are odd, and where the first is. odd: of those stored."""
    i = int(np.argmax(odd))
    row = int(np.searchsorted(part.indptr, i, side="right")) - 1
    return (f"{odd.sum():,} of the {part.shape[0] * part.shape[1]:,} in rows {rows[0]:,} to "
            f"{rows[-1]:,}; the first is {part.data[i]:.6g} in row {rows[row]:,}, column "
            f"{part.indices[i]:,}")


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


@compiled
def _rank(indptr, genes, values, rows, seed, found):  # type: ignore[no-untyped-def]
    k = found.shape[1]
    golden = np.uint64(0x9E3779B97F4A7C15)
    for cell in range(len(rows)):
        base = _mixed(_mixed(seed + golden) + (rows[cell] + np.uint64(1)) * golden)
        own, kept = genes[indptr[cell] : indptr[cell + 1]], values[indptr[cell] : indptr[cell + 1]]
        left = np.arange(len(kept))
        if len(kept) > k:
            left = np.flatnonzero(kept >= np.partition(kept, len(kept) - k)[len(kept) - k])
        ties = np.empty(len(left), np.uint64)
        for i in range(len(left)):
            ties[i] = _mixed(base + (np.uint64(own[left[i]]) + np.uint64(1)) * golden)
        # Both in falling order: by the tie, and then, stably, by the value.
        left = left[np.argsort(~ties)]
        left = left[np.argsort(-kept[left], kind="mergesort")][:k]
        found[cell, : len(left)] = own[left]
