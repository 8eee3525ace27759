"""One training step: losses, gradients and Adam against plain single layers."""

import math

import pytest
import torch
from plain_layer import LOSSES, VARIANTS, PlainLayer, pairs, stack
from torch import Tensor

from scfm_circuits import InputError
from scfm_circuits.transcoders.training.gradients import (
    Objective,
    adam_rows,
    follow_threshold,
    gradients,
    transcoder_losses,
    without_parallel,
)
from scfm_circuits.transcoders.transcoder import Variant, unit_rows

torch.set_num_threads(1)


# --- losses --------------------------------------------------------------------------------------


def random_batch(seed: int = 0, layers: int = 2, n: int = 6, d: int = 5, f: int = 9
                 ) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(layers, n, d, generator=g, dtype=torch.float64)
    estimate = torch.randn(layers, n, d, generator=g, dtype=torch.float64)
    return y, estimate, torch.randn(layers, n, f, generator=g, dtype=torch.float64).relu()


def test_equation_4_of_the_paper():
    y, estimate, z = random_batch()
    found = transcoder_losses("equation4", 0.3, y, estimate, z)
    for layer in range(2):
        error = penalty = 0.0
        for n in range(6):
            error += sum(float(estimate[layer, n, i] - y[layer, n, i]) ** 2 for i in range(5))
            penalty += 0.3 * sum(abs(float(one)) for one in z[layer, n])
        assert abs(float(found.reconstruction[layer]) - error / 6) < 1e-12
        assert abs(float(found.sparsity[layer]) - penalty / 6) < 1e-12


def test_the_normalized_loss_is_the_ancestors():
    y, estimate, z = random_batch()
    found = transcoder_losses("normalized", 0.3, y, estimate, z)
    for layer in range(2):
        # As transcoder_circuits writes it: a mean over tokens and dimensions of e^2 / ||y||.
        e = estimate[layer] - y[layer]
        mse = (e.pow(2) / y[layer].pow(2).sum(dim=-1, keepdim=True).sqrt()).mean()
        l1 = 0.3 * z[layer].norm(p=1, dim=-1).mean()
        assert abs(found.reconstruction[layer] - mse) < 1e-12
        assert abs(found.sparsity[layer] - l1) < 1e-12


@pytest.mark.parametrize("d", [64, 1024])
def test_the_two_losses_differ_by_d_times_the_norm_of_y(d):
    y, estimate, z = random_batch(n=1, d=d)
    plain = transcoder_losses("equation4", 1.4e-4, y, estimate, z)
    normalized = transcoder_losses("normalized", 1.4e-4, y, estimate, z)
    ratio = plain.reconstruction / normalized.reconstruction
    assert torch.allclose(ratio, d * y[:, 0].norm(dim=-1))
    # So the same coefficient weighs that much more beside the reconstruction.
    assert torch.equal(plain.sparsity, normalized.sparsity)
    unit = y / y.norm(dim=-1, keepdim=True)
    one = transcoder_losses("normalized", 0.0, unit, estimate, z).reconstruction
    assert torch.allclose(
        transcoder_losses("equation4", 0.0, unit, estimate, z).reconstruction / one,
        torch.tensor(float(d), dtype=torch.float64))


def test_an_unknown_loss():
    with pytest.raises(InputError, match="known are normalized and equation4"):
        transcoder_losses("mse", 1.0, *random_batch())


# --- gradients and steps against a plain single layer --------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradients_are_autograds(variant, loss):
    t = stack(variant, 3, 6, 40)
    x, y = pairs(3, 30, 6, 4)
    weights = dict((*t.named_parameters(), *t.named_buffers()))
    found, measures = gradients(weights, variant, Objective(loss, 0.05), x, y)
    assert found.keys() == dict(t.named_parameters()).keys()
    for layer in range(3):
        taken = PlainLayer(t, layer, loss).step(x[layer], y[layer], 0.1, 0.05)
        for name, gradient in found.items():
            assert float((gradient[layer] - taken.gradients[name]).abs().max()) < 1e-10
            assert gradient[layer].any()
        total = measures.losses.reconstruction[layer] + measures.losses.sparsity[layer]
        assert abs(float(total) - taken.loss) < 1e-10
        assert torch.allclose(measures.residual[layer], taken.estimate - y[layer], atol=1e-12)
        assert torch.equal(measures.fired[layer], (taken.z > 0).any(dim=0))
        assert float(measures.l0[layer]) == pytest.approx(float((taken.z > 0).sum()) / 30)
    assert measures.l0.min() > 0


def test_bfloat16_gradients_are_close_to_the_exact_ones():
    t = stack(Variant(), 1, 16, 64, dtype=torch.float32)
    x, y = (part.float() for part in pairs(1, 200, 16, 0))
    weights = dict((*t.named_parameters(), *t.named_buffers()))
    rough, _ = gradients(weights, t.variant, Objective("normalized", 0.01), x.bfloat16(), y)
    exact, _ = gradients(weights, t.variant, Objective("normalized", 0.01), x, y)
    for name, one in exact.items():
        assert float((rough[name].float() - one).norm() / one.norm()) < 0.03


# --- batchtopk's threshold -----------------------------------------------------------------------


@pytest.mark.parametrize("silent", [0.0, math.inf], ids=["sparse", "dense"])
def test_a_batch_without_activations_leaves_the_threshold(silent):
    log_threshold = torch.tensor([[0.5, 0.5], [1.0, 1.0]])
    follow_threshold(log_threshold, torch.tensor([silent, math.e**2]))
    assert torch.allclose(log_threshold, torch.tensor([[0.5, 0.5], [1.05, 1.05]]))


# --- Adam ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [False, True])
def test_adam_rows_is_pytorchs_adam(unit):
    g = torch.Generator().manual_seed(0)
    weight = unit_rows(torch.randn(3, 7, 5, generator=g, dtype=torch.float64))
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    plain = weight.clone().requires_grad_()
    adam = torch.optim.Adam([plain], lr=1.0, foreach=False, fused=False)
    for step in range(1, 8):
        gradient = torch.randn(3, 7, 5, generator=g, dtype=torch.float64) * 10.0 ** (step - 4)
        rate = 0.1 / step
        plain.grad = gradient.clone()
        if unit:
            along = (gradient * plain.detach()).sum(dim=-1, keepdim=True)
            plain.grad -= along * plain.detach()
        adam.param_groups[0]["lr"] = rate
        adam.step()
        if unit:
            with torch.no_grad():
                plain /= plain.norm(dim=-1, keepdim=True)
        numbers = [torch.tensor(number, dtype=torch.float64) for number in
                   (rate / (1 - 0.9**step), (1 - 0.999**step) ** -0.5)]
        assert adam_rows(weight, gradient, mean, square, *numbers, unit)
        assert float((weight - plain.detach()).abs().max()) < 1e-12
    state = adam.state[plain]
    assert torch.allclose(mean, state["exp_avg"]) and torch.allclose(square, state["exp_avg_sq"])


def test_the_parallel_gradient_goes_and_the_rest_stays():
    g = torch.Generator().manual_seed(0)
    rows = unit_rows(torch.randn(3, 24, 16, generator=g, dtype=torch.float64))
    gradient = torch.randn(3, 24, 16, generator=g, dtype=torch.float64)
    left = without_parallel(gradient.clone(), rows)
    assert float((left * rows).sum(dim=-1).abs().max()) < 1e-12
    removed = gradient - left
    along = (removed * rows).sum(dim=-1, keepdim=True)
    assert torch.allclose(removed, along * rows, atol=1e-12) and removed.norm() > 1
