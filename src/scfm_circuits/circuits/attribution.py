"""Exact contributions to a feature or logit in a frozen language model.

With attention patterns and the norms' scales held at their values on one text, the model is linear,
so a pre-activation is a sum over what was written into the residual stream:

    h = sum(features) + sum(errors) + embedding + sum(attention heads, by source token) + constant

1. `freeze` runs the model once and keeps patterns, scales, residuals and activations.
2. `feature_direction` and `logit_direction` pull an encoder row or an unembedding row back through
   its norm to the residual stream: u = C(g * f) / sigma, with C subtracting the mean in LayerNorm
   and doing nothing in RMSNorm. This is what the paper's Equation 5 leaves out.
3. `contributions` gives every node's share of u . residual, and the constant from the biases.
4. `head_direction` goes one attention hop further: what a head read at its source token.

The constant is computed from the biases, never as the rest, so the sum can be checked.
In a parallel block (GPT-NeoX) attention and MLP of one layer read the same residual, so an MLP's
features see attention of earlier layers only; in a sequential one (Llama) they see their own
layer's too. Which models there are, and where their parts stand, is in `architectures`.
The sums are exact in the model's precision. transformers' RMSNorm rounds to float32, so in a
float64 model with RMSNorm they are as good as float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scfm_circuits import InputError
from scfm_circuits.models.architectures import (
    LayerWeights,
    architecture_of,
    decoder_layers,
    final_norm,
    layer_weights,
)
from scfm_circuits.models.mlp_sites import device_of, hooked
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NO_CIRCUITS = ("Circuits are traced through transcoders, and the profile asks for autoencoders of "
               "MLP outputs (`site: sae`); set `site: transcoder`.")


@dataclass(frozen=True)
class Frozen:
    """One text, run once, with all that the linear view needs.

    tokens: (n_pos,). residual: (n_layers, n_pos, d_model) entering each layer; final: (n_pos,
    d_model) leaving the last. patterns: (n_layers, n_heads, n_pos, n_pos) attention, rows are
    destinations. sigma1, sigma2: (n_layers, n_pos) and sigma_final: (n_pos,) the norms' scales.
    mlp_in, mlp_out: (n_layers, n_pos, d_model). pre, activations: (n_layers, n_pos, n_features)
    before and after the transcoders' activation function. error: (n_layers, n_pos, d_model) MLP
    output minus what the features and the output bias write (what a skip connection writes is part
    of it).
    parallel: an MLP does not see its layer's attention. centred: the norms subtract the mean
    (LayerNorm), or do not (RMSNorm).
    """

    tokens: Tensor
    residual: Tensor
    final: Tensor
    patterns: Tensor
    sigma1: Tensor
    sigma2: Tensor
    sigma_final: Tensor
    mlp_in: Tensor
    mlp_out: Tensor
    pre: Tensor
    activations: Tensor
    error: Tensor
    logits: Tensor
    weights: tuple[LayerWeights, ...]
    transcoders: Transcoders
    final_gain: Tensor
    final_bias: Tensor
    unembedding: Tensor
    parallel: bool
    centred: bool

    def centre(self, x: Tensor) -> Tensor:
        """C x: what the norms do to x (..., d_model) before they scale it; C is symmetric."""
        return x - x.mean(dim=-1, keepdim=True) if self.centred else x


class Reading(NamedTuple):
    """A linear reading `vector . residual + constant` of the stream at one position.

    It sees the embedding, MLPs of layers below `mlp_limit` and attention below `attention_limit`.
    value: what the model itself gives for the reading, to check the sum against.
    """

    vector: Tensor
    position: int
    mlp_limit: int
    attention_limit: int
    constant: Tensor
    value: Tensor


class Contributions(NamedTuple):
    """Everything that adds up to a reading.

    features: (mlp_limit, n_features); errors: (mlp_limit,); embedding: (); heads:
    (attention_limit, n_heads, n_pos) by source token; constant: () all biases.
    """

    features: Tensor
    errors: Tensor
    embedding: Tensor
    heads: Tensor
    constant: Tensor

    def total(self) -> Tensor:
        """The sum of all parts: equals the reading's value."""
        return (self.features.sum() + self.errors.sum() + self.embedding + self.heads.sum()
                + self.constant)


# --- the frozen run ------------------------------------------------------------------------------


@torch.no_grad()
def freeze(model: "PreTrainedModel", transcoders: Transcoders, tokens: np.ndarray | Tensor
           ) -> Frozen:
    """Run one text (n_pos,) and keep what the linear view needs; attention must be `eager`.

    Raises InputError for a model of another family than `architectures` knows, for one whose
    attention gives no patterns, and for autoencoders, which do not read what an MLP reads.
    """
    family = architecture_of(model)
    if transcoders.variant.site != "transcoder":
        raise InputError(NO_CIRCUITS)
    ids = torch.as_tensor(tokens).to(device_of(model))[None]
    output, seen = _recorded(model, ids)
    if not output.attentions or output.attentions[0] is None:
        raise InputError("The model returns no attention patterns; load it with "
                         "attn_implementation='eager'.")
    stacked = {key: torch.stack(values) for key, values in seen.items()}
    layers, last = decoder_layers(model), family.norm(final_norm(model))
    sigma1 = [family.norm(layer.input_layernorm).scale(x)
              for layer, x in zip(layers, seen["residual"], strict=True)]
    sigma2 = [family.norm(layer.post_attention_layernorm).scale(x)
              for layer, x in zip(layers, seen["mid"], strict=True)]
    pre = transcoders.pre_activations(stacked["in"])
    z = transcoders.activate(pre)
    unembedding: Any = model.get_output_embeddings()
    return Frozen(
        tokens=ids[0], residual=stacked["residual"], final=stacked["final"][0],
        patterns=torch.stack(list(output.attentions))[:, 0],
        sigma1=torch.stack(sigma1), sigma2=torch.stack(sigma2),
        sigma_final=last.scale(stacked["final"][0]), mlp_in=stacked["in"], mlp_out=stacked["out"],
        pre=pre, activations=z, error=stacked["out"] - transcoders.decode(z),
        logits=output.logits[0],
        weights=layer_weights(model), transcoders=transcoders,
        final_gain=last.gain, final_bias=last.bias, unembedding=unembedding.weight,
        parallel=family.parallel(model.config), centred=last.centred,
    )


def _recorded(model: "PreTrainedModel", ids: Tensor) -> tuple[Any, dict[str, list[Tensor]]]:
    """The model's output with attention patterns, and what passed through its parts, by layer:
    residual (entering the layer), mid (entering the second norm), in and out of the MLP; final."""
    seen: dict[str, list[Tensor]] = {key: [] for key in ("residual", "mid", "in", "out", "final")}

    def keep(key: str):  # type: ignore[no-untyped-def]
        return lambda module, args, kwargs: seen[key].append(
            (args[0] if args else kwargs["hidden_states"])[0])

    handles = [final_norm(model).register_forward_pre_hook(keep("final"), with_kwargs=True)]
    for layer in decoder_layers(model):
        handles += [
            layer.register_forward_pre_hook(keep("residual"), with_kwargs=True),
            layer.post_attention_layernorm.register_forward_pre_hook(keep("mid"), with_kwargs=True),
            layer.mlp.register_forward_pre_hook(keep("in"), with_kwargs=True),
            layer.mlp.register_forward_hook(
                lambda module, args, output: seen["out"].append(output[0])),
        ]
    with hooked(handles):
        return model(input_ids=ids, use_cache=False, output_attentions=True), seen


# --- readings ------------------------------------------------------------------------------------


@torch.no_grad()
def feature_direction(frozen: Frozen, layer: int, feature: int, position: int) -> Reading:
    """The pre-activation of a feature at a position, as a reading of the residual stream."""
    t, weights = frozen.transcoders, frozen.weights[layer]
    f = t.W_enc[layer, feature]
    u = frozen.centre(weights.ln2_gain * f) / frozen.sigma2[layer, position]
    constant = f @ (weights.ln2_bias - t.b_in[layer]) + t.b_enc[layer, feature]
    # In a sequential block the MLP also sees its own layer's attention.
    attention_limit = layer if frozen.parallel else layer + 1
    return Reading(u, position, layer, attention_limit, constant,
                     frozen.pre[layer, position, feature])


@torch.no_grad()
def logit_direction(frozen: Frozen, token: int, position: int, minus: Sequence[int] = ()
                    ) -> Reading:
    """A token's logit less the mean logit, or its log-odds against other tokens, as a reading.

    minus: other tokens. The value is then logit(token) - logsumexp(logits of `minus`), and the
    direction its gradient in the logits, pushed through the frozen final norm: the token's
    unembedding less the others', weighted by their softmax p among themselves. Because
    logsumexp(l) = sum(p l) + H(p), the constant holds the entropy H(p), and the sum stays exact.
    """
    unembed, logits = frozen.unembedding, frozen.logits[position]
    if minus:
        others = torch.as_tensor(list(minus), device=unembed.device)
        among = logits[others].softmax(dim=-1)
        f_minus, entropy = among @ unembed[others], torch.special.entr(among).sum()
        value = logits[token] - logits[others].logsumexp(dim=-1)
    else:
        f_minus, entropy = unembed.mean(dim=0), torch.zeros_like(logits[token])
        value = logits[token] - logits.mean()
    f = unembed[token] - f_minus
    u = frozen.centre(frozen.final_gain * f) / frozen.sigma_final[position]
    n_layers = len(frozen.weights)
    return Reading(u, position, n_layers, n_layers, f @ frozen.final_bias - entropy, value)


@torch.no_grad()
def head_direction(frozen: Frozen, of: Reading, layer: int, head: int, source: int) -> Reading:
    """What a head carried from `source` into the reading `of`, as a reading at the source.

    Its value is the head's contribution to `of` from that token; its biases were already counted
    in `of`'s constant, so its own constant is zero. It sees layers below `layer` only.
    """
    v = _value_direction(frozen, of.vector, layer)[head]
    scale = frozen.patterns[layer, head, of.position, source] / frozen.sigma1[layer, source]
    u = scale * v
    return Reading(u, source, layer, layer, torch.zeros_like(of.constant),
                     u @ frozen.residual[layer, source])


def _value_direction(frozen: Frozen, u: Tensor, layer: int) -> Tensor:
    """(n_heads, d_model): C(g1 * W_V^T W_O^T u) for each head."""
    return frozen.centre(frozen.weights[layer].ln1_gain * _pulled_to_norm(frozen, u, layer))


def _pulled_to_norm(frozen: Frozen, u: Tensor, layer: int) -> Tensor:
    """(n_heads, d_model): W_V^T W_O^T u, a reading of the first norm's output."""
    weights = frozen.weights[layer]
    # In two steps: in one, einsum would form (n_heads, d_head, d_model) products first.
    return torch.einsum("hkd,hk->hd", weights.w_v, torch.einsum("hok,o->hk", weights.w_o, u))


@torch.no_grad()
def through_attention(frozen: Frozen, layer: int, change: Tensor) -> Tensor:
    """What a layer's attention makes of a change of the residual it reads, patterns and scales
    frozen; both (n_pos, d_model). Linear: no bias comes in. The adjoint of `head_direction`,
    summed over heads and sources."""
    weights = frozen.weights[layer]
    normed = frozen.centre(change) / frozen.sigma1[layer][:, None] * weights.ln1_gain
    values = torch.einsum("hkd,sd->hsk", weights.w_v, normed)
    mixed = torch.einsum("hts,hsk->htk", frozen.patterns[layer], values)
    return torch.einsum("htk,hok->to", mixed, weights.w_o)


# --- contributions -------------------------------------------------------------------------------


@torch.no_grad()
def contributions(frozen: Frozen, reading: Reading) -> Contributions:
    """Every node's contribution to a reading; they sum to its value exactly."""
    u, position, t = reading.vector, reading.position, frozen.transcoders
    n_mlp, n_attention = reading.mlp_limit, reading.attention_limit
    written = torch.einsum("lfd,d->lf", t.W_dec[:n_mlp], u)
    features = frozen.activations[:n_mlp, position] * written
    errors = frozen.error[:n_mlp, position] @ u
    constant = reading.constant + (t.b_dec[:n_mlp] @ u).sum()
    heads = []
    for layer in range(n_attention):
        weights = frozen.weights[layer]
        pulled = _pulled_to_norm(frozen, u, layer)
        v = frozen.centre(weights.ln1_gain * pulled)
        read = frozen.residual[layer] @ v.T / frozen.sigma1[layer][:, None]
        heads.append(frozen.patterns[layer, :, position] * read.T)
        # A value bias arrives in full whatever is attended to, as a pattern's rows sum to one; the
        # sum itself is used, because the model takes its softmax in float32.
        arriving = frozen.patterns[layer, :, position].sum(dim=-1)
        from_values = pulled @ weights.ln1_bias + (
            torch.einsum("hok,o->hk", weights.w_o, u) * weights.b_v).sum(dim=-1)
        constant = constant + weights.b_o @ u + arriving @ from_values
    n_heads, n_positions = frozen.patterns.shape[1], frozen.patterns.shape[2]
    stacked = torch.stack(heads) if heads else u.new_zeros(0, n_heads, n_positions)
    return Contributions(features, errors, frozen.residual[0, position] @ u, stacked, constant)


@torch.no_grad()
def equation_5(frozen: Frozen, layer: int, feature: int, position: int) -> Tensor:
    """The paper's Equation 5 as printed: z * (f_dec . f_enc), (layer, n_features).

    It reads the residual stream as if there were no norm before the MLP; kept for comparison.
    """
    t = frozen.transcoders
    return frozen.activations[:layer, position] * torch.einsum(
        "lfd,d->lf", t.W_dec[:layer], t.W_enc[layer, feature])


def closure(frozen: Frozen, reading: Reading) -> float:
    """|sum of contributions - value| over their scale.

    Relative to the larger of |value| and the largest single contribution, because a value near
    zero can be the difference of large parts.
    """
    parts = contributions(frozen, reading)
    largest = max(float(part.abs().max()) for part in parts if part.numel())
    scale = max(abs(float(reading.value)), largest, 1e-30)
    return abs(float(parts.total() - reading.value)) / scale


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
