"""Tiny random models of every supported family, and an oracle for their frozen linear view."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from scfm_circuits.circuits.attribution import Frozen

LLAMA_TYPE = ("llama", "llama-biases", "mistral", "qwen2")
FAMILIES = ("parallel", "sequential", "neox-no-biases", *LLAMA_TYPE)


def tiny(family: str, *, layers: int = 3, width: int = 16, heads: int = 4, value_heads: int = 2,
         head_size: int | None = None, vocabulary: int = 40, seed: int = 0,
         dtype: torch.dtype = torch.float64, native_norms: bool = False) -> Any:
    """A random model of a family; gains and all biases that it has are random too.

    value_heads, head_size: of Llama-type models; head_size None is width / heads. transformers'
    RMSNorm rounds to float32, so identities of float64 would be lost in it: unless `native_norms`,
    a float64 model computes the same formula without the rounding.
    """
    torch.manual_seed(seed)
    shared: dict[str, Any] = dict(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=2 * width, max_position_embeddings=64,
        attn_implementation="eager", bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
    grouped = {"num_key_value_heads": value_heads, "head_dim": head_size or width // heads}
    model: Any
    if family in ("parallel", "sequential", "neox-no-biases"):
        model = GPTNeoXForCausalLM(GPTNeoXConfig(
            **shared, use_parallel_residual=family != "sequential",
            attention_bias=family != "neox-no-biases"))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**shared, **grouped, sliding_window=4))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shared, **grouped))
    else:
        biases = family == "llama-biases"
        model = LlamaForCausalLM(LlamaConfig(**shared, **grouped, attention_bias=biases,
                                             mlp_bias=biases))
    model.to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        scale = 0.3 if name.endswith("bias") or "norm" in name else 0.0
        parameter.mul_(8 if parameter.ndim > 1 else 1).add_(
            scale * torch.randn(parameter.shape, dtype=dtype))
    if not native_norms:
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.forward = _unrounded(module)
    return model


def _unrounded(norm: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True)
                                             + norm.variance_epsilon)
    return forward


class Read(NamedTuple):
    """MLP inputs (n_layers, n_pos, d_model) and logits (n_pos, vocabulary)."""

    mlp_in: Tensor
    logits: Tensor


def _with_frozen_pattern(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any,
                         **options: Any) -> tuple[Tensor, None]:
    pattern = module.frozen_pattern
    # Head h of n reads value head h // (n / n_value_heads).
    owner = torch.arange(len(pattern)) * value.shape[1] // len(pattern)
    return (pattern @ value[0, owner]).transpose(0, 1)[None], None


AttentionInterface.register("frozen_pattern", _with_frozen_pattern)


class LinearModel:
    """transformers' own forward pass, with patterns and scales frozen at a run's and MLPs that
    write what they are told: linear in the embeddings and in what the MLPs write, and an
    independent route to all edges and constants, by autograd or by calling it with zeros.

    Changes the model, so give it one of its own.
    """

    def __init__(self, model: Any, frozen: Frozen) -> None:
        self.model, self.frozen = model, frozen
        self._sources: Tensor | None = None
        self._read: list[Tensor] = []
        self._body = model.base_model
        model.set_attn_implementation("frozen_pattern")
        final = getattr(self._body, "norm", None) or self._body.final_layer_norm
        self._freeze_norm(final, frozen.final)
        mid = self._second_norm_inputs(frozen)
        for index, layer in enumerate(self._body.layers):
            attention = getattr(layer, "self_attn", None) or layer.attention
            attention.frozen_pattern = frozen.patterns[index]
            self._freeze_norm(layer.input_layernorm, frozen.residual[index])
            self._freeze_norm(layer.post_attention_layernorm, mid[index])
            layer.mlp.forward = self._source(index)

    @staticmethod
    def _second_norm_inputs(frozen: Frozen) -> Tensor:
        """h of a parallel block, and of a sequential one what it leaves less what its MLP wrote."""
        after = torch.cat([frozen.residual[1:], frozen.final[None]])
        return frozen.residual if frozen.parallel else after - frozen.mlp_out

    @staticmethod
    def _freeze_norm(norm: Any, clean: Tensor) -> None:
        """Its divisor becomes a constant; the formulas are those of the two papers."""
        if isinstance(norm, nn.LayerNorm):
            scale = (clean.square().mean(-1) - clean.mean(-1).square() + norm.eps).sqrt()
            norm.forward = lambda x: ((x - x.mean(-1, keepdim=True)) / scale[:, None] * norm.weight
                                      + norm.bias)
        else:
            scale = (clean.norm(dim=-1).square() / clean.shape[-1] + norm.variance_epsilon).sqrt()
            norm.forward = lambda x: x / scale[:, None] * norm.weight

    def _source(self, layer: int) -> Any:
        def forward(x: Tensor) -> Tensor:
            self._read.append(x[0])
            return self._sources[layer][None]
        return forward

    def __call__(self, embeddings: Tensor, sources: Tensor) -> Read:
        """embeddings: (n_pos, d_model); sources: (n_layers, n_pos, d_model) MLP outputs."""
        self._sources, self._read = sources, []
        logits = self.model(inputs_embeds=embeddings[None], use_cache=False).logits[0]
        return Read(torch.stack(self._read), logits)
