"""How loops are compiled, and work shared out among threads."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np

_pools: dict[int, ThreadPoolExecutor] = {}

os.register_at_fork(after_in_child=_pools.clear)  # threads do not outlive a fork


def n_threads() -> int:
    """Threads that this process is to use: OMP_NUM_THREADS, or else one for each of its cores."""
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if text.isdigit() and int(text):
        return int(text)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_out(n: int, n_threads: int, work: Callable[[int, int], None]) -> None:
    """Call work(first, last) on shares of 0 to n - 1, one share per thread."""
    if n_threads == 1 or n < 2 * n_threads:
        work(0, n)
        return
    if n_threads not in _pools:
        _pools[n_threads] = ThreadPoolExecutor(n_threads)
    cuts = np.linspace(0, n, n_threads + 1).astype(int)
    list(_pools[n_threads].map(lambda share: work(*share), pairwise(cuts)))


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Compile with numba, keeping the machine code on disk where a writable folder is found."""
    try:
        return numba.njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:
        # Neither the package folder nor the user's cache folder can be written to.
        return numba.njit(nogil=True, **options)(function)
