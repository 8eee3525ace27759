"""A feature's gene list, from E(f, t) by the paper's gene rule, and which features are live."""

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.features.statistics import FeatureStatistics

if TYPE_CHECKING:
    from scfm_circuits.common.profile import Profile

_FEATURES = 1024


def gene_scores(statistics: FeatureStatistics, layer: int, n_genes: int, rule: str,
                features: np.ndarray | None = None) -> sp.csr_matrix:
    """(n_features, n_genes) activation counts of genes, of all features or of those given.

    `occurrence`: activations inside that gene. `token`: for each gene, activations on any of its
    tokens in whichever gene it stands, which is what the paper describes.
    """
    inside = np.flatnonzero(statistics.pair_gene >= 0)
    counts = statistics.counts[layer]
    counts = (counts if features is None else counts[features])[:, inside]
    genes, tokens = statistics.pair_gene[inside], statistics.pair_token[inside]
    ones = np.ones(len(inside))
    by_gene = sp.csr_matrix((ones, (np.arange(len(inside)), genes)), (len(inside), n_genes))
    if rule == "occurrence":
        return sp.csr_matrix(counts @ by_gene)
    unique, token = np.unique(tokens, return_inverse=True)
    by_token = sp.csr_matrix((ones, (np.arange(len(inside)), token)), (len(inside), len(unique)))
    # A gene may hold a token twice; it still contains it once.
    contains = sp.csr_matrix((ones, (token, genes)), (len(unique), n_genes)).sign()
    return sp.csr_matrix((counts @ by_token) @ contains)


def ranked_genes(statistics: FeatureStatistics, layer: int, features: np.ndarray, n_genes: int,
                 rule: str, most: int | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each feature its activating genes, most active first, and their scores.

    Genes that share a token tie under the rule `token`; activations inside the gene itself decide,
    then the gene's id, so the order never depends on chance. most: how many of the first genes are
    wanted at least; the rest may then be left out, which saves ordering thousands.
    """
    ranked = []
    for start in range(0, len(features), _FEATURES):
        some = features[start : start + _FEATURES]
        scores = gene_scores(statistics, layer, n_genes, rule, some)
        own = gene_scores(statistics, layer, n_genes, "occurrence", some)
        second = np.zeros(n_genes)
        for row in range(len(some)):
            part, inside = (slice(*one.indptr[row : row + 2]) for one in (scores, own))
            genes, values = scores.indices[part], scores.data[part]
            if most is not None and len(values) > most:
                head = values >= np.partition(values, -most)[-most]
                genes, values = genes[head], values[head]
            second[own.indices[inside]] = own.data[inside]
            order = np.lexsort((genes, -second[genes], -values))
            second[own.indices[inside]] = 0
            ranked.append((genes[order], values[order]))
    return ranked


def select_genes(genes: np.ndarray, scores: np.ndarray, list_rule: str, size: int, share: float
                 ) -> np.ndarray:
    """The head of a ranking that is tested: all, the first `size`, or `share` of the scores."""
    if list_rule == "all":
        return genes
    if list_rule == "top":
        return genes[:size]
    cumulative = np.cumsum(scores)
    if not len(cumulative):
        return genes
    return genes[: int(np.searchsorted(cumulative, share * cumulative[-1])) + 1]


def gene_list_ids(statistics: FeatureStatistics, layer: int, features: np.ndarray, corpus: Corpus,
                  profile: "Profile") -> list[np.ndarray]:
    """Each feature's gene list under the profile's gene rule and list rule, as gene ids."""
    most = profile.list_size if profile.list_rule == "top" else None
    ranked = ranked_genes(statistics, layer, features, len(corpus.symbols), profile.gene_rule, most)
    return [select_genes(genes, scores, profile.list_rule, profile.list_size, profile.list_share)
            for genes, scores in ranked]


def gene_lists(statistics: FeatureStatistics, layer: int, features: np.ndarray, corpus: Corpus,
               profile: "Profile") -> list[list[str]]:
    """`gene_list_ids` as symbols."""
    return [corpus.symbols[ids].tolist()
            for ids in gene_list_ids(statistics, layer, features, corpus, profile)]


def check_live(statistics: FeatureStatistics, layer: int, cut: float) -> None:
    """InputError if a layer has no live feature: there would be nothing to show."""
    if not statistics.live(cut)[layer].any():
        raise InputError(f"Layer {layer} has no feature with log10 E(f) >= {cut:g}; lower "
                         "`l1_coefficient`, train on more tokens, or lower the live cut.")
