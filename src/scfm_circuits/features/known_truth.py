"""Do dictionaries find what was planted? Scores that can tell, on simulated cells (`logic_cells`).

The rule, which was fixed before any result was seen:

1. Each unit is read in a cell in three ways, of which one is chosen with it, on training cells: the
   unit of the largest AUROC; that of the largest F1, with its cut; and for a probe 1, 2 or 5 of
   them, one after the other, each that which leaves the least squares, with a logistic regression
   on them. All are scored on held-out cells (`unit_scores`).
2. Scores are averaged over the truths of a kind, within a seed. A kind of transcoders is compared
   with each rival by the differences within seeds, with Student's interval over seeds. It is ahead
   where that lies above 0 for every rival; and it wins where it does so at a level divided by the
   number of all comparisons (Bonferroni).

The small models were sized on another seed, by how many types they name and by L0, not by scores.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from scfm_circuits.cells.corpus import Corpus, build_corpus
from scfm_circuits.cells.simulated import FOLD, LogicCells, logic_cells
from scfm_circuits.common.files import digest
from scfm_circuits.common.kept import kept_arrays, stamp_of
from scfm_circuits.common.profile import Profile
from scfm_circuits.common.randomness import generator
from scfm_circuits.features.baselines import principal_axes
from scfm_circuits.features.unit_scores import (
    MEASURES,
    Encoder,
    f1_score,
    probe_auroc,
    read_units,
    scores,
)
from scfm_circuits.models.architectures import decoder_layers
from scfm_circuits.models.known_types import ranks
from scfm_circuits.models.mlp_sites import batches, device_of
from scfm_circuits.models.small_models import train_small_model
from scfm_circuits.transcoders.training.run import TrainingRun, training_buffer
from scfm_circuits.transcoders.training.settings import FIELDS
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENIZERS = {"genes": "a token a gene", "train": "sub-words"}
TRANSCODERS: Mapping[str, Mapping[str, Any]] = {
    "TopK, L0 8": {"activation": "topk", "active_features": 8},
    "TopK, L0 16": {"activation": "topk", "active_features": 16},
    "ReLU + L1": {"activation": "relu"},
}
"""Kinds of transcoders, and the profile's fields that make them."""
UNTRAINED, RANDOM = "untrained encoder, L0 16", "random directions"
NEURONS, COMPONENTS = "MLP neurons", "principal components"
RIVALS = (UNTRAINED, RANDOM, NEURONS, COMPONENTS)
"""What no dictionary learning made, at the same sites: the encoder of `TopK, L0 16` before its
first step, its directions without activation, the neurons' activations, and the components of what
the MLPs read, with both signs."""
GENES, EVERYTHING, ALWAYS = "single genes", "all that MLPs read, linear", "always yes"
"""What scores are seen against: a gene's place in the sentence; one logistic regression on what the
MLPs read, read as units are; and the answer that needs no cell."""
LEVEL = 0.95
RIGHT = "right types, %"


class Design(NamedTuple):
    """Sizes of the study: enough for a model that names most types, in little time."""

    seeds: int = 5
    cells: int = 4000
    chosen_on: int = 1500
    genes_per_cell: int = 40
    vocabulary: int = 512
    layers: int = 2
    width: int = 64
    heads: int = 4
    steps: int = 400
    batch_cells: int = 32
    expansion: int = 4
    training_tokens: int = 400_000
    l1_coefficient: float = 3e-3


# --- one run -------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One seed under one tokenizer.

    values: (n_units, n_truths, n_measures) by the names in `units` and the order of the cells'
    truths; nan where there is none. about: what is known of the model and its transcoders.
    """

    units: np.ndarray
    values: np.ndarray
    about: dict[str, float]


def rivals_of(model: "PreTrainedModel", untrained: Transcoders, inputs: Tensor
              ) -> dict[str, Encoder]:
    """`RIVALS`; inputs: (n_layers, n_tokens, d_model) of training cells, for the components."""
    mean, axes = inputs.mean(dim=1), principal_axes(inputs)
    mlps: list[Any] = [layer.mlp for layer in decoder_layers(model)]
    return {UNTRAINED: untrained.layer_activations, RANDOM: untrained.layer_pre_activations,
            NEURONS: lambda layer, x: mlps[layer].act(mlps[layer].dense_h_to_4h(x)),
            COMPONENTS: lambda layer, x: (x - mean[layer]) @ torch.cat([axes, -axes], 1)[layer].T}


def run_profile(profile: Profile, design: Design, tokenizer: str, seed: int) -> Profile:
    """The profile of one run: the study's sizes, and the profile's own ways of training."""
    steps = design.training_tokens // 1024
    return profile.model_copy(update={
        "seed": profile.seed + seed, "tokenizer": tokenizer, "validation_share": 0.25,
        "prompt": "{genes}.\n\nType:", "genes_per_cell": design.genes_per_cell,
        "vocabulary_size": design.vocabulary,
        "model": "train", "model_revision": None, "model_layers": design.layers,
        "model_width": design.width, "model_heads": design.heads, "human_layer": 0,
        "model_steps": design.steps, "model_batch_cells": design.batch_cells,
        "model_learning_rate": 3e-3, "model_answer_weight": 20.0, "model_type_balance": 0.0,
        "model_thinning": 1.0, "model_precision": "float32", "expansion": design.expansion,
        "loss": "normalized", "l1_coefficient": design.l1_coefficient, "l1_warmup_steps": 0,
        "learning_rate": 2e-3, "warmup_steps": steps // 20, "decay_steps": steps // 5,
        "resample_steps": 0, "skip": False, "site": "transcoder", "batch_tokens": 1024,
        "training_tokens": design.training_tokens, "buffer_tokens": 65_536})


def study_run(profile: Profile, design: Design, simulated: LogicCells) -> Run:
    """Train a model and its transcoders on the cells, and score all units. profile: the run's."""
    corpus = build_corpus(simulated.cells, profile)
    model, _ = train_small_model(corpus, profile, progress=False)
    model.requires_grad_(False)
    buffer = training_buffer(model, corpus, profile)
    encoders: dict[str, Encoder] = {}
    about = {"tokens of a cell": float(corpus.lengths.mean()),
             RIGHT: 100 * right_types(model, corpus)}
    for name, changes in TRANSCODERS.items():
        run = TrainingRun(model, corpus, profile.model_copy(update=dict(changes)), buffer=buffer)
        run.start()
        untrained = copy.deepcopy(run.transcoders) if name.endswith("16") else None
        if untrained is not None:
            encoders |= rivals_of(model, untrained.requires_grad_(False), buffer.sites(0).inputs)
        trained = run.run(progress=False).requires_grad_(False)
        encoders[name] = trained.layer_activations
        for key in ("l0", "fvu"):
            about[f"{name}: {key}"] = float(np.mean(run.history[-1][key]))
    encoders = {name: encoders[name] for name in (*TRANSCODERS, *RIVALS)}
    return Run(*_scored(model, corpus, encoders, simulated, profile, design), about)


def _scored(model: "PreTrainedModel", corpus: Corpus, encoders: Mapping[str, Encoder],
            simulated: LogicCells, profile: Profile, design: Design
            ) -> tuple[np.ndarray, np.ndarray]:
    """`Run`'s units and values."""
    train, held_out = np.flatnonzero(~corpus.held_out), np.flatnonzero(corpus.held_out)
    drawn = generator(profile.seed, "cells that known truth is scored on")
    train = np.sort(drawn.permutation(train)[: design.chosen_on])
    inputs: Encoder = lambda layer, x: x  # noqa: E731
    read = [read_units(model, corpus, cells, {**encoders, EVERYTHING: inputs})
            for cells in (train, held_out)]
    for one, cells in zip(read, (train, held_out), strict=True):
        one[GENES] = ranks(corpus, cells).toarray().astype(np.float32)
    names = np.array([*encoders, GENES, EVERYTHING, ALWAYS])
    own, other = (np.array([*simulated.truths.values()])[:, cells] for cells in (train, held_out))
    values = np.full((len(names), len(own), len(MEASURES)), np.nan)
    for i, name in enumerate([*encoders, GENES]):
        values[i] = scores(read[0][name], read[1][name], own, other)
    mean, spread = read[0][EVERYTHING].mean(axis=0), read[0][EVERYTHING].std(axis=0) + 1e-6
    ours, theirs = ((one[EVERYTHING] - mean) / spread for one in read)
    values[-2, :, 0] = [probe_auroc(ours, theirs, *both, strength=0.01)
                        for both in zip(own, other, strict=True)]
    values[-1, :, :2] = [(0.5, f1_score(np.ones_like(one), one)) for one in other]
    return names, values


@torch.no_grad()
def right_types(model: "PreTrainedModel", corpus: Corpus) -> float:
    """Share of held-out cells whose answer's first token, which tells the type, is likeliest."""
    right = 0
    cells = np.flatnonzero(corpus.held_out)
    for rows, tokens, mask in batches(corpus, cells, 64, device_of(model)):
        asked = corpus.answer_start[rows]
        logits = model(input_ids=tokens, attention_mask=mask).logits
        said = logits[np.arange(len(rows)), asked - 1].argmax(dim=-1).cpu().numpy()
        right += int((said == corpus.tokens[rows, asked]).sum())
    return right / len(cells)


# --- all runs, and what they say -----------------------------------------------------------------


class KnownTruth(NamedTuple):
    """What units find of what was planted, over seeds and tokenizers."""

    values: pd.DataFrame
    """tokenizer, seed, units, kind, truth, measure, value: all that was measured."""
    about: pd.DataFrame
    """tokenizer, seed, of the model and its transcoders: measure, value."""
    comparisons: pd.DataFrame
    """`comparison_table` of `values`."""

    def summary(self) -> pd.DataFrame:
        """tokenizer, kind, measure, units; mean over seeds of the mean over a kind's truths, low
        and high: Student's interval over seeds, missing for one seed."""
        own = _by_seed(self.values)
        rows = [(*key, *interval(one["value"].to_numpy()))
                for key, one in own.groupby([*_WHERE, "units"], sort=False)]
        return pd.DataFrame(rows, columns=[*_WHERE, "units", "mean", "low", "high"])

    def means(self) -> pd.DataFrame:
        """tokenizer, kind, units, and a column for each measure: the means of `summary`."""
        table = self.summary().pivot_table(index=["tokenizer", "kind", "units"], columns="measure",
                                           values="mean", sort=False)
        return table[[*MEASURES]].reset_index().rename_axis(columns=None)

    def words(self) -> dict[str, float]:
        """For a page: seeds, fold (how far programs rise), and the percentage of held-out types
        that the models name right, right_genes and right_sub_words."""
        right = self.models().set_index(["tokenizer", "measure"])["mean"]
        return {"seeds": self.values["seed"].nunique(), "fold": FOLD,
                **{f"right_{name}": round(float(right[label, RIGHT]), 1) for name, label in
                   zip(("genes", "sub_words"), TOKENIZERS.values(), strict=True)}}

    def models(self) -> pd.DataFrame:
        """tokenizer, measure, mean, low, high of `about` over seeds."""
        rows = [(*key, *interval(one["value"].to_numpy()))
                for key, one in self.about.groupby(["tokenizer", "measure"], sort=False)]
        return pd.DataFrame(rows, columns=["tokenizer", "measure", "mean", "low", "high"])


_WHERE = ["tokenizer", "kind", "measure"]


def known_truth_study(profile: Profile, design: Design = Design()) -> KnownTruth:  # noqa: B008
    """Train and score small models on simulated cells: every seed with either tokenizer.

    Each run is kept in `results/<profile>/known_truth/` as soon as it is done. A minute or two of
    a core each; a run that was cut short starts again.
    """
    values, about = [], []
    for seed in range(design.seeds):
        simulated: LogicCells | None = None
        for tokenizer, label in TOKENIZERS.items():
            own = run_profile(profile, design, tokenizer, seed)
            simulated = simulated or logic_cells(own.seed, design.cells, design.genes_per_cell)
            run = _kept_run(own, design, simulated, seed)
            values.append(_frame(run, simulated).assign(tokenizer=label, seed=seed))
            about.append(pd.DataFrame({"tokenizer": label, "seed": seed, "measure": [*run.about],
                                       "value": [*run.about.values()]}))
    order = ["tokenizer", "seed", "units", "kind", "truth", "measure", "value"]
    table = pd.concat(values, ignore_index=True)[order]
    return KnownTruth(table, pd.concat(about, ignore_index=True), comparison_table(table))


def _kept_run(profile: Profile, design: Design, simulated: LogicCells, seed: int) -> Run:
    """A run: read if it is current, else made and kept. profile: the run's."""
    stamp = stamp_of(profile, ("tokenizer", "response", *FIELDS),
                     ("cells", "models", "transcoders", "features/known_truth",
                      "features/unit_scores", "features/baselines"), design=design._asdict(),
                     cells=digest(simulated.cells.ranking.tobytes()))

    def make() -> Run:
        print(f"Known truth: seed {seed}, tokenizer `{profile.tokenizer}`.", flush=True)
        return study_run(profile, design, simulated)

    return kept_arrays(
        profile.results / "known_truth" / f"{profile.tokenizer}-{seed}.npz", stamp, make,
        lambda run: {"units": run.units, "values": run.values, "about": np.array([*run.about]),
                     "about_values": np.array([*run.about.values()])},
        lambda found: Run(found["units"], found["values"], dict(zip(
            found["about"].tolist(), found["about_values"].tolist(), strict=True))))


def _frame(run: Run, simulated: LogicCells) -> pd.DataFrame:
    """`KnownTruth.values` of one run, without what was not measured."""
    index = pd.MultiIndex.from_tuples(
        [(str(units), *truth, measure) for units in run.units for truth in simulated.truths
         for measure in MEASURES], names=["units", "kind", "truth", "measure"])
    return pd.Series(run.values.ravel(), index, name="value").dropna().reset_index()


def _by_seed(values: pd.DataFrame) -> pd.DataFrame:
    """Means over a kind's truths: `_WHERE`, units, seed, value."""
    return values.groupby([*_WHERE, "units", "seed"], sort=False)["value"].mean().reset_index()


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """Mean, and Student's interval for it (missing for one value), of (n_seeds,) values."""
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return mean, np.nan, np.nan
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return mean, mean - half, mean + half


def comparison_table(values: pd.DataFrame) -> pd.DataFrame:
    """Each kind of transcoders against its rivals, by tokenizer, kind of truth and measure.

    values: as in `KnownTruth`. Columns: tokenizer, kind, measure, transcoders; rival (the one over
    which the mean lead is least), lead, low, high (that lead, with the interval over seeds); ahead
    (the interval lies above 0 for every rival) and wins (so it does at a level for all rows of the
    table at once); behind and loses (the same below 0, for any rival; at once for all of them).
    """
    wide = _by_seed(values).pivot(index=[*_WHERE, "seed"], columns="units", values="value")
    groups = list(wide.groupby(level=_WHERE, sort=False))
    n = len(groups) * len(TRANSCODERS)
    rows = []
    for key, own in groups:
        for name in TRANSCODERS:
            leads = {rival: (own[name] - own[rival]).to_numpy() for rival in RIVALS}
            rival = min(leads, key=lambda one: leads[one].mean())
            plain, at_once, each = ([interval(lead, 1 - (1 - LEVEL) / by)
                                     for lead in leads.values()]
                                    for by in (1, n, n * len(RIVALS)))
            rows.append((*key, name, rival, *interval(leads[rival]),
                         *(all(low > 0 for _, low, _ in found) for found in (plain, at_once)),
                         *(any(high < 0 for _, _, high in found) for found in (plain, each))))
    return pd.DataFrame(rows, columns=[*_WHERE, "transcoders", "rival", "lead", "low", "high",
                                       "ahead", "wins", "behind", "loses"])


def verdict(comparisons: pd.DataFrame) -> str:
    """What `comparison_table` says, in sentences."""
    n, luck = len(comparisons), (1 - LEVEL) / 2 * len(comparisons)
    wins, loses = (comparisons[comparisons[name]] for name in ("wins", "loses"))
    ahead, behind = (int(comparisons[name].sum()) for name in ("ahead", "behind"))
    one_by_one = (f"judged one by one, {ahead} of {n} are ahead, where luck alone allows up to "
                  f"{luck:.1f}")
    first = (f"Transcoders win on known truth: in {len(wins)} of {n} comparisons a kind of them is "
             f"ahead of every rival, judged all at once ({one_by_one}): {_places(wins)}."
             if len(wins) else
             f"On known truth transcoders do not win: in none of {n} comparisons is a kind of them "
             f"ahead of every rival, judged all at once ({one_by_one}).")
    one_by_one = (f"judged one by one, {behind} are behind some rival, where luck allows up to "
                  f"{len(RIVALS) * luck:.0f}")
    second = (f"In {len(loses)} a kind is behind some rival, judged all at once ({one_by_one}): "
              f"{_places(loses)}." if len(loses) else
              f"In none is a kind behind a rival, judged all at once ({one_by_one}).")
    return f"{first} {second}"


def _places(rows: pd.DataFrame) -> str:
    """Where rows of the comparisons are: kind of truth and tokenizer, with how many of each."""
    places = (rows["kind"] + ", " + rows["tokenizer"]).tolist()
    return "; ".join(f"{place} ({places.count(place)})" for place in dict.fromkeys(places))
