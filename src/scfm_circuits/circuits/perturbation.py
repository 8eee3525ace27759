"""In-silico perturbation: a gene taken out of a cell, or moved to its front, and what changes.

The text is encoded again, token for token, and a `Readout` reads it. As in Geneformer (Theodoris et
al. 2023; in_silico_perturber.py) deleting a gene moves all later ones up; one moved to the front
comes first, and what no longer fits is cut. What is read is free: how far a call is ahead
(`of_call`), a token where it is predicted (`of_token`), how near the cell's embedding is to that of
a state (`near`, `along`), or how like itself it still is (`likeness`).

    effect = read(whole) - read(changed)

so deleting a gene that speaks for what is read has a positive effect. A deletion is two changes in
one, and the effect is the sum of both:

    own part       the gene's tokens are gone, and every other token keeps its position
    position part  then all later tokens move up
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from scfm_circuits import InputError
from scfm_circuits.cells.prompts import answered_prompt, answered_sentence
from scfm_circuits.circuits.contrast import Contrast, contrast_of
from scfm_circuits.models.architectures import architecture_of, decoder
from scfm_circuits.models.mlp_sites import device_of, faster_attention
from scfm_circuits.models.states import mean_over_genes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile

How = Literal["delete", "front"]


# --- the change ----------------------------------------------------------------------------------


def changed(ids: Sequence[int] | np.ndarray, genes: Iterable[int], how: How, most: int
            ) -> np.ndarray:
    """A cell's gene ids, in rank order, after a change of some genes.

    genes: ids, taken together. `delete`: they are gone. `front`: they come first, in the order
    given, whether the cell had them or not. most: ids beyond so many are cut. InputError for any
    other change, for symbols in place of ids, and if the cell has none of the genes to delete, or
    nothing would be left.
    """
    genes = list(genes)
    if how not in get_args(How):
        raise InputError(f"The change is {how!r}; use 'delete' or 'front'.")
    if any(isinstance(one, str) for one in (*genes[:1], *ids[:1])):
        raise InputError(f"{[*genes, *ids][0]!s:.60} is no gene id; the id of a gene is its place "
                         "in corpus.symbols.")
    ids, chosen = np.asarray(ids), list(dict.fromkeys(int(gene) for gene in genes))
    rest = ids[~np.isin(ids, chosen)]
    if how == "front":
        return np.concatenate([np.array(chosen, ids.dtype), rest])[:most]
    if len(rest) == len(ids):
        raise InputError("The cell has none of the genes that are to be deleted; name genes of "
                         "its sentence.")
    if not len(rest):
        raise InputError("Without these genes the cell has none; delete fewer.")
    return rest[:most]


# --- as texts ------------------------------------------------------------------------------------


class Text(NamedTuple):
    """A cell as a model reads it.

    tokens, gene: (n,) ids, gene -1 where a token belongs to none. read: the token at which an
    answer or a next gene is read. positions: (n,), if they are not 0, 1, ...
    """

    tokens: np.ndarray
    gene: np.ndarray
    read: int
    positions: np.ndarray | None = None


class Encoder(NamedTuple):
    """Encodes genes as the text of one cell. contrast: of the call, where the text has an answer.

    For cell sentences the text ends where the answer's contrast is read, at the same token of the
    same answer whatever the genes.
    """

    encode: Callable[[np.ndarray], Text]
    contrast: Contrast | None


def encoder_of(corpus: "Corpus", profile: "Profile", cell: int, answer: str | None = None
               ) -> Encoder:
    """How a cell's genes become its text, under the corpus's encoding.

    answer: the label that is read; the cell's own unless given.
    """
    if not corpus.has_answers:
        return Encoder(_ranked(corpus, cell), None)
    label = str(corpus.labels[cell]) if answer is None else answer
    whole = answered_prompt(corpus, profile, cell, label)
    contrast = contrast_of(corpus, whole)
    behind = contrast.position - whole.answer_start

    def encode(ids: np.ndarray) -> Text:
        prompt = answered_sentence(corpus.tokenizer, profile, corpus.symbols[ids].tolist(), ids,
                                   label)
        end = prompt.answer_start + behind + 1
        return Text(prompt.encoded.tokens[:end], prompt.encoded.gene[:end], end - 1)

    return Encoder(encode, contrast)


def _ranked(corpus: "Corpus", cell: int) -> Callable[[np.ndarray], Text]:
    """Of a cell whose genes are tokens: those, between what stands before and after the cell's."""
    own, gene = corpus.tokens[cell][corpus.mask[cell]], corpus.gene[cell][corpus.mask[cell]]
    places = np.flatnonzero(gene >= 0)
    head, tail = own[: places[0]], own[places[-1] + 1 :]
    known: dict[int, int] = dict(zip(gene[places].tolist(), own[places].tolist(), strict=True))

    def token_of(one: int) -> int:
        if one not in known:  # of another cell, moved to the front of this one
            where = np.argwhere(corpus.gene == one)
            if not len(where):
                raise InputError(f"No cell has the gene {corpus.symbols[one]} among its tokens, so "
                                 "its token is not known; name another gene.")
            known[one] = int(corpus.tokens[tuple(where[0])])
        return known[one]

    def encode(ids: np.ndarray) -> Text:
        tokens = np.concatenate([head, [token_of(int(one)) for one in ids], tail]).astype(np.int64)
        belongs = np.full(len(tokens), -1, np.int32)
        belongs[len(head) : len(head) + len(ids)] = ids
        return Text(tokens, belongs, len(head) + len(ids) - 1)

    return encode


def in_place(whole: Text, part: Text) -> Text:
    """`part`, a text without some genes of `whole`, with the positions its tokens have in `whole`.

    A gene keeps the position of its last token, as its first may be cut otherwise at the begin of a
    sentence. Between the tokens that are left positions are missing.
    """
    last = {int(gene): place for place, gene in enumerate(whole.gene) if gene >= 0}
    at = np.arange(len(part.tokens))
    shift, now = np.zeros(len(at), np.int64), 0
    ends = {int(gene): place for place, gene in enumerate(part.gene) if gene >= 0}
    behind = max(ends.values(), default=-1)
    for place, gene in enumerate(part.gene.tolist()):
        if gene >= 0:
            now = last[gene] - ends[gene]
        elif place > behind >= 0:
            now = len(whole.tokens) - len(part.tokens)
        shift[place] = now
    return part._replace(positions=at + shift)


# --- reading -------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Texts padded on the right, (n, length); read: (n,); positions None if they are 0, 1, ..."""

    tokens: Tensor
    mask: Tensor
    gene: Tensor
    read: Tensor
    positions: Tensor | None


Readout = Callable[[Any, Batch], Tensor]
"""From a model and texts to (n,) numbers."""


def batch_of(texts: Sequence[Text], device: torch.device) -> Batch:
    """Texts of one kind as a batch."""
    def padded(rows: Iterable[np.ndarray], fill: int = 0) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(np.asarray(row, np.int64)) for row in rows], batch_first=True,
            padding_value=fill).to(device)

    lengths = torch.tensor([len(one.tokens) for one in texts], device=device)
    tokens = padded(one.tokens for one in texts)
    mask = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
    positions = None if all(one.positions is None for one in texts) else padded(
        np.arange(len(one.tokens)) if one.positions is None else one.positions for one in texts)
    return Batch(tokens, mask, padded((one.gene for one in texts), -1),
                 torch.tensor([one.read for one in texts], device=device), positions)


def hidden(model: Any, batch: Batch, layer: int = 0) -> Tensor:
    """(n, length, d_model) what the model's body gives; layer: or, below 0, what the layer before
    its last (-1), or one further up, gives."""
    inputs: dict[str, Any] = {"input_ids": batch.tokens, "use_cache": False}
    if batch.positions is not None:
        inputs["position_ids"] = batch.positions
    if batch.positions is not None or not architecture_of(model).causal:
        # A causal model does not look at the padding behind; but with positions and without a
        # mask, transformers takes each gap for the begin of another text.
        inputs["attention_mask"] = batch.mask.long()
    if not layer:
        return decoder(model)(**inputs).last_hidden_state
    return decoder(model)(**inputs, output_hidden_states=True).hidden_states[layer - 1]


def of_call(contrast: Contrast) -> Readout:
    """A call's `contrast`, in nats; no other logit is computed."""
    return lambda model, batch: contrast.of(model.get_output_embeddings()(_read(model, batch)))


def of_token(token: int) -> Readout:
    """The logit, less the mean logit, of a token where one is predicted: a decoder's next gene, or
    an encoder's gene where its texts have a mask (`Text.read`)."""
    def read(model: Any, batch: Batch) -> Tensor:
        if architecture_of(model).causal:
            logits = model.get_output_embeddings()(_read(model, batch))
        else:
            inputs = {} if batch.positions is None else {"position_ids": batch.positions}
            every = model(input_ids=batch.tokens, attention_mask=batch.mask.long(), **inputs).logits
            logits = every[torch.arange(len(every), device=every.device), batch.read]
        return logits[:, token] - logits.mean(dim=-1)

    return read


def near(state: Tensor, layer: int = -1) -> Readout:
    """Cosine of a cell's embedding, the mean over its genes' tokens, with a state's (d_model,).

    The embedding is taken behind the layer before the last (-1), as Geneformer takes it, which then
    calls minus the effect the shift towards the state.
    """
    return lambda model, batch: torch.cosine_similarity(
        _embedding(model, batch, layer), state[None], dim=-1)


def along(direction: Tensor, layer: int = 0) -> Readout:
    """A cell's embedding along a direction (d_model,), such as from one state to another: linear,
    so circuits add up to it (`attribution.stream_direction`)."""
    return lambda model, batch: _embedding(model, batch, layer) @ direction


def likeness(model: Any, whole: Text, layer: int = -1) -> Readout:
    """Mean cosine, gene by gene, of the embeddings of genes that a text shares with `whole`: what
    Geneformer reads where no state is named. 1 for the same text.

    Where genes are tokens. Raises InputError for sub-words, which are no genes.
    """
    genes = whole.gene[whole.gene >= 0]
    if len(np.unique(genes)) < len(genes):
        raise InputError("A gene is cut into several tokens here, and has no embedding of its own; "
                         "set `tokenizer: genes` or an `encoding` in which genes are tokens.")
    before = hidden(model, batch_of([whole], device_of(model)), layer)[0]
    at = torch.full((int(genes.max()) + 2,), -1, device=before.device)
    at[torch.from_numpy(genes.astype(np.int64)).to(before.device)] = torch.from_numpy(
        np.flatnonzero(whole.gene >= 0)).to(before.device)

    def read(model: Any, batch: Batch) -> Tensor:
        # Genes that are new, or none, look into the last place, which holds -1.
        new = (batch.gene < 0) | (batch.gene >= len(at))
        place = at[batch.gene.masked_fill(new, len(at) - 1)]
        cosine = torch.cosine_similarity(hidden(model, batch, layer), before[place.clamp_min(0)],
                                         dim=-1)
        return (cosine * (place >= 0)).sum(dim=1) / (place >= 0).sum(dim=1)

    return read


def _read(model: Any, batch: Batch) -> Tensor:
    states = hidden(model, batch)
    return states[torch.arange(len(states), device=states.device), batch.read]


def _embedding(model: Any, batch: Batch, layer: int) -> Tensor:
    return mean_over_genes(hidden(model, batch, layer), batch.gene >= 0)


@torch.no_grad()
def responses(model: "PreTrainedModel", texts: Sequence[Text], readout: Readout, size: int
              ) -> np.ndarray:
    """(n_texts,) float64 what is read of each text, `size` texts in one pass."""
    device = device_of(model)
    with faster_attention(model):
        found = [readout(model, batch_of(texts[start : start + size], device))
                 for start in range(0, len(texts), size)]
    return torch.cat(found).double().cpu().numpy()


def deletions(model: "PreTrainedModel", encoder: Encoder, ids: np.ndarray, readout: Readout,
              size: int, *, some: np.ndarray | None = None, split: bool = False
              ) -> tuple[np.ndarray, np.ndarray]:
    """(n_genes,) effect of deleting each gene of a cell, or each of `some`, and its own part (nan
    unless `split`).

    ids: the cell's genes in rank order; InputError for fewer than two. The position part is the
    difference.
    """
    whole = encoder.encode(ids)
    without = [encoder.encode(changed(ids, [gene], "delete", len(ids)))
               for gene in (ids if some is None else some)]
    read = responses(model, [whole, *without], readout, size)
    own = np.full(len(without), np.nan)
    if split:
        own = read[0] - responses(model, [in_place(whole, one) for one in without], readout, size)
    return read[0] - read[1:], own
