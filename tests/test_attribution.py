"""Contributions are exact: they sum to the pre-activation, and agree with autograd."""

import numpy as np
import pytest
import torch
from helpers import tiny_model, tiny_transcoders, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad

from scfm_circuits import InputError
from scfm_circuits.attribution import (
    Frozen,
    closure,
    contributions,
    equation_5,
    feature_direction,
    freeze,
    head_direction,
    logit_direction,
)


@pytest.fixture(scope="module", params=[True, False], ids=["parallel", "sequential"])
def frozen(request: pytest.FixtureRequest) -> Frozen:
    model = tiny_model(parallel=request.param)
    return freeze(model, tiny_transcoders(model), tokens(9))


@settings(max_examples=40, deadline=None)
@given(layers=st.integers(1, 4), heads=st.sampled_from([1, 2, 4]), n=st.integers(1, 12),
       parallel=st.booleans(), seed=st.integers(0, 10_000))
def test_contributions_sum_to_pre_activation(layers, heads, n, parallel, seed):
    model = tiny_model(layers=layers, heads=heads, parallel=parallel, seed=seed)
    run = freeze(model, tiny_transcoders(model, seed=seed), tokens(n, seed=seed))
    rng = np.random.default_rng(seed)
    layer, feature, position = (int(rng.integers(size)) for size in (layers, 24, n))
    reading = feature_direction(run, layer, feature, position)
    assert abs(contributions(run, reading).total() - reading.value) < 1e-10
    assert closure(run, reading) < 1e-10


def test_logits_and_logit_differences_close(frozen):
    for minus in (None, 3):
        reading = logit_direction(frozen, 7, 8, minus)
        assert abs(contributions(frozen, reading).total() - reading.value) < 1e-10


def test_head_contributions_close_through_two_hops(frozen):
    reading = feature_direction(frozen, 2, 5, 8)
    first = head_direction(frozen, reading, 1, 0, 3)
    assert abs(contributions(frozen, reading).heads[1, 0, 3] - first.value) < 1e-12
    assert abs(contributions(frozen, first).total() - first.value) < 1e-10
    second = head_direction(frozen, first, 0, 1, 2)
    assert abs(contributions(frozen, first).heads[0, 1, 2] - second.value) < 1e-12
    assert abs(contributions(frozen, second).total() - second.value) < 1e-10


def test_nothing_comes_from_the_same_or_later_layers(frozen):
    reading = feature_direction(frozen, 1, 0, 8)
    parts = contributions(frozen, reading)
    assert parts.features.shape[0] == parts.errors.shape[0] == 1
    assert parts.heads.shape[0] == (1 if frozen.parallel else 2)


def test_heads_see_no_later_token(frozen):
    parts = contributions(frozen, feature_direction(frozen, 2, 1, 4))
    assert parts.heads[:, :, 5:].abs().max() == 0


def test_the_frozen_run_is_the_models_own(frozen):
    model = tiny_model(parallel=frozen.parallel)
    with torch.no_grad():
        logits = model(input_ids=frozen.tokens[None]).logits[0]
    assert torch.allclose(frozen.logits, logits, atol=1e-12)
    estimate = frozen.transcoders.decode(frozen.activations)
    assert torch.allclose(estimate + frozen.error, frozen.mlp_out, atol=1e-12)


def _linear_forward(frozen: Frozen, sources: torch.Tensor) -> torch.Tensor:
    """Pre-activations of the last layer, with patterns and scales frozen, as a function of what
    the MLPs write; an independent route for autograd (residuals, not directions)."""
    residual = frozen.residual[0]
    t, norm = frozen.transcoders, None
    for layer, w in enumerate(frozen.weights):
        def normed(x, sigma, gain, bias):
            return (x - x.mean(-1, keepdim=True)) / sigma[:, None] * gain + bias
        values = torch.einsum("hkd,nd->hnk", w.w_v, normed(
            residual, frozen.sigma1[layer], w.ln1_gain, w.ln1_bias)) + w.b_v[:, None]
        mixed = torch.einsum("hts,hsk,hok->to", frozen.patterns[layer], values, w.w_o) + w.b_o
        stream = residual if frozen.parallel else residual + mixed
        norm = normed(stream, frozen.sigma2[layer], w.ln2_gain, w.ln2_bias)
        residual = residual + mixed + sources[layer]
    return torch.nn.functional.linear(norm - t.b_in[-1], t.W_enc[-1], t.b_enc[-1])


def test_feature_edges_equal_the_gradient_and_doubling(frozen):
    layer, feature, position = 2, 3, 8
    sources = frozen.mlp_out.clone()
    value = _linear_forward(frozen, sources)[position, feature]
    assert abs(value - frozen.pre[layer, position, feature]) < 1e-10
    gradient = grad(lambda s: _linear_forward(frozen, s)[position, feature])(sources)
    # The gradient to the same token holds all paths; those of one hop are what is left when no
    # later layer's attention carries them on, which at one layer below the target is exact.
    z, decoder = frozen.activations, frozen.transcoders.W_dec
    expected = z[1, position] * (decoder[1] @ gradient[1, position])
    direct = contributions(frozen, feature_direction(frozen, layer, feature, position))
    if frozen.parallel:
        assert torch.allclose(direct.features[1], expected, atol=1e-10)
    assert gradient[layer].abs().max() == 0
    doubled = sources.clone()
    active = int(direct.features[1].abs().argmax())
    doubled[1, position] += z[1, position, active] * decoder[1, active]
    moved = _linear_forward(frozen, doubled)[position, feature] - value
    if frozen.parallel:
        assert abs(moved - direct.features[1, active]) < 1e-10


def test_equation_5_ignores_the_layer_norm(frozen):
    raw = equation_5(frozen, 2, 5, 8)
    exact = contributions(frozen, feature_direction(frozen, 2, 5, 8)).features
    assert raw.shape == exact.shape
    assert not torch.allclose(raw, exact, rtol=0.05)


def test_attention_patterns_are_needed():
    model = tiny_model()
    model.set_attn_implementation("sdpa")
    with pytest.raises(InputError, match="eager"):
        freeze(model, tiny_transcoders(model), tokens(4))


def test_functional_call_is_not_needed_to_patch_the_model():
    # The tracer must leave the model as it was: no hook stays behind.
    model = tiny_model()
    before = model(input_ids=torch.arange(5)[None]).logits
    freeze(model, tiny_transcoders(model), tokens(5))
    after = functional_call(model, dict(model.named_parameters()),
                            kwargs={"input_ids": torch.arange(5)[None]}).logits
    assert torch.equal(before, after)
