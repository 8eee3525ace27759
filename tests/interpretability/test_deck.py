"""The deck: what it shows is what was counted, and it tells nothing away."""

import json

import numpy as np
import pytest
from helpers import model_for, tiny_corpus, tiny_profile, tiny_transcoders

from scfm_circuits import InputError
from scfm_circuits.cells.tokens import token_texts
from scfm_circuits.features.contexts import draw_features, token_table
from scfm_circuits.features.statistics import get_statistics
from scfm_circuits.interpretability.cards import (
    Fires,
    Subject,
    activations,
    draw_deck,
    draw_study,
    nearest,
    quantile_places,
)
from scfm_circuits.interpretability.deck import (
    FEATURE,
    QUANTILE,
    RANDOM,
    SOURCES,
    TOP,
    UNTRAINED,
    CardGene,
    CardToken,
    Piece,
    deck_key,
    write_deck,
)
from scfm_circuits.models.mlp_sites import mlp_sites


@pytest.fixture
def world(tmp_path, monkeypatch):
    run = tiny_profile(monkeypatch, tmp_path, human_features=5, human_decoys=4)
    corpus = tiny_corpus(24)
    model = model_for(corpus).float()
    transcoders = tiny_transcoders(model)
    statistics = get_statistics(model, transcoders, corpus, run)
    return run, corpus, model, transcoders, statistics


def drawn_deck(world, **changes):
    run, corpus, model, transcoders, statistics = world
    run = run.model_copy(update=changes)
    drawn = draw_features(statistics, run.human_layer, run.human_features, run.live_cut, run.seed)
    return draw_deck(model, transcoders, statistics, corpus, run, drawn)


def test_a_deck_holds_the_features_and_the_decoys(world):
    run, *_, statistics = world
    deck = drawn_deck(world)
    assert [one.card for one in deck.cards] == [f"c{i:02d}" for i in range(1, 10)]
    assert [len(deck.of_source(source)) for source in SOURCES] == [5, 2, 2]
    wanted = draw_features(statistics, run.human_layer, 5, run.live_cut, run.seed)
    assert sorted(one.feature for one in deck.of_source(FEATURE)) == wanted.tolist()
    assert [one.source for one in deck.cards] != sorted(one.source for one in deck.cards)
    assert drawn_deck(world) == deck
    assert drawn_deck(world, seed=1).study != deck.study
    assert len(drawn_deck(world, human_decoys=0).cards) == 5


def test_a_card_shows_what_was_counted(world):
    _, corpus, _, _, statistics = world
    pairs = list(zip(token_texts(corpus.tokenizer, statistics.pair_token),
                     statistics.pair_gene, strict=True))
    for card in drawn_deck(world).of_source(FEATURE):
        table = token_table(statistics, card.layer, card.feature, corpus).head(5)
        assert [one.fired for one in card.tokens] == table["count"].tolist()
        assert [one.share for one in card.tokens] == pytest.approx(table["share"].tolist())
        assert [one.fired / one.present for one in card.tokens] == pytest.approx(
            table["rate"].tolist())
        row = statistics.counts[card.layer][card.feature].toarray().ravel()
        for gene in card.genes:
            pair = pairs.index((gene.token, corpus.symbols.tolist().index(gene.symbol)))
            assert (row[pair], statistics.pair_count[pair]) == (gene.fired, gene.occurrences)
        assert card.log10_frequency == pytest.approx(
            statistics.log10_frequency[card.layer, card.feature])


def test_contexts_carry_the_models_activations(world):
    run, corpus, model, transcoders, statistics = world
    for card in drawn_deck(world).of_source(FEATURE):
        for context in card.contexts:
            x, _ = mlp_sites(model, *(one[None, : corpus.lengths[context.cell]] for one in (
                _tensor(corpus.tokens[context.cell]), _tensor(corpus.mask[context.cell]))))
            z = transcoders.layer_activations(card.layer, x[card.layer])[:, card.feature].numpy()
            pieces = corpus.pieces(context.cell)
            texts = [piece.text for piece in context.pieces]
            starts = [i for i in range(len(pieces) - len(texts) + 1)
                      if pieces[i : i + len(texts)] == texts]
            found = [piece.activation for piece in context.pieces]
            assert any(np.allclose(z[i : i + len(texts)], found, atol=2e-4) for i in starts)
            assert max(found) > 0
        top = [max(p.activation for p in one.pieces) for one in card.contexts if one.kind == TOP]
        assert top[0] == pytest.approx(
            statistics.context_activation[card.layer, card.feature, 0], abs=2e-4)
        assert len(top) == min(run.contexts_per_feature, (
            statistics.context_cell[card.layer, card.feature] >= 0).sum())
        assert any(one.kind == QUANTILE for one in card.contexts)


def _tensor(array):
    import torch

    return torch.from_numpy(array)


def test_decoys_fire_as_often_as_features(world):
    deck = drawn_deck(world)
    features = [one.log10_frequency for one in deck.of_source(FEATURE)]
    for card in (*deck.of_source(UNTRAINED), *deck.of_source(RANDOM)):
        assert min(abs(card.log10_frequency - one) for one in features) < 0.3
        assert card.tokens and card.contexts
    assert all(one.feature == -1 for one in deck.of_source(RANDOM))


def test_the_nearest_is_taken_once():
    given = np.array([0.0, 1.0, 1.1, 5.0])
    assert nearest(np.array([1.05, 1.05, 1.05]), given, given < 4).tolist() == [1, 2, 0]
    assert nearest(np.array([5.0, 5.0]), given, given > 4).tolist() == [3]


def test_quantile_contexts_come_from_every_stratum():
    fires = Fires(np.arange(100), np.zeros(100, int), np.arange(100.0))
    subject = Subject(FEATURE, 0, np.zeros(1), fires, ((99, 0), (98, 0)))
    found = [cell for cell, _ in quantile_places(subject, 7, np.random.default_rng(0))]
    assert [cell // 14 for cell in found] == [6, 5, 4, 3, 2, 1, 0]
    few = subject._replace(fires=Fires(*(one[97:] for one in fires)))
    assert quantile_places(few, 7, np.random.default_rng(0)) == [(97, 0)]


def test_activations_are_those_of_the_features_asked_for(world):
    _, corpus, model, transcoders, statistics = world
    features = np.array([3, 17])
    found = activations(model, transcoders, corpus, np.arange(len(corpus)), 1, features, 5)
    for one, feature in zip(found, features, strict=True):
        assert len(one.cell) == statistics.fired[1, feature]
        assert one.activation.sum() == pytest.approx(statistics.activation_sum[1, feature],
                                                     rel=1e-4)
        assert corpus.mask[one.cell, one.position].all()


def test_the_written_deck_is_blind(world, tmp_path):
    deck = drawn_deck(world)
    path = write_deck(deck, tmp_path / "deck.json")
    content = json.loads(path.read_text())
    assert set(content) == {"study", "instructions", "cards"}
    assert {key for one in content["cards"] for key in one} == {
        "card", "log10_frequency", "tokens", "genes", "contexts"}
    assert content["study"] == deck.study
    for one, other in zip(content["cards"], deck.cards, strict=True):
        assert one["card"] == other.card
        assert [CardToken(**token) for token in one["tokens"]] == list(other.tokens)
        assert [CardGene(**gene) for gene in one["genes"]] == list(other.genes)
        for context, drawn in zip(one["contexts"], other.contexts, strict=True):
            assert (context["kind"], context["cell"]) == (drawn.kind, drawn.cell)
            assert [Piece(**piece) for piece in context["pieces"]] == list(drawn.pieces)
    key = deck_key(deck)
    assert key["source"].value_counts().to_dict() == {FEATURE: 5, UNTRAINED: 2, RANDOM: 2}


def test_a_study_has_a_sheet_for_the_decks_features(world):
    run, corpus, model, transcoders, statistics = world
    study = draw_study(model, transcoders, statistics, corpus, run)
    assert study.deck == drawn_deck(world)
    assert study.sheet["feature"].tolist() == study.drawn.tolist()
    assert (study.sheet["study"] == study.deck.study).all()
    key = study.key.set_index("card").loc[study.sheet["card"]]
    assert key["feature"].tolist() == study.drawn.tolist() and (key["source"] == FEATURE).all()
    assert len(study.contexts) == len(study.drawn)
    with pytest.raises(InputError, match="no feature with"):
        draw_study(model, transcoders, statistics, corpus, run.model_copy(update={"live_cut": 0.0}))
