"""Controls that need a model: what they keep, what they lose, and where they are stored."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import before_each_step, model_for, tiny_corpus, tiny_profile, tiny_transcoders
from sklearn.decomposition import PCA

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common import kept
from scfm_circuits.common.profile import Profile
from scfm_circuits.features import baselines as baselines_module
from scfm_circuits.features import statistics as features_module
from scfm_circuits.features.baselines import (
    DIRECTIONS,
    direction_encoder,
    direction_statistics,
    mean_output_norms,
    output_scale,
    reinitialised_model,
    reinitialised_statistics,
    untrained_statistics,
)
from scfm_circuits.features.statistics import FeatureStatistics, count_features
from scfm_circuits.models.mlp_sites import batches, hooked, mlp_sites, mlps
from scfm_circuits.transcoders.training.run import TrainingRun, get_transcoders
from scfm_circuits.transcoders.training.settings import Control
from scfm_circuits.transcoders.transcoder import load_transcoders

SETTINGS = {"batch_tokens": 32, "buffer_tokens": 100_000, "training_tokens": 32 * 14,
            "warmup_steps": 5, "expansion": 2, "forward_cells": 3, "learning_rate": 1e-2,
            "live_cut_table4": -4.0}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return tiny_corpus(20)


@pytest.fixture(scope="module")
def model(corpus: Corpus) -> Any:
    return model_for(corpus, dtype=torch.float32)


@pytest.fixture(scope="module")
def statistics(model: Any, corpus: Corpus) -> FeatureStatistics:
    return count_features(model, tiny_transcoders(model), corpus, 8, progress=False)


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Profile:
    return tiny_profile(monkeypatch, tmp_path, **SETTINGS)


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was computed rather than read: training steps and counting passes."""
    calls: list[str] = []
    count = features_module.count_features

    def counting(*args: Any, **options: Any) -> FeatureStatistics:
        calls.append("count")
        return count(*args, **{**options, "progress": False})

    monkeypatch.setattr(features_module, "count_features", counting)
    before_each_step(monkeypatch, lambda run: calls.append("step"))
    return calls


def same(a: FeatureStatistics, b: FeatureStatistics) -> bool:
    return (np.array_equal(a.fired, b.fired) and np.array_equal(a.l0_histogram, b.l0_histogram)
            and all((x != y).nnz == 0 for x, y in zip(a.counts, b.counts, strict=True)))


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


# --- the re-initialised model --------------------------------------------------------------------


def test_every_tensor_is_drawn_anew_with_its_own_moments(corpus):
    model = model_for(corpus, width=64, dtype=torch.float32)
    before = parameters(model)
    drawn = parameters(reinitialised_model(model, 0))
    assert set(drawn) == set(before)
    for name, new in drawn.items():
        old, n = before[name].double().numpy().ravel(), before[name].numel()
        new = new.double().numpy().ravel()
        # Five standard errors of a normal sample's mean and standard deviation.
        assert abs(new.mean() - old.mean()) < 5 * old.std() / np.sqrt(n), name
        assert abs(new.std() / old.std() - 1) < 5 / np.sqrt(2 * n), name
        assert (new != old).mean() > 0.99, name
        # And the new numbers know nothing of the old.
        assert abs(np.corrcoef(old, new)[0, 1]) < 5 / np.sqrt(n), name


def test_the_model_itself_stays_as_it_is(model):
    before = parameters(model)
    drawn = reinitialised_model(model, 0)
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())
    assert not drawn.training
    shared = {one.data_ptr() for one in model.parameters()}
    assert not shared & {one.data_ptr() for one in drawn.parameters()}


def test_the_seed_decides(model):
    first, again, other = (parameters(reinitialised_model(model, seed)) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_a_constant_tensor_and_other_precisions(corpus):
    model = model_for(corpus, dtype=torch.float64)
    with torch.no_grad():
        mlps(model)[0].dense_h_to_4h.bias.fill_(0.25)
    drawn = reinitialised_model(model, 0)
    assert {one.dtype for one in drawn.parameters()} == {torch.float64}
    assert (mlps(drawn)[0].dense_h_to_4h.bias == 0.25).all()
    single: Any = torch.nn.Linear(1, 1)  # one number has no spread
    assert torch.equal(reinitialised_model(single, 0).weight, single.weight)
    half = reinitialised_model(model_for(corpus, dtype=torch.bfloat16), 0)
    assert all(one.dtype == torch.bfloat16 and one.isfinite().all() for one in half.parameters())


def test_tied_tensors_stay_tied(corpus):
    model = model_for(corpus, dtype=torch.float32)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    drawn = reinitialised_model(model, 0)
    assert drawn.get_output_embeddings().weight is drawn.get_input_embeddings().weight
    assert not torch.equal(drawn.get_input_embeddings().weight,
                           model.get_input_embeddings().weight)


# --- the scale of its MLP outputs ----------------------------------------------------------------


def test_mean_norms_equal_a_loop_over_cells(model, corpus):
    cells = np.array([1, 4, 7, 9])
    norms = []
    for cell in cells:
        ids = torch.from_numpy(corpus.tokens[cell][corpus.mask[cell]])[None]
        y = mlp_sites(model, ids, torch.ones_like(ids, dtype=torch.bool)).outputs
        norms.append(np.linalg.norm(y.numpy(), axis=-1))
    expected = np.concatenate(norms, axis=1).mean(axis=1)
    assert mean_output_norms(model, corpus, cells, 3).numpy() == pytest.approx(expected, rel=1e-5)


def test_the_controls_targets_have_the_norm_of_the_models(model, corpus, profile):
    other = reinitialised_model(model, 0)
    scale = output_scale(model, other, corpus, profile)
    assert (scale > 0).all() and (scale - 1).abs().max() > 0.05
    control = Control("reinitialised", {}, scale)
    ours = TrainingRun(model, corpus, profile).buffer.sites(0).outputs
    theirs = TrainingRun(other, corpus, profile, control=control).buffer.sites(0)
    plain = TrainingRun(other, corpus, profile).buffer.sites(0)
    norms = ours.norm(dim=-1).mean(dim=1)
    assert torch.allclose(theirs.outputs.norm(dim=-1).mean(dim=1), norms, rtol=1e-5)
    assert not torch.allclose(plain.outputs.norm(dim=-1).mean(dim=1), norms, rtol=1e-2)
    assert torch.equal(theirs.inputs, plain.inputs)


def test_an_mlp_that_writes_nothing_has_no_scale(model, corpus, profile):
    other = reinitialised_model(model, 0)
    with torch.no_grad():
        for parameter in mlps(other)[1].dense_4h_to_h.parameters():
            parameter.zero_()
    scale = output_scale(model, other, corpus, profile)
    assert scale.isfinite().all() and scale[1] == 1


# --- transcoders of the re-initialised model -----------------------------------------------------


def test_the_control_is_trained_and_counted_once(model, corpus, profile, worked,
                                                 monkeypatch):
    first = reinitialised_statistics(model, corpus, profile)
    assert first.fired.shape == (2, 32) and first.n_tokens == corpus.mask.sum()
    assert len(first.counts) == 2 and first.counts[0].shape == (32, len(first.pair_token))
    assert worked == ["step"] * 14 + ["count"]
    monkeypatch.setattr(baselines_module, "reinitialised_model", None)  # not even that again
    again = reinitialised_statistics(model, corpus, profile)
    reinitialised_statistics(model, corpus, profile.model_copy(update={"fdr": 0.2}))
    assert len(worked) == 15 and same(first, again)
    # The files are those of the transcoders that were trained on the other model.
    folder = profile.results / "reinitialised"
    names = {path.name for path in folder.iterdir()}  # a lock on one of them may stay
    assert {name for name in names if not name.startswith(".")} == {"transcoders", "features.npz"}
    stored = load_transcoders(folder / "transcoders")
    other = reinitialised_model(model, profile.seed)
    scale = output_scale(model, other, corpus, profile)
    run = TrainingRun(other, corpus, profile, control=Control("reinitialised", {}, scale))
    assert torch.equal(run.run(progress=False).W_enc, stored.W_enc)
    assert same(count_features(other, stored, corpus, 8, progress=False), first)
    assert not same(count_features(model, stored, corpus, 8, progress=False), first)


def test_lost_transcoders_are_trained_again_though_their_statistics_are_there(
        model, corpus, profile, worked):
    first = reinitialised_statistics(model, corpus, profile)
    lost = profile.results / "reinitialised" / "transcoders" / "layer_1.safetensors"
    was = lost.read_bytes()
    lost.unlink()
    worked.clear()
    assert same(reinitialised_statistics(model, corpus, profile), first)
    assert worked == ["step"] * 14 and lost.read_bytes() == was


def test_the_record_says_which_control_and_its_scale(model, corpus, profile):
    reinitialised_statistics(model, corpus, profile)
    folder = profile.results / "reinitialised" / "transcoders"
    record = json.loads((folder / "training.json").read_text())
    assert record["stamp"]["control"]["name"] == "reinitialised"
    assert "features/baselines" in record["stamp"]["control"]["sources"]
    scale = output_scale(model, reinitialised_model(model, profile.seed), corpus, profile)
    assert record["output_scale"] == pytest.approx(scale.tolist())
    assert "reinitialised" in (folder / "config.yaml").read_text()


@pytest.mark.parametrize("change", [
    {"l1_coefficient": 0.1}, {"seed": 5}, {"training_tokens": 32 * 10}], ids=str)
def test_a_change_of_training_makes_the_control_stale(model, corpus, profile, worked, change):
    reinitialised_statistics(model, corpus, profile)
    worked.clear()
    changed = profile.model_copy(update=change)
    reinitialised_statistics(model, corpus, changed)
    assert worked == ["step"] * (changed.training_tokens // 32) + ["count"]


def test_a_change_of_its_own_source_makes_the_control_stale_and_nothing_else(
        model, corpus, profile, worked, monkeypatch):
    get_transcoders(model, corpus, profile)
    reinitialised_statistics(model, corpus, profile)
    worked.clear()
    before = kept.room_hash
    monkeypatch.setattr(kept, "room_hash", lambda room: (
        "other" if room == "features/baselines" else before(room)))
    get_transcoders(model, corpus, profile)
    assert not worked
    reinitialised_statistics(model, corpus, profile)
    assert worked == ["step"] * 14 + ["count"]


def test_an_interrupted_control_ends_as_an_uninterrupted_one(model, corpus, profile, monkeypatch,
                                                             tmp_path, capsys):
    def interrupt(run: TrainingRun) -> None:
        if run.step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        before_each_step(patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            reinitialised_statistics(model, corpus, profile)
    folder = profile.results / "reinitialised"
    assert [path.name for path in folder.iterdir()] == ["training_checkpoint"]
    resumed = reinitialised_statistics(model, corpus, profile)
    assert "Resuming at step 6 of 14" in capsys.readouterr().out
    assert not (folder / "training_checkpoint").exists()
    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path / "elsewhere"))
    whole = reinitialised_statistics(model, corpus, profile)
    assert same(resumed, whole)
    here, there = (load_transcoders(one / "transcoders") for one in (
        folder, profile.results / "reinitialised"))
    assert torch.equal(here.W_enc, there.W_enc) and torch.equal(here.b_dec, there.b_dec)


def test_a_controls_checkpoint_is_never_taken_for_the_real_one(model, corpus, profile, tmp_path):
    controls = [None, Control("reinitialised", {"seed": 1}), Control("reinitialised", {"seed": 2}),
                Control("shuffled", {"seed": 1})]
    for i, writer in enumerate(controls):
        path = tmp_path / str(i)
        run = TrainingRun(model, corpus, profile, path, writer)
        run.run(until=3, progress=False)
        run.save_checkpoint()
        for j, reader in enumerate(controls):
            other = TrainingRun(model, corpus, profile, path, reader)
            if i == j:
                assert other.resume() and other.step == 3
                continue
            with pytest.raises(InputError, match="control"):
                other.resume()
            assert other.step == 0


def test_finished_controls_are_not_taken_for_the_real_transcoders(model, corpus, profile, worked):
    reinitialised_statistics(model, corpus, profile)
    assert not (profile.results / "transcoders").exists()
    assert not (profile.results / "features.npz").exists()
    shutil.copytree(profile.results / "reinitialised" / "transcoders",
                    profile.results / "transcoders")
    worked.clear()
    real, _ = get_transcoders(model, corpus, profile)
    assert worked == ["step"] * 14
    control = load_transcoders(profile.results / "reinitialised" / "transcoders")
    assert not torch.equal(real.W_enc, control.W_enc)


# --- the untrained encoder -----------------------------------------------------------------------


def test_an_untrained_encoder_fires_as_often_as_the_trained_features(model, corpus, profile,
                                                                     statistics):
    untrained = untrained_statistics(model, statistics, corpus,
                                     profile.model_copy(update={"forward_cells": 32}),
                                     n_features=200)
    assert untrained.fired.shape == (2, 200)
    for layer in range(2):
        live = statistics.frequency[layer][statistics.live(-4.0)[layer]]
        assert np.median(untrained.frequency[layer]) == pytest.approx(np.median(live), abs=0.12)


def test_directions_are_fitted_to_training_cells_of_the_whole_file(model, corpus, profile,
                                                                  monkeypatch):
    """A file's first cells are often of one sample."""
    read = []
    monkeypatch.setattr(baselines_module, "batches", lambda model, cells, *more: read.append(
        cells.tolist()) or batches(model, cells, *more))
    few = profile.model_copy(update={"forward_cells": 3})
    baselines_module._some_inputs(model, corpus, few)
    training = np.flatnonzero(~corpus.held_out)
    assert read == [[training[0], training[(len(training) - 1) // 2], training[-1]]]


def test_untrained_features_are_counted_once(model, corpus, profile, statistics, worked):
    first = untrained_statistics(model, statistics, corpus, profile, n_features=10)
    again = untrained_statistics(model, statistics, corpus, profile, n_features=10)
    assert worked == ["count"] and same(first, again)
    assert (profile.results / "untrained" / "features.npz").is_file()
    assert not (profile.results / "features.npz").exists()
    untrained_statistics(model, statistics, corpus,
                         profile.model_copy(update={"live_cut_table4": -1.0}), n_features=10)
    assert worked == ["count"] * 2


def test_untrained_features_follow_the_trained_ones(model, corpus, profile, statistics, worked):
    untrained_statistics(model, statistics, corpus, profile, n_features=10)
    more = untrained_statistics(model, statistics, corpus, profile, n_features=12)
    assert worked == ["count"] * 2 and more.fired.shape == (2, 12)
    other = count_features(model, tiny_transcoders(model, seed=9), corpus, 8, progress=False)
    untrained_statistics(model, other, corpus, profile, n_features=12)
    assert worked == ["count"] * 3


# --- the model's own directions ------------------------------------------------------------------


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_directions_fire_as_often_as_the_trained_features(kind, model, corpus, profile, statistics,
                                                          worked):
    wide = profile.model_copy(update={"forward_cells": 32})
    found = direction_statistics(kind, model, statistics, corpus, wide)
    again = direction_statistics(kind, model, statistics, corpus, wide)
    assert worked == ["count"] and same(found, again)
    for layer in range(2):
        live = statistics.frequency[layer][statistics.live(-4.0)[layer]]
        # Each fires as often as one of them, but for the cells that set no threshold.
        nearest = np.abs(found.frequency[layer][:, None] - live).min(axis=1)
        assert nearest.max() < 0.06 and np.median(nearest) < 0.02
        assert len({*found.frequency[layer].round(3)}) > 8


def test_a_neurons_feature_fires_where_the_neuron_is_most_active(model, corpus, profile,
                                                                 statistics):
    encoder = direction_encoder("MLP neurons", model, statistics, corpus, profile)
    some = corpus.training_cells(profile.forward_cells)
    _, tokens, mask = next(batches(corpus, some, len(some), torch.device("cpu")))
    neurons = []
    with hooked([mlps(model)[1].act.register_forward_hook(
            lambda module, args, output: neurons.append(output[mask]))]):
        inputs = mlp_sites(model, tokens, mask).inputs[1]
    fires = encoder.layer_activations(1, inputs) > 0
    checked = 0
    for fired, activation in zip(fires.T, neurons[0].T, strict=True):
        # GELU falls before it rises: below its lowest place the order is another.
        if fired.any() and not fired.all() and activation[fired].min() > 0:
            assert activation[fired].min() > activation[~fired].max()
            checked += 1
    assert checked > 8


def test_principal_components_are_those_of_scikit_learn(model, corpus, profile, statistics):
    encoder = direction_encoder("principal components", model, statistics, corpus, profile)
    some = corpus.training_cells(profile.forward_cells)
    _, tokens, mask = next(batches(corpus, some, len(some), torch.device("cpu")))
    inputs = mlp_sites(model, tokens, mask).inputs
    d_model = inputs.shape[-1]
    assert encoder.n_features == 2 * d_model
    for layer in range(2):
        expected = PCA().fit(inputs[layer].double().numpy())
        kept = expected.explained_variance_ > 1e-6 * expected.explained_variance_[0]
        ours = encoder.W_enc[layer].detach().double().numpy()
        overlap = np.abs((ours[:d_model] * expected.components_).sum(axis=1))
        assert overlap[kept] == pytest.approx(1, abs=1e-3)
        assert (ours[d_model:] == -ours[:d_model]).all()
