"""Random models of every family with a run and a target of it, and all that reaches a reading."""

import numpy as np
import torch
from helpers import tiny_transcoders, tokens
from hypothesis import strategies as st
from tiny_architectures import ALL_FAMILIES, LinearModel, Read, tiny
from torch import Tensor

from scfm_circuits.circuits.attribution import (
    Reading,
    contributions,
    feature_direction,
    head_direction,
)
from scfm_circuits.circuits.frozen import Frozen, freeze

SHAPES = {"family": st.sampled_from(ALL_FAMILIES), "layers": st.integers(1, 3),
          "heads": st.sampled_from([(1, 1, 16), (2, 1, 6), (4, 4, 4), (4, 2, 4), (4, 1, 8)]),
          "n": st.integers(1, 8), "seed": st.integers(0, 10_000)}


class Case:
    """A random model of a family, a run of it, a target, and the linear oracle of that run."""

    def __init__(self, family: str, layers: int, heads: tuple[int, int, int], n: int, seed: int
                 ) -> None:
        shape = {"layers": layers, "heads": heads[0], "value_heads": heads[1],
                 "head_size": heads[2], "seed": seed}
        self.model = tiny(family, **shape)
        self.run = freeze(self.model, tiny_transcoders(self.model, seed=seed), tokens(n, seed=seed))
        self.linear = LinearModel(tiny(family, **shape), self.run)
        rng = np.random.default_rng(seed)
        self.layer, self.feature, self.position = (
            int(rng.integers(size)) for size in (layers, 24, n))
        self.reading = feature_direction(self.run, self.layer, self.feature, self.position)
        self.clean = (self.run.leaves[0], self.run.mlp_out)
        self.zero = tuple(torch.zeros_like(part) for part in self.clean)

    def target(self, read: Read) -> Tensor:
        """The target's pre-activation, from what the oracle's MLPs read."""
        return self.pre(read)[self.layer, self.position, self.feature]

    def pre(self, read: Read) -> Tensor:
        t = self.run.transcoders
        return torch.einsum("lfd,lnd->lnf", t.W_enc, read.mlp_in - t.b_in[:, None]) \
            + t.b_enc[:, None]

    def gradient(self) -> tuple[Tensor, Tensor]:
        """d target / d (embeddings, MLP outputs), by autograd through transformers' code."""
        leaves = [part.clone().requires_grad_() for part in self.clean]
        return torch.autograd.grad(self.target(self.linear(*leaves)), leaves, allow_unused=True,
                                   materialize_grads=True)


class Collected:
    """All that reaches a reading through any number of heads: `contributions` of the reading, and
    of each head it sees, and so on; heads at the same layer and token are read as one."""

    def __init__(self, run: Frozen, reading: Reading) -> None:
        self.features = torch.zeros_like(run.pre)
        self.errors = torch.zeros_like(run.pre[..., 0])
        self.leaves = torch.zeros_like(run.leaves[..., 0])
        self.constant = torch.zeros(())
        waiting: dict[tuple[int, int], Tensor] = {}
        self._take(run, reading, waiting)
        while waiting:
            layer, source = max(waiting)
            vector = waiting.pop((layer, source))
            self._take(run, Reading(vector, source, layer, layer, vector.new_zeros(()),
                                      vector @ run.residual[layer, source]), waiting)

    def _take(self, run: Frozen, reading: Reading, waiting: dict[tuple[int, int], Tensor]
              ) -> None:
        parts = contributions(run, reading)
        assert abs(parts.total() - reading.value) < 1e-10
        self.features[: reading.mlp_limit, reading.position] += parts.features
        self.errors[: reading.mlp_limit, reading.position] += parts.errors
        self.leaves[:, reading.position] += parts.embedding
        self.constant = self.constant + parts.constant
        for layer in range(reading.attention_limit):
            for source in range(reading.position + 1 if run.causal else len(run.tokens)):
                hops = [head_direction(run, reading, layer, head, source)
                        for head in range(run.patterns.shape[1])]
                for head, hop in enumerate(hops):
                    assert abs(hop.value - parts.heads[layer, head, source]) < 1e-11
                vector = sum(hop.vector for hop in hops)
                waiting[layer, source] = waiting.get((layer, source), 0) + vector

    def total(self) -> Tensor:
        return (self.features.sum() + self.errors.sum() + self.leaves.sum() + self.constant)
