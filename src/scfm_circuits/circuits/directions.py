"""Directions to steer along, chosen on training cells.

- By what it tells: the feature whose activation at the question's last token tells the label's
  cells best (`choose`: AUROC over the features of all layers), and the best of its layer.
- By what it does: the feature along which a push should move the label's contrast most, in the
  frozen model (`by_effect`): a feature that tells a label need not be one that makes the call.
  Beside it the direction of which all such effects are products, the gradient (`mean_pull`): it
  uses the same cells and the same model, and no dictionary.
- The difference of the means of what an MLP writes at the question's last token (`means_at`).
- Random features that fire as often and as strongly (`matched`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from scfm_circuits import InputError
from scfm_circuits.cells.prompts import answered_prompt
from scfm_circuits.circuits.contrast import contrast_of
from scfm_circuits.circuits.direct_effects import total_pulls
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.features.statistics import FeatureStatistics
from scfm_circuits.features.unit_scores import aurocs
from scfm_circuits.models.mlp_sites import batches, device_of, mlp_sites
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile

TOP, NEAREST = 5, 8
"""Features pushed together; among how many that fire alike a random one is drawn."""


class Chosen(NamedTuple):
    """The `TOP` features of a layer that tell a label best, the best one first; auroc: (n,)."""

    layer: int
    features: list[int]
    auroc: np.ndarray


class AtQuestion(NamedTuple):
    """Some cells where they are asked for their type: the question's last token.

    activations: (n_cells, n_layers, n_features); outputs: (n_cells, n_layers, d_model) of the MLPs;
    norms: (n_layers,) mean norm of these over all tokens of the questions.
    """

    activations: Tensor
    outputs: Tensor
    norms: Tensor


@torch.no_grad()
def at_question(model: "PreTrainedModel", transcoders: Transcoders, corpus: "Corpus",
                cells: np.ndarray, forward_cells: int) -> AtQuestion:
    """Read the cells in one pass."""
    activations, outputs, norms, n = [], [], [], 0
    for rows, tokens, _ in batches(corpus, cells, forward_cells, device_of(model)):
        asked = corpus.answer_start[rows]
        inside = torch.arange(tokens.shape[1], device=tokens.device) < torch.from_numpy(
            asked).to(tokens.device)[:, None]
        sites = mlp_sites(model, tokens, inside)
        last = torch.from_numpy(np.cumsum(asked) - 1).to(tokens.device)
        inputs = sites.inputs[:, last]
        activations.append(torch.stack([transcoders.layer_activations(layer, x)
                                        for layer, x in enumerate(inputs)], dim=1))
        outputs.append(sites.outputs[:, last].transpose(0, 1))
        norms.append(sites.outputs.norm(dim=-1).sum(dim=1))
        n += int(asked.sum())
    return AtQuestion(torch.cat(activations), torch.cat(outputs), torch.stack(norms).sum(0) / n)


def choose(at: AtQuestion, labels: np.ndarray, label: str) -> Chosen:
    """The features that tell a label's cells from all others best, of the layer with the best one.

    labels: (n_cells,) of the cells in `at`. Features of equal AUROC stand in the order of how much
    more they fire in the label's cells.

    Raises InputError if the cells are all of the label, or none is.
    """
    own = labels == label
    if own.all() or not own.any():
        raise InputError(f"Steering to {label!r} needs training cells of this label and of others, "
                         "and there are only one kind; give `case_type` another label.")
    z = at.activations.cpu().numpy().reshape(len(labels), -1)
    area = aurocs(rankdata(z, axis=0), own)
    order = np.lexsort((z[~own].mean(axis=0) - z[own].mean(axis=0), -area))
    n_features = at.activations.shape[2]
    layer = int(order[0]) // n_features
    features = order[order // n_features == layer][:TOP]
    return Chosen(layer, (features % n_features).tolist(), area[features])


def means_at(at: AtQuestion, labels: np.ndarray, label: str, layer: int) -> Tensor:
    """(d_model,) mean of what a layer's MLP writes in the label's cells less that in others; the
    means of the other types count alike."""
    mean = {one: at.outputs[torch.from_numpy(labels == one), layer].mean(dim=0)
            for one in np.unique(labels)}
    return mean.pop(label) - torch.stack([*mean.values()]).mean(dim=0)


@torch.no_grad()
def mean_pull(model: "PreTrainedModel", transcoders: Transcoders, corpus: "Corpus",
              profile: "Profile", cells: np.ndarray, label: str) -> Tensor:
    """(n_layers, d_model) the gradient of the label's contrast, in nats, in a push at every token
    of what each layer's MLP writes: mean over the cells, in the frozen model.

    Patterns, the norms' scales and active features are frozen (`direct_effects.total_pulls`).
    """
    total = torch.zeros_like(transcoders.b_dec)
    for cell in cells:
        prompt = answered_prompt(corpus, profile, int(cell), label)
        frozen = freeze(model, transcoders, prompt.encoded.tokens)
        total += total_pulls(frozen, contrast_of(corpus, prompt).start(frozen)[1]).sum(dim=1)
    return total / len(cells)


def by_effect(pull: Tensor, transcoders: Transcoders, norms: Tensor) -> Tensor:
    """(n_layers, n_features) by how many nats a push of dose 1 along each feature's decoder row
    should move the contrast. pull: `mean_pull`; norms: (n_layers,) of a push of dose 1."""
    unit = torch.nn.functional.normalize(transcoders.W_dec, dim=-1)
    return torch.einsum("ld,lfd->lf", pull, unit) * norms[:, None].to(pull)


def matched(statistics: FeatureStatistics, layer: int, features: Sequence[int],
            rng: np.random.Generator, nearest: int = NEAREST) -> list[int]:
    """For each feature another of the layer that fires about as often and as strongly.

    The draw is among the `nearest` by the distance of log frequency and log mean activation, each
    in its standard deviation over the layer's features that fire; none is one of `features`, and
    none is drawn twice. Raises InputError if the layer has too few features that fire.
    """
    fired = statistics.fired[layer]
    free = np.setdiff1d(np.flatnonzero(fired > 0), features)
    if len(free) < len(features):
        raise InputError(f"Layer {layer} has {len(free)} features that fire beside those to "
                         f"compare with, and {len(features)} are needed; train transcoders longer "
                         "or with a smaller `l1_coefficient`.")
    about = np.stack([np.log(np.maximum(fired, 1)),
                      np.log(np.maximum(statistics.mean_activation[layer], 1e-12))])
    about = about / np.maximum(about[:, fired > 0].std(axis=1), 1e-12)[:, None]
    drawn: list[int] = []
    for feature in features:
        distance = np.square(about[:, free] - about[:, feature, None]).sum(axis=0)
        closest = free[np.argsort(distance, kind="stable")[:nearest]]
        drawn.append(int(rng.choice(closest)))
        free = free[free != drawn[-1]]
    return drawn
