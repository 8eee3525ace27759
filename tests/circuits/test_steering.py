"""A push does what arithmetic says, costs nothing at dose 0, and everything is chosen honestly."""

import json
import re

import jupytext
import numpy as np
import pandas as pd
import pytest
import torch
from chapter_code import executed
from helpers import model_for, tiny_corpus, tiny_profile, tiny_transcoders, tokens
from hypothesis import given
from hypothesis import strategies as st
from tiny_architectures import FAMILIES, tiny

from scfm_circuits import InputError
from scfm_circuits.cells.prompts import answered_prompt
from scfm_circuits.circuits import directions, steering, wrong_calls
from scfm_circuits.circuits.attribution import feature_direction
from scfm_circuits.circuits.case_targets import activations_at_end
from scfm_circuits.circuits.contrast import contrast_of
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.interventions import FeatureAt, frozen_change, scale_features
from scfm_circuits.common.profile import ROOT
from scfm_circuits.features.statistics import count_features
from scfm_circuits.models.architectures import decoder
from scfm_circuits.models.mlp_sites import hooked, mlp_sites, site_hooks

# --- edits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_behind_the_push_are_runs_of_their_own(family):
    model, ids = tiny(family), torch.as_tensor(tokens(7))
    push = torch.randn(2, 16, dtype=torch.float64)
    edits = [steering.pushed(0 * push[0]), *map(steering.pushed, push)]
    for layer in range(3):
        found = steering.steered(model, ids, layer, edits)
        plain = decoder(model)(input_ids=ids[None]).last_hidden_state
        assert torch.allclose(found[0], plain[0], atol=1e-12)
        for one, vector in zip(found[1:], push, strict=True):
            with hooked(site_hooks(model, lambda _, x, y, v=vector: y + v, [layer])):
                expected = decoder(model)(input_ids=ids[None]).last_hidden_state[0]
            assert torch.allclose(one, expected, atol=1e-12)
            assert (one - plain[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_feature_taken_away_is_one_scaled_to_zero(family):
    model = tiny(family)
    run = freeze(model, tiny_transcoders(model), tokens(6))
    target, seen = FeatureAt(2, 4, 5), []
    reading = feature_direction(run, *target)
    two = run.activations[1].sum(dim=0).topk(2).indices.tolist()
    features = [FeatureAt(1, feature, place) for feature in two for place in range(6)]
    expected = scale_features(model, run, features, 0.0, target, reading)
    with hooked(site_hooks(model, lambda _, x, y: seen.append(x), [2])):
        steering.steered(model, run.tokens, 1, [steering.scaled(run.transcoders, 1, two, 0.0)])
    after = run.transcoders.layer_pre_activations(2, seen[0][0, 5])[4]
    assert expected.measured_change != 0
    assert float(after) - expected.before == pytest.approx(expected.measured_change, abs=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_push_of_the_last_layer_moves_a_logit_by_the_unembedding_through_the_norm(family):
    model = tiny(family)
    run = freeze(model, tiny_transcoders(model), tokens(6))
    push = torch.randn(16, dtype=torch.float64)
    final = steering.steered(model, run.tokens, 2, [steering.pushed(push)])[0]
    norm = run.last.norm
    # But for its scale, which is that of the pushed stream, the norm is linear.
    before, after = (norm.scale(stream)[:, None] for stream in (run.final, run.final + push))
    bias = run.unembedding @ norm.bias
    own = run.unembedding @ (norm.gain * norm.centre(push))
    expected = ((run.logits - bias) * before + own) / after + bias
    assert torch.allclose(final @ run.unembedding.T, expected, atol=1e-9)


def test_what_is_written_along_a_direction_is_projected_out():
    output, vector = torch.randn(5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    left = steering.projected_out(vector)(output, output)
    assert torch.allclose(left @ vector, torch.zeros(5, dtype=torch.float64), atol=1e-12)
    assert torch.linalg.matrix_rank(torch.cat([output - left, vector[None]])) == 1


# --- what is read --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_parts():
    corpus = tiny_corpus(40)
    model = model_for(corpus)
    return model, tiny_transcoders(model), corpus


@pytest.mark.parametrize("label", ["CD4+ T cell", "B cell", "CD34+"])
def test_readings_are_those_of_plain_runs(tiny_parts, label, monkeypatch, tmp_path):
    model, transcoders, corpus = tiny_parts
    profile = tiny_profile(monkeypatch, tmp_path)
    vector = 3 * torch.randn(transcoders.d_model, dtype=torch.float64)
    cells = np.arange(8)
    contrasts = steering.contrasts_of(corpus, profile, cells, label)
    for cell, contrast in zip(cells, contrasts, strict=True):
        prompt = answered_prompt(corpus, profile, int(cell), label)
        assert contrast == contrast_of(corpus, prompt)
        text = steering.text_of(corpus, int(cell), label, contrast, torch.device("cpu"))
        found = steering.read_text(model, text, 1, [steering.pushed(vector),
                                                    steering.pushed(0 * vector)])
        for at, change in enumerate((vector, 0 * vector)):
            with hooked(site_hooks(model, lambda _, x, y, v=change: y + v, [1])):
                asked = model(torch.as_tensor(prompt.encoded.tokens)[None]).logits[0]
                own = model(text.tokens[None]).logits[0]
            logits = asked[contrast.position]
            assert found[0][at] == pytest.approx(float(contrast.of(logits)), abs=1e-10)
            start, end = int(corpus.answer_start[cell]), int(corpus.answer_end[cell])
            right = own[start - 1 : end].argmax(-1) == text.tokens[start : end + 1]
            assert found[1][at] == bool(right.all())
            assert found[2][at] == (int(logits.argmax()) not in (contrast.token, *contrast.others))
            on_gene = corpus.gene[cell, 1 : end + 1] >= 0
            whole = torch.nn.functional.cross_entropy(own[:-1], text.tokens[1:], reduction="none")
            # In so short a text every token of a gene is taken.
            assert found[3][at] == pytest.approx(float(whole[on_gene].mean()), abs=1e-5)


# --- choosing ------------------------------------------------------------------------------------


def test_the_feature_that_tells_the_label_is_chosen_and_the_means_are_those_of_its_layer():
    generator = torch.Generator().manual_seed(0)
    labels = np.array(["a", "b", "c"] * 10)
    z = torch.rand(30, 2, 6, generator=generator).relu()
    z[:, 1, 4] = torch.from_numpy(labels == "a") + 0.01 * z[:, 1, 4]
    written = torch.rand(30, 2, 5, generator=generator)
    at = directions.AtQuestion(z, written, torch.tensor([1.0, 3.0]))
    chosen = directions.choose(at, labels, "a")
    assert (chosen.layer, chosen.features[0]) == (1, 4)
    assert chosen.auroc[0] == 1 and list(chosen.auroc) == sorted(chosen.auroc, reverse=True)
    mean = {one: written[torch.from_numpy(labels == one), 1].mean(0) for one in "abc"}
    assert torch.allclose(directions.means_at(at, labels, "a", 1),
                          mean["a"] - (mean["b"] + mean["c"]) / 2)


@pytest.mark.parametrize("labels", [["a"] * 4, ["b"] * 4])
def test_a_label_is_told_from_others_only_where_there_are_both(labels):
    at = directions.AtQuestion(torch.rand(4, 1, 3), torch.rand(4, 1, 5), torch.ones(1))
    with pytest.raises(InputError, match="needs training cells of this label and of others"):
        directions.choose(at, np.array(labels), "a")


def test_cells_are_read_where_they_are_asked(tiny_parts):
    model, transcoders, corpus = tiny_parts
    at = directions.at_question(model, transcoders, corpus, np.arange(9), 4)
    found = activations_at_end(model, transcoders, corpus, np.arange(9), 1, "query", 3)
    assert np.allclose(at.activations[:, 1].numpy(), found)
    sizes = []
    for cell in range(9):
        end = int(corpus.answer_start[cell])
        ids = torch.from_numpy(np.asarray(corpus.tokens[cell, :end]))[None]
        outputs = mlp_sites(model, ids, torch.ones_like(ids, dtype=torch.bool)).outputs
        assert torch.allclose(at.outputs[cell], outputs[:, -1])
        sizes.append(outputs.norm(dim=-1))
    assert torch.allclose(at.norms, torch.cat(sizes, dim=1).mean(dim=1))


def test_a_feature_s_effect_is_that_of_its_push_in_the_frozen_model(
        tiny_parts, monkeypatch, tmp_path):
    model, transcoders, corpus = tiny_parts
    profile, norms = tiny_profile(monkeypatch, tmp_path), torch.tensor([2.0, 3.0]).double()
    pull = directions.mean_pull(model, transcoders, corpus, profile, np.array([1, 2]), "CD34+")
    found = directions.by_effect(pull, transcoders, norms)
    for layer, feature in ((1, 4), (1, 9)):  # the last: no later feature answers
        changes = []
        for cell in (1, 2):
            prompt = answered_prompt(corpus, profile, cell, "CD34+")
            run = freeze(model, transcoders, prompt.encoded.tokens)
            row = transcoders.W_dec[layer, feature]
            change = torch.zeros_like(run.mlp_out)
            change[layer] = norms[layer] * row / row.norm()
            changes.append(frozen_change(run, change, contrast_of(corpus, prompt).start(run)[1]))
        assert float(found[layer, feature]) == pytest.approx(np.mean(changes), abs=1e-9)
    # No feature does more than the gradient of the same norm.
    assert (found <= (norms * pull.norm(dim=-1))[:, None] + 1e-12).all()


def test_a_push_along_the_gradient_moves_the_contrast_as_autograd_says(
        tiny_parts, monkeypatch, tmp_path):
    """In the last layer, where nothing but the final norm is frozen: the slope at no push, with the
    norm's scale held."""
    model, transcoders, corpus = tiny_parts
    profile, last = tiny_profile(monkeypatch, tmp_path), transcoders.n_layers - 1
    pull = directions.mean_pull(model, transcoders, corpus, profile, np.array([3]), "CD34+")[last]
    prompt = answered_prompt(corpus, profile, 3, "CD34+")
    contrast, run = contrast_of(corpus, prompt), freeze(model, transcoders, prompt.encoded.tokens)
    push = torch.zeros_like(pull, requires_grad=True)
    stream = run.final[contrast.position] + push
    normed = run.last.norm.gain * run.last.norm.centre(stream) / run.last.sigma[contrast.position]
    logits = (normed + run.last.norm.bias) @ run.unembedding.T + run.unembedding_bias
    [slope] = torch.autograd.grad(contrast.of(logits), push)
    assert torch.allclose(pull, slope, atol=1e-10) and pull.norm() > 1e-3


class Statistics:
    """As much of `FeatureStatistics` as is matched on."""

    def __init__(self, fired, mean):
        self.fired, self.mean_activation = np.array([fired]), np.array([mean])


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(1e-3, 10)), min_size=14, max_size=30),
       st.integers(0, 2**31))
def test_random_features_fire_as_often_and_as_strongly(about, seed):
    fired, mean = (np.array(one) for one in zip(*about, strict=True))
    fired[:8] += 1
    statistics, chosen = Statistics(fired, mean), [0, 1, 2]
    drawn = directions.matched(statistics, 0, chosen, np.random.default_rng(seed), nearest=2)
    assert len(set(drawn)) == 3 and not set(drawn) & set(chosen)
    assert (fired[drawn] > 0).all()
    live = fired > 0
    place = np.stack([np.log(np.maximum(fired, 1)), np.log(mean)])
    place = place / np.maximum(place[:, live].std(axis=1), 1e-12)[:, None]
    distance = np.square(place - place[:, :1]).sum(axis=0)
    nearer = [one for one in np.flatnonzero(live) if one not in chosen
              and distance[one] < distance[drawn[0]] * (1 - 1e-9) - 1e-12]
    assert len(nearer) < 2


def test_too_few_features_to_compare_with_is_said():
    with pytest.raises(InputError, match="has 1 features that fire"):
        directions.matched(Statistics([3, 4, 5, 0], [1.0] * 4), 0, [0, 1], np.random.default_rng(0))


# --- the study -----------------------------------------------------------------------------------


def test_a_study_reads_held_out_cells_under_every_setting(tiny_parts, monkeypatch, tmp_path):
    model, transcoders, corpus = tiny_parts
    profile = tiny_profile(monkeypatch, tmp_path, forward_cells=7)
    statistics = count_features(model, transcoders, corpus, 4, progress=False)
    for name, value in {"SEEDS": 2, "DOSES": (-1.0, 0.0, 1.0), "SCORED_CELLS": 5,
                        "TRACED_CELLS": 2}.items():
        monkeypatch.setattr(steering, name, value)
    first, again = (steering.steering_study(model, transcoders, corpus, profile, statistics,
                                            "B cell") for _ in range(2))
    for one, other in zip(first.readings, again.readings, strict=True):
        assert one.shape == (2 * 7 * 4, 5) and np.array_equal(one, other)
    doses = np.array([one.dose for one in first.settings])
    for found, before in zip(first.readings, first.before, strict=True):
        assert np.allclose(found[doses == 0], before)
    assert not np.allclose(first.readings.contrast[doses == 1], first.before.contrast)
    arms = {one.arm: one.norm for one in first.settings if one.dose == 1 and one.seed == 0}
    assert list(arms) == [steering.BEST, steering.BEST_SET.format(5), steering.BY_EFFECT,
                          steering.RANDOM, steering.GRADIENT, steering.MEANS]
    assert len(set(arms.values())) == 1  # pushes of one norm
    chosen = first.chosen
    assert chosen["arm"].tolist() == [steering.BEST, steering.BY_EFFECT] * 2
    assert (chosen["predicted"][1::2].to_numpy() >= chosen["predicted"][::2].to_numpy()).all()
    assert (chosen["auroc"][::2].to_numpy() >= chosen["auroc"][1::2].to_numpy()).all()
    assert (chosen["predicted"] <= chosen["steepest"]).all() and chosen["fires"].between(0, 1).all()


# --- the chapter ---------------------------------------------------------------------------------

def test_every_cell_of_the_chapter(monkeypatch, tmp_path):
    """Its code, executed on a few of the real cells where they are at hand and on simulated ones
    elsewhere, leaves all tables and every number that its text has."""
    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path))
    for module, sizes in ((steering, {"SEEDS": 1, "SCORED_CELLS": 4, "TRACED_CELLS": 2}),
                          (wrong_calls, {"DRAWS": 1, "TRAINING_CELLS": 6, "ERRORS": 2})):
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
    notebook = jupytext.read(ROOT / "notebooks" / "15_steering.py")
    names = executed(notebook, max_cells=60, validation_share=0.4)
    results = names["settings"].results
    for name in ("steering", "debugging", "concept_scores"):
        assert len(pd.read_csv(results / "tables" / f"{name}.csv")) > 1
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    kept = json.loads((results / "values" / "15_steering.json").read_text())
    assert set(re.findall(r"glue:text\}`([^`]+)`", text)) <= set(kept)
    assert kept["debugging.known"] and kept["concepts.all"] >= 1
