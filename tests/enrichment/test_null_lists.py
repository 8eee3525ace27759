"""Null lists hold fixed what they say, and the statistics around them."""


import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, false_discovery_control

from scfm_circuits import InputError
from scfm_circuits.enrichment.null_lists import (
    SCORES,
    Ragged,
    TokenCounts,
    TokenFamilies,
    frequency_matched_null,
    own_kept,
    ragged,
    token_families,
    token_preserving_null,
    uniform_null,
)
from scfm_circuits.enrichment.significance import benjamini_hochberg, empirical_p
from scfm_circuits.features.gene_lists import MIN_FIRINGS, rescored


def parts(lists: Ragged) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(lists.ids, lists.indptr[1:-1])]


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(12, 40), st.integers(0, 9)
)
@settings(max_examples=50, deadline=None)
def test_uniform_null_keeps_lengths_and_never_repeats(
    lengths: list[int], genes: int, seed: int
) -> None:
    null = uniform_null(lengths, genes, np.random.default_rng(seed))
    assert null.lengths.tolist() == lengths
    for ids in parts(null):
        assert len(set(ids)) == len(ids) and all(0 <= i < genes for i in ids)
    again = uniform_null(lengths, genes, np.random.default_rng(seed))
    assert again.ids.tolist() == null.ids.tolist()


def test_uniform_null_is_uniform() -> None:
    null = uniform_null(np.full(4000, 5), 20, np.random.default_rng(1))
    counts = np.bincount(null.ids, minlength=20)
    assert chisquare(counts).pvalue > 1e-4
    # Position in the list tells nothing either: the first gene is uniform, too.
    assert chisquare(np.bincount(null.ids[::5], minlength=20)).pvalue > 1e-4


def test_uniform_null_cannot_draw_more_than_there_is() -> None:
    assert sorted(uniform_null([7], 7, np.random.default_rng(0)).ids.tolist()) == list(range(7))
    with pytest.raises(InputError, match="8 distinct genes from 7"):
        uniform_null([8], 7, np.random.default_rng(0))


def test_frequency_matched_null_stays_in_the_bin() -> None:
    frequency = np.arange(100.0)
    lists = ragged([[3, 95, 97], [50], list(range(90, 100)), []])
    null = frequency_matched_null(lists, frequency, 10, np.random.default_rng(2))
    assert [sorted(i // 10 for i in ids) for ids in parts(null)] == [[0, 9, 9], [5], [9] * 10, []]
    # A list that fills its bin must come back as it was; others must move.
    assert sorted(parts(null)[2]) == list(range(90, 100))
    many = frequency_matched_null(
        ragged([[50]] * 4000), frequency, 10, np.random.default_rng(3)
    ).ids
    assert chisquare(np.bincount(many - 50, minlength=10)).pvalue > 1e-4


def test_a_matched_list_holds_as_many_of_the_own_genes_as_draws_do() -> None:
    rng = np.random.default_rng(4)
    frequency = rng.permutation(60) // 2
    lists = ragged([rng.permutation(60)[:size] for size in (1, 7, 30, 60)] + [[]])
    draws = 4000
    for n_bins in (1, 5):
        null = frequency_matched_null(lists, frequency, n_bins, rng, draws)
        kept = own_kept(lists, frequency, n_bins)
        assert np.isnan(kept[4]) and kept[3] == pytest.approx(1)
        for i in range(4):
            own = set(lists.ids[lists.indptr[i] : lists.indptr[i + 1]])
            held = [len(own & {*null.ids[null.indptr[j] : null.indptr[j + 1]]}) / len(own)
                    for j in range(i, draws * 5, 5)]
            assert np.mean(held) == pytest.approx(kept[i], abs=0.03)
    assert own_kept(lists, frequency, 1)[1] == pytest.approx(7 / 60)


def test_frequency_ties_share_a_bin() -> None:
    frequency = np.array([0.0] * 50 + [1.0] * 5)
    null = frequency_matched_null(
        ragged([[0, 1, 2]] * 300), frequency, 20, np.random.default_rng(4)
    )
    assert set(null.ids.tolist()) == set(range(50))


@pytest.mark.parametrize(
    ("lists", "message"),
    [([[0, 3]], "outside 0..2"), ([[-1]], "outside 0..2"), ([[1, 1]], "same gene twice")],
)
def test_frequency_matched_null_refuses(lists: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        frequency_matched_null(ragged(lists), [1, 2, 3], 2, np.random.default_rng(0))
    with pytest.raises(InputError, match="number of bins is 0"):
        frequency_matched_null(ragged([[0]]), [1, 2, 3], 0, np.random.default_rng(0))


def families_of(sizes: list[int], frequency: list[float], n_bins: int = 2) -> TokenFamilies:
    """Token t stands for `sizes[t]` genes of its own and occurs `frequency[t]` times in each."""
    token = np.repeat(np.arange(len(sizes)), sizes)
    per_gene = np.repeat(np.asarray(frequency) / np.asarray(sizes), sizes)
    return token_families(token, np.arange(token.size), per_gene, n_bins)


def one_feature(tokens: list[int], counts: list[float], copies: int = 1) -> TokenCounts:
    indptr = np.arange(copies + 1) * len(tokens)
    return TokenCounts(indptr, np.tile(tokens, copies), np.tile(counts, copies).astype(float))


def test_token_null_matches_frequency_and_family_size() -> None:
    # Four kinds of token: rare or frequent, small or large family; 10 of each.
    sizes = [2, 8] * 20
    frequency = [16.0] * 20 + [160.0] * 20
    families = families_of(sizes, frequency)
    owner = np.repeat(np.arange(40), sizes)
    null = token_preserving_null(
        one_feature([0, 2, 21], [5, 3, 9], 200), families, [40] * 200, np.random.default_rng(5),
        n_genes=owner.size,
    )
    assert null.lengths.tolist() == [2 + 2 + 8] * 200
    drawn = np.array([[owner[i] for i in ids] for ids in parts(null)])
    tokens = [np.unique(row) for row in drawn]
    assert all(len(t) == 3 for t in tokens)
    for t in tokens:
        assert [(frequency[i], sizes[i]) for i in t] == [(16.0, 2), (16.0, 2), (160.0, 8)]
    assert len({tuple(t) for t in tokens}) > 100


@given(st.integers(0, 10_000), st.integers(0, 9), st.booleans(), st.sampled_from(SCORES))
@settings(max_examples=120, deadline=None)
def test_a_token_null_is_the_list_of_a_feature_that_fires_on_the_drawn_tokens(
    seed: int, length: int, by_token: bool, score: str
) -> None:
    """With every token alone in its cell nothing can move, so the null is the feature's own list:
    scored with a dense matrix, ranked by sorting, cut at the feature's length."""
    rng = np.random.default_rng(seed)
    n_tokens, n_genes = int(rng.integers(2, 8)), int(rng.integers(2, 12))
    holds = rng.random((n_tokens, n_genes)) < 0.5
    holds[np.arange(n_tokens), rng.integers(0, n_genes, n_tokens)] = True
    token, gene = np.nonzero(holds)
    pair_count = rng.integers(1, 50, token.size)
    families = token_families(token, gene, pair_count)._replace(cell=np.arange(n_tokens))
    own = np.flatnonzero(rng.random(n_tokens) < 0.7)
    counts = rng.integers(1, 100, own.size)
    null = token_preserving_null(
        TokenCounts(np.array([0, own.size]), own, counts.astype(float)), families, [length], rng,
        n_genes=n_genes, by_token=by_token, score=score, least=MIN_FIRINGS)

    occurs = np.zeros((n_tokens, n_genes))
    occurs[token, gene] = pair_count
    inside = counts @ (occurs / occurs.sum(axis=1, keepdims=True))[own]
    whole = counts @ holds[own] if by_token else inside
    if score != "count":
        times = occurs.sum(axis=1) @ holds if by_token else occurs.sum(axis=0)
        found = np.zeros(n_genes)
        some = times > 0
        found[some] = rescored(whole[some], times[some], np.full(
            some.sum(), counts.sum() / occurs.sum()), score)
        expected = np.argsort(-found, kind="stable")[: min(length, int((found > 0).sum()))]
        assert np.sort(found[null.ids]) == pytest.approx(np.sort(found[expected]))
        return
    order = np.lexsort((-inside, -whole))
    expected = order[inside[order] > 0][:length]
    # Full ties may fall either way: the same scores must be on the list, not the same genes.
    for scores in (whole, inside):
        assert np.sort(scores[null.ids]) == pytest.approx(np.sort(scores[expected]))
    assert len(set(null.ids.tolist())) == null.ids.size


def test_nulls_of_several_draws_are_blocks_of_lists() -> None:
    lists = ragged([[0, 1, 2], [3]])
    for null in (
        uniform_null(lists.lengths, 9, np.random.default_rng(0), draws=4),
        frequency_matched_null(lists, np.ones(9), 2, np.random.default_rng(0), draws=4),
    ):
        assert null.lengths.tolist() == [3, 1] * 4
    families = families_of([1] * 9, [1.0] * 9)
    features = TokenCounts(lists.indptr, lists.ids, np.ones(4))
    null = token_preserving_null(features, families, lists.lengths, np.random.default_rng(0),
                                 n_genes=9, draws=4)
    assert null.lengths.tolist() == [3, 1] * 4
    assert len({tuple(sorted(ids)) for ids in parts(null)[::2]}) > 1


def test_token_null_refuses() -> None:
    families = families_of([1, 2], [1.0, 1.0])
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="belongs to no gene"):
        token_families([0, 2], [0, 1], [1, 1])
    with pytest.raises(InputError, match="same gene twice"):
        token_families([0, 0], [1, 1], [1, 1])
    with pytest.raises(InputError, match="same token twice"):
        token_preserving_null(one_feature([0, 0], [1, 1]), families, [2], rng, n_genes=3)
    with pytest.raises(InputError, match=r"outside 0\.\.1"):
        token_preserving_null(one_feature([2], [1]), families, [2], rng, n_genes=3)


def test_benjamini_hochberg_is_scipys() -> None:
    p = np.random.default_rng(0).random(50)
    assert benjamini_hochberg(p).tolist() == false_discovery_control(p).tolist()
    assert benjamini_hochberg([]).size == 0


def test_empirical_p_is_never_zero_and_counts_ties() -> None:
    null = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    assert empirical_p([0.2, 0.1], null).tolist() == [3 / 5, 1 / 5]
    assert empirical_p([0.0, 1.0], null[0]).tolist() == [1 / 5, 1.0]
    assert float(empirical_p(0.25, null[0])) == 3 / 5
    with pytest.raises(InputError, match="at least one null"):
        empirical_p([0.1], np.empty((1, 0)))
