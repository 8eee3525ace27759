"""What the ratings say: rates with intervals, decoys beside features, agreement, sample size."""

import math
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportion_effectsize

from scfm_circuits import InputError
from scfm_circuits.common.intervals import wilson_interval
from scfm_circuits.interpretability.deck import FEATURE, SOURCES
from scfm_circuits.interpretability.ratings import ANSWERS, card_verdicts

POOLED = "all raters"
POWER = 0.8
"""Chance that a study shall have to find a difference."""


class Rated(NamedTuple):
    """What a study's ratings say.

    rates: `rate_table` below the paper's own rate. agreement: `agreement_table`. needed:
    `separation_table` of the paper's rate against a half, a fifth and this study's rates.
    yes, n: features called interpretable, of those rated. paper: the interval of the paper's rate.
    decoys: the rate of either kind of decoy, of those that were rated.
    """

    rates: pd.DataFrame
    agreement: pd.DataFrame
    needed: pd.DataFrame
    yes: int
    n: int
    paper: tuple[float, float]
    decoys: dict[str, float]


def rating_study(ratings: pd.DataFrame, table3: pd.DataFrame) -> Rated:
    """Rates with intervals, agreement, and how many cards would tell rates apart.

    ratings: from `read_ratings`. table3: the paper's, as printed.
    """
    rates = rate_table(ratings)
    pooled = rates[rates["rater"] == POOLED].set_index("source")
    theirs, cards = int((table3["gene_level_interpretable"] == "Yes").sum()), len(table3)
    interval = wilson_interval(theirs, cards)
    printed = pd.DataFrame([("the paper's features", "the paper", theirs, cards, theirs / cards,
                             *interval)], columns=rates.columns)
    needed = separation_table(theirs / cards, {"one half": 0.5, "one fifth": 0.2, **{
        f"this study's {source}": float(rate) for source, rate in pooled["rate"].items()}})
    own = pooled[["yes", "cards"]].astype(int).to_dict("index").get(FEATURE, {"yes": 0, "cards": 0})
    return Rated(pd.concat([printed, rates]) if len(rates) else printed, agreement_table(ratings),
                 needed, own["yes"], own["cards"], interval,
                 {str(source): float(rate) for source, rate in pooled["rate"].items()
                  if source != FEATURE})


def rate_table(ratings: pd.DataFrame) -> pd.DataFrame:
    """How often raters say Yes, by what the cards are: for each rater and for all together.

    Columns: source, rater, yes, cards, rate, lower_95, upper_95 (Wilson). For all raters together
    a card is Yes if more than half of its ratings are. Unsure counts as not Yes.
    """
    rows = []
    for source in SOURCES:
        part = ratings[ratings["source"] == source]
        verdicts = card_verdicts(part)
        counted = [(rater, int((one["interpretable"] == "Yes").sum()), len(one))
                   for rater, one in part.groupby("rater")]
        for rater, yes, n in [*counted, (POOLED, int(verdicts.sum()), len(verdicts))]:
            if n:
                rows.append((source, rater, yes, n, yes / n, *wilson_interval(yes, n)))
    return pd.DataFrame(rows, columns=["source", "rater", "yes", "cards", "rate", "lower_95",
                                       "upper_95"])


def agreement_table(ratings: pd.DataFrame) -> pd.DataFrame:
    """Agreement beyond chance: Cohen's kappa of every two raters, Fleiss' kappa of all.

    Columns: raters, statistic, cards (that they all rated), agreement (share of pairs of answers
    that are equal), kappa (nan if all answers are the same one, or no card was rated by all). All
    three answers count as categories. No rows for fewer than two raters.
    """
    wide = ratings.pivot(index="card", columns="rater", values="interpretable")
    rows = []
    for one, other in combinations(wide.columns, 2):
        both = wide[[one, other]].dropna()
        rows.append((f"{one}, {other}", "Cohen", len(both), *_cohen(both)))
    if wide.shape[1] >= 2:
        common = wide.dropna()
        rows.append((POOLED, "Fleiss", len(common), *_fleiss(common)))
    return pd.DataFrame(rows, columns=["raters", "statistic", "cards", "agreement", "kappa"])


def _cohen(both: pd.DataFrame) -> tuple[float, float]:
    if both.empty:
        return math.nan, math.nan
    one, other = (both.iloc[:, i].tolist() for i in (0, 1))
    same = float(np.mean([a == b for a, b in zip(one, other, strict=True)]))
    # With one answer alone chance agrees fully as well, and kappa is 0 / 0.
    if len({*one, *other}) < 2:
        return same, math.nan
    return same, float(cohen_kappa_score(one, other, labels=list(ANSWERS)))


def _fleiss(common: pd.DataFrame) -> tuple[float, float]:
    if common.empty:
        return math.nan, math.nan
    codes = np.array([[ANSWERS.index(answer) for answer in row] for row in common.to_numpy()])
    counts, _ = aggregate_raters(codes, n_cat=len(ANSWERS))
    n = codes.shape[1]
    same = float(((counts**2).sum(axis=1) - n).mean() / (n * (n - 1)))
    if len(np.unique(codes)) < 2:
        return same, math.nan
    return same, float(fleiss_kappa(counts, method="fleiss"))


def cards_to_separate(rate: float, other: float) -> int:
    """Cards of each of two kinds that a two-sided test at 5 % needs to tell their rates apart.

    With a power of `POWER`; normal approximation with Cohen's effect size h (statsmodels).

    Raises:
        InputError: rates that are equal or no shares.
    """
    if not (0 <= rate <= 1 and 0 <= other <= 1) or rate == other:
        raise InputError(f"No number of cards separates the rates {rate:g} and {other:g}; give two "
                         "different shares.")
    needed = NormalIndPower().solve_power(effect_size=abs(proportion_effectsize(rate, other)),
                                          power=POWER, alpha=0.05, alternative="two-sided")
    return max(2, math.ceil(float(needed)))


def separation_table(rate: float, others: dict[str, float]) -> pd.DataFrame:
    """`cards_to_separate` for a rate against several others by name.

    Columns: against, rate, other_rate, cards_of_each (missing where the rates are equal), power.
    """
    rows = [(name, rate, other, None if rate == other else cards_to_separate(rate, other), POWER)
            for name, other in others.items()]
    frame = pd.DataFrame(rows, columns=["against", "rate", "other_rate", "cards_of_each", "power"])
    return frame.astype({"cards_of_each": "Int64"})
