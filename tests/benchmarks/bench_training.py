"""Training at the paper's layer size against the machine's limit; run by hand or by `make bench`.

    make bench BENCH=training

On a GPU, if there is one, all 24 layers; on a CPU one layer and 2 threads, from which the 24 are
extrapolated. Weights, tokens and the GPT-NeoX are random. Everything is timed side by side in one
process, in rounds of one step of each, and medians are kept; memory is measured in processes of
their own. A learning rate near 0 keeps the share of active features where a round began: about
half, as at the start of a training, or 50 of 8,192 (`_50_active`), as late in one.

`fraction_of_matmul_peak` is the time of the step's five bare matrix products, in the step's shapes
and types, over the time of the step; where few features are active, a CPU leaves out what is
multiplied by 0 and can come out above 1. Products in bfloat16 are left out on a CPU that only
emulates them. On a GPU it is that of whole training, with the model's
forward pass, the buffer and the optimizer, and `_of_the_step` that of the step alone. There each
part is timed too (`milliseconds_part_...`: products, passes, Adam, and what they stand in for), the
model's pass with the buffer by cells at once, on cells of several lengths (`_padded`) and with its
attention compiled (`_compiled`), and the ways to take a step (`milliseconds_way_...`).

`--quick` takes fewer rounds, and no memory of the peers: under two minutes on a GPU. `--seconds` is
a limit for everything: what matters most comes first. Figures are written as they come, so a run
that is cut short leaves those that it had.

Peers: `autograd`, the step as this package had it before its gradient was written out, and sparsify
(TopK) where it can be imported, which is left without its data loading, masks and logging:

    pip install --target DIR --no-deps eai-sparsify==1.3.3 accelerate datasets einops natsort \\
        schedulefree simple-parsing docstring-parser dill multiprocess xxhash
    PYTHONPATH=DIR make bench BENCH=training

`ratio_vs_<peer>` is its time over ours, `memory_ratio_vs_<peer>` its memory over ours.
Writes results/bench/training.json.
"""

import argparse
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from machine import (
    MIB,
    above,
    cpu_has,
    cpu_model,
    multiplies_bfloat16,
    part,
    peak_mib,
    reset_peak,
)
from training_steps import (
    PAPER,
    RATE,
    K,
    Size,
    Step,
    activate,
    autograd,
    ours,
    parts,
    products,
    sparsify_step,
    sparsify_version,
)
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.files import write_json
from scfm_circuits.transcoders.training.activation_buffer import ActivationBuffer
from scfm_circuits.transcoders.training.run import TrainingRun
from scfm_circuits.transcoders.training.settings import precision_of
from scfm_circuits.transcoders.transcoder import Variant

ACTIVE = 50
IMPORTED = ["transformers.models.gpt_neox.modeling_gpt_neox",
            "scfm_circuits.transcoders.training.run"]
"""What takes long to import."""
CELL_TOKENS = 211
"""Tokens of the paper's Figure 4 prompt with its answer."""


class Training:
    """Training itself on a random model: forward pass, buffer, batches, steps, bookkeeping."""

    def __init__(self, size: Size, active: int | None, compiled: bool = True) -> None:
        # A fill is a whole number of batches; cells for three fills, so that each is harvested.
        buffer = PAPER.buffer_tokens if size.device == "cuda" else 4 * size.tokens
        cells = 3 * -(-buffer // CELL_TOKENS) + 1
        self.profile = PAPER.model_copy(update={
            "batch_tokens": size.tokens, "buffer_tokens": buffer, "expansion": size.expansion,
            "learning_rate": RATE, "warmup_steps": 0,
            "training_tokens": PAPER.training_tokens if compiled else size.tokens})
        self.run = TrainingRun(random_model(size), random_corpus(cells), self.profile)
        self.run.start()
        self.run.transcoders.b_in.zero_()  # as it is in `batch`
        activate(self.run.transcoders, self.run.buffer.sites(0).inputs, active)
        if active is not None:
            self.run.stepper.expect(active)
        self._batches, self._fill = self.run.buffer.batches(0), 0
        self.steps = 0

    def fill(self) -> None:
        """Train on the next fill of the buffer, which begins by making it; keeps `steps`."""
        log_every = PAPER.training_tokens // PAPER.batch_tokens // 200
        self.steps = self.run.buffer.n_batches(self._fill)
        for _ in range(self.steps):
            log = (self.run.step + 1) % log_every == 0
            self.run.train_step(next(self._batches), log=log)
        self._fill += 1


def random_model(size: Size) -> Any:
    """A GPT-NeoX of Pythia's proportions and random weights; its head is not used."""
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=1024, hidden_size=size.width, num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.width // 64), intermediate_size=4 * size.width,
        max_position_embeddings=256, rotary_pct=0.25, use_parallel_residual=True,
        attn_implementation="eager"))
    on_gpu = size.device == "cuda"
    return model.to(size.device, torch.bfloat16 if on_gpu else torch.float32).eval()


def random_corpus(n: int) -> Corpus:
    """n cells of CELL_TOKENS random tokens; none held out."""
    rng = np.random.default_rng(0)
    shape, none = (n, CELL_TOKENS), np.empty(0)
    tokens = rng.integers(0, 1024, shape)
    text = np.full(n, "")
    return Corpus(tokens, np.ones(shape, bool), np.zeros(shape, np.int32),
                  np.zeros(shape, np.int16), np.zeros(n, int), np.zeros(n, int), text, text,
                  np.zeros(n, bool), none, none, None)  # type: ignore[arg-type]


# --- measuring -----------------------------------------------------------------------------------


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


class Times:
    """Seconds of each step in interleaved rounds, after calls that compile."""

    def __init__(self, steps: dict[str, Step], rounds: int, device: str, warmups: int = 2) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(rounds + warmups):
            for name, step in steps.items():
                run, times = repeated(step, device) if name != "fill" else (step, 1)
                wait(device)
                start = time.perf_counter()
                run()
                wait(device)
                if number >= warmups:
                    self.seconds[name].append((time.perf_counter() - start) / times)

    def __getitem__(self, name: str) -> float:
        """The median of one step's times."""
        return median(self.seconds[name])

    def ratio(self, over: str, under: str) -> float | None:
        """The median over rounds of one step's time over another's; None if one was not timed."""
        if not {over, under} <= set(self.seconds):
            return None
        return median(a / b for a, b in
                      zip(self.seconds[over], self.seconds[under], strict=True))


def repeated(step: Step, device: str) -> tuple[Step, int]:
    """A step several times over on a GPU, which is given the next one while it does this one."""
    times = 5 if device == "cuda" else 1

    def run() -> None:
        for _ in range(times):
            step()

    return run, times


def step_figures(size: Size, rounds: int) -> dict[str, Any]:
    """Everything about single steps of this package, beside the products."""
    on_gpu, n = size.device == "cuda", size.layers
    at_once = n if on_gpu else 1
    kind, dense = precision_of(PAPER, torch.device(size.device)), Variant()
    steps: dict[str, Step] = {
        "products": products(size, n, kind, at_once),
        "step": ours(size, n, dense, precision=kind),
        "step_50_active": ours(size, n, dense, ACTIVE, precision=kind),
    }
    bfloat16 = not on_gpu and multiplies_bfloat16()
    if not on_gpu and not bfloat16:
        print("Left out: steps in bfloat16, which this processor does not multiply.", flush=True)
    if bfloat16:
        steps["products_bfloat16"] = products(size, n, torch.bfloat16, at_once)
        steps["step_bfloat16"] = ours(size, n, dense, precision=torch.bfloat16)
    t = Times(steps, rounds, size.device)
    figures: dict[str, Any] = {f"seconds_{name}": t[name] for name in steps}
    of_step = "_of_the_step" if on_gpu else ""
    figures |= {
        f"fraction_of_matmul_peak{of_step}": t.ratio("products", "step"),
        f"fraction_of_matmul_peak{of_step}_50_active": t.ratio("products", "step_50_active"),
        "matmul_gflops": 10e-9 * n * size.tokens * size.features * size.width / t["products"],
    }
    if bfloat16:
        figures["fraction_of_matmul_peak_bfloat16"] = t.ratio("products_bfloat16",
                                                              "step_bfloat16")
        figures["ratio_bfloat16_vs_float32"] = t.ratio("step", "step_bfloat16")
    return figures


def autograd_figures(size: Size, rounds: int) -> dict[str, Any]:
    """The autograd step over ours."""
    kind = precision_of(PAPER, torch.device(size.device))
    t = Times({"step": ours(size, size.layers, Variant(), precision=kind),
               "step_50_active": ours(size, size.layers, Variant(), ACTIVE, precision=kind),
               "autograd": autograd(size, size.layers)}, rounds, size.device)
    return {"seconds_autograd": t["autograd"], "ratio_vs_autograd": t.ratio("autograd", "step"),
            "ratio_vs_autograd_50_active": t.ratio("autograd", "step_50_active")}


def sparsify_figures(size: Size, rounds: int) -> dict[str, Any]:
    """The step of sparsify over ours; its kernels fail to load where Triton finds no GPU."""
    kind = precision_of(PAPER, torch.device(size.device))
    t = Times({"topk": ours(size, size.sparsify_layers, Variant("topk", K), precision=kind),
               "sparsify": sparsify_step(size, size.sparsify_layers)}, rounds, size.device)
    return {"seconds_topk": t["topk"], "seconds_sparsify": t["sparsify"],
            "ratio_vs_sparsify": t.ratio("sparsify", "topk")}


def part_figures(size: Size, rounds: int) -> dict[str, Any]:
    """Milliseconds of each part of a step on a GPU."""
    steps = parts(size, precision_of(PAPER, torch.device(size.device)))
    t = Times(steps, rounds, size.device)
    return {f"milliseconds_part_{name}": 1e3 * t[name] for name in steps}


WAYS: dict[str, dict[str, Any]] = {"kernels": {}, "eager": {"way": "plain"}}
"""Ways to take a step on a GPU: options of `ours`."""


def way_figures(size: Size, rounds: int, ways: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds of a step taken in each way, of which one at a time is in memory."""
    kind = precision_of(PAPER, torch.device(size.device))
    figures: dict[str, Any] = {}
    for name, options in ways.items():
        step = ours(size, size.layers, Variant(), **{"precision": kind, **options})
        t = Times({name: step}, rounds, size.device)
        figures[f"milliseconds_way_{name}"] = 1e3 * t[name]
        print(f"milliseconds_way_{name}: {1e3 * t[name]:.4g}", flush=True)
        del step, t
        if size.device == "cuda":
            torch.cuda.empty_cache()
    return figures


def training_figures(size: Size, active: int | None, rounds: int) -> dict[str, Any]:
    """Tokens per second of whole training, beside the products in the same process."""
    on_gpu = size.device == "cuda"
    training = Training(size, active)
    kind = training.run.precision
    bare = products(size, size.layers, kind, size.layers if on_gpu else 1)
    t = Times({"products": bare, "fill": training.fill}, rounds, size.device, warmups=1)
    step = t["fill"] / training.steps
    layers = PAPER.model_layers
    assert layers is not None
    per_second = size.tokens / step * (size.layers / layers)
    of = "" if size.layers == layers else f"_24_layers_extrapolated_from_{size.layers}"
    late = "" if active is None else "_50_active"
    figures: dict[str, Any] = {
        f"seconds_per_step_of_training{late}": step,
        f"tokens_per_second{of}{late}": per_second,
        f"projected_minutes_for_60m_tokens{of}{late}": PAPER.training_tokens / per_second / 60,
    }
    if on_gpu:
        figures[f"fraction_of_matmul_peak{late}"] = t["products"] / step
    if active is None:
        figures["peak_memory_mib"] = (torch.cuda.max_memory_allocated() / MIB if on_gpu
                                      else peak_mib())
        figures |= forward_figures(training, size, rounds)
    return figures


def harvest_milliseconds(buffer: ActivationBuffer, size: Size, rounds: int) -> float:
    """Milliseconds of the model's pass and of writing the buffer, for each step."""
    def fill() -> None:
        buffer._held = None
        buffer.sites(0)

    seconds = Times({"fill": fill}, rounds, size.device, warmups=1)["fill"]
    return 1e3 * seconds * size.tokens / buffer.sites(0).inputs.shape[1]


def forward_figures(training: Training, size: Size, rounds: int) -> dict[str, Any]:
    """The model's pass and the buffer by cells at once, and on cells of several lengths."""
    buffer, part = training.run.buffer, "milliseconds_part_forward_and_buffer"
    figures, usual = {}, buffer.cells_per_pass
    for cells in sorted({usual // 2, usual, 2 * usual} if size.device == "cuda" else {usual}):
        buffer.cells_per_pass = cells
        figures[f"{part}_{cells}_cells"] = harvest_milliseconds(buffer, size, rounds)
    buffer.cells_per_pass = usual
    if size.device == "cuda":
        lengths = np.random.default_rng(1).integers(CELL_TOKENS - 21, CELL_TOKENS + 1,
                                                    (len(buffer._corpus), 1))
        buffer._corpus = replace(buffer._corpus, mask=np.arange(CELL_TOKENS) < lengths)
        figures[f"{part}_padded"] = harvest_milliseconds(buffer, size, rounds)
    return figures


def compiled_forward_figures(size: Size, rounds: int) -> dict[str, Any]:
    """The model's pass and the buffer with its attention compiled, and as it is without."""
    found: dict[str, Any] = {}
    for name, compiled in (("as_it_is", False), ("compiled", True)):
        began = time.perf_counter()
        buffer = Training(size, None, compiled).run.buffer
        wait(size.device)
        found[f"seconds_to_begin_{name}"] = time.perf_counter() - began
        found[f"milliseconds_part_forward_and_buffer_{name}"] = harvest_milliseconds(
            buffer, size, rounds)
    return found


def memory_figure(name: str, size: Size) -> dict[str, float | None]:
    """Memory that three steps take above what the process had before, libraries included."""
    kind = precision_of(PAPER, torch.device(size.device))
    makers: dict[str, Callable[[Size], Step]] = {
        "step": lambda size: ours(size, size.layers, Variant(), precision=kind),
        "autograd": lambda size: autograd(size, size.layers),
        "topk": lambda size: ours(size, size.sparsify_layers, Variant("topk", K), precision=kind),
        "sparsify": lambda size: sparsify_step(size, size.sparsify_layers),
    }
    makers[name](size._replace(layers=1, sparsify_layers=1, width=64, tokens=64))()
    before = reset_peak()
    if size.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = makers[name](size)
    for _ in range(3):
        step()
    found = (torch.cuda.max_memory_allocated() / MIB if size.device == "cuda" else above(before))
    return {f"memory_mib_{name}": found}


def guarded(function: Callable[..., dict[str, Any]], arguments: tuple) -> dict[str, Any] | str:
    """What a function returns, or what went wrong: not every exception can leave a process."""
    try:
        return function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:300]}"


def apart(threads: int, until: float, function: Callable[..., dict[str, Any]], *arguments: Any
          ) -> dict[str, Any]:
    """What a function returns in a process of its own; without its figures if it fails there.

    until: when it is ended, by the clock of `time.perf_counter`. Where there is a GPU, the process
    is a copy of one that has imported everything; memory is measured in what begins empty.
    """
    with part(f"{function.__name__}{' ' + arguments[0] if isinstance(arguments[0], str) else ''}"):
        found = _apart(threads, until, function, *arguments)
    if isinstance(found, str):
        print(f"{function.__name__} failed: {found}", flush=True)
        return {f"failed_{function.__name__}": found}
    for key, value in found.items():
        print(f"{key}: {value:.6g}" if isinstance(value, float) else f"{key}: {value}", flush=True)
    return found


def _apart(threads: int, until: float, function: Callable[..., dict[str, Any]], *arguments: Any
           ) -> dict[str, Any] | str:
    """What a function returns in a process of its own, or why it does not."""
    began = time.perf_counter()
    if began < until:
        context: Any = multiprocessing.get_context("spawn")
        if torch.cuda.is_available():
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(IMPORTED)
        with context.Pool(1, torch.set_num_threads, (threads,)) as pool:
            given = pool.apply_async(guarded, (function, arguments))
            try:
                return given.get(min(until - began, 86400))
            except multiprocessing.TimeoutError:
                return "ended at the limit"
    return "no time was left"


def measure(size: Size, rounds: int, threads: int, quick: bool, until: float,
            write: Callable[[dict[str, Any]], None]) -> None:
    """All figures, each part in its own process, so that none holds memory of another."""
    few, on_gpu = max(2, rounds // 3), size.device == "cuda"
    tasks: list[tuple] = [(training_figures, size, None, few), (step_figures, size, rounds)]
    if on_gpu:
        tasks += [(part_figures, size, few), (way_figures, size, few, WAYS)]
    if sparsify_version():
        tasks.append((sparsify_figures, size, few if quick else rounds))
    tasks.append((autograd_figures, size, few if quick else rounds))
    if on_gpu:
        tasks.append((compiled_forward_figures, size, few))
    tasks.append((training_figures, size, ACTIVE, few))
    if on_gpu:  # last: compiling them takes long
        slow: dict[str, dict[str, Any]] = {"compiled": {"way": "compiled"}}
        slow |= {} if quick else {"compiled_1_layer": {"way": "compiled", "layers_at_once": 1}}
        tasks.append((way_figures, size, few, slow))
    for function, *arguments in tasks:
        write(apart(threads, until, function, *arguments))
    if quick:
        return
    memory: dict[str, Any] = {}
    for name in ("step", "autograd", *(("topk", "sparsify") if sparsify_version() else ())):
        memory |= apart(threads, until, memory_figure, name, size)
    for peer, own in (("autograd", "step"), ("sparsify", "topk")):
        pair = memory.get(f"memory_mib_{peer}"), memory.get(f"memory_mib_{own}")
        memory[f"memory_ratio_vs_{peer}"] = pair[0] / pair[1] if all(pair) else None
    write(memory)


def main() -> None:
    """Read the options, measure, print and write the figures."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=24 if on_gpu else 1)
    parser.add_argument("--sparsify-layers", type=int, default=24 if on_gpu else 2)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=PAPER.batch_tokens, help="tokens in a step")
    parser.add_argument("--rounds", type=int, help="default: 20 on a GPU, 7 on a CPU")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no memory of peers")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for everything")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--output", default="results/bench/training.json")
    options = parser.parse_args()
    until = time.perf_counter() + options.seconds
    size = Size("cuda" if on_gpu else "cpu", options.layers, options.sparsify_layers,
                options.width, PAPER.expansion, options.tokens)
    if not on_gpu:
        print(f"No GPU: {size.layers} layer(s) on {options.threads} threads of the CPU. The same "
              "command measures all 24 layers where there is a GPU.", flush=True)
    if not sparsify_version():
        print("sparsify is not installed, its figures are left out; see the head of this file.")
    rounds = options.rounds or (6 if options.quick else 20 if on_gpu else 7)
    figures: dict[str, Any] = {}
    about = {
        "layers": size.layers, "width": size.width, "features": size.features,
        "tokens_per_step": size.tokens, "rounds": rounds, "sparsify_n_layers": size.sparsify_layers,
        "peer": f"sparsify {sparsify_version()} SparseCoder, TopK k={K}, float32 weights, fused "
                "Adam" if sparsify_version() else None,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "cpu": cpu_model(), "cpu_has_avx512_bf16": cpu_has("avx512_bf16"),
        "cores": os.cpu_count(), "threads": options.threads, "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(), "torch": torch.__version__,
    }

    def write(found: dict[str, Any]) -> None:
        figures.update(found)
        write_json(options.output, {**figures, **about})

    measure(size, rounds, options.threads, options.quick, until, write)


if __name__ == "__main__":
    main()
