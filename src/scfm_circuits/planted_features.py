"""Features that are what a feature ought to be, to see whether the controls would let one pass.

A planted feature fires on every token of the genes of one term of a library, wherever such a gene
stands in a cell, and nowhere else. If features like these did not come out beyond all controls, the
controls would be too strict to say anything about real ones.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scfm_circuits import InputError
from scfm_circuits.enrichment import GeneSets
from scfm_circuits.features import FeatureStatistics
from scfm_circuits.sentences import Corpus

if TYPE_CHECKING:
    from scfm_circuits.profile import Profile

MIN_GENES, MAX_GENES = 10, 100


def planted_statistics(statistics: FeatureStatistics, corpus: Corpus,
                       libraries: Sequence[GeneSets], profile: "Profile", n: int = 200
                       ) -> tuple[FeatureStatistics, pd.DataFrame]:
    """Statistics of up to n planted features, the same in every layer, and what they are.

    Terms are drawn at random (seeded) from those with 10 to 100 genes in the corpus, each set of
    genes once. The table has a row per feature: library, term, n_genes (of the term, in the
    corpus).

    Raises:
        InputError: no term has that many genes in the corpus.
    """
    occurring = np.unique(corpus.gene[corpus.gene >= 0])
    place = {corpus.symbols[gene].upper(): gene for gene in occurring}
    found: dict[tuple[int, ...], tuple[str, str]] = {}
    for library in libraries:
        for i, term in enumerate(library.terms):
            genes = sorted(place[symbol] for symbol in library.term_members(i) if symbol in place)
            if MIN_GENES <= len(genes) <= MAX_GENES:
                found.setdefault(tuple(genes), (library.name, term))
    if not found:
        raise InputError(f"No term has {MIN_GENES} to {MAX_GENES} genes in the corpus; nothing can "
                         "be planted.")
    sets = list(found)
    rng = np.random.default_rng([profile.seed, 13])
    drawn = np.sort(rng.permutation(len(sets))[:n])
    rows = []
    for i in drawn:
        rows.append(np.where(np.isin(statistics.pair_gene, sets[i]), statistics.pair_count, 0))
    counts = sp.csr_matrix(np.array(rows))
    n_layers = len(statistics.fired)
    fired = np.tile(np.asarray(counts.sum(axis=1)).ravel(), (n_layers, 1))
    table = pd.DataFrame([(*found[sets[i]], len(sets[i])) for i in drawn],
                         columns=["library", "term", "n_genes"])
    return replace(statistics, fired=fired, counts=(counts,) * n_layers), table
