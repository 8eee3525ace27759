"""Seconds and memory per circuit, small and at the paper's size; run by hand or by `make bench`.

    SCFM_TOKENIZER=<folder of the paper's tokenizer> python tests/benchmarks/bench_circuits.py

Two GPT-NeoX of random weights: `demo`, of the demo profile's size, and `paper`, of 24 layers and
width 1,024 with transcoders of 8,192 features, on the sentence of the paper's Figure 4 prompt with
its full stop, 211 tokens. Encoder biases are set so that 50 features are active per token and
layer. Each runs in a process of its own, so that its peak memory is its own. Times are for one
circuit: the frozen run, the greedy search from the strongest feature of the last layer, and the
direct-effect graph. Without SCFM_TOKENIZER, random tokens of the same number stand in.
Writes results/bench/circuits.json.
"""

import argparse
import multiprocessing
import os
import platform
import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from machine import above, cpu_model, part, peak_mib, reset_peak
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from scfm_circuits.cells.tokens import load_tokenizer
from scfm_circuits.circuits.attribution import contributions, feature_direction
from scfm_circuits.circuits.frozen import Frozen, freeze
from scfm_circuits.circuits.graph import attribution_graph, feature_target
from scfm_circuits.circuits.graph_scores import prune
from scfm_circuits.circuits.search import strongest_features, trace_feature
from scfm_circuits.common.files import write_json
from scfm_circuits.common.profile import ROOT, load_profile
from scfm_circuits.transcoders.transcoder import Transcoders

SIZES: dict[str, dict[str, int]] = {
    "demo": dict(layers=4, width=128, heads=4, features=1_024, vocabulary=1_024, tokens=159),
    "paper": dict(layers=24, width=1_024, heads=16, features=8_192, vocabulary=50_304, tokens=211),
}
ACTIVE_PER_TOKEN = 50


def prompt_tokens(size: dict[str, int], tokenizer: str | None) -> np.ndarray:
    """(n_tokens,) the sentence of the paper's prompt, or random tokens of the same number."""
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, size["vocabulary"], size["tokens"])
    genes = pd.read_csv(ROOT / "data" / "paper" / "figure4_genes.csv")["gene"]
    return np.array(load_tokenizer(tokenizer).encode(" ".join(genes) + "."))


def random_model(size: dict[str, int]) -> GPTNeoXForCausalLM:
    """A GPT-NeoX of random weights, in float32, with eager attention."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=size["vocabulary"], hidden_size=size["width"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"],
        intermediate_size=4 * size["width"], max_position_embeddings=2_048, rotary_pct=0.25,
        use_parallel_residual=True, attn_implementation="eager", bos_token_id=0, eos_token_id=0)
    return GPTNeoXForCausalLM(config).float().eval().requires_grad_(False)


@torch.no_grad()
def sparse_transcoders(model: GPTNeoXForCausalLM, size: dict[str, int], tokens: np.ndarray
                       ) -> Transcoders:
    """Random transcoders whose biases let ACTIVE_PER_TOKEN features of a layer be active."""
    transcoders = Transcoders(size["layers"], size["width"], size["features"])
    transcoders.requires_grad_(False).initialise(1)
    pre = freeze(model, transcoders, tokens).pre
    for layer in range(size["layers"]):
        flat = pre[layer].flatten()
        below = len(flat) - ACTIVE_PER_TOKEN * len(tokens)
        transcoders.b_enc[layer] = -flat.kthvalue(below).values
    return transcoders


def measure(name: str, max_features: int, tokenizer: str | None) -> dict[str, Any]:
    """All figures of one size, units in their names."""
    size = SIZES[name]
    with part(f"{name}: random model and transcoders"):
        tokens = prompt_tokens(size, tokenizer if name == "paper" else None)
        model = random_model(size)
        transcoders = sparse_transcoders(model, size, tokens)
    peak = peak_mib()
    before = reset_peak()
    with part(f"{name}: freezing the model on one prompt"):
        start = time.perf_counter()
        frozen = freeze(model, transcoders, tokens)
        seconds_freeze = time.perf_counter() - start
    last, position = size["layers"] - 1, len(tokens) - 1
    feature = strongest_features(frozen, last, position, 1)[0]
    figures = {
        "layers": size["layers"], "width": size["width"], "heads": size["heads"],
        "transcoder_features": size["features"], "n_tokens": len(tokens),
        "tokens_are": "the paper's sentence" if tokenizer and name == "paper" else "random",
        "active_per_token": float((frozen.pre > 0).sum() / (len(tokens) * size["layers"])),
        "freeze_seconds": seconds_freeze, "freeze_extra_peak_mib": above(before),
    }
    peak = max(peak, peak_mib())
    with part(f"{name}: greedy search"):
        figures.update(measure_greedy(frozen, last, feature, position))
    peak = max(peak, peak_mib())
    with part(f"{name}: graph of direct effects"):
        figures.update(measure_graph(frozen, last, feature, position, max_features))
    return {**figures, "peak_rss_mib_with_setup": max(peak, peak_mib())}


def measure_greedy(frozen: Frozen, layer: int, feature: int, position: int) -> dict[str, Any]:
    """The greedy search with the profiles' own limits."""
    profile, reading = load_profile("paper"), feature_direction(frozen, layer, feature, position)
    before = reset_peak()
    start = time.perf_counter()
    contributions(frozen, reading)
    one = time.perf_counter() - start
    start = time.perf_counter()
    circuit = trace_feature(frozen, layer, feature, position, branches=profile.circuit_branches,
                            depth=profile.circuit_depth, max_nodes=profile.circuit_nodes)
    return {
        "greedy_seconds": time.perf_counter() - start,
        "greedy_peak_rss_mib": peak_mib(), "greedy_extra_peak_mib": above(before),
        "greedy_seconds_first_contributions": one,
        "greedy_n_nodes": len(circuit.nodes), "greedy_n_edges": len(circuit.edges),
        "greedy_n_expanded": len(circuit.expansions),
        "greedy_closure_max_relative": circuit.closure_max_relative,
    }


def measure_graph(frozen: Frozen, layer: int, feature: int, position: int, max_features: int
                  ) -> dict[str, Any]:
    """The direct-effect graph, and its pruning."""
    target = [feature_target(frozen, layer, feature, position)]
    before = reset_peak()
    start = time.perf_counter()
    graph = attribution_graph(frozen, target, max_features=max_features)
    seconds, extra = time.perf_counter() - start, above(before)
    start = time.perf_counter()
    pruned = prune(graph)
    seconds_prune = time.perf_counter() - start
    rows = int(graph.of_kind("feature").sum())
    return {
        "graph_seconds": seconds, "graph_milliseconds_per_row": 1000 * seconds / rows,
        "graph_prune_seconds": seconds_prune,
        "graph_n_active_features": graph.n_active, "graph_n_rows": rows,
        "graph_n_nodes": len(graph.nodes), "graph_n_edges": graph.n_edges,
        "graph_n_nodes_pruned": len(pruned.nodes), "graph_n_edges_pruned": pruned.n_edges,
        "graph_closure_max_relative": graph.closure_max_relative,
        "graph_peak_rss_mib": peak_mib(), "graph_extra_peak_mib": extra,
    }


def main() -> None:
    """Read the options, run each size in its own process, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--max-features", type=int, default=200, help="rows of the graph")
    parser.add_argument("--output", default="results/bench/circuits.json")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for name in options.sizes:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (name, options.max_features,
                                         os.environ.get("SCFM_TOKENIZER")))
        for key, value in found.items():
            figures[f"{name}_{key}"] = value
            print(f"{name}_{key}: {value:.6g}" if isinstance(value, float)
                  else f"{name}_{key}: {value}", flush=True)
    write_json(options.output, {
        **figures, "cpu": cpu_model(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__,
    })


if __name__ == "__main__":
    main()
