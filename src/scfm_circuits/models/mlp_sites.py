"""The MLPs of a model: what they read and write on a corpus, and what happens without them.

Batches of prompts, what a model is asked of them and its loss, activations at every MLP, and MLPs
replaced by transcoders, by their mean output or by zeros.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scfm_circuits import InputError
from scfm_circuits.common.randomness import generator
from scfm_circuits.models.architectures import architecture_of, decoder, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus

MASKED = 0.15
"""Share of a cell's genes that an encoder is asked (Geneformer's, in training and here)."""
RUNS = 32
"""Copies of neighbouring cells up to which these are taken for those of single rows."""

Replacement = Callable[[int, Tensor], Tensor]
"""From a layer and its MLP input (..., d_model) to what takes the MLP output's place."""


class Sites(NamedTuple):
    """What the MLPs of all layers read and wrote on some tokens.

    inputs, outputs: (n_layers, n_tokens, d_model); row `n` of both is the same token.
    """

    inputs: Tensor
    outputs: Tensor


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU's tensor on the device; if that is a GPU, what it is doing is not waited for."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def not_finite(model: nn.Module) -> str | None:
    """The first of the model's weights that holds NaN or an infinite value, if one does."""
    return next((name for name, weight in model.named_parameters()
                 if not torch.isfinite(weight).all()), None)


def moved_to(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on a device; transformers' own `to` has a type that takes none."""
    return model.to(device)


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mlps(model: nn.Module) -> list[nn.Module]:
    """What makes of an MLP's input what it writes to the stream, layer by layer, to be called:
    the MLP's module where it is one. InputError for a model of no supported family."""
    return [parts[0] if len(parts) == 1 else nn.Sequential(*parts) for parts in _parts(model)]


def _parts(model: nn.Module) -> list[list[nn.Module]]:
    names = architecture_of(model).mlp
    return [[layer.get_submodule(name) for name in names] for layer in decoder_layers(model)]


def site_hooks(model: nn.Module, hook: Callable[[int, Tensor, Tensor], Tensor | None],
               layers: Iterable[int] | None = None) -> list[RemovableHandle]:
    """Have `hook(layer, input, output)` called after each MLP of `layers` (default: all); what it
    returns takes the output's place, unless None."""
    parts, handles = _parts(model), []
    for layer in range(len(parts)) if layers is None else layers:
        first, last, read = parts[layer][0], parts[layer][-1], list[Tensor]()

        def before(module: nn.Module, args: tuple, read: list[Tensor] = read) -> None:
            read[:] = [args[0]]

        def after(module: nn.Module, args: tuple, output: Tensor, layer: int = layer,
                  read: list[Tensor] = read) -> Tensor | None:
            return hook(layer, read.pop(), output)

        handles += [first.register_forward_pre_hook(before), last.register_forward_hook(after)]
    return handles


# --- forward passes ------------------------------------------------------------------------------


def mask_token(corpus: "Corpus") -> int:
    """The token that stands for a masked gene; InputError if the corpus has none."""
    found = corpus.tokenizer.get_vocab().get("<mask>")
    if found is None:
        raise InputError("The model fills in masked genes and the cells' tokens have no <mask>; "
                         "set `encoding` in the profile to the model's own.")
    return found


def masked_genes(corpus: "Corpus", cells: Sequence[int] | np.ndarray, seed: int) -> np.ndarray:
    """(n, length) bool: the genes of cells that an encoder is asked, in every evaluation the same.

    `MASKED` of a cell's genes, at least one, drawn by the seed and the cell's identifier: not by
    its place in the corpus, nor by the cells beside it.
    """
    cells = np.asarray(cells)
    chosen = np.zeros((len(cells), corpus.tokens.shape[1]), bool)
    for row, cell in enumerate(cells):
        genes = np.flatnonzero(corpus.gene[cell] >= 0)
        rng = generator(seed, "masked genes", zlib.crc32(str(corpus.cell_ids[cell]).encode()))
        chosen[row, rng.permutation(genes)[: max(1, round(MASKED * len(genes)))]] = True
    return chosen


class Asked(NamedTuple):
    """What a model is asked of some cells.

    shown: (n, length) tokens that it reads; at: (n, length) bool where its logits answer; wanted:
    (n_predictions,) the right tokens there, in the order of `logits[at]`.
    """

    shown: Tensor
    at: Tensor
    wanted: Tensor

    def loss(self, logits: Tensor) -> Tensor:
        """(n_predictions,) cross-entropy of each, in nats, computed in float32; logits: (n, length,
        vocabulary)."""
        return nn.functional.cross_entropy(logits[self.at].float(), self.wanted, reduction="none")


def next_tokens(tokens: Tensor, mask: Tensor) -> Asked:
    """What a decoder is asked: each next token that is not padding; tokens, mask: (n, length)."""
    at = torch.zeros_like(mask)
    at[:, :-1] = mask[:, 1:]
    return Asked(tokens, at, tokens[:, 1:][mask[:, 1:]])


def asked(model: nn.Module, corpus: "Corpus", rows: np.ndarray, tokens: Tensor, mask: Tensor,
          seed: int) -> Asked:
    """What the model is asked of a batch from `batches`: of a decoder each next token, of an
    encoder the `masked_genes`, which it is shown as masks. Raises InputError as `mask_token`.
    """
    if architecture_of(model).causal:
        return next_tokens(tokens, mask)
    chosen = masked_genes(corpus, rows, seed)[:, : tokens.shape[1]]
    at = torch.from_numpy(chosen).to(tokens.device)
    return Asked(tokens.masked_fill(at, mask_token(corpus)), at, tokens[at])


def batches(corpus: "Corpus", cells: Sequence[int] | np.ndarray, size: int, device: torch.device
            ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Cells in the given order, `size` at a time, cut to their longest.

    Yields (rows, tokens, mask): (n,) cell indices, (n, length) token ids, (n, length) bool.
    """
    cells = np.asarray(cells)
    for start in range(0, len(cells), size):
        rows = cells[start : start + size]
        length = int(corpus.lengths[rows].max())
        yield (rows, torch.from_numpy(corpus.tokens[rows, :length]).to(device),
               torch.from_numpy(corpus.mask[rows, :length]).to(device))


@contextlib.contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Within the block these hooks are in place; however it ends, they are gone after it."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _StandIn(nn.Module):
    """In the place of a layer's MLP, which is then not computed."""

    def __init__(self, layer: int, replacement: Replacement) -> None:
        super().__init__()
        self.layer, self.replacement = layer, replacement

    def forward(self, inputs: Tensor) -> Tensor:
        return self.replacement(self.layer, inputs)


@contextlib.contextmanager
def replaced_mlps(model: nn.Module, replacement: Replacement,
                  layers: Sequence[int] | None = None) -> Iterator[None]:
    """Within the block, the MLPs of `layers` (default: all) give `replacement(layer, input)`.

    Raises KeyError for a layer that the model does not have.
    """
    blocks, names = dict(enumerate(decoder_layers(model))), architecture_of(model).mlp
    chosen = {layer: blocks[layer] for layer in (blocks if layers is None else layers)}
    before = {layer: [block.get_submodule(name) for name in names]
              for layer, block in chosen.items()}
    try:
        for layer, block in chosen.items():  # the input passes the others as it is
            _put(block, names, [*(nn.Identity() for _ in names[1:]), _StandIn(layer, replacement)])
        yield
    finally:
        for layer, block in chosen.items():
            _put(block, names, before[layer])


def _put(block: nn.Module, names: Sequence[str], modules: Sequence[nn.Module]) -> None:
    for name, module in zip(names, modules, strict=True):
        owner, _, last = name.rpartition(".")
        setattr(block.get_submodule(owner), last, module)


def zero_ablation(layer: int, inputs: Tensor) -> Tensor:
    """The replacement that removes an MLP: it writes nothing (the paper's "No MLP")."""
    return torch.zeros_like(inputs)


def mean_ablation(means: Tensor) -> Replacement:
    """The replacement by an MLP's mean output, on all tokens; means: (n_layers, d_model)."""
    return lambda layer, inputs: means[layer].to(inputs).expand_as(inputs)


@contextlib.contextmanager
def faster_attention(model: "PreTrainedModel") -> Iterator[None]:
    """Within the block, the model's attention is PyTorch's fused one, which keeps no patterns."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def counting_precision(model: "PreTrainedModel") -> Iterator[None]:
    """Within the block, a GPU's float32 products are TF32's, and its attention is fused: faster.

    For passes over all cells that count or average. Factors are rounded to 11 significant bits,
    bfloat16's to 8, in which transcoders are trained there. Circuits are not traced so: their sums
    would not close. On a CPU nothing changes.
    """
    before, on_gpu = torch.get_float32_matmul_precision(), device_of(model).type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    try:
        with faster_attention(model) if on_gpu else contextlib.nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def mlp_sites(model: nn.Module, tokens: Tensor, mask: Tensor, into: Sites | None = None, *,
              masked: bool = True) -> Sites:
    """Inputs and outputs of all MLPs on the tokens that are not padding, from one forward pass.

    tokens, mask: (n, length). into: where they are written as the pass goes, in its type; None: to
    memory of their own. masked: whether the model is told of the padding. Where that stands after
    the tokens, as in a corpus, no token attends to it, so only the choice of attention's kernel
    (and its last digits) depend on it; the mask may then be a CPU's, so that a GPU need not be
    waited for. No logits are computed.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    keep = _kept_tokens(mask, tokens.device)

    def hook(layer: int, read: Tensor, output: Tensor) -> None:
        if into is None:
            seen.append((keep(read), keep(output)))
            return
        for part, to in zip((read, output), into, strict=True):
            keep(part, to[layer])

    told = masked or not architecture_of(model).causal  # else a token attends to the padding
    with hooked(site_hooks(model, hook)):
        decoder(model)(input_ids=tokens, attention_mask=mask.to(tokens.device) if told else None,
                       use_cache=False)
    if into is not None:
        return into
    inputs, outputs = zip(*seen, strict=True)
    return Sites(torch.stack(inputs), torch.stack(outputs))


def _kept_tokens(mask: Tensor, device: torch.device) -> Callable[..., Tensor]:
    """keep(part, out=None): the tokens of (n, length, d_model), on the device, that aren't padding.

    Into `out` neighbouring cells of one length, padded on the right, go in one copy: in the
    buffer's order by length there are few such runs, and a GPU takes single rows much slower.
    """
    where = mask.flatten().nonzero()[:, 0]  # once: if it is a GPU's, that is waited for each time
    where = where if mask.is_cuda else sent(where, device)
    lengths = mask.sum(dim=1).tolist()
    right = bool(torch.equal(mask, torch.arange(mask.shape[1], device=mask.device)
                             < mask.sum(dim=1)[:, None]))
    runs = [(length, len(list(cells))) for length, cells in groupby(lengths)]

    def keep(part: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            return part.flatten(0, 1)[where]
        if not right or len(runs) > RUNS:
            return out.copy_(part.flatten(0, 1)[where])
        cell = row = 0
        for length, cells in runs:
            to = out[row : row + cells * length].view(cells, length, -1)
            to.copy_(part[cell : cell + cells, :length])
            cell, row = cell + cells, row + cells * length
        return out

    return keep
