"""The studies of Table 4's chapter say what their parts say, one by one."""


import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import MadeUp, tiny_corpus, tiny_profile

from scfm_circuits.enrichment.controls import studies
from scfm_circuits.enrichment.gene_sets import gene_sets_from_dict
from scfm_circuits.enrichment.over_representation import over_representation
from scfm_circuits.enrichment.prerank import prerank_study
from scfm_circuits.enrichment.rules import RULES
from scfm_circuits.enrichment.terms import term_table
from scfm_circuits.features.gene_lists import gene_lists
from scfm_circuits.features.statistics import FeatureStatistics


@pytest.fixture
def profile(monkeypatch, tmp_path):
    return tiny_profile(monkeypatch, tmp_path, live_cut_table4=-4.0, list_size=10, null_draws=19,
                        fdr=0.3, list_rule="top")


def made_up(rows: np.ndarray) -> tuple[MadeUp, FeatureStatistics]:
    """Features (n, 300) that fire so often on each gene's token, in one layer."""
    pair = np.arange(300)
    gene = np.repeat(pair, 3)
    corpus = MadeUp(np.array([f"G{i}" for i in pair]), gene, 0 * gene, gene >= 0)
    return corpus, FeatureStatistics(
        10_000, rows.sum(axis=1)[None], pair, pair.astype(np.int32),
        np.full(300, 100), (sp.csr_matrix(rows),), np.zeros((1, 1)))


def study_of(parts, profile):
    corpus, statistics, other, libraries = parts
    return studies.table4_study(statistics, {"untrained encoder": other}, corpus, profile,
                                libraries)


# --- Table 4 -------------------------------------------------------------------------------------


def test_table4_and_every_choice_count_the_same_features(parts, profile):
    corpus, statistics, other, libraries = parts
    study = study_of(parts, profile)
    live = statistics.live(profile.live_cut_table4)
    assert study.table["live"].tolist() == live.sum(axis=1).tolist()
    assert len(study.verdicts) == live.sum() and study.band_draws == 19
    # 19 null lists of each kind; the fewest features of the baseline in a layer may be fewer.
    fewest = min(one.baseline_min_p[0].size for one in study.counted)
    assert study.smallest_possible_p == max(1 / 20, 1 / (1 + fewest))
    kinds = {"features": statistics, "untrained encoder": other}
    choices = studies.choices(kinds, corpus, profile, libraries).set_index("choice")
    called = study.table["interpretable"].sum()
    # The profile's own choice is among those tried, once as a list and once as a background.
    for label in ("list: top 10", "background 20000, BH over hit terms"):
        assert choices.loc[label, "hits"] == called, label
    assert (choices["live"] == live.sum()).all()
    corpus_rule = study.shares[(study.shares["rule"] == "corpus")
                               & (study.shares["lists"] == "features")]["called"].sum()
    assert choices.loc["background corpus genes, BH over all terms", "hits"] == corpus_rule
    hits = 0
    for layer in range(len(live)):
        given = gene_lists(statistics, layer, np.flatnonzero(live[layer]), corpus,
                           studies.by_occurrence(profile))
        hits += np.any([over_representation(given, one, background=20_000, family="hit",
                                            alpha=profile.fdr).n_significant > 0
                        for one in libraries], axis=0).sum()
    assert choices.loc["gene rule: occurrence", "hits"] == hits
    assert {"genes ranked by rate, gene rule: token", "gene rule: token, by letters"} <= {
        *choices.index}
    # A kind that is the trained features again scores the same, under every choice.
    twice = studies.choices({"features": statistics, "again": statistics}, corpus, profile,
                            libraries)
    assert twice["again"].to_numpy() == pytest.approx(twice["percentage"].to_numpy())
    lists_change = choices.index.str.startswith(("list:", "gene"))
    assert choices.loc[lists_change, "token-preserving"].between(0, 100).all()
    assert choices.loc[~lists_change, "token-preserving"].isna().all()


def test_all_layers_together_by_hand():
    shares = pd.DataFrame(
        [("r", kind, layer, 10, called, 10.0 * called) for kind, counts in
         {"features": (8, 6), "uniform": (1, 1), "untrained encoder": (9, 7)}.items()
         for layer, called in enumerate(counts)],
        columns=["rule", "lists", "layer", "tested", "called", "percentage"])
    found = studies.together(shares)
    assert found.percentages["r"].to_dict() == {
        "features": 70, "uniform": 10, "untrained encoder": 80}
    assert found.highest["r"] == "untrained encoder" and found.lead["r"] == -10


def test_a_layer_stands_beside_the_papers_at_the_same_depth():
    ours = pd.DataFrame({"layer": [0, 1, 2], "live": 5, "interpretable": 2, "percentage": 40.0})
    printed = pd.DataFrame({"layer": range(24), "total": range(100, 124), "interpretable": 50,
                            "percentage": 80.0})
    beside = studies.beside_paper(ours, printed)
    assert beside["paper: layer"].tolist() == [0, 12, 23]
    assert beside["paper: live"].tolist() == [100, 112, 123]


# --- the test itself -----------------------------------------------------------------------------


def test_random_lists_are_called_no_more_often_than_the_level(profile):
    rng = np.random.default_rng(0)
    corpus, _ = made_up(np.zeros((1, 300), np.int64))
    library = gene_sets_from_dict("l", {f"t{i}": corpus.symbols[rng.permutation(300)[:20]].tolist()
                                        for i in range(40)})
    strict = profile.model_copy(update={"fdr": 0.05})
    table = studies.nominal_level([library], corpus, strict, draws=400)
    assert table["genes"].tolist() == [10, 30, 100] * 2 and (table["lists"] == 400).all()
    by_rule = table.groupby("rule")["percentage"].max()
    assert by_rule["corpus"] < 9 and (table["percentage"] == table["called"] / 4).all()
    assert (table["percentage"].between(table["lower_95"] - 1e-9, table["upper_95"] + 1e-9)).all()
    few = tiny_corpus(12)  # 16 genes: no list of 10 is half of them
    assert studies.nominal_level(
        [gene_sets_from_dict("l", {"t": few.symbols[:4].tolist()})], few, strict).empty


# --- would a good feature pass? ------------------------------------------------------------------


def test_planted_features_pass_and_are_counted(profile):
    rng = np.random.default_rng(1)
    random = np.zeros((40, 300), np.int64)
    for row in random:
        row[rng.permutation(300)[:15]] = 40
    corpus, statistics = made_up(random)
    library = gene_sets_from_dict("l", {f"t{i}": corpus.symbols[15 * i:15 * (i + 1)].tolist()
                                        for i in range(12)})
    strict = profile.model_copy(update={"fdr": 0.05, "null_draws": 100, "human_layer": 0})
    asked = (statistics, {"nothing learnt": statistics}, corpus, strict, [library])
    study = studies.table4_study(*asked)
    found = studies.planted_passing(*asked, study.verdicts)
    assert found.tested and found.median_genes == 15
    assert found.planted == {"token": 12, "occurrence": 12}
    assert found.ahead["occurrence"] == 12  # 15 of 15 genes: no random list comes near
    assert found.table["planted"].tolist() == [12] * 6
    assert found.table["% ahead of all controls"].iloc[3] == 100
    assert found.needed is not None and found.needed >= 1
    large = gene_sets_from_dict("l", {"all": corpus.symbols.tolist()})
    nothing = studies.planted_passing(*asked[:4], [large], study.verdicts)
    assert nothing.table.empty and nothing.ahead == {} and nothing.needed is None
    assert not nothing.tested


# --- feature by feature --------------------------------------------------------------------------


def test_demands_only_take_away():
    n = 8
    verdicts = pd.DataFrame({
        "layer": [0] * 4 + [2] * 4, "interpretable_enrichr": [True] * 6 + [False] * 2,
        "interpretable_corpus": [True] * 4 + [False] * 4, "p_uniform": [0.01] * n,
        "p_frequency_matched": [0.01, 0.5] * 4, "p_token_preserving": [0.01] * n,
        "p_controls": [0.01, 0.01, 0.5, 0.5] * 2, "beyond_all_controls": [True] * n})
    left = np.array(list(studies.demands(verdicts, 3, 0.05).values()))
    assert left[:, 0].tolist() == [100, 100, 50, 25, 25]
    assert left[:, 2].tolist() == [50, 0, 0, 0, 0]
    assert np.isnan(left[:, 1]).all()  # no live feature there


def test_every_feature_has_its_best_term(parts, profile):
    corpus, statistics, _, libraries = parts
    found = studies.feature_tables(study_of(parts, profile), statistics, corpus, profile, libraries)
    live = statistics.live(profile.live_cut_table4)
    assert len(found.features) == live.sum()
    assert found.features["p_controls"].is_monotonic_increasing
    symbols, rule = corpus.occurring_symbols, RULES["corpus"]
    for row in found.features[:10].itertuples():
        tables = [term_table(row.genes.split(), one, background=rule.background_for(symbols),
                             family=rule.family, odds=rule.odds) for one in libraries]
        best = pd.concat([one.head(1) for one in tables]).sort_values("P-value", kind="stable")
        assert row.Term == best["Term"].iloc[0] and row.Overlap == best["Overlap"].iloc[0]
    page = found.page()
    assert {"best_term", "overlap", "q_controls"} <= set(page) and page.columns.is_unique
    assert len(page.columns) == len(found.features.columns) - sum(
        name.startswith("interpretable_") for name in found.features)


# --- GSEA proper ---------------------------------------------------------------------------------


def test_prerank_finds_the_feature_of_a_term_and_not_its_shuffled_names(profile):
    rows = np.zeros((3, 300), np.int64)
    rows[0, 40:80], rows[1, 200:240] = np.arange(60, 20, -1), np.arange(60, 20, -1)
    corpus, statistics = made_up(rows)  # the third fires on no gene: it ranks nothing
    libraries = [gene_sets_from_dict("l", {"on": corpus.symbols[40:80].tolist(),
                                           "both": corpus.symbols[[*range(200, 240)]].tolist()})]
    asked = profile.model_copy(update={"human_layer": 0, "human_features": 3, "live_cut": -5.0,
                                       "prerank_features": 3, "fdr": 0.05})
    found = prerank_study(statistics, corpus, asked, libraries)
    assert (found.n, found.called, found.shuffled) == (2, 2, 0)
    assert found.best["feature"].tolist() == ["0", "0, names shuffled", "1", "1, names shuffled"]
    assert found.best["best term"].tolist()[::2] == ["on", "both"]
    assert (found.best["terms tested"] == 2).all() and len(found.terms) == 8
