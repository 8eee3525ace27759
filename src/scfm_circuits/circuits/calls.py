"""What a model calls a cell, and that call as one reading: the question that circuits answer.

- In words: the model completes a prompt with a cell type. The call is the `contrast` of the answer,
  in nats, and is read at one token.
- By its state, where nothing is asked in words: the model names the type whose place in its
  embedding is nearest (`models.states`). The call is how far the cell lies on that type's side of
  the line from all other types: 1 at the type's place, -1 at the others' mean. It is read at the
  tokens of all genes, and is linear but for the final norm, so with that frozen it is exact.

`calls_of` is the only place that asks which. Everything else goes through `Calls`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from scfm_circuits.cells.prompts import AnsweredPrompt, answered_prompt
from scfm_circuits.cells.tokens import token_texts
from scfm_circuits.circuits.attribution import Contributions, Reading, contributions
from scfm_circuits.circuits.circuit import Circuit, Node
from scfm_circuits.circuits.contrast import (
    ONE_TYPE,
    Contrast,
    Scored,
    answered,
    contrast_of,
    contrasts_of,
)
from scfm_circuits.circuits.direct_effects import whole_sums
from scfm_circuits.circuits.frozen import Frozen
from scfm_circuits.circuits.interventions import Call
from scfm_circuits.circuits.perturbation import Readout, hidden, of_call
from scfm_circuits.circuits.search import limits, trace
from scfm_circuits.models.answers import label_probability, predict_answers
from scfm_circuits.models.architectures import architecture_of
from scfm_circuits.models.mlp_sites import mask_token
from scfm_circuits.models.states import embeddings, genes_at, get_states, mean_over_genes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile


class StateCall(NamedTuple):
    """How far a cell lies on a type's side: w . embedding + b; w: (d_model,) float64.

    places: the tokens of the cell's genes.
    """

    places: list[int]
    w: Tensor
    b: float

    def read(self, model: nn.Module, hidden: Tensor, at: Tensor) -> Tensor:
        """(n,) of texts: hidden, (n, n_pos, d_model) from the model's body; at, (n, n_pos) bool the
        tokens of their genes."""
        return mean_over_genes(hidden, at) @ self.w.to(hidden) + self.b

    @torch.no_grad()
    def start(self, frozen: Frozen) -> tuple[Node, Reading]:
        """The node at which a circuit of the call ends, and its reading in the linear model: of the
        stream that leaves the last layer, through the final norm where the body has one."""
        n, layers = len(self.places), len(frozen.weights)
        w = self.w.to(frozen.final) / n
        vector, constant = w.expand(n, -1), w.new_full((), self.b)
        if not frozen.head:
            vector = frozen.last._replace(sigma=frozen.last.sigma[self.places]).back(vector)
            constant = constant + n * (w @ frozen.last.norm.bias)
        value = (vector * frozen.final[self.places]).sum() + constant
        reading = Reading(vector, list(self.places), layers, layers, constant, value)
        return Node.of_state(self.places[-1], layers, value), reading


class GeneCall(NamedTuple):
    """A gene that a model is asked: its name, the text as the model is shown it, and the log-odds
    of its token against those of all other genes."""

    gene: str
    prompt: AnsweredPrompt
    call: Contrast


class Calls:
    """A model's calls in words."""

    unit = "nats"
    """What a call is measured in, as a page says it."""
    named = one_named = "the model names exactly"
    none_named = "of which the model names none exactly"
    median_of = "whose label has the median probability"
    """What is said of cells that are named rightly, and of the one in the middle."""

    def __init__(self, model: "PreTrainedModel", corpus: "Corpus", profile: "Profile") -> None:
        self.model, self.corpus, self.profile = model, corpus, profile

    def callable(self, cells: np.ndarray) -> np.ndarray:
        """Those of the cells whose type can be called."""
        return cells

    def said(self, cells: np.ndarray) -> np.ndarray:
        """(n_cells,) what the model calls each."""
        return np.array(predict_answers(self.model, self.corpus, cells), dtype=str)

    def sureness(self, cells: np.ndarray) -> np.ndarray:
        """(n_cells,) the probability of each cell's own label."""
        return np.array([label_probability(self.model, self.corpus, int(cell)) for cell in cells])

    def prompt(self, cell: int, answer: str | None = None) -> AnsweredPrompt:
        """The cell's text with an answer, by default its label."""
        return answered_prompt(self.corpus, self.profile, int(cell),
                               str(self.corpus.labels[cell]) if answer is None else answer)

    def call(self, prompt: AnsweredPrompt, answer: str) -> Call:
        """The call of an answer to a prompt that ends with it."""
        return contrast_of(self.corpus, prompt)

    def probability(self, frozen: Frozen, call: Any) -> float:
        """Of the token that the call is read of; of a state 1, as it has none."""
        return float(frozen.logits[call.position].softmax(-1)[call.token])

    def own_calls(self, cells: np.ndarray) -> list[Call]:
        """The call of each cell's own label."""
        return [*contrasts_of(self.corpus, self.profile, cells)]

    def readout(self, cell: int) -> Readout:
        """How the call of a cell's own label is read of its text, whatever genes that is without
        (`perturbation.encoder_of`)."""
        return of_call(contrast_of(self.corpus, self.prompt(cell)))

    def scored(self, rows: np.ndarray, tokens: Tensor, last: Tensor, calls: Sequence[Any]
               ) -> Scored:
        """Of the cells `rows`: whether each token of the answer is the likeliest, and the calls.

        tokens: (n, length); last: (n, length, d_model) what the model's body gives.
        """
        return answered(self.model, self.corpus, rows, tokens, last, calls)

    def gene_call(self, prompt: AnsweredPrompt, markers: set[str]) -> GeneCall | None:
        """A gene of a text that is asked by itself; None in words, where the call is asked."""
        return None

    # --- what a page says of a call ---

    def about(self, prompt: AnsweredPrompt, call: Any) -> str:
        """What is read, and where, in a sentence."""
        [own] = token_texts(self.corpus.tokenizer, [call.token])
        if not call.others:
            return ONE_TYPE
        others, tokens = sum(map(len, call.labels)), len(call.others)
        differ = "1 other label has another token" if others == 1 else (
            f"{others} other labels have {tokens} other token{'s' * (tokens > 1)}")
        return (f"Here the answer's token is \"{own}\", predicted at the token "
                f"\"{prompt.texts[call.position]}\"; {differ} there.")

    def name(self, call: Any, answer: str) -> str:
        """What the call's node is called in other programs."""
        return token_texts(self.corpus.tokenizer, [call.token])[0]

    def table(self, prompt: AnsweredPrompt, frozen: Frozen, call: Any) -> pd.DataFrame:
        """What the call holds against what."""
        found: pd.DataFrame = call.table(frozen, self.corpus.tokenizer)
        return found

    def by_gene(self, frozen: Frozen, call: Call, genes: list[str | None]) -> pd.DataFrame:
        """What each gene's tokens give the call, most positive first: gene, contribution, and what
        it is the sum of. In words: what attention brings directly (`gene_contributions`)."""
        return gene_contributions(contributions(frozen, call.start(frozen)[1]), genes)

    def sums(self, frozen: Frozen, call: Call, by_gene: pd.DataFrame) -> dict[str, float]:
        """A call's direct contributions by what they come from; they add up to it.

        by_gene: `gene_contributions` of the same call.
        """
        return sums_by_gene_or_not(contributions(frozen, call.start(frozen)[1]), by_gene)

    def parts(self, sums: dict[str, float]) -> str:
        """Of `sums`, what comes from genes, from features and from errors, as a page says it."""
        genes, features, errors = (f"{sums[name]:.2g}" for name in (
            "attention to genes", "features", "transcoder error"))
        return (f"{genes} come through attention from genes, {features} straight from features and "
                f"{errors} from what the transcoders miss")


class StateCalls(Calls):
    """A model's calls by the nearest type in its embedding."""

    unit = "units"
    named, one_named = "lie nearest to its place", "lies nearest to its type's place"
    none_named = "none of which lies nearest to its place"
    median_of = "whose call is the median"

    def __init__(self, model: "PreTrainedModel", corpus: "Corpus", profile: "Profile") -> None:
        super().__init__(model, corpus, profile)
        self.states = get_states(model, corpus, profile)

    def callable(self, cells: np.ndarray) -> np.ndarray:
        """Those of types that have training cells, and others beside them."""
        known = np.isin(self.corpus.labels[cells], self.states.types)
        return cells[known & (len(self.states.types) > 1)]

    def _embedded(self, cells: np.ndarray) -> np.ndarray:
        return embeddings(self.model, self.corpus, cells, self.profile.forward_cells)

    def said(self, cells: np.ndarray) -> np.ndarray:
        """(n_cells,) the type nearest to each."""
        return self.states.nearest(self._embedded(cells))

    def sureness(self, cells: np.ndarray) -> np.ndarray:
        """(n_cells,) how far each lies on its own type's side."""
        axes = [self.states.axis(str(self.corpus.labels[cell])) for cell in cells]
        return np.array([float(row @ w + b) for row, (w, b) in zip(
            self._embedded(cells), axes, strict=True)])

    def call(self, prompt: AnsweredPrompt, answer: str) -> Call:
        """How far the text lies on the side of the type `answer`."""
        w, b = self.states.axis(answer)
        return StateCall(np.flatnonzero(prompt.encoded.gene >= 0).tolist(), torch.from_numpy(w), b)

    def probability(self, frozen: Frozen, call: Any) -> float:
        """1: a state has no probability, and other programs want one."""
        return 1.0

    def own_calls(self, cells: np.ndarray) -> list[Call]:
        return [self.call(self.prompt(cell), str(self.corpus.labels[cell])) for cell in cells]

    def readout(self, cell: int) -> Readout:
        """How the call of a cell's own label is read of its text, whatever genes that lacks."""
        [call] = self.own_calls(np.array([cell]))
        return lambda model, batch: call.read(model, hidden(model, batch), batch.gene >= 0)

    def scored(self, rows: np.ndarray, tokens: Tensor, last: Tensor, calls: Sequence[Any]
               ) -> Scored:
        """Of the cells `rows`: whether their own types are nearest, and the calls."""
        of_gene = genes_at(self.corpus, rows, tokens.shape[1], last.device)
        embedded = mean_over_genes(last.double(), of_gene).cpu().numpy()
        values = [float(one.read(self.model, last[place : place + 1], of_gene[place : place + 1]))
                  for place, one in enumerate(calls)]
        return Scored(self.states.nearest(embedded) == self.corpus.labels[rows], np.array(values))

    def gene_call(self, prompt: AnsweredPrompt, markers: set[str]) -> GeneCall | None:
        """The first gene of a text, in rank order, that is one of `markers`, or the first of all: a
        decoder predicts it behind the genes before it, so that there must be one, an encoder where
        it is shown a mask. None if there is no such gene."""
        causal = architecture_of(self.model).causal
        places = [place for place, gene in enumerate(prompt.genes) if gene][int(causal) :]
        if not places:
            return None
        at = next((place for place in places if prompt.genes[place] in markers), places[0])
        name, tokens = str(prompt.genes[at]), prompt.encoded.tokens.copy()
        own, genes = int(tokens[at]), np.unique(self.corpus.tokens[self.corpus.gene >= 0])
        others = tuple(int(one) for one in genes if one != own)
        if causal:
            return GeneCall(name, prompt, Contrast(at - 1, own, others))
        tokens[at] = mask_token(self.corpus)
        shown = prompt._replace(
            encoded=prompt.encoded._replace(tokens=tokens),
            texts=[*prompt.texts[:at], "<mask>", *prompt.texts[at + 1 :]],
            genes=[*prompt.genes[:at], None, *prompt.genes[at + 1 :]])
        return GeneCall(name, shown, Contrast(at, own, others))

    def about(self, prompt: AnsweredPrompt, call: Any) -> str:
        return (f"Nothing is asked in words here. The call is read at the tokens of all "
                f"{len(call.places)} genes: how far their mean embedding lies on the type's side.")

    def name(self, call: Any, answer: str) -> str:
        return f"state: {answer}"

    def table(self, prompt: AnsweredPrompt, frozen: Frozen, call: Any) -> pd.DataFrame:
        """How far the cell lies on the side of each type."""
        values = [float(self.call(prompt, str(one)).start(frozen)[1].value)
                  for one in self.states.types]
        return pd.DataFrame({"type": self.states.types, "call": values}).sort_values(
            "call", ascending=False, ignore_index=True)

    def by_gene(self, frozen: Frozen, call: Call, genes: list[str | None]) -> pd.DataFrame:
        """What is written at each gene's token gives the call through all attention paths: gene,
        contribution, and its parts: identity (which gene), rank (the position's embedding, if there
        is one), features and errors of the MLPs."""
        [found] = whole_sums(frozen, [call.start(frozen)[1]])
        parts = {"identity": found.leaves[0],
                 **({"rank": found.leaves[1]} if len(found.leaves) > 1 else {}),
                 "features": found.features.sum(dim=0), "errors": found.errors.sum(dim=0)}
        table = pd.DataFrame({name: part.double().cpu().numpy() for name, part in parts.items()})
        table.insert(0, "gene", [gene or "" for gene in genes[: len(table)]])
        table.insert(1, "contribution", table[list(parts)].sum(axis=1))
        table = table[table["gene"] != ""]
        return table.sort_values(["contribution", "gene"], ascending=[False, True],
                                 ignore_index=True)

    def sums(self, frozen: Frozen, call: Call, by_gene: pd.DataFrame) -> dict[str, float]:
        """The call by what was written where; the parts add up to it."""
        [found] = whole_sums(frozen, [call.start(frozen)[1]])
        others = float(found.total() - found.constant) - float(by_gene["contribution"].sum())
        names = {"identity": "which genes", "rank": "their ranks", "features": "features at genes",
                 "errors": "transcoder error at genes"}
        return {**{names[name]: float(by_gene[name].sum()) for name in names if name in by_gene},
                "special tokens": others, "constant (biases)": float(found.constant)}

    def parts(self, sums: dict[str, float]) -> str:
        genes, features, errors = (f"{sums[name]:.2g}" for name in (
            "which genes", "features at genes", "transcoder error at genes"))
        return (f"{genes} come from which genes are there, {features} from features at them and "
                f"{errors} from what the transcoders miss")


def calls_of(model: "PreTrainedModel", corpus: "Corpus", profile: "Profile") -> Calls:
    """How the model calls the corpus's cells: in words, or by their states."""
    return (Calls if corpus.has_answers else StateCalls)(model, corpus, profile)


def trace_call(frozen: Frozen, call: Call, profile: "Profile") -> Circuit:
    """The greedy circuit of a call (`search.trace`), as large as the profile's circuits are."""
    return trace(frozen, *call.start(frozen), **limits(profile))


# --- direct contributions, summed up -------------------------------------------------------------


def gene_contributions(parts: Contributions, genes: list[str | None]) -> pd.DataFrame:
    """What attention brings to a reading from each gene's tokens, directly, most positive first.

    genes: (n_pos,) the gene of each token. Columns: gene, contribution (signed sum over heads and
    tokens), absolute (sum of absolute values), strongest_head ("layer.head").
    """
    heads = parts.heads.cpu().numpy()
    rows = []
    for gene in dict.fromkeys(gene for gene in genes if gene):
        own = heads[:, :, [g == gene for g in genes]]
        layer, head = np.unravel_index(np.abs(own.sum(axis=2)).argmax(), own.shape[:2])
        rows.append((gene, float(own.sum()), float(np.abs(own).sum()), f"{layer}.{head}"))
    frame = pd.DataFrame(rows, columns=["gene", "contribution", "absolute", "strongest_head"])
    return frame.sort_values(["contribution", "gene"], ascending=[False, True], ignore_index=True)


def sums_by_source(parts: Contributions) -> dict[str, float]:
    """A reading's contributions summed by what they come from; they add up to its value."""
    return {
        "features of earlier layers": float(parts.features.sum()),
        "attention heads": float(parts.heads.sum()),
        "token embedding": float(parts.embedding.sum()),
        "transcoder error": float(parts.errors.sum()), "constant (biases)": float(parts.constant)}


def sums_by_gene_or_not(parts: Contributions, by_gene: pd.DataFrame) -> dict[str, float]:
    """`sums_by_source` with attention split by whether the token read belongs to a gene.

    by_gene: `gene_contributions` of the same parts.
    """
    on_genes = float(by_gene["contribution"].sum())
    (_, features), (_, heads), *others = sums_by_source(parts).items()
    return {"features": features, "attention to genes": on_genes,
            "attention to other tokens": heads - on_genes, **dict(others)}
