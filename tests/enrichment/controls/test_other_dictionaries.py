"""What dictionaries are compared by: autoencoders read outputs, and every kind has its row."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import model_for, tiny_corpus, tiny_profile, tiny_transcoders

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.profile import Profile
from scfm_circuits.enrichment.controls import layer_counts, other_dictionaries
from scfm_circuits.enrichment.controls.layer_counts import layer_controls
from scfm_circuits.enrichment.controls.other_dictionaries import (
    by_layer,
    cells_counted,
    compare_dictionaries,
    feature_measures,
    summary,
)
from scfm_circuits.enrichment.controls.tables import share_table
from scfm_circuits.enrichment.gene_sets import GeneSets, gene_sets_from_dict
from scfm_circuits.features.statistics import FeatureStatistics, count_features
from scfm_circuits.models.mlp_sites import mlp_sites, mlps, replaced_mlps
from scfm_circuits.report.plots.variants import variants as picture
from scfm_circuits.transcoders.held_out import held_out_measures, replacement_of
from scfm_circuits.transcoders.training.settings import Control
from scfm_circuits.transcoders.transcoder import Transcoders, Variant
from scfm_circuits.transcoders.validation import (
    compare_configurations,
    fraction_of_variance_unexplained,
)
from scfm_circuits.transcoders.variants import Trained, settings, variant_profile

CELLS = np.array([0, 3, 5, 8])


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return tiny_corpus(20)


@pytest.fixture(scope="module")
def model(corpus: Corpus) -> Any:
    return model_for(corpus)


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Profile:
    return tiny_profile(monkeypatch, tmp_path, live_cut_table4=-3.0, list_size=4, null_draws=99)


def autoencoder(model: Any, identity: bool = False) -> Transcoders:
    """An autoencoder; with `identity` one that gives back what it reads: y = relu(y) - relu(-y)."""
    d_model = model.config.hidden_size
    made = Transcoders(model.config.num_hidden_layers, d_model, 2 * d_model,
                       Variant(site="sae")).to(torch.float64).requires_grad_(False)
    signs = torch.cat([torch.eye(d_model), -torch.eye(d_model)]).double()
    made.W_enc[:], made.W_dec[:] = signs, signs
    if not identity:
        made.W_dec.mul_(0.5)
    return made


def measured(model: Any, corpus: Corpus, **variants: Transcoders) -> pd.DataFrame:
    ready = {name: lambda one=one: one for name, one in variants.items()}
    return held_out_measures(model, ready, corpus, CELLS, 3).set_index(["variant", "layer"])


def test_one_kind_is_held_at_a_time(model: Any, corpus: Corpus) -> None:
    held: list[weakref.ref] = []

    def load() -> Transcoders:
        assert all(other() is None for other in held)
        one = tiny_transcoders(model)
        held.append(weakref.ref(one))
        return one

    held_out_measures(model, {"a": load, "b": load, "c": load}, corpus, CELLS, 3)
    assert len(held) == 3


def test_an_autoencoder_reads_the_output_it_replaces(model: Any, corpus: Corpus) -> None:
    tokens = torch.from_numpy(corpus.tokens[:2, : int(corpus.lengths[:2].min())])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    halved = replacement_of(model, autoencoder(model))
    y = mlp_sites(model, tokens, mask).outputs
    seen: dict[int, torch.Tensor] = {}
    with replaced_mlps(model, halved, [0]):
        # Called after the replacement's own.
        after = mlps(model)[0].register_forward_hook(
            lambda module, args, output: seen.__setitem__(0, output[mask]))
        model(input_ids=tokens, attention_mask=mask)
    after.remove()
    torch.testing.assert_close(seen[0], 0.5 * y[0])


def test_a_perfect_autoencoder_costs_nothing_and_uses_half_its_features(
        model: Any, corpus: Corpus) -> None:
    found = measured(model, corpus, sae=autoencoder(model, identity=True))
    original = found.loc[("original", -1), "loss"]
    assert found.loc["sae", "loss"].to_numpy() == pytest.approx(original)
    own = found.loc["sae"].loc[0:]
    assert own["fvu"].to_numpy() == pytest.approx(0, abs=1e-12)
    assert own["l0"].to_numpy() == pytest.approx(model.config.hidden_size)
    assert (found.loc["no MLP", "loss"] != original).all()


def test_transcoders_measures_are_those_of_the_validation_chapter(model: Any, corpus: Corpus
                                                                  ) -> None:
    transcoders = tiny_transcoders(model)
    found = measured(model, corpus, own=transcoders)
    [fvu] = fraction_of_variance_unexplained(model, transcoders, corpus, CELLS, 3)
    assert found.loc["own", "fvu"].loc[0:].to_numpy() == pytest.approx(fvu, rel=1e-6)
    scores = compare_configurations(model, transcoders, corpus, CELLS, 3).scores.set_index(
        ["configuration", "layer"])["loss"]
    names = {"own": "transcoder", "no MLP": "no_mlp", "original": "original"}
    for (name, layer), loss in found["loss"].items():
        assert loss == pytest.approx(scores[names[name], layer], rel=1e-5), (name, layer)


def test_l0_and_fvu_are_missing_where_they_mean_nothing(model: Any, corpus: Corpus) -> None:
    found = measured(model, corpus, own=tiny_transcoders(model))
    with_l0 = found.index[found["l0"].notna()].tolist()
    assert with_l0 == [("own", 0), ("own", 1)] and found["fvu"].notna().sum() == 2
    assert found["loss"].notna().all() and len(found) == 3 + 3 + 1


# --- features ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def statistics(model: Any, corpus: Corpus) -> FeatureStatistics:
    return count_features(model, tiny_transcoders(model), corpus, 8, progress=False)


@pytest.fixture
def library(corpus: Corpus) -> GeneSets:
    rng = np.random.default_rng(1)
    return gene_sets_from_dict("made up", {
        f"term {i}": rng.choice(corpus.symbols, 4, replace=False).tolist() for i in range(12)})


def test_called_features_are_those_of_table_4(
        statistics: FeatureStatistics, corpus: Corpus, profile: Profile, library: GeneSets) -> None:
    ready = layer_counts.testers([library], corpus, profile)
    found = feature_measures(statistics, corpus, profile, ready)
    layers = [layer_controls(statistics, {}, layer, corpus, profile, ready) for layer in range(2)]
    shares = share_table(layers, [], profile)
    for tester in ready:
        own = shares[(shares["rule"] == tester.rule) & (shares["lists"] == "features")]
        assert found[f"called_{tester.rule}"].tolist() == own["called"].tolist()
        assert (found[f"null_{tester.rule}"] <= found["live_table4"]).all()
    assert found["live_table4"].tolist() == statistics.live(-3.0).sum(axis=1).tolist()
    assert found["live"].tolist() == statistics.live(profile.live_cut).sum(axis=1).tolist()
    assert found["dead"].to_numpy() == pytest.approx((statistics.fired == 0).mean(axis=1))


def test_features_are_counted_in_as_many_cells_as_the_profile_says(
        model: Any, corpus: Corpus, profile: Profile) -> None:
    assert cells_counted(corpus, profile) is corpus
    assert cells_counted(corpus, profile.model_copy(update={"variant_cells": 20})) is corpus
    some = cells_counted(corpus, profile.model_copy(update={"variant_cells": 8}))
    assert len(some) == 8 and len(set(some.cell_ids)) == 8
    rows = np.flatnonzero(np.isin(corpus.cell_ids, some.cell_ids))
    assert some.cell_ids.tolist() == corpus.cell_ids[rows].tolist()
    found = count_features(model, tiny_transcoders(model), some, 3, progress=False)
    assert found.n_tokens == corpus.lengths[rows].sum()
    table = feature_measures(found, some, profile, layer_counts.testers(
        [gene_sets_from_dict("own", {"a term": corpus.symbols[:6].tolist()})], some, profile))
    assert len(table) == len(found.fired) and (table["live"] > 0).all()


def test_a_layer_without_live_features_is_a_row_of_zeros(
        statistics: FeatureStatistics, corpus: Corpus, profile: Profile, library: GeneSets) -> None:
    none = profile.model_copy(update={"live_cut_table4": 0.1})
    ready = layer_counts.testers([library], corpus, none)
    found = feature_measures(statistics, corpus, none, ready)
    assert (found.filter(regex="called|null|live_table4") == 0).all(axis=None)


# --- tables --------------------------------------------------------------------------------------


def test_the_table_has_every_kind(model: Any, corpus: Corpus, statistics: FeatureStatistics,
                                  profile: Profile, library: GeneSets,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    trained = [Trained(one, variant_profile(profile, one.changes, active_features=7),
                       Control(one.name, {}), [], 0.5, 1 + seed)
               for seed, one in enumerate(settings(profile))]
    scores = held_out_measures(
        model, {one.setting.name: lambda seed=seed: tiny_transcoders(model, seed=seed)
                for seed, one in enumerate(trained)}, corpus, CELLS, 3)
    ready = layer_counts.testers([library], corpus, profile)
    features = {one.setting.name: feature_measures(statistics, corpus, profile, ready)
                for one in trained}
    layers = by_layer(trained, scores, features)
    table = summary(trained, layers, scores)
    assert table["variant"].tolist() == [one.name for one in settings(profile)]
    assert len(layers) == 2 * len(table) and not layers.isna().any(axis=None)
    row, own = table.iloc[3], layers[layers["variant"] == "topk"]
    assert row["k"] == 7 and np.isnan(row["l1_coefficient"]) and row["seconds_ratio"] == 4
    assert table.iloc[0]["l1_coefficient"] == 0.5 and np.isnan(table.iloc[0]["k"])
    assert row["fvu"] == pytest.approx(own["fvu"].mean())
    assert row["l0_ratio"] == pytest.approx(own["l0"].mean() / table["l0"][0])
    by_name = scores.set_index(["variant", "layer"])["loss"]
    assert row["loss_increase"] == pytest.approx(
        (by_name["topk", 0] + by_name["topk", 1]) / 2 - by_name["original", -1])
    rule = profile.enrichment_rule
    assert row[f"percentage_{rule}"] == pytest.approx(
        100 * own[f"called_{rule}"].sum() / own["live_table4"].sum())
    figure = picture(table, layers, rule)
    assert len(figure.axes) == 4
    assert [text.get_text() for text in figure.axes[1].get_yticklabels()] == table["label"].tolist()
    # All of it in one call, as the chapter has it.
    kinds = [one.setting.name for one in trained]
    monkeypatch.setattr(Trained, "load", lambda self, device: tiny_transcoders(
        model, seed=kinds.index(self.setting.name)))
    monkeypatch.setattr(other_dictionaries, "get_statistics", lambda *given: statistics)
    monkeypatch.setattr(other_dictionaries, "HELD_OUT", 2)
    found = compare_dictionaries(trained, model, corpus, [library], profile)
    assert (found.cells, found.counted) == (2, len(corpus))
    assert found.rules == tuple(tester.rule for tester in ready)
    first, *_, last = np.flatnonzero(corpus.held_out)
    cells = np.array([first, last])  # not the first two: cells of one sample stand together
    again = held_out_measures(
        model, {"topk": lambda: tiny_transcoders(model, seed=kinds.index("topk"))}, corpus, cells,
        profile.forward_cells)
    own = found.scores[found.scores["variant"] == "topk"].reset_index(drop=True)
    pd.testing.assert_frame_equal(own, again[again["variant"] == "topk"].reset_index(drop=True))
    assert found.table["live"].tolist() == table["live"].tolist()
    assert found.layers["variant"].tolist() == layers["variant"].tolist()
