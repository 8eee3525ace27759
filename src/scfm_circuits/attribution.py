"""Exact contributions to a feature or logit in a frozen GPT-NeoX.

With attention patterns and LayerNorm scales held at their values on one text, the model is linear,
so a pre-activation is a sum over what was written into the residual stream:

    h = sum(features) + sum(errors) + embedding + sum(attention heads, by source token) + constant

1. `freeze` runs the model once and keeps patterns, scales, residuals and activations.
2. `feature_direction` and `logit_direction` pull an encoder row or an unembedding row back through
   its LayerNorm to the residual stream: u = C(g * f) / sigma, with C subtracting the mean. This is
   what the paper's Equation 5 leaves out.
3. `contributions` gives every node's share of u . residual, and the constant from the biases.
4. `head_direction` goes one attention hop further: what a head read at its source token.

The constant is computed from the biases, never as the rest, so the sum can be checked.
GPT-NeoX's attention and MLP of one layer read the same residual (parallel residual), so an MLP's
features see attention of earlier layers only.
Imports neither scanpy nor gseapy, so it runs on a bare GPU machine.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scfm_circuits import InputError
from scfm_circuits.language_model import device_of, mlps
from scfm_circuits.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM


@dataclass(frozen=True)
class LayerWeights:
    """What one layer's linear parts look like from the residual stream.

    w_v: (n_heads, d_head, d_model); b_v: (n_heads, d_head); w_o: (n_heads, d_model, d_head);
    b_o, ln1_gain, ln1_bias, ln2_gain, ln2_bias: (d_model,).
    """

    w_v: Tensor
    b_v: Tensor
    w_o: Tensor
    b_o: Tensor
    ln1_gain: Tensor
    ln1_bias: Tensor
    ln2_gain: Tensor
    ln2_bias: Tensor


@dataclass(frozen=True)
class Frozen:
    """One text, run once, with all that the linear view needs.

    tokens: (n_pos,). residual: (n_layers, n_pos, d_model) entering each layer; final: (n_pos,
    d_model) leaving the last. patterns: (n_layers, n_heads, n_pos, n_pos) attention, rows are
    destinations. sigma1, sigma2: (n_layers, n_pos) and sigma_final: (n_pos,) LayerNorm scales.
    mlp_in, mlp_out: (n_layers, n_pos, d_model). pre: (n_layers, n_pos, n_features)
    pre-activations; error: (n_layers, n_pos, d_model) MLP output minus the transcoders' estimate.
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
    error: Tensor
    logits: Tensor
    weights: tuple[LayerWeights, ...]
    transcoders: Transcoders
    final_gain: Tensor
    final_bias: Tensor
    unembedding: Tensor
    parallel: bool

    @property
    def activations(self) -> Tensor:
        """(n_layers, n_pos, n_features) z."""
        return self.pre.relu()


class Direction(NamedTuple):
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


def layer_weights(model: "GPTNeoXForCausalLM") -> tuple[LayerWeights, ...]:
    """The weights of every layer; GPT-NeoX interleaves q, k and v per head."""
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    size = width // heads
    out = []
    layer: Any
    for layer in model.gpt_neox.layers:
        qkv = layer.attention.query_key_value
        if qkv.bias is None:
            raise InputError("The model's attention has no biases; this GPT-NeoX variant is not "
                             "supported: use one with attention_bias.")
        _, _, w_v = qkv.weight.view(heads, 3, size, width).unbind(dim=1)
        _, _, b_v = qkv.bias.view(heads, 3, size).unbind(dim=1)
        dense = layer.attention.dense
        ln1, ln2 = layer.input_layernorm, layer.post_attention_layernorm
        out.append(LayerWeights(
            w_v, b_v, dense.weight.view(width, heads, size).permute(1, 0, 2), dense.bias,
            ln1.weight, ln1.bias, ln2.weight, ln2.bias))
    return tuple(out)


@torch.no_grad()
def freeze(model: "GPTNeoXForCausalLM", transcoders: Transcoders, tokens: np.ndarray | Tensor
           ) -> Frozen:
    """Run one text (n_pos,) and keep what the linear view needs; attention must be `eager`."""
    ids = torch.as_tensor(tokens).to(device_of(model))[None]
    seen: dict[str, list[Tensor]] = {key: [] for key in ("residual", "mid", "in", "out", "final")}

    def keep(key: str):  # type: ignore[no-untyped-def]
        return lambda module, args, kwargs: seen[key].append(
            (args[0] if args else kwargs["hidden_states"])[0])

    handles = [model.gpt_neox.final_layer_norm.register_forward_pre_hook(
        keep("final"), with_kwargs=True)]
    layer: Any
    for layer, mlp in zip(model.gpt_neox.layers, mlps(model), strict=True):
        handles += [
            layer.register_forward_pre_hook(keep("residual"), with_kwargs=True),
            layer.post_attention_layernorm.register_forward_pre_hook(keep("mid"), with_kwargs=True),
            mlp.register_forward_pre_hook(keep("in"), with_kwargs=True),
            mlp.register_forward_hook(lambda module, args, output: seen["out"].append(output[0])),
        ]
    try:
        output = model(input_ids=ids, use_cache=False, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    if not output.attentions or output.attentions[0] is None:
        raise InputError("The model returns no attention patterns; load it with "
                         "attn_implementation='eager'.")
    stacked = {key: torch.stack(values) for key, values in seen.items()}
    eps = model.config.layer_norm_eps
    pre = transcoders.pre_activations(stacked["in"])
    norm = model.gpt_neox.final_layer_norm
    return Frozen(
        tokens=ids[0], residual=stacked["residual"], final=stacked["final"][0],
        patterns=torch.stack(list(output.attentions))[:, 0],
        sigma1=_sigma(stacked["residual"], eps), sigma2=_sigma(stacked["mid"], eps),
        sigma_final=_sigma(stacked["final"][0], eps), mlp_in=stacked["in"], mlp_out=stacked["out"],
        pre=pre, error=stacked["out"] - transcoders.decode(pre.relu()), logits=output.logits[0],
        weights=layer_weights(model), transcoders=transcoders,
        final_gain=norm.weight, final_bias=norm.bias,
        unembedding=model.get_output_embeddings().weight,
        parallel=bool(model.config.use_parallel_residual),
    )


def _sigma(x: Tensor, eps: float) -> Tensor:
    """LayerNorm's divisor: sqrt(variance + eps) over the last dimension."""
    return (x.var(dim=-1, unbiased=False) + eps).sqrt()


def _through_layer_norm(f: Tensor, gain: Tensor) -> Tensor:
    """C(g * f): a reading of LayerNorm's output as one of its (unscaled) input."""
    scaled = gain * f
    return scaled - scaled.mean(dim=-1, keepdim=True)


# --- readings ------------------------------------------------------------------------------------


@torch.no_grad()
def feature_direction(frozen: Frozen, layer: int, feature: int, position: int) -> Direction:
    """The pre-activation of a feature at a position, as a reading of the residual stream."""
    t, weights = frozen.transcoders, frozen.weights[layer]
    f = t.W_enc[layer, feature]
    u = _through_layer_norm(f, weights.ln2_gain) / frozen.sigma2[layer, position]
    constant = f @ (weights.ln2_bias - t.b_in[layer]) + t.b_enc[layer, feature]
    # In a sequential block the MLP also sees its own layer's attention.
    attention_limit = layer if frozen.parallel else layer + 1
    return Direction(u, position, layer, attention_limit, constant,
                     frozen.pre[layer, position, feature])


@torch.no_grad()
def logit_direction(frozen: Frozen, token: int, position: int, minus: int | None = None
                    ) -> Direction:
    """A token's logit less the mean logit (or less another token's), as a reading."""
    unembed, logits = frozen.unembedding, frozen.logits[position]
    other = unembed.mean(dim=0) if minus is None else unembed[minus]
    f = unembed[token] - other
    u = _through_layer_norm(f, frozen.final_gain) / frozen.sigma_final[position]
    n_layers = len(frozen.weights)
    value = logits[token] - (logits.mean() if minus is None else logits[minus])
    return Direction(u, position, n_layers, n_layers, f @ frozen.final_bias, value)


@torch.no_grad()
def head_direction(frozen: Frozen, of: Direction, layer: int, head: int, source: int) -> Direction:
    """What a head carried from `source` into the reading `of`, as a reading at the source.

    Its value is the head's contribution to `of` from that token; its biases were already counted
    in `of`'s constant, so its own constant is zero. It sees layers below `layer` only.
    """
    v = _value_direction(frozen, of.vector, layer)[head]
    scale = frozen.patterns[layer, head, of.position, source] / frozen.sigma1[layer, source]
    u = scale * v
    return Direction(u, source, layer, layer, torch.zeros_like(of.constant),
                     u @ frozen.residual[layer, source])


def _value_direction(frozen: Frozen, u: Tensor, layer: int) -> Tensor:
    """(n_heads, d_model): C(g1 * W_V^T W_O^T u) for each head."""
    return _through_layer_norm(_pulled_to_norm(frozen, u, layer), frozen.weights[layer].ln1_gain)


def _pulled_to_norm(frozen: Frozen, u: Tensor, layer: int) -> Tensor:
    """(n_heads, d_model): W_V^T W_O^T u, a reading of the first LayerNorm's output."""
    weights = frozen.weights[layer]
    return torch.einsum("hkd,hok,o->hd", weights.w_v, weights.w_o, u)


# --- contributions -------------------------------------------------------------------------------


@torch.no_grad()
def contributions(frozen: Frozen, reading: Direction) -> Contributions:
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
        v = _through_layer_norm(pulled, weights.ln1_gain)
        read = frozen.residual[layer] @ v.T / frozen.sigma1[layer][:, None]
        heads.append(frozen.patterns[layer, :, position] * read.T)
        # A value bias arrives in full whatever is attended to, as a pattern's rows sum to one; the
        # sum itself is used, because the model takes its softmax in float32.
        arriving = frozen.patterns[layer, :, position].sum(dim=-1)
        from_values = pulled @ weights.ln1_bias + torch.einsum(
            "hok,hk,o->h", weights.w_o, weights.b_v, u)
        constant = constant + weights.b_o @ u + arriving @ from_values
    n_heads, n_positions = frozen.patterns.shape[1], frozen.patterns.shape[2]
    stacked = torch.stack(heads) if heads else u.new_zeros(0, n_heads, n_positions)
    return Contributions(features, errors, frozen.residual[0, position] @ u, stacked, constant)


@torch.no_grad()
def equation_5(frozen: Frozen, layer: int, feature: int, position: int) -> Tensor:
    """The paper's Equation 5 as printed: z * (f_dec . f_enc), (layer, n_features).

    It reads the residual stream as if there were no LayerNorm before the MLP; kept for comparison.
    """
    t = frozen.transcoders
    return frozen.activations[:layer, position] * torch.einsum(
        "lfd,d->lf", t.W_dec[:layer], t.W_enc[layer, feature])


def closure(frozen: Frozen, reading: Direction) -> float:
    """|sum of contributions - value| over their scale.

    Relative to the larger of |value| and the largest single contribution, because a value near
    zero can be the difference of large parts.
    """
    parts = contributions(frozen, reading)
    largest = max(float(part.abs().max()) for part in parts if part.numel())
    scale = max(abs(float(reading.value)), largest, 1e-30)
    return abs(float(parts.total() - reading.value)) / scale

