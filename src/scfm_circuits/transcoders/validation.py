"""Tables 1 and 2: what the model loses when transcoders take the place of its MLPs.

All configurations see the same held-out tokens. Loss is the cross-entropy of the next token, KL is
KL(original || modified) of the next-token distributions, both in float32 log-softmax and in nats,
as means over all predictions that are not padding. "No MLP" is zero ablation, so its loss can lie
above that of a uniform guess.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from scfm_circuits.models.architectures import decoder, decoder_layers
from scfm_circuits.models.mlp_sites import (
    Replacement,
    batches,
    counting_precision,
    device_of,
    hooked,
    mlp_sites,
    mlps,
    replaced_mlps,
    zero_ablation,
)
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM

    from scfm_circuits.cells.corpus import Corpus

NAMES = {"original": "Original", "transcoder": "Transcoder", "no_mlp": "No MLP"}
"""What the paper's tables call the configurations of the whole model."""


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
                           cells: np.ndarray, forward_cells: int) -> pd.DataFrame:
    """Loss and KL of every configuration on the given cells.

    Returns one row per configuration: configuration, layer (-1: all layers), loss, kl (nats per
    token), loss_se and kl_se (standard errors over cells), n_tokens (predictions). Cost and memory
    are those of `scores_by_cell`.
    """
    chosen = configurations(transcoders)
    per_cell, predictions = scores_by_cell(model, chosen, corpus, cells, forward_cells)
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


def table1(scores: pd.DataFrame, paper: Mapping[str, float]) -> pd.DataFrame:
    """Table 1: configuration, validation_loss, standard_error (over cells), paper (as printed)."""
    return _as_printed(scores, "loss", "validation_loss", paper)


def table2(scores: pd.DataFrame, paper: Mapping[str, float]) -> pd.DataFrame:
    """Table 2: configuration, mean_kl, standard_error (over cells), paper (as printed)."""
    return _as_printed(scores, "kl", "mean_kl", paper)


def _as_printed(scores: pd.DataFrame, measure: str, name: str, paper: Mapping[str, float]
                ) -> pd.DataFrame:
    """The whole model's rows of `compare_configurations` beside those that the paper prints."""
    whole = scores[scores["layer"] == -1].set_index("configuration")
    keys = [key for key, printed in NAMES.items() if printed in paper]
    return pd.DataFrame({
        "configuration": [NAMES[key] for key in keys], name: whole.loc[keys, measure].to_list(),
        "standard_error": whole.loc[keys, f"{measure}_se"].to_list(),
        "paper": [paper[NAMES[key]] for key in keys]})


def each_layer(scores: pd.DataFrame, fvu: np.ndarray) -> pd.DataFrame:
    """Each layer alone: layer, fvu, and loss and KL with its MLP replaced and removed."""
    single = scores[scores["layer"] >= 0].pivot(index="layer", columns="configuration",
                                                values=["loss", "kl"])
    return pd.DataFrame({"layer": single.index, "fvu": fvu, **{
        f"{measure}_{done}": single[measure, name] for measure in ("loss", "kl")
        for done, name in (("replaced", "transcoder"), ("removed", "no_mlp"))}})


def recovered(loss: Mapping[str, float]) -> float:
    """Share of the loss that removing the MLPs costs which the transcoders win back.

    loss: by the names that the paper's tables use.
    """
    original, replaced, removed = (loss[name] for name in NAMES.values())
    return float((removed - replaced) / (removed - original))


@torch.no_grad()
def scores_by_cell(model: "GPTNeoXForCausalLM", chosen: Sequence[Configuration], corpus: "Corpus",
                   cells: np.ndarray, forward_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Loss and KL of configurations, of which the first is the untouched model.

    Returns (n_configurations, 2, n_cells) sums over each cell's predictions, and (n_cells,) how
    many there are. A configuration of one layer starts from what the untouched model handed to that
    layer, so it costs half a run of the model on average. Memory is that of four sets of logits and
    of the residuals of all layers for `forward_cells` cells.
    """
    per_cell = np.zeros((len(chosen), 2, len(cells)))
    predictions = np.zeros(len(cells))
    done = 0
    bar = tqdm(total=len(cells), desc="validation", unit="cell")
    for rows, tokens, mask in batches(corpus, cells, forward_cells, device_of(model)):
        where = slice(done, done + len(rows))
        done += len(rows)
        with counting_precision(model):
            per_cell[:, :, where], predictions[where] = _scores(model, chosen, tokens, mask)
        bar.update(len(rows))
    bar.close()
    return per_cell, predictions


def _scores(model: "GPTNeoXForCausalLM", chosen: Sequence[Configuration], tokens: Tensor,
            mask: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """`scores_by_cell` of some cells that pass together."""
    wanted = mask[:, 1:]
    targets = tokens[:, 1:][wanted]
    cell = torch.nonzero(wanted)[:, 0].cpu().numpy()
    per_cell = np.empty((len(chosen), 2, len(tokens)))
    residuals: list[Tensor] = []
    original: Tensor | None = None
    for index, configuration in enumerate(chosen):
        logs = _log_probabilities(model, configuration, tokens, mask, residuals)
        original = logs if original is None else original
        loss = -logs.gather(-1, targets[:, None])[:, 0]
        kl = torch.linalg.vecdot(original.exp(), original - logs)
        for kind, values in enumerate((loss, kl)):
            per_cell[index, kind] = np.bincount(
                cell, weights=values.double().cpu().numpy(), minlength=len(tokens))
    return per_cell, np.bincount(cell, minlength=len(tokens))


def _log_probabilities(model: "GPTNeoXForCausalLM", configuration: Configuration, tokens: Tensor,
                       mask: Tensor, residuals: list[Tensor]) -> Tensor:
    """(n_predictions, vocabulary) float32 log-probabilities of the tokens after the first.

    residuals: what the untouched model hands to each layer, (n, length, d_model); the untouched
    configuration fills it, those of one layer start from it.
    """
    run = decoder(model)
    with contextlib.ExitStack() as stack:
        given = {"input_ids": tokens}
        if configuration.replacement is None:
            stack.enter_context(hooked(
                layer.register_forward_pre_hook(lambda module, args: residuals.append(args[0]))
                for layer in decoder_layers(model)))
        else:
            stack.enter_context(replaced_mlps(model, configuration.replacement,
                                              configuration.layers))
        if configuration.layers is not None:
            first = min(configuration.layers)
            stack.enter_context(_starting_at(model, first))
            given = {"inputs_embeds": residuals[first]}
        last = run(**given, attention_mask=mask, use_cache=False).last_hidden_state
    # Only predictions that count go through the unembedding, the model's largest product.
    logits = model.get_output_embeddings()(last[:, :-1][mask[:, 1:]])
    return logits.float().log_softmax(dim=-1)


@contextlib.contextmanager
def _starting_at(model: nn.Module, layer: int) -> Iterator[None]:
    """Within the block, the decoder consists of `layer` and those after it."""
    run = decoder(model)
    whole: nn.ModuleList = run.layers  # type: ignore[assignment]
    run.layers = whole[layer:]
    try:
        yield
    finally:
        run.layers = whole


class OutputVariance:
    """Squared deviations of MLP outputs from their mean, summed batch by batch in float64."""

    def __init__(self, n_layers: int, d_model: int) -> None:
        self.n_tokens = 0
        self._total = torch.zeros(n_layers, d_model, dtype=torch.float64)
        self._squares = torch.zeros(n_layers, dtype=torch.float64)

    def add(self, outputs: Tensor) -> None:
        """Take in (n_layers, n_tokens, d_model) outputs of any type."""
        self.n_tokens += outputs.shape[1]
        for layer, y in enumerate(outputs):
            self._total[layer] += y.sum(dim=0, dtype=torch.float64).cpu()
            self._squares[layer] += y.double().square().sum().cpu()

    def value(self) -> np.ndarray:
        """(n_layers,) sum of ||y - mean(y)||^2 over all tokens taken in."""
        return (self._squares - self._total.square().sum(dim=1) / self.n_tokens).numpy()


@torch.no_grad()
def fraction_of_variance_unexplained(model: "GPTNeoXForCausalLM", transcoders: Transcoders,
                                     corpus: "Corpus", cells: np.ndarray, forward_cells: int
                                     ) -> np.ndarray:
    """(n_layers,) FVU: sum ||y_hat - y||^2 / sum ||y - mean(y)||^2 over the cells' tokens.

    Each layer sees the original model's inputs, so errors of other layers do not enter.
    """
    error = np.zeros(transcoders.n_layers)
    variance = OutputVariance(transcoders.n_layers, transcoders.d_model)
    for _, tokens, mask in batches(corpus, cells, forward_cells, device_of(model)):
        with counting_precision(model):
            x, y = mlp_sites(model, tokens, mask)
            variance.add(y)
            for layer in range(transcoders.n_layers):  # the activations of one layer at a time
                missed = transcoders.layer_estimate(layer, x[layer]) - y[layer]
                error[layer] += float(missed.double().square().sum())
    return error / variance.value()


Load = Callable[[], Transcoders]
"""Reads some dictionaries."""


@torch.no_grad()
def replacement_of(model: nn.Module, transcoders: Transcoders) -> Replacement:
    """What takes an MLP's place: an autoencoder reads the MLP's own output."""
    if transcoders.variant.site == "transcoder":
        return transcoders.replacement
    modules = mlps(model)
    # `forward` itself passes the hook by, which would call it again.
    return lambda layer, x: transcoders.replacement(layer, modules[layer].forward(x))


def held_out_measures(model: nn.Module, variants: Mapping[str, Load], corpus: "Corpus",
                      cells: np.ndarray, forward_cells: int) -> pd.DataFrame:
    """L0, FVU and loss on the cells: a row per variant and layer.

    variants: functions that load the dictionaries, of which one is held at a time.
    Columns: variant, layer, l0, fvu, loss (nats per token with that layer's MLP replaced; layer -1:
    all of them, with l0 and fvu missing). The rows of `no MLP` have zeros in the MLP's place, the
    row of `original` (layer -1) the model as it is.
    """
    n_layers, given = len(mlps(model)), (model, corpus, cells, forward_cells)
    config: Any = model.config
    variance = OutputVariance(n_layers, config.hidden_size)
    for _, tokens, mask in batches(corpus, cells, forward_cells, device_of(model)):
        variance.add(mlp_sites(model, tokens, mask).outputs)
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


def _sparsity_and_error(one: Transcoders, model: nn.Module, corpus: "Corpus", cells: np.ndarray,
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


def _losses(replacement: Replacement, model: nn.Module, corpus: "Corpus", cells: np.ndarray,
            forward_cells: int) -> np.ndarray:
    """(2 + n_layers,) losses: of the untouched model, with all MLPs replaced, with each alone."""
    chosen = [Configuration("", None, None), Configuration("", replacement, None),
              *(Configuration("", replacement, [layer]) for layer in range(len(mlps(model))))]
    per_cell, predictions = scores_by_cell(model, chosen, corpus, cells,  # type: ignore[arg-type]
                                           forward_cells)
    return per_cell[:, 0].sum(axis=1) / predictions.sum()
