"""Two tokenizers measured alike: the same cells and steps, intervals over seeds, what is judged."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import TRAINING, tiny_corpus, tiny_profile
from scipy import stats

from scfm_circuits import InputError
from scfm_circuits.common.profile import load_profile
from scfm_circuits.enrichment.gene_sets import load_library
from scfm_circuits.models import loading
from scfm_circuits.report import sub_words
from scfm_circuits.report.plots.sub_words import both_tokenizers
from scfm_circuits.report.sub_words import (
    BETWEEN,
    EARLY,
    KINDS,
    LATE,
    QUOTED,
    Compared,
    case_cell,
    compare_tokenizers,
    differences,
    interval,
    judged,
    same_cells,
    study_profile,
)
from scfm_circuits.transcoders.training.settings import training_steps


@pytest.mark.parametrize("name", ["demo", "smoke", "paper", "planted"])
def test_both_take_the_same_steps_over_the_same_genes(name: str) -> None:
    profile = load_profile(name)
    pieces, genes = (study_profile(profile, kind, 1, length)
                     for kind, length in (("train", 160.0), ("genes", 80.0)))
    assert training_steps(pieces) == training_steps(genes) == pieces.model_steps
    assert pieces.batch_tokens == 2 * genes.batch_tokens
    same = {"tokenizer", "name", "batch_tokens", "training_tokens", "buffer_tokens",
            "dead_after_tokens"}
    assert {key for key, value in dict(pieces).items() if getattr(genes, key) != value} == same
    assert pieces.model == "train" and pieces.seed == profile.seed + 1
    assert pieces.results != genes.results and profile.results in pieces.results.parents
    # Whatever a profile could say, it can say this.
    type(pieces).model_validate({**dict(pieces), "name": "any"})
    for field, most in (("model_layers", 3), ("model_width", 64), ("model_steps", 300),
                        ("genes_per_cell", 64)):
        assert getattr(pieces, field) <= min(most, getattr(profile, field) or most)


def test_both_have_the_same_cells_with_the_case_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tiny_corpus(30)
    held_out = corpus.labels[corpus.held_out]
    monkeypatch.setattr(sub_words, "CELLS", 4)
    for label in np.unique(held_out):
        profile = load_profile("smoke", {"case_type": str(label)})
        cells = same_cells(corpus, profile)
        pieces, genes = (cells[kind] for kind in KINDS)
        assert 4 <= len(pieces) <= 5
        for key in ("labels", "cell_ids", "held_out", "symbols"):
            assert np.array_equal(getattr(pieces, key), getattr(genes, key))
        assert [pieces.genes_of(i) for i in range(4)] == [genes.genes_of(i) for i in range(4)]
        assert pieces.has_sub_words and not genes.has_sub_words
        assert pieces.cell_ids[case_cell(pieces, profile)] == corpus.cell_ids[
            case_cell(corpus, profile)]


def test_of_long_sentences_the_first_genes_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tiny_corpus(20)
    monkeypatch.setattr(sub_words, "GENES", 3)
    profile = load_profile("smoke", {"case_type": str(corpus.labels[corpus.held_out][0])})
    cells = same_cells(corpus, profile)
    for kind in KINDS:
        assert [cells[kind].genes_of(i) for i in range(20)] == [
            corpus.genes_of(i)[:3] for i in range(20)]
        assert study_profile(profile, kind, 0, 20.0).genes_per_cell == 3


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [0.5, 0.5, 0.5], [3.0, np.nan, 5.0]])
def test_the_interval_is_student_s(values: list[float]) -> None:
    known = [value for value in values if value == value]
    mean, low, high = interval(values)
    assert mean == pytest.approx(np.mean(known))
    if len(set(known)) == 1:
        assert low == high == mean
    else:
        theirs = stats.ttest_1samp(known, 0).confidence_interval(0.95)
        assert (low, high) == pytest.approx((theirs.low, theirs.high))


def test_of_one_value_there_is_no_interval() -> None:
    assert interval([2.0, np.nan])[0] == 2 and np.isnan(interval([2.0])[1:]).all()
    assert np.isnan(interval([np.nan])).all()


def made_runs(**values: tuple[list[float], list[float]]) -> pd.DataFrame:
    """Runs whose quoted measures are, by key, those with sub-words and those with genes."""
    rows = [(*QUOTED[key], label, seed, value)
            for key in QUOTED for label, column in zip(KINDS.values(), values.get(
                key, ([0.0] * 3, [0.0] * 3)), strict=True) for seed, value in enumerate(column)]
    return pd.DataFrame(rows, columns=["where", "measure", "tokenizer", "seed", "value"])


def compared(**values: tuple[list[float], list[float]]) -> Compared:
    runs = made_runs(**values).sample(frac=1, random_state=0)
    return Compared(runs, differences(runs), 9, load_profile("smoke"))


def test_differences_are_paired_by_seed() -> None:
    table = compared(dip=([-30.0, -10.0, -20.0], [-25.0, -5.0, -15.0])).table
    row = table.set_index(["where", "measure"]).loc[[QUOTED["dip"]]].iloc[0]
    # Seeds differ by 20 points and the tokenizers by 5 in each.
    assert row.tolist() == pytest.approx([-20, -15, 5, 5, 5])


@pytest.mark.parametrize(("values", "verdict"), [
    (([-30.0, -10.0, -20.0], [-25.0, -4.0, -15.0]), "holds"),
    (([-25.0, -4.0, -15.0], [-30.0, -10.0, -20.0]), "fails"),
    (([-30.0, -10.0, -20.0], [-25.0, -14.0, -15.0]), "not decided"),
    (([np.nan] * 3, [1.0] * 3), "not decided"),
])
def test_what_is_expected_holds_fails_or_is_not_decided(values: Any, verdict: str) -> None:
    assert judged(compared(dip=values))["dip_shrinks"] == verdict
    assert judged(compared(lead=values))["lead_grows"] == verdict
    ours = [after - before for before, after in zip(*values, strict=True)]
    assert judged(compared(fragments=(ours, [0.0] * 3)))["fragments"] == verdict


def test_a_small_run_is_measured_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    corpus = tiny_corpus(30)
    profile = tiny_profile(monkeypatch, tmp_path, **{
        **TRAINING, "model_steps": 3, "case_type": str(corpus.labels[corpus.held_out][0])})
    monkeypatch.setattr(sub_words, "SEEDS", 2)
    libraries = [load_library("GO_Biological_Process_2025", str(tmp_path))]
    found = compare_tokenizers(corpus, profile, libraries, processes=1)
    counts = found.runs.groupby(["where", "measure"])["value"].size()
    assert (counts == 4).all() and set(QUOTED.values()) <= set(counts.index)
    assert set(found.runs["seed"]) == {profile.seed, profile.seed + 1}
    wide = found.runs.pivot(index=["where", "measure", "seed"], columns="tokenizer",
                            values="value")
    tokens = wide.loc["model", "tokens of a cell"]
    assert (tokens[KINDS["genes"]] < tokens[KINDS["train"]]).all()
    # With a token a gene the two gene rules are one, and nothing is scored sub-word.
    for where in (EARLY, LATE):
        for source in ("features, %", "untrained encoder, %", "ahead of the best control, points"):
            own = [wide.loc[where, f"Table 4, {rule}: {source}"][KINDS["genes"]]
                   for rule in ("token", "occurrence")]
            np.testing.assert_array_equal(*own)
        assert (wide.loc[where, "score: sub-word, feature, %"][KINDS["genes"]].fillna(0) == 0).all()
    early, late, between = (wide.loc[where, "Table 4, token: features, %"]
                            for where in (EARLY, LATE, BETWEEN))
    pd.testing.assert_frame_equal(early - late, between)
    assert set(judged(found)) == {"fragments", "dip_shrinks", "lead_grows"}
    # What was made is read again.
    monkeypatch.setattr(loading, "train_small_model", None)
    again = compare_tokenizers(corpus, profile, libraries, processes=1)
    pd.testing.assert_frame_equal(again.runs, found.runs)
    axes = both_tokenizers(found.runs).axes
    assert len(axes) == 4 and all(len(axis.get_xticks()) == 4 for axis in axes)


class Deadly:
    """A process that unpickles it dies."""

    def __reduce__(self) -> Any:
        return os._exit, (9,)


def test_runs_side_by_side_are_those_one_after_another(monkeypatch: pytest.MonkeyPatch,
                                                       tmp_path: Path) -> None:
    corpus = tiny_corpus(30)
    monkeypatch.setattr(sub_words, "SEEDS", 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    libraries = [load_library("GO_Biological_Process_2025", str(tmp_path))]
    found = []
    for processes in (1, 2):
        profile = tiny_profile(monkeypatch, tmp_path / str(processes), **{
            **TRAINING, "model_steps": 3, "case_type": str(corpus.labels[corpus.held_out][0])})
        found.append(compare_tokenizers(corpus, profile, libraries, processes=processes).runs)
    pd.testing.assert_frame_equal(*found)


def test_a_run_whose_process_dies_is_told() -> None:
    runs: Any = [(Deadly(), None, [])] * 2
    with pytest.raises(InputError, match="has died"):
        sub_words._in_processes(runs, 2)
