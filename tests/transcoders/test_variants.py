"""Dictionaries of other kinds: the same tokens, the same L0, kept by stamp."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import before_each_step, model_for, tiny_corpus, tiny_profile

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.profile import Profile
from scfm_circuits.transcoders import variants as variants_module
from scfm_circuits.transcoders.training import checkpoints
from scfm_circuits.transcoders.training.activation_buffer import ActivationBuffer
from scfm_circuits.transcoders.training.run import TrainingRun
from scfm_circuits.transcoders.training.settings import Control
from scfm_circuits.transcoders.variants import (
    LAST,
    MatchedRun,
    Trained,
    Trainer,
    correction,
    first_guess,
    get_variants,
    l0_path,
    settings,
    variant_profile,
)

SETTINGS = {"batch_tokens": 128, "buffer_tokens": 100_000, "training_tokens": 128 * 60,
            "variant_tokens": 32 * 60, "warmup_steps": 6, "expansion": 4, "forward_cells": 3,
            "learning_rate": 1e-2, "l1_coefficient": 0.01}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return tiny_corpus(20)


@pytest.fixture(scope="module")
def model(corpus: Corpus) -> Any:
    return model_for(corpus, dtype=torch.float32)


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Profile:
    return tiny_profile(monkeypatch, tmp_path, **SETTINGS)


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was computed rather than read: training steps and fills of a buffer."""
    calls: list[str] = []
    room = ActivationBuffer._room

    def stepping(run: TrainingRun) -> None:
        assert run.control is not None
        calls.append(run.control.name)

    def filling(self: ActivationBuffer, n_tokens: int) -> Any:
        calls.append("fill")
        return room(self, n_tokens)

    before_each_step(monkeypatch, stepping)
    monkeypatch.setattr(ActivationBuffer, "_room", filling)
    return calls


def all_of(model: Any, corpus: Corpus, profile: Profile) -> list[Trained]:
    return get_variants(model, corpus, profile)


# --- settings ------------------------------------------------------------------------------------


def test_every_kind_differs_from_the_reference_in_what_its_name_says(profile: Profile) -> None:
    kinds = {one.name: variant_profile(profile, one.changes) for one in settings(profile)}
    assert list(kinds) == ["relu_normalized", "relu_equation4", "jumprelu", "topk", "batchtopk",
                           "relu_skip", "topk_skip", "sae"]
    reference = kinds["relu_normalized"].model_dump()
    differs = {name: {key for key, value in one.model_dump().items() if value != reference[key]}
               for name, one in kinds.items()}
    assert differs == {
        "relu_normalized": set(), "relu_equation4": {"loss"}, "jumprelu": {"activation"},
        "topk": {"activation"}, "batchtopk": {"activation"}, "relu_skip": {"skip"},
        "topk_skip": {"activation", "skip"}, "sae": {"site"}}


def test_the_reference_is_the_papers_kind_under_the_profiles_loss(profile: Profile) -> None:
    other = profile.model_copy(update={"loss": "equation4", "activation": "topk", "skip": True,
                                       "site": "sae"})
    first, second, *_ = settings(other)
    assert (first.name, second.name) == ("relu_equation4", "relu_normalized")
    made = variant_profile(other, first.changes)
    assert (made.activation, made.loss, made.skip, made.site) == (
        "relu", "equation4", False, "transcoder")


def test_schedules_keep_their_share_of_the_run(profile: Profile) -> None:
    long = profile.model_copy(update={"variant_tokens": None, "training_tokens": 12_000,
                                      "batch_tokens": 40, "warmup_steps": 90})
    short = variant_profile(long, {})
    assert (short.training_tokens, short.batch_tokens) == (1000, 10)  # 100 steps, not 300
    assert (short.warmup_steps, short.decay_steps) == (30, 0)


# --- the same L0 ---------------------------------------------------------------------------------


def test_the_correction_answers_in_the_right_direction() -> None:
    assert correction([], [30, 20]) == 1
    assert correction([30, 20], [30, 20]) == 1
    assert correction([30, 25], [30, 20]) > 1 > correction([30, 15], [30, 20])
    assert correction([0.0] * 500, [50.0] * 500) >= 0  # all dead: no error, and no infinity
    # What has been goes on counting; only the last rows count twice.
    once = correction([60.0] + [30.0] * LAST, [30.0] * (LAST + 1))
    assert once == pytest.approx(2 ** variants_module.INTEGRAL)


@pytest.mark.parametrize("start", [0.05, 1.0, 20.0])
def test_a_toy_is_brought_to_the_wanted_l0_from_any_start(start: float) -> None:
    # L0 falls with the penalty's square root and follows it slowly, as weights do.
    wanted, found, l0 = [40.0] * 250, [], 200.0
    for _ in wanted:
        penalty = start * correction(found, wanted)
        l0 += 0.1 * (100 / (1 + penalty) ** 0.5 - l0)
        found.append(l0)
    assert found[-1] == pytest.approx(40, rel=0.1)


def test_trained_kinds_reach_the_references_l0(model: Any, corpus: Corpus, profile: Profile
                                               ) -> None:
    longer = profile.model_copy(update={"variant_tokens": 32 * 200, "l1_coefficient": 0.003})
    first, *others = all_of(model, corpus, longer)
    wanted = np.mean(l0_path(first.history)[-LAST:])
    assert 0 < wanted < first.load().n_features
    for one in others:
        found = np.mean(l0_path(one.history)[-LAST:])
        assert found == pytest.approx(wanted, rel=0.2, abs=1), one.setting.name
        if one.setting.matched == "k":
            assert (one.profile.active_features, one.l1_coefficient) == (round(wanted), 0)


def test_without_steering_another_loss_ends_elsewhere(model: Any, corpus: Corpus, profile: Profile,
                                                      tmp_path: Path) -> None:
    run = MatchedRun(model, corpus, variant_profile(profile, {}), tmp_path, Control("one", {}),
                     stamp={}, buffer=ActivationBuffer(model, corpus, profile))
    assert [run.l1_coefficient(step) for step in (0, 9)] == [profile.l1_coefficient] * 2
    run.wanted, run.history = [10.0, 10.0], [{"l0": [20.0, 20.0]}]
    assert run.l1_coefficient(1) > profile.l1_coefficient


def test_the_first_guess_is_in_the_units_of_the_loss(model: Any, corpus: Corpus, profile: Profile
                                                     ) -> None:
    reference, other, jump, *_ = settings(profile)
    history = [{"l0": [4.0, 6.0], "sparsity": [0.1, 0.3]}]
    trained = Trained(reference, profile, None, history, 0.01, 1.0)  # type: ignore[arg-type]
    buffer = ActivationBuffer(model, corpus, profile)
    outputs = buffer.sites(0).outputs
    expected = 0.01 * outputs.shape[-1] * outputs.norm(dim=-1).mean().item()
    assert first_guess(other, trained, buffer) == pytest.approx(expected, rel=1e-5)
    assert first_guess(jump, trained, buffer) == pytest.approx(0.4 / 10)
    assert first_guess(reference, trained, buffer) == 0.01


# --- training ------------------------------------------------------------------------------------


def test_all_are_trained_on_one_harvest_and_read_the_next_time(
        model: Any, corpus: Corpus, profile: Profile, worked: list[str]) -> None:
    first = all_of(model, corpus, profile)
    assert worked.count("fill") == 1
    names = [f"variants/{one.setting.name}" for one in first]
    assert [worked.count(name) for name in names] == [60] * 8
    worked.clear()
    again = all_of(model, corpus, profile)
    assert worked == []
    for one, other in zip(first, again, strict=True):
        assert one.history == other.history and one.seconds == other.seconds > 0
        assert torch.equal(one.load().W_enc, other.load().W_enc)
        assert one.load().variant == other.load().variant
    assert not list(profile.results.rglob("training_checkpoint"))


def test_each_has_the_kind_it_is_called_by(model: Any, corpus: Corpus, profile: Profile) -> None:
    kinds = {one.setting.name: one.load().variant for one in all_of(model, corpus, profile)}
    assert {name: (kind.activation, kind.skip, kind.site) for name, kind in kinds.items()} == {
        "relu_normalized": ("relu", False, "transcoder"),
        "relu_equation4": ("relu", False, "transcoder"),
        "jumprelu": ("jumprelu", False, "transcoder"), "topk": ("topk", False, "transcoder"),
        "batchtopk": ("batchtopk", False, "transcoder"), "relu_skip": ("relu", True, "transcoder"),
        "topk_skip": ("topk", True, "transcoder"), "sae": ("relu", False, "sae")}


def test_what_differs_is_trained_anew_and_nothing_else(
        model: Any, corpus: Corpus, profile: Profile, worked: list[str]) -> None:
    first = all_of(model, corpus, profile)
    sae = profile.results / "variants" / "sae" / "transcoders" / "training.json"
    record = json.loads(sae.read_text())
    sae.write_text(json.dumps({**record, "stamp": {**record["stamp"], "corpus": "another"}}))
    worked.clear()
    all_of(model, corpus, profile)
    assert set(worked) == {"fill", "variants/sae"}
    worked.clear()
    # Another coefficient: another reference, another L0 to match.
    changed = all_of(model, corpus, profile.model_copy(update={"l1_coefficient": 0.05}))
    assert {f"variants/{one.setting.name}" for one in first} <= set(worked)
    assert l0_path(changed[0].history) != l0_path(first[0].history)


def test_what_is_not_whole_is_trained_anew_and_nothing_else(
        model: Any, corpus: Corpus, profile: Profile, worked: list[str]) -> None:
    first = all_of(model, corpus, profile)
    (first[3].folder / "layer_0.safetensors").unlink()
    (first[4].folder / "config.yaml").unlink()  # what it says is known
    worked.clear()
    again = all_of(model, corpus, profile)
    assert set(worked) == {"fill", f"variants/{first[3].setting.name}"}
    assert torch.equal(first[3].load().W_enc, again[3].load().W_enc)
    assert (first[4].folder / "config.yaml").is_file()


def test_an_interrupted_steered_run_goes_on_to_the_same_end(
        model: Any, corpus: Corpus, profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {one.setting.name: one for one in all_of(model, corpus, profile)}
    weights = whole["jumprelu"].load().state_dict()
    folder = profile.results / "variants" / "jumprelu"
    (folder / "transcoders" / "training.json").unlink()

    def interrupt(run: TrainingRun) -> None:
        if run.step == 23:
            raise KeyboardInterrupt

    trainer = Trainer(model, corpus, profile)
    setting = whole["jumprelu"].setting
    with monkeypatch.context() as patch:
        before_each_step(patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            trainer.trained(setting, whole["relu_normalized"])
    assert checkpoints._steps(folder / "training_checkpoint")[0][0] == 23
    ended = trainer.trained(setting, whole["relu_normalized"])
    assert ended.history == whole["jumprelu"].history
    assert ended.l1_coefficient == whole["jumprelu"].l1_coefficient
    for name, tensor in ended.load().state_dict().items():
        assert torch.equal(tensor, weights[name]), name
