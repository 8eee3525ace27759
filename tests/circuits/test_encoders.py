"""Encoders, and readings beyond a call: padding, ranks, masked genes, directions between states."""

from dataclasses import replace

import numpy as np
import torch
from helpers import tiny_transcoders, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_architectures import BERT_TYPE, LinearModel, tiny
from traced import SHAPES, Case, Collected

from scfm_circuits.circuits.attribution import (
    added_up,
    contributions,
    contributions_each,
    feature_direction,
    logit_direction,
    stream_direction,
)
from scfm_circuits.circuits.direct_effects import (
    direct_effects,
    sources_of,
    whole_sums,
)
from scfm_circuits.circuits.frozen import freeze

ENCODERS = (*BERT_TYPE, "scgpt")


@settings(max_examples=25, deadline=None)
@given(family=st.sampled_from(ENCODERS), n=st.integers(1, 7), more=st.integers(1, 5),
       seed=st.integers(0, 1000))
def test_padding_moves_nothing(family, n, more, seed):
    model = tiny(family, seed=seed)
    t = tiny_transcoders(model, seed=seed)
    text = tokens(n, seed=seed)
    alone = freeze(model, t, text)
    padded = freeze(model, t, np.append(text, np.zeros(more, int)), np.arange(n + more) < n)
    for one, other in ((feature_direction(alone, 2, 5, n - 1), feature_direction(padded, 2, 5,
                                                                                 n - 1)),
                       (logit_direction(alone, 0, 0), logit_direction(padded, 0, 0))):
        a, b = contributions(alone, one), contributions(padded, other)
        assert (b.heads[..., n:] == 0).all()
        assert (a.heads - b.heads[..., :n]).abs().max() < 1e-11
        assert (a.features - b.features).abs().max() < 1e-11
        assert abs(b.total() - one.value) < 1e-10
        sources = sources_of(padded, [other])
        effects, _ = direct_effects(padded, sources, [other])
        leaves = effects[0, sources.embeddings :].view(2, n + more)
        assert leaves[:, n:].abs().max() == 0


@settings(max_examples=25, deadline=None)
@given(family=st.sampled_from(BERT_TYPE), seed=st.integers(0, 1000), others=st.integers(1, 5))
def test_a_masked_genes_log_odds_close_with_the_heads_bias(family, seed, others):
    model = tiny(family, seed=seed)
    run = freeze(model, tiny_transcoders(model, seed=seed), tokens(6, seed=seed))
    reading = logit_direction(run, 3, 2, minus=list(range(4, 4 + others)))
    logits = model(input_ids=run.tokens[None]).logits[0, 2]
    wanted = logits[3] - logits[4 : 4 + others].logsumexp(0)
    assert abs(reading.value - wanted) < 1e-12
    assert abs(contributions(run, reading).total() - wanted) < 1e-10


def test_the_leaves_of_an_encoder_are_its_tokens_and_their_ranks():
    model = tiny("bert")
    run = freeze(model, tiny_transcoders(model), tokens(6))
    reading = feature_direction(run, 0, 5, 3)
    parts = contributions(run, reading)
    leaves = parts.embedding
    assert run.entry is not None and leaves.shape == (2,)
    embeddings = model.bert.embeddings
    assert torch.equal(run.leaves[0], embeddings.word_embeddings(run.tokens))
    assert torch.equal(run.leaves[1], embeddings.position_embeddings.weight[:6])
    rest = parts.features.sum() + parts.errors.sum() + parts.heads.sum() + parts.constant
    assert abs(leaves.sum() - (reading.value - rest)) < 1e-12
    # Without ranks, all else frozen, the reading loses what they give through all paths.
    linear = LinearModel(tiny("bert"), run)
    linear.model.bert.embeddings.position_embeddings.weight.zero_()
    without = linear(run.leaves[0], run.mlp_out).mlp_in[0, 3] @ run.transcoders.W_enc[0, 5]
    whole = run.mlp_in[0, 3] @ run.transcoders.W_enc[0, 5]
    assert abs(Collected(run, reading).leaves[1].sum() - (whole - without)) < 1e-10


def test_the_leaves_of_scgpt_are_genes_and_their_levels():
    """A value closes, and what a level says is what the value loses without it, all else frozen."""
    model, text = tiny("scgpt"), np.array([3, 17, 25, 34, 12, 39])  # ten genes at levels 0 to 3
    run = freeze(model, tiny_transcoders(model), text)
    gene, level = model.scgpt.genes(run.tokens % 10), (run.tokens // 10).to(torch.float64)
    body = model.scgpt
    assert torch.equal(run.leaves[0], body.gene_norm(gene))
    assert torch.equal(run.leaves[1], body.level_norm(body.level_out(body.level_in(
        level[:, None]).relu())))
    value = model(input_ids=run.tokens[None]).logits[0, 3, 0]
    reading = logit_direction(run, 0, 3)
    assert abs(reading.value - value) < 1e-12
    assert abs(contributions(run, reading).total() - value) < 1e-10
    linear = LinearModel(tiny("scgpt"), run)
    whole, without = (linear(run.leaves[0] - moved, run.mlp_out).logits[3, 0]
                      for moved in (0, run.leaves[1]))
    assert abs(whole - value) < 1e-10
    assert abs(Collected(run, reading).leaves[1].sum() - (whole - without)) < 1e-10


# --- directions between states --------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(**SHAPES, below=st.integers(0, 1))
def test_a_direction_between_states_closes_on_the_mean_embedding(family, layers, heads, n, seed,
                                                                  below):
    """Read on the mean over tokens, of the last layer's stream or the one before, in one hop and
    through all paths; the parts of tokens, of their ranks and of MLPs are autograd's."""
    case = Case(family, layers, heads, n, seed)
    run, layer = case.run, layers - below
    direction = torch.randn(16, generator=torch.Generator().manual_seed(seed),
                            dtype=torch.float64) / n
    stream = run.final if layer == layers else run.residual[layer]
    value = stream.sum(dim=0) @ direction
    readings = [stream_direction(run, direction, position, layer) for position in range(n)]
    assert abs(sum(one.value for one in readings) - value) < 1e-10
    assert abs(sum(contributions(run, one).total() for one in readings) - value) < 1e-10
    if layer == 0:  # nothing but what the stream begins with
        return
    [found] = whole_sums(run, [added_up(readings)])
    assert abs(found.total() - value) < 1e-10
    every = [Collected(run, one) for one in readings]
    leaves, features, errors = (sum(getattr(one, name) for one in every)
                                for name in ("leaves", "features", "errors"))
    assert (found.leaves - leaves).abs().max() < 1e-10
    assert (found.features - features.sum(dim=-1)[:layer]).abs().max() < 1e-10
    assert (found.errors - errors[:layer]).abs().max() < 1e-10


@settings(max_examples=25, deadline=None)
@given(**SHAPES)
def test_contributions_to_many_tokens_at_once_are_those_to_each(family, layers, heads, n, seed):
    run = Case(family, layers, heads, n, seed).run
    groups = [[logit_direction(run, 0, position) for position in range(n)],
              [feature_direction(run, layers - 1, 3, position) for position in range(n)],
              [feature_direction(run, 0, 3, position) for position in range(n)]]
    for readings in groups:
        together = contributions_each(run, readings)
        for row, one in enumerate(readings):
            assert abs(sum(part[row].sum() for part in together) - one.value) < 1e-10
            for part, alone in zip(together, contributions(run, one), strict=True):
                assert part[row].shape == alone.shape
                assert torch.allclose(part[row], alone, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(**SHAPES)
def test_sums_of_several_readings_split_at_attention(family, layers, heads, n, seed):
    """Readings that see other layers are swept together; what came along a reading's own stream is
    what `contributions` has beside heads, and attention carried the rest."""
    case = Case(family, layers, heads, n, seed)
    run, rng = case.run, torch.Generator().manual_seed(seed)
    u = torch.randn(16, generator=rng, dtype=torch.float64)
    groups = [[logit_direction(run, 0, position) for position in range(n)],
              [stream_direction(run, u, position, layers) for position in range(n)]]
    if layers > 1:
        groups.insert(1, [stream_direction(run, u, position, layers - 1) for position in range(n)])
    readings = [added_up(group) for group in groups]
    own = whole_sums(replace(run, patterns=0 * run.patterns), readings)
    for group, whole, direct in zip(groups, whole_sums(run, readings), own, strict=True):
        alone = [whole_sums(run, [one])[0] for one in group]
        for one, parts in zip(whole, zip(*alone, strict=True), strict=True):
            for part in parts:  # a reading of a decoder reaches no later token
                one = one.clone()
                one[tuple(map(slice, part.shape))] -= part
            assert one.abs().max() < 1e-10
        assert abs(whole.total() - sum(one.value for one in group)) < 1e-9
        parts = [contributions(run, one) for one in group]
        assert abs(direct.features.sum() - sum(one.features.sum() for one in parts)) < 1e-10
        assert abs(direct.errors.sum() - sum(one.errors.sum() for one in parts)) < 1e-10
        at_own = sum(one.embedding for one in parts)
        assert (direct.leaves.sum(dim=1) - at_own).abs().max() < 1e-10
