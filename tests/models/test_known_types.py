"""What the model knows of the types: its answers beside a regression's and the commonest type's."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import model_for, tiny_corpus, tiny_profile
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.intervals import wilson_interval
from scfm_circuits.models import known_types as asking
from scfm_circuits.models.known_types import (
    COMMONEST,
    MODEL,
    OTHER,
    REGRESSION,
    Said,
    ask_held_out,
    get_known_types,
    known_types,
    mcnemar_p,
    ranks,
    regression_answers,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return tiny_corpus(80, validation_share=0.5)


def said(corpus: Corpus, model: Any, regression: Any = None) -> Said:
    """Given answers for all held-out cells."""
    cells = np.flatnonzero(corpus.held_out)
    labels = corpus.labels[cells]
    return Said(cells, np.array([model(place, label) for place, label in enumerate(labels)]),
                labels if regression is None else regression)


def some_right(place: int, label: str) -> str:
    return label if place % 3 == 0 else "B cell" if place % 3 == 1 else "a banana"


def test_answers_are_counted_by_true_type(corpus: Corpus) -> None:
    given = said(corpus, some_right)
    found = known_types(corpus, given)
    frame = pd.DataFrame({"type": corpus.labels[given.cells], "answer": given.model})
    frame["right"] = frame["type"] == frame["answer"]
    grouped = frame.groupby("type")
    table = pd.DataFrame(found.by_type).set_index("cell type")
    assert table.index.tolist() == list(grouped.groups)
    assert table["held_out"].tolist() == grouped.size().tolist()
    assert table["right"].tolist() == grouped["right"].sum().tolist()
    assert table["regression"].tolist() == table["held_out"].tolist()
    assert table["commonest_answer"].tolist() == [one["answer"].mode()[0] for _, one in grouped]
    training = pd.Series(corpus.labels[~corpus.held_out])
    assert table["training"].tolist() == training.value_counts().loc[table.index].tolist()
    assert found.commonest == training.mode()[0]
    for one in table.itertuples():
        low, high = wilson_interval(one.right, one.held_out)
        assert [one.lower_95, one.upper_95] == pytest.approx([100 * low, 100 * high])


def test_the_model_stands_beside_the_commonest_type_and_a_regression(corpus: Corpus) -> None:
    rng = np.random.default_rng(0)
    regression = rng.choice(np.unique(corpus.labels), int(corpus.held_out.sum()))
    given = said(corpus, some_right, regression)
    found = known_types(corpus, given)
    truth = corpus.labels[given.cells]
    right = {MODEL: given.model == truth, REGRESSION: regression == truth,
             COMMONEST: truth == found.commonest}
    for name, one in right.items():
        assert found.of(name, "right") == one.sum()
        assert found.of(name, "percentage") == pytest.approx(100 * one.mean())
        by_type = pd.Series(one).groupby(truth)
        assert found.of(name, "mean_over_types") == pytest.approx(
            100 * by_type.mean()[by_type.size() >= asking.ENOUGH].mean())
        assert found.of(name, "only_model") == (right[MODEL] & ~one).sum()
        assert found.of(name, "only_this") == (one & ~right[MODEL]).sum()
    assert math.isnan(found.of(MODEL, "p"))


def test_the_confusion_matrix_holds_every_cell_once(corpus: Corpus) -> None:
    given = said(corpus, some_right)
    found = known_types(corpus, given)
    matrix = pd.DataFrame(found.confusion).set_index("cell type")
    expected = pd.crosstab(corpus.labels[given.cells], np.where(
        given.model == "a banana", OTHER, given.model))
    for kind in matrix.index:
        for answer in matrix:
            wanted = expected.loc[kind, answer] if answer in expected else 0
            assert matrix.loc[kind, answer] == wanted
    assert matrix.to_numpy().sum() == len(given.cells) and list(matrix)[-1] == OTHER
    assert OTHER not in known_types(corpus, said(corpus, lambda place, label: label)).confusion


@given(ours=st.integers(0, 60), theirs=st.integers(0, 60))
def test_the_p_is_that_of_an_exact_one_sided_mcnemar_test(ours: int, theirs: int) -> None:
    n = ours + theirs
    expected = sum(math.comb(n, k) for k in range(ours, n + 1)) / 2**n
    assert mcnemar_p(ours, theirs, "greater") == pytest.approx(expected, rel=1e-9)


def test_a_model_that_guesses_is_called_one_that_does_not_know(corpus: Corpus) -> None:
    """Always the commonest type, random types, nothing sensible at all: none knows anything."""
    rng, types = np.random.default_rng(1), np.unique(corpus.labels)
    commonest = known_types(corpus, said(corpus, some_right)).commonest
    for guess in (lambda place, label: commonest, lambda place, label: rng.choice(types),
                  lambda place, label: "a banana"):
        found = known_types(corpus, said(corpus, guess))
        warning = found.warning()
        assert not found.knows and warning is not None
        assert "does not know these types" in warning and "a guess" in warning
        assert f"{found.of(MODEL, 'percentage'):.0f} %" in warning and repr(commonest) in warning
    for knowing in (lambda place, label: label, lambda place, label: label if place % 4 else "x"):
        found = known_types(corpus, said(corpus, knowing))
        assert found.knows and found.warning() is None


def test_ranks_are_those_of_the_sentences(corpus: Corpus) -> None:
    cells = np.array([7, 0, 33])
    longest = max(len(corpus.genes_of(cell)) for cell in range(len(corpus)))
    expected = np.zeros((3, len(corpus.symbols)))
    for row, cell in zip(expected, cells, strict=True):
        for place, gene in enumerate(corpus.gene_ids_of(cell)):
            row[gene] = 1 - place / longest
    np.testing.assert_allclose(ranks(corpus, cells).toarray(), expected, rtol=1e-12)


def test_the_regression_is_trained_on_the_training_cells_alone(
        corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    training, cells = np.flatnonzero(~corpus.held_out), np.flatnonzero(corpus.held_out)[:9]
    fitted = LogisticRegression(max_iter=1000).fit(ranks(corpus, training).toarray(),
                                                   corpus.labels[training])
    found = regression_answers(corpus, cells)
    assert found.tolist() == fitted.predict(ranks(corpus, cells).toarray()).tolist()
    assert found.tolist() == regression_answers(corpus, cells).tolist()
    monkeypatch.setattr(asking, "TAUGHT", 1)  # one cell, so one type
    assert set(regression_answers(corpus, cells)) == {corpus.labels[training[0]]}


def test_the_model_is_asked_about_so_many_held_out_cells(
        corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "predict_answers", lambda model, corpus, cells: [
        f"answer {cell}" for cell in cells])
    found = ask_held_out(None, corpus, 0, most=7)  # type: ignore[arg-type]
    assert len(set(found.cells)) == 7 and corpus.held_out[found.cells].all()
    assert found.model.tolist() == [f"answer {cell}" for cell in found.cells]
    again, other = (ask_held_out(None, corpus, seed, most=7)  # type: ignore[arg-type]
                    for seed in (0, 1))
    assert again.cells.tolist() == found.cells.tolist() != other.cells.tolist()


def test_a_model_is_asked_once(corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
                               ) -> None:
    profile, model = tiny_profile(monkeypatch, tmp_path), model_for(corpus)
    first = get_known_types(model, corpus, profile)
    monkeypatch.setattr(asking, "predict_answers", None)
    kept = get_known_types(model, corpus, profile)
    pd.testing.assert_frame_equal(pd.DataFrame(kept.by_type), pd.DataFrame(first.by_type))
    pd.testing.assert_frame_equal(pd.DataFrame(kept.accuracy), pd.DataFrame(first.accuracy))
    with pytest.raises(TypeError):  # another corpus is asked anew
        get_known_types(model, tiny_corpus(80, seed=4, validation_share=0.5), profile)
