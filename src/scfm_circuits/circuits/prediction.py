"""Has what was predicted come true? Predicted changes held against measured ones.

A correlation does not say so: predictions of the wrong sign in every cell can correlate with what
was measured, and so can predictions a hundred times too large. `agreement` counts signs and holds
the changes against the line of identity, measured = predicted:

    slope = sum(predicted * measured) / sum(predicted^2)      (1 on the line; through the origin)
    R2    = 1 - sum((measured - predicted)^2) / sum(measured^2)

R2 is 1 on the line and 0 for a prediction no better than that nothing changes; below 0 it is worse.

`predictions` does so for every intervention with a circuit, all of its features at once and one at
a time; `sentences` and `key_point` say what came out.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from scfm_circuits.common.intervals import bootstrap_interval, wilson_interval
from scfm_circuits.common.randomness import generator

DRAWS = 2_000
"""Resamplings of the cells for the intervals of slope and R2."""
HALF = 0.5
"""Share of right signs that a coin has, and R2 from which a prediction holds."""

HOLDS, DIRECTION, FAILED = "holds", "right sign, wrong size", "failed"
"""What a prediction can come to (`Agreement.verdict`)."""
TOGETHER, SINGLE = "all at once", "one at a time"
DONE = {"ablation": "taken away", "doubling": "doubled", "alone": "alone",
        "alone, own kind": "alone, own kind"}
"""Interventions (`interventions.Comparison`) and what a page calls them."""


class Agreement(NamedTuple):
    """How well changes were predicted; every interval is of 95 % and over cells.

    same_sign: share of the predictions with the sign of what was measured, mean over cells, with
    Wilson's interval for so many cells (for several predictions a cell it is wider than need be).
    slope, r2: as in the module's formulas, with percentiles of the resampled cells. pearson: the
    correlation, which is shown to be compared and decides nothing.
    """

    cells: int
    predictions: int
    same_sign: float
    same_sign_low: float
    same_sign_high: float
    slope: float
    slope_low: float
    slope_high: float
    r2: float
    r2_low: float
    r2_high: float
    pearson: float

    @property
    def verdict(self) -> str:
        """By a rule that was made before the result was seen.

        `FAILED` unless the signs are right in more than half, by the whole of their interval;
        `HOLDS` if R2 is above a half as well; between them, `DIRECTION`.
        """
        if not self.same_sign_low > HALF:
            return FAILED
        return HOLDS if self.r2 > HALF else DIRECTION


def agreement(predicted: np.ndarray, measured: np.ndarray, cells: np.ndarray, seed: int
              ) -> Agreement:
    """`Agreement` of (n,) predicted and measured changes; cells: (n,) which cell each is of.

    Changes are in one unit over all cells. One that is 0 has neither sign.
    """
    predicted, measured = (np.asarray(one, float) for one in (predicted, measured))
    names, of = np.unique(np.asarray(cells), return_inverse=True)
    n = len(names)
    right = np.bincount(of, predicted * measured > 0, n) / np.bincount(of, minlength=n)
    sums = np.stack([np.bincount(of, part, n) for part in (
        predicted * measured, predicted**2, (measured - predicted) ** 2, measured**2)])
    drawn = generator(seed, "resampled predictions").multinomial(n, np.full(n, 1 / n), DRAWS)
    # Where all that was predicted or measured is 0 there is no slope or R2.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        line = np.transpose(bootstrap_interval(sums, drawn, _on_the_line))
    varied = len(of) > 1 and predicted.std() > 0 and measured.std() > 0
    pearson = float(np.corrcoef(predicted, measured)[0, 1]) if varied else np.nan
    return Agreement._make([n, len(of), float(right.mean()), *wilson_interval(right.sum(), n),
                            *map(float, line.flat), pearson])


def _on_the_line(means: np.ndarray) -> np.ndarray:
    """Slope and R2, (2, ...), of means over cells, (4, ...): predicted * measured, predicted^2,
    missed^2, measured^2."""
    both, squares, missed, whole = means
    return np.stack([both / squares, 1 - missed / whole])


# --- the predictions of a circuit study ----------------------------------------------------------


def predictions(effects: pd.DataFrame, singles: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A row for each prediction: done (what to the circuit's features), features (`TOGETHER`,
    `SINGLE`), the fields of `Agreement`, verdict.

    effects, singles: those of `studies.CircuitStudy`.
    """
    own = effects[effects["features"] == "circuit"]
    rows = []
    for features, frame in ((TOGETHER, own), (SINGLE, singles)):
        for name, done in DONE.items():
            some = frame[frame["intervention"] == name]
            if len(some):
                found = agreement(some["predicted"].to_numpy(), some["measured"].to_numpy(),
                                  some["cell"].to_numpy(), seed)
                rows.append({"done": done, "features": features, **found._asdict(),
                             "verdict": found.verdict})
    return pd.DataFrame(rows).sort_values(
        "done", key=lambda one: one.map({name: i for i, name in enumerate(DONE.values())}),
        kind="stable", ignore_index=True)


def gone_r2(effects: pd.DataFrame) -> float:
    """R2 of saying of every cell that the target is gone (-1) once its circuit is taken away.

    What the prediction for features taken away all at once has to beat. NaN if nothing changed.
    """
    own = (effects["features"] == "circuit") & (effects["intervention"] == "ablation")
    measured = effects.loc[own, "measured"].to_numpy(float)
    whole = (measured**2).sum()
    return float(1 - ((measured + 1) ** 2).sum() / whole) if whole else np.nan


def key_point(table: pd.DataFrame) -> str:
    """Which of `predictions` hold and which do not, in a sentence."""
    said = []
    for verdict, begins in ((HOLDS, "The prediction holds for features"),
                            (DIRECTION, "It has the right sign and the wrong size for features"),
                            (FAILED, "It failed for features")):
        some = table[table["verdict"] == verdict]
        if len(some):
            said.append(f"{begins} " + ", ".join(f"{row.done} ({row.features})"
                                                 for row in some.itertuples(index=False)) + ".")
    return " ".join(said)
