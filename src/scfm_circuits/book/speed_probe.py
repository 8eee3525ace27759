"""How fast this machine is at what a run consists of, measured in seconds.

Four things are timed, at the run's own shapes and on random numbers: a layer of the model, the
unembedding, a training step of one layer's transcoder, and counting one layer's features. A run is
made of millions of them, so its time can be told beforehand (`run_plan`).
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scfm_circuits.book.run_sizes import RunSizes
from scfm_circuits.common.profile import Profile
from scfm_circuits.features.counting import Batch, FeatureTotals, add_on_cpu, add_on_gpu
from scfm_circuits.models.architectures import decoder
from scfm_circuits.models.loading import model_dtype
from scfm_circuits.transcoders.training.optimizer import Stepper
from scfm_circuits.transcoders.training.settings import precision_of, variant_of
from scfm_circuits.transcoders.transcoder import Transcoders

TOKENS = 2048
"""Tokens that are timed at most, as large as the paper's batch."""
SECONDS = 0.4
"""How long each is repeated for at least; the best counts."""
SPARSE_BIAS = -3.0
"""Bias under which random features fire on a token in a few hundred, as trained ones do."""


class Speeds(NamedTuple):
    """Seconds per token; but for `unembedding`, per layer of the model too.

    forward: a pass of the model. unembedding: logits and their log-softmax. training: a step.
    counting: activations and what is counted of them.
    """

    forward: float
    unembedding: float
    training: float
    counting: float


def measure_speeds(profile: Profile, sizes: RunSizes, device: torch.device) -> Speeds:
    """Measure on the device; a few seconds, and the memory of one layer.

    On a GPU the training step is timed as it is before it is compiled, so the real one is faster.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return Speeds(*_forward(profile, sizes, device), _train(profile, sizes, device),
                      _count(profile, sizes, device))


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several runs, after one that is not timed."""
    run()
    spent, best = 0.0, float("inf")
    while spent < SECONDS or best == float("inf"):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - began
        spent, best = spent + took, min(best, took)
    return best


@torch.no_grad()
def _forward(profile: Profile, sizes: RunSizes, device: torch.device) -> tuple[float, float]:
    """Seconds per token of one layer, and of the unembedding."""
    from transformers import AutoModelForCausalLM

    given = {**sizes.config.to_dict(), "num_hidden_layers": 1}
    if given.get("layer_types"):  # one entry for each layer
        given["layer_types"] = given["layer_types"][:1]
    config: Any = type(sizes.config)(**given)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).to(device, model_dtype(profile)).eval()
    length = max(2, round(sizes.length))
    cells = max(1, min(profile.forward_cells, TOKENS // length))
    tokens = torch.randint(sizes.vocabulary, (cells, length), device=device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    asked = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
    run = decoder(model)
    layer = _best(lambda: run(**asked), device)
    last = run(**asked).last_hidden_state[0, :256]
    unembed = _best(lambda: model.get_output_embeddings()(last).float().log_softmax(-1), device)
    return layer / tokens.numel(), unembed / len(last)


def _transcoder(profile: Profile, sizes: RunSizes, device: torch.device) -> Transcoders:
    width = profile.expansion * sizes.width
    return Transcoders(1, sizes.width, width, variant_of(profile)).initialise(0).to(device)


def _train(profile: Profile, sizes: RunSizes, device: torch.device) -> float:
    """Seconds per token of a training step of one layer; dense, so an upper bound."""
    precision = precision_of(profile, device)
    stepper = Stepper(_transcoder(profile, sizes, device), profile.loss, precision,
                      compiled=False, sparse=False)
    n = min(profile.batch_tokens, TOKENS)
    x = torch.randn(1, n, sizes.width, device=device, dtype=precision)
    numbers = iter(range(1, 10**9))

    def step() -> None:
        stepper.step(lambda layers: (x[layers], x[layers]), 1e-4, profile.l1_coefficient,
                     next(numbers))

    return _best(step, device) / n


@torch.no_grad()
def _count(profile: Profile, sizes: RunSizes, device: torch.device) -> float:
    """Seconds per token of making one layer's activations and counting them."""
    transcoders = _transcoder(profile, sizes, device)
    # Rows of norm 1: pre-activations are of order 1, whatever the sizes.
    transcoders.W_enc.div_(transcoders.W_enc.norm(dim=-1, keepdim=True))
    transcoders.b_enc.fill_(SPARSE_BIAS)
    n, n_pairs = TOKENS, 10_000
    totals = FeatureTotals(1, transcoders.n_features, n_pairs, n, profile.contexts_per_feature,
                           device)
    batch = _random_batch(n, n_pairs, max(2, round(sizes.length)), device)
    x = torch.randn(1, n, sizes.width, device=device)
    if device.type == "cuda":
        return _best(lambda: add_on_gpu(totals, transcoders, x, batch), device) / n
    return _best(lambda: add_on_cpu(totals, transcoders, 0, x[0], batch), device) / n


def _random_batch(n: int, n_pairs: int, length: int, device: torch.device) -> Batch:
    at: Tensor = torch.arange(n, device=device)
    cell = at // length
    return Batch(torch.randint(n_pairs, (n,), device=device), cell, at % length,
                 np.bincount(cell.cpu().numpy()))
