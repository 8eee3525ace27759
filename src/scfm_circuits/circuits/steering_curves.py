"""What steering does and costs: its curves, and arms compared at equal norm and at equal cost.

Effects are of the label's contrast, in nats: the mean over cells of what it gains. The cost is what
the loss on the tokens of genes gains, in nats per token. Intervals are over resampled cells (an
arm's mean over seeds and draws, cell by cell); they know nothing of the draws of training cells,
which choose other directions. So beside them stand the lowest and highest seed or draw, and one arm
counts as ahead of another only if it is so by its whole interval and in every draw.

At equal norm: all arms at `NORM`. At equal cost: along the doses of one sign the first place where
the cost reaches `COST` is found between two doses, on the straight line between them; an arm that
never costs as much is read at its last dose, and marked.
"""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from scfm_circuits.circuits.steering import BY_EFFECT, SteeringStudy
from scfm_circuits.common.intervals import bootstrap_interval, percentage
from scfm_circuits.common.randomness import generator

NORM, COST = 1.0, 0.1
"""The dose, and the nats per token of a gene, at which arms are compared."""
RESAMPLED = 2_000
"""Resamplings of the cells for intervals."""
ADDED, TAKEN_AWAY = "pushed", "taken away"


class Arm(NamedTuple):
    """One arm at one dose: (n_runs, n_cells) of each seed and draw, less what was before. seeds:
    (n_runs,)."""

    arm: str
    dose: float
    seeds: np.ndarray
    contrast: np.ndarray
    loss: np.ndarray
    called: np.ndarray
    right: np.ndarray
    no_label: np.ndarray
    norm: float
    typical: float


def arms_of(study: SteeringStudy) -> list[Arm]:
    """The study's settings by arm and dose, the doses from low to high, `TAKEN_AWAY` (dose missing)
    last."""
    found, keys = [], [(one.arm, one.dose) for one in study.settings]
    doses = sorted({dose for _, dose in keys if not np.isnan(dose)})
    for arm in dict.fromkeys(name for name, _ in keys):
        for dose in (*doses, np.nan):
            rows = [at for at, (name, own) in enumerate(keys)
                    if name == arm and (own == dose or (np.isnan(own) and np.isnan(dose)))]
            if not rows:
                continue
            now, before = study.readings, study.before
            settings = [study.settings[at] for at in rows]
            found.append(Arm(
                arm, dose, np.array([one.seed for one in settings]),
                now.contrast[rows] - before.contrast, now.loss[rows] - before.loss,
                now.contrast[rows] > 0, now.right[rows], now.no_label[rows],
                float(np.mean([one.norm for one in settings])),
                float(np.mean([one.typical for one in settings]))))
    return found


def curve(study: SteeringStudy, seed: int) -> pd.DataFrame:
    """A row for each arm and dose, means over seeds and draws.

    Columns: arm, done (`ADDED`, `TAKEN_AWAY`), dose, norm, typical (the push in units of what the
    arm's features typically write), runs (seeds and draws), cells; change of the contrast in nats
    with lower_95, upper_95 (over cells), lowest, highest (over runs); to_label: of the cells that
    were not called by the label, the percentage that now are, and from_label: of those that were,
    the percentage that no longer are; called: of all; each with Wilson's interval; own_right,
    others_right: percentage of the label's cells, and of all others, that are answered rightly;
    no_label: percentage of answers that begin like no label; cost (nats per token of a gene) with
    cost_lower_95, cost_upper_95. The first row is the model as it is.
    """
    drawn = _resampled(study, seed)
    own, called = study.labels == study.label, study.before.contrast[0] > 0
    zero = np.zeros_like(study.before.contrast)
    nothing = Arm("nothing", 0.0, np.zeros(1), zero, zero, called[None], study.before.right,
                  study.before.no_label, 0.0, np.nan)
    rows = []
    for one in (nothing, *arms_of(study)):
        change, low, high = bootstrap_interval(one.contrast.mean(axis=0), drawn)
        cost, cost_low, cost_high = bootstrap_interval(one.loss.mean(axis=0), drawn)
        by_run = one.contrast.mean(axis=1)
        rows.append({
            "arm": one.arm, "done": TAKEN_AWAY if np.isnan(one.dose) else ADDED, "dose": one.dose,
            "norm": one.norm, "typical": one.typical, "runs": len(one.contrast),
            "cells": one.contrast.shape[1], "change": change, "lower_95": low, "upper_95": high,
            "lowest": by_run.min(), "highest": by_run.max(),
            **percentage("to_label", one.called[:, ~called]),
            **percentage("from_label", ~one.called[:, called]),
            **percentage("called", one.called), **percentage("own_right", one.right[:, own]),
            **percentage("others_right", one.right[:, ~own]),
            **percentage("no_label", one.no_label), "cost": cost, "cost_lower_95": cost_low,
            "cost_upper_95": cost_high})
    return pd.DataFrame(rows)


def _resampled(study: SteeringStudy, seed: int) -> np.ndarray:
    n = len(study.labels)
    return generator(seed, "resampled steering").multinomial(n, np.full(n, 1 / n), RESAMPLED)


# --- compared ------------------------------------------------------------------------------------


def compared(study: SteeringStudy, seed: int) -> pd.DataFrame:
    """A row for each direction of the push, way to compare, and arm.

    Columns: pushed (towards or away), compared (`equal norm`, `equal cost`), arm; effect (nats
    towards what was wanted) with lower_95, upper_95, and lowest, highest (of any one seed or draw);
    difference (what the feature by effect does more) with difference_lower_95, difference_upper_95,
    on the same resampled cells, and difference_lowest, difference_highest (against the feature by
    effect of the same seed); dose where it is read (for the cells as they are), cost there, and
    reached (whether the arm costs as much).
    """
    drawn, arms = _resampled(study, seed), arms_of(study)
    counts = np.concatenate([np.ones((1, drawn.shape[1])), drawn]) / drawn.shape[1]
    names, rows = list(dict.fromkeys(one.arm for one in arms)), []
    for pushed, sign in (("towards", 1.0), ("away", -1.0)):
        along = {name: sorted((one for one in arms if one.arm == name and sign * one.dose > 0),
                              key=lambda one: abs(one.dose)) for name in names}
        for how in ("equal norm", "equal cost"):
            found = {name: _read_at(how, steps, sign, counts) for name, steps in along.items()}
            by_run = {name: _by_run(how, steps, sign) for name, steps in along.items()}
            for name in names:
                effect, dose, cost, reached = found[name]
                ahead = found[BY_EFFECT][0] - effect
                apart = [best - one for seed, one in by_run[name]
                         for other, best in by_run[BY_EFFECT] if other == seed]
                runs = [one for _, one in by_run[name]]
                rows.append({
                    "pushed": pushed, "compared": how, "arm": name, "effect": effect[0],
                    **_ends("lower_95", "upper_95", effect), "lowest": min(runs),
                    "highest": max(runs), "difference": ahead[0],
                    **_ends("difference_lower_95", "difference_upper_95", ahead),
                    "difference_lowest": min(apart), "difference_highest": max(apart),
                    "dose": dose, "cost": cost, "reached": reached})
    return pd.DataFrame(rows)


def _ends(low: str, high: str, values: np.ndarray) -> dict[str, float]:
    return dict(zip((low, high), np.percentile(values[1:], [2.5, 97.5]), strict=True))


def _read_at(how: str, steps: list[Arm], sign: float, counts: np.ndarray
             ) -> tuple[np.ndarray, float, float, bool]:
    """(n_resamples,) effects towards what is wanted, and of the cells as they are the dose, the
    cost and whether the cost is reached. counts: (n_resamples, n_cells), rows sum to 1."""
    doses = np.array([0.0, *(abs(one.dose) for one in steps)])
    effects, costs = (np.stack([np.zeros(len(counts)), *(
        counts @ getattr(one, name).mean(axis=0) for one in steps)], axis=1)
        for name in ("contrast", "loss"))
    if how == "equal norm":
        at, reached = np.full(len(counts), NORM), np.ones(len(counts), bool)
    else:
        at, reached = crossing(doses, costs, COST)
    effect = sign * np.array([np.interp(x, doses, row) for x, row in
                              zip(at, effects, strict=True)])
    return effect, float(sign * at[0]), float(np.interp(at[0], doses, costs[0])), bool(reached[0])


def _by_run(how: str, steps: list[Arm], sign: float) -> list[tuple[int, float]]:
    """Seed and effect, as `_read_at` reads it, of each run."""
    n = steps[0].contrast.shape[1]
    found = []
    for run, seed in enumerate(steps[0].seeds.tolist()):
        alone = [one._replace(contrast=one.contrast[[run]], loss=one.loss[[run]]) for one in steps]
        found.append((seed, float(_read_at(how, alone, sign, np.full((1, n), 1 / n))[0][0])))
    return found


def crossing(doses: np.ndarray, costs: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """(n,) the dose where each row of costs (n, n_doses) first reaches a level, on straight lines
    between doses (ascending), and whether it does; the last dose where it does not."""
    above = costs >= level
    reached, first = np.asarray(above.any(axis=1)), above.argmax(axis=1)
    at = np.where(reached, doses[first], doses[-1]).astype(float)
    rows = np.flatnonzero(reached & (first > 0))
    left, right = first[rows] - 1, first[rows]
    part = (level - costs[rows, left]) / (costs[rows, right] - costs[rows, left])
    at[rows] = doses[left] + part * (doses[right] - doses[left])
    return at, reached


# --- in words ------------------------------------------------------------------------------------


def effects(table: pd.DataFrame, pushed: str, how: str) -> dict[str, str]:
    """By arm its effect with the interval, in words; table: `compared`."""
    rows: Any = table[(table["pushed"] == pushed) & (table["compared"] == how)]
    return {row["arm"]: _nats(row) for _, row in rows.iterrows()}


def beside(table: pd.DataFrame, pushed: str, how: str, arm: str) -> str:
    """The feature by effect beside an arm, in words; table: `compared`. It is ahead or behind only
    by the whole interval and in every draw."""
    rows: Any = table[(table["pushed"] == pushed) & (table["compared"] == how)].set_index("arm")
    row = rows.loc[arm]
    verdict = ("more than" if min(row["difference_lower_95"], row["difference_lowest"]) > 0 else
               "less than" if max(row["difference_upper_95"], row["difference_highest"]) < 0 else
               "not clearly other than")
    return (f"{verdict} the {arm} (difference {row['difference']:.2f} nats, "
            f"{row['difference_lower_95']:.2f} to {row['difference_upper_95']:.2f} over cells, "
            f"{row['difference_lowest']:.2f} to {row['difference_highest']:.2f} over draws)")


def _nats(row: Any) -> str:
    return (f"{row['effect']:.2f} nats ({row['lower_95']:.2f} to {row['upper_95']:.2f} over cells, "
            f"{row['lowest']:.2f} to {row['highest']:.2f} over draws)")
