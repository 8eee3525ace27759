"""Figures of chapters 01 and 02: cells, the model's training, the transcoders' training."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from scfm_circuits.report.plots.style import (
    BLUE,
    GREEN,
    ORANGE,
    layer_colours,
    literal,
    panels,
    ticks,
)


def cells_per_type(labels: np.ndarray, held_out: np.ndarray) -> Figure:
    """Cells of each type, training and held-out."""
    frame = pd.DataFrame({"type": labels, "set": np.where(held_out, "held out", "training")})
    counts = frame.value_counts(["type", "set"]).unstack(fill_value=0)
    counts = counts.loc[counts.sum(axis=1).sort_values().index]
    figure, (axis,) = panels(1, width=7.5, height=0.5 + 0.36 * len(counts))
    places, left = np.arange(len(counts)), np.zeros(len(counts))
    for name, colour in (("training", BLUE), ("held out", ORANGE)):
        values = counts.get(name, pd.Series(0, counts.index)).to_numpy()
        axis.barh(places, values, left=left, color=colour, label=name)
        left += values
    axis.set_yticks(places, [literal(name) for name in counts.index])
    axis.set(xlabel="cells")
    axis.grid(axis="y", visible=False)
    axis.legend()
    return figure


def training_curve(step: Sequence[int], loss: Sequence[float]) -> Figure:
    """Loss of the small language model against its steps."""
    figure, (axis,) = panels(1, width=6)
    axis.plot(step, loss, color=BLUE, linewidth=1)
    axis.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    return figure


def transcoder_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Reconstruction, L0, FVU and dead share of every layer against training tokens."""
    tokens = [row["tokens"] for row in history]
    n_layers = len(history[0]["l0"])
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), constrained_layout=True, sharex=True)
    panels = (("reconstruction", "reconstruction loss", "log"), ("l0", "active features (L0)",
              "log"), ("fvu", "FVU", "log"), ("dead", "dead share", "linear"))
    for axis, (key, label, scale) in zip(axes.flat, panels, strict=True):
        for layer, colour in enumerate(layer_colours(n_layers)):
            axis.plot(tokens, [row[key][layer] for row in history], color=colour, linewidth=1.2,
                      label=f"layer {layer}")
        axis.set(ylabel=label, yscale=scale)
    axes[1, 1].set_ylim(-0.02, 1.02)
    for axis in axes[1]:
        axis.set(xlabel="training tokens")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if n_layers <= 12:
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure


def loss_comparison(table: pd.DataFrame) -> Figure:
    """Validation loss of the three configurations, ours and the paper's, side by side.

    table: from `validation.table1`.
    """
    figure, axes = panels(2, width=4.2)
    ours, errors, paper = (table[name].astype(float).tolist()
                           for name in ("validation_loss", "standard_error", "paper"))
    for axis, values, title, error in ((axes[0], ours, "this run", errors),
                                       (axes[1], paper, "the paper", None)):
        bars = axis.bar(["original", "transcoders", "no MLP"], values, yerr=error,
                        color=[BLUE, GREEN, ORANGE])
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.set(title=title, ylim=(0, max(values) * 1.15))
        axis.grid(axis="x", visible=False)
    axes[0].set_ylabel("validation loss (nats per token)")
    return figure


def layer_alone(scores: pd.DataFrame, fvu: np.ndarray) -> Figure:
    """KL when one layer alone is replaced or removed, and FVU of each layer."""
    figure, axes = panels(2)
    single = scores[scores["layer"] >= 0]
    for name, colour, label in (("transcoder", GREEN, "replaced"), ("no_mlp", ORANGE, "removed")):
        rows = single[single["configuration"] == name]
        axes[0].plot(rows["layer"], rows["kl"], "o-", color=colour, label=label)
    axes[0].set(yscale="log", xlabel="layer", ylabel="KL(original || modified), nats")
    axes[0].legend()
    axes[1].bar(np.arange(len(fvu)), fvu, color=BLUE)
    axes[1].set(xlabel="layer", ylabel="FVU on held-out cells", ylim=(0, None))
    for axis in axes:
        axis.set_xticks(ticks(len(fvu)))
    return figure
