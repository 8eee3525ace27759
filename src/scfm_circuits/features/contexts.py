"""What a feature fires on: its tokens, the families they fall into, its strongest contexts."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.cells.tokens import token_texts
from scfm_circuits.features.statistics import FeatureStatistics


def token_table(statistics: FeatureStatistics, layer: int, feature: int, corpus: Corpus
                ) -> pd.DataFrame:
    """E(f, t): the tokens a feature fires on, most often first.

    Columns: token (text), count, share (of the feature's activations), rate (share of the token's
    occurrences on which it fires), genes (in which it fires, most often first).
    """
    row = statistics.counts[layer][feature]
    pairs, counts = row.indices, row.data
    frame = pd.DataFrame({"token_id": statistics.pair_token[pairs], "count": counts,
                          "gene": statistics.pair_gene[pairs]})
    occurrences = np.bincount(statistics.pair_token, weights=statistics.pair_count)
    rows = []
    for token, group in frame.groupby("token_id"):
        order = group.sort_values(["count", "gene"], ascending=[False, True])
        genes = [str(corpus.symbols[gene]) for gene in order["gene"] if gene >= 0]
        total = int(group["count"].sum())
        rate = total / occurrences[token]  # type: ignore[index]
        rows.append((token, total, total / counts.sum(), rate, genes))
    table = pd.DataFrame(rows, columns=["token_id", "count", "share", "rate", "genes"])
    table = table.sort_values(["count", "token_id"], ascending=[False, True], ignore_index=True)
    table.insert(0, "token", token_texts(corpus.tokenizer, table["token_id"].to_numpy()))
    return table



class Context(NamedTuple):
    """Where a feature fires: a cell, a position in it, the activation, and the text around."""

    cell: int
    position: int
    activation: float
    before: str
    token: str
    after: str



def feature_contexts(statistics: FeatureStatistics, corpus: Corpus, layer: int,
                     features: np.ndarray, n: int, window: int = 6) -> list[list[Context]]:
    """The n strongest activations of each feature, at most one per cell, strongest first.

    Of equal activations those in lower cells come first. window: tokens shown on either side.
    Raises InputError if fewer than n were kept when the features were counted.
    """
    kept = statistics.context_cell.shape[2]
    if n > kept:
        raise InputError(f"{n} contexts of each feature are asked for, but {kept} were kept; raise "
                         "`contexts_per_feature` in the profile.")
    cells, positions, activations = (one[layer][features, :n].tolist() for one in (
        statistics.context_cell, statistics.context_position, statistics.context_activation))
    return [[_context(corpus, *one, window) for one in zip(*feature, strict=True) if one[0] >= 0]
            for feature in zip(cells, positions, activations, strict=True)]



def _context(corpus: Corpus, cell: int, position: int, activation: float, window: int) -> Context:
    pieces = corpus.pieces(cell)
    before = pieces[max(0, position - window) : position]
    after = pieces[position + 1 : position + 1 + window]
    return Context(cell, position, activation, "".join(before), pieces[position], "".join(after))



def draw_features(statistics: FeatureStatistics, layer: int, n: int, cut: float, seed: int
                  ) -> np.ndarray:
    """n live features of a layer drawn at random (all of them if there are fewer), sorted."""
    live = np.flatnonzero(statistics.live(cut)[layer])
    drawn = np.random.default_rng([seed, 7, layer]).permutation(live)[:n]
    return np.sort(drawn)

FeatureOf = tuple[int, int]

"""A feature by layer and index, wherever it stands."""



def token_families(statistics: FeatureStatistics, features: Iterable[FeatureOf], *,
                   share: float = 0.5, most: int = 10) -> dict[FeatureOf, tuple[int, ...]]:
    """For each feature the ids of the tokens it fires on most, most often first.

    As many as hold `share` of its activations in the corpus, and `most` at the most; ties go by
    token id. A feature that never fires in the corpus has none.
    """
    families = {}
    for layer, feature in features:
        row = statistics.counts[layer][feature]
        tokens, inverse = np.unique(statistics.pair_token[row.indices], return_inverse=True)
        counts = np.bincount(inverse, weights=row.data, minlength=len(tokens))
        order = np.lexsort((tokens, -counts))
        held = np.cumsum(counts[order])
        n = int(np.searchsorted(held, share * held[-1])) + 1 if len(held) else 0
        families[layer, feature] = tuple(tokens[order][: min(n, most)].tolist())
    return families



def top_tokens(statistics: FeatureStatistics, layer: int, features: np.ndarray, corpus: Corpus,
               n: int = 6) -> list[str]:
    """For each feature the tokens it fires on most, with their share of its activations."""
    tokens, token = np.unique(statistics.pair_token, return_inverse=True)
    by_token = sp.csr_matrix((np.ones(len(token)), (np.arange(len(token)), token)))
    counts = sp.csr_matrix(statistics.counts[layer][features] @ by_token)
    texts = token_texts(corpus.tokenizer, tokens)
    shown = []
    for row in range(len(features)):
        own = slice(counts.indptr[row], counts.indptr[row + 1])
        places, values = counts.indices[own], counts.data[own]
        order = np.lexsort((places, -values))[:n]
        shown.append(", ".join(f"{texts[places[k]]} {100 * values[k] / values.sum():.0f} %"
                               for k in order))
    return shown
