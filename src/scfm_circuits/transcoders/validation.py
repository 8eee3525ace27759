"""Tables 1 and 2: what the model loses when transcoders take the place of its MLPs.

All configurations see the same held-out tokens. Loss is the cross-entropy of what the model is
`asked`, the next token or, of an encoder, masked genes; KL is KL(original || modified) of the same
distributions, both in float32 log-softmax and in nats, as means over all predictions. "No MLP" is
zero ablation, so its loss can lie above that of a uniform guess; mean ablation, where every MLP
writes its mean output, stands beside it. From the same passes come the loss by kind of token and
the share of right answers, or of cells nearest to their type's place (`models.states`).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from scfm_circuits.common.intervals import wilson_interval
from scfm_circuits.models.architectures import (
    architecture_of,
    decoder,
    decoder_layers,
    unembedded,
)
from scfm_circuits.models.mlp_sites import (
    MASKED,
    Asked,
    Replacement,
    asked,
    batches,
    counting_precision,
    device_of,
    hooked,
    mean_ablation,
    mlp_sites,
    mlps,
    replaced_mlps,
    zero_ablation,
)
from scfm_circuits.models.states import States, find_states, genes_at, mean_over_genes
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus

NAMES = {"original": "Original", "transcoder": "Transcoder", "no_mlp": "No MLP"}
"""What the paper's tables call the configurations of the whole model."""

SHOWN = {"original": "original", "transcoder": "transcoders", "mean": "MLPs at their mean",
         "no_mlp": "no MLP"}
"""What the page calls all configurations of the whole model."""

REPLACED = {"transcoder": "replaced", "mean": "at_mean", "no_mlp": "removed"}
"""What is done to the MLPs in all configurations but the original."""

KINDS = ("first piece of a gene", "later pieces", "prompt", "answer")
GENE_KINDS = ("gene", "later pieces", "special token", "answer")
"""Kinds of predicted tokens, and what they are called where genes are tokens. White space between
two genes counts as later pieces, the end of the text as the answer."""

ALL, LATER = -1, -2
"""What stands in place of a layer's number: all layers; all but the first, which alone reads the
tokens themselves."""

MEAN_CELLS = 200
"""Training cells over whose tokens an MLP's output is averaged, evenly spaced in the corpus."""


class Configuration(NamedTuple):
    """A way to run the model: `name`, the replacement (None: untouched) and in which layers."""

    name: str
    replacement: Replacement | None
    layers: Sequence[int] | None

    @property
    def place(self) -> int:
        """The layer, if it is one alone; else `ALL` or `LATER`."""
        if self.layers is None:
            return ALL
        return self.layers[0] if len(self.layers) == 1 else LATER


def configurations(transcoders: Transcoders, means: Tensor) -> list[Configuration]:
    """Original, all MLPs replaced, at their mean, removed; then all but the first, and each alone.

    means: (n_layers, d_model), from `mean_outputs`.
    """
    ways = {"transcoder": transcoders.replacement, "mean": mean_ablation(means),
            "no_mlp": zero_ablation}
    n = transcoders.n_layers
    where = [None, *([[*range(1, n)]] if n > 2 else []), *([layer] for layer in range(n))]
    return [Configuration("original", None, None),
            *(Configuration(name, way, layers) for layers in where for name, way in ways.items())]


class Compared(NamedTuple):
    """What the configurations do on the same tokens, one frame each."""

    scores: pd.DataFrame
    """One row per configuration: configuration, layer (or `ALL`, `LATER`), loss, kl (nats per
    token), loss_se and kl_se (standard errors over cells), added_se (that of what is added to the
    original's loss), n_tokens (predictions)."""
    kinds: pd.DataFrame
    """One row per kind of predicted token that occurs and one for all: tokens (which), predictions,
    share of them, and the loss in nats of the configurations of the whole model, by name."""
    answers: pd.DataFrame
    """One row per configuration: configuration, layer, cells, right (how many of them are answered
    rightly), percentage, lower_95, upper_95 (Wilson), and of the cells, how many were right before
    and are not now (lost) and the other way round (gained)."""


@torch.no_grad()
def compare_configurations(model: "PreTrainedModel", transcoders: Transcoders, corpus: "Corpus",
                           cells: np.ndarray, forward_cells: int, seed: int = 0) -> Compared:
    """Loss, KL and answers of every configuration on the given cells.

    An answer is right if each of its tokens, full stop included, is the likeliest after those
    before it: then the model, asked, says that and nothing else. Where nothing is asked in words it
    is right if the type's place in the untouched model's embedding is the nearest. seed: of what
    an encoder is asked. Cost and memory are those of `scores_by_cell`, and a pass over training
    cells.
    """
    chosen = configurations(transcoders, mean_outputs(model, corpus, forward_cells))
    states = None if corpus.has_answers else find_states(model, corpus, forward_cells)
    found = scores_by_cell(model, chosen, corpus, cells, forward_cells, seed, states)
    per_cell, predictions = found.sums.sum(axis=2), found.predictions.sum(axis=0)
    totals = per_cell.sum(axis=2) / predictions.sum()
    # Cells weigh by their predictions in the mean, so in its error (of a ratio, linearised).
    off = (per_cell - totals[..., None] * predictions) / predictions.mean()
    # What a configuration adds to a cell's loss varies less than the loss, as cells are the same.
    errors, added = (each.std(axis=2, ddof=1) / np.sqrt(len(cells)) if len(cells) > 1
                     else totals * np.nan for each in (off, off - off[:1]))
    which = {"configuration": [one.name for one in chosen],
             "layer": [one.place for one in chosen]}
    scores = pd.DataFrame({
        **which, "loss": totals[:, 0], "kl": totals[:, 1], "loss_se": errors[:, 0],
        "kl_se": errors[:, 1], "added_se": added[:, 0], "n_tokens": int(predictions.sum())})
    names = KINDS if corpus.has_answers else GENE_KINDS
    return Compared(scores, _by_kind(found, names),
                    pd.DataFrame({**which, **_answers(found.right)}))


def _by_kind(found: "CellScores", names: Sequence[str]) -> pd.DataFrame:
    """`Compared.kinds`; the configurations of the whole model come first."""
    counts = found.predictions.sum(axis=1)
    losses = found.sums[: len(SHOWN), 0].sum(axis=2)
    counts, losses = np.append(counts, counts.sum()), np.column_stack([losses, losses.sum(axis=1)])
    table = pd.DataFrame({"tokens": [*names, "all"], "predictions": counts.astype(int),
                          "share": counts / counts[-1],
                          **dict(zip(SHOWN, losses / np.maximum(counts, 1), strict=True))})
    return table[table["predictions"] > 0].reset_index(drop=True)


def shares_said(kinds: pd.DataFrame) -> str:
    """What is predicted, in a sentence; kinds: `Compared.kinds`."""
    found = kinds.set_index("tokens")["share"]
    of_gene, later, other, answer = (
        f"{100 * share:.{1 if share < 0.1 else 0}f} %" for share in (
            max(found.get(name, 0.0) for name in both)
            for both in zip(KINDS, GENE_KINDS, strict=True)))
    if GENE_KINDS[0] in found:
        return f"Of the predictions {of_gene} are genes and {other} special tokens."
    return (f"Of the predictions {later} are later pieces of a gene's name, {of_gene} first pieces "
            f"and {answer} the answer.")


def asked_said(model: nn.Module, in_words: bool) -> str:
    """What the loss is of, for a sentence."""
    if not architecture_of(model).causal:
        return (f"masked genes, in nats: {100 * MASKED:.0f} % of each held-out cell's genes, the "
                "same in every evaluation, are shown as masks. The next token, which the paper's "
                "model is asked, an encoder does not predict")
    return (f"the next {'token' if in_words else 'gene'} in nats, over every prediction of the "
            "held-out cells that is not padding" + (", prompt and answer included" if in_words
                                                    else ""))


def _answers(right: np.ndarray) -> dict[str, Any]:
    """Columns of `Compared.answers` from (n_configurations, n_cells) bool, the original first."""
    counts, n = right.sum(axis=1), right.shape[1]
    low, high = 100 * np.array([wilson_interval(k, n) for k in counts]).T
    return {"cells": n, "right": counts, "percentage": 100 * counts / n,
            "lower_95": low, "upper_95": high,
            "lost": (right[0] & ~right).sum(axis=1), "gained": (~right[0] & right).sum(axis=1)}


def table1(scores: pd.DataFrame, paper: Mapping[str, float]) -> pd.DataFrame:
    """Table 1: configuration, validation_loss, standard_error (over cells), paper (as printed), and
    added_error: the standard error of what is added to the original's loss in the same cells."""
    table = _as_printed(scores, "loss", "validation_loss", paper)
    whole = scores[scores["layer"] == -1].set_index("configuration")["added_se"]
    return table.assign(added_error=whole.rename(NAMES)[table["configuration"]].to_list())


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


def each_layer(found: Compared, fvu: np.ndarray, without_first: np.ndarray) -> pd.DataFrame:
    """Each layer alone: layer, fvu, fvu_without_first (token of each text), and loss, KL and
    percentage of right answers with its MLP replaced, at its mean and removed."""
    both = found.scores.assign(right=found.answers["percentage"])
    single = both[both["layer"] >= 0].pivot(index="layer", columns="configuration",
                                            values=["loss", "kl", "right"])
    return pd.DataFrame({"layer": single.index, "fvu": fvu, "fvu_without_first": without_first, **{
        f"{measure}_{done}": single[measure, name] for measure in ("loss", "kl", "right")
        for name, done in REPLACED.items()}})


def recovered(loss: Mapping[str, float], without: str = NAMES["no_mlp"]) -> float:
    """Share of the loss that the MLPs' absence costs which the transcoders win back.

    loss: by the names that the paper's tables use. without: the name of the absence.
    """
    original, replaced = loss[NAMES["original"]], loss[NAMES["transcoder"]]
    return float((loss[without] - replaced) / (loss[without] - original))


class CellScores(NamedTuple):
    """Loss and KL of configurations, summed over each cell's predictions, and its answers.

    sums: (n_configurations, 2, n_kinds, n_cells) in nats; predictions: (n_kinds, n_cells) how many
    there are; right: (n_configurations, n_cells) whether each token of the answer is right, or the
    type's place the nearest.
    """

    sums: np.ndarray
    predictions: np.ndarray
    right: np.ndarray


@torch.no_grad()
def scores_by_cell(model: "PreTrainedModel", chosen: Sequence[Configuration], corpus: "Corpus",
                   cells: np.ndarray, forward_cells: int, seed: int = 0,
                   states: States | None = None) -> CellScores:
    """Loss, KL and answers of configurations, of which the first is the untouched model.

    states: where there are no answers; without them no cell is right. A decoder's configuration of
    one layer starts from what the untouched model handed to that layer, so it costs half a run of
    the model on average. Memory is that of four sets of logits and of the
    residuals of all layers for `forward_cells` cells.
    """
    found = CellScores(np.zeros((len(chosen), 2, len(KINDS), len(cells))),
                       np.zeros((len(KINDS), len(cells))),
                       np.zeros((len(chosen), len(cells)), bool))
    done = 0
    bar = tqdm(total=len(cells), desc="validation", unit="cell")
    for rows, tokens, mask in batches(corpus, cells, forward_cells, device_of(model)):
        where = slice(done, done + len(rows))
        done += len(rows)
        with counting_precision(model):
            question = asked(model, corpus, rows, tokens, mask, seed)
            part = _scores(model, chosen, corpus, rows, tokens, mask, question, states)
        for whole, some in zip(found, part, strict=True):
            whole[..., where] = some
        bar.update(len(rows))
    bar.close()
    return found


def predicted_kinds(corpus: "Corpus", cells: np.ndarray, length: int) -> np.ndarray:
    """(n_cells, length - 1) ints: the place in `KINDS` of each token after the first."""
    gene, place = corpus.gene[cells, 1:length], corpus.place[cells, 1:length]
    at, inside = np.arange(1, length), gene >= 0
    between = (np.cumsum(inside, axis=1) > 0) & (np.cumsum(inside[:, ::-1], axis=1)[:, ::-1] > 0)
    answered = at >= corpus.answer_start[cells][:, None]
    return np.select([answered, place == 0, between], [3, 0, 1], 2)


def _scores(model: "PreTrainedModel", chosen: Sequence[Configuration], corpus: "Corpus",
            rows: np.ndarray, tokens: Tensor, mask: Tensor, question: Asked,
            states: States | None) -> CellScores:
    """`scores_by_cell` of the cells `rows`, which pass together."""
    targets, n = question.wanted, len(rows)
    cell, at = np.nonzero(question.at.cpu().numpy())
    kinds = predicted_kinds(corpus, rows, tokens.shape[1])
    # An encoder is asked genes alone.
    group = (kinds[cell, at] if architecture_of(model).causal else 0) * n + cell
    shape = len(KINDS), n
    # The end of the text is not asked of an answer: the full stop is its last token.
    of_answer = ((at + 1 >= corpus.answer_start[rows][cell])
                 & (at + 1 <= corpus.answer_end[rows][cell]))
    answers = torch.from_numpy(np.flatnonzero(of_answer)).to(tokens.device)
    # A masked gene says nothing of the cell.
    of_gene = genes_at(corpus, rows, tokens.shape[1], tokens.device) & (question.shown == tokens)
    sums, right = np.empty((len(chosen), 2, *shape)), np.zeros((len(chosen), n), bool)
    residuals: list[Tensor] = []
    original: Tensor | None = None
    for index, configuration in enumerate(chosen):
        last = _last_hidden(model, configuration, question.shown, mask, residuals)
        # Only predictions that count go through the unembedding, the model's largest product.
        logs = _log_probabilities(model, last[question.at])
        original = logs if original is None else original
        loss = -logs.gather(-1, targets[:, None])[:, 0]
        kl = torch.linalg.vecdot(original.exp(), original - logs)
        for measure, values in enumerate((loss, kl)):
            sums[index, measure] = np.bincount(
                group, values.double().cpu().numpy(), len(KINDS) * n).reshape(shape)
        if corpus.has_answers:
            missed = (logs[answers].argmax(dim=-1) != targets[answers]).cpu().numpy()
            right[index] = np.bincount(cell[of_answer], missed, n) == 0
        elif states is not None:
            embedded = mean_over_genes(last.double(), of_gene).cpu().numpy()
            right[index] = states.nearest(embedded) == corpus.labels[rows]
    return CellScores(sums, np.bincount(group, minlength=len(KINDS) * n).reshape(shape), right)


def _log_probabilities(model: "PreTrainedModel", hidden: Tensor) -> Tensor:
    """(n, vocabulary) float32, of what the model's body gives, with the model's cap on logits."""
    logits, cap = unembedded(model, hidden).float(), getattr(
        model.config, "final_logit_softcapping", None)
    return (cap * torch.tanh(logits / cap) if cap else logits).log_softmax(dim=-1)


def _last_hidden(model: "PreTrainedModel", configuration: Configuration, tokens: Tensor,
                 mask: Tensor, residuals: list[Tensor]) -> Tensor:
    """(n, length, d_model) what the model's body gives.

    residuals: what the untouched model hands to each layer, (n, length, d_model); the untouched
    configuration fills it, those of one layer start from it, unless the stream begins with more
    than tokens' embeddings, or attention is not of one kind in all layers.
    """
    run, kinds = decoder(model), set(getattr(model.config, "layer_types", None) or ())
    startable = architecture_of(model).embedded is None and len(kinds) < 2
    with contextlib.ExitStack() as stack:
        given = {"input_ids": tokens}
        if configuration.replacement is None:
            stack.enter_context(hooked(
                layer.register_forward_pre_hook(lambda module, args: residuals.append(args[0]))
                for layer in decoder_layers(model)))
        else:
            stack.enter_context(replaced_mlps(model, configuration.replacement,
                                              configuration.layers))
        if configuration.layers is not None and startable:
            first = min(configuration.layers)
            stack.enter_context(_starting_at(model, first))
            given = {"inputs_embeds": residuals[first]}
        last: Tensor = run(**given, attention_mask=mask, use_cache=False).last_hidden_state
    return last


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

    @property
    def mean(self) -> Tensor:
        """(n_layers, d_model) mean over all tokens taken in."""
        return self._total / self.n_tokens

    def value(self) -> np.ndarray:
        """(n_layers,) sum of ||y - mean(y)||^2 over all tokens taken in."""
        return (self._squares - self._total.square().sum(dim=1) / self.n_tokens).numpy()


@torch.no_grad()
def mean_outputs(model: nn.Module, corpus: "Corpus", forward_cells: int) -> Tensor:
    """(n_layers, d_model) float64: each MLP's mean output over the tokens of `MEAN_CELLS` training
    cells, or of all of them if there are fewer."""
    return output_variance(model, corpus, corpus.training_cells(MEAN_CELLS), forward_cells).mean


@torch.no_grad()
def output_variance(model: nn.Module, corpus: "Corpus", cells: np.ndarray, forward_cells: int
                    ) -> OutputVariance:
    """The MLPs' outputs on all tokens of the cells, taken in."""
    config: Any = model.config
    found = OutputVariance(len(mlps(model)), config.hidden_size)
    for _, tokens, mask in batches(corpus, cells, forward_cells, device_of(model)):
        with counting_precision(model):  # type: ignore[arg-type]
            found.add(mlp_sites(model, tokens, mask).outputs)
    return found


@torch.no_grad()
def fraction_of_variance_unexplained(model: "PreTrainedModel", transcoders: Transcoders,
                                     corpus: "Corpus", cells: np.ndarray, forward_cells: int,
                                     skips: Sequence[int] = (0,)) -> np.ndarray:
    """(len(skips), n_layers) FVU: sum ||y_hat - y||^2 / sum ||y - mean(y)||^2 over the cells'
    tokens.

    Each layer sees the original model's inputs, so errors of other layers do not enter. skips: how
    many tokens at a text's beginning are left out of both sums; where a model rests its attention
    on the first token, what an MLP writes there can be most of the variance.
    """
    n_layers = transcoders.n_layers
    error = np.zeros((len(skips), n_layers))
    variances = [OutputVariance(n_layers, transcoders.d_model) for _ in skips]
    for _, tokens, mask in batches(corpus, cells, forward_cells, device_of(model)):
        place = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)[mask]
        with counting_precision(model):
            x, y = mlp_sites(model, tokens, mask)
            for skip, variance in zip(skips, variances, strict=True):
                variance.add(y[:, place >= skip])
            for layer in range(n_layers):  # the activations of one layer at a time
                missed = transcoders.layer_estimate(layer, x[layer]) - y[layer]
                each = missed.double().square().sum(dim=1)
                error[:, layer] += [float(each[place >= skip].sum()) for skip in skips]
    return error / np.stack([variance.value() for variance in variances])
