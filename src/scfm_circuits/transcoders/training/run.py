"""Training the transcoders of all MLP layers from one forward pass of the model.

A step takes the next batch of the buffer (`activation_buffer`) and moves all layers' transcoders
(`optimizer`). Layers share no parameter, and Adam treats each parameter alone, so this trains
each layer exactly as if it were trained alone. A run stops at any step and goes on from its
checkpoint (`checkpoints`) as if it had not stopped; `torchrun` shares its layers out among
processes (`processes`):

    torchrun --nproc-per-node 2 -m scfm_circuits train --profile paper
"""

import contextlib
import copy
import math
import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from scfm_circuits import InputError
from scfm_circuits.common.files import atomic_folder, only_one
from scfm_circuits.common.kept import read_record
from scfm_circuits.models.architectures import architecture_of
from scfm_circuits.models.mlp_sites import Sites, device_of, mlps
from scfm_circuits.models.small_models import FAMILIES
from scfm_circuits.transcoders.training import checkpoints
from scfm_circuits.transcoders.training.activation_buffer import ActivationBuffer, Batch
from scfm_circuits.transcoders.training.gradients import Measures
from scfm_circuits.transcoders.training.history import (
    MEASURES,
    Logged,
    TensorBoard,
    known_mean,
    trouble,
)
from scfm_circuits.transcoders.training.interrupts import Stops, Terminated, stops_heeded
from scfm_circuits.transcoders.training.optimizer import Stepper, resample
from scfm_circuits.transcoders.training.processes import ALONE, FailedElsewhere, Ranks, started
from scfm_circuits.transcoders.training.settings import (
    Control,
    precision_of,
    stage_folder,
    training_memory,
    training_stamp,
    variant_of,
)
from scfm_circuits.transcoders.transcoder import (
    Transcoders,
    load_transcoders,
    save_config,
    save_layers,
    save_record,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile

COMPILED_TOKENS = 20_000_000
"""Tokens of a training on a GPU from which compiling the model's attention saves more than the five
seconds that it takes."""
_AGREE_STEPS = 10
"""Every so many steps, and where measurements are taken, several processes ask one another whether
to end."""


def training_buffer(model: "PreTrainedModel", corpus: "Corpus", profile: "Profile",
                    control: Control | None = None, ranks: Ranks = ALONE) -> ActivationBuffer:
    """The activations that a run is trained on, in the type of its products."""
    device = device_of(model)
    precision = precision_of(profile, device)
    compiled = device.type == "cuda" and profile.training_tokens >= COMPILED_TOKENS
    if compiled or precision != next(model.parameters()).dtype:
        model = copy.deepcopy(model).to(precision)  # type: ignore[arg-type]
    return ActivationBuffer(model, corpus, profile, None if control is None else
                            control.output_scale, precision, ranks, compiled)


class TrainingRun:
    """A training run that can stop at any step and be resumed from its checkpoint.

    checkpoint: folder of its checkpoints, or None. ranks: this process among several, of which each
    trains its own layers. buffer: one that is there already. Raises InputError if some of the
    processes would have no layer.
    """

    def __init__(self, model: "PreTrainedModel", corpus: "Corpus", profile: "Profile",
                 checkpoint: Path | None = None, control: Control | None = None,
                 ranks: Ranks = ALONE, buffer: ActivationBuffer | None = None) -> None:
        self.profile, self.checkpoint, self.control = profile, checkpoint, control
        self.ranks, device = ranks, device_of(model)
        self.n_layers, self.written = len(mlps(model)), architecture_of(model).written
        self.layers = ranks.layers(self.n_layers)
        if ranks.size > self.n_layers:
            raise InputError(f"{ranks.size} processes cannot share the {self.n_layers} layers of "
                             "the model; start at most one for each.")
        self.precision = precision_of(profile, device)
        self.buffer = buffer or training_buffer(model, corpus, profile, control, ranks)
        self.steps = max(1, profile.training_tokens // profile.batch_tokens)
        self.stamp = training_stamp(profile, corpus, control)
        d_model = model.config.hidden_size
        self.transcoders = Transcoders(len(self.layers), d_model, profile.expansion * d_model,
                                       variant_of(profile)).to(device)
        self.stepper = Stepper(self.transcoders, profile.loss, self.precision)
        shape = self.transcoders.b_enc.shape
        self.tokens_since_fired = torch.zeros(shape, dtype=torch.int64, device=device)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._seconds, self._began = 0.0, math.nan
        self._saved_step = 0
        self._warned: set[tuple[str, int]] = set()

    def start(self) -> None:
        """Initial weights: seeded, with the mean input and mean output of the first fill."""
        self.transcoders.initialise(self.profile.seed, self.layers.start)
        sites = self.buffer.sites(0)
        with torch.no_grad():
            for part, bias in ((self._sites(sites).inputs, self.transcoders.b_in),
                               (sites.outputs, self.transcoders.b_dec)):
                bias.copy_(part.mean(dim=1, dtype=bias.dtype))

    def _sites(self, sites: Sites) -> Sites:
        """What is read and what is estimated."""
        return Sites(self.transcoders.variant.read(*sites), sites.outputs)

    def run(self, *, until: int | None = None, progress: bool = True,
            logged: Logged | None = None) -> Transcoders:
        """Train to the end (or to step `until`), writing checkpoints; returns the transcoders.

        Ctrl-C and SIGTERM end it after the step under way, with a checkpoint; among several
        processes, at the next step at which they agree (`_AGREE_STEPS`).
        """
        self._began = time.monotonic()
        if not self.resume():
            self.start()
        last = self.steps if until is None else min(until, self.steps)
        size = self.profile.batch_tokens
        bar = tqdm(total=self.steps * size, initial=self.step * size, desc="transcoders",
                   unit="tok", unit_scale=True, disable=not progress or not self.ranks.first)
        with bar, stops_heeded() as stops:
            # One of several processes that left the others would leave them waiting.
            alone = self.ranks.size == 1
            with contextlib.nullcontext() if alone else stops.held():
                try:
                    self._steps(last, bar, logged, stops)
                except (KeyboardInterrupt, Terminated):
                    with stops.held():  # a second request must not cut this short
                        self.save_checkpoint()
                    raise
        return self.transcoders

    def _steps(self, last: int, bar: tqdm, logged: Logged | None, stops: Stops) -> None:
        log_every = max(1, self.steps // 200)
        written = time.monotonic()
        batches = self.buffer.batches(self.step)
        while self.step < last:
            batch = next(batches)
            log = (self.step + 1) % log_every == 0 or self.step + 1 == self.steps
            with stops.held():  # half a step could not be resumed
                row = self.train_step(batch, log=log)
                self.history += [row] if row is not None else []
            bar.update(self.profile.batch_tokens)
            if row is not None:
                self._show(row, bar)
                if logged is not None:
                    logged(self.history)
            if self._due(written, log, stops):
                self.save_checkpoint()
                written = time.monotonic()

    def _due(self, written: float, log: bool, stops: Stops) -> bool:
        """Whether to write a checkpoint now; several processes agree, and also on whether to end.

        Raises what ends the run if one of them was asked to.
        """
        every = self.profile.checkpoint_steps
        due = bool(every) and self.step % every == 0
        late = time.monotonic() - written > self.profile.checkpoint_seconds
        if self.ranks.size == 1:
            return due or late
        if not log and self.step % _AGREE_STEPS:
            return due
        found = self.ranks.gather((late, stops.asked))
        asked = [number for _, number in found if number is not None]
        if asked:
            stops.end(asked[0])
        return due or found[0][0]

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant, then a linear fall to 0 over the last `decay_steps`."""
        profile = self.profile
        warm = min(1.0, (step + 1) / max(1, profile.warmup_steps))
        left = min(1.0, (self.steps - step) / max(1, profile.decay_steps))
        return profile.learning_rate * min(warm, left)

    def l1_coefficient(self, step: int) -> float:
        """The penalty's weight, which rises linearly over `l1_warmup_steps`."""
        share = min(1.0, (step + 1) / max(1, self.profile.l1_warmup_steps))
        return self.profile.l1_coefficient * share

    def train_step(self, batch: Batch, *, log: bool) -> dict[str, Any] | None:
        """One optimizer step of all layers; returns measurements if `log`."""
        found = self.stepper.step(
            lambda layers: self._sites(batch.sites(layers, self.stepper.take)),
            self.learning_rate(self.step), self.l1_coefficient(self.step), self.step + 1,
            measured=log)
        self.tokens_since_fired += len(batch.chosen)
        self.tokens_since_fired.masked_fill_(found.fired, 0)
        self.step += 1
        every = self.profile.resample_steps
        if every and self.step % every == 0 and self.step <= self.steps // 2:
            dead = self.tokens_since_fired > self.profile.dead_after_tokens
            resample(self.stepper, dead, self._sites(batch.sites()).inputs, found.residual,
                     self.profile.seed, self.step, self.layers.start)
            self.tokens_since_fired.masked_fill_(dead, 0)
        row = self._row(found) if log else None
        if row is not None:
            self.stepper.expect(known_mean(row["l0"]))
        return row

    def _row(self, found: Measures) -> dict[str, Any]:
        """Per-layer measurements of one batch; lists of n_layers numbers, None if not finite."""
        dead = (self.tokens_since_fired > self.profile.dead_after_tokens).float().mean(dim=1)
        own = torch.stack([part.float() for part in
                           (*found.losses, found.l0, found.fvu, dead)]).tolist()
        parts = [list(chain(*lists)) for lists in zip(*self.ranks.gather(own), strict=True)]
        # JSON has no infinity; a checkpoint of a layer that diverges is one all the same.
        numbers = [[one if math.isfinite(one) else None for one in part] for part in parts]
        return {"step": self.step, "tokens": self.step * self.profile.batch_tokens,
                **dict(zip(MEASURES, numbers, strict=True))}

    def _show(self, row: Mapping[str, Any], bar: tqdm) -> None:
        """Means over layers beside the bar; and say once what is wrong with a layer (`trouble`)."""
        shown = {}
        for key in ("reconstruction", "l0", "fvu", "dead"):
            mean = known_mean(row[key])
            shown[key] = f"{mean:.3g}" if math.isfinite(mean) else "none"
        bar.set_postfix(shown, refresh=False)
        warm, last = self.step > self.profile.warmup_steps, self.step == self.steps
        for layer in range(self.n_layers):
            problem = trouble(self.history, layer, warm, last)
            if problem and (problem[:4], layer) not in self._warned and self.ranks.first:
                self._warned.add((problem[:4], layer))
                bar.write(f"Warning: layer {layer} {problem} (step {self.step:,}).")

    # --- checkpoints ---

    @property
    def seconds(self) -> float:
        """Time spent in `run` so far, with that of the runs this one goes on from."""
        since = time.monotonic() - self._began
        return self._seconds + (since if math.isfinite(since) else 0.0)

    def _state(self) -> list[dict[str, Tensor]]:
        """Per layer, all that the next step depends on."""
        stores: dict[str, Mapping[str, Tensor]] = {
            "model": self.transcoders.state_dict(), "mean": self.stepper.mean,
            "square": self.stepper.square, "silent": {"tokens": self.tokens_since_fired}}
        return [{f"{store}.{name}": tensor[layer] for store, tensors in stores.items()
                 for name, tensor in tensors.items()} for layer in range(len(self.layers))]

    def save_checkpoint(self) -> None:
        """Write a checkpoint; if that fails, say so and keep the one before."""
        if self.checkpoint is None or self.step == self._saved_step:
            return
        try:
            checkpoints.save(self.checkpoint, self.step, self._state(), self.layers, self.history,
                             self.seconds, self.stamp, self.ranks)
            self._saved_step = self.step
        except OSError as error:
            if self.ranks.first:
                print(f"Warning: no checkpoint could be written at step {self.step:,} ({error}); "
                      f"an earlier one, if there is one, is still in {self.checkpoint}.")

    def resume(self) -> bool:
        """Take up this run's checkpoint, if there is one.

        Raises InputError if what is there belongs to a run with other settings.
        """
        if self.checkpoint is None:
            return False
        found = checkpoints.load(self.checkpoint, self.layers, self.stamp, self.ranks)
        if found is None:
            return False
        with torch.no_grad():
            for own, stored in zip(self._state(), found.tensors, strict=True):
                for name, tensor in own.items():
                    tensor.copy_(stored[name])
        self.step, self.history, self._seconds = found.step, found.history, found.seconds
        self._saved_step = found.step
        if self.history:
            self.stepper.expect(known_mean(self.history[-1]["l0"]))
        if self.ranks.first:
            print(f"Resuming at step {self.step:,} of {self.steps:,}.")
        return True


def trained_record(corpus: "Corpus", profile: "Profile", control: Control | None = None
                   ) -> dict[str, Any] | None:
    """The record of the profile's transcoders, if they are current and whole; of a control's."""
    folder = stage_folder(profile, control) / "transcoders"
    record = read_record(folder / "training.json", training_stamp(profile, corpus, control))
    if record is not None:
        save_config(folder, _title(profile, control), variant_of(profile), record["written"])
    return record


def _title(profile: "Profile", control: Control | None) -> str:
    """What config.yaml calls the model."""
    name = (f"small {FAMILIES[profile.encoding]} ({profile.name})" if profile.model == "train"
            else profile.model)
    return name if control is None else f"{name}, {control.name}"


def get_transcoders(model: "PreTrainedModel", corpus: "Corpus", profile: "Profile",
                    control: Control | None = None, ranks: Ranks = ALONE,
                    logged: Logged | None = None) -> tuple[Transcoders, list[dict[str, Any]]]:
    """The profile's transcoders and their training history: read if current, else trained.

    With `control`, those of that control, which are trained the same way on the model given.
    Raises InputError if the profile's have no active feature.
    """
    folder = stage_folder(profile, control) / "transcoders"
    record = trained_record(corpus, profile, control)
    there = ranks.gather(record is not None)
    if record is None or not all(there):
        checkpoint = folder.with_name("training_checkpoint")
        run = TrainingRun(model, corpus, profile, checkpoint, control, ranks)
        if ranks.first:
            _announce(run, corpus)
        run.run(logged=logged)
        record = {"stamp": run.stamp, "history": run.history, "seconds": run.seconds,
                  "steps": run.steps, "tokens": run.steps * profile.batch_tokens}
        _store(run, folder, record)
        del run  # with Adam's moments and the buffer, before the result is read
        if ranks.first:
            checkpoints.remove(checkpoint)
    if control is None:
        _check_alive(record["history"], folder)
    transcoders = load_transcoders(folder).to(device_of(model))
    return transcoders, record["history"]


def _check_alive(history: list[dict[str, Any]], folder: Path) -> None:
    """InputError if no feature of any layer was active in the last batch that was measured."""
    if history and all(l0 == 0 for l0 in history[-1]["l0"]):
        raise InputError("No feature of any layer is active at the end of training, so there is "
                         "nothing to explain; lower `l1_coefficient` or `learning_rate`, or train "
                         f"on more tokens. What was trained is in {folder}.")


def _store(run: TrainingRun, folder: Path, record: dict[str, Any]) -> None:
    """Write the trained transcoders: each process its layers, then the first one all the rest."""
    control, ranks = run.control, run.ranks
    if control is not None and control.output_scale is not None:
        record["output_scale"] = control.output_scale.tolist()
    with contextlib.ExitStack() as stack:
        fresh = stack.enter_context(atomic_folder(folder)) if ranks.first else None
        fresh = ranks.gather(fresh)[0]
        save_layers(run.transcoders, fresh, run.layers.start)
        ranks.barrier()
        if ranks.first:
            record["written"] = run.written
            save_record(fresh, record, run.transcoders.variant, run.n_layers)
            save_config(fresh, _title(run.profile, control), run.transcoders.variant, run.written)
    ranks.barrier()


def _announce(run: TrainingRun, corpus: "Corpus") -> None:
    """Say what is about to happen: layers, steps, memory."""
    t, profile = run.transcoders, run.profile
    memory = training_memory(profile, int(corpus.lengths[~corpus.held_out].sum()), t.n_layers,
                             t.d_model, run.stepper.layers_at_once, run.precision.itemsize)
    parts = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in memory.items())
    control = f" of the control `{run.control.name}`" if run.control is not None else ""
    shared = f" in {run.ranks.size} processes" if run.ranks.size > 1 else ""
    each = " of the first process" if run.ranks.size > 1 else ""
    print(f"Training {run.n_layers} transcoders{control} of width {t.n_features:,} for "
          f"{run.steps:,} steps of {profile.batch_tokens:,} tokens{shared}; memory{each}: {parts}.")


# --- as a program --------------------------------------------------------------------------------


def train(profile_name: str, overrides: Mapping[str, Any]) -> None:
    """Train a profile's transcoders, as one of several processes under `torchrun`.

    Raises InputError, as where another run holds the results; SystemExit in a process that had to
    end because another one failed and said why.
    """
    from scfm_circuits.cells.corpus import load_corpus
    from scfm_circuits.common.profile import load_profile, own_results
    from scfm_circuits.models.loading import get_model

    def prepared() -> tuple["Profile", "Corpus", "PreTrainedModel"]:
        profile = load_profile(profile_name, overrides)
        if ranks.first:
            held.enter_context(only_one(profile.results, "training into"))
            own_results(profile, profile_name)
        corpus = load_corpus(profile)
        return profile, corpus, get_model(profile, corpus)[0]

    def logs() -> Logged | None:  # before any work: TensorBoard may not be installed
        profile = load_profile(profile_name, overrides)
        return TensorBoard(profile.results / "tensorboard") if profile.tensorboard else None

    try:
        with started() as ranks, contextlib.ExitStack() as held:
            logged = ranks.after_first(lambda: logs() if ranks.first else None)
            # The first process builds what the others then read.
            profile, corpus, model = ranks.after_first(prepared)
            get_transcoders(model, corpus, profile, ranks=ranks, logged=logged)
            if ranks.first:
                print(f"The transcoders are in {profile.results / 'transcoders'}.")
    except FailedElsewhere:
        raise SystemExit(1) from None
