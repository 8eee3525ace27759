"""Compiled loops over activations on the CPU: which features are active, and what is kept of them.

A batch's activations are mostly zeros. `find_active` reads them once at the speed of memory and
leaves the few that are not; all else goes over these.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from scfm_circuits.enrichment_kernels import compiled

N_BINS = 32
LOWEST_BIN = -20
"""Bins of activations, half an octave each: bin b begins at 2^((b + LOWEST_BIN) / 2), so they reach
from 2^-10 to 2^6; the first and the last also take what lies beyond."""
BLOCK = 64
"""Features that `_gather` looks at as a whole first, as nearly all are silent."""
SQRT_2 = 0x3504F3
"""Mantissa bits of float32's square root of 2, where the upper half of an octave begins."""
POSITION = 2**32 - 1
"""An activation and its position are one int64: the bits of the float32, whose order is that of the
positive numbers, then POSITION - position. The largest is the strongest, or the earliest of several
that are equal."""


class Active(NamedTuple):
    """Active features, token by token.

    start: (n_tokens + 1,) where each token's begin; feature, value: (n_active,) int32, type of z.
    """

    start: np.ndarray
    feature: np.ndarray
    value: np.ndarray


def find_active(z: np.ndarray, n_threads: int, at_most: int | None = None) -> Active | None:
    """Entries above zero of activations (n_tokens, n_features); None if more than `at_most`."""
    n = len(z)
    start = np.zeros(n + 1, np.int64)
    # Two threads gain nothing: the product that made z leaves a thread of its own spinning.
    n_threads = n_threads if n_threads > 2 else 1
    share_out(n, n_threads, lambda first, last: _count(z, first, last, start))
    np.cumsum(start, out=start)
    if at_most is not None and start[-1] > at_most:
        return None
    feature, value = np.empty(start[-1], np.int32), np.empty(start[-1], z.dtype)
    share_out(n, n_threads, lambda first, last: _gather(z, first, last, start, feature, value))
    return Active(start, feature, value)


_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)  # threads do not outlive a fork


def share_out(n: int, n_threads: int, work: Callable[[int, int], None]) -> None:
    """Call work(first, last) on shares of 0 to n - 1, one share per thread."""
    if n_threads == 1 or n < 2 * n_threads:
        work(0, n)
        return
    if n_threads not in _pools:
        _pools[n_threads] = ThreadPoolExecutor(n_threads)
    cuts = np.linspace(0, n, n_threads + 1).astype(int)
    list(_pools[n_threads].map(lambda share: work(*share), pairwise(cuts)))


@compiled
def _count(z, first, last, start):  # type: ignore[no-untyped-def]
    """start[i + 1]: active features of token i."""
    for i in range(first, last):
        n = np.int32(0)
        for j in range(z.shape[1]):
            n += np.int32(z[i, j] > 0)
        start[i + 1] = n


@compiled
def _gather(z, first, last, start, feature, value):  # type: ignore[no-untyped-def]
    """Write the active features of tokens first to last - 1."""
    whole = z.shape[1] // BLOCK * BLOCK
    for i in range(first, last):
        at, row = start[i], z[i]
        for begin in range(0, whole, BLOCK):
            n = np.int32(0)
            for j in range(BLOCK):
                n += np.int32(row[begin + j] > 0)
            if n:
                for j in range(begin, begin + BLOCK):
                    if row[j] > 0:
                        feature[at] = j
                        value[at] = row[j]
                        at += 1
        for j in range(whole, z.shape[1]):
            if row[j] > 0:
                feature[at] = j
                value[at] = row[j]
                at += 1


@compiled
def tally(start, feature, value, pair, cell, position, base, n_pairs, keys, l0, histogram,  # type: ignore[no-untyped-def]
          total, strongest):
    """Add active features to one layer's l0, histogram and total; write each one's key.

    keys: (n_active,), base + feature * n_pairs + pair. strongest: (n_cells, n_features), raised to
    the feature's strongest activation in the cell (see POSITION).
    """
    bits = value.view(np.int32)
    for i in range(len(start) - 1):
        l0[start[i + 1] - start[i]] += 1
        for e in range(start[i], start[i + 1]):
            f, b = np.int64(feature[e]), np.int64(bits[e])
            keys[e] = base + f * n_pairs + pair[i]
            total[f] += value[e]
            octave = 2 * ((b >> 23) - 127) + ((b & 0x7FFFFF) >= SQRT_2)
            histogram[f, min(max(octave - LOWEST_BIN, 0), N_BINS - 1)] += 1
            packed = (b << 32) | (POSITION - position[i])
            if packed > strongest[cell[i], f]:
                strongest[cell[i], f] = packed


@compiled
def keep_strongest(strongest, first_cell, best, best_cell):  # type: ignore[no-untyped-def]
    """Merge some cells' strongest activations into the n best of each feature, strongest first.

    strongest: (n_cells, n_features), of cells from first_cell on, which come after all that are in
    best, best_cell: (n_features, n). Of equal activations, those of lower cells are kept.
    """
    last = best.shape[1] - 1
    for c in range(strongest.shape[0]):
        for f in range(strongest.shape[1]):
            packed = strongest[c, f]
            if packed >> 32 <= best[f, last] >> 32:
                continue
            at = last
            while at > 0 and packed >> 32 > best[f, at - 1] >> 32:
                best[f, at], best_cell[f, at] = best[f, at - 1], best_cell[f, at - 1]
                at -= 1
            best[f, at], best_cell[f, at] = packed, first_cell + c
