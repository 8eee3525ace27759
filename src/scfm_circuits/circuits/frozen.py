"""One text run once, with attention patterns, norms' scales and activations as they were.

With these held, the model is linear; `attribution` says how a reading adds up. Where a family's
norms stand is in `models.architectures`: here each is kept with its scales, read at its very place.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scfm_circuits import InputError
from scfm_circuits.models.architectures import (
    Architecture,
    Heads,
    Norm,
    architecture_of,
    attentions,
    decoder,
    decoder_layers,
    final_norm,
    layer_weights,
    norm_in,
)
from scfm_circuits.models.mlp_sites import device_of, hooked, site_hooks
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NO_CIRCUITS = ("Circuits are traced through transcoders, and the profile asks for autoencoders of "
               "MLP outputs (`site: sae`); set `site: transcoder`.")


class AtTokens(NamedTuple):
    """A norm with its scales on a text, sigma: (n_pos,): linear but for its bias."""

    norm: Norm
    sigma: Tensor

    def back(self, u: Tensor, position: int | list[int] | None = None) -> Tensor:
        """A reading of the norm's output as one of its input: C(g * u) / sigma. u: (d_model,) at a
        token, (n, d_model) at n of them, or (..., n, d_model) at the first n tokens."""
        sigma = self.sigma[: u.shape[-2]] if position is None else self.sigma[position]
        return self.norm.back(u) / sigma[..., None]

    def onward(self, change: Tensor) -> Tensor:
        """What a change of its input (n_pos, d_model) does to its output."""
        return self.norm.centre(change) / self.sigma[:, None] * self.norm.gain


class Map(NamedTuple):
    """A map between the stream and the final norm, its nonlinearity frozen as a factor: gate *
    (W x + b). weight: (d_model, d_model); bias: (d_model,); gate: (n_pos, d_model)."""

    weight: Tensor
    bias: Tensor
    gate: Tensor


@dataclass(frozen=True)
class Frozen:
    """One text, run once, with all that the linear view needs.

    tokens: (n_pos,). residual: (n_layers, n_pos, d_model) entering each layer; final: (n_pos,
    d_model) leaving the last. patterns: (n_layers, n_heads, n_pos, n_pos) attention, rows are
    destinations. first, second: of each layer, the norm in front of attention and in front of the
    MLP, which leaves all as it is where there is none; last: the norm before the unembedding.
    mlp_in, mlp_out: (n_layers, n_pos, d_model). pre, activations: (n_layers, n_pos, n_features)
    before and after the transcoders' activation function. error: (n_layers, n_pos, d_model) MLP
    output minus what the features and the output bias write (what a skip connection writes is part
    of it).
    weights: of each layer's attention. parallel: an MLP does not see its own layer's.
    middle, end: of each layer, the norm on the stream behind its attention and behind its MLP;
    behind: the norm on what its attention writes; entry: the norm on the embeddings; None where
    there is none. leaves: (n_leaves, n_pos, d_model) what the stream begins with, before `entry`:
    the token's embedding and, where there is one, its position's or its level's; same: (n_pos,
    d_model) what stands beside them whatever the token. head: the maps between the stream and the
    final norm, in order. causal: no token sees a later one.
    """

    tokens: Tensor
    residual: Tensor
    final: Tensor
    patterns: Tensor
    first: tuple[AtTokens, ...]
    second: tuple[AtTokens, ...]
    mlp_in: Tensor
    mlp_out: Tensor
    pre: Tensor
    activations: Tensor
    error: Tensor
    logits: Tensor
    weights: tuple[Heads, ...]
    transcoders: Transcoders
    last: AtTokens
    unembedding: Tensor
    unembedding_bias: Tensor
    parallel: bool
    middle: tuple[AtTokens | None, ...]
    end: tuple[AtTokens | None, ...]
    behind: tuple[AtTokens | None, ...]
    entry: AtTokens | None
    leaves: Tensor
    same: Tensor | None
    head: tuple[Map, ...]
    causal: bool

    def across(self, norm: AtTokens | None, change: Tensor) -> Tensor:
        """A change (n_pos, d_model) of the stream, behind a norm that may stand on it."""
        return change if norm is None else norm.onward(change)


# --- the run ------------------------------------------------------------------------------------


@torch.no_grad()
def freeze(model: "PreTrainedModel", transcoders: Transcoders, tokens: np.ndarray | Tensor,
           mask: np.ndarray | Tensor | None = None) -> Frozen:
    """Run one text (n_pos,) and keep what the linear view needs; attention must be `eager`.

    mask: (n_pos,) False on padding, to which no token then attends; default: there is none. Raises
    InputError for a model of another family than `architectures` knows, for one whose attention
    gives no patterns, for autoencoders, which do not read what an MLP reads, and for what is no
    text of the model's tokens.
    """
    family = architecture_of(model)
    if transcoders.variant.site != "transcoder":
        raise InputError(NO_CIRCUITS)
    _check_text(model, tokens, mask)
    ids = torch.as_tensor(tokens).to(device_of(model))[None]
    patterns, seen = _recorded(model, family, ids, mask)
    stacked = {key: torch.stack(seen[key]) for key in ("residual", "in", "out")}
    first, second = (_in_front(model, family, step.norm, seen) for step in family.steps
                     if step.does != "norm")
    last = norm_in(model, family, family.final_norm, seen["last"][0].shape[-1])
    pre = transcoders.pre_activations(stacked["in"])
    z = transcoders.activate(pre)
    unembedding: Any = model.get_output_embeddings()
    bias = getattr(unembedding, "bias", None)
    entry, leaves, same = _beginning(model, family, ids[0], stacked["residual"][0])
    return Frozen(
        tokens=ids[0], residual=stacked["residual"], final=seen["final"][0],
        patterns=patterns, first=first, second=second,
        last=AtTokens(last, last.scale(seen["last"][0])), mlp_in=stacked["in"],
        mlp_out=stacked["out"], pre=pre, activations=z,
        error=stacked["out"] - transcoders.decode(z), logits=seen["logits"][0],
        weights=layer_weights(model),
        transcoders=transcoders, unembedding=unembedding.weight,
        unembedding_bias=unembedding.weight[:, 0] * 0 if bias is None else bias,
        parallel=family.parallel(model.config), **_stream_norms(model, family, seen), entry=entry,
        leaves=leaves, same=same, head=_head(model, family, seen),
        causal=family.causal)


def _check_text(model: "PreTrainedModel", tokens: np.ndarray | Tensor,
                mask: np.ndarray | Tensor | None) -> None:
    """InputError for what is no text (n_pos,) of the model's tokens, or no mask of its length."""
    shape, kind = tuple(tokens.shape), torch.as_tensor(tokens).dtype
    if len(shape) != 1 or not shape[0]:
        raise InputError(f"The text has the shape {shape}; give the tokens of one text, (n_pos,).")
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise InputError(f"Tokens are whole numbers, not {kind}.")
    if mask is not None and tuple(mask.shape) != shape:
        raise InputError(f"The mask has the shape {tuple(mask.shape)} and the text {shape}; they "
                         "must be alike.")
    least, most = int(tokens.min()), int(tokens.max())
    # Under `binned` a token holds its level, too.
    known = 2**63 if hasattr(model.config, "levels") else model.config.vocab_size
    if least < 0 or most >= known:
        raise InputError(f"The text has the token {least if least < 0 else most}, and the model "
                         f"knows {model.config.vocab_size:,}, counted from 0.")


def _recorded(model: "PreTrainedModel", family: Architecture, ids: Tensor,
              mask: np.ndarray | Tensor | None) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Attention patterns (n_layers, n_heads, n_pos, n_pos), and what passed through the model's
    parts, by layer: residual (entering the layer), what each norm read, by its name, in and out of
    the MLP; final (leaving the last layer), last (what the last norm read, or the unembedding where
    there is none), logits (as the unembedding gives them), mapped (what the head's linear maps
    gave) and mapping (what those behind the first read)."""
    seen: dict[str, list[Tensor]] = {}
    n_layers, patterns = len(decoder_layers(model)), list[Tensor]()

    def attended(layer: int):  # type: ignore[no-untyped-def]
        def hook(module: Any, args: tuple, output: Any) -> None:
            pattern = output[1]
            if pattern is None:
                raise InputError("The model returns no attention patterns; load it with "
                                 "attn_implementation='eager'.")
            if not patterns:  # all layers' at once, so that they are held once
                patterns.append(pattern.new_empty(n_layers, *pattern.shape[1:]))
            patterns[0][layer] = pattern[0]
        return hook

    def note(key: str, value: Tensor) -> None:
        seen.setdefault(key, []).append(value[0])

    def keep(key: str):  # type: ignore[no-untyped-def]
        return lambda module, args, kwargs: note(key, args[0] if args else kwargs["hidden_states"])

    def given(key: str):  # type: ignore[no-untyped-def]
        return lambda module, args, output: note(key, output)

    def reads(module: Any, key: str) -> Any:
        return module.register_forward_pre_hook(keep(key), with_kwargs=True)

    def site(layer: int, read: Tensor, wrote: Tensor) -> None:
        note("in", read)
        note("out", wrote)

    unembedding: Any = model.get_output_embeddings()
    handles = [reads(final_norm(model) or unembedding, "last"),
               unembedding.register_forward_hook(given("logits"))]
    handles += site_hooks(model, site)
    handles += [one.register_forward_hook(attended(layer))
                for layer, one in enumerate(attentions(model))]
    for layer in decoder_layers(model):
        handles += [reads(layer, "residual"), *(
            reads(layer.get_submodule(name), name) for step in family.steps
            for name in (step.norm, step.behind) if name)]
    for place, name in enumerate(family.maps):
        linear = model.get_submodule(family.head).get_submodule(name)
        handles += [reads(linear, "mapping" if place else "final"),
                    linear.register_forward_hook(given("mapped"))]
    with hooked(handles):
        model(input_ids=ids, use_cache=False, **({} if mask is None else {
            "attention_mask": torch.as_tensor(mask).to(ids)[None]}))
    seen.setdefault("final", seen["last"])
    return patterns[0], seen


def _in_front(model: "PreTrainedModel", family: Architecture, name: str,
              seen: dict[str, list[Tensor]]) -> tuple[AtTokens, ...]:
    """Of each layer the norm of that name, in front of a branch."""
    read = seen[name or "residual"]
    norms = [norm_in(layer, family, name, x.shape[-1])
             for layer, x in zip(decoder_layers(model), read, strict=True)]
    return tuple(AtTokens(norm, norm.scale(x)) for norm, x in zip(norms, read, strict=True))


def _stream_norms(model: "PreTrainedModel", family: Architecture, seen: dict[str, list[Tensor]]
                  ) -> dict[str, tuple[AtTokens | None, ...]]:
    """`middle`, `end` and `behind` of a Frozen."""
    places, branch = {"middle": "", "end": "", "behind": ""}, "attention"
    for step in family.steps:
        if step.does == "norm":
            places["middle" if branch == "attention" else "end"] = step.norm
        else:
            branch = step.does
            places["behind"] = places["behind"] or step.behind

    def at(index: int, layer: Any, name: str) -> AtTokens | None:
        norm = family.norm(layer.get_submodule(name)) if name else None
        return norm and AtTokens(norm, norm.scale(seen[name][index]))

    return {place: tuple(at(index, layer, name)
                         for index, layer in enumerate(decoder_layers(model)))
            for place, name in places.items()}


def _beginning(model: "PreTrainedModel", family: Architecture, tokens: Tensor, residual: Tensor
               ) -> tuple[AtTokens | None, Tensor, Tensor | None]:
    """`entry`, `leaves` and `same` of a Frozen."""
    if family.embedded is None:
        return None, residual[None], None
    parts = family.embedded(decoder(model), tokens)
    leaves = torch.stack([parts.token, parts.other])
    whole = leaves.sum(dim=0) + (0 if parts.same is None else parts.same)
    return parts.norm and AtTokens(parts.norm, parts.norm.scale(whole)), leaves, parts.same


def _head(model: "PreTrainedModel", family: Architecture, seen: dict[str, list[Tensor]]
          ) -> tuple[Map, ...]:
    found = []
    made = [*seen.get("mapping", []), *seen["last"]]  # of what each map gave, by its function
    for place, name in enumerate(family.maps):
        linear: Any = model.get_submodule(family.head).get_submodule(name)
        mapped = seen["mapped"][place]
        # As a factor; 0 of 0 is 0 for ReLU, LeakyReLU and GELU.
        gate = torch.where(mapped == 0, 0.0, made[place] / mapped)
        found.append(Map(linear.weight, linear.bias, gate))
    return tuple(found)
