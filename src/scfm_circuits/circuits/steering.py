"""Steering with a measure: push what an MLP writes along a direction, and read what that does.

At every token of a text an MLP's output y becomes y + dose * s * v, with v a direction of norm 1
and s the mean norm of what this MLP writes: pushes of one dose are of one norm, whatever the
direction. Or what a feature writes is taken away wherever it fires. Rules, fixed before any result
was seen:

1. Everything is chosen on training cells (`choose`): the feature whose activation at the question's
   last token tells the label's cells best (AUROC over the features of all layers), the `TOP` best
   of its layer, and the difference of the means of what the MLP writes there. Random features of
   the layer fire as often and as strongly as the chosen ones. `SEEDS` draws of training cells.
2. Held-out cells are read (`Readings`): the label's contrast, whether the cell's own answer is
   given, whether an answer is any label at all, and the loss on the tokens of genes.
3. `steering_curves` compares at equal norm and at equal cost.

A text passes the layers below the push once, for all of a layer's settings.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from tqdm import tqdm

from scfm_circuits import InputError
from scfm_circuits.circuits.contrast import Contrast, answers_by_label, contrasts_of
from scfm_circuits.circuits.interventions import Edit
from scfm_circuits.circuits.studies import studied_cells
from scfm_circuits.common.randomness import generator
from scfm_circuits.features.statistics import FeatureStatistics
from scfm_circuits.features.unit_scores import aurocs
from scfm_circuits.models.architectures import decoder
from scfm_circuits.models.mlp_sites import (
    batches,
    device_of,
    faster_attention,
    hooked,
    mlp_sites,
    site_hooks,
)
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile

BEST, BEST_SET, MEANS = "best feature", "best {} features", "difference of means"
RANDOM, RANDOM_SET = "random feature", "{} random features"
"""Arms of the study; `{}` is how many features, `TOP` if the layer has them."""
DOSES = (-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0)
"""Pushes, in units of the mean norm of what the layer's MLP writes."""
SEEDS, TOP, RANDOM_DRAWS, NEAREST = 3, 5, 2, 8
"""Draws of training cells; features pushed together; random features of a seed, and among how many
that fire alike each is drawn."""
CHOICE_CELLS, CHOICE_PER_TYPE, SCORED_CELLS, SCORED_PER_TYPE = 200, 100, 64, 32
"""Training cells of a seed, and held-out cells that are read, at most, and of a type at most."""


# --- edits ---------------------------------------------------------------------------------------


def pushed(vector: Tensor) -> Edit:
    """Add a vector (d_model,) to what is written at every token."""
    return lambda x, output: output + vector


def scaled(transcoders: Transcoders, layer: int, features: Sequence[int], factor: float) -> Edit:
    """Multiply what a layer's features write at every token by `factor`; 0 takes them away."""
    chosen = torch.tensor(features, device=transcoders.W_dec.device)

    def edited(x: Tensor, output: Tensor) -> Tensor:
        z = activations_of(transcoders, layer, chosen, x)
        return output + (factor - 1) * (z @ transcoders.W_dec[layer, chosen]).to(output.dtype)

    return edited


def projected_out(vector: Tensor) -> Edit:
    """Take away what is written along a vector (d_model,), whatever its sign."""
    unit = vector / vector.norm()
    return lambda x, output: output - (output @ unit)[..., None] * unit


def activations_of(t: Transcoders, layer: int, features: Tensor, x: Tensor) -> Tensor:
    """(..., n) activations of some features of a layer on an MLP's inputs (..., d_model)."""
    if t.activation.only_cuts:
        return nn.functional.linear(x - t.b_in[layer], t.W_enc[layer, features],
                                    t.b_enc[layer, features]).relu()
    # Whether one is active may depend on all of a token's.
    return t.layer_activations(layer, x)[..., features]


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
    the contrast is read is no label's. loss: mean over the next tokens that are of genes, nats.
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


class Text(NamedTuple):
    """A cell's text with its own answer, and the one that the label's contrast is read in.

    tokens: (n_pos,) up to the answer's end; start: the answer's first. on_gene: (n,) positions
    whose next token is a gene's. asked: (n,) up to the token where the contrast is read; the same
    text, unless the two answers have parted by then.
    """

    tokens: Tensor
    start: int
    on_gene: Tensor
    asked: Tensor
    contrast: Contrast


def text_of(corpus: "Corpus", cell: int, label: str, contrast: Contrast, device: torch.device
            ) -> Text:
    """A cell's text; contrast: of `label`, in this cell."""
    start, end = int(corpus.answer_start[cell]), int(corpus.answer_end[cell]) + 1
    own = np.asarray(corpus.tokens[cell, :end])
    taught = answers_by_label(corpus)[label][: contrast.position + 1 - start]
    asked = np.concatenate([own[:start], np.array(taught, dtype=own.dtype)])
    on_gene = np.flatnonzero(np.asarray(corpus.gene[cell, 1:end]) >= 0)
    tokens, genes, other = (torch.from_numpy(one).to(device) for one in (own, on_gene, asked))
    return Text(tokens, start, genes, other, contrast)


@torch.no_grad()
def read_text(model: "PreTrainedModel", text: Text, layer: int, edits: Sequence[Edit]
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


# --- choosing, on training cells -----------------------------------------------------------------


class Chosen(NamedTuple):
    """What one draw of training cells chooses.

    features: the `TOP` best of the layer, the best one first; auroc: (n,) of each. vector:
    (d_model,) difference of means; norm: mean norm of what the layer's MLP writes at the questions'
    tokens. cells: how many were looked at.
    """

    layer: int
    features: list[int]
    auroc: np.ndarray
    vector: Tensor
    norm: float
    cells: int


class AtQuestion(NamedTuple):
    """Some cells where they are asked for their type: the question's last token.

    activations: (n_cells, n_layers, n_features); outputs: (n_cells, n_layers, d_model) of the MLPs;
    norms: (n_layers,) mean norm of these over all tokens of the questions.
    """

    activations: Tensor
    outputs: Tensor
    norms: Tensor


@torch.no_grad()
def at_question(model: "PreTrainedModel", transcoders: Transcoders, corpus: "Corpus",
                cells: np.ndarray, forward_cells: int) -> AtQuestion:
    """Read the cells in one pass."""
    activations, outputs, norms, n = [], [], [], 0
    for rows, tokens, _ in batches(corpus, cells, forward_cells, device_of(model)):
        asked = corpus.answer_start[rows]
        inside = torch.arange(tokens.shape[1], device=tokens.device) < torch.from_numpy(
            asked).to(tokens.device)[:, None]
        sites = mlp_sites(model, tokens, inside)
        last = torch.from_numpy(np.cumsum(asked) - 1).to(tokens.device)
        inputs = sites.inputs[:, last]
        activations.append(torch.stack([transcoders.layer_activations(layer, x)
                                        for layer, x in enumerate(inputs)], dim=1))
        outputs.append(sites.outputs[:, last].transpose(0, 1))
        norms.append(sites.outputs.norm(dim=-1).sum(dim=1))
        n += int(asked.sum())
    return AtQuestion(torch.cat(activations), torch.cat(outputs), torch.stack(norms).sum(0) / n)


def choose(at: AtQuestion, labels: np.ndarray, label: str) -> Chosen:
    """The best features for a label, and the difference of means at their layer.

    labels: (n_cells,) of the cells in `at`. Features of equal AUROC stand in the order of how much
    more they fire in the label's cells. The means of the other types count alike.

    Raises InputError if the cells are all of the label, or none is.
    """
    own = labels == label
    if own.all() or not own.any():
        raise InputError(f"Steering to {label!r} needs training cells of this label and of others, "
                         "and there are only one kind; give `case_type` another label.")
    z = at.activations.cpu().numpy().reshape(len(labels), -1)
    area = aurocs(rankdata(z, axis=0), own)
    more = z[own].mean(axis=0) - z[~own].mean(axis=0)
    order = np.lexsort((-more, -area))
    n_features = at.activations.shape[2]
    layer = int(order[0]) // n_features
    features = order[order // n_features == layer][:TOP]
    written = at.outputs[:, layer]
    others = torch.stack([written[torch.from_numpy(labels == one)].mean(dim=0)
                          for one in np.unique(labels[~own])]).mean(dim=0)
    return Chosen(layer, (features % n_features).tolist(), area[features],
                  written[torch.from_numpy(own)].mean(dim=0) - others, float(at.norms[layer]),
                  len(labels))


def matched(statistics: FeatureStatistics, layer: int, features: Sequence[int],
            rng: np.random.Generator, nearest: int = NEAREST) -> list[int]:
    """For each feature another of the layer that fires about as often and as strongly.

    The draw is among the `nearest` by the distance of log frequency and log mean activation, each
    in its standard deviation over the layer's features that fire; none is one of `features`, and
    none is drawn twice. Raises InputError if the layer has too few features that fire.
    """
    fired = statistics.fired[layer]
    free = np.setdiff1d(np.flatnonzero(fired > 0), features)
    if len(free) < len(features):
        raise InputError(f"Layer {layer} has {len(free)} features that fire beside those to "
                         f"compare with, and {len(features)} are needed; train transcoders longer "
                         "or with a smaller `l1_coefficient`.")
    about = np.stack([np.log(np.maximum(fired, 1)),
                      np.log(np.maximum(statistics.mean_activation[layer], 1e-12))])
    about = about / np.maximum(about[:, fired > 0].std(axis=1), 1e-12)[:, None]
    drawn: list[int] = []
    for feature in features:
        distance = np.square(about[:, free] - about[:, feature, None]).sum(axis=0)
        closest = free[np.argsort(distance, kind="stable")[:nearest]]
        drawn.append(int(rng.choice(closest)))
        free = free[free != drawn[-1]]
    return drawn


# --- the study -----------------------------------------------------------------------------------


class Setting(NamedTuple):
    """One way to steer: arm, seed, draw (of random features), layer, dose (missing: what the arm
    has is taken away), norm of the push, and that norm in units of what the arm's features
    typically write (mean activation where one fires; missing for the difference of means)."""

    arm: str
    seed: int
    draw: int
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
    """A row per seed: seed, layer, feature (the best), auroc, held_out_auroc, others (the other
    `TOP` - 1 of the layer), cells (training cells looked at), norm (of dose 1)."""


def settings_of(transcoders: Transcoders, statistics: FeatureStatistics, chosen: Chosen, seed: int,
                rng: np.random.Generator) -> list[Setting]:
    """All settings of one draw of training cells."""
    layer, best = chosen.layer, chosen.features
    sets = [(BEST, 0, best[:1]), (BEST_SET.format(len(best)), 0, best)]
    for draw in range(RANDOM_DRAWS):
        sets += [(RANDOM, draw, matched(statistics, layer, best[:1], rng)),
                 (RANDOM_SET.format(len(best)), draw, matched(statistics, layer, best, rng))]
    arms: list[tuple[str, int, Tensor, Edit, float]] = []
    for name, draw, features in sets:
        z = torch.from_numpy(statistics.mean_activation[layer][features]).to(transcoders.W_dec)
        vector = z @ transcoders.W_dec[layer, features]
        arms.append((name, draw, vector, scaled(transcoders, layer, features, 0.0),
                     float(vector.norm())))
    arms.append((MEANS, 0, chosen.vector, projected_out(chosen.vector), np.nan))
    found = []
    for name, draw, vector, away, typical in arms:
        unit = chosen.norm * vector / vector.norm().clamp_min(1e-12)
        found += [Setting(name, seed, draw, layer, dose, dose * chosen.norm,
                          dose * chosen.norm / typical, pushed(dose * unit)) for dose in DOSES]
        found.append(Setting(name, seed, draw, layer, np.nan, np.nan, np.nan, away))
    return found


@torch.no_grad()
def steering_study(model: "PreTrainedModel", transcoders: Transcoders, corpus: "Corpus",
                   profile: "Profile", statistics: FeatureStatistics, label: str
                   ) -> SteeringStudy:
    """Choose on `SEEDS` draws of training cells, and steer up to `SCORED_CELLS` held-out cells.

    Every type gives as many cells as there are, up to a bound. Time: for each setting and cell that
    of the layers behind the push and of the loss on a text of its length.
    """
    training = np.flatnonzero(~corpus.held_out)
    held_out = generator(profile.seed, "steering", SEEDS).permutation(
        np.flatnonzero(corpus.held_out))
    cells = studied_cells(corpus, SCORED_PER_TYPE, SCORED_CELLS, among=held_out)
    theirs = at_question(model, transcoders, corpus, cells, profile.forward_cells)
    settings, rows = [], []
    for seed in range(SEEDS):
        rng = generator(profile.seed, "steering", seed)
        some = studied_cells(corpus, CHOICE_PER_TYPE, CHOICE_CELLS, among=rng.permutation(training))
        chosen = choose(at_question(model, transcoders, corpus, some, profile.forward_cells),
                        corpus.labels[some], label)
        settings += settings_of(transcoders, statistics, chosen, seed, rng)
        rows.append({
            "seed": seed, "layer": chosen.layer, "feature": chosen.features[0],
            "auroc": chosen.auroc[0],
            "held_out_auroc": _auroc(theirs.activations[:, chosen.layer, chosen.features[0]],
                                     corpus.labels[cells] == label),
            "others": " ".join(map(str, chosen.features[1:])), "cells": chosen.cells,
            "norm": chosen.norm})
    return SteeringStudy(label, settings, *read_cells(model, corpus, profile, cells, label,
                                                      settings),
                         corpus.labels[cells], pd.DataFrame(rows))


def _auroc(values: Tensor, own: np.ndarray) -> float:
    if own.all() or not own.any():
        return float("nan")
    return float(aurocs(rankdata(values.cpu().numpy())[:, None], own)[0])


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
