"""What the chapters compute with the model on a GPU: the same as on the processor.

On a pretended GPU everywhere (`pretended_gpu`), and on a real one by `pytest -m gpu`.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from helpers import TRAINING, logit_targets, model_for, tiny_corpus, tiny_profile, tiny_transcoders
from pretended_gpu import OnGpu, pretended_gpu
from torch import Tensor

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.circuits import circuit as circuits
from scfm_circuits.circuits import knock_out, structure
from scfm_circuits.circuits.attribution import (
    closure,
    contributions,
    equation_5,
    feature_direction,
    logit_direction,
)
from scfm_circuits.circuits.calls import gene_contributions
from scfm_circuits.circuits.case_targets import strongest_at_end
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.graph import attribution_graph, feature_target
from scfm_circuits.circuits.graph_scores import completeness_score, effect_ends, prune
from scfm_circuits.circuits.interventions import FeatureAt, compare_interventions
from scfm_circuits.circuits.search import strongest_features, trace_feature
from scfm_circuits.circuits.token_means import mean_activations, token_kinds
from scfm_circuits.features import baselines
from scfm_circuits.features.statistics import corpus_pairs, count_features
from scfm_circuits.interpretability import cards as card_drawing
from scfm_circuits.interpretability.mentions import count_held_out
from scfm_circuits.models.answers import predict_answers
from scfm_circuits.transcoders import validation
from scfm_circuits.transcoders.held_out import held_out_measures
from scfm_circuits.transcoders.transcoder import Transcoders, Variant

VARIANTS = (Variant(), Variant("topk", 5), Variant("jumprelu"), Variant("relu", skip=True),
            Variant("topk", 4, skip=True), Variant("relu", site="sae"))


@contextlib.contextmanager
def real_gpu() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    yield torch.device("cuda")


@pytest.fixture(params=[pytest.param(pretended_gpu, id="pretended"),
                        pytest.param(real_gpu, id="cuda", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with request.param() as device:
        yield device


# --- comparing -----------------------------------------------------------------------------------


def plain(found: Any) -> Any:
    """Results as nested lists of arrays and plain values on the host."""
    if isinstance(found, Tensor):
        return found.detach().cpu().numpy()
    if isinstance(found, pd.DataFrame):
        return [list(found.columns), *(found[name].to_numpy() for name in found)]
    if sp.issparse(found):
        return found.toarray()
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        return {field.name: plain(getattr(found, field.name))
                for field in dataclasses.fields(found)}
    if isinstance(found, dict):
        return {key: plain(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [plain(one) for one in found]
    return found


def assert_same(a: Any, b: Any, relative: float, place: str = "") -> None:
    """Two results of `plain`; numbers within `relative` of the largest of their array."""
    assert type(a) is type(b), place
    if isinstance(a, dict):
        assert list(a) == list(b), place
        for key in a:
            assert_same(a[key], b[key], relative, f"{place}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), place
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, relative, f"{place}[{i}]")
    elif isinstance(a, (float, np.ndarray)) and np.asarray(a).dtype.kind == "f":
        assert np.asarray(a).dtype == np.asarray(b).dtype, place
        scale = np.nanmax(np.abs(a), initial=0.0, where=np.isfinite(a))
        np.testing.assert_allclose(b, a, rtol=relative, atol=relative * scale, err_msg=place)
    else:
        np.testing.assert_array_equal(np.asarray(b), np.asarray(a), err_msg=place)


def on_both(gpu: torch.device, work: Callable[..., Any], *, dtype: torch.dtype = torch.float64,
            variant: Variant = VARIANTS[0], relative: float = 1e-9) -> None:
    """work(model, transcoders, corpus) on the processor and on the GPU.

    relative: what is allowed on a pretended one. A real one's sums have another order, and the
    model takes its softmax in float32 whatever its type.
    """
    corpus = tiny_corpus(14)
    model = model_for(corpus, layers=3, dtype=dtype)
    transcoders = tiny_transcoders(model, 24, variant=variant)
    there = copy.deepcopy(model).to(gpu), copy.deepcopy(transcoders).to(gpu)
    expected = plain(work(model, transcoders, corpus))
    if torch.cuda.is_available():
        relative = max(relative, 1e-4)
    assert_same(expected, plain(work(*there, corpus)), relative)
    assert next(there[0].parameters()).device.type == "cuda"


# --- the pretended GPU itself --------------------------------------------------------------------


def test_the_pretended_gpu_refuses_what_a_gpu_refuses() -> None:
    host = torch.arange(6.0).view(2, 3)
    with pretended_gpu() as device:
        there = host.to(device)
        assert there.is_cuda and there.device.type == "cuda" and isinstance(there, OnGpu)
        for wrong in (lambda: there + host, lambda: there.numpy(), lambda: np.asarray(there),
                      lambda: torch.cat([there, host]), lambda: there @ host.T,
                      lambda: there.index_add(0, torch.tensor([0]), there[:1]),
                      lambda: torch.zeros(3, device=device) + host[0]):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        # Numbers, indices on the host and copies are taken, and writes reach views.
        there[0].mul_(torch.tensor(2.0))
        there[torch.tensor([1])] = 0.0
        torch.testing.assert_close(there.cpu(), torch.tensor([[0.0, 2, 4], [0, 0, 0]]))
        assert torch.equal(host.copy_(there), there.cpu()) and float(there[0, 1]) == 2


# --- chapters 01 to 05 ---------------------------------------------------------------------------


def test_answers(gpu: torch.device) -> None:
    on_both(gpu, lambda model, t, corpus: predict_answers(model, corpus, range(4), 6))


@pytest.mark.parametrize("variant", VARIANTS[:5], ids=str)
def test_tables_1_and_2(gpu: torch.device, variant: Variant) -> None:
    def work(model: Any, t: Transcoders, corpus: Corpus) -> Any:
        cells = np.arange(6)
        return (validation.compare_configurations(model, t, corpus, cells, 4).scores,
                validation.fraction_of_variance_unexplained(model, t, corpus, cells, 4))
    on_both(gpu, work, variant=variant, relative=1e-5)  # log-probabilities are in float32


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_counts_of_features(gpu: torch.device, variant: Variant) -> None:
    """In float64, in which no activation is so near 0 that another order of sums moves it across;
    in TF32, in which a GPU counts float32 models, one in some ten thousand is."""
    def work(model: Any, t: Transcoders, corpus: Corpus) -> Any:
        pairs, _, _, index = corpus_pairs(corpus)
        return (count_features(model, t, corpus, 4, 3, progress=False),
                count_held_out(model, t, corpus, 4, index, len(pairs)))
    on_both(gpu, work, variant=variant, relative=1e-6)  # sums of activations are kept in float32


def test_cards_of_the_human_evaluation(gpu: torch.device) -> None:
    on_both(gpu, lambda model, t, corpus: card_drawing.activations(
        model, t, corpus, np.array([1, 3, 4, 8]), 1, np.array([2, 5, 17]), 3), relative=1e-6)


# --- baselines -----------------------------------------------------------------------------------


def test_the_baselines_models(gpu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
                              ) -> None:
    profile = tiny_profile(monkeypatch, tmp_path, **TRAINING)

    def work(model: Any, t: Transcoders, corpus: Corpus) -> Any:
        other = baselines.reinitialised_model(model, 3)
        statistics = count_features(model, t, corpus, 4, 3, progress=False)
        encoder = baselines.untrained_encoder(model, statistics, corpus, profile, 8)
        # A GPU draws other random directions, so only what does not depend on them is compared.
        return (baselines.output_scale(model, other, corpus, profile), encoder.b_in,
                list(other.parameters()))
    on_both(gpu, work, dtype=torch.float32, relative=1e-4)


# --- circuits ------------------------------------------------------------------------------------


def traced(model: Any, t: Transcoders, corpus: Corpus) -> tuple[Any, ...]:
    cell = 2
    end = int(corpus.answer_end[cell])
    frozen = freeze(model, t, corpus.tokens[cell, : end + 1])
    feature = strongest_features(frozen, 2, end - 1, 1)[0]
    circuit = trace_feature(frozen, 2, feature, end - 1, branches=6, depth=3,
                                     max_nodes=40)
    return frozen, feature, end - 1, circuit


CIRCUIT_VARIANTS = [one for one in VARIANTS if one.site == "transcoder"]


@pytest.mark.parametrize("variant", CIRCUIT_VARIANTS, ids=str)
def test_a_circuit(gpu: torch.device, variant: Variant) -> None:
    def work(model: Any, t: Transcoders, corpus: Corpus) -> Any:
        frozen, feature, position, circuit = traced(model, t, corpus)
        n = len(frozen.tokens)
        texts, genes = [str(i) for i in range(n)], [f"G{i % 3}" for i in range(n)]
        reading = feature_direction(frozen, 2, feature, position)
        parts = contributions(frozen, reading)
        assert closure(frozen, reading) < 1e-6
        logit = contributions(frozen, logit_direction(frozen, 5, position)).total()
        return (parts, logit, equation_5(frozen, 2, feature, position),
                circuits.node_table(circuit, texts, genes).drop(columns=["node"]),
                circuits.edge_table(circuit)[["weight", "share"]],
                gene_contributions(parts, genes), structure.path_ends(circuit),
                structure.flow_table(circuit, parts), structure.head_table(circuit, parts, genes),
                strongest_at_end(model, t, corpus, np.arange(5), 2, "answer", 3))
    on_both(gpu, work, variant=variant, relative=1e-8)


def test_a_graph(gpu: torch.device) -> None:
    def work(model: Any, t: Transcoders, corpus: Corpus) -> Any:
        frozen, feature, position, _ = traced(model, t, corpus)
        targets = [feature_target(frozen, 2, feature, position), *logit_targets(
            frozen, position, most=3)]
        whole = attribution_graph(frozen, targets, max_features=12, edges_per_row=50, batch=5)
        return [(one.weights, one.value, one.constant, one.dropped_absolute, abs(one.matrix).sum(),
                 [node.id for node in one.nodes], completeness_score(one), effect_ends(one))
                for one in (whole, prune(whole))]
    on_both(gpu, work, relative=1e-7)


@pytest.mark.parametrize("variant", CIRCUIT_VARIANTS[:4], ids=str)
def test_interventions(gpu: torch.device, variant: Variant) -> None:
    def work(model: Any, t: Transcoders, corpus: Corpus) -> Any:
        frozen, feature, position, circuit = traced(model, t, corpus)
        means = mean_activations(model, t, corpus, np.arange(10), 4)
        kinds = token_kinds(corpus.gene[2, : position + 2], corpus.place[2, : position + 2],
                            int(corpus.answer_start[2]))
        chosen = [FeatureAt(node.layer, node.index, node.position) for node in
                  circuit.nodes.values() if node.kind == "feature" and node.id != circuit.target]
        return means, [one._asdict() for one in compare_interventions(
            model, frozen, chosen, FeatureAt(2, feature, position),
            feature_direction(frozen, 2, feature, position), means, kinds,
            np.random.default_rng(1), draws=2)]
    on_both(gpu, work, variant=variant, relative=1e-7)


def test_knock_outs(gpu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    profile = tiny_profile(monkeypatch, tmp_path, circuit_branches=6, circuit_nodes=40,
                           forward_cells=3)

    def work(model: Any, t: Transcoders, corpus: Corpus) -> Any:
        study = knock_out.knock_out_study(model, t, corpus, profile, most=2)
        return study.genes.filter(like="score_"), study.genes[["effect"]], study.kept
    on_both(gpu, work, relative=1e-4)  # attention's softmax is in float32


# --- other dictionaries --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_measures_of_other_dictionaries(gpu: torch.device, variant: Variant) -> None:
    on_both(gpu, lambda model, t, corpus: held_out_measures(
        model, {"own": lambda: t}, corpus, np.arange(6), 4), variant=variant, relative=1e-5)
