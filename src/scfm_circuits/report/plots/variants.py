"""The picture of the chapter that compares dictionaries of other kinds.

Each kind has a colour (what makes it sparse) and a marker (what it reads or has beside it), so that
it can be told without colours too.
"""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scfm_circuits.report.plots.style import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    literal,
    plain_log,
)

_STYLES = {"relu": (BLUE, "o"), "jumprelu": (GREEN, "D"), "topk": (ORANGE, "s"),
           "batchtopk": (PURPLE, "^"), "relu_skip": (BLUE, "P"), "topk_skip": (ORANGE, "X"),
           "sae": (BROWN, "v")}


def _style(variant: str, first: bool) -> dict[str, Any]:
    """Colour and marker; of the two losses of ReLU the reference's is filled."""
    colour, marker = _STYLES["relu" if variant.startswith("relu_") and variant != "relu_skip"
                             else variant]
    hollow = variant.startswith("relu_") and variant != "relu_skip" and not first
    return {"marker": marker, "markeredgecolor": colour, "color": colour, "linestyle": "none",
            "markerfacecolor": "none" if hollow else colour, "markeredgewidth": 1.6}


def variants(table: pd.DataFrame, layers: pd.DataFrame, rule: str) -> Figure:
    """FVU against L0, and for each kind the loss, the live features and the interpretable share.

    table, layers: from `other_dictionaries`, a row per variant, and per variant and layer.
    """
    figure = plt.figure(figsize=(9.5, 7.5), constrained_layout=True)
    grid = figure.add_gridspec(2, 3, height_ratios=[1.25, 1])
    scatter = figure.add_subplot(grid[0, :])
    for place, row in enumerate(table.to_dict("records")):
        own, style = layers[layers["variant"] == row["variant"]], _style(row["variant"], not place)
        scatter.plot(own["l0"], own["fvu"], markersize=4, alpha=0.4, **style)
        scatter.plot([row["l0"]], [row["fvu"]], markersize=11, label=literal(row["label"]), **style)
    scatter.set(xscale="log", yscale="log", xlabel="active features per token (L0), held-out cells",
                ylabel="FVU, held-out cells")
    for scale in (scatter.xaxis, scatter.yaxis):
        plain_log(scale)
    scatter.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    first = figure.add_subplot(grid[1, 0])
    second, third = (figure.add_subplot(grid[1, i], sharey=first) for i in (1, 2))
    _dots(first, table, "loss_increase", "loss added\nby one layer\n(nats per token)")
    _dots(second, table, "live_table4", "live features\n(Table 4's cut)")
    _dots(third, table, f"percentage_{rule}", f"called\ninterpretable (%),\nrule {rule}")
    for place, value in enumerate(table[f"null_{rule}"]):
        third.plot([value], [place], marker="|", markersize=16, color=GREY, markeredgewidth=3,
                   label="null lists" if place == 0 else None, linestyle="none", zorder=1)
    third.set(xlim=(0, 105), xticks=(0, 50, 100))
    third.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    first.set(yticks=range(len(table)), yticklabels=[literal(label) for label in table["label"]])
    first.invert_yaxis()
    for axis in (second, third):
        axis.tick_params(labelleft=False)
    return figure


def _dots(axis: Axes, table: pd.DataFrame, column: str, label: str) -> None:
    for place, row in enumerate(table.to_dict("records")):
        axis.plot([row[column]], [place], markersize=9, **_style(row["variant"], not place))
    low = min(0.0, float(table[column].min()))
    axis.set(xlabel=label, xlim=(low, 1.12 * float(table[column].max()) or 1.0))
    # The last number of a panel would run into the first of the next.
    axis.xaxis.set_major_locator(MaxNLocator(2, prune="upper"))
    axis.xaxis.set_major_formatter("{x:g}")
