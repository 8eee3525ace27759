"""Figures of steering: curves along the dose, and held-out concept scores."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from scfm_circuits.circuits.steering import BEST, BY_EFFECT, GRADIENT, MEANS, RANDOM
from scfm_circuits.circuits.steering_curves import ADDED
from scfm_circuits.features.concepts import EVERY, FEATURES
from scfm_circuits.report.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    legend_below,
    literal,
    panels,
)

_COLOURS = {BY_EFFECT: BLUE, GRADIENT: RED, BEST: GREEN, MEANS: ORANGE, RANDOM: GREY}


def steering_curves(curve: pd.DataFrame, label: str) -> Figure:
    """What pushes do along the dose: to the contrast, to the calls and to the loss.

    curve: `steering_curves.curve`. Bands are 95 % intervals over cells, thin lines the lowest and
    highest seed or draw. A dose below 0 pushes away from the label.
    """
    figure, axes = panels(3, width=3.5, height=3.5)
    pushes = curve[(curve["done"] == ADDED) & (curve["arm"] != "nothing")]
    for arm in dict.fromkeys(pushes["arm"]):
        # Its orange and the gradient's red are alike in the dark mode.
        colour, line = _COLOURS.get(arm, PURPLE), "s--" if arm == MEANS else "o-"
        rows = pd.concat([curve[curve["arm"] == "nothing"], pushes[pushes["arm"] == arm]])
        rows = rows.sort_values("dose")
        for axis, (value, low, high) in zip(axes[::2], (
                ("change", "lower_95", "upper_95"), ("cost", "cost_lower_95", "cost_upper_95")),
                strict=True):
            axis.plot(rows["dose"], rows[value], line, color=colour, markersize=4, label=arm)
            axis.fill_between(rows["dose"], rows[low], rows[high], color=colour, alpha=0.2,
                              linewidth=0)
        axes[0].vlines(rows["dose"], rows["lowest"], rows["highest"], color=colour, linewidth=1)
        axes[1].plot(rows["dose"], rows["called"], line, color=colour, markersize=4)
        axes[1].fill_between(rows["dose"], rows["called_lower_95"], rows["called_upper_95"],
                             color=colour, alpha=0.1, linewidth=0)
    for axis in axes:
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set(xlabel="norm of the push (0: none)")
    axes[0].axhline(0, color="black", linewidth=0.6)
    axes[0].set(ylabel="nats gained", title=f"log-odds of {literal(label, 24)}")
    axes[1].set(ylabel="% of the cells", ylim=(-3, 103), title="called so")
    axes[2].set(ylabel="nats per token of a gene", title="what it costs")
    legend_below(figure, 3)
    return figure


def concept_scores(table: pd.DataFrame) -> Figure:
    """Held-out F1 of the best unit of every kind, a row for each concept.

    table: `concepts.ConceptScores.table`. Lines are 95 % intervals over cells; a black bar is what
    saying yes to everything scores.
    """
    concepts = list(dict.fromkeys(table["concept"]))
    kinds = [kind for kind in dict.fromkeys(table["units"]) if kind != EVERY]
    colours: dict[str, Any] = dict(zip(kinds, (BLUE, GREY, PURPLE, ORANGE, GREEN), strict=True))
    figure, axis = plt.subplots(figsize=(8.6, 1.2 + 0.62 * len(concepts)),
                                constrained_layout=True)
    shift = np.linspace(-0.3, 0.3, len(kinds))
    for at, concept in enumerate(concepts):
        own = table[table["concept"] == concept].set_index("units")
        axis.vlines(own["always_yes"].iloc[0], at - 0.4, at + 0.4, color="black", linewidth=2,
                    label="" if at else "yes everywhere")
        for kind, up in zip(kinds, shift, strict=True):
            row = own.loc[kind]
            axis.hlines(at + up, row["lower_95"], row["upper_95"], color=colours[kind])
            axis.plot(row["f1"], at + up, "D" if kind == FEATURES else "o", color=colours[kind],
                      markersize=5, label=None if at else kind)
    axis.set(xlim=(-0.02, 1.02), xlabel="F1 on held-out cells")
    axis.set_yticks(range(len(concepts)), [literal(concept, 48) for concept in concepts])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    legend_below(figure, 3)
    return figure
