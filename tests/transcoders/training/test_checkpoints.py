"""Checkpoints: whole or not at all, whatever happens while they are written."""

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import child, in_ranks
from torch import Tensor

from scfm_circuits import InputError
from scfm_circuits.common.files import read_json, write_json
from scfm_circuits.transcoders.training import checkpoints
from scfm_circuits.transcoders.training.checkpoints import load, remove, save, stamp_difference
from scfm_circuits.transcoders.training.processes import Ranks

STAMP = {"fields": {"seed": 0, "loss": "normalized"}, "sources": {"training": "ab"},
         "versions": {"torch": "2"}, "corpus": "cd"}
LAYERS = range(3)


def tensors(step: int, layers: range = LAYERS) -> list[dict[str, Tensor]]:
    return [{"model.W": torch.full((2, 2), step + layer / 10), "silent": torch.tensor([step])}
            for layer in layers]


def history(step: int) -> list[dict[str, Any]]:
    return [{"step": one, "fvu": [0.5, None]} for one in range(1, step + 1)]


def write(folder: Path, step: int, ranks: Ranks = Ranks(), stamp: Any = STAMP) -> None:  # noqa: B008
    layers = ranks.layers(len(LAYERS))
    save(folder, step, tensors(step, layers), layers, history(step), 0.5 * step, stamp, ranks)


def read(folder: Path, ranks: Ranks = Ranks(), stamp: Any = STAMP) -> int | None:  # noqa: B008
    """The step that is taken up, which must be whole."""
    layers = ranks.layers(len(LAYERS))
    found = load(folder, layers, stamp, ranks)
    if found is None:
        return None
    assert found.history == history(found.step)
    for own, expected in zip(found.tensors, tensors(found.step, layers), strict=True):
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[key], expected[key]) for key in own)
    return found.step


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file()}


def test_what_is_read_is_what_was_written_and_one_is_kept(tmp_path):
    assert read(tmp_path / "none") is None
    for step in (3, 7, 20):
        write(tmp_path, step)
        assert read(tmp_path) == step
        assert load(tmp_path, LAYERS, STAMP).seconds == 0.5 * step
        assert [path.name for path in tmp_path.iterdir()] == [f"step_{step}"]


def test_other_files_stay(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    write(tmp_path, 3)
    write(tmp_path, 4)
    remove(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    remove(tmp_path / "none")


def test_the_folder_goes_with_its_checkpoints(tmp_path):
    write(tmp_path / "one", 3)
    (tmp_path / "one" / ".step_5").mkdir()
    remove(tmp_path / "one")
    assert not (tmp_path / "one").exists()


# --- killed while writing ------------------------------------------------------------------------


def die(*arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(function: Callable, at: int = 1) -> Callable:
    """The function, which kills the process when it is called the `at`-th time."""
    calls: list[int] = []

    def killing(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            die()
        return function(*arguments, **named)
    return killing


def half_written(values: dict[str, Tensor], path: Path) -> None:
    path.write_bytes(b"\x40\0\0\0\0\0\0\0{")
    die()


KILLED = {
    "before the folder": (Path, "mkdir", before(Path.mkdir, 2), 7),
    "before the first layer": (checkpoints, "save_file", before(checkpoints.save_file), 7),
    "in the first layer": (checkpoints, "save_file", half_written, 7),
    "before the last layer": (checkpoints, "save_file", before(checkpoints.save_file, 3), 7),
    "before the record": (checkpoints, "write_json", before(write_json), 7),
    "before the new one is named": (Path, "rename", before(Path.rename), 7),
    "before the old one goes": (checkpoints.shutil, "rmtree",
                                before(checkpoints.shutil.rmtree, 2), 9),
}


def killed_while_writing(folder: Path, place: str) -> None:
    target, name, replacement, _ = KILLED[place]
    setattr(target, name, replacement)
    write(folder, 9)


@pytest.mark.parametrize("place", KILLED)
def test_a_kill_while_writing_leaves_a_whole_one(tmp_path, place):
    write(tmp_path, 7)
    process = child(killed_while_writing, tmp_path, place)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert read(tmp_path) == KILLED[place][-1]
    write(tmp_path, 12)
    assert read(tmp_path) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["step_12"], "what was left over is gone"


# --- no room, no right ---------------------------------------------------------------------------


def full(*arguments: Any, **named: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("target, name", [
    (checkpoints, "save_file"), (checkpoints, "write_json"), (Path, "mkdir"), (Path, "rename"),
], ids=["layers", "record", "folder", "naming"])
def test_a_full_disk_leaves_the_one_before(tmp_path, monkeypatch, target, name):
    write(tmp_path, 7)
    kept = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, 9)
    assert contents(tmp_path) == kept and read(tmp_path) == 7
    write(tmp_path, 9)
    assert read(tmp_path) == 9


def write_with_little_room(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    large = [{"W": torch.zeros(5000)} for _ in LAYERS]
    try:
        save(folder, 9, large, LAYERS, [], 0.0, STAMP, Ranks())
    except OSError:
        raise SystemExit(3) from None


def test_a_file_that_the_system_refuses(tmp_path):
    """Here safetensors meets the error, and wraps it in one of its own."""
    write(tmp_path, 7)
    process = child(write_with_little_room, tmp_path)
    process.join(60)
    assert process.exitcode == 3
    assert read(tmp_path) == 7 and [path.name for path in tmp_path.iterdir()] == ["step_7"]


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError):
        write(tmp_path / "file", 3)
    with pytest.raises(OSError):
        write(tmp_path / "file" / "below", 3)
    assert (tmp_path / "file").read_text() == "mine"


# --- broken ones ---------------------------------------------------------------------------------


def broken(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))
    return damage


DAMAGES = {
    "empty": broken("layer_1.safetensors", lambda content: b""),
    "head only": broken("layer_1.safetensors", lambda content: content[:50]),
    "tail cut": broken("layer_2.safetensors", lambda content: content[:-3]),
    "noise": broken("layer_0.safetensors", lambda content: b"\xff" * 500),
    "no layer": lambda folder: (folder / "layer_1.safetensors").unlink(),
    "no JSON": broken("state.json", lambda content: content[:-20]),
    "a list": broken("state.json", lambda content: b"[1]"),
    "no stamp": broken("state.json", lambda content: b'{"step": 7, "history": []}'),
    "a stamp that is none": broken("state.json", lambda content: b'{"step": 7, "stamp": 3}'),
    "no step": broken("state.json", lambda content: content.replace(b'"step": 7\n}',
                                                                    b'"stop": 7\n}')),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_named_and_passed_over(tmp_path, capsys, damage):
    write(tmp_path, 7)
    DAMAGES[damage](tmp_path / "step_7")
    assert read(tmp_path) is None
    said = capsys.readouterr().out
    assert f"{tmp_path / 'step_7'} cannot be read" in said and len(said.splitlines()) == 1
    # What is written next stays, though it is of an earlier step than the broken one.
    write(tmp_path, 2)
    assert read(tmp_path) == 2
    write(tmp_path, 7)
    assert read(tmp_path) == 7


def test_the_one_before_takes_a_broken_ones_place(tmp_path):
    write(tmp_path, 3)
    (tmp_path / "step_3").rename(tmp_path / "kept")
    write(tmp_path, 7)
    (tmp_path / "kept").rename(tmp_path / "step_3")  # as after a kill before it was removed
    assert read(tmp_path) == 7
    DAMAGES["empty"](tmp_path / "step_7")
    assert read(tmp_path) == 3


# --- other settings ------------------------------------------------------------------------------


@pytest.mark.parametrize("change, named", [
    ({"fields": {"seed": 1, "loss": "equation4"}}, "loss, seed"),
    ({"fields": {"seed": 0}}, "loss"),
    ({"fields": {**STAMP["fields"], "new": 1}}, "new"),
    ({"sources": {"training": "ef"}}, "sources"), ({"versions": {}}, "versions"),
    ({"corpus": "other"}, "corpus"), ({"control": {"name": "one"}}, "control"),
])
def test_other_settings_are_refused_by_name_and_nothing_is_deleted(tmp_path, change, named):
    write(tmp_path, 1234)
    kept = contents(tmp_path)
    assert stamp_difference(STAMP, {**STAMP, **change}) == named
    with pytest.raises(InputError) as caught:
        load(tmp_path, LAYERS, {**STAMP, **change})
    message = str(caught.value)
    assert f"this changed since: {named}. " in message and "step 1,234" in message
    assert f"delete {tmp_path} to begin anew" in message and "\n" not in message
    assert contents(tmp_path) == kept


# --- several processes ---------------------------------------------------------------------------


def read_in_rank(ranks: Ranks, folder: Path) -> int | None:
    return read(folder, ranks)


def load_other_corpus(ranks: Ranks, folder: Path) -> Any:
    return load(folder, LAYERS, {**STAMP, "corpus": "x"}, ranks)


def write_and_read(ranks: Ranks, folder: Path) -> list[int | None]:
    found = [read(folder, ranks)]
    for step in (3, 7):
        write(folder, step, ranks)
        found.append(read(folder, ranks))
    return found


@pytest.mark.parametrize("written, taken_up", [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_another_number_of_processes_takes_it_up(tmp_path, written, taken_up):
    for answer in in_ranks(written, write_and_read, tmp_path):
        assert answer == [None, 3, 7]
    assert sorted(contents(tmp_path)) == sorted(
        f"step_7/{name}" for name in ("state.json", *(f"layer_{i}.safetensors" for i in LAYERS)))
    assert in_ranks(taken_up, read_in_rank, tmp_path) == [7] * taken_up


def one_fails(ranks: Ranks, folder: Path, rank: int, name: str) -> list[Any]:
    """Write 7; a process fails to write 9; write 11."""
    write(folder, 7, ranks)
    real = getattr(checkpoints, name)
    if ranks.rank == rank:
        setattr(checkpoints, name, full)
    try:
        write(folder, 9, ranks)
        said = "nothing"
    except OSError as error:
        said = str(error)
    setattr(checkpoints, name, real)
    left = read(folder, ranks)
    write(folder, 11, ranks)
    return [said, left, read(folder, ranks)]


@pytest.mark.parametrize("rank, name", [(0, "save_file"), (1, "save_file"), (0, "write_json")])
def test_a_process_that_cannot_write_stops_all_of_them(tmp_path, rank, name):
    for said, *steps in in_ranks(2, one_fails, tmp_path, rank, name):
        assert "No space left" in said and steps == [7, 11]


def test_processes_take_the_latest_that_all_can_read(tmp_path):
    write(tmp_path, 3)
    (tmp_path / "step_3").rename(tmp_path / "kept")
    write(tmp_path, 7)
    (tmp_path / "kept").rename(tmp_path / "step_3")
    DAMAGES["tail cut"](tmp_path / "step_7")  # a layer of the second process
    assert in_ranks(2, read_in_rank, tmp_path) == [3, 3]


def test_each_process_refuses(tmp_path):
    write(tmp_path, 3)
    answers = in_ranks(2, load_other_corpus, tmp_path)
    assert all(isinstance(one, InputError) and "corpus" in str(one) for one in answers)
    assert read_json(tmp_path / "step_3" / "state.json")["step"] == 3
