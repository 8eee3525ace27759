"""Curves of a training that is under way: in a notebook run by hand, or in TensorBoard."""

import io
import os
import sys
import time
from typing import Any

from scfm_circuits.common.profile import Profile
from scfm_circuits.transcoders.training.history import History, Logged, TensorBoard

UNWATCHED = "SCFM_UNWATCHED"
"""Environment variable that is set where notebooks are executed without anybody looking on."""


def watched() -> bool:
    """Whether this is a notebook's kernel whose output a person sees while it runs."""
    if os.environ.get(UNWATCHED):
        return False
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def watcher(profile: Profile) -> Logged | None:
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

    from scfm_circuits.report.plots.cells_and_training import transcoder_curves

    figure, buffer = transcoder_curves(history), io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)  # or the notebook would show it once more
    return buffer.getvalue()
