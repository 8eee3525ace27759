"""Training on a real GPU: its steps against float64 on the processor, and bfloat16 against float32.

Run by `pytest -m gpu`.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TRAINING, model_for, tiny_corpus, tiny_profile
from plain_layer import given_sites, pairs, stack

from scfm_circuits.transcoders.training.history import known_mean
from scfm_circuits.transcoders.training.optimizer import Stepper
from scfm_circuits.transcoders.training.run import TrainingRun
from scfm_circuits.transcoders.transcoder import Variant

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                  reason="there is no GPU")]

SINGLE, HALF = torch.float32, torch.bfloat16
CASES = [(Variant(), "normalized", HALF, True), (Variant(), "normalized", HALF, False),
         (Variant(), "equation4", SINGLE, True), (Variant(), "equation4", SINGLE, False),
         (Variant("topk", 16), "normalized", HALF, True),
         (Variant("batchtopk", 16), "equation4", HALF, False),
         (Variant("jumprelu"), "normalized", SINGLE, True),
         (Variant("relu", skip=True), "normalized", HALF, False)]
"""Each is compiled anew, which takes seconds."""
BOUNDS = {SINGLE: 1e-4, HALF: 0.12}
"""How far a gradient may lie from that in float64, by norms; rounding changes which are the k
largest, so that TopK's lie 0.08 away on a CPU, and ReLU's 0.01."""


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """A function is compiled for a few kinds of arguments only, then done without."""
    torch._dynamo.reset()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double().cpu() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.parametrize("variant, loss, precision, measured", CASES, ids=str)
def test_a_step_is_that_of_float64_on_the_processor(variant: Variant, loss: str,
                                                    precision: torch.dtype, measured: bool
                                                    ) -> None:
    exact = stack(variant, layers=3, d=64, f=512)
    x, y = pairs(3, 256, 64, seed=5)
    own = copy.deepcopy(exact).float().cuda()
    there = x.to("cuda", precision), y.to("cuda", precision)
    # The reference is given what the GPU is given: inputs rounded to its type.
    wanted, found = Stepper(exact, loss, sparse=False), Stepper(own, loss, precision)
    given = given_sites(*(one.double().cpu() for one in there))
    measures = wanted.step(given, 1e-3, 0.01, 1, measured), found.step(
        given_sites(*there), 1e-3, 0.01, 1, measured)
    bound = BOUNDS[precision]
    for name, mean in wanted.mean.items():
        # A threshold's gradient is a count of what lies within a narrow window, edges included.
        if float(mean.norm()) and name != "log_threshold":
            assert distance(found.mean[name], mean) < bound, name
    for name, one in (*exact.named_parameters(), *exact.named_buffers()):
        other = dict([*own.named_parameters(), *own.named_buffers()])[name]
        assert distance(other, one.data) < bound, name
    if measured:
        for one, other in zip((*measures[0].losses, measures[0].l0, measures[0].fvu),
                              (*measures[1].losses, measures[1].l0, measures[1].fvu), strict=True):
            assert distance(other, one) < bound
    assert float((measures[1].fired.cpu() != measures[0].fired).float().mean()) < bound


@pytest.mark.parametrize("fields", [{}, {"activation": "topk", "active_features": 4}], ids=str)
def test_bfloat16_reaches_what_float32_reaches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                               fields: dict[str, Any]) -> None:
    ends = compare_precisions(monkeypatch, tmp_path, torch.device("cuda"), fields)
    for name, (single, half) in ends.items():
        assert half == pytest.approx(single, rel=0.05), name


def compare_precisions(monkeypatch: pytest.MonkeyPatch, folder: Path, device: torch.device,
                       fields: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Reconstruction, L0 and FVU in the last rows of two trainings of one seed."""
    corpus = tiny_corpus(60)
    model = model_for(corpus, width=32, dtype=torch.float32).to(device)
    found = []
    for precision in ("float32", "bfloat16"):
        profile = tiny_profile(monkeypatch, folder, **{
            **TRAINING, "training_tokens": 128 * 600, "batch_tokens": 128, "buffer_tokens": 4096,
            "warmup_steps": 50, "learning_rate": 1e-3, "expansion": 8, "l1_coefficient": 1e-3,
            "precision": precision, **fields})
        run = TrainingRun(model, corpus, profile)
        run.run(progress=False)
        found.append({name: float(np.mean([known_mean(row[name]) for row in run.history[-20:]]))
                      for name in ("reconstruction", "l0", "fvu")})
    return {name: (found[0][name], found[1][name]) for name in found[0]}
