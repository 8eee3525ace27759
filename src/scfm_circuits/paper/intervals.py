"""Statements with their uncertainty: what layers, losses and lists say beyond luck.

Each function returns an `Estimate`, whose interval a bound is judged by: a statement such as "above
0" is no match while the interval reaches to the other side.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from scfm_circuits.common.intervals import bootstrap_interval, wilson_interval
from scfm_circuits.common.randomness import generator


class Estimate(NamedTuple):
    """A value and its interval, from low to high; nan where there is too little for one."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def named(self, key: str) -> dict[str, float | None]:
        """As values of a run: `key`, `key.low` and `key.high`, None for nan."""
        return {key + end: None if math.isnan(number) else number
                for end, number in zip(("", ".low", ".high"), self, strict=True)}


class Shares(NamedTuple):
    """By layer: of `of` features, the share `percent`; layers without features are left out."""

    layer: np.ndarray
    percent: np.ndarray
    of: np.ndarray

    @classmethod
    def given(cls, percent: Sequence[float], of: Sequence[float]) -> "Shares":
        """percent, of: by layer, from layer 0; nan where a layer has no features."""
        share, count = np.asarray(percent, float), np.asarray(of, float)
        told = np.flatnonzero(~np.isnan(share) & (count > 0))
        return cls(told, share[told], count[told])

    @property
    def has_layer0(self) -> bool:
        """Whether layer 0 and another one have features."""
        return len(self.layer) > 1 and self.layer[0] == 0


def layers_over(shares: Shares, percent: float) -> Estimate:
    """Share of the layers that lie over a percentage.

    Low: those whose 95 % Wilson interval does; high: those whose interval reaches over it.
    """
    if not len(shares.layer):
        return Estimate(math.nan)
    ends = [wilson_interval(round(share * n / 100), int(n))
            for share, n in zip(shares.percent, shares.of, strict=True)]
    low, high = (100 * np.array(one) for one in zip(*ends, strict=True))
    return Estimate(*(float((one > percent).mean()) for one in (shares.percent, low, high)))


def layer0_difference(shares: Shares) -> Estimate:
    """Layer 0 less the mean of the other layers, in points, with a 95 % interval.

    How far one more layer may lie from the mean of m others is a prediction interval: Student's t
    with m - 1 degrees of freedom and the variance s^2 (1 + 1/m), s^2 from how the others scatter.
    As features of a layer share genes, that scatter is the only honest size of a layer's noise. Few
    features in layer 0 add p (1 - p) / n.
    """
    if not shares.has_layer0:
        return Estimate(math.nan)
    others = shares.percent[1:]
    value = float(shares.percent[0] - others.mean())
    half = _half_of_layer0(shares, 1 + 1 / len(others))
    return Estimate(value, value - half, value + half)


def layers_above_layer0(shares: Shares) -> Estimate:
    """Share of the other layers that lie above layer 0; low and high: above either end of what
    layer 0 may be, by `layer0_difference`'s noise of one layer."""
    if not shares.has_layer0:
        return Estimate(math.nan)
    half = _half_of_layer0(shares, 1)
    above = shares.percent[1:] - shares.percent[0]
    value = float((above > 0).mean())
    if math.isnan(half):
        return Estimate(value)
    return Estimate(value, float((above > half).mean()), float((above > -half).mean()))


def _half_of_layer0(shares: Shares, factor: float) -> float:
    others = shares.percent[1:]
    if len(others) < 2:
        return math.nan
    share = shares.percent[0] / 100
    few = 100**2 * share * (1 - share) / shares.of[0]
    spread = math.sqrt(others.var(ddof=1) * factor + few)
    return float(stats.t.ppf(0.975, len(others) - 1) * spread)


def late_less_early(shares: Shares, n_layers: int) -> Estimate:
    """Mean of the upper two thirds of the layers less mean of the first third, in points.

    With Welch's 95 % interval over layers, which takes them for independent: neighbours resemble
    each other, so the true one is wider.
    """
    early = shares.percent[shares.layer < n_layers // 3]
    late = shares.percent[shares.layer >= n_layers // 3]
    if not len(early) or not len(late):
        return Estimate(math.nan)
    value = float(late.mean() - early.mean())
    if min(len(early), len(late)) < 2 or not (early.std() or late.std()):
        return Estimate(value)
    interval = stats.ttest_ind(late, early, equal_var=False).confidence_interval(0.95)
    return Estimate(value, float(interval.low), float(interval.high))


def share_estimate(share: float, of: int) -> Estimate:
    """A share of `of` things, with Wilson's 95 % interval."""
    return Estimate(share, *wilson_interval(round(share * of), of)) if of else Estimate(math.nan)


def gap_closed(added: float, error: float, added_none: float, error_none: float) -> Estimate:
    """The share of the gap between no MLP and original that transcoders close, 1 - a / b.

    added, error: what transcoders add to the loss, and its standard error; added_none, error_none:
    the same without MLPs. The 95 % interval is the delta method's. Without a gap there is no share.
    """
    if not added_none > 0:
        return Estimate(math.nan)
    value = 1 - added / added_none
    half = 1.96 * math.hypot(error / added_none, added * error_none / added_none**2)
    return Estimate(value, value - half, value + half)


def implied_l0(sampled: np.ndarray, live: int, cut: float) -> Estimate:
    """The L0 that the paper's tables imply for the layer of its Table 3, which prints none.

    A layer's L0 is the sum of E(f) over its features: as many as Table 4 counts, times the mean of
    those of Table 3's random sample that are above Table 4's cut. What is below the cut is left
    out. The interval is a bootstrap over the sample.

    sampled: log10 E(f) of Table 3's features; live: Table 4's count for that layer.
    """
    frequency = 10.0 ** sampled[sampled >= cut]
    if len(frequency) < 2:
        return Estimate(math.nan)
    n = len(frequency)
    counts = generator(0, "resampled features of Table 3").multinomial(n, np.full(n, 1 / n), 5000)
    return Estimate(*(float(live * one) for one in bootstrap_interval(frequency, counts)))


class Overlap(NamedTuple):
    """How many of some named genes are among those found, and what luck would give."""

    found: int
    named: int
    drawn: int
    of: int
    by_luck: float
    p: float
    """Of at least as many (hypergeometric)."""
    beyond: Estimate
    """Found less what luck gives. Its low end is above 0 if p is at most 0.05, its high end is not
    if luck finds as few in fewer than 5 % of draws."""

    @property
    def told(self) -> str:
        """The counts and the p in words."""
        return (f"{self.found} of the {self.named} are among the {self.drawn} of {self.of} genes; "
                f"by luck {self.by_luck:.1f} (p = {self.p:.2g})")


def overlap(found: int, named: int, drawn: int, of: int) -> Overlap | None:
    """Judged together: `found` of `named` genes are among the `drawn` ones of `of`.

    By luck the overlap is hypergeometric. None where it can have one value only, as if all are
    drawn; but where nothing was drawn, nothing was found.
    """
    if not 0 <= found <= min(named, drawn) or max(named, drawn) > of or drawn == of:
        return None
    luck, mean = stats.hypergeom(of, named, drawn), named * drawn / of
    # P(more than `many`) is at most 0.05, and P(at most `few`) below it.
    many, few = float(luck.isf(0.05)), float(luck.ppf(0.05)) - 1
    beyond = Estimate(found - mean, found - many, found - few)
    return Overlap(found, named, drawn, of, mean, float(luck.sf(found - 1)),
                   beyond if drawn else Estimate(0.0, 0.0, 0.0))
