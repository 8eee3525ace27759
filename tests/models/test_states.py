"""Types as places of the embedding: means over genes, the nearest place, the line to a type."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.neighbors import NearestCentroid
from three_types import TYPES, gene_corpus, gene_model

from scfm_circuits import InputError
from scfm_circuits.models import states as states_module
from scfm_circuits.models.known_types import MODEL, RANKS, REDRAWN, get_known_types, ranks
from scfm_circuits.models.loading import reinitialised_model
from scfm_circuits.models.states import (
    States,
    embeddings,
    find_states,
    get_states,
    means_by_type,
    placed_cells,
)


@pytest.fixture(scope="module", params=["maxtoki", "geneformer_v2", "geneformer_v1"])
def parts(request, tmp_path_factory) -> Any:
    """A profile, its corpus of gene tokens, and a model of the encoding's family."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCFM_RESULTS", str(folder / "results"))
        profile, corpus = gene_corpus(folder, request.param)
        yield profile, corpus, gene_model(request.param, corpus)


def test_a_cells_embedding_is_the_mean_over_its_genes_alone(parts):
    """One cell at a time, without padding and without special tokens."""
    profile, corpus, model = parts
    cells = np.array([7, 0, 3])
    found = embeddings(model, corpus, cells, profile.forward_cells)
    for row, cell in zip(found, cells, strict=True):
        ids = torch.from_numpy(corpus.tokens[cell][corpus.mask[cell]])
        last = model(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0]
        of_gene = corpus.gene[cell][corpus.mask[cell]] >= 0
        np.testing.assert_allclose(row, last[of_gene].mean(dim=0), atol=1e-6)
    whole = embeddings(model, corpus, cells, 1)
    np.testing.assert_allclose(whole, found, atol=1e-6)


def test_cells_are_named_by_the_nearest_place_as_scikit_learn_does(parts):
    _, corpus, model = parts
    training, held_out = (np.flatnonzero(one) for one in (~corpus.held_out, corpus.held_out))
    points = embeddings(model, corpus, training, 4)
    other = NearestCentroid().fit(points, corpus.labels[training])
    found = find_states(model, corpus, 4)
    assert found.types.tolist() == other.classes_.tolist() == list(TYPES)
    np.testing.assert_allclose(found.places, other.centroids_, atol=1e-9)
    asked = embeddings(model, corpus, held_out, 4)
    assert found.nearest(asked).tolist() == other.predict(asked).tolist()


def test_means_of_sparse_points_are_those_of_dense_ones():
    rng = np.random.default_rng(0)
    points, labels = rng.integers(0, 3, (20, 5)) * 1.0, rng.choice(["b", "a", "c"], 20)
    dense, sparse = means_by_type(points, labels), means_by_type(csr_array(points), labels)
    wanted = pd.DataFrame(points).groupby(labels).mean()
    assert dense.types.tolist() == wanted.index.tolist()
    np.testing.assert_allclose(dense.places, wanted.to_numpy())
    np.testing.assert_allclose(sparse.places, wanted.to_numpy())
    assert dense.nearest(csr_array(points)).tolist() == dense.nearest(points).tolist()


def test_the_line_to_a_type_is_one_at_its_place_and_minus_one_at_the_others_mean():
    rng = np.random.default_rng(2)
    states = States(np.array(["a", "b", "c"]), rng.normal(size=(3, 6)))
    w, b = states.axis("b")
    assert states.places[1] @ w + b == pytest.approx(1)
    assert states.places[[0, 2]].mean(axis=0) @ w + b == pytest.approx(-1)
    across = states.places[1] - states.places[[0, 2]].mean(axis=0)
    assert abs(np.corrcoef(w, across)[0, 1]) == pytest.approx(1)
    for types in (["b"], ["a", "c"]):
        with pytest.raises(InputError, match="no direction leads to it"):
            States(np.array(types), np.ones((len(types), 2))).axis("b")


def test_places_are_kept_and_those_of_many_cells_are_of_some(parts, monkeypatch):
    profile, corpus, model = parts
    first = get_states(model, corpus, profile)
    monkeypatch.setattr(states_module, "find_states", None)
    again = get_states(model, corpus, profile)
    assert np.array_equal(first.places, again.places) and list(again.types) == list(first.types)
    monkeypatch.setattr(states_module, "PLACED", 5)
    some = placed_cells(corpus)
    assert len(some) == 5 and not corpus.held_out[some].any()


def test_what_the_model_knows_stands_beside_ranks_and_redrawn_weights(parts):
    profile, corpus, model = parts
    found = get_known_types(model, corpus, profile)
    held_out = np.flatnonzero(corpus.held_out)
    truth, training = corpus.labels[held_out], ~corpus.held_out
    redrawn = reinitialised_model(model, profile.seed)
    inputs = {MODEL: lambda one: embeddings(model, corpus, one, 4),
              RANKS: lambda one: ranks(corpus, one).toarray(),
              REDRAWN: lambda one: embeddings(redrawn, corpus, one, 4)}
    for name, of in inputs.items():
        other = NearestCentroid().fit(of(np.flatnonzero(training)), corpus.labels[training])
        right = other.predict(of(held_out)) == truth
        assert found.of(name, "right") == right.sum()
        assert found.of(name, "mean_over_types") == pytest.approx(
            100 * pd.Series(right).groupby(truth).mean().mean())
        assert (found.of(name, "mean_low") <= found.of(name, "mean_over_types")
                <= found.of(name, "mean_high"))
    assert found.of(RANKS, "percentage") > 90  # each type has genes of its own
    assert found.of(MODEL, "mean_low") < found.of(MODEL, "mean_high")
