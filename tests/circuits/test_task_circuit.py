"""A circuit for a task is chosen by what it claims, and the model runs with it and nothing else."""

import numpy as np
import pytest
import torch
from helpers import tiny_profile, tiny_transcoders, tokens
from tiny_architectures import FAMILIES, tiny

from scfm_circuits.cells.prompts import answered_prompt
from scfm_circuits.circuits import task_circuit as task
from scfm_circuits.circuits.attribution import feature_direction
from scfm_circuits.circuits.calls import calls_of
from scfm_circuits.circuits.contrast import contrast_of
from scfm_circuits.circuits.direct_effects import direct_effects, sources_of, total_pulls
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.token_means import kinds_of, mean_activations
from scfm_circuits.models.mlp_sites import mlp_sites
from scfm_circuits.transcoders.transcoder import Variant

# --- choosing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_total_effects_are_the_sums_over_all_paths(family):
    model = tiny(family)
    run = freeze(model, tiny_transcoders(model), tokens(6))
    target = feature_direction(run, run.transcoders.n_layers - 1, 4, 5)
    sources = sources_of(run, [target])
    n = sources.n_active
    places = list(zip(sources.layer.tolist(), sources.position.tolist(), sources.feature.tolist(),
                      strict=True))
    readings = [feature_direction(run, layer, feature, position)
                for layer, position, feature in places]
    # In the readings' own numbering, row by row: what each source gives each feature.
    between = torch.zeros(n, n, dtype=torch.float64)
    for row, reading in enumerate(readings):
        if reading.mlp_limit:
            own = sources_of(run, [reading])
            effects = direct_effects(run, own, [reading])[0][0, : own.n_active]
            columns = [places.index(place) for place in zip(
                own.layer.tolist(), own.position.tolist(), own.feature.tolist(), strict=True)]
            between[row, columns] = effects
    z = sources.activation
    direct = direct_effects(run, sources, [target])[0][0, :n]
    # A feature's total effect: direct, and through every later feature in proportion to its z.
    expected = direct @ torch.linalg.inv(torch.eye(n, dtype=torch.float64) - between / z[:, None])
    pulls = total_pulls(run, target)
    found = torch.stack([run.activations[layer, position, feature]
                         * (pulls[layer, position] @ run.transcoders.W_dec[layer, feature])
                         for layer, position, feature in places])
    assert torch.allclose(found, expected, atol=1e-8)
    assert (found - direct).abs().max() > 1e-4


def test_gradients_are_those_of_the_model(parts):
    model, transcoders, corpus = parts
    prompt = answered_prompt(corpus, tiny_profile_of(), 3, str(corpus.labels[3]))
    contrast = contrast_of(corpus, prompt)
    ids = torch.as_tensor(prompt.encoded.tokens)
    gradients = task.output_gradients(model, ids, contrast)
    assert gradients.shape == (2, len(ids), transcoders.d_model)
    # The model takes its softmax in float32, so a smaller step would lose more than it gains.
    step, place, direction = 3e-3, 2, torch.arange(transcoders.d_model, dtype=torch.float64)

    def read(size: float) -> float:
        def hook(module, args, output):
            output = output.clone()
            output[0, place] += size * direction
            return output

        handle = model.gpt_neox.layers[0].mlp.register_forward_hook(hook)
        try:
            with torch.no_grad():
                return float(contrast.of(model(input_ids=ids[None]).logits[0, contrast.position]))
        finally:
            handle.remove()

    slope = (read(step) - read(-step)) / (2 * step)
    assert float(gradients[0, place] @ direction) == pytest.approx(slope, rel=5e-3)


def tiny_profile_of(**overrides):
    from scfm_circuits.common.profile import load_profile

    return load_profile("smoke", {"genes_per_cell": 6, "max_cells": None, **overrides})


def test_random_features_fire_as_often_layer_by_layer():
    rng = np.random.default_rng(0)
    score, firing = torch.from_numpy(rng.random((2, 40))), torch.from_numpy(rng.random((2, 40)))
    firing[1, :30] = 0
    dealt = task.exchanged(score, firing, np.random.default_rng(1))
    assert not torch.equal(dealt, score)
    for n in (1, 7, 30):
        kept, random = task.largest(score, n), task.largest(dealt, n)
        for layer in range(2):
            order = firing[layer].argsort(stable=True)
            for start in range(0, 40, task.BIN):
                group = order[start : start + task.BIN]
                assert kept[layer, group].sum() == random[layer, group].sum()
    assert task.largest(torch.zeros(2, 3), 2).tolist() == [[True, True, False], [False] * 3]


# --- running -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [Variant(), Variant("topk", 5), Variant(skip=True)], ids=str)
def test_what_stands_in_an_mlps_place(parts, variant):
    model, _, corpus = parts
    t = tiny_transcoders(model, variant=variant)
    cells = np.arange(4)
    means = mean_activations(model, t, corpus, np.arange(len(corpus)), 5)
    kinds = kinds_of(corpus, cells)
    inside = torch.from_numpy(kinds >= 0)
    ids = torch.from_numpy(corpus.tokens[cells])
    places = means.places(np.where(kinds < 0, kinds[:, :1], kinds))
    x, y = mlp_sites(model, ids, inside)
    every = torch.ones(2, t.n_features, dtype=torch.bool)
    whole = {}
    for baseline in (task.MEAN, task.ZERO):
        for keep in (every, ~every):
            setting = task.Setting("", baseline, 0, 1.0, keep)
            written = task.kept_features(t, means, places[inside], setting)
            whole[baseline, bool(keep.any())] = torch.stack([written(i, x[i]) for i in range(2)])
    plain = torch.stack([t.replacement(i, x[i]) for i in range(2)])
    assert torch.allclose(whole[task.ZERO, True], plain, atol=1e-10)
    assert torch.allclose(whole[task.MEAN, False], means.outputs[:, places[inside]], atol=1e-10)
    if not variant.skip:  # whose path is part of the error
        nothing = torch.stack([t.b_dec[i].expand_as(x[i]) for i in range(2)])
        assert torch.allclose(whole[task.ZERO, False], nothing, atol=1e-10)
        # With all features the error's mean over tokens of the kind is left, and nothing else.
        left = whole[task.MEAN, True] - plain
        every_x, every_y = mlp_sites(model, torch.from_numpy(corpus.tokens),
                                     torch.from_numpy(kinds_of(corpus, np.arange(24)) >= 0))
        missed = every_y - torch.stack([t.replacement(i, every_x[i]) for i in range(2)])
        all_kinds = kinds_of(corpus, np.arange(24))
        of_kind = torch.from_numpy(all_kinds[all_kinds >= 0] == kinds[0, 0])
        expected = missed[:, of_kind].mean(dim=1)
        assert torch.allclose(left[:, 0], expected, atol=1e-9)
    # Half of the features at their means write what the kept ones write beyond theirs.
    half = every.clone()
    half[:, ::2] = False
    written = task.kept_features(t, means, places[inside], task.Setting("", task.MEAN, 0, 1, half))
    z = t.layer_activations(1, x[1])
    beyond = (z - means.activations[1][places[inside]])[:, 1::2] @ t.W_dec[1, 1::2]
    assert torch.allclose(written(1, x[1]), beyond + means.outputs[1][places[inside]], atol=1e-9)
    assert len(y) == 2


def test_the_task_is_asked_of_held_out_cells_and_comes_out_the_same_again(
        parts, monkeypatch, tmp_path):
    model, transcoders, corpus = parts
    profile = tiny_profile(monkeypatch, tmp_path, forward_cells=4)
    monkeypatch.setattr(task, "SCORED_CELLS", 5)
    first = task.task_circuit(model, transcoders, corpus, profile)
    again = task.task_circuit(model, transcoders, corpus, profile)
    assert corpus.held_out[first.cells].all() and len(first.cells) == 5
    assert np.array_equal(first.right, again.right)
    assert np.array_equal(first.contrast, again.contrast)
    # The original model's contrast is that of its logits on the corpus's own tokens.
    for cell, found in zip(first.cells, first.contrast[0], strict=True):
        prompt = answered_prompt(corpus, profile, int(cell), str(corpus.labels[cell]))
        contrast = contrast_of(corpus, prompt)
        with torch.no_grad():
            logits = model(input_ids=torch.as_tensor(prompt.encoded.tokens)[None]).logits[0]
        assert found == pytest.approx(float(contrast.of(logits[contrast.position])), abs=1e-6)
    assert not np.allclose(first.contrast[0], first.contrast[1])
    sizes = {(one.chosen, one.share): one.features for one in first.settings}
    for name in task.CHOSEN_BY:
        assert [sizes[name, share] for share in task.SHARES] == [
            max(1, round(share * first.firing)) for share in task.SHARES]


def test_an_answer_is_right_if_each_of_its_tokens_is(parts, monkeypatch):
    model, _, corpus = parts
    cells = np.arange(3)
    ids = torch.from_numpy(corpus.tokens[cells])
    profile = tiny_profile_of()
    calls = calls_of(model, corpus, profile)
    own = calls.own_calls(cells)
    likeliest = ids.roll(-1, dims=1)
    likeliest[1, corpus.answer_end[1] - 1] += 1  # the full stop of the second is missed
    likeliest[2, corpus.answer_start[2] - 2] += 1  # before the answer nothing counts

    class Sure(torch.nn.Module):
        def forward(self, hidden):
            return torch.nn.functional.one_hot(hidden[..., 0].long(), len(corpus.tokenizer) + 1
                                               ).double()

    monkeypatch.setattr(model, "get_output_embeddings", lambda: Sure())
    right, contrast = calls.scored(cells, ids, likeliest[..., None].double(), own)
    assert right.tolist() == [True, False, True]
    assert np.isfinite(contrast).all()
