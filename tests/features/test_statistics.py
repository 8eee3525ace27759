"""Feature statistics against plain loops over cells, tokens and features."""

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from helpers import model_for, tiny_corpus, tiny_profile, tiny_transcoders
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.cells.tokens import token_texts
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.features import statistics as features_module
from scfm_circuits.features.contexts import draw_features, feature_contexts, token_table
from scfm_circuits.features.gene_lists import (
    containment,
    gene_lists,
    gene_scores,
    ranked_genes,
    select_genes,
)
from scfm_circuits.features.statistics import (
    FeatureStatistics,
    corpus_pairs,
    count_features,
    get_statistics,
)
from scfm_circuits.models.mlp_sites import mlp_sites
from scfm_circuits.transcoders.transcoder import Transcoders

N_FEATURES = 24


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return tiny_corpus()


@pytest.fixture(scope="module")
def model(corpus: Corpus) -> Any:
    return model_for(corpus, dtype=torch.float32)


@pytest.fixture(scope="module")
def transcoders(model: Any) -> Transcoders:
    t = tiny_transcoders(model, N_FEATURES)
    t.b_enc.sub_(4)  # so that some features are silent and most fire now and then
    t.b_enc[0, 0] = -1e6
    return t


@pytest.fixture(scope="module")
def z(model: Any, transcoders: Transcoders, corpus: Corpus) -> list[np.ndarray]:
    """Activations of each cell, (n_layers, length, n_features), one cell at a time, unpadded."""
    found = []
    for cell in range(len(corpus)):
        ids = torch.from_numpy(corpus.tokens[cell][corpus.mask[cell]])[None]
        x = mlp_sites(model, ids, torch.ones_like(ids, dtype=torch.bool)).inputs
        found.append(transcoders.encode(x).numpy())
    return found


@pytest.fixture(scope="module")
def statistics(model: Any, transcoders: Transcoders, corpus: Corpus) -> FeatureStatistics:
    return count_features(model, transcoders, corpus, 5, progress=False)


# --- counts --------------------------------------------------------------------------------------


def test_frequencies_counts_and_l0_equal_loops(statistics, corpus, z):
    fired: Counter = Counter()
    pairs: Counter = Counter()
    occurrences: Counter = Counter()
    l0 = [[], []]
    for cell, activations in enumerate(z):
        for place in range(activations.shape[1]):
            pair = int(corpus.tokens[cell, place]), int(corpus.gene[cell, place])
            occurrences[pair] += 1
            for layer in range(2):
                active = [f for f in range(N_FEATURES) if activations[layer, place, f] > 0]
                l0[layer].append(len(active))
                for f in active:
                    fired[layer, f] += 1
                    pairs[layer, f, pair] += 1
    assert statistics.n_tokens == len(l0[0]) == corpus.mask.sum()
    for layer in range(2):
        assert statistics.fired[layer].tolist() == [fired[layer, f] for f in range(N_FEATURES)]
        assert statistics.l0[layer] == pytest.approx(np.mean(l0[layer]))
        histogram = [l0[layer].count(k) for k in range(N_FEATURES + 1)]
        assert statistics.l0_histogram[layer].tolist() == histogram
    stored = list(zip(statistics.pair_token.tolist(), statistics.pair_gene.tolist(), strict=True))
    assert dict(zip(stored, statistics.pair_count.tolist(), strict=True)) == occurrences
    for layer in range(2):
        dense = statistics.counts[layer].toarray()
        for f in range(N_FEATURES):
            assert dense[f].tolist() == [pairs[layer, f, pair] for pair in stored]
    assert 0 < statistics.frequency.max() < 1 and statistics.fired[0, 0] == 0


def test_l0_quantiles_are_those_of_the_tokens(statistics, z):
    levels = (0.05, 0.25, 0.5, 0.9, 1.0)
    found = statistics.l0_quantiles(levels)
    for layer in range(2):
        l0 = np.concatenate([(one[layer] > 0).sum(axis=1) for one in z])
        expected = np.quantile(l0, levels, method="inverted_cdf")
        assert found[layer].tolist() == expected.tolist()


def test_pairs_lead_back_to_positions(corpus):
    tokens, genes, counts, index = corpus_pairs(corpus)
    assert (index[~corpus.mask] == -1).all()
    np.testing.assert_array_equal(tokens[index[corpus.mask]], corpus.tokens[corpus.mask])
    np.testing.assert_array_equal(genes[index[corpus.mask]], corpus.gene[corpus.mask])
    assert len(set(zip(tokens, genes, strict=True))) == len(tokens)
    assert counts.sum() == corpus.mask.sum()


def test_counts_do_not_depend_on_batches(model, transcoders, corpus, statistics):
    other = count_features(model, transcoders, corpus, 12, progress=False)
    assert (other.fired == statistics.fired).all()


def made_up(fired: list[int], n_tokens: int) -> FeatureStatistics:
    return FeatureStatistics(n_tokens, np.array([fired]), np.zeros(0, int), np.zeros(0, int),
                             np.zeros(0, int), (sp.csr_matrix((len(fired), 0)),),
                             np.zeros((1, len(fired) + 1), int))


def test_live_cuts_include_the_cut_itself():
    statistics = made_up([0, 1, 9, 10, 11, 99, 100, 100_000], 100_000)
    assert statistics.live(-4)[0].tolist() == [False] * 3 + [True] * 5
    assert statistics.live(-3)[0].tolist() == [False] * 6 + [True] * 2
    assert statistics.log10_frequency[0, [0, 3, 7]] == pytest.approx([-10, -4, 0], abs=1e-5)


def test_drawn_features_are_live_seeded_and_nested():
    statistics = made_up([0, 100, 0, 5, 100, 100, 100, 100, 0, 100], 1000)
    live = {1, 4, 5, 6, 7, 9}
    draws = [draw_features(statistics, 0, n, -2, seed=3).tolist() for n in (2, 4, 20)]
    assert [len(one) for one in draws] == [2, 4, 6] and set(draws[2]) == live
    assert set(draws[0]) < set(draws[1]) and all(one == sorted(one) for one in draws)
    assert draws[1] == draw_features(statistics, 0, 4, -2, seed=3).tolist()
    others = {tuple(draw_features(statistics, 0, 2, -2, seed)) for seed in range(20)}
    assert len(others) > 5


# --- genes ---------------------------------------------------------------------------------------


def scores_by_loops(corpus: Corpus, z: list[np.ndarray], layer: int, rule: str) -> np.ndarray:
    """(n_features, n_genes) by going through every token of every cell."""
    n_genes = len(corpus.symbols)
    inside = np.zeros((N_FEATURES, n_genes), int)
    on_token: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(N_FEATURES, int))
    tokens_of: dict[int, set[int]] = defaultdict(set)
    for cell, activations in enumerate(z):
        for place in range(activations.shape[1]):
            gene, token = int(corpus.gene[cell, place]), int(corpus.tokens[cell, place])
            if gene < 0:
                continue
            active = activations[layer, place] > 0
            inside[:, gene] += active
            on_token[token] += active
            tokens_of[gene].add(token)
    if rule == "occurrence":
        return inside
    total = np.zeros_like(inside)
    for gene, tokens in tokens_of.items():
        for token in tokens:
            total[:, gene] += on_token[token]
    return total


@pytest.mark.parametrize("rule", ["token", "occurrence"])
@pytest.mark.parametrize("layer", [0, 1])
def test_gene_rules_equal_loops(statistics, corpus, z, rule, layer):
    found = gene_scores(statistics, layer, len(corpus.symbols), rule).toarray()
    np.testing.assert_array_equal(found, scores_by_loops(corpus, z, layer, rule))
    assert found.any()


@pytest.mark.parametrize("rule", ["token", "occurrence"])
@pytest.mark.parametrize("score", ["rate", "z"])
def test_rates_and_excesses_equal_loops(statistics, corpus, z, rule, score, monkeypatch):
    monkeypatch.setattr("scfm_circuits.features.gene_lists.MIN_FIRINGS", 2)
    found = gene_scores(statistics, 1, len(corpus.symbols), rule, score=score).toarray()
    fired = scores_by_loops(corpus, z, 1, rule)
    # A feature that fires everywhere counts how often what it is counted on occurs.
    always = [np.ones_like(one) for one in z]
    occurs = scores_by_loops(corpus, always, 1, rule)[0]
    everywhere = scores_by_loops(corpus, always, 1, "occurrence")[0].sum()
    own = scores_by_loops(corpus, z, 1, "occurrence").sum(axis=1) / everywhere
    checked = 0
    for feature, gene in np.ndindex(*fired.shape):
        n, k, p = occurs[gene], fired[feature, gene], own[feature]
        if k < 2:
            expected = 0.0
        elif score == "rate":
            expected = k / n
        else:
            law = binom(n, p)
            expected = max(0.0, (k - law.mean()) / law.std()) if 0 < p < 1 else 0.0
            checked += expected > 0
        assert found[feature, gene] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert found.any() and (score == "rate" or checked > 20)


def test_a_rate_puts_a_rare_gene_first_that_a_count_puts_last():
    """Fires on half of a common gene's occurrences and on all of a rare one's."""
    statistics = FeatureStatistics(
        10_000, np.array([[510]]), np.array([0, 1]), np.array([0, 1], np.int32),
        np.array([1000, 10]), (sp.csr_matrix([[500, 10]]),), np.zeros((1, 1)))
    one = np.array([0])
    first = {score: ranked_genes(statistics, 0, one, 2, "occurrence", score=score)[0][0][0]
             for score in ("count", "rate", "z")}
    assert first == {"count": 0, "rate": 1, "z": 1}


def test_letters_hold_what_the_tokenizer_does_and_more(statistics, corpus, monkeypatch, tmp_path):
    profile = tiny_profile(monkeypatch, tmp_path, gene_rule="token", containment="letters")
    spelt = containment(statistics, corpus, profile).toarray()
    inside = statistics.pair_gene >= 0
    tokens = np.unique(statistics.pair_token[inside])
    texts = [text.removeprefix("_") for text in token_texts(corpus.tokenizer, tokens)]
    for row, text in zip(spelt, texts, strict=True):
        for gene in corpus.occurring:
            assert row[gene] == (text in corpus.symbols[gene])
    cut = gene_scores(statistics, 1, len(corpus.symbols), "token").toarray()
    by_letters = gene_scores(statistics, 1, len(corpus.symbols), "token",
                             contains=containment(statistics, corpus, profile)).toarray()
    assert (by_letters >= cut).all() and (by_letters > cut).any()
    other = profile.model_copy(update={"gene_rule": "occurrence"})
    assert containment(statistics, corpus, other) is None


def test_the_two_rules_differ_where_genes_share_tokens(statistics, corpus):
    own, shared = (gene_scores(statistics, 1, len(corpus.symbols), rule).toarray()
                   for rule in ("occurrence", "token"))
    assert (shared >= own).all() and (shared > own).any()


@pytest.mark.parametrize("rule", ["token", "occurrence"])
def test_rankings_are_in_order_of_score_then_own_activations_then_gene(statistics, corpus, z,
                                                                      rule):
    features = np.array([3, 11, 0, 7])
    scores = scores_by_loops(corpus, z, 1, rule)
    own = scores_by_loops(corpus, z, 1, "occurrence")
    ranked = ranked_genes(statistics, 1, features, len(corpus.symbols), rule)
    for feature, (genes, values) in zip(features, ranked, strict=True):
        expected = sorted(np.flatnonzero(scores[feature]).tolist(),
                          key=lambda g: (-scores[feature, g], -own[feature, g], g))
        assert genes.tolist() == expected
        assert values.tolist() == scores[feature, expected].tolist()
    for most in (1, 3, 10_000):
        heads = ranked_genes(statistics, 1, features, len(corpus.symbols), rule, most)
        for (genes, values), (head, first) in zip(ranked, heads, strict=True):
            assert len(head) >= min(most, len(genes))
            assert head.tolist() == genes[: len(head)].tolist()
            assert first.tolist() == values[: len(head)].tolist()


def test_rankings_do_not_depend_on_how_many_are_made_at_a_time(statistics, corpus, monkeypatch):
    features = np.arange(12)
    whole = ranked_genes(statistics, 0, features, len(corpus.symbols), "token")
    monkeypatch.setattr("scfm_circuits.features.gene_lists._FEATURES", 5)
    parts = ranked_genes(statistics, 0, features, len(corpus.symbols), "token")
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)


@given(scores=st.lists(st.integers(1, 9), min_size=1, max_size=12), size=st.integers(1, 15),
       share=st.floats(0.01, 0.99))
def test_list_rules(scores, size, share):
    values = np.sort(np.array(scores, float))[::-1]
    genes = np.arange(len(values)) + 100
    assert select_genes(genes, values, "all", size, share).tolist() == genes.tolist()
    assert select_genes(genes, values, "top", size, share).tolist() == genes[:size].tolist()
    chosen = select_genes(genes, values, "share", size, share)
    n = len(chosen)
    assert chosen.tolist() == genes[:n].tolist()
    # The shortest head that holds the share.
    tolerance = 1e-9 * values.sum()
    assert values[:n].sum() >= share * values.sum() - tolerance
    assert values[: n - 1].sum() <= share * values.sum() + tolerance


def test_an_empty_ranking_gives_an_empty_list():
    none = np.zeros(0)
    for rule in ("all", "top", "share"):
        assert len(select_genes(none, none, rule, 5, 0.5)) == 0


def test_gene_lists_follow_the_profile(statistics, corpus, monkeypatch, tmp_path):
    profile = tiny_profile(monkeypatch, tmp_path, list_rule="top", list_size=3,
                           gene_rule="occurrence")
    features = np.array([5, 0])
    ranked = ranked_genes(statistics, 1, features, len(corpus.symbols), "occurrence")
    expected = [[str(corpus.symbols[g]) for g in genes[:3]] for genes, _ in ranked]
    assert gene_lists(statistics, 1, features, corpus, profile) == expected
    silent = gene_lists(statistics, 0, np.array([0]), corpus, profile)
    assert silent == [[]]


def test_token_table_equals_loops(statistics, corpus, z):
    feature = int(statistics.fired[1].argmax())
    count: Counter = Counter()
    genes: dict[int, Counter] = defaultdict(Counter)
    for cell, activations in enumerate(z):
        for place in np.flatnonzero(activations[1, :, feature] > 0):
            token, gene = int(corpus.tokens[cell, place]), int(corpus.gene[cell, place])
            count[token] += 1
            if gene >= 0:
                genes[token][gene] += 1
    table = token_table(statistics, 1, feature, corpus)
    assert dict(zip(table["token_id"], table["count"], strict=True)) == count
    assert table["count"].is_monotonic_decreasing
    assert token_table(statistics, 1, feature, corpus, 2).equals(table.head(2))
    assert table["share"].sum() == pytest.approx(1)
    occurrences = Counter(corpus.tokens[corpus.mask].tolist())
    for line in table.itertuples():
        assert line.token == token_texts(corpus.tokenizer, [line.token_id])[0]
        assert line.rate == pytest.approx(count[line.token_id] / occurrences[line.token_id])
        order = sorted(genes[line.token_id].items(), key=lambda one: (-one[1], one[0]))
        assert line.genes == [corpus.symbols[g] for g, _ in order]


def test_token_table_of_a_silent_feature_is_empty(statistics, corpus):
    table = token_table(statistics, 0, 0, corpus)
    assert len(table) == 0
    assert list(table) == ["token", "token_id", "count", "share", "rate", "genes"]


# --- contexts ------------------------------------------------------------------------------------


def test_contexts_are_the_strongest_activations(corpus, statistics, z):
    live = np.flatnonzero(statistics.fired[1])
    chosen = live[np.argsort(statistics.fired[1, live], kind="stable")][:: len(live) // 3]
    assert len(chosen) >= 3
    found = feature_contexts(statistics, corpus, 1, chosen, 4, window=3)
    for feature, contexts in zip(chosen, found, strict=True):
        strongest = [one[1, :, feature].max() for one in z]
        order = np.argsort(strongest)[::-1]
        expected = [cell for cell in order if strongest[cell] > 0][:4]
        assert expected and len({one.cell for one in contexts}) == len(contexts) == len(expected)
        # By value, as cells that begin alike tie.
        assert [one.activation for one in contexts] == pytest.approx(
            [strongest[cell] for cell in expected], rel=1e-4)
        for one in contexts:
            assert one.activation == pytest.approx(strongest[one.cell], rel=1e-4)
            assert z[one.cell][1, one.position, feature] == pytest.approx(one.activation, rel=1e-4)
            pieces = corpus.pieces(one.cell)
            assert one.token == pieces[one.position]
            around = (pieces[max(0, one.position - 3) : one.position],
                      pieces[one.position + 1 : one.position + 4])
            assert (one.before, one.after) == ("".join(around[0]), "".join(around[1]))


def test_a_silent_feature_has_no_context(statistics, corpus):
    assert feature_contexts(statistics, corpus, 0, np.array([0]), 4) == [[]]


def test_more_contexts_than_were_kept_are_refused(statistics, corpus):
    assert len(feature_contexts(statistics, corpus, 1, np.arange(N_FEATURES), 5)) == N_FEATURES
    with pytest.raises(InputError, match=r"6 contexts .* 5 were kept.*contexts_per_feature"):
        feature_contexts(statistics, corpus, 1, np.array([0]), 6)


# --- the stored statistics -----------------------------------------------------------------------


def same(a: FeatureStatistics, b: FeatureStatistics) -> bool:
    plain = [key for key in vars(a) if key != "counts"]
    return (all(np.array_equal(getattr(a, key), getattr(b, key)) for key in plain)
            and all(x.shape == y.shape and (x != y).nnz == 0
                    for x, y in zip(a.counts, b.counts, strict=True)))


@pytest.fixture
def profile(monkeypatch, tmp_path):
    return tiny_profile(monkeypatch, tmp_path)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time features are counted."""
    calls: list[int] = []
    count = features_module.count_features

    def counting(*args: Any, **options: Any) -> FeatureStatistics:
        calls.append(1)
        return count(*args, **{**options, "progress": False})

    monkeypatch.setattr(features_module, "count_features", counting)
    return calls


def test_statistics_are_counted_once(model, transcoders, corpus, statistics, profile, counted):
    first = get_statistics(model, transcoders, corpus, profile)
    again = get_statistics(model, transcoders, corpus, profile)
    assert len(counted) == 1 and same(first, again) and same(first, statistics)
    get_statistics(model, transcoders, corpus, profile.model_copy(update={"fdr": 0.1}))
    assert len(counted) == 1
    get_statistics(model, transcoders, corpus, profile.model_copy(update={"l1_coefficient": 0.1}))
    assert len(counted) == 2


def test_genes_of_other_numbers_are_counted_again(model, transcoders, corpus, profile, counted):
    # A gene that no cell expresses moves all gene ids, while every token stays.
    get_statistics(model, transcoders, corpus, profile)
    moved = replace(corpus, symbols=np.append("A1BG", corpus.symbols),
                    gene=np.where(corpus.gene >= 0, corpus.gene + 1, -1).astype(np.int32))
    found = get_statistics(model, transcoders, moved, profile)
    assert len(counted) == 2 and found.pair_gene.max() == moved.gene.max()


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_a_truncated_store_is_counted_again(model, transcoders, corpus, statistics, profile,
                                            counted, share):
    get_statistics(model, transcoders, corpus, profile)
    path = profile.results / "features.npz"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert same(get_statistics(model, transcoders, corpus, profile), statistics)
    assert len(counted) == 2


@pytest.mark.parametrize("cells", [1, 5, 4096])
def test_pairs_are_those_of_all_tokens_at_once(monkeypatch, cells):
    corpus = tiny_corpus(12)
    monkeypatch.setattr(features_module, "_CELLS", cells)
    tokens, genes, counts, index = corpus_pairs(corpus)
    both = np.stack([corpus.tokens[corpus.mask], corpus.gene[corpus.mask]])
    unique, inverse, expected = np.unique(both, axis=1, return_inverse=True, return_counts=True)
    assert (np.stack([tokens, genes]) == unique).all() and (counts == expected).all()
    assert (index[corpus.mask] == inverse.ravel()).all() and (index[~corpus.mask] == -1).all()


def test_features_that_fire_mostly_outside_genes_by_counting():
    corpus = tiny_corpus(9)
    model = model_for(corpus)
    transcoders = tiny_transcoders(model)
    found = count_features(model, transcoders, corpus, 4, progress=False).mostly_outside_genes
    inside, fired = np.zeros(found.shape, int), np.zeros(found.shape, int)
    for cell in range(len(corpus)):
        tokens = corpus.tokens[cell][corpus.mask[cell]]
        active = freeze(model, transcoders, tokens).activations.numpy() > 0
        fired += active.sum(axis=1)
        inside += active[:, corpus.gene[cell][corpus.mask[cell]] >= 0].sum(axis=1)
    assert np.array_equal(found, 2 * inside < fired) and found.any() and not found.all()
