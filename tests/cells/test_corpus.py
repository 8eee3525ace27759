"""Cell sentences: the ranking, and a token's way back to its gene."""

import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import GENES, ranked, tiny_cells, tiny_corpus, tiny_profile
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_architectures import FAMILIES, tiny
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from scfm_circuits import InputError
from scfm_circuits.cells import reading as cells_module
from scfm_circuits.cells.corpus import (
    Corpus,
    build_corpus,
    load_corpus,
    sentence_texts,
    split_cells,
    with_tokenizer,
)
from scfm_circuits.cells.tokens import (
    END_OF_TEXT,
    encode_prompt,
    load_tokenizer,
    question,
    token_texts,
    train_tokenizer,
)
from scfm_circuits.common import profile as profiles
from scfm_circuits.common.profile import ROOT, load_profile

ODD_SYMBOLS = ["C1ORF112", "MT-CO1", "RP11-291B21.2", "HLA-DQA1", "7SK", "Y_RNA", "A2M", "SEPT1",
               "AC011558.5", "NKX2-5", "CTD-2545M3.6", "A", "1", "TRA@"]


@cache
def trained() -> Any:
    return train_tokenizer([f" {gene} {gene}." for gene in GENES] * 3, 330)


@pytest.fixture(scope="module", params=["trained", "real"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return trained() if request.param == "trained" else real_tokenizer()


def real_tokenizer() -> Any:
    folder = os.environ.get("SCFM_TOKENIZER")
    if not folder:
        pytest.skip("SCFM_TOKENIZER is not set to a folder with Pythia's tokenizer.json")
    return load_tokenizer(folder)


# --- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 512, 1300])
@pytest.mark.parametrize("symbols", [GENES, tuple(GENES), np.array(GENES)], ids=type)
def test_sentences_are_the_genes_before_the_end_of_a_ranking(n, symbols):
    rng = np.random.default_rng(n)
    ranking = rng.permuted(np.tile(np.arange(len(GENES), dtype=np.int32), (n, 1)), axis=1)[:, :5]
    sizes = rng.integers(0, 6, n)
    ranking[np.arange(5) >= sizes[:, None]] = -1
    assert list(sentence_texts(ranking, symbols)) == [
        " ".join(GENES[gene] for gene in row[:size])
        for row, size in zip(ranking.tolist(), sizes.tolist(), strict=True)]


# --- split ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(n=st.integers(2, 300), share=st.floats(0.01, 0.9), seed=st.integers(0, 100))
def test_split_is_by_cell_and_leaves_both_parts(n, share, seed):
    if max(1, round(n * share)) >= n:
        with pytest.raises(InputError, match="use more cells"):
            split_cells(n, share, seed)
        return
    held_out = split_cells(n, share, seed)
    assert held_out.shape == (n,) and held_out.dtype == bool
    assert held_out.sum() == max(1, round(n * share))
    assert (held_out == split_cells(n, share, seed)).all()


def test_the_split_depends_on_the_seed():
    assert len({split_cells(50, 0.2, seed).tobytes() for seed in range(10)}) == 10


def test_a_few_cells_are_of_all_samples_and_on_one_side_of_the_split():
    """Cells stand in the file's order, sample by sample: the first few are of one sample."""
    corpus = tiny_corpus()
    for held_out, few in ((True, corpus.held_out_cells), (False, corpus.training_cells)):
        side = np.flatnonzero(corpus.held_out == held_out)
        n = len(side)
        assert few(n).tolist() == few(10 * n).tolist() == side.tolist()
        assert few(2).tolist() == [side[0], side[-1]]
        some = few(3)
        assert np.abs(np.diff(np.searchsorted(side, some)) - (n - 1) / 2).max() <= 0.5


# --- tokens and genes ----------------------------------------------------------------------------


def gene_pieces(tokenizer: Any, prompt: str, genes: list[str], answer: str = "") -> list[str]:
    """What the tokens of each gene spell, in order; also checks `place` and the prompt's words."""
    ids = np.arange(len(genes)) * 3 + 5
    encoded, _ = encode_prompt(tokenizer, prompt, genes, ids, answer)
    texts = [tokenizer.decode([int(token)], clean_up_tokenization_spaces=False)
             for token in encoded.tokens]
    outside = "".join(text for text, gene in zip(texts, encoded.gene, strict=True) if gene < 0)
    words = prompt.replace("{genes}", "") + answer
    assert "".join(outside.split()) == "".join(words.split())
    assert ((encoded.place < 0) == (encoded.gene < 0)).all()
    pieces = []
    for gene in ids:
        mine = np.flatnonzero(encoded.gene == gene)
        assert encoded.place[mine].tolist() == list(range(len(mine)))
        assert (np.diff(mine) == 1).all()
        pieces.append("".join(texts[i] for i in mine).strip())
    return pieces


def test_pieces_of_odd_symbols_spell_them(tokenizer):
    prompt = "Cell {with braces}: {genes}.\n\nThe corresponding cell type is:"
    answer = " CD8A+ {label} MT-CO1."
    assert gene_pieces(tokenizer, prompt, ODD_SYMBOLS, answer) == ODD_SYMBOLS


SYMBOL = st.from_regex(r"[A-Z][A-Z0-9]{0,6}([-.][A-Z0-9]{1,4})?", fullmatch=True)


@settings(deadline=None, max_examples=60)
@given(genes=st.lists(SYMBOL, min_size=1, max_size=12, unique=True))
def test_pieces_of_any_symbols_spell_them(genes):
    prompt = "{genes}.\n\nThe corresponding cell type is:"
    assert gene_pieces(trained(), prompt, genes, " B cell.") == genes


def test_a_gene_that_is_also_in_the_answer_counts_in_the_sentence_only():
    encoded, start = encode_prompt(trained(), "{genes}. CD8A is:", ["CD8A"], [9], " CD8A.")
    inside = np.flatnonzero(encoded.gene == 9)
    assert inside.max() < start
    assert "".join(token_texts(trained(), encoded.tokens[inside])) == "CD8A"
    assert "".join(token_texts(trained(), encoded.tokens[start:])) == "_CD8A."


@pytest.mark.parametrize("seed", range(3))
def test_every_gene_of_a_corpus_can_be_read_back(seed):
    corpus = tiny_corpus(seed=seed)
    cells = tiny_cells(seed=seed)
    for cell, ranking in enumerate(ranked(cells, 6, load_profile("smoke").seed).ranking):
        ranking = ranking[ranking >= 0]
        genes = [cells.symbols[i] for i in ranking]
        assert corpus.genes_of(cell) == genes
        ids = corpus.gene[cell][corpus.mask[cell]]
        for index, gene in zip(ranking, genes, strict=True):
            pieces = np.array(corpus.pieces(cell))[ids == index]
            assert "".join(pieces).lstrip("_") == gene


@pytest.mark.parametrize("kind", ["train", "genes"])
def test_cells_in_other_tokens_are_the_same_cells(kind):
    own, fields = tiny_corpus(20), {"genes_per_cell": 6, "max_cells": None,
                                    "validation_share": 0.25, "tokenizer": kind}
    rows = np.array([2, 3, 7, 11, 19])
    some = with_tokenizer(own, load_profile("smoke", fields), rows)
    assert [some.genes_of(i) for i in range(5)] == [own.genes_of(i) for i in rows]
    for key in ("labels", "cell_ids", "held_out"):
        assert np.array_equal(getattr(some, key), getattr(own, key)[rows])
    whole = with_tokenizer(own, load_profile("smoke", fields), np.arange(20))
    assert same(whole, tiny_corpus(20, tokenizer=kind))


@pytest.mark.parametrize("kind", ["train", "genes"])
def test_the_answer_is_where_the_corpus_says(kind):
    corpus = tiny_corpus(tokenizer=kind)
    profile = load_profile("smoke")
    for cell in range(len(corpus)):
        start, end = corpus.answer_start[cell], corpus.answer_end[cell]
        tokens = corpus.tokens[cell]
        answer = corpus.tokenizer.decode(tokens[start : end + 1])
        assert answer == profile.response.replace("{label}", corpus.labels[cell])
        assert corpus.tokenizer.decode(tokens[end : end + 1]).endswith(".")
        assert corpus.tokenizer.decode(tokens[:start]).endswith("is:")
        assert tokens[end + 1] == corpus.tokenizer.eos_token_id
        assert corpus.lengths[cell] == end + 2
        assert (corpus.gene[cell, start:] == -1).all()


def test_padding_is_masked_and_belongs_to_no_gene():
    corpus = tiny_corpus()
    assert len(set(corpus.lengths)) > 1 and corpus.mask.any(axis=0).all()
    assert (corpus.gene[~corpus.mask] == -1).all() and (corpus.place[~corpus.mask] == -1).all()
    # Padding is on the right: the mask never comes back.
    assert (np.diff(corpus.mask.astype(int), axis=1) <= 0).all()


@pytest.mark.parametrize("kind", ["train", "genes"])
def test_the_tokenizer_never_sees_held_out_answers(kind):
    cells, own = tiny_cells(12), tiny_corpus(12, tokenizer=kind)
    labels = cells.labels.copy()
    labels[own.held_out] = "ZZZZZZZZ"
    changed = build_corpus(ranked(replace(cells, labels=labels), 6), load_profile("smoke", {
        "genes_per_cell": 6, "max_cells": None, "validation_share": 0.25, "tokenizer": kind}))
    assert changed.tokenizer.get_vocab() == own.tokenizer.get_vocab()


def test_with_a_token_a_gene_sentences_stay_and_prompts_are_shorter():
    pieces, genes = tiny_corpus(20), tiny_corpus(20, tokenizer="genes")
    assert [genes.genes_of(i) for i in range(20)] == [pieces.genes_of(i) for i in range(20)]
    assert ((genes.gene >= 0) == (genes.place == 0)).all()
    assert (genes.lengths < pieces.lengths).all()
    token, gene = genes.tokens[genes.gene >= 0], genes.gene[genes.gene >= 0]
    assert len(set(zip(token, gene, strict=True))) == len(set(token)) == len(set(gene))
    assert "_CD3D" in genes.pieces(3)


# --- the paper's own examples --------------------------------------------------------------------


def test_the_papers_figure_4_is_64_genes_and_211_tokens():
    tokenizer = real_tokenizer()
    genes = pd.read_csv(ROOT / "data" / "paper" / "figure4_genes.csv")["gene"].tolist()
    assert len(genes) == 64
    # 210 pieces of genes, and the full stop that ends the sentence.
    encoded, start = encode_prompt(tokenizer, "{genes}.", genes, np.arange(64))
    assert len(encoded.tokens) == start == 211 and (encoded.gene >= 0).sum() == 210
    assert gene_pieces(tokenizer, load_profile("paper").prompt, genes) == genes


GENE_FAMILIES = {"PTPN": "PTPN1", "CSNK": "CSNK1A1", "FOXO": "FOXO1", "WSB": "WSB1"}
NOT_ABOUT_GENES = {4942: "Trailing 2", 2459: "Y tokens"}


def test_the_tokens_of_the_papers_table_3_are_pieces_of_the_genes_it_names():
    tokenizer = real_tokenizer()
    table = pd.read_csv(ROOT / "data" / "paper" / "table3.csv", keep_default_na=False)
    checked = 0
    for feature, text in zip(table["feature"], table["activating_tokens"], strict=True):
        if feature in NOT_ABOUT_GENES:
            assert text.startswith(NOT_ABOUT_GENES[feature])
            continue
        token, _, where = text.partition(" token in ")
        named = where.replace("(", " ").replace(")", " ").replace(",", " ").split()
        genes = [GENE_FAMILIES.get(word, word) for word in named
                 if word not in ("gene", "genes", "family") and not word.endswith("*")]
        assert genes, text
        for gene in genes:
            # Inside a sentence, so that the first piece has its space.
            encoded, _ = encode_prompt(tokenizer, "A {genes}.", [gene], [0])
            pieces = token_texts(tokenizer, encoded.tokens[encoded.gene == 0])
            assert token in [piece.lstrip("_") for piece in pieces], (token, gene, pieces)
            checked += 1
    assert checked == 32


# --- the stored corpus ---------------------------------------------------------------------------


def h5ad(folder: Path, seed: int = 3) -> Path:
    cells = tiny_cells(12, labels=("CD4+ T cell", "B cell"), seed=seed)
    data = anndata.AnnData(
        cells.expression.toarray(), obs=pd.DataFrame({"type": cells.labels}, index=cells.cell_ids),
        var=pd.DataFrame(index=list(cells.symbols)))
    data.write_h5ad(folder / "mine.h5ad")
    return folder / "mine.h5ad"


def same(a: Corpus, b: Corpus) -> bool:
    arrays = [key for key in vars(a) if key != "tokenizer"]
    return (all(np.array_equal(getattr(a, key), getattr(b, key)) for key in arrays)
            and a.tokenizer.get_vocab() == b.tokenizer.get_vocab()
            and a.tokenizer.eos_token_id == b.tokenizer.eos_token_id
            and a.pieces(3) == b.pieces(3)
            and a.tokenizer("CD3D CD8A.")["input_ids"] == b.tokenizer("CD3D CD8A.")["input_ids"])


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    return {"cells": str(h5ad(tmp_path)), "matrix": "X", "label_column": "type",
            "validation_share": 0.25, "case_type": "B cell"}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one each time cells are read."""
    seen: list[str] = []
    read = cells_module.read_ranked

    def counted(profile: Any) -> Any:
        seen.append(profile.name)
        return read(profile)

    monkeypatch.setattr(cells_module, "read_ranked", counted)
    return seen


def test_the_stored_corpus_is_the_built_one(tmp_path, monkeypatch, fields, reads):
    profile = tiny_profile(monkeypatch, tmp_path, **fields)
    built, stored = load_corpus(profile), load_corpus(profile)
    assert len(reads) == 1 and same(built, stored)
    assert same(built, build_corpus(cells_module.read_ranked(profile), profile))


def test_a_changed_field_builds_another_corpus(tmp_path, monkeypatch, fields, reads):
    profile = tiny_profile(monkeypatch, tmp_path, **fields)
    first = load_corpus(profile)
    for field, value in (("genes_per_cell", 4), ("seed", 1), ("response", " a {label}."),
                         ("prompt", "{genes} is:"), ("validation_share", 0.5)):
        changed = profile.model_copy(update={field: value})
        other = load_corpus(changed)
        assert not (np.array_equal(other.tokens, first.tokens)
                    and np.array_equal(other.held_out, first.held_out)), field
    assert len(reads) == 6
    # A field that sentences do not depend on changes nothing.
    load_corpus(changed.model_copy(update={"expansion": 2}))
    assert len(reads) == 6


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative to the project"])
def test_a_changed_file_builds_another_corpus(tmp_path, monkeypatch, fields, reads, relative):
    if relative:
        monkeypatch.setattr(profiles, "ROOT", tmp_path)
        fields["cells"] = "mine.h5ad"
    profile = tiny_profile(monkeypatch, tmp_path, **fields)
    first = load_corpus(profile)
    h5ad(tmp_path, seed=4)
    assert not same(load_corpus(profile), first) and len(reads) == 2


@pytest.mark.parametrize("name", ["tokens.npy", "labels.npy", "tokenizer.json", "corpus.json"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_store_is_built_again(tmp_path, monkeypatch, fields, reads, share, name):
    profile = tiny_profile(monkeypatch, tmp_path, **fields)
    built = load_corpus(profile)
    # What is mapped must not change in place.
    built = replace(built, **{key: np.array(value) for key, value in vars(built).items()
                              if key != "tokenizer"})
    path = profile.results / "corpus" / name
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: int(len(content) * share)])
    assert same(load_corpus(profile), built) and len(reads) == 2


def test_another_end_of_text_survives_the_store(tmp_path, monkeypatch, fields):
    folder = tmp_path / "tokenizer"
    tokenizer = trained()
    text = tokenizer.backend_tokenizer.to_str().replace(END_OF_TEXT, "</s>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token="</s>"
                            ).save_pretrained(folder)
    profile = tiny_profile(monkeypatch, tmp_path, tokenizer=str(folder), **fields)
    built, stored = load_corpus(profile), load_corpus(profile)
    assert same(built, stored) and len(built.tokenizer) == len(stored.tokenizer)


def test_a_case_study_without_a_cell(tmp_path, monkeypatch, fields):
    profile = tiny_profile(monkeypatch, tmp_path, **{**fields, "case_type": "Hepatocyte"})
    with pytest.raises(InputError, match=r"'Hepatocyte' .`case_type`.*CD4\+ T cell"):
        load_corpus(profile)


def test_labels_and_prompts_with_braces(tmp_path):
    cells = tiny_cells(8, labels=("{label}", "{genes}", "a {0} b", "100 %"))
    profile = load_profile("smoke", {
        "genes_per_cell": 4, "max_cells": None, "validation_share": 0.25,
        "prompt": "{0} {genes} {a b}?", "response": " {} {label}."})
    corpus = build_corpus(ranked(cells, 4), profile)
    for cell in range(8):
        text = corpus.tokenizer.decode(corpus.tokens[cell][corpus.mask[cell]])
        genes = " ".join(corpus.genes_of(cell))
        assert text == f"{{0}} {genes} {{a b}}? {{}} {cells.labels[cell]}.{END_OF_TEXT}"


def test_the_model_s_own_templates_are_filled_in_for_every_cell(tmp_path):
    """As the paper prints its prompt, and as cell2sentence's templates are made: one field."""
    cells = tiny_cells(8)
    own = ("Here are {num_genes} genes of a {organism} cell.\nCell sentence: {genes}.\nIts type:")
    for prompt, expected in ((own, "Here are 4 genes of a Mus musculus cell.\nCell sentence: "),
                             ("{genes}.\n\nThe corresponding cell type is:", "")):
        profile = load_profile("smoke", {
            "genes_per_cell": 4, "max_cells": None, "validation_share": 0.25, "prompt": prompt,
            "organism": "Mus musculus"})
        corpus = build_corpus(ranked(cells, 4), profile)
        for cell in range(8):
            text = corpus.tokenizer.decode(corpus.tokens[cell][corpus.mask[cell]])
            assert text.startswith(expected + " ".join(corpus.genes_of(cell)) + ".\n")
            start = corpus.answer_start[cell]
            asked, _ = encode_prompt(corpus.tokenizer, question(profile), corpus.genes_of(cell),
                                     corpus.gene_ids_of(cell))
            assert asked.tokens.tolist() == corpus.tokens[cell][:start].tolist()


# --- tokenizers that cannot be had ---------------------------------------------------------------


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(InputError, match="check `tokenizer` in the profile"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", '{"model": 1}'])
def test_a_broken_tokenizer_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="check `tokenizer` in the profile"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_folder_without_its_tokenizer(tmp_path, family):
    tiny(family, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"(no token for 'A', 'B', |cannot be loaded).*`tok"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_cannot_write_a_gene(tmp_path):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "CD3D": 1, "</s>": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>"
                            ).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no token for 'A', 'B', "):
        load_tokenizer(str(tmp_path))


def test_a_begin_token_that_is_left_out_is_said(tmp_path, monkeypatch, fields):
    from tokenizers.processors import TemplateProcessing

    tokenizer = trained()
    mine = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    mine.add_special_tokens(["<s>"])
    mine.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[
        ("<s>", mine.token_to_id("<s>"))])
    PreTrainedTokenizerFast(tokenizer_object=mine, bos_token="<s>", eos_token=END_OF_TEXT
                            ).save_pretrained(tmp_path / "tokenizer")
    profile = tiny_profile(monkeypatch, tmp_path, tokenizer=str(tmp_path / "tokenizer"), **fields)
    corpus = load_corpus(profile)
    said = [one for one in corpus.decisions if "'<s>'" in one]
    assert len(said) == 1 and "left out" in said[0]
    assert mine.token_to_id("<s>") not in corpus.tokens
    trained().save_pretrained(tmp_path / "plain")
    other = load_corpus(profile.model_copy(update={"tokenizer": str(tmp_path / "plain")}))
    assert not any("left out" in one for one in other.decisions)
    np.testing.assert_array_equal(other.tokens, corpus.tokens)


def test_a_tokenizer_without_an_end(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=trained().backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="end"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_in_a_folder_is_the_same(tmp_path):
    trained().save_pretrained(tmp_path)
    text = "CD3D HLA-DQA1. The corresponding cell type is: B cell."
    assert load_tokenizer(str(tmp_path))(text)["input_ids"] == trained()(text)["input_ids"]
    for other in tmp_path.iterdir():
        if other.name != "tokenizer.json":
            other.unlink()
    assert load_tokenizer(str(tmp_path))(text)["input_ids"] == trained()(text)["input_ids"]


def test_an_answered_prompt_with_the_right_answer_is_the_corpus_itself():
    from scfm_circuits.cells.prompts import answered_prompt

    corpus = tiny_corpus()
    for place in ("answer", "query"):
        profile = load_profile("smoke", {"genes_per_cell": 6, "case_position": place})
        for cell in range(len(corpus)):
            case = answered_prompt(corpus, profile, cell, str(corpus.labels[cell]))
            end = int(corpus.answer_end[cell]) + 1
            assert case.encoded.tokens.tolist() == corpus.tokens[cell][:end].tolist()
            assert case.encoded.gene.tolist() == corpus.gene[cell][:end].tolist()
            assert list(dict.fromkeys(g for g in case.genes if g)) == corpus.genes_of(cell)
            asked = int(corpus.answer_start[cell]) - 1
            assert case.position == (end - 1 if place == "answer" else asked)
