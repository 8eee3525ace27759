"""What few features leave of a task: the curves of `task_circuit`, and what is said of them.

Two measures. *Right answers*: of those that the original model gives, how many stay right; what
none of the features keeps needs no feature. *Contrast*: of what all features add to the contrast of
the call (in nats, mean over cells) over none, how much some of them win back; it still tells
circuits apart where few answers change.
"""

from typing import Any

import numpy as np
import pandas as pd

from scfm_circuits.circuits.task_circuit import (
    ALL,
    CHOSEN_BY,
    DRAWS,
    INFLUENCE,
    MEAN,
    NONE,
    RANDOM,
    SHARES,
    ZERO,
    TaskCircuit,
)
from scfm_circuits.common.intervals import bootstrap_interval, percentage
from scfm_circuits.common.randomness import generator

RIGHT, CONTRAST = "right answers", "contrast"
"""What is kept."""
RESAMPLED = 2_000
"""Resamplings of the cells for the intervals of differences."""


def curve(found: TaskCircuit) -> pd.DataFrame:
    """A row for each setting: chosen (by `CHOSEN_BY`, or what stands beside them), others (where
    the other features stand), draw, share (of the firing features), features_kept (how many);
    cells, right, percentage, lower_95, upper_95 (Wilson); kept: of the answers that the original
    model gives rightly, the percentage that is right still, with kept_lower_95 and kept_upper_95;
    contrast: its mean over cells in nats.
    """
    before, rows = found.right[0], []
    for setting, right, contrast in zip(found.settings, found.right, found.contrast, strict=True):
        rows.append({
            "chosen": setting.chosen, "others": setting.baseline, "draw": setting.draw,
            "share": setting.share, "features_kept": setting.features, "cells": len(right),
            "right": int(right.sum()), **percentage("percentage", right, ""),
            **percentage("kept", right[before]), "contrast": float(contrast.mean())})
    return pd.DataFrame(rows)


def compare_choices(found: TaskCircuit, seed: int) -> pd.DataFrame:
    """A row for each measure, baseline and choice: what is kept, mean over `SHARES` and draws.

    Columns: kept (measure), others (where the other features stand), chosen, percentage, lowest and
    highest (over draws), difference (what features chosen by influence keep less that, in points)
    with lower_95 and upper_95 over resampled cells, of several draws the outermost. Missing where
    there is nothing to keep: no right answer of the original model, or no contrast that all
    features add.
    """
    rows = []
    for others in (MEAN, ZERO):
        at = {(one.chosen, one.draw, one.share): row for row, one in enumerate(found.settings)
              if one.baseline == others}
        none, everything = (found.contrast[at[name, 0, share]]
                            for name, share in ((NONE, 0.0), (ALL, 1.0)))
        right = found.right[:, found.right[0]]
        for kept, values, base, whole in (
                (RIGHT, right.astype(float), 0.0, np.ones(right.shape[1])),
                (CONTRAST, found.contrast, none, everything - none)):
            by_draw = {name: np.array([
                np.mean([values[at[name, draw, share]] - base for share in SHARES], axis=0)
                for draw in range(DRAWS if name == RANDOM else 1)]) for name in CHOSEN_BY}
            rows += [{"kept": kept, "others": others, **row}
                     for row in _beside_influence(by_draw, whole, seed)]
    return pd.DataFrame(rows)


def _beside_influence(by_draw: dict[str, np.ndarray], whole: np.ndarray, seed: int
                      ) -> list[dict[str, Any]]:
    """Percentages of `whole`, (n_cells,), that each choice keeps; by_draw: (n_draws, n_cells)."""
    n, columns = len(whole), ("percentage", "lowest", "highest", "difference", "lower_95",
                              "upper_95")
    if not n or whole.mean() <= 0:
        return [{"chosen": name, **dict.fromkeys(columns, np.nan)} for name in by_draw]
    # All choices are held against each other on the same resampled cells.
    drawn = generator(seed, "task circuit", 1 + DRAWS).multinomial(n, np.full(n, 1 / n), RESAMPLED)
    rows = []
    for name, each in by_draw.items():
        draws = 100 * each.mean(axis=1) / whole.mean()
        # Draws can be further apart than cells tell: what is ahead has to be so in each of them.
        ahead, low, high = np.transpose([bootstrap_interval(
            np.stack([by_draw[INFLUENCE][0] - one, whole]), drawn, _percentage_of_whole)
            for one in each])
        rows.append({"chosen": name, **dict(zip(columns, (
            draws.mean(), draws.min(), draws.max(), ahead.mean(), low.min(), high.max()),
            strict=True))})
    return rows


def _percentage_of_whole(means: np.ndarray) -> np.ndarray:
    part, whole = means
    return 100 * part / np.maximum(whole, 1e-30)


# --- in words ------------------------------------------------------------------------------------


def fewest(table: pd.DataFrame, others: str, enough: float = 90.0) -> str:
    """The smallest circuit of `curve` that keeps `enough` percent of right answers, in words."""
    rows = table[(table["chosen"] == INFLUENCE) & (table["others"] == others)
                 & (table["kept"] >= enough)]
    if not len(rows):
        return f"no circuit of up to {100 * max(SHARES):.0f} % of them keeps {enough:.0f} %"
    row: Any = rows.sort_values("features_kept", kind="stable").iloc[0]
    return (f"{row['features_kept']:,} of them ({100 * row['share']:.1f} %) keep "
            f"{row['kept']:.0f} % ({row['kept_lower_95']:.0f} to {row['kept_upper_95']:.0f})")
