"""No two uses of random numbers share a stream, and none is drawn from outside the table."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from scfm_circuits.common.randomness import STREAMS, generator, torch_seed

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*(ROOT / "src").rglob("*.py"), *(ROOT / "notebooks").glob("*.py")]


def test_no_number_stands_twice() -> None:
    numbers = [stream.number for stream in STREAMS.values()]
    assert len(set(numbers)) == len(numbers)


def test_no_two_names_or_words_give_the_same_stream() -> None:
    # With zeros among the words, as numpy fills up with zeros: (seed, 11) is (seed, 11, 0).
    drawn = {(seed, name, words): generator(seed, name, *words).integers(2**62)
             for seed in (0, 1, 11) for name, stream in STREAMS.items()
             for words in product((0, 1, 2), repeat=len(stream.words))}
    assert len(set(drawn.values())) == len(drawn) > 200
    seeds = [torch_seed(*key[:2], *key[2]) for key in drawn]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(("name", "words"), [
    ("permuted circuits", []), ("held-out cells", [3]), ("batches of a buffer", [6, 4]),
    ("null lists", [9, 1, 2, 300]), ("cards", [33]),
])
def test_a_stream_is_the_seed_its_number_and_its_words(name: str, words: list[int]) -> None:
    assert generator(7, name, *words[1:]).random() == np.random.default_rng([7, *words]).random()


def test_what_is_no_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="No random stream is called 'dice'"):
        generator(0, "dice")
    with pytest.raises(ValueError, match=r"takes 3 words \(layer, kind, first draw\), not 1"):
        generator(0, "null lists", 1)
    with pytest.raises(ValueError, match=r"takes 0 words \(none\), not 1"):
        generator(0, "cards", 1)
    for seed, layer in ((2**32, 0), (0, -1)):
        with pytest.raises(ValueError, match="lie from 0 to"):
            generator(seed, "batches of a buffer", layer)


def test_every_generator_has_a_name_and_every_name_is_used() -> None:
    texts = {path: path.read_text() for path in SOURCES if path.name != "randomness.py"}
    outside = [str(path.relative_to(ROOT)) for path, text in texts.items()
               if any(word in text for word in ("default_rng(", "SeedSequence", "RandomState("))]
    assert not outside
    together = "\n".join(texts.values())
    assert [name for name in STREAMS if f'"{name}"' not in together] == []
