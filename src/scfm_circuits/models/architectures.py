"""Where the parts of a language model are: one description for each family that can be traced.

A family fits if a layer reads and writes one residual stream, in transformers' own classes:

    sequential:  h' = h + attention(norm1(h));  h'' = h' + mlp(norm2(h'))
    parallel:    h' = h + attention(norm1(h)) + mlp(norm2(h))

GPT-NeoX has LayerNorm, a setting for either arrangement, and q, k and v in one matrix, interleaved
by head. Llama, Mistral and Qwen2 have RMSNorm, are sequential, and several heads may share one
value head (grouped-query attention). In all of them norm2 is called `post_attention_layernorm`,
and nothing but a rotation of q and k depends on the position. A family that normalises what
attention or the MLP writes (Gemma 2) or scales by 1 + gain (Gemma) does not fit: it is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from scfm_circuits import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

class Norm(NamedTuple):
    """LayerNorm (centred) or RMSNorm: gain * C(x) / scale(x) + bias; C subtracts the mean if
    centred. gain, bias: (d_model,); an RMSNorm's bias is zero."""

    gain: Tensor
    bias: Tensor
    eps: float
    centred: bool

    def scale(self, x: Tensor) -> Tensor:
        """The divisor of x (..., d_model): sqrt(variance + eps), of RMSNorm sqrt(mean square +
        eps)."""
        if self.centred:
            return (x.var(dim=-1, unbiased=False) + self.eps).sqrt()
        return (x.square().mean(dim=-1) + self.eps).sqrt()


class Heads(NamedTuple):
    """What attention does with what it reads, head by head; biases are zero where there are none.

    values: (n_value_heads, d_head, d_model); value_bias: (n_value_heads, d_head); output:
    (n_heads, d_model, d_head); output_bias: (d_model,).
    """

    values: Tensor
    value_bias: Tensor
    output: Tensor
    output_bias: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """What one layer's linear parts look like from the residual stream.

    values: (n_value_heads, d_head, d_model); value_bias: (n_value_heads, d_head); w_o: (n_heads,
    d_model, d_head); b_o, ln1_gain, ln1_bias, ln2_gain, ln2_bias: (d_model,). Biases that the
    model does not have are zero.
    """

    values: Tensor
    value_bias: Tensor
    w_o: Tensor
    b_o: Tensor
    ln1_gain: Tensor
    ln1_bias: Tensor
    ln2_gain: Tensor
    ln2_bias: Tensor

    @property
    def w_v(self) -> Tensor:
        """(n_heads, d_head, d_model): the values each head reads."""
        return self._for_each_head(self.values)

    @property
    def b_v(self) -> Tensor:
        """(n_heads, d_head): their biases."""
        return self._for_each_head(self.value_bias)

    def _for_each_head(self, x: Tensor) -> Tensor:
        # Neighbouring heads share a value head. Made when asked for: a copy for all layers of a
        # 7B model would take gigabytes.
        shared = len(self.w_o) // len(x)
        return x if shared == 1 else x.repeat_interleave(shared, dim=0)


@dataclass(frozen=True)
class Architecture:
    """The names of a family's parts, and how to read its weights.

    body: attribute of the causal model that holds `layers`; final_norm: the norm in `body` before
    the unembedding. norm: from a norm's module to its description. heads: from a layer. neurons:
    attribute of an MLP, the linear map whose rows drive its neurons (of a gated MLP, the gates).
    parallel: from the configuration, whether MLP and attention of a layer read the same residual.
    """

    family: str
    body: str
    final_norm: str
    norm: Callable[[Any], Norm]
    heads: Callable[[Any], Heads]
    neurons: str
    parallel: Callable[[Any], bool]


# --- reading weights -----------------------------------------------------------------------------


def _layer_norm(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight, module.bias, module.eps, centred=True)


def _rms_norm(module: Any) -> Norm:
    return Norm(module.weight, torch.zeros_like(module.weight), module.variance_epsilon,
                centred=False)


def _bias(linear: nn.Linear) -> Tensor:
    """The bias of a linear map, zeros if it has none."""
    return linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias


def _output(linear: nn.Linear, size: int) -> Tensor:
    """(n_heads, d_model, d_head): the columns of an output projection that each head uses."""
    return linear.weight.view(len(linear.weight), -1, size).permute(1, 0, 2)


def _neox_heads(layer: Any) -> Heads:
    """The rows of `query_key_value` are, head by head, its q, its k and its v."""
    attention = layer.attention
    qkv, dense, size = attention.query_key_value, attention.dense, attention.head_size
    _, _, values = qkv.weight.view(-1, 3, size, qkv.in_features).unbind(dim=1)
    _, _, value_bias = _bias(qkv).view(-1, 3, size).unbind(dim=1)
    return Heads(values, value_bias, _output(dense, size), _bias(dense))


def _llama_heads(layer: Any) -> Heads:
    """The width of all heads together need not be d_model."""
    v, out, size = layer.self_attn.v_proj, layer.self_attn.o_proj, layer.self_attn.head_dim
    return Heads(v.weight.view(-1, size, v.in_features), _bias(v).view(-1, size),
                 _output(out, size), _bias(out))


def _llama_type(family: str) -> Architecture:
    return Architecture(family, "model", "norm", _rms_norm, _llama_heads, "gate_proj",
                        lambda config: False)


_ARCHITECTURES = {
    "gpt_neox": Architecture("GPT-NeoX (Pythia, C2S-Pythia)", "gpt_neox", "final_layer_norm",
                             _layer_norm, _neox_heads, "dense_h_to_4h",
                             lambda config: bool(config.use_parallel_residual)),
    "llama": _llama_type("Llama"),
    "mistral": _llama_type("Mistral"),
    "qwen2": _llama_type("Qwen2"),
}
"""By `model_type` of the configuration."""


# --- parts of a model ----------------------------------------------------------------------------


def check_supported(model_type: str | None, name: str) -> Architecture:
    """The family of a configuration's `model_type`; InputError, which calls it `name`, if none."""
    found = _ARCHITECTURES.get(model_type or "")
    if found is None:
        *others, last = (one.family for one in _ARCHITECTURES.values())
        raise InputError(f"The model is a {name}; MLP sites and circuits are known for "
                         f"{', '.join(others)} and {last} only: set `model` to one of these.")
    return found


def architecture_of(model: nn.Module) -> Architecture:
    """The family of a causal language model; InputError, naming those supported, if none."""
    config: Any = getattr(model, "config", None)
    found = check_supported(getattr(config, "model_type", None), type(model).__name__)
    if not hasattr(model, found.body):
        raise InputError(f"The model is a {type(model).__name__}, which has no `{found.body}`; "
                         "load it as a causal language model (AutoModelForCausalLM).")
    return found


def decoder(model: nn.Module) -> nn.Module:
    """The part of the model that gives the last residual, without the unembedding."""
    return getattr(model, architecture_of(model).body)


def decoder_layers(model: nn.Module) -> list[Any]:
    """The layers, which have `input_layernorm`, `post_attention_layernorm` and `mlp`."""
    return list(decoder(model).layers)  # type: ignore[arg-type]


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attention modules, layer by layer."""
    return [getattr(layer, "attention", None) or layer.self_attn
            for layer in decoder_layers(model)]


def final_norm(model: nn.Module) -> Any:
    """The module of the norm before the unembedding."""
    return getattr(decoder(model), architecture_of(model).final_norm)


def neuron_rows(model: nn.Module) -> list[Tensor]:
    """(n_neurons, d_model) of each layer: the directions in its MLP's input that drive neurons."""
    name = architecture_of(model).neurons
    return [getattr(layer.mlp, name).weight for layer in decoder_layers(model)]


def layer_weights(model: "PreTrainedModel") -> tuple[LayerWeights, ...]:
    """The weights of every layer; views of the model's own where they can be."""
    family = architecture_of(model)
    weights = []
    for layer in decoder_layers(model):
        first, second = (family.norm(norm) for norm in
                         (layer.input_layernorm, layer.post_attention_layernorm))
        weights.append(LayerWeights(*family.heads(layer), first.gain, first.bias, second.gain,
                                    second.bias))
    return tuple(weights)
