"""What the chapters compute with the model on a GPU: the same as on the processor.

On a pretended GPU everywhere (`pretended_gpu`), and on a real one by `pytest -m gpu`.
"""

import contextlib
import copy
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from helpers import (
    LABELS,
    TRAINING,
    logit_targets,
    model_for,
    tiny_corpus,
    tiny_profile,
    tiny_transcoders,
)
from pretended_gpu import OnGpu, pretended_gpu
from three_types import gene_corpus, gene_model
from torch import Tensor

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.cells.simulated import Plan, Program
from scfm_circuits.circuits import circuit as circuits
from scfm_circuits.circuits import (
    knock_out,
    known_response,
    origins,
    perturbed_cells,
    planted_genes,
    steering,
    structure,
    studies,
    task_circuit,
    wrong_calls,
)
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
from scfm_circuits.features import baselines, concepts
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
        scale = np.max(np.abs(a), initial=0.0, where=np.isfinite(a))
        np.testing.assert_allclose(b, a, rtol=relative, atol=relative * scale, err_msg=place)
    else:
        np.testing.assert_array_equal(np.asarray(b), np.asarray(a), err_msg=place)


def on_both(gpu: torch.device, work: Callable[..., Any], *, dtype: torch.dtype = torch.float64,
            variant: Variant = VARIANTS[0], relative: float = 1e-9, cells: int = 14) -> None:
    """work(model, transcoders, corpus) on the processor and on the GPU.

    relative: what is allowed on a pretended one. A real one's sums have another order, and the
    model takes its softmax in float32 whatever its type. cells: of the corpus.
    """
    corpus = tiny_corpus(cells)
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
        # A vector's product ends in a tensor that is squeezed in place.
        product = (there[0] @ there.T).view(2) @ torch.ones(2, device=device)
        assert float(product) == float(there.cpu()[0] @ there.cpu().T @ torch.ones(2))
        # Gradients go through another precision, and back.
        added = torch.zeros_like(there, requires_grad=True)
        [gradient] = torch.autograd.grad((there + added).to(torch.float64).square().sum(), added)
        assert torch.equal(gradient.cpu(), 2 * there.cpu())


def test_tied_weights_stay_one_on_the_pretended_gpu() -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5)})
    model["head"].weight = model["embed"].weight
    with pretended_gpu() as device:
        model.float().to(device)
        assert model["head"].weight is model["embed"].weight and model["head"].weight.is_cuda
        assert len(list(model.parameters())) == 2


def test_kernels_start_with_the_pretended_gpu(tmp_path: Path) -> None:
    """As a notebook's kernel does: by what IPython starts with."""
    pretending = Path(__file__).with_name("pretended_gpu.py")
    folder = subprocess.run([sys.executable, pretending, tmp_path], capture_output=True, text=True,
                            check=True).stdout.strip()
    code = ("from scfm_circuits.models.mlp_sites import best_device; import torch; "
            "print(best_device(), torch.zeros(2, device=best_device()).is_cuda)")
    told = subprocess.run([sys.executable, "-m", "IPython", "-c", code], check=True, text=True,
                          capture_output=True, env={**os.environ, "IPYTHONDIR": folder}).stdout
    assert told.split() == ["cuda", "True"]


# --- chapters 01 to 05 ---------------------------------------------------------------------------


def test_answers(gpu: torch.device) -> None:
    on_both(gpu, lambda model, t, corpus: predict_answers(model, corpus, range(4)))


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


# --- studies of many cells: chapters 07, 08 and 13 to 15 -----------------------------------------


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Callable[..., Any]:
    """A profile whose results, which studies keep, are those of one device."""
    def made(model: Any, **fields: Any) -> Any:
        return tiny_profile(monkeypatch, tmp_path / next(model.parameters()).device.type, **{
            "circuit_branches": 6, "circuit_depth": 3, "circuit_nodes": 40, "forward_cells": 3,
            "case_type": LABELS[0], "known_response": ["LYZ", "CD3D", "NONE"], "list_size": 4,
            **fields})
    return made


def test_circuits_of_many_cells(gpu: torch.device, at: Any, monkeypatch: pytest.MonkeyPatch
                                ) -> None:
    monkeypatch.setattr(studies, "studied_cells", lambda corpus: [2])
    monkeypatch.setattr(studies, "DRAWS", 1)

    def work(model: Any, t: Transcoders, corpus: Corpus) -> Any:
        study = studies.circuit_study(model, t, corpus, at(model))
        return study.effects, study.singles, study.flow, study.heads, study.inside
    on_both(gpu, work)


def test_planted_genes(gpu: torch.device, at: Any) -> None:
    plan = Plan(dict.fromkeys(LABELS, 0.25), (Program("b", ("MS4A1",), ("B cell",), 1.0),), {})
    on_both(gpu, lambda model, t, corpus: planted_genes.circuit_gene_table(
        model, t, corpus, [0, 1, 5], plan, at(model)))


def test_the_circuit_of_the_task(gpu: torch.device, at: Any, monkeypatch: pytest.MonkeyPatch
                                 ) -> None:
    monkeypatch.setattr(task_circuit, "SCORED_CELLS", 4)
    on_both(gpu, lambda model, t, corpus: task_circuit.task_circuit(model, t, corpus, at(model)))


def test_wrong_calls(gpu: torch.device, at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrong_calls, "TRAINING_CELLS", 8)
    monkeypatch.setattr(wrong_calls, "ERRORS", 1)
    monkeypatch.setattr(wrong_calls, "DRAWS", 1)

    def work(model: Any, t: Transcoders, corpus: Corpus) -> Any:
        statistics = count_features(model, t, corpus, 4, progress=False)
        found = wrong_calls.wrong_calls(model, t, corpus, at(model), statistics)
        assert found is not None
        return found.features, found.table
    on_both(gpu, work, cells=24)


@pytest.mark.parametrize("encoding", ["maxtoki", "geneformer_v2"])
def test_parts_of_models_of_gene_tokens(gpu: torch.device, at: Any, encoding: str, tmp_path: Any
                                        ) -> None:
    at(torch.nn.Linear(1, 1))
    _, corpus = gene_corpus(tmp_path, encoding, n=12)
    found = []
    for device in (torch.device("cpu"), gpu):
        model = gene_model(encoding, corpus)
        transcoders = tiny_transcoders(model).to(device)
        found.append(origins.origins(model.to(device), transcoders, corpus, np.arange(3),
                                     ("alpha", "beta"), 0, 5))
    assert found[0].closure < 1e-6 and found[1].closure < 1e-4
    for one, other in zip(*[one[:2] for one in found], strict=True):
        assert_same(one, other, 1e-4 if torch.cuda.is_available() else 1e-9)


def test_known_answers(gpu: torch.device, at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturbed_cells, "NEAR", 2)

    def work(model: Any, t: Transcoders, corpus: Corpus) -> Any:
        profile, cells = at(model), np.flatnonzero(corpus.held_out)[:3]
        statistics = count_features(model, t, corpus, 4, progress=False)
        study = known_response.response_study(model, t, corpus, profile, most=3)
        return (study.genes, known_response.telling_features(
                    model, t, statistics, corpus, profile, top=3),
                perturbed_cells.perturbed(model, corpus, profile, cells, LABELS[0]),
                perturbed_cells.changed_together(model, corpus, profile, cells, LABELS[0],
                                                 profile.known_response))
    on_both(gpu, work, cells=24)


def test_steering(gpu: torch.device, at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SEEDS": 1, "DOSES": (-1.0, 0.0, 1.0), "SCORED_CELLS": 3,
                        "TRACED_CELLS": 2}.items():
        monkeypatch.setattr(steering, name, value)

    def work(model: Any, t: Transcoders, corpus: Corpus) -> Any:
        statistics = count_features(model, t, corpus, 4, progress=False)
        found = steering.steering_study(model, t, corpus, at(model), statistics, LABELS[0])
        return found.readings, found.before, found.chosen
    on_both(gpu, work, cells=24)


def test_scores_of_concepts(gpu: torch.device, at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LEAST": 2, "RESAMPLED": 50, "DRAWS": 2}.items():
        monkeypatch.setattr(concepts, name, value)

    def work(model: Any, t: Transcoders, corpus: Corpus) -> Any:
        statistics = count_features(model, t, corpus, 4, progress=False)
        table = concepts.concept_scores(model, t, corpus, at(model), statistics,
                                        {"T": {"CD3D", "CD8A"}}).table
        # A GPU draws other random directions, and gives components other signs.
        return table[table["units"].isin([concepts.FEATURES, concepts.EVERY])]
    on_both(gpu, work, dtype=torch.float32, relative=1e-4, cells=24)
