"""Ground truth at the input: take a gene out of the sentence, and see what the call does.

For some held-out cells, each called what its label says (`calls`), every gene in turn is taken out
(of a longer cell `MOST_GENES`, evenly spaced by rank, as models of gene tokens read thousands): the
text is encoded again without it, token for token, nothing stands in its place, and the call is
read again: of an answer at the same token, of a state at the genes that are left.

    effect(gene) = call(whole sentence) - call(without the gene),  in nats, or a state call's units

so a gene that speaks for the call has a positive effect. `gene_scores` has what circuits say of
each gene, and what is had for less. Over the genes of one cell a score and the effect are compared
by rank correlation (with signs, and by size), and by how many of the k largest by size they share.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, SupportsFloat

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor
from tqdm import tqdm

from scfm_circuits import InputError
from scfm_circuits.cells.prompts import AnsweredPrompt
from scfm_circuits.circuits.calls import Calls, calls_of, trace_call
from scfm_circuits.circuits.direct_effects import all_paths, direct_effects, extent, sources_of
from scfm_circuits.circuits.frozen import Frozen, freeze
from scfm_circuits.circuits.interventions import Call, Kept, at_places, held_at_means, kept_alone
from scfm_circuits.circuits.perturbation import deletions, encoder_of
from scfm_circuits.circuits.structure import features_at
from scfm_circuits.circuits.studies import studied_cells
from scfm_circuits.circuits.token_means import Means, prompt_kinds, study_means
from scfm_circuits.common.intervals import bootstrap_interval, resampled
from scfm_circuits.common.randomness import generator
from scfm_circuits.models.architectures import decoder
from scfm_circuits.models.mlp_sites import faster_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.circuits.circuit import Circuit
    from scfm_circuits.common.profile import Profile
    from scfm_circuits.transcoders.transcoder import Transcoders

CELLS, MOST_GENES, TOP, STEPS, DRAWS = 30, 256, 10, 8, 1_000
"""Cells; genes that are taken out of a cell, at most; the k of top-k; steps of integrated
gradients; resamples of cells, and shuffles."""
LEAST = 4
"""Genes that a sentence has at least, for ranks to say anything."""
SCORES = {
    "paths": "circuit: all paths from the gene's embedding, signed",
    "written": "circuit: all that is written at the gene's tokens, signed",
    "nodes_signed": "greedy circuit: influence of nodes on the gene, signed",
    "nodes": "greedy circuit: influence of nodes on the gene",
    "rank": "place in the sentence, first genes first",
    "attention": "attention rollout from the token that is read",
    "input_x_gradient": "input x gradient of the model",
    "integrated_gradients": "integrated gradients of the model",
}
"""What each score of `gene_scores` is."""
CIRCUITS = ("paths", "written", "nodes_signed", "nodes")
"""Those that a circuit gives; the others are rivals that need none."""


# --- the truth -----------------------------------------------------------------------------------


def places(corpus: "Corpus", cell: int) -> np.ndarray:
    """(n_genes,) places, from 0 and in rank order, of the genes that are taken out of a cell: all
    or, of more than `MOST_GENES`, so many evenly spaced ones."""
    n = len(corpus.gene_ids_of(cell))
    return np.linspace(0, n - 1, min(n, MOST_GENES)).round().astype(int)


def knock_outs(model: "PreTrainedModel", corpus: "Corpus", profile: "Profile", cell: int
               ) -> np.ndarray:
    """(n_genes,) effect on the call of its label of each gene that is taken out of a cell
    (`places`)."""
    readout, ids = calls_of(model, corpus, profile).readout(cell), corpus.gene_ids_of(cell)
    return deletions(model, encoder_of(corpus, profile, cell), ids, readout, profile.forward_cells,
                     some=ids[places(corpus, cell)])[0]


# --- what is held against it ---------------------------------------------------------------------


def gene_scores(model: "PreTrainedModel", frozen: Frozen, prompt: AnsweredPrompt,
                call: Call, circuit: "Circuit | None", ids: Sequence[int] | np.ndarray
                ) -> dict[str, np.ndarray]:
    """(n_genes,) of each of `SCORES`, in the order of `ids`, the sentence's genes; without a
    circuit, of those that need no greedy one.

    paths: `direct_effects.all_paths` of the gene's own tokens. written: what embedding, active
    features and errors at the gene's tokens give the call through attention alone; with biases
    and all other tokens this adds up to the call. nodes: `Circuit.influence` of nodes on the
    gene's tokens, heads where they read. rank: the first gene highest. attention: rollout (Abnar
    and Zuidema 2020): per layer half of the mean pattern and half of the identity, multiplied; mean
    over the tokens that are read. input_x_gradient, integrated_gradients: by the real model's
    gradient in the token embeddings; the latter from a text whose genes' tokens all have the mean
    embedding of these, in `STEPS` steps.
    """
    _, reading = call.start(frozen)
    sources, n = sources_of(frozen, [reading]), extent(frozen, [reading])[1]
    [row], _ = direct_effects(frozen, sources, [reading])
    effects = row.double().cpu().numpy()
    written = np.bincount(sources.position, effects[: sources.errors], n)
    written += effects[sources.errors : sources.embeddings].reshape(-1, n).sum(axis=0)
    written += effects[sources.embeddings :].reshape(-1, n).sum(axis=0)
    own = prompt.encoded.gene[:n]
    gradient, integrated = _by_gradient(model, frozen, call, torch.from_numpy(own >= 0))
    by_token: dict[str, Tensor | np.ndarray] = {
        "paths": all_paths(frozen, reading)[:n], "written": written,
        "attention": _rollout(frozen)[call.places].mean(dim=0)[:n],
        "input_x_gradient": gradient, "integrated_gradients": integrated}
    if circuit is not None:
        by_token |= {"nodes_signed": _by_source(circuit, n, signed=True),
                     "nodes": _by_source(circuit, n, signed=False)}
    at = [np.flatnonzero(own == gene) for gene in ids]
    found = {"rank": np.arange(len(at), 0, -1, dtype=float)}
    for name, values in by_token.items():
        array = values.double().cpu().numpy() if isinstance(values, Tensor) else values
        found[name] = np.array([array[places].sum() for places in at])
    return {name: found[name] for name in SCORES if name in found}


def _by_source(circuit: "Circuit", n: int, *, signed: bool) -> np.ndarray:
    influence, found = circuit.influence(signed=signed), np.zeros(n)
    for node in circuit.nodes.values():
        if node.id != circuit.target:
            found[node.source] += influence[node.id]
    return found


def _rollout(frozen: Frozen) -> Tensor:
    """(n_pos, n_pos) attention rollout, rows are destinations."""
    whole = torch.eye(len(frozen.tokens), dtype=frozen.patterns.dtype, device=frozen.tokens.device)
    for pattern in frozen.patterns.mean(dim=1):
        whole = 0.5 * (pattern @ whole + whole)
    return whole


def _by_gradient(model: "PreTrainedModel", frozen: Frozen, call: Call, on_gene: Tensor
                 ) -> tuple[Tensor, Tensor]:
    """(n,) each token's input x gradient, and its integrated gradient."""
    x = frozen.leaves[0, : len(on_gene)]
    base = torch.where(on_gene.to(x.device)[:, None], x[on_gene].mean(dim=0), x)
    along = (torch.arange(STEPS, device=x.device, dtype=x.dtype) + 0.5) / STEPS
    mean = torch.zeros_like(x)
    with faster_attention(model):
        plain = _gradient(model, call, x[None])[0]
        for some in along.split(4):  # a few texts at once: their activations are kept
            mean += _gradient(model, call, base + some[:, None, None] * (x - base)).sum(dim=0)
    return (x * plain).sum(dim=-1), ((x - base) * mean / STEPS).sum(dim=-1)


@torch.enable_grad()
def _gradient(model: "PreTrainedModel", call: Call, embedded: Tensor) -> Tensor:
    """Gradient of each text's call in its tokens' embeddings, both (n, n_tokens, d_model)."""
    leaf = embedded.detach().requires_grad_()
    hidden = decoder(model)(inputs_embeds=leaf, use_cache=False).last_hidden_state
    at = at_places(call.places, leaf[0]).expand(len(leaf), -1)
    return torch.autograd.grad(call.read(model, hidden, at).sum(), leaf)[0]


# --- all cells -----------------------------------------------------------------------------------


class KnockOuts(NamedTuple):
    """Knock-outs of some cells, and what circuits and rivals say of them."""

    genes: pd.DataFrame
    """A row per cell and gene: cell, cell_type, gene, rank (from 1), effect (in the call's units),
    then `score_` with each of `SCORES`."""
    cells: pd.DataFrame
    """A row per cell and score: cell, cell_type, score, genes, spearman, spearman_size, k,
    overlap."""
    summary: pd.DataFrame
    """A row per score, see `summarised`."""
    kept: pd.DataFrame
    """A row per cell: cell, cell_type, and `interventions.Kept` of its call (own kind)."""


def knock_out_study(model: "PreTrainedModel", transcoders: "Transcoders", corpus: "Corpus",
                    profile: "Profile", most: int = CELLS) -> KnockOuts:
    """Knock out genes (`places`) of the first `most` held-out cells, taken from each type in turn.

    Each cell's circuit is the greedy one of the call of its label. Cells with fewer than `LEAST`
    genes are left out, and those whose type cannot be called. Raises InputError if none is left.
    """
    calls = calls_of(model, corpus, profile)
    means = study_means(model, transcoders, corpus, profile)
    among = calls.callable(np.flatnonzero(corpus.held_out))
    chosen = [int(cell) for cell in studied_cells(corpus, most, most, among)
              if len(corpus.gene_ids_of(cell)) >= LEAST]
    if not chosen:
        raise InputError(f"No held-out cell of a type that can be called has {LEAST} genes, so "
                         "none can be taken out; raise `genes_per_cell`, or use more cells.")
    genes, kept = [], []
    for cell in tqdm(chosen, desc="knock-outs", unit="cell"):
        keys = {"cell": str(corpus.cell_ids[cell]), "cell_type": str(corpus.labels[cell])}
        scores, left = _of_cell(calls, transcoders, cell, means)
        at, names = places(corpus, cell), corpus.genes_of(cell)
        genes.append(pd.DataFrame({
            **keys, "gene": [names[place] for place in at], "rank": at + 1,
            "effect": knock_outs(model, corpus, profile, cell),
            **{f"score_{name}": values for name, values in scores.items()}}))
        kept.append({**keys, **left._asdict()})
    table = pd.concat(genes, ignore_index=True)
    return KnockOuts(table, *compared(table, profile.seed), pd.DataFrame(kept))


def _of_cell(calls: Calls, transcoders: "Transcoders", cell: int, means: Means
             ) -> tuple[dict[str, np.ndarray], Kept]:
    model, prompt = calls.model, calls.prompt(cell)
    call = calls.call(prompt, str(calls.corpus.labels[cell]))
    frozen = freeze(model, transcoders, prompt.encoded.tokens)
    circuit = trace_call(frozen, call, calls.profile)
    left = kept_alone(model, frozen, features_at(circuit), call, call.start(frozen)[1],
                      held_at_means(frozen, means, prompt_kinds(prompt)))
    ids = calls.corpus.gene_ids_of(cell)[places(calls.corpus, cell)]
    return gene_scores(model, frozen, prompt, call, circuit, ids), left


# --- compared ------------------------------------------------------------------------------------


def compared(genes: pd.DataFrame, seed: int, draws: int = DRAWS, *, truth: str = "effect",
             scores: Mapping[str, str] = SCORES) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`KnockOuts.cells` and `KnockOuts.summary` of its `genes`. truth: the column that scores are
    held against; scores: their names, and what each is.

    k is `TOP`, or half of the genes of a sentence with fewer than twice as many. Summary: score,
    what (`SCORES`), and for each of spearman, spearman_size and overlap the mean over cells, with
    `_low` and `_high`, its 95 % interval over resampled cells, and `_null_low`, `_null_high`, the
    range of the mean in 95 % of draws that deal each cell's effects out to its genes at random. A
    score that is the same for all genes of a cell has no order: its correlation counts as 0.
    """
    rows, rng = [], generator(seed, "knock-outs", 0)
    null = {name: np.zeros((len(MEASURES), draws)) for name in scores}
    by_cell = genes.groupby(["cell", "cell_type"], sort=False)
    for (cell, kind), part in by_cell:
        n, effect = len(part), part[truth].to_numpy()
        k, shuffled = min(TOP, n // 2), effect[rng.permuted(np.tile(np.arange(n), (draws, 1)),
                                                            axis=1)]
        for name in scores:
            score = part[f"score_{name}"].to_numpy()
            found = _measured(score, effect[None], k)[:, 0]
            rows.append((cell, kind, name, n, k, *found))
            null[name] += _measured(score, shuffled, k) / len(by_cell)
    cells = pd.DataFrame(rows, columns=["cell", "cell_type", "score", "genes", "k", *MEASURES])
    return cells, summarised(cells, null, seed, draws, scores)


MEASURES = ("spearman", "spearman_size", "overlap")
"""Rank correlation of score and effect; of their sizes; shared among the k largest, of k."""


def _measured(score: np.ndarray, effects: np.ndarray, k: int) -> np.ndarray:
    """(3, n_draws) `MEASURES` of one score with each row of effects (n_draws, n_genes)."""
    def ranks(values: np.ndarray) -> np.ndarray:
        centred = rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2
        return centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-30)

    def largest(values: np.ndarray) -> np.ndarray:
        # Of equals those that stand first in the sentence.
        order = np.argsort(-np.abs(values), axis=-1, kind="stable")[..., :k]
        chosen = np.zeros(values.shape)
        np.put_along_axis(chosen, order, 1.0, axis=-1)
        return chosen

    return np.stack([ranks(effects) @ ranks(score), ranks(np.abs(effects)) @ ranks(np.abs(score)),
                     largest(effects) @ largest(score) / k])


def summarised(cells: pd.DataFrame, null: Mapping[str, np.ndarray], seed: int, draws: int,
               scores: Mapping[str, str] = SCORES) -> pd.DataFrame:
    """`compared`'s summary; null: by score (3, draws) means over cells of shuffled effects."""
    n, rows = cells["cell"].nunique(), []
    counts = resampled(generator(seed, "knock-outs", 1), n, draws)  # the same for every score
    for name, what in scores.items():
        part = cells[cells["score"] == name]
        row: dict[str, object] = {"score": name, "what": what}
        means = np.transpose(bootstrap_interval(part[[*MEASURES]].to_numpy().T, counts))
        for measure, (mean, low, high), shuffled in zip(MEASURES, means, null[name], strict=True):
            lowest, highest = np.percentile(shuffled, [2.5, 97.5])
            row |= {measure: mean, f"{measure}_low": low, f"{measure}_high": high,
                    f"{measure}_null_low": lowest, f"{measure}_null_high": highest}
        rows.append(row)
    return pd.DataFrame(rows).assign(cells=n)


class Winner(NamedTuple):
    """The best score of circuits and the best rival by one measure, and how far they are apart.

    difference: circuit less rival, mean over cells, with its 95 % interval over resampled cells.
    """

    circuit: str
    rival: str
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Which is ahead by the whole interval: the circuit, the rival, or neither."""
        return "the circuit" if self.low > 0 else "the rival" if self.high < 0 else "neither"


def winners(cells: pd.DataFrame, summary: pd.DataFrame, seed: int, draws: int = DRAWS
            ) -> dict[str, Winner]:
    """By measure, the best of `CIRCUITS` against the best of the others.

    Both are chosen after the fact, so the difference flatters neither; the interval is that of the
    pair chosen.
    """
    by_score, found = summary.set_index("score"), {}
    counts = resampled(generator(seed, "knock-outs", 2), cells["cell"].nunique(), draws)
    is_circuit = by_score.index.isin(CIRCUITS)
    for measure in MEASURES:
        means = by_score[measure]
        circuit, rival = str(means[is_circuit].idxmax()), str(means[~is_circuit].idxmax())
        one, other = (cells.loc[cells["score"] == name, measure].to_numpy()
                      for name in (circuit, rival))
        difference = bootstrap_interval(one - other, counts)
        found[measure] = Winner(circuit, rival, *map(float, difference))
    return found


def numbers(study: KnockOuts, seed: int) -> dict[str, str | int | float]:
    """What a page says: cells, types, genes and k (medians), which genes, cells whose label is
    ahead of all others; measures, and in how many of them the circuit's best score is ahead; per
    measure a sentence on its `winners`; the contrast, mean over cells with its interval, in the
    whole model, with the greedy circuit alone and with no circuit; and the `Kept.faithfulness` of
    these means."""
    by_score, cells = study.summary.set_index("score"), study.cells
    found: dict[str, str | int | float] = {
        "cells": len(study.kept), "types": int(study.kept["cell_type"].nunique()),
        "genes": float(cells["genes"].median()), "k": float(cells["k"].median()),
        "which": ("every gene" if study.genes["rank"].max() <= MOST_GENES else
                  f"every gene, or {MOST_GENES} evenly spaced ones of a longer cell,"),
        "ahead": int((study.kept["whole"] > 0).sum()), "steps": STEPS}
    best = winners(cells, study.summary, seed)
    found |= {"measures": len(best),
              "won": sum(one.verdict == "the circuit" for one in best.values())}
    for measure, one in best.items():
        said = {name: with_interval(*by_score.loc[name, [measure, f"{measure}_low",
                                                         f"{measure}_high"]])
                for name in (one.circuit, one.rival)}
        ahead = {"neither": "neither is ahead of the other by its whole interval",
                 "the circuit": "the circuit is ahead", "the rival": "the rival is ahead"}
        low, high = by_score[f"{measure}_null_low"].min(), by_score[f"{measure}_null_high"].max()
        found[measure] = (
            f"best of the circuit's scores is \"{SCORES[one.circuit]}\" with {said[one.circuit]}, "
            f"best of the rivals \"{SCORES[one.rival]}\" with {said[one.rival]}; the difference is "
            f"{with_interval(one.difference, one.low, one.high)}, so {ahead[one.verdict]} "
            f"(shuffled genes: {low:.2f} to {high:.2f})")
    counts = resampled(generator(seed, "knock-outs", 3), len(study.kept), DRAWS)
    for name in Kept._fields:
        found[name] = with_interval(*bootstrap_interval(study.kept[name].to_numpy(), counts))
    kept = study.kept[[*Kept._fields]].to_numpy().T
    _, low, high = bootstrap_interval(kept[0] - kept[2], counts)
    found["faithfulness"] = "n/a (features may add nothing)" if low <= 0 <= high else (
        with_interval(*bootstrap_interval(kept, counts, lambda one: (one[1] - one[2]) / (
            one[0] - one[2]))))
    return found


def most_missed(genes: pd.DataFrame, cell_type: str) -> str:
    """A sentence: without which gene the call loses most, over the cells of one type.

    genes: as `KnockOuts.genes`. A cell whose call loses nothing without any gene counts for none.
    """
    own = genes[genes["cell_type"] == cell_type]
    losses = own[own["effect"] > 0]
    first = losses.loc[losses.groupby("cell", sort=False)["effect"].idxmax(), "gene"]
    if first.empty:
        return f"In no cell of type \"{cell_type}\" here does the call lose by a gene taken out."
    counted = ", ".join(f"{gene} (in {n} of {own['cell'].nunique()} cells)"
                        for gene, n in Counter(first).most_common(4))
    return f"In cells of type \"{cell_type}\" the call loses most without {counted}."


def with_interval(value: SupportsFloat, low: SupportsFloat, high: SupportsFloat) -> str:
    """A number with its interval, as a page writes it."""
    return f"{value:.2f} ({low:.2f} to {high:.2f})"
