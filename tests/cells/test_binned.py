"""scGPT's encoding: levels against its own arithmetic, tokens of a gene at a level, training."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from gene_tokens import NAMES, cells, counts, dictionaries, profile_of, scgpt
from helpers import TRAINING
from hypothesis import given
from hypothesis import strategies as st

from scfm_circuits import InputError
from scfm_circuits.cells.binned import levels_of
from scfm_circuits.cells.corpus import Corpus, load_corpus
from scfm_circuits.cells.packaged import open_packaged
from scfm_circuits.circuits.attribution import closure, feature_direction, logit_direction
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.common.encodings import GENE_TOKENS
from scfm_circuits.common.profile import load_profile
from scfm_circuits.features.statistics import corpus_pairs
from scfm_circuits.models.loading import get_model
from scfm_circuits.transcoders.training.run import TrainingRun

SPECIAL = GENE_TOKENS["binned"].special
V = len(NAMES) + len(SPECIAL)


@pytest.fixture(autouse=True)
def _results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path / "results"))


def corpus_of(folder: Path, values: np.ndarray, **more: Any) -> Corpus:
    return load_corpus(profile_of(cells(folder, values), scgpt(folder), **more))


def their_bins(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest bin that scGPT may put each value into; values: above zero."""
    edges = np.quantile(values, np.linspace(0, 1, 50))
    return np.digitize(values, edges, right=True), np.digitize(values, edges)


@given(n=st.integers(1, 5), genes=st.integers(1, 200), most=st.integers(1, 60),
       seed=st.integers(0, 1000))
def test_levels_are_the_last_bins_that_scgpt_may_choose(n, genes, most, seed):
    rng = np.random.default_rng(seed)
    dense = rng.integers(0, most + 1, (n, genes)).astype(np.float32)
    ranking = np.where(dense > 0, np.arange(genes), -1)
    found = levels_of(sp.csr_matrix(dense), ranking)
    logged = levels_of(sp.csr_matrix(np.log1p(dense) / 3), ranking)
    assert np.array_equal(found, logged)
    assert (found[dense == 0] == 0).all()
    for row, level in zip(dense, found, strict=True):
        if row.max() > 0:
            low, high = their_bins(row[row > 0].astype(float))
            assert np.array_equal(level[row > 0], high) and (high >= low).all()
            assert level.max() == 50 and level[row > 0].min() >= 1
            order = np.argsort(row, kind="stable")
            assert (np.diff(level[order]) >= 0).all()


def test_a_token_is_a_gene_at_a_level(tmp_path):
    values = counts()
    values[1::2, 5:] = 0
    corpus = corpus_of(tmp_path, values)
    pad, cls = len(NAMES), len(NAMES) + 1
    for cell, row in enumerate(values):
        ids = corpus.tokens[cell][corpus.mask[cell]]
        assert ids[0] == cls and (corpus.tokens[cell][~corpus.mask[cell]] == pad).all()
        there = np.flatnonzero(row)
        wanted = {gene: level for gene, level in zip(
            there, their_bins(row[there].astype(float))[1], strict=True)}
        assert {int(one) % V: int(one) // V for one in ids[1:]} == wanted
        assert corpus.genes_of(cell) == [NAMES[one % V] for one in ids[1:]]
        assert corpus.pieces(cell) == ["<cls>", *corpus.genes_of(cell)]
    assert any("scGPT draws one at random" in one for one in corpus.decisions)
    # Features are counted by gene, whatever its level.
    tokens, genes, seen, _ = corpus_pairs(corpus)
    assert tokens.max() < V and len(tokens) == len({*zip(tokens, genes, strict=True)})
    assert seen[tokens == cls] == len(values)


def test_logged_values_give_the_same_tokens_and_few_genes_the_most_expressed(tmp_path):
    values = counts(seed=3)
    values[:, 2:] += 5 * np.arange(6)
    whole, logged = corpus_of(tmp_path, values), corpus_of(tmp_path, np.log1p(values) / 7)
    assert np.array_equal(np.sort(whole.tokens), np.sort(logged.tokens))
    few = corpus_of(tmp_path, values, genes_per_cell=4)
    for cell in range(len(values)):
        assert set(few.tokens[cell]) == set(whole.tokens[cell, :5])


def test_training_and_circuits_take_it(tmp_path):
    profile = profile_of(cells(tmp_path, counts(40)), scgpt(tmp_path), **TRAINING)
    corpus = load_corpus(profile)
    model, _ = get_model(profile, corpus, exact=True)
    training = TrainingRun(model, corpus, profile)
    training.run(progress=False)
    run = freeze(model, training.transcoders, corpus.tokens[0][corpus.mask[0]])
    for reading in (feature_direction(run, 1, 3, 2), logit_direction(run, 0, 4)):
        assert closure(run, reading) < 1e-5


@pytest.mark.parametrize(("changes", "told"), [
    ({"genes_per_cell": 1200}, "takes 1,199 genes at most, not 1,200"),
    ({"model": "train"}, "is scGPT's, so name a folder"),
    ({"token_dictionary": None}, "needs the model's own"),
    ({"gene_medians": "some.json"}, "divides nothing; leave it out"),
    ({"ensembl_column": "id"}, "knows genes by their symbols"),
])
def test_fields_that_do_not_fit(tmp_path, changes, told):
    with pytest.raises(InputError, match=told):
        profile_of("none.h5ad", scgpt(tmp_path) | changes)


def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path):
    path, own = cells(tmp_path, counts()), scgpt(tmp_path)
    known = Path(own["token_dictionary"])
    for content, told in (
            ({name: i for i, name in enumerate(NAMES)}, "no token <pad>, which `encoding: binned`"),
            (json.loads(Path(dictionaries(tmp_path)["token_dictionary"]).read_text()),
             "no token <eoc>.*set `encoding: geneformer_v2`"),
            ({"OTHER": 0} | {one: i for i, one in enumerate(SPECIAL, 1)},
             "No gene of .* found by symbols, such as VWF\\); check `symbol_column` and")):
        known.write_text(json.dumps(content))
        with pytest.raises(InputError, match=told):
            load_corpus(profile_of(path, own))
    scgpt(tmp_path)
    bare = cells(tmp_path, counts(), [f"ENSG{i:011d}" for i in range(8)])
    with pytest.raises(InputError, match="names its genes by Ensembl identifiers, not symbols"):
        load_corpus(profile_of(bare, own))


def test_a_vocabulary_of_another_size_is_not_the_models(tmp_path):
    """Its numbers of genes and levels would be taken apart wrongly."""
    own = scgpt(tmp_path)
    other = {name: i for i, name in enumerate((*NAMES, "NEW", *SPECIAL))}
    Path(own["token_dictionary"]).write_text(json.dumps(other))
    profile = profile_of(cells(tmp_path, counts()), own)
    with pytest.raises(InputError, match="has 12 tokens, but the model has 11 rows; set `token_d"):
        get_model(profile, load_corpus(profile))


@pytest.mark.skipif("SCFM_SCGPT" not in os.environ, reason="scGPT's vocabulary is not here")
def test_real_cells_have_the_levels_of_the_real_vocabulary(tmp_path):
    known = json.loads((Path(os.environ["SCFM_SCGPT"]) / "default_census_vocab.json").read_text())
    known |= {name: len(known) + i for i, name in enumerate(SPECIAL)}  # as the checkpoint's has
    (tmp_path / "vocab.json").write_text(json.dumps(known))
    profile = load_profile("demo", {
        "encoding": "binned", "token_dictionary": str(tmp_path / "vocab.json"), "max_cells": 12,
        "sampling": "stratified", "genes_per_cell": 1199, "model": "somewhere",
        "model_layers": None, "model_thinning": 1.0, "case_type": "delta", "validation_share": 0.5})
    corpus = load_corpus(profile)
    data = open_packaged()
    matrix, variables = data.matrices["X"]
    upper, used = {name.upper(): token for name, token in known.items()}, {*corpus.symbols}
    # As R has rewritten them, or not.
    names = [one if one in upper else one.replace(".", "-")
             for one in variables.index.astype(str).str.upper()]
    columns = [i for i, name in enumerate(names) if name in used]
    assert len(columns) == len(used) > 16_000
    rows = list(data.obs.index.astype(str))
    for cell in range(len(corpus)):
        at = rows.index(str(corpus.cell_ids[cell]))
        row = np.asarray(matrix[at : at + 1].todense()).ravel()[columns]
        there = np.flatnonzero(row)
        levels = their_bins(row[there].astype(float))[1]
        wanted = {upper[names[columns[gene]]]: level
                  for gene, level in zip(there, levels, strict=True)}
        found = {int(one) % len(known): int(one) // len(known)
                 for one in corpus.tokens[cell][corpus.mask[cell]][1:]}
        assert found.items() <= wanted.items() and len(found) == min(1199, len(there))
    data.close()
