"""One relabelling for all lists: what it keeps, how wide its bands are, what its p-values say."""


import numpy as np
import pytest
import scipy.sparse as sp
from helpers import MadeUp, tiny_profile

from scfm_circuits.enrichment.controls.joint_null import (
    ALL_LAYERS,
    JointNull,
    JointStudy,
    difference_table,
    joint_null,
    joint_study,
    joint_table,
    relabelling,
)
from scfm_circuits.enrichment.controls.layer_counts import get_controls
from scfm_circuits.enrichment.controls.tables import share_table
from scfm_circuits.enrichment.gene_sets import gene_sets_from_dict
from scfm_circuits.features.statistics import FeatureStatistics

N_GENES = 300


def corpus() -> MadeUp:
    gene = np.repeat(np.arange(N_GENES), 3)
    return MadeUp(np.array([f"G{i}" for i in range(N_GENES)]), gene, 0 * gene, gene >= 0)


def firing(lists: list[np.ndarray]) -> FeatureStatistics:
    """Features of one layer, each of which fires on the genes of a list."""
    rows = np.zeros((len(lists), N_GENES), np.int64)
    for row, genes in zip(rows, lists, strict=True):
        row[genes] = 100
    pair = np.arange(N_GENES)
    return FeatureStatistics(100_000, rows.sum(axis=1)[None], pair, pair.astype(np.int32),
                             np.full(N_GENES, 100), (sp.csr_matrix(rows),), np.zeros((1, 1)))


def library(rng: np.random.Generator, terms: int = 30, size: int = 20):
    return gene_sets_from_dict("l", {f"t{i}": [f"G{g}" for g in rng.permutation(N_GENES)[:size]]
                                     for i in range(terms)})


def genes_of(sets, term: int) -> np.ndarray:
    return np.array([int(gene[1:]) for gene in sets.term_members(term)])


@pytest.fixture
def profile(monkeypatch, tmp_path):
    return tiny_profile(monkeypatch, tmp_path, live_cut_table4=-4.0, list_size=20, null_draws=200,
                        fdr=0.2, list_rule="top")


def test_a_relabelling_exchanges_genes_of_like_frequency_and_no_others():
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 400, 1000)
    used = np.flatnonzero(cells)
    label = relabelling(cells, used, np.random.default_rng(1))
    assert sorted(label) == list(range(1000))
    assert (label[cells == 0] == np.flatnonzero(cells == 0)).all()
    # 50 bins of about 20 genes: exchanged genes are neighbours in frequency.
    assert np.abs(cells[label[used]] - cells[used]).max() <= 400 / 50 * 2
    assert (label[used] != used).mean() > 0.8
    again = relabelling(cells, used, np.random.default_rng(1))
    assert (label == again).all()


def test_lists_that_share_their_genes_have_a_wide_null(profile):
    """Thirty features with one list are called together or not at all; drawn one by one, each null
    list is called or not for itself, and the band is several times too narrow."""
    rng = np.random.default_rng(3)
    genes, sets = rng.permutation(N_GENES)[:20], [library(rng)]
    statistics = firing([genes] * 30)
    joint = joint_null({"features": statistics}, corpus(), profile, sets)
    of_layer = 100 * joint.null[:, 0, 0] / 30
    assert set(of_layer) == {0.0, 100.0}
    counted = get_controls(statistics, {}, corpus(), profile, sets)
    one_by_one = 100 * counted[0].null_called[1, 1] / 30
    assert of_layer.mean() == pytest.approx(one_by_one.mean(), abs=8)
    assert of_layer.std() > 3.5 * one_by_one.std() > 0
    table = joint_table(joint).set_index("layer")
    old = share_table(counted, [], profile).set_index(["rule", "lists"])
    old = old.loc[("corpus", "frequency-matched")]
    assert table.loc[0, "upper_95"] - table.loc[0, "lower_95"] > 2 * (
        old["upper_95"] - old["lower_95"])


def test_p_values_are_valid_where_nothing_is_associated(profile):
    """Lists that overlap heavily, and know nothing of the terms: p is uniform or larger."""
    few = profile.model_copy(update={"null_draws": 39})
    found = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        core = rng.permutation(N_GENES)[:40]
        lists = [rng.permutation(core)[:20] for _ in range(15)]
        joint = joint_null({"features": firing(lists)}, corpus(), few, [library(rng)])
        found.append(joint_table(joint)["p"][0])
    # 10 % of 60, and three standard errors.
    assert np.mean(np.array(found) <= 0.1) <= 0.1 + 3 * np.sqrt(0.09 / 60)
    assert len(set(found)) > 10


def test_features_made_of_terms_are_far_ahead(profile):
    rng = np.random.default_rng(5)
    sets = library(rng)
    of_terms = [genes_of(sets, term) for term in range(20)]
    random = [rng.permutation(N_GENES)[:20] for _ in range(20)]
    joint = joint_null({"features": firing(of_terms), "random": firing(random)}, corpus(), profile,
                       [sets])
    shares = joint_table(joint).set_index(["lists", "layer"])
    assert shares.loc[("features", 0), "percentage"] == 100
    assert shares.loc[("features", 0), "p"] == pytest.approx(1 / 201)
    assert shares.loc[("random", 0), "p"] > 0.05
    ahead = difference_table(joint).set_index(["lists", "layer"]).loc[("random", ALL_LAYERS)]
    assert ahead["difference"] > 60 and ahead["p"] == pytest.approx(1 / 201)
    assert ahead["lower_95"] < 0 < ahead["upper_95"]


def test_the_mean_over_layers_weighs_layers_alike_and_leaves_out_empty_ones():
    joint = JointNull(("features", "other"), np.array([[10, 100, 0], [50, 50, 0]]),
                      np.array([[5, 100, 0], [25, 50, 0]]), np.zeros((4, 2, 3), np.int64))
    shares = joint_table(joint).set_index(["lists", "layer"])
    assert shares.loc[("features", ALL_LAYERS), "percentage"] == 75
    assert np.isnan(shares.loc[("features", 2), ["percentage", "p"]].to_numpy(float)).all()
    differences = difference_table(joint).set_index(["lists", "layer"])
    assert differences.loc[("other", ALL_LAYERS), "difference"] == 0
    assert np.isnan(differences.loc[("other", 2), "p"])


def test_it_is_kept_and_made_anew_for_other_lists(profile, monkeypatch):
    rng = np.random.default_rng(6)
    lists, sets = [rng.permutation(N_GENES)[:20] for _ in range(5)], [library(rng)]
    first = joint_null({"features": firing(lists)}, corpus(), profile, sets)
    made = []
    monkeypatch.setattr("scfm_circuits.enrichment.controls.joint_null._relabelled",
                        lambda *parts: made.append(1) or first)
    again = joint_null({"features": firing(lists)}, corpus(), profile, sets)
    assert not made and (again.null == first.null).all() and again.kinds == first.kinds
    joint_null({"features": firing(lists[1:])}, corpus(), profile, sets)
    assert made


def test_a_study_of_both_gene_rules_reads_as_it_counts(profile):
    rng = np.random.default_rng(7)
    sets = [library(rng)]
    kinds = {name: firing([rng.permutation(N_GENES)[:20] for _ in range(8)]) for name in
             ("untrained encoder", "MLP neurons", "principal components")}
    of_terms = firing([genes_of(sets[0], term) for term in range(8)])
    study = joint_study(of_terms, kinds, corpus(), profile, sets)
    assert isinstance(study, JointStudy)
    assert set(study.shares["gene_rule"]) == {profile.gene_rule, "occurrence"}
    points, text = study.ahead("occurrence", "MLP neurons")
    assert f"{points:+.1f} points" in text and "relabelled" in text
    assert study.learning_shows("occurrence", 0.05)
    assert study.ahead("occurrence", "re-initialised model") == (None, "not tested")
    without = JointStudy(study.shares, study.differences[
        study.differences["lists"] != "MLP neurons"])
    assert not without.learning_shows("occurrence", 0.05)


def test_a_lead_that_relabelled_genes_exceed_shows_no_learning(profile):
    """Lists that are longer, say, are called more often whatever the genes are called: a lead far
    below what relabelling gives has a small p, and is no lead."""
    kinds = ("untrained encoder", "MLP neurons", "principal components")
    rng = np.random.default_rng(8)

    def study(lead: int, relabelled: int) -> JointStudy:
        tested = np.full((4, 1), 100)
        called = np.array([[50 + lead], [50], [50], [50]])
        null = np.broadcast_to(called, (200, 4, 1)).copy()
        null[:, 0, 0] = 50 + relabelled + rng.integers(-2, 3, 200)
        joint = JointNull(("features", *kinds), tested, called, null)
        return JointStudy(*(table(joint).assign(gene_rule="token")
                            for table in (joint_table, difference_table)))

    less = study(lead=5, relabelled=12)
    assert less.ahead("token", kinds[0])[0] == 5
    assert (less.differences["p"] < 0.05).all()
    assert not less.learning_shows("token", 0.05)
    assert study(lead=12, relabelled=5).learning_shows("token", 0.05)
    assert not study(lead=-5, relabelled=-12).learning_shows("token", 0.05)
