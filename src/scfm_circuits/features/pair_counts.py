"""Exact counts of (layer, feature, pair) in memory that grows with the distinct ones only."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

BUFFER_KEYS = 2**24
"""Keys that wait on the host until they are sorted; a GPU keeps eight times as many."""


class PairCounts:
    """How often each feature of each layer is active on each pair.

    Keys are collected until a buffer is full, then sorted and counted into one sparse matrix per
    layer. Matrices are added up as in a binary counter: a new one is merged with the last while
    that is less than twice as large. So each holds at least twice the next one's entries, and all
    together less than twice the distinct ones; an entry takes part in few mergers. `threads` layers
    are merged at a time: a GPU would wait longer for this than it works.
    """

    def __init__(self, n_layers: int, n_features: int, n_pairs: int, n_tokens: int,
                 buffer_keys: int = BUFFER_KEYS, threads: int = 1) -> None:
        self.n_layers, self.shape = n_layers, (n_features, n_pairs)
        self._threads = min(threads, n_layers)
        self._buffer_keys = buffer_keys
        # No count is larger than the number of tokens.
        self._type = np.int32 if n_tokens < 2**31 else np.int64
        self._waiting: list[Tensor] = []
        # On the host one buffer: small arrays that are kept, among large ones that are not, would
        # leave the memory of all the large ones in pieces that fit no other.
        self._buffer = np.zeros(0, np.int64)
        self._n_waiting = 0
        self._runs: list[list[sp.csr_matrix]] = [[] for _ in range(n_layers)]

    def add(self, keys: Tensor) -> None:
        """Count (n,) int64 keys, (layer * n_features + feature) * n_pairs + pair, in any order."""
        if keys.is_cuda:
            if self._n_waiting + len(keys) > 8 * self._buffer_keys:
                self.flush()
            self._waiting.append(keys)
            self._n_waiting += len(keys)
            return
        for part in keys.split(self._buffer_keys):
            if self._n_waiting + len(part) > self._buffer_keys:
                self.flush()
            if not self._buffer.size:
                self._buffer = np.empty(self._buffer_keys, np.int64)
            self._buffer[self._n_waiting : self._n_waiting + len(part)] = part.numpy()
            self._n_waiting += len(part)

    def flush(self) -> None:
        """Sort what waits into the matrices."""
        if not self._n_waiting:
            return
        if self._waiting:
            waiting, self._waiting = torch.cat(self._waiting), []
            keys, counts = (one.cpu().numpy() for one in waiting.unique(return_counts=True))
        else:
            every = self._buffer[: self._n_waiting]
            every.sort()
            first = np.flatnonzero(np.append(True, every[1:] != every[:-1]))
            keys, counts = every[first], np.diff(first, append=len(every))
        self._n_waiting = 0
        per_layer = self.shape[0] * self.shape[1]
        ends = np.searchsorted(keys, per_layer * np.arange(self.n_layers + 1))
        jobs = [(layer, keys[a:b], counts[a:b]) for layer, (a, b) in enumerate(pairwise(ends))
                if b > a]
        if self._threads == 1:
            for job in jobs:
                self._push(*job)
            return
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(lambda job: self._push(*job), jobs))

    def _push(self, layer: int, keys: np.ndarray, counts: np.ndarray) -> None:
        n_features, n_pairs = self.shape
        keys = keys - layer * n_features * n_pairs
        starts = np.searchsorted(keys, n_pairs * np.arange(n_features + 1))
        new = sp.csr_matrix((counts.astype(self._type), (keys % n_pairs).astype(np.int32), starts),
                            shape=self.shape)
        runs = self._runs[layer]
        while runs and runs[-1].nnz < 2 * new.nnz:
            new = runs.pop() + new
        runs.append(new)

    def matrices(self) -> tuple[sp.csr_matrix, ...]:
        """The counts so far, (n_features, n_pairs) for each layer, sorted."""
        self.flush()
        self._buffer = np.zeros(0, np.int64)
        for runs in self._runs:
            while len(runs) > 1:
                last = runs.pop()
                runs[-1] = runs[-1] + last
        none = np.zeros(self.shape[0] + 1, np.int32)
        empty = np.zeros(0, self._type), none[:0], none
        return tuple(runs[0] if runs else sp.csr_matrix(empty, shape=self.shape)
                     for runs in self._runs)


# --- files ---------------------------------------------------------------------------------------


def pack_matrices(matrices: Sequence[sp.csr_matrix]) -> dict[str, np.ndarray]:
    """Matrices as the arrays of an .npz file; `unpack_matrices` reads them back."""
    return {f"counts_{i}_{key}": getattr(matrix, key) for i, matrix in enumerate(matrices)
            for key in ("data", "indices", "indptr")}


def unpack_matrices(arrays: Mapping[str, np.ndarray], shape: tuple[int, int]
                    ) -> tuple[sp.csr_matrix, ...]:
    """What `pack_matrices` packed; KeyError if a part is missing, ValueError if they do not fit."""
    n = sum(key.startswith("counts_") and key.endswith("_indptr") for key in arrays)
    return tuple(sp.csr_matrix(tuple(arrays[f"counts_{i}_{key}"] for key in
                                     ("data", "indices", "indptr")), shape=shape)
                 for i in range(n))
