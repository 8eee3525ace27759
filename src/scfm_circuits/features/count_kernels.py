"""Compiled loops over active features: counts, histograms and the strongest of each cell."""

import numpy as np

from scfm_circuits.common.compiled import compiled

N_BINS = 32
LOWEST_BIN = -20
"""Bins of activations, half an octave each: bin b begins at 2^((b + LOWEST_BIN) / 2), so they reach
from 2^-10 to 2^6; the first and the last also take what lies beyond."""
SQRT_2 = 0x3504F3
"""Mantissa bits of float32's square root of 2, where the upper half of an octave begins."""
POSITION = 2**32 - 1
"""An activation and its position are one int64: the bits of the float32, whose order is that of the
positive numbers, then POSITION - position. The largest is the strongest, or the earliest of several
that are equal."""


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
