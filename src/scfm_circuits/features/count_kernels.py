"""Compiled loops over active features: counts, histograms and the strongest of each cell."""

from typing import NamedTuple

import numpy as np

from scfm_circuits.common.compiled import compiled

N_BINS = 32
LOWEST_BIN = -20
"""Bins of activations, half an octave each: bin b begins at 2^((b + LOWEST_BIN) / 2), so they reach
from 2^-10 to 2^6; the first and the last also take what lies beyond."""
SQRT_2 = 0x3504F3
"""Where the upper half of an octave begins: the mantissa of float32's square root of 2.

    a positive float32 is   0 | e, 8 bits | m, 23 bits   =   2^(e - 127) * (1 + m / 2^23),

so its octave is e - 127, and it is in the upper half if m >= SQRT_2: no logarithm is needed."""
POSITION = 2**32 - 1
"""An activation and its position in the cell are packed into one int64:

    bits 63 to 32: those of the float32 | bits 31 to 0: POSITION - position.

Read as integers, the bits of positive float32 are in the order of the numbers (see above). So the
larger of two packed ones is the stronger activation or, of equal ones, the earlier: a plain maximum
finds it, and 0 stands for none."""


class Tokens(NamedTuple):
    """Some tokens, (n_tokens,) int64 each: pair of token and gene, cell, position in the cell."""

    pair: np.ndarray
    cell: np.ndarray
    position: np.ndarray


class LayerTotals(NamedTuple):
    """What is added up for one layer.

    l0: (n_features + 1,) tokens by their number of active features. histogram: (n_features,
    N_BINS). total: (n_features,) sum of activations. strongest: (n_cells, n_features), each cell's
    strongest activation of each feature, packed (see POSITION).
    """

    l0: np.ndarray
    histogram: np.ndarray
    total: np.ndarray
    strongest: np.ndarray


@compiled
def tally(active, tokens, totals, first_key, n_pairs, keys):  # type: ignore[no-untyped-def]
    """Add the active features (`Active`, float32) of `tokens` to a layer's `totals`.

    keys: (n_active,), filled with first_key + feature * n_pairs + pair.
    """
    bits = active.value.view(np.int32)
    for i in range(len(active.start) - 1):
        totals.l0[active.start[i + 1] - active.start[i]] += 1
        for e in range(active.start[i], active.start[i + 1]):
            f, b = np.int64(active.feature[e]), np.int64(bits[e])
            keys[e] = first_key + f * n_pairs + tokens.pair[i]
            totals.total[f] += active.value[e]
            half_octave = 2 * ((b >> 23) - 127) + ((b & 0x7FFFFF) >= SQRT_2)
            totals.histogram[f, min(max(half_octave - LOWEST_BIN, 0), N_BINS - 1)] += 1
            packed = (b << 32) | (POSITION - tokens.position[i])
            if packed > totals.strongest[tokens.cell[i], f]:
                totals.strongest[tokens.cell[i], f] = packed


@compiled
def keep_strongest(strongest, first_cell, best, best_cell):  # type: ignore[no-untyped-def]
    """Merge some cells' strongest activations into the n best of each feature, strongest first.

    strongest: (n_cells, n_features), of cells from first_cell on, which come after all that are in
    best, best_cell: (n_features, n). Of equal activations, those of lower cells are kept, wherever
    they stand in them: hence only the upper halves are compared (see POSITION).
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
