"""A prediction is held against the line of identity, and failing is called failing."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, linregress

from scfm_circuits.circuits import prediction
from scfm_circuits.circuits.prediction import DIRECTION, FAILED, HOLDS, SINGLE, TOGETHER, agreement


def wrong_in_every_cell(n: int = 25) -> tuple[np.ndarray, np.ndarray]:
    """Predictions of +0.42 to +0.55 where -0.10 to -0.23 was measured, with a correlation of 0.77:
    what a page once called evidence."""
    rng = np.random.default_rng(0)
    base, other = rng.normal(size=(2, n))
    base -= base.mean()
    other -= other.mean() + base * (other @ base) / (base @ base)
    mixed = 0.77 * base / base.std() + (1 - 0.77**2) ** 0.5 * other / other.std()
    return 0.485 + 0.03 * base / base.std(), -0.165 + 0.03 * mixed / mixed.std()


def test_a_correlation_of_077_with_the_wrong_sign_in_every_cell_is_a_failed_prediction():
    predicted, measured = wrong_in_every_cell()
    assert np.corrcoef(predicted, measured)[0, 1] == pytest.approx(0.77)
    assert (predicted > 0).all() and (measured < 0).all()
    found = agreement(predicted, measured, np.arange(25), seed=0)
    assert found.verdict == FAILED
    assert found.same_sign == 0 and found.same_sign_high < 0.5
    assert found.slope < 0 and found.r2 < -10 and found.pearson == pytest.approx(0.77)
    assert found.slope_high < 0 and found.r2_high < -5


def test_the_numbers_are_those_of_other_libraries():
    rng = np.random.default_rng(1)
    predicted = rng.normal(size=40)
    measured = 0.5 * predicted + 0.3 * rng.normal(size=40)
    found = agreement(predicted, measured, np.arange(40), seed=3)
    right = int((predicted * measured > 0).sum())
    wilson = binomtest(right, 40).proportion_ci(method="wilson")
    assert (found.same_sign, found.same_sign_low, found.same_sign_high) == pytest.approx(
        (right / 40, wilson.low, wilson.high))
    # Through the origin: the slope of the points and their mirror images.
    slope = linregress(np.r_[predicted, -predicted], np.r_[measured, -measured]).slope
    assert found.slope == pytest.approx(slope)
    assert found.r2 == pytest.approx(
        1 - ((measured - predicted) ** 2).sum() / (measured**2).sum())
    assert found.slope_low < found.slope < found.slope_high
    # As far apart as two standard errors to either side, from the residuals.
    error = ((predicted * (measured - slope * predicted)) ** 2).sum() ** 0.5 / (predicted**2).sum()
    assert found.slope_high - found.slope_low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_a_cell_counts_once_however_many_predictions_it_has():
    predicted, measured = np.ones(101), np.ones(101)
    measured[:100] = -1  # all of one cell
    cells = np.r_[np.zeros(100, int), 1]
    found = agreement(predicted, measured, cells, seed=0)
    assert (found.cells, found.predictions, found.same_sign) == (2, 101, 0.5)


@pytest.mark.parametrize(("factor", "verdict"), [
    (1.0, HOLDS), (0.8, HOLDS), (0.05, DIRECTION), (4.0, DIRECTION), (-1.0, FAILED), (0.0, FAILED)])
def test_the_verdict_is_by_rule(factor, verdict):
    predicted = np.linspace(0.5, 1, 30)
    assert agreement(predicted, factor * predicted, np.arange(30), 0).verdict == verdict


def test_two_cells_are_too_few_to_hold():
    assert agreement(np.ones(2), np.ones(2), np.arange(2), 0).verdict == FAILED


@given(st.lists(st.tuples(*[st.integers(-20, 20)] * 2, st.integers(0, 4)), min_size=1,
                max_size=20), st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_units_do_not_matter_and_turning_all_signs_changes_nothing(rows, unit):
    predicted, measured, cells = (np.array(one) for one in zip(*rows, strict=True))
    first = agreement(predicted, measured, cells, 0)
    again = agreement(-unit * predicted, -unit * measured, cells, 0)
    assert first.same_sign_low <= first.same_sign <= first.same_sign_high
    assert np.allclose(first[:6], again[:6], equal_nan=True) and first.verdict == again.verdict


def study_frames() -> tuple[pd.DataFrame, pd.DataFrame]:
    predicted, measured = wrong_in_every_cell()
    cells = [f"c{i}" for i in range(25)]
    own = pd.DataFrame({"cell": cells, "features": "circuit"})
    effects = pd.concat([
        own.assign(intervention="doubling", predicted=predicted, measured=measured),
        own.assign(intervention="ablation", predicted=-predicted, measured=-1.1 * predicted),
        own.assign(features="same size", intervention="doubling", predicted=9.0, measured=9.0)])
    single = pd.DataFrame({"cell": np.repeat(cells, 4), "intervention": "doubling",
                           "predicted": np.tile([0.1, 0.2, -0.1, -0.3], 25)})
    return effects, single.assign(measured=0.9 * single["predicted"])


def test_saying_that_the_target_is_gone_is_judged_as_a_prediction_is():
    """Its R2 is that of `agreement` with -1 for every cell."""
    effects, _ = study_frames()
    own = effects[(effects["features"] == "circuit") & (effects["intervention"] == "ablation")]
    gone = prediction.agreement(np.full(len(own), -1.0), own["measured"].to_numpy(),
                                own["cell"].to_numpy(), seed=0)
    assert prediction.gone_r2(effects) == pytest.approx(gone.r2)
    assert np.isnan(prediction.gone_r2(effects.assign(measured=0.0)))


def test_what_the_page_says_is_what_the_table_says():
    table = prediction.predictions(*study_frames(), seed=0)
    assert table[["done", "features", "verdict"]].to_numpy().tolist() == [
        ["taken away", TOGETHER, HOLDS], ["doubled", TOGETHER, FAILED], ["doubled", SINGLE, HOLDS]]
    assert prediction.key_point(table) == (
        "The prediction holds for features taken away (all at once), doubled (one at a time). It "
        "failed for features doubled (all at once).")
