"""Debugging: a wrong call, the features that made it, and what taking them away repairs and breaks.

Rules, fixed before any result was seen:

1. The case is the held-out cell, among those that are answered wrongly, whose own label has the
   lowest contrast: the wrong call of which the model is surest.
2. The features are those that give the contrast of the answer most, along all paths of the frozen
   model (`direct_effects.total_pulls`), summed over the tokens: as many as together give it all, so
   that without them the call should turn; at most `MOST`.
3. They are taken away wherever they fire, in every held-out cell. Beside them: as many that do the
   same in training cells that are answered wrongly (mean over up to `ERRORS`), and as many random
   ones of the same layers that fire as often and as strongly (`directions.matched`).

A repair that holds for one cell need not be one for others: what counts are right answers before
and after over all other held-out cells, with the exact McNemar test of those that changed. The case
chose its features, so it is told by itself and not counted.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from scfm_circuits.cells.prompts import answered_prompt
from scfm_circuits.circuits.contrast import Scored, answered, contrast_of, contrasts_of
from scfm_circuits.circuits.direct_effects import total_pulls
from scfm_circuits.circuits.directions import matched
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.steering import scaled
from scfm_circuits.circuits.studies import studied_cells
from scfm_circuits.circuits.task_circuit import last_hidden
from scfm_circuits.common.randomness import generator
from scfm_circuits.models.answers import predict_answers
from scfm_circuits.models.known_types import mcnemar_p
from scfm_circuits.models.mlp_sites import batches, device_of, faster_attention, hooked, site_hooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile
    from scfm_circuits.features.statistics import FeatureStatistics
    from scfm_circuits.transcoders.transcoder import Transcoders

CASE, TRAINING, RANDOM = "features of the case", "features of training errors", "random features"
"""What is taken away."""
MOST, ERRORS, DRAWS = 10, 10, 3
"""Features at most; training cells answered wrongly that are looked into; random choices."""
TRAINING_CELLS = 160
"""Training cells that are asked, the same number of every type as far as there are any."""
EVERY = "all labels"

Features = list[tuple[int, int]]
"""(layer, feature) of each."""


@torch.no_grad()
def said_without(model: "PreTrainedModel", transcoders: "Transcoders", corpus: "Corpus",
                 profile: "Profile", cells: np.ndarray, features: Features) -> Scored:
    """What the model says of cells with some features taken away wherever they fire; the values are
    the contrasts of their own labels, in nats."""
    by_layer: dict[int, list[int]] = {}
    for layer, feature in features:
        by_layer.setdefault(layer, []).append(feature)
    edits = {layer: scaled(transcoders, layer, own, 0.0) for layer, own in by_layer.items()}
    contrasts, found = contrasts_of(corpus, profile, cells), []
    with hooked(site_hooks(model, lambda layer, x, y: edits[layer](x, y), edits)), \
            faster_attention(model):
        done = 0
        for rows, tokens, mask in batches(corpus, cells, profile.forward_cells, device_of(model)):
            found.append(answered(model, corpus, rows, tokens, last_hidden(model, tokens, mask),
                                  contrasts[done : done + len(rows)]))
            done += len(rows)
    return Scored(*(np.concatenate(part) for part in zip(*found, strict=True)))


def contributions(model: "PreTrainedModel", transcoders: "Transcoders", corpus: "Corpus",
                  profile: "Profile", cell: int, answer: str) -> tuple[np.ndarray, float]:
    """(n_layers, n_features) what each feature gives the contrast of an answer along all paths of
    the frozen model, summed over the text's tokens; and that contrast, in nats."""
    prompt = answered_prompt(corpus, profile, cell, answer)
    frozen = freeze(model, transcoders, prompt.encoded.tokens)
    reading = contrast_of(corpus, prompt).start(frozen)[1]
    pulls = total_pulls(frozen, reading)
    given = [(z * (pull @ writes.T)).sum(dim=0) for z, pull, writes in
             zip(frozen.activations, pulls, transcoders.W_dec, strict=True)]
    return torch.stack(given).double().cpu().numpy(), float(reading.value)


def strongest(given: np.ndarray, n: int) -> Features:
    """The `n` features that give most, the first of equal ones first; none that gives nothing."""
    order = np.argsort(-given, axis=None, kind="stable")[:n]
    return [(int(layer), int(feature)) for layer, feature in zip(
        *np.unravel_index(order, given.shape), strict=True) if given[layer, feature] > 0]


def enough(given: np.ndarray, contrast: float, most: int = MOST) -> Features:
    """As many of the strongest as together give the contrast; one at least, `most` at most."""
    chosen = strongest(given, most)
    together = np.cumsum([given[one] for one in chosen])
    return chosen[: int(np.searchsorted(together, contrast)) + 1]


# --- the study -----------------------------------------------------------------------------------


class WrongCalls(NamedTuple):
    """The case, and what taking features away does to all other held-out cells."""

    cell: str
    label: str
    answer: str
    """The case's name, its label, and what the model says instead."""
    contrast: float
    by_features: float
    predicted: float
    measured: float
    """Nats: the contrast of the answer in the case; what all features together give it; how taking
    the chosen ones away should change it; and how the contrast of the cell's own label then
    changes, with the opposite sign, which is the same where there are two labels."""
    training_errors: int
    """Training cells answered wrongly that were looked into."""
    features: pd.DataFrame
    """A row for each feature taken away: removed (`CASE`, `TRAINING`), layer, feature, gives (nats
    of the contrast of the wrong answer; of training errors the mean)."""
    table: pd.DataFrame
    """`counted`, of each thing that is taken away."""
    wrong: int
    """Held-out cells that are answered wrongly."""


def wrong_calls(model: "PreTrainedModel", transcoders: "Transcoders", corpus: "Corpus",
                profile: "Profile", statistics: "FeatureStatistics") -> WrongCalls | None:
    """The study; None if no held-out cell is answered wrongly.

    Time: a pass over all held-out cells for each of five sets of features and one without, and one
    over `TRAINING_CELLS`.
    """
    cells = np.flatnonzero(corpus.held_out)
    before = said_without(model, transcoders, corpus, profile, cells, [])
    if before.right.all():
        return None
    case = int(np.where(before.right, np.inf, before.values).argmin())
    cell = int(cells[case])
    [answer] = predict_answers(model, corpus, [cell])
    given, contrast = contributions(model, transcoders, corpus, profile, cell, answer)
    chosen = enough(given, contrast)
    rng = generator(profile.seed, "wrong calls")
    theirs, errors = _of_training(model, transcoders, corpus, profile, rng)
    found = strongest(theirs, len(chosen))
    sets = [(CASE, 0, chosen), *([(TRAINING, 0, found)] if found else [])]
    sets += [(RANDOM, draw, _matched(statistics, chosen, rng)) for draw in range(DRAWS)]
    labels, rows, after = corpus.labels[cells], [], {}
    others = np.arange(len(cells)) != case
    for name, draw, features in tqdm(sets, desc="wrong calls", unit="pass"):
        now = said_without(model, transcoders, corpus, profile, cells, features)
        rows += [{"removed": name, "draw": draw, "features": len(features), **row,
                  "case_right": bool(now.right[case])}
                 for row in counted(labels[others], before.right[others], now.right[others])]
        after[name] = now
    listed = pd.DataFrame(
        [{"removed": name, "layer": layer, "feature": feature,
          "gives": (given if name == CASE else theirs)[layer, feature]}
         for name, _, features in sets if name != RANDOM for layer, feature in features])
    return WrongCalls(
        str(corpus.cell_ids[cell]), str(labels[case]), answer, contrast,
        float(given.sum()), -float(sum(given[one] for one in chosen)),
        float(before.values[case] - after[CASE].values[case]), errors, listed,
        pd.DataFrame(rows), int((~before.right).sum()))


def _of_training(model: "PreTrainedModel", transcoders: "Transcoders", corpus: "Corpus",
                 profile: "Profile", rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """(n_layers, n_features) mean of what features give the wrong answers of training cells, and of
    how many cells; zeros of none.

    Cells are taken in a random order, as many of every type.
    """
    training = rng.permutation(np.flatnonzero(~corpus.held_out))
    some = studied_cells(corpus, TRAINING_CELLS, TRAINING_CELLS, among=training)
    said = said_without(model, transcoders, corpus, profile, some, [])
    wrong = rng.permutation(some[~said.right])[:ERRORS]
    answers = predict_answers(model, corpus, wrong)
    given = [contributions(model, transcoders, corpus, profile, int(cell), answer)[0]
             for cell, answer in zip(wrong, answers, strict=True)]
    return np.mean(given, axis=0) if given else np.zeros(transcoders.b_enc.shape), len(wrong)


def _matched(statistics: "FeatureStatistics", features: Features, rng: np.random.Generator
             ) -> Features:
    found: Features = []
    for layer in sorted({layer for layer, _ in features}):
        own = [feature for one, feature in features if one == layer]
        found += [(layer, feature) for feature in matched(statistics, layer, own, rng)]
    return found


def counted(labels: np.ndarray, before: np.ndarray, after: np.ndarray) -> list[dict[str, Any]]:
    """A row for each label, all first: label, cells, right_before, right_after, repaired (wrong
    before and right after), broken (the reverse), p (`mcnemar_p`).

    labels, before, after: (n_cells,), the latter two whether a cell is answered rightly.
    """
    rows = []
    for label in (EVERY, *np.unique(labels)):
        own = np.ones(len(labels), bool) if label is EVERY else labels == label
        repaired, broken = (int((own & one).sum()) for one in (~before & after, before & ~after))
        rows.append({"label": str(label), "cells": int(own.sum()),
                     "right_before": int(before[own].sum()), "right_after": int(after[own].sum()),
                     "repaired": repaired, "broken": broken, "p": mcnemar_p(repaired, broken)})
    return rows


# --- in words ------------------------------------------------------------------------------------


def what_it_does(study: WrongCalls, removed: str = CASE) -> str:
    """What taking features away does to all held-out cells but the case, in words."""
    rows: Any = study.table[(study.table["removed"] == removed) & (study.table["label"] == EVERY)]
    if not len(rows):
        return "was not done: no training cell that was asked is answered wrongly"
    if len(rows) > 1:
        return (f"repairs {_span(rows['repaired'])} and breaks {_span(rows['broken'])} "
                f"({len(rows)} draws; right answers {_span(rows['right_after'])} of "
                f"{rows['cells'].iloc[0]})")
    row = rows.iloc[0]
    verdict = ("no more than chance does" if row["p"] >= 0.05 else
               "more right answers than before" if row["repaired"] > row["broken"] else
               "fewer right answers than before")
    return (f"repairs {row['repaired']} and breaks {row['broken']} (right answers "
            f"{row['right_before']} before, {row['right_after']} after, of {row['cells']}; "
            f"p = {row['p']:.2g}: {verdict})")


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
