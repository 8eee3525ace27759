"""What the transcoders are trained on: fills, batches, and several processes that share them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TRAINING, model_for, tiny_corpus, tiny_profile
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import in_ranks
from torch import Tensor

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.profile import Profile
from scfm_circuits.models.architectures import attentions
from scfm_circuits.models.mlp_sites import Sites, mlp_sites
from scfm_circuits.transcoders.training import activation_buffer
from scfm_circuits.transcoders.training.activation_buffer import ActivationBuffer, Batch
from scfm_circuits.transcoders.training.processes import Ranks


@pytest.fixture
def numbered(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """The corpus with a number of its own for each token, and `activations` that repeat it."""
    n = corpus.tokens.size
    marked = replace(corpus, tokens=np.arange(n).reshape(corpus.tokens.shape))

    def fake_sites(model: Any, ids: Tensor, mask: Tensor, into: Sites, **_: Any) -> Sites:
        number = ids[mask].float()[None, :, None].expand(2, -1, 16)
        layer = torch.arange(2)[:, None, None] * 10_000
        into.inputs[:], into.outputs[:] = number + layer, -number - layer
        return into

    monkeypatch.setattr(activation_buffer, "mlp_sites", fake_sites)
    return marked


def numbers(batch: Batch) -> list[int]:
    """The tokens of a batch; checks that layers, inputs and outputs speak of the same."""
    inputs, outputs = batch.sites()
    first = inputs[0, :, 0]
    assert torch.equal(inputs[1], first[:, None].expand(-1, 16) + 10_000)
    assert torch.equal(inputs, -outputs)
    assert torch.equal(batch.sites(slice(1, 2)).inputs, inputs[1:])
    return first.int().tolist()


def fills(buffer: ActivationBuffer, n: int) -> Iterator[tuple[int, list[list[int]]]]:
    batches = buffer.batches(0)
    for fill in range(n):
        yield fill, [numbers(next(batches)) for _ in range(buffer.n_batches(fill))]


@pytest.mark.parametrize("buffer_tokens", [64, 150, 100_000], ids=["small", "half", "all"])
def test_each_token_of_a_fill_comes_once_and_never_a_held_out_one(model, numbered, profile,
                                                                  buffer_tokens):
    profile = profile.model_copy(update={"buffer_tokens": buffer_tokens, "batch_tokens": 1})
    buffer = ActivationBuffer(model, numbered, profile)
    train = set(np.flatnonzero(~numbered.held_out).tolist())
    orders = []
    for fill, batches in fills(buffer, 5):
        cells = buffer.cells(fill)
        assert set(cells.tolist()) <= train
        expected = Counter(int(token) for cell in cells
                           for token in numbered.tokens[cell][numbered.mask[cell]])
        found = [number for batch in batches for number in batch]
        assert Counter(found) == expected
        orders.append(tuple(found))
    assert len(set(orders)) == 5, "each fill has a permutation of its own"


def test_what_a_fill_leaves_over_is_less_than_a_batch(model, numbered, profile):
    buffer = ActivationBuffer(model, numbered, profile)
    for fill, batches in fills(buffer, 6):
        found = [number for batch in batches for number in batch]
        assert {len(batch) for batch in batches} == {32} and len(set(found)) == len(found)
        assert 0 <= numbered.lengths[buffer.cells(fill)].sum() - len(found) < 32


def test_all_training_cells_have_their_turn(model, corpus, profile):
    buffer = ActivationBuffer(model, corpus, profile)
    train = np.flatnonzero(~corpus.held_out)
    size = buffer.cells_per_fill
    assert 1 < size < len(train)
    turns = np.concatenate([buffer.cells(fill) for fill in range(len(train))])
    # size * n cells are exactly `size` rounds through all n, each round in an order of its own.
    rounds = turns.reshape(size, len(train))
    for one in rounds:
        assert sorted(one) == train.tolist()
    assert len({tuple(one) for one in rounds}) == size


@settings(deadline=None, max_examples=25)
@given(first=st.integers(0, 30))
def test_batches_from_any_step_are_those_of_the_whole_run(first):
    corpus = tiny_corpus(14)
    model = model_for(corpus, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        profile = tiny_profile(patch, Path("unused"), **TRAINING)
        stream, later = (ActivationBuffer(model, corpus, profile).batches(n) for n in (0, first))
        for _ in range(first):
            next(stream)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in
                       zip(next(stream).sites(), next(later).sites(), strict=True))


def test_a_corpus_that_fits_is_harvested_once(model, corpus, profile, monkeypatch):
    calls: list[int] = []

    def counted(model: Any, ids: Tensor, mask: Tensor, into: Sites, **more: Any) -> Sites:
        calls.append(len(ids))
        return mlp_sites(model, ids, mask, into, **more)

    monkeypatch.setattr(activation_buffer, "mlp_sites", counted)
    buffer = ActivationBuffer(model, corpus, profile.model_copy(update={"buffer_tokens": 100_000}))
    batches = buffer.batches(0)
    for _ in range(3 * buffer.n_batches(0)):
        next(batches)
    assert sum(calls) == (~corpus.held_out).sum()


def test_the_memory_of_a_fill_is_used_again(model, corpus, profile):
    buffer = ActivationBuffer(model, corpus, profile)
    tokens = [int(corpus.lengths[buffer.cells(fill)].sum()) for fill in range(6)]
    places = [buffer.sites(fill).inputs.data_ptr() for fill in range(6)]
    grown = sum(n > max(tokens[:i]) for i, n in enumerate(tokens) if i)
    assert len(set(places)) <= 1 + grown < 6
    assert buffer.sites(5).inputs.shape == (2, tokens[5], 16)


def test_a_fill_holds_what_the_model_gives(model, corpus, profile):
    buffer = ActivationBuffer(model, corpus, profile)
    before = model.config._attn_implementation
    inputs, outputs = buffer.sites(1)
    assert model.config._attn_implementation == before == "eager"
    found = []
    for cell in buffer.cells(1):
        ids = torch.from_numpy(corpus.tokens[cell][corpus.mask[cell]])[None]
        found.append(mlp_sites(model, ids, torch.ones_like(ids, dtype=torch.bool)))
    for part, expected in ((inputs, [one.inputs for one in found]),
                           (outputs, [one.outputs for one in found])):
        # Any order: what counts is which tokens there are.
        wanted = torch.cat(expected, dim=1)
        order = [one[:, 0].argsort() for one in part], [one[:, 0].argsort() for one in wanted]
        for layer in range(2):
            assert torch.allclose(part[layer][order[0][layer]], wanted[layer][order[1][layer]],
                                  atol=1e-4)


def test_with_compiled_attention_a_fill_holds_the_same(corpus, profile, capsys):
    profile = profile.model_copy(update={"buffer_tokens": 150})
    plain = ActivationBuffer(model_for(corpus), corpus, profile)
    compiled = ActivationBuffer(model_for(corpus), corpus, profile, compiled=True)
    for fill in range(3):  # of other lengths
        for one, other in zip(compiled.sites(fill), plain.sites(fill), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    assert capsys.readouterr().out == ""


def test_attention_that_cannot_be_compiled_is_not(corpus, profile, monkeypatch, capsys):
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("no compiler for this\nand more")

    compiled = ActivationBuffer(model_for(corpus), corpus, profile, compiled=True)
    for attention in attentions(compiled._model)[1:]:  # the second layer's is the first to fail
        monkeypatch.setattr(attention, "_compiled_call_impl", fail)
    plain = ActivationBuffer(model_for(corpus), corpus, profile)
    for one, other in zip(compiled.sites(0), plain.sites(0), strict=True):
        assert torch.equal(one, other)
    said = capsys.readouterr().out
    assert said == ("The model's attention could not be compiled and is done without (no compiler "
                    "for this).\n")
    compiled.sites(1)
    assert capsys.readouterr().out == ""


def test_activations_are_kept_in_the_type_asked_for(model, corpus, profile):
    exact = ActivationBuffer(model, corpus, profile).sites(0)
    rough = ActivationBuffer(model, corpus, profile, dtype=torch.bfloat16).sites(0)
    assert rough.inputs.dtype == rough.outputs.dtype == torch.bfloat16
    assert torch.equal(rough.inputs, exact.inputs.bfloat16())


def halves(ranks: Ranks, model: Any, corpus: Corpus, profile: Profile) -> list[Tensor]:
    scale = torch.tensor([2.0, 0.5, 3.0])
    buffer = ActivationBuffer(model, corpus, profile, scale, ranks=ranks)
    batches, found = buffer.batches(0), []
    for _ in range(6):
        found += [one.clone() for one in next(batches).sites()]
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("cells", [1, 3, 100], ids=["many turns", "some", "one turn"])
def test_processes_that_share_the_forward_hold_their_layers(corpus, profile, size, cells):
    model = model_for(corpus, layers=3, dtype=torch.float32)
    profile = profile.model_copy(update={"forward_cells": cells})
    whole = halves(Ranks(), model, corpus, profile)
    answers = in_ranks(size, halves, model, corpus, profile)
    for together, *apart in zip(whole, *answers, strict=True):
        assert torch.equal(torch.cat(apart), together)


def forwards(ranks: Ranks, model: Any, corpus: Corpus, profile: Profile) -> int:
    calls: list[int] = []
    real = mlp_sites

    def counted(model: Any, ids: Tensor, mask: Tensor, into: Sites | None, **more: Any) -> Sites:
        calls.append(len(ids))
        return real(model, ids, mask, into, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_buffer, "mlp_sites", counted)
        ActivationBuffer(model, corpus, profile, ranks=ranks).sites(0)
    return sum(calls)


def test_each_cell_passes_the_model_once(model, corpus, profile):
    profile = profile.model_copy(update={"buffer_tokens": 100_000, "forward_cells": 1})
    found = in_ranks(2, forwards, model, corpus, profile)
    assert sum(found) == (~corpus.held_out).sum() and abs(found[0] - found[1]) <= 1


@pytest.mark.parametrize("buffer_tokens", [64, 100_000], ids=["refilled", "kept"])
def test_scaled_outputs_are_scaled_once_and_layer_by_layer(model, corpus, profile, buffer_tokens):
    profile = profile.model_copy(update={"buffer_tokens": buffer_tokens})
    plain = ActivationBuffer(model, corpus, profile)
    scaled = ActivationBuffer(model, corpus, profile, torch.tensor([2.0, 0.25]))
    for fill in (0, 1, 0):
        x, y = plain.sites(fill)
        inputs, outputs = scaled.sites(fill)
        assert torch.equal(inputs, x)
        assert torch.equal(outputs[0], 2 * y[0]) and torch.equal(outputs[1], y[1] / 4)
