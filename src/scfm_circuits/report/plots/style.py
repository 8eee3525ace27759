"""The theme, colours and panels that all figures share: every file of figures imports it."""

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.legend import Legend
from matplotlib.ticker import FixedFormatter, FuncFormatter, LogLocator, NullLocator

sns.set_theme(context="notebook", style="whitegrid", palette="colorblind",
              rc={"figure.dpi": 100, "axes.titlesize": "medium", "axes.titleweight": "bold"})
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, PINK, GREY, _, _ = sns.color_palette("colorblind")

WIDE, NARROW = 5.0, 4.4
"""Inches across: a figure that is wider than the first has a narrow version for phones."""
LONGEST = 60
"""Characters of a text from outside that a figure draws."""


def panels(n: int, *, width: float = 4.4, height: float = 3.4) -> tuple[Figure, Sequence[Axes]]:
    """A figure of n panels side by side; width and height of one in inches."""
    figure, axes = plt.subplots(1, n, figsize=(width * n, height), constrained_layout=True)
    return figure, np.atleast_1d(axes).tolist()


def legend_below(figure: Figure, columns: int = 1, **options: Any) -> None:
    """One legend for all panels, below them, which names what they have in common once."""
    named = _named(figure)
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns,
                  frameon=False, **options)


def _named(figure: Figure) -> dict[str, Any]:
    """What a legend shows beside each name that the figure's panels have."""
    return {label: handle for axis in figure.axes for handle, label in zip(
        *axis.get_legend_handles_labels(), strict=True)}


def plain_log(scale: Axis) -> None:
    """Few marks on a logarithmic scale, as plain numbers."""
    scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
    scale.set_major_formatter("{x:g}")
    scale.set_minor_locator(NullLocator())


def narrow(figure: Figure) -> bool:
    """Change a wide figure to one that can be read on a phone; False for one that is not wide.

    Panels come below each other at about their height, or higher where their names need it, and so
    do the entries of a legend. What another panel of the row or column said for all (a scale, its
    name) each then says by itself. A drawing without axes stays: its texts fit its boxes.
    """
    width, height = figure.get_size_inches()
    if width <= WIDE or not any(axis.axison for axis in figure.axes):
        return False
    legends = [*figure.legends, *(one for axis in figure.axes if (one := _legend_beside(axis)))]
    placed = [(axis, spec) for axis in figure.axes if (spec := axis.get_subplotspec()) is not None]
    rows, columns = placed[0][1].get_gridspec().get_geometry() if placed else (1, 1)
    if columns > 1 and len(placed) == len(figure.axes):
        grid = GridSpec(len(placed), 1, figure=figure)
        high = max(height / rows, 0.62 * NARROW)
        for place, (axis, _) in enumerate(placed):
            if len(placed) == rows * columns:
                left, low = placed[place - place % columns][0], placed[place % columns - columns][0]
                axis.set_ylabel(axis.get_ylabel() or left.get_ylabel())
                axis.set_xlabel(axis.get_xlabel() or low.get_xlabel())
            axis.tick_params(labelleft=True, labelbottom=True)
            axis.set_subplotspec(grid[place])
            high = max(high, _wrap_names(axis) + 1.0)
        figure.set_size_inches(NARROW, len(placed) * high)
    else:
        names = [label.get_text() for axis in figure.axes for label in axis.get_yticklabels()]
        # Many names would make it too high, and short ones leave room for the panel.
        wrapped = len(names) <= 20 and any(len(name) > 30 for name in names)
        high = max(map(_wrap_names, figure.axes)) + 1.0 if wrapped else 0.0
        figure.set_size_inches(max(0.6 * width, NARROW), max(
            high, (0.6 if len(placed) < len(figure.axes) else 1) * height))
    labels = [text.get_text() for legend in legends for text in legend.get_texts()]
    # Of a point with an interval a legend holds the line alone; the panel has both.
    both = _named(figure)
    drawn = [handle for legend in legends for handle in legend.legend_handles]
    handles = [both.get(label, handle) for label, handle in zip(labels, drawn, strict=True)
               if handle is not None]
    for legend in legends:
        legend.remove()
    if labels:
        # A line has room for about 53 letters; a mark and its gaps take 9.
        each = max(map(len, labels)) + 9
        columns = min(len(labels), 53 // each) if each <= 26 else 1
        figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=columns)
        if len(labels) > 4 * columns:  # else it would take the panels' room
            figure.set_figheight(figure.get_figheight() + 0.24 * len(labels) / columns)
    return True


def _legend_beside(axis: Axes) -> Legend | None:
    """A panel's legend that is right of it, where a phone has no room."""
    legend = axis.get_legend()
    if legend is None:
        return None
    start = legend.get_bbox_to_anchor().transformed(axis.transAxes.inverted()).x0
    return legend if start > 0.99 else None


def _wrap_names(axis: Axes) -> float:
    """Break long names along an upright axis, which would leave no room for the panel.

    Returns the inches that they need above each other, 0 if there are none. Numbers that a scale
    writes itself are no names: the formula of a power has many letters and few signs.
    """
    if not isinstance(axis.yaxis.get_major_formatter(), FixedFormatter | FuncFormatter):
        return 0.0
    names = [label.get_text() for label in axis.get_yticklabels()]
    wrapped = [textwrap.fill(name, 20) for name in names]
    if wrapped != names:
        axis.set_yticks(axis.get_yticks(), wrapped)
    lines = max((name.count("\n") + 1 for name in wrapped), default=0)
    if lines < 2:
        return 0.0
    axis.tick_params(axis="y", labelsize=9)
    return len(names) * lines * 9 * 1.5 / 72


def layer_colours(n: int) -> list[Any]:
    """A colour for each of n layers, from dark to light; none so light that it is lost on the page,
    or so dark that it is lost where the dark mode exchanges the two."""
    return [*plt.get_cmap("viridis")(np.linspace(0.12, 0.68, n))]


def ticks(n: int) -> list[int]:
    """Layers to mark on an axis of n: all, or every other one of more than 12."""
    return list(range(0, n, 1 if n <= 12 else 2))


def literal(text: str, longest: int = LONGEST) -> str:
    """Text from outside (labels, genes, tokens) for a figure, which draws it as it is.

    A dollar is no mathematics then. What has more than `longest` characters is cut.
    """
    text = str(text)
    shown = text if len(text) <= longest else text[: longest - 1] + "…"
    return shown.replace("$", r"\$")
