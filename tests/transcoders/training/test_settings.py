"""What a run states before it begins: memory and stamp."""

import numpy as np
import pytest

from scfm_circuits.common.profile import Profile
from scfm_circuits.models.mlp_sites import batches, mlp_sites
from scfm_circuits.transcoders.training import checkpoints
from scfm_circuits.transcoders.training.run import TrainingRun
from scfm_circuits.transcoders.training.settings import (
    FIELDS,
    Control,
    loss_units,
    settings_table,
    training_memory,
    training_stamp,
)


def test_memory_is_that_of_what_is_held(model, corpus, profile):
    train = int(corpus.lengths[~corpus.held_out].sum())
    needed = training_memory(profile, train, 2, 16)
    assert needed["buffer"] == 2 * 4 * 2 * 16 * 64
    run = TrainingRun(model, corpus, profile)
    run.run(until=1, progress=False)
    held = sum(3 * 4 * p.numel() for p in run.transcoders.parameters())
    assert abs(needed["parameters and Adam"] / held - 1) < 0.05
    assert needed["activations of one batch"] >= 4 * 2 * 32 * 32
    # One layer at a time takes that much less.
    alone = training_memory(profile, train, 2, 16, at_once=1)
    assert alone["gradients"] * 2 == needed["gradients"] and alone["buffer"] == needed["buffer"]


def test_stamps_of_controls_are_their_own(corpus, profile):
    stamp = training_stamp(profile, corpus)
    difference = checkpoints.stamp_difference
    assert difference(stamp, stamp) == ""
    control = training_stamp(profile, corpus, Control("other", {}))
    assert difference(control, stamp) == difference(stamp, control) == "control"
    assert {key: value for key, value in control.items() if key != "control"} == stamp


def test_settings_stand_beside_the_papers_and_say_what_they_are(model, corpus, profile):
    printed = {"n_layers": 24.0, "width": 8192.0, "expansion": 8.0, "training_tokens": 6e7,
               "l1_coefficient": 1.4e-4, "train_share": 0.9, "live_cut_table3": -4.0}
    rows = {one.name: one for one in settings_table(model, profile, printed)}
    assert list(rows)[:7] == list(printed)
    assert rows["width"].paper == 8192 and isinstance(rows["width"].paper, int)
    assert (rows["n_layers"].ours, rows["width"].ours) == (2, 2 * 16)
    assert rows["training_tokens"].ours == 14 * 32
    assert rows["live_cut_table3"].ours == profile.live_cut
    assert rows["loss"].paper == "equation4" and rows["skip"].paper is False
    assert rows["precision"].paper == "not named" and rows["precision"].ours == profile.precision
    assert "Adam" in rows["warmup_steps"].meaning or "learning rate" in rows["warmup_steps"].meaning
    assert all(one.meaning.endswith(".") and "\n" not in one.meaning for one in rows.values())
    # Each is a field that decides a training, or follows from one.
    assert set(rows) - set(printed) <= {*FIELDS} <= set(Profile.model_fields)


@pytest.mark.parametrize("loss", ["normalized", "equation4"])
def test_the_coefficient_in_the_units_of_equation_4(model, corpus, profile, loss):
    given = profile.model_copy(update={"loss": loss})
    found = loss_units(model, corpus, given)
    train = np.flatnonzero(~corpus.held_out)  # 8192 tokens hold them all
    norms = np.concatenate([mlp_sites(model, tokens, mask).outputs.norm(dim=-1).numpy() for
                            _, tokens, mask in batches(corpus, train, 3, model.device)], axis=1)
    np.testing.assert_allclose(found["mean_norm_of_target"], norms.mean(axis=1), rtol=1e-5)
    factor = 16 * norms.mean(axis=1) if loss == "normalized" else np.ones(2)
    np.testing.assert_allclose(found["times_equation_4"], factor, rtol=1e-5)
    np.testing.assert_allclose(found["lambda_in_equation_4"], given.l1_coefficient * factor,
                               rtol=1e-5)
