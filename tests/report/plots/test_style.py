"""Figures look alike, whichever chapter draws them."""

import importlib
import pkgutil
import sys
from itertools import pairwise

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from scfm_circuits.report import plots
from scfm_circuits.report.plots.style import NARROW, WIDE, narrow, panels

FILES = [one.name for one in pkgutil.iter_modules(plots.__path__)]


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_figures_sets_the_theme(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in [one for one in sys.modules if one.startswith(f"{plots.__name__}.")]:
        monkeypatch.delitem(sys.modules, module)
    with mpl.rc_context():
        mpl.rcdefaults()
        importlib.import_module(f"{plots.__name__}.{name}")
        assert mpl.rcParams["axes.titleweight"] == "bold" and mpl.rcParams["axes.grid"]


def test_a_wide_figure_is_stacked_for_a_phone_and_each_panel_says_what_it_shows() -> None:
    long = "a name that would leave no room at all for the panel beside it"
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True, constrained_layout=True)
    for axis, title in zip(axes, "abc", strict=True):
        axis.plot([0, 1], [0, 1], label="a line of some length")
        axis.plot([0, 1], [1, 0], label="another one, longer still")
        axis.set(title=title, xlabel=f"x of {title}")
    axes[0].set_yticks([0, 1], [long, "short"])
    axes[0].set_ylabel("what all share")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    assert narrow(figure)
    figure.canvas.draw()
    assert figure.get_size_inches()[0] == NARROW
    boxes = [axis.get_window_extent() for axis in axes]
    assert all(lower.y1 < upper.y0 for upper, lower in pairwise(boxes))
    assert all(box.width > 0.4 * figure.bbox.width for box in boxes)
    for axis, title in zip(axes, "abc", strict=True):
        assert axis.get_ylabel() == "what all share" and axis.get_xlabel() == f"x of {title}"
        shown = [label.get_text() for label in axis.get_yticklabels() if label.get_visible()]
        assert [text.replace("\n", " ") for text in shown] == [long, "short"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "a line of some length", "another one, longer still"]
    assert legend.get_window_extent().width < figure.bbox.width
    plt.close(figure)


def test_an_irregular_grid_lends_no_names_and_a_small_figure_stays_as_it_is() -> None:
    figure = plt.figure(figsize=(11, 7), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    top, left, right = (figure.add_subplot(grid[where]) for where in ((0, slice(None)), (1, 0),
                                                                      (1, 1)))
    top.set(ylabel="FVU", xlabel="L0")
    assert narrow(figure) and right.get_ylabel() == left.get_xlabel() == ""
    small, _ = panels(1, width=WIDE)
    assert not narrow(small) and small.get_size_inches()[0] == WIDE
    plt.close("all")
