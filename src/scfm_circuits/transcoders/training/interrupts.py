"""Ending a long run at a moment of its own choosing when Ctrl-C or SIGTERM asks for it."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


class Terminated(SystemExit):
    """The process was asked to end (SIGTERM, as SLURM sends before it kills)."""


class Stops:
    """Requests to end: raised at once, or at the end of a block that must not be cut short."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._holding = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.asked = number
        if not self._holding:
            self.end(number)

    def end(self, number: int) -> NoReturn:
        """Raise what a signal stands for."""
        self.asked = None
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(128 + number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold requests back to the end of the block."""
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1
        if self.asked is not None and not self._holding:
            self.end(self.asked)


@contextlib.contextmanager
def stops_heeded() -> Iterator[Stops]:
    """Within the block, Ctrl-C raises KeyboardInterrupt and SIGTERM `Terminated`, unless held back.

    A signal that the process ignores stays ignored. Python delivers signals to the main thread
    only, so elsewhere there is nothing to heed.
    """
    stops = Stops()
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in before.items()
                  if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, stops.handle)
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
