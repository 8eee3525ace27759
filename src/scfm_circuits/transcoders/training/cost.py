"""What training costs in floating-point operations, and in time at the rate of a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from scfm_circuits.common.files import read_json
from scfm_circuits.transcoders.training.settings import training_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile


class TrainingCost(NamedTuple):
    """A training's tokens, floating-point operations and seconds."""

    tokens: int
    operations: float
    seconds: float


def training_cost(model: "PreTrainedModel", corpus: "Corpus", profile: "Profile") -> TrainingCost:
    """What the profile's transcoders cost, once they are trained."""
    tokens = training_steps(profile) * profile.batch_tokens
    in_training = int(corpus.lengths[~corpus.held_out].sum())
    width = model.config.hidden_size
    operations = training_operations(
        model.config.num_hidden_layers, width, profile.expansion * width, tokens,
        weights_per_layer(model),
        in_training if in_training <= profile.buffer_tokens else tokens)  # kept: it runs once
    record = read_json(profile.results / "transcoders" / "training.json")
    return TrainingCost(tokens, operations, max(float(record["seconds"]), 1e-9))


def paper_cost(settings: Mapping[str, float], run: TrainingCost) -> TrainingCost:
    """What the paper's training would cost at a run's operations per second.

    settings: as printed, by name (`PaperTables.settings`).
    """
    width, tokens = int(settings["width"]), int(settings["training_tokens"])
    operations = training_operations(int(settings["n_layers"]), width // int(settings["expansion"]),
                                     width, tokens)
    return TrainingCost(tokens, operations, operations / run.operations * run.seconds)


def training_operations(n_layers: int, d_model: int, n_features: int, tokens: int,
                        layer_weights: int | None = None, forward_tokens: int | None = None
                        ) -> float:
    """Floating-point operations of training transcoders on all layers from one forward pass.

    A step has five products of n_tokens x d_model x n_features per layer (two forward, three
    backward); the model's forward pass has two operations per weight and token. Attention's own
    products, a few per cent of the pass on sentences of 200 tokens, are left out, and the logits,
    which are not computed. The paper's size gives 1.57e17.

    layer_weights: entries of a layer's matrices in the model; by default GPT-NeoX's 12 d_model^2.
    forward_tokens: tokens that pass the model, fewer than `tokens` if a buffer keeps them all.
    """
    weights = 12 * d_model**2 if layer_weights is None else layer_weights
    passing = tokens if forward_tokens is None else forward_tokens
    return float(n_layers * (10 * tokens * d_model * n_features + 2 * passing * weights))


def weights_per_layer(model: "PreTrainedModel") -> int:
    """Entries of the matrices of one of the model's layers, on average."""
    from scfm_circuits.models.architectures import decoder_layers

    layers = decoder_layers(model)
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters()
               if parameter.ndim == 2) // len(layers)
