"""The probe measures every family of models, and leaves nothing behind."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model, tiny_profile
from tiny_architectures import FAMILIES, tiny

from scfm_circuits.book import speed_probe
from scfm_circuits.book.run_sizes import RunSizes
from scfm_circuits.common.profile import Profile

CPU = torch.device("cpu")


def sizes_of(model: Any, length: float = 9.5) -> RunSizes:
    return RunSizes(12, 12, 3, 16, length, 12, False, model.config,
                    sum(one.numel() for one in model.parameters()))


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Profile:
    monkeypatch.setattr(speed_probe, "SECONDS", 0.0)
    return tiny_profile(monkeypatch, tmp_path, batch_tokens=32, forward_cells=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured(profile: Profile, family: str) -> None:
    found = speed_probe.measure_speeds(profile, sizes_of(tiny(family, dtype=torch.float32)), CPU)
    assert all(math.isfinite(one) and one > 0 for one in found)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_every_kind_of_transcoder_is_measured(profile: Profile, activation: str) -> None:
    other = profile.model_copy(update={"activation": activation, "active_features": 4,
                                       "skip": True})
    assert all(one > 0 for one in speed_probe.measure_speeds(other, sizes_of(tiny_model()), CPU))


def test_no_random_number_of_the_run_is_used_up(profile: Profile) -> None:
    sizes = sizes_of(tiny_model())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    speed_probe.measure_speeds(profile, sizes, CPU)
    assert torch.equal(torch.rand(3), expected)


def test_the_best_of_several_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 10.0, 10.25, 20.0, 23.0])
    monkeypatch.setattr(speed_probe.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(speed_probe, "SECONDS", 12.0)
    runs: list[int] = []
    assert speed_probe._best(lambda: runs.append(1), CPU) == 0.25
    assert len(runs) == 4  # the first is not timed
