"""Figures of features: L0, frequencies (the paper's Figures 2 and 3), and scores."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from scfm_circuits.features.known_truth import ALWAYS, TRANSCODERS
from scfm_circuits.features.unit_scores import AUROC, F1
from scfm_circuits.interpretability.deck import FEATURE, RANDOM, UNTRAINED
from scfm_circuits.interpretability.scores import EITHER, FAMILY, GENE, NONE, SUB_WORD
from scfm_circuits.report.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    legend_below,
    panels,
    ticks,
)

SHOWN = {GENE: BLUE, FAMILY: GREEN, EITHER: PURPLE, SUB_WORD: ORANGE, NONE: GREY}
"""Verdicts in the order in which bars are stacked, with their colours."""


def explained_per_layer(shares: pd.DataFrame) -> Figure:
    """Shares of the verdicts by layer, for features and both kinds of decoys.

    shares: from `scores.verdict_shares`.
    """
    sources = [FEATURE, UNTRAINED, RANDOM]
    by_layer = shares[shares["layer"] != "all"]
    n_layers = by_layer["layer"].nunique()
    figure, axes = panels(len(sources), width=max(3.2, 0.32 * n_layers))
    for axis, source in zip(axes, sources, strict=True):
        part = by_layer[by_layer["source"] == source]
        bottom = np.zeros(len(part))
        for verdict, colour in SHOWN.items():
            height = 100 * part[verdict].fillna(0).to_numpy(float)
            axis.bar(part["layer"].astype(int), height, bottom=bottom, color=colour, label=verdict,
                     width=0.8)
            bottom += height
        axis.set(title={FEATURE: "live features"}.get(source, source), xlabel="layer",
                 ylim=(0, 100))
        axis.grid(axis="x", visible=False)
    axes[0].set(ylabel="% of those with a verdict")
    for axis in axes[1:]:
        axis.set(yticklabels=[])
    legend_below(figure, 5)
    return figure


def prediction_by_kind(features: pd.DataFrame, decoys: pd.DataFrame) -> Figure:
    """How well each kind of explanation predicts held-out mentions: share of features above an F1.

    features, decoys: from `scores`.
    """
    figure, axes = panels(3, width=3.4)
    levels = np.linspace(0, 1, 101)
    sources = [(FEATURE, features, BLUE), *((name, decoys[decoys["source"] == name], colour)
               for name, colour in ((UNTRAINED, ORANGE), (RANDOM, GREY)))]
    for axis, (kind, title) in zip(axes, {"gene": "genes", "family": "families",
                                          "token": "sub-words"}.items(), strict=True):
        for name, frame, colour in sources:
            f1 = frame[f"{kind}_f1"].dropna().to_numpy()
            if len(f1):
                axis.plot(levels, [100 * (f1 >= level).mean() for level in levels], color=colour,
                          label={FEATURE: "live features"}.get(name, name))
        axis.set(title=f"up to three {title}", xlabel="F1 on held-out cells of at least",
                 xlim=(0, 1), ylim=(0, 100))
    axes[0].set(ylabel="% of features")
    legend_below(figure, 3)
    return figure


def l0_per_layer(mean: np.ndarray, quantiles: np.ndarray,
                 printed: tuple[float, float, float, float] | None = None) -> Figure:
    """Figure 2: mean active features per token, with the 10 and 90 % quantiles over tokens.

    mean: (n_layers,); quantiles: (n_layers, n). printed: what the paper's tables imply for one of
    its layers: the layer's relative depth from 0 to 1, the L0, and the ends of its interval.
    """
    figure, (axis,) = panels(1, width=6.5)
    layers = np.arange(len(mean))
    axis.fill_between(layers, quantiles[:, 0], quantiles[:, -1], color=BLUE, alpha=0.2,
                      label="10 to 90 % of tokens")
    axis.plot(layers, mean, "o-", color=BLUE, label="mean of this run")
    if printed is not None:
        depth, value, low, high = printed
        axis.errorbar(depth * layers[-1], value, yerr=[[value - low], [high - value]], fmt="D",
                      color="black", capsize=4, label="the paper's layer 12, from its tables")
    axis.set(xlabel="layer", ylabel="active features\nper token (L0)", ylim=(0, None),
             xticks=ticks(len(mean)))
    legend_below(figure, 2, fontsize=11)
    return figure


def frequency_distribution(log10_frequency: np.ndarray, cut: float, layer: int,
                           printed: np.ndarray) -> Figure:
    """Figure 3: distribution of log10 E(f) over one layer's features that ever fired.

    printed: log10 E(f) of the paper's Table 3, a random sample of the live features of its Figure
    3, a dot each below ours.
    """
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.5, 4.2), height_ratios=(4, 1),
                                          sharex=True, constrained_layout=True)
    fired = log10_frequency[np.isfinite(log10_frequency)]
    sns.histplot(fired, bins=40, ax=above, color=BLUE)
    for axis in (above, below):
        axis.axvline(cut, color=ORANGE, linestyle="--")
    above.text(cut, 0.97, " live", color="0.2", va="top", fontsize=11,
               transform=above.get_xaxis_transform())
    never = len(log10_frequency) - len(fired)
    above.set(ylabel="features", title=f"this run, layer {layer}"
              + (f" ({never:,} never fired)" if never else ""))
    bins = np.round(np.sort(printed), 1)
    heights = [int((bins[:i] == one).sum()) for i, one in enumerate(bins)]
    below.scatter(bins, heights, s=28, color="black")
    below.set(xlabel=r"$\log_{10} E(f)$, E(f): share of the tokens on which a feature fires",
              yticks=[], ylim=(-0.7, max(heights) + 0.9))
    below.set_title(f"the paper, layer 12: {len(printed)} drawn at random (Table 3)")
    below.grid(axis="y", visible=False)
    return figure


def known_truth_scores(summary: pd.DataFrame) -> Figure:
    """How well the best unit tells a planted truth: AUROC and F1 with their intervals over seeds.

    summary: from `KnownTruth`. A row of panels per tokenizer, a column per kind of truth; the
    answer that needs no cell is a line.
    """
    tokenizers, kinds = summary["tokenizer"].unique(), summary["kind"].unique()
    figure, axes = plt.subplots(len(tokenizers), len(kinds), sharex=True, sharey=True,
                                figsize=(3.9 * len(kinds), 3.3 * len(tokenizers)), squeeze=False,
                                constrained_layout=True)
    names = [name for name in summary["units"].unique() if name != ALWAYS]
    for row, tokenizer in zip(axes, tokenizers, strict=True):
        for axis, kind in zip(row, kinds, strict=True):
            part = summary[(summary["tokenizer"] == tokenizer) & (summary["kind"] == kind)]
            for measure, colour, marker, shift in ((AUROC, BLUE, "o", -0.15),
                                                   (F1, ORANGE, "s", 0.15)):
                own = part[part["measure"] == measure].set_index("units")
                axis.axvline(own["mean"].get(ALWAYS, np.nan), color=colour, linestyle=":")
                own = own.reindex(names)
                at = np.arange(len(names)) + shift
                axis.hlines(at, own["low"], own["high"], color=colour)
                axis.plot(own["mean"], at, marker, color=colour, markersize=5, label=measure)
            axis.set_title(f"{kind}\n{tokenizer}", fontsize=10)
            axis.grid(axis="y", visible=False)
    axes[0][0].set(xlim=(0.3, 1.02), yticks=range(len(names)),
                   yticklabels=names)
    for label in (label for row in axes for label in row[0].get_yticklabels()):
        label.set_fontweight("bold" if label.get_text() in TRANSCODERS else "normal")
    axes[0][0].invert_yaxis()
    for axis in axes[-1]:
        axis.set_xlabel("on held-out cells")
    legend_below(figure, 2)
    return figure
