"""Held-out concept scores: how well the best unit of a kind says yes where a concept holds.

As in InterPLM (Simon and Zou 2024) and interpTFM: a unit says yes where it lies above a cut, and
F1 = 2 TP / (2 TP + FP + FN). Unit and cut are chosen on training cells, and the F1 reported is that
of held-out cells. Rules, fixed before any result was seen:

1. A concept holds of cells (a label), where a unit is read by its largest value over the
   question's tokens; or of tokens (the token is part of a gene of a set), read as they are, genes'
   tokens only.
2. Cuts lie at the quantiles `LEVELS` of a unit on the first of the training cells, in the order
   in which they are drawn: cells of one label may stand together in a corpus.
3. All kinds offer the same number of units in a layer, the fewest that any has; of a kind with
   more they are drawn, `DRAWS` times, and scores are means over draws. All features stand beside.

What is kept of the choosing pass are whole numbers by unit, cut and concept; no activation is.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.intervals import bootstrap_interval
from scfm_circuits.common.randomness import generator
from scfm_circuits.features.baselines import DIRECTIONS, direction_encoder, untrained_encoder
from scfm_circuits.features.statistics import FeatureStatistics
from scfm_circuits.models.mlp_sites import batches, device_of, faster_attention, mlp_sites
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM

    from scfm_circuits.common.profile import Profile

FEATURES, UNTRAINED, RANDOM = "features", "untrained encoder", "random directions"
EVERY = "all features"
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995)
"""Quantiles of a unit's values that cuts are taken from."""
CHOICE_CELLS, SCORED_CELLS, DRAWS, RESAMPLED = 120, 160, 5, 1_000
"""Training cells and held-out cells at most; draws of candidates; resamples of held-out cells."""
LEAST = 10
"""Training cells and held-out cells that a label has at least, to be a concept."""
CELL, TOKEN = "cells", "tokens"

Units = Callable[..., Tensor]
"""From a layer and what its MLP reads (n_tokens, d_model) to units (n_tokens, n) of all or, with
their indices behind, of some: `Transcoders.layer_activations`, or `layer_pre_activations`."""


def kinds_of_units(model: "GPTNeoXForCausalLM", transcoders: Transcoders,
                   statistics: FeatureStatistics, corpus: Corpus, profile: "Profile"
                   ) -> dict[str, Units]:
    """The features, and what no dictionary learning made: an untrained encoder's features, its
    directions without activation, the neurons' reading directions, and the principal components of
    what MLPs read, both signs."""
    own = {kind: direction_encoder(kind, model, statistics, corpus, profile) for kind in DIRECTIONS}
    fewest = min(one.n_features for one in (transcoders, *own.values()))
    untrained = untrained_encoder(model, statistics, corpus, profile, fewest)
    return {FEATURES: transcoders.layer_activations, UNTRAINED: untrained.layer_activations,
            RANDOM: untrained.layer_pre_activations,
            **{kind: one.layer_pre_activations for kind, one in own.items()}}


# --- concepts ------------------------------------------------------------------------------------


class Concepts(NamedTuple):
    """What may hold: `names` of either level; of_cell: (n_cells, n) bool; of_gene: (n_genes, m)
    bool, of the corpus's genes."""

    cell_names: list[str]
    gene_names: list[str]
    of_cell: np.ndarray
    of_gene: np.ndarray


def times_in(corpus: Corpus, cells: np.ndarray) -> dict[str, int]:
    """How often each gene (upper-case symbol) stands in these cells."""
    genes = corpus.gene[cells][corpus.place[cells] == 0]
    counts = np.bincount(genes, minlength=len(corpus.symbols))
    return {str(symbol).upper(): int(n)
            for symbol, n in zip(corpus.symbols, counts, strict=True) if n}


def concepts_of(corpus: Corpus, sets: Mapping[str, Collection[str]], training: np.ndarray,
                held_out: np.ndarray) -> Concepts:
    """The labels that enough of these cells have, and sets of genes (upper-case symbols).

    A set none of whose genes stands in both kinds of cells is left out. Raises InputError if
    nothing is left.
    """
    both = training, held_out
    labels = [str(one) for one in np.unique(corpus.labels) if all(
        LEAST <= (corpus.labels[cells] == one).sum() < len(cells) for cells in both)]
    symbols = np.array([symbol.upper() for symbol in corpus.symbols])
    seen = [np.isin(np.arange(len(symbols)), corpus.gene[cells]) for cells in both]
    members = {name: np.isin(symbols, list(genes)) for name, genes in sets.items()}
    members = {name: own for name, own in members.items() if all((own & one).any() for one in seen)}
    if not labels and not members:
        raise InputError(f"There is no concept to score: no label has {LEAST} training and "
                         f"{LEAST} held-out cells, and no gene set has a gene in both.")
    return Concepts(labels, list(members),
                    np.stack([corpus.labels == one for one in labels], axis=1)
                    if labels else np.zeros((len(corpus), 0), bool),
                    np.stack([*members.values()], axis=1)
                    if members else np.zeros((len(symbols), 0), bool))


class Batch(NamedTuple):
    """Some cells' questions: inputs (n_layers, n_tokens, d_model) of the MLPs on them, cell by
    cell; lengths: tokens of each; cell: (n_tokens,) place in the batch; on_gene: (n_tokens,) bool;
    of_cell: (n_cells, n), of_token: (n_gene_tokens, m), concepts that hold, as floats."""

    inputs: Tensor
    lengths: list[int]
    cell: Tensor
    on_gene: Tensor
    of_cell: Tensor
    of_token: Tensor

    def readings(self, units: Tensor) -> dict[str, Tensor]:
        """Units (n_tokens, n) by level: (n_cells, n), (n_gene_tokens, n)."""
        most = torch.stack([one.amax(dim=0) for one in units.split(self.lengths)])
        return {CELL: most, TOKEN: units[self.on_gene]}

    def truths(self) -> dict[str, Tensor]:
        """What holds, by level."""
        return {CELL: self.of_cell, TOKEN: self.of_token}


@torch.no_grad()
def question_batches(model: "GPTNeoXForCausalLM", corpus: Corpus, cells: np.ndarray, size: int,
                     concepts: Concepts) -> Iterator[Batch]:
    """The cells' questions, `size` cells at a time; answers are not read."""
    device = device_of(model)
    with faster_attention(model):
        for rows, tokens, _ in batches(corpus, cells, size, device):
            asked, width = corpus.answer_start[rows], tokens.shape[1]
            inside = np.arange(width) < asked[:, None]
            genes = corpus.gene[rows, :width][inside]
            where = torch.from_numpy(inside).to(device)
            inputs = mlp_sites(model, tokens, where).inputs
            cell, on_gene, of_cell, of_token = (torch.from_numpy(one).to(device) for one in (
                np.repeat(np.arange(len(rows)), asked), genes >= 0,
                concepts.of_cell[rows].astype(np.float32),
                concepts.of_gene[genes[genes >= 0]].astype(np.float32)))
            yield Batch(inputs, asked.tolist(), cell, on_gene, of_cell, of_token)


# --- choosing ------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Of one kind and level, whole numbers: hits and said (yes), by layer, unit and cut; hits also
    by concept first; truth: (n_concepts,) where each holds; seen: cells or tokens."""

    cuts: Tensor
    hits: Tensor
    said: Tensor
    truth: Tensor
    seen: int

    def f1(self) -> Tensor:
        """(n_concepts, n_layers, n_units, n_cuts) F1 of units above cuts as signs of concepts."""
        return 2 * self.hits / (self.said + self.truth[:, None, None, None]).clamp_min(1)


@torch.no_grad()
def count_units(kinds: Mapping[str, Units], found: Iterator[Batch]
                ) -> dict[tuple[str, str], Counts]:
    """Count all units of all kinds, by kind and level; the cuts are those of the first batch."""
    counts: dict[tuple[str, str], Counts] = {}
    for batch in found:
        truths, seen = batch.truths(), dict.fromkeys((CELL, TOKEN), 0)
        for kind, units in kinds.items():
            for layer, x in enumerate(batch.inputs):
                for level, values in batch.readings(units(layer, x)).items():
                    seen[level] = len(values)
                    if (kind, level) not in counts:
                        counts[kind, level] = _empty(len(batch.inputs), values, truths[level])
                    own = counts[kind, level]
                    if own.seen == 0:
                        own.cuts[layer] = cuts_of(values)
                    _count(own, layer, values, truths[level])
        for (kind, level), own in counts.items():
            truth = own.truth + truths[level].sum(dim=0).double()
            counts[kind, level] = own._replace(truth=truth, seen=own.seen + seen[level])
    return counts


def _empty(n_layers: int, values: Tensor, truth: Tensor) -> Counts:
    shape = n_layers, values.shape[1], len(LEVELS)
    n = truth.shape[1]
    # Sums of whole numbers: float64 holds them exactly, and divides.
    zeros = values.new_zeros((n, *shape), dtype=torch.float64)
    return Counts(values.new_zeros(shape), zeros, zeros.new_zeros(shape), zeros.new_zeros(n), 0)


def cuts_of(values: Tensor) -> Tensor:
    """(n_units, n_levels) cuts between the value (n, n_units) at each of `LEVELS` and the next.

    Halfway, so that no last digit decides: equal values of a unit may differ by rounding.
    """
    ordered = values.sort(dim=0).values.T.contiguous()
    n = ordered.shape[1]
    low = ordered[:, [min(int(level * n), n - 1) for level in LEVELS]]
    same = low + 1e-5 * ordered.abs().amax(dim=1, keepdim=True)
    after = torch.searchsorted(ordered, same.contiguous(), right=True)
    high = ordered.gather(1, after.clamp(max=n - 1))
    return torch.where(after < n, (low + high) / 2, same)


def _count(own: Counts, layer: int, values: Tensor, truth: Tensor) -> None:
    both = torch.cat([truth, truth.new_ones(len(truth), 1)], dim=1).T.contiguous()
    for at in range(len(LEVELS)):
        # Below 2^24 in a batch, so that float32 counts exactly.
        found = both @ (values > own.cuts[layer, :, at]).to(both.dtype)
        own.hits[:, layer, :, at] += found[:-1]
        own.said[layer, :, at] += found[-1]


class Choice(NamedTuple):
    """A unit with its cut, chosen for a concept: of which kind (as it is called), in which draw."""

    shown: str
    kind: str
    level: str
    concept: int
    draw: int
    layer: int
    unit: int
    cut: float
    training_f1: float


def choices(counts: Mapping[tuple[str, str], Counts], n_units: int, seed: int) -> list[Choice]:
    """For every kind, concept and draw of `n_units` candidates of each layer the best unit, the
    first of equal ones; and the best of all features."""
    found = []
    for (kind, level), own in counts.items():
        f1, all_units = own.f1(), own.said.shape[1]
        rng = generator(seed, "concept scores", 0)
        drawn = [np.sort(rng.permutation(all_units)[:n_units]) for _ in range(
            DRAWS if all_units > n_units else 1)]
        sets = [(kind, draw, units) for draw, units in enumerate(drawn)]
        sets += [(EVERY, 0, np.arange(all_units))] if kind == FEATURES else []
        for shown, draw, units in sets:
            some = f1[:, :, torch.from_numpy(units).to(f1.device)]
            best = some.flatten(1).argmax(dim=1).cpu().numpy()
            for concept, place in enumerate(best):
                layer, at, cut = np.unravel_index(place, tuple(some.shape[1:]))
                unit = int(units[at])
                found.append(Choice(shown, kind, level, concept, draw, int(layer), unit,
                                    float(own.cuts[layer, unit, cut]),
                                    float(some[concept, layer, at, cut])))
    return found


# --- scoring -------------------------------------------------------------------------------------


@torch.no_grad()
def score_choices(kinds: Mapping[str, Units], chosen: list[Choice], found: Iterator[Batch]
                  ) -> np.ndarray:
    """(n_choices, 3, n_cells): in each cell how often both the unit says yes and the concept holds,
    the unit says yes, and the concept holds. Only chosen units are computed."""
    parts = []
    by_layer: dict[tuple[str, int], list[int]] = {}
    for at, one in enumerate(chosen):
        by_layer.setdefault((one.kind, one.layer), []).append(at)
    for batch in found:
        truths, n = batch.truths(), len(batch.of_cell)
        of = {CELL: torch.arange(n, device=batch.cell.device), TOKEN: batch.cell[batch.on_gene]}
        part = torch.zeros(len(chosen), 3, n, dtype=torch.float64, device=batch.cell.device)
        for (kind, layer), places in by_layer.items():
            units = torch.tensor([chosen[at].unit for at in places], device=batch.cell.device)
            values = batch.readings(kinds[kind](layer, batch.inputs[layer], units))
            for column, at in enumerate(places):
                one = chosen[at]
                said = (values[one.level][:, column] > one.cut).double()
                holds = truths[one.level][:, one.concept].double()
                for row, what in enumerate((said * holds, said, holds)):
                    part[at, row].index_add_(0, of[one.level], what)
        parts.append(part.cpu().numpy())
    return np.concatenate(parts, axis=2)


def f1_of(means: np.ndarray) -> np.ndarray:
    """F1 of (..., 3, n) hits, yeses and truths, means over cells."""
    return np.asarray(2 * means[..., 0, :] / np.maximum(means[..., 1, :] + means[..., 2, :], 1e-30))


class ConceptScores(NamedTuple):
    """Held-out F1 by concept and kind of unit."""

    table: pd.DataFrame
    """concept, of (`CELL`, `TOKEN`), units (kind), candidates, f1 with lower_95 and upper_95 (over
    held-out cells; mean over draws), lowest and highest (over draws), training_f1, difference (what
    the features have more) with an interval that holds those of every draw, layer and unit (of the
    first draw), always_yes (the F1 of saying yes to everything, by the training cells)."""
    training_cells: int
    held_out_cells: int


def concept_scores(model: "GPTNeoXForCausalLM", transcoders: Transcoders, corpus: Corpus,
                   profile: "Profile", statistics: FeatureStatistics,
                   sets: Mapping[str, Collection[str]]) -> ConceptScores:
    """Choose on training cells, score on held-out cells; sets: gene sets by name.

    Memory: the counts, `n_units x n_levels x n_concepts` of 8 bytes for all layers, and one layer's
    values of `forward_cells` cells.
    """
    rng = generator(profile.seed, "concept scores", 1)
    training, held_out = (rng.permutation(np.flatnonzero(one))[:most] for one, most in (
        (~corpus.held_out, CHOICE_CELLS), (corpus.held_out, SCORED_CELLS)))
    concepts = concepts_of(corpus, sets, training, held_out)
    kinds = kinds_of_units(model, transcoders, statistics, corpus, profile)
    size = profile.forward_cells
    counts = count_units(kinds, question_batches(model, corpus, training, size, concepts))
    fewest = min(own.said.shape[1] for own in counts.values())
    chosen = choices(counts, fewest, profile.seed)
    scored = score_choices(kinds, chosen, question_batches(model, corpus, held_out, size, concepts))
    n = len(held_out)
    drawn = generator(profile.seed, "concept scores", 2).multinomial(n, np.full(n, 1 / n),
                                                                     RESAMPLED)
    names, rows = {CELL: concepts.cell_names, TOKEN: concepts.gene_names}, []
    # In the order of levels, concepts and kinds.
    for level, concept in dict.fromkeys((one.level, one.concept) for one in sorted(
            chosen, key=lambda one: (one.level, one.concept))):
        own: dict[str, list[int]] = {}
        for at, one in enumerate(chosen):
            if (one.level, one.concept) == (level, concept):
                own.setdefault(one.shown, []).append(at)
        share = float(counts[FEATURES, level].truth[concept]) / counts[FEATURES, level].seen
        rows += [{"concept": names[level][concept], "of": level, "units": shown,
                  "candidates": transcoders.n_layers * (transcoders.n_features if shown == EVERY
                                                        else fewest),
                  **_row([chosen[at] for at in places], scored[places], scored[own[FEATURES]],
                         drawn), "always_yes": 2 * share / (1 + share)}
                 for shown, places in own.items()]
    return ConceptScores(pd.DataFrame(rows), len(training), n)


def _row(chosen: list[Choice], scored: np.ndarray, features: np.ndarray, drawn: np.ndarray
         ) -> dict[str, Any]:
    """The score of one kind for one concept; scored, features: (n_draws, 3, n_cells)."""
    each = f1_of(scored.mean(axis=2, keepdims=True))[:, 0]
    value, low, high = _interval(scored, drawn, lambda means: f1_of(means).mean(axis=0))
    # Draws can be further apart than cells tell: what is ahead has to be so in each of them.
    pairs = np.broadcast_arrays(features, scored)
    ahead = np.array([_interval(np.stack(pair), drawn, lambda means: np.subtract(*f1_of(means)))
                      for pair in zip(*pairs, strict=True)])
    return {"f1": value, "lower_95": low, "upper_95": high, "lowest": each.min(),
            "highest": each.max(), "training_f1": float(np.mean([one.training_f1
                                                                 for one in chosen])),
            "difference": ahead[:, 0].mean(), "difference_lower_95": ahead[:, 1].min(),
            "difference_upper_95": ahead[:, 2].max(), "layer": chosen[0].layer,
            "unit": chosen[0].unit}


def _interval(values: np.ndarray, drawn: np.ndarray, statistic: Any) -> tuple[float, float, float]:
    found = bootstrap_interval(
        values, drawn, lambda means: statistic(means if means.ndim == 3 else means[..., None]))
    return float(found[0].item()), float(found[1]), float(found[2])
