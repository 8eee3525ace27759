"""Prompts put together from pieces, against the tokenizer itself."""

import os
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scfm_circuits.cells import tokens
from scfm_circuits.cells.tokens import (
    encode_all,
    encode_prompt,
    in_memory,
    load_tokenizer,
    token_texts,
    train_gene_tokenizer,
    train_tokenizer,
)

SYMBOLS = np.array(["CD14", "C1ORF112", "MT-CO1", "RP11-291B21.2", "HLA-DQA1", "7SK", "Y_RNA",
                    "A2M", "NKX2-5", "A", "1", "TRA@", "KIAA1217", "HLA-", "S100A8"])
PROMPTS = ("{genes}.\n\nThe corresponding cell type is:", "Genes: {genes}. Which?", "{genes}",
           "The genes {genes}...")


@cache
def tokenizer(kind: str) -> Any:
    texts = [f" {gene} {gene}. B cell." for gene in SYMBOLS] * 3
    if kind == "trained":
        return train_tokenizer(texts, 330)
    if kind == "genes":
        return train_gene_tokenizer(texts, SYMBOLS.tolist(), 330)
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


@pytest.mark.parametrize("kind", ["trained", "genes", "real"])
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


# --- one token a gene ----------------------------------------------------------------------------

PROMPT = "Genes: {genes}.\n\nThe T cell type of CD14+ is:"
LABELS = ("CD14+ T cell", "B", "T", "7SK", "Genes", "β cell", "<gene>B")
ODD = ("T", "B", "TYPE", "GENES", "GENES:", "THE", "IS", "CD14", "CD14+", "HLA-A", "HLA-", "-", ".",
       "A", "A.", "A..", "RP11-291B21.2", "AC0.1.", "7SK", "1", "{GENES}", "{LABEL}", "<GENE>",
       "<gene>B", "<|endoftext|>", "Β2M", "É1", "ÅŞİ", "基因", "🧬", "\u0301A", "Ġ", "ĠT", "Y_RNA")
ANY = st.text(st.characters(exclude_categories=("Z", "C")), min_size=1, max_size=9)
SYMBOL = st.sampled_from(ODD) | ANY.filter(lambda text: text.split() == [text])


def by_gene(symbols: list[str]) -> Any:
    texts = [PROMPT.replace("{genes}", "") + f" {label}." for label in LABELS]
    return train_gene_tokenizer(texts, symbols, 330)


@settings(deadline=None, max_examples=80)
@given(genes=st.lists(SYMBOL, min_size=1, max_size=12, unique=True), label=st.sampled_from(LABELS),
       prompt=st.sampled_from([PROMPT, *PROMPTS, "x{genes}x", "B {genes} B"]))
def test_every_gene_is_one_token_whatever_it_is_called(genes, label, prompt):
    made, ids, answer = by_gene(genes), np.arange(len(genes)) * 3 + 5, f" {label}."
    encoded, start = encode_prompt(made, prompt, genes, ids, answer, end=True)
    inside = encoded.gene >= 0
    assert encoded.gene[inside].tolist() == ids.tolist()
    assert (encoded.place[inside] == 0).all() and (encoded.place[~inside] == -1).all()
    assert token_texts(made, encoded.tokens[inside]) == [f"_{gene}" for gene in genes]
    # A word that looks like a gene is none, and text reads as it was written.
    assert not set(encoded.tokens[inside]) & set(encoded.tokens[~inside])
    whole = made.decode(encoded.tokens[:-1], clean_up_tokenization_spaces=False)
    before, after = prompt.split("{genes}")
    assert whole == before.removesuffix(" ") + " " + " ".join(genes) + after + answer
    assert made.decode(encoded.tokens[start:-1], clean_up_tokenization_spaces=False) == answer


def test_a_gene_is_the_same_token_wherever_it_stands():
    made = by_gene(list(ODD))
    found = [encode_prompt(made, PROMPT, genes, range(3))[0] for genes in
             (("B", "T", "CD14"), ("T", "CD14", "B"), ("CD14", "B", "T"))]
    b, t, cd14 = found[0].tokens[found[0].gene >= 0]
    assert [one.tokens[one.gene >= 0].tolist() for one in found[1:]] == [[t, cd14, b], [cd14, b, t]]


def test_a_gene_that_the_tokenizer_does_not_have_is_spelt():
    made = by_gene(["B", "CD14"])
    encoded, start = encode_prompt(made, PROMPT, ["B", "FOXP3", "CD14"], [4, 5, 6], " B.")
    own = [np.flatnonzero(encoded.gene == gene) for gene in (4, 5, 6)]
    assert [len(one) == 1 for one in own] == [True, False, True]
    assert "".join(token_texts(made, encoded.tokens[own[1]])) == "FOXP3"
    assert "".join(token_texts(made, encoded.tokens[start:])) == "_B."


def test_a_stored_tokenizer_has_the_same_tokens(tmp_path):
    made = by_gene(list(ODD))
    made.save_pretrained(tmp_path)
    genes = list(ODD)
    before, after = (encode_prompt(one, PROMPT, genes, range(len(genes)), " B.")[0].tokens
                     for one in (made, load_tokenizer(str(tmp_path))))
    np.testing.assert_array_equal(before, after)
    assert load_tokenizer(str(tmp_path)).decode(after) == made.decode(before)
