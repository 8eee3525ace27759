"""Tiny random models of every supported family, and an oracle for their frozen linear view."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from scfm_circuits.circuits.frozen import Frozen
from scfm_circuits.models.architectures import decoder_layers
from scfm_circuits.models.scgpt import ScGPT, ScGPTConfig

LLAMA_TYPE = ("llama", "llama-biases", "mistral", "qwen2")
FAMILIES = ("parallel", "sequential", "neox-no-biases", *LLAMA_TYPE)
BERT_TYPE = ("bert", "bert-gelu")
ALL_FAMILIES = (*FAMILIES, "gemma2", *BERT_TYPE, "scgpt")
"""With those whose norms stand elsewhere than in front of a branch."""


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
    elif family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(
            **shared, **grouped, query_pre_attn_scalar=8, attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0, sliding_window=4))
    elif family in BERT_TYPE:
        model = BertForMaskedLM(BertConfig(
            **shared | {"hidden_size": heads * (width // heads)}, layer_norm_eps=1e-12,
            hidden_act="gelu" if family == "bert-gelu" else "relu", pad_token_id=0))
    elif family == "scgpt":  # ten genes at four levels
        model = ScGPT(ScGPTConfig(
            vocabulary // 4, heads * (width // heads), layers, heads, 2 * width, levels=4,
            attn_implementation="eager"))
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
        scale = 0.3 if name.endswith("bias") or "norm" in name.lower() else 0.0
        parameter.mul_(8 if parameter.ndim > 1 else 1).add_(
            scale * torch.randn(parameter.shape, dtype=dtype))
    if family in ("gemma2", *BERT_TYPE):  # the padding's embedding begins as zeros
        model.get_input_embeddings().weight[0] = torch.randn(model.config.hidden_size, dtype=dtype)
    return model if native_norms else with_unrounded_norms(model)


def with_unrounded_norms(model: Any) -> Any:
    """The model, whose RMSNorms now compute in its own type; transformers rounds to float32."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _unrounded(module)
    return model


def _unrounded(norm: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        return gain_of(norm) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps_of(norm))
    return forward


def gain_of(norm: Any) -> Tensor:
    """An RMSNorm's gain, which Gemma keeps less 1."""
    return norm.weight + ("Gemma" in type(norm).__name__)


def eps_of(norm: Any) -> float:
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


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
        # scGPT is given all that its stream begins with.
        self._beside = frozen.leaves[1] if isinstance(model, ScGPT) else 0
        self._sources: Tensor | None = None
        self._read: list[Tensor] = []
        self._frozen_functions()
        model.set_attn_implementation("frozen_pattern")
        model.config.final_logit_softcapping = None
        for index, layer in enumerate(decoder_layers(model)):
            attention = getattr(layer, "self_attn", None) or layer.attention
            (attention if not hasattr(attention, "self") else attention.self).frozen_pattern = (
                frozen.patterns[index])
            self._own_mlp(index, layer)

    def _frozen_functions(self) -> None:
        """Norms, and the function of a head, as they are in a run of the model itself."""
        clean: dict[Any, Tensor] = {}
        norms = [one for one in self.model.modules() if isinstance(one, nn.LayerNorm)
                 or type(one).__name__.endswith("RMSNorm")]
        handles = [one.register_forward_pre_hook(
            lambda module, args: clean.update({module: args[0][0]})) for one in norms]
        gates: dict[Any, Tensor] = {}
        for owner, name in self._functions():
            handles.append(getattr(owner, name).register_forward_hook(
                lambda module, args, output: gates.update({module: output[0] / args[0][0]})))
        self.model(input_ids=self.frozen.tokens[None])
        for handle in handles:
            handle.remove()
        for one in norms:
            self._freeze_norm(one, clean[one])
        for owner, name in self._functions():  # may be shared by layers, whose MLPs are not run
            gate, identity = gates[getattr(owner, name)], nn.Identity()
            identity.forward = lambda x, gate=gate: x * gate
            setattr(owner, name, identity)

    def _functions(self) -> list[tuple[nn.Module, str]]:
        """A head's functions: whose, and under which name."""
        if isinstance(self.model, ScGPT):
            return [(self.model.head, "1"), (self.model.head, "3")]
        head = getattr(getattr(self.model, "cls", None), "predictions", None)
        return [(head.transform, "transform_act_fn")] if head else []

    def _own_mlp(self, index: int, layer: Any) -> None:
        if hasattr(layer, "mlp"):
            layer.mlp.forward = self._source(index)
        else:
            layer.intermediate.forward = self._source(index)
            layer.output.dense.forward = lambda x: x
        if hasattr(layer, "post_feedforward_layernorm"):
            layer.post_feedforward_layernorm.forward = lambda x: x

    @staticmethod
    def _freeze_norm(norm: Any, clean: Tensor) -> None:
        """Its divisor becomes a constant; the formulas are those of the two papers."""
        if isinstance(norm, nn.LayerNorm):
            scale = (clean.square().mean(-1) - clean.mean(-1).square() + norm.eps).sqrt()
            norm.forward = lambda x: ((x - x.mean(-1, keepdim=True)) / scale[:, None] * norm.weight
                                      + norm.bias)
        else:
            scale = (clean.norm(dim=-1).square() / clean.shape[-1] + eps_of(norm)).sqrt()
            norm.forward = lambda x: x / scale[:, None] * gain_of(norm)

    def _source(self, layer: int) -> Any:
        def forward(x: Tensor) -> Tensor:
            self._read.append(x[0])
            return self._sources[layer][None]
        return forward

    def __call__(self, embeddings: Tensor, sources: Tensor) -> Read:
        """embeddings: (n_pos, d_model); sources: (n_layers, n_pos, d_model) MLP outputs."""
        self._sources, self._read = sources, []
        logits = self.model(inputs_embeds=(embeddings + self._beside)[None],
                            use_cache=False).logits[0]
        return Read(torch.stack(self._read), logits)
