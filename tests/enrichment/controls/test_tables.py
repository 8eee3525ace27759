"""The tables say what was counted: against hand-made layers and independent formulas."""

import numpy as np
import pandas as pd
import pytest
from helpers import model_for, tiny_corpus, tiny_profile, tiny_transcoders
from scipy.stats import false_discovery_control
from statsmodels.stats.proportion import proportion_confint

from scfm_circuits.enrichment.controls.layer_counts import LayerControls
from scfm_circuits.enrichment.controls.tables import (
    detectable,
    pooled,
    share_table,
    single_controls,
    smallest_possible_p,
    table4,
    verdict_table,
)
from scfm_circuits.features.contexts import token_table, top_tokens
from scfm_circuits.features.statistics import count_features

BASELINES = ["untrained encoder", "re-initialised model"]


@pytest.fixture
def profile(monkeypatch, tmp_path):
    return tiny_profile(monkeypatch, tmp_path, enrichment_rule="enrichr")


def layer(seed: int, n: int, m: int = 30) -> LayerControls:
    """Random counts of n features: a third of them strong, the rules `enrichr` and `corpus`."""
    rng = np.random.default_rng(seed)
    strong = np.arange(n) % 3 == 0
    p = np.where(strong, 1e-9, rng.random(n))
    return LayerControls(
        np.arange(n) * 2, np.full(n, 50), np.array([rng.random(n) < 0.9, strong]),
        np.array([p / 2, p]), np.array([p, p * 2]), rng.integers(0, n + 1, (2, 3, 100)),
        np.where(strong, 1 / 1001, rng.random((3, n))),
        (rng.random((2, m)) < 0.5, rng.random((2, 0)) < 0.5),
        (rng.random(m), np.zeros(0)))


LAYERS = [layer(1, 60), layer(2, 90), layer(3, 0)]


def test_shares_have_wilson_intervals_and_bands_of_draws(profile):
    shares = share_table(LAYERS, BASELINES, profile).set_index(["rule", "lists", "layer"])
    assert len(shares) == 2 * 6 * 3
    row = shares.loc[("corpus", "features", 1)]
    assert (row["tested"], row["called"]) == (90, 30)
    low, high = proportion_confint(30, 90, method="wilson")
    assert (row["lower_95"], row["upper_95"]) == pytest.approx((100 * low, 100 * high))
    row = shares.loc[("enrichr", "token-preserving", 0)]
    draws = 100 * LAYERS[0].null_called[0, 2] / 60
    assert row["percentage"] == pytest.approx(draws.mean())
    assert (row["lower_95"], row["upper_95"]) == pytest.approx(
        tuple(np.percentile(draws, [2.5, 97.5])))
    assert np.isnan(shares.loc[("corpus", "features", 2), "percentage"])
    assert np.isnan(shares.loc[("corpus", "re-initialised model", 0), "percentage"])
    total = pooled(shares.reset_index()).set_index(["rule", "lists"])
    assert total.loc[("corpus", "features"), "percentage"] == pytest.approx(100 * 50 / 150)


def test_a_feature_has_to_beat_every_control(profile):
    verdicts = verdict_table(LAYERS, BASELINES, profile)
    assert len(verdicts) == 150
    columns = ["p_uniform", "p_frequency_matched", "p_token_preserving", "p_untrained_encoder"]
    called = verdicts["interpretable_corpus"].to_numpy(bool)
    assert verdicts["p_controls"].to_numpy() == pytest.approx(
        np.where(called, verdicts[columns].max(axis=1), 1.0))
    # A baseline without a live feature says nothing.
    assert verdicts["p_re_initialised_model"].isna().all()
    null = LAYERS[0].baseline_min_p[0]
    own = LAYERS[0].min_p[1, 7]
    assert verdicts.loc[7, "p_untrained_encoder"] == pytest.approx((1 + (null <= own).sum()) / 31)
    assert verdicts["q_controls"].to_numpy() == pytest.approx(
        false_discovery_control(verdicts["p_controls"]))
    beyond = verdicts["beyond_all_controls"]
    assert beyond.equals(verdicts["q_controls"] < profile.fdr)


def test_how_many_good_features_could_be_told_apart():
    verdicts = pd.DataFrame({"p_controls": np.linspace(0.01, 1, 200)})
    needed = detectable(verdicts, 0.001, 0.05)

    def beyond(k):
        q = false_discovery_control(np.concatenate([verdicts["p_controls"], [0.001] * k]))
        return q[-1] < 0.05

    assert beyond(needed) and not beyond(needed - 1)
    assert detectable(verdicts, 0.9, 0.05) is None


def test_table4_has_every_percentage_with_its_interval(profile):
    shares = share_table(LAYERS, BASELINES, profile)
    verdicts = verdict_table(LAYERS, BASELINES, profile)
    verdicts.loc[[0, 3, 70], "beyond_all_controls"] = True
    verdicts.loc[verdicts.index.difference([0, 3, 70]), "beyond_all_controls"] = False
    table = table4(shares, verdicts, profile)
    assert table.columns[:6].tolist() == ["rule", "gene_rule", "layer", "live", "interpretable",
                                          "percentage"]
    assert table["live"].tolist() == [60, 90, 0]
    assert table["beyond_all_controls"].tolist() == [2, 1, 0]
    assert table["percentage_beyond_all_controls"][0] == pytest.approx(200 / 60)
    assert table["interpretable_corpus"].tolist() == [20, 30, 0]
    for control in ("uniform", "frequency_matched", "token_preserving", "untrained_encoder",
                    "re_initialised_model"):
        for rule in ("enrichr", "corpus"):
            assert {f"{control}_{rule}{end}" for end in ("", "_lower_95", "_upper_95")} <= {*table}
    assert table["percentage"].equals(table["percentage_enrichr"])


def test_top_tokens_are_those_of_the_token_table():
    corpus = tiny_corpus(20)
    model = model_for(corpus).float()
    statistics = count_features(model, tiny_transcoders(model), corpus, 8, progress=False)
    features = np.flatnonzero(statistics.fired[0])[:6]
    for feature, text in zip(features, top_tokens(statistics, 0, features, corpus, 3), strict=True):
        table = token_table(statistics, 0, int(feature), corpus).head(3)
        assert text == ", ".join(f"{token} {100 * share:.0f} %" for token, share in
                                 zip(table["token"], table["share"], strict=True))


def test_the_largest_of_several_p_hides_how_each_control_does():
    # No better than any control: each p is uniform. Ahead of all three at once are one in 8,000.
    p = np.random.default_rng(0).random((3, 4_000))
    table = pd.DataFrame({"layer": 0, "p": 0.5, "p_uniform": p[0], "p_frequency_matched": p[1],
                          "p_controls": p.max(axis=0), "p_untrained_encoder": p[2]})
    table.loc[:9, "p_uniform"] = np.nan  # no control there
    found = single_controls(table, 0.05).set_index("control")
    assert found.index.tolist() == ["uniform", "frequency-matched", "untrained encoder",
                                    "all of them"]
    assert found["percentage"][:3].between(4, 6).all() and found["percentage"].iloc[3] < 0.2
    assert found.loc["uniform", "features"] == 3_990
    assert found.loc["uniform", "ahead"] == (p[0, 10:] < 0.05).sum()


def test_the_smallest_possible_p_is_that_of_the_layer_with_the_most_to_compare(profile):
    """Strong features are ahead of all there is, so they have the smallest p that is possible."""
    layers = [layer(1, 60, 30), layer(2, 90, 400), layer(3, 0, 5000)]
    smallest = smallest_possible_p(layers, BASELINES, 1000)
    assert smallest == verdict_table(layers, BASELINES, profile)["p_controls"].min() == 1 / 401
    # With enough of a baseline's features null lists decide.
    assert smallest_possible_p([layer(1, 60, 5000)], BASELINES, 1000) == 1 / 1001
