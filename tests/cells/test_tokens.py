"""Prompts put together from pieces, against the tokenizer itself."""

import os
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scfm_circuits.cells import tokens
from scfm_circuits.cells.tokens import encode_all, in_memory, load_tokenizer, train_tokenizer

SYMBOLS = np.array(["CD14", "C1ORF112", "MT-CO1", "RP11-291B21.2", "HLA-DQA1", "7SK", "Y_RNA",
                    "A2M", "NKX2-5", "A", "1", "TRA@", "KIAA1217", "HLA-", "S100A8"])
PROMPTS = ("{genes}.\n\nThe corresponding cell type is:", "Genes: {genes}. Which?", "{genes}",
           "The genes {genes}...")


@cache
def tokenizer(kind: str) -> Any:
    texts = [f" {gene} {gene}. B cell." for gene in SYMBOLS] * 3
    if kind == "trained":
        return train_tokenizer(texts, 330)
    if kind == "across words":  # merges over spaces, so no prompt can be put together
        from tokenizers import Tokenizer, models, trainers
        from transformers import PreTrainedTokenizerFast

        made = Tokenizer(models.BPE())
        made.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False))
        return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")
    folder = os.environ.get("SCFM_TOKENIZER")
    if not folder:
        pytest.skip("SCFM_TOKENIZER is not set to a folder with Pythia's tokenizer.json")
    return load_tokenizer(folder)


def rankings(seed: int, n: int, least: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = np.full((n, 8), -1, np.int32)
    for row in found:
        size = rng.integers(least, 9)
        row[:size] = rng.permutation(len(SYMBOLS))[:size]
    return found


def alone(*given: Any) -> Any:
    return tokens._one_by_one(*given, in_memory, quiet=True)


def same(ours: Any, theirs: Any) -> None:
    for name, one, other in zip(ours._fields, ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.mark.parametrize("kind", ["trained", "real"])
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10_000), prompt=st.sampled_from(PROMPTS), n=st.integers(1, 12))
def test_what_is_put_together_is_what_the_tokenizer_gives(kind, seed, prompt, n):
    ranking = rankings(seed, n)
    answers = [[" B cell.", " T/NK <cell>.", " 7 cells"][i % 3] for i in range(n)]
    used = tokenizer(kind), prompt, SYMBOLS, ranking, answers
    parts = tokens._parts(*used[:4], *np.unique(answers, return_inverse=True))
    assert parts is not None
    theirs = alone(*used)
    same(tokens._joined(used[0].eos_token_id, ranking, *parts, in_memory), theirs)
    same(encode_all(*used), theirs)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many cells each call encoded one by one."""
    seen: list[int] = []
    real = tokens._one_by_one

    def one_by_one(*given: Any, **named: Any) -> Any:
        seen.append(len(given[3]))
        return real(*given, **named)

    monkeypatch.setattr(tokens, "_one_by_one", one_by_one)
    return seen


def test_of_many_cells_a_sample_is_looked_at(monkeypatch):
    monkeypatch.setattr(tokens, "_CELLS", 100)
    ranking, answers = rankings(0, 950), [" B cell."] * 949 + [" rare."]
    theirs = alone(tokenizer("trained"), PROMPTS[0], SYMBOLS, ranking, answers)
    seen = counted(monkeypatch)
    same(encode_all(tokenizer("trained"), PROMPTS[0], SYMBOLS, ranking, answers), theirs)
    assert len(seen) == 1 and 256 <= seen[0] <= 258


@pytest.mark.parametrize("kind, least, answer", [
    ("across words", 2, " B cell."), ("trained", 1, " B cell."), ("trained", 2, "B cell.")])
def test_where_it_cannot_be_each_prompt_is_encoded_by_itself(monkeypatch, kind, least, answer):
    ranking, answers = rankings(1, 60, least), [answer] * 60
    assert least == 2 or (ranking[:, 1] < 0).any()
    theirs = alone(tokenizer(kind), PROMPTS[0], SYMBOLS, ranking, answers)
    seen = counted(monkeypatch)
    same(encode_all(tokenizer(kind), PROMPTS[0], SYMBOLS, ranking, answers), theirs)
    assert seen[-1] == 60
