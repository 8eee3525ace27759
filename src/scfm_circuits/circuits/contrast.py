"""The contrast of a call: the model's answer against the run's other labels, where they part.

A call is not its first token: nine of ten labels may begin with `_CD`, and the model has then said
nothing yet. So the answer is followed, token for token, to the place where it parts from most of
the other labels (the first of equals). There the others offer tokens B, each once, however many
labels share it, and the answer has a:

    contrast = logit(a) - logsumexp(logit(b) for b in B)

in nats: the log-odds of the answer's token against the others', given that one of them comes next;
above 0 the model prefers it to all of them together. Labels that parted earlier are no part of it,
nor is what a shared token of B leads to. Every text is answered with its own tokens up to there
(teacher forcing), so one position of one text holds it all: a linear reading, as in `attribution`.
A prediction that is no label parts from all labels alike. The rule looks at labels only.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor, nn

from scfm_circuits.cells.prompts import AnsweredPrompt, answered_prompt
from scfm_circuits.cells.tokens import token_texts
from scfm_circuits.circuits.attribution import Reading, logit_direction
from scfm_circuits.circuits.circuit import Node
from scfm_circuits.circuits.frozen import Frozen
from scfm_circuits.common.labels import listed
from scfm_circuits.models.architectures import unembedded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile

ONE_TYPE = ("There is no other label in this run to hold the answer against; its token's logit "
            "less the mean logit is read instead.")


class Contrast(NamedTuple):
    """Where a call is read, and what is held against what.

    position: of the token that predicts; token: the answer's own; others: the other labels' tokens
    there, ascending, each once; labels: by token of `others`, the labels that have it. Without
    others, which is so if the run has one label only, the token's logit less the mean logit is
    read (`ONE_TYPE`).
    """

    position: int
    token: int
    others: tuple[int, ...] = ()
    labels: tuple[tuple[str, ...], ...] = ()

    @property
    def places(self) -> list[int]:
        """The one token whose logits are read."""
        return [self.position]

    def read(self, model: nn.Module, hidden: Tensor, at: Tensor) -> Tensor:
        """(n,) the contrast of texts, from what the model's body gives, hidden (n, n_pos, d_model),
        at one token of each, (n, n_pos) bool; no other logit is computed."""
        return self.of(unembedded(model, hidden[at]))

    def of(self, logits: Tensor) -> Tensor:
        """(...) the contrast in nats; logits: (..., vocabulary) at the position."""
        own = logits[..., self.token]
        if not self.others:
            return own - logits.mean(dim=-1)
        return own - logits[..., list(self.others)].logsumexp(dim=-1)

    def table(self, frozen: Frozen, tokenizer: "PreTrainedTokenizerFast") -> pd.DataFrame:
        """The tokens where the call is read, the answer's own first: token, labels that have it,
        logit, and share, its probability among them."""
        tokens = [self.token, *self.others]
        logits = frozen.logits[self.position, tokens].double()
        return pd.DataFrame({
            "token": token_texts(tokenizer, tokens),
            "labels": ["the answer", *map(listed, self.labels)],
            "logit": logits.tolist(), "share": logits.softmax(-1).tolist()})

    def start(self, frozen: Frozen) -> tuple[Node, Reading]:
        """The node at which a circuit of the call ends, and its reading in the linear model."""
        reading = logit_direction(frozen, self.token, self.position, self.others)
        return Node.of_logit(self.token, self.position, len(frozen.weights), reading.value), reading


def answers_by_label(corpus: "Corpus") -> dict[str, tuple[int, ...]]:
    """Every label of the corpus as the tokens of the answer it is trained on, with the end of the
    text, so that none is the beginning of another."""
    labels, one_of_each = np.unique(corpus.labels, return_index=True)
    return {str(label): (*corpus.tokens[cell, corpus.answer_start[cell] : corpus.answer_end[cell]
                                        + 1].tolist(), corpus.tokenizer.eos_token_id)
            for label, cell in zip(labels, one_of_each, strict=True)}


def contrast_of(corpus: "Corpus", prompt: AnsweredPrompt) -> Contrast:
    """The contrast of a prompt's answer, which may be a label or the model's own words."""
    start = prompt.answer_start
    own = (*prompt.encoded.tokens[start:].tolist(), corpus.tokenizer.eos_token_id)
    others = {label: tokens for label, tokens in answers_by_label(corpus).items() if tokens != own}
    found: list[dict[int, list[str]]] = []
    for place, token in enumerate(own):
        parting: dict[int, list[str]] = {}
        for label, tokens in others.items():
            if tokens[:place] == own[:place] and tokens[place] != token:
                parting.setdefault(tokens[place], []).append(label)
        found.append(parting)
    place = int(np.argmax([sum(map(len, parting.values())) for parting in found]))
    there = dict(sorted(found[place].items()))
    return Contrast(start + place - 1, own[place], tuple(there),
                    tuple(tuple(labels) for labels in there.values()))


def contrasts_of(corpus: "Corpus", profile: "Profile", cells: np.ndarray, label: str | None = None
                 ) -> list[Contrast]:
    """Each cell's contrast of its own label, or of `label`; the same for all cells of a type, but
    for where it is read."""
    found: dict[str, Contrast] = {}
    asked = [str(one) if label is None else label for one in corpus.labels[cells]]
    for cell, name in zip(cells, asked, strict=True):
        if name not in found:
            one = contrast_of(corpus, answered_prompt(corpus, profile, int(cell), name))
            found[name] = one._replace(position=one.position - int(corpus.answer_start[cell]))
    return [found[name]._replace(position=found[name].position + int(corpus.answer_start[cell]))
            for cell, name in zip(cells, asked, strict=True)]


class Scored(NamedTuple):
    """Of some cells, (n_cells,) each: whether they are named rightly, and the calls' values."""

    right: np.ndarray
    values: np.ndarray


def answered(model: nn.Module, corpus: "Corpus", rows: np.ndarray, tokens: Tensor, last: Tensor,
             contrasts: Sequence[Contrast]) -> Scored:
    """Whether each token of the answer is the likeliest, and the contrasts, of the cells `rows`.
    tokens: (n, length); last: (n, length, d_model) what the model's body gives."""
    start, end = corpus.answer_start[rows], corpus.answer_end[rows]
    cell = np.repeat(np.arange(len(rows)), end + 1 - start)
    at = np.concatenate([np.arange(a - 1, b) for a, b in zip(start, end, strict=True)])
    likeliest = unembedded(model, last[cell, at]).argmax(dim=-1)
    missed = (likeliest != tokens[cell, at + 1]).cpu().numpy()
    ends = [one.position for one in contrasts]
    logits = unembedded(model, last[np.arange(len(rows)), ends])
    return Scored(np.bincount(cell, missed, len(rows)) == 0, np.array(
        [float(one.of(row)) for one, row in zip(contrasts, logits, strict=True)]))
