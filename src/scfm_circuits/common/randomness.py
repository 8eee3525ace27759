"""Random numbers by name: every use has a stream of its own, from the profile's seed.

`generator(seed, "null lists", layer, kind, first_draw)` is numpy's generator of the words (seed,
number of the stream, layer, kind, first draw). numpy fills up with zeros, so (seed, 11) and
(seed, 11, 0) are one stream; therefore no two names share a number, and a name always takes the
same number of words. A new use gets a new name and number; a number is never changed, since all
that was drawn with it would change too.

Weights are drawn by torch's own generators, seeded where they are made; `torch_seed` is for those
that a training draws on its way.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Stream(NamedTuple):
    """Number of a stream, and what the words that follow it are."""

    number: int
    words: tuple[str, ...] = ()


STREAMS: Mapping[str, Stream] = {
    "permuted circuits": Stream(0),
    "drawn cells": Stream(1),
    "cells asked for their type": Stream(2),
    "held-out cells": Stream(3),
    "batches of the small model": Stream(4),
    "cells of a buffer's fill": Stream(5, ("epoch",)),
    "batches of a buffer": Stream(6, ("fill",)),
    "features of a study": Stream(7, ("layer",)),
    "interventions": Stream(8),
    "null lists": Stream(9, ("layer", "kind", "first draw")),
    "untrained encoder": Stream(10),
    "re-initialised model": Stream(11),
    "lists at the nominal level": Stream(12),
    "prerank ties": Stream(13),
    "prerank, names shuffled": Stream(14),
    "null lists of the case": Stream(15, ("kind",)),
    "null lists of other dictionaries": Stream(16, ("layer",)),
    "planted features": Stream(17),
    "resampled features": Stream(18, ("step", "layer")),
    "jitter of points": Stream(19),
    "simulated cells": Stream(20),
    "random genes of a prompt": Stream(21),
    "scores of random tokens": Stream(31, ("layer",)),
    "scored features of the untrained encoder": Stream(32, ("layer",)),
    "cards": Stream(33),
    "features with known items": Stream(34, ("kind",)),
    "cells that kinds are counted in": Stream(35),
    "thinned cells": Stream(40),
    "the model's own directions": Stream(43, ("kind",)),
    "relabelled genes": Stream(41, ("draw",)),
    "null lists under other choices": Stream(42),
    "cells of both tokenizers": Stream(44),
    "resampled predictions": Stream(60),
    "steering": Stream(80, ("use",)),
    "resampled steering": Stream(83),
    "wrong calls": Stream(81),
    "concept scores": Stream(82, ("use",)),
    "simulated logic": Stream(45),
    "cells that known truth is scored on": Stream(46),
    "task circuit": Stream(61, ("part",)),
    "random gene nodes": Stream(63),
    "knock-outs": Stream(62, ("use",)),
    "resampled features of Table 3": Stream(64),
    "resampled perturbed cells": Stream(90),
    "shuffled perturbations": Stream(91),
    "genes as frequent": Stream(92),
    "random genes changed": Stream(93, ("cell",)),
    "resampled cells and genes": Stream(94),
    "masked genes": Stream(70, ("cell",)),
    "masks in training": Stream(71),
    "resampled cells of parts": Stream(72),
}


def generator(seed: int, name: str, *words: int) -> np.random.Generator:
    """The generator of a stream; `words` are those that STREAMS names.

    Raises:
        ValueError: no such stream, another number of words, or one that does not fit 32 bits.
    """
    return np.random.default_rng(_sequence(seed, name, words))


def torch_seed(seed: int, name: str, *words: int) -> int:
    """A seed for a torch generator, from a stream; raises as `generator`."""
    return int(_sequence(seed, name, words).generate_state(1)[0])


def _sequence(seed: int, name: str, words: tuple[int, ...]) -> np.random.SeedSequence:
    if name not in STREAMS:
        raise ValueError(f"No random stream is called {name!r}; add it to STREAMS under a number "
                         "of its own.")
    stream = STREAMS[name]
    if len(words) != len(stream.words):
        raise ValueError(f"The random stream {name!r} takes {len(stream.words)} words "
                         f"({', '.join(stream.words) or 'none'}), not {len(words)}.")
    entropy = [int(one) for one in (seed, stream.number, *words)]
    # A larger number would take two words, and move those behind it.
    if not all(0 <= one < 2**32 for one in entropy):
        raise ValueError(f"A seed and words of a random stream lie from 0 to 2^32 - 1, not "
                         f"{entropy}.")
    return np.random.SeedSequence(entropy)
