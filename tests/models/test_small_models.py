"""How the small model is trained: what is drawn, what counts, and that a seed decides all of it."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_cells, tiny_corpus, tiny_profile

from scfm_circuits.cells.corpus import Corpus, load_corpus
from scfm_circuits.cells.tokens import Prompts
from scfm_circuits.common.profile import Profile, load_profile
from scfm_circuits.models import small_models
from scfm_circuits.models.loading import get_model
from scfm_circuits.models.small_models import train_small_model
from scfm_circuits.transcoders.training.settings import training_stamp

QUICK = {"model_steps": 6, "model_width": 16, "model_batch_cells": 4, "validation_share": 0.25,
         "model_type_balance": 0.0, "model_answer_weight": 1.0}


def profile_of(monkeypatch: pytest.MonkeyPatch, folder: Path, **fields: Any) -> Profile:
    return tiny_profile(monkeypatch, folder, **{**QUICK, **fields})


def cells_seen(corpus: Corpus, profile: Profile) -> list[int]:
    """The cells of all batches, told by their tokens."""
    known = {corpus.tokens[cell].tobytes(): cell for cell in range(len(corpus))}
    return [known[row.tobytes()] for batch in small_models._batches(corpus, profile)
            for row in batch.tokens]


@pytest.mark.parametrize("ahead", [1, 3, 128])
def test_cells_come_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ahead: int) -> None:
    corpus = tiny_corpus(14, validation_share=0.3)
    train = np.flatnonzero(~corpus.held_out)
    monkeypatch.setattr(small_models, "_AHEAD", ahead)
    seen = cells_seen(corpus, profile_of(monkeypatch, tmp_path, model_steps=5))
    assert len(seen) == 20 and len(train) == 10
    assert sorted(seen[:10]) == sorted(seen[10:]) == train.tolist() and seen[:10] != seen[10:]


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_types_are_drawn_as_evenly_as_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                            balance: float) -> None:
    corpus = tiny_corpus(20, validation_share=0.2)
    corpus.labels[:] = np.where(np.arange(20) < 16, "many", "few")
    train = ~corpus.held_out
    many, few = ((train & (corpus.labels == one)).sum() for one in ("many", "few"))
    assert many > 2 * few > 0
    seen = cells_seen(corpus, profile_of(monkeypatch, tmp_path, model_steps=1000,
                                         model_type_balance=balance))
    assert not corpus.held_out[seen].any()
    share = np.mean(corpus.labels[seen] == "few")
    expected = few ** (1 - balance) / (few ** (1 - balance) + many ** (1 - balance))
    assert share == pytest.approx(expected, abs=0.03)


def test_an_answer_s_tokens_weigh_as_much_as_asked() -> None:
    corpus = tiny_corpus()
    batch = Prompts(*(getattr(corpus, name)[:3] for name in Prompts._fields))
    weights = small_models._weights(batch, 20.0)
    for row in range(3):
        start, end = batch.answer_start[row], batch.answer_end[row]
        assert (weights[row, start : end + 1] == 20).all()
        assert (np.delete(weights[row], np.arange(start, end + 1)) == 1).all()


def test_a_larger_weight_teaches_the_answer_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path
                                                  ) -> None:
    corpus = tiny_corpus(14)

    def answers_loss(weight: float) -> float:
        model, _ = train_small_model(corpus, profile_of(
            monkeypatch, tmp_path, model_answer_weight=weight, model_steps=60), progress=False)
        tokens = torch.from_numpy(np.array(corpus.tokens))
        with torch.no_grad():
            log = model(input_ids=tokens).logits.log_softmax(-1)
        own = [log[cell, at - 1, tokens[cell, at]].item() for cell in range(len(corpus))
               for at in range(corpus.answer_start[cell], corpus.answer_end[cell] + 1)]
        return -float(np.mean(own))

    assert answers_loss(50.0) < answers_loss(0.001) - 0.5


def test_two_trainings_on_thinned_cells_give_the_same_weights(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cells = tiny_cells(24, seed=5)
    anndata.AnnData(cells.expression, obs=pd.DataFrame({"cell_type": cells.labels},
                                                       index=cells.cell_ids),
                    var=pd.DataFrame(index=list(cells.symbols))).write_h5ad(tmp_path / "c.h5ad")
    profile = profile_of(monkeypatch, tmp_path, cells=str(tmp_path / "c.h5ad"), case_type="B cell",
                         model_thinning=0.4, model_type_balance=0.5, model_answer_weight=20.0)
    corpus = load_corpus(profile)
    first, curve = train_small_model(corpus, profile, progress=False)
    again, same = train_small_model(corpus, profile, progress=False)
    assert curve == same
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(),
                                                 strict=True))
    whole = profile.model_copy(update={"model_thinning": 1.0})
    assert train_small_model(corpus, whole, progress=False)[1] != curve


def test_every_field_of_the_small_model_makes_what_is_kept_stale(corpus: Corpus) -> None:
    own = {name for name in Profile.model_fields if name.startswith("model_")}
    assert {*small_models.TRAINING_FIELDS} == {"encoding"} | own - {
        "model_revision", "model_subfolder", "model_precision"}
    profile = load_profile("smoke")
    for field in small_models.TRAINING_FIELDS:
        changed = profile.model_copy(update={field: 0.77})
        assert training_stamp(changed, corpus) != training_stamp(profile, corpus), field


@pytest.mark.parametrize(("field", "value"), [("model_answer_weight", 7.0),
                                              ("model_type_balance", 1.0)])
def test_a_changed_field_trains_another_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                              field: str, value: float) -> None:
    corpus, profile = tiny_corpus(), profile_of(monkeypatch, tmp_path)
    _, curve = get_model(profile, corpus)
    assert get_model(profile.model_copy(update={field: value}), corpus)[1] != curve
