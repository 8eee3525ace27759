"""The prompt that is traced: a cell's, or the paper's own sentence."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import model_for, tiny_corpus, tiny_profile

from scfm_circuits import InputError
from scfm_circuits.cells.tokens import encode_prompt, load_tokenizer
from scfm_circuits.circuits import calls, case_study
from scfm_circuits.common.profile import ROOT, load_profile
from scfm_circuits.models.answers import answer_prompt

FIGURE_4 = "data/paper/figure4_genes.csv"


@pytest.fixture(scope="module")
def corpus() -> Any:
    return tiny_corpus()


def written(folder: Path, text: str) -> str:
    path = folder / "sentence.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("right", "chances", "chosen", "told"), [
    ([True] * 5, [0.9, 0.1, 0.3, 0.7, 0.5], 4, "(0.5) among the 5 of 5 held-out cells"),
    ([True] * 4 + [False], [0.9, 0.1, 0.3, 0.7, 0.2], 2, "(0.3) among the 4 of 5"),
    ([False, False, True, False, False], [0.9, 0.1, 0.05, 0.7, 0.5], 2, "(0.05) among the 1 of 5"),
    ([False] * 5, [0.9, 0.1, 0.3, 0.7, 0.5], 4, "among the 5 held-out cells of that type, of "
     "which the model names none"),
    ([True] * 5, [0.5, 0.5, 0.5, 0.5, 0.5], 2, "(0.5) among the 5 of 5"),
])
def test_the_cell_of_median_probability_is_traced(monkeypatch, tmp_path, right, chances, chosen,
                                                  told):
    corpus = tiny_corpus(40, validation_share=0.5, seed=1)
    kind = max(set(corpus.labels), key=lambda one: (corpus.held_out & (corpus.labels == one)).sum())
    rows = np.flatnonzero(corpus.held_out & (corpus.labels == kind))[:5].tolist()
    assert len(rows) == 5
    profile = tiny_profile(monkeypatch, tmp_path, case_type=str(kind))
    monkeypatch.setattr(case_study, "_CANDIDATES", 5)
    monkeypatch.setattr(calls, "predict_answers", lambda model, corpus, cells: [
        kind if right[rows.index(cell)] else "no" for cell in cells])
    monkeypatch.setattr(calls, "label_probability",
                        lambda model, corpus, cell: chances[rows.index(cell)])
    found = case_study.case_study(calls.calls_of(model_for(corpus), corpus, profile))
    assert found.sentence == corpus.genes_of(rows[chosen])
    assert (found.truth, found.prediction) == (kind, kind if right[chosen] else "no")
    assert told in found.origin


@pytest.mark.parametrize("place", ["answer", "query"])
@pytest.mark.parametrize("prompt", [None, "{num_genes} genes of a {organism} cell: {genes}. Is:"])
def test_a_sentence_from_a_file_is_the_prompt(corpus, monkeypatch, tmp_path, place, prompt):
    symbols = [str(symbol) for symbol in corpus.symbols[:5]]
    sentence = [symbols[3], "NOTINTHECORPUS1", *symbols[:2]]
    name = written(tmp_path, "rank,gene\n" + "".join(
        f"{rank},{gene.lower()}\n" for rank, gene in enumerate(sentence, 1)))
    profile = tiny_profile(monkeypatch, tmp_path, case_sentence=name, case_position=place,
                           **({"prompt": prompt} if prompt else {}))
    model = model_for(corpus)
    found = case_study.case_study(calls.calls_of(model, corpus, profile))
    asked = profile.prompt.replace("{genes}", " ".join(sentence)).replace(
        "{num_genes}", "4").replace("{organism}", "Homo sapiens")
    ids = np.array(corpus.tokenizer(asked, add_special_tokens=False)["input_ids"])
    assert found.prediction == answer_prompt(model, corpus.tokenizer, ids)
    whole = asked + profile.response.replace("{label}", found.prediction)
    assert found.prompt.encoded.tokens.tolist() == corpus.tokenizer(
        whole, add_special_tokens=False)["input_ids"]
    # Its tokens spell its genes, also one that the corpus does not have.
    spelled: dict[str, str] = {}
    for gene, text in zip(found.prompt.genes, found.prompt.texts, strict=True):
        if gene is not None:
            spelled[gene] = spelled.get(gene, "") + text.removeprefix("_")
    assert spelled == {gene: gene for gene in sentence}
    end = len(found.prompt.texts) - 1
    assert found.prompt.position == (end if place == "answer" else found.prompt.answer_start - 1)
    assert found.sentence == sentence and "sentence.csv" in found.origin


@pytest.mark.parametrize(("text", "wrong"), [
    ("rank,symbol\n1,VWF\n", "no column `gene`"),
    ("gene\n", "holds no gene"),
    ("gene\nVWF\nvwf\n", "'VWF'"),
    ("gene,rank\n,1\n", "an empty gene"),
    ("gene\nVWF PTPRB\n", "'VWF PTPRB'"),
    ("", "not readable CSV"),
    ('gene\n"VWF', "not readable CSV"),
])
def test_a_file_without_a_sentence(tmp_path, text, wrong):
    with pytest.raises(InputError, match=wrong):
        case_study.read_sentence(written(tmp_path, text))
    with pytest.raises(InputError, match="does not exist"):
        case_study.read_sentence(str(tmp_path / "none.csv"))


def test_the_papers_profile_traces_figure_4():
    profile = load_profile("paper")
    assert profile.case_sentence == FIGURE_4
    sentence = case_study.read_sentence(profile.case_sentence)
    assert len(sentence) == 64 and sentence[1] == "VWF"


def test_each_of_the_nine_genes_maps_back_from_its_tokens():
    folder = os.environ.get("SCFM_TOKENIZER")
    if not folder:
        pytest.skip("SCFM_TOKENIZER is not set to a folder with Pythia's tokenizer.json")
    tokenizer, profile = load_tokenizer(folder), load_profile("paper")
    sentence = case_study.read_sentence(FIGURE_4)
    encoded, _ = encode_prompt(tokenizer, profile.prompt, sentence, range(64))
    assert int((encoded.gene >= 0).sum()) == 210  # with the sentence's full stop, 211
    for gene in pd.read_csv(ROOT / "data" / "paper" / "circuit_genes.csv")["gene"]:
        own = encoded.tokens[encoded.gene == sentence.index(gene)]
        assert tokenizer.decode(own.tolist()).strip() == gene
