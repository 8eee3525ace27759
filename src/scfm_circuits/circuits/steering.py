"""Steering with a measure: push what an MLP writes along a direction, and read what that does.

At every token of a text an MLP's output y becomes y + dose * s * v, with v a direction of norm 1
and s the mean norm of what this MLP writes: pushes of one dose are of one norm, whatever the
direction. Or what a feature writes is taken away wherever it fires. Rules, fixed before any result
was seen:

1. Everything is chosen on training cells (`directions`), on `SEEDS` draws of them: the feature that
   tells the label best, which decides the layer; the best features of this layer; that one of them
   all along which a push should move the call most; the gradient by which that one is found; the
   difference of means; random features.
2. Held-out cells are read (`Readings`): the label's contrast, whether the cell's own answer is
   given, whether an answer is any label at all, and the loss on tokens of genes.
3. `steering_curves` compares at equal norm and at equal cost.

The feature chosen by effect was added after a first look at the others, which turned out to push
against their label. The gradient was added when that feature was far ahead of all others, none of
which is chosen by what it does. Where nothing is pushed, all readings are as before.

A text passes the layers below the push once, for all of a layer's settings.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from scfm_circuits.circuits.contrast import Contrast, answers_by_label, contrasts_of
from scfm_circuits.circuits.directions import (
    AtQuestion,
    at_question,
    by_effect,
    choose,
    matched,
    mean_pull,
    means_at,
)
from scfm_circuits.circuits.interventions import Edit
from scfm_circuits.circuits.studies import studied_cells
from scfm_circuits.common.randomness import generator
from scfm_circuits.features.statistics import FeatureStatistics
from scfm_circuits.features.unit_scores import auroc
from scfm_circuits.models.architectures import decoder
from scfm_circuits.models.mlp_sites import device_of, faster_attention, hooked, site_hooks
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile

BEST, BEST_SET, BY_EFFECT = "feature by AUROC", "{} features by AUROC", "feature by effect"
GRADIENT, MEANS, RANDOM = "gradient", "difference of means", "random feature"
"""Arms of the study; `{}` is how many features, `directions.TOP` if the layer has them."""
DOSES = (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0)
"""Pushes, in units of the mean norm of what the layer's MLP writes."""
SEEDS, RANDOM_DRAWS = 3, 2
"""Draws of training cells, and of random features for each."""
CHOICE_CELLS, CHOICE_PER_TYPE, SCORED_CELLS, SCORED_PER_TYPE = 160, 80, 48, 24
"""Training cells of a seed, and held-out cells that are read, at most, and of a type at most."""
TRACED_CELLS, LOSS_TOKENS = 6, 64
"""Training cells of a seed that effects are predicted in; tokens of genes that a cell's loss is
taken over, evenly spaced in its text."""


# --- edits ---------------------------------------------------------------------------------------


def pushed(vector: Tensor) -> Edit:
    """Add a vector (d_model,) to what is written at every token."""
    return lambda x, output: output + vector


def scaled(transcoders: Transcoders, layer: int, features: Sequence[int], factor: float) -> Edit:
    """Multiply what a layer's features write at every token by `factor`; 0 takes them away."""
    chosen = torch.tensor(features, device=transcoders.W_dec.device)

    def edited(x: Tensor, output: Tensor) -> Tensor:
        z = transcoders.layer_activations(layer, x, chosen)
        return output + (factor - 1) * (z @ transcoders.W_dec[layer, chosen]).to(output.dtype)

    return edited


def projected_out(vector: Tensor) -> Edit:
    """Take away what is written along a vector (d_model,), whatever its sign."""
    unit = vector / vector.norm().clamp_min(1e-12)
    return lambda x, output: output - (output @ unit)[..., None] * unit


@torch.no_grad()
def steered(model: nn.Module, tokens: Tensor, layer: int, edits: Sequence[Edit]) -> Tensor:
    """(n_edits, n_pos, d_model) what the final norm gives of one text (n_pos,) under each edit of
    a layer's MLP output; the layers below are passed once."""
    def hook(_: int, read: Tensor, output: Tensor) -> Tensor:
        return torch.stack([edit(read[0], output[0]) for edit in edits])

    # From there on the stream is as many copies of the text, since residuals add up.
    with hooked(site_hooks(model, hook, [layer])):
        return torch.as_tensor(decoder(model)(
            input_ids=tokens[None], use_cache=False).last_hidden_state)


# --- what is read --------------------------------------------------------------------------------


class Readings(NamedTuple):
    """What cells say under settings, each (n_settings, n_cells).

    contrast: of the label that is steered towards, nats. right: whether each token of the cell's
    own answer is the likeliest after those before it. no_label: whether the likeliest token where
    the contrast is read is no label's. loss: mean over `LOSS_TOKENS` next tokens of genes, nats.
    """

    contrast: np.ndarray
    right: np.ndarray
    no_label: np.ndarray
    loss: np.ndarray

    @classmethod
    def empty(cls, n_settings: int, n_cells: int) -> "Readings":
        """Zeros, to be filled."""
        shape = n_settings, n_cells
        return cls(np.zeros(shape), np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape))


class AnsweredText(NamedTuple):
    """A cell's text with its own answer, and the one that the label's contrast is read in.

    tokens: (n_pos,) up to the answer's end; start: the answer's first. on_gene: (n,) positions
    whose next token is a gene's, evenly spaced. asked: (n,) up to the token where the contrast is
    read; the same text, unless the two answers have parted by then.
    """

    tokens: Tensor
    start: int
    on_gene: Tensor
    asked: Tensor
    contrast: Contrast


def text_of(corpus: "Corpus", cell: int, label: str, contrast: Contrast, device: torch.device
            ) -> AnsweredText:
    """A cell's text; contrast: of `label`, in this cell."""
    start, end = int(corpus.answer_start[cell]), int(corpus.answer_end[cell]) + 1
    own = np.asarray(corpus.tokens[cell, :end])
    taught = answers_by_label(corpus)[label][: contrast.position + 1 - start]
    asked = np.concatenate([own[:start], np.array(taught, dtype=own.dtype)])
    on_gene = np.flatnonzero(np.asarray(corpus.gene[cell, 1:end]) >= 0)
    on_gene = on_gene[np.unique(np.linspace(0, len(on_gene) - 1, LOSS_TOKENS).round().astype(int))]
    tokens, genes, other = (torch.from_numpy(one).to(device) for one in (own, on_gene, asked))
    return AnsweredText(tokens, start, genes, other, contrast)


@torch.no_grad()
def read_text(model: "PreTrainedModel", text: AnsweredText, layer: int, edits: Sequence[Edit]
              ) -> list[np.ndarray]:
    """The text's column of each of `Readings` under edits of one layer: (n_edits,) each."""
    unembed = model.get_output_embeddings()
    final = steered(model, text.tokens, layer, edits)
    n = len(text.asked)
    same = n <= len(text.tokens) and bool((text.asked == text.tokens[:n]).all())
    asked = final if same else steered(model, text.asked, layer, edits)
    logits = unembed(asked[:, text.contrast.position])  # type: ignore[operator]
    answer = unembed(final[:, text.start - 1 : -1])  # type: ignore[operator]
    right = (answer.argmax(dim=-1) == text.tokens[text.start:]).all(dim=-1)
    labels = torch.tensor([text.contrast.token, *text.contrast.others], device=logits.device)
    no_label = ~torch.isin(logits.argmax(dim=-1), labels)
    wanted = text.tokens[text.on_gene + 1]
    loss = torch.stack([nn.functional.cross_entropy(  # one by one: logits of all tokens are large
        unembed(one[text.on_gene]).float(), wanted) for one in final])  # type: ignore[operator]
    return [one.cpu().numpy() for one in (text.contrast.of(logits).double(), right, no_label,
                                          loss.double())]


# --- the study -----------------------------------------------------------------------------------


class Setting(NamedTuple):
    """One way to steer: arm, seed, layer, dose (missing: what the arm has is taken away), norm of
    the push, and that norm in units of what the arm's features typically write (mean activation
    where one fires; missing for the directions of no feature)."""

    arm: str
    seed: int
    layer: int
    dose: float
    norm: float
    typical: float
    edit: Edit


class SteeringStudy(NamedTuple):
    """Readings of held-out cells: `readings` row by row of `settings`; `before`: (1, n_cells)."""

    label: str
    settings: list[Setting]
    readings: Readings
    before: Readings
    labels: np.ndarray
    """(n_cells,) the cells' own."""
    chosen: pd.DataFrame
    """Two rows per seed: seed, arm (`BEST`, `BY_EFFECT`), layer, feature, fires (share of tokens),
    auroc, held_out_auroc, predicted (nats by which a push of dose 1 should move the contrast),
    steepest (the same along the gradient), cells (training cells looked at), norm (of dose 1)."""


def _settings(transcoders: Transcoders, statistics: FeatureStatistics, layer: int, norm: float,
              sets: Sequence[tuple[str, list[int]]], plain: Mapping[str, Tensor], seed: int
              ) -> list[Setting]:
    """All doses of all arms; sets: names and their features; plain: directions (d_model,) of no
    feature, by name."""
    arms: list[tuple[str, Tensor, Edit, float]] = []
    for name, features in sets:
        z = torch.from_numpy(statistics.mean_activation[layer][features]).to(transcoders.W_dec)
        vector = z @ transcoders.W_dec[layer, features]
        arms.append((name, vector, scaled(transcoders, layer, features, 0.0),
                     float(vector.norm())))
    arms += [(name, vector, projected_out(vector), np.nan) for name, vector in plain.items()]
    found = []
    for name, vector, away, typical in arms:
        unit = norm * vector / vector.norm().clamp_min(1e-12)
        found += [Setting(name, seed, layer, dose, dose * norm, dose * norm / typical,
                          pushed(dose * unit)) for dose in DOSES]
        found.append(Setting(name, seed, layer, np.nan, np.nan, np.nan, away))
    return found


class _Parts(NamedTuple):
    model: "PreTrainedModel"
    transcoders: Transcoders
    corpus: "Corpus"
    profile: "Profile"
    statistics: FeatureStatistics

    def at(self, cells: np.ndarray) -> AtQuestion:
        """The cells where they are asked."""
        return at_question(self.model, self.transcoders, self.corpus, cells,
                           self.profile.forward_cells)


def _of_seed(parts: _Parts, seed: int, label: str) -> tuple[list[Setting], list[dict[str, Any]]]:
    """All settings of one draw of training cells, and its rows of `SteeringStudy.chosen`."""
    t, statistics, corpus = parts.transcoders, parts.statistics, parts.corpus
    rng = generator(parts.profile.seed, "steering", seed)
    drawn = rng.permutation(np.flatnonzero(~corpus.held_out))
    cells = studied_cells(corpus, CHOICE_PER_TYPE, CHOICE_CELLS, among=drawn)
    at, labels = parts.at(cells), corpus.labels[cells]
    chosen = choose(at, labels, label)
    traced = studied_cells(corpus, TRACED_CELLS, TRACED_CELLS, among=drawn)
    pull = mean_pull(parts.model, t, corpus, parts.profile, traced, label)
    effect = by_effect(pull, t, at.norms)
    layer, best = chosen.layer, chosen.features
    live = torch.from_numpy(statistics.fired[layer] > 0).to(effect.device)
    strongest = int(effect[layer].masked_fill(~live, -torch.inf).argmax())
    sets = [(BEST, best[:1]), (BEST_SET.format(len(best)), best), (BY_EFFECT, [strongest])]
    sets += [(RANDOM, matched(statistics, layer, best[:1], rng)) for _ in range(RANDOM_DRAWS)]
    norm = float(at.norms[layer])
    plain = {GRADIENT: pull[layer], MEANS: means_at(at, labels, label, layer)}
    return _settings(t, statistics, layer, norm, sets, plain, seed), [
        {"seed": seed, "arm": arm, "layer": layer, "feature": one,
         "fires": float(statistics.frequency[layer, one]),
         "auroc": auroc(at.activations[:, layer, one].cpu().numpy(), labels == label),
         "predicted": float(effect[layer, one]), "steepest": norm * float(pull[layer].norm()),
         "cells": len(cells), "norm": norm}
        for arm, one in ((BEST, best[0]), (BY_EFFECT, strongest))]


@torch.no_grad()
def steering_study(model: "PreTrainedModel", transcoders: Transcoders, corpus: "Corpus",
                   profile: "Profile", statistics: FeatureStatistics, label: str
                   ) -> SteeringStudy:
    """Choose on `SEEDS` draws of training cells, and steer up to `SCORED_CELLS` held-out cells.

    Every type gives as many cells as there are, up to a bound. Time: for each setting and cell that
    of the layers behind the push and of the loss on `LOSS_TOKENS` tokens.
    """
    parts = _Parts(model, transcoders, corpus, profile, statistics)
    held_out = generator(profile.seed, "steering", SEEDS).permutation(
        np.flatnonzero(corpus.held_out))
    cells = studied_cells(corpus, SCORED_PER_TYPE, SCORED_CELLS, among=held_out)
    settings: list[Setting] = []
    rows: list[dict[str, Any]] = []
    for seed in range(SEEDS):
        some, about = _of_seed(parts, seed, label)
        settings, rows = [*settings, *some], [*rows, *about]
    theirs, own = parts.at(cells), corpus.labels[cells] == label
    for row in rows:
        values = theirs.activations[:, row["layer"], row["feature"]].cpu().numpy()
        row["held_out_auroc"] = auroc(values, own)
    return SteeringStudy(label, settings, *read_cells(model, corpus, profile, cells, label,
                                                      settings),
                         corpus.labels[cells], pd.DataFrame(rows))


def read_cells(model: "PreTrainedModel", corpus: "Corpus", profile: "Profile", cells: np.ndarray,
               label: str, settings: Sequence[Setting]) -> tuple[Readings, Readings]:
    """`SteeringStudy`'s readings, and those before."""
    found, before = (Readings.empty(n, len(cells)) for n in (len(settings), 1))
    by_layer = {layer: [at for at, one in enumerate(settings) if one.layer == layer]
                for layer in sorted({one.layer for one in settings})}
    contrasts = contrasts_of(corpus, profile, cells, label)
    unchanged: Edit = lambda x, output: output  # noqa: E731
    bar = tqdm(total=len(cells) * len(settings), desc="steering", unit="reading")
    with bar, faster_attention(model):
        for column, (cell, contrast) in enumerate(zip(cells, contrasts, strict=True)):
            text = text_of(corpus, int(cell), label, contrast, device_of(model))
            for into, one in zip(before, read_text(model, text, 0, [unchanged]), strict=True):
                into[:, column] = one
            for layer, places in by_layer.items():
                for start in range(0, len(places), profile.forward_cells):
                    some = places[start : start + profile.forward_cells]
                    values = read_text(model, text, layer, [settings[at].edit for at in some])
                    for readings, one in zip(found, values, strict=True):
                        readings[some, column] = one
                    bar.update(len(some))
    return found, before
