"""Ablations do what they say, and the prediction is the linear model's."""

import numpy as np
import pytest
import torch
from helpers import tiny_model, tiny_transcoders, tokens

from scfm_circuits.attribution import Frozen, feature_direction, freeze
from scfm_circuits.interventions import (
    FeatureAt,
    ablate,
    frozen_change,
    matched_features,
    written_by,
)

TARGET = FeatureAt(2, 5, 8)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def frozen(model) -> Frozen:
    return freeze(model, tiny_transcoders(model), tokens(9))


def active(frozen: Frozen, layer: int, position: int, n: int) -> list[FeatureAt]:
    found = torch.nonzero(frozen.activations[layer, position])[:, 0][:n]
    return [FeatureAt(layer, int(feature), position) for feature in found]


def test_nothing_ablated_changes_nothing(model, frozen):
    effect = ablate(model, frozen, [], TARGET, feature_direction(frozen, *TARGET))
    assert effect.before == pytest.approx(float(frozen.pre[2, 8, 5]), abs=1e-12)
    assert effect.predicted_change == 0
    assert effect.measured_change == pytest.approx(0, abs=1e-12)


def test_a_feature_that_fell_silent_is_not_subtracted_again(model, frozen):
    # Layer 1's features read layer 0's. With all of layer 0's gone first, those of layer 1 have
    # other activations, and it is these that are taken away; by hand, in a plain forward pass.
    chain = active(frozen, 0, 8, 24) + active(frozen, 1, 8, 24)
    effect = ablate(model, frozen, chain, TARGET, feature_direction(frozen, *TARGET))
    t, body = frozen.transcoders, model.gpt_neox
    silenced: list[float] = []

    def by_hand(layer):
        chosen = [f for level, f, _ in chain if level == layer]

        def hook(module, args, output):
            z = t.layer_pre_activations(layer, args[0][0, 8]).relu()
            silenced.append(float((z[chosen] - frozen.activations[layer, 8, chosen]).abs().max()))
            output = output.clone()
            for f in chosen:
                output[0, 8] -= z[f] * t.W_dec[layer, f]
            return output

        return hook

    seen = []
    handles = [body.layers[layer].mlp.register_forward_hook(by_hand(layer)) for layer in (0, 1)]
    handles.append(body.layers[2].mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0])))
    model(input_ids=frozen.tokens[None])
    for handle in handles:
        handle.remove()
    after = t.layer_pre_activations(2, seen[0][0, 8])[5]
    assert effect.measured_change == pytest.approx(float(after) - effect.before, abs=1e-10)
    assert silenced[1] > 1e-3, "the chain must matter, or the test could not fail"


def test_the_prediction_of_one_layer_below_is_the_direct_contribution(frozen):
    from scfm_circuits.attribution import contributions

    reading = feature_direction(frozen, *TARGET)
    (feature,) = active(frozen, 1, 8, 1)
    predicted = frozen_change(frozen, -written_by(frozen, [feature]), reading)
    direct = contributions(frozen, reading).features[1, feature.feature]
    assert predicted == pytest.approx(-float(direct), abs=1e-12)


def test_the_prediction_counts_attention_paths(frozen):
    # All that the MLPs write is taken away: the embedding's and the biases' part is left.
    reading = feature_direction(frozen, *TARGET)
    change = frozen_change(frozen, -frozen.mlp_out, reading)
    residual = frozen.residual[0]
    for layer in range(2):
        w = frozen.weights[layer]
        centred = residual - residual.mean(-1, keepdim=True)
        normed = centred / frozen.sigma1[layer][:, None] * w.ln1_gain + w.ln1_bias
        values = torch.einsum("hkd,nd->hnk", w.w_v, normed) + w.b_v[:, None]
        residual = residual + w.b_o + torch.einsum(
            "hts,hsk,hok->to", frozen.patterns[layer], values, w.w_o)
    without = residual[8] @ reading.vector + reading.constant
    assert float(reading.value) + change == pytest.approx(float(without), abs=1e-10)


def test_hooks_are_removed(model, frozen):
    before = model(input_ids=frozen.tokens[None]).logits
    ablate(model, frozen, active(frozen, 0, 3, 2), TARGET, feature_direction(frozen, *TARGET))
    assert torch.equal(before, model(input_ids=frozen.tokens[None]).logits)


def test_random_features_are_others_active_at_the_same_token(frozen):
    circuit = active(frozen, 0, 8, 3) + active(frozen, 1, 4, 2)
    drawn = matched_features(frozen, circuit, TARGET, np.random.default_rng(0))
    assert len(set(drawn)) == len(circuit)
    assert not set(drawn) & {*circuit, TARGET}
    assert [(f.layer, f.position) for f in drawn] == [(f.layer, f.position) for f in circuit]
    assert all(frozen.activations[f.layer, f.position, f.feature] > 0 for f in drawn)
