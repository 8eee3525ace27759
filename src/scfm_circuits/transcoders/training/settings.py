"""What a training run will be, before it begins: its settings, its memory, its stamp.

Imports neither scanpy nor gseapy, so it runs on a bare GPU machine.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from scfm_circuits.models.loading import corpus_digest
from scfm_circuits.transcoders.transcoder import Variant

if TYPE_CHECKING:
    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile

FIELDS = ("seed", "expansion", "loss", "l1_coefficient", "l1_warmup_steps", "learning_rate",
          "warmup_steps", "decay_steps", "activation", "active_features", "skip", "site",
          "resample_steps", "precision", "batch_tokens", "training_tokens", "buffer_tokens",
          "dead_after_tokens", "model", "model_revision", "model_precision", "forward_cells")
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


def memory_needed(profile: "Profile", train: int, n_layers: int, d_model: int,
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
                   ) -> dict[str, Any]:
    """What the trained transcoders depend on: profile fields, sources, corpus, which control."""
    stamp = profile.fingerprint((*FIELDS, "model_layers", "model_width", "model_heads",
                                 "model_steps", "model_batch_cells", "model_learning_rate"),
                                _ROOMS)
    stamp["corpus"] = corpus_digest(corpus)
    if control is not None:
        stamp["control"] = {"name": control.name, **control.stamp}
    return stamp


def stage_folder(profile: "Profile", control: Control | None) -> Path:
    """Where transcoders and their statistics are kept: the run's results, or a control's folder."""
    return profile.results if control is None else profile.results / control.name
