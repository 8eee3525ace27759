"""The most expressed genes of a cell, against Cell2Sentence's algorithm."""

from collections import Counter

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import read_cells
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm_circuits.cells.ranking import _mixed, top_genes
from scfm_circuits.common.profile import load_profile
from tests.helpers import tiny_cells


def cell2sentence(values: np.ndarray, genes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A cell's genes as Levine et al. (2024) order them: shuffle, then a stable sort."""
    order = rng.permutation(len(values))
    return genes[order[np.argsort(-values[order], kind="stable")]]


def levels(values: np.ndarray, genes: np.ndarray, ranking: np.ndarray) -> list[tuple[float, set]]:
    """The ranked genes, as a set for each level of expression."""
    value = dict(zip(genes.tolist(), values.tolist(), strict=True))
    shown = [value[gene] for gene in ranking.tolist()]
    assert shown == sorted(shown, reverse=True) and len(set(ranking.tolist())) == len(ranking)
    return [(level, {gene for gene in ranking.tolist() if value[gene] == level})
            for level in sorted(set(shown), reverse=True)]


def agree(values: np.ndarray, genes: np.ndarray, ranking: np.ndarray, k: int, seed: int) -> None:
    """The same genes at each level of expression, but for ties at the cut: as many of them."""
    ours = levels(values, genes, ranking[ranking >= 0])
    theirs = levels(values, genes, cell2sentence(values, genes, np.random.default_rng(seed))[:k])
    assert ours[:-1] == theirs[:-1]
    assert [(a, len(b)) for a, b in ours[-1:]] == [(a, len(b)) for a, b in theirs[-1:]]
    if len(values) <= k:
        assert ours == theirs


@settings(deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 5), min_size=12, max_size=12), min_size=1,
                     max_size=6), k=st.integers(1, 15), seed=st.integers(0, 2**31))
def test_each_level_of_expression_holds_the_genes_it_does_in_cell2sentence(rows, k, seed):
    x = sp.csr_matrix(np.array(rows, np.float32))
    found = top_genes(x, np.arange(len(rows)), k, seed)
    assert found.shape == (len(rows), k) and found.dtype == np.int32
    for row, ranking in enumerate(found):
        part = x[row]
        agree(part.data, part.indices, ranking, k, seed)
    # Fewer genes are the head of more.
    assert (top_genes(x, np.arange(len(rows)), k + 3, seed)[:, :k] == found).all()


@pytest.mark.parametrize("k", [1, 16, 64, 1000])
def test_the_pbmcs_are_ordered_as_by_cell2sentence(k):
    cells = read_cells(load_profile("pbmc"))
    x = cells.expression
    found = top_genes(x, np.arange(len(cells)), k, 0)
    for row in range(0, len(cells), 1 if k == 64 else 20):
        part = x[row]
        agree(part.data, part.indices, found[row], k, row)


@pytest.mark.parametrize("highest", [1, 3, 30, 10**6])
@pytest.mark.parametrize("k", [1, 2, 16, 64, 400])
def test_genes_stand_by_value_and_then_by_the_hash_of_seed_row_and_gene(highest, k):
    rng = np.random.default_rng(k)
    x = rng.integers(0, highest, (40, 300), endpoint=True).astype(np.float32)
    x[::2] *= rng.random((20, 300)) < 0.3
    rows, seed, golden = rng.integers(0, 10**6, 40), 11, np.uint64(0x9E3779B97F4A7C15)
    base = _mixed.py_func(_mixed.py_func(np.array([seed], np.uint64) + golden)
                          + (rows.astype(np.uint64) + np.uint64(1)) * golden)
    ties = _mixed.py_func(base[:, None] + np.arange(1, 301, dtype=np.uint64) * golden)
    for found, values, tie in zip(top_genes(sp.csr_matrix(x), rows, k, seed), x, ties, strict=True):
        rising = np.lexsort((tie, values))
        expected = rising[::-1][: min(k, np.count_nonzero(values))]
        assert found[found >= 0].tolist() == expected.tolist()
        assert (found[len(expected):] == -1).all()


def test_ties_are_in_random_order():
    x = sp.csr_matrix(np.tile(np.array([2, 1, 1, 1], np.float32), (600, 1)))
    for found in (top_genes(x, np.arange(600), 4, 0), np.concatenate(
            [top_genes(x[:1], np.zeros(1), 4, seed) for seed in range(600)])):
        orders = Counter(map(tuple, found.tolist()))
        assert {order[0] for order in orders} == {0}
        # All six orders of the three ties, each about 100 times of 600.
        assert len(orders) == 6 and min(orders.values()) > 60 and max(orders.values()) < 140


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 100), order=st.permutations(range(12)), n=st.integers(1, 12))
def test_a_cells_order_depends_on_its_row_and_the_seed_alone(seed, order, n):
    cells = tiny_cells(12)
    everything = top_genes(cells.expression, np.arange(12), 5, seed)
    some = np.array(order[:n])
    assert (top_genes(cells.expression[some], some, 5, seed) == everything[some]).all()


def test_another_seed_gives_other_orders():
    x = tiny_cells(12).expression
    assert (top_genes(x, np.arange(12), 5, 0) != top_genes(x, np.arange(12), 5, 1)).any()


def test_many_blocks_of_cells_are_ranked_as_one():
    x = sp.random(1500, 40, 0.3, format="csr", random_state=0, dtype=np.float32)
    found = top_genes(x, np.arange(1500), 6, 7)
    assert (np.concatenate([top_genes(x[i : i + 1], np.array([i]), 6, 7) for i in range(1500)])
            == found).all()
