from typing import Any

import pytest
from helpers import model_for, tiny_corpus, tiny_transcoders


@pytest.fixture(scope="module")
def parts() -> Any:
    """A model of a corpus of 24 cells, its transcoders, and the corpus."""
    corpus = tiny_corpus(24)
    model = model_for(corpus)
    return model, tiny_transcoders(model), corpus
