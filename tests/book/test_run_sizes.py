"""How large a run is told to be before it begins, against what it then is."""

from pathlib import Path

import pytest
from helpers import tiny_model, tiny_profile
from huggingface_hub import constants

from scfm_circuits import InputError
from scfm_circuits.book import run_sizes
from scfm_circuits.cells.corpus import load_corpus
from scfm_circuits.common.profile import load_profile
from scfm_circuits.models.loading import get_model
from scfm_circuits.models.small_models import build_small_model

PYTHIA_410M = 405_334_016
"""Parameters of EleutherAI/pythia-410m, as its authors count them (embeddings included)."""


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which nothing has been fetched or made, without a network."""
    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("SCFM_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_the_papers_size_is_known_before_anything_is_fetched(empty: Path) -> None:
    found = run_sizes.run_sizes(load_profile("paper"))
    assert (found.cells, found.cells_in_file, found.genes) == (316_000, 704_296, 32_732)
    assert (found.layers, found.width, found.vocabulary) == (24, 1024, 50_304)
    assert found.parameters == PYTHIA_410M
    assert found.held_out == 31_600 and not found.measured
    # Figure 4's prompt has 219 tokens: 64 genes of 3.3 and the question; the run needs 60 M.
    assert found.length == pytest.approx(225, rel=0.1)
    assert found.training_tokens > 60_000_000


def test_what_is_told_of_the_small_profiles_is_what_they_are(
        empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = tiny_profile(monkeypatch, empty / "results", max_cells=60)
    before = run_sizes.run_sizes(profile)
    assert (before.cells, before.cells_in_file, before.held_out) == (60, 700, 12)
    corpus = load_corpus(profile)
    found = run_sizes.run_sizes(profile)
    assert found.measured and found.tokens == int(corpus.mask.sum())
    assert found.training_tokens == pytest.approx(corpus.lengths[~corpus.held_out].sum(), rel=0.05)
    assert found.padded == corpus.tokens.shape[1]
    assert before.length == pytest.approx(found.length, rel=0.5)
    model = build_small_model(profile, len(corpus.tokenizer), found.padded)
    assert found.parameters == sum(one.numel() for one in model.parameters())
    assert found.vocabulary == len(corpus.tokenizer)


def test_a_model_in_a_folder_is_looked_at(empty: Path) -> None:
    tiny_model(layers=5, width=24).save_pretrained(empty / "model")
    profile = load_profile("smoke", {"model": str(empty / "model"), "model_layers": None,
                                     "tokenizer": str(empty / "model")})
    assert run_sizes.model_config(profile, None, 10).hidden_size == 24
    with pytest.raises(InputError, match=r"asks for 2 layers.*has 5; set `model_layers: 5`"):
        run_sizes.model_config(profile.model_copy(update={"model_layers": 2}), None, 10)
    with pytest.raises(InputError, match="has layers 0 to 4; lower it"):
        run_sizes.model_config(profile.model_copy(update={"human_layer": 5}), None, 10)


def test_what_cannot_be_known_is_told(empty: Path) -> None:
    for changes, told in ((dict(model="some/model", tokenizer="some/model"), "check `model`"),
                          (dict(cells=str(empty / "none.h5ad")), "do not exist"),
                          (dict(label_column="none"), "set `label_column`")):
        with pytest.raises(InputError, match=told):
            run_sizes.run_sizes(load_profile("smoke", changes))


def test_layers_are_checked_before_weights_are_read(empty: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(layers=3).save_pretrained(empty / "model")
    (empty / "model" / "model.safetensors").write_bytes(b"no weights")
    profile = tiny_profile(monkeypatch, empty / "results")
    corpus = load_corpus(profile.model_copy(update={"max_cells": 60}))
    wrong = profile.model_copy(update={"model": str(empty / "model"), "model_layers": 9})
    with pytest.raises(InputError, match="set `model_layers: 3`"):
        get_model(wrong, corpus)
