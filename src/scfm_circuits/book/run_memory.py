"""How much memory a run holds at its largest moments, and how much there is.

Each stage is a sum of parts that follow from the run's sizes, so that what is too much can be said
with the profile field that makes it smaller. What a chapter's other work holds is one number, read
off runs of `demo` and of a rehearsal of `paper`.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from scfm_circuits.features.counting import CHUNK_BYTES, fixed_bytes
from scfm_circuits.features.pair_counts import BUFFER_KEYS
from scfm_circuits.models.loading import model_dtype
from scfm_circuits.transcoders.training.settings import memory_needed, precision_of
from scfm_circuits.transcoders.variants import variant_profile

if TYPE_CHECKING:
    from scfm_circuits.book.run_sizes import RunSizes
    from scfm_circuits.common.profile import Profile

GIB = 2**30
OTHER = 2 * GIB
"""Memory of a chapter's process beside the parts: libraries, tables, figures."""
KEPT = 0.2
"""Share of it all that is freed and not given back at once, or lies in pieces."""
COUNT_SHARE = 0.03
"""Share of all (feature, pair of token and gene) that occur: a guess, on the large side."""
PIECES = 3.3
"""Tokens of a gene's name."""
MOST_ACTIVE = 100
"""Features that are active on a token at most, on average, where few tokens are the limit."""

TRAINING, VALIDATION, COUNTING = "training", "validation", "counting features"
CONTROL, CIRCUITS, KINDS = "the control's training", "circuits", "the kinds of dictionary"
_CHAPTERS = {
    TRAINING: ("02",), VALIDATION: ("03",), COUNTING: ("04", "05", "06", "09"), CONTROL: ("06",),
    CIRCUITS: ("07", "08"), KINDS: ("09",),
}
"""The chapters that a stage belongs to, by the beginning of their names."""

FIELDS = {
    "forward_cells": ("logits", "layers' inputs and outputs", "attention"),
    "buffer_tokens": ("buffer",),
    "batch_tokens": ("activations of one batch",),
    "expansion": ("parameters and Adam", "gradients", "transcoders", "feature counts",
                  "activations of one batch", "activations of a prompt"),
}
"""Profile fields and the parts that are proportional to them; first what changes results least."""


class Stage(NamedTuple):
    """Memory at one stage: parts in bytes.

    on_device: whether it is the GPU's memory, if there is one.
    """

    name: str
    parts: Mapping[str, int]
    on_device: bool = True

    @property
    def bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    def serves(self, chapters: Collection[str]) -> bool:
        """Whether one of the chapters, by their notebooks' names, has this stage."""
        return any(name.startswith(_CHAPTERS[self.name]) for name in chapters)


def transcoder_bytes(profile: "Profile", sizes: "RunSizes") -> int:
    """The transcoders of all layers, in float32."""
    width = profile.expansion * sizes.width
    return 4 * sizes.layers * (2 * width * sizes.width + width + 2 * sizes.width)


def feature_count_bytes(profile: "Profile", sizes: "RunSizes") -> int:
    """One set of feature statistics, in a file or in memory."""
    features = sizes.layers * profile.expansion * sizes.width
    occurring = min(round(COUNT_SHARE * features * PIECES * sizes.genes),
                    sizes.layers * sizes.tokens * MOST_ACTIVE)
    return fixed_bytes(features, profile.contexts_per_feature) + 8 * occurring


def memory_stages(profile: "Profile", sizes: "RunSizes", device: torch.device) -> list[Stage]:
    """The stages of a run that hold most, largest first."""
    on_gpu, own = device.type == "cuda", model_dtype(profile)
    cells = min(profile.forward_cells, sizes.cells)
    batch, one_set = cells * round(sizes.length), transcoder_bytes(profile, sizes)
    heads = int(sizes.config.num_attention_heads)
    model = {
        "model": own.itemsize * sizes.parameters, "other": OTHER,
        # As a list by layers and put together.
        "layers' inputs and outputs": 2 * own.itemsize * 2 * sizes.layers * batch * sizes.width,
        # Scores, their softmax and its sum with the mask, of one layer.
        "attention": 3 * 4 * cells * heads * sizes.padded**2}
    one = model | {"transcoders": one_set}
    counts = {"feature counts": (4 if profile.reinitialised_control else 3)
              * feature_count_bytes(profile, sizes), "keys to be sorted": 4 * 8 * BUFFER_KEYS}
    prompt = 4 * sizes.layers * sizes.padded
    stages = {
        TRAINING: _training(profile, sizes, device, model) | {"transcoders": one_set},
        # Log-probabilities of two configurations, logits, and one more while they are compared.
        VALIDATION: one | {"logits": 4 * 4 * batch * sizes.vocabulary},
        CIRCUITS: one | {"model": 4 * sizes.parameters, "activations of a prompt":
                         3 * prompt * profile.expansion * sizes.width,
                         "attention": 0, "attention patterns": prompt * heads * sizes.padded},
        KINDS: _training(variant_profile(profile, {}), sizes, device, model) | {
            "transcoders": one_set},
        COUNTING: one | ({"activations and keys": 2 * CHUNK_BYTES + 4 * 8 * 8 * BUFFER_KEYS}
                         if on_gpu else counts),
    }
    if profile.reinitialised_control:
        stages[CONTROL] = _training(profile, sizes, device, model) | {
            "re-initialised model": model["model"], "transcoders": 2 * one_set} | (
            {} if on_gpu else {"feature counts": 2 * feature_count_bytes(profile, sizes)})
    found = [Stage(name, parts) for name, parts in stages.items()]
    if on_gpu:
        found.append(Stage(COUNTING, {"other": OTHER, **counts}, on_device=False))
    found = [stage._replace(parts={**stage.parts, "freed and kept": round(KEPT * stage.bytes)})
             for stage in found]
    return sorted(found, key=lambda stage: -stage.bytes)


def _training(profile: "Profile", sizes: "RunSizes", device: torch.device,
              model: Mapping[str, int]) -> dict[str, int]:
    """Parts of a training run. model: those of a forward pass; attention is fused here."""
    precision = precision_of(profile, device)
    copied = {"model in the type of training": precision.itemsize * sizes.parameters
              } if precision != model_dtype(profile) else {}
    held = memory_needed(profile, sizes.training_tokens, sizes.layers, sizes.width,
                         sizes.layers if device.type == "cuda" else 1, precision.itemsize)
    return {**model, "attention": 0} | copied | held


# --- what there is -------------------------------------------------------------------------------


def memory_available(device: torch.device) -> int:
    """Bytes that are free on the device: of the GPU, or of the machine and this container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return min([int(psutil.virtual_memory().available), *_group_limits()])


def _group_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
                  ) -> list[int]:
    """Bytes left under the limits of this process's control groups (containers, batch jobs)."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        # Version 2 has one tree, version 1 one for each kind.
        base = root if kinds == "" else root / "memory"
        names = (("memory.max", "memory.current", "file") if kinds == "" else
                 ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"))
        place = base / path.strip("/")
        for folder in (place, *place.parents):
            if folder == base.parent:
                break
            left = _group_left(folder, *names)
            found += [] if left is None else [left]
    return found


def _group_left(folder: Path, limit: str, held: str, files: str) -> int | None:
    """Bytes left in one group, None if it has no limit. Files kept in memory give way."""
    try:
        most, used = (int((folder / name).read_text()) for name in (limit, held))
        kept = next(int(line.split()[1]) for line in (folder / "memory.stat").read_text()
                    .splitlines() if line.startswith(f"{files} "))
    except (OSError, ValueError, StopIteration):
        return None
    return most - used + kept


# --- what does not fit ---------------------------------------------------------------------------


def memory_problems(profile: "Profile", sizes: "RunSizes", stages: Sequence[Stage],
                    device: torch.device) -> list[str]:
    """One sentence for each field to lower, with the value at which all stages that it can help
    fit; and one for what no field alone can help."""
    advice: dict[str, list[tuple[int, Stage, int]]] = {}
    for stage in stages:
        free = memory_available(device if stage.on_device else torch.device("cpu"))
        if stage.bytes > free:
            field, value = _advice(profile, sizes, stage, free)
            advice.setdefault(field, []).append((value, stage, free))
    problems = []
    for field, found in advice.items():
        value, (_, stage, free) = min(one[0] for one in found), max(
            found, key=lambda one: one[1].bytes - one[2])
        where = "the GPU" if stage.on_device and device.type == "cuda" else "this machine"
        needs = (f"{stage.name[0].upper()}{stage.name[1:]} needs {stage.bytes / GIB:.1f} GiB of "
                 f"memory, and {where} has {free / GIB:.1f} GiB free; ")
        problems.append(needs + (
            f"lower `{field}` in the profile (it is {getattr(profile, field):,}; {value:,} would "
            "fit)." if field else "no profile field alone is enough: lower `expansion` and "
            "`buffer_tokens`, set `model_precision: bfloat16`"
            + (", or do without (`reinitialised_control: false`)." if stage.name == CONTROL
               else ", or take a smaller model.")))
    return problems


def _advice(profile: "Profile", sizes: "RunSizes", stage: Stage, free: int) -> tuple[str, int]:
    """The first field that makes a stage fit, and its value; an empty name if there is none."""
    most = {"buffer_tokens": sizes.training_tokens, "forward_cells": sizes.cells}
    least = {"buffer_tokens": profile.batch_tokens}
    for field, parts in FIELDS.items():
        held = (1 + KEPT) * sum(stage.parts.get(part, 0) for part in parts)
        if held:
            used = min(getattr(profile, field), most.get(field, 2**63))
            # A little less, as parts are not wholly proportional.
            value = int(0.99 * used * (1 - (stage.bytes - free) / held))
            if value >= least.get(field, 1):
                return field, value
    return "", 0
