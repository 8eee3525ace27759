"""The picture of the chapter that compares two tokenizers."""

import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scfm_circuits.report.plots.style import BLUE, GREEN, GREY, ORANGE
from scfm_circuits.report.sub_words import EARLY, KINDS, LATE

_PANELS: dict[str, dict[str, tuple[str, str]]] = {
    "FVU": {"FVU": ("features", BLUE)},
    "L0": {"L0": ("features", BLUE)},
    "called interpretable (%)": {
        "Table 4, token: features, %": ("features", BLUE),
        "Table 4, token: untrained encoder, %": ("untrained encoder", ORANGE),
        "Table 4, token: re-initialised model, %": ("re-initialised model", GREEN),
        "Table 4, token: frequency-matched, %": ("frequency-matched lists", GREY)},
    "scored (%)": {"score: named by genes, feature, %": ("named by genes", BLUE),
                   "score: sub-word, feature, %": ("sub-word", ORANGE)},
}
"""By what is shown: measures with their label and colour."""


def both_tokenizers(runs: pd.DataFrame) -> Figure:
    """FVU, L0, Table 4 with controls, and score, of layer 0 and the later layers.

    runs: a row per run and measure, from `sub_words.compare_tokenizers`.
    """
    figure, axes = plt.subplots(2, 2, figsize=(8.5, 7))
    figure.set_layout_engine("constrained", h_pad=0.3)
    for axis, (label, measures) in zip(axes.flat, _PANELS.items(), strict=True):
        _panel(axis, runs, measures)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        if len(measures) > 1:
            # Above its panel, which it must not make narrower.
            axis.legend(fontsize=9, loc="lower left", bbox_to_anchor=(-0.05, 1), ncols=2,
                        frameon=False, columnspacing=1.2).set_in_layout(False)
    return figure


def _panel(axis: Axes, runs: pd.DataFrame, measures: Mapping[str, tuple[str, str]]) -> None:
    groups = [(where, tokenizer) for where in (EARLY, LATE) for tokenizer in KINDS.values()]
    for n, (measure, (label, colour)) in enumerate(measures.items()):
        shift = 0.18 * (n - (len(measures) - 1) / 2)
        for place, (where, tokenizer) in enumerate(groups):
            values = runs.loc[(runs["where"] == where) & (runs["measure"] == measure)
                              & (runs["tokenizer"] == tokenizer), "value"]
            x = place + shift
            axis.plot([x] * len(values), values, "o", markersize=4, alpha=0.6, color=colour)
            axis.plot([x - 0.07, x + 0.07], [values.mean()] * 2, color=colour, linewidth=2,
                      label=label if place == 0 else None)
    # Four wide labels side by side are only read if they are broken into lines.
    axis.set_xticks(range(len(groups)), [f"{where}\n{textwrap.fill(tokenizer, 9)}"
                                         for where, tokenizer in groups], fontsize=9)
