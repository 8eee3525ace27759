"""The counting pass against dense arrays in numpy: both ways of counting."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import model_for, tiny_corpus, tiny_transcoders
from hypothesis import given
from hypothesis import strategies as st

from scfm_circuits.features import counting
from scfm_circuits.features.counting import (
    N_BINS,
    FeatureTotals,
    activation_edges,
    add_on_cpu,
    add_on_gpu,
    describe_batch,
    unpack_best,
)
from scfm_circuits.features.pair_counts import PairCounts
from scfm_circuits.features.statistics import count_features
from scfm_circuits.models.mlp_sites import mlp_sites
from scfm_circuits.transcoders.active_entries import find_active
from scfm_circuits.transcoders.transcoder import Variant

# --- batches of made-up activations --------------------------------------------------------------


class GivenActivations:
    """In place of transcoders: their input is the activations themselves."""

    def __init__(self, n_layers: int, n_features: int) -> None:
        self.n_layers, self.n_features = n_layers, n_features

    def layer_activations(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        return x

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Made(SimpleNamespace):
    """Activations z (n_layers, n_cells, length, n_features), zero on padding; mask; pairs."""


@st.composite
def made_activations(draw: st.DrawFn) -> Made:
    n_layers, n_features = draw(st.integers(1, 3)), draw(st.sampled_from([1, 5, 63, 64, 65, 150]))
    n_cells, length, n_pairs = (draw(st.integers(1, n)) for n in (7, 9, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    lengths = rng.integers(1, length + 1, n_cells)
    lengths[rng.integers(n_cells)] = length
    mask = np.arange(length) < lengths[:, None]
    shape = n_layers, n_cells, length, n_features
    # Few levels, so that there are ties; far enough apart to reach beyond the histogram's ends.
    levels = np.array([1e-6, 2**-10, 0.3, 2**-0.5, 1, 1.4, 2**0.5, 1.5, 50, 64, 1e5], np.float32)
    active = rng.random(shape) < draw(st.sampled_from([0, 0.02, 0.3, 1]))
    z = np.where(active & mask[..., None], rng.choice(levels, shape), 0).astype(np.float32)
    return Made(z=z, mask=mask, pairs=rng.integers(0, n_pairs, mask.shape), n_pairs=n_pairs)


def counted(made: Made, way: str, n_contexts: int, cells_at_a_time: int,
            dtype: torch.dtype = torch.float32) -> FeatureTotals:
    """The totals of made-up activations, counted in batches of cells."""
    n_layers, n_cells, _, n_features = made.z.shape
    totals = FeatureTotals(n_layers, n_features, made.n_pairs, int(made.mask.sum()), n_contexts,
                           torch.device("cpu"))
    given_z: Any = GivenActivations(n_layers, n_features)
    for start in range(0, n_cells, cells_at_a_time):
        part = slice(start, start + cells_at_a_time)
        mask = made.mask[part]
        batch = describe_batch(made.pairs[part], torch.from_numpy(mask))
        x = torch.from_numpy(made.z[:, part][:, mask]).to(dtype)
        if way == "gpu":
            add_on_gpu(totals, given_z, x, batch)
        else:
            for layer in range(n_layers):
                add_on_cpu(totals, given_z, layer, x[layer], batch)
        totals.done += len(mask)
    return totals


def strongest_by_search(z: np.ndarray, n: int) -> list[tuple[float, int, int]]:
    """(activation, cell, position) of one feature's n strongest cells; z: (n_cells, length)."""
    found = [(float(row.max()), cell, int(row.argmax())) for cell, row in enumerate(z)]
    return sorted((one for one in found if one[0] > 0), key=lambda one: (-one[0], one[1]))[:n]


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "CHUNK_ACTIVATIONS", 200)  # ends within cells
        patch.setattr(counting, "CHUNK_BYTES", 2000)  # one cell or some at a time
        yield


@pytest.mark.parametrize("way", ["cpu", "gpu"])
@given(made=made_activations(), n_contexts=st.integers(1, 9), at_a_time=st.integers(1, 4))
def test_totals_equal_dense_arrays(way, made, n_contexts, at_a_time):
    totals = counted(made, way, n_contexts, at_a_time)
    active = made.z > 0
    n_layers, _, _, n_features = made.z.shape
    found = {key: tensor.numpy() for key, tensor in totals.tensors.items()}
    for layer, matrix in enumerate(totals.counts.matrices()):
        dense = np.zeros((n_features, made.n_pairs), int)
        for cell, position, feature in np.argwhere(active[layer]):
            dense[feature, made.pairs[cell, position]] += 1
        np.testing.assert_array_equal(matrix.toarray(), dense)
        assert matrix.has_canonical_format and (matrix.data > 0).all()
        l0 = np.bincount(active[layer].sum(axis=-1)[made.mask], minlength=n_features + 1)
        assert found["l0"][layer].tolist() == l0.tolist()
    np.testing.assert_allclose(found["total"], made.z.astype(float).sum(axis=(1, 2)), rtol=1e-6)
    edges = activation_edges()
    for layer, feature in np.ndindex(n_layers, n_features):
        values = made.z[layer, :, :, feature].astype(float)
        # Float32's roots of 2 and 1/2 stand for the roots themselves.
        inside = np.clip(values[values > 0] * (1 + 1e-7), edges[0], np.nextafter(edges[-1], 0))
        histogram = np.histogram(inside, edges)[0]
        assert found["histogram"][layer, feature].tolist() == histogram.tolist()


@pytest.mark.parametrize("way", ["cpu", "gpu"])
@given(made=made_activations())
def test_double_precision_gives_the_same(way, made):
    one, other = (counted(made, way, 3, 2, dtype) for dtype in (torch.float32, torch.float64))
    for key, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, other.tensors[key], atol=0,
                                   rtol=1e-12 if key == "total" else 0)


@pytest.mark.parametrize("way", ["cpu", "gpu"])
@given(made=made_activations(), n_contexts=st.integers(1, 9), at_a_time=st.integers(1, 4))
def test_contexts_equal_a_search(way, made, n_contexts, at_a_time):
    tensors = counted(made, way, n_contexts, at_a_time).tensors
    activation, position = unpack_best(tensors["best"].numpy())
    cell = tensors["best_cell"].numpy()
    n_layers, _, _, n_features = made.z.shape
    for layer, feature in np.ndindex(n_layers, n_features):
        expected = strongest_by_search(made.z[layer, :, :, feature], n_contexts)
        n = len(expected)
        at = layer, feature, slice(n)
        assert list(zip(activation[at].tolist(), cell[at].tolist(), position[at].tolist(),
                        strict=True)) == expected
        assert (activation[layer, feature, n:] == 0).all()
        assert (position[layer, feature, n:] == -1).all()


@given(made=made_activations(), n_threads=st.integers(1, 4))
def test_active_features_are_those_above_zero(made, n_threads):
    z = np.ascontiguousarray(made.z[0][made.mask])
    z[::2] *= np.where(z[::2] > 1, -1, 1)
    found = find_active(z, n_threads)
    token, feature = (z > 0).nonzero()
    assert np.repeat(np.arange(len(z)), np.diff(found.start)).tolist() == token.tolist()
    assert found.feature.tolist() == feature.tolist()
    assert found.value.tolist() == z[token, feature].tolist()


# --- sparse counts -------------------------------------------------------------------------------


def held_bytes(counts: PairCounts) -> int:
    """In the matrices and in the buffer."""
    return 8 * counts._n_waiting + sum(
        run.data.nbytes + run.indices.nbytes + run.indptr.nbytes
        for runs in counts._runs for run in runs)


@pytest.mark.parametrize("threads", [1, 3])
def test_counts_take_less_than_twice_what_is_distinct_and_are_exact(threads):
    rng = np.random.default_rng(0)
    shape, n_layers, n_keys = (40, 3000), 2, 4000
    counts = PairCounts(n_layers, *shape, 10**6, buffer_keys=8192, threads=threads)
    expected = np.zeros((n_layers, *shape), int)
    for _ in range(400):
        # Most keys come again and again, some never do: the matrices keep growing.
        keys = (expected.size * rng.random(n_keys) ** 3).astype(np.int64)
        np.add.at(expected.reshape(-1), keys, 1)
        counts.add(torch.from_numpy(keys))
        held, distinct = held_bytes(counts), int((expected > 0).sum())
        # Less than twice the distinct entries, an index for each row of each run, and the buffer.
        assert held < 2 * 8 * distinct + 8 * n_layers * 41 * 20 + 8 * 8192
    for matrix, dense in zip(counts.matrices(), expected, strict=True):
        np.testing.assert_array_equal(matrix.toarray(), dense)
    # Far less than the keys that went in, and no more than twice what came out.
    entries = int((expected > 0).sum())
    assert held < 8 * 400 * n_keys / 4 and held < 2.2 * 8 * entries + 8 * 8192


def test_keys_are_copied_and_may_be_more_than_the_buffer_holds():
    counts = PairCounts(1, 3, 4, 100, buffer_keys=5)
    keys = torch.arange(12)
    for _ in range(2):
        given = keys.clone()
        counts.add(given)
        given.zero_()  # so the caller's memory is free again at once
    counts.add(keys[3:5])
    expected = np.full((3, 4), 2)
    expected.reshape(-1)[3:5] += 1
    assert counts.matrices()[0].toarray().tolist() == expected.tolist()


def test_counts_are_wide_enough_for_the_corpus():
    few, many = (PairCounts(1, 2, 3, n) for n in (2**31 - 1, 2**31))
    for counts in (few, many):
        counts.add(torch.tensor([5, 5, 0]))
    assert few.matrices()[0].dtype == np.int32 and many.matrices()[0].dtype == np.int64
    many._push(0, np.array([0]), np.array([2**31 - 1]))
    many.add(torch.tensor([0, 0]))
    assert many.matrices()[0].toarray().tolist() == [[2**31 + 2, 0, 0], [0, 0, 2]]


# --- the pass ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, Any]:
    corpus = tiny_corpus(14)
    model = model_for(corpus, dtype=torch.float32)
    return model, tiny_transcoders(model), corpus


def test_both_ways_give_the_same_statistics_of_a_model(parts, monkeypatch):
    by_loops = count_features(*parts, 3, progress=False)
    def on_gpu(totals: FeatureTotals, transcoders: Any, layer: int, x: Any, batch: Any) -> None:
        stacked.append(x)
        if layer == 1:
            add_on_gpu(totals, transcoders, torch.stack(stacked[-2:]), batch)

    stacked: list[torch.Tensor] = []
    monkeypatch.setattr(counting, "add_on_cpu", on_gpu)
    by_tensors = count_features(*parts, 3, progress=False)
    assert (by_loops.fired == by_tensors.fired).all() and by_loops.fired.sum() > 0
    np.testing.assert_allclose(by_loops.mean_activation, by_tensors.mean_activation, rtol=1e-5)
    np.testing.assert_allclose(by_loops.context_activation, by_tensors.context_activation,
                               rtol=1e-5)
    assert by_loops.activation_histogram.shape[2] == N_BINS


def test_autoencoders_read_the_outputs(parts):
    model, transcoders, corpus = parts
    sae = tiny_transcoders(model)
    sae.variant = Variant(site="sae")
    found = count_features(model, sae, corpus, 3, progress=False)
    fired = np.zeros(found.fired.shape, int)
    for cell in range(len(corpus)):
        ids = torch.from_numpy(corpus.tokens[cell][corpus.mask[cell]])[None]
        y = mlp_sites(model, ids, torch.ones_like(ids, dtype=torch.bool)).outputs
        fired += (sae.encode(y) > 0).sum(dim=1).numpy()
    assert (found.fired == fired).all()
    assert (fired != count_features(model, transcoders, corpus, 3, progress=False).fired).any()
