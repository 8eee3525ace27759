"""Figures of enrichment: Table 4 beside its controls."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from scfm_circuits.common.profile import Profile
from scfm_circuits.report.plots.style import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    legend_below,
    literal,
    panels,
    ticks,
)

_RULE_TITLES = {"enrichr": "rule enrichr\n(the paper's, likely)", "corpus": "rule corpus",
                "gseapy": "rule gseapy"}

_CONTROL_COLOURS = {"uniform": GREY, "frequency-matched": GREEN, "token-preserving": ORANGE,
                    "untrained encoder": PURPLE, "re-initialised model": BROWN,
                    "MLP neurons": RED, "principal components": "black"}
_NULL_LISTS = {"uniform": "random genes", "frequency-matched": "genes as common",
               "token-preserving": "random tokens"}
"""Null lists as the page calls them."""
_MARKERS = {"untrained encoder": "^", "re-initialised model": "v", "MLP neurons": "s",
            "principal components": "D"}


def share_with_controls(frame: pd.DataFrame, joint: pd.DataFrame,
                        paper: np.ndarray | None = None) -> Figure:
    """Share called interpretable per layer, features beside all other lists, one panel a choice.

    frame: columns gene_rule, rule, lists, layer, percentage, lower_95, upper_95; null lists are
    thin lines, other features points with intervals. joint: columns gene_rule, lists, layer,
    lower_95, upper_95; the trained features' band under relabelled genes, drawn where the rule is
    `corpus`. paper: the paper's percentages, drawn under the rule `enrichr` at the same relative
    depth.
    """
    choices = list(dict.fromkeys(zip(frame["gene_rule"], frame["rule"], strict=True)))
    figure, axes = panels(len(choices), width=3.4, height=4.6)
    n_layers = int(frame["layer"].max()) + 1
    for axis, (gene_rule, rule) in zip(axes, choices, strict=True):
        part = frame[(frame["gene_rule"] == gene_rule) & (frame["rule"] == rule)]
        if rule == "corpus":
            band = joint[(joint["gene_rule"] == gene_rule) & (joint["lists"] == "features")
                         & joint["layer"].isin(range(n_layers))].sort_values("layer")
            axis.fill_between(band["layer"].to_numpy(int), band["lower_95"], band["upper_95"],
                              color=BLUE, alpha=0.2, linewidth=0,
                              label="the same lists, genes relabelled (95 %)")
        _kinds(axis, part)
        if paper is not None and rule == "enrichr":
            axis.plot(np.linspace(0, n_layers - 1, len(paper)), paper, ":", color="black",
                      linewidth=1.2, label="the paper (24 layers, relative depth)")
        axis.set(title=_RULE_TITLES.get(rule, literal(rule)) + f"\ngenes by {literal(gene_rule)}",
                 xlabel="layer", ylim=(-3, 105), xticks=ticks(n_layers))
    axes[0].set_ylabel("lists called interpretable (%)")
    legend_below(figure, 3)
    return figure


def table4_with_nulls(shares: pd.DataFrame, profile: Profile,
                      paper: np.ndarray | None = None) -> Figure:
    """Table 4 as one picture: the share called interpretable by layer, beside what it has to beat.

    shares: as for `share_with_controls`, of which the rows of the profile's two rules are drawn. A
    band goes from the lowest to the highest of its kinds, with their intervals. paper: its
    percentages, drawn at the same relative depth.
    """
    own = shares[(shares["gene_rule"] == profile.gene_rule)
                 & (shares["rule"] == profile.enrichment_rule)]
    figure, (axis,) = panels(1, width=6.5, height=4)
    n_layers = int(own["layer"].max()) + 1
    random = [kind for kind in _CONTROL_COLOURS if kind not in _MARKERS]
    for kinds, colour, label in (
            (random, GREY, "lists of random genes or tokens"),
            (list(_MARKERS), ORANGE, "untrained features, neurons, components")):
        band = own[own["lists"].isin(kinds)].groupby("layer")
        axis.fill_between(sorted(own["layer"].unique()), band["lower_95"].min(),
                          band["upper_95"].max(), color=colour, alpha=0.35, linewidth=0,
                          label=label)
    if paper is not None:
        axis.plot(np.linspace(0, n_layers - 1, len(paper)), paper, "--", color="black",
                  linewidth=1.5, label=f"the paper, {len(paper)} layers")
    features = own[own["lists"] == "features"].sort_values("layer")
    axis.plot(features["layer"], features["percentage"], "o-", color=BLUE, linewidth=2.5,
              label="features of this run")
    axis.axhline(80, color="0.4", linewidth=0.8)
    axis.text(n_layers - 1, 78.5, "80 %: the paper's claim", va="top", ha="right", fontsize=11,
              color="0.2")
    at = "" if paper is None else " (the paper's at the same relative depth)"
    axis.set(xlabel=f"layer{at}", ylabel="lists called interpretable (%)", ylim=(0, 103),
             xticks=ticks(n_layers))
    legend_below(figure, 2, fontsize=11)
    return figure


def _kinds(axis: Axes, part: pd.DataFrame) -> None:
    """One panel's lines and points, the trained features last."""
    kinds = [kind for kind in dict.fromkeys(part["lists"]) if kind != "features"]
    for place, kind in enumerate(kinds):
        rows = part[part["lists"] == kind].sort_values("layer")
        layer, middle = rows["layer"].to_numpy(), rows["percentage"].to_numpy()
        colour = _CONTROL_COLOURS.get(kind, RED)
        if kind not in _MARKERS:
            axis.plot(layer, middle, color=colour, linewidth=1.5,
                      label=literal(_NULL_LISTS.get(kind, kind)))
            continue
        # Points of different kinds stand side by side.
        around = np.abs([middle - rows["lower_95"], rows["upper_95"] - middle])
        axis.errorbar(layer + 0.12 * (place - 4.5), middle, color=colour, capsize=2, yerr=around,
                      label=literal(kind), fmt=_MARKERS[kind], markersize=5)
    own = part[part["lists"] == "features"].sort_values("layer")
    axis.plot(own["layer"], own["percentage"], "o-", color=BLUE, linewidth=2.5, zorder=5,
              label="features of this run")


def beyond_controls(layers: Sequence[int], called: Mapping[str, Sequence[float]], fdr: float
                    ) -> Figure:
    """Percentage of live features left, layer by layer, as the demands grow.

    called: percentages per layer by demand, the least demanding first. fdr: the level, of which a
    line says what luck gives uncorrected.
    """
    figure, (axis,) = panels(1, width=7.5, height=3.8)
    colours = sns.light_palette(BLUE, len(called) + 1)[1:]
    width = 0.8 / len(called)
    for place, ((label, values), colour) in enumerate(zip(called.items(), colours, strict=True)):
        bars = axis.bar(np.asarray(layers) + (place - (len(called) - 1) / 2) * width, values, width,
                        color=colour, label=literal(label))
        if len(layers) <= 8:
            axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=9, zorder=3,
                           path_effects=[withStroke(linewidth=3, foreground="white")])
    axis.axhline(100 * fdr, color="black", linewidth=1, linestyle="dotted",
                 label=f"{100 * fdr:g} %: luck at most, uncorrected")
    axis.set(xlabel="layer", ylabel="% of live features", ylim=(0, 110), xticks=list(layers))
    axis.grid(axis="x", visible=False)
    legend_below(figure, 2)
    return figure
