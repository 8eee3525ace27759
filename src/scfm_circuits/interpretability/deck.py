"""The deck of the human evaluation: cards to rate, decoys hidden among them.

A card shows what a rater can judge a feature by, and nothing that tells what it is: which sub-word
tokens it fires on, whether it fires on all genes that contain these tokens or on some, and contexts
with the activation of each token. Most cards are live features of one layer (the paper's Table 3),
the others are decoys that fire as often:

- *untrained encoder*: a feature that reads a random direction of the real model;
- *random tokens*: some tokens drawn at random, on which it "fires" at random.

`write_deck` writes the cards without what they are, for raters; `deck_key` is the table
that tells. `cards` draws them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from scfm_circuits.common.files import write_atomic

FEATURE, UNTRAINED, RANDOM = "feature", "untrained encoder", "random tokens"
SOURCES = (FEATURE, UNTRAINED, RANDOM)
"""What a card may be; the last two are decoys."""
TOP, QUANTILE = "top", "quantile"
"""Kinds of contexts: the strongest, and one from each stratum of the activations."""
INSTRUCTIONS = (
    "Each card shows one feature of the model: the sub-word tokens on which it is active, genes "
    "that contain them, and contexts in which it is active.",
    "Answer Yes if it is active consistently on tokens of specific genes or gene families, No if "
    "it is active on a sub-word whatever the gene or without a pattern, Unsure if you cannot tell.",
    "Firing rates help: a sub-word's feature is active in all genes that contain the token, a "
    "gene's or a family's feature in some and not in the others.",
    "Some cards are decoys that mean nothing. Rate alone; give a label if you see a pattern.",
)


class CardToken(NamedTuple):
    """A token that a card fires on.

    share: of the card's activations; fired: how often it is active there; present: how often the
    token occurs in the corpus.
    """

    text: str
    share: float
    fired: int
    present: int


class CardGene(NamedTuple):
    """A gene that contains one of the card's strongest tokens.

    fired: on how many of the `occurrences` of that token in that gene the card is active.
    """

    symbol: str
    token: str
    fired: int
    occurrences: int


class Piece(NamedTuple):
    """A token of a context: text, the card's activation on it (0: none), the gene it is part of."""

    text: str
    activation: float
    gene: str | None


class CardContext(NamedTuple):
    """Where a card fires: kind (`top` or `quantile`), the cell's row, about 25 tokens."""

    kind: str
    cell: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Card:
    """One card; source, layer and feature stand in the key alone, not on a blind card.

    feature: its index among the layer's features, or in the untrained encoder; -1: random tokens.
    """

    card: str
    source: str
    layer: int
    feature: int
    log10_frequency: float
    tokens: tuple[CardToken, ...]
    genes: tuple[CardGene, ...]
    contexts: tuple[CardContext, ...]


@dataclass(frozen=True)
class Deck:
    """The cards in the order in which they are rated, and the name of the study."""

    study: str
    cards: tuple[Card, ...]

    def of_source(self, source: str) -> tuple[Card, ...]:
        """The cards of one source, in the deck's order."""
        return tuple(card for card in self.cards if card.source == source)


def deck_key(deck: Deck) -> pd.DataFrame:
    """What each card is; columns card, source, layer, feature."""
    return pd.DataFrame([(one.card, one.source, one.layer, one.feature) for one in deck.cards],
                        columns=["card", "source", "layer", "feature"])


def blind(deck: Deck) -> dict[str, Any]:
    """The deck as plain data, without what the cards are.

    {"study", "instructions": [...], "cards": [{"card", "log10_frequency", "tokens": [{"text",
    "share", "fired", "present"}], "genes": [{"symbol", "token", "fired", "occurrences"}],
    "contexts": [{"kind", "cell", "pieces": [{"text", "activation", "gene"}]}]}]}
    """
    return {"study": deck.study, "instructions": list(INSTRUCTIONS), "cards": [{
        "card": one.card, "log10_frequency": round(one.log10_frequency, 4),
        "tokens": [token._asdict() for token in one.tokens],
        "genes": [gene._asdict() for gene in one.genes],
        "contexts": [{"kind": context.kind, "cell": context.cell,
                      "pieces": [piece._asdict() for piece in context.pieces]}
                     for context in one.contexts],
    } for one in deck.cards]}


def write_deck(deck: Deck, path: str | Path) -> Path:
    """Write `blind(deck)` as JSON."""
    return write_atomic(path, json.dumps(blind(deck), allow_nan=False, separators=(",", ":")))
