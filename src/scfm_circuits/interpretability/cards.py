"""Drawing the deck of the human evaluation: features, decoys that fire as often, their contexts.

Phases: the study's features are drawn as for Table 3; each decoy is matched to one of them in
log10 E(f); what each card fires on is counted over all cells; activations for contexts are read
from the model on the cells of the strongest ones and on a random sample of cells. All is seeded.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.cells.tokens import token_texts
from scfm_circuits.common.randomness import generator
from scfm_circuits.features.baselines import untrained_encoder, untrained_statistics
from scfm_circuits.features.contexts import (
    Context,
    draw_features,
    feature_contexts,
    fired_tokens,
    pieces_around,
)
from scfm_circuits.features.gene_lists import check_live
from scfm_circuits.features.statistics import FeatureStatistics, corpus_pairs
from scfm_circuits.interpretability.deck import (
    FEATURE,
    QUANTILE,
    RANDOM,
    TOP,
    UNTRAINED,
    Card,
    CardContext,
    CardGene,
    CardToken,
    Deck,
    Piece,
    deck_key,
)
from scfm_circuits.interpretability.ratings import rating_sheet
from scfm_circuits.interpretability.scores import draw_tokens
from scfm_circuits.models.mlp_sites import batches, device_of, mlp_sites
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM

    from scfm_circuits.common.profile import Profile

WINDOW = 12
"""Tokens shown on either side of a context's own."""
TOKENS_SHOWN, TOKENS_WITH_GENES, GENES_PER_TOKEN = 5, 3, 8
SAMPLE_CELLS = 400
"""Cells from which the contexts of all strengths are drawn."""


class Fires(NamedTuple):
    """Where a card fires in some cells, and how strongly: arrays of equal length."""

    cell: np.ndarray
    position: np.ndarray
    activation: np.ndarray


class Subject(NamedTuple):
    """What a card is about. counts: (n_pairs,) how often it fires on each pair of the corpus.

    fires: everywhere in the cells looked at. strongest: (cell, position), strongest first.
    """

    source: str
    feature: int
    counts: np.ndarray
    fires: Fires
    strongest: tuple[tuple[int, int], ...]


class Study(NamedTuple):
    """What is handed to raters.

    drawn: the features, contexts: the strongest of each. key, sheet: as `deck_key` and
    `rating_sheet` make them.
    """

    drawn: np.ndarray
    contexts: list[list[Context]]
    deck: Deck
    key: pd.DataFrame
    sheet: pd.DataFrame


def draw_study(model: "GPTNeoXForCausalLM", transcoders: Transcoders,
               statistics: FeatureStatistics, corpus: Corpus, profile: "Profile") -> Study:
    """Draw live features of the rated layer, their cards with decoys, and the sheet of Table 3.

    Raises InputError if the layer has no live feature.
    """
    layer = profile.human_layer
    check_live(statistics, layer, profile.live_cut)
    drawn = draw_features(statistics, layer, profile.human_features, profile.live_cut, profile.seed)
    contexts = feature_contexts(statistics, corpus, layer, drawn, profile.contexts_per_feature)
    deck = draw_deck(model, transcoders, statistics, corpus, profile, drawn)
    key = deck_key(deck)
    sheet = rating_sheet(deck.study, layer, drawn, statistics, contexts, corpus, profile.gene_rule,
                         key)
    return Study(drawn, contexts, deck, key, sheet)


def draw_deck(model: "GPTNeoXForCausalLM", transcoders: Transcoders,
              statistics: FeatureStatistics, corpus: Corpus, profile: "Profile",
              drawn: np.ndarray) -> Deck:
    """The study's deck: the features drawn and `human_decoys` decoys, in random order.

    Fewer decoys of the untrained encoder if it has fewer live features. The study's name depends on
    all that was drawn and counted.
    """
    layer, rng = profile.human_layer, generator(profile.seed, "cards")
    n_random = profile.human_decoys // 2
    matched = np.resize(rng.permutation(drawn), profile.human_decoys)
    sample = np.sort(rng.permutation(len(corpus))[:SAMPLE_CELLS])
    subjects = _of_encoder(FEATURE, model, transcoders, statistics, drawn, corpus, sample, profile)
    pools = {one.feature: one.fires.activation for one in subjects}
    if profile.human_decoys > n_random:
        n = transcoders.n_features
        other = untrained_statistics(model, statistics, corpus, profile, n_features=n)
        encoder = untrained_encoder(model, statistics, corpus, profile, n)
        wanted = statistics.log10_frequency[layer, matched[n_random:]]
        chosen = nearest(wanted, other.log10_frequency[layer], other.live(profile.live_cut)[layer])
        subjects += _of_encoder(UNTRAINED, model, encoder, other, chosen, corpus, sample, profile)
    for feature in matched[:n_random]:
        pool = pools[int(feature)]
        subjects.append(_random_tokens(int(statistics.fired[layer, feature]), pool if len(pool) else
                                       statistics.context_activation[layer, feature, :1], corpus,
                                       statistics, profile.contexts_per_feature, rng))
    order = rng.permutation(len(subjects))
    cards = tuple(_card(f"c{place + 1:02d}", subjects[i], layer, statistics, corpus,
                        profile.contexts_per_feature, rng) for place, i in enumerate(order))
    return Deck(_study_name(profile, cards), cards)


def nearest(wanted: np.ndarray, given: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """For each wanted value the index of the nearest allowed given one, each used once."""
    free, chosen = np.flatnonzero(allowed).tolist(), []
    for value in wanted[: len(free)]:
        chosen.append(min(free, key=lambda i: (abs(given[i] - value), i)))
        free.remove(chosen[-1])
    return np.array(chosen, np.int64)


def _study_name(profile: "Profile", cards: Sequence[Card]) -> str:
    """Profile, layer and a digest of what was drawn and counted; activations' last digits vary."""
    content = [(one.card, one.source, one.layer, one.feature,
                [(token.text, token.fired) for token in one.tokens],
                [(gene.symbol, gene.fired) for gene in one.genes]) for one in cards]
    digest = hashlib.sha256(repr(content).encode()).hexdigest()[:10]
    return f"{profile.name}-layer{profile.human_layer}-{digest}"


# --- what a card fires on ------------------------------------------------------------------------


def _of_encoder(source: str, model: "GPTNeoXForCausalLM", encoder: Transcoders,
                statistics: FeatureStatistics, features: np.ndarray, corpus: Corpus,
                sample: np.ndarray, profile: "Profile") -> list[Subject]:
    layer, n = profile.human_layer, profile.contexts_per_feature
    cells = statistics.context_cell[layer][features, :n]
    positions = statistics.context_position[layer][features, :n]
    needed = np.union1d(sample, cells[cells >= 0])
    fires = activations(model, encoder, corpus, needed, layer, features, profile.forward_cells)
    counts = statistics.counts[layer][features].toarray()
    return [Subject(source, int(feature), counts[i], fires[i],
                    tuple((int(c), int(p)) for c, p in zip(cells[i], positions[i], strict=True)
                          if c >= 0))
            for i, feature in enumerate(features)]


@torch.no_grad()
def activations(model: "GPTNeoXForCausalLM", encoder: Transcoders, corpus: Corpus,
                cells: np.ndarray, layer: int, features: np.ndarray, forward_cells: int
                ) -> list[Fires]:
    """Where each of some features of a layer is active in some cells."""
    device = device_of(model)
    columns = torch.from_numpy(features).to(device)
    found: list[list[np.ndarray]] = [[] for _ in features]
    for rows, tokens, mask in batches(corpus, cells, forward_cells, device):
        x = encoder.variant.read(*mlp_sites(model, tokens, mask))[layer]
        z = encoder.layer_activations(layer, x)[:, columns].float().cpu().numpy()
        cell, position = np.nonzero(mask.cpu().numpy())
        for i in range(len(features)):
            active = np.flatnonzero(z[:, i] > 0)
            found[i].append(np.stack([rows[cell[active]], position[active], z[active, i]]))
    return [Fires(*(part[0].astype(int), part[1].astype(int), part[2]))
            for part in (np.concatenate(one, axis=1) if one else np.zeros((3, 0))
                         for one in found)]


def _random_tokens(wanted: int, pool: np.ndarray, corpus: Corpus, statistics: FeatureStatistics,
                   n_contexts: int, rng: np.random.Generator) -> Subject:
    """A decoy on random tokens; its activations are drawn from `pool`, those of a real feature."""
    inside = statistics.pair_gene >= 0
    tokens, place = np.unique(statistics.pair_token[inside], return_inverse=True)
    occurrences = np.bincount(place, statistics.pair_count[inside])
    drawn, rate = draw_tokens(occurrences, wanted, rng)
    here = np.isin(corpus.tokens, tokens[drawn]) & corpus.mask & (corpus.gene >= 0)
    cell, position = np.nonzero(here)
    fired = rng.random(len(cell)) < rate
    cell, position = cell[fired], position[fired]
    activation = rng.choice(pool, len(cell)) if len(cell) else np.zeros(0)
    *_, index = corpus_pairs(corpus)
    counts = np.bincount(index[cell, position], minlength=len(statistics.pair_count))
    order = np.argsort(-activation, kind="stable")
    _, first = np.unique(cell[order], return_index=True)
    strongest = order[np.sort(first)[:n_contexts]]
    return Subject(RANDOM, -1, counts, Fires(cell, position, activation),
                   tuple((int(cell[i]), int(position[i])) for i in strongest))


# --- a card --------------------------------------------------------------------------------------


def _card(name: str, subject: Subject, layer: int, statistics: FeatureStatistics, corpus: Corpus,
          n_contexts: int, rng: np.random.Generator) -> Card:
    total = max(int(subject.counts.sum()), 1)
    ids, fired = (one[:TOKENS_SHOWN] for one in
                  fired_tokens(statistics, sp.csr_matrix(subject.counts)))
    present = np.bincount(statistics.pair_token, statistics.pair_count)[ids]
    texts = token_texts(corpus.tokenizer, ids)
    shown = tuple(CardToken(text, float(n / total), int(n), int(m))
                  for text, n, m in zip(texts, fired, present, strict=True))
    genes = [gene for i, text in zip(ids[:TOKENS_WITH_GENES], texts, strict=False)
             for gene in _genes(np.flatnonzero((statistics.pair_token == i)
                                               & (statistics.pair_gene >= 0)),
                                subject.counts, text, statistics, corpus)]
    places = [(TOP, *one) for one in subject.strongest]
    places += [(QUANTILE, *one) for one in quantile_places(subject, n_contexts, rng)]
    return Card(name, subject.source, layer, subject.feature,
                float(np.log10(subject.counts.sum() / statistics.n_tokens + 1e-10)), shown,
                tuple(genes), tuple(_context(*one, subject.fires, corpus) for one in places))


def _genes(pairs: np.ndarray, counts: np.ndarray, text: str, statistics: FeatureStatistics,
           corpus: Corpus) -> list[CardGene]:
    """Genes that contain a token: those in which it occurs most, and those it fires in most."""
    common = pairs[np.argsort(-statistics.pair_count[pairs], kind="stable")]
    active = pairs[np.argsort(-counts[pairs], kind="stable")]
    kept = dict.fromkeys([*active[: GENES_PER_TOKEN // 2], *common])
    return [CardGene(str(corpus.symbols[statistics.pair_gene[pair]]), text, int(counts[pair]),
                     int(statistics.pair_count[pair])) for pair in list(kept)[:GENES_PER_TOKEN]]


def quantile_places(subject: Subject, n: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(cell, position) of one random firing from each of n strata of the activations.

    Strata are equal in number of firings, the strongest first; the strongest contexts are left out.
    Fewer if it fires fewer times in the cells looked at.
    """
    cell, position, activation = subject.fires
    order = np.argsort(-activation, kind="stable")
    shown = set(subject.strongest)
    order = np.array([i for i in order if (int(cell[i]), int(position[i])) not in shown], np.int64)
    strata = [part for part in np.array_split(order, n) if len(part)]
    chosen = [int(rng.choice(part)) for part in strata]
    return [(int(cell[i]), int(position[i])) for i in chosen]


def _context(kind: str, cell: int, position: int, fires: Fires, corpus: Corpus) -> CardContext:
    start, pieces = pieces_around(corpus, cell, position, WINDOW)
    here = fires.cell == cell
    strength = dict(zip(fires.position[here].tolist(), fires.activation[here].tolist(),
                        strict=True))
    return CardContext(kind, cell, tuple(
        Piece(text, round(float(strength.get(i, 0.0)), 4),
              str(corpus.symbols[corpus.gene[cell, i]]) if corpus.gene[cell, i] >= 0 else None)
        for i, text in enumerate(pieces, start)))
