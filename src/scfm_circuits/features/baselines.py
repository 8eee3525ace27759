"""Features that no dictionary learning made, to set beside those that it made.

Two owe nothing to what the model has learnt, or nothing to dictionary learning:

- A re-initialised model: every weight is drawn anew, and transcoders are trained on it just as on
  the model itself. Sparse autoencoders of such models (Pythia among them) give features that look
  about as interpretable as those of the trained ones (Heap, Lawson, Farnik and Aitchison,
  arXiv:2501.17727), so the corpus and the training alone may do it.
- An untrained encoder: the model is the real one, and the features read random directions.

Two are the model's own directions, at the same sites: its MLP neurons, and the principal components
of what the MLPs read, each with both signs.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.files import digest
from scfm_circuits.common.kept import stamp_of
from scfm_circuits.common.randomness import generator
from scfm_circuits.features.statistics import FeatureStatistics, get_statistics, stored_statistics
from scfm_circuits.models.architectures import neuron_rows
from scfm_circuits.models.loading import reinitialised_model
from scfm_circuits.models.mlp_sites import batches, device_of, mlp_sites
from scfm_circuits.transcoders.training.activation_buffer import ActivationBuffer
from scfm_circuits.transcoders.training.run import get_transcoders, trained_record
from scfm_circuits.transcoders.training.settings import Control
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.common.profile import Profile

# --- a re-initialised model ----------------------------------------------------------------------


def mean_output_norms(model: "PreTrainedModel", corpus: Corpus, cells: np.ndarray,
                      forward_cells: int) -> Tensor:
    """(n_layers,) mean norm of each MLP's output over the tokens of some cells."""
    total, n_tokens = torch.zeros((), dtype=torch.float64, device=device_of(model)), 0
    for _, tokens, mask in batches(corpus, cells, forward_cells, device_of(model)):
        norms = mlp_sites(model, tokens, mask).outputs.norm(dim=-1).double()
        total, n_tokens = total + norms.sum(dim=1), n_tokens + norms.shape[1]
    return total / n_tokens


def output_scale(model: "PreTrainedModel", control: "PreTrainedModel", corpus: Corpus,
                 profile: "Profile") -> Tensor:
    """(n_layers,) factors that give the control's MLP outputs the mean norm of the model's.

    A trained MLP's input and output weights fit each other, random ones do not: their outputs are
    several times smaller. Under the loss `equation4` the same penalty would then weigh that much
    more. `normalized` scales with the outputs, but Adam's steps do not: smaller outputs are learnt
    less well in the same number of them. Measured on the training cells of the buffer's first fill.
    """
    cells = ActivationBuffer(model, corpus, profile).cells(0)
    wanted, found = (mean_output_norms(one, corpus, cells, profile.forward_cells)
                     for one in (model, control))
    return torch.where(found > 0, wanted / found, 1.0)


def reinitialised_statistics(model: "PreTrainedModel", corpus: Corpus, profile: "Profile"
                             ) -> FeatureStatistics:
    """Statistics of transcoders trained on the re-initialised model as the profile's own are.

    The transcoders' folder and the statistics are kept in `results/<profile>/reinitialised/`, and
    training goes on from its checkpoint there if it was interrupted. It takes as long as training
    on the model itself, and the memory of one more model. Each layer's outputs are first brought
    to the scale of the model's own (`output_scale`; the factors are in `training.json`).
    """
    control = Control("reinitialised", stamp_of(profile, (), ("features/baselines",)))
    stored = stored_statistics(corpus, profile, control)
    # The transcoders are a result too: where they are lost, they are trained again.
    if stored is not None and trained_record(corpus, profile, control) is not None:
        return stored
    other, control = _reinitialised(model, corpus, profile, control)
    transcoders, _ = get_transcoders(other, corpus, profile, control)
    return get_statistics(other, transcoders, corpus, profile, control)


def reinitialised_transcoders(model: "PreTrainedModel", corpus: Corpus, profile: "Profile"
                              ) -> "tuple[PreTrainedModel, Transcoders, Control]":
    """The re-initialised model and the transcoders that `reinitialised_statistics` is of, whose
    decoders are brought back to the scale of that model's own outputs; and what they are kept as.
    """
    control = Control("reinitialised", stamp_of(profile, (), ("features/baselines",)))
    other, control = _reinitialised(model, corpus, profile, control)
    transcoders, _ = get_transcoders(other, corpus, profile, control)
    assert control.output_scale is not None
    with torch.no_grad():
        scale = control.output_scale.to(transcoders.b_dec)[:, None]
        transcoders.W_dec.div_(scale[..., None])
        transcoders.b_dec.div_(scale)
    return other, transcoders, control


def _reinitialised(model: "PreTrainedModel", corpus: Corpus, profile: "Profile", control: Control
                   ) -> "tuple[PreTrainedModel, Control]":
    other = reinitialised_model(model, profile.seed)
    return other, control._replace(output_scale=output_scale(model, other, corpus, profile))


# --- an untrained encoder ------------------------------------------------------------------------


def untrained_statistics(model: "PreTrainedModel", statistics: FeatureStatistics,
                         corpus: Corpus, profile: "Profile", n_features: int = 256
                         ) -> FeatureStatistics:
    """Statistics of an encoder that was initialised as for training, and not trained.

    Its features' thresholds are set so that they fire as often as live trained features of the
    same layer, drawn at random, do: they differ in what they fire on, not in how often.
    statistics: those of the trained features. Kept in `results/<profile>/untrained/`.
    """
    return _matched_statistics(
        "untrained", model, statistics, corpus, profile,
        lambda: untrained_encoder(model, statistics, corpus, profile, n_features),
        n_features=n_features)


def _matched_statistics(name: str, model: "PreTrainedModel", statistics: FeatureStatistics,
                        corpus: Corpus, profile: "Profile", encoder: Callable[[], Transcoders],
                        **more: int) -> FeatureStatistics:
    """Statistics of an encoder that fires as often as live trained features do, kept by name.

    encoder: made only where none are stored. more: what else the stamp holds.
    """
    rates = digest(np.ascontiguousarray(statistics.fired).tobytes())
    control = Control(name, stamp_of(profile, ("live_cut_table4",), ("features/baselines",),
                                     fired=rates, **more))
    stored = stored_statistics(corpus, profile, control)
    if stored is not None:
        return stored
    return get_statistics(model, encoder(), corpus, profile, control)


@torch.no_grad()
def untrained_encoder(model: "PreTrainedModel", statistics: FeatureStatistics, corpus: Corpus,
                      profile: "Profile", n_features: int) -> Transcoders:
    """Random directions, n_features per layer, with thresholds set on some training cells."""
    untrained = Transcoders(len(statistics.fired), model.config.hidden_size, n_features).to(
        device_of(model))
    untrained.initialise(profile.seed + 1)
    _fire_as_often(untrained, _some_inputs(model, corpus, profile), statistics, profile,
                   generator(profile.seed, "untrained encoder"))
    return untrained


def _some_inputs(model: "PreTrainedModel", corpus: Corpus, profile: "Profile") -> Tensor:
    """(n_layers, n_tokens, d_model) what the MLPs read in training cells of the whole file, as many
    as are read at once."""
    some = corpus.training_cells(profile.forward_cells)
    _, tokens, mask = next(iter(batches(corpus, some, len(some), device_of(model))))
    return mlp_sites(model, tokens, mask).inputs


def _fire_as_often(encoder: Transcoders, inputs: Tensor, statistics: FeatureStatistics,
                   profile: "Profile", rng: np.random.Generator) -> None:
    """Centre the encoder on its inputs, and set each feature's bias so that it fires as often as a
    live trained feature of its layer, drawn at random, does."""
    encoder.b_in.copy_(inputs.mean(dim=1))
    live = statistics.live(profile.live_cut_table4)
    for layer in range(encoder.n_layers):
        rates = statistics.frequency[layer][live[layer]]
        if not len(rates):
            continue
        wanted = np.clip(rng.choice(rates, encoder.n_features), 0, 1)
        pre = encoder.layer_pre_activations(layer, inputs[layer])  # not of all layers at once
        ordered = pre.sort(dim=0, descending=True).values
        rank = np.minimum((wanted * len(ordered)).round().astype(int), len(ordered) - 1)
        columns = torch.arange(encoder.n_features, device=ordered.device)
        encoder.b_enc[layer] = -ordered[torch.from_numpy(rank).to(ordered.device), columns]


# --- the model's own directions ------------------------------------------------------------------

DIRECTIONS = ("MLP neurons", "principal components")
"""Directions of the model that are there without any dictionary learning."""


def direction_statistics(kind: str, model: "PreTrainedModel", statistics: FeatureStatistics,
                         corpus: Corpus, profile: "Profile") -> FeatureStatistics:
    """Statistics of one of DIRECTIONS, which fire as often as live trained features do.

    statistics: those of the trained features. Kept in `results/<profile>/<kind>/`.
    """
    return _matched_statistics(
        kind.replace(" ", "_"), model, statistics, corpus, profile,
        lambda: direction_encoder(kind, model, statistics, corpus, profile))


def principal_axes(inputs: Tensor) -> Tensor:
    """(n_layers, d_model, d_model) principal components of inputs (n_layers, n_tokens, d_model), a
    row each, that of the largest variance first."""
    centred = (inputs - inputs.mean(dim=1, keepdim=True)).double()
    # Eigenvectors come in the order of their variance; the sign of each is arbitrary.
    return torch.linalg.eigh(centred.mT @ centred).eigenvectors.mT.flip(1).to(inputs.dtype)


@torch.no_grad()
def direction_encoder(kind: str, model: "PreTrainedModel", statistics: FeatureStatistics,
                      corpus: Corpus, profile: "Profile") -> Transcoders:
    """An encoder of the model's own directions, with thresholds set on some training cells.

    `MLP neurons`: the rows that the MLP reads with, so that a feature fires where the neuron is
    most strongly driven. `principal components`: of the inputs of some training cells, both signs.
    """
    inputs = _some_inputs(model, corpus, profile)
    if kind == "MLP neurons":
        directions = torch.stack([read.float() for read in neuron_rows(model)])
    else:
        axes = principal_axes(inputs)
        directions = torch.cat([axes, -axes], dim=1)
    n_layers, n_features, d_model = directions.shape
    encoder = Transcoders(n_layers, d_model, n_features).to(device_of(model))
    encoder.W_enc.copy_(directions)
    encoder.W_dec.copy_(directions)
    _fire_as_often(encoder, inputs, statistics, profile,
                   generator(profile.seed, "the model's own directions", DIRECTIONS.index(kind)))
    return encoder
