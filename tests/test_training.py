"""Training: its losses, one step against a plain layer, its data, and resuming."""

import json
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import model_for, tiny_corpus, tiny_profile
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scfm_circuits import InputError
from scfm_circuits import training as training_module
from scfm_circuits.language_model import Sites, mlp_sites
from scfm_circuits.profile import Profile
from scfm_circuits.sentences import Corpus
from scfm_circuits.training import (
    ActivationBuffer,
    Control,
    TrainingRun,
    get_transcoders,
    memory_needed,
    stamp_difference,
    training_stamp,
    transcoder_losses,
)
from scfm_circuits.transcoder import Transcoders

SETTINGS = {"batch_tokens": 32, "buffer_tokens": 64, "training_tokens": 32 * 14, "warmup_steps": 5,
            "expansion": 2, "forward_cells": 3, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return tiny_corpus(14)


@pytest.fixture(scope="module")
def model(corpus: Corpus) -> Any:
    return model_for(corpus, dtype=torch.float32)


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Profile:
    return tiny_profile(monkeypatch, tmp_path, **SETTINGS)


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


# --- one step against a plain single layer -------------------------------------------------------


class PlainLayer:
    """One transcoder layer, trained by autograd and torch's unfused Adam."""

    def __init__(self, t: Transcoders, layer: int) -> None:
        self.enc, self.dec, self.b_enc, self.b_dec = (
            part[layer].detach().clone().requires_grad_()
            for part in (t.W_enc, t.W_dec, t.b_enc, t.b_dec))
        self.b_in = t.b_in[layer].clone()
        self.parts = [self.enc, self.dec, self.b_enc, self.b_dec]
        self.adam = torch.optim.Adam(self.parts, lr=1.0, foreach=False, fused=False)

    def loss(self, x: Tensor, y: Tensor, profile: Profile) -> Tensor:
        total = torch.zeros((), dtype=x.dtype)
        for token, target in zip(x, y, strict=True):
            z = torch.relu(self.enc @ (token - self.b_in) + self.b_enc)
            squared = ((z @ self.dec + self.b_dec - target) ** 2).sum()
            if profile.loss == "normalized":
                squared = squared / (len(target) * (target**2).sum().sqrt())
            total = total + squared + profile.l1_coefficient * z.abs().sum()
        return total / len(x)

    def step(self, x: Tensor, y: Tensor, profile: Profile, rate: float) -> float:
        loss = self.loss(x, y, profile)
        self.adam.zero_grad()
        loss.backward()
        gradient = self.dec.grad
        for row in range(len(self.dec)):
            unit = self.dec.detach()[row]
            gradient[row] -= (gradient[row] @ unit) * unit
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        with torch.no_grad():
            for row in range(len(self.dec)):
                self.dec[row] /= self.dec[row].norm()
        return float(loss.detach())


@pytest.mark.parametrize("loss", ["normalized", "equation4"])
@pytest.mark.parametrize("seed", [0, 1])
def test_steps_equal_a_plain_layer_trained_alone(model, corpus, profile, loss, seed):
    profile = profile.model_copy(update={"loss": loss, "l1_coefficient": 0.05})
    run = TrainingRun(model, corpus, profile)
    run.transcoders.initialise(torch.Generator().manual_seed(seed))
    run.transcoders.double()
    t = run.transcoders
    with torch.no_grad():
        for bias in (t.b_in, t.b_dec, t.b_enc):
            bias.normal_(generator=torch.Generator().manual_seed(seed + 5)).mul_(0.3)
    plain = [PlainLayer(t, layer) for layer in range(t.n_layers)]
    g = torch.Generator().manual_seed(seed + 9)
    for step in range(4):
        x, y = torch.randn(2, t.n_layers, 11, t.d_model, generator=g, dtype=torch.float64)
        rate = profile.learning_rate * min(1, (step + 1) / profile.warmup_steps)
        row = run.train_step(Sites(x, y), log=True)
        for layer, one in enumerate(plain):
            total = one.step(x[layer], y[layer], profile, rate)
            assert abs(row["reconstruction"][layer] + row["sparsity"][layer] - total) < 1e-10
            pairs = [(t.W_enc, one.enc), (t.W_dec, one.dec), (t.b_enc, one.b_enc),
                     (t.b_dec, one.b_dec)]
            for stacked, alone in pairs:
                assert float((stacked.grad[layer] - alone.grad).abs().max()) < 1e-10
                assert float((stacked[layer] - alone).detach().abs().max()) < 1e-10
        assert torch.allclose(t.W_dec.norm(dim=-1), torch.ones(t.n_layers, t.n_features,
                                                               dtype=torch.float64))


def test_the_input_mean_is_not_trained(model, corpus, profile):
    run = TrainingRun(model, corpus, profile)
    run.start()
    before = run.transcoders.b_in.clone()
    run.run(progress=False)
    assert torch.equal(run.transcoders.b_in, before) and before.any()


def test_the_start_holds_the_means_of_the_first_fill(model, corpus, profile):
    run = TrainingRun(model, corpus, profile)
    run.start()
    sums = torch.zeros(2, 2, 16, dtype=torch.float64)
    n = 0
    for cell in run.buffer.cells(0):
        ids = torch.from_numpy(corpus.tokens[cell][corpus.mask[cell]])[None]
        sites = mlp_sites(model, ids, torch.ones_like(ids, dtype=torch.bool))
        sums += torch.stack([part.double().sum(dim=1) for part in sites])
        n += ids.shape[1]
    assert torch.allclose(run.transcoders.b_in.double(), sums[0] / n, atol=1e-4)
    assert torch.allclose(run.transcoders.b_dec.double(), sums[1] / n, atol=1e-4)


def test_warm_up_is_linear_then_constant(model, corpus, profile):
    run = TrainingRun(model, corpus, profile)
    rates = [run.learning_rate(step) / profile.learning_rate for step in range(8)]
    assert np.allclose(rates, [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])
    at_once = TrainingRun(model, corpus, profile.model_copy(update={"warmup_steps": 0}))
    assert at_once.learning_rate(0) == profile.learning_rate


def test_dead_features_are_those_silent_for_long_enough(model, corpus, profile):
    run = TrainingRun(model, corpus, profile.model_copy(
        update={"dead_after_tokens": 64, "learning_rate": 1e-9}))
    run.transcoders.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        run.transcoders.b_enc[0, :8] = -1e6  # a quarter of layer 0 cannot fire
        run.transcoders.b_enc[0, 8:] = 1e6
        run.transcoders.b_enc[1] = 1e6
    shares = []
    for step in range(4):
        if step == 3:
            with torch.no_grad():
                run.transcoders.b_enc[0, :4] = 1e6  # some come back
        x, y = torch.randn(2, 2, 32, 16)
        shares.append(run.train_step(Sites(x, y), log=True)["dead"])
    # Silent for 32, 64, 96, 128 tokens; dead is more than 64.
    assert shares == [[0, 0], [0, 0], [0.25, 0], [0.125, 0]]
    assert run.tokens_since_fired[0, :8].tolist() == [0] * 4 + [128] * 4


def test_measurements_are_those_of_the_batch(model, corpus, profile):
    run = TrainingRun(model, corpus, profile)
    run.start()
    x, y = torch.randn(2, 2, 40, 16)
    with torch.no_grad():
        z = run.transcoders.encode(x)
        estimate = run.transcoders.decode(z)
    row = run.train_step(Sites(x, y), log=True)
    for layer in range(2):
        l0 = np.mean([(z[layer, n] > 0).sum() for n in range(40)])
        spread = ((y[layer] - y[layer].mean(dim=0)) ** 2).sum()
        fvu = ((estimate[layer] - y[layer]) ** 2).sum() / spread
        assert row["l0"][layer] == pytest.approx(l0)
        assert row["fvu"][layer] == pytest.approx(float(fvu), rel=1e-5)
    assert (row["step"], row["tokens"]) == (1, 32)
    json.dumps(row, allow_nan=False)


# --- the buffer ----------------------------------------------------------------------------------


@pytest.fixture
def numbered(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """The corpus with a number of its own for each token, and `activations` that repeat it."""
    n = corpus.tokens.size
    marked = replace(corpus, tokens=np.arange(n).reshape(corpus.tokens.shape))

    def fake_sites(model: Any, ids: Tensor, mask: Tensor) -> Sites:
        number = ids[mask].float()[None, :, None].expand(2, -1, 16)
        layer = torch.arange(2)[:, None, None] * 10_000
        return Sites(number + layer, -number - layer)

    monkeypatch.setattr(training_module, "mlp_sites", fake_sites)
    return marked


def numbers(batch: Sites) -> list[int]:
    """The tokens of a batch; checks that layers, inputs and outputs speak of the same."""
    first = batch.inputs[0, :, 0]
    assert torch.equal(batch.inputs[1], first[:, None].expand(-1, 16) + 10_000)
    assert torch.equal(batch.inputs, -batch.outputs)
    return first.int().tolist()


def fills(buffer: ActivationBuffer, n: int) -> Iterator[tuple[int, list[list[int]]]]:
    batches = buffer.batches(0)
    for fill in range(n):
        yield fill, [numbers(next(batches)) for _ in range(buffer.n_batches(fill))]


@pytest.mark.parametrize("buffer_tokens", [64, 150, 100_000], ids=["small", "half", "all"])
def test_each_token_of_a_fill_comes_once_and_never_a_held_out_one(model, numbered, profile,
                                                                  buffer_tokens):
    profile = profile.model_copy(update={"buffer_tokens": buffer_tokens, "batch_tokens": 1})
    buffer = ActivationBuffer(model, numbered, profile)
    train = set(np.flatnonzero(~numbered.held_out).tolist())
    orders = []
    for fill, batches in fills(buffer, 5):
        cells = buffer.cells(fill)
        assert set(cells.tolist()) <= train
        expected = Counter(int(token) for cell in cells
                           for token in numbered.tokens[cell][numbered.mask[cell]])
        found = [number for batch in batches for number in batch]
        assert Counter(found) == expected
        orders.append(tuple(found))
    assert len(set(orders)) == 5, "each fill has a permutation of its own"


def test_what_a_fill_leaves_over_is_less_than_a_batch(model, numbered, profile):
    buffer = ActivationBuffer(model, numbered, profile)
    for fill, batches in fills(buffer, 6):
        found = [number for batch in batches for number in batch]
        assert {len(batch) for batch in batches} == {32} and len(set(found)) == len(found)
        assert 0 <= numbered.lengths[buffer.cells(fill)].sum() - len(found) < 32


def test_all_training_cells_have_their_turn(model, corpus, profile):
    buffer = ActivationBuffer(model, corpus, profile)
    train = np.flatnonzero(~corpus.held_out)
    size = buffer.cells_per_fill
    assert 1 < size < len(train)
    turns = np.concatenate([buffer.cells(fill) for fill in range(len(train))])
    # size * n cells are exactly `size` rounds through all n, each round in an order of its own.
    rounds = turns.reshape(size, len(train))
    for one in rounds:
        assert sorted(one) == train.tolist()
    assert len({tuple(one) for one in rounds}) == size


@settings(deadline=None, max_examples=25)
@given(first=st.integers(0, 30))
def test_batches_from_any_step_are_those_of_the_whole_run(first):
    corpus = tiny_corpus(14)
    model = model_for(corpus, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        profile = tiny_profile(patch, Path("unused"), **SETTINGS)
        stream, later = (ActivationBuffer(model, corpus, profile).batches(n) for n in (0, first))
        for _ in range(first):
            next(stream)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(next(stream), next(later), strict=True))


def test_a_corpus_that_fits_is_harvested_once(model, corpus, profile, monkeypatch):
    calls: list[int] = []

    def counted(model: Any, ids: Tensor, mask: Tensor) -> Sites:
        calls.append(len(ids))
        return mlp_sites(model, ids, mask)

    monkeypatch.setattr(training_module, "mlp_sites", counted)
    TrainingRun(model, corpus, profile.model_copy(update={"buffer_tokens": 100_000})).run(
        progress=False)
    assert sum(calls) == (~corpus.held_out).sum()


@pytest.mark.parametrize("buffer_tokens", [64, 100_000], ids=["refilled", "kept"])
def test_scaled_outputs_are_scaled_once_and_layer_by_layer(model, corpus, profile, buffer_tokens):
    profile = profile.model_copy(update={"buffer_tokens": buffer_tokens})
    plain = ActivationBuffer(model, corpus, profile)
    scaled = ActivationBuffer(model, corpus, profile, torch.tensor([2.0, 0.25]))
    for fill in (0, 1, 0):
        x, y = plain.sites(fill)
        inputs, outputs = scaled.sites(fill)
        assert torch.equal(inputs, x)
        assert torch.equal(outputs[0], 2 * y[0]) and torch.equal(outputs[1], y[1] / 4)


def test_memory_is_that_of_what_is_held(model, corpus, profile):
    needed = memory_needed(profile, corpus, 2, 16)
    assert needed["buffer"] == 2 * 4 * 2 * 16 * 64
    run = TrainingRun(model, corpus, profile)
    run.run(until=1, progress=False)
    held = sum(4 * p.numel() * 4 for p in run.transcoders.parameters())
    assert abs(needed["parameters, gradient and Adam"] / held - 1) < 0.05
    assert needed["activations of one batch"] >= 4 * 2 * 32 * 32


# --- resuming ------------------------------------------------------------------------------------


def same_run(a: TrainingRun, b: TrainingRun) -> bool:
    states = a.transcoders.state_dict(), b.transcoders.state_dict()
    return (all(torch.equal(states[0][key], states[1][key]) for key in states[0])
            and a.history == b.history and a.step == b.step
            and torch.equal(a.tokens_since_fired, b.tokens_since_fired))


@pytest.mark.parametrize("buffer_tokens", [12, 100_000], ids=["refilled", "kept"])
@pytest.mark.parametrize("seed", range(4))
def test_an_interrupted_run_ends_as_an_uninterrupted_one(model, corpus, profile, tmp_path, seed,
                                                         buffer_tokens):
    # Batches of four tokens leave features silent, so that their counts matter too.
    profile = profile.model_copy(update={"buffer_tokens": buffer_tokens, "batch_tokens": 4,
                                         "training_tokens": 120, "dead_after_tokens": 3})
    whole = TrainingRun(model, corpus, profile)
    whole.run(progress=False)
    assert whole.step == whole.steps == 30 and len(whole.history) == 30
    assert whole.tokens_since_fired.any() and any(map(any, (row["dead"] for row in whole.history)))
    if buffer_tokens == 12:
        assert sum(whole.buffer.n_batches(fill) for fill in range(3)) < 30
    checkpoint, silent = tmp_path / "checkpoint.safetensors", 0
    for stop in np.sort(np.random.default_rng(seed).choice(np.arange(1, 30), 3, replace=False)):
        part = TrainingRun(model, corpus, profile, checkpoint)
        part.run(until=int(stop), progress=False)
        assert part.step == stop
        part.save_checkpoint()
        taken_up = TrainingRun(model, corpus, profile, checkpoint)
        assert taken_up.resume() and same_run(taken_up, part)
        silent += int(part.tokens_since_fired.max())
    last = TrainingRun(model, corpus, profile, checkpoint)
    last.run(progress=False)
    assert same_run(last, whole) and silent


def test_a_checkpoint_is_written_as_time_passes(model, corpus, profile, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    TrainingRun(model, corpus, profile, path).run(until=3, progress=False)
    assert not path.exists()
    often = profile.model_copy(update={"checkpoint_seconds": 1e-9})
    TrainingRun(model, corpus, often, path).run(until=3, progress=False)
    again = TrainingRun(model, corpus, often, path)
    assert again.resume() and again.step == 3


@pytest.mark.parametrize("place", ["encode", "remove_parallel_gradient", "normalise_decoder"])
@pytest.mark.parametrize("step", [0, 3])
def test_an_interrupt_in_the_middle_of_a_step_loses_nothing(model, corpus, profile, tmp_path,
                                                            monkeypatch, place, step):
    whole = TrainingRun(model, corpus, profile)
    whole.run(progress=False)
    path = tmp_path / "checkpoint.safetensors"
    run = TrainingRun(model, corpus, profile, path)
    run.start()
    real = getattr(Transcoders, place)

    def interrupting(self: Transcoders, *args: Any) -> Any:
        result = real(self, *args)
        if run.transcoders is self and run.step == step:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(run, "start", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(Transcoders, place, interrupting)
        with pytest.raises(KeyboardInterrupt):
            run.run(progress=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run.step == step + 1 == len(run.history)
    last = TrainingRun(model, corpus, profile, path)
    assert last.run(progress=False) is last.transcoders
    assert same_run(last, whole)


def test_an_interrupt_before_the_first_step(model, corpus, profile, tmp_path, monkeypatch):
    whole = TrainingRun(model, corpus, profile)
    whole.run(progress=False)
    path = tmp_path / "checkpoint.safetensors"
    run = TrainingRun(model, corpus, profile, path)
    sites = ActivationBuffer.sites
    calls: list[int] = []

    def second_fails(self: ActivationBuffer, fill: int) -> Sites:
        calls.append(fill)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sites(self, fill)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationBuffer, "sites", second_fails)
        with pytest.raises(KeyboardInterrupt):
            run.run(progress=False)
    last = TrainingRun(model, corpus, profile, path)
    last.run(progress=False)
    assert same_run(last, whole)


def stopped(model: Any, corpus: Corpus, profile: Profile, path: Path) -> None:
    part = TrainingRun(model, corpus, profile, path)
    part.run(until=6, progress=False)
    part.save_checkpoint()


@pytest.mark.parametrize("change", [
    {"l1_coefficient": 0.5}, {"loss": "equation4"}, {"seed": 5}, {"learning_rate": 1e-3},
    {"batch_tokens": 16, "buffer_tokens": 32},
], ids=lambda change: next(iter(change)))
def test_a_checkpoint_of_other_settings_is_named_and_not_used(model, corpus, profile, tmp_path,
                                                              capsys, change):
    path = tmp_path / "checkpoint.safetensors"
    stopped(model, corpus, profile, path)
    changed = profile.model_copy(update=change)
    run = TrainingRun(model, corpus, changed, path)
    capsys.readouterr()
    assert not run.resume() and run.step == 0
    assert f"{', '.join(sorted(change))} changed" in capsys.readouterr().out.replace("\n", " ")
    run.run(progress=False)
    fresh = TrainingRun(model, corpus, changed)
    fresh.run(progress=False)
    assert same_run(run, fresh)


def test_a_checkpoint_of_another_corpus_is_not_used(model, corpus, profile, tmp_path, capsys):
    path = tmp_path / "checkpoint.safetensors"
    stopped(model, corpus, profile, path)
    other = replace(corpus, held_out=np.roll(corpus.held_out, 1))
    assert not TrainingRun(model, other, profile, path).resume()
    assert "corpus changed" in capsys.readouterr().out


def test_stamps_differ_in_sources_too(corpus, profile):
    stamp = training_stamp(profile, corpus)
    assert stamp_difference(stamp, stamp) == ""
    assert stamp_difference({**stamp, "sources": {}}, stamp) == "sources"
    control = training_stamp(profile, corpus, Control("other", {}))
    assert stamp_difference(control, stamp) == stamp_difference(stamp, control) == "control"
    assert {key: value for key, value in control.items() if key != "control"} == stamp
    assert "seed" in stamp_difference({}, stamp)


def no_metadata(content: bytes) -> bytes:
    from safetensors.torch import load, save
    return save(load(content))


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:100], lambda content: content[:-50],
    lambda content: b"\xff" * 500, no_metadata,
], ids=["empty", "head", "tail cut", "noise", "no metadata"])
def test_a_broken_checkpoint_starts_again(model, corpus, profile, tmp_path, capsys, damage):
    path = tmp_path / "checkpoint.safetensors"
    stopped(model, corpus, profile, path)
    path.write_bytes(damage(path.read_bytes()))
    run = TrainingRun(model, corpus, profile, path)
    run.run(progress=False)
    assert "starting again" in capsys.readouterr().out
    whole = TrainingRun(model, corpus, profile)
    whole.run(progress=False)
    assert same_run(run, whole)


def test_finished_transcoders_are_kept_and_the_checkpoint_goes(model, corpus, profile,
                                                               monkeypatch, capsys):
    first, history = get_transcoders(model, corpus, profile)
    assert len(history) == 14 and "Training 2 transcoders of width 32" in capsys.readouterr().out
    assert not (profile.results / "training_checkpoint.safetensors").exists()
    monkeypatch.setattr(TrainingRun, "run", None)  # training again would fail
    again, same = get_transcoders(model, corpus, profile)
    assert same == history and torch.equal(first.W_enc, again.W_enc)
    with pytest.raises(TypeError):
        get_transcoders(model, corpus, profile.model_copy(update={"l1_coefficient": 0.1}))


def test_what_is_saved_is_what_was_trained(model, corpus, profile):
    run = TrainingRun(model, corpus, profile)
    run.run(progress=False)
    stored, _ = get_transcoders(model, corpus, profile)
    x = run.buffer.sites(0).inputs
    with torch.no_grad():
        assert torch.allclose(stored(x), run.transcoders(x), atol=1e-4)
