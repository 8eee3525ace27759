"""Intervals of 95 %: Wilson's of a share, and the bootstrap's of what is a mean over cells."""

from collections.abc import Callable

import numpy as np

from scfm_circuits import InputError


def wilson_interval(k: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share k / n (statsmodels); (0, 1) when nothing was counted.

    `k` may be a sum of n shares.

    Raises:
        InputError: counts that are negative or k > n.
    """
    if not 0 <= k <= n:
        raise InputError(f"{k} of {n} is not a share; give 0 <= k <= n.")
    if n == 0:
        return 0.0, 1.0
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(k, n, method="wilson")
    # Of none or all it is rounded, at times to the other side of the share.
    return min(float(low), k / n), max(float(high), k / n)


def percentage(name: str, of: np.ndarray, prefix: str | None = None) -> dict[str, float]:
    """What percentage of (..., n_cells) bool is true, with Wilson's interval of as many cells as
    there are, as `name`, and `lower_95` and `upper_95` behind a prefix (`name_` unless given);
    NaN of no cells."""
    before = f"{name}_" if prefix is None else prefix
    names, n = (name, f"{before}lower_95", f"{before}upper_95"), of.shape[-1]
    if not n:
        return dict.fromkeys(names, np.nan)
    low, high = wilson_interval(float(of.reshape(-1, n).mean(axis=0).sum()), n)
    return dict(zip(names, (100 * float(of.mean()), 100 * low, 100 * high), strict=True))


def resampled(rng: np.random.Generator, n: int, draws: int) -> np.ndarray:
    """(n_draws, n_cells) how often each resample of n cells, drawn with replacement, has each."""
    return np.stack([np.bincount(one, minlength=n) for one in rng.integers(n, size=(draws, n))])


def bootstrap_interval(
        values: np.ndarray, counts: np.ndarray,
        statistic: Callable[[np.ndarray], np.ndarray] = np.asarray,
        ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A statistic of means over cells, and both ends of its 95 % interval over resampled cells.

    Args:
        values: (..., n_cells).
        counts: (n_draws, n_cells) how often each resample has each cell; `n_cells` in all.
        statistic: of means over cells, (..., n) or (...), in the unit of what it returns for each
            of n; the means themselves unless given.

    Returns:
        The statistic of the cells as they are, and percentiles 2.5 and 97.5 of its resamples.
    """
    found = statistic(values @ counts.T / values.shape[-1])
    low, high = np.percentile(found, [2.5, 97.5], axis=-1)
    return statistic(values.mean(axis=-1)), low, high
