"""Features that are what a feature ought to be, to see whether the controls would let one pass.

A planted feature fires on every token of the genes of one term of a library, wherever such a gene
stands in a cell, and nowhere else; a diluted one on random other genes as well. If features like
these did not come out ahead of the controls, the controls would be too strict to say anything about
real ones.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.profile import Profile
from scfm_circuits.common.randomness import generator
from scfm_circuits.enrichment.gene_sets import GeneSets
from scfm_circuits.features.statistics import FeatureStatistics

MIN_GENES, MAX_GENES = 10, 100


def planted_statistics(statistics: FeatureStatistics, corpus: Corpus,
                       libraries: Sequence[GeneSets], profile: Profile, n: int = 100,
                       purity: float = 1.0) -> tuple[FeatureStatistics, pd.DataFrame]:
    """Statistics of up to n planted features, the same in every layer, and what they are.

    Terms are drawn at random (seeded) from those with 10 to 100 genes in the corpus, each set of
    genes once. purity: share of the feature's genes that are the term's; the others are drawn from
    the rest of the corpus. The table has a row per feature: library, term, n_genes (of the term, in
    the corpus); no rows if no term has that many genes, or none of them makes a live feature.

    Raises:
        InputError: a purity that is no share.
    """
    if not 0 < purity <= 1:
        raise InputError(f"The purity is {purity}; give a share above 0 and up to 1.")
    occurring = corpus.occurring
    found = _terms_within(libraries, {corpus.symbols[gene].upper(): int(gene)
                                      for gene in occurring})
    rng = generator(profile.seed, "planted features")
    sets, rows, kept = list(found), [], []
    for genes in [sets[i] for i in np.sort(rng.permutation(len(sets))[:n])]:
        others = np.setdiff1d(occurring, genes)
        more = min(round(len(genes) * (1 / purity - 1)), len(others))
        fires = np.isin(statistics.pair_gene, [*genes, *rng.permutation(others)[:more]])
        row = np.where(fires, statistics.pair_count, 0)
        # A feature that is not live is not tested, planted or not.
        if row.sum() / statistics.n_tokens >= 10.0**profile.live_cut_table4:
            rows.append(row)
            kept.append((*found[genes], len(genes)))
    counts = sp.csr_matrix(np.array(rows, np.int64).reshape(len(rows), len(statistics.pair_gene)))
    n_layers = len(statistics.fired)
    fired = np.tile(np.asarray(counts.sum(axis=1)).ravel(), (n_layers, 1))
    table = pd.DataFrame(kept, columns=["library", "term", "n_genes"])
    return FeatureStatistics(statistics.n_tokens, fired, statistics.pair_token,
                             statistics.pair_gene, statistics.pair_count, (counts,) * n_layers,
                             statistics.l0_histogram), table


def _terms_within(libraries: Sequence[GeneSets], place: Mapping[str, int]
                  ) -> dict[tuple[int, ...], tuple[str, str]]:
    """Library and name of each distinct set of corpus genes that is neither small nor large."""
    found: dict[tuple[int, ...], tuple[str, str]] = {}
    for library in libraries:
        for term, symbols in library.within(place, MIN_GENES, MAX_GENES).items():
            genes = tuple(sorted(place[symbol] for symbol in symbols))
            found.setdefault(genes, (library.name, term))
    return found
