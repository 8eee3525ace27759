"""Exact contributions to a feature or logit in a frozen language model.

With attention patterns and the norms' scales held at their values on one text, the model is linear,
so a pre-activation is a sum over what was written into the residual stream:

    h = sum(features) + sum(errors) + embedding + sum(attention heads, by source token) + constant

1. `freeze` runs the model once and keeps patterns, scales, residuals and activations.
2. `feature_direction` and `logit_direction` pull an encoder row or an unembedding row back through
   its norm to the residual stream: u = C(g * f) / sigma, with C subtracting the mean in LayerNorm
   and doing nothing in RMSNorm. This is what the paper's Equation 5 leaves out (`equation_5`).
3. `contributions` gives every node's share of u . residual, and the constant from the biases. Where
   a norm stands on the stream itself (BERT), u changes at it in the same way, and its bias counts.
4. `head_direction` goes one attention hop further: what a head read at its source token.

The constant is computed from the biases, never as the rest, so the sum can be checked.
In a parallel block (GPT-NeoX) attention and MLP of one layer read the same residual, so an MLP's
features see attention of earlier layers only; in a sequential one (Llama) they see their own
layer's too. Which models there are, and where their parts and norms stand, is in `architectures`.
The sums are exact in the model's precision. transformers' RMSNorm rounds to float32, so in a
float64 model with RMSNorm they are as good as float32.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scfm_circuits import InputError
from scfm_circuits.circuits.frozen import AtTokens, Frozen

AT_ONCE = 64
"""Tokens of a reading at many of which the contributions are held together."""


class Reading(NamedTuple):
    """A linear reading `vector . residual + constant` of the stream at one position; or the sum of
    such at several, with a vector for each, (n, d_model), and a list of n positions.

    It sees the embedding, MLPs of layers below `mlp_limit` and attention below `attention_limit`.
    value: what the model itself gives for the reading, to check the sum against.
    """

    vector: Tensor
    position: int | list[int]
    mlp_limit: int
    attention_limit: int
    constant: Tensor
    value: Tensor

    @property
    def token(self) -> int:
        """The one position that is read."""
        assert isinstance(self.position, int)
        return self.position

    @property
    def last_position(self) -> int:
        """The last position that is read."""
        return self.position if isinstance(self.position, int) else max(self.position)


class Contributions(NamedTuple):
    """Everything that adds up to a reading.

    features: (mlp_limit, n_features); errors: (mlp_limit,); embedding: (n_leaves,) what the token
    itself gives, and what its position does where that is embedded too; heads: (attention_limit,
    n_heads, n_pos) by source token; constant: () all biases.
    """

    features: Tensor
    errors: Tensor
    embedding: Tensor
    heads: Tensor
    constant: Tensor

    def total(self) -> Tensor:
        """The sum of all parts: equals the reading's value."""
        return (self.features.sum() + self.errors.sum() + self.embedding.sum() + self.heads.sum()
                + self.constant.sum())


# --- readings ------------------------------------------------------------------------------------


@torch.no_grad()
def feature_direction(frozen: Frozen, layer: int, feature: int, position: int) -> Reading:
    """The pre-activation of a feature at a position, as a reading of the residual stream.

    InputError for one that is not there; a position below 0 is counted from the end.
    """
    layers, tokens, features = frozen.pre.shape
    if not (0 <= layer < layers and 0 <= feature < features and -tokens <= position < tokens):
        raise InputError(f"There is no feature {feature} of layer {layer} at token {position}: the "
                         f"run has {layers} layers of {features:,} features and {tokens} tokens, "
                         "counted from 0.")
    t, norm = frozen.transcoders, frozen.second[layer]
    f = t.W_enc[layer, feature]
    u = norm.back(f, position)
    constant = f @ (norm.norm.bias - t.b_in[layer]) + t.b_enc[layer, feature]
    # In a sequential block the MLP also sees its own layer's attention.
    attention_limit = layer if frozen.parallel else layer + 1
    return Reading(u, position, layer, attention_limit, constant,
                     frozen.pre[layer, position, feature])


@torch.no_grad()
def logit_direction(frozen: Frozen, token: int, position: int, minus: Sequence[int] = ()
                    ) -> Reading:
    """A token's logit less the mean logit, or its log-odds against other tokens, as a reading; of
    a model that gives one value (scGPT), `token` 0, that value.

    minus: other tokens. The value is then logit(token) - logsumexp(logits of `minus`), and the
    direction its gradient in the logits, pushed through the frozen final norm: the token's
    unembedding less the others', weighted by their softmax p among themselves. Because
    logsumexp(l) = sum(p l) + H(p), the constant holds the entropy H(p), and the sum stays exact.
    """
    unembed, bias, logits = frozen.unembedding, frozen.unembedding_bias, frozen.logits[position]
    if minus:
        others = torch.as_tensor(list(minus), device=unembed.device)
        among = logits[others].softmax(dim=-1)
        f_minus, entropy = among @ unembed[others], torch.special.entr(among).sum()
        value, bias_minus = logits[token] - logits[others].logsumexp(dim=-1), among @ bias[others]
    else:
        share = float(len(unembed) > 1)  # one value is read as it is
        f_minus, entropy = share * unembed.mean(dim=0), torch.zeros_like(logits[token])
        value, bias_minus = logits[token] - share * logits.mean(), share * bias.mean()
    f = unembed[token] - f_minus
    u = frozen.last.back(f, position)
    constant = f @ frozen.last.norm.bias - entropy + (bias[token] - bias_minus)
    for one in reversed(frozen.head):
        gated = u * one.gate[position]
        u, constant = gated @ one.weight, constant + gated @ one.bias
    n_layers = len(frozen.weights)
    return Reading(u, position, n_layers, n_layers, constant, value)


@torch.no_grad()
def stream_direction(frozen: Frozen, vector: Tensor, position: int, layer: int) -> Reading:
    """A direction (d_model,) of the stream that enters a layer, at a position; for the number of
    layers, of the stream that leaves the last.

    A direction between two states of a cell, read on the mean embedding of its genes as in-silico
    perturbation does (Theodoris et al. 2023), is the mean of these over the genes: linear, so
    exact. With a norm on the stream (BERT) it is read behind that.
    """
    stream = frozen.final if layer == len(frozen.weights) else frozen.residual[layer]
    return Reading(vector, position, layer, layer, vector.new_zeros(()), vector @ stream[position])


@torch.no_grad()
def head_direction(frozen: Frozen, of: Reading, layer: int, head: int, source: int) -> Reading:
    """What a head carried from `source` into the reading `of`, as a reading at the source.

    Its value is the head's contribution to `of` from that token; its biases were already counted
    in `of`'s constant, so its own constant is zero. It sees layers below `layer` only.
    """
    pulled = _pulled_to_norm(frozen, seen_by(frozen, [of]).attention[layer], layer)[0, head]
    norm = frozen.first[layer]
    scale = frozen.patterns[layer, head, of.token, source] / norm.sigma[source]
    u = scale * norm.norm.back(pulled)
    return Reading(u, source, layer, layer, torch.zeros_like(of.constant),
                     u @ frozen.residual[layer, source])


def _pulled_to_norm(frozen: Frozen, u: Tensor, layer: int) -> Tensor:
    """(n, n_heads, d_model): W_V^T W_O^T u for u (n, d_model), as readings of the first norm's
    output."""
    weights = frozen.weights[layer]
    # In two steps: in one, einsum would form (n_heads, d_head, d_model) products first.
    return torch.einsum("hkd,nhk->nhd", weights.w_v, torch.einsum("hok,no->nhk", weights.w_o, u))


@torch.no_grad()
def through_attention(frozen: Frozen, layer: int, change: Tensor) -> Tensor:
    """What a layer's attention makes of a change of the residual it reads, patterns and scales
    frozen; both (n_pos, d_model). Linear: no bias comes in. The adjoint of `head_direction`,
    summed over heads and sources."""
    weights = frozen.weights[layer]
    values = torch.einsum("hkd,sd->hsk", weights.w_v, frozen.first[layer].onward(change))
    mixed = torch.einsum("hts,hsk->htk", frozen.patterns[layer], values)
    return frozen.across(frozen.behind[layer], torch.einsum("htk,hok->to", mixed, weights.w_o))


# --- contributions -------------------------------------------------------------------------------


class SeenBy(NamedTuple):
    """The vectors of n readings (n, d_model) where each part writes into the stream, and their
    constants (n,).

    mlps, attention: by layer, as far as they see them; start: where the stream begins, before
    `entry`. The same vectors everywhere but behind norms.
    """

    mlps: dict[int, Tensor]
    attention: dict[int, Tensor]
    start: Tensor
    constant: Tensor


@torch.no_grad()
def seen_by(frozen: Frozen, readings: Sequence[Reading]) -> SeenBy:
    """Follow readings, each of one token, down the stream there, back through the norms that stand
    on it. All see the same layers."""
    first, position = readings[0], [one.token for one in readings]
    u = torch.stack([one.vector for one in readings])
    constant = torch.stack([one.constant for one in readings])

    def before(norm: AtTokens | None, u: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
        return (u, constant) if norm is None else (
            norm.back(u, position), constant + u @ norm.norm.bias)

    of_mlps, of_attention = dict[int, Tensor](), dict[int, Tensor]()
    for layer in range(max(first.mlp_limit, first.attention_limit) - 1, -1, -1):
        if layer < first.mlp_limit:
            u, constant = before(frozen.end[layer], u, constant)
            of_mlps[layer] = u
        if layer < first.attention_limit:
            u, constant = before(frozen.middle[layer], u, constant)
            of_attention[layer], constant = before(frozen.behind[layer], u, constant)
    u, constant = before(frozen.entry, u, constant)
    if frozen.same is not None:
        constant = constant + (u * frozen.same[position]).sum(dim=-1)
    return SeenBy(of_mlps, of_attention, u, constant)


def contributions(frozen: Frozen, reading: Reading) -> Contributions:
    """Every node's contribution to a reading; they sum to its value exactly."""
    return Contributions(*(part[0] for part in contributions_each(frozen, [reading])))


@torch.no_grad()
def contributions_each(frozen: Frozen, readings: Sequence[Reading]) -> Contributions:
    """`contributions` of n readings that see the same layers, each part with a leading axis (n,).

    At once, as a product with all decoders of a layer takes hardly longer for many than for one.
    """
    position, t = [one.token for one in readings], frozen.transcoders
    n_mlp, n_attention = readings[0].mlp_limit, readings[0].attention_limit
    seen = seen_by(frozen, readings)
    error = frozen.error[:n_mlp, position].transpose(0, 1)
    none = seen.start.new_zeros(len(readings), 0, seen.start.shape[-1])
    u = torch.stack([seen.mlps[layer] for layer in range(n_mlp)], dim=1) if n_mlp else none
    written = torch.einsum("lfd,nld->nlf", t.W_dec[:n_mlp], u)
    errors, biases = (error * u).sum(dim=-1), (t.b_dec[:n_mlp] * u).sum(dim=(1, 2))
    features = frozen.activations[:n_mlp, position].transpose(0, 1) * written
    constant, heads = seen.constant + biases, []
    for layer in range(n_attention):
        weights, norm, u = frozen.weights[layer], frozen.first[layer], seen.attention[layer]
        pulled = _pulled_to_norm(frozen, u, layer)
        pattern = frozen.patterns[layer, :, position].transpose(0, 1)
        read = torch.einsum("nhd,sd->nhs", norm.norm.back(pulled), frozen.residual[layer])
        heads.append(pattern * (read / norm.sigma))
        # A value bias arrives in full whatever is attended to, as a pattern's rows sum to one; the
        # sum itself is used, because the model takes its softmax in float32.
        from_values = pulled @ norm.norm.bias + (
            torch.einsum("hok,no->nhk", weights.w_o, u) * weights.b_v).sum(dim=-1)
        constant = constant + u @ weights.b_o + (pattern.sum(dim=-1) * from_values).sum(dim=-1)
    n_heads, n_positions = frozen.patterns.shape[1], frozen.patterns.shape[2]
    stacked = (torch.stack(heads, dim=1) if heads
               else constant.new_zeros(len(readings), 0, n_heads, n_positions))
    embedding = torch.stack([(leaf[position] * seen.start).sum(dim=-1) for leaf in frozen.leaves],
                            dim=-1)
    return Contributions(features, errors, embedding, stacked, constant)


def added_up(readings: Sequence[Reading]) -> Reading:
    """The sum of readings at single positions, no two at one, that see the same layers."""
    first = readings[0]
    return first._replace(
        vector=torch.stack([one.vector for one in readings]),
        position=[one.token for one in readings],
        constant=torch.stack([one.constant for one in readings]).sum(),
        value=torch.stack([one.value for one in readings]).sum())


def one_by_one(reading: Reading) -> list[Reading]:
    """The readings at single positions that a reading is the sum of; the first has its constant.
    Of several, the values of the single ones are not known (NaN)."""
    if isinstance(reading.position, int):
        return [reading]
    none = torch.zeros_like(reading.constant)
    return [reading._replace(vector=vector, position=position, value=none * torch.nan,
                             constant=none if place else reading.constant)
            for place, (vector, position) in enumerate(zip(
                reading.vector, reading.position, strict=True))]


def in_parts(reading: Reading) -> Iterator[list[Reading]]:
    """`one_by_one`, at most `AT_ONCE` at a time."""
    every = one_by_one(reading)
    return (every[start : start + AT_ONCE] for start in range(0, len(every), AT_ONCE))


def closure(frozen: Frozen, reading: Reading) -> float:
    """|sum of contributions - value| over their scale.

    Relative to the larger of |value| and the largest single contribution, because a value near
    zero can be the difference of large parts.
    """
    total, largest = torch.zeros_like(reading.constant), abs(float(reading.value))
    for some in in_parts(reading):
        parts = contributions_each(frozen, some)
        largest = max(largest, *(float(part.abs().max()) for part in parts if part.numel()))
        total = total + parts.total()
    return abs(float(total - reading.value)) / max(largest, 1e-30)


# --- the paper's Equation 5 ----------------------------------------------------------------------


@torch.no_grad()
def equation_5(frozen: Frozen, layer: int, feature: int, position: int) -> Tensor:
    """The paper's Equation 5 as printed: z * (f_dec . f_enc), (layer, n_features).

    It reads the residual stream as if there were no norm before the MLP; kept for comparison.
    """
    t = frozen.transcoders
    return frozen.activations[:layer, position] * torch.einsum(
        "lfd,d->lf", t.W_dec[:layer], t.W_enc[layer, feature])


class Equation5(NamedTuple):
    """The paper's Equation 5 beside the exact contributions, over the features active at a token.

    correlation: NaN for fewer than three of them. ratio: of the sums over all features; NaN if the
    exact one is 0.
    """

    correlation: float
    ratio: float


def compare_equation_5(frozen: Frozen, parts: Contributions, layer: int, feature: int,
                       position: int) -> Equation5:
    """Equation 5 as printed against `parts`, the exact contributions to the same feature."""
    raw = equation_5(frozen, layer, feature, position).flatten().cpu().numpy()
    exact = parts.features.flatten().cpu().numpy()
    active = frozen.activations[:layer, position].flatten().cpu().numpy() > 0
    agreement = np.corrcoef(raw[active], exact[active])[0, 1] if active.sum() > 2 else np.nan
    return Equation5(float(agreement), float(raw.sum() / exact.sum()) if exact.sum() else np.nan)
