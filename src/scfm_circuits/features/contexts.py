"""What a feature fires on: its tokens, the families they fall into, its strongest contexts."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.cells.tokens import token_texts
from scfm_circuits.common.randomness import generator
from scfm_circuits.features.statistics import FeatureStatistics


def fired_tokens(statistics: FeatureStatistics, counts: sp.csr_matrix
                 ) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the tokens that something fires on, and how often: most often first, ties by id.

    counts: (1, n_pairs) how often it fires on each pair of the corpus, as a feature's row of
    `FeatureStatistics.counts`.
    """
    tokens, place = np.unique(statistics.pair_token[counts.indices], return_inverse=True)
    fired = np.bincount(place, counts.data, len(tokens)).astype(np.int64)
    order = np.lexsort((tokens, -fired))
    return tokens[order], fired[order]


def token_table(statistics: FeatureStatistics, layer: int, feature: int, corpus: Corpus,
                most: int | None = None) -> pd.DataFrame:
    """E(f, t): the tokens a feature fires on, most often first; `most` rows, or all.

    Columns: token (text), token_id, count, share (of the feature's activations), rate (share of the
    token's occurrences on which it fires), genes (in which it fires, most often first).
    """
    row = statistics.counts[layer][feature]
    ids, fired = fired_tokens(statistics, row)
    total = fired.sum()
    ids, fired = ids[:most], fired[:most]
    token, gene = statistics.pair_token[row.indices], statistics.pair_gene[row.indices]
    genes = []
    for one in ids:
        inside = np.flatnonzero((token == one) & (gene >= 0))
        inside = inside[np.lexsort((gene[inside], -row.data[inside]))]
        genes.append(corpus.symbols[gene[inside]].tolist())
    occurrences = np.bincount(statistics.pair_token, statistics.pair_count)[ids]
    return pd.DataFrame({"token": token_texts(corpus.tokenizer, ids), "token_id": ids,
                         "count": fired, "share": fired / total, "rate": fired / occurrences,
                         "genes": genes})


def top_tokens(statistics: FeatureStatistics, layer: int, features: np.ndarray, corpus: Corpus,
               n: int = 6) -> list[str]:
    """For each feature the tokens it fires on most, with their share of its activations."""
    shown = []
    for feature in features:
        ids, fired = fired_tokens(statistics, statistics.counts[layer][feature])
        texts = token_texts(corpus.tokenizer, ids[:n])
        shown.append(", ".join(f"{text} {100 * count / fired.sum():.0f} %"
                               for text, count in zip(texts, fired, strict=False)))
    return shown


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
        ids, fired = fired_tokens(statistics, statistics.counts[layer][feature])
        held = np.cumsum(fired)
        n = int(np.searchsorted(held, share * held[-1])) + 1 if len(held) else 0
        families[layer, feature] = tuple(ids[: min(n, most)].tolist())
    return families


class Context(NamedTuple):
    """Where a feature fires: a cell, a position in it, the activation, and the text around."""

    cell: int
    position: int
    activation: float
    before: str
    token: str
    after: str


def pieces_around(corpus: Corpus, cell: int, position: int, window: int) -> tuple[int, list[str]]:
    """The tokens of a cell from `window` before a position to `window` behind it, as texts, and
    the position of the first."""
    start = max(0, position - window)
    ids = corpus.tokens[cell][corpus.mask[cell]][start : position + window + 1]
    return start, token_texts(corpus.tokenizer, ids)


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
    return [[_context(corpus, window, *one) for one in zip(*feature, strict=True) if one[0] >= 0]
            for feature in zip(cells, positions, activations, strict=True)]


def _context(corpus: Corpus, window: int, cell: int, position: int, activation: float) -> Context:
    start, pieces = pieces_around(corpus, cell, position, window)
    at = position - start
    return Context(cell, position, activation, "".join(pieces[:at]), pieces[at],
                   "".join(pieces[at + 1 :]))


def draw_features(statistics: FeatureStatistics, layer: int, n: int, cut: float, seed: int
                  ) -> np.ndarray:
    """n live features of a layer drawn at random (all of them if there are fewer), sorted."""
    live = np.flatnonzero(statistics.live(cut)[layer])
    drawn = generator(seed, "features of a study", layer).permutation(live)[:n]
    return np.sort(drawn)
