"""Rates, agreement and sample sizes, against worked examples from the literature."""

import math

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.proportion import proportion_confint

from scfm_circuits import InputError
from scfm_circuits.interpretability.agreement import (
    POOLED,
    agreement_table,
    cards_to_separate,
    rate_table,
    rating_study,
    separation_table,
)


def ratings(answers: dict[str, str], source: str = "feature") -> pd.DataFrame:
    """One letter per card and rater: y, n, u, or a space for none."""
    spelled = {"y": "Yes", "n": "No", "u": "Unsure"}
    return pd.DataFrame([(f"c{i:02d}", source, rater, spelled[letter]) for rater, row in
                         answers.items() for i, letter in enumerate(row) if letter != " "],
                        columns=["card", "source", "rater", "interpretable"])


def test_rates_by_source_and_rater():
    table = pd.concat([ratings({"ann": "yyyn", "bob": "yynn", "cy": "ynyu"}),
                       ratings({"ann": "yn", "bob": "n "}, "random tokens").assign(
                           card=lambda frame: "d" + frame["card"])])
    rates = rate_table(table).set_index(["source", "rater"])
    assert rates["yes"].to_dict() == {
        ("feature", "ann"): 3, ("feature", "bob"): 2, ("feature", "cy"): 2, ("feature", POOLED): 3,
        ("random tokens", "ann"): 1, ("random tokens", "bob"): 0, ("random tokens", POOLED): 0}
    assert rates.loc[("random tokens", POOLED), "cards"] == 2
    for row in rates.itertuples():
        low, high = proportion_confint(row.yes, row.cards, method="wilson")
        assert (row.lower_95, row.upper_95) == pytest.approx((low, high))


def test_the_papers_interval():
    row = rate_table(ratings({"p": "y" * 7 + "n" * 13})).iloc[0]
    assert (round(row["lower_95"], 2), round(row["upper_95"], 2)) == (0.18, 0.57)


def test_nobody_has_rated():
    none = ratings({})
    assert rate_table(none).empty
    assert agreement_table(none).empty
    assert agreement_table(ratings({"ann": "yyn"})).empty


def test_cohens_kappa_of_a_textbook_table():
    # 50 grant proposals: both Yes 20, only A 5, only B 10, both No 15 (agreement 0.7, kappa 0.4).
    table = agreement_table(ratings({"a": "y" * 25 + "n" * 25,
                                     "b": "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15}))
    row = table[table["statistic"] == "Cohen"].iloc[0]
    assert (row["cards"], row["agreement"], row["kappa"]) == (50, pytest.approx(0.7),
                                                             pytest.approx(0.4))


def test_fleiss_kappa_of_a_worked_example():
    # Three raters, four cards; of their pairs agree: all, one of three, none, all.
    # Of the 12 answers 6 are Yes, 5 No and 1 Unsure.
    table = agreement_table(ratings({"a": "yynn", "b": "yyun", "c": "ynyn"}))
    fleiss = table[table["statistic"] == "Fleiss"].iloc[0]
    agreement = np.mean([1, 1 / 3, 0, 1])
    chance = (6**2 + 5**2 + 1**2) / 144
    assert fleiss["agreement"] == pytest.approx(agreement)
    assert fleiss["kappa"] == pytest.approx((agreement - chance) / (1 - chance))
    assert fleiss["cards"] == 4
    assert table["raters"].tolist() == ["a, b", "a, c", "b, c", POOLED]


def test_agreement_counts_cards_that_all_rated():
    table = agreement_table(ratings({"a": "yynn  ", "b": "yynn  ", "c": "y   ny"}))
    assert table["cards"].tolist() == [4, 1, 1, 1]
    assert table["kappa"].tolist()[0] == 1
    none = agreement_table(ratings({"a": "yy  ", "b": "  nn"}))
    assert none["cards"].tolist() == [0, 0]
    assert none["kappa"].isna().all()
    same = agreement_table(ratings({"a": "yyy", "b": "yyy"}))
    assert same["agreement"].tolist() == [1, 1]
    assert same["kappa"].isna().all()


@pytest.mark.parametrize(("rate", "other"), [(0.35, 0.5), (0.35, 0.05), (0.2, 0.9), (0.0, 0.3)])
def test_sample_sizes_follow_cohens_formula(rate, other):
    # Cohen (1988), two samples of n: n = 2 ((z_0.975 + z_0.8) / h)^2, where
    # h = 2 asin sqrt(p) - 2 asin sqrt(q).
    h = 2 * math.asin(math.sqrt(rate)) - 2 * math.asin(math.sqrt(other))
    wanted = max(2, math.ceil(2 * ((1.959964 + 0.841621) / h) ** 2))
    assert cards_to_separate(rate, other) == wanted == cards_to_separate(other, rate)


def test_simulated_studies_of_that_size_have_the_power():
    n = cards_to_separate(0.35, 0.5)
    rng = np.random.default_rng(0)
    one, other = rng.binomial(n, (0.35, 0.5), (20000, 2)).T / n
    pooled = (one + other) / 2
    z = np.abs(one - other) / np.sqrt(2 * pooled * (1 - pooled) / n)
    assert (z > 1.96).mean() == pytest.approx(0.8, abs=0.02)


def test_rates_that_cannot_be_separated():
    table = separation_table(0.35, {"half": 0.5, "same": 0.35})
    assert table["cards_of_each"].isna().tolist() == [False, True]
    for pair in ((0.35, 0.35), (0.2, 1.2), (math.nan, 0.5)):
        with pytest.raises(InputError, match="separates"):
            cards_to_separate(*pair)


def test_a_studys_ratings_stand_below_the_papers_own():
    table3 = pd.DataFrame({"gene_level_interpretable": ["Yes"] * 7 + ["No"] * 13})
    nobody = rating_study(ratings({}), table3)
    assert nobody.rates["rate"].tolist() == [0.35] and (nobody.yes, nobody.n) == (0, 0)
    assert nobody.decoys == {} and nobody.agreement.empty
    assert nobody.needed["against"].tolist() == ["one half", "one fifth"]
    answers = pd.concat([ratings({"ann": "yyn", "bob": "yny"}),
                         ratings({"ann": "yn"}, "random tokens").assign(
                             card=lambda frame: "d" + frame["card"])])
    rated = rating_study(answers, table3)
    assert (rated.yes, rated.n) == (1, 3) and rated.decoys == {"random tokens": 0.5}
    assert rated.rates["source"].tolist() == ["the paper's features", *["feature"] * 3,
                                              *["random tokens"] * 2]
    assert rated.paper == pytest.approx(proportion_confint(7, 20, method="wilson"))
    assert rated.needed.set_index("against")["other_rate"].to_dict() == {
        "one half": 0.5, "one fifth": 0.2, "this study's feature": pytest.approx(1 / 3),
        "this study's random tokens": 0.5}
    assert rated.agreement["statistic"].tolist() == ["Cohen", "Fleiss"]
