"""How well units tell a truth about cells: features, neurons, directions or genes.

A unit is read in a cell in three ways: its mean and its largest value over the question's tokens,
and its value at the last of them, where the type is asked for. Units of all layers stand side by
side, and the answer is never read. What is chosen is chosen on training cells, and scored on
held-out cells.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.models.mlp_sites import batches, device_of, mlp_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBES = (1, 2, 5)
AUROC, F1 = "AUROC, best unit", "F1, best unit"
MEASURES = (AUROC, F1, *(f"AUROC, probe of {k}" for k in PROBES))

# --- scores --------------------------------------------------------------------------------------


def aurocs(ranks: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(n_units,) areas under the ROC curve for truth (n_cells,).

    ranks: (n_cells, n_units) of the values, ties at their mean (`stats.rankdata`).
    """
    n, positive = len(truth), int(truth.sum())
    above = ranks[truth].sum(axis=0) - positive * (positive + 1) / 2
    return above / (positive * (n - positive))


def best_cuts(falling: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n_units,) the largest F1 that `values >= cut` has on some cells, and the cell at the cut.

    falling: (n_cells, n_units) the values, largest first; truth: the same shape, of their cells.
    """
    n, positive = len(truth), int(truth[:, 0].sum())
    f1 = 2 * truth.cumsum(axis=0, dtype=np.int32) / (np.arange(1, n + 1)[:, None] + positive)
    f1[:-1][falling[:-1] == falling[1:]] = -1  # no cut parts equal values
    best = f1.argmax(axis=0)
    return f1[best, np.arange(f1.shape[1])], best


def f1_score(said: np.ndarray, truth: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of two (n_cells,) bool."""
    return float(2 * (said & truth).sum() / (said.sum() + truth.sum()))


def chosen_units(values: np.ndarray, truth: np.ndarray, n: int) -> list[int]:
    """Units by forward selection: each the one with which least squares explain the truth best.

    values: (n_cells, n_units), standardised.
    """
    left, wanted = values.copy(), (truth - truth.mean()).astype(values.dtype)
    chosen: list[int] = []
    for _ in range(min(n, left.shape[1])):
        size = np.square(left).sum(axis=0)
        # What is left of a unit that the chosen ones explain is rounding.
        size[size < 1e-4 * len(left)] = np.inf
        best = int((np.square(wanted @ left) / size).argmax())
        axis = left[:, best] / np.sqrt(size[best])
        wanted = wanted - axis * (axis @ wanted)
        left -= np.outer(axis, axis @ left)
        chosen.append(best)
    return chosen


def scores(training: np.ndarray, held_out: np.ndarray, truths: np.ndarray,
           truths_held_out: np.ndarray) -> np.ndarray:
    """(n_truths, n_measures) `MEASURES` of units (n_cells, n_units), chosen on training cells.

    truths, truths_held_out: (n_truths, n_cells) bool of these cells.
    """
    ranks = stats.rankdata(training, axis=0)
    order = np.argsort(-training, axis=0, kind="stable")
    falling = np.take_along_axis(training, order, axis=0)
    mean, spread = training.mean(axis=0), training.std(axis=0)
    spread[spread < 1e-6] = np.inf
    ours, theirs = (training - mean) / spread, (held_out - mean) / spread
    found = []
    for truth, other in zip(truths, truths_held_out, strict=True):
        best = int(aurocs(ranks, truth).argmax())
        f1, places = best_cuts(falling, truth[order])
        cut = int(f1.argmax())
        chosen = chosen_units(ours, truth, max(PROBES))
        found.append([auroc(held_out[:, best], other),
                      f1_score(held_out[:, cut] >= falling[places[cut], cut], other),
                      *(probe_auroc(ours[:, chosen[:k]], theirs[:, chosen[:k]], truth, other)
                        for k in PROBES)])
    return np.array(found)


def auroc(values: np.ndarray, truth: np.ndarray) -> float:
    """Area under the ROC curve of (n_cells,) values for (n_cells,) truth; NaN if that is the same
    for all."""
    if truth.all() or not truth.any():
        return float("nan")
    return float(aurocs(stats.rankdata(values)[:, None], truth)[0])


def probe_auroc(training: np.ndarray, held_out: np.ndarray, truth: np.ndarray,
                truth_held_out: np.ndarray, strength: float = 1.0) -> float:
    """Held-out AUROC of a logistic regression on standardised values (n_cells, n_units).

    strength: inverse weight of its L2 penalty.
    """
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(C=strength, solver="newton-cholesky").fit(training, truth)
    return auroc(probe.decision_function(held_out), truth_held_out)


# --- units of a model ----------------------------------------------------------------------------

Encoder = Callable[[int, Tensor], Tensor]
"""From a layer and what its MLP reads (n_tokens, d_model) to units (n_tokens, n_units)."""


@torch.no_grad()
def read_units(model: "PreTrainedModel", corpus: Corpus, cells: np.ndarray,
               encoders: Mapping[str, Encoder], size: int = 32) -> dict[str, np.ndarray]:
    """By encoder (n_cells, n_layers * 3 * n_units): mean, largest and last value over the
    question's tokens, layer by layer."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in encoders}
    for rows, tokens, mask in batches(corpus, cells, size, device_of(model)):
        inputs = mlp_sites(model, tokens, mask).inputs
        asked = torch.from_numpy(corpus.answer_start[rows]).to(tokens.device)
        inside = torch.arange(tokens.shape[1], device=tokens.device) < asked[:, None]
        cell = torch.arange(len(rows), device=tokens.device)
        for name, encode in encoders.items():
            found = []
            for layer, x in enumerate(inputs):
                units = encode(layer, x)
                padded = units.new_zeros((*mask.shape, units.shape[1]))
                padded[mask] = units
                sums = (padded * inside[..., None]).sum(dim=1) / asked[:, None]
                most = padded.masked_fill(~inside[..., None], -torch.inf).amax(dim=1)
                found += [sums, most, padded[cell, asked - 1]]
            parts[name].append(torch.cat(found, dim=1).cpu().numpy())
    return {name: np.concatenate(part) for name, part in parts.items()}
