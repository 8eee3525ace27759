"""Adjusted and empirical p-values, intervals of shares."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scfm_circuits import InputError

IntArray = NDArray[np.integer[Any]]

FloatArray = NDArray[np.floating[Any]]


def benjamini_hochberg(p_values: ArrayLike) -> FloatArray:
    """Benjamini-Hochberg adjusted p-values, in the order given (empty in, empty out)."""
    from scipy.stats import false_discovery_control

    p = np.asarray(p_values, dtype=np.float64)
    return false_discovery_control(p) if p.size else p


def empirical_p(observed: ArrayLike, null: ArrayLike) -> FloatArray:
    """Share of null values at most as large as the observed one, never 0: (1 + #) / (1 + n).

    Args:
        observed: smallest p (or q) of each feature, (n_features,), or a single value, ().
        null: the same of its null lists, (n_features, n_null), or (n_null,) to share them.

    Raises:
        InputError: there is no null value.
    """
    draws = np.asarray(null, dtype=np.float64)
    if draws.shape[-1:] in {(), (0,)}:
        raise InputError("An empirical p-value needs at least one null list; raise their number.")
    below = draws <= np.asarray(observed, dtype=np.float64)[..., np.newaxis]
    return (1 + below.sum(axis=-1)) / (1 + draws.shape[-1])


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of the share k / n; (0, 1) when nothing was counted.

    Raises:
        InputError: counts that are negative or k > n.
    """
    if not 0 <= k <= n:
        raise InputError(f"{k} of {n} is not a share; give 0 <= k <= n.")
    if n == 0:
        return 0.0, 1.0
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(k, n, alpha=1 - confidence, method="wilson")
    return float(low), float(high)


def ratio(part: float, whole: float) -> float:
    return float(part) / whole if whole else np.nan


def percent(share: float) -> str:
    return "none" if np.isnan(share) else f"{100 * share:.0f} %"
