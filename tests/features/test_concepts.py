"""Concept scores are exact counts: F1 is scikit-learn's, and nothing of held-out cells chooses."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import model_for, tiny_corpus, tiny_profile, tiny_transcoders
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import f1_score

from scfm_circuits import InputError
from scfm_circuits.features import concepts as module
from scfm_circuits.features.concepts import CELL, TOKEN
from scfm_circuits.features.statistics import count_features
from scfm_circuits.models.mlp_sites import mlp_sites

SETS = {"T": {"CD3D", "CD8A"}, "mono": {"LYZ", "S100A8", "S100A9"}, "absent": {"INS"}}


@pytest.fixture(scope="module")
def parts() -> Any:
    corpus = tiny_corpus(60)
    model = model_for(corpus)
    transcoders = tiny_transcoders(model)
    return model, transcoders, corpus, count_features(model, transcoders, corpus, 8, progress=False)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LEAST": 2, "RESAMPLED": 50, "DRAWS": 2}.items():
        monkeypatch.setattr(module, name, value)


def plain(model: Any, corpus: Any, t: Any, active: bool, cells: np.ndarray, layer: int) -> Any:
    """Values of all units of an encoder on each cell's question, with its activation or without,
    and the genes of its tokens, cell by cell."""
    for cell in cells:
        end = int(corpus.answer_start[cell])
        ids = torch.from_numpy(np.asarray(corpus.tokens[cell, :end]))[None]
        x = mlp_sites(model, ids, torch.ones_like(ids, dtype=torch.bool)).inputs[layer]
        pre = t.layer_pre_activations(layer, x)
        z = t.activate(pre, layer) if active else pre
        yield z.numpy(), np.asarray(corpus.gene[cell, :end])


def test_every_unit_and_cut_is_counted_as_scikit_learn_counts(parts: Any, few: None) -> None:
    model, transcoders, corpus, _ = parts
    cells = np.arange(0, 24)
    concepts = module.concepts_of(corpus, SETS, cells, np.arange(24, 48))
    assert concepts.gene_names == ["T", "mono"] and len(concepts.cell_names) == 4
    kinds = {"on": transcoders.layer_activations, "pre": transcoders.layer_pre_activations}
    counts = module.count_units(kinds, module.question_batches(model, corpus, cells, 7, concepts))
    for kind in kinds:
        for layer in range(2):
            each = list(plain(model, corpus, transcoders, kind == "on", cells, layer))
            most = np.stack([z.max(axis=0) for z, _ in each])
            on_gene = np.concatenate([z[gene >= 0] for z, gene in each])
            genes = np.concatenate([gene[gene >= 0] for _, gene in each])
            for level, values, truth in ((CELL, most, concepts.of_cell[cells]),
                                         (TOKEN, on_gene, concepts.of_gene[genes])):
                own = counts[kind, level]
                assert own.seen == len(values)
                assert np.array_equal(own.truth.numpy(), truth.sum(axis=0))
                # Rounding may put a value at a cut on either side, so look in between.
                cuts, f1 = own.cuts[layer].numpy(), own.f1()[:, layer]
                for unit in range(0, transcoders.n_features, 5):
                    for at, cut in enumerate(cuts[unit]):
                        near = np.abs(values[:, unit] - cut) < 1e-9
                        said = (values[:, unit] > cut) & ~near
                        for concept in range(truth.shape[1]):
                            expected = f1_score(truth[:, concept], said, zero_division=0)
                            assert f1[concept, unit, at] == pytest.approx(expected)


def test_scores_of_chosen_units_are_those_of_their_cells(parts: Any, few: None) -> None:
    model, transcoders, corpus, _ = parts
    cells = np.arange(24, 45)
    concepts = module.concepts_of(corpus, SETS, np.arange(24), cells)
    kinds = {"on": transcoders.layer_activations}
    chosen = [module.Choice("on", "on", level, concept, 0, layer, 3 + concept, 0.2, 0.0)
              for level in (CELL, TOKEN) for concept in (0, 1) for layer in (1, 0)]
    scored = module.score_choices(kinds, chosen,
                                  module.question_batches(model, corpus, cells, 4, concepts))
    assert scored.shape == (8, 3, len(cells))
    for one, (hits, said, holds) in zip(chosen, scored, strict=True):
        each = plain(model, corpus, transcoders, True, cells, one.layer)
        for column, (z, gene) in enumerate(each):
            values = z[:, one.unit]
            if one.level == CELL:
                yes = np.array([values.max() > one.cut])
                truth = concepts.of_cell[cells[column], [one.concept]]
            else:
                yes = values[gene >= 0] > one.cut
                truth = concepts.of_gene[gene[gene >= 0], one.concept]
            assert (hits[column], said[column], holds[column]) == (
                (yes & truth).sum(), yes.sum(), truth.sum())


@given(arrays(bool, (2, 30)), st.integers(1, 5))
def test_f1_of_summed_cells_is_scikit_learn_s(values: np.ndarray, n_cells: int) -> None:
    said, truth = values
    cell = np.arange(30) % n_cells
    counts = np.stack([np.bincount(cell, one, n_cells) for one in (said & truth, said, truth)])
    found = module.f1_of(counts.mean(axis=1, keepdims=True))[0]
    assert found == pytest.approx(f1_score(truth, said, zero_division=0))


@given(arrays(float, (17, 3), elements=st.floats(-2, 2).map(lambda x: round(x, 2))))
def test_cuts_lie_between_values_at_rising_levels(values: np.ndarray) -> None:
    cuts = module.cuts_of(torch.from_numpy(values)).numpy()
    assert cuts.shape == (3, len(module.LEVELS)) and (np.diff(cuts, axis=1) >= 0).all()
    for unit, own in enumerate(cuts):
        for level, cut in zip(module.LEVELS, own, strict=True):
            # Above the value at the level and all that equal it, below the next.
            at = np.sort(values[:, unit])[int(level * 17)]
            above = values[values[:, unit] > at, unit]
            assert at <= cut and (above > cut).all()


@given(st.integers(0, 99), st.sampled_from([(4, 4), (1, 4), (4, 1)]))
def test_the_interval_of_what_features_have_more_holds_that_of_every_draw(seed: int,
                                                                          draws: Any) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, 20)
    features, scored = (np.stack([(said := rng.integers(0, 2, (n, 20))) * truth, said,
                                  np.broadcast_to(truth, (n, 20))], axis=1) for n in draws)
    drawn = rng.multinomial(20, np.full(20, 1 / 20), 50)
    chosen = [module.Choice("", "", "", 0, 0, 0, 0, 0.0, 0.5)]
    row = module._row(chosen, scored, features, drawn)
    alone = [module._row(chosen, scored[i : i + 1] if draws[1] > 1 else scored,
                         features[i : i + 1] if draws[0] > 1 else features, drawn)
             for i in range(4)]
    for name, bound in (("lower", min), ("upper", max)):
        key = f"difference_{name}_95"
        assert row[key] == pytest.approx(bound(one[key] for one in alone))
    assert row["difference"] == pytest.approx(np.mean([one["difference"] for one in alone]))


def test_all_kinds_offer_as_many_candidates_and_held_out_cells_choose_nothing(
        parts: Any, few: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    corpus, statistics = parts[2:]
    model = model_for(corpus, dtype=torch.float32)
    transcoders = tiny_transcoders(model)
    profile = tiny_profile(monkeypatch, tmp_path, forward_cells=9)
    study = module.concept_scores(model, transcoders, corpus, profile, statistics, SETS)
    again = module.concept_scores(model, transcoders, corpus, profile, statistics, SETS)
    assert study.table.equals(again.table)
    table = study.table
    kinds = [module.FEATURES, module.EVERY, module.UNTRAINED, module.RANDOM, "MLP neurons",
             "principal components"]
    assert table["units"].tolist() == kinds * 6
    others = table[table["units"] != module.EVERY]
    assert others["candidates"].nunique() == 1
    assert (table.loc[table["units"] == module.FEATURES, "difference"] == 0).all()
    assert (table["lower_95"] <= table["f1"] + 1e-12).all()
    # Another truth in held-out cells changes scores, and no choice.
    labels = corpus.labels.copy()
    labels[corpus.held_out] = np.roll(labels[corpus.held_out], 1)
    other = module.concept_scores(model, transcoders, replace(corpus, labels=labels), profile,
                                  statistics, SETS).table
    for key in ("layer", "unit", "training_f1"):
        assert table[key].tolist() == other[key].tolist()
    assert table["f1"].tolist() != other["f1"].tolist()


def test_cuts_are_taken_from_cells_of_all_labels(
        parts: Any, few: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Though the corpus has them label by label."""
    corpus, statistics = parts[2:]
    order = np.argsort(corpus.labels, kind="stable")
    sorted_corpus = replace(corpus, **{name: getattr(corpus, name)[order] for name in (
        "tokens", "mask", "gene", "place", "answer_start", "answer_end", "labels", "cell_ids",
        "held_out")})
    model = model_for(corpus, dtype=torch.float32)
    profile, asked = tiny_profile(monkeypatch, tmp_path, forward_cells=12), []
    kept = module.question_batches

    def seen(model: Any, corpus: Any, cells: np.ndarray, *rest: Any) -> Any:
        asked.append(corpus.labels[cells])
        return kept(model, corpus, cells, *rest)

    monkeypatch.setattr(module, "question_batches", seen)
    module.concept_scores(model, tiny_transcoders(model), sorted_corpus, profile, statistics, SETS)
    assert set(asked[0][:12]) == set(np.unique(corpus.labels))


@pytest.mark.parametrize(("least", "sets", "levels"), [(99, SETS, {TOKEN}), (2, {}, {CELL})])
def test_labels_or_gene_sets_alone_are_scored(
        parts: Any, few: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, least: int,
        sets: Any, levels: set[str]) -> None:
    corpus, statistics = parts[2:]
    monkeypatch.setattr(module, "LEAST", least)
    model = model_for(corpus, dtype=torch.float32)
    table = module.concept_scores(model, tiny_transcoders(model), corpus, tiny_profile(
        monkeypatch, tmp_path), statistics, sets).table
    assert set(table["of"]) == levels and table["f1"].between(0, 1).all()


def test_genes_are_counted_once_where_they_stand(parts: Any) -> None:
    corpus, cells = parts[2], np.arange(3)
    genes = [gene for cell in cells for gene in corpus.genes_of(cell)]
    assert module.times_in(corpus, cells) == {gene: genes.count(gene) for gene in set(genes)}


def test_without_a_concept_nothing_is_scored(parts: Any) -> None:
    corpus = parts[2]
    with pytest.raises(InputError, match="no concept to score"):
        module.concepts_of(corpus, {"absent": {"INS"}}, np.arange(4), np.arange(4, 8))
