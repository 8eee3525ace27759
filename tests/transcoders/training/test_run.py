"""Training runs: schedules, measurements, resuming, and what goes wrong on the way."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TRAINING, model_for
from plain_layer import PlainLayer
from processes import child, wait_for
from torch import Tensor
from tqdm import tqdm

from scfm_circuits import InputError
from scfm_circuits.__main__ import main
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.profile import Profile
from scfm_circuits.models.mlp_sites import Sites, mlp_sites
from scfm_circuits.transcoders.training import checkpoints
from scfm_circuits.transcoders.training import run as training_module
from scfm_circuits.transcoders.training.activation_buffer import ActivationBuffer, Batch
from scfm_circuits.transcoders.training.interrupts import Terminated
from scfm_circuits.transcoders.training.optimizer import Stepper
from scfm_circuits.transcoders.training.run import TrainingRun, get_transcoders
from scfm_circuits.transcoders.training.sparse_gradients import SparseSteps


def changed(profile: Profile, **fields: Any) -> Profile:
    return profile.model_copy(update=fields)


def batch_of(x: Tensor, y: Tensor) -> Batch:
    return Batch(Sites(x, y), torch.arange(x.shape[1]))


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["transcoder", "sae"])
@pytest.mark.parametrize("loss", ["normalized", "equation4"])
def test_steps_equal_a_plain_layer_trained_alone(model, corpus, profile, loss, site):
    profile = changed(profile, loss=loss, site=site, l1_coefficient=0.05, l1_warmup_steps=3,
                      warmup_steps=2, decay_steps=12)
    run = TrainingRun(model, corpus, profile)
    run.transcoders.initialise(0).double()
    run.stepper = Stepper(run.transcoders, loss)
    t, g = run.transcoders, torch.Generator().manual_seed(5)
    with torch.no_grad():
        for bias in (t.b_in, t.b_dec, t.b_enc):
            bias.normal_(generator=g).mul_(0.3)
    plain = [PlainLayer(t, layer, loss) for layer in range(t.n_layers)]
    shares = [0.5, 1, 1, 11 / 12]  # of 14 steps, the last twelve fall
    for step in range(4):
        x, y = torch.randn(2, t.n_layers, 11, t.d_model, generator=g, dtype=torch.float64)
        row = run.train_step(batch_of(x, y), log=True)
        assert row is not None
        for layer, one in enumerate(plain):
            taken = one.step((x if site == "transcoder" else y)[layer], y[layer],
                             profile.learning_rate * shares[step],
                             0.05 * min(1, (step + 1) / 3))
            # Rows are kept in float32.
            total = row["reconstruction"][layer] + row["sparsity"][layer]
            assert total == pytest.approx(taken.loss, rel=1e-6)
            for name, part in t.named_parameters():
                assert float((part[layer] - one.parts[name]).detach().abs().max()) < 1e-10


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


def test_an_autoencoder_starts_at_the_mean_output(model, corpus, profile):
    run = TrainingRun(model, corpus, changed(profile, site="sae"))
    run.start()
    assert torch.equal(run.transcoders.b_in, run.transcoders.b_dec) and run.transcoders.b_in.any()
    assert torch.allclose(run.transcoders.b_in, run.buffer.sites(0).outputs.mean(dim=1))
    assert run.run(progress=False).variant.site == "sae"


def test_warm_up_is_linear_then_constant_then_a_fall(model, corpus, profile):
    run = TrainingRun(model, corpus, profile)
    rates = [run.learning_rate(step) / profile.learning_rate for step in range(14)]
    assert np.allclose(rates, [0.2, 0.4, 0.6, 0.8, *[1] * 10])
    at_once = TrainingRun(model, corpus, changed(profile, warmup_steps=0, decay_steps=4))
    rates = [at_once.learning_rate(step) / profile.learning_rate for step in range(14)]
    assert np.allclose(rates, [*[1] * 11, 0.75, 0.5, 0.25])


def test_the_penalty_rises_linearly(model, corpus, profile):
    run = TrainingRun(model, corpus, changed(profile, l1_warmup_steps=4))
    shares = [run.l1_coefficient(step) / profile.l1_coefficient for step in range(6)]
    assert np.allclose(shares, [0.25, 0.5, 0.75, 1, 1, 1])
    assert TrainingRun(model, corpus, profile).l1_coefficient(0) == profile.l1_coefficient


def test_dead_features_are_those_silent_for_long_enough(model, corpus, profile):
    run = TrainingRun(model, corpus, changed(profile, dead_after_tokens=64, learning_rate=1e-9))
    run.transcoders.initialise(0)
    with torch.no_grad():
        run.transcoders.b_enc[0, :8] = -1e6  # a quarter of layer 0 cannot fire
        run.transcoders.b_enc[0, 8:] = 1e6
        run.transcoders.b_enc[1] = 1e6
    shares = []
    for step in range(4):
        if step == 3:
            with torch.no_grad():
                run.transcoders.b_enc[0, :4] = 1e6  # some come back
        row = run.train_step(batch_of(*torch.randn(2, 2, 32, 16)), log=True)
        shares.append(row["dead"])
    # Silent for 32, 64, 96, 128 tokens; dead is more than 64.
    assert shares == [[0, 0], [0, 0], [0.25, 0], [0.125, 0]]
    assert run.tokens_since_fired[0, :8].tolist() == [0] * 4 + [128] * 4


def test_dead_features_start_anew_in_the_first_half(model, corpus, profile):
    profile = changed(profile, dead_after_tokens=60, resample_steps=3, learning_rate=1e-9)
    run = TrainingRun(model, corpus, profile)
    run.start()
    b_enc = run.transcoders.b_enc
    back = []
    for step, batch in zip(range(1, 13), run.buffer.batches(0), strict=False):
        with torch.no_grad():
            if step in (1, 7):
                b_enc[1, :5] = -1e6
        run.train_step(batch, log=False)
        back.append(bool((b_enc[1, :5] > -1).all()))
    # Silent for 64 of more than 60 tokens after step 2; of 14 steps, 7 are the first half.
    assert back == [False, False, True, True, True, True] + [False] * 6


def test_measurements_are_those_of_the_batch(model, corpus, profile):
    run = TrainingRun(model, corpus, profile)
    run.start()
    x, y = torch.randn(2, 2, 40, 16)
    with torch.no_grad():
        z = run.transcoders.encode(x)
        estimate = run.transcoders.decode(z)
    row = run.train_step(batch_of(x, y), log=True)
    for layer in range(2):
        l0 = np.mean([(z[layer, n] > 0).sum() for n in range(40)])
        spread = ((y[layer] - y[layer].mean(dim=0)) ** 2).sum()
        fvu = ((estimate[layer] - y[layer]) ** 2).sum() / spread
        assert row["l0"][layer] == pytest.approx(l0)
        assert row["fvu"][layer] == pytest.approx(float(fvu), rel=1e-5)
    assert (row["step"], row["tokens"]) == (1, 32)
    json.dumps(row, allow_nan=False)
    assert run.train_step(batch_of(x, y), log=False) is None


@pytest.mark.parametrize("fields", [{"activation": "topk", "active_features": 4},
                                    {"activation": "batchtopk", "active_features": 4},
                                    {"activation": "jumprelu"}, {"skip": True}, {"site": "sae"},
                                    {"precision": "bfloat16"}], ids=str)
def test_each_variant_is_trained_and_explains_more(model, corpus, profile, fields):
    run = TrainingRun(model, corpus, changed(profile, training_tokens=32 * 120, **fields))
    t = run.run(progress=False)
    first, last = (np.mean([row["fvu"] for row in rows]) for rows in
                   (run.history[:5], run.history[-5:]))
    assert last < 0.7 * first
    assert {part.dtype for part in t.parameters()} == {torch.float32}
    if "topk" in fields.get("activation", ""):
        assert all(0 < l0 <= 4 for l0 in run.history[-1]["l0"])
    stored, _ = get_transcoders(model, corpus, run.profile)
    assert stored.variant == t.variant


def test_no_more_cells_are_harvested_than_steps_need(model, corpus, profile, monkeypatch):
    buffer = ActivationBuffer(model, corpus, profile)
    steps = buffer.n_batches(0) + buffer.n_batches(1)
    fills: list[int] = []
    real = ActivationBuffer._harvest
    monkeypatch.setattr(ActivationBuffer, "_harvest",
                        lambda self, *given: (fills.append(1), real(self, *given))[1])
    TrainingRun(model, corpus, profile).run(until=steps, progress=False)
    assert len(fills) == 2


# --- resuming ------------------------------------------------------------------------------------


def same_run(a: TrainingRun, b: TrainingRun) -> bool:
    states = a.transcoders.state_dict(), b.transcoders.state_dict()
    return (all(torch.equal(states[0][key], states[1][key]) for key in states[0])
            and a.history == b.history and a.step == b.step
            and torch.equal(a.tokens_since_fired, b.tokens_since_fired))


def trained(model: Any, corpus: Corpus, profile: Profile, checkpoint: Path | None = None
            ) -> TrainingRun:
    run = TrainingRun(model, corpus, profile, checkpoint)
    run.run(progress=False)
    return run


SMALL_STEPS = {"batch_tokens": 4, "training_tokens": 120, "dead_after_tokens": 3}
"""Batches of four tokens leave features silent, so that their counts matter too."""


@pytest.mark.parametrize("fields", [
    {}, {"buffer_tokens": 100_000}, {"activation": "batchtopk", "active_features": 2},
    {"activation": "jumprelu", "resample_steps": 4}, {"skip": True, "decay_steps": 9},
    {"site": "sae", "l1_warmup_steps": 20, "precision": "bfloat16"},
], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_an_interrupted_run_ends_as_an_uninterrupted_one(model, corpus, profile, tmp_path, seed,
                                                         fields):
    profile = changed(profile, **{"buffer_tokens": 12, **SMALL_STEPS, **fields})
    whole = trained(model, corpus, profile)
    assert whole.step == whole.steps == 30 and len(whole.history) == 30
    assert whole.tokens_since_fired.any() and any(any(row["dead"]) for row in whole.history)
    if profile.buffer_tokens == 12:
        assert sum(whole.buffer.n_batches(fill) for fill in range(3)) < 30
    checkpoint, silent = tmp_path / "checkpoint", 0
    for stop in np.sort(np.random.default_rng(seed).choice(np.arange(1, 30), 3, replace=False)):
        part = TrainingRun(model, corpus, profile, checkpoint)
        part.run(until=int(stop), progress=False)
        assert part.step == stop
        part.save_checkpoint()
        taken_up = TrainingRun(model, corpus, profile, checkpoint)
        assert taken_up.resume() and same_run(taken_up, part)
        silent += int(part.tokens_since_fired.max())
    assert same_run(trained(model, corpus, profile, checkpoint), whole) and silent


def test_a_checkpoint_is_written_as_time_passes(model, corpus, profile, tmp_path):
    path = tmp_path / "checkpoint"
    TrainingRun(model, corpus, profile, path).run(until=3, progress=False)
    assert not path.exists()
    often = changed(profile, checkpoint_seconds=1e-9)
    TrainingRun(model, corpus, often, path).run(until=3, progress=False)
    again = TrainingRun(model, corpus, often, path)
    assert again.resume() and again.step == 3


def test_a_checkpoint_is_written_every_so_many_steps(model, corpus, profile, tmp_path, monkeypatch):
    steps: list[int] = []
    real = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda folder, step, *rest: (
        steps.append(step), real(folder, step, *rest)))
    run = trained(model, corpus, changed(profile, checkpoint_steps=4), tmp_path / "checkpoint")
    assert steps == [4, 8, 12] and run.step == 14
    run.save_checkpoint()
    run.save_checkpoint()  # what is there already is not put at risk
    assert steps == [4, 8, 12, 14]


# --- asked to end --------------------------------------------------------------------------------


@pytest.mark.parametrize("number, raised", [(signal.SIGINT, KeyboardInterrupt),
                                            (signal.SIGTERM, Terminated)], ids=["INT", "TERM"])
@pytest.mark.parametrize("place", [(SparseSteps, "step"), (Stepper, "step"), (TrainingRun, "_row")],
                         ids=lambda place: f"{place[0].__name__}.{place[1]}")
@pytest.mark.parametrize("step", [0, 3])
def test_a_request_in_the_middle_of_a_step_loses_nothing(model, corpus, profile, tmp_path,
                                                         monkeypatch, place, step, number, raised):
    whole = trained(model, corpus, profile)
    run = TrainingRun(model, corpus, profile, tmp_path / "checkpoint")
    real = getattr(*place)
    before = signal.getsignal(number)

    def interrupting(self: Any, *args: Any, **named: Any) -> Any:
        result = real(self, *args, **named)
        if len(run.history) == step:
            signal.raise_signal(number)
            signal.raise_signal(number)  # as SLURM and torchrun may each send one
        return result

    with monkeypatch.context() as patch:
        patch.setattr(*place, interrupting)
        with pytest.raises(raised):
            run.run(progress=False)
    assert signal.getsignal(number) == before
    assert run.step == step + 1 == len(run.history)
    assert same_run(trained(model, corpus, profile, tmp_path / "checkpoint"), whole)


def test_the_time_of_runs_before_is_counted(model, corpus, profile, tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(training_module.time, "monotonic", lambda: now[0])
    step = TrainingRun.train_step

    def slow(self: TrainingRun, *given: Any, **named: Any) -> Any:
        now[0] += 2.0
        return step(self, *given, **named)

    monkeypatch.setattr(TrainingRun, "train_step", slow)
    profile = changed(profile, checkpoint_steps=4)
    first = TrainingRun(model, corpus, profile, tmp_path / "checkpoint")
    assert first.seconds == 0
    first.run(until=5, progress=False)
    assert first.seconds == 10
    now[0] += 1000  # the last step was not kept, and nothing ran in between
    again = TrainingRun(model, corpus, profile, tmp_path / "checkpoint")
    again.run(progress=False)
    assert again.seconds == 2 * again.steps


def test_a_second_request_does_not_cut_the_checkpoint_short(model, corpus, profile, tmp_path,
                                                            monkeypatch):
    whole = trained(model, corpus, profile)
    run = TrainingRun(model, corpus, changed(profile, checkpoint_steps=5), tmp_path / "checkpoint")
    real, saved = checkpoints.save_file, []

    def interrupting(*args: Any) -> None:
        saved.append(1)
        if len(saved) in (1, 2):  # in the checkpoint of step 5, and in that of the request
            signal.raise_signal(signal.SIGTERM)
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", interrupting)
        with pytest.raises(Terminated):
            run.run(progress=False)
    assert len(saved) >= 3
    again = TrainingRun(model, corpus, profile, tmp_path / "checkpoint")
    assert again.resume() and again.step == 5
    again.run(progress=False)
    assert same_run(again, whole)


def test_an_interrupt_before_the_first_step(model, corpus, profile, tmp_path, monkeypatch):
    whole = trained(model, corpus, profile)
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
            trained(model, corpus, profile, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    assert same_run(trained(model, corpus, profile, tmp_path / "checkpoint"), whole)


# --- killed --------------------------------------------------------------------------------------


def told_training(model: Any, corpus: Corpus, profile: Profile, folder: Path, told: Path,
                  slow_from: float) -> None:
    """Train, adding a byte to a file with every step and file; slow once it has so many bytes."""
    save_file, train_step = checkpoints.save_file, TrainingRun.train_step

    def tell() -> None:
        with told.open("ab") as file:
            file.write(b".")
        time.sleep(0.05 if told.stat().st_size >= slow_from else 0)

    def saving(values: Any, path: Path) -> None:
        save_file(values, path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])  # killed here, the file is half written
        tell()
        path.write_bytes(content)

    def stepping(self: TrainingRun, *args: Any, **named: Any) -> Any:
        tell()
        return train_step(self, *args, **named)

    checkpoints.save_file, TrainingRun.train_step = saving, stepping
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the process ends)
    run = TrainingRun(model, corpus, profile, folder)
    run.run(progress=False)
    run.save_checkpoint()


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_it_ends_the_same(model, corpus, profile, tmp_path, seed):
    profile = changed(profile, training_tokens=32 * 40, checkpoint_steps=1)
    whole = trained(model, corpus, profile)
    rng, steps = np.random.default_rng(seed), [0]
    for attempt in range(8):
        told, size = tmp_path / f"told_{attempt}", int(rng.integers(1, 16))
        process = child(told_training, model, corpus, profile, tmp_path / "checkpoint", told, size)
        wait_for(told, size)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found = TrainingRun(model, corpus, profile, tmp_path / "checkpoint")
        found.resume()
        steps.append(found.step)
    assert steps == sorted(steps) and steps[-1] > 0, "no checkpoint is lost"
    process = child(told_training, model, corpus, profile, tmp_path / "checkpoint",
                    tmp_path / "told", math.inf)
    process.join(120)
    assert process.exitcode == 0
    last = TrainingRun(model, corpus, profile, tmp_path / "checkpoint")
    assert last.resume() and same_run(last, whole)


def make_bar() -> None:
    tqdm(total=1, disable=True).close()


def hold_the_lock_of_bars(held: Path) -> None:
    with tqdm.get_lock():
        held.touch()
        time.sleep(120)


def test_a_child_that_is_killed_takes_no_lock_with_it(tmp_path):
    make_bar()  # a lock that is shared is made with the first bar
    process = child(hold_the_lock_of_bars, tmp_path / "held")
    wait_for(tmp_path / "held")
    process.kill()
    process.join()
    after = child(make_bar)
    after.join(30)
    assert after.exitcode == 0
    for lock in tqdm.get_lock().locks:
        assert lock.acquire(True, 30)
        lock.release()


def test_sigterm_ends_a_process_with_a_checkpoint(model, corpus, profile, tmp_path):
    profile = changed(profile, training_tokens=32 * 400)
    process = child(told_training, model, corpus, profile, tmp_path / "checkpoint",
                    tmp_path / "told", 5)
    wait_for(tmp_path / "told", 5)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    found = TrainingRun(model, corpus, profile, tmp_path / "checkpoint")
    assert found.resume() and 0 < found.step < 400


# --- no room -------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_training_goes_on(model, corpus, profile, tmp_path, monkeypatch,
                                                  capsys):
    profile = changed(profile, checkpoint_steps=2)
    whole = trained(model, corpus, profile)
    real, saved = checkpoints.save_file, []

    def full(*args: Any) -> None:
        saved.append(1)
        if 4 < len(saved) < 8:  # from the third checkpoint on, until there is room again
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args)

    monkeypatch.setattr(checkpoints, "save_file", full)
    run = TrainingRun(model, corpus, profile, tmp_path / "checkpoint")
    run.run(until=7, progress=False)
    said = capsys.readouterr().out
    assert said.count("Warning: no checkpoint could be written at step 6") == 1
    assert "No space left" in said and str(tmp_path / "checkpoint") in said
    again = TrainingRun(model, corpus, profile, tmp_path / "checkpoint")
    assert again.resume() and again.step == 4
    run.run(progress=False)
    assert same_run(run, whole) and "at step 8" in capsys.readouterr().out
    last = TrainingRun(model, corpus, profile, tmp_path / "checkpoint")
    assert last.resume() and last.step == 14


def test_a_folder_that_cannot_be_made(model, corpus, profile, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    whole = trained(model, corpus, profile)
    run = trained(model, corpus, changed(profile, checkpoint_steps=5), tmp_path / "file")
    assert run.history == whole.history and (tmp_path / "file").read_text() == "mine"
    assert capsys.readouterr().out.count("Warning: no checkpoint could be written") == 2


# --- other settings, broken checkpoints ----------------------------------------------------------


def stopped(model: Any, corpus: Corpus, profile: Profile, path: Path) -> None:
    part = TrainingRun(model, corpus, profile, path)
    part.run(until=6, progress=False)
    part.save_checkpoint()


@pytest.mark.parametrize("change", [
    {"l1_coefficient": 0.5}, {"loss": "equation4"}, {"seed": 5}, {"learning_rate": 1e-3},
    {"batch_tokens": 16, "buffer_tokens": 32}, {"activation": "topk"}, {"skip": True},
    {"precision": "bfloat16"}, {"decay_steps": 3}, {"model_steps": 7},
], ids=lambda change: next(iter(change)))
def test_other_settings_are_refused_before_anything_is_done(model, corpus, profile, tmp_path,
                                                            monkeypatch, change):
    path = tmp_path / "checkpoint"
    stopped(model, corpus, profile, path)
    kept = {one: one.read_bytes() for one in path.rglob("*") if one.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(ActivationBuffer, "sites", None)
        with pytest.raises(InputError) as caught:
            trained(model, corpus, changed(profile, **change), path)
    message = str(caught.value)
    assert f"changed since: {', '.join(sorted(change))}. " in message and str(path) in message
    assert {one: one.read_bytes() for one in path.rglob("*") if one.is_file()} == kept
    assert same_run(trained(model, corpus, profile, path), trained(model, corpus, profile))


def test_what_does_not_change_the_result_may_change(model, corpus, profile, tmp_path):
    stopped(model, corpus, profile, tmp_path / "checkpoint")
    other = changed(profile, checkpoint_seconds=5.0, checkpoint_steps=3, fdr=0.1)
    assert TrainingRun(model, corpus, other, tmp_path / "checkpoint").resume()


def test_another_corpus_is_refused(model, corpus, profile, tmp_path):
    stopped(model, corpus, profile, tmp_path / "checkpoint")
    other = replace(corpus, held_out=np.roll(corpus.held_out, 1))
    with pytest.raises(InputError, match="changed since: corpus"):
        TrainingRun(model, other, profile, tmp_path / "checkpoint").resume()


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "layer_1.safetensors").write_bytes(b""),
    lambda folder: (folder / "state.json").write_text("{"),
    lambda folder: (folder / "layer_0.safetensors").unlink(),
], ids=["empty layer", "cut record", "no layer"])
def test_a_broken_checkpoint_starts_again(model, corpus, profile, tmp_path, capsys, damage):
    path = tmp_path / "checkpoint"
    stopped(model, corpus, profile, path)
    damage(path / "step_6")
    run = trained(model, corpus, changed(profile, checkpoint_steps=4), path)
    assert "cannot be read" in capsys.readouterr().out
    assert same_run(run, trained(model, corpus, profile))
    assert [one.name for one in path.iterdir()] == ["step_12"]


# --- watching it ---------------------------------------------------------------------------------


def test_the_bar_shows_speed_and_measurements(model, corpus, profile, capsys):
    TrainingRun(model, corpus, profile).run(progress=True)
    shown = re.split(r"[\r\n]", capsys.readouterr().err)
    assert re.search(r"transcoders: 100%.*448/448.*tok/s", shown[-2])
    last = shown[-2]
    assert all(re.search(rf"{key}=[\d.]+", last) for key in ("reconstruction", "l0", "fvu", "dead"))
    TrainingRun(model, corpus, profile).run(progress=False)
    assert capsys.readouterr().err == ""


def test_a_resumed_bar_begins_where_training_does(model, corpus, profile, tmp_path, capsys):
    stopped(model, corpus, profile, tmp_path / "checkpoint")
    capsys.readouterr()
    TrainingRun(model, corpus, profile, tmp_path / "checkpoint").run(progress=True)
    captured = capsys.readouterr()
    assert "Resuming at step 6 of 14." in captured.out
    assert "192/448" in captured.err and "448/448" in captured.err


def test_each_row_is_handed_on(model, corpus, profile):
    seen: list[int] = []
    run = TrainingRun(model, corpus, profile)
    run.run(progress=False, logged=lambda history: seen.append(len(history)))
    assert seen == list(range(1, 15))


def test_a_layer_that_diverges_is_named_once_and_stored_all_the_same(model, corpus, profile,
                                                                     tmp_path, capsys):
    profile = changed(profile, checkpoint_steps=3)
    run = TrainingRun(model, corpus, profile, tmp_path / "checkpoint")
    run.resume()
    run.run(until=4, progress=False)
    with torch.no_grad():
        run.transcoders.W_dec[1] = torch.inf
    run.save_checkpoint()
    assert TrainingRun(model, corpus, profile, tmp_path / "checkpoint").resume()
    capsys.readouterr()
    again = trained(model, corpus, profile, tmp_path / "checkpoint")
    said = capsys.readouterr().out
    assert said.count("Warning: layer 1 diverges") == 1 and "layer 0" not in said
    assert "lower `learning_rate`" in said and "(step 5)" in said
    assert again.history[-1]["fvu"][1] is None and math.isfinite(again.history[-1]["fvu"][0])
    last = TrainingRun(model, corpus, profile, tmp_path / "checkpoint")
    assert last.resume() and last.history == again.history[:12]


def test_a_rate_that_is_too_high_is_said_after_the_warm_up(model, corpus, profile, capsys):
    profile = changed(profile, learning_rate=0.9, warmup_steps=3, loss="equation4")
    trained(model, corpus, profile)
    said = capsys.readouterr().out.splitlines()
    assert any(re.match(r"Warning: layer \d diverges \(fraction of variance unexplained \d", one)
               for one in said)
    steps = [int(re.search(r"step (\d+)", one).group(1)) for one in said if "diverges" in one]
    assert min(steps) > 3 and len(steps) <= 2


@pytest.mark.parametrize(("fvu", "told"), [
    ([520, 300, 180, 60, 30, 12, 3], []),  # tiny outputs: far off at the start, and coming down
    ([520, 300, 180, 60, 30, 40, 3], []),  # as batches vary
    ([520, 300, 180, 60, 30, 61, 3], [("diverges", 6)]),
    ([1.2, 0.9, 400, 300, 200, 100, 20], [("diverges", 4)]),  # rose while the rate warmed up
    ([1.2, 0.9, 9, 9, 9, 9, 9], []),
    ([520, 500, 480, 450, 420, 400, 390], [("ends far worse than its mean output alone", 7)]),
    ([520, 300, 180, None, 60, 30, 12], [("diverges", 4),
                                         ("ends far worse than its mean output alone", 7)]),
])
def test_only_a_layer_whose_error_has_risen_diverges(model, corpus, profile, monkeypatch, capsys,
                                                     fvu, told):
    profile = changed(profile, warmup_steps=3, training_tokens=7 * profile.batch_tokens)
    run = TrainingRun(model, corpus, profile)

    def step(batch: Batch, *, log: bool) -> dict[str, Any]:
        run.step += 1
        layers = {key: [0.5, 0.5] for key in ("reconstruction", "sparsity", "l0", "dead")}
        return {"step": run.step, "tokens": 0, **layers, "fvu": [0.5, fvu[run.step - 1]]}

    monkeypatch.setattr(run, "train_step", step)
    run.run(progress=False)
    said = capsys.readouterr().out.splitlines()
    assert [re.match(r"Warning: layer 1 ([\w ]*\w) \(.*\(step (\d)\)\.$", one).groups()  # type: ignore[union-attr]
            for one in said] == [(what, str(at)) for what, at in told]


def test_a_layer_that_dies_is_named_once(model, corpus, profile, capsys):
    profile = changed(profile, dead_after_tokens=100, loss="equation4")
    run = TrainingRun(model, corpus, profile)
    run.start()
    with torch.no_grad():
        run.transcoders.b_enc[0] = -1e6
    run.resume = lambda: True  # type: ignore[method-assign]
    run.run(progress=False)
    said = [one for one in capsys.readouterr().out.splitlines() if "dies" in one]
    assert len(said) == 1 and said[0].startswith("Warning: layer 0 dies (100% of its features")
    assert "lower `l1_coefficient`" in said[0] and "(step 4)" in said[0]


# --- kept results, and the program ---------------------------------------------------------------


def test_finished_transcoders_are_kept_and_the_checkpoint_goes(model, corpus, profile,
                                                               monkeypatch, capsys):
    profile = changed(profile, checkpoint_steps=3)
    first, history = get_transcoders(model, corpus, profile)
    assert len(history) == 14 and "Training 2 transcoders of width 32" in capsys.readouterr().out
    assert sorted(one.name for one in profile.results.iterdir()) == ["transcoders"]
    monkeypatch.setattr(TrainingRun, "run", None)  # training again would fail
    again, same = get_transcoders(model, corpus, profile)
    assert same == history and torch.equal(first.W_enc, again.W_enc)
    with pytest.raises(TypeError):
        get_transcoders(model, corpus, changed(profile, l1_coefficient=0.1))


@pytest.mark.parametrize("file", ["layer_1.safetensors", "training.json"])
@pytest.mark.parametrize("lose", [Path.unlink, lambda path: path.write_bytes(b""),
                                  lambda path: os.truncate(path, path.stat().st_size // 2)],
                         ids=["deleted", "emptied", "cut"])
def test_transcoders_that_are_not_whole_are_trained_again(model, corpus, profile, capsys, file,
                                                          lose):
    first, _ = get_transcoders(model, corpus, profile)
    folder = profile.results / "transcoders"
    lose(folder / file)
    capsys.readouterr()
    again, _ = get_transcoders(model, corpus, profile)
    told = capsys.readouterr().out
    assert told.startswith(f"{os.path.relpath(folder)} is not whole ({file} ")
    assert "Training 2 " in told
    assert torch.equal(first.W_enc, again.W_enc) and torch.equal(first.W_dec, again.W_dec)


@pytest.mark.parametrize("lose", [Path.unlink, lambda path: path.write_bytes(b"")],
                         ids=["deleted", "emptied"])
def test_a_lost_description_costs_no_training(model, corpus, profile, monkeypatch, lose):
    get_transcoders(model, corpus, profile)
    path = profile.results / "transcoders" / "config.yaml"
    was = path.read_bytes()
    lose(path)
    monkeypatch.setattr(TrainingRun, "run", None)  # training again would fail
    get_transcoders(model, corpus, profile)
    assert path.read_bytes() == was


def test_training_says_at_its_end_that_nothing_is_active(model, corpus, profile, monkeypatch):
    dead = changed(profile, l1_coefficient=1e9, learning_rate=0.5, warmup_steps=0,
                   training_tokens=1600)
    for _ in range(2):  # the second time what is stored is read
        with pytest.raises(InputError, match="No feature of any layer is active at the end"):
            get_transcoders(model, corpus, dead)
        assert (profile.results / "transcoders" / "training.json").is_file()
        monkeypatch.setattr(TrainingRun, "run", None)  # training again would fail


def test_what_is_saved_is_what_was_trained(model, corpus, profile):
    run = trained(model, corpus, profile)
    stored, _ = get_transcoders(model, corpus, profile)
    x = run.buffer.sites(0).inputs
    with torch.no_grad():
        assert torch.allclose(stored(x), run.transcoders(x), atol=1e-4)


def test_transcoders_that_diverge_are_stored_too(model, corpus, profile, monkeypatch):
    start = TrainingRun.start

    def broken(self: TrainingRun) -> None:
        start(self)
        with torch.no_grad():
            self.transcoders.b_dec[1] = torch.nan

    monkeypatch.setattr(TrainingRun, "start", broken)
    _, history = get_transcoders(model, corpus, profile)
    assert history[-1]["reconstruction"][1] is None
    monkeypatch.setattr(TrainingRun, "run", None)
    assert get_transcoders(model, corpus, profile)[1] == history


def no_model(profile: Profile, corpus: Corpus) -> Any:
    return model_for(corpus, dtype=torch.float32), None


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: Corpus) -> Callable[..., int]:
    """`main` with a tiny corpus and model in place of the profile's own."""
    from scfm_circuits.cells import corpus as sentences
    from scfm_circuits.models import loading

    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path))
    monkeypatch.setattr(sentences, "load_corpus", lambda profile: corpus)
    monkeypatch.setattr(loading, "get_model", no_model)
    fields = [f"-p{key}={value}" for key, value in TRAINING.items()]
    return lambda *more: main(["train", "--profile", "smoke", *fields, *more])


def test_the_program_trains_what_the_chapter_reads(program, tmp_path, capsys):
    assert program() == 0
    folder = next(tmp_path.glob("smoke+*/transcoders"))
    assert f"The transcoders are in {folder}." in capsys.readouterr().out
    assert (folder / "layer_1.safetensors").is_file()


def test_the_program_logs_as_the_chapter_does(program, monkeypatch):
    seen: list[int] = []

    monkeypatch.setattr(training_module, "TensorBoard",
                        lambda folder: lambda history: seen.append(len(history)))
    assert program("-p", "tensorboard=true") == 0 and len(seen) > 1
    assert seen == sorted(seen)


@pytest.mark.parametrize("given, message", [
    (["-p", "loss=mse"], "Profile field `loss`"), (["-p", "loss"], "must have the form key=value"),
    (["--profile", "nowhere"], "There is no profile 'nowhere'"),
])
def test_what_a_person_can_mend_is_one_line(program, capsys, given, message):
    assert program(*given) == 1
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_program_asked_to_end(program, monkeypatch, capsys, number, code):
    real = training_module.TrainingRun._row

    def interrupting(self: TrainingRun, *args: Any) -> Any:
        if self.step == 6:
            signal.raise_signal(number)
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_row", interrupting)
        if number == signal.SIGTERM:
            with pytest.raises(SystemExit) as caught:
                program()
            assert caught.value.code == code
        else:
            assert program() == code
            assert "run the same command again to go on" in capsys.readouterr().err
    assert program() == 0
    assert "Resuming at step 6 of 14." in capsys.readouterr().out


def test_training_imports_neither_scanpy_nor_gseapy():
    """A GPU machine may have neither, nor pandas."""
    code = ("import sys, scfm_circuits.transcoders.training.run; "
            "print([name for name in ('scanpy', 'gseapy', 'anndata', 'pandas', 'matplotlib') "
            "if name in sys.modules])")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
