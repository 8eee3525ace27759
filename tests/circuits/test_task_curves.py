"""Curves of a task's circuits say what was counted, and luck is not called skill."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from scfm_circuits.circuits import task_curves as curves
from scfm_circuits.circuits.task_circuit import (
    ACTIVATION,
    ALL,
    CHOSEN_BY,
    DRAWS,
    GRADIENT,
    INFLUENCE,
    MEAN,
    NONE,
    ORIGINAL,
    RANDOM,
    SHARES,
    ZERO,
    Setting,
    TaskCircuit,
)


def found(rates: dict[str, float], n: int = 60) -> TaskCircuit:
    """Cells of which the first tenth is wrong from the start; `rates` of the others stay right."""
    keep = torch.ones(2, 8, dtype=torch.bool)
    settings = [Setting(ORIGINAL, "", 0, np.nan, None)]
    for baseline in (MEAN, ZERO):
        settings += [Setting(ALL, baseline, 0, 1.0, keep), Setting(NONE, baseline, 0, 0.0, ~keep)]
        settings += [Setting(name, baseline, draw, share, keep) for name in CHOSEN_BY
                     for draw in range(DRAWS if name == RANDOM else 1) for share in SHARES]
    wrong = n // 10
    rows = []
    for one in settings:
        row = np.arange(n) < wrong + round((n - wrong) * rates.get(one.chosen, 1.0))
        rows.append(row & (np.arange(n) >= wrong))
    right = np.array(rows)
    right[1, 0] = True  # by luck, where the original is wrong: nothing that is kept
    return TaskCircuit(settings, right, 2.0 * right - 1, 16, 9, np.arange(n))


def test_the_curve_by_hand():
    rates = {INFLUENCE: 0.5, NONE: 0.0, RANDOM: 0.25}
    table = curves.curve(found(rates))
    assert table["chosen"].tolist()[:3] == [ORIGINAL, ALL, NONE]
    assert table["kept"].tolist()[:3] == [100, 100, 0] and table["right"][1] == 55
    row = table[(table["chosen"] == INFLUENCE) & (table["others"] == ZERO)].iloc[0]
    wilson = binomtest(27, 54).proportion_ci(method="wilson")
    assert (row["kept"], row["kept_lower_95"], row["kept_upper_95"]) == pytest.approx(
        (50, 100 * wilson.low, 100 * wilson.high))
    assert row["percentage"] == 100 * 27 / 60 and row["features_kept"] == 16
    assert curves.fewest(table, MEAN, enough=50.0).startswith("16 of them (0.4 %) keep 50 % (37 to")
    assert curves.fewest(table, MEAN) == "no circuit of up to 25 % of them keeps 90 %"


def test_what_influence_is_worth_stands_beside_every_rival():
    rates = {INFLUENCE: 0.5, NONE: 0.0, RANDOM: 0.25, GRADIENT: 0.5, ACTIVATION: 0.9}
    table = curves.compare_choices(found(rates), seed=0)
    row = table[(table["kept"] == curves.RIGHT) & (table["others"] == MEAN)].set_index("chosen")
    assert row["percentage"].round().tolist() == [50, 50, 91, 26]
    assert row.loc[RANDOM, "difference"] == pytest.approx(100 * 13 / 54)
    # As wide as that of a share of 13 in 54, with the cells' own errors.
    share = 13 / 54
    error = 196 * (share * (1 - share) / 54) ** 0.5
    assert row.loc[RANDOM, "upper_95"] - row.loc[RANDOM, "lower_95"] == pytest.approx(
        2 * error, rel=0.1)
    assert row.loc[ACTIVATION, "upper_95"] < 0 < row.loc[RANDOM, "lower_95"]
    assert row.loc[GRADIENT, "difference"] == 0
    contrast = table[(table["kept"] == curves.CONTRAST)].set_index(["others", "chosen"])
    # Of 54 that all features have and none has not (and one by luck), half.
    assert contrast.loc[(MEAN, INFLUENCE), "percentage"] == pytest.approx(100 * 27 / 55)


def test_the_interval_against_random_features_holds_every_draw():
    """Two draws keep little and one keeps as much as the choice by influence: with so few of them
    the mean of the three says nothing, however sure it is over cells."""
    study = found({INFLUENCE: 0.5, RANDOM: 0.0, NONE: 0.0})
    for row, one in enumerate(study.settings):
        if (one.chosen, one.draw) == (RANDOM, DRAWS - 1):
            influence = study.settings.index(one._replace(chosen=INFLUENCE, draw=0))
            for kept in (study.right, study.contrast):
                kept[row] = kept[influence]
    for (kept, _), table in curves.compare_choices(study, seed=0).groupby(["kept", "others"]):
        table = table.set_index("chosen")
        row = table.loc[RANDOM]
        assert row["lowest"] < row["percentage"] < row["highest"]
        assert row["lower_95"] <= 0 < row["difference"] < row["upper_95"], kept
        # That of the draw that is farthest off, with its cells' own errors.
        assert row["upper_95"] > table.loc[INFLUENCE, "percentage"] - row["lowest"]


def test_a_model_that_knows_nothing_has_nothing_to_keep():
    nothing = found({})
    nothing.right[:] = False
    nothing.contrast[:] = -1
    table = curves.compare_choices(nothing, seed=0)
    assert table["percentage"].isna().all() and len(table) == 2 * 2 * len(CHOSEN_BY)
    assert curves.curve(nothing)["kept"].isna().all()
    assert curves.fewest(curves.curve(nothing), ZERO).startswith("no circuit of up to 25 %")
