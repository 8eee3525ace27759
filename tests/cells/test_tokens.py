"""Prompts as tokens that know their gene, against the tokenizer itself."""

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
    if kind == "across words":  # merges over spaces
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


def spelt(kind: str, prompt: str, genes: np.ndarray, answer: str) -> Any:
    """Tokens, gene and place of each, and where the answer begins: character by character."""
    before, after = prompt.split("{genes}")
    owner, text = [-1] * len(before), before
    for gene in genes:
        owner += [int(gene)] * len(SYMBOLS[gene]) + [-1]
        text += SYMBOLS[gene] + " "
    text = text[:-1] + after + answer
    owner += [-1] * len(after + answer)
    if kind == "genes":  # its genes are no part of what it makes of a text
        encoded, begin = encode_prompt(tokenizer(kind), prompt, SYMBOLS[genes].tolist(), genes,
                                       answer)
        return *(one.tolist() for one in encoded), begin
    found = tokenizer(kind)(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in found["offset_mapping"]]
    gene = [owner[end - 1] for end in ends]
    place = [-1 if one < 0 else gene[:i].count(one) for i, one in enumerate(gene)]
    return found["input_ids"], gene, place, sum(end <= len(text) - len(answer) for end in ends)


@pytest.mark.parametrize("kind", ["trained", "genes", "across words", "real"])
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow,
          HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), prompt=st.sampled_from(PROMPTS), n=st.integers(1, 12))
def test_all_prompts_are_what_the_tokenizer_gives_for_each(kind, seed, prompt, n, monkeypatch):
    monkeypatch.setattr(tokens, "_CELLS", 5)
    ranking = rankings(seed, n, 1)
    answers = [[" B cell.", " T/NK <cell>.", "7 cells"][i % 3] for i in range(n)]
    prompts = encode_all(tokenizer(kind), prompt, SYMBOLS, ranking, answers)
    for row, (genes, answer) in enumerate(zip(ranking, answers, strict=True)):
        ids, gene, place, begin = spelt(kind, prompt, genes[genes >= 0], answer)
        length = len(ids) + 1  # with the end of text, which fills the row up
        assert prompts.mask[row].tolist() == [i < length for i in range(len(prompts.mask[row]))]
        rest = prompts.tokens.shape[1] - len(ids)
        assert prompts.tokens[row].tolist() == ids + [tokenizer(kind).eos_token_id] * rest
        assert prompts.gene[row].tolist() == gene + [-1] * rest
        assert prompts.place[row].tolist() == place + [-1] * rest
        assert (prompts.answer_start[row], prompts.answer_end[row]) == (begin, len(ids) - 1)


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
    encoded, start = encode_prompt(made, prompt, genes, ids, answer)
    inside = encoded.gene >= 0
    assert encoded.gene[inside].tolist() == ids.tolist()
    assert (encoded.place[inside] == 0).all() and (encoded.place[~inside] == -1).all()
    assert token_texts(made, encoded.tokens[inside]) == [f"_{gene}" for gene in genes]
    # A word that looks like a gene is none, and text reads as it was written.
    assert not set(encoded.tokens[inside]) & set(encoded.tokens[~inside])
    whole = made.decode(encoded.tokens, clean_up_tokenization_spaces=False)
    before, after = prompt.split("{genes}")
    assert whole == before.removesuffix(" ") + " " + " ".join(genes) + after + answer
    assert made.decode(encoded.tokens[start:], clean_up_tokenization_spaces=False) == answer


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
