"""What a run will cost, said before anything is fetched: downloads, disk, memory and time.

What does not fit is refused with the profile field to lower. All numbers are estimates; the time,
of a machine that does nothing else, may be off by a factor of one and a half.
"""

import os
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scfm_circuits import InputError
from scfm_circuits.book import side_by_side
from scfm_circuits.book.chapters import Notebook
from scfm_circuits.book.downloads import (
    Download,
    missing,
    missing_libraries,
    notes,
)
from scfm_circuits.book.sizes import (
    CELLS,
    CONTROLS,
    COUNTED,
    INTERVENED,
    KINDS,
    SCORED,
    TRACED,
    TRAINED,
    VALIDATED,
    Sizes,
    run_sizes,
    works,
)
from scfm_circuits.circuits.case_study import read_sentence
from scfm_circuits.circuits.frozen import NO_CIRCUITS
from scfm_circuits.common.encodings import BINNED
from scfm_circuits.common.files import time_in_words
from scfm_circuits.common.profile import Profile
from scfm_circuits.enrichment.gene_sets import downloads_are_off
from scfm_circuits.features.counting import CHUNK_BYTES
from scfm_circuits.features.pair_counts import BUFFER_KEYS
from scfm_circuits.models.loading import model_dtype
from scfm_circuits.models.mlp_sites import best_device
from scfm_circuits.transcoders.training.settings import precision_of, training_memory

ANYWAY = "SCFM_ANYWAY"
"""Environment variable that turns refusals into warnings."""
VALUES_ALONE = ("scGPT gives each gene a value and no probability, so Tables 1 and 2, and what the "
                "book's chapters ask a model (which word, which gene), have no answer in it; its "
                "transcoders alone are trained, by `.venv/bin/python -m scfm_circuits train "
                "--profile PROFILE`.")
GIB, CPU = 2**30, torch.device("cpu")
OTHER, KEPT = 3 * GIB // 2, 0.2
"""A chapter's memory beside the parts (libraries, tables, figures), and the share of it all that is
freed and not given back at once."""
MOST_SECONDS = 365 * 86400.0
"""A run that would take longer is refused: a field has a wrong number of zeros."""
STARTED, NULL_SECONDS, LIVE = 8.0, 0.02, 800
CIRCUITS = TRACED, INTERVENED
SPEED = 0.7
"""Work in n times as many threads is done n to this power times as fast, read off likewise."""
"""Read off runs of `demo` on two cores: seconds of a chapter beside its work and of a feature's
thousand null lists, and live features of a layer."""
REACHED = {"cuda": {"model": 0.52, "train": 0.73, "count": 0.078, "validate": 0.158},
           "cpu": {"model": 0.33, "train": 0.65, "count": 0.3, "validate": 0.27}}
"""Share of the bare products' rate (`matrix_rate`) at which operations are done. On a GPU: read off
one H200 at the paper's size, where a step of training took 10.7 ms with 50 features active;
counting went through 50,000 tokens a second, Tables 1 and 2 through 5,263. On a CPU: read off
`pbmc` on two cores, where training leaves out features that are zero."""
TOKENIZERS, TOKENIZERS_SECONDS = "tables/sub_words.csv", 60.0
OTHERS, OTHERS_SECONDS = "tables/other_models.csv", 45.0
"""The chapters with two tokenizers and with other models, by a file that each leaves. Their models
are small in every profile; seconds as for `STARTED`."""

FIELDS = {
    "forward_cells": ("logits", "layers' inputs and outputs", "attention"),
    "buffer_tokens": ("buffer",),
    "batch_tokens": ("activations of one batch",),
    "expansion": ("parameters and Adam", "gradients", "transcoders", "feature counts",
                  "activations of one batch", "features of a cell"),
}
"""Profile fields and the parts of memory that grow with them; first what changes results least."""


class Stage(NamedTuple):
    """A moment at which much memory is held. leaves: by which work; parts: in bytes; device: whose
    memory."""

    name: str
    leaves: tuple[str, ...]
    parts: Mapping[str, int]
    device: torch.device

    @property
    def bytes(self) -> int:
        """All parts together, and what is freed and kept."""
        return round((1 + KEPT) * sum(self.parts.values()))


class Cost(NamedTuple):
    """Lines for the terminal, why the run is refused (or nothing), its seconds (or 0) and those of
    each chapter beside others, and how many run at once."""

    text: str
    refusal: str
    seconds: float
    each: Mapping[str, float]
    jobs: int = 1


def run_cost(profile: Profile, notebooks: Sequence[Notebook], stale: Collection[str] | None = None,
             jobs: int | None = None) -> Cost:
    """What the stale chapters cost.

    notebooks: all of the run. stale: names of those that are, or all. jobs: how many run at once;
    by default as many as the machine allows, and one if two that would meet do not fit.

    Raises InputError for what will fail in any case: cells, a model, a folder of gene sets or a
    sentence that cannot be had, no cell for the case study, layers that the model lacks, a
    single layer, and autoencoders.
    """
    if profile.site != "transcoder":
        raise InputError(NO_CIRCUITS)
    if profile.case_sentence is not None:
        read_sentence(profile.case_sentence)
    sizes, device, libraries = run_sizes(profile), best_device(), missing_libraries(profile)
    if sizes.layers < 2:
        raise InputError("A model of one layer has no circuit: before its features there is the "
                         "token alone. Set `model_layers` to at least 2, or name another `model`.")
    chapters = [one for one in notebooks if stale is None or one.name in stale]
    wanted = {file for one in chapters for file in one.produces}
    if profile.encoding == BINNED:
        wanted &= {CELLS, TRAINED}
    found = missing(profile, sizes.parameters)
    disk = disk_needed(profile, sizes, found, wanted)
    stages = [one for one in memory_stages(profile, sizes, device) if {*one.leaves} & wanted]
    together = meeting(chapters, side_by_side.before(notebooks), stages)
    fits = all(size <= memory_available(place) for place, size in together.items())
    at_once = jobs or (side_by_side.usual_jobs() if fits else 1)
    problems = [*_disk_problems(disk), *memory_problems(profile, sizes, stages)]
    lines = _what_is_needed(profile, sizes, found, libraries, disk)
    lines += _memory_lines(stages, together if at_once > 1 else {})
    if profile.encoding == BINNED:
        return Cost("\n".join(lines), VALUES_ALONE, 0.0, {})
    hint = f"(To try all the same, set {ANYWAY}=1.)"
    if problems and not os.environ.get(ANYWAY):
        return Cost("\n".join(lines), "\n".join([*problems, hint]), 0.0, {})
    rate = matrix_rate(profile, sizes, device)
    alone = {one.name: run_seconds(profile, sizes, one.produces, 1, rate, REACHED[device.type])
             for one in chapters}
    seconds, each = seconds_at_once(alone, chapters, notebooks, at_once, device)
    lines.append(f"  time      about {time_in_words(seconds)} for {len(chapters)} chapter"
                 f"{'s' if len(chapters) != 1 else ''}, {at_once} at once, if nothing of them is "
                 "there yet")
    if seconds > MOST_SECONDS and not os.environ.get(ANYWAY):
        return Cost("\n".join(lines), f"The run would take about {time_in_words(seconds)} here; "
                    "lower what it takes most of (`training_tokens`, `model_steps`, `null_draws`). "
                    + hint, 0.0, {})
    return Cost("\n".join(lines), "", seconds, each, at_once)


def _what_is_needed(profile: Profile, sizes: Sizes, found: Sequence[Download],
                    libraries: Sequence[str], disk: Mapping[Path, int]) -> list[str]:
    """The run's size, notes, what is fetched (`found`), gene sets that are not here, and disk."""
    of = f" of {sizes.cells_in_file:,}" if sizes.cells != sizes.cells_in_file else ""
    lines = [f"{profile.name}: {sizes.cells:,}{of} cells, {'' if sizes.measured else 'about '}"
             f"{sizes.tokens / sizes.cells:.0f} tokens each, {sizes.tokens / 1e6:,.2f} M tokens; "
             f"{sizes.layers} layers of width {sizes.width:,}, "
             f"{profile.expansion * sizes.width:,} features each"]
    lines += [f"  note      {note}" for note in (*sizes.notes, *notes(profile))]
    lines += [f"  download  {'' if one.exact else 'at most '}{_size(one.bytes)}: {one.what}"
              for one in found]
    if libraries and downloads_are_off():
        lines.append(f"  gene sets {', '.join(libraries)} are not here and downloads are off; a "
                     "small bundled library will stand in")
    lines += [f"  disk      up to {_size(size)} into {folder} "
              f"({_size(shutil.disk_usage(_existing(folder)).free)} free)"
              for folder, size in disk.items()]
    return lines


def _memory_lines(stages: Sequence[Stage], together: Mapping[torch.device, int]) -> list[str]:
    """Each device's largest stage, beside two chapters at once where they are given."""
    lines = []
    for place in dict.fromkeys(one.device for one in stages):
        largest = max((one for one in stages if one.device == place), key=lambda one: one.bytes)
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in
                          sorted(largest.parts.items(), key=lambda item: -item[1])[:4])
        name = f"{os.cpu_count()} CPU cores" if place == CPU else torch.cuda.get_device_name(place)
        both = (f"two chapters at once {together[place] / GIB:.1f} GiB; " if place in together
                else "")
        lines.append(f"  memory    about {largest.bytes / GIB:.1f} GiB ({largest.name}: {parts}); "
                     f"{both}{memory_available(place) / GIB:.1f} GiB free on {name}")
    return lines


def meeting(chapters: Sequence[Notebook], stands_on: Mapping[str, set[str]],
            stages: Sequence[Stage]) -> dict[torch.device, int]:
    """By device the most bytes that two chapters hold which may run at once."""
    found: dict[torch.device, int] = {}
    for place in {one.device for one in stages}:
        most = {one.name: max((stage.bytes for stage in stages if stage.device == place
                               and {*stage.leaves} & {*one.produces}), default=OTHER)
                for one in chapters}
        pairs = side_by_side.pairs_at_once(chapters, stands_on)
        if pairs:
            found[place] = max(most[one] + most[other] for one, other in pairs)
    return found


def seconds_at_once(each: Mapping[str, float], chapters: Sequence[Notebook],
                    notebooks: Sequence[Notebook], jobs: int, device: torch.device
                    ) -> tuple[float, Mapping[str, float]]:
    """Seconds of the chapters side by side, and of each then; each: by itself with all cores."""
    stands_on, share = side_by_side.before(notebooks), side_by_side.threads_of(notebooks)
    if device.type == "cpu":
        # What a chapter does with half of the cores takes longer, though not twice as long.
        each = {name: STARTED + (seconds - STARTED) * (side_by_side.cores() / share[name]) ** SPEED
                for name, seconds in each.items()}
    taken = side_by_side.length(chapters, stands_on, jobs, each)
    # One GPU does what all ask of it, one after another.
    if device.type != "cpu":
        taken = max(taken, sum(each.values()) - STARTED * len(each))
    return taken, each


def _size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{max(n, 1e5) / 1e6:.1f} MB"


def disk_needed(profile: Profile, sizes: Sizes, found: Iterable[Download],
                wanted: Collection[str]) -> dict[Path, int]:
    """Bytes that will be written, by folder, at the moment when most is there.

    In results/: what the stale chapters leave beyond what is there already, and one training
    checkpoint with the one that takes its place.
    """
    needed = 200 * 2**20 + 15 * sizes.cells * sizes.padded * (CELLS in wanted)
    if {TRAINED, CONTROLS, KINDS} & {*wanted}:
        needed += 2 * 3 * sizes.one_set
    for file, work in works(profile, sizes).items():
        if file in wanted and work.bytes:
            top = profile.results / work.folder
            there = sum(one.stat().st_size for one in (top, *top.rglob("*")) if one.is_file())
            needed += max(0, work.bytes - there)
    disk = {profile.results: needed}
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
            problems.append(
                f"The disk of {' and '.join(map(str, folders))} has {free / 1e9:.1f} GB free, and "
                f"the run writes up to {needed / 1e9:.1f} GB there; make room, name other folders "
                "in SCFM_RESULTS, SCFM_DATA or HF_HOME, or lower `expansion` or `max_cells` in the "
                "profile.")
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


def memory_stages(profile: Profile, sizes: Sizes, device: torch.device) -> list[Stage]:
    """The stages of a run that hold most."""
    on_gpu, own, other = device.type == "cuda", model_dtype(profile), precision_of(profile, device)
    cells = min(profile.forward_cells, sizes.cells)
    batch = round(cells * sizes.tokens / sizes.cells)
    passing = {
        "model": own.itemsize * sizes.parameters, "other": OTHER, "transcoders": sizes.one_set,
        # As a list by layers and put together.
        "layers' inputs and outputs": 2 * own.itemsize * 2 * sizes.layers * batch * sizes.width,
        # Scores, their softmax and its sum with the mask, of one layer.
        "attention": 3 * 4 * cells * sizes.heads * sizes.padded**2}
    training = passing | {"attention": 0} | training_memory(  # which is fused here
        profile, sizes.training_tokens, sizes.layers, sizes.width,
        sizes.layers if on_gpu else 1, other.itemsize)
    if other != own:
        training["model in the type of training"] = other.itemsize * sizes.parameters
    counts = {"feature counts": (4 if profile.reinitialised_control else 3) * sizes.counts,
              "keys to be sorted": 4 * 8 * BUFFER_KEYS}
    counting = "counting features", (COUNTED, SCORED, CONTROLS, KINDS)
    on_device = {"activations and keys": 2 * CHUNK_BYTES + 4 * 8 * 8 * BUFFER_KEYS}
    stages = [
        Stage("training", (TRAINED, KINDS), training, device),
        # Log-probabilities of two configurations, logits, and one more while they are compared.
        Stage("validation", (VALIDATED,),
              passing | {"logits": 4 * 4 * batch * sizes.vocabulary}, device),
        Stage(*counting, passing | (on_device if on_gpu else counts), device)]
    if on_gpu:
        stages.append(Stage(*counting, {"other": OTHER, **counts}, CPU))
    if profile.reinitialised_control:
        stages.append(Stage("the control's training", (CONTROLS,), training | {
            "re-initialised model": passing["model"], "transcoders": 2 * sizes.one_set} | (
            {} if on_gpu else {"feature counts": 2 * sizes.counts}), device))
    # Patterns of all layers, one layer's scores, and activations before, after and what they write.
    tracing = {"model": 4 * sizes.parameters, "other": OTHER, "transcoders": sizes.one_set,
               "attention patterns of a cell": 4 * (sizes.layers + 3) * sizes.heads
               * sizes.padded**2,
               "features of a cell": 3 * 4 * sizes.layers * sizes.padded
               * profile.expansion * sizes.width}
    return [*stages, Stage("tracing a circuit", CIRCUITS, tracing, device)]


def memory_available(device: torch.device) -> int:
    """Bytes that are free on the device: of the GPU, or of the machine and this container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return min([int(psutil.virtual_memory().available), *side_by_side.group_limits()])


def memory_problems(profile: Profile, sizes: Sizes, stages: Sequence[Stage]) -> list[str]:
    """A sentence for each field to lower, with the value at which all stages that it can help fit;
    and one for what no field alone can help."""
    problems: dict[str, tuple[int, str]] = {}
    for stage in stages:
        free = memory_available(stage.device)
        if stage.bytes <= free:
            continue
        field, value = _advice(profile, sizes, stage, free)
        where = "this machine" if stage.device == CPU else "the GPU"
        text = (f"{stage.name[0].upper()}{stage.name[1:]} needs {stage.bytes / GIB:.1f} GiB of "
                f"memory, and {where} has {free / GIB:.1f} GiB free; ") + (
            f"lower `{field}` in the profile (it is {getattr(profile, field):,}; {value:,} would "
            "fit)." if field else "attention patterns grow with the square of a cell's tokens: "
            "lower `genes_per_cell`." if stage.leaves == CIRCUITS else
            "no profile field alone is enough: lower `expansion` and "
            "`buffer_tokens`, set `model_precision: bfloat16`"
            + (", or do without (`reinitialised_control: false`)."
               if stage.leaves == (CONTROLS,) else ", or take a smaller model."))
        about = field or stage.name * (stage.leaves == CIRCUITS)  # those without a field share one
        problems[about] = min(problems.get(about, (value, text)), (value, text))
    return [text for _, text in problems.values()]


def _advice(profile: Profile, sizes: Sizes, stage: Stage, free: int) -> tuple[str, int]:
    """The first field that makes a stage fit, and its value; an empty name if there is none."""
    most = {"buffer_tokens": sizes.training_tokens, "forward_cells": sizes.cells}
    least = {"buffer_tokens": profile.batch_tokens}
    for field, parts in FIELDS.items():
        held = (1 + KEPT) * sum(stage.parts.get(part, 0) for part in parts)
        used = min(getattr(profile, field), most.get(field, 2**63))
        # A little less, as parts are not wholly proportional.
        value = int(0.99 * used * (1 - (stage.bytes - free) / held)) if held else 0
        if value >= least.get(field, 1):
            return field, value
    return "", 0


def matrix_rate(profile: Profile, sizes: Sizes, device: torch.device) -> float:
    """Operations per second of products of a transcoder's shape, measured in a second."""
    kind: dict[str, Any] = {"device": device, "dtype": precision_of(profile, device)}
    x = torch.ones(profile.batch_tokens, min(sizes.width, 1024), **kind)
    w = torch.ones(x.shape[1], min(profile.expansion * sizes.width, 8192), **kind)
    # One after the other, as in a step: launching one takes a GPU as long as a product does.
    together = 20 if device.type == "cuda" else 1
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 1.0 or best == float("inf"):
        start = time.perf_counter()
        for _ in range(together):
            product = x @ w
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return together * 2 * x.shape[0] * w.numel() / best


def run_seconds(profile: Profile, sizes: Sizes, wanted: Collection[str], chapters: int,
                rate: float, reached: Mapping[str, float]) -> float:
    """Seconds that the stale chapters take from nothing.

    rate: operations of bare products per second. reached: see `REACHED`.
    """
    live = sizes.layers * min(profile.expansion * sizes.width, LIVE)
    nulls = live * NULL_SECONDS * profile.null_draws / 1000 * 2 / side_by_side.cores()
    total = sum(operations / reached[kind] for file, work in works(profile, sizes).items()
                if file in wanted for kind, operations in work.operations.items())
    small = sum(seconds * min(1.0, profile.model_steps / steps) for file, seconds, steps in (
        (TOKENIZERS, TOKENIZERS_SECONDS, 300), (OTHERS, OTHERS_SECONDS, 1000)) if file in wanted)
    return chapters * STARTED + nulls * (CONTROLS in wanted) + small + total / rate
