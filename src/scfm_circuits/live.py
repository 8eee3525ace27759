"""Watching a training run: curves that redraw themselves in a notebook, and TensorBoard.

`watcher` gives what `get_transcoders` takes as `logged`. When the book is executed nobody looks on:
`execution` says so to its kernels through the environment, and the page gets the final curves only.
"""

import io
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfm_circuits import InputError

if TYPE_CHECKING:
    from scfm_circuits.profile import Profile

UNWATCHED = "SCFM_UNWATCHED"
"""Environment variable that is set where notebooks are executed without anybody looking on."""
MEASURES = ("reconstruction", "sparsity", "l0", "fvu", "dead")
"""What a row of the history holds, beside its step and tokens: a list of one number per layer,
None where it was not finite."""

History = list[dict[str, Any]]
Logged = Callable[[History], None]
"""Called with the history so far, each time a row is added."""


def known_mean(values: Sequence[float | None]) -> float:
    """Mean of a measure over layers, without those where it was not finite; NaN if all are so."""
    known = [one for one in values if one is not None]
    return sum(known) / len(known) if known else math.nan


def watched() -> bool:
    """Whether this is a notebook's kernel whose output a person sees while it runs."""
    if os.environ.get(UNWATCHED):
        return False
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def watcher(profile: "Profile") -> Logged | None:
    """What is to be called with the training history each time a row is added; None for nothing.

    Live curves where somebody looks on, and TensorBoard if the profile asks for it. Raises
    InputError if TensorBoard is asked for and not installed.
    """
    watchers: list[Logged] = []
    if profile.tensorboard:
        watchers.append(TensorBoard(profile.results / "tensorboard"))
    if watched():
        watchers.append(LiveCurves())
    if not watchers:
        return None

    def logged(history: History) -> None:
        for one in watchers:
            one(history)

    return logged


class LiveCurves:
    """The training curves in a notebook's output, drawn anew every few seconds.

    seconds: least time between two drawings; a drawing never takes more than a twentieth of the
    time.
    """

    def __init__(self, seconds: float = 3.0) -> None:
        self.seconds = seconds
        self._next = 0.0
        self._handle: Any = None

    def __call__(self, history: History) -> None:
        """Draw, if it is time."""
        began = time.monotonic()
        if began < self._next:
            return
        from IPython.display import Image, display

        image = Image(data=_png(history))
        if self._handle is None:
            self._handle = display(image, display_id=True)
        else:
            self._handle.update(image)
        now = time.monotonic()
        self._next = now + max(self.seconds, 19 * (now - began))


def _png(history: History) -> bytes:
    """The curves as a picture, whatever backend the notebook has chosen."""
    import matplotlib.pyplot as plt

    from scfm_circuits.figures import transcoder_curves

    figure, buffer = transcoder_curves(history), io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)  # or the notebook would show it once more
    return buffer.getvalue()


class TensorBoard:
    """Writes the history to TensorBoard's files: `tensorboard --logdir results/<profile>`.

    One curve per measure and layer, and one of each measure's mean over layers, against training
    tokens. A resumed run brings its earlier rows along, which take the place of those there.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "The profile sets `tensorboard: true`, but TensorBoard is not installed; run "
                f"`{sys.executable} -m pip install tensorboard`, or set it to false.") from None
        self._writer = SummaryWriter(str(folder), purge_step=0)
        self._written = 0

    def __call__(self, history: History) -> None:
        """Write the rows that are new."""
        for row in history[self._written :]:
            for measure in MEASURES:
                values = row[measure]
                points = {f"layers/{measure}/{layer:02}": value
                          for layer, value in enumerate(values)}
                points[f"mean/{measure}"] = known_mean(values)
                for name, value in points.items():
                    # TensorBoard marks what is not a number; it has no None.
                    self._writer.add_scalar(name, math.nan if value is None else value,
                                            row["tokens"])
        self._written = len(history)
        self._writer.flush()
