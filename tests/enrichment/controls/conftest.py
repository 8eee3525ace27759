from typing import Any

import pytest
from helpers import model_for, tiny_corpus, tiny_transcoders

from scfm_circuits.enrichment.gene_sets import gene_sets_from_dict
from scfm_circuits.features.statistics import count_features


@pytest.fixture(scope="module")
def parts() -> Any:
    """A corpus, statistics of features and of a smaller dictionary there, and two libraries."""
    corpus = tiny_corpus(20)
    model = model_for(corpus).float()
    statistics = count_features(model, tiny_transcoders(model), corpus, 8, progress=False)
    other = count_features(model, tiny_transcoders(model, 10, seed=5), corpus, 8, progress=False)
    genes = corpus.symbols.tolist()
    libraries = [gene_sets_from_dict("first", {"a": genes[:4], "b": genes[3:9]}),
                 gene_sets_from_dict("second", {"c": genes[9:14], "d": [*genes[1:3], "ELSEWHERE"]})]
    return corpus, statistics, other, libraries
