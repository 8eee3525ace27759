"""Adjusted and empirical p-values; shares, and how they are written."""

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


def ratio(part: float, whole: float) -> float:
    """part / whole; nan where there is no whole."""
    return float(part) / whole if whole else np.nan


def percent(share: float) -> str:
    """A share as a whole percentage; "none" for nan."""
    return "none" if np.isnan(share) else f"{100 * share:.0f} %"
