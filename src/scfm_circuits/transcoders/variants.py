"""Other dictionaries, trained on the same sites and tokens as the paper's, at the same L0.

How well a dictionary explains an output depends first on how many features it may use, so kinds can
be compared at one L0 only. Here it is the L0 that the reference reaches: ReLU with the profile's
loss and L1 coefficient. `topk` and `batchtopk` are told it. Where an L1 penalty decides, its weight
is steered while training, so that L0 takes the reference's way down (`correction`): a search over
whole runs would cost several times as much, and one over short runs misjudges L0, which goes on
falling long after. `jumprelu`'s thresholds are moved by a common factor instead: its penalty acts
on them by at most a learning rate's worth in a step, too slowly to be steered by.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.files import atomic_folder, digest
from scfm_circuits.common.kept import Stamp, read_record, stamp_of
from scfm_circuits.models.architectures import architecture_of
from scfm_circuits.transcoders.activations import ACTIVATIONS
from scfm_circuits.transcoders.training import checkpoints
from scfm_circuits.transcoders.training.activation_buffer import ActivationBuffer, Batch
from scfm_circuits.transcoders.training.history import known_mean
from scfm_circuits.transcoders.training.run import TrainingRun, training_buffer
from scfm_circuits.transcoders.training.settings import (
    Control,
    stage_folder,
    training_stamp,
    variant_of,
)
from scfm_circuits.transcoders.transcoder import (
    Transcoders,
    load_transcoders,
    save_config,
    save_transcoders,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.common.profile import Profile

TOKENS_SHARE, BATCH_SHARE = 12, 4
"""By default a variant is trained on the profile's `training_tokens` divided by the first, in
batches of its `batch_tokens` divided by the second: a third as many steps at a twelfth of the cost.
L0 falls with steps."""
THRESHOLD = 0.2
"""Where thresholds of `jumprelu` start here, near where pre-activations, of order 1, need them."""
THRESHOLD_RATE = 0.3
"""How far log thresholds move at each row of the history, per log(L0 / wanted)."""
PROPORTIONAL, INTEGRAL = 1.0, 0.08
"""How strongly the penalty's weight answers to log(L0 / wanted): the mean of the last `LAST` rows
of the history, and the sum of all."""
LAST = 5

Matched = Literal["reference", "k", "penalty", "threshold"]


class Setting(NamedTuple):
    """A kind of dictionary: its folder, its name on the page, profile fields, what sets its L0."""

    name: str
    label: str
    changes: Mapping[str, Any]
    matched: Matched


class Trained(NamedTuple):
    """A setting's dictionaries, which stay on disk, and how they came about.

    profile, control: what they were trained with, and where they are kept. l1_coefficient: the
    penalty's weight at the end; 0 if there is none. seconds: median of a step.
    """

    setting: Setting
    profile: "Profile"
    control: Control
    history: list[dict[str, Any]]
    l1_coefficient: float
    seconds: float

    @property
    def folder(self) -> Path:
        """Where the dictionaries are."""
        return stage_folder(self.profile, self.control) / "transcoders"

    def load(self, device: torch.device | str = "cpu") -> Transcoders:
        """The dictionaries; all kinds at once would be eight times the paper's memory."""
        return load_transcoders(self.folder).to(device)


def settings(profile: "Profile") -> list[Setting]:
    """The reference first; each of the others differs from it in what its name says."""
    own, other = profile.loss, {"normalized": "equation4",
                                "equation4": "normalized"}[profile.loss]
    words = {"normalized": "normalized loss", "equation4": "Equation 4"}
    topk = {"activation": "topk"}
    return [
        Setting(f"relu_{own}", f"ReLU + L1, {words[own]}", {}, "reference"),
        Setting(f"relu_{other}", f"ReLU + L1, {words[other]}", {"loss": other}, "penalty"),
        Setting("jumprelu", "JumpReLU", {"activation": "jumprelu"}, "threshold"),
        Setting("topk", "TopK", topk, "k"),
        Setting("batchtopk", "BatchTopK", {"activation": "batchtopk"}, "k"),
        Setting("relu_skip", "ReLU + L1, skip", {"skip": True}, "penalty"),
        Setting("topk_skip", "TopK, skip", {**topk, "skip": True}, "k"),
        Setting("sae", "SAE (reads the output)", {"site": "sae"}, "penalty"),
    ]


def variant_profile(profile: "Profile", changes: Mapping[str, Any], **more: Any) -> "Profile":
    """The profile with some changes, all else the paper's, and schedules as short as the run."""
    tokens = profile.variant_tokens or max(1, profile.training_tokens // TOKENS_SHARE)
    batch = max(1, profile.batch_tokens // BATCH_SHARE)
    paper = {"activation": "relu", "skip": False, "site": "transcoder"}
    return profile.model_copy(update={**paper, "training_tokens": tokens, "batch_tokens": batch,
                                      **schedules(profile, tokens / batch), **changes, **more})


def schedules(profile: "Profile", steps: float) -> dict[str, int]:
    """The profile's fields of schedules, shortened for a training of so many steps."""
    share = steps / (profile.training_tokens / profile.batch_tokens)
    return {field: math.ceil(share * getattr(profile, field)) for field in
            ("warmup_steps", "l1_warmup_steps", "decay_steps", "resample_steps")}


# --- the same L0 ---------------------------------------------------------------------------------


def l0_path(history: Sequence[Mapping[str, Any]]) -> list[float]:
    """Mean L0 over layers, row by row of a history."""
    return [known_mean(row["l0"]) for row in history]


def end_of(path: Sequence[float]) -> float:
    """Where a path of L0 ends: the mean of its last rows."""
    return float(np.mean(path[-LAST:]))


def log_ratio(found: float, wanted: float) -> float:
    """log(found / wanted), finite also where nothing fires."""
    return math.log(max(found, 1e-3) / max(wanted, 1e-3))


def correction(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Factor on a penalty's weight, given the L0 so far and what it should have been.

    A controller on log L0 (proportional and integral); it has no state but the history, so an
    interrupted run goes on as if it had not been.
    """
    errors = [log_ratio(a, b) for a, b in zip(found, wanted, strict=False)]
    if not errors:
        return 1.0
    last = errors[-LAST:]
    return math.exp(PROPORTIONAL * sum(last) / len(last) + INTEGRAL * sum(errors))


class MatchedRun(TrainingRun):
    """A training run steered along `wanted`, the L0 of each row of the reference's history.

    By the penalty's weight; with `jumprelu` by the thresholds, and to where `wanted` ends. stamp:
    under which it is kept, whatever weight the penalty begins with.
    """

    def __init__(self, model: "PreTrainedModel", corpus: Corpus, profile: "Profile",
                 checkpoint: Path, control: Control, *, stamp: Stamp, buffer: ActivationBuffer,
                 wanted: Sequence[float] | None = None) -> None:
        super().__init__(model, corpus, profile, checkpoint, control, buffer=buffer)
        self.stamp, self.wanted = stamp, wanted

    @property
    def by_thresholds(self) -> bool:
        """Whether thresholds, not the penalty's weight, are what is steered."""
        return ACTIVATIONS[self.profile.activation].threshold == "trained"

    def start(self) -> None:
        """As any run, but for the thresholds."""
        super().start()
        if self.by_thresholds:
            self.transcoders.log_threshold.data.fill_(math.log(THRESHOLD))

    def l1_coefficient(self, step: int) -> float:
        """The penalty's weight, corrected by what L0 has been."""
        weight = super().l1_coefficient(step)
        if self.wanted is None or self.by_thresholds:
            return weight
        return weight * correction(l0_path(self.history), self.wanted)

    def train_step(self, batch: Batch, *, log: bool) -> dict[str, Any] | None:
        """As any run's; where it measures, `jumprelu`'s thresholds all move by one factor."""
        row = super().train_step(batch, log=log)
        if row is not None and self.wanted is not None and self.by_thresholds:
            error = log_ratio(l0_path([row])[0], end_of(self.wanted))
            # Within a factor of two a row, so that no start can overshoot into silence.
            move = max(-math.log(2), min(math.log(2), THRESHOLD_RATE * error))
            with torch.no_grad():
                self.transcoders.log_threshold.add_(move)
        return row


def first_guess(setting: Setting, reference: Trained, buffer: ActivationBuffer) -> float:
    """The penalty's weight that a run begins with: the reference's, in the variant's units.

    Another loss: see `transcoder_losses`. JumpReLU's penalty counts features, each of which has so
    far cost as much as its mean activation.
    """
    weight = max(reference.l1_coefficient, 1e-12)
    if "loss" in setting.changes:
        outputs = buffer.sites(0).outputs
        ratio = float(outputs.float().norm(dim=-1).mean()) * outputs.shape[-1]
        return weight * ratio if setting.changes["loss"] == "equation4" else weight / ratio
    if setting.changes.get("activation") == "jumprelu":
        last = reference.history[-1]
        return max(sum(last["sparsity"]) / max(sum(last["l0"]), 1e-3), 1e-12)
    return weight


# --- training ------------------------------------------------------------------------------------


class Trainer:
    """What the variants share: model, corpus, and the activations, which are harvested once."""

    def __init__(self, model: "PreTrainedModel", corpus: Corpus, profile: "Profile") -> None:
        self.model, self.corpus, self.profile = model, corpus, profile
        self._buffer: ActivationBuffer | None = None

    def trained(self, setting: Setting, reference: Trained | None = None) -> Trained:
        """One variant: read from `results/<profile>/variants/<name>` if current, else trained."""
        wanted = None if reference is None else l0_path(reference.history)
        more: dict[str, int] = {}
        like: dict[str, str] = {}
        if wanted is not None:
            more["active_features"] = max(1, round(end_of(wanted)))
            like["wanted"] = digest(json.dumps(wanted))
        profile = variant_profile(self.profile, setting.changes, **more)
        control = Control(f"variants/{setting.name}",
                          stamp_of(self.profile, (), ("transcoders/variants",), **like))
        stamp = training_stamp(profile, self.corpus, control)
        folder = stage_folder(profile, control) / "transcoders"
        record = read_record(folder / "training.json", stamp)
        if record is None:
            # The same cells in the same order for all, so what is there already serves.
            self._buffer = self._buffer or training_buffer(self.model, self.corpus, profile)
            steered = profile
            if reference is not None and setting.matched != "k":
                guess = first_guess(setting, reference, self._buffer)
                steered = profile.model_copy(update={"l1_coefficient": guess})
            run = MatchedRun(
                self.model, self.corpus, steered, folder.with_name("training_checkpoint"), control,
                stamp=stamp, buffer=self._buffer, wanted=None if steered is profile else wanted)
            record = self._train(run, setting)
            with atomic_folder(folder) as fresh:
                save_transcoders(run.transcoders, fresh, setting.label, record, run.written)
            assert run.checkpoint is not None
            checkpoints.remove(run.checkpoint)
        save_config(folder, setting.label, variant_of(profile),
                    architecture_of(self.model).written)
        return Trained(setting, profile, control, record["history"], record["l1_coefficient"],
                       record["seconds_per_step"])

    def _train(self, run: MatchedRun, setting: Setting) -> dict[str, Any]:
        run.buffer.sites(0)  # not timed: it is there for all but the first
        print(f"{setting.label}: {run.steps:,} steps.")
        times = [(0, time.monotonic())]
        run.run(logged=lambda history: times.append((history[-1]["step"], time.monotonic())))
        # The median, as something else may run beside.
        each = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(times)]
        penalised = ACTIVATIONS[run.profile.activation].penalised
        weight = run.l1_coefficient(run.steps) if penalised else 0.0
        return {"stamp": run.stamp, "history": run.history, "l1_coefficient": weight,
                "seconds_per_step": float(np.median(each)),
                "steps": run.steps, "tokens": run.steps * run.profile.batch_tokens}


def get_variants(model: "PreTrainedModel", corpus: Corpus, profile: "Profile") -> list[Trained]:
    """All of `settings`, the reference first. Memory is that of training one of them."""
    trainer = Trainer(model, corpus, profile)
    reference, *others = settings(profile)
    first = trainer.trained(reference)
    return [first, *(trainer.trained(one, first) for one in others)]
