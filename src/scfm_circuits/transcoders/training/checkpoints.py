"""Checkpoints of a training run: everything the next step depends on, whole or not at all.

`<checkpoint>/step_<n>/` holds a file per layer (weights, Adam's moments, silence counts) and
`state.json` (step, history, and the stamp of the run they belong to). It is written under another
name and renamed, and the one before it is removed only then, so that a process killed at any moment
leaves a whole one. As layers are apart, a run may be taken up by another number of processes.
The data position and all random choices follow from the seed and the step.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scfm_circuits import InputError
from scfm_circuits.common.files import flush, read_json, write_json
from scfm_circuits.transcoders.training.processes import ALONE, Ranks

_STATE = "state.json"


class Checkpoint(NamedTuple):
    """A checkpoint read back; tensors: per layer asked for, by name; seconds: spent so far."""

    step: int
    history: list[dict[str, Any]]
    seconds: float
    tensors: list[dict[str, Tensor]]


def stamp_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Names of the profile fields, or else the other parts, in which two stamps differ."""
    fields = old.get("fields", {}), new.get("fields", {})
    names = [key for key in sorted({*fields[0], *fields[1]})
             if fields[0].get(key) != fields[1].get(key)]
    names += [key for key in ("sources", "versions", "corpus", "control")
              if old.get(key) != new.get(key)]
    return ", ".join(names)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints in a folder, the latest first."""
    found = [(int(path.name[5:]), path) for path in folder.glob("step_*")
             if re.fullmatch(r"step_\d+", path.name) and (path / _STATE).is_file()]
    return sorted(found, reverse=True)


def save(folder: Path, step: int, tensors: list[dict[str, Tensor]], layers: range,
         history: list[dict[str, Any]], seconds: float, stamp: Mapping[str, Any],
         ranks: Ranks) -> None:
    """Write the checkpoint of a step; each process gives its own layers.

    tensors: per layer, by name. seconds: time spent so far. Raises OSError at all of them if one
    has no room or no right to write; what stood there before is then still there.
    """
    whole, part = folder / f"step_{step}", folder / f".step_{step}"
    with _agreed(part, ranks):
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".step_*"):  # of a process that was killed while writing
                shutil.rmtree(left, ignore_errors=True)
            part.mkdir()
    with _agreed(part, ranks):
        for layer, values in zip(layers, tensors, strict=True):
            save_file({key: value.detach().cpu().contiguous() for key, value in values.items()},
                      part / f"layer_{layer}.safetensors")
            flush(part / f"layer_{layer}.safetensors")
    with _agreed(part, ranks):
        if ranks.first:
            write_json(part / _STATE, {"step": step, "stamp": stamp, "history": history,
                                      "seconds": seconds})
            shutil.rmtree(whole, ignore_errors=True)  # one that could not be read
            part.rename(whole)
            for _, old in _steps(folder):  # later ones could not be read either
                if old != whole:
                    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _agreed(part: Path, ranks: Ranks) -> Iterator[None]:
    """Raise OSError at every process if one of them has a problem within the block, and remove what
    is half done."""
    problem = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        problem = str(error)
    problems = [one for one in ranks.gather(problem) if one is not None]
    if problems:
        if ranks.first:
            shutil.rmtree(part, ignore_errors=True)
        raise OSError(problems[0])


def load(folder: Path, layers: range, stamp: Mapping[str, Any], ranks: Ranks = ALONE
         ) -> Checkpoint | None:
    """The latest whole checkpoint of this very run; None if there is none.

    Several processes take the latest that each of them can read. Raises InputError if the
    checkpoint is of a run with other settings, naming what differs: hours of training are not
    thrown away for a changed line.
    """
    for step in ranks.gather([step for step, _ in _steps(folder)])[0]:
        path = folder / f"step_{step}"
        found, reason = None, ""
        try:
            state = read_json(path / _STATE)
            differing = stamp_difference(state["stamp"], stamp)
            if not differing:
                tensors = [load_file(path / f"layer_{layer}.safetensors") for layer in layers]
                found = Checkpoint(int(state["step"]), list(state["history"]),
                                   float(state["seconds"]), tensors)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            differing = ""
        if differing:
            raise InputError(
                f"Training stopped at step {step:,} and cannot go on, because this changed "
                f"since: {differing}. Set it back, or delete {folder} to begin anew.")
        reasons = [one for one in ranks.gather(reason) if one]
        if not reasons:
            return found
        if ranks.first:
            print(f"The checkpoint {path} cannot be read ({reasons[0]}).")
    return None


def remove(folder: Path) -> None:
    """Remove all checkpoints in a folder, and the folder if nothing else is in it."""
    for path in (*folder.glob("step_*"), *folder.glob(".step_*")):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
