"""The pass over active entries against the dense step, which is tested against autograd."""

import builtins
import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scfm_circuits.transcoders.training import sparse_gradients
from scfm_circuits.transcoders.training.gradients import Measures
from scfm_circuits.transcoders.training.optimizer import DenseSteps, Stepper
from scfm_circuits.transcoders.transcoder import Transcoders, Variant

VARIANTS = [Variant(), Variant("topk", 2), Variant("batchtopk", 2), Variant(skip=True),
            Variant(site="sae")]


def stack(variant: Variant, shape: tuple[int, int, int], seed: int = 0) -> Transcoders:
    t = Transcoders(*shape, variant).double().initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for bias in (t.b_enc, t.b_dec, t.b_in, *([t.W_skip] if variant.skip else [])):
            bias.normal_(generator=generator).mul_(0.3)
    return t


def steps(stepper: Stepper, batches: list[tuple[Tensor, Tensor]], rate: float = 1e-2
          ) -> list[Measures]:
    return [stepper.step(lambda layers, b=batch: (b[0][layers], b[1][layers]), rate, 0.1, i + 1)
            for i, batch in enumerate(batches)]


def both(variant: Variant, loss: str, shape: tuple[int, int, int], n: int, seed: int,
         count: int = 4) -> tuple[Stepper, Stepper, list[Measures], list[Measures]]:
    g = torch.Generator().manual_seed(seed)
    batches = [tuple(torch.randn(2, shape[0], n, shape[1], generator=g, dtype=torch.float64))
               for _ in range(count)]
    t = stack(variant, shape, seed)
    dense = Stepper(t, loss, way="plain")
    sparse = Stepper(copy.deepcopy(t), loss)
    return dense, sparse, steps(dense, batches), steps(sparse, batches)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Entries are always gone over; the list grows by their number, layer by layer."""
    monkeypatch.setattr(sparse_gradients, "DENSITY", 2.0)
    seen: list[int] = []
    update = sparse_gradients.update

    def counted(active: Any, *rest: Any) -> None:
        seen.append(len(active.value))
        update(active, *rest)

    monkeypatch.setattr(sparse_gradients, "update", counted)
    return seen


@settings(max_examples=40)
@given(variant=st.sampled_from(VARIANTS), loss=st.sampled_from(["normalized", "equation4"]),
       layers=st.integers(1, 3), d=st.integers(1, 9), width=st.integers(2, 130),
       n=st.integers(2, 20), seed=st.integers(0, 99))
def test_steps_over_active_entries_are_the_dense_ones(variant, loss, layers, d, width, n, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_gradients, "DENSITY", 2.0)
        # One step's gradients, seen through Adam's moments, which no root or quotient has changed.
        dense, sparse, plain, found = both(variant, loss, (layers, d, width), n, seed, count=1)
    for name in dense.mean:
        scale = 1 + float(dense.mean[name].abs().max())
        assert float((dense.mean[name] - sparse.mean[name]).abs().max()) < 1e-12 * scale
        assert float((dense.square[name] - sparse.square[name]).abs().max()) < 1e-12 * scale**2
    assert torch.allclose(dense.trained["W_enc"], sparse.trained["W_enc"], atol=1e-6)
    one, other = plain[0], found[0]
    assert torch.equal(one.fired, other.fired)
    for a, b in zip((*one.losses, one.l0, one.fvu, one.residual),
                    (*other.losses, other.l0, other.fvu, other.residual), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_many_steps_stay_together(always, variant):
    dense, sparse, _, _ = both(variant, "normalized", (2, 8, 40), 24, seed=3, count=12)
    assert len(always) == 24 and min(always) > 0
    for name in dense.trained:
        assert torch.allclose(dense.trained[name], sparse.trained[name], atol=1e-9), name
    rows = sparse.trained["W_dec"].norm(dim=-1)
    assert torch.allclose(rows, torch.ones_like(rows))


def test_a_batch_on_which_nothing_fires_moves_by_momentum_alone(always):
    t = stack(Variant(), (1, 6, 12))
    dense, sparse = Stepper(t, "normalized", way="plain"), None
    sparse = Stepper(copy.deepcopy(t), "normalized")
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 1, 10, 6, generator=g, dtype=torch.float64)
    for stepper in (dense, sparse):
        stepper.step(lambda layers: (x, y), 1e-2, 0.1, 1)
        stepper.trained["b_enc"].fill_(-1e6)
        before = stepper.trained["W_enc"].clone()
        found = stepper.step(lambda layers: (x, y), 1e-2, 0.1, 2)
        assert not found.fired.any() and float(found.l0) == 0
        assert not torch.equal(stepper.trained["W_enc"], before)
    assert always[1] == 0
    assert torch.allclose(dense.trained["W_enc"], sparse.trained["W_enc"], atol=1e-9)


def test_threads_change_no_bit(always):
    threads, ends = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            t = stack(Variant(), (1, 16, 64)).float()
            g = torch.Generator().manual_seed(2)
            batches = [tuple(torch.randn(2, 1, 50, 16, generator=g)) for _ in range(3)]
            stepper = Stepper(t, "normalized")
            # What the dense product gives may depend on threads, so it is given.
            z = torch.rand(50, 64, generator=g).sub(0.9).relu()
            active = sparse_gradients.active_entries(z)
            x, y = batches[0][0][0], batches[0][1][0]
            parts = sparse_gradients.sparse_backward(
                active, stepper.trained["W_dec"][0], torch.zeros(50, 16),
                                         y, torch.full((50,), 0.1), 0.01)
            moments = [[store[name][0] for store in (stepper.trained, stepper.mean,
                                                     stepper.square)]
                       for name in ("W_enc", "W_dec", "b_enc")]
            sparse_gradients.update(active, parts[2], parts[1], x, *moments,
                               sparse_gradients.Rates(0.1, 1.0, 0.9, 0.999, 1e-8))
            ends.append([tensor.clone() for rows in moments for tensor in rows])
    finally:
        torch.set_num_threads(threads)
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


@pytest.mark.parametrize(("share", "taken"), [(0.05, True), (0.5, False)])
def test_it_is_used_where_few_are_active(share, taken):
    z = torch.zeros(20, 50)
    z.view(-1)[: int(share * 1000)] = 1.0
    active = sparse_gradients.active_entries(z[:, torch.randperm(50)])
    assert (active is not None) == taken
    if active is not None:
        assert len(active.value) == active.start[-1] == 50


def test_a_machine_without_numba_takes_dense_steps(monkeypatch):
    real = builtins.__import__

    def no_numba(name: str, *args: Any, **options: Any) -> Any:
        if name.endswith("sparse_gradients"):
            raise ImportError("No module named 'numba'")
        return real(name, *args, **options)

    t = stack(Variant(), (1, 4, 8))
    plain = Stepper(copy.deepcopy(t), "normalized", way="plain")
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", no_numba)
        without = Stepper(t, "normalized")
    assert type(without.way) is DenseSteps
    g = torch.Generator().manual_seed(1)
    batches = [tuple(torch.randn(2, 1, 10, 4, generator=g, dtype=torch.float64))]
    steps(plain, batches)
    steps(without, batches)
    assert torch.equal(plain.trained["W_enc"], without.trained["W_enc"])
