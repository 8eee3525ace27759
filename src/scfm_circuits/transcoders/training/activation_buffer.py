"""What the transcoders are trained on: MLP inputs and outputs of some cells, shuffled.

1. A fill: the model runs once over as many training cells as the buffer holds and leaves every
   MLP's inputs and outputs there. A corpus that fits is harvested once and kept. Several processes
   take turns at a fill's cells, and each is handed the activations of its own layers.
2. One permutation per fill, the same for all layers, cuts the buffer into batches of tokens.

Which cells a fill takes and how it is permuted depend on the seed and the fill's number only, so
training can go on from any step as if it had not been interrupted.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scfm_circuits.common.randomness import generator
from scfm_circuits.models.architectures import attentions
from scfm_circuits.models.mlp_sites import (
    Sites,
    batches,
    device_of,
    faster_attention,
    mlp_sites,
    mlps,
    sent,
)
from scfm_circuits.transcoders.training.processes import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile

PASS_TOKENS = 65_536
"""Tokens in one pass of the model on a GPU, if `forward_cells` is not more."""


Take = Callable[[Tensor, Tensor], Tensor]


def taken(part: Tensor, chosen: Tensor) -> Tensor:
    """Some tokens of what is (n_layers, n_tokens, d_model)."""
    return part[:, chosen]


def reason(error: Exception) -> str:
    """The first line of what an exception says, or else its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class Batch(NamedTuple):
    """Some tokens of a fill: the fill's activations, and (n_tokens,) which of them."""

    fill: Sites
    chosen: Tensor

    def sites(self, layers: slice = slice(None), take: Take = taken) -> Sites:
        """Inputs and outputs of some layers on the batch's tokens. take: as `taken`."""
        return Sites(*(take(part[layers], self.chosen) for part in self.fill))


class ActivationBuffer:
    """MLP inputs and outputs of some training cells, for all layers, in shuffled batches.

    output_scale: (n_layers,) factors on the outputs, or None. dtype: type they are kept in; the
    model computes in its own. ranks: this process among several, of which each holds the layers
    that are its own (`layers`). compiled: whether the model, of which nobody else makes use, has
    its attention compiled; if that fails, at once or at a later shape, it is done without.
    """

    def __init__(self, model: "PreTrainedModel", corpus: "Corpus", profile: "Profile",
                 output_scale: Tensor | None = None, dtype: torch.dtype = torch.float32,
                 ranks: Ranks = ALONE, compiled: bool = False) -> None:
        self._model, self._corpus, self._profile = model, corpus, profile
        self._output_scale, self._dtype, self._ranks = output_scale, dtype, ranks
        self.layers = ranks.layers(len(mlps(model)))
        self._train = np.flatnonzero(~corpus.held_out)
        mean_length = corpus.lengths[self._train].mean()
        wanted = math.ceil(profile.buffer_tokens / mean_length)
        self.cells_per_fill = min(len(self._train), wanted)
        # A GPU is given so much at once that it, not the host, sets the pace.
        at_once = PASS_TOKENS / mean_length if device_of(model).type == "cuda" else 1
        passes = max(1, round(self.cells_per_fill / at_once))  # of equal size
        self.cells_per_pass = max(profile.forward_cells, math.ceil(self.cells_per_fill / passes))
        self._held: tuple[int, Sites] | None = None
        self._storage: Sites | None = None
        self._cells: tuple[int, np.ndarray] = 0, self._cells_of(0)
        self._compiled = compiled
        for attention in attentions(model) if compiled else ():
            attention.compile(dynamic=True)  # dynamic: cells are of many lengths

    def cells(self, fill: int) -> np.ndarray:
        """Cells of one fill: the next ones of an endless sequence of seeded permutations."""
        if self._cells[0] != fill:
            self._cells = fill, self._cells_of(fill)
        return self._cells[1]

    def _cells_of(self, fill: int) -> np.ndarray:
        n, size = len(self._train), self.cells_per_fill
        if size == n:
            return self._train
        first, last = fill * size, (fill + 1) * size - 1
        epochs = (generator(self._profile.seed, "cells of a buffer's fill", epoch)
                  for epoch in range(first // n, last // n + 1))
        sequence = np.concatenate([epoch.permutation(self._train) for epoch in epochs])
        start = first - first // n * n
        return sequence[start : start + size]

    def n_batches(self, fill: int) -> int:
        """Batches that a fill gives; what is left over is dropped."""
        tokens = int(self._corpus.lengths[self.cells(fill)].sum())
        return max(1, tokens // self._profile.batch_tokens)

    def sites(self, fill: int) -> Sites:
        """Activations of a fill's cells, (n_layers, n_tokens, d_model) each, on the device.

        The last fill is held, and the next one overwrites it.
        """
        if self.cells_per_fill == len(self._train):
            fill = 0
        if self._held is not None and self._held[0] == fill:
            return self._held[1]
        self._held = None
        cells, corpus = self.cells(fill), self._corpus
        # Cells of like length together: less padding. The tokens are permuted anyway.
        cells = cells[np.argsort(corpus.lengths[cells], kind="stable")]
        inputs, outputs = self._room(int(corpus.lengths[cells].sum()))
        with faster_attention(self._model):
            self._harvest(cells, Sites(inputs, outputs))
        if self._output_scale is not None:
            scale = self._output_scale.to(outputs)[self.layers.start : self.layers.stop]
            outputs *= scale[:, None, None]
        self._held = fill, Sites(inputs, outputs)
        return self._held[1]

    def _harvest(self, cells: np.ndarray, room: Sites) -> None:
        """Write what this process's layers read and wrote on the cells, in their order."""
        size, ranks, end = self.cells_per_pass, self._ranks, 0
        turns = [cells[start : start + size] for start in range(0, len(cells), size)]
        for first in range(0, len(turns), ranks.size):
            together = turns[first : first + ranks.size]
            counts = [int(self._corpus.lengths[turn].sum()) for turn in together]
            counts += [0] * (ranks.size - len(together))
            if ranks.size == 1:
                start, end = end, end + counts[0]
                self._forward(together[0], Sites(*(part[:, start:end] for part in room)))
                continue
            own = self._forward(together[ranks.rank] if ranks.rank < len(together) else cells[:0])
            for inputs, outputs in ranks.exchange(
                    [torch.stack([part[list(ranks.layers(len(part), rank))] for part in own])
                     for rank in range(ranks.size)],
                    [(2, len(self.layers), n, own.inputs.shape[-1]) for n in counts]):
                start, end = end, end + inputs.shape[1]
                room.inputs[:, start:end], room.outputs[:, start:end] = inputs, outputs

    def _forward(self, cells: np.ndarray, into: Sites | None = None) -> Sites:
        """Activations of all layers on some cells, from one pass of the model (see `mlp_sites`)."""
        model, device = self._model, device_of(self._model)
        if not len(cells):
            none = torch.empty((len(mlps(model)), 0, model.config.hidden_size), device=device,
                               dtype=next(model.parameters()).dtype)
            return Sites(none, none)
        _, ids, mask = next(batches(self._corpus, cells, len(cells), torch.device("cpu")))
        tokens = sent(ids, device)
        # Told of padding, a GPU would not take its fastest attention.
        return self._passed(lambda: mlp_sites(model, tokens, mask, into,
                                              masked=device.type != "cuda"))

    def _passed(self, forward: Callable[[], Sites]) -> Sites:
        """What a pass gives; without compiling, from now on, if that fails."""
        try:
            return forward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler fails in many ways; what is really wrong comes back
            if not self._compiled:
                raise
            print(f"The model's attention could not be compiled and is done without "
                  f"({reason(error)}).")
            for attention in attentions(self._model):
                attention._compiled_call_impl = None
            self._compiled = False
            return forward()

    def _room(self, n_tokens: int) -> Sites:
        """Memory for a fill: what is there already, if it is enough."""
        if self._storage is None or self._storage.inputs.shape[1] < n_tokens:
            self._storage = None  # given back before more is taken
            shape = (len(self.layers), n_tokens, self._model.config.hidden_size)
            device = device_of(self._model)
            self._storage = Sites(torch.empty(shape, device=device, dtype=self._dtype),
                                  torch.empty(shape, device=device, dtype=self._dtype))
        return Sites(*(part[:, :n_tokens] for part in self._storage))

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Batches from the given step on, without end."""
        fill, skipped = 0, 0
        while skipped + self.n_batches(fill) <= first_step:
            skipped += self.n_batches(fill)
            fill += 1
        skip = first_step - skipped
        size = self._profile.batch_tokens
        while True:
            held = self.sites(fill)
            order = generator(self._profile.seed, "batches of a buffer", fill)
            permutation = sent(torch.from_numpy(order.permutation(held.inputs.shape[1])),
                               held.inputs.device)
            for batch in range(skip, self.n_batches(fill)):
                yield Batch(held, permutation[batch * size : (batch + 1) * size])
            fill, skip = fill + 1, 0
