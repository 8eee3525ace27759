"""Figures look alike, whichever chapter draws them."""

import importlib
import pkgutil
import sys
from itertools import pairwise

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from matplotlib.lines import Line2D

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


def test_a_scale_of_powers_keeps_its_numbers_on_a_phone() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
    for axis in axes:
        axis.plot([1e-4, 1e3])
        axis.set_yscale("log")
    figure.canvas.draw()
    before = {label.get_text() for label in axes[0].get_yticklabels()}
    assert max(map(len, before)) > 20
    assert narrow(figure)
    figure.canvas.draw()
    texts = {label.get_text() for axis in axes for label in axis.get_yticklabels()}
    assert not any("\n" in text for text in texts) and texts & before
    plt.close(figure)


def test_names_of_many_lines_do_not_run_into_each_other_on_a_phone() -> None:
    names = [f"score {i}: what is written at the tokens of the gene, signed, of it" for i in
             range(8)]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True, constrained_layout=True)
    for axis in axes:
        axis.plot(range(8), range(8))
        axis.set(title="a title", xlabel="a mean")
    axes[0].set_yticks(range(8), names)
    assert narrow(figure)
    figure.canvas.draw()
    for axis in axes:
        boxes = [label.get_window_extent() for label in axis.get_yticklabels()]
        assert len(boxes) == 8
        assert all(lower.y1 <= upper.y0 for lower, upper in pairwise(boxes))
        assert {label.get_fontsize() for label in axis.get_yticklabels()} == {9}
    plt.close(figure)


def test_long_names_leave_a_single_panel_its_room_on_a_phone() -> None:
    figure, axis = plt.subplots(figsize=(9, 5), constrained_layout=True)
    axis.plot(range(6), range(6))
    axis.set_yticks(range(6), [f"way {i}: how much more often in such training cells" for i in
                               range(6)])
    assert narrow(figure)
    figure.canvas.draw()
    assert axis.get_window_extent().width > 0.55 * figure.bbox.width
    boxes = [label.get_window_extent() for label in axis.get_yticklabels()]
    assert all(lower.y1 <= upper.y0 for lower, upper in pairwise(boxes))
    plt.close(figure)


@pytest.mark.parametrize("names", [["untouched", "replaced", "at its mean", "removed"],
                                   ["gene", "family", "either", "sub-word", "none"],
                                   ["all", "none"], [f"layer {i}" for i in range(12)]])
def test_a_legend_is_no_wider_than_a_phone(names: list[str]) -> None:
    figure, (axis,) = panels(1, width=7)
    for name in names:
        axis.plot([0, 1], label=name)
    figure.legend(loc="outside lower center", ncols=len(names))
    assert narrow(figure)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    plt.close(figure)


def test_a_legend_of_points_with_intervals_shows_points_on_a_phone() -> None:
    figure, (axis,) = panels(1, width=7)
    axis.errorbar([0, 1], [0, 1], yerr=0.1, fmt="s", label="a mean with its interval")
    figure.legend(loc="outside lower center")
    assert narrow(figure)
    figure.canvas.draw()
    assert "s" in {one.get_marker() for one in figure.legends[0].findobj(Line2D)}
    plt.close(figure)


def test_a_legend_beside_a_panel_comes_below_on_a_phone() -> None:
    figure = plt.figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    top = figure.add_subplot(grid[0, :])
    rest = [figure.add_subplot(grid[1, i]) for i in range(3)]
    top.plot([1, 2], label="a kind whose name takes all the room beside it")
    top.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    rest[0].plot([1, 2], label="inside")
    rest[0].legend()
    assert narrow(figure)
    figure.canvas.draw()
    assert top.get_legend() is None and rest[0].get_legend() is not None
    assert len(figure.legends) == 1
    assert all(axis.get_window_extent().width > 0.6 * figure.bbox.width for axis in (top, *rest))
    plt.close(figure)


def test_a_drawing_without_axes_keeps_its_shape() -> None:
    figure, axis = plt.subplots(figsize=(9, 5))
    axis.axis("off")
    assert not narrow(figure) and figure.get_size_inches()[0] == 9
    plt.close(figure)
