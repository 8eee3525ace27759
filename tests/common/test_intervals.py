import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap

from scfm_circuits import InputError
from scfm_circuits.common.intervals import bootstrap_interval, wilson_interval


def test_wilson_interval_solves_its_equation() -> None:
    # The limits are where the score statistic equals the normal quantile; 7.5 is a sum of shares.
    z = 1.959963984540054
    for k, n in [(3, 20), (18, 20), (50, 1000), (7.5, 20)]:
        for limit in wilson_interval(k, n):
            assert abs((k / n - limit) / np.sqrt(limit * (1 - limit) / n)) == pytest.approx(z)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(InputError, match="5 of 4"):
        wilson_interval(5, 4)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_is_scipys(counted) -> None:
    theirs = binomtest(*counted).proportion_ci(method="wilson")
    assert wilson_interval(*counted) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_a_share_is_never_outside_of_its_interval() -> None:
    """By a rounding error even: figures refuse it, where every answer of a model was right."""
    for n in range(1, 3000):
        assert wilson_interval(0, n)[0] <= 0 and wilson_interval(n, n)[1] >= 1


def test_bootstrap_interval_is_that_of_cells_drawn_again() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 3, 17))
    drawn = rng.integers(17, size=(400, 17))
    counts = np.stack([np.bincount(one, minlength=17) for one in drawn])
    value, low, high = bootstrap_interval(values, counts)
    ends = np.percentile(values[..., drawn].mean(axis=-1), [2.5, 97.5], axis=-1)
    np.testing.assert_allclose((value, low, high), (values.mean(axis=-1), *ends), rtol=1e-12)


def test_bootstrap_interval_of_a_ratio_is_scipys() -> None:
    rng = np.random.default_rng(1)
    part, whole = np.abs(rng.normal(1, 0.3, size=(2, 60)))
    counts = rng.multinomial(60, np.full(60, 1 / 60), 20_000)
    found = bootstrap_interval(np.stack([part, whole]), counts, lambda means: means[0] / means[1])
    theirs = bootstrap((part, whole), lambda a, b, axis: a.mean(axis) / b.mean(axis), paired=True,
                       method="percentile", n_resamples=20_000, random_state=2)
    assert found[0] == part.mean() / whole.mean()
    # Each end lies within the noise of so many draws.
    assert found[1:] == pytest.approx(tuple(theirs.confidence_interval),
                                      abs=0.05 * theirs.standard_error)
