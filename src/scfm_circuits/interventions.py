"""Is a circuit what the model uses? Take its features away and see what the target does.

A feature is ablated by subtracting what it writes, z d, from the MLP's output at its token, in the
real model: attention, LayerNorm and the MLPs' other features then respond as they will. z is what
the feature's activation is by then, not what it was before: a feature that has already fallen
silent because others were taken away has nothing left to lose. The prediction is the change in the
frozen linear model, where only attention carries the difference on.
Imports neither pandas nor scanpy.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scfm_circuits.attribution import Direction, Frozen
from scfm_circuits.language_model import mlps

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM


class FeatureAt(NamedTuple):
    """A feature at a token."""

    layer: int
    feature: int
    position: int


class Ablation(NamedTuple):
    """A target's pre-activation before and after, and the change predicted and measured."""

    before: float
    predicted_change: float
    measured_change: float


@torch.no_grad()
def written_by(frozen: Frozen, features: Sequence[FeatureAt]) -> Tensor:
    """(n_layers, n_pos, d_model): the sum of what the features write."""
    total = torch.zeros_like(frozen.mlp_out)
    for layer, feature, position in features:
        z = frozen.activations[layer, position, feature]
        total[layer, position] += z * frozen.transcoders.W_dec[layer, feature]
    return total


@torch.no_grad()
def frozen_change(frozen: Frozen, change: Tensor, reading: Direction) -> float:
    """What a change of the MLPs' outputs (n_layers, n_pos, d_model) does to a reading, in the
    linear model with attention patterns and LayerNorm scales frozen."""
    stream = torch.zeros_like(frozen.residual[0])
    for layer in range(max(reading.mlp_limit, reading.attention_limit)):
        weights = frozen.weights[layer]
        centred = stream - stream.mean(dim=-1, keepdim=True)
        normed = centred / frozen.sigma1[layer][:, None] * weights.ln1_gain
        values = torch.einsum("hkd,sd->hsk", weights.w_v, normed)
        carried = torch.einsum("hts,hsk,hok->to", frozen.patterns[layer], values, weights.w_o)
        if layer < reading.attention_limit:
            stream = stream + carried
        if layer < reading.mlp_limit:
            stream = stream + change[layer]
    return float(stream[reading.position] @ reading.vector)


@torch.no_grad()
def ablate(model: "GPTNeoXForCausalLM", frozen: Frozen, features: Sequence[FeatureAt],
           target: FeatureAt, reading: Direction) -> Ablation:
    """Remove the features' writing in the real model and read the target's pre-activation."""
    seen: list[Tensor] = []
    modules, t = mlps(model), frozen.transcoders
    by_layer: dict[int, tuple[list[int], list[int]]] = {}
    for layer, feature, position in features:
        positions, indices = by_layer.setdefault(layer, ([], []))
        positions.append(position)
        indices.append(feature)

    def without(layer: int):  # type: ignore[no-untyped-def]
        positions, indices = by_layer[layer]

        def hook(module, args, output):  # type: ignore[no-untyped-def]
            x = args[0][0, positions] - t.b_in[layer]
            z = ((x * t.W_enc[layer, indices]).sum(dim=-1) + t.b_enc[layer, indices]).relu()
            changed = output.clone()
            changed[0].index_add_(0, torch.tensor(positions, device=x.device),
                                  z[:, None] * t.W_dec[layer, indices], alpha=-1)
            return changed

        return hook

    handles = [modules[layer].register_forward_hook(without(layer)) for layer in by_layer]
    handles.append(modules[target.layer].register_forward_pre_hook(
        lambda module, args: seen.append(args[0][0, target.position])))
    try:
        model(input_ids=frozen.tokens[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    after = frozen.transcoders.layer_pre_activations(target.layer, seen[0])[target.feature]
    before = float(reading.value)
    predicted = frozen_change(frozen, -written_by(frozen, features), reading)
    return Ablation(before, predicted, float(after) - before)


def matched_features(frozen: Frozen, features: Sequence[FeatureAt], target: FeatureAt,
                     rng: np.random.Generator) -> list[FeatureAt]:
    """For each feature another of its layer that is active at its token: a random circuit.

    Features of the circuit, and the target, are not drawn. Where a token has too few others, the
    draw is from the layer's other tokens up to the target's.
    """
    taken = {*features, target}
    drawn: list[FeatureAt] = []
    active = frozen.activations > 0
    for layer, _, position in features:
        here = [FeatureAt(layer, int(f), position)
                for f in torch.nonzero(active[layer, position])[:, 0]]
        pool = [one for one in here if one not in taken]
        if not pool:
            pool = [FeatureAt(layer, int(f), int(p)) for p, f in
                    torch.nonzero(active[layer, : target.position + 1])]
            pool = [one for one in pool if one not in taken]
        if pool:
            choice = pool[int(rng.integers(len(pool)))]
            drawn.append(choice)
            taken.add(choice)
    return drawn
