"""What a run will cost, said before it begins: downloads, disk, memory and time on this machine.

Sizes are the run's own (`run_sizes`), speeds are measured (`speed_probe`), and what would not fit
is refused with the profile field that makes it smaller. Times are those of a run from nothing; what
an earlier run has left is not made again. All numbers are estimates: memory and disk err on the
large side, times may be off by a factor of two.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from scfm_circuits import InputError, manifest
from scfm_circuits.attribution import NO_CIRCUITS
from scfm_circuits.case_study import read_sentence
from scfm_circuits.downloads import missing_bytes
from scfm_circuits.gene_sets import cache_folder, downloads_are_off, local_copy
from scfm_circuits.language_model import best_device
from scfm_circuits.profile import ROOT, Profile, cells_path
from scfm_circuits.run_memory import (
    GIB,
    Stage,
    feature_count_bytes,
    memory_available,
    memory_problems,
    memory_stages,
    transcoder_bytes,
)
from scfm_circuits.run_sizes import RunSizes, run_sizes
from scfm_circuits.run_times import STARTED, chapter_seconds
from scfm_circuits.speed_probe import Speeds, measure_speeds
from scfm_circuits.training_cost import time_in_words
from scfm_circuits.variants import settings

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


def plan_run(profile: Profile) -> RunPlan:
    """Look at sizes, compare needs with what there is, and measure speeds.

    Raises InputError as `run_sizes` and `case_study.read_sentence` do, and for autoencoders.
    """
    if profile.site != "transcoder":
        raise InputError(NO_CIRCUITS)
    if profile.case_sentence is not None:
        read_sentence(profile.case_sentence)
    sizes, device = run_sizes(profile), best_device()
    found = downloads(profile, sizes)
    disk = disk_needed(profile, sizes, found)
    stages = memory_stages(profile, sizes, device)
    problems = [*_disk_problems(disk), *memory_problems(profile, sizes, stages, device)]
    # What will not be run is not tried at its own size either.
    runs = not problems or os.environ.get(ANYWAY)
    speeds = measure_speeds(profile, sizes, device) if runs else None
    seconds = chapter_seconds(profile, sizes, speeds) if speeds is not None else {}
    return RunPlan(sizes, device, found, disk, stages, problems, speeds, seconds)


def check_plan(plan: RunPlan) -> None:
    """InputError if the run cannot fit, unless the environment says to try all the same."""
    if plan.problems and not os.environ.get(ANYWAY):
        raise InputError("\n".join(plan.problems) + f"\n(To try all the same, set {ANYWAY}=1.)")


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
        if name != "train" and not _is_here(name, profile.model_revision):
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


def _is_here(name: str, revision: str | None) -> bool:
    """Whether a model or tokenizer is a folder, or whole in the Hugging Face cache."""
    if Path(name).expanduser().exists():
        return True
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, revision=revision, local_files_only=True)
    except Exception:  # huggingface_hub raises many kinds
        return False
    return True


def disk_needed(profile: Profile, sizes: RunSizes, found: Iterable[Download]) -> dict[Path, int]:
    """Bytes that will be written, by folder, at the moment when most is there.

    In results/: the corpus, the small model, all transcoders (the run's, the control's, those of
    the kinds compared), their feature counts, and one training checkpoint with the one that
    takes its place.
    """
    one_set = transcoder_bytes(profile, sizes)
    sets = 1 + profile.reinitialised_control + len(settings(profile))
    disk = {profile.results: 15 * sizes.cells * sizes.padded + sets * one_set + 2 * 3 * one_set
            + sets * feature_count_bytes(profile, sizes) + 200 * 2**20
            + (4 * sizes.parameters if profile.model == "train" else 0)}
    for one in found:
        disk[one.folder] = disk.get(one.folder, 0) + one.bytes
    return disk


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
    while not folder.exists():
        folder = folder.parent
    return folder


# --- in words ------------------------------------------------------------------------------------


def describe_plan(profile: Profile, plan: RunPlan, stale: Sequence[str]) -> str:
    """The plan as lines for the terminal. stale: names of the chapters that will be executed."""
    sizes, lines = plan.sizes, []
    of = f" of {sizes.cells_in_file:,}" if sizes.cells != sizes.cells_in_file else ""
    about = "" if sizes.measured else "about "
    lines.append(f"{profile.name}: {sizes.cells:,}{of} cells, {about}{sizes.length:.0f} tokens "
                 f"each, {sizes.tokens / 1e6:,.1f} M tokens; {sizes.layers} layers of width "
                 f"{sizes.width:,}, {profile.expansion * sizes.width:,} features each")
    for one in plan.downloads:
        lines.append(f"  download  {'' if one.exact else 'at most '}{_size(one.bytes)}: {one.what}")
    if downloads_are_off() and (missing := missing_libraries(profile)):
        lines.append(f"  gene sets {', '.join(missing)} are not here and downloads are off; a "
                     "small bundled library will stand in")
    for folder, size in plan.disk.items():
        free = shutil.disk_usage(_existing(folder)).free
        lines.append(f"  disk      up to {_size(size)} into {folder} ({_size(free)} free)")
    largest = plan.stages[0]
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in
                      sorted(largest.parts.items(), key=lambda item: -item[1])[:4])
    lines.append(f"  memory    up to {largest.bytes / GIB:.1f} GiB ({largest.name}: {parts}); "
                 f"{memory_available(plan.device) / GIB:.1f} GiB free on "
                 f"{_device_name(plan.device)}")
    return "\n".join([*lines, *_times(plan, stale)])


def _times(plan: RunPlan, stale: Sequence[str]) -> list[str]:
    if plan.speeds is None:
        return []
    seconds = {name: plan.seconds.get(name, STARTED) for name in stale}
    total = time_in_words(sum(seconds.values()))
    rate, layers = plan.speeds, plan.sizes.layers
    return [f"  time      about {total} for {len(stale)} chapters, if nothing of them is there yet",
            *(f"            {name:28} {time_in_words(seconds[name])}" for name in stale),
            f"            (measured: {1 / (layers * rate.forward):,.0f} tokens/s through the "
            f"model, {1 / (layers * rate.training):,.0f} in training)"]


def _size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{max(n, 1e5) / 1e6:.1f} MB"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores"
