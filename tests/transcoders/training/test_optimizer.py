"""The stepper: whole steps against plain layers, in every way it takes them; dead features."""

import math
import shutil
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_layer import LOSSES, VARIANTS, PlainLayer, given_sites, pairs, stack

from scfm_circuits import InputError
from scfm_circuits.transcoders.activations import ACTIVATIONS, BANDWIDTH
from scfm_circuits.transcoders.training import sparse_gradients
from scfm_circuits.transcoders.training.gradients import gradients, transcoder_losses
from scfm_circuits.transcoders.training.optimizer import CompiledSteps, Stepper, resample
from scfm_circuits.transcoders.transcoder import INITIAL_THRESHOLD, Transcoders, Variant

torch.set_num_threads(1)


# --- steps against a plain single layer -----------------------------------------------------------


@settings(max_examples=120)
@given(variant=st.sampled_from(VARIANTS), loss=st.sampled_from(LOSSES), layers=st.integers(1, 3),
       n=st.integers(1, 12), d=st.integers(2, 7), f=st.integers(1, 20), k=st.integers(1, 6),
       at_once=st.booleans(), way=st.sampled_from(["plain", "sparse"]), measured=st.booleans(),
       seed=st.integers(0, 999))
def test_steps_equal_plain_layers_trained_alone(variant, loss, layers, n, d, f, k, at_once, way,
                                                measured, seed):
    t = stack(variant._replace(k=k), layers, d, f, seed)
    plain = [PlainLayer(t, layer, loss) for layer in range(layers)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_gradients, "DENSITY", 1.0)  # whatever the shape, if it is allowed
        stepper = Stepper(t, loss, layers_at_once=layers if at_once else 1, way=way)
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
    real = sparse_gradients.update
    monkeypatch.setattr(sparse_gradients, "update", lambda active, *rest: (
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
    near = (pre - theta).abs() < BANDWIDTH / 2
    before = t.log_threshold.clone()
    Stepper(t, "equation4").step(given_sites(x, y), 0.01, 0.5, 1)
    assert 0 < int(near.any(dim=0).sum()) < 40
    assert torch.equal((t.log_threshold != before)[0], near.any(dim=0))


def take_and_compare(variant: Variant, loss: str, layers_at_once: int, dtype: torch.dtype,
                     atol: float, only: Callable | None = None) -> None:
    """Logged and unlogged steps, compiled and not; `only`: the one function that is compiled."""
    steppers = [Stepper(stack(variant, layers=2, d=4, dtype=dtype), loss,
                        layers_at_once=layers_at_once, way=way)
                for way in ("plain", "compiled")]
    compiled = steppers[1].way.compiled
    for function in [one for one in compiled if only not in (None, one)]:
        del compiled[function]
    expected = set(compiled)
    x, y = (part.to(dtype) for part in pairs(2, 8, 4, 3))
    for step, measured in ((1, True), (2, False), (3, True)):
        one, other = (stepper.step(given_sites(x, y), 0.05, 0.1, step, measured)
                      for stepper in steppers)
        for name in ("l0", "fvu", "smallest", "residual"):
            assert torch.allclose(getattr(one, name), getattr(other, name), atol=atol)
        assert bool(one.l0.any()) == measured and torch.equal(one.fired, other.fired)
        for part, its in zip(one.losses, other.losses, strict=True):
            assert torch.allclose(part, its, atol=atol)
    assert set(compiled) == expected, "it could not be compiled"
    parts, others = (stepper.transcoders.state_dict() for stepper in steppers)
    for name, part in parts.items():
        assert torch.allclose(part, others[name], atol=atol)


@pytest.mark.parametrize(("loss", "layers_at_once"), zip(LOSSES, (1, 2), strict=True))
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_is_traced_gives_the_same(variant, loss, layers_at_once, monkeypatch):
    """As `way="compiled"`, without the time that a C++ compiler takes."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda one, **rest: real(one, backend="aot_eager"))
    torch._dynamo.reset()  # a function is not compiled for any number of shapes
    take_and_compare(variant, loss, layers_at_once, torch.float64, 1e-10)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None,
                    reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize(("variant", "loss"), zip(VARIANTS[:4], 2 * LOSSES, strict=True), ids=str)
def test_compiled_gradients_give_the_same(variant, loss):
    torch._dynamo.reset()
    # Of Adam, each of the shapes takes as long again; `test_what_is_traced` has it.
    take_and_compare(variant, loss, 2, torch.float32, 1e-5, only=gradients)


FAILURES = [torch._dynamo.exc.TorchDynamoException("no C++ compiler\nlong trace"),
            AssertionError("side_effects.codegen_save_tempvars"), AssertionError(),
            RuntimeError("a later shape")]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
@pytest.mark.parametrize("first", [1, 2], ids=["at once", "later"])
def test_a_compiler_that_cannot_is_done_without(failure, first, capsys):
    """Whatever it raises, at the first call or at a later one."""
    def fails(function: Callable) -> Callable:
        calls: list[int] = []

        def compiled(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) >= first:
                raise failure
            return function(*arguments)

        return compiled

    x, y = pairs(2, 8, 4, 3)
    one, other = stack(layers=2, d=4), stack(layers=2, d=4)
    stepper = Stepper(one, "normalized", way="compiled")
    stepper.way.compiled = {function: fails(function) for function in stepper.way.compiled}
    plain = Stepper(other, "normalized", way="plain")
    for step in (1, 2, 3):
        for each in (stepper, plain):
            each.step(given_sites(x, y), 0.05, 0.1, step)
    assert torch.allclose(one.W_enc, other.W_enc, atol=1e-12)
    said = capsys.readouterr().out.splitlines()
    reason = (str(failure) or "AssertionError").splitlines()[0]
    assert sorted(said) == [f"{name} could not be compiled and is done without ({reason})."
                            for name in ("adam_rows", "gradients")]


def test_what_is_wrong_without_the_compiler_too_is_not_hidden():
    stepper = Stepper(stack(layers=2, d=4), "normalized", way="compiled")
    stepper.way.compiled = {gradients: torch.compile(gradients, backend="eager")}
    x, y = pairs(2, 8, 5, 3)  # five wide, not four
    with pytest.raises(RuntimeError, match=r"size|shape"):
        stepper.step(given_sites(x, y), 0.05, 0.1, 1)


def test_memory_that_ran_out_is_no_failure_of_the_compiler(capsys):
    def fails(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    stepper = Stepper(stack(layers=2, d=4), "normalized", way="compiled")
    stepper.way.compiled = dict.fromkeys(stepper.way.compiled, fails)
    with pytest.raises(torch.OutOfMemoryError):
        stepper.step(given_sites(*pairs(2, 8, 4, 3)), 0.05, 0.1, 1)
    assert capsys.readouterr().out == ""


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


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("failure", [None, ImportError("No module named 'triton'")], ids=repr)
def test_kernels_are_for_activations_without_thresholds(variant, failure, monkeypatch, capsys):
    class Kernels:
        def __init__(self, *given: Any) -> None:
            if failure is not None:
                raise failure

    kernels = SimpleNamespace(GpuSteps=Kernels)
    monkeypatch.setitem(sys.modules, "scfm_circuits.transcoders.training.gpu_gradients", kernels)
    asked = ACTIVATIONS[variant.activation].threshold is None
    found = Stepper(stack(variant, dtype=torch.float32), "normalized", way="kernels")
    assert type(found.way) is (Kernels if asked and failure is None else CompiledSteps)
    said = "The kernels for a GPU are done without (No module named 'triton').\n"
    assert capsys.readouterr().out == (said if asked and failure is not None else "")
    exact = Stepper(stack(variant), "normalized", way="kernels")  # float64
    assert type(exact.way) is CompiledSteps


def test_an_unknown_loss():
    with pytest.raises(InputError, match="known are normalized and equation4"):
        Stepper(stack(), "mse")


# --- measures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["plain", "sparse"])
@pytest.mark.parametrize("variant", [Variant(), Variant("topk", 3), Variant("batchtopk", 3)],
                         ids=str)
def test_measures_are_those_of_the_batch_before_the_step(variant, way, monkeypatch):
    monkeypatch.setattr(sparse_gradients, "DENSITY", 1.0)
    t = stack(variant, 2, 5, 9)
    x, y = pairs(2, 40, 5, 8)
    plain = [PlainLayer(t, layer, "normalized").step(x[layer], y[layer], 0.0, 0.2)
             for layer in range(2)]
    found = Stepper(t, "normalized", way=way).step(given_sites(x, y), 0.01, 0.2, 1)
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


# --- batchtopk's threshold ------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["plain", "sparse"])
def test_the_threshold_follows_the_batches(way, monkeypatch):
    monkeypatch.setattr(sparse_gradients, "DENSITY", 1.0)
    t = stack(Variant("batchtopk", 2), 2, 5, 12)
    assert torch.allclose(t.log_threshold.exp(), torch.tensor(INITIAL_THRESHOLD).double())
    stepper = Stepper(t, "normalized", way=way)
    expected = t.log_threshold[:, 0].clone()
    for step in range(1, 120):
        smallest = stepper.step(given_sites(*pairs(2, 300, 5, step)), 1e-4, 0.0, step).smallest
        expected = 0.95 * expected + 0.05 * smallest.log()
        assert torch.allclose(t.log_threshold, expected[:, None], atol=1e-12)
    # What it then lets through without a batch is k features per token, on average.
    z = t.encode(pairs(2, 4000, 5, 7)[0])
    assert ((z > 0).sum(dim=-1).double().mean(dim=1) - 2).abs().max() < 0.2


@pytest.mark.parametrize("way", ["plain", "sparse"])
def test_a_silent_layer_stays_finite(way):
    t = stack(Variant("batchtopk", 2), 2, 5, 12)
    t.b_enc[0] = -1e6
    stepper = Stepper(t, "normalized", way=way)
    for step in (1, 2):
        found = stepper.step(given_sites(*pairs(2, 10, 5, step)), 0.01, 0.0, step)
    assert not found.fired[0].any() and found.fired[1].any()
    assert all(torch.isfinite(part).all() for part in t.state_dict().values())


# --- dead features --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [Variant(), Variant("jumprelu")], ids=str)
def test_dead_features_start_anew_where_much_is_missing(variant):
    t = stack(variant, 3, 6, 10)
    stepper = Stepper(t, "equation4", way="plain")
    x, y = pairs(3, 30, 6, 5)
    residual = stepper.step(given_sites(x, y), 0.01, 0.1, 1).residual.clone()
    residual[:, 10:] = 0  # explained wholly, so never drawn
    dead = torch.zeros(3, 10, dtype=torch.bool)
    dead[0, [1, 4, 7]] = True
    dead[2] = True  # a layer of which nothing lives has no norm to go by
    before = {name: part.clone() for name, part in stepper.trained.items()}
    resample(stepper, dead, x, residual, 3, 7)
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
    resample(Stepper(whole, "equation4"), dead.expand(3, 10), x, y, 3, 7)
    single = Transcoders(1, 6, 10).double().requires_grad_(False)
    single.load_state_dict({name: part[[2]] for name, part in alone.state_dict().items()})
    resample(Stepper(single, "equation4"), dead[None], x[[2]], y[[2]], 3, 7, first_layer=2)
    assert torch.equal(single.W_enc[0], whole.W_enc[2])
    assert torch.equal(single.W_dec[0], whole.W_dec[2])
    other = stack(layers=3, d=6, f=10)
    resample(Stepper(other, "equation4"), dead.expand(3, 10), x, y, 3, 8)
    assert not torch.equal(other.W_dec[2], whole.W_dec[2]), "each step draws tokens of its own"


@pytest.mark.parametrize("value", [0.0, math.nan, 1e300])
def test_nothing_is_drawn_where_nothing_is_missing_or_all_diverges(value):
    t = stack(layers=1, d=6, f=10)
    before = t.W_enc.clone()
    x, y = pairs(1, 30, 6, 5)
    dead = torch.arange(10)[None] < 3
    resample(Stepper(t, "equation4"), dead, x, torch.full_like(y, value), 1, 0)
    assert torch.equal(t.W_enc, before)


def test_resampling_brings_a_dead_feature_back():
    t = stack(layers=1, d=6, f=10)
    t.b_enc[0, :5] = -1e6
    stepper = Stepper(t, "equation4")
    x, y = pairs(1, 200, 6, 5)
    found = stepper.step(given_sites(x, y), 0.01, 0.01, 1)
    assert not found.fired[0, :5].any()
    resample(stepper, ~found.fired, x, found.residual, 1, 0)
    assert stepper.step(given_sites(x, y), 0.01, 0.01, 2).fired[0, :5].all()
