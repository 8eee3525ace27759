"""A wrong call is chosen by its rule, and repairs are counted against what they break."""

import numpy as np
import pytest
import torch
from helpers import model_for, tiny_corpus, tiny_profile, tiny_transcoders
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from scfm_circuits.cells.prompts import answered_prompt
from scfm_circuits.circuits import wrong_calls as wrong
from scfm_circuits.circuits.contrast import contrast_of
from scfm_circuits.circuits.direct_effects import direct_effects, sources_of
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.features.statistics import count_features
from scfm_circuits.models.mlp_sites import hooked, site_hooks


@pytest.fixture(scope="module")
def tiny_parts():
    corpus = tiny_corpus(40)
    model = model_for(corpus)
    return model, tiny_transcoders(model), corpus


def test_what_is_said_without_features_is_what_the_model_says_without_them(
        tiny_parts, monkeypatch, tmp_path):
    model, t, corpus = tiny_parts
    profile = tiny_profile(monkeypatch, tmp_path, forward_cells=3)
    cells, features = np.arange(7), [(0, 2), (1, 5), (1, 7)]
    for some in ([], features):
        said = wrong.said_without(model, t, corpus, profile, cells, some)

        def edit(layer, x, y, some=some):
            z = t.layer_activations(layer, x)
            return y - sum(z[..., f, None] * t.W_dec[layer, f] for one, f in some if one == layer)

        for cell, right, contrast in zip(cells, *said, strict=True):
            prompt = answered_prompt(corpus, profile, int(cell), str(corpus.labels[cell]))
            with hooked(site_hooks(model, edit)):
                logits = model(torch.as_tensor(prompt.encoded.tokens)[None]).logits[0]
            own = contrast_of(corpus, prompt)
            assert contrast == pytest.approx(float(own.of(logits[own.position])), abs=1e-6)
            start, end = corpus.answer_start[cell], corpus.answer_end[cell] + 1
            given_back = logits[start - 1 : end - 1].argmax(-1).numpy()
            assert right == (given_back == corpus.tokens[cell, start:end]).all()


def test_the_last_layer_gives_what_reaches_the_contrast_directly(tiny_parts, monkeypatch, tmp_path):
    model, t, corpus = tiny_parts
    profile = tiny_profile(monkeypatch, tmp_path)
    answer = str(corpus.labels[4])
    given_, value = wrong.contributions(model, t, corpus, profile, 3, answer)
    prompt = answered_prompt(corpus, profile, 3, answer)
    frozen = freeze(model, t, prompt.encoded.tokens)
    reading = contrast_of(corpus, prompt).start(frozen)[1]
    sources = sources_of(frozen, [reading])
    effects = direct_effects(frozen, sources, [reading])[0][0]
    last = np.zeros(t.n_features)
    for layer, feature, effect in zip(sources.layer.tolist(), sources.feature.tolist(),
                                      effects.tolist(), strict=False):
        last[feature] += effect * (layer == t.n_layers - 1)
    assert np.allclose(given_[-1], last, atol=1e-9) and np.abs(last).max() > 1e-6
    assert value == pytest.approx(float(reading.value))


@given(arrays(float, (2, 6), elements=st.floats(-2, 2)), st.floats(0.1, 5), st.integers(1, 8))
def test_as_many_features_as_give_the_contrast(values, contrast, most):
    chosen = wrong.enough(values, contrast, most)
    gives = [values[one] for one in chosen]
    assert len(chosen) <= most and all(one > 0 for one in gives)
    assert gives == sorted(gives, reverse=True)
    positive = np.sort(values[values > 0])[::-1]
    assert gives == positive[: len(gives)].tolist()
    if len(chosen) < min(most, len(positive)):
        assert sum(gives) >= contrast - 1e-9
    assert len(chosen) <= 1 or sum(gives[:-1]) < contrast


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_that_of_statsmodels(first, second):
    from statsmodels.stats.contingency_tables import mcnemar

    table = [[5, first], [second, 7]]
    assert wrong.mcnemar_p(first, second) == pytest.approx(
        float(mcnemar(table, exact=True).pvalue) if first + second else 1.0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), min_size=1))
def test_counts_add_up(cells):
    labels, before, after = (np.array(one) for one in zip(*cells, strict=True))
    every, *rows = wrong.counted(labels, before, after)
    assert every["label"] == wrong.EVERY and every["cells"] == len(cells)
    for key in ("cells", "right_before", "right_after", "repaired", "broken"):
        assert every[key] == sum(row[key] for row in rows)
    for row in (every, *rows):
        assert row["right_after"] == row["right_before"] + row["repaired"] - row["broken"]


def test_the_surest_wrong_call_is_the_case(tiny_parts, monkeypatch, tmp_path):
    model, t, corpus = tiny_parts
    profile = tiny_profile(monkeypatch, tmp_path)
    statistics = count_features(model, t, corpus, 4, progress=False)
    monkeypatch.setattr(wrong, "TRAINING_CELLS", 8)
    monkeypatch.setattr(wrong, "ERRORS", 2)
    study = wrong.wrong_calls(model, t, corpus, profile, statistics)
    again = wrong.wrong_calls(model, t, corpus, profile, statistics)
    assert study.table.equals(again.table) and study.features.equals(again.features)
    held_out = np.flatnonzero(corpus.held_out)
    said = wrong.said_without(model, t, corpus, profile, held_out, [])
    at = held_out[~said.right][said.values[~said.right].argmin()]
    assert study.cell == corpus.cell_ids[at] and study.wrong == (~said.right).sum() > 0
    table = study.table[study.table["label"] == wrong.EVERY]
    assert (table["removed"] == wrong.RANDOM).sum() == wrong.DRAWS
    assert (table["right_before"] == said.right.sum()).all()
    assert (table["cells"] == len(held_out) - 1).all()  # the case chose its features
    now = wrong.said_without(model, t, corpus, profile, held_out, [
        (row.layer, row.feature) for row in study.features[
            study.features["removed"] == wrong.CASE].itertuples()])
    others = held_out != at
    row = table[table["removed"] == wrong.CASE].iloc[0]
    assert row["repaired"] == (now.right & ~said.right)[others].sum()
    assert row["case_right"] == now.right[~others][0]
    assert table["features"].nunique() == 1
    own = study.features[study.features["removed"] == wrong.CASE]
    assert study.predicted == pytest.approx(-own["gives"].sum())
    theirs = study.features.loc[study.features["removed"] == wrong.TRAINING, "gives"]
    assert len(theirs) == len(own) and theirs.is_monotonic_decreasing and (theirs > 0).all()
    assert "repairs" in wrong.what_it_does(study) and study.training_errors == 2
    assert "draws" in wrong.what_it_does(study, wrong.RANDOM)


def test_without_a_wrong_call_there_is_no_case(tiny_parts, monkeypatch, tmp_path):
    model, t, corpus = tiny_parts
    monkeypatch.setattr(wrong, "said_without",
                        lambda *_: wrong.Scored(np.ones(3, bool), np.ones(3)))
    assert wrong.wrong_calls(model, t, corpus, tiny_profile(monkeypatch, tmp_path), None) is None
