"""Training the transcoders of all MLP layers from one forward pass of the model.

1. A fill: the model runs once over as many training cells as the buffer holds and leaves every
   MLP's inputs and outputs there. A corpus that fits is harvested once and kept.
2. One permutation per fill, the same for all layers, cuts the buffer into batches of tokens.
3. A step: all layers' losses are summed. Layers share no parameter, and Adam treats each
   parameter alone, so this trains each layer exactly as if it were trained alone.

Which cells a fill takes and how it is permuted depend on the seed and the fill's number only, so
a run resumed from a checkpoint at any step goes on as if it had not been interrupted.
Imports neither scanpy nor gseapy, so it runs on a bare GPU machine.
"""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from scfm_circuits import InputError
from scfm_circuits.files import atomic_folder, atomic_path, read_json
from scfm_circuits.language_model import (
    Sites,
    batches,
    corpus_digest,
    device_of,
    mlp_sites,
    mlps,
)
from scfm_circuits.transcoder import Transcoders, load_transcoders, save_transcoders

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM

    from scfm_circuits.profile import Profile
    from scfm_circuits.sentences import Corpus

FIELDS = ("seed", "expansion", "loss", "l1_coefficient", "learning_rate", "warmup_steps",
          "batch_tokens", "training_tokens", "buffer_tokens", "dead_after_tokens", "model",
          "model_revision", "forward_cells")
_MODULES = ("transcoder", "training", "architectures", "language_model", "sentences", "cells")


class Control(NamedTuple):
    """Transcoders that are no result but a control: where they are kept and what sets them apart.

    name: their folder under `results/<profile>/`. stamp: what they depend on beyond the profile's
    own. output_scale: (n_layers,) factors on the MLP outputs that they learn to give; None: 1.
    """

    name: str
    stamp: Mapping[str, Any]
    output_scale: Tensor | None = None


class Losses(NamedTuple):
    """Parts of the loss per layer, each (n_layers,): what is minimised is their sum."""

    reconstruction: Tensor
    sparsity: Tensor


def transcoder_losses(name: str, l1_coefficient: float, y: Tensor, estimate: Tensor, z: Tensor
                      ) -> Losses:
    """The two losses by name, as means over tokens.

    `equation4` (paper): ||y_hat - y||^2 + lambda ||z||_1.
    `normalized` (the code the paper's settings come from): ||y_hat - y||^2 / (d ||y||)
    + lambda ||z||_1, so the same lambda weighs d ||y|| times more, a thousandfold at d = 1024.

    y, estimate: (n_layers, n_tokens, d_model); z: (n_layers, n_tokens, n_features), nonnegative.
    """
    squared = (estimate - y).square().sum(dim=-1)
    if name == "normalized":
        squared = squared / (y.norm(dim=-1).clamp_min(1e-6) * y.shape[-1])
    elif name != "equation4":
        raise InputError(f"There is no loss {name!r}; known are normalized and equation4.")
    return Losses(squared.mean(dim=-1), l1_coefficient * z.sum(dim=-1).mean(dim=-1))


# --- data ----------------------------------------------------------------------------------------


class ActivationBuffer:
    """MLP inputs and outputs of some training cells, for all layers, in shuffled batches."""

    def __init__(self, model: "GPTNeoXForCausalLM", corpus: "Corpus", profile: "Profile",
                 output_scale: Tensor | None = None) -> None:
        self._model, self._corpus, self._profile = model, corpus, profile
        self._output_scale = output_scale
        self._train = np.flatnonzero(~corpus.held_out)
        mean_length = corpus.lengths[self._train].mean()
        wanted = math.ceil(profile.buffer_tokens / mean_length)
        self.cells_per_fill = min(len(self._train), wanted)
        self._kept: Sites | None = None

    def cells(self, fill: int) -> np.ndarray:
        """Cells of one fill: the next ones of an endless sequence of seeded permutations."""
        n, size = len(self._train), self.cells_per_fill
        if size == n:
            return self._train
        first, last = fill * size, (fill + 1) * size - 1
        sequence = np.concatenate([
            np.random.default_rng([self._profile.seed, 5, epoch]).permutation(self._train)
            for epoch in range(first // n, last // n + 1)
        ])
        start = first - first // n * n
        return sequence[start : start + size]

    def n_batches(self, fill: int) -> int:
        """Batches that a fill gives; what is left over is dropped."""
        tokens = int(self._corpus.lengths[self.cells(fill)].sum())
        return max(1, tokens // self._profile.batch_tokens)

    def sites(self, fill: int) -> Sites:
        """Activations of a fill's cells, (n_layers, n_tokens, d_model) each, on the device."""
        if self._kept is not None:
            return self._kept
        cells = self.cells(fill)
        device, corpus = device_of(self._model), self._corpus
        # Cells of like length together: less padding. The tokens are permuted anyway.
        cells = cells[np.argsort(corpus.lengths[cells], kind="stable")]
        n_tokens = int(corpus.lengths[cells].sum())
        shape = (len(mlps(self._model)), n_tokens, self._model.config.hidden_size)
        inputs, outputs = torch.empty(shape, device=device), torch.empty(shape, device=device)
        end = 0
        for _, tokens, mask in batches(corpus, cells, self._profile.forward_cells, device):
            part = mlp_sites(self._model, tokens, mask)
            start, end = end, end + part.inputs.shape[1]
            inputs[:, start:end], outputs[:, start:end] = part
        if self._output_scale is not None:
            outputs *= self._output_scale.to(outputs)[:, None, None]
        filled = Sites(inputs, outputs)
        if self.cells_per_fill == len(self._train):
            self._kept = filled
        return filled

    def batches(self, first_step: int) -> Iterator[Sites]:
        """Batches from the given step on, without end."""
        fill, skipped = 0, 0
        while skipped + self.n_batches(fill) <= first_step:
            skipped += self.n_batches(fill)
            fill += 1
        skip = first_step - skipped
        while True:
            inputs, outputs = self.sites(fill)
            order = np.random.default_rng([self._profile.seed, 6, fill])
            permutation = torch.from_numpy(order.permutation(inputs.shape[1])).to(inputs.device)
            for batch in range(skip, self.n_batches(fill)):
                size = self._profile.batch_tokens
                chosen = permutation[batch * size : (batch + 1) * size]
                yield Sites(inputs[:, chosen], outputs[:, chosen])
            fill, skip = fill + 1, 0


def memory_needed(profile: "Profile", corpus: "Corpus", n_layers: int, d_model: int
                  ) -> dict[str, int]:
    """Bytes that training holds, in float32: the buffer, the parameters with Adam, one batch."""
    width = profile.expansion * d_model
    train = int(corpus.lengths[~corpus.held_out].sum())
    return {
        "buffer": 8 * n_layers * d_model * min(train, profile.buffer_tokens),
        "parameters, gradient and Adam": 16 * n_layers * (2 * width * d_model + width),
        "activations of one batch": 16 * n_layers * profile.batch_tokens * width,
    }


# --- the run -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back to the end of the block: a checkpoint of half a step could not be resumed.

    Python delivers signals to the main thread only, so elsewhere there is nothing to hold back.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        handler(held[0], None)


class TrainingRun:
    """A training run that can stop at any step and be resumed from its checkpoint."""

    def __init__(self, model: "GPTNeoXForCausalLM", corpus: "Corpus", profile: "Profile",
                 checkpoint: Path | None = None, control: Control | None = None) -> None:
        self.profile, self.checkpoint, self.control = profile, checkpoint, control
        scale = control.output_scale if control is not None else None
        self.buffer = ActivationBuffer(model, corpus, profile, scale)
        self.steps = max(1, profile.training_tokens // profile.batch_tokens)
        self.stamp = training_stamp(profile, corpus, control)
        d_model = model.config.hidden_size
        self.transcoders = Transcoders(len(mlps(model)), d_model, profile.expansion * d_model)
        self.transcoders.to(device_of(model))
        parameters = list(self.transcoders.parameters())
        self.optimizer = torch.optim.Adam(parameters, lr=profile.learning_rate, fused=True)
        shape = self.transcoders.b_enc.shape
        self.tokens_since_fired = torch.zeros(shape, dtype=torch.int64, device=device_of(model))
        self.step = 0
        self.history: list[dict[str, Any]] = []

    def start(self) -> None:
        """Initial weights: seeded, with the mean input and mean output of the first fill."""
        generator = torch.Generator(self.transcoders.W_enc.device)
        self.transcoders.initialise(generator.manual_seed(self.profile.seed))
        sites = self.buffer.sites(0)
        with torch.no_grad():
            self.transcoders.b_in.copy_(sites.inputs.mean(dim=1))
            self.transcoders.b_dec.copy_(sites.outputs.mean(dim=1))

    def run(self, *, until: int | None = None, progress: bool = True) -> Transcoders:
        """Train to the end (or to step `until`), writing checkpoints; returns the transcoders."""
        if not self.resume():
            self.start()
        last = self.steps if until is None else min(until, self.steps)
        log_every = max(1, self.steps // 200)
        written = time.monotonic()
        bar = tqdm(total=self.steps, initial=self.step, desc="transcoders", unit="step",
                   disable=not progress)
        try:
            for batch in self.buffer.batches(self.step):
                if self.step >= last:
                    break
                log = (self.step + 1) % log_every == 0 or self.step + 1 == self.steps
                with _interrupts_held():
                    row = self.train_step(batch, log=log)
                    self.history += [row] if row is not None else []
                bar.update()
                if row is not None:
                    bar.set_postfix({key: f"{np.mean(row[key]):.3g}" for key in
                                     ("reconstruction", "l0", "fvu", "dead")}, refresh=False)
                if time.monotonic() - written > self.profile.checkpoint_seconds:
                    self.save_checkpoint()
                    written = time.monotonic()
        except KeyboardInterrupt:
            self.save_checkpoint()
            raise
        finally:
            bar.close()
        return self.transcoders

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant."""
        return self.profile.learning_rate * min(1.0, (step + 1) / max(1, self.profile.warmup_steps))

    def train_step(self, batch: Sites, *, log: bool) -> dict[str, Any] | None:
        """One optimizer step of all layers; returns measurements if `log`."""
        transcoders, profile = self.transcoders, self.profile
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        z = transcoders.encode(batch.inputs)
        estimate = transcoders.decode(z)
        losses = transcoder_losses(profile.loss, profile.l1_coefficient, batch.outputs, estimate, z)
        self.optimizer.zero_grad(set_to_none=True)
        (losses.reconstruction.sum() + losses.sparsity.sum()).backward()
        transcoders.remove_parallel_gradient()
        self.optimizer.step()
        transcoders.normalise_decoder()
        with torch.no_grad():
            active = z > 0
            self.tokens_since_fired += batch.inputs.shape[1]
            self.tokens_since_fired.masked_fill_(active.any(dim=1), 0)
            self.step += 1
            return self._measure(batch.outputs, estimate, active, losses) if log else None

    def _measure(self, y: Tensor, estimate: Tensor, active: Tensor, losses: Losses
                 ) -> dict[str, Any]:
        """Per-layer measurements of one batch; lists of n_layers numbers."""
        variance = (y - y.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
        fvu = (estimate - y).square().sum(dim=(1, 2)) / variance.clamp_min(1e-12)
        dead = (self.tokens_since_fired > self.profile.dead_after_tokens).float().mean(dim=1)
        return {
            "step": self.step, "tokens": self.step * self.profile.batch_tokens,
            "reconstruction": losses.reconstruction.tolist(), "sparsity": losses.sparsity.tolist(),
            "l0": active.sum(dim=-1).float().mean(dim=1).tolist(), "fvu": fvu.tolist(),
            "dead": dead.tolist(),
        }

    # --- checkpoints ---

    def save_checkpoint(self) -> None:
        """Write all that the next step depends on; the previous checkpoint stays until then."""
        if self.checkpoint is None or self.step == 0:  # before the first step Adam has no state
            return
        tensors = {f"model.{key}": value for key, value in self.transcoders.state_dict().items()}
        for name, parameter in self.transcoders.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value
        tensors["tokens_since_fired"] = self.tokens_since_fired
        metadata = {"step": str(self.step), "stamp": json.dumps(self.stamp, sort_keys=True),
                    "history": json.dumps(self.history)}
        with atomic_path(self.checkpoint) as temporary:
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()},
                      temporary, metadata=metadata)

    def resume(self) -> bool:
        """Take up the checkpoint if it belongs to this very run; says so, or why not."""
        if self.checkpoint is None or not self.checkpoint.is_file():
            return False
        try:
            with safe_open(self.checkpoint, framework="pt") as stored:
                metadata = stored.metadata()
                differing = stamp_difference(json.loads(metadata["stamp"]), self.stamp)
                if differing:
                    print(f"A checkpoint of another run is set aside: {differing} changed.")
                    return False
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            print(f"The checkpoint {self.checkpoint} cannot be read ({error}); starting again.")
            return False
        self.transcoders.load_state_dict(
            {key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
        for name, parameter in self.transcoders.named_parameters():
            self.optimizer.state[parameter] = {
                key: tensors[f"adam.{name}.{key}"].to(
                    parameter.device if key != "step" or parameter.is_cuda else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.tokens_since_fired.copy_(tensors["tokens_since_fired"])
        self.step, self.history = int(metadata["step"]), json.loads(metadata["history"])
        print(f"Resuming at step {self.step:,} of {self.steps:,}.")
        return True


def training_stamp(profile: "Profile", corpus: "Corpus", control: Control | None = None
                   ) -> dict[str, Any]:
    """What the trained transcoders depend on: profile fields, sources, corpus, which control."""
    stamp = profile.fingerprint((*FIELDS, "model_layers", "model_width", "model_heads",
                                 "model_steps", "model_batch_cells", "model_learning_rate"),
                                _MODULES)
    stamp["corpus"] = corpus_digest(corpus)
    if control is not None:
        stamp["control"] = {"name": control.name, **control.stamp}
    return stamp


def stamp_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Names of the profile fields, or else the other parts, in which two stamps differ."""
    fields = old.get("fields", {}), new.get("fields", {})
    names = [key for key in sorted({*fields[0], *fields[1]})
             if fields[0].get(key) != fields[1].get(key)]
    names += [key for key in ("sources", "versions", "corpus", "control")
              if old.get(key) != new.get(key)]
    return ", ".join(names)


def stage_folder(profile: "Profile", control: Control | None) -> Path:
    """Where transcoders and their statistics are kept: the run's results, or a control's folder."""
    return profile.results if control is None else profile.results / control.name


def get_transcoders(model: "GPTNeoXForCausalLM", corpus: "Corpus", profile: "Profile",
                    control: Control | None = None) -> tuple[Transcoders, list[dict[str, Any]]]:
    """The profile's transcoders and their training history: read if current, else trained.

    With `control`, those of that control, which are trained the same way on the model given.
    """
    folder = stage_folder(profile, control) / "transcoders"
    stamp = json.loads(json.dumps(training_stamp(profile, corpus, control)))
    record = read_json(folder / "training.json")
    if record.get("stamp") != stamp:
        checkpoint = folder.with_name("training_checkpoint.safetensors")
        run = TrainingRun(model, corpus, profile, checkpoint, control)
        _announce(run, corpus)
        began = time.monotonic()
        run.run()
        seconds = time.monotonic() - began
        record = {"stamp": stamp, "history": run.history, "seconds": seconds,
                  "steps": run.steps, "tokens": run.steps * profile.batch_tokens}
        name = profile.model if profile.model != "train" else f"small GPT-NeoX ({profile.name})"
        if control is not None:
            name = f"{name}, {control.name}"
            if control.output_scale is not None:
                record["output_scale"] = control.output_scale.tolist()
        with atomic_folder(folder) as fresh:
            save_transcoders(run.transcoders, fresh, name, record)
        checkpoint.unlink(missing_ok=True)
    transcoders = load_transcoders(folder).to(device_of(model))
    return transcoders, record["history"]


def _announce(run: TrainingRun, corpus: "Corpus") -> None:
    """Say what is about to happen: layers, steps, memory."""
    t, profile = run.transcoders, run.profile
    memory = memory_needed(profile, corpus, t.n_layers, t.d_model)
    parts = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in memory.items())
    control = f" of the control `{run.control.name}`" if run.control is not None else ""
    print(f"Training {t.n_layers} transcoders{control} of width {t.n_features:,} for "
          f"{run.steps:,} steps of {profile.batch_tokens:,} tokens; memory: {parts}.")
