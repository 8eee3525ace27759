"""What a run states before it begins: memory and stamp."""

from scfm_circuits.transcoders.training import checkpoints
from scfm_circuits.transcoders.training.run import TrainingRun
from scfm_circuits.transcoders.training.settings import Control, memory_needed, training_stamp


def test_memory_is_that_of_what_is_held(model, corpus, profile):
    train = int(corpus.lengths[~corpus.held_out].sum())
    needed = memory_needed(profile, train, 2, 16)
    assert needed["buffer"] == 2 * 4 * 2 * 16 * 64
    run = TrainingRun(model, corpus, profile)
    run.run(until=1, progress=False)
    held = sum(3 * 4 * p.numel() for p in run.transcoders.parameters())
    assert abs(needed["parameters and Adam"] / held - 1) < 0.05
    assert needed["activations of one batch"] >= 4 * 2 * 32 * 32
    # One layer at a time takes that much less.
    alone = memory_needed(profile, train, 2, 16, at_once=1)
    assert alone["gradients"] * 2 == needed["gradients"] and alone["buffer"] == needed["buffer"]


def test_stamps_of_controls_are_their_own(corpus, profile):
    stamp = training_stamp(profile, corpus)
    difference = checkpoints.stamp_difference
    assert difference(stamp, stamp) == ""
    control = training_stamp(profile, corpus, Control("other", {}))
    assert difference(control, stamp) == difference(stamp, control) == "control"
    assert {key: value for key, value in control.items() if key != "control"} == stamp
