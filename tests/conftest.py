"""Settings of all tests, and what those of training share unless they have their own.

The tests hold identities in float64 and byte for byte, and several start processes; they run on the
processor wherever they run. Those that need a GPU are marked `gpu` and run by `pytest -m gpu`.
Where no test ends for a minute, those that run are named; one that never ends is ended (pyproject).
"""

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile

# A first call imports libraries, and the machine may be busy: time says nothing about an example.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from the tests and the processes that they start, unless they are wanted."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers have nowhere to say it
        config.pluginmanager.register(Waiting())


class Waiting:
    """Names the tests under way whenever none has ended for a time."""

    seconds = float(os.environ.get("SCFM_TESTS_NAMED_AFTER", "60"))

    def __init__(self) -> None:
        self._running, self._none_ended, self._over = set[str](), True, threading.Event()
        self._stderr = os.dup(2)  # what is written to 2 itself while a test runs, is captured

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running.add(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when not in ("setup", "call"):  # the teardown, or its worker's end
            self._running.discard(report.nodeid)
            self._none_ended = False

    def pytest_sessionstart(self) -> None:
        threading.Thread(target=self._name, daemon=True).start()

    def pytest_sessionfinish(self) -> None:
        self._over.set()

    def _name(self) -> None:
        while not self._over.wait(self.seconds):
            if self._none_ended and self._running:
                told = f"\nWaiting for {', '.join(sorted(self._running))}\n"
                os.write(self._stderr, told.encode())
            self._none_ended = True


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the tests' own, in which the demo's cells are read from their package once."""
    os.environ["SCFM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return Path(os.environ["SCFM_CACHE"])


@pytest.fixture(scope="module")
def corpus() -> "Corpus":
    from helpers import tiny_corpus

    return tiny_corpus(14)


@pytest.fixture(scope="module")
def model(corpus: "Corpus") -> Any:
    import torch
    from helpers import model_for

    return model_for(corpus, dtype=torch.float32)


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Profile":
    """A profile that trains in a moment."""
    from helpers import TRAINING, tiny_profile

    return tiny_profile(monkeypatch, tmp_path, **TRAINING)
