"""Where a guessed gene, and what tells cell types apart, come from in models of gene tokens.

Two questions that need no answer in words. Of a cell, the genes that `masked_genes` draws are asked
(an encoder sees masks in their places, a decoder the genes before each), and the logit of the right
one, less the mean logit, is read. And the mean embedding of a cell's genes is read along the
direction from the other types' mean to a type's, in the stream that enters the last layer, as
in-silico perturbation does (Theodoris et al. 2023). Both are linear readings of a frozen run, so
they split exactly into what was written where: tokens, ranks, features, errors, biases; at the
token that is read, or brought by attention from others.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from scfm_circuits.circuits.attribution import (
    Reading,
    added_up,
    closure,
    feature_direction,
    logit_direction,
    stream_direction,
)
from scfm_circuits.circuits.direct_effects import WholeSum, whole_sums
from scfm_circuits.circuits.frozen import Frozen, freeze
from scfm_circuits.circuits.search import strongest_features
from scfm_circuits.common.intervals import bootstrap_interval
from scfm_circuits.common.randomness import generator
from scfm_circuits.models.mlp_sites import batches, device_of, mask_token, masked_genes
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus

PARTS = ("own token", "own rank", "own features", "other genes", "other genes' ranks",
         "other tokens' features", "special tokens and masks", "errors", "biases, token type")
"""Own: written at the token that is read, and never left it: carried along its stream, or by its
attention to itself. The four that follow came from or by way of other tokens. Errors, what
transcoders miss, and biases came either way; with these a BERT's embedding of a token's type."""
SUM = "sum"
"""What is read itself, as a last row."""
GENE, STATE = "the right gene", "the cell's type"
"""What is read."""
EVERY = "all"
"""In the place of a type: cells of every type."""
LEAST = 5
"""Held-out cells of a type from which on it has rows of its own."""
DIRECTION_CELLS = 600
"""Training cells, evenly spaced in the corpus, from which directions are taken."""
DRAWS = 1000
"""Resamples of cells for an interval."""


class Origins(NamedTuple):
    """Parts of what is read, by cell.

    genes: (n_parts, n_cells), the mean over a cell's asked genes, in logits; states: (n_types,
    n_parts, n_cells), along each type's direction (of length 1). The parts are `PARTS`; ranks are
    NaN in a model that embeds none. closure: the largest |sum - value| over the largest part, of
    all that was read and of each cell's strongest feature in the last layer.
    """

    genes: np.ndarray
    states: np.ndarray
    types: tuple[str, ...]
    closure: float


def frequent_types(labels: np.ndarray, case_type: str) -> tuple[str, ...]:
    """Types of at least `LEAST` of the cells, and the case's, the commonest first."""
    names, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return tuple(str(names[i]) for i in order if counts[i] >= LEAST or names[i] == case_type)


@torch.no_grad()
def origins(model: "PreTrainedModel", transcoders: Transcoders, corpus: "Corpus",
            cells: np.ndarray, types: Sequence[str], seed: int, forward_cells: int) -> Origins:
    """Split what the model says of each cell; two or three short runs a cell.

    seed: of the genes asked. Raises InputError as `freeze`, or for an encoder without a mask.
    """
    directions = type_directions(model, corpus, types, forward_cells)
    genes, states, worst = [], [], 0.0
    for cell in tqdm(cells, desc="parts", unit="cell"):
        one = _of_cell(model, transcoders, corpus, int(cell), directions, seed)
        genes.append(one[0])
        states.append(one[1])
        worst = max(worst, one[2])
    return Origins(np.array(genes).T, np.array(states).transpose(1, 2, 0), tuple(types), worst)


@torch.no_grad()
def type_directions(model: "PreTrainedModel", corpus: "Corpus", types: Sequence[str],
                    forward_cells: int) -> Tensor:
    """(n_types, d_model) of length 1, from the mean of all other training cells to the type's, of
    mean embeddings of genes in the stream that enters the last layer."""
    cells = corpus.training_cells(DIRECTION_CELLS)
    means, layer = [], model.config.num_hidden_layers - 1
    for rows, tokens, mask in batches(corpus, cells, forward_cells, device_of(model)):
        stream = model(input_ids=tokens, attention_mask=mask.long(),
                       output_hidden_states=True).hidden_states[layer]
        inside = torch.from_numpy(corpus.gene[rows, : tokens.shape[1]] >= 0).to(stream)[..., None]
        means.append((stream * inside).sum(dim=1) / inside.sum(dim=1))
    found, labels = torch.cat(means), corpus.labels[cells]
    apart = torch.stack([found[labels == one].mean(dim=0) - found[labels != one].mean(dim=0)
                         for one in types]).nan_to_num()  # a type without a training cell
    return torch.nn.functional.normalize(apart, dim=-1)


def _of_cell(model: "PreTrainedModel", transcoders: Transcoders, corpus: "Corpus", cell: int,
             directions: Tensor, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """A cell's column of `Origins.genes` and of `Origins.states`, and its largest closure."""
    tokens = torch.from_numpy(corpus.tokens[cell][corpus.mask[cell]])
    chosen = masked_genes(corpus, [cell], seed)[0, : len(tokens)]
    genes, places = corpus.gene[cell, : len(tokens)] >= 0, np.flatnonzero(chosen)
    whole = freeze(model, transcoders, tokens)
    if whole.causal:
        asked, known, at = whole, genes, places - 1
    else:
        shown = tokens.masked_fill(torch.from_numpy(chosen), mask_token(corpus))
        asked, known, at = freeze(model, transcoders, shown), genes & ~chosen, places
    guess = added_up([logit_direction(asked, int(tokens[place]), int(before))
                      for place, before in zip(places, at, strict=True)])
    layer, inside = len(whole.weights) - 1, np.flatnonzero(genes)
    states = [added_up([stream_direction(whole, one / len(inside), int(place), layer)
                        for place in inside]) for one in directions]
    gene, gap = _split(asked, [guess], known)
    state, other = _split(whole, states, genes)
    strongest = strongest_features(asked, layer, int(at[0]), 1)
    gaps = [closure(asked, feature_direction(asked, layer, one, int(at[0]))) for one in strongest]
    return gene[0] / len(places), state, max(gap, other, *gaps)


def _split(frozen: Frozen, readings: Sequence[Reading], genes: np.ndarray
           ) -> tuple[np.ndarray, float]:
    """(n_readings, n_parts) `PARTS` of each reading, and how far the worst sum is off. genes:
    (n_pos,) bool, the tokens that are genes and not masked."""
    values, worst = [], 0.0
    for reading, whole, own in zip(readings, whole_sums(frozen, readings),
                                   whole_sums(staying(frozen), readings), strict=True):
        values.append(_parts(whole, own, torch.from_numpy(genes).to(own.leaves.device)))
        scale = max(float(part.abs().max()) for part in whole if part.numel())
        value = float(reading.value)
        worst = max(worst, abs(float(whole.total()) - value) / max(scale, abs(value), 1e-30))
    return np.array(values), worst


def staying(frozen: Frozen) -> Frozen:
    """The run with each token's attention to itself alone: of a reading's sum it has what was
    written at the tokens that are read and never left them. Biases are not to be taken from it."""
    alone = torch.eye(frozen.patterns.shape[-1], device=frozen.patterns.device)
    return replace(frozen, patterns=frozen.patterns * alone.to(frozen.patterns))


def _parts(whole: WholeSum, own: WholeSum, genes: Tensor) -> list[float]:
    carried, genes = whole.leaves - own.leaves, genes[: whole.leaves.shape[1]]
    ranks = len(whole.leaves) > 1
    return [float(one) for one in (
        own.leaves[0].sum(), own.leaves[1].sum() if ranks else np.nan, own.features.sum(),
        carried[0, genes].sum(), carried[1, genes].sum() if ranks else np.nan,
        whole.features.sum() - own.features.sum(), carried[:, ~genes].sum(), whole.errors.sum(),
        whole.constant)]


# --- over cells ----------------------------------------------------------------------------------


def origins_table(found: Origins, labels: np.ndarray, seed: int) -> pd.DataFrame:
    """A row per question, type and part: question, cell_type, cells, part, contribution (in logits,
    or units of the stream), its 95 % interval over resampled cells (lower_95, upper_95), and
    share of the sum of all parts, with share_lower, share_upper: NaN where the sum's interval has
    0, as there is nothing to share. The last row of each is `SUM`.

    Of `GENE` it is the mean over cells. Of `STATE` it is the mean over the type's cells less the
    mean over all others, so what is the same in every cell cancels: the parts of the distance
    between them. labels: (n_cells,) of the cells.
    """
    rows, every = [], np.ones(len(labels), bool)
    for name in (EVERY, *found.types):
        members = every if name == EVERY else labels == name
        rows += _rows(GENE, name, found.genes[:, members], [np.arange(members.sum())], seed)
    for index, name in enumerate(found.types):
        own = labels == name
        weights = np.where(own, len(own) / own.sum(), -len(own) / max(1, (~own).sum()))
        rows += _rows(STATE, name, found.states[index] * weights,
                      [np.flatnonzero(own), np.flatnonzero(~own)], seed, int(own.sum()))
    return pd.DataFrame(rows)


def _rows(question: str, cell_type: str, values: np.ndarray, strata: Sequence[np.ndarray],
          seed: int, cells: int | None = None) -> list[dict[str, object]]:
    """Rows of one question and type. values: (n_parts, n_cells); strata: cells resampled among
    themselves."""
    rng = generator(seed, "resampled cells of parts")
    counts = np.zeros((DRAWS, values.shape[1]))
    for one in strata:
        if len(one):
            counts[:, one] = rng.multinomial(len(one), np.full(len(one), 1 / len(one)), DRAWS)
    given = np.vstack([np.nan_to_num(values), np.nansum(values, axis=0)])
    contribution = bootstrap_interval(given, counts)
    share = bootstrap_interval(given, counts, lambda means: means / means[-1])
    missing = np.append(np.isnan(values).all(axis=1), False)
    nothing = contribution[1][-1] <= 0 <= contribution[2][-1]
    rows = []
    for i, part in enumerate((*PARTS, SUM)):
        numbers = [np.nan if missing[i] else float(one[i]) for one in contribution]
        numbers += [np.nan if missing[i] or nothing else float(one[i]) for one in share]
        rows.append({"question": question, "cell_type": cell_type,
                     "cells": cells or values.shape[1], "part": part, **dict(zip(
                         ("contribution", "lower_95", "upper_95", "share", "share_lower",
                          "share_upper"), numbers, strict=True))})
    return rows
