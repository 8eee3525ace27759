"""Settings of all tests, and what those of training share unless they have their own.

The tests hold identities in float64 and byte for byte, and several start processes; they run on the
processor wherever they run. Those that need a GPU are marked `gpu` and run by `pytest -m gpu`.
"""

import os
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
