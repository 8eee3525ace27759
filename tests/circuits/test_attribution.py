"""Contributions are exact: they sum to the pre-activation, and agree with autograd."""

import numpy as np
import pytest
import torch
from helpers import tiny_model, tiny_transcoders, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_architectures import (
    FAMILIES,
    LLAMA_TYPE,
    tiny,
)
from torch import Tensor
from torch.func import functional_call, grad
from traced import SHAPES, Case, Collected

from scfm_circuits import InputError
from scfm_circuits.circuits.attribution import (
    Reading,
    closure,
    compare_equation_5,
    contributions,
    equation_5,
    feature_direction,
    head_direction,
    logit_direction,
    through_attention,
)
from scfm_circuits.circuits.direct_effects import direct_effects, sources_of
from scfm_circuits.circuits.frozen import Frozen, freeze
from scfm_circuits.models.architectures import decoder_layers
from scfm_circuits.transcoders.transcoder import Variant


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


def test_logits_close(frozen):
    reading = logit_direction(frozen, 7, 8)
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
        def normed(x, at):
            return (x - x.mean(-1, keepdim=True)) / at.sigma[:, None] * at.norm.gain + at.norm.bias
        values = torch.einsum("hkd,nd->hnk", w.w_v, normed(
            residual, frozen.first[layer])) + w.b_v[:, None]
        mixed = torch.einsum("hts,hsk,hok->to", frozen.patterns[layer], values, w.w_o) + w.b_o
        stream = residual if frozen.parallel else residual + mixed
        norm = normed(stream, frozen.second[layer])
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


KINDS = (Variant("topk", 5), Variant("batchtopk", 5), Variant("jumprelu"),
         Variant("topk", 5, skip=True))


def test_equation_5_beside_the_exact_sum_is_numpys_correlation(frozen):
    parts = contributions(frozen, feature_direction(frozen, 2, 5, 8))
    found = compare_equation_5(frozen, parts, 2, 5, 8)
    raw, exact = equation_5(frozen, 2, 5, 8).numpy(), parts.features.numpy()
    assert found.ratio == pytest.approx(raw.sum() / exact.sum())
    active = frozen.activations[:2, 8].numpy() > 0
    assert found.correlation == pytest.approx(np.corrcoef(raw[active], exact[active])[0, 1])
    # In the first layer no feature is upstream.
    first = contributions(frozen, feature_direction(frozen, 0, 5, 8))
    assert np.isnan(compare_equation_5(frozen, first, 0, 5, 8)).all()


@pytest.mark.parametrize("variant", KINDS, ids=str)
def test_only_features_that_are_active_contribute(variant):
    """Under every activation function: a pre-activation above zero makes no feature active."""
    model = tiny_model()
    t = tiny_transcoders(model, variant=variant)
    if variant.activation == "batchtopk":
        t.log_threshold.fill_(0.2)
    run = freeze(model, t, tokens(9))
    assert torch.equal(run.activations, t.encode(run.mlp_in))
    silent = (run.pre > 0) & (run.activations == 0)
    assert silent.any()
    assert torch.allclose(t.decode(run.activations) + run.error, run.mlp_out, atol=1e-12)
    parts = contributions(run, feature_direction(run, 2, 5, 8))
    assert (parts.features[silent[:2, 8]] == 0).all() and (parts.features != 0).any()
    assert closure(run, feature_direction(run, 2, 5, 8)) < 1e-10
    assert (equation_5(run, 2, 5, 8)[silent[:2, 8]] == 0).all()


def test_autoencoders_of_outputs_are_refused():
    model = tiny_model()
    with pytest.raises(InputError, match="set `site: transcoder`"):
        freeze(model, tiny_transcoders(model, variant=Variant(site="sae")), tokens(4))


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


# --- every family --------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(**SHAPES)
def test_one_hop_and_logits_close_in_every_family(family, layers, heads, n, seed):
    case = Case(family, layers, heads, n, seed)
    assert abs(contributions(case.run, case.reading).total() - case.reading.value) < 1e-10
    reading = logit_direction(case.run, 0 if family == "scgpt" else 7, case.position)
    assert abs(contributions(case.run, reading).total() - reading.value) < 1e-10


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_frozen_patterns_and_scales_give_the_eager_run(family, layers, heads, n, seed):
    case = Case(family, layers, heads, n, seed)
    read = case.linear(*case.clean)
    assert (read.logits - case.run.logits).abs().max() < 1e-10
    assert (read.mlp_in - case.run.mlp_in).abs().max() < 1e-10
    eager = case.model(input_ids=case.run.tokens[None]).logits[0]
    capped = torch.tanh(case.run.logits / 3) * 3 if family == "gemma2" else case.run.logits
    assert (capped - eager).abs().max() < (1e-12 if family == "gemma2" else 1e-300)


@settings(max_examples=60, deadline=None)
@given(**SHAPES)
def test_the_graph_through_all_heads_is_autograds(family, layers, heads, n, seed):
    case = Case(family, layers, heads, n, seed)
    run, found = case.run, Collected(case.run, case.reading)
    assert abs(found.total() - case.reading.value) < 1e-10
    # The constant is what is left of the model without embeddings, features and errors; what
    # positions give stays, as the oracle is told tokens' embeddings alone.
    decoder_biases = run.transcoders.b_dec[:, None].expand_as(run.mlp_out)
    alone = case.target(case.linear(case.zero[0], decoder_biases))
    assert abs(found.constant + found.leaves[1:].sum() - alone) < 1e-10
    of_embedding, of_mlp = case.gradient()
    written = torch.einsum("lfd,lnd->lnf", run.transcoders.W_dec, of_mlp)
    assert (found.features - run.activations * written).abs().max() < 1e-10
    assert (found.errors - (run.error * of_mlp).sum(dim=-1)).abs().max() < 1e-10
    assert (found.leaves[0] - (run.leaves[0] * of_embedding).sum(dim=-1)).abs().max() < 1e-10
    # Nothing from its own or a later layer, or from a later token: exactly nothing.
    assert of_mlp[case.layer :].abs().sum() == 0 and found.features[case.layer :].abs().sum() == 0
    if run.causal:
        assert of_mlp[:, case.position + 1 :].abs().sum() == 0
        assert found.features[:, case.position + 1 :].abs().sum() == 0
    # And all at once, by the closed form.
    sources = sources_of(run, [case.reading])
    effects, constant = direct_effects(run, sources, [case.reading])
    assert abs(effects.sum() + constant[0] - case.reading.value) < 1e-10
    at = sources.embeddings
    wanted = found.leaves[:, : sources.n_pos].flatten()
    assert (effects[0, at:] - wanted).abs().max() < 1e-10


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_doubling_a_feature_moves_all_downstream_by_its_edges(family, layers, heads, n, seed):
    case = Case(family, layers, heads, n, seed)
    run, rng = case.run, np.random.default_rng(seed + 1)
    active = torch.nonzero(run.activations)
    layer, position, feature = (int(i) for i in active[rng.integers(len(active))])
    doubled = run.mlp_out.clone()
    doubled[layer, position] += (run.activations[layer, position, feature]
                                 * run.transcoders.W_dec[layer, feature])
    moved = case.pre(case.linear(run.leaves[0], doubled)) - run.pre
    assert moved[: layer + 1].abs().max() < 1e-10
    assert position == 0 or not run.causal or moved[:, :position].abs().max() < 1e-10
    for _ in range(3):
        target = (int(rng.integers(layers)), int(rng.integers(24)), int(rng.integers(n)))
        edges = Collected(run, feature_direction(run, *target)).features
        assert abs(moved[target[0], target[2], target[1]]
                   - edges[layer, position, feature]) < 1e-10


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_carried_is_what_attention_makes_of_a_change(family, layers, heads, n, seed):
    case = Case(family, layers, heads, n, seed)
    run = case.run
    change = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed),
                         dtype=torch.float64)
    # In the first layer of the oracle, silent MLPs: what is added beyond the change is attention.
    silent = torch.zeros_like(run.mlp_out)
    before, after = (case.linear(run.leaves[0] + moved, silent) for moved in (0, change))
    stream = run.across(run.entry, change)
    for layer in range(layers):
        stream = _onward(run, layer, stream + through_attention(run, layer, stream))
    for one in run.head:
        stream = one.gate * (stream @ one.weight.T)
    logits = run.last.onward(stream) @ run.unembedding.T
    assert (after.logits - before.logits - logits).abs().max() < 1e-9
    # And it is the adjoint of the head readings.
    of = Reading(torch.randn(16, dtype=torch.float64), case.position, layers, layers,
                   torch.zeros(()), torch.zeros(()))
    by_heads = sum(head_direction(run, of, layers - 1, head, source).vector @ change[source]
                   for head in range(heads[0]) for source in range(n))
    changed = _onward(run, layers - 1, through_attention(run, layers - 1, change))[case.position]
    assert abs(changed @ of.vector - by_heads) < 1e-10


def _onward(run: Frozen, layer: int, stream: Tensor) -> Tensor:
    """Through the norms that may stand on the stream behind attention and MLP."""
    return run.across(run.end[layer], run.across(run.middle[layer], stream))


def test_an_rms_norm_is_not_centred():
    # A constant added to the stream vanishes in LayerNorm only.
    for family in ("parallel", "llama"):
        run = Case(family, 2, (2, 1, 6), 5, 0).run
        vanished = bool(through_attention(run, 1, torch.ones_like(run.final)).abs().max() < 1e-10)
        assert vanished == run.first[0].norm.centred == (family not in LLAMA_TYPE)


def test_a_sliding_window_leaves_older_tokens_out():
    run = Case("mistral", 2, (4, 2, 4), 8, 0).run
    parts = contributions(run, feature_direction(run, 1, 0, 7))
    assert parts.heads[:, :, :4].abs().max() == 0 < parts.heads[:, :, 4:].abs().min()


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_transformers_own_norms_close_as_float32_can(family):
    native, exact, single = (
        freeze(one, tiny_transcoders(one), tokens(9)) for one in (
            tiny(family, native_norms=True), tiny(family), tiny(family, native_norms=True).float()))
    assert torch.allclose(native.logits, exact.logits, atol=1e-4)
    for one in (native, single):
        assert closure(one, feature_direction(one, 2, 5, 8)) < 1e-5
        assert closure(one, logit_direction(one, 7, 8)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_freezing_leaves_no_hook(family):
    model = tiny(family)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    model(input_ids=torch.arange(5)[None], output_attentions=True)  # transformers adds its own
    before = hooks()
    freeze(model, tiny_transcoders(model), tokens(5))
    assert hooks() == before
    decoder_layers(model)[-1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        freeze(model, tiny_transcoders(model), tokens(5))
    assert hooks() == before + 1


@pytest.mark.parametrize(("ids", "mask", "told"), [
    ([[1, 2], [3, 4]], None, r"has the shape \(2, 2\)"), ([], None, r"has the shape \(0,\)"),
    ([1, 40], None, "token 40, and the model knows 40"), ([-1, 2], None, "token -1"),
    ([0.5, 1.0], None, "whole numbers"), ([1, 2], [True], r"mask has the shape \(1,\)"),
])
def test_what_is_no_text_is_refused(ids, mask, told):
    model = tiny_model()
    with pytest.raises(InputError, match=told):
        freeze(model, tiny_transcoders(model), np.array(ids), None if mask is None else
               np.array(mask))


@pytest.mark.parametrize("where", [(3, 0, 0), (-1, 0, 0), (0, 24, 0), (0, -1, 0), (0, 0, 9)])
def test_a_feature_that_is_not_there_is_refused(frozen, where):
    """A layer below 0 was taken for the last one in part."""
    with pytest.raises(InputError, match="3 layers of 24 features and 9 tokens, counted from 0"):
        feature_direction(frozen, *where)
