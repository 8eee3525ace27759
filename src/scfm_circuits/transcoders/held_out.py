"""Several dictionaries on the same held-out cells: how sparse, how exact, and what they cost."""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch
from torch import nn

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.models.mlp_sites import (
    Replacement,
    batches,
    device_of,
    mlp_sites,
    mlps,
    zero_ablation,
)
from scfm_circuits.transcoders.transcoder import Transcoders
from scfm_circuits.transcoders.validation import Configuration, output_variance, scores_by_cell

Load = Callable[[], Transcoders]
"""Reads some dictionaries."""


@torch.no_grad()
def replacement_of(model: nn.Module, transcoders: Transcoders) -> Replacement:
    """What takes an MLP's place: an autoencoder reads the MLP's own output."""
    if transcoders.variant.site == "transcoder":
        return transcoders.replacement
    modules = mlps(model)
    return lambda layer, x: transcoders.replacement(layer, modules[layer](x))


def held_out_measures(model: nn.Module, variants: Mapping[str, Load], corpus: Corpus,
                      cells: np.ndarray, forward_cells: int) -> pd.DataFrame:
    """L0, FVU and loss on the cells: a row per variant and layer.

    variants: functions that load the dictionaries, of which one is held at a time.
    Columns: variant, layer, l0, fvu, loss (nats per token with that layer's MLP replaced; layer -1:
    all of them, with l0 and fvu missing). The rows of `no MLP` have zeros in the MLP's place, the
    row of `original` (layer -1) the model as it is.
    """
    n_layers, given = len(mlps(model)), (model, corpus, cells, forward_cells)
    variance = output_variance(*given)
    layers, missing = range(-1, n_layers), np.full(1 + n_layers, np.nan)
    rows = []
    for name, load in variants.items():
        one = load()
        active, error = _sparsity_and_error(one, *given)
        losses = _losses(replacement_of(model, one), *given)[1:]
        del one  # before the next one is read
        l0, fvu = (np.append(np.nan, part) for part in (
            active / variance.n_tokens, error / variance.value()))
        rows += [[name, *row] for row in zip(layers, l0, fvu, losses, strict=True)]
    losses = _losses(zero_ablation, *given)
    rows += [["no MLP", *row] for row in zip(layers, missing, missing, losses[1:], strict=True)]
    rows.append(["original", -1, np.nan, np.nan, losses[0]])
    return pd.DataFrame(rows, columns=["variant", "layer", "l0", "fvu", "loss"])


def _sparsity_and_error(one: Transcoders, model: nn.Module, corpus: Corpus, cells: np.ndarray,
                        forward_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """(n_layers,) active features and squared errors, summed over the cells' tokens."""
    active, error = np.zeros(one.n_layers), np.zeros(one.n_layers)
    for _, tokens, mask in batches(corpus, cells, forward_cells, device_of(model)):
        x, y = mlp_sites(model, tokens, mask)
        read = one.variant.read(x, y)
        for layer in range(one.n_layers):
            active[layer] += int((one.layer_activations(layer, read[layer]) > 0).sum())
            missed = one.layer_estimate(layer, read[layer]) - y[layer]
            error[layer] += float(missed.double().square().sum())
    return active, error


def _losses(replacement: Replacement, model: nn.Module, corpus: Corpus, cells: np.ndarray,
            forward_cells: int) -> np.ndarray:
    """(2 + n_layers,) losses: of the untouched model, with all MLPs replaced, with each alone."""
    chosen = [Configuration("", None, None), Configuration("", replacement, None),
              *(Configuration("", replacement, [layer]) for layer in range(len(mlps(model))))]
    found = scores_by_cell(model, chosen, corpus, cells, forward_cells)  # type: ignore[arg-type]
    return found.sums[:, 0].sum(axis=(1, 2)) / found.predictions.sum()
