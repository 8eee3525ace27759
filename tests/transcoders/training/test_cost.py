"""Operations of training, and the benchmark's figures as a table."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scfm_circuits.common.files import time_in_words
from scfm_circuits.models.mlp_sites import mlp_sites
from scfm_circuits.report.benchmarks import benchmark_table, cost_table
from scfm_circuits.transcoders.training.cost import (
    TrainingCost,
    paper_cost,
    training_cost,
    training_operations,
    weights_per_layer,
)
from scfm_circuits.transcoders.training.optimizer import Stepper
from tests.helpers import tiny_model, tiny_transcoders


def test_the_papers_size() -> None:
    assert training_operations(24, 1024, 8192, 60_000_000) == pytest.approx(1.57e17, rel=0.001)


def test_operations_are_those_that_are_done() -> None:
    model = tiny_model(layers=3, width=16)
    transcoders = tiny_transcoders(model, features=24).float().requires_grad_(True)
    n = 40
    with FlopCounterMode(display=False) as forward:
        mlp_sites(model, torch.zeros(2, 20, dtype=torch.int64), torch.ones(2, 20, dtype=torch.bool))
    counts = forward.get_flop_counts()["Global"]
    products = sum(count for op, count in counts.items() if "addmm" in str(op))
    stepper = Stepper(transcoders, "normalized", way="plain")
    x, y = torch.randn(2, 3, n, 16)
    with FlopCounterMode(display=False) as step:
        stepper.step(lambda layers: (x[layers], y[layers]), 1e-3, 1e-3, 1)
    stated = training_operations(3, 16, 24, n, weights_per_layer(model))
    assert stated == products + step.get_total_flops()


def test_a_buffer_that_keeps_all_runs_the_model_once() -> None:
    once = training_operations(2, 8, 16, 1000, forward_tokens=100)
    assert training_operations(2, 8, 16, 1000) - once == 2 * 2 * 900 * 12 * 8**2


def test_weights_of_a_layer() -> None:
    model = tiny_model(layers=2, width=16)  # its MLP is 2 times as wide as the model
    assert weights_per_layer(model) == (4 + 2 * 2) * 16**2


def test_a_run_and_the_papers_size_at_its_rate(model, corpus, profile) -> None:
    (profile.results / "transcoders").mkdir(parents=True)
    (profile.results / "transcoders" / "training.json").write_text('{"seconds": 4.0}')
    passing = int(corpus.lengths[~corpus.held_out].sum())
    assert passing > profile.buffer_tokens
    run = training_cost(model, corpus, profile)
    per_layer = weights_per_layer(model)
    assert run == TrainingCost(448, training_operations(2, 16, 32, 448, per_layer), 4.0)
    kept = training_cost(model, corpus, profile.model_copy(update={"buffer_tokens": passing}))
    assert kept.operations - run.operations == 2 * 2 * (passing - 448) * per_layer
    settings = {"n_layers": 24.0, "width": 8192.0, "expansion": 8.0, "training_tokens": 6e7}
    paper = paper_cost(settings, run)
    assert paper.operations == training_operations(24, 1024, 8192, 60_000_000)
    assert paper.operations / paper.seconds == pytest.approx(run.operations / run.seconds)
    shown = cost_table(run, paper).set_index("measure")
    assert shown.loc["tokens"].tolist() == ["448", "60,000,000"]
    assert shown.loc["tokens per second", "this run"] == "112"
    assert shown.loc["time", "the paper's size"].endswith(", projected")


@pytest.mark.parametrize(("seconds", "words"), [
    (1, "1.0 seconds"), (119, "119 seconds"), (120, "2.0 minutes"), (7200, "2.0 hours"),
    (36 * 86400, "36 days")])
def test_time_in_words(seconds: float, words: str) -> None:
    assert time_in_words(seconds) == words


def test_no_benchmark_no_table(tmp_path: Path) -> None:
    assert benchmark_table(tmp_path / "training.json") is None


def test_the_table_says_what_was_extrapolated_and_where(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    path.write_text(json.dumps({
        "fraction_of_matmul_peak": 0.9, "ratio_vs_sparsify": None, "layers": 1, "device": "cpu",
        "cpu": "A <b>", "threads": 2,
        "tokens_per_second_24_layers_extrapolated_from_1": 60.0,
        "tokens_per_second_24_layers_extrapolated_from_1_50_active": 90.0}))
    found = benchmark_table(path)
    assert found is not None
    table, where = found
    assert where == "A <b>, 2 threads"
    assert table.set_index("measure")["value"].to_dict() == {
        "share of the matrix-product limit": 0.9,
        "tokens per second, 24 layers (extrapolated from 1)": 60.0}


def test_a_gpus_table_has_its_own_figures(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    path.write_text(json.dumps({"tokens_per_second": 2e5, "layers": 24, "device": "Some GPU",
                                "cpu": "A", "projected_minutes_for_60m_tokens": 5.0}))
    found = benchmark_table(path)
    assert found is not None
    assert found[1] == "Some GPU"
    assert found[0]["value"].tolist() == [2e5, 5.0]
