"""A feature's gene list, from E(f, t) by the paper's gene rule, and which features are live."""

import re

import numpy as np
import scipy.sparse as sp

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.profile import Profile
from scfm_circuits.features.statistics import FeatureStatistics

_FEATURES = 1024


MIN_FIRINGS = 5
"""Activations below which a gene's rate says nothing; such genes are not listed by rate or z."""


def gene_scores(statistics: FeatureStatistics, layer: int, n_genes: int, rule: str,
                features: np.ndarray | None = None, *, score: str = "count",
                contains: sp.csr_matrix | None = None) -> sp.csr_matrix:
    """(n_features, n_genes) how strongly genes belong to all features or to those given.

    rule: `occurrence`: activations inside that gene; `token`: for each gene, activations on any of
    its tokens in whichever gene it stands, which is what the paper describes. score: `count`, the
    number of these activations; `rate`, their share of the occurrences, E(f, t) read as a
    probability; `z`, by how many standard deviations they exceed what the feature's mean rate
    inside genes gives (binomial), where they do. contains: (tokens in genes, n_genes) which gene
    contains which token, where it is not the tokenizer that decides (`containment`).
    """
    inside = np.flatnonzero(statistics.pair_gene >= 0)
    counts = statistics.counts[layer]
    counts = sp.csr_matrix((counts if features is None else counts[features])[:, inside])
    occurrences, found = statistics.pair_count[inside].astype(np.float64), counts
    mean = np.asarray(counts.sum(axis=1), np.float64).ravel() / max(1.0, occurrences.sum())
    for step in _to_genes(statistics, inside, n_genes, rule, contains):
        found, occurrences = sp.csr_matrix(found @ step), occurrences @ step
    if score == "count":
        return found
    found.data = rescored(found.data.astype(np.float64), occurrences[found.indices],
                          np.repeat(mean, np.diff(found.indptr)), score)
    found.eliminate_zeros()
    return found


def _to_genes(statistics: FeatureStatistics, inside: np.ndarray, n_genes: int, rule: str,
              contains: sp.csr_matrix | None) -> list[sp.csr_matrix]:
    """For which genes an activation on a pair counts, (pairs in genes, n_genes), in factors.

    Counts are summed by token first: the product of both factors has as many entries as a token's
    pairs times its genes.
    """
    genes, tokens = statistics.pair_gene[inside], statistics.pair_token[inside]
    ones = np.ones(len(inside))
    if rule == "occurrence":
        return [sp.csr_matrix((ones, (np.arange(len(inside)), genes)), (len(inside), n_genes))]
    unique, token = np.unique(tokens, return_inverse=True)
    by_token = sp.csr_matrix((ones, (np.arange(len(inside)), token)), (len(inside), len(unique)))
    if contains is None:
        # A gene may hold a token twice; it still contains it once.
        contains = sp.csr_matrix((ones, (token, genes)), (len(unique), n_genes)).sign()
    return [by_token, contains]


def rescored(counts: np.ndarray, occurrences: np.ndarray, mean: np.ndarray, score: str
             ) -> np.ndarray:
    """`rate` or `z` of activations (see `gene_scores`); 0 for what is not listed.

    counts, occurrences, mean: of one shape; mean is the feature's rate over all genes.
    """
    if score == "rate":
        values = counts / occurrences
    else:
        values = (counts - occurrences * mean) / np.sqrt(
            np.maximum(occurrences * mean * (1 - mean), 1e-12))
    return np.where((counts >= MIN_FIRINGS) & (values > 0), values, 0.0)


def containment(statistics: FeatureStatistics, corpus: Corpus, profile: Profile
                ) -> sp.csr_matrix | None:
    """(tokens in genes, n_genes) which gene's symbol holds a token's letters, for the profile's
    `containment: letters`; None where the tokenizer decides or a gene's own tokens count alone.

    The other reading of "contained within gene names": not the pieces into which the tokenizer cuts
    the name, but any piece of it that spells the token.
    """
    if profile.containment == "token" or profile.gene_rule == "occurrence":
        return None
    inside = statistics.pair_gene >= 0
    tokens, token = np.unique(statistics.pair_token[inside], return_inverse=True)
    genes = np.asarray(corpus.occurring)
    symbols = "\n".join(corpus.symbols[genes])  # one long text is searched far faster than many
    starts = np.concatenate([[0], [one.end() for one in re.finditer("\n", symbols)]])
    # A leading space belongs to the place in the sentence, not to the name.
    texts = [str(corpus.tokenizer.decode([int(one)])).strip() for one in tokens]
    found = [[one.start() for one in re.finditer(re.escape(text), symbols)]
             if text and "\n" not in text else [] for text in texts]
    rows = [genes[np.unique(np.searchsorted(starts, one, side="right") - 1)] for one in found]
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    shape = (len(tokens), len(corpus.symbols))
    spelt = sp.csr_matrix((np.ones(indptr[-1]), np.concatenate([*rows, genes[:0]]), indptr), shape)
    # A token that is half a letter spells nothing, and still stands in its gene.
    stands = sp.csr_matrix((np.ones(len(token)), (token, statistics.pair_gene[inside])), shape)
    return sp.csr_matrix(spelt.maximum(stands.sign()))


def ranked_genes(statistics: FeatureStatistics, layer: int, features: np.ndarray, n_genes: int,
                 rule: str, most: int | None = None, *, score: str = "count",
                 contains: sp.csr_matrix | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each feature its activating genes, highest score first, and their scores.

    Genes that share a token tie under the rule `token`; activations inside the gene itself decide,
    then the gene's id, so the order never depends on chance. most: how many of the first genes are
    wanted at least; the rest may then be left out, which saves ordering thousands.
    """
    ranked = []
    for start in range(0, len(features), _FEATURES):
        some = features[start : start + _FEATURES]
        scores = gene_scores(statistics, layer, n_genes, rule, some, score=score,
                             contains=contains)
        own = scores if (rule, score) == ("occurrence", "count") else gene_scores(
            statistics, layer, n_genes, "occurrence", some)
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
                  profile: Profile) -> list[np.ndarray]:
    """Each feature's gene list under the profile's gene rule and list rule, as gene ids."""
    most = profile.list_size if profile.list_rule == "top" else None
    ranked = ranked_genes(statistics, layer, features, len(corpus.symbols), profile.gene_rule, most,
                          score=profile.gene_score,
                          contains=containment(statistics, corpus, profile))
    return [select_genes(genes, scores, profile.list_rule, profile.list_size, profile.list_share)
            for genes, scores in ranked]


def gene_lists(statistics: FeatureStatistics, layer: int, features: np.ndarray, corpus: Corpus,
               profile: Profile) -> list[list[str]]:
    """`gene_list_ids` as symbols."""
    return [corpus.symbols[ids].tolist()
            for ids in gene_list_ids(statistics, layer, features, corpus, profile)]


def check_live(statistics: FeatureStatistics, layer: int, cut: float) -> None:
    """InputError if a layer has no live feature: there would be nothing to show."""
    if not statistics.live(cut)[layer].any():
        raise InputError(f"Layer {layer} has no feature with log10 E(f) >= {cut:g}; lower "
                         "`l1_coefficient`, train on more tokens, or lower the live cut.")
