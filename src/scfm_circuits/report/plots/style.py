"""The theme, colours and panels that all figures share: every file of figures imports it."""

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

sns.set_theme(context="notebook", style="whitegrid", palette="colorblind",
              rc={"figure.dpi": 100, "axes.titlesize": "medium", "axes.titleweight": "bold"})
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, PINK, GREY, _, _ = sns.color_palette("colorblind")

WIDE, NARROW = 7.0, 4.4
"""Inches across: a figure that is wider than the first has a narrow version for phones."""
LONGEST = 60
"""Characters of a text from outside that a figure draws."""


def panels(n: int, *, width: float = 4.4, height: float = 3.4) -> tuple[Figure, Sequence[Axes]]:
    """A figure of n panels side by side; width and height of one in inches."""
    figure, axes = plt.subplots(1, n, figsize=(width * n, height), constrained_layout=True)
    return figure, np.atleast_1d(axes).tolist()


def narrow(figure: Figure) -> bool:
    """Change a wide figure to one that can be read on a phone; False for one that is not wide.

    Panels come below each other at about their height, and so do the entries of a legend. What
    another panel of the row or column said for all (a scale, its name) each then says by itself.
    """
    width, height = figure.get_size_inches()
    if width <= WIDE:
        return False
    placed = [(axis, spec) for axis in figure.axes if (spec := axis.get_subplotspec()) is not None]
    rows, columns = placed[0][1].get_gridspec().get_geometry() if placed else (1, 1)
    if columns > 1 and len(placed) == len(figure.axes):
        grid = GridSpec(len(placed), 1, figure=figure)
        for place, (axis, _) in enumerate(placed):
            if len(placed) == rows * columns:
                left, low = placed[place - place % columns][0], placed[place % columns - columns][0]
                axis.set_ylabel(axis.get_ylabel() or left.get_ylabel())
                axis.set_xlabel(axis.get_xlabel() or low.get_xlabel())
            axis.tick_params(labelleft=True, labelbottom=True)
            axis.set_subplotspec(grid[place])
            _wrap_names(axis)
        figure.set_size_inches(NARROW, len(placed) * max(height / rows, 0.62 * NARROW))
    else:
        figure.set_size_inches(0.6 * width, (0.6 if len(placed) < len(figure.axes) else 1) * height)
    for legend in list(figure.legends):
        labels = [text.get_text() for text in legend.get_texts()]
        handles = [handle for handle in legend.legend_handles if handle is not None]
        figure.legend(handles, labels, loc="outside lower center", frameon=False,
                      ncols=len(labels) if sum(map(len, labels)) < 40 else 1)
        legend.remove()
    return True


def _wrap_names(axis: Axes) -> None:
    """Break long names along an upright axis, which would leave no room for the panel."""
    names = [label.get_text() for label in axis.get_yticklabels()]
    if max(map(len, names), default=0) > 20:
        axis.set_yticks(axis.get_yticks(), [textwrap.fill(name, 20) for name in names], fontsize=9)


def layer_colours(n: int) -> list[Any]:
    """A colour for each of n layers, from dark to light."""
    return sns.color_palette("viridis", n)


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
