"""How much memory a run holds at its largest moments, and how much there is.

Each stage is a sum of parts that follow from the run's sizes, so that what is too much can be said
with the profile field that makes it smaller. All of it errs on the large side.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from scfm_circuits.active_features import N_BINS
from scfm_circuits.language_model import model_dtype
from scfm_circuits.training_plan import memory_needed, precision_of
from scfm_circuits.variants import variant_profile

if TYPE_CHECKING:
    from scfm_circuits.profile import Profile
    from scfm_circuits.run_sizes import RunSizes

GIB = 2**30
LIBRARIES = GIB
"""Memory of a chapter's process before it computes anything."""
COUNT_SHARE = 0.03
"""Share of all (feature, pair of token and gene) that occur: a guess, on the large side."""
PIECES = 3.3
"""Tokens of a gene's name."""
MOST_ACTIVE = 100
"""Features that are active on a token at most, on average, where few tokens are the limit."""


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


FIELDS = {
    "forward_cells": ("logits", "layers' inputs and outputs"), "buffer_tokens": ("buffer",),
    "batch_tokens": ("activations of one batch",),
    "expansion": ("parameters and Adam", "gradients", "transcoders", "feature counts",
                  "activations of one batch"),
}
"""Profile fields and the parts that are proportional to them; first what changes results least."""


def transcoder_bytes(profile: "Profile", sizes: "RunSizes") -> int:
    """The transcoders of all layers, in float32."""
    width = profile.expansion * sizes.width
    return 4 * sizes.layers * (2 * width * sizes.width + width + 2 * sizes.width)


def feature_count_bytes(profile: "Profile", sizes: "RunSizes") -> int:
    """One set of feature statistics, in a file or in memory."""
    features = sizes.layers * profile.expansion * sizes.width
    fixed = features * (8 * N_BINS + 16 + 16 * profile.contexts_per_feature)
    return fixed + 8 * min(round(COUNT_SHARE * features * PIECES * sizes.genes),
                           sizes.layers * sizes.tokens * MOST_ACTIVE)


def memory_stages(profile: "Profile", sizes: "RunSizes", device: torch.device) -> list[Stage]:
    """The stages of a run that hold most, largest first."""
    on_gpu = device.type == "cuda"
    batch = min(profile.forward_cells, sizes.cells) * round(sizes.length)
    precision, one_set = precision_of(profile, device), transcoder_bytes(profile, sizes)
    own = model_dtype(profile)
    model = {"model": own.itemsize * sizes.parameters, "libraries": LIBRARIES,
             "layers' inputs and outputs": own.itemsize * 2 * sizes.layers * batch * sizes.width}
    copied = {"model in the type of training": precision.itemsize * sizes.parameters
              } if precision != own else {}

    def training(settings: "Profile") -> dict[str, int]:
        return model | copied | memory_needed(
            settings, sizes.training_tokens, sizes.layers, sizes.width,
            sizes.layers if on_gpu else 1, precision.itemsize)

    stages = {
        "training": training(profile) | {"transcoders": one_set},
        # Log-probabilities of two configurations, logits, and one more while they are compared.
        "validation": model | {"transcoders": one_set,
                               "logits": 4 * 4 * batch * sizes.vocabulary},
        "the kinds of dictionary": training(variant_profile(profile, {})) | {
            "transcoders": one_set},
    }
    if profile.reinitialised_control:
        stages["the control's training"] = training(profile) | {
            "re-initialised model": model["model"], "transcoders": 2 * one_set}
    counts = {"feature counts": 2 * feature_count_bytes(profile, sizes)}
    if not on_gpu:
        stages["counting features"] = model | counts | {"transcoders": one_set}
    found = [Stage(name, parts) for name, parts in stages.items()]
    if on_gpu:
        found.append(Stage("counting features", {"libraries": LIBRARIES, **counts}, False))
    return sorted(found, key=lambda stage: -stage.bytes)


def memory_available(device: torch.device) -> int:
    """Bytes that are free on the device: of the GPU, or of the machine and this container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        held = int((group / "memory.current").read_text())
        files = next(int(line.split()[1]) for line in (group / "memory.stat").read_text()
                     .splitlines() if line.startswith("file "))
    except (OSError, ValueError, StopIteration):
        return free
    # Files that are kept in memory give way.
    return min(free, int(limit) - held + files) if limit.isdigit() else free


def memory_problems(profile: "Profile", sizes: "RunSizes", stages: Sequence[Stage],
                    device: torch.device) -> list[str]:
    """One sentence for each stage that does not fit, with the field that would help most."""
    most = {"buffer_tokens": sizes.training_tokens, "forward_cells": sizes.cells}
    problems = []
    for stage in stages:
        on = device if stage.on_device else torch.device("cpu")
        free = memory_available(on)
        if stage.bytes <= free:
            continue
        held = {field: sum(stage.parts.get(part, 0) for part in parts)
                for field, parts in FIELDS.items()}
        # A little less, as parts are not wholly proportional.
        fits = {field: int(0.99 * min(getattr(profile, field), most.get(field, 2**63))
                           * (1 - (stage.bytes - free) / size)) for field, size in held.items()
                if size}
        field = next((field for field, value in fits.items() if value >= 1),
                     max(held, key=lambda field: held[field]))
        advice = (f"{fits[field]:,} would fit" if fits[field] >= 1
                  else "no value of it alone is enough")
        where = "the GPU" if on.type == "cuda" else "this machine"
        problems.append(
            f"{stage.name[0].upper()}{stage.name[1:]} needs {stage.bytes / GIB:.1f} GiB of memory, "
            f"and {where} has {free / GIB:.1f} GiB free; lower `{field}` in the profile, on which "
            f"{held[field] / GIB:.1f} GiB depend (it is {getattr(profile, field):,}; {advice}).")
    return problems
