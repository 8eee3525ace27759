"""Interventions do what they say, and the prediction is the linear model's."""

import numpy as np
import pytest
import torch
from helpers import tiny_model, tiny_transcoders, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_architectures import FAMILIES, tiny

from scfm_circuits import InputError
from scfm_circuits.circuits.attribution import contributions, feature_direction, head_direction
from scfm_circuits.circuits.contrast import Contrast
from scfm_circuits.circuits.frozen import Frozen, freeze
from scfm_circuits.circuits.interventions import (
    FeatureAt,
    circuit_alone,
    compare_interventions,
    frozen_change,
    held_at_means,
    kept_alone,
    matched_features,
    scale_each,
    scale_features,
    written_by,
)
from scfm_circuits.circuits.token_means import Means
from scfm_circuits.models.mlp_sites import mlp_sites, mlps, replaced_mlps
from scfm_circuits.transcoders.transcoder import Variant

TARGET = FeatureAt(2, 5, 8)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def frozen(model) -> Frozen:
    return freeze(model, tiny_transcoders(model), tokens(9))


@pytest.fixture(scope="module")
def held(frozen):
    generator = torch.Generator().manual_seed(0)
    t = frozen.transcoders
    means = torch.rand(t.n_layers, 4, t.n_features, generator=generator, dtype=torch.float64)
    return held_at_means(frozen, Means(means, torch.ones(4)), np.arange(9) % 4)


def active(frozen: Frozen, layer: int, position: int, n: int) -> list[FeatureAt]:
    found = torch.nonzero(frozen.activations[layer, position])[:, 0][:n]
    return [FeatureAt(layer, int(feature), position) for feature in found]


# --- scaling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [Variant("topk", 5), Variant("jumprelu")], ids=str)
def test_other_activations_are_scaled_and_run_as_they_are(model, variant):
    t = tiny_transcoders(model, variant=variant)
    run = freeze(model, t, tokens(9))
    reading = feature_direction(run, *TARGET)
    chain = active(run, 0, 8, 24) + active(run, 1, 3, 24)
    # As many as are active, not as have a pre-activation above zero.
    assert len(chain) == int((t.encode(run.mlp_in)[[0, 1], [8, 3]] > 0).sum())
    effect = scale_features(model, run, chain, 3.0, TARGET, reading)
    modules, seen = mlps(model), []

    def edited(layer, x):
        z = t.activate(t.layer_pre_activations(layer, x), layer)
        place = torch.zeros(x.shape[1], 1, dtype=x.dtype)
        place[8 if layer == 0 else 3] = 1
        if layer == 2:
            seen.append(x)
        return modules[layer].forward(x) + (2 * place * (z @ t.W_dec[layer]) if layer < 2 else 0)

    with replaced_mlps(model, edited):
        model(input_ids=run.tokens[None])
    after = t.layer_pre_activations(2, seen[0][0, 8])[5]
    assert effect.measured_change == pytest.approx(float(after) - effect.before, abs=1e-10)
    every = [FeatureAt(layer, f, p) for layer, p, f in torch.nonzero(run.activations[:2]).tolist()]
    means = Means(torch.zeros(t.n_layers, 1, t.n_features, dtype=torch.float64), torch.ones(1))
    held = held_at_means(run, means, np.zeros(9, int))
    alone = circuit_alone(model, run, every, TARGET, reading, held)
    assert alone.predicted_change == pytest.approx(0, abs=1e-10)
    assert alone.measured_change == pytest.approx(0, abs=1e-10)


def test_nothing_ablated_changes_nothing(model, frozen):
    effect = scale_features(model, frozen, [], 0.0, TARGET, feature_direction(frozen, *TARGET))
    assert effect.before == pytest.approx(float(frozen.pre[2, 8, 5]), abs=1e-12)
    assert effect.predicted_change == 0
    assert effect.measured_change == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("factor", [0.0, 2.0, -1.0])
def test_factor_1_changes_nothing_and_others_do(model, frozen, factor):
    chain = active(frozen, 0, 8, 6) + active(frozen, 1, 3, 6)
    reading = feature_direction(frozen, *TARGET)
    same = scale_features(model, frozen, chain, 1.0, TARGET, reading)
    assert same.predicted_change == 0
    assert same.measured_change == pytest.approx(0, abs=1e-12)
    other = scale_features(model, frozen, chain, factor, TARGET, reading)
    assert abs(other.measured_change) > 1e-3
    one = scale_features(model, frozen, chain, 2.0, TARGET, reading)
    assert other.predicted_change == pytest.approx((factor - 1) * one.predicted_change, abs=1e-12)


@pytest.mark.parametrize("factor", [0.0, 3.0])
def test_a_feature_is_scaled_as_it_is_by_then(model, frozen, factor):
    # Layer 1's features read layer 0's. With all of layer 0's changed first, those of layer 1 have
    # other activations, and it is these that are scaled; by hand, in a plain forward pass.
    chain = active(frozen, 0, 8, 24) + active(frozen, 1, 8, 24)
    effect = scale_features(model, frozen, chain, factor, TARGET,
                            feature_direction(frozen, *TARGET))
    t, body = frozen.transcoders, model.gpt_neox
    moved: list[float] = []

    def by_hand(layer):
        chosen = [f for level, f, _ in chain if level == layer]

        def hook(module, args, output):
            z = t.layer_pre_activations(layer, args[0][0, 8]).relu()
            moved.append(float((z[chosen] - frozen.activations[layer, 8, chosen]).abs().max()))
            output = output.clone()
            for f in chosen:
                output[0, 8] += (factor - 1) * z[f] * t.W_dec[layer, f]
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
    assert moved[1] > 1e-3, "the chain must matter, or the test could not fail"


@pytest.mark.parametrize("family", FAMILIES)
def test_doubling_moves_the_frozen_model_by_the_edge_over_all_paths(family):
    model = tiny(family, seed=4)
    run = freeze(model, tiny_transcoders(model), tokens(9))
    reading = feature_direction(run, *TARGET)
    one = active(run, 0, 6, 1)[0]
    # Its edge: what each later head carries of it from token 6 to the target's token.
    edge = 0.0
    for layer in range(1, reading.attention_limit):
        for head in range(4):
            # Sequential blocks give a second hop: layer 1's heads, then layer 2's.
            for source in range(9):
                via = head_direction(run, reading, layer, head, source)
                parts = contributions(run, via)
                edge += float(parts.features[0, one.feature]) * (source == one.position)
                for inner in range(4) if layer == 2 else ():
                    second = head_direction(run, via, 1, inner, one.position)
                    edge += float(contributions(run, second).features[0, one.feature])
    effect = scale_features(model, run, [one], 2.0, TARGET, reading)
    assert effect.predicted_change == pytest.approx(edge, abs=1e-10)
    assert abs(edge) > 1e-4
    # Nothing but the factor changes what the model computes, in any family.
    assert scale_features(model, run, [one], 1.0, TARGET, reading).measured_change == pytest.approx(
        0, abs=1e-10)
    assert effect.measured_change != pytest.approx(0, abs=1e-6)


def test_the_prediction_of_one_layer_below_is_the_direct_contribution(frozen):
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
        norm, sigma = frozen.first[layer]
        normed = centred / sigma[:, None] * norm.gain + norm.bias
        values = torch.einsum("hkd,nd->hnk", w.w_v, normed) + w.b_v[:, None]
        residual = residual + w.b_o + torch.einsum(
            "hts,hsk,hok->to", frozen.patterns[layer], values, w.w_o)
    without = residual[8] @ reading.vector + reading.constant
    assert float(reading.value) + change == pytest.approx(float(without), abs=1e-10)


def test_hooks_are_removed(model, frozen, held):
    before = model(input_ids=frozen.tokens[None]).logits
    reading = feature_direction(frozen, *TARGET)
    scale_features(model, frozen, active(frozen, 0, 3, 2), 2.0, TARGET, reading)
    circuit_alone(model, frozen, [], TARGET, reading, held)
    assert torch.equal(before, model(input_ids=frozen.tokens[None]).logits)


@pytest.mark.parametrize("variant", [Variant(), Variant("topk", 5), Variant("jumprelu")], ids=str)
def test_one_at_a_time_is_each_by_itself(model, variant):
    run = freeze(model, tiny_transcoders(model, variant=variant), tokens(9))
    reading = feature_direction(run, *TARGET)
    silent = int(torch.nonzero(run.activations[0, 4] == 0)[0, 0])
    chain = [*active(run, 0, 8, 3), *active(run, 1, 3, 3), *active(run, 0, 3, 2),
             FeatureAt(0, silent, 4)]
    found = scale_each(model, run, chain, [0.0, 2.0], TARGET, reading, batch=4)
    for factor, each in zip((0.0, 2.0), found, strict=True):
        for feature, one in zip(chain, each, strict=True):
            assert one == pytest.approx(
                scale_features(model, run, [feature], factor, TARGET, reading), abs=1e-11)
        assert max(abs(one.measured_change) for one in each[:3]) > 1e-3
    assert scale_each(model, run, [], [2.0], TARGET, reading, batch=4) == [[]]


# --- the circuit alone ---------------------------------------------------------------------------


def every_feature(frozen: Frozen) -> list[FeatureAt]:
    t = frozen.transcoders
    return [FeatureAt(layer, feature, position) for layer in range(t.n_layers)
            for feature in range(t.n_features) for position in range(len(frozen.tokens))]


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_features_the_circuit_alone_is_the_whole_model(family):
    model = tiny(family)
    run = freeze(model, tiny_transcoders(model), tokens(9))
    means = Means(torch.ones(3, 1, 24, dtype=torch.float64), torch.ones(1))
    held = held_at_means(run, means, np.zeros(9, int))
    reading = feature_direction(run, *TARGET)
    effect = circuit_alone(model, run, every_feature(run), TARGET, reading, held)
    assert effect.predicted_change == pytest.approx(0, abs=1e-10)
    assert effect.measured_change == pytest.approx(0, abs=1e-10)
    part = circuit_alone(model, run, every_feature(run)[::2], TARGET, reading, held)
    assert abs(part.measured_change) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_of_a_call(family):
    """The call is read from the real model's logits, with every layer's MLP edited."""
    model = tiny(family)
    run = freeze(model, tiny_transcoders(model), tokens(9))
    held = held_at_means(run, Means(torch.ones(3, 1, 24, dtype=torch.float64), torch.ones(1)),
                         np.zeros(9, int))
    contrast = Contrast(7, 5, (2, 9, 30))
    _, reading = contrast.start(run)
    kept = kept_alone(model, run, every_feature(run), contrast, reading, held)
    assert kept.whole == pytest.approx(float(contrast.of(run.logits[7])))
    assert kept.circuit == pytest.approx(kept.whole, abs=1e-9)
    with replaced_mlps(model, lambda layer, x: held.mlp_out[layer][None]), torch.no_grad():
        logits = model(input_ids=run.tokens[None]).logits[0, 7]
    assert kept.nothing == pytest.approx(float(contrast.of(logits)), abs=1e-9)
    assert abs(kept.nothing - kept.whole) > 1e-3


@pytest.mark.parametrize("n", [0, 3])
def test_features_outside_the_circuit_are_held_at_their_means(model, frozen, held, n):
    # By hand: every MLP is its transcoder on activations of which only the circuit's are live.
    circuit = active(frozen, 0, 8, n) + active(frozen, 1, 2, n) + active(frozen, 1, 8, n)
    t, kinds = frozen.transcoders, torch.arange(9) % 4

    def replacement(layer, x):
        z = held.means[layer][kinds].clone()
        live = t.layer_pre_activations(layer, x[0]).relu()
        for level, feature, position in circuit:
            if level == layer:
                z[position, feature] = live[position, feature]
        return (z @ t.W_dec[layer] + t.b_dec[layer] + frozen.error[layer])[None]

    with replaced_mlps(model, replacement):
        inputs = mlp_sites(model, frozen.tokens[None], torch.ones(1, 9, dtype=torch.bool)).inputs
    after = t.layer_pre_activations(2, inputs[2, 8])[5]
    reading = feature_direction(frozen, *TARGET)
    effect = circuit_alone(model, frozen, circuit, TARGET, reading, held)
    assert effect.measured_change == pytest.approx(float(after) - effect.before, abs=1e-10)
    assert abs(effect.measured_change) > 1e-3


def test_the_prediction_holds_the_rest_at_its_means_too(model, frozen, held):
    circuit = active(frozen, 1, 8, 2)
    z = frozen.activations - held.means[:, torch.arange(9) % 4]
    for layer, feature, position in circuit:
        z[layer, position, feature] = 0
    reading = feature_direction(frozen, *TARGET)
    change = frozen_change(frozen, -torch.einsum("lpf,lfd->lpd", z, frozen.transcoders.W_dec),
                           reading)
    effect = circuit_alone(model, frozen, circuit, TARGET, reading, held)
    assert effect.predicted_change == pytest.approx(change, abs=1e-10)


def test_a_word_that_no_averaged_cell_has_is_refused(frozen):
    means = Means(torch.zeros(3, 3, 24, dtype=torch.float64), torch.tensor([2, 0, 5]))
    for kinds in (np.full(9, 1), np.full(9, 3)):
        with pytest.raises(InputError, match="same `prompt`"):
            held_at_means(frozen, means, kinds)


# --- matched features ----------------------------------------------------------------------------


def test_random_features_are_others_active_at_the_same_token(frozen):
    circuit = active(frozen, 0, 8, 3) + active(frozen, 1, 4, 2)
    drawn = matched_features(frozen, circuit, TARGET, np.random.default_rng(0))
    assert len(set(drawn)) == len(circuit)
    assert not set(drawn) & {*circuit, TARGET}
    assert [(f.layer, f.position) for f in drawn] == [(f.layer, f.position) for f in circuit]
    assert all(frozen.activations[f.layer, f.position, f.feature] > 0 for f in drawn)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 8), nearest=st.integers(1, 4),
       within=st.sampled_from(["token", "layer"]))
def test_no_free_feature_would_match_much_better(frozen, seed, size, nearest, within):
    rng = np.random.default_rng(seed)
    everyone = [f for layer in (0, 1) for position in range(9)
                for f in active(frozen, layer, position, 24)]
    circuit = [everyone[i] for i in rng.choice(len(everyone), size, replace=False)]
    drawn = matched_features(frozen, circuit, TARGET, rng, within=within, nearest=nearest)
    assert len(set(drawn)) == len(drawn) == size
    assert not set(drawn) & {*circuit, TARGET}
    sizes = frozen.activations * frozen.transcoders.W_dec.norm(dim=-1)[:, None]

    def apart(one, own):
        return abs(np.log(float(sizes[one.layer, one.position, one.feature]
                                / sizes[own.layer, own.position, own.feature])))

    for own, one in zip(circuit, drawn, strict=True):
        assert one.layer == own.layer
        pool = [f for f in everyone if f.layer == own.layer and f not in {*circuit, *drawn}
                and (within == "layer" or f.position == own.position)]
        if within == "token" and pool:
            assert one.position == own.position
        better = sum(apart(f, own) < apart(one, own) - 1e-12 for f in pool)
        assert better < nearest


def test_an_equal_twin_is_found(frozen):
    # Twins: feature 2k+1 of layer 0 writes as much as 2k at every token.
    t = tiny_transcoders(tiny_model())
    for parameter in (t.W_enc, t.W_dec, t.b_enc):
        parameter[0, 1::2] = parameter[0, 0::2]
    run = freeze(tiny_model(), t, tokens(9))
    circuit = [f for f in active(run, 0, 8, 24) if f.feature % 2 == 0][:4]
    drawn = matched_features(run, circuit, TARGET, np.random.default_rng(1), nearest=1)
    assert [f.feature for f in drawn] == [f.feature + 1 for f in circuit]


def test_where_a_token_has_no_other_feature_the_layer_gives_one(frozen):
    circuit = active(frozen, 0, 4, 24)
    drawn = matched_features(frozen, circuit, TARGET, np.random.default_rng(0))
    assert len(drawn) == len(circuit)
    assert all(f.layer == 0 and f.position != 4 and f.position <= 8 for f in drawn)


def test_an_unknown_place_to_draw_from_is_refused(frozen):
    with pytest.raises(InputError, match="`token` or `layer`"):
        matched_features(frozen, [], TARGET, np.random.default_rng(0), within="cell")


def test_compare_gives_shares_means_and_ranges(model, frozen):
    generator = torch.Generator().manual_seed(0)
    means = Means(torch.rand(3, 4, 24, generator=generator, dtype=torch.float64),
                  torch.tensor([3, 1, 1, 5]))
    kinds = np.arange(9) % 4
    circuit = active(frozen, 0, 8, 4) + active(frozen, 1, 8, 4)
    reading = feature_direction(frozen, *TARGET)
    rows = {(row.features, row.intervention): row
            for row in compare_interventions(model, frozen, circuit, TARGET, reading, means, kinds,
                               np.random.default_rng(3), draws=4)}
    assert len(rows) == 12
    before = float(reading.value)
    own = rows["circuit", "ablation"]
    direct = scale_features(model, frozen, circuit, 0.0, TARGET, reading)
    assert own.measured == own.lowest == own.highest == direct.measured_change / before
    assert (own.circuits, own.n_features, own.size) == (1, 8, pytest.approx(1))
    rng = np.random.default_rng(3)
    expected = [scale_features(model, frozen, matched_features(frozen, circuit, TARGET, rng), 0.0,
                               TARGET, reading).measured_change / before for _ in range(4)]
    random = rows["same token", "ablation"]
    assert (random.lowest, random.highest) == (min(expected), max(expected))
    assert random.measured == pytest.approx(np.mean(expected))
    assert random.lowest < random.highest
    of_kind = circuit_alone(model, frozen, [], TARGET, reading, held_at_means(frozen, means, kinds))
    assert rows["none", "alone, own kind"].measured == of_kind.measured_change / before
    overall = torch.einsum("k,lkf->lf", means.counts.double() / 10, means.activations)
    everywhere = held_at_means(frozen, Means(overall[:, None].expand(3, 4, 24), means.counts),
                               kinds)
    nothing = circuit_alone(model, frozen, [], TARGET, reading, everywhere)
    assert rows["none", "alone"].measured == pytest.approx(nothing.measured_change / before)
    assert rows["none", "alone"].measured != rows["none", "alone, own kind"].measured
