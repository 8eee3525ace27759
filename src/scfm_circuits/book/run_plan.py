"""What a run will cost, said before it begins: downloads, disk, memory and time on this machine.

Sizes are the run's own (`run_sizes`), speeds are measured (`speed_probe`), and what would not fit
is refused with the profile field that makes it smaller. Times are those of a run from nothing; what
an earlier run has left is not made again. All numbers are estimates; times may be off by a factor
of two.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from scfm_circuits import InputError
from scfm_circuits.book.downloads import MODEL_FILES, missing_bytes
from scfm_circuits.book.run_memory import (
    GIB,
    Stage,
    feature_count_bytes,
    memory_available,
    memory_problems,
    memory_stages,
    transcoder_bytes,
)
from scfm_circuits.book.run_sizes import RunSizes, run_sizes
from scfm_circuits.book.run_times import STARTED, chapter_seconds
from scfm_circuits.book.speed_probe import Speeds, measure_speeds
from scfm_circuits.circuits.attribution import NO_CIRCUITS
from scfm_circuits.circuits.case_study import read_sentence
from scfm_circuits.common import manifest
from scfm_circuits.common.files import time_in_words
from scfm_circuits.common.profile import ROOT, Profile, cells_path, load_profile
from scfm_circuits.enrichment.gene_sets import cache_folder, downloads_are_off, local_copy
from scfm_circuits.models.mlp_sites import best_device
from scfm_circuits.transcoders.variants import settings

ANYWAY = "SCFM_ANYWAY"
"""Environment variable that turns refusals into warnings."""


class Download(NamedTuple):
    """Something to fetch: bytes, into which folder; `exact` if the size is known."""

    what: str
    bytes: int
    folder: Path
    exact: bool = True


class RunPlan(NamedTuple):
    """All of it.

    disk: bytes by folder. problems: what cannot fit, a sentence each. speeds, seconds: measured,
    and by chapter; None and empty if the run is refused.
    """

    sizes: RunSizes
    device: torch.device
    downloads: list[Download]
    disk: dict[Path, int]
    stages: list[Stage]
    problems: list[str]
    speeds: Speeds | None
    seconds: dict[str, float]


def plan_run(profile: Profile, stale: Sequence[str]) -> RunPlan:
    """Look at sizes, compare what the stale chapters need with what there is, and measure speeds.

    stale: names of the chapters that will be executed. Raises InputError as `run_sizes` and
    `case_study.read_sentence` do, and for autoencoders.
    """
    if profile.site != "transcoder":
        raise InputError(NO_CIRCUITS)
    if profile.case_sentence is not None:
        read_sentence(profile.case_sentence)
    sizes, device = run_sizes(profile), best_device()
    found = downloads(profile, sizes)
    disk = disk_needed(profile, sizes, found, stale)
    stages = [one for one in memory_stages(profile, sizes, device) if one.serves(stale)]
    problems = [*_disk_problems(disk), *memory_problems(profile, sizes, stages, device)]
    # What will not be run is not tried at its own size either.
    runs = not problems or os.environ.get(ANYWAY)
    speeds = measure_speeds(profile, sizes, device) if runs else None
    told = chapter_seconds(profile, sizes, speeds) if speeds is not None else {}
    seconds = {name: told.get(name, STARTED) for name in stale} if told else {}
    return RunPlan(sizes, device, found, disk, stages, problems, speeds, seconds)


def refusal(plan: RunPlan) -> str:
    """Why the run cannot fit; empty if it can, or if the environment says to try all the same."""
    if not plan.problems or os.environ.get(ANYWAY):
        return ""
    return "\n".join([*plan.problems, f"(To try all the same, set {ANYWAY}=1.)"])


# --- downloads and disk --------------------------------------------------------------------------


def downloads(profile: Profile, sizes: RunSizes) -> list[Download]:
    """What is not here yet. A model's size is that of its weights in float32, the most there is."""
    from huggingface_hub import constants

    found = []
    listed, path = manifest.entry("cells", profile.cells), cells_path(profile, ROOT)
    if listed is not None and path is not None:
        left = missing_bytes(int(listed["bytes"]), path)
        found += [Download(path.name, left, path.parent)] if left else []
    for name in dict.fromkeys((profile.model, profile.tokenizer)):
        if name != "train" and not _is_here(name, profile.model_revision, name == profile.model):
            size = 4 * sizes.parameters if name == profile.model else 3 * 2**20
            found.append(Download(name, size, Path(constants.HF_HUB_CACHE), exact=False))
    for name in () if downloads_are_off() else missing_libraries(profile):
        library = manifest.entry("gene_sets", name)
        size = int(library["bytes"]) if library else 2**20
        found.append(Download(name, size, cache_folder(), exact=library is not None))
    return found


def missing_libraries(profile: Profile) -> list[str]:
    """Gene-set libraries that are not here; InputError if a folder named for them is not."""
    return [name for name in dict.fromkeys((*profile.libraries, profile.case_library))
            if local_copy(name, profile.gene_sets) is None]


def _is_here(name: str, revision: str | None, weights: bool) -> bool:
    """Whether a model (with its weights) or a tokenizer is a folder, or in Hugging Face's cache."""
    if Path(name).expanduser().exists():
        return True
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, revision=revision, local_files_only=True,
                                   allow_patterns=MODEL_FILES)
    except Exception:  # huggingface_hub raises many kinds
        return False
    return any(Path(folder).glob("*.safetensors" if weights else "tokenizer*"))


def disk_needed(profile: Profile, sizes: RunSizes, found: Iterable[Download],
                stale: Sequence[str]) -> dict[Path, int]:
    """Bytes that will be written, by folder, at the moment when most is there.

    In results/, by the chapters that will run: what they leave beyond what is there already, and
    one training checkpoint with the one that takes its place.
    """
    disk = {profile.results: 200 * 2**20}
    for chapter, (names, size) in _left_by(profile, sizes).items():
        if any(name.startswith(chapter) for name in stale):
            there = sum(_bytes_in(profile.results / name) for name in names)
            disk[profile.results] += max(0, size - there)
    if any(name.startswith(("02", "06", "09")) for name in stale):
        disk[profile.results] += 2 * 3 * transcoder_bytes(profile, sizes)
    for one in found:
        disk[one.folder] = disk.get(one.folder, 0) + one.bytes
    return disk


def _left_by(profile: Profile, sizes: RunSizes) -> dict[str, tuple[list[str], int]]:
    """By the beginning of a chapter's name: what large things it leaves, and their bytes."""
    trained, counts = transcoder_bytes(profile, sizes), feature_count_bytes(profile, sizes)
    small = 4 * sizes.parameters if profile.model == "train" else 0
    return {
        "01": (["corpus", "language_model"], 15 * sizes.cells * sizes.padded + small),
        "02": (["transcoders"], trained),
        "04": (["features.npz"], counts),
        "05": (["untrained"], counts),
        "06": (["reinitialised"], profile.reinitialised_control * (trained + counts)),
        "09": (["variants"], len(settings(profile)) * (trained + counts)),
    }


def _bytes_in(path: Path) -> int:
    """Size of a file, or of all files below a folder; 0 for what is not there."""
    if path.is_file():
        return path.stat().st_size
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def _disk_problems(disk: Mapping[Path, int]) -> list[str]:
    """One sentence for each disk that has not the room; folders of one disk are added up."""
    together: dict[int, list[Path]] = {}
    for folder in disk:
        together.setdefault(os.stat(_existing(folder)).st_dev, []).append(folder)
    problems = []
    for folders in together.values():
        needed = sum(disk[folder] for folder in folders)
        free = shutil.disk_usage(_existing(folders[0])).free
        if needed > free:
            names = " and ".join(str(folder) for folder in folders)
            problems.append(
                f"The disk of {names} has {free / 1e9:.1f} GB free, and the run writes up to "
                f"{needed / 1e9:.1f} GB there; make room, name other folders in SCFM_RESULTS, "
                "SCFM_DATA or HF_HOME, or lower `expansion` or `max_cells` in the profile.")
    return problems


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists; InputError if nothing can be written."""
    try:
        while not folder.exists():
            folder = folder.parent
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    raise InputError(f"Nothing can be written into {folder}; name other folders in SCFM_RESULTS, "
                     "SCFM_DATA, SCFM_CACHE or HF_HOME.")


# --- in words ------------------------------------------------------------------------------------


def describe_plan(profile: Profile, plan: RunPlan) -> str:
    """The plan as lines for the terminal."""
    sizes, lines = plan.sizes, []
    of = f" of {sizes.cells_in_file:,}" if sizes.cells != sizes.cells_in_file else ""
    about = "" if sizes.measured else "about "
    lines.append(f"{profile.name}: {sizes.cells:,}{of} cells, {about}{sizes.length:.0f} tokens "
                 f"each, {sizes.tokens / 1e6:,.2f} M tokens; {sizes.layers} layers of width "
                 f"{sizes.width:,}, {profile.expansion * sizes.width:,} features each")
    for one in plan.downloads:
        lines.append(f"  download  {'' if one.exact else 'at most '}{_size(one.bytes)}: {one.what}")
    if downloads_are_off() and (missing := missing_libraries(profile)):
        lines.append(f"  gene sets {', '.join(missing)} are not here and downloads are off; a "
                     "small bundled library will stand in")
    for folder, size in plan.disk.items():
        free = shutil.disk_usage(_existing(folder)).free
        lines.append(f"  disk      up to {_size(size)} into {folder} ({_size(free)} free)")
    return "\n".join([*lines, *_memory(plan), *_times(plan)])


def _memory(plan: RunPlan) -> list[str]:
    """A line for the largest stage on the GPU and one for that on the machine, if there are any."""
    lines = []
    for on_device in (True, False):
        stages = [one for one in plan.stages if one.on_device == on_device]
        if not stages:
            continue
        largest = max(stages, key=lambda stage: stage.bytes)
        device = plan.device if on_device else torch.device("cpu")
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in
                          sorted(largest.parts.items(), key=lambda item: -item[1])[:4])
        lines.append(f"  memory    about {largest.bytes / GIB:.1f} GiB ({largest.name}: {parts}); "
                     f"{memory_available(device) / GIB:.1f} GiB free on {_device_name(device)}")
    return lines


def _times(plan: RunPlan) -> list[str]:
    if plan.speeds is None:
        return []
    total, rate = time_in_words(sum(plan.seconds.values())), plan.speeds
    chapters = "1 chapter" if len(plan.seconds) == 1 else f"{len(plan.seconds)} chapters"
    return [f"  time      about {total} for {chapters}, if nothing of them is there yet",
            *(f"            {name:28} {time_in_words(seconds)}"
              for name, seconds in plan.seconds.items()),
            f"            (measured: {1 / (plan.sizes.layers * rate.forward):,.0f} tokens/s "
            f"through the model, {1 / (plan.sizes.layers * rate.training):,.0f} in training)"]


def _size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{max(n, 1e5) / 1e6:.1f} MB"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores"


# --- as a program --------------------------------------------------------------------------------


def main(given: Sequence[str] | None = None) -> int:
    """Print a plan as JSON: text, refusal (empty if all is well), longest (seconds of a chapter).

    A program of its own, so that a GPU and the memory of the libraries are free again when the
    notebooks run.
    """
    from scfm_circuits.common.profile import add_profile_arguments, parse_overrides

    parser = argparse.ArgumentParser(prog="scfm_circuits.book.run_plan", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_profile_arguments(parser)
    parser.add_argument("--stale", nargs="*", default=[], help="chapters that will be executed")
    arguments = parser.parse_args(given)
    found = {"text": "", "refusal": "", "longest": 0.0}
    try:
        profile = load_profile(arguments.profile, parse_overrides(arguments.parameters))
        plan = plan_run(profile, arguments.stale)
        found = {"text": describe_plan(profile, plan), "refusal": refusal(plan),
                 "longest": max(plan.seconds.values(), default=0.0)}
    except InputError as error:
        found["refusal"] = str(error)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
