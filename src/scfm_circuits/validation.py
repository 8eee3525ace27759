"""Tables 1 and 2: what the model loses when transcoders take the place of its MLPs.

All configurations see the same held-out tokens. Loss is the cross-entropy of the next token, KL is
KL(original || modified) of the next-token distributions, both in float32 log-softmax and in nats,
as means over all predictions that are not padding. "No MLP" is zero ablation, so its loss can lie
above that of a uniform guess.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scfm_circuits.language_model import (
    Replacement,
    batches,
    device_of,
    mlp_sites,
    mlps,
    replaced_mlps,
    zero_ablation,
)
from scfm_circuits.transcoder import Transcoders

if TYPE_CHECKING:
    import pandas as pd
    from transformers import GPTNeoXForCausalLM

    from scfm_circuits.sentences import Corpus


class Configuration(NamedTuple):
    """A way to run the model: `name`, the replacement (None: untouched) and in which layers."""

    name: str
    replacement: Replacement | None
    layers: Sequence[int] | None


def configurations(transcoders: Transcoders) -> list[Configuration]:
    """Original, all MLPs replaced, all removed; then each layer replaced or removed alone."""
    whole = [
        Configuration("original", None, None),
        Configuration("transcoder", transcoders.replacement, None),
        Configuration("no_mlp", zero_ablation, None),
    ]
    single = [
        Configuration(name, replacement, [layer])
        for layer in range(transcoders.n_layers)
        for name, replacement in (("transcoder", transcoders.replacement),
                                  ("no_mlp", zero_ablation))
    ]
    return whole + single


@torch.no_grad()
def compare_configurations(model: "GPTNeoXForCausalLM", transcoders: Transcoders, corpus: "Corpus",
                           cells: np.ndarray, forward_cells: int) -> "pd.DataFrame":
    """Loss and KL of every configuration on the given cells.

    Returns one row per configuration: configuration, layer (-1: all layers), loss, kl (nats per
    token), loss_se and kl_se (standard errors over cells), n_tokens (predictions). Memory is that
    of two sets of logits for `forward_cells` cells.
    """
    import pandas as pd

    chosen = configurations(transcoders)
    per_cell = np.zeros((len(chosen), 2, len(cells)))
    predictions = np.zeros(len(cells))
    done = 0
    for rows, tokens, mask in batches(corpus, cells, forward_cells, device_of(model)):
        wanted = mask[:, 1:]
        targets = tokens[:, 1:][wanted]
        where = slice(done, done + len(rows))
        cell = torch.nonzero(wanted)[:, 0].cpu().numpy()
        done += len(rows)
        predictions[where] = np.bincount(cell, minlength=len(rows))
        original: Tensor | None = None
        for index, configuration in enumerate(chosen):
            logs = _log_probabilities(model, configuration, tokens, mask)[wanted]
            original = logs if original is None else original
            loss = -logs.gather(-1, targets[:, None])[:, 0]
            kl = (original.exp() * (original - logs)).sum(dim=-1)
            for kind, values in enumerate((loss, kl)):
                per_cell[index, kind, where] = np.bincount(
                    cell, weights=values.double().cpu().numpy(), minlength=len(rows))
    totals = per_cell.sum(axis=2) / predictions.sum()
    means = per_cell / predictions
    errors = means.std(axis=2, ddof=1) / np.sqrt(len(cells)) if len(cells) > 1 else totals * np.nan
    return pd.DataFrame({
        "configuration": [one.name for one in chosen],
        "layer": [-1 if one.layers is None else one.layers[0] for one in chosen],
        "loss": totals[:, 0], "kl": totals[:, 1],
        "loss_se": errors[:, 0], "kl_se": errors[:, 1],
        "n_tokens": int(predictions.sum()),
    })


def _log_probabilities(model: "GPTNeoXForCausalLM", configuration: Configuration, tokens: Tensor,
                       mask: Tensor) -> Tensor:
    """(n, length - 1, vocabulary) float32 log-probabilities of the next tokens."""
    if configuration.replacement is None:
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    else:
        with replaced_mlps(model, configuration.replacement, configuration.layers):
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return logits[:, :-1].float().log_softmax(dim=-1)


@torch.no_grad()
def fraction_of_variance_unexplained(model: "GPTNeoXForCausalLM", transcoders: Transcoders,
                                     corpus: "Corpus", cells: np.ndarray, forward_cells: int
                                     ) -> np.ndarray:
    """(n_layers,) FVU: sum ||y_hat - y||^2 / sum ||y - mean(y)||^2 over the cells' tokens.

    Each layer sees the original model's inputs, so errors of other layers do not enter.
    """
    n_layers, d_model = len(mlps(model)), transcoders.d_model
    error = torch.zeros(n_layers, dtype=torch.float64)
    total, squares = torch.zeros(n_layers, d_model, dtype=torch.float64), error.clone()
    n_tokens = 0
    for _, tokens, mask in batches(corpus, cells, forward_cells, device_of(model)):
        x, y = mlp_sites(model, tokens, mask)
        error += (transcoders(x) - y).square().sum(dim=(1, 2)).double().cpu()
        total += y.sum(dim=1).double().cpu()
        squares += y.double().square().sum(dim=(1, 2)).cpu()
        n_tokens += y.shape[1]
    variance = squares - total.square().sum(dim=1) / n_tokens
    return (error / variance).numpy()
