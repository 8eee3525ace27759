"""Other foundation models on the same cells: a decoder and an encoder of genes as tokens.

A small copy of MaxToki (a Llama that writes the next gene) and one of Geneformer (a BERT that fills
in masked genes) are trained on the profile's training cells, in the rank-value encoding that both
share, with transcoders on each; and the encoder again with random weights. All parts are kept in
`results/<profile>/other_models/`, by the rooms that make them. It stands in this room as it asks
both `circuits` and `enrichment`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from scfm_circuits.cells.corpus import Corpus, load_corpus
from scfm_circuits.circuits.origins import (
    EVERY,
    GENE,
    STATE,
    SUM,
    frequent_types,
    origins,
    origins_table,
)
from scfm_circuits.common.encodings import OWN_DICTIONARY
from scfm_circuits.common.intervals import wilson_interval
from scfm_circuits.common.profile import Profile
from scfm_circuits.enrichment.controls.layer_counts import Tester, testers
from scfm_circuits.enrichment.controls.other_dictionaries import cells_counted, feature_measures
from scfm_circuits.enrichment.gene_sets import GeneSets
from scfm_circuits.features.baselines import reinitialised_transcoders, untrained_statistics
from scfm_circuits.features.statistics import FeatureStatistics, get_statistics
from scfm_circuits.models.mlp_sites import asked, batches, device_of, masked_genes
from scfm_circuits.report.sub_words import Parts, small_profile
from scfm_circuits.transcoders.transcoder import Transcoders
from scfm_circuits.transcoders.validation import fraction_of_variance_unexplained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DECODER, ENCODER = "decoder (MaxToki's shape)", "encoder (Geneformer's shape)"
RANDOM = "the encoder with random weights"
ENCODINGS = {DECODER: "maxtoki", ENCODER: "geneformer_v2"}
LAYERS, WIDTH, HEADS, STEPS, MODEL_CELLS, BATCH_CELLS = 3, 64, 4, 400, 16, 4
"""At most so large, and no larger than the profile's own: the models' layers, width, heads,
training steps and cells in each of them, chosen before any run for a quarter of a minute each on
one core. Then the cells in each step of the transcoders, which take as many steps as the profile
trains its own model for."""
LEARNING_RATE = 5e-3
"""Of the transcoders. The decoder's MLPs write little, and with the rate of the other chapters and
400 steps its transcoders missed more than a constant would; chosen on FVU alone."""
CONTROLS = ("untrained", "reinitialised")
"""Features that learnt nothing: an untrained encoder's on the same model, and those of transcoders
of the model with random weights."""
NULL = "frequency-matched"
"""The null lists: random genes as frequent as the feature's."""
_SMOOTHED = 50.0
"""Genes that a type's counts are smoothed with, drawn as all cells have them."""


def study_profile(profile: Profile, encoding: str) -> Profile:
    """The profile of one model: the cells' own, small sizes, tokens and medians of these cells."""
    batch = BATCH_CELLS * profile.genes_per_cell
    return small_profile(
        profile, (LAYERS, WIDTH, HEADS), profile.model_steps, batch, encoding=encoding,
        name=f"{profile.name}/other_models/{encoding}", token_dictionary=OWN_DICTIONARY,
        model_subfolder="", model_steps=min(STEPS, profile.model_steps),
        model_batch_cells=min(MODEL_CELLS, profile.model_batch_cells * 2),
        buffer_tokens=max(64 * batch, profile.buffer_tokens), learning_rate=LEARNING_RATE,
        reinitialised_control=True)


class Measured(NamedTuple):
    """One model's rows: of `Compared.table`, by layer, and `origins_table`."""

    row: dict[str, object]
    layers: pd.DataFrame
    parts: pd.DataFrame


class Compared(NamedTuple):
    """The models side by side.

    table: a row per model: model, parameters, loss, frequencies, by_type (nats per asked gene of
    held-out cells: the model's, of genes' frequencies, and of those in cells of the same type),
    fvu, l0, live_table4, for each rule what `shares` says, closure. layers: model, layer, fvu, l0,
    live_table4, and percentage_<rule>. parts: `origins.origins_table` with model. profile: the last
    model's. tokens, counted, cells, asked: tokens, cells that features are counted in, held-out
    cells, and genes asked of these.
    """

    table: pd.DataFrame
    layers: pd.DataFrame
    parts: pd.DataFrame
    profile: Profile
    tokens: int
    counted: int
    cells: int
    asked: int


def compare_models(profile: Profile, libraries: Sequence[GeneSets]) -> Compared:
    """Train both models and their transcoders, and measure them and the random encoder alike.

    Raises InputError as `load_corpus`, such as for cells without counts.
    """
    found: dict[str, Measured] = {}
    for name, encoding in ENCODINGS.items():
        used = study_profile(profile, encoding)
        parts = Parts(used, load_corpus(used))
        counted = cells_counted(parts.corpus, profile)
        ready, model, corpus = testers(libraries, counted, used), parts.model, parts.corpus
        own = get_statistics(model, parts.transcoders, counted, used)
        untrained = untrained_statistics(model, own, counted, used, parts.transcoders.n_features)
        random, transcoders, control = reinitialised_transcoders(model, corpus, used)
        again = get_statistics(random, transcoders, counted, used, control)
        found[name] = _measured(name, corpus, counted, (model, parts.transcoders, own), used,
                                {"untrained": untrained, "reinitialised": again}, ready)
    found[RANDOM] = _measured(RANDOM, corpus, counted, (random, transcoders, again), used, {},
                              ready)  # of the last one, the encoder
    held_out = np.flatnonzero(corpus.held_out)
    return Compared(
        pd.DataFrame([one.row for one in found.values()]),
        pd.concat([one.layers for one in found.values()], ignore_index=True),
        pd.concat([one.parts for one in found.values()], ignore_index=True), used,
        len(corpus.tokenizer), len(counted), len(held_out),
        int(masked_genes(corpus, held_out, profile.seed).sum()))


Dictionary = tuple["PreTrainedModel", Transcoders, FeatureStatistics]


def _measured(name: str, corpus: Corpus, counted: Corpus, explained: Dictionary, profile: Profile,
              controls: Mapping[str, FeatureStatistics], ready: Sequence[Tester]) -> Measured:
    model, transcoders, statistics = explained
    held_out = np.flatnonzero(corpus.held_out)
    [fvu] = fraction_of_variance_unexplained(model, transcoders, corpus, held_out,
                                             profile.forward_cells)
    own, said = shares(statistics, controls, counted, profile, ready)
    labels, l0 = corpus.labels[held_out], statistics.frequency.sum(axis=1)
    split = origins(model, transcoders, corpus, held_out,
                    frequent_types(labels, profile.case_type), profile.seed, profile.forward_cells)
    row = {"model": name, "parameters": sum(one.numel() for one in model.parameters()),
           **gene_losses(model, corpus, held_out, profile), "fvu": fvu.mean(), "l0": l0.mean(),
           "live_table4": int(own["live_table4"].sum()), **said, "closure": split.closure}
    layers = own[["layer", "live_table4"]].assign(fvu=fvu, l0=l0, model=name, **{
        f"percentage_{one.rule}": 100 * own[f"called_{one.rule}"]
        / own["live_table4"].replace(0, np.nan) for one in ready})
    return Measured(row, layers, origins_table(split, labels, profile.seed).assign(model=name))


def shares(statistics: FeatureStatistics, controls: Mapping[str, FeatureStatistics],
           corpus: Corpus, profile: Profile, ready: Sequence[Tester]
           ) -> tuple[pd.DataFrame, dict[str, float]]:
    """Table 4's percentages of all layers beside those of controls.

    Returns `feature_measures` of the features, and by rule percentage_, lower_95_, upper_95_
    (Wilson's), null_ (`NULL` lists) and, of `CONTROLS`, those given; NaN for others.
    """
    frames = {name: feature_measures(one, corpus, profile, ready, NULL)
              for name, one in (("percentage", statistics), *controls.items())}
    said: dict[str, float] = {}
    for rule in (one.rule for one in ready):
        own = frames["percentage"]
        called, live = int(own[f"called_{rule}"].sum()), int(own["live_table4"].sum())
        low, high = wilson_interval(called, live)
        for name in ("percentage", *CONTROLS):
            frame = frames.get(name)
            said[f"{name}_{rule}"] = np.nan if frame is None else _percentage(
                frame, f"called_{rule}")
        said |= {f"lower_95_{rule}": 100 * low, f"upper_95_{rule}": 100 * high,
                 f"null_{rule}": _percentage(own, f"null_{rule}")}
    return frames["percentage"], said


def _percentage(frame: pd.DataFrame, column: str) -> float:
    live = int(frame["live_table4"].sum())
    return 100 * float(frame[column].sum()) / live if live else np.nan


@torch.no_grad()
def gene_losses(model: "PreTrainedModel", corpus: Corpus, cells: np.ndarray, profile: Profile
                ) -> dict[str, float]:
    """Mean loss over the asked genes of some cells, in nats: of the model; of the frequencies of
    genes in the training cells; of those in training cells of the same type, which the model is
    not told. Of a decoder too the genes that an encoder would be asked count alone."""
    table = _log_frequencies(corpus)
    sums, n = np.zeros(3), 0
    for rows, tokens, mask in batches(corpus, cells, profile.forward_cells, device_of(model)):
        question = asked(model, corpus, rows, tokens, mask, profile.seed)
        logits = model(input_ids=question.shown, attention_mask=mask.long()).logits[question.at]
        loss = torch.nn.functional.cross_entropy(logits.float(), question.wanted,
                                                 reduction="none").cpu().numpy()
        cell, place = (one.cpu().numpy() for one in question.at.nonzero().unbind(dim=1))
        shift = int(question.shown is tokens)  # a decoder answers one place before
        chosen = masked_genes(corpus, rows, profile.seed)[cell, place + shift]
        wanted = question.wanted.cpu().numpy()[chosen]
        own = corpus.labels[rows][cell[chosen]]
        sums += [loss[chosen].sum(), -table[""][wanted].sum(),
                 -sum(table.get(label, table[""])[token]
                      for label, token in zip(own, wanted, strict=True))]
        n += len(wanted)
    return dict(zip(("loss", "frequencies", "by_type"), sums / n, strict=True))


def _log_frequencies(corpus: Corpus) -> dict[str, np.ndarray]:
    """Log-frequencies of tokens among the genes of training cells, by type; of all under no name.
    Each count has one more; a type's are smoothed with the whole's."""
    size, train = len(corpus.tokenizer), ~corpus.held_out

    def counted(cells: np.ndarray) -> np.ndarray:
        return np.bincount(corpus.tokens[cells][corpus.gene[cells] >= 0], minlength=size)

    whole = counted(train) + 1.0
    whole /= whole.sum()
    found = {"": np.log(whole)}
    for label in np.unique(corpus.labels[train]):
        own = counted(train & (corpus.labels == label)) + _SMOOTHED * whole
        found[str(label)] = np.log(own / own.sum())
    return found


# --- as the page shows it ------------------------------------------------------------------------

SHORT = {DECODER: "decoder", ENCODER: "encoder", RANDOM: "random"}
"""What numbers in the prose and tables with no room call the models."""
_QUOTED = {"gene_share": (GENE, "other genes"), "gene_features": (GENE, "own features"),
           "gene_rank": (GENE, "own rank"), "gene_biases": (GENE, "biases, token type"),
           "state_own": (STATE, "own token"), "state_share": (STATE, "other genes")}


def shares_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`Compared.table`'s percentages, a row per rule and model (`SHORT`)."""
    rules = [str(one).removeprefix("percentage_") for one in table
             if str(one).startswith("percentage_")]
    return pd.DataFrame([{
        "rule": rule, "model": SHORT[row["model"]], "features": row[f"percentage_{rule}"],
        "lower_95": row[f"lower_95_{rule}"], "upper_95": row[f"upper_95_{rule}"],
        "untrained encoder": row[f"untrained_{rule}"],
        "re-initialised model": row[f"reinitialised_{rule}"],
        "frequency-matched lists": row[f"null_{rule}"]}
        for rule in rules for row in table.to_dict("records")])


def lead(row: Mapping[Any, Any], rule: str) -> float:
    """Points by which a model's features are ahead of the best of what learnt nothing."""
    others = [row[f"{name}_{rule}"] for name in (*CONTROLS, "null")]
    return row[f"percentage_{rule}"] - max(one for one in others if not np.isnan(one))


def parts_shown(parts: pd.DataFrame, question: str, cell_type: str) -> pd.DataFrame:
    """The shares of one question and type, with intervals: a row per part, a column per model."""
    chosen = parts[(parts["question"] == question) & (parts["cell_type"] == cell_type)]
    return _wide(chosen.assign(share=[_share(row) for row in chosen.to_dict("records")]), ["part"])


def by_type_shown(parts: pd.DataFrame) -> pd.DataFrame:
    """Every type's shares: a row per question, type and part, a column per model (`SHORT`)."""
    kept = parts[parts["part"] != SUM]
    return _wide(kept.assign(share=[_share(row) for row in kept.to_dict("records")]),
                 ["question", "cell_type", "cells", "part"]).rename(columns=SHORT)


def _wide(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    wide = rows.pivot_table(index=keys, columns="model", values="share", aggfunc="first",
                            sort=False)
    return wide.reindex(columns=[name for name in SHORT if name in wide]).reset_index()


def _share(row: Mapping[Any, Any]) -> str:
    """A share with its interval; of the sum its value."""
    if row["part"] == SUM:
        return f"{row['contribution']:.2f} ({row['lower_95']:.2f} to {row['upper_95']:.2f})"
    if np.isnan(row["share"]):
        return "n/a"
    return (f"{100 * row['share']:z.0f} ({100 * row['share_lower']:z.0f} to "
            f"{100 * row['share_upper']:z.0f})")


def quoted(parts: pd.DataFrame, case_type: str) -> list[tuple[str, str, str, float]]:
    """The shares that the prose has: the model's short name, key, text and number."""
    found = parts.set_index(["model", "question", "cell_type", "part"])["share"]
    rows = []
    for model, name in SHORT.items():
        for key, (question, part) in _QUOTED.items():
            share = float(found[model, question, EVERY if question == GENE else case_type, part])
            rows.append((name, key, "n/a" if np.isnan(share) else f"{100 * share:z.0f} %", share))
    return rows
