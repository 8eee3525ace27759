"""Other models on the same cells: their profiles, losses of the same genes, one small run."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from gene_tokens import cells, counts, gene_corpus, profile_of
from tiny_architectures import tiny

from scfm_circuits.cells.corpus import load_corpus
from scfm_circuits.circuits.origins import PARTS, STATE, SUM
from scfm_circuits.common.profile import load_profile
from scfm_circuits.enrichment.gene_sets import load_library
from scfm_circuits.features.baselines import output_scale, reinitialised_transcoders
from scfm_circuits.models import loading
from scfm_circuits.models.mlp_sites import masked_genes
from scfm_circuits.report.other_models import (
    DECODER,
    ENCODER,
    ENCODINGS,
    RANDOM,
    SHORT,
    by_type_shown,
    compare_models,
    gene_losses,
    lead,
    parts_shown,
    quoted,
    shares_shown,
    study_profile,
)
from scfm_circuits.report.plots.other_models import parts_of_readings
from scfm_circuits.report.sub_words import Parts
from scfm_circuits.transcoders.training.run import get_transcoders
from scfm_circuits.transcoders.training.settings import training_steps


@pytest.fixture(autouse=True)
def _results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path / "results"))


@pytest.mark.parametrize("name", ["demo", "smoke", "planted"])
def test_the_models_differ_in_their_encoding_alone(name: str) -> None:
    profile = load_profile(name)
    assert profile.counts_at_hand
    decoder, encoder = (study_profile(profile, one) for one in ENCODINGS.values())
    assert {key for key, value in dict(decoder).items() if getattr(encoder, key) != value} == {
        "name", "encoding"}
    assert training_steps(decoder) == profile.model_steps and decoder.seed == profile.seed
    assert profile.results in decoder.results.parents
    # Whatever a profile could say, it can say this.
    type(decoder).model_validate({**dict(decoder), "name": "any"})


@pytest.mark.parametrize("name", ["paper", "pbmc", "maxtoki"])
def test_a_profile_of_other_cells_has_no_such_chapter(name: str) -> None:
    assert not load_profile(name).counts_at_hand


@pytest.mark.parametrize("encoding", ENCODINGS.values())
def test_losses_are_of_the_same_genes_in_both_kinds_of_model(tmp_path, encoding):
    """Cell by cell from the logits; frequencies by counting."""
    profile, corpus = gene_corpus(tmp_path, encoding, n=12)
    model = tiny("llama" if encoding == "maxtoki" else "bert", vocabulary=len(corpus.tokenizer))
    shift, losses, plain = int(encoding == "maxtoki"), [], []
    train = corpus.tokens[~corpus.held_out][corpus.gene[~corpus.held_out] >= 0]
    frequency = np.bincount(train, minlength=12) + 1
    for cell in range(12):
        ids = torch.from_numpy(corpus.tokens[cell][corpus.mask[cell]])[None]
        chosen = np.flatnonzero(masked_genes(corpus, [cell], profile.seed)[0])
        shown = ids.clone()
        if not shift:
            shown[0, chosen] = 1
        logs = model(input_ids=shown).logits[0].log_softmax(dim=-1)
        losses += [-float(logs[i - shift, ids[0, i]]) for i in chosen]
        plain += [-math.log(frequency[ids[0, i]] / frequency.sum()) for i in chosen]
    found = gene_losses(model, corpus, np.arange(12), profile)
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert found["frequencies"] == pytest.approx(np.mean(plain))


def test_a_type_whose_genes_are_its_own_is_told_by_its_frequencies(tmp_path):
    values = np.zeros((20, 8), int)
    values[::2, :4], values[1::2, 4:] = 3, 3
    fields = {"encoding": "geneformer_v2", "token_dictionary": "train"}
    profile = profile_of(cells(tmp_path, values), fields)
    corpus = load_corpus(profile)
    found = gene_losses(tiny("bert", vocabulary=12), corpus, np.arange(20), profile)
    assert found["by_type"] < found["frequencies"]


def test_the_best_control_is_what_a_lead_is_over() -> None:
    row = {"percentage_x": 50.0, "untrained_x": 30.0, "reinitialised_x": np.nan, "null_x": 60.0}
    assert lead(row, "x") == -10


def test_a_small_run_is_measured_shown_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path
                                                ) -> None:
    path = cells(tmp_path, counts(16, seed=4))
    profile = load_profile("smoke", {
        "cells": path, "matrix": "X", "label_column": "type", "case_type": "a", "max_cells": None,
        "genes_per_cell": 8, "validation_share": 0.4, "model_steps": 4, "model_width": 16})
    libraries = [load_library("GO_Biological_Process_2025", str(tmp_path))]
    found = compare_models(profile, libraries)
    table, parts = found.table, found.parts
    assert table["model"].tolist() == [DECODER, ENCODER, RANDOM] == list(SHORT)
    assert table["closure"].max() < 1e-4 and np.isfinite(table[["loss", "fvu", "l0"]]).all(None)
    rule = profile.enrichment_rule
    assert table.loc[2, [f"untrained_{rule}", f"reinitialised_{rule}"]].isna().all()
    assert table.loc[0, "parameters"] != table.loc[1, "parameters"] == table.loc[2, "parameters"]
    assert set(parts["part"]) == {*PARTS, SUM} and set(parts["model"]) == {*SHORT}
    assert (found.cells, found.tokens) == (6, 12)
    assert len(found.layers) == 3 * found.profile.model_layers
    assert len(shares_shown(table)) == 3 * len(
        [one for one in table if str(one).startswith("percentage_")])
    shown = parts_shown(parts, STATE, "a")
    assert shown.columns.tolist() == ["part", *SHORT] and len(shown) == 10
    assert (shown.loc[shown["part"] == "own rank", DECODER] == "n/a").all()
    assert len(by_type_shown(parts)) == len(parts[parts["part"] != SUM]) / 3
    assert {name for name, *_ in quoted(parts, "a")} == {*SHORT.values()}
    assert len(parts_of_readings(parts, "a").axes) == 2
    # What was made is read again.
    monkeypatch.setattr(loading, "train_small_model", None)
    again = compare_models(profile, libraries)
    pd.testing.assert_frame_equal(again.table, table)
    pd.testing.assert_frame_equal(again.parts, parts)


def test_the_random_encoders_transcoders_are_of_its_own_outputs(tmp_path: Path) -> None:
    """They were trained on outputs brought to the scale of the encoder's, and are brought back."""
    path = cells(tmp_path, counts(16, seed=4))
    profile = study_profile(load_profile("smoke", {
        "cells": path, "matrix": "X", "label_column": "type", "case_type": "a", "max_cells": None,
        "genes_per_cell": 8, "validation_share": 0.4, "model_steps": 5}), "geneformer_v2")
    parts: Any = Parts(profile, load_corpus(profile))
    model, found, control = reinitialised_transcoders(parts.model, parts.corpus, profile)
    trained, _ = get_transcoders(model, parts.corpus, profile, control)  # as it was kept
    scale = output_scale(parts.model, model, parts.corpus, profile)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        assert abs(scale[layer] - 1) > 0.05
        assert torch.allclose(found.layer_estimate(layer, x) * scale[layer],
                              trained.layer_estimate(layer, x), atol=1e-5)
