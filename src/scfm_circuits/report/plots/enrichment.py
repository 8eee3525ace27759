"""Figures of enrichment: Table 4 beside its controls."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from scfm_circuits.report.plots.style import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    literal,
    panels,
    ticks,
)

_RULE_TITLES = {"enrichr": "rule enrichr (the paper's, likely)", "corpus": "rule corpus",
                "gseapy": "rule gseapy"}

_CONTROL_COLOURS = {"uniform": GREY, "frequency-matched": GREEN, "token-preserving": ORANGE,
                    "untrained encoder": PURPLE, "re-initialised model": BROWN}


def share_with_controls(frame: pd.DataFrame, paper: np.ndarray | None = None) -> Figure:
    """Share called interpretable per layer, features beside their controls, one panel a rule.

    frame: columns rule, lists, layer, percentage, lower_95, upper_95. Null lists are bands, the
    baselines' features points with intervals. paper: the paper's percentages, drawn in the panel of
    the rule `enrichr` at the same relative depth.
    """
    rules = list(dict.fromkeys(frame["rule"]))
    figure, axes = panels(len(rules), width=4.4, height=4.6)
    n_layers = int(frame["layer"].max()) + 1
    kinds = [kind for kind in dict.fromkeys(frame["lists"]) if kind != "features"]
    for axis, rule in zip(axes, rules, strict=True):
        part = frame[frame["rule"] == rule]
        for place, kind in enumerate(kinds):
            rows = part[part["lists"] == kind].sort_values("layer")
            layer, middle = rows["layer"].to_numpy(), rows["percentage"].to_numpy()
            low, high = rows["lower_95"].to_numpy(), rows["upper_95"].to_numpy()
            colour = _CONTROL_COLOURS.get(kind, RED)
            if kind in ("uniform", "frequency-matched", "token-preserving"):
                axis.fill_between(layer, low, high, color=colour, alpha=0.35, linewidth=0)
                axis.plot(layer, middle, color=colour, linewidth=1.5, label=literal(kind))
            else:
                # Points of different baselines stand side by side.
                axis.errorbar(layer + 0.12 * (place - 3.5), middle, color=colour, capsize=2,
                              yerr=np.abs([middle - low, high - middle]), label=literal(kind),
                              fmt="^" if kind == "untrained encoder" else "v", markersize=5)
        own = part[part["lists"] == "features"].sort_values("layer")
        axis.plot(own["layer"], own["percentage"], "o-", color=BLUE, linewidth=2.5, zorder=5,
                  label="features of this run")
        if paper is not None and rule == "enrichr":
            axis.plot(np.linspace(0, n_layers - 1, len(paper)), paper, ":", color="black",
                      linewidth=1.2, label="the paper (24 layers, relative depth)")
        axis.set(title=_RULE_TITLES.get(rule, literal(rule)), xlabel="layer", ylim=(-3, 105),
                 xticks=ticks(n_layers))
    axes[0].set_ylabel("lists called interpretable (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def beyond_controls(layers: Sequence[int], called: Mapping[str, Sequence[float]]) -> Figure:
    """Percentage of live features left, layer by layer, as the demands grow.

    called: percentages per layer by demand, the least demanding first.
    """
    figure, (axis,) = panels(1, width=7.5, height=3.8)
    colours = sns.light_palette(BLUE, len(called) + 1)[1:]
    width = 0.8 / len(called)
    for place, ((label, values), colour) in enumerate(zip(called.items(), colours, strict=True)):
        bars = axis.bar(np.asarray(layers) + (place - (len(called) - 1) / 2) * width, values, width,
                        color=colour, label=literal(label))
        if len(layers) <= 8:
            axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
    axis.set(xlabel="layer", ylabel="% of live features", ylim=(0, 110), xticks=list(layers))
    axis.grid(axis="x", visible=False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
