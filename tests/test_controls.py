"""Control lists keep what they are said to keep, and lose the rest."""

import numpy as np
import pytest
from helpers import model_for, tiny_corpus, tiny_profile, tiny_transcoders

from scfm_circuits.controls import (
    control_lists,
    enriched_share,
    exchange_tokens,
    untrained_statistics,
)
from scfm_circuits.enrichment import RULES, gene_sets_from_dict, ragged
from scfm_circuits.features import count_features


@pytest.fixture
def profile(monkeypatch, tmp_path):
    return tiny_profile(monkeypatch, tmp_path, live_cut_table4=-4.0, list_size=5)


@pytest.fixture(scope="module")
def parts():
    corpus = tiny_corpus(20)
    model = model_for(corpus).float()
    statistics = count_features(model, tiny_transcoders(model), corpus, 8, progress=False)
    return corpus, model, statistics


def test_control_lists_have_the_features_lengths_and_only_genes_of_the_corpus(parts, profile):
    corpus, model, statistics = parts
    untrained = untrained_statistics(model, statistics, corpus, profile, n_features=30)
    lists = control_lists(statistics, untrained, 0, corpus, profile, draws=3)
    own, used = lists["features"], set(corpus.gene[corpus.gene >= 0].tolist())
    for kind in ("uniform", "frequency-matched"):
        assert lists[kind].lengths.tolist() == own.lengths.tolist() * 3
    assert len(lists["token-preserving"].lengths) == 3 * len(own.lengths)
    for kind, one in lists.items():
        assert set(one.ids.tolist()) <= used, kind
        for start, end in zip(one.indptr[:-1], one.indptr[1:], strict=True):
            assert len(set(one.ids[start:end].tolist())) == end - start, kind


def test_the_same_seed_gives_the_same_controls(parts, profile):
    corpus, model, statistics = parts
    untrained = untrained_statistics(model, statistics, corpus, profile, n_features=10)
    first, second = (control_lists(statistics, untrained, 1, corpus, profile, draws=2)
                     for _ in range(2))
    for kind in first:
        assert np.array_equal(first[kind].ids, second[kind].ids)


def test_exchanged_tokens_keep_a_features_counts_and_move_them(parts):
    _, _, statistics = parts
    moved = exchange_tokens(statistics, 0, np.random.default_rng(0), n_bins=2)
    inside = statistics.pair_gene >= 0
    before = statistics.counts[0][:, np.flatnonzero(inside)]
    assert np.allclose(moved.counts[0].sum(axis=1), before.sum(axis=1))

    def per_token(counts, tokens):
        table = np.zeros((counts.shape[0], tokens.max() + 1))
        np.add.at(table.T, tokens, counts.toarray().T)
        return table[:, np.unique(tokens)]

    old = per_token(before, statistics.pair_token[inside])
    new = per_token(moved.counts[0], moved.pair_token)
    assert np.allclose(np.sort(old, axis=1), np.sort(new, axis=1))
    assert not np.allclose(old, new)


def test_an_untrained_encoder_fires_as_often_as_the_trained_features(parts, profile):
    corpus, model, statistics = parts
    untrained = untrained_statistics(model, statistics, corpus, profile, n_features=200)
    for layer in range(2):
        live = statistics.frequency[layer][statistics.live(-4.0)[layer]]
        assert np.median(untrained.frequency[layer]) == pytest.approx(np.median(live), abs=0.12)


def test_enriched_share_is_any_library(parts):
    corpus, _, _ = parts
    symbols = corpus.symbols
    first = gene_sets_from_dict("first", {"t": symbols[:4].tolist()})
    second = gene_sets_from_dict("second", {"t": symbols[4:8].tolist()})
    lists = ragged([[0, 1, 2, 3], [4, 5, 6, 7], [0, 4, 8, 9]])
    hits = enriched_share(lists, symbols, [first, second], RULES["corpus"], symbols.tolist(), 0.05)
    assert hits.tolist() == [True, True, False]
