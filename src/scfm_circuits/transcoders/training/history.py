"""Watching a training run: curves that redraw themselves in a notebook, and TensorBoard.

`watcher` gives what `get_transcoders` takes as `logged`. When the book is executed nobody looks on:
`execution` says so to its kernels through the environment, and the page gets the final curves only.
"""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scfm_circuits import InputError

MEASURES = ("reconstruction", "sparsity", "l0", "fvu", "dead")
"""What a row of the history holds, beside its step and tokens: a list of one number per layer,
None where it was not finite."""

FAR, RISEN = 10.0, 2.0
"""A fraction of variance unexplained that only a failed or an unfinished training leaves; how many
times above its lowest it has risen, and not just varied from batch to batch."""

History = list[dict[str, Any]]
Logged = Callable[[History], None]
"""Called with the history so far, each time a row is added."""


def known_mean(values: Sequence[float | None]) -> float:
    """Mean of a measure over layers, without those where it was not finite; NaN if all are so."""
    known = [one for one in values if one is not None]
    return sum(known) / len(known) if known else math.nan


def trouble(history: History, layer: int, warm: bool, last: bool) -> str:
    """What the last row says is wrong with a layer, as the end of a sentence; empty if nothing is.

    A layer diverges if its loss is no finite number or, once the rate has warmed up (`warm`), if
    its FVU is above `FAR` and `RISEN` times the lowest so far. Writing directions start with norm
    1, so where an MLP writes little the first estimates are far off too; such a layer comes down
    and is named only if it is still there in the run's last row (`last`).
    """
    row = history[-1]
    loss, fvu, dead = (row[key][layer] for key in ("reconstruction", "fvu", "dead"))
    if loss is None or fvu is None:
        return "diverges (its loss is infinite or not a number); lower `learning_rate`"
    told = f"(fraction of variance unexplained {fvu:.3g})"
    lowest = min(one for row in history if (one := row["fvu"][layer]) is not None)
    if warm and fvu > FAR and fvu > RISEN * lowest:
        return f"diverges {told}; lower `learning_rate`"
    if last and fvu > FAR:
        return (f"ends far worse than its mean output alone {told}; train longer "
                "(`training_tokens`) or change `learning_rate`")
    if dead > 0.95:
        return f"dies ({dead:.0%} of its features are dead); lower `l1_coefficient`"
    return ""


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
