"""Several processes that train one set of transcoders."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import model_for
from hypothesis import given
from hypothesis import strategies as st
from processes import child, free_port, in_ranks, wait_for
from torch import Tensor

from scfm_circuits import InputError
from scfm_circuits.__main__ import main
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.files import read_json
from scfm_circuits.common.profile import ROOT, Profile
from scfm_circuits.transcoders.training import checkpoints
from scfm_circuits.transcoders.training.interrupts import Terminated
from scfm_circuits.transcoders.training.processes import FailedElsewhere, Ranks, _take_gpu, started
from scfm_circuits.transcoders.training.run import TrainingRun, get_transcoders


@pytest.fixture(scope="module")
def model(corpus: Corpus) -> Any:
    return model_for(corpus, layers=3, dtype=torch.float32)


# --- ranks ---------------------------------------------------------------------------------------


@given(n_layers=st.integers(0, 60), size=st.integers(1, 20))
def test_layers_are_shared_out_evenly(n_layers, size):
    shares = [Ranks(rank, size).layers(n_layers) for rank in range(size)]
    assert [layer for share in shares for layer in share] == list(range(n_layers))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [Ranks(0, size).layers(n_layers, rank) for rank in range(size)] == shares


def test_a_process_that_torchrun_did_not_start_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with started() as ranks:
        assert ranks == Ranks(0, 1) and ranks.first
        ranks.barrier()
        assert ranks.gather("one") == ["one"] and ranks.after_first(lambda: 3) == 3


def slow_to_join() -> None:
    real = torch.distributed.init_process_group

    def joined(*arguments: Any, **named: Any) -> None:
        real(*arguments, **named)
        time.sleep(0.4 * int(os.environ["RANK"]))
        os.environ["JOINED"] = str(time.monotonic())

    torch.distributed.init_process_group = joined


def joined_and_begun(ranks: Ranks) -> tuple[float, float]:
    return float(os.environ["JOINED"]), time.monotonic()


def test_none_begins_before_all_have_joined():
    joined, begun = zip(*in_ranks(3, joined_and_begun, before=slow_to_join), strict=True)
    assert min(begun) >= max(joined)


def exchanged(ranks: Ranks) -> list[Any]:
    gathered = ranks.gather({"rank": ranks.rank})
    # Process r hands q a tensor of r + 1 rows that says from whom to whom; the first hands nothing
    # to the second.
    parts = [torch.full((0 if (ranks.rank, other) == (0, 1) else ranks.rank + 1, 2),
                        10.0 * ranks.rank + other, dtype=torch.bfloat16)
             for other in range(ranks.size)]
    shapes = [(0 if (other, ranks.rank) == (0, 1) else other + 1, 2) for other in range(ranks.size)]
    return [gathered, [(tuple(one.shape), one.unique().tolist())
                       for one in ranks.exchange(parts, shapes)]]


@pytest.mark.parametrize("size", [2, 3])
def test_each_process_is_handed_its_part(size):
    for rank, (gathered, parts) in enumerate(in_ranks(size, exchanged)):
        assert gathered == [{"rank": other} for other in range(size)]
        assert parts == [((0, 2), []) if (other, rank) == (0, 1) else
                         ((other + 1, 2), [10 * other + rank]) for other in range(size)]


def build(ranks: Ranks, path: Path) -> str:
    def read_or_build() -> str:
        if path.exists():
            return f"read {path.read_text()}"
        time.sleep(0.3)  # the others would not find it yet
        path.write_text("once")
        return "built"
    return ranks.after_first(read_or_build)


def test_the_first_process_builds_what_the_others_read(tmp_path):
    assert in_ranks(3, build, tmp_path / "built") == ["built", "read once", "read once"]


def fail_first(ranks: Ranks) -> None:
    def fail() -> None:
        raise InputError("no such profile" if ranks.first else "never reached")
    ranks.after_first(fail)


def test_where_the_first_process_fails_the_others_do_not_wait():
    first, second = in_ranks(2, fail_first)
    assert isinstance(first, InputError) and str(first) == "no such profile"
    assert isinstance(second, FailedElsewhere)


# --- training ------------------------------------------------------------------------------------


def state(run: TrainingRun) -> tuple[dict[str, Tensor], list[dict[str, Any]], int]:
    return run.transcoders.state_dict(), run.history, run.step


def run_until(ranks: Ranks, model: Any, corpus: Corpus, profile: Profile, folder: Path | None,
              until: int | None = None) -> Any:
    run = TrainingRun(model, corpus, profile, folder, ranks=ranks)
    run.run(until=until, progress=False)
    if until is not None:
        run.save_checkpoint()
    return state(run)


def assert_together(parts: list[Any], whole: Any) -> None:
    """Ranks' layers, put together, are those of one process, bit by bit."""
    for name, tensor in whole[0].items():
        assert torch.equal(torch.cat([part[0][name] for part in parts]), tensor), name
    assert all(part[1:] == whole[1:] for part in parts)


@pytest.mark.parametrize("fields", [
    {}, {"activation": "batchtopk", "active_features": 3, "precision": "bfloat16"},
    {"site": "sae", "skip": True, "resample_steps": 2, "dead_after_tokens": 20},
], ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_processes_train_what_one_trains(model, corpus, profile, size, fields):
    profile = profile.model_copy(update=fields)
    whole = run_until(Ranks(), model, corpus, profile, None)
    assert_together(in_ranks(size, run_until, model, corpus, profile, None), whole)
    assert len(whole[1]) == 14 and len(whole[1][0]["fvu"]) == 3


def test_another_number_of_processes_goes_on(model, corpus, profile, tmp_path):
    whole = run_until(Ranks(), model, corpus, profile, None)
    folder = tmp_path / "checkpoint"
    for size, until in ((2, 4), (1, 7), (3, 10)):
        in_ranks(size, run_until, model, corpus, profile, folder, until)
        assert [path.name for path in folder.iterdir()] == [f"step_{until}"]
    assert_together(in_ranks(2, run_until, model, corpus, profile, folder), whole)


def stored(ranks: Ranks, model: Any, corpus: Corpus, profile: Profile) -> Any:
    transcoders, history = get_transcoders(model, corpus, profile, ranks=ranks)
    return transcoders.state_dict(), history


def test_the_files_are_those_of_one_process(model, corpus, profile, monkeypatch, tmp_path):
    profile = profile.model_copy(update={"checkpoint_steps": 5})
    folders = []
    for size in (1, 2, 3):
        monkeypatch.setenv("SCFM_RESULTS", str(tmp_path / str(size)))
        answers = in_ranks(size, stored, model, corpus, profile)
        for tensors, history in answers:  # each process has all layers at the end
            assert history == answers[0][1] and len(tensors["W_enc"]) == 3
        folders.append(profile.results)
    contents = [{path.name: path.read_bytes() for path in (folder / "transcoders").iterdir()
                 if path.name != "training.json"} for folder in folders]
    assert contents[0] == contents[1] == contents[2] and len(contents[0]) == 4
    assert [path.name for path in folders[1].iterdir()] == ["transcoders"]
    records = [{**read_json(folder / "transcoders" / "training.json"), "seconds": 0}
               for folder in folders]
    assert records[0] == records[1] == records[2]


def test_more_processes_than_layers(model, corpus, profile):
    for answer in in_ranks(4, run_until, model, corpus, profile, None):
        assert isinstance(answer, InputError) and "4 processes cannot share the 3" in str(answer)


def asked_to_end(ranks: Ranks, model: Any, corpus: Corpus, profile: Profile, folder: Path,
                 numbers: dict[int, int]) -> tuple[str, int, int]:
    """SIGTERM or Ctrl-C reaches some of the processes in the middle of step 6."""
    run = TrainingRun(model, corpus, profile, folder, ranks=ranks)
    real = run._row

    def interrupting(found: Any) -> Any:
        if run.step == 6 and ranks.rank in numbers:
            signal.raise_signal(numbers[ranks.rank])
        return real(found)

    run._row = interrupting  # type: ignore[method-assign]
    said = "nothing"
    try:
        run.run(progress=False)
    except KeyboardInterrupt:
        said = "interrupt"
    except Terminated as error:
        said = f"exit {error.code}"
    whole = TrainingRun(model, corpus, profile, folder, ranks=ranks)
    whole.resume()
    return said, run.step, whole.step


@pytest.mark.parametrize("numbers, said", [
    ({0: signal.SIGTERM, 1: signal.SIGTERM}, "exit 143"), ({1: signal.SIGTERM}, "exit 143"),
    ({0: signal.SIGINT, 1: signal.SIGINT}, "interrupt"),
], ids=["both", "one", "Ctrl-C"])
def test_processes_end_at_the_same_step_with_a_checkpoint(model, corpus, profile, tmp_path, numbers,
                                                          said):
    answers = in_ranks(2, asked_to_end, model, corpus, profile, tmp_path / "checkpoint", numbers)
    assert answers == [(said, 6, 6)] * 2
    whole = run_until(Ranks(), model, corpus, profile, None)
    assert_together([run_until(Ranks(), model, corpus, profile, tmp_path / "checkpoint")], whole)


def without_room(ranks: Ranks, model: Any, corpus: Corpus, profile: Profile, folder: Path) -> Any:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if ranks.rank == 1:
        checkpoints.save_file = full  # type: ignore[assignment]
    return run_until(ranks, model, corpus, profile, folder)


def test_processes_go_on_where_one_has_no_room(model, corpus, profile, tmp_path):
    profile = profile.model_copy(update={"checkpoint_steps": 4})
    whole = run_until(Ranks(), model, corpus, profile, None)
    run_until(Ranks(), model, corpus, profile, tmp_path / "checkpoint", 5)
    answers = in_ranks(2, without_room, model, corpus, profile, tmp_path / "checkpoint")
    assert_together(answers, whole)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step_5"]


def one_fails(ranks: Ranks, model: Any, corpus: Corpus, profile: Profile) -> Any:
    run = TrainingRun(model, corpus, profile, ranks=ranks)
    real = run.train_step

    def failing(*arguments: Any, **named: Any) -> Any:
        if ranks.rank == 1 and run.step == 3:
            raise ValueError("out of memory, say")
        return real(*arguments, **named)

    run.train_step = failing  # type: ignore[method-assign]
    return run.run(progress=False)


def test_a_process_that_fails_does_not_leave_the_others_waiting(model, corpus, profile):
    first, second = in_ranks(2, one_fails, model, corpus, profile, seconds=30)
    assert str(second) == "out of memory, say"
    assert isinstance(first, RuntimeError), "its next exchange ends with an error"


# --- the program ---------------------------------------------------------------------------------


def program(rank: int, port: int, errors: Path, given: list[str], n_gpus: int = 0) -> None:
    """The program as torchrun starts it, on a machine that seems to have some GPUs."""
    if n_gpus:
        seem_to_have(pytest.MonkeyPatch(), n_gpus)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stderr = errors.open("w")
    code = main(["train", *given])
    sys.stderr.close()
    raise SystemExit(code)


@pytest.mark.parametrize("field, said", [("loss=mse", "Profile field `loss`"),
                                         ("case_type=Unicorn", "No held-out cell has the type")])
def test_processes_say_once_what_a_person_can_mend(tmp_path, monkeypatch, field, said):
    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path))
    port, errors = free_port(), [tmp_path / "0", tmp_path / "1"]
    processes = [child(program, rank, port, errors[rank], ["--profile", "smoke", "-p", field])
                 for rank in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [1, 1]
    assert said in errors[0].read_text() and len(errors[0].read_text().splitlines()) == 1
    assert errors[1].read_text() == ""


# --- fewer GPUs than processes --------------------------------------------------------------------


def seem_to_have(patch: pytest.MonkeyPatch, n_gpus: int) -> list[int]:
    """Let the package see a number of GPUs; returns the list of those that are made current."""
    taken: list[int] = []
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    patch.setattr(torch.cuda, "set_device", taken.append)
    return taken


@pytest.mark.parametrize("number, said", [(1, "has 1 GPU; start at most 1 "),
                                          (2, "has 2 GPUs; start at most 2 ")])
def test_one_process_says_that_there_are_too_few_gpus(monkeypatch, number, said):
    taken = seem_to_have(monkeypatch, number)
    for name, value in (("WORLD_SIZE", "6"), ("LOCAL_WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    for local in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        with pytest.raises(InputError) as found, started():
            pass
        assert isinstance(found.value, FailedElsewhere) == bool(local)
        assert local or f"3 processes were started, but this machine {said}" in str(found.value)
    assert taken == []


def test_the_program_says_once_that_there_are_too_few_gpus(tmp_path):
    port, errors = free_port(), [tmp_path / "0", tmp_path / "1"]
    processes = [child(program, rank, port, errors[rank], ["--profile", "smoke"], 1)
                 for rank in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [1, 1]
    assert errors[0].read_text().startswith("2 processes were started") and not errors[
        1].read_text()


def seem_to_have_one() -> None:
    seem_to_have(pytest.MonkeyPatch(), 1)


def exchanged_through(ranks: Ranks) -> list[Any]:
    return [ranks.through_host, *exchanged(ranks)]


def test_processes_that_may_share_a_gpu_exchange_through_the_host(monkeypatch):
    monkeypatch.setenv("SCFM_SHARE_GPUS", "1")
    answers = in_ranks(2, exchanged_through, before=seem_to_have_one)
    assert [one[0] for one in answers] == [True, True]
    assert [one[1:] for one in answers] == in_ranks(2, exchanged)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    taken = seem_to_have(monkeypatch, 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for local in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert _take_gpu() is True
    assert taken == [0, 1]


# --- torchrun ------------------------------------------------------------------------------------


def test_torchrun_trains_what_one_process_trains(tmp_path, monkeypatch):
    """With nothing there, the first process builds the corpus and the small model for both."""
    fields = {"model_steps": 3, "training_tokens": 4096, "genes_per_cell": 8,
              "vocabulary_size": 300}
    given = [f"-p{key}={value}" for key, value in fields.items()]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
         str(free_port()), "-m", "scfm_circuits", "train", "--profile", "smoke", *given],
        env={**os.environ, "SCFM_RESULTS": str(tmp_path / "two"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    two = next((tmp_path / "two").iterdir())
    assert f"The transcoders are in {two / 'transcoders'}." in done.stdout
    assert done.stdout.count("Training 2 transcoders") == 1 and "tok/s" in done.stderr
    # The other way has no model of its own to train: it must find this one current.
    one = tmp_path / "one" / two.name
    one.mkdir(parents=True)
    for name in ("corpus", "language_model"):
        (two / name).rename(one / name)
    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path / "one"))
    monkeypatch.setattr("scfm_circuits.models.small_models.train_small_model", None)
    assert main(["train", "--profile", "smoke", *given]) == 0
    for layer in range(2):
        name = f"transcoders/layer_{layer}.safetensors"
        assert (one / name).read_bytes() == (two / name).read_bytes()


# --- the script for SLURM ------------------------------------------------------------------------


TRAINERS = {  # what stands for torchrun; SIGTERM arrives when there is a file `ready`
    "ends well": ("exit 0", False, 0, 0), "fails": ("exit 3", False, 3, 0),
    "asked to end": ("trap 'echo saved > checkpoint; exit 1' TERM; touch ready; sleep 60 & wait",
                     True, 0, 1),
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_slurm_script_queues_again_only_if_it_was_asked_to_end(tmp_path, trainer):
    """The script of the page, with other programs in the place of torchrun and scontrol."""
    body, asked, code, requeued = TRAINERS[trainer]
    page = (ROOT / "book" / "reproduce.md").read_text(encoding="utf-8")
    (tmp_path / "job").write_text(page.split("```bash\n")[1].split("```")[0])
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, text in ((".venv/bin/torchrun", body), ("scontrol", 'echo "$@" >> queue')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = subprocess.Popen(["bash", "job"], cwd=tmp_path, env={
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"})
    if asked:
        wait_for(tmp_path / "ready")
        job.terminate()
    assert job.wait(60) == code
    queue = tmp_path / "queue"
    assert (queue.read_text() if queue.exists() else "") == "requeue 17\n" * requeued
    assert (tmp_path / "checkpoint").exists() == asked
