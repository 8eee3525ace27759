"""Passes over the corpus at the paper's size, where nothing is trained: counting, Tables 1 and 2.

    make bench BENCH=passes

A GPT-NeoX of 24 layers x 1,024 and transcoders of 8,192 features, all random, on cells of 211
random tokens, 32 at a time; on a CPU one layer of each, 4 at a time. TopK stands in for trained
features' sparsity. The profile `paper` has 316,000 cells, of which a tenth are held out;
`minutes_for_paper` is what one pass over them takes with all 24 layers (counting: all cells;
validation: those held out, under all configurations of Tables 1 and 2).
Writes results/bench/passes.json.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from machine import MIB, cpu_model, part
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.files import write_json
from scfm_circuits.features.pair_counts import PairCounts
from scfm_circuits.features.statistics import count_features
from scfm_circuits.transcoders.transcoder import Transcoders, Variant
from scfm_circuits.transcoders.validation import configurations, scores_by_cell

CELLS, HELD_OUT, CELL_TOKENS, GENES, PIECES = 316_000, 31_600, 211, 20_000, 3
ACTIVE, VOCABULARY = 48, 50_304


def random_corpus(n: int) -> Corpus:
    """n cells of genes of three random pieces each, a few genes in most cells; none held out."""
    rng = np.random.default_rng(0)
    shape, none = (n, CELL_TOKENS), np.zeros(n, int)
    text, symbols = np.full(n, ""), np.array([f"G{i}" for i in range(GENES)])
    common = rng.lognormal(0, 2, GENES)
    drawn = rng.choice(GENES, (n, -(-CELL_TOKENS // PIECES)), p=common / common.sum())
    pieces = rng.integers(0, 5000, (GENES, PIECES))
    tokens = pieces[drawn].reshape(n, -1)[:, :CELL_TOKENS]
    gene = np.repeat(drawn, PIECES, axis=1)[:, :CELL_TOKENS].astype(np.int32)
    return Corpus(tokens, np.ones(shape, bool), gene, np.zeros(shape, np.int16), none, none, text,
                  text, np.zeros(n, bool), symbols, np.empty(0), None)  # type: ignore[arg-type]


class Flushes:
    """Adds up the seconds in which keys are sorted into sparse counts, once all else is done."""

    def __init__(self) -> None:
        self.seconds, flush = 0.0, PairCounts.flush

        def timed_flush(counts: PairCounts) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            flush(counts)
            self.seconds += time.perf_counter() - began

        PairCounts.flush = timed_flush  # type: ignore[method-assign]


def stand_ins(layers: int, width: int, device: str) -> tuple[Any, Transcoders]:
    """A model and transcoders of random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPTNeoXForCausalLM(GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers,
            num_attention_heads=16, intermediate_size=4 * width, rotary_pct=0.25,
            max_position_embeddings=2048, use_parallel_residual=True,
            attn_implementation="eager")).eval().requires_grad_(False)
        transcoders = Transcoders(layers, width, 8 * width, Variant("topk", ACTIVE))
    return model, transcoders.initialise(0).requires_grad_(False)


def timed(work: Callable[[], Any]) -> tuple[float, float | None]:
    """Seconds of a second call, and the peak of the GPU's memory in MiB."""
    on_gpu = torch.cuda.is_available()
    work()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / MIB if on_gpu else None
    return time.perf_counter() - began, peak


def measure(layers: int, width: int, batches: int, device: str) -> dict[str, Any]:
    """All figures; batches: how many are counted."""
    together = 32 if device == "cuda" else 4
    with part("random model, transcoders and cells"):
        model, transcoders = stand_ins(layers, width, device)
        corpus = random_corpus(batches * together)
    n_tokens, few = int(corpus.mask.sum()), np.arange(together)
    flushes = Flushes()
    with part("counting"):
        counting, counting_peak = timed(lambda: count_features(
            model, transcoders, corpus, together, progress=False))
    with part("validation"):
        chosen = configurations(transcoders, torch.zeros(layers, width))
        validation, validation_peak = timed(lambda: scores_by_cell(
            model, chosen, corpus, few, together))
    tokens_of_few = int(corpus.mask[few].sum())
    found = {"counting_tokens_per_second": n_tokens / counting,
             "counting_peak_gpu_mib": counting_peak,
             "counting_share_in_sparse_counts": flushes.seconds / 2 / counting,
             "validation_tokens_per_second": tokens_of_few / validation,
             "validation_peak_gpu_mib": validation_peak}
    if layers == 24:
        for name, cells in (("counting", CELLS), ("validation", HELD_OUT)):
            found[f"{name}_minutes_for_paper"] = (
                cells * CELL_TOKENS / found[f"{name}_tokens_per_second"] / 60)
    return found


def main() -> None:
    """Read the options, measure, print and write the figures."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=24 if on_gpu else 1)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=16 if on_gpu else 1)
    parser.add_argument("--output", default="results/bench/passes.json")
    options = parser.parse_args()
    found = measure(options.layers, options.width, options.batches, "cuda" if on_gpu else "cpu")
    for key, value in found.items():
        print(f"{key}: {value:.6g}" if isinstance(value, float) else f"{key}: {value}")
    write_json(options.output, {
        **found, "layers": options.layers, "width": options.width,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu", "cpu": cpu_model(),
        "torch": torch.__version__})


if __name__ == "__main__":
    main()
