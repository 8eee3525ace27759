"""scGPT (Cui et al. 2024) as a transformers model, and its published checkpoint made into one.

A cell is a set of genes, each with its expression as a level (a bin): no order, so no positions. A
token is a gene at a level, in one number: gene + genes of the vocabulary * level. What enters the
layers is LayerNorm(embedding of the gene) + LayerNorm(map of the level), two leaves; what comes out
is a value for each gene, from two maps with LeakyReLU and a row. Published checkpoints are pickles
of tensors, read with `weights_only` and written once as safetensors. Batch norms, which some models
tuned for integration have on their input, are no LayerNorm and are refused.
Source: bowang-lab/scGPT, scgpt/model/model.py.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from scfm_circuits import InputError
from scfm_circuits.common.encodings import LEVELS
from scfm_circuits.common.files import atomic_folder, first_line, read_json

CHECKPOINT, SETTINGS = "best_model.pt", "args.json"
_LEFT = ("mvc_decoder.", "cls_decoder.", "flag_encoder.")
"""Parts that have no say in a gene's value: other heads, and the marks of perturbed genes."""
_NAMES = (
    (r"encoder\.embedding\.weight", "scgpt.genes.weight"),
    (r"encoder\.enc_norm\.(\w+)", r"scgpt.gene_norm.\1"),
    (r"value_encoder\.linear1\.(\w+)", r"scgpt.level_in.\1"),
    (r"value_encoder\.linear2\.(\w+)", r"scgpt.level_out.\1"),
    (r"value_encoder\.norm\.(\w+)", r"scgpt.level_norm.\1"),
    # FlashAttention's name first: its rows are q, k and v one after the other too.
    (r"transformer_encoder\.layers\.(\d+)\.self_attn\.(?:Wqkv\.|in_proj_)(\w+)",
     r"scgpt.layers.\1.self_attn.qkv.\2"),
    (r"transformer_encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)",
     r"scgpt.layers.\1.self_attn.out.\2"),
    (r"transformer_encoder\.layers\.(\d+)\.linear1\.(\w+)", r"scgpt.layers.\1.mlp.0.\2"),
    (r"transformer_encoder\.layers\.(\d+)\.linear2\.(\w+)", r"scgpt.layers.\1.mlp.2.\2"),
    (r"transformer_encoder\.layers\.(\d+)\.(norm[12])\.(\w+)", r"scgpt.layers.\1.\2.\3"),
    (r"decoder\.fc\.([02])\.(\w+)", r"head.\1.\2"),
    (r"decoder\.fc\.4\.(\w+)", r"value.\1"),
)
"""From the names of a checkpoint's tensors to those of `ScGPT`."""


class ScGPTConfig(PreTrainedConfig):
    """vocab_size: genes and special tokens; levels: of a gene, from 0."""

    model_type = "scgpt"

    def __init__(self, vocab_size: int = 60_697, hidden_size: int = 512,
                 num_hidden_layers: int = 12, num_attention_heads: int = 8,
                 intermediate_size: int = 512, levels: int = LEVELS,
                 max_position_embeddings: int = 1200, **more: Any) -> None:
        self.vocab_size, self.hidden_size, self.levels = vocab_size, hidden_size, levels
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**{"tie_word_embeddings": False, **more})


def _eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
           scaling: float, **_: Any) -> tuple[Tensor, Tensor]:
    scores = query @ key.transpose(2, 3) * scaling
    pattern = (scores if mask is None else scores + mask).softmax(dim=-1)
    return (pattern @ value).transpose(1, 2), pattern


class Attention(nn.Module):
    """Every token sees every other; what is padding has weight 0."""

    is_causal = False

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        width, self.heads, self.config = config.hidden_size, config.num_attention_heads, config
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", _eager)
        mixed, pattern = attend(self, q, k, v, mask, scaling=q.shape[-1] ** -0.5, dropout=0.0)
        return self.out(mixed.flatten(2)), pattern


class Layer(nn.Module):
    """A post-norm layer: a norm on the stream behind each branch."""

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.self_attn = Attention(config)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        mixed, pattern = self.self_attn(x, mask)
        x = self.norm1(x + mixed)
        return self.norm2(x + self.mlp(x)), pattern


class _Loads(PreTrainedModel):
    config_class = ScGPTConfig
    base_model_prefix = "scgpt"
    _supports_sdpa = True
    _supports_attention_backend = True


class ScGPTModel(_Loads):
    """The embeddings and the layers."""

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.genes, self.gene_norm = nn.Embedding(config.vocab_size, width), nn.LayerNorm(width)
        self.level_in, self.level_out = nn.Linear(1, width), nn.Linear(width, width)
        self.level_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def embedded(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What tells the gene and what tells its level, (..., d_model) each; tokens: (...)."""
        gene, level = tokens % self.config.vocab_size, tokens // self.config.vocab_size
        level = self.level_in(level[..., None].to(self.level_in.weight.dtype)).relu()
        return self.gene_norm(self.genes(gene)), self.level_norm(self.level_out(level))

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                inputs_embeds: Tensor | None = None, output_attentions: bool | None = None,
                **_: Any) -> BaseModelOutput:
        """inputs_embeds: the sum of both parts of `embedded`, in place of tokens."""
        if inputs_embeds is not None:
            x = inputs_embeds
        else:
            assert input_ids is not None
            gene, level = self.embedded(input_ids)
            x = gene + level
        mask = None
        if attention_mask is not None:
            mask = torch.zeros_like(x[:, None, None, :, 0]).masked_fill(
                ~attention_mask.bool()[:, None, None], torch.finfo(x.dtype).min)
        patterns = []
        for layer in self.layers:
            x, pattern = layer(x, mask)
            patterns.append(pattern)
        return BaseModelOutput(last_hidden_state=x,
                               attentions=tuple(patterns) if output_attentions else None)


class ScGPT(_Loads):
    """With the head that gives each gene's value, (n, length, 1)."""

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.scgpt = ScGPTModel(config)
        self.head = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(),
                                  nn.Linear(width, width), nn.LeakyReLU())
        self.value = nn.Linear(width, 1)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.scgpt.genes

    def get_output_embeddings(self) -> nn.Module:
        return self.value

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                **more: Any) -> MaskedLMOutput:
        """tokens (n, length); attention_mask: False on padding."""
        output = self.scgpt(input_ids, attention_mask, **more)
        return MaskedLMOutput(logits=self.value(self.head(output.last_hidden_state)),
                              attentions=output.attentions)


def register() -> None:
    """Have transformers know the family by its `model_type`; called before a model is loaded."""
    AutoConfig.register("scgpt", ScGPTConfig, exist_ok=True)
    AutoModelForMaskedLM.register(ScGPTConfig, ScGPT, exist_ok=True)


# --- the published checkpoint --------------------------------------------------------------------


def is_published(folder: Path) -> bool:
    """Whether the folder holds what scGPT's authors publish."""
    return (folder / CHECKPOINT).is_file() and not (folder / "config.json").is_file()


def converted(folder: Path, into: Path) -> Path:
    """The folder `into` with the checkpoint of `folder` as a transformers model, made once.

    Raises InputError for a file that is missing or is no table of tensors, settings of another
    kind of model, and tensors that are missing or that this model does not have, by name.
    """
    source = folder / CHECKPOINT
    seen = {"bytes": source.stat().st_size, "mtime_ns": source.stat().st_mtime_ns}
    if read_json(into / "source.json") == seen:
        return into
    config = _config(folder)
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the unpickler raise
        raise _refused(folder, f"{CHECKPOINT} cannot be read as tensors alone "
                       f"({first_line(error)}), and nothing else is taken from a pickle") from None
    tensors = _renamed(content, folder)
    config.vocab_size = len(tensors.get("scgpt.genes.weight", ())) or config.vocab_size
    with torch.device("meta"):
        wanted = {name: tuple(one.shape) for name, one in ScGPT(config).state_dict().items()}
    problems = {
        "lacks the tensors": sorted(wanted.keys() - tensors.keys()),
        "has tensors that this model does not": sorted(tensors.keys() - wanted.keys()),
        "has tensors of another shape": sorted(
            name for name in wanted.keys() & tensors.keys()
            if tuple(tensors[name].shape) != wanted[name])}
    for what, names in problems.items():
        if names:
            raise _refused(folder, f"{CHECKPOINT} {what}: {', '.join(names[:3])}"
                           + f" and {len(names) - 3} more" * (len(names) > 3))
    from safetensors.torch import save_file

    with atomic_folder(into) as fresh:
        config.save_pretrained(fresh)
        save_file({name: one.contiguous().clone() for name, one in tensors.items()},
                  fresh / "model.safetensors", metadata={"format": "pt"})
        (fresh / "source.json").write_text(json.dumps(seen), encoding="utf-8")
    return into


def _config(folder: Path) -> ScGPTConfig:
    """What `args.json` says of the model; InputError for one of another kind."""
    found = read_json(folder / SETTINGS)
    numbers = {"embsize": "hidden_size", "nlayers": "num_hidden_layers",
               "nheads": "num_attention_heads", "d_hid": "intermediate_size"}
    odd = [key for key in numbers if type(found.get(key)) is not int or found[key] < 1]
    if odd:
        raise _refused(folder, f"{SETTINGS}, which came with it, gives no `{odd[0]}`")
    for key, only in {"input_emb_style": "continuous", "n_bins": LEVELS}.items():
        if found.get(key, only) != only:
            raise _refused(folder, f"{SETTINGS} says `{key}: {found[key]}`, and only `{only}` is "
                           "known here")
    if found.get("pre_norm") or found.get("explicit_zero_prob"):
        which = "pre_norm" if found.get("pre_norm") else "explicit_zero_prob"
        raise _refused(folder, f"{SETTINGS} says `{which}`, which is another model")
    return ScGPTConfig(**{ours: found[theirs] for theirs, ours in numbers.items()},
                       architectures=["ScGPT"])


def _renamed(content: Any, folder: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors by the names of `ScGPT`; those it does not know keep theirs."""
    if not isinstance(content, Mapping) or not all(
            isinstance(one, Tensor) for one in content.values()):
        raise _refused(folder, f"{CHECKPOINT} is no table of tensors")
    norms = sorted(name for name in content if re.match(r"(dsbn|bn|batch_encoder)\.", name))
    if norms:
        raise _refused(folder, f"{CHECKPOINT} has {norms[0]}: models with batch norms or batch "
                       "labels are not linear in what they read, so their circuits are not traced")
    found = {}
    for name, tensor in content.items():
        if name.startswith(_LEFT):
            continue
        known = (re.sub(pattern, names, name) for pattern, names in _NAMES
                 if re.fullmatch(pattern, name))
        found[next(known, name)] = tensor
    return found


def _refused(folder: Path, why: str) -> InputError:
    return InputError(f"The scGPT model in {folder} cannot be used: {why}; give a folder with the "
                      f"whole-human model's {CHECKPOINT}, {SETTINGS} and vocab.json.")
