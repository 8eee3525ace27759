"""What chapters write while they run, on one terminal.

Whole lines stay. Below them is one line that holds, of each chapter that runs, what its cell wrote
last, or else how many of its cells are done. Where nobody looks on, only messages are printed.
"""

import contextlib
import re
import shutil
import threading
from collections.abc import Iterator
from typing import NamedTuple, TextIO

CLEARED = "\r\x1b[K"
"""Back to the start of the terminal's line, and nothing on it."""
_MOVES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Line:
    """What is written by one writer, as a file: a line feed ends a line that stays, and after a
    carriage return, as in bars, the line begins anew."""

    def __init__(self, screen: "Screen") -> None:
        self._screen = screen
        self.text = ""

    def write(self, text: str) -> None:
        """Show the text at once."""
        with self._screen.changed() as terminal:
            for piece in re.split("(\r?\n|\r)", _MOVES.sub("", text)):
                if piece.endswith("\n"):
                    print(self.text, file=terminal)
                self.text = "" if piece.endswith(("\n", "\r")) else self.text + piece

    def flush(self) -> None:
        """papermill calls this after each piece."""


class Live(NamedTuple):
    """A chapter's lines: what its cells write, and how many of them are done."""

    name: str
    cells: Line
    bar: Line

    def shown(self) -> tuple[str, str]:
        """The chapter's number, and the line that it shows."""
        number = self.name.split("_")[0]
        return number, self.cells.text if self.cells.text.strip() else self.bar.text


class Screen:
    """The terminal, if `stderr` is one; chapters in several threads write on it."""

    def __init__(self, stderr: TextIO) -> None:
        self._terminal = stderr if stderr.isatty() else None
        self._chapters: list[Live] = []
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def of_chapter(self, name: str) -> Iterator[Live | None]:
        """A chapter's lines; None where nobody looks on."""
        live = Live(name, Line(self), Line(self))
        with self.changed():
            self._chapters.append(live)
        try:
            yield live if self._terminal is not None else None
        finally:
            with self.changed():
                self._chapters.remove(live)

    def say(self, message: str) -> None:
        """Print a message above the last line, on stdout."""
        with self.changed():
            print(message, flush=True)

    @contextlib.contextmanager
    def changed(self) -> Iterator[TextIO | None]:
        """The terminal with its last line cleared, which is written anew afterwards."""
        with self._lock:
            if self._terminal is None:
                yield None
                return
            self._terminal.write(CLEARED)
            self._terminal.flush()
            yield self._terminal
            shown = [one.shown() for one in self._chapters]
            texts = [(number, text) for number, text in shown if text.strip()]
            width = (shutil.get_terminal_size().columns - 1) // max(1, len(texts)) - 2
            self._terminal.write("  ".join(
                (text if text.startswith(number) or len(texts) == 1 else f"{number} {text}")[:width]
                for number, text in texts))
            self._terminal.flush()
