"""Where the parts of a language model are: one description for each family that can be traced.

A family fits if its layers read and write one residual stream h, in transformers' own classes. A
layer is then a list of steps on the stream: a branch (attention or MLP) adds to it, or a norm takes
its place. The norm may stand at four places:

    in front of a branch       h + attention(norm(h))     GPT-NeoX, Llama, Mistral, Qwen2, Gemma 2
    behind a branch            h + norm(attention(h))     Gemma 2, which has both
    on the stream, afterwards  norm(h + attention(h))     BERT (Geneformer), scGPT
    on the stream, before      the same as afterwards, one branch later

GPT-NeoX has LayerNorm, q, k and v in one matrix, interleaved by head, and a setting by which
attention and MLP of a layer read the same h (parallel). Llama, Mistral and Qwen2 have RMSNorm, and
several heads may share one value head (grouped-query attention); so has Gemma 2, which scales by
1 + gain. In these nothing but a rotation of q and k depends on the position. BERT's attention sees
all tokens, its stream begins as the norm of a token's, a position's and a type's embedding, and
behind its last layer stands one more map (the head of its masked language model). scGPT
(`models.scgpt`, the one family that transformers has not) is alike, but that its stream begins as
a gene's and a level's embedding, each normed, and that its head gives a value and has no norm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from scfm_circuits import InputError


class Norm(NamedTuple):
    """LayerNorm (centred) or RMSNorm: gain * C(x) / scale(x) + bias; C subtracts the mean if
    centred. gain, bias: (d_model,); an RMSNorm's bias is zero. absent: there is none, and x stays
    as it is."""

    gain: Tensor
    bias: Tensor
    eps: float
    centred: bool
    absent: bool = False

    def centre(self, x: Tensor) -> Tensor:
        """C x, of x (..., d_model); C is symmetric."""
        return x - x.mean(dim=-1, keepdim=True) if self.centred else x

    def back(self, u: Tensor) -> Tensor:
        """A reading u (..., d_model) of the output as one of the input, but for the scale there:
        C(gain * u)."""
        return self.centre(self.gain * u)

    def scale(self, x: Tensor) -> Tensor:
        """The divisor of x (..., d_model): sqrt(variance + eps), of RMSNorm sqrt(mean square +
        eps)."""
        if self.absent:
            return torch.ones_like(x[..., 0])
        if self.centred:
            return (x.var(dim=-1, unbiased=False) + self.eps).sqrt()
        return (x.square().mean(dim=-1) + self.eps).sqrt()


class Heads(NamedTuple):
    """What attention does with what it reads, head by head; biases are zero where there are none.

    values: (n_value_heads, d_head, d_model); value_bias: (n_value_heads, d_head); w_o: (n_heads,
    d_model, d_head); b_o: (d_model,).
    """

    values: Tensor
    value_bias: Tensor
    w_o: Tensor
    b_o: Tensor

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


class Step(NamedTuple):
    """What a layer does to the stream next: a branch adds to it, or a norm takes its place.

    norm: in a layer, the norm in front of the branch, or the norm itself; behind: the norm on what
    attention writes. Empty: there is none.
    """

    does: Literal["attention", "mlp", "norm"]
    norm: str = ""
    behind: str = ""


class Embedded(NamedTuple):
    """What the stream begins with, (n_pos, d_model) each: what tells the token, what its position
    or its level, and what is the same for all; `norm` of their sum enters the first layer."""

    token: Tensor
    other: Tensor
    same: Tensor | None = None
    norm: Norm | None = None


@dataclass(frozen=True)
class Architecture:
    """The names of a family's parts, and how to read its weights.

    body: attribute of the model that holds the layers, at `layers` in it; final_norm: the norm
    before the unembedding, in the model, empty if there is none. norm: from a norm's module to its
    description. heads: from a layer. neurons: in a layer, the linear map whose rows drive its MLP's
    neurons (of a gated MLP, the gates). parallel: from the configuration, whether MLP and attention
    of a layer read the same residual. steps: of a layer, in order. mlp: in a layer, the modules
    through which what the MLP reads becomes what it writes to the stream, one after the other.
    causal: a token sees those before it alone. auto: transformers' class that loads it. embedded:
    from the body and (n_pos,) tokens, where the stream begins with more than a token's embedding,
    or a norm stands on that. head: in the model, a map between the stream and the final norm; maps:
    in it, the linear ones, each with a function behind it. written: circuit-tracer's name for what
    an MLP writes to the stream; encoders it does not know.
    """

    family: str
    body: str
    final_norm: str
    norm: Callable[[Any], Norm]
    heads: Callable[[Any], Heads]
    neurons: str
    parallel: Callable[[Any], bool] = lambda config: False
    layers: str = "layers"
    steps: tuple[Step, ...] = (Step("attention", "input_layernorm"),
                               Step("mlp", "post_attention_layernorm"))
    mlp: tuple[str, ...] = ("mlp",)
    causal: bool = True
    auto: str = "AutoModelForCausalLM"
    embedded: Callable[[Any, Tensor], Embedded] | None = None
    head: str = ""
    maps: tuple[str, ...] = ()
    written: str = "mlp.hook_out"


# --- reading weights -----------------------------------------------------------------------------


def _layer_norm(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight, module.bias, module.eps, centred=True)


def _rms_norm(module: Any) -> Norm:
    return Norm(module.weight, torch.zeros_like(module.weight), module.variance_epsilon,
                centred=False)


def _gemma_norm(module: Any) -> Norm:
    return Norm(1 + module.weight, torch.zeros_like(module.weight), module.eps, centred=False)


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


def _bert_heads(layer: Any) -> Heads:
    v, out = layer.attention.self.value, layer.attention.output.dense
    size = layer.attention.self.attention_head_size
    return Heads(v.weight.view(-1, size, v.in_features), _bias(v).view(-1, size),
                 _output(out, size), _bias(out))


def _bert_embedded(body: Any, tokens: Tensor) -> Embedded:
    parts = body.embeddings
    word = parts.word_embeddings(tokens)
    return Embedded(word, parts.position_embeddings.weight[: len(tokens)],
                    parts.token_type_embeddings.weight[0].expand_as(word),
                    _layer_norm(parts.LayerNorm))


def _scgpt_heads(layer: Any) -> Heads:
    """The rows of `qkv` are all q, then all k, then all v."""
    attention = layer.self_attn
    size = len(attention.out.weight) // attention.heads
    _, _, values = attention.qkv.weight.view(3, -1, size, attention.qkv.in_features)
    _, _, value_bias = attention.qkv.bias.view(3, -1, size)
    return Heads(values, value_bias, _output(attention.out, size), attention.out.bias)


def _llama_type(family: str) -> Architecture:
    return Architecture(family, "model", "model.norm", _rms_norm, _llama_heads, "mlp.gate_proj")


_ARCHITECTURES = {
    "gpt_neox": Architecture(
        "GPT-NeoX (Pythia, C2S-Pythia)", "gpt_neox", "gpt_neox.final_layer_norm", _layer_norm,
        _neox_heads, "mlp.dense_h_to_4h", lambda config: bool(config.use_parallel_residual)),
    "llama": _llama_type("Llama (MaxToki)"),
    "mistral": _llama_type("Mistral"),
    "qwen2": _llama_type("Qwen2"),
    "gemma2": Architecture(
        "Gemma 2 (C2S-Scale)", "model", "model.norm", _gemma_norm, _llama_heads, "mlp.gate_proj",
        steps=(Step("attention", "input_layernorm", "post_attention_layernorm"),
               Step("mlp", "pre_feedforward_layernorm")),
        mlp=("mlp", "post_feedforward_layernorm"), written="hook_mlp_out"),
    "bert": Architecture(
        "BERT (Geneformer)", "bert", "cls.predictions.transform.LayerNorm", _layer_norm,
        _bert_heads, "intermediate.dense", layers="encoder.layer",
        steps=(Step("attention"), Step("norm", "attention.output.LayerNorm"),
               Step("mlp"), Step("norm", "output.LayerNorm")),
        mlp=("intermediate", "output.dense"), causal=False, auto="AutoModelForMaskedLM",
        embedded=_bert_embedded, head="cls.predictions.transform", maps=("dense",)),
    "scgpt": Architecture(
        "scGPT", "scgpt", "", _layer_norm, _scgpt_heads, "mlp.0",
        steps=(Step("attention"), Step("norm", "norm1"), Step("mlp"), Step("norm", "norm2")),
        causal=False, auto="AutoModelForMaskedLM",
        embedded=lambda body, tokens: Embedded(*body.embedded(tokens)), head="head",
        maps=("0", "2")),
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
    """The family of a language model; InputError, naming those supported, if none."""
    config: Any = getattr(model, "config", None)
    found = check_supported(getattr(config, "model_type", None), type(model).__name__)
    if not hasattr(model, found.body):
        raise InputError(f"The model is a {type(model).__name__}, which has no `{found.body}`; "
                         f"load it as a language model ({found.auto}).")
    return found


def decoder(model: nn.Module) -> nn.Module:
    """The part of the model that gives the last residual, without the unembedding."""
    return getattr(model, architecture_of(model).body)


def decoder_layers(model: nn.Module) -> list[Any]:
    """The layers."""
    layers: Any = decoder(model).get_submodule(architecture_of(model).layers)
    return list(layers)


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attention modules, layer by layer."""
    return [getattr(layer, "attention", None) or layer.self_attn
            for layer in decoder_layers(model)]


def final_norm(model: nn.Module) -> Any:
    """The module of the norm before the unembedding; None where there is none."""
    name = architecture_of(model).final_norm
    return model.get_submodule(name) if name else None


def unembedded(model: nn.Module, hidden: Tensor) -> Tensor:
    """(..., vocabulary) logits of what the body gives, hidden (..., d_model); no cap on them (Gemma
    2) is applied, as nowhere in this project."""
    head = architecture_of(model).head
    embeddings: Any = model.get_output_embeddings()  # type: ignore[operator]
    logits: Tensor = embeddings(model.get_submodule(head)(hidden) if head else hidden)
    return logits


def norm_in(layer: nn.Module, family: Architecture, path: str, width: int) -> Norm:
    """A layer's norm of that name; for no name, the one that leaves x as it is."""
    if path:
        return family.norm(layer.get_submodule(path))
    weight = next(layer.parameters())
    return Norm(weight.new_ones(width), weight.new_zeros(width), 0.0, centred=False, absent=True)


def neuron_rows(model: nn.Module) -> list[Tensor]:
    """(n_neurons, d_model) of each layer: the directions in its MLP's input that drive neurons."""
    name = architecture_of(model).neurons
    return [layer.get_submodule(name).weight for layer in decoder_layers(model)]


def layer_weights(model: nn.Module) -> tuple[Heads, ...]:
    """The attention weights of every layer; views of the model's own where they can be."""
    family = architecture_of(model)
    return tuple(family.heads(layer) for layer in decoder_layers(model))
