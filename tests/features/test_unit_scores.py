"""Scores of units: against scikit-learn, and on truths of which the right score is known."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import model_for, tiny_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from sklearn.linear_model import LinearRegression
from sklearn.metrics import f1_score as their_f1
from sklearn.metrics import roc_auc_score

from scfm_circuits.features.unit_scores import (
    AUROC,
    F1,
    MEASURES,
    aurocs,
    best_cuts,
    chosen_units,
    f1_score,
    read_units,
    scores,
)
from scfm_circuits.models.mlp_sites import mlp_sites


def truths(n: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(bool, n).filter(lambda truth: bool(truth.any() and not truth.all()))


# Few different values, so that many are equal.
TIED = arrays(np.float64, (12, 3), elements=st.integers(-2, 2).map(float))


@given(TIED, truths(12))
def test_auroc_is_scikit_learns(values: np.ndarray, truth: np.ndarray) -> None:
    ours = aurocs(stats.rankdata(values, axis=0), truth)
    assert ours == pytest.approx([roc_auc_score(truth, one) for one in values.T])


@settings(max_examples=25)
@given(TIED, truths(12))
def test_the_best_cut_is_the_best_of_all_cuts(values: np.ndarray, truth: np.ndarray) -> None:
    order = np.argsort(-values, axis=0, kind="stable")
    falling = np.take_along_axis(values, order, axis=0)
    f1, places = best_cuts(falling, truth[order])
    for unit, one in enumerate(values.T):
        best = max(their_f1(truth, one >= cut) for cut in one)
        assert f1[unit] == pytest.approx(best)
        said = one >= falling[places[unit], unit]
        assert f1_score(said, truth) == pytest.approx(best)


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_units_are_chosen_as_least_squares_would(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(40, 6))
    values = (values - values.mean(axis=0)) / values.std(axis=0)
    values[:, 5] = values[:, 0]  # a unit once more never adds anything
    truth = values @ rng.normal(size=6) + rng.normal(size=40) > 0
    if truth.all() or not truth.any():
        return
    chosen: list[int] = []
    for _ in range(4):
        fits = []
        for unit in range(5):
            part = values[:, [*chosen, unit]]
            fits.append(LinearRegression().fit(part, truth).score(part, truth))
        chosen.append(int(np.argmax(fits)))
    # Of two that are the same, either.
    assert [unit % 5 for unit in chosen_units(values, truth, 4)] == chosen


def planted(seed: int, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """A and B, on in half of the cells each, and both: values (n, 2) and truths (3, n)."""
    on = np.random.default_rng(seed).random((n, 2)) < 0.5
    return on.astype(np.float64), np.array([*on.T, on.all(axis=1)])


def split_scores(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    half = len(values) // 2
    return scores(values[:half], values[half:], truth[:, :half], truth[:, half:])


def test_a_perfect_unit_scores_1_and_a_shuffled_one_as_chance() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(400, 30))
    _, truth = planted(1)
    perfect = split_scores(np.hstack([noise, truth.T * 3.0]), truth)
    assert perfect == pytest.approx(np.ones((3, len(MEASURES))))
    # The same units, dealt out to other cells: what is chosen on half of them says nothing.
    found = np.mean([split_scores(np.hstack([noise, rng.permutation(truth.T * 3.0)]), truth)
                     for _ in range(8)], axis=0)
    for place, measure in enumerate(MEASURES):
        if measure.startswith("AUROC"):
            assert np.abs(found[:, place] - 0.5).max() < 0.06, measure
    always = 2 * truth.mean(axis=1) / (1 + truth.mean(axis=1))
    assert (found[:, MEASURES.index(F1)] < always + 0.05).all()


def test_no_half_of_a_conjunction_scores_as_the_whole() -> None:
    on, truth = planted(2)
    both = truth[2:]
    alone = split_scores(on, both)[0]
    rate = both[0, 200:].sum() / max(on[200:, 0].sum(), on[200:, 1].sum())
    # A half is true wherever the whole is, and in as many cells again.
    assert alone[MEASURES.index(F1)] < 2 * rate / (1 + rate) + 0.05 < 0.8
    assert 0.7 < alone[MEASURES.index(AUROC)] < 0.9
    # Two of them together tell it; so does one unit that fires where both are on.
    assert alone[MEASURES.index("AUROC, probe of 1")] < 0.9
    assert alone[MEASURES.index("AUROC, probe of 2")] == 1
    whole = split_scores(np.hstack([on, np.maximum(on.sum(axis=1, keepdims=True) - 1.5, 0)]), both)
    assert whole[0] == pytest.approx(np.ones(len(MEASURES)))


def test_what_is_chosen_does_not_know_the_held_out_cells() -> None:
    rng = np.random.default_rng(3)
    _, truth = planted(4)
    values = rng.normal(size=(400, 5))
    values[:200, 0] = truth[0, :200]  # right on the training cells, wrong on the others
    values[200:, 0] = ~truth[0, 200:]
    values[200:, 1] = truth[0, 200:]
    found = split_scores(values, truth[:1])[0]
    assert found[MEASURES.index(AUROC)] == 0 and found[MEASURES.index(F1)] == 0


def test_units_are_read_over_the_question_only() -> None:
    corpus = tiny_corpus(7)
    model: Any = model_for(corpus)
    cells = np.array([3, 0, 5])
    weight = torch.randn(5, model.config.hidden_size, dtype=torch.float64)
    read = read_units(model, corpus, cells, {"some": lambda layer, x: x @ weight.T + layer}, 2)
    for row, cell in enumerate(cells):
        asked = int(corpus.answer_start[cell])
        tokens = torch.from_numpy(np.array(corpus.tokens[cell]))[None, :asked]
        # The answer is not even there.
        inputs = mlp_sites(model, tokens, torch.ones_like(tokens, dtype=torch.bool)).inputs
        wanted = []
        for layer, x in enumerate(inputs):
            units = x @ weight.T + layer
            wanted += [units.mean(dim=0), units.max(dim=0).values, units[-1]]
        np.testing.assert_allclose(read["some"][row], torch.cat(wanted).numpy(), atol=1e-10)


