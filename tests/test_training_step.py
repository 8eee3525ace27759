"""One training step: losses, gradients and Adam against plain single layers."""

import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_layer import PlainLayer
from torch import Tensor

from scfm_circuits import InputError, sparse_step, training_step
from scfm_circuits.training_step import (
    Objective,
    Stepper,
    adam_rows,
    follow_threshold,
    gradients,
    resample,
    transcoder_losses,
    unit_rows,
    without_parallel,
)
from scfm_circuits.transcoder import INITIAL_THRESHOLD, Transcoders, Variant

torch.set_num_threads(1)

LOSSES = ("normalized", "equation4")
VARIANTS = (Variant(), Variant("topk", 3), Variant("batchtopk", 2), Variant("jumprelu"),
            Variant("relu", skip=True), Variant("topk", 2, skip=True),
            Variant("batchtopk", 3, skip=True), Variant("jumprelu", skip=True))


def stack(variant: Variant = Variant(), layers: int = 2, d: int = 5, f: int = 9,  # noqa: B008
          seed: int = 0, dtype: torch.dtype = torch.float64) -> Transcoders:
    """Random transcoders with unit writing directions and random biases."""
    t = Transcoders(layers, d, f, variant).to(dtype).requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for name, part in (*t.named_parameters(), *t.named_buffers()):
        if name != "log_threshold":
            part.copy_(torch.randn(part.shape, generator=g, dtype=dtype) * 0.5)
    if variant.activation == "jumprelu":  # so high that the window is met on both sides
        t.log_threshold.copy_((0.3 + torch.rand(layers, f, generator=g, dtype=dtype)).log())
    t.normalise_decoder()
    return t


def pairs(layers: int, n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random inputs and outputs."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, layers, n, d, generator=g, dtype=torch.float64)
    return x, y


def given_sites(x: Tensor, y: Tensor) -> Callable[[slice], tuple[Tensor, Tensor]]:
    return lambda layers: (x[layers], y[layers])


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
    with pytest.raises(InputError, match="known are normalized and equation4"):
        Stepper(stack(), "mse")


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


@settings(max_examples=120)
@given(variant=st.sampled_from(VARIANTS), loss=st.sampled_from(LOSSES), layers=st.integers(1, 3),
       n=st.integers(1, 12), d=st.integers(2, 7), f=st.integers(1, 20), k=st.integers(1, 6),
       at_once=st.booleans(), sparse=st.booleans(), measured=st.booleans(),
       seed=st.integers(0, 999))
def test_steps_equal_plain_layers_trained_alone(variant, loss, layers, n, d, f, k, at_once, sparse,
                                                measured, seed):
    t = stack(variant._replace(k=k), layers, d, f, seed)
    plain = [PlainLayer(t, layer, loss) for layer in range(layers)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_step, "DENSITY", 1.0)  # whatever the shape, if it is allowed
        stepper = Stepper(t, loss, layers_at_once=layers if at_once else 1, sparse=sparse)
        for step in range(1, 5):
            x, y = pairs(layers, n, d, 1000 * step + seed)
            rate, l1 = 0.02 * step, 0.03 * step
            found = stepper.step(given_sites(x, y), rate, l1, step, measured)
            for layer, one in enumerate(plain):
                taken = one.step(x[layer], y[layer], rate, l1)
                total = found.losses.reconstruction[layer] + found.losses.sparsity[layer]
                if measured:
                    assert abs(float(total) - taken.loss) < 1e-10
                for name, part in t.named_parameters():
                    assert float((part[layer] - one.parts[name].detach()).abs().max()) < 1e-10
                assert torch.equal(found.fired[layer], (taken.z > 0).any(dim=0))
        assert torch.allclose(t.W_dec.norm(dim=-1), torch.ones(layers, f, dtype=torch.float64))


def test_the_way_over_active_entries_is_taken_where_few_are_active(monkeypatch):
    calls: list[int] = []
    real = sparse_step.update
    monkeypatch.setattr(sparse_step, "update", lambda active, *rest: (
        calls.append(len(active.value)), real(active, *rest)))
    x, y = pairs(2, 20, 5, 1)
    for k, expected in ((2, [40, 40]), (30, [])):  # of 100 features; the limit is a tenth
        Stepper(stack(Variant("topk", k), 2, 5, 100), "equation4").step(
            given_sites(x, y), 0.01, 0.1, 1)
        assert calls == expected
        calls.clear()


def test_the_jumprelu_window_is_met_and_moves_the_thresholds():
    t = stack(Variant("jumprelu"), 1, 6, 40)
    x, y = pairs(1, 50, 6, 2)
    pre, theta = t.pre_activations(x)[0], t.log_threshold[0].exp()
    near = (pre - theta).abs() < training_step.BANDWIDTH / 2
    before = t.log_threshold.clone()
    Stepper(t, "equation4").step(given_sites(x, y), 0.01, 0.5, 1)
    assert 0 < int(near.any(dim=0).sum()) < 40
    assert torch.equal((t.log_threshold != before)[0], near.any(dim=0))


def compiled_and_not(layers_at_once: int) -> list[Stepper]:
    return [Stepper(stack(layers=2, d=4), "normalized", layers_at_once=layers_at_once,
                    compiled=compiled, sparse=False) for compiled in (False, True)]


def take_and_compare(steppers: list[Stepper]) -> None:
    x, y = pairs(2, 8, 4, 3)
    for step in (1, 2, 3):
        found = [stepper.step(given_sites(x, y), 0.05, 0.1, step) for stepper in steppers]
        assert torch.allclose(found[0].l0, found[1].l0)
    assert steppers[1]._compiled, "it could not be compiled"
    one, other = (dict(stepper.transcoders.named_parameters()) for stepper in steppers)
    for name, part in one.items():
        assert torch.allclose(part, other[name], atol=1e-10)


@pytest.mark.parametrize("layers_at_once", [1, 2])
def test_what_is_traced_gives_the_same(layers_at_once, monkeypatch):
    """As `compiled=True`, without the time that a C++ compiler takes."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda one, **rest: real(one, backend="aot_eager"))
    take_and_compare(compiled_and_not(layers_at_once))


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None,
                    reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_gradients_give_the_same():
    steppers = compiled_and_not(2)
    del steppers[1]._compiled[adam_rows]  # each of its four shapes takes as long again
    take_and_compare(steppers)


def test_a_compiler_that_cannot_is_done_without(capsys):
    def fails(*arguments: Any) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nlong trace")

    x, y = pairs(2, 8, 4, 3)
    one, other = stack(layers=2, d=4), stack(layers=2, d=4)
    stepper = Stepper(one, "normalized", compiled=True)
    stepper._compiled = dict.fromkeys(stepper._compiled, fails)
    for step in (1, 2):
        stepper.step(given_sites(x, y), 0.05, 0.1, step)
    plain = Stepper(other, "normalized", compiled=False)
    for step in (1, 2):
        plain.step(given_sites(x, y), 0.05, 0.1, step)
    assert torch.equal(one.W_enc, other.W_enc)
    said = capsys.readouterr().out
    assert said.count("gradients could not be compiled and is done without (no C++ compiler)") == 1
    assert len(said.splitlines()) == 2


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_products_in_bfloat16_lower_the_loss(variant):
    t = stack(variant, 2, 8, 32, dtype=torch.float32)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 64, 8, generator=g)
    y = torch.tanh(x) @ torch.randn(8, 8, generator=g) + 0.1
    stepper = Stepper(t, "equation4", torch.bfloat16)
    found = [stepper.step(given_sites(x.bfloat16(), y.bfloat16()), 0.01, 1e-3, step)
             for step in range(1, 81)]
    first, last = (one.losses.reconstruction for one in (found[0], found[-1]))
    assert (last < 0.5 * first).all() and torch.isfinite(last).all()
    assert {part.dtype for part in (*t.parameters(), *stepper.mean.values())} == {torch.float32}
    assert torch.allclose(t.W_dec.norm(dim=-1), torch.ones(2, 32), atol=1e-6)


def test_bfloat16_gradients_are_close_to_the_exact_ones():
    t = stack(Variant(), 1, 16, 64, dtype=torch.float32)
    x, y = (part.float() for part in pairs(1, 200, 16, 0))
    weights = dict((*t.named_parameters(), *t.named_buffers()))
    rough, _ = gradients(weights, t.variant, Objective("normalized", 0.01), x.bfloat16(), y)
    exact, _ = gradients(weights, t.variant, Objective("normalized", 0.01), x, y)
    for name, one in exact.items():
        assert float((rough[name].float() - one).norm() / one.norm()) < 0.03


# --- measures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("variant", [Variant(), Variant("topk", 3), Variant("batchtopk", 3)],
                         ids=str)
def test_measures_are_those_of_the_batch_before_the_step(variant, sparse, monkeypatch):
    monkeypatch.setattr(sparse_step, "DENSITY", 1.0)
    t = stack(variant, 2, 5, 9)
    x, y = pairs(2, 40, 5, 8)
    plain = [PlainLayer(t, layer, "normalized").step(x[layer], y[layer], 0.0, 0.2)
             for layer in range(2)]
    found = Stepper(t, "normalized", sparse=sparse).step(given_sites(x, y), 0.01, 0.2, 1)
    for layer, one in enumerate(plain):
        spread = ((y[layer] - y[layer].mean(dim=0)) ** 2).sum()
        fvu = ((one.estimate - y[layer]) ** 2).sum() / spread
        losses = transcoder_losses("normalized", 0.2, y[[layer]], one.estimate[None], one.z[None])
        assert float(found.l0[layer]) == pytest.approx(float((one.z > 0).sum() / 40))
        assert float(found.fvu[layer]) == pytest.approx(float(fvu))
        assert float(found.losses.reconstruction[layer]) == pytest.approx(
            float(losses.reconstruction[0]))
        expected = float(losses.sparsity[0]) if variant.activation == "relu" else 0.0
        assert float(found.losses.sparsity[layer]) == pytest.approx(expected)
        if variant.activation == "batchtopk":
            assert float(found.smallest[layer]) == float(one.z[one.z > 0].min())


# --- batchtopk's threshold -----------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
def test_the_threshold_follows_the_batches(sparse, monkeypatch):
    monkeypatch.setattr(sparse_step, "DENSITY", 1.0)
    t = stack(Variant("batchtopk", 2), 2, 5, 12)
    assert torch.allclose(t.log_threshold.exp(), torch.tensor(INITIAL_THRESHOLD).double())
    stepper = Stepper(t, "normalized", sparse=sparse)
    expected = t.log_threshold[:, 0].clone()
    for step in range(1, 120):
        smallest = stepper.step(given_sites(*pairs(2, 300, 5, step)), 1e-4, 0.0, step).smallest
        expected = 0.95 * expected + 0.05 * smallest.log()
        assert torch.allclose(t.log_threshold, expected[:, None], atol=1e-12)
    # What it then lets through without a batch is k features per token, on average.
    z = t.encode(pairs(2, 4000, 5, 7)[0])
    assert ((z > 0).sum(dim=-1).double().mean(dim=1) - 2).abs().max() < 0.2


@pytest.mark.parametrize("silent", [0.0, math.inf], ids=["sparse", "dense"])
def test_a_batch_without_activations_leaves_the_threshold(silent):
    log_threshold = torch.tensor([[0.5, 0.5], [1.0, 1.0]])
    follow_threshold(log_threshold, torch.tensor([silent, math.e**2]))
    assert torch.allclose(log_threshold, torch.tensor([[0.5, 0.5], [1.05, 1.05]]))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_silent_layer_stays_finite(sparse):
    t = stack(Variant("batchtopk", 2), 2, 5, 12)
    t.b_enc[0] = -1e6
    stepper = Stepper(t, "normalized", sparse=sparse)
    for step in (1, 2):
        found = stepper.step(given_sites(*pairs(2, 10, 5, step)), 0.01, 0.0, step)
    assert not found.fired[0].any() and found.fired[1].any()
    assert all(torch.isfinite(part).all() for part in t.state_dict().values())


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


# --- dead features -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [Variant(), Variant("jumprelu")], ids=str)
def test_dead_features_start_anew_where_much_is_missing(variant):
    t = stack(variant, 3, 6, 10)
    stepper = Stepper(t, "equation4", sparse=False)
    x, y = pairs(3, 30, 6, 5)
    residual = stepper.step(given_sites(x, y), 0.01, 0.1, 1).residual.clone()
    residual[:, 10:] = 0  # explained wholly, so never drawn
    dead = torch.zeros(3, 10, dtype=torch.bool)
    dead[0, [1, 4, 7]] = True
    dead[2] = True  # a layer of which nothing lives has no norm to go by
    before = {name: part.clone() for name, part in stepper.trained.items()}
    resample(stepper, dead, x, residual, [3, 7])
    for name, part in stepper.trained.items():
        if name in ("W_enc", "W_dec", "b_enc", "log_threshold"):
            dead_too = torch.zeros(3, 10, dtype=torch.bool)
            dead_too[0] = dead[0]
            assert torch.equal(part[~dead_too], before[name][~dead_too])
            assert not stepper.mean[name][dead_too].any()
            assert not stepper.square[name][dead_too].any()
            assert stepper.mean[name][~dead_too].any()
        else:
            assert torch.equal(part, before[name])
    norm = before["W_enc"][0, ~dead[0]].norm(dim=-1).mean()
    for feature in (1, 4, 7):
        missing = -residual[0] / residual[0].norm(dim=-1, keepdim=True).clamp_min(1e-12)
        distance = (t.W_dec[0, feature] - missing).norm(dim=-1)
        token = int(distance.argmin())
        assert float(distance[token]) < 1e-12 and token < 10
        read = x[0, token] - t.b_in[0]
        assert torch.allclose(t.W_enc[0, feature], 0.2 * norm * read / read.norm())
        assert t.b_enc[0, feature] == 0
    if variant.activation == "jumprelu":
        assert torch.allclose(t.log_threshold[0, dead[0]].exp(),
                              torch.tensor(INITIAL_THRESHOLD).double())


def test_a_layer_draws_the_same_tokens_alone():
    x, y = pairs(3, 30, 6, 5)
    dead = torch.arange(10) % 2 == 0
    whole, alone = stack(layers=3, d=6, f=10), stack(layers=3, d=6, f=10)
    resample(Stepper(whole, "equation4"), dead.expand(3, 10), x, y, [3, 7])
    single = Transcoders(1, 6, 10).double().requires_grad_(False)
    single.load_state_dict({name: part[[2]] for name, part in alone.state_dict().items()})
    resample(Stepper(single, "equation4"), dead[None], x[[2]], y[[2]], [3, 7], first_layer=2)
    assert torch.equal(single.W_enc[0], whole.W_enc[2])
    assert torch.equal(single.W_dec[0], whole.W_dec[2])
    other = stack(layers=3, d=6, f=10)
    resample(Stepper(other, "equation4"), dead.expand(3, 10), x, y, [3, 8])
    assert not torch.equal(other.W_dec[2], whole.W_dec[2]), "each step draws tokens of its own"


@pytest.mark.parametrize("value", [0.0, math.nan, 1e300])
def test_nothing_is_drawn_where_nothing_is_missing_or_all_diverges(value):
    t = stack(layers=1, d=6, f=10)
    before = t.W_enc.clone()
    x, y = pairs(1, 30, 6, 5)
    resample(Stepper(t, "equation4"), torch.arange(10)[None] < 3, x, torch.full_like(y, value), [1])
    assert torch.equal(t.W_enc, before)


def test_resampling_brings_a_dead_feature_back():
    t = stack(layers=1, d=6, f=10)
    t.b_enc[0, :5] = -1e6
    stepper = Stepper(t, "equation4")
    x, y = pairs(1, 200, 6, 5)
    found = stepper.step(given_sites(x, y), 0.01, 0.01, 1)
    assert not found.fired[0, :5].any()
    resample(stepper, ~found.fired, x, found.residual, [1])
    assert stepper.step(given_sites(x, y), 0.01, 0.01, 2).fired[0, :5].all()
