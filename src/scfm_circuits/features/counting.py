"""Counting what every feature of every layer fires on, in one pass over the corpus.

At the paper's size (24 x 8192 features, 60 million tokens, some 10^5 pairs of token and gene) a
table of all features by all pairs would take 79 GB, and few features fire on more than a small part
of the pairs. So the pass keeps sparse counts, and in arrays of fixed size what else is wanted of a
feature: its strongest contexts, the sum and the histogram of its activations.

Each batch of cells is reduced where the model is: on the CPU by compiled loops
over the activations, on a GPU by a few operations for all layers, with one synchronisation.
The pass takes minutes at that size; one that was interrupted starts again.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scfm_circuits.common.compiled import compiled, n_threads
from scfm_circuits.features.pair_counts import PairCounts
from scfm_circuits.models.mlp_sites import batches, counting_precision, device_of, mlp_sites
from scfm_circuits.transcoders.active_entries import find_active
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus

CHUNK_ACTIVATIONS = 2**22
"""Activations that are made and looked through at a time on the CPU, in its cache."""
CHUNK_BYTES = 2**31
"""Activations of all layers that a GPU holds at a time."""
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


class BatchTokens(NamedTuple):
    """What is known of a batch's tokens: the pair, the cell within the batch, the position in it.

    pair, cell, position: (n_tokens,) int64 on the model's device, cell by cell. lengths: (n_cells,)
    tokens of each cell.
    """

    pair: Tensor
    cell: Tensor
    position: Tensor
    lengths: np.ndarray


class FeatureTotals:
    """Everything that is counted, after any number of cells.

    Tensors on the model's device: l0 (n_layers, n_features + 1), tokens by their number of active
    features; histogram (n_layers, n_features, N_BINS), activations by size; total (n_layers,
    n_features) float64, their sum; best, best_cell (n_layers, n_features, n_contexts), the
    strongest activations with their positions in one int64 (see `unpack_best`), and their cells.
    counts: the sparse counts by pair, on the host. done: cells counted.
    """

    def __init__(self, n_layers: int, n_features: int, n_pairs: int, n_tokens: int,
                 n_contexts: int, device: torch.device) -> None:
        whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self.tensors = {
            "l0": torch.zeros(n_layers, n_features + 1, **whole),
            "histogram": torch.zeros(n_layers, n_features, N_BINS, **whole),
            "total": torch.zeros(n_layers, n_features, dtype=torch.float64, device=device),
            "best": torch.zeros(n_layers, n_features, n_contexts, **whole),
            "best_cell": torch.full((n_layers, n_features, n_contexts), -1, **whole),
        }
        threads = 1 if device.type == "cpu" else n_threads()
        self.counts = PairCounts(n_layers, n_features, n_pairs, n_tokens, threads=threads)
        self.done = 0


def fixed_bytes(n_features: int, n_contexts: int) -> int:
    """Bytes of what is kept of features but for their counts by pair; n_features: of all layers."""
    return n_features * (8 * N_BINS + 8 + 8 + 16 * n_contexts)


# --- one batch -----------------------------------------------------------------------------------


def describe_batch(pairs: np.ndarray, mask: Tensor) -> BatchTokens:
    """pairs: (n_cells, length) pair of each token; mask: the same shape, False on padding."""
    inside = mask.cpu().numpy()
    pair, cell, position = (torch.from_numpy(one).to(mask.device) for one in
                            (pairs[inside].astype(np.int64), *inside.nonzero()))
    return BatchTokens(pair, cell, position, inside.sum(axis=1))


def add_on_cpu(totals: FeatureTotals, transcoders: Transcoders, layer: int, x: Tensor,
               batch: BatchTokens) -> None:
    """Count one layer's activations on a batch; x: (n_tokens, d_model), its transcoder's input."""
    tensors = {key: tensor[layer].numpy() for key, tensor in totals.tensors.items()}
    strongest = np.zeros((len(batch.lengths), transcoders.n_features), np.int64)
    sums = LayerTotals(tensors["l0"], tensors["histogram"], tensors["total"], strongest)
    n_pairs = totals.counts.shape[1]
    first_key = layer * transcoders.n_features * n_pairs
    n_tokens = max(1, CHUNK_ACTIVATIONS // transcoders.n_features)
    for start in range(0, len(x), n_tokens):
        part = slice(start, start + n_tokens)
        z = transcoders.layer_activations(layer, x[part]).numpy()
        found = find_active(z, torch.get_num_threads())
        assert found is not None  # which it is only under a limit
        found = found._replace(value=found.value.astype(np.float32, copy=False))
        keys = np.empty(len(found.feature), np.int64)
        tally(found, Tokens(*(one[part].numpy() for one in batch[:3])), sums, first_key, n_pairs,
              keys)
        totals.counts.add(torch.from_numpy(keys))
    keep_strongest(strongest, totals.done, tensors["best"], tensors["best_cell"])


def add_on_gpu(totals: FeatureTotals, transcoders: Transcoders, x: Tensor,
               batch: BatchTokens) -> None:
    """Count all layers' activations on a batch; x: (n_layers, n_tokens, d_model).

    The same as `add_on_cpu`, by operations that any device has. As many cells are taken at a time
    as `CHUNK_BYTES` allows; each time waits for the device once.
    """
    # Activations are float32 at least, whatever the model's type.
    per_token = transcoders.n_layers * transcoders.n_features * max(4, x.element_size())
    ends = np.cumsum(batch.lengths)
    first = 0
    while first < len(ends):
        start = int(ends[first - 1]) if first else 0
        fit = int(np.searchsorted(ends, start + CHUNK_BYTES // per_token, side="right"))
        last = max(first + 1, fit)
        part = slice(start, int(ends[last - 1]))
        z = transcoders.encode(x[:, part])
        _add_cells(totals, z, batch.pair[part], batch.cell[part] - first, batch.position[part],
                   totals.done + first, last - first)
        first = last


def _add_cells(totals: FeatureTotals, z: Tensor, pair: Tensor, cell: Tensor, position: Tensor,
               first_cell: int, n_cells: int) -> None:
    """z: (n_layers, n_tokens, n_features) activations on the tokens of some whole cells."""
    tensors, (n_layers, _, n_features) = totals.tensors, z.shape
    active = z > 0
    l0 = active.sum(dim=-1)
    tensors["l0"].scatter_add_(1, l0, torch.ones_like(l0))
    tensors["total"] += z.float().sum(dim=1, dtype=torch.float64)
    layer, token, feature = active.nonzero(as_tuple=True)  # the one place that waits
    bits = z[layer, token, feature].float().view(torch.int32).long()
    unit = layer * n_features + feature
    half_octave = 2 * ((bits >> 23) - 127) + ((bits & 0x7FFFFF) >= SQRT_2)
    where = unit * N_BINS + (half_octave - LOWEST_BIN).clamp(0, N_BINS - 1)
    tensors["histogram"].view(-1).scatter_add_(0, where, torch.ones_like(where))
    totals.counts.add(unit * totals.counts.shape[1] + pair[token])
    strongest = torch.zeros(n_layers * n_features * n_cells, dtype=torch.int64, device=z.device)
    strongest.scatter_reduce_(0, unit * n_cells + cell[token],
                              (bits << 32) | (POSITION - position[token]), "amax")
    # Sorted by activation alone and stably: of equal ones, those of lower cells stay in front.
    best = torch.cat([tensors["best"], strongest.view(n_layers, n_features, n_cells)], dim=2)
    cells = torch.arange(first_cell, first_cell + n_cells, device=z.device)
    cells = torch.cat([tensors["best_cell"], cells.expand(n_layers, n_features, -1)], dim=2)
    order = (best >> 32).sort(dim=2, descending=True, stable=True).indices
    order = order[..., : tensors["best"].shape[2]]
    tensors["best"].copy_(best.gather(2, order))
    tensors["best_cell"].copy_(cells.gather(2, order))


def unpack_best(best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Activations (float32) and positions (int64) of `FeatureTotals.tensors["best"]`."""
    activation = np.ascontiguousarray(best >> 32).astype(np.int32).view(np.float32)
    return activation, np.where(best > 0, POSITION - (best & POSITION), -1)


def activation_edges() -> np.ndarray:
    """(N_BINS + 1,) bounds of the bins of activations; the outer bins take all beyond."""
    return 2.0 ** ((np.arange(N_BINS + 1) + LOWEST_BIN) / 2)


# --- the pass ------------------------------------------------------------------------------------


@torch.no_grad()
def count_activations(model: "PreTrainedModel", transcoders: Transcoders, corpus: "Corpus",
                      pairs: np.ndarray, n_pairs: int, forward_cells: int, n_contexts: int,
                      progress: bool) -> FeatureTotals:
    """All cells in their order.

    pairs: (n_cells, length) pair of each token of the corpus, as from `corpus_pairs`.
    """
    device, n_tokens = device_of(model), int(corpus.mask.sum())
    size = transcoders.n_layers, transcoders.n_features
    totals = FeatureTotals(*size, n_pairs, n_tokens, n_contexts, device)
    bar = tqdm(total=n_tokens, desc="features", unit="token", unit_scale=True,
               disable=not progress)
    with bar, counting_precision(model):
        for rows, tokens, mask in batches(corpus, np.arange(len(corpus)), forward_cells, device):
            x = transcoders.variant.read(*mlp_sites(model, tokens, mask))
            batch = describe_batch(pairs[rows, : mask.shape[1]], mask)
            if device.type == "cpu":
                for layer in range(transcoders.n_layers):
                    add_on_cpu(totals, transcoders, layer, x[layer], batch)
            else:
                add_on_gpu(totals, transcoders, x, batch)
            totals.done += len(rows)
            bar.update(int(batch.lengths.sum()))
    return totals


# --- loops over active features ------------------------------------------------------------------


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
