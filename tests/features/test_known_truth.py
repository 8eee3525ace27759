"""The study of known truth: what its rule says, and that it does what it says in small."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import tiny_profile
from scipy import stats

from scfm_circuits.features import known_truth
from scfm_circuits.features.known_truth import (
    ALWAYS,
    EVERYTHING,
    GENES,
    RIVALS,
    TRANSCODERS,
    Design,
    comparison_table,
    interval,
    known_truth_study,
    verdict,
)
from scfm_circuits.features.unit_scores import MEASURES

TINY = Design(seeds=2, cells=120, chosen_on=60, genes_per_cell=8, vocabulary=400, layers=1,
              width=16, heads=2, steps=3, batch_cells=4, expansion=2, training_tokens=2048)


def measured(lead: float, spread: float = 0.01, seeds: int = 5, seed: int = 0) -> pd.DataFrame:
    """Values in which every kind of transcoders is `lead` above the best rival in one of two
    measures, and equal in the other, with so much noise between seeds."""
    rng, rows = np.random.default_rng(seed), []
    for one in range(seeds):
        level = rng.normal(0.7, 0.1)  # seeds differ by far more than units within one
        for measure in MEASURES[:2]:
            for units in (*TRANSCODERS, *RIVALS):
                better = lead if measure == MEASURES[0] and units in TRANSCODERS else 0.0
                worse = 0.05 * (units in RIVALS[1:])
                for truth in "ab":
                    value = level + better - worse + rng.normal(0, spread)
                    rows.append(("genes", one, units, "kind", truth, measure, value))
    return pd.DataFrame(rows, columns=["tokenizer", "seed", "units", "kind", "truth", "measure",
                                       "value"])


def test_intervals_are_students() -> None:
    values = np.random.default_rng(0).normal(size=5)
    mean, low, high = interval(values, 0.9)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (low, high) == pytest.approx(tuple(theirs)) and mean == values.mean()
    assert np.isnan(interval(values[:1])[1:]).all()


def test_a_lead_within_seeds_wins_and_none_does_not() -> None:
    found = comparison_table(measured(0.3))
    assert len(found) == 2 * len(TRANSCODERS)
    leading = found["measure"] == MEASURES[0]
    assert found.loc[leading, "wins"].all() and not found.loc[~leading, "ahead"].all()
    # The best rival is the one to beat, not the mean of them.
    assert (found.loc[leading, "rival"] == RIVALS[0]).all()
    assert found.loc[leading, "lead"].between(0.27, 0.33).all()
    said = verdict(found)
    assert said.startswith("Transcoders win on known truth: in 3 of 6 comparisons")
    assert "kind, genes (3)" in said
    lost = comparison_table(measured(-0.3))
    assert lost.loc[leading, "loses"].all() and not lost["wins"].any()
    said = verdict(lost)
    assert said.startswith("On known truth transcoders do not win: in none of 6 comparisons")
    assert "In 3 a kind is behind some rival, judged all at once (" in said
    assert said.endswith("where luck allows up to 1): kind, genes (3).")


def test_equals_are_seldom_ahead_and_hardly_ever_win() -> None:
    found = pd.concat([comparison_table(measured(0.0, seed=seed)) for seed in range(60)])
    first = found[found["measure"] == MEASURES[0]]
    assert first["ahead"].mean() < 0.06 and first["wins"].mean() < 0.02
    # Three rivals are worse indeed, so not being behind them is no luck.
    assert first["behind"].mean() < 0.06 and first["loses"].mean() < 0.02


def test_being_ahead_of_some_rivals_is_not_enough() -> None:
    values = measured(0.0)
    values.loc[values["units"] == RIVALS[2], "value"] += 0.5
    found = comparison_table(values)
    assert not found["ahead"].any() and found["loses"].all()
    assert (found["rival"] == RIVALS[2]).all()


def test_one_seed_says_nothing() -> None:
    found = comparison_table(measured(0.3, seeds=1))
    assert not found[["ahead", "wins", "behind", "loses"]].any().any()
    assert "do not win" in verdict(found)


def test_the_whole_study_in_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profile = tiny_profile(monkeypatch, tmp_path)
    study = known_truth_study(profile, TINY)
    wide = study.values.pivot(index=["tokenizer", "seed", "kind", "truth"],
                              columns=["units", "measure"], values="value")
    assert len(wide) == 2 * 2 * 7 and wide.notna().all().all()
    assert ((wide >= 0) & (wide <= 1)).all().all()
    every = {(units, measure) for units in (*TRANSCODERS, *RIVALS, GENES) for measure in MEASURES}
    assert set(wide.columns) == every | {(EVERYTHING, MEASURES[0]), (ALWAYS, MEASURES[0]),
                                         (ALWAYS, MEASURES[1])}
    # What genes tell does not depend on the tokenizer, and neither do the cells.
    genes = study.values[study.values["units"] == GENES]
    first, second = (part.drop(columns="tokenizer").reset_index(drop=True)
                     for _, part in genes.groupby("tokenizer"))
    pd.testing.assert_frame_equal(first, second)
    models = study.models().set_index(["tokenizer", "measure"])["mean"]
    assert models["sub-words", "tokens of a cell"] > models["a token a gene", "tokens of a cell"]
    assert models["a token a gene", "TopK, L0 8: l0"] <= 8
    assert len(study.comparisons) == 2 * 3 * len(MEASURES) * len(TRANSCODERS)
    summary = study.summary()
    one = summary.iloc[0]
    own = study.values[(study.values[["tokenizer", "kind", "measure", "units"]]
                        == one[["tokenizer", "kind", "measure", "units"]]).all(axis=1)]
    assert one["mean"] == pytest.approx(own["value"].mean())
    means = study.means().set_index(["tokenizer", "kind", "units"])
    assert means.loc[tuple(one[["tokenizer", "kind", "units"]]), one["measure"]] == one["mean"]
    assert means.columns.tolist() == [*MEASURES] and len(means) == 2 * 3 * 10
    words = study.words()
    assert (words["seeds"], words["fold"]) == (2, 2.5) and 0 <= words["right_genes"] <= 100
    # It is kept: nothing is trained again.
    monkeypatch.setattr(known_truth, "train_small_model", None)
    again = known_truth_study(profile, TINY)
    pd.testing.assert_frame_equal(again.values, study.values)
    with pytest.raises(TypeError):
        known_truth_study(profile, TINY._replace(steps=4))
