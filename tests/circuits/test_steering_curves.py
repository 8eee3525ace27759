"""Curves count what happened, and equal cost is equal cost."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from scfm_circuits.circuits import steering_curves as curves
from scfm_circuits.circuits.steering import (
    BY_EFFECT,
    MEANS,
    Readings,
    Setting,
    SteeringStudy,
    pushed,
)

DOSES = (-2.0, -1.0, 1.0, 2.0)


def study(effects, n=8, apart=0.0):
    """A study in which contrast and loss are linear in the dose; effects: by arm, (slope, cost).
    apart: by how much two seeds' slopes are apart, of all arms but `BY_EFFECT`."""
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b"] * (n // 2))
    before = Readings(np.where(labels == "a", 1.0, -1.0)[None], np.ones((1, n), bool),
                      np.zeros((1, n), bool), rng.random((1, n)))
    edit, settings, contrast, loss = pushed(torch.zeros(1)), [], [], []
    for arm, (slope, cost) in effects.items():
        for seed in range(2):
            for dose in (*DOSES, np.nan):
                settings.append(Setting(arm, seed, 0, dose, dose, dose, edit))
                contrast.append(before.contrast[0] + (
                    dose * (slope + (arm != BY_EFFECT) * apart * (seed - 0.5))
                    if dose == dose else 0.5 * seed))
                loss.append(before.loss[0] + (cost * abs(dose) if dose == dose else 0.0))
    contrast, loss = np.array(contrast), np.array(loss)
    right = (contrast > 0) == (labels == "a")
    return SteeringStudy("a", settings, Readings(contrast, right, np.zeros_like(right), loss),
                         before, labels, pd.DataFrame())


def test_a_row_counts_what_its_settings_did():
    table = curves.curve(study({BY_EFFECT: (0.6, 0.05), MEANS: (2.0, 0.4)}), seed=0)
    assert table.iloc[0][["arm", "change", "cost", "to_label", "own_right"]].tolist() == [
        "nothing", 0, 0, 0, 100]
    rows = table.set_index(["arm", "dose"])
    best = rows.loc[BY_EFFECT, 1.0]
    assert best["change"] == pytest.approx(0.6) and best["cost"] == pytest.approx(0.05)
    assert (best["to_label"], best["from_label"], best["others_right"]) == (0, 0, 100)
    assert rows.loc[(BY_EFFECT, 2.0), ["to_label", "others_right"]].tolist() == [100, 0]
    assert rows.loc[(BY_EFFECT, -2.0), "from_label"] == 100
    assert rows["called"].tolist()[:3] == [50, 0, 50]
    away = table[(table["arm"] == BY_EFFECT) & (table["done"] == curves.TAKEN_AWAY)].iloc[0]
    assert (away["lowest"], away["highest"]) == pytest.approx((0.0, 0.5))
    assert away["change"] == pytest.approx(0.25) and away["runs"] == 2


def test_arms_are_compared_at_the_same_norm_and_at_the_same_cost():
    found = curves.compared(study({BY_EFFECT: (0.6, 0.08), MEANS: (2.0, 0.4)}), seed=0)
    rows = found.set_index(["pushed", "compared", "arm"]).sort_index()
    for way in ("towards", "away"):
        norm, cost = rows.loc[way, "equal norm"], rows.loc[way, "equal cost"]
        assert norm.loc[MEANS, "effect"] == pytest.approx(2.0)
        assert norm.loc[MEANS, "difference"] == pytest.approx(-1.4)
        # 0.1 nats cost the best feature a dose of 1.25, the difference of means one of a quarter.
        assert abs(cost.loc[BY_EFFECT, "dose"]) == pytest.approx(1.25)
        assert cost.loc[BY_EFFECT, "effect"] == pytest.approx(0.75)
        assert abs(cost.loc[MEANS, "dose"]) == pytest.approx(0.25)
        assert cost.loc[MEANS, "difference"] == pytest.approx(0.75 - 0.5)
        assert cost["cost"].tolist() == pytest.approx([curves.COST] * 2) and cost["reached"].all()
    for how, verdict in (("equal norm", "less than"), ("equal cost", "more than")):
        said = curves.beside(found, "towards", how, MEANS)
        assert said.startswith(f"{verdict} the difference of means (difference ")
    assert curves.effects(found, "away", "equal norm")[MEANS] == (
        "2.00 nats (2.00 to 2.00 over cells, 2.00 to 2.00 over draws)")


@pytest.mark.parametrize(("apart", "verdict"),
                         [(0.0, "more than"), (2.0, "not clearly other than")])
def test_an_arm_is_ahead_only_if_every_draw_says_so(apart, verdict):
    """Cells agree to the last digit, and the two draws do not."""
    found = curves.compared(study({BY_EFFECT: (0.6, 0.05), MEANS: (0.2, 0.05)}, apart=apart), 0)
    rows = found[(found["pushed"] == "towards") & (found["compared"] == "equal norm")]
    row = rows.set_index("arm").loc[MEANS]
    assert row["lower_95"] == pytest.approx(0.2) == row["upper_95"]
    assert (row["lowest"], row["highest"]) == pytest.approx((0.2 - apart / 2, 0.2 + apart / 2))
    assert (row["difference_lowest"], row["difference_highest"]) == pytest.approx(
        (0.4 - apart / 2, 0.4 + apart / 2))
    said = curves.beside(found, "towards", "equal norm", MEANS)
    assert said.startswith(f"{verdict} the difference of means (difference 0.40 nats, 0.40 to 0.40")
    assert curves.effects(found, "towards", "equal norm")[BY_EFFECT].endswith("over draws)")


def test_an_arm_that_never_costs_as_much_is_read_at_its_last_dose_and_marked():
    found = curves.compared(study({BY_EFFECT: (0.6, 0.01), MEANS: (0.6, 0.01)}), seed=0)
    row = found[(found["compared"] == "equal cost")].iloc[0]
    assert not row["reached"] and row["dose"] == 2.0 and row["effect"] == pytest.approx(1.2)
    assert "not clearly other than" in curves.beside(found, "away", "equal norm", MEANS)


@given(arrays(float, (3, 5), elements=st.floats(-1, 1)), st.floats(0.01, 0.9))
def test_a_level_is_first_reached_where_the_line_crosses_it(costs, level):
    costs[:, 0] = 0.0
    doses = np.array([0.0, 0.5, 1.0, 2.0, 4.0])
    at, reached = curves.crossing(doses, costs, level)
    fine = np.linspace(0, 4, 4001)
    for row, dose, found in zip(costs, at, reached, strict=True):
        line = np.interp(fine, doses, row)
        assert found == (row.max() >= level)
        assert (line[fine < dose - 2e-3] < level + 1e-9).all()
        assert not found or np.interp(dose, doses, row) == pytest.approx(level, abs=1e-9) or (
            row[doses == dose][0] >= level)
