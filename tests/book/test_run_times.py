"""Times of chapters follow what they do."""

from pathlib import Path

import pytest
from helpers import tiny_model, tiny_profile
from test_speed_probe import sizes_of

from scfm_circuits.book.chapters import NOTEBOOKS, read_notebooks
from scfm_circuits.book.run_times import STARTED, chapter_seconds
from scfm_circuits.book.speed_probe import Speeds
from scfm_circuits.common.profile import Profile

SPEEDS = Speeds(1e-3, 2e-3, 4e-3, 8e-3)


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Profile:
    return tiny_profile(monkeypatch, tmp_path, batch_tokens=32, buffer_tokens=64,
                        training_tokens=32_000)


def own(profile: Profile, speeds: Speeds = SPEEDS) -> dict[str, float]:
    found = chapter_seconds(profile, sizes_of(tiny_model()), speeds)
    return {name: seconds - STARTED for name, seconds in found.items()}


def test_every_notebook_has_a_time(profile: Profile) -> None:
    assert list(own(profile)) == [one.name for one in read_notebooks(NOTEBOOKS)]
    assert all(seconds >= 0 for seconds in own(profile).values())


def test_training_is_steps_times_layers_and_what_passes_the_model(profile: Profile) -> None:
    sizes, n = sizes_of(tiny_model()), 3
    # 9 training cells of 9.5 tokens do not fit into the buffer: every token passes the model.
    assert sizes.training_tokens > profile.buffer_tokens
    assert own(profile)["02_training"] == pytest.approx(32_000 * n * (4e-3 + 1e-3))
    kept = profile.model_copy(update={"buffer_tokens": 4096})
    assert own(kept)["02_training"] == pytest.approx(
        32_000 * n * 4e-3 + sizes.training_tokens * n * 1e-3)


def test_one_pass_over_all_cells_counts_features(profile: Profile) -> None:
    tokens = sizes_of(tiny_model()).tokens
    assert own(profile)["04_sparsity"] == pytest.approx(tokens * 3 * (1e-3 + 8e-3))


def test_the_control_costs_as_much_as_the_transcoders(profile: Profile) -> None:
    without = own(profile.model_copy(update={"reinitialised_control": False}))
    saved = own(profile)["06_enrichment"] - without["06_enrichment"]
    assert saved == pytest.approx(own(profile)["02_training"] + own(profile)["04_sparsity"])


def test_a_slower_machine_takes_longer(profile: Profile) -> None:
    slower = own(profile, Speeds(*(3 * one for one in SPEEDS)))
    assert slower["02_training"] == pytest.approx(3 * own(profile)["02_training"])
    assert all(slower[name] >= seconds for name, seconds in own(profile).items())
