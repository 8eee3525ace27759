"""Genes are taken out of the text itself, and scores are what they are called."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_profile, tiny_transcoders, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from tiny_architectures import FAMILIES, LinearModel, tiny

from scfm_circuits import InputError
from scfm_circuits.cells.prompts import answered_prompt
from scfm_circuits.circuits import knock_out
from scfm_circuits.circuits.attribution import contributions, feature_direction
from scfm_circuits.circuits.calls import trace_call
from scfm_circuits.circuits.contrast import Contrast, contrast_of
from scfm_circuits.circuits.direct_effects import all_paths, direct_effects, sources_of
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.transcoders.transcoder import Variant

OPTIONS = {"circuit_branches": 64, "circuit_depth": 3, "circuit_nodes": 200, "forward_cells": 3}


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        return tiny_profile(patch, tmp_path_factory.mktemp("results"), **OPTIONS)


@pytest.fixture(scope="module")
def case(parts, profile) -> Any:
    """A cell of many genes: its number, prompt, contrast, frozen run, circuit and scores."""
    model, transcoders, corpus = parts
    cell = max(range(len(corpus)), key=lambda one: len(corpus.genes_of(one)))
    prompt = answered_prompt(corpus, profile, cell, str(corpus.labels[cell]))
    frozen = freeze(model, transcoders, prompt.encoded.tokens)
    contrast = contrast_of(corpus, prompt)
    circuit = trace_call(frozen, contrast, profile)
    scores = knock_out.gene_scores(model, frozen, prompt, contrast, circuit,
                                   corpus.gene_ids_of(cell))
    return cell, prompt, contrast, frozen, circuit, scores


# --- the truth -----------------------------------------------------------------------------------


def contrast_without(parts: Any, profile: Any, cell: int, gone: str | None) -> float:
    """The contrast of a cell's text, put together as a string, without one of its genes."""
    model, _, corpus = parts
    label = str(corpus.labels[cell])
    sentence = " ".join(gene for gene in corpus.genes_of(cell) if gene != gone)
    asked = profile.prompt.replace("{genes}", sentence)
    ids, start = (corpus.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (
        asked + profile.response.replace("{label}", label), asked))
    found = contrast_of(corpus, answered_prompt(corpus, profile, cell, label))
    at = len(start) + found.position - int(corpus.answer_start[cell])
    return float(found.of(model(input_ids=torch.tensor([ids])).logits[0, at]))


def test_a_gene_is_taken_out_of_the_text(parts, profile):
    model, _, corpus = parts
    before = model.config._attn_implementation
    for cell in (0, 5, 7):
        whole = contrast_without(parts, profile, cell, None)
        expected = [whole - contrast_without(parts, profile, cell, gene)
                    for gene in corpus.genes_of(cell)]
        # Attention's softmax is in float32 here, and fused there.
        assert knock_out.knock_outs(model, corpus, profile, cell) == pytest.approx(
            expected, abs=1e-6)
        assert np.ptp(expected) > 1e-3
    assert model.config._attn_implementation == before


def test_of_a_long_cell_evenly_spaced_genes_are_taken_out(parts, profile, monkeypatch):
    model, transcoders, corpus = parts
    cells = [cell for cell in range(len(corpus)) if len(corpus.gene_ids_of(cell)) > 3]
    every = {cell: knock_out.knock_outs(model, corpus, profile, cell) for cell in cells}
    whole = knock_out.knock_out_study(model, transcoders, corpus, profile).genes
    monkeypatch.setattr(knock_out, "MOST_GENES", 3)
    for cell, effects in every.items():
        n = len(effects)
        assert knock_out.places(corpus, cell).tolist() == [0, round((n - 1) / 2), n - 1]
        assert knock_out.knock_outs(model, corpus, profile, cell) == pytest.approx(
            effects[knock_out.places(corpus, cell)], abs=1e-6)
    study = knock_out.knock_out_study(model, transcoders, corpus, profile)
    keys = ["cell", "gene", "rank"]
    same = study.genes[keys].merge(whole, on=keys)
    assert len(same) == len(study.genes) == 3 * study.genes["cell"].nunique() < len(whole)
    for score in ("score_paths", "score_attention", "score_input_x_gradient", "effect"):
        assert np.allclose(same[score], study.genes[score], atol=1e-5)
    assert knock_out.numbers(study, 0)["which"].startswith("every gene, or 3 evenly spaced ones")


# --- what is held against it ---------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(family=st.sampled_from(FAMILIES), layers=st.integers(1, 3), n=st.integers(1, 8),
       seed=st.integers(0, 10_000),
       variant=st.sampled_from([Variant(), Variant("topk", 5), Variant("jumprelu")]),
       of_feature=st.booleans())
def test_all_paths_are_autograds(family, layers, n, seed, variant, of_feature):
    shape = {"layers": layers, "heads": 2, "value_heads": 1, "head_size": 6, "seed": seed}
    model = tiny(family, **shape)
    run = freeze(model, tiny_transcoders(model, seed=seed, variant=variant),
                 tokens(n, seed=seed))
    t, linear = run.transcoders, LinearModel(tiny(family, **shape), run)
    read: list[torch.Tensor] = []

    def replaced(layer: int) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            pre = t.layer_pre_activations(layer, x[0])
            read.append(pre)
            z = pre * (run.activations[layer] > 0)
            return (z @ t.W_dec[layer] + t.b_dec[layer] + run.error[layer])[None]
        return forward

    for index, block in enumerate(linear.model.base_model.layers):
        block.mlp.forward = replaced(index)
    contrast, feature = Contrast(n - 1, 7, (2, 9)), (layers - 1, 5, n - 1)
    reading = feature_direction(run, *feature) if of_feature else contrast.start(run)[1]
    embedded = run.residual[0].clone().requires_grad_()
    logits = linear.model(inputs_embeds=embedded[None]).logits[0, n - 1]
    value = read[-1][n - 1, 5] if of_feature else contrast.of(logits)
    assert float(value.detach()) == pytest.approx(float(reading.value), abs=1e-9)
    (gradient,) = torch.autograd.grad(value, embedded)
    expected = (gradient * run.residual[0]).sum(dim=-1)
    assert torch.allclose(all_paths(run, reading), expected, atol=1e-9)


def test_what_is_written_at_all_tokens_is_the_contrast(parts, profile, case):
    cell, prompt, contrast, frozen, _, scores = case
    _, reading = contrast.start(frozen)
    [row], [constant] = direct_effects(frozen, sources_of(frozen, [reading]), [reading])
    # By hand for the first gene: its columns among features, errors and embeddings.
    sources, own = sources_of(frozen, [reading]), parts[2].gene_ids_of(cell)[0]
    there = np.flatnonzero(prompt.encoded.gene == own)
    n = contrast.position + 1
    at = np.concatenate([sources.position, np.tile(np.arange(n), 2), np.arange(n)])
    assert len(at) == sources.count
    assert scores["written"][0] == pytest.approx(float(row[np.isin(at, there)].sum()))
    others = float(row[~np.isin(at, np.flatnonzero(prompt.encoded.gene >= 0))].sum())
    assert scores["written"].sum() + others + float(constant) == pytest.approx(float(reading.value))


def test_gradients_are_the_real_models(parts, case):
    model, _, corpus = parts
    cell, prompt, contrast, frozen, _, scores = case
    ids = corpus.gene_ids_of(cell)
    embedded = model.get_input_embeddings()(frozen.tokens).clone().requires_grad_()
    value = contrast.of(model(inputs_embeds=embedded[None]).logits[0, contrast.position])
    by_token = (torch.autograd.grad(value, embedded)[0] * embedded).sum(dim=-1).detach().numpy()
    assert scores["input_x_gradient"] == pytest.approx(
        [by_token[prompt.encoded.gene == gene].sum() for gene in ids])


def test_integrated_gradients_add_up_to_the_change_from_the_mean(monkeypatch, parts, case):
    monkeypatch.setattr(knock_out, "STEPS", 400)
    model, _, corpus = parts
    cell, prompt, contrast, frozen, circuit, _ = case
    scores = knock_out.gene_scores(model, frozen, prompt, contrast, circuit,
                                   corpus.gene_ids_of(cell))
    x = frozen.residual[0].clone()
    on_gene = torch.from_numpy(prompt.encoded.gene >= 0)
    x[on_gene] = x[on_gene].mean(dim=0)
    base = contrast.of(model(inputs_embeds=x[None]).logits[0, contrast.position])
    whole = contrast.of(frozen.logits[contrast.position])
    assert scores["integrated_gradients"].sum() == pytest.approx(float(whole - base), rel=1e-3)


def test_attention_rank_and_nodes_by_hand(parts, case):
    cell, prompt, contrast, frozen, circuit, scores = case
    ids = parts[2].gene_ids_of(cell)
    assert scores["rank"].tolist() == list(range(len(ids), 0, -1))
    whole = np.eye(len(frozen.tokens))
    for pattern in frozen.patterns.numpy():
        whole = (0.5 * pattern.mean(axis=0) + 0.5 * np.eye(len(whole))) @ whole
    assert whole.sum(axis=1) == pytest.approx(1)
    row = whole[contrast.position]
    assert scores["attention"] == pytest.approx([row[prompt.encoded.gene == one].sum()
                                                 for one in ids])
    for name, signed in (("nodes", False), ("nodes_signed", True)):
        influence = circuit.influence(signed=signed)
        by_gene = [sum(influence[node.id] for node in circuit.nodes.values()
                       if prompt.encoded.gene[node.source] == one) for one in ids]
        assert scores[name] == pytest.approx(by_gene)
    assert scores["nodes"].min() >= 0 and (scores["nodes"] > 0).any()
    assert set(scores) == set(knock_out.SCORES)


# --- compared ------------------------------------------------------------------------------------


def made_up(n_cells: int, n_genes: int, seed: int = 0) -> pd.DataFrame:
    """Effects at random, `paths` equal to them, `written` to their negative, others at random."""
    rng = np.random.default_rng(seed)
    rows = n_cells * n_genes
    effect = rng.normal(size=rows)
    scores = {f"score_{name}": rng.normal(size=rows) for name in knock_out.SCORES}
    scores |= {"score_paths": effect, "score_written": -effect, "score_nodes": np.zeros(rows)}
    return pd.DataFrame({"cell": np.repeat(np.arange(n_cells), n_genes).astype(str),
                         "cell_type": "a", "effect": effect, **scores})


def test_scores_are_compared_cell_by_cell():
    genes = made_up(6, 24)
    cells, summary = knock_out.compared(genes, 0, draws=400)
    assert len(cells) == 6 * len(knock_out.SCORES) and (cells["k"] == 10).all()
    for (cell, name), row in cells.groupby(["cell", "score"]).first().iterrows():
        part = genes[genes["cell"] == cell]
        score = part[f"score_{name}"]
        if name == "nodes":
            assert row["spearman"] == 0  # without an order
            continue
        assert row["spearman"] == pytest.approx(spearmanr(score, part["effect"]).statistic)
        assert row["spearman_size"] == pytest.approx(
            spearmanr(score.abs(), part["effect"].abs()).statistic)
        top = set(part["effect"].abs().nlargest(10).index) & set(score.abs().nlargest(10).index)
        assert row["overlap"] == pytest.approx(len(top) / 10)
    by_score = summary.set_index("score")
    assert by_score.loc["paths", ["spearman", "spearman_low", "overlap"]].tolist() == (
        pytest.approx([1, 1, 1]))
    assert by_score.loc["written", ["spearman", "spearman_size"]].tolist() == pytest.approx([-1, 1])
    means = cells.groupby("score")["spearman"].mean()
    assert by_score["spearman"].to_dict() == pytest.approx(means.to_dict())
    # Shuffled genes: no correlation, and k of n shared, with the spread of six cells of 24 genes.
    null = by_score.loc["paths"]
    assert null["spearman_null_low"] < 0 < null["spearman_null_high"]
    assert null["spearman_null_high"] == pytest.approx(1.96 / np.sqrt(6 * 23), rel=0.2)
    assert null["overlap_null_low"] < 10 / 24 < null["overlap_null_high"]
    again = knock_out.compared(genes, 0, draws=400)[1]
    pd.testing.assert_frame_equal(again, summary)


def test_the_interval_is_over_cells():
    genes = made_up(2, 12)
    # In one cell right, in the other wrong: no interval over two cells leaves either out.
    second = genes["cell"] == "1"
    genes.loc[second, "score_paths"] *= -1
    _, summary = knock_out.compared(genes, 0, draws=400)
    row = summary.set_index("score").loc["paths"]
    assert (row["spearman"], row["spearman_low"], row["spearman_high"]) == pytest.approx((0, -1, 1))
    assert knock_out.compared(genes, 0, draws=50)[0]["k"].eq(6).all()


def test_the_best_of_each_sort_is_said_with_the_difference():
    genes = made_up(8, 24)
    genes["score_rank"] = -genes["effect"] * 0.5
    cells, summary = knock_out.compared(genes, 0, draws=200)
    said = knock_out.winners(cells, summary, seed=0, draws=200)
    assert (said["spearman"].circuit, said["spearman"].difference) == ("paths", pytest.approx(
        1 - summary.set_index("score").loc[said["spearman"].rival, "spearman"]))
    assert said["spearman"].low > 0 and said["spearman"].verdict == "the circuit"
    # By size the rank is as good as the circuit.
    assert said["spearman_size"].rival == "rank" and said["spearman_size"].difference == (
        pytest.approx(0))
    assert said["spearman_size"].verdict == "neither"


# --- all cells -----------------------------------------------------------------------------------


def test_the_study_takes_cells_of_each_type_in_turn(parts, profile):
    model, transcoders, corpus = parts
    study = knock_out.knock_out_study(model, transcoders, corpus, profile, most=5)
    held_out = np.flatnonzero(corpus.held_out)
    chosen = [cell for cell in held_out if len(corpus.genes_of(cell)) >= knock_out.LEAST]
    assert set(study.kept["cell"]) <= set(corpus.cell_ids[chosen]) and 0 < len(study.kept) <= 5
    for row in study.kept.itertuples():
        cell = int(np.flatnonzero(corpus.cell_ids == row.cell)[0])
        part = study.genes[study.genes["cell"] == row.cell]
        assert part["gene"].tolist() == corpus.genes_of(cell)
        assert part["effect"].to_numpy() == pytest.approx(
            knock_out.knock_outs(model, corpus, profile, cell))
        prompt = answered_prompt(corpus, profile, cell, row.cell_type)
        run = freeze(model, transcoders, prompt.encoded.tokens)
        contrast = contrast_of(corpus, prompt)
        assert row.whole == pytest.approx(float(contrast.of(run.logits[contrast.position])))
        assert contributions(run, contrast.start(run)[1]).total() == pytest.approx(row.whole)
    assert study.summary["cells"].eq(len(study.kept)).all()
    said = knock_out.numbers(study, 0)
    assert said["cells"] == len(study.kept) and said["ahead"] == (study.kept["whole"] > 0).sum()
    assert str(said["nothing"]).startswith(f"{study.kept['nothing'].mean():.2f} (")
    gap = study.kept.assign(nothing=study.kept["whole"] - 2, circuit=study.kept["whole"] - 0.5)
    assert knock_out.numbers(study._replace(kept=gap), 0)["faithfulness"] == "0.75 (0.75 to 0.75)"
    gap = gap.assign(nothing=gap["whole"])
    assert "n/a" in str(knock_out.numbers(study._replace(kept=gap), 0)["faithfulness"])
    best = study.summary.set_index("score")["overlap"].drop(list(knock_out.CIRCUITS)).max()
    assert f"with {best:.2f} (" in str(said["overlap"])


def test_sentences_too_short_to_rank_are_refused(parts, profile, monkeypatch):
    monkeypatch.setattr(knock_out, "LEAST", 99)
    with pytest.raises(InputError, match="raise `genes_per_cell`"):
        knock_out.knock_out_study(*parts, profile)


def test_the_gene_without_which_the_call_loses_most_is_named_by_type():
    genes = pd.DataFrame([("a", "T", "CD3E", 2.0), ("a", "T", "CD8A", 1.0), ("b", "T", "CD3E", 0.1),
                          ("b", "T", "LYZ", -5.0), ("c", "T", "CD2", 3.0), ("d", "T", "LYZ", -1.0),
                          ("e", "B", "CD79A", 9.0)],
                         columns=["cell", "cell_type", "gene", "effect"])
    assert knock_out.most_missed(genes, "T") == (
        'In cells of type "T" the call loses most without CD3E (in 2 of 4 cells), CD2 (in 1 of 4 '
        "cells).")
    for none in ("mast", "T"):
        said = knock_out.most_missed(genes[genes["effect"] < 0], none)
        assert said == f'In no cell of type "{none}" here does the call lose by a gene taken out.'
