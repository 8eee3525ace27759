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
    GREY,
    ORANGE,
    PURPLE,
    layer_colours,
    legend_below,
    literal,
    panels,
    plain_log,
    ticks,
)
from scfm_circuits.transcoders.validation import ALL, LATER

MOST_BARS = 100
"""Types that have a bar of their own; a picture has no room for thousands."""


def cells_per_type(labels: np.ndarray, held_out: np.ndarray) -> Figure:
    """Cells of each type, training and held-out; of many types the rarest are added up."""
    frame = pd.DataFrame({"type": labels, "set": np.where(held_out, "held out", "training")})
    counts = frame.value_counts(["type", "set"]).unstack(fill_value=0)
    counts = counts.loc[counts.sum(axis=1).sort_values().index]
    names = [literal(name) for name in counts.index]
    rest = len(counts) - MOST_BARS
    if rest > 1:
        others = counts.iloc[:rest].sum().to_frame().T
        counts = pd.concat([others, counts.iloc[rest:]], ignore_index=True)
        names = [f"{rest:,} other types", *names[rest:]]
    figure, (axis,) = panels(1, width=7.5, height=0.9 + 0.36 * len(counts))
    places, left = np.arange(len(counts)), np.zeros(len(counts))
    for name, colour in (("training", BLUE), ("held out", ORANGE)):
        values = counts.get(name, pd.Series(0, counts.index)).to_numpy()
        axis.barh(places, values, left=left, color=colour, label=name)
        left += values
    axis.set_yticks(places, names)
    axis.set(xlabel="cells")
    axis.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


MOST_TYPES, MOST_LETTERS = 20, 24


def confusion_matrix(counts: pd.DataFrame) -> Figure:
    """Answers for the cells of each type, as counts on a colour that is the share of the row.

    counts: (n_types, n_answers), by name; the types with most cells are shown, and other answers
    together. Columns bear the numbers of the rows: names would be too small to read on a phone.
    """
    order = counts.sum(axis=1).sort_values(ascending=False, kind="stable").index[:MOST_TYPES]
    shown, sizes = counts.loc[order, order].to_numpy(), counts.loc[order].sum(axis=1).to_numpy()
    columns, other = [str(number) for number in range(1, len(order) + 1)], sizes - shown.sum(axis=1)
    if other.any():
        shown, columns = np.column_stack([shown, other]), [*columns, "other"]
    figure, (axis,) = panels(1, width=5.4, height=1.1 + 0.27 * len(order))
    share = shown / sizes[:, None]
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    for (row, column), n in np.ndenumerate(shown):
        if n:
            axis.text(column, row, f"{n}", ha="center", va="center", fontsize=8,
                      color="white" if share[row, column] > 0.6 else "black")
    axis.set_yticks(range(len(order)), [
        f"{literal(name, MOST_LETTERS)} ({size})  {number}" for number, (name, size) in
        enumerate(zip(order, sizes, strict=True), 1)], fontsize=9)
    axis.set_xticks(range(len(columns)), columns, fontsize=9)
    axis.set_xlabel("answer", fontsize=10)
    axis.grid(visible=False)
    return figure


def training_curve(step: Sequence[int], loss: Sequence[float]) -> Figure:
    """Loss of the small language model against its steps."""
    figure, (axis,) = panels(1, width=6)
    axis.plot(step, loss, color=BLUE, linewidth=1)
    axis.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    return figure


def transcoder_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Reconstruction, L0, FVU and dead share of every layer against training tokens."""
    scale, unit = (1e6, "million") if history[-1]["tokens"] >= 2e6 else (1e3, "thousand")
    tokens = [row["tokens"] / scale for row in history]
    n_layers = len(history[0]["l0"])
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), constrained_layout=True, sharex=True)
    panels = (("reconstruction", "reconstruction loss", "log"), ("l0", "active features (L0)",
              "log"), ("fvu", "FVU", "log"), ("dead", "dead features (%)", "linear"))
    for axis, (key, label, kind) in zip(axes.flat, panels, strict=True):
        for layer, colour in enumerate(layer_colours(n_layers)):
            values = np.array([row[key][layer] for row in history], float)
            axis.plot(tokens, 100 * values if key == "dead" else values, color=colour,
                      linewidth=1.2, label=f"layer {layer}")
        axis.set(ylabel=label, yscale=kind)
        if kind == "log":
            plain_log(axis.yaxis)
    dead = axes[1, 1]
    most = max(5.0, dead.get_ylim()[1])
    dead.set_ylim(-0.02 * most, most)  # a line at 0 stands clear of the frame
    for axis in axes[1]:
        axis.set(xlabel=f"training tokens ({unit}s)")
    if n_layers <= 12:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper",
                      frameon=False)
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
    """KL when one layer alone is replaced, at its mean or removed, and FVU of each layer."""
    figure, axes = panels(2)
    single = scores[scores["layer"] >= 0]
    for name, (colour, label) in _WAYS.items():
        rows = single[single["configuration"] == name]
        axes[0].plot(rows["layer"], rows["kl"], "o-", color=colour, label=label)
    axes[0].set(yscale="log", xlabel="layer", ylabel="KL(original || modified), nats")
    axes[0].legend()
    axes[1].bar(np.arange(len(fvu)), fvu, color=BLUE)
    axes[1].set(xlabel="layer", ylabel="FVU on held-out cells", ylim=(0, None))
    for axis in axes:
        axis.set_xticks(ticks(len(fvu)))
    return figure


_WAYS = {"transcoder": (GREEN, "replaced"), "mean": (PURPLE, "at its mean"),
         "no_mlp": (ORANGE, "removed")}


def answers_by_layer(answers: pd.DataFrame) -> Figure:
    """Percentage of right answers with the MLP of one layer changed, and of several together.

    answers: `validation.Compared.answers`.
    """
    figure, (axis,) = panels(1, width=6.2, height=3.8)
    n_layers = int(answers["layer"].max()) + 1
    together = {place: n_layers + 0.5 + step for step, place in enumerate(
        one for one in (LATER, ALL) if one in set(answers["layer"]))}
    names = {ALL: "all", LATER: f"1\u2013{n_layers - 1}"}
    axis.axhline(answers.loc[answers["configuration"] == "original", "percentage"].iloc[0],
                 color=GREY, linewidth=1.5, label="untouched")
    for place, (name, (colour, label)) in enumerate(_WAYS.items()):
        rows = answers[answers["configuration"] == name]
        # Several layers together stand behind the last one, a gap apart.
        x = rows["layer"].replace(together) + 0.14 * (place - 1)
        middle, low, high = (rows[name].to_numpy() for name in ("percentage", "lower_95",
                                                                "upper_95"))
        axis.errorbar(x, middle, yerr=[middle - low, high - middle],
                      fmt="o", color=colour, capsize=2, label=label)
    axis.set_xticks([*ticks(n_layers), *together.values()],
                    [*map(str, ticks(n_layers)), *(names[one] for one in together)])
    axis.set(xlabel="layer", ylabel="answers that are right (%)", ylim=(-3, 103))
    axis.grid(axis="x", visible=False)
    legend_below(figure, 4)
    return figure
