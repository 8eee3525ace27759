"""Thinned cells: counts fall as they would with fewer molecules, and sentences follow them."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import tiny_cells, tiny_profile

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus, load_corpus
from scfm_circuits.cells.thinning import Counts, read_counts, thinned, thinned_prompts
from scfm_circuits.common.profile import Profile

COUNTS = Counts(sp.csr_matrix(np.array([[400, 0, 100, 1], [0, 5, 0, 0]], np.float32)),
                np.array([7, 3, 9, 2]))


def written(path: Path, times: float = 1.0) -> None:
    cells = tiny_cells(24, seed=5)
    anndata.AnnData(cells.expression * times, obs=pd.DataFrame(
        {"cell_type": cells.labels}, index=cells.cell_ids),
        var=pd.DataFrame(index=list(cells.symbols))).write_h5ad(path)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Profile, Corpus]:
    """A file of counts, its profile and corpus; not all genes stand in a sentence."""
    written(tmp_path / "cells.h5ad")
    profile = tiny_profile(monkeypatch, tmp_path, cells=str(tmp_path / "cells.h5ad"),
                           genes_per_cell=4, case_type="B cell", model_thinning=0.4)
    return profile, load_corpus(profile)


def test_with_all_molecules_the_order_is_that_of_the_counts() -> None:
    found = thinned(COUNTS, np.array([1, 0, 0]), 1.0, 3, np.random.default_rng(0))
    assert found.tolist() == [[3, -1, -1], [7, 9, 2], [7, 9, 2]] and found.dtype == np.int32


def test_a_gene_of_one_molecule_is_seen_as_often_as_molecules_are_kept() -> None:
    for least in (0.2, 0.6):
        found = thinned(COUNTS, np.zeros(4000, int), least, 3, np.random.default_rng(1))
        seen = (found == 2).any(axis=1).mean()
        assert seen == pytest.approx((least + 1) / 2, abs=0.03)
        assert (found[:, 0] == 7).all() and (found[:, 1] == 9).all()


def test_counts_that_are_close_change_places() -> None:
    close = Counts(sp.csr_matrix(np.array([[12, 10]], np.float32)), np.array([0, 1]))
    found = thinned(close, np.zeros(500, int), 0.5, 2, np.random.default_rng(0))
    assert 0.2 < (found[:, 0] == 1).mean() < 0.5


def test_a_cell_of_which_nothing_would_be_left_keeps_all() -> None:
    found = thinned(COUNTS, np.ones(200, int), 1e-9, 2, np.random.default_rng(0))
    assert (found == [3, -1]).all()


def test_the_cells_are_left_as_they_are() -> None:
    before = COUNTS.values.toarray()
    thinned(COUNTS, np.array([0, 1]), 0.3, 3, np.random.default_rng(0))
    assert (COUNTS.values.toarray() == before).all()


def test_only_genes_of_the_corpus_s_sentences_stand_in_them(made: tuple[Profile, Corpus]) -> None:
    profile, corpus = made
    counts = read_counts(profile, corpus)
    assert counts is not None and counts.genes.tolist() == corpus.occurring.tolist()
    assert counts.values.shape == (len(corpus), len(corpus.occurring))
    # A cell has all its counts of these genes, ranked or not.
    cells = tiny_cells(24, seed=5)
    assert (counts.values.toarray() == cells.expression.toarray()[:, corpus.occurring]).all()
    prompts = thinned_prompts(corpus, profile, counts, np.arange(24), np.random.default_rng(0))
    assert set(np.unique(prompts.gene)) <= {-1, *corpus.occurring.tolist()}
    for cell in range(24):
        own = prompts.tokens[cell][prompts.answer_start[cell] : prompts.answer_end[cell] + 1]
        as_before = corpus.tokens[cell][corpus.answer_start[cell] : corpus.answer_end[cell] + 1]
        assert own.tolist() == as_before.tolist()
    assert (prompts.tokens[:, :9] != corpus.tokens[:, :9]).any()


def test_values_that_are_no_counts_are_not_thinned(made: tuple[Profile, Corpus]) -> None:
    profile, _ = made
    written(Path(profile.cells), times=0.7)
    assert read_counts(profile, load_corpus(profile)) is None


def test_cells_that_have_changed_are_told(made: tuple[Profile, Corpus], monkeypatch: Any) -> None:
    profile, corpus = made
    corpus.cell_ids[3] = "another"
    with pytest.raises(InputError, match="have changed since their sentences were made"):
        read_counts(profile, corpus)
