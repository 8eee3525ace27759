"""Estimates with intervals, and what the old rules would have said without them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from scfm_circuits.paper.exhibits import read_paper
from scfm_circuits.paper.intervals import (
    Shares,
    gap_closed,
    implied_l0,
    late_less_early,
    layer0_difference,
    layers_above_layer0,
    layers_over,
    overlap,
    share_estimate,
)

NAN = math.nan


def shares(*percent: float, of: float = 500) -> Shares:
    return Shares.given(percent, [of] * len(percent))


def test_a_dip_within_noise_is_no_dip() -> None:
    """Layer 0 is lowest in both; in the first the other layers scatter as much by themselves."""
    noisy, clear = shares(78, 80, 92, 79, 90), shares(60, 85, 86, 84, 85)
    for one in (noisy, clear):
        assert layer0_difference(one).value < 0, "the old rule: below the mean of the others"
    assert layer0_difference(noisy).low < 0 < layer0_difference(noisy).high
    assert layer0_difference(clear).high < 0
    assert layers_above_layer0(noisy)[:2] == (1.0, 0.0)
    assert layers_above_layer0(clear) == (1.0, 1.0, 1.0)


def test_few_features_in_layer_0_widen_its_interval() -> None:
    percent = [80, 85, 86, 84, 85]
    widths = [np.ptp(layer0_difference(Shares.given(percent, [n, 500, 500, 500, 500]))[1:])
              for n in (20, 200, 10**9)]
    assert widths[0] > widths[1] > widths[2]
    # Without that part it is the textbook's prediction interval for one more value.
    others = np.array(percent[1:])
    half = stats.t.ppf(0.975, 3) * others.std(ddof=1) * math.sqrt(1 + 1 / 4)
    assert widths[2] == pytest.approx(2 * half, rel=1e-6)


def test_the_prediction_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(85, 4, size=(2000, 8))
    covered = [one.low <= 0 <= one.high for one in (
        layer0_difference(Shares.given(list(row), [1e9] * 8)) for row in draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_middle_above_early_layers_over_the_layers() -> None:
    paper = read_paper().table4
    printed = Shares.given(paper["percentage"].to_list(), paper["total"].to_list())
    found = late_less_early(printed, 24)
    early, late = np.split(paper["percentage"].to_numpy(), [8])
    oracle = stats.ttest_ind(late, early, equal_var=False)
    assert found.value == pytest.approx(3.71, abs=0.005) and found.value > 0, "the old rule"
    assert found.low < 0 < found.high and oracle.pvalue > 0.05
    assert late_less_early(shares(50, 51, 52, 80, 81, 82, 81, 80, 82), 9).low > 0
    # One layer on a side has no scatter.
    alone = late_less_early(shares(50, 80, 81), 3)
    assert alone.value == 30.5 and math.isnan(alone.low)


def test_layers_over_a_level_by_their_own_intervals() -> None:
    found = layers_over(Shares.given([80.5, 95.0, 70.0, 79.5], [200, 200, 200, 200]), 80)
    assert found == (0.5, 0.25, 0.75)


def test_layers_without_features_are_left_out() -> None:
    found = Shares.given([50, NAN, 80, 81], [10, 0, 500, 500])
    assert found.layer.tolist() == [0, 2, 3]
    assert layer0_difference(found).value == pytest.approx(-30.5)
    for nothing in (Shares.given([], []), Shares.given([NAN, 80], [0, 5])):
        assert math.isnan(layer0_difference(nothing).value)
        assert math.isnan(layers_above_layer0(nothing).value)
    assert math.isnan(layers_over(Shares.given([], []), 80).value)
    assert math.isnan(layer0_difference(shares(50, 80)).low), "one other layer has no scatter"


def test_the_nine_genes_are_judged_together() -> None:
    """A circuit that names 26 of 64 genes finds each of nine by luck in 41 % of draws, and the old
    rule called each that it found a match."""
    luck = overlap(4, 9, 26, 64)
    assert luck is not None and luck.found == 4, "four matches, by the old rule"
    assert luck.by_luck == pytest.approx(9 * 26 / 64) and luck.p == pytest.approx(
        stats.hypergeom(64, 9, 26).sf(3))
    assert luck.beyond.low <= 0 < luck.beyond.high
    assert "4 of the 9 are among the 26 of 64 genes; by luck 3.7 (p = 0.54)" in luck.told
    many, none = overlap(8, 9, 26, 64), overlap(0, 9, 26, 64)
    assert many is not None and none is not None
    assert many.p < 0.05 and many.beyond.low > 0
    assert none.beyond.high <= 0 and stats.hypergeom(64, 9, 26).cdf(0) < 0.05


@given(st.data())
def test_beyond_luck_if_and_only_if_p_says_so(data: st.DataObject) -> None:
    of = data.draw(st.integers(2, 80))
    named, drawn = data.draw(st.integers(1, of)), data.draw(st.integers(1, of - 1))
    low, high = max(0, named + drawn - of), min(named, drawn)
    found = data.draw(st.integers(low, high))
    told = overlap(found, named, drawn, of)
    assert told is not None
    fewer = stats.hypergeom(of, named, drawn).cdf(found)
    if min(abs(told.p - 0.05), abs(fewer - 0.05)) > 1e-9:
        assert (told.beyond.low > 0) == (told.p < 0.05)
        assert (told.beyond.high <= 0) == (fewer < 0.05)


def test_an_overlap_that_cannot_be_otherwise_says_nothing() -> None:
    assert overlap(9, 9, 64, 64) is None
    assert overlap(3, 2, 5, 10) is None and overlap(1, 2, 5, 3) is None
    nothing = overlap(0, 9, 0, 64)
    assert nothing is not None and nothing.beyond == (0, 0, 0)


def test_shares_and_gaps() -> None:
    assert share_estimate(0.25, 20)[1:] == pytest.approx((0.1119, 0.4687), abs=1e-4)
    assert math.isnan(share_estimate(0.0, 0).value)
    found = gap_closed(1.0, 0.1, 4.0, 0.2)
    rng = np.random.default_rng(0)
    drawn = 1 - rng.normal(1, 0.1, 200_000) / rng.normal(4, 0.2, 200_000)
    assert found.value == 0.75
    assert found.high - found.value == pytest.approx(1.96 * drawn.std(), rel=0.02)
    assert math.isnan(gap_closed(1.0, 0.1, 0.0, 0.1).value)
    assert math.isnan(gap_closed(1.0, NAN, 4.0, NAN).low)


def test_l0_of_a_layer_from_a_sample_of_its_features() -> None:
    """A population whose L0 is known: the sample's estimate and its interval hold it."""
    rng = np.random.default_rng(0)
    frequency = rng.lognormal(np.log(0.004), 0.8, 900)
    live = frequency[frequency >= 1e-3]
    found = [implied_l0(np.log10(rng.choice(live, 40, replace=False)), len(live), -3.0)
             for _ in range(60)]
    held = [one.low <= live.sum() <= one.high for one in found]
    assert np.mean(held) > 0.8, "a bootstrap of 40 skewed values holds a little less than 95 %"
    assert np.mean([one.value for one in found]) == pytest.approx(live.sum(), rel=0.1)
    # What is below the cut has no say, and of a single feature there is no interval.
    assert implied_l0(np.array([-2.0, -2.0, -5.0]), 100, -3.0) == (1.0, 1.0, 1.0)
    assert math.isnan(implied_l0(np.array([-2.0, -5.0]), 100, -3.0).value)
    paper = read_paper()
    [live_features] = paper.table4.loc[paper.table4["layer"] == 12, "total"]
    printed = implied_l0(paper.table3["log10_E_f"].to_numpy(), int(live_features), -3.0)
    assert 2 < printed.low < printed.value < printed.high < 15
