"""What sub-words cost: the same model and transcoders with two tokenizers, measured alike.

One tokenizer cuts gene names into pieces (`train`), the other has a token for each gene (`genes`).
For each of three seeds a small model and its transcoders are trained with either, on the same
cells, which are split alike. Every step sees as many cells, hence as many genes, so that shorter
sequences only make it cheaper. All parts of a run are kept in `results/<profile>/sub_words/`, by
the rooms that make them. It stands in this room as it asks both `circuits` and `interpretability`.
"""

import math
import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus, with_tokenizer
from scfm_circuits.cells.prompts import answered_prompt
from scfm_circuits.circuits.circuit import circuit_genes, node_table, share_kept
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.search import limits, strongest_features, trace_feature
from scfm_circuits.common.compiled import n_threads
from scfm_circuits.common.profile import Profile
from scfm_circuits.common.randomness import generator
from scfm_circuits.enrichment.controls.layer_counts import Tester, tester_of
from scfm_circuits.enrichment.controls.other_dictionaries import HELD_OUT, feature_measures
from scfm_circuits.enrichment.gene_sets import GeneSets
from scfm_circuits.enrichment.rules import RULES
from scfm_circuits.features.statistics import FeatureStatistics
from scfm_circuits.interpretability.deck import FEATURE, UNTRAINED
from scfm_circuits.interpretability.scores import (
    NONE,
    RARE,
    SUB_WORD,
    FeatureScores,
    feature_scores,
    verdicts,
)
from scfm_circuits.models.answers import predict_answers
from scfm_circuits.models.known_types import cells_asked, commonest_text
from scfm_circuits.report.chapter import Chapter
from scfm_circuits.transcoders.held_out import held_out_measures
from scfm_circuits.transcoders.variants import schedules

KINDS = {"train": "sub-words", "genes": "a token a gene"}
"""The tokenizers compared, as the profile's field `tokenizer` names them."""
SEEDS = 3
CELLS, GENES, LAYERS, WIDTH, HEADS, STEPS, MODEL_CELLS, BATCH_CELLS = 400, 64, 3, 48, 4, 300, 8, 2
"""At most so large, and no larger than the profile's own: cells; the genes of each, its first; the
model's layers, width, heads, training steps and cells in each of them. Then the cells in each step
of the transcoders, which are trained for as many steps."""
EARLY, LATE, BETWEEN = "layer 0", "later layers", "layer 0 less later layers"
QUOTED = {"tokens": ("model", "tokens of a cell"),
          "right": ("model", "right answers, %"), "commonest": ("model", "commonest type, %"),
          "loss": ("model", "loss, nats a cell"),
          "added": ("model", "added by transcoders, nats a cell"),
          "fragments": (BETWEEN, "score: sub-word, feature, %"),
          "dip": (BETWEEN, "Table 4, token: features, %"),
          "untrained_fragments": (BETWEEN, f"score: sub-word, {UNTRAINED}, %"),
          "untrained_dip": (BETWEEN, f"Table 4, token: {UNTRAINED}, %"),
          "lead": (EARLY, "Table 4, token: ahead of the best control, points")}
"""Rows of the table that the page's prose has, by their key."""
_RULE = "corpus"
_NULL = "frequency-matched"


def study_profile(profile: Profile, tokenizer: str, seed: int, length: float) -> Profile:
    """One run's profile; length: mean tokens of a cell, of which a step takes `BATCH_CELLS`."""
    steps, batch = min(STEPS, profile.model_steps), round(BATCH_CELLS * length)
    return small_profile(
        profile, (LAYERS, WIDTH, HEADS), steps, batch, tokenizer=tokenizer,
        name=f"{profile.name}/sub_words/{tokenizer}-{seed}", seed=profile.seed + seed,
        genes_per_cell=min(GENES, profile.genes_per_cell), model_steps=steps,
        model_batch_cells=min(MODEL_CELLS, profile.model_batch_cells), buffer_tokens=64 * batch)


def small_profile(profile: Profile, sizes: tuple[int, int, int], steps: int, batch: int,
                  **own: Any) -> Profile:
    """The profile of a small model that is trained on the spot, with transcoders.

    sizes: layers, width and heads, no larger than the profile's own. The transcoders are trained in
    so many steps of `batch` tokens. own: further fields.
    """
    layers, width, heads = sizes[0], min(sizes[1], profile.model_width), sizes[2]
    return profile.model_copy(update={
        "model": "train", "model_revision": None, "human_layer": 0, "model_thinning": 1.0,
        "model_layers": min(layers, profile.model_layers or layers), "model_width": width,
        "model_heads": math.gcd(heads, width), "batch_tokens": batch,
        "training_tokens": steps * batch, "dead_after_tokens": steps * batch,
        "site": "transcoder", **schedules(profile, steps), **own})


# --- the same cells ------------------------------------------------------------------------------


def same_cells(corpus: Corpus, profile: Profile) -> dict[str, Corpus]:
    """The cells with either tokenizer: all, or `CELLS` drawn at random and the first case."""
    drawn = generator(profile.seed, "cells of both tokenizers").permutation(len(corpus))[:CELLS]
    rows = np.union1d(drawn, case_cell(corpus, profile))
    genes = min(GENES, profile.genes_per_cell)
    return {kind: with_tokenizer(corpus, profile.model_copy(update={
        "tokenizer": kind, "genes_per_cell": genes}), rows) for kind in KINDS}


def case_cell(corpus: Corpus, profile: Profile) -> int:
    """The first held-out cell of the profile's `case_type`."""
    return int(np.flatnonzero(corpus.held_out & (corpus.labels == profile.case_type))[0])


# --- one run -------------------------------------------------------------------------------------


class Parts(Chapter):
    """What a run has, made when first asked for; the corpus is given."""

    def __init__(self, profile: Profile, corpus: Corpus) -> None:
        super().__init__(profile, "sub_words")
        self.exact = True
        self.corpus = corpus


def measured(parts: Parts, ready: Sequence[Tester]) -> pd.DataFrame:
    """One run's measures, a row each: where (`EARLY`, `LATE`, the model, the circuit), measure,
    value; nan where there was nothing to measure."""
    rows = [*model_rows(parts), *share_rows(parts, ready), *score_rows(parts), *circuit_rows(parts)]
    found = {(where, measure): value for where, measure, value in rows}
    rows += [(BETWEEN, measure, found[EARLY, measure] - found[LATE, measure])
             for where, measure in QUOTED.values() if where == BETWEEN]
    return pd.DataFrame(rows, columns=["where", "measure", "value"])


Row = tuple[str, str, float]


def model_rows(parts: Parts) -> list[Row]:
    """Length and loss of a cell, right answers, and FVU and L0 on held-out cells.

    Loss is nats for a cell's whole text, which two tokenizers have in common; tokens are not.
    """
    corpus, held_out = parts.corpus, parts.corpus.held_out_cells(HELD_OUT)
    found = held_out_measures(parts.model, {"own": lambda: parts.transcoders}, corpus, held_out,
                              parts.profile.forward_cells)
    loss = found.set_index(["variant", "layer"])["loss"]
    predictions = float((corpus.lengths[held_out] - 1).mean())
    asked = cells_asked(corpus, parts.profile.seed)
    truth, commonest = corpus.labels[asked], commonest_text(corpus.labels[~corpus.held_out])
    answers = np.array(predict_answers(parts.model, corpus, asked), dtype=str)
    rows: list[Row] = [("model", "tokens of a cell", float(corpus.lengths.mean())),
                       ("model", "loss, nats a cell", predictions * loss["original", -1]),
                       ("model", "added by transcoders, nats a cell",
                        predictions * (loss["own", -1] - loss["original", -1])),
                       ("model", "right answers, %", 100 * np.mean(answers == truth)),
                       ("model", "commonest type, %", 100 * np.mean(truth == commonest))]
    own = found[(found["variant"] == "own") & (found["layer"] >= 0)]
    for where, part in _split(own):
        rows += [(where, "FVU", part["fvu"].mean()), (where, "L0", part["l0"].mean())]
    return rows


def _split(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Rows of layer 0, and of the others."""
    return [(EARLY, frame[frame["layer"] == 0]), (LATE, frame[frame["layer"] > 0])]


def share_rows(parts: Parts, ready: Sequence[Tester]) -> list[Row]:
    """Table 4's percentage and its controls, under the rule `corpus` and both gene rules."""
    rows: list[Row] = []
    sources: dict[str, FeatureStatistics] = {"features": parts.statistics, **parts.baselines}
    for gene_rule in ("token", "occurrence"):
        profile = parts.profile.model_copy(update={"gene_rule": gene_rule})
        shares: dict[str, dict[str, float]] = {EARLY: {}, LATE: {}}
        for name, statistics in sources.items():
            found = feature_measures(statistics, parts.corpus, profile, ready, _NULL)
            for where, part in _split(found):
                live = part["live_table4"].sum() or np.nan
                shares[where][name] = 100 * part[f"called_{_RULE}"].sum() / live
                if name == "features":
                    shares[where][_NULL] = 100 * part[f"null_{_RULE}"].sum() / live
        for where, own in shares.items():
            rows += [(where, f"Table 4, {gene_rule}: {label}, %", value)
                     for label, value in own.items()]
            best = max(value for label, value in own.items() if label != "features")
            rows.append((where, f"Table 4, {gene_rule}: ahead of the best control, points",
                         own["features"] - best))
    return rows


def score_rows(parts: Parts) -> list[Row]:
    """The automatic score's shares, of features and of an untrained encoder's.

    Named by genes: three genes or families predict where it fires, whatever sub-words do, so that
    both tokenizers are asked the same.
    """
    scores: FeatureScores = feature_scores(parts.model, parts.transcoders, parts.statistics,
                                           parts.corpus, parts.profile)
    rows: list[Row] = []
    for source, frame in ((FEATURE, scores.features),
                          (UNTRAINED, scores.decoys[scores.decoys["source"] == UNTRAINED])):
        told = frame[frame["verdict"] != RARE]
        by_gene = verdicts(told.assign(token_f1=0.0))
        told = told.assign(named=by_gene != NONE, sub_word=told["verdict"] == SUB_WORD)
        for where, part in _split(told):
            rows += [(where, f"score: named by genes, {source}, %", 100 * part["named"].mean()),
                     (where, f"score: sub-word, {source}, %", 100 * part["sub_word"].mean())]
    return rows


def circuit_rows(parts: Parts) -> list[Row]:
    """The case cell's circuits, with its label as the answer: from the strongest feature of the
    last layer where the answer ends, as in the case study, and where it begins."""
    profile, corpus, rows = parts.profile, parts.corpus, list[Row]()
    cell = case_cell(corpus, profile)
    for place, where in (("answer", "circuit, end of the answer"),
                         ("query", "circuit, end of the question")):
        case = answered_prompt(corpus, profile.model_copy(update={"case_position": place}), cell,
                               str(corpus.labels[cell]))
        frozen = freeze(parts.model, parts.transcoders, case.encoded.tokens)
        last = parts.transcoders.n_layers - 1
        names = ("nodes", "edges", "closure", "kept, %", "nodes on genes, %", "genes named")
        values = [np.nan] * len(names)
        if strongest := strongest_features(frozen, last, case.position, 1):
            found = trace_feature(frozen, last, strongest[0], case.position, **limits(profile))
            nodes = node_table(found, case.texts, case.genes)
            values = [len(nodes), len(found.edges), found.closure_max_relative,
                      100 * share_kept(found), 100 * float((nodes["gene"] != "").mean()),
                      len(circuit_genes(nodes))]
        rows += [(where, name, float(value)) for name, value in zip(names, values, strict=True)]
    return rows


# --- all runs ------------------------------------------------------------------------------------


class Compared(NamedTuple):
    """Both tokenizers over the seeds.

    runs: a row per run and measure, with columns tokenizer and seed beside those of `measured`.
    table: `differences` of these. cells: how many there were. profile: that of the last run.
    """

    runs: pd.DataFrame
    table: pd.DataFrame
    cells: int
    profile: Profile


def compare_tokenizers(corpus: Corpus, profile: Profile, libraries: Sequence[GeneSets],
                       processes: int | None = None) -> Compared:
    """Train and measure with either tokenizer for each seed.

    processes: that many runs at a time, each in a process with one thread, which such small models
    keep busier than two threads one model; by default 2, where this process is to use two threads
    and there is no GPU. With 1 the runs are made here, one after another. Raises InputError where a
    process dies.
    """
    cells = same_cells(corpus, profile)
    ready = [tester_of(RULES[_RULE], libraries, cells["train"], profile.fdr)]
    runs = [(kind, study_profile(profile, kind, seed, float(cells[kind].lengths.mean())))
            for seed in range(SEEDS) for kind in KINDS]
    at_once = processes or (1 if torch.cuda.is_available() else min(2, n_threads()))
    if at_once == 1:
        found = [_run(used, cells[kind], ready) for kind, used in runs]
    else:
        found = _in_processes([(used, cells[kind], ready) for kind, used in runs], at_once)
    frames = [frame.assign(tokenizer=KINDS[kind], seed=used.seed)
              for (kind, used), frame in zip(runs, found, strict=True)]
    table = pd.concat(frames, ignore_index=True)
    return Compared(table, differences(table), len(cells["train"]), runs[-1][1])


def _run(profile: Profile, corpus: Corpus, ready: Sequence[Tester]) -> pd.DataFrame:
    return measured(Parts(profile, corpus), ready)


def _in_processes(runs: Sequence[tuple[Profile, Corpus, Sequence[Tester]]], at_once: int
                  ) -> list[pd.DataFrame]:
    """What `_run` gives for each, in order; what is kept by then is kept if one fails."""
    # Started afresh: a fork would share locks, and lack threads, of this process.
    pool = ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn"), _begin)
    try:
        return list(pool.map(_run, *zip(*runs, strict=True)))
    except BrokenProcessPool:
        raise InputError("A process that trains a small model has died, most likely because memory "
                         "ran out; what was finished is kept, so run the same command again."
                         ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
    """Before a process takes its first run."""
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        # A killed parent tells nobody, and what waits for its next run would wait for ever.
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def differences(runs: pd.DataFrame) -> pd.DataFrame:
    """A row per measure: each tokenizer's mean over seeds, and the difference with its interval.

    Columns: where, measure, one for each of `KINDS`, difference (genes less sub-words), lower_95,
    upper_95 (Student's t over the seeds, as both tokenizers share a seed's cells).
    """
    rows = []
    for (where, measure), part in runs.groupby(["where", "measure"], sort=False):
        wide = part.pivot(index="seed", columns="tokenizer", values="value")
        before, after = (wide[label] for label in KINDS.values())
        rows.append([where, measure, before.mean(), after.mean(), *interval(after - before)])
    return pd.DataFrame(rows, columns=["where", "measure", *KINDS.values(), "difference",
                                       "lower_95", "upper_95"])


def judged(compared: Compared) -> dict[str, str]:
    """What the paper expects, fixed beforehand: whether it holds, fails or is not decided.

    fragments: with sub-words, more of layer 0's features than of the others' are scored sub-word.
    dip_shrinks: layer 0 less later layers is larger with a token a gene. lead_grows: so is layer
    0's lead over its best control. It holds if the whole 95 % interval is above 0, and fails if it
    is below.
    """
    runs = compared.runs.set_index(["tokenizer", "where", "measure"])["value"].sort_index()
    bounds = {"fragments": interval(runs.loc[(KINDS["train"], *QUOTED["fragments"])])[1:]}
    rows = compared.table.set_index(["where", "measure"])
    for key, name in (("dip_shrinks", "dip"), ("lead_grows", "lead")):
        row = rows.loc[[QUOTED[name]]]
        bounds[key] = float(row["lower_95"].iloc[0]), float(row["upper_95"].iloc[0])
    return {key: "holds" if low > 0 else "fails" if high < 0 else "not decided"
            for key, (low, high) in bounds.items()}


def interval(values: Sequence[float] | pd.Series) -> tuple[float, float, float]:
    """Mean and 95 % interval of a few values by Student's t; nan where there are fewer than two."""
    given = np.asarray(values, float)
    given = given[~np.isnan(given)]
    if len(given) < 2:
        return (float(given.mean()) if len(given) else np.nan), np.nan, np.nan
    half = stats.t.ppf(0.975, len(given) - 1) * given.std(ddof=1) / np.sqrt(len(given))
    return float(given.mean()), float(given.mean() - half), float(given.mean() + half)
