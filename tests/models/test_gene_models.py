"""Small models of genes as tokens: their shape, what they are asked, and that they can be used."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gene_tokens import cells, counts, gene_corpus, profile_of
from helpers import TRAINING, model_for, tiny_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_architectures import tiny

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import load_corpus, of_cells
from scfm_circuits.cells.tokens import Prompts
from scfm_circuits.circuits.attribution import closure, feature_direction, logit_direction
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.common.encodings import RANK_VALUE
from scfm_circuits.models.loading import get_model, model_stamp
from scfm_circuits.models.mlp_sites import (
    MASKED,
    Asked,
    asked,
    batches,
    masked_genes,
    mlp_sites,
)
from scfm_circuits.models.small_models import hidden_genes, small_config, train_small_model
from scfm_circuits.transcoders.training.activation_buffer import ActivationBuffer
from scfm_circuits.transcoders.training.run import get_transcoders
from scfm_circuits.transcoders.validation import fraction_of_variance_unexplained

SMALL: dict[str, Any] = {
    "model_steps": 4, "model_layers": 2, "model_width": 16, "model_heads": 2, "human_layer": 1,
    "model_batch_cells": 3, "model_type_balance": 0.0, **TRAINING}
ENCODERS = ["geneformer_v1", "geneformer_v2"]
EACH = pytest.mark.parametrize("encoding", sorted(RANK_VALUE))


@pytest.fixture(autouse=True)
def _results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path / "results"))


@pytest.mark.parametrize(("encoding", "kind", "mlp", "tied"), [
    ("maxtoki", "llama", 2, False), ("geneformer_v1", "bert", 2, True),
    ("geneformer_v2", "bert", 4, True)])
def test_the_model_has_the_proportions_of_the_encodings_own(tmp_path, encoding, kind, mlp, tied):
    profile, corpus = gene_corpus(tmp_path, encoding, **SMALL)
    config: Any = small_config(profile, len(corpus.tokenizer), 300)
    assert (config.model_type, config.intermediate_size, config.tie_word_embeddings) == (
        kind, mlp * 16, tied)
    assert config.max_position_embeddings == 300 and config.vocab_size == len(corpus.tokenizer)
    assert config.pad_token_id == 0
    if kind == "bert":
        assert (config.hidden_act, config.layer_norm_eps, config.type_vocab_size) == (
            "relu", 1e-12, 2)
    else:
        ids = corpus.tokenizer.convert_tokens_to_ids(["<bos>", "<eos>"])
        assert [config.bos_token_id, config.eos_token_id] == ids
        assert config.num_key_value_heads == 2 and config.rms_norm_eps == 1e-6


@EACH
def test_it_learns_from_training_cells_only_and_is_loaded_as_trained(tmp_path, encoding):
    profile, corpus = gene_corpus(tmp_path, encoding, **SMALL)
    model, curve = get_model(profile, corpus)
    assert abs(curve.loss[0] - math.log(len(corpus.tokenizer))) < 0.5 and not model.training
    changed = corpus.tokens.copy()
    changed[corpus.held_out] = 1
    again, same = train_small_model(replace(corpus, tokens=changed), profile, progress=False)
    assert same == curve
    loaded, stored = get_model(profile, corpus)
    assert stored == curve
    for one in (again, loaded):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), one.parameters(),
                                                     strict=True))
    more = profile.model_copy(update={"model_steps": 60, "model_learning_rate": 1e-2})
    losses = train_small_model(corpus, more, progress=False)[1].loss
    assert np.mean(losses[-20:]) < np.mean(losses[:3]) - 0.4


def test_no_dictionary_is_needed(tmp_path):
    profile = profile_of(cells(tmp_path, counts()), {"encoding": "geneformer_v2",
                                                     "token_dictionary": "train"}, **SMALL)
    corpus = load_corpus(profile)
    model, curve = get_model(profile, corpus)
    assert model.config.vocab_size == 12 and np.isfinite(curve.loss).all()


def test_models_of_one_corpus_and_two_encodings_are_told_apart(tmp_path):
    """V2 and MaxToki differ in the name of a token alone."""
    profile, corpus = gene_corpus(tmp_path, "geneformer_v2", **SMALL)
    other = profile.model_copy(update={"encoding": "maxtoki"})
    assert model_stamp(profile, corpus) != model_stamp(other, corpus)


# --- what is masked ------------------------------------------------------------------------------


def test_genes_are_hidden_in_training_by_geneformers_rule():
    n, special = 4000, 4
    gene = np.tile([-1, *range(12), -1, -1, -1], (n, 1)).astype(np.int32)
    tokens = np.where(gene >= 0, gene + special, 2)
    mask = np.ones(gene.shape, bool)
    batch = Prompts(tokens, mask, gene, gene, np.zeros(n), np.zeros(n))
    told, chosen = hidden_genes(batch, 1, 116, np.random.default_rng(0))
    asked_of, genes = chosen.sum(), n * 12
    assert not chosen[gene < 0].any() and np.array_equal(told[~chosen], tokens[~chosen])
    assert abs(asked_of / genes - MASKED) < 0.01
    own = (told == tokens)[chosen].mean()
    assert abs((told == 1)[chosen].mean() - 0.8) < 0.02 and abs(own - 0.1) < 0.02
    others = told[chosen][(told != tokens)[chosen] & (told[chosen] != 1)]
    assert others.min() == 0 and others.max() == 115


def test_a_batch_in_which_no_gene_is_drawn_asks_one():
    gene = np.array([[-1, 0, -1]], np.int32)
    batch = Prompts(np.array([[2, 4, 3]]), gene > -2, gene, gene, np.array([3]), np.array([2]))
    for seed in range(20):
        assert hidden_genes(batch, 1, 5, np.random.default_rng(seed))[1].tolist() == [
            [False, True, False]]


@EACH
def test_every_evaluation_masks_the_same_genes(tmp_path, encoding):
    """Whatever cells stand beside a cell, and wherever it stands."""
    profile, corpus = gene_corpus(tmp_path, encoding, n=12)
    whole = masked_genes(corpus, np.arange(12), profile.seed)
    assert not whole[corpus.gene < 0].any() and not whole[~corpus.mask].any()
    genes = (corpus.gene >= 0).sum(axis=1)
    assert np.array_equal(whole.sum(axis=1), np.maximum(1, np.round(MASKED * genes)))
    order = np.array([7, 2, 11])
    assert np.array_equal(masked_genes(corpus, order, profile.seed), whole[order])
    assert np.array_equal(masked_genes(of_cells(corpus, order), range(3), profile.seed),
                          whole[order])
    assert not np.array_equal(masked_genes(corpus, np.arange(12), profile.seed + 1), whole)
    assert len({one.tobytes() for one in whole}) > 4


@EACH
@pytest.mark.parametrize("size", [1, 5])
def test_what_is_asked_is_what_the_losses_are_of(tmp_path, encoding, size):
    profile, corpus = gene_corpus(tmp_path, encoding)
    family = "llama" if encoding == "maxtoki" else "bert"
    model, cells = tiny(family, vocabulary=len(corpus.tokenizer)), np.arange(8)
    chosen, pad = masked_genes(corpus, cells, profile.seed), corpus.tokens.min()
    for rows, tokens, mask in batches(corpus, cells, size, torch.device("cpu")):
        question = asked(model, corpus, rows, tokens, mask, profile.seed)
        logits = model(input_ids=question.shown, attention_mask=mask.long()).logits
        found = question.loss(logits)
        if encoding == "maxtoki":
            wanted = torch.nn.functional.cross_entropy(
                logits[:, :-1][mask[:, 1:]], tokens[:, 1:][mask[:, 1:]], reduction="none")
            assert question.shown is tokens
        else:
            at = torch.from_numpy(chosen[rows, : tokens.shape[1]])
            wanted = torch.nn.functional.cross_entropy(logits[at], tokens[at], reduction="none")
            assert torch.equal(question.shown != tokens, at) and (question.shown[at] == 1).all()
        assert torch.allclose(found, wanted.float(), atol=1e-5) and len(wanted)
        assert (question.wanted != pad).all()


def test_an_encoder_is_asked_of_tokens_without_a_mask():
    corpus = tiny_corpus()
    model = tiny("bert", vocabulary=len(corpus.tokenizer))
    rows, tokens, mask = next(batches(corpus, [0, 1], 2, torch.device("cpu")))
    with pytest.raises(InputError, match="no <mask>; set `encoding`"):
        asked(model, corpus, rows, tokens, mask, 0)
    assert asked(model_for(corpus), corpus, rows, tokens, mask, 0).shown is tokens


@settings(max_examples=25)
@given(family=st.sampled_from(["bert", "bert-gelu"]), n=st.integers(2, 9), more=st.integers(1, 6),
       seed=st.integers(0, 1000))
def test_padding_moves_no_loss(family, n, more, seed):
    model = tiny(family, seed=seed)
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(0, 40, (1, n)))
    chosen = torch.from_numpy(rng.random((1, n)) < 0.5)
    chosen[0, 0] = True
    wide, mask = (torch.nn.functional.pad(one, (0, more)) for one in (ids, torch.ones_like(ids)))
    padded = torch.nn.functional.pad(chosen, (0, more))
    alone = Asked(ids, chosen, ids[chosen]).loss(model(input_ids=ids).logits)
    beside = Asked(wide, padded, wide[padded]).loss(
        model(input_ids=wide, attention_mask=mask).logits)
    assert (alone - beside).abs().max() < 1e-5


# --- on the way to circuits ----------------------------------------------------------------------


@EACH
def test_transcoders_see_no_padding_and_circuits_close(tmp_path, encoding):
    """From counts, by a model trained here, to what a buffer holds, transcoders and exact sums."""
    profile, corpus = gene_corpus(tmp_path, encoding, **SMALL)
    assert len(set(corpus.lengths)) > 1
    model, _ = get_model(profile, corpus)
    whole = profile.model_copy(update={"buffer_tokens": 100_000})
    fill = ActivationBuffer(model, corpus, whole).sites(0)
    train = np.flatnonzero(~corpus.held_out)
    train = train[np.argsort(corpus.lengths[train], kind="stable")]
    each = [torch.from_numpy(corpus.tokens[cell][corpus.mask[cell]])[None] for cell in train]
    alone = [mlp_sites(model, ids, torch.ones_like(ids, dtype=torch.bool)) for ids in each]
    for part, name in zip(fill, ("inputs", "outputs"), strict=True):
        wanted = torch.cat([getattr(one, name) for one in alone], dim=1)
        assert (part - wanted).abs().max() < 1e-5
    transcoders, _ = get_transcoders(model, corpus, profile)
    fvu = fraction_of_variance_unexplained(model, transcoders, corpus, np.arange(8), 3)
    assert np.isfinite(fvu).all() and f"small {'Llama' if encoding == 'maxtoki' else 'BERT'}" in (
        profile.results / "transcoders" / "config.yaml").read_text()
    frozen = freeze(model, transcoders, corpus.tokens[0][corpus.mask[0]])
    for reading in (feature_direction(frozen, 1, 3, 2), logit_direction(frozen, 5, 2)):
        assert closure(frozen, reading) < 1e-5
