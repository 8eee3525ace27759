"""Entries above zero of a batch's activations, found by compiled loops on the CPU.

A batch's activations are mostly zeros. `find_active` reads them once at the speed of memory and
leaves the few that are not; all else goes over these.
"""

from typing import NamedTuple

import numpy as np

from scfm_circuits.common.compiled import compiled, share_out

BLOCK = 64
"""Features that `_gather` looks at as a whole first, as nearly all are silent."""


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
