"""Planted features are what they are said to be, and the controls let them pass."""

import numpy as np
import pytest
from helpers import MadeUp, model_for, tiny_corpus, tiny_profile, tiny_transcoders

from scfm_circuits import InputError
from scfm_circuits.enrichment.controls import layer_counts, planted_features
from scfm_circuits.enrichment.controls.planted_features import planted_statistics
from scfm_circuits.enrichment.controls.tables import verdict_table
from scfm_circuits.enrichment.gene_sets import gene_sets_from_dict
from scfm_circuits.features.gene_lists import gene_lists
from scfm_circuits.features.statistics import FeatureStatistics, count_features


@pytest.fixture
def profile(monkeypatch, tmp_path):
    return tiny_profile(monkeypatch, tmp_path, live_cut_table4=-4.0, gene_rule="occurrence")


def test_a_planted_feature_lists_its_terms_genes(profile, monkeypatch):
    monkeypatch.setattr(planted_features, "MIN_GENES", 3)
    corpus = tiny_corpus(20)
    model = model_for(corpus).float()
    statistics = count_features(model, tiny_transcoders(model), corpus, 8, progress=False)
    used = corpus.symbols[np.unique(corpus.gene[corpus.gene >= 0])].tolist()
    library = gene_sets_from_dict("one", {"a": used[:4], "same": [s.lower() for s in used[:4]],
                                          "b": [*used[2:7], "ELSEWHERE"], "small": used[:2]})
    planted, table = planted_statistics(statistics, corpus, [library], profile)
    assert table["term"].tolist() == ["a", "b"] and table["n_genes"].tolist() == [4, 5]
    lists = gene_lists(planted, 1, np.array([0, 1]), corpus, profile)
    assert [sorted(one) for one in lists] == [sorted(used[:4]), sorted(used[2:7])]
    # It fires on every token of these genes: as often as they stand in the corpus.
    stands = np.isin(corpus.gene, [corpus.symbols.tolist().index(s) for s in used[:4]])
    assert planted.fired[0, 0] == (stands & corpus.mask).sum()
    # Diluted: as many other genes again, and the same terms.
    diluted, same = planted_statistics(statistics, corpus, [library], profile, purity=0.5)
    lists = gene_lists(diluted, 1, np.array([0]), corpus, profile)
    assert same.equals(table) and len(lists[0]) == 8 and set(used[:4]) < set(lists[0])
    monkeypatch.setattr(planted_features, "MIN_GENES", 30)
    nothing, empty = planted_statistics(statistics, corpus, [library], profile)
    assert empty.empty and nothing.counts[0].shape[0] == 0 and nothing.fired.shape == (2, 0)
    with pytest.raises(InputError, match="purity"):
        planted_statistics(statistics, corpus, [library], profile, purity=0)


def made_up(rng, n_genes, n_features):
    """A corpus of n genes of two tokens each, a family token shared by four, and one's own."""
    gene = np.repeat(np.arange(n_genes), 2)
    token = np.stack([n_genes + np.arange(n_genes) // 4, np.arange(n_genes)], axis=1).ravel()
    order = np.lexsort((gene, token))
    pair_count = np.repeat(rng.integers(50, 150, n_genes), 2)
    fires = np.zeros((n_features, n_genes * 2), np.int64)
    for row in fires:
        chosen = rng.permutation(n_genes * 2)[:30]
        row[chosen] = rng.integers(1, 50, 30)
    fired = fires.sum(axis=1)[None]
    return (gene[order].astype(np.int32), token[order], pair_count[order], fires, fired)


def test_the_controls_let_planted_features_pass_and_stop_random_ones(profile):
    """20 features that fire on a term's genes among 100 that fire at random on tokens."""
    rng = np.random.default_rng(0)
    n_genes, n_random = 400, 100
    gene, token, pair_count, fires, fired = made_up(rng, n_genes, n_random)
    symbols = np.array([f"G{i}" for i in range(n_genes)])
    terms = {f"T{i}": [f"G{j}" for j in rng.permutation(n_genes)[:15]] for i in range(200)}
    # Families are terms too: what the token-preserving control is there for.
    terms |= {f"F{i}": [f"G{j}" for j in range(4 * i, 4 * i + 4)] for i in range(n_genes // 4)}
    library = gene_sets_from_dict("made up", terms)

    stands = np.repeat(gene, 3)
    corpus = MadeUp(symbols, stands, 0 * stands, stands >= 0)
    at_random = FeatureStatistics(10_000, fired, token, gene, pair_count,
                                  (layer_counts.sp.csr_matrix(fires),), np.zeros((1, 1)))
    planted, table = planted_statistics(at_random, corpus, [library], profile, n=20)
    together = FeatureStatistics(
        10_000, np.concatenate([planted.fired, fired], axis=1), token, gene, pair_count,
        (layer_counts.sp.vstack([planted.counts[0], at_random.counts[0]]).tocsr(),),
        np.zeros((1, 1)))
    used = profile.model_copy(update={"null_draws": 400, "list_size": 20})
    one = layer_counts.layer_controls(together, {}, 0, corpus, used,
                                  layer_counts.testers([library], corpus, used))
    verdicts = verdict_table([one], [], used)
    assert len(table) == 20 and verdicts["beyond_all_controls"][:20].mean() > 0.9
    assert verdicts["beyond_all_controls"][20:].mean() < 0.05
    assert (verdicts["p_token_preserving"][20:] < 0.05).mean() < 0.15
