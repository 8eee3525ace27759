"""Who watches a training run, and what they are shown."""

import builtins
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from scfm_circuits import InputError
from scfm_circuits.report import live_curves
from scfm_circuits.report.live_curves import UNWATCHED, LiveCurves, watched, watcher
from scfm_circuits.report.plots.cells_and_training import transcoder_curves
from scfm_circuits.transcoders.training.history import MEASURES, TensorBoard, known_mean
from scfm_circuits.transcoders.training.settings import FIELDS
from tests.helpers import tiny_profile


def history(rows: int = 3, layers: int = 2) -> list[dict[str, Any]]:
    return [{"step": i, "tokens": 100 * i, **{name: [i + 0.25 * layer for layer in range(layers)]
             for name in MEASURES}} for i in range(1, rows + 1)]


class ZMQInteractiveShell:
    """Bears the name of the shell in a notebook's kernel."""


def in_kernel(monkeypatch: pytest.MonkeyPatch, shell: object) -> None:
    monkeypatch.delenv(UNWATCHED, raising=False)
    monkeypatch.setitem(sys.modules, "IPython",
                        types.SimpleNamespace(get_ipython=lambda: shell))


def test_only_a_notebook_run_by_hand_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    in_kernel(monkeypatch, None)
    assert not watched()
    in_kernel(monkeypatch, ZMQInteractiveShell())
    assert watched()
    monkeypatch.setenv(UNWATCHED, "1")
    assert not watched()


def test_without_anybody_nothing_is_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_kernel(monkeypatch, None)
    assert watcher(tiny_profile(monkeypatch, tmp_path)) is None


def test_the_kernels_of_the_book_know_that_nobody_looks_on(tmp_path: Path) -> None:
    import papermill
    from nbformat.v4 import new_code_cell, new_notebook

    from scfm_circuits.book.execution import _Kernel, _kernel_manager

    node = new_notebook(cells=[new_code_cell(
        "import IPython\n"
        "from scfm_circuits.report import live_curves\nprint(live_curves.watched())")],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    said = []
    with open(tmp_path / "log", "w") as log:
        kernel = _Kernel(1, lambda group: None, None)
        ours = _kernel_manager(log, tmp_path / "notes", kernel)
        for options in ({"kernel_manager_class": ours}, {}):
            done = papermill.execute_notebook(node, str(tmp_path / "out.ipynb"), progress_bar=False,
                                              kernel_name="python3", **options)
            said.append(done.cells[-1].outputs[0].text.strip())
    assert said == ["False", "True"]
    assert UNWATCHED not in os.environ


def test_curves_are_drawn_in_place_and_not_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, bytes]] = []

    class Handle:
        def update(self, image: Any) -> None:
            shown.append(("update", image.data))

    def display(image: Any, display_id: bool) -> Handle:
        assert display_id
        shown.append(("display", image.data))
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    now = [100.0]
    monkeypatch.setattr(live_curves.time, "monotonic", lambda: now[0])
    before = plt.get_fignums()
    curves = LiveCurves(seconds=5)
    for seconds, rows in ((0, 1), (4, 2), (2, 3), (1, 4), (5, 5)):
        now[0] += seconds
        curves(history(rows))
    assert [how for how, _ in shown] == ["display", "update", "update"]
    assert all(data.startswith(b"\x89PNG") for _, data in shown)
    assert len({data for _, data in shown}) == 3, "each drawing shows the rows so far"
    assert plt.get_fignums() == before, "a figure left open is shown once more by the notebook"


def test_drawing_takes_little_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawn = [0.0], []

    def slow(rows: Any) -> bytes:
        now[0] += 2.0
        drawn.append(now[0])
        return b""

    monkeypatch.setattr(live_curves, "_png", slow)
    monkeypatch.setattr(live_curves.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("IPython.display.display", lambda image, display_id: types.SimpleNamespace(
        update=lambda image: None))
    curves = LiveCurves(seconds=1)
    while now[0] < 400:
        curves(history())
        now[0] += 0.5
    assert 2.0 * len(drawn) <= 0.06 * now[0]
    assert len(drawn) > 5


def test_without_tensorboard_it_says_so_before_any_work(monkeypatch: pytest.MonkeyPatch,
                                                        tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    profile = tiny_profile(monkeypatch, tmp_path, tensorboard=True)
    with pytest.raises(InputError, match="pip install tensorboard"):
        watcher(profile)
    assert not (profile.results / "tensorboard").exists()


class Writer:
    """Stands in for TensorBoard's SummaryWriter, which is an option."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.points: list[tuple[str, float, int]] = []
        self.flushed = 0

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.points.append((name, value, step))

    def flush(self) -> None:
        self.flushed += 1


def test_tensorboard_gets_each_row_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        types.SimpleNamespace(SummaryWriter=Writer))
    in_kernel(monkeypatch, None)
    profile = tiny_profile(monkeypatch, tmp_path, tensorboard=True)
    board = TensorBoard(profile.results / "tensorboard")
    rows = history(4, layers=3)
    for n in (2, 3, 4):  # the first call of a resumed run brings several rows
        board(rows[:n])
    points = board._writer.points
    assert len(points) == len(set(points)) == 4 * len(MEASURES) * (3 + 1)
    assert ("layers/fvu/02", 4.5, 400) in points
    assert ("mean/l0", 2.25, 200) in points
    assert board._writer.purge_step == 0
    assert board._writer.folder == str(tmp_path / profile.name / "tensorboard")
    assert watcher(profile) is not None


def test_a_layer_that_diverged_leaves_the_others_curves(monkeypatch: pytest.MonkeyPatch,
                                                        tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        types.SimpleNamespace(SummaryWriter=Writer))
    rows = history(2)
    rows[1]["fvu"] = [None, 3.0]
    board = TensorBoard(tmp_path)
    board(rows)
    points = {(name, step): value for name, value, step in board._writer.points}
    assert points["mean/fvu", 200] == points["layers/fvu/01", 200] == 3.0
    assert math.isnan(points["layers/fvu/00", 200]) and points["mean/l0", 200] == 2.125
    figure = transcoder_curves(rows)
    assert len(figure.axes[2].lines) == 2
    plt.close(figure)


def test_the_mean_is_of_layers_that_are_finite() -> None:
    assert known_mean([1.0, None, 3.0]) == 2.0
    assert math.isnan(known_mean([None]))


def test_watching_changes_no_result() -> None:
    assert "tensorboard" not in FIELDS
