"""The theme, colours and panels that all figures share: every file of figures imports it."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sns.set_theme(context="notebook", style="whitegrid", palette="colorblind",
              rc={"figure.dpi": 100, "axes.titlesize": "medium", "axes.titleweight": "bold"})
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, PINK, GREY, _, _ = sns.color_palette("colorblind")

LONGEST = 60
"""Characters of a text from outside that a figure draws."""


def panels(n: int, *, width: float = 4.4, height: float = 3.4) -> tuple[Figure, Sequence[Axes]]:
    """A figure of n panels side by side; width and height of one in inches."""
    figure, axes = plt.subplots(1, n, figsize=(width * n, height), constrained_layout=True)
    return figure, np.atleast_1d(axes).tolist()


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
