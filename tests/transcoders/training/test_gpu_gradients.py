"""Steps on a GPU: its kernels, and every way to take a step, against float64 on the CPU.

On a machine without a GPU the kernels' own tests run in Triton's interpreter where it is installed
and TRITON_INTERPRET=1 is set; the rest is skipped.
"""

import os
from typing import Any

import pytest
import torch
from plain_layer import LOSSES, VARIANTS, given_sites, pairs, stack
from torch import Tensor

from scfm_circuits.transcoders.activations import ACTIVATIONS, Activation
from scfm_circuits.transcoders.training.gradients import adam_rows, corrected
from scfm_circuits.transcoders.training.optimizer import Stepper
from scfm_circuits.transcoders.transcoder import Transcoders, Variant, unit_rows

pytestmark = pytest.mark.gpu
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
needs_triton = pytest.mark.skipif(not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1",
                                  reason="needs a GPU, or Triton's interpreter")
FUSED = [variant for variant in VARIANTS if ACTIVATIONS[variant.activation].threshold is None]


def apart(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm of the second, in float64 on the CPU."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).norm() / other.norm().clamp_min(1e-12))


def is_copy(one: Tensor, other: Tensor) -> bool:
    """Whether one is the other in its own type; Triton's interpreter cuts digits off instead."""
    exact = ON_GPU or one.dtype == other.dtype
    return torch.equal(one, other.to(one.dtype)) if exact else apart(one, other) < 1e-2


@pytest.fixture
def kernels() -> Any:
    """The module with the kernels, which imports Triton."""
    from scfm_circuits.transcoders.training import gpu_gradients

    return gpu_gradients


# --- kernels -------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("width", [1, 6, 300])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_buffer_are_taken_and_centred(kernels, width, kind):
    g = torch.Generator().manual_seed(2)
    room = torch.randn((4, 50, width), generator=g).to(kind)
    mean = torch.randn((2, width), generator=g).to(kind)
    chosen = torch.tensor([7, 0, 39, 7, 21])
    source = room.to(DEVICE)[1:3, :40]  # a part of a larger buffer
    expected = room[1:3, chosen]
    taken = kernels.rows(source, chosen.to(DEVICE))
    assert torch.equal(taken.cpu(), expected) and taken.is_contiguous()
    less = kernels.rows(taken, less=mean.to(DEVICE))
    assert is_copy(less.cpu(), (expected.float() - mean.float()[:, None]))
    both = kernels.rows(source, chosen.to(DEVICE), mean.to(DEVICE))
    assert torch.equal(both, less)
    whole = kernels.rows(room.to(DEVICE).mT.contiguous().mT)  # tokens that are not contiguous
    assert torch.equal(whole.cpu(), room)


@needs_triton
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unit", [False, True])
def test_adam_is_adam_rows_and_keeps_the_copy(kernels, unit, kind):
    g = torch.Generator().manual_seed(0)
    exact = unit_rows(torch.randn(3, 7, 300, generator=g, dtype=torch.float64))
    moments = torch.zeros((2, *exact.shape), dtype=torch.float64)
    weight, (mean, square) = exact.float().to(DEVICE), moments.float().to(DEVICE)
    copy = torch.full_like(weight, torch.nan, dtype=kind)
    for step in range(1, 6):
        gradient = torch.randn(exact.shape, generator=g).to(kind) * 10.0 ** (step - 3)
        factors = corrected(0.1 / step, step)
        kernels.adam(gradient.to(DEVICE), weight, mean, square, copy, factors, unit)
        adam_rows(exact, gradient, *moments, *(torch.tensor(one) for one in factors), unit)
        for one, other in ((weight, exact), (mean, moments[0]), (square, moments[1])):
            assert apart(one, other) < 1e-5
        assert is_copy(copy, weight)


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 37, 130), (3, 64, 256)], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_active_is_cut_and_the_rest_is_summed(kernels, shape, kind):
    g = torch.Generator().manual_seed(1)
    inner, z = torch.randn((2, *shape), generator=g).to(kind)
    z = z.relu()
    given = inner.clone().to(DEVICE)
    sums, counts = kernels.cut(given, z.to(DEVICE), 0.25)
    expected = torch.where(z > 0, inner.double() + 0.25, 0)
    assert apart(given, expected) < (1e-6 if kind == torch.float32 else 4e-3)
    assert apart(sums, expected.sum(dim=1)) < 1e-5
    assert torch.equal(counts.cpu(), (z > 0).sum(dim=1).int())


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 37, 300), (2, 70, 20)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_entries_are_all_that_is_not_0_in_order(shape, share):
    from scfm_circuits.transcoders.training.gpu_entries import entries

    g = torch.Generator().manual_seed(3)
    z = torch.rand(shape, generator=g) + 0.1
    z[torch.rand(shape, generator=g) >= share] = 0
    found = entries(z.to(DEVICE))
    for layer, token in torch.cartesian_prod(torch.arange(shape[0]), torch.arange(shape[1])):
        there = found.features[layer, token, : found.of_token[layer, token]].cpu().long()
        assert torch.equal(there, z[layer, token].nonzero()[:, 0])
    for layer, feature in torch.cartesian_prod(torch.arange(shape[0]), torch.arange(shape[2])):
        parts = zip(found.tokens[layer, feature], found.of_feature[layer, feature], strict=True)
        there = torch.cat([part[:n] for part, n in parts]).cpu().long()
        assert torch.equal(there, z[layer, :, feature].nonzero()[:, 0])


# --- whole steps ---------------------------------------------------------------------------------


def taken(t: Transcoders, loss: str, kind: torch.dtype, device: str, active: int | None = None,
          **options: Any) -> Stepper:
    """A stepper after a step that is measured and two that are not, with what it found.

    active: how many features it is told are active.
    """
    copied = Transcoders(t.n_layers, t.d_model, t.n_features, t.variant).requires_grad_(False)
    copied.to(device, t.W_enc.dtype if device == "cpu" else torch.float32)
    copied.load_state_dict(t.state_dict())
    stepper = Stepper(copied, loss, kind, **options)
    if active is not None:
        stepper.expect(active)
    first: Any = None
    for step in (1, 2, 3):
        x, y = (part.to(device) for part in pairs(t.n_layers, 300, t.d_model, step))
        found = stepper.step(given_sites(x, y), 1e-3, 0.05, step, measured=step == 1)
        first = first or found
    stepper.found = first  # type: ignore[attr-defined]
    return stepper


WAYS: dict[str, dict[str, Any]] = {
    "eager": {"way": "plain"},
    "compiled": {"way": "compiled"},
    "fused": {"way": "kernels"},
    "fused, two layers at a time": {"way": "kernels", "layers_at_once": 2},
    "fused, over entries": {"way": "kernels", "active": 0},
}
BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 5e-2}
"""Which features are active is decided by rounding now and then, which a norm shows."""


@needs_gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", BOUNDS, ids=str)
@pytest.mark.parametrize(("variant", "loss"), zip(VARIANTS, 4 * LOSSES, strict=True), ids=str)
def test_a_step_is_that_of_float64(variant, loss, kind, way, capsys):
    if way.startswith("fused") and variant not in FUSED:
        pytest.skip("this variant's steps are compiled")
    exact_type = variant.activation == "jumprelu"  # whose thresholds are compared in it alone
    if way == "compiled" and (variant.skip or exact_type != (kind == torch.float32)):
        pytest.skip("compiling each takes long")
    torch._dynamo.reset()
    variant = variant._replace(k=12)
    t = stack(variant, 3, 64, 512)
    exact = taken(t, loss, torch.float64, "cpu", way="plain")
    found = taken(t, loss, kind, "cuda", **WAYS[way])
    bound = BOUNDS[kind] * (1 if variant.activation == "relu" else 5)
    assert capsys.readouterr().out == "", "it was done without"
    for name in ("residual", "l0", "fvu"):
        assert apart(getattr(found.found, name), getattr(exact.found, name)) < bound
    for one, other in zip(found.found.losses, exact.found.losses, strict=True):
        assert apart(one, other) < bound
    for name, part in exact.trained.items():
        # The moments are sums of gradients; what Adam makes of small ones is their sign.
        if name != "log_threshold" or kind == torch.float32:
            assert apart(found.mean[name], exact.mean[name]) < bound
            assert apart(found.square[name], exact.square[name]) < 2 * bound
        assert float((found.trained[name].cpu() - part).abs().max()) < 8e-3
    norms = found.trained["W_dec"].norm(dim=-1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)


class EvenFeatures(Activation):
    """An activation that nothing else knows."""

    penalised = "l1"

    def select(self, z: Tensor, k: int) -> Tensor:
        return z * (torch.arange(z.shape[-1], device=z.device) % 2 == 0)


@needs_triton
@pytest.mark.parametrize("active", [1, 150])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("variant", [*FUSED, Variant("even")], ids=str)
def test_steps_by_kernels_are_those_without(kernels, variant, loss, active, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "even", EvenFeatures())
    steppers = [Stepper(stack(variant, 3, 6, 150, dtype=torch.float32).to(DEVICE), loss,
                        layers_at_once=at_once, way=way)
                for way, at_once in (("plain", 3), ("kernels", 2))]
    assert isinstance(steppers[1].way, kernels.GpuSteps)
    steppers[1].expect(active)  # over entries, or by products: both are right at any number
    x, y = (part.float().to(DEVICE) for part in pairs(3, 37, 6, 3))
    for step, measured in ((1, True), (2, False), (3, True)):
        one, other = (stepper.step(given_sites(x, y), 0.01, 0.1, step, measured)
                      for stepper in steppers)
        assert torch.equal(one.fired, other.fired)
        for part, its in zip((*one.losses, one.residual, one.l0, one.fvu),
                             (*other.losses, other.residual, other.l0, other.fvu), strict=True):
            assert apart(its, part) < 1e-5
    for name, part in steppers[0].trained.items():
        assert apart(steppers[1].trained[name], part) < 1e-5


@needs_triton
def test_weights_that_change_elsewhere_are_copied_anew(kernels):
    stepper = Stepper(stack(Variant(), 2, 6, 150, dtype=torch.float32).to(DEVICE), "normalized",
                      torch.bfloat16, way="kernels")
    fused, x = stepper.way, torch.randn(2, 2, 37, 6, device=DEVICE)
    assert isinstance(fused, kernels.GpuSteps)

    def step(number: int) -> None:
        stepper.step(given_sites(*x), 0.01, 0.1, number)
        for name, copy in fused.copies.items():
            assert is_copy(copy, stepper.trained[name])

    step(1)
    with torch.no_grad():
        stepper.transcoders.W_enc[0, :3] = 7
        stepper.transcoders.state_dict()["W_dec"].copy_(unit_rows(torch.ones(2, 150, 6)))
    before = fused.copies["W_enc"].clone()
    fused.copy()
    assert not torch.equal(fused.copies["W_enc"], before)
    for name, copy in fused.copies.items():
        assert is_copy(copy, stepper.trained[name])
    step(2)


# --- training ------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("fields", [{}, {"activation": "topk", "active_features": 4}], ids=str)
def test_training_in_bfloat16_reaches_what_float32_does(profile, corpus, fields):
    """Loss and FVU within 5 per cent, L0 within 5 per cent; the same seed, a small profile."""
    from helpers import model_for

    from scfm_circuits.transcoders.training.run import TrainingRun

    model = model_for(corpus, dtype=torch.float32).to("cuda")
    profile = profile.model_copy(update={"training_tokens": 64 * 800, "batch_tokens": 64,
                                         "buffer_tokens": 256, "expansion": 8,
                                         "learning_rate": 3e-3, **fields})
    ends = []
    for precision in ("float32", "bfloat16"):
        run = TrainingRun(model, corpus, profile.model_copy(update={"precision": precision}))
        run.run(progress=False)
        rows = run.history[-20:]
        ends.append({key: torch.tensor([row[key] for row in rows]).mean(dim=0)
                     for key in ("reconstruction", "sparsity", "fvu", "l0")})
        first = torch.tensor(run.history[0]["fvu"])
        assert (ends[-1]["fvu"] < 0.5 * first).all(), "it did not learn"
    for key, exact in ends[0].items():
        assert torch.allclose(ends[1][key], exact, rtol=0.05, atol=1e-3), key
