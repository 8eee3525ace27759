"""What a training run will be, before it begins: its settings, its memory, its stamp.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scfm_circuits.common.kept import Stamp, stamp_of
from scfm_circuits.models.loading import corpus_digest
from scfm_circuits.models.small_models import TRAINING_FIELDS
from scfm_circuits.transcoders.training.activation_buffer import ActivationBuffer
from scfm_circuits.transcoders.transcoder import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile

FIELDS = ("seed", "expansion", "loss", "l1_coefficient", "l1_warmup_steps", "learning_rate",
          "warmup_steps", "decay_steps", "activation", "active_features", "skip", "site",
          "resample_steps", "precision", "batch_tokens", "training_tokens", "buffer_tokens",
          "dead_after_tokens", "model", "model_revision", "model_subfolder",
          "model_precision", "forward_cells")
_ROOMS = ("cells", "models", "transcoders/active_entries", "transcoders/transcoder",
          "transcoders/training")


class Control(NamedTuple):
    """Transcoders that are no result but a control: where they are kept and what sets them apart.

    name: their folder under `results/<profile>/`. stamp: what they depend on beyond the profile's
    own. output_scale: (n_layers,) factors on the MLP outputs that they learn to give; None: 1.
    """

    name: str
    stamp: Mapping[str, Any]
    output_scale: Tensor | None = None


def variant_of(profile: "Profile") -> Variant:
    """Which kind of transcoders the profile asks for."""
    return Variant(profile.activation, profile.active_features, profile.skip, profile.site)


def precision_of(profile: "Profile", device: torch.device) -> torch.dtype:
    """Type of the products in training: by default bfloat16 on a GPU, float32 on a CPU."""
    if profile.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[profile.precision]


def training_memory(profile: "Profile", train: int, n_layers: int, d_model: int,
                    at_once: int | None = None, item: int = 4) -> dict[str, int]:
    """Bytes that training holds: the buffer, the parameters with Adam, one batch.

    train: tokens of the training cells; a buffer that they do not fill is smaller. at_once: layers
    that pass together (default: all). item: bytes of a number in the buffer and in products.
    """
    at_once = at_once or n_layers
    width = profile.expansion * d_model
    parameters = 2 * width * d_model + width + d_model
    return {
        "buffer": 2 * item * n_layers * d_model * min(train, profile.buffer_tokens),
        "parameters and Adam": 12 * n_layers * parameters,
        "gradients": 4 * at_once * parameters,
        "activations of one batch": 3 * item * at_once * profile.batch_tokens * width,
    }


def training_stamp(profile: "Profile", corpus: "Corpus", control: Control | None = None
                   ) -> Stamp:
    """What the trained transcoders depend on: profile fields, sources, corpus, which control."""
    which = {} if control is None else {"control": {"name": control.name, **control.stamp}}
    return stamp_of(profile, (*FIELDS, *TRAINING_FIELDS), _ROOMS, corpus=corpus_digest(corpus),
                    **which)


def stage_folder(profile: "Profile", control: Control | None) -> Path:
    """Where transcoders and their statistics are kept: the run's results, or a control's folder."""
    return profile.results if control is None else profile.results / control.name


# --- settings as a reader meets them -------------------------------------------------------------

DESCRIBED = {"loss": "equation4", "activation": "relu", "skip": False, "site": "transcoder"}
"""What the paper's text fixes beyond the settings it lists."""
OTHERS = ("active_features", "warmup_steps", "l1_warmup_steps", "decay_steps", "resample_steps",
          "precision")
"""What else decides a training, of which the paper says nothing."""


class Setting(NamedTuple):
    """One setting: what it is, and its value in the paper (`not named`: it has none) and here."""

    name: str
    meaning: str
    paper: Any
    ours: Any


def training_steps(profile: "Profile") -> int:
    """Optimizer steps of a training."""
    return max(1, profile.training_tokens // profile.batch_tokens)


def settings_table(model: "PreTrainedModel", profile: "Profile", paper: Mapping[str, float]
                   ) -> list[Setting]:
    """The settings of the paper beside the run's, and what else can be trained.

    paper: as printed, by name (`PaperTables.settings`). What a setting is, the docstring of the
    profile's field says.
    """
    config, fields = model.config, type(profile).model_fields
    named = {name: int(value) if value == int(value) else value for name, value in paper.items()}
    # Where the paper's name is no field's: what it means, and its value in the run.
    other = {
        "n_layers": ("Layers, each with a transcoder.", config.num_hidden_layers),
        "width": ("Features per layer.", profile.expansion * config.hidden_size),
        "training_tokens": (fields["training_tokens"].description,
                            training_steps(profile) * profile.batch_tokens),
        "train_share": ("Share of the cells trained on.", 1 - profile.validation_share),
        "live_cut_table3": (fields["live_cut"].description, profile.live_cut)}
    theirs, rows = {**named, **DESCRIBED}, []
    for name in (*theirs, *OTHERS):
        meaning, ours = other.get(name) or (fields[name].description, getattr(profile, name))
        rows.append(Setting(name, " ".join(str(meaning).split()), theirs.get(name, "not named"),
                            ours))
    return rows


def loss_units(model: "PreTrainedModel", corpus: "Corpus", profile: "Profile"
               ) -> dict[str, np.ndarray]:
    """What the profile's L1 coefficient would be in the units of the paper's Equation 4, by layer.

    Columns: layer, mean_norm_of_target (over about 8192 tokens of training cells),
    times_equation_4 (the factor), lambda_in_equation_4.
    """
    few = profile.model_copy(update={"buffer_tokens": 8192,
                                     "batch_tokens": min(profile.batch_tokens, 8192)})
    outputs = ActivationBuffer(model, corpus, few).sites(0).outputs
    norms = outputs.norm(dim=-1).mean(dim=1).cpu().numpy()
    weight = (model.config.hidden_size * norms if profile.loss == "normalized"
              else np.ones(len(norms)))
    return {"layer": np.arange(len(norms)), "mean_norm_of_target": norms,
            "times_equation_4": weight, "lambda_in_equation_4": profile.l1_coefficient * weight}
