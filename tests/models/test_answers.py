"""What the model answers: a model that gives back its training text is right in every cell."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ranked, tiny_cells, tiny_profile
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus, build_corpus, load_corpus
from scfm_circuits.circuits.calls import calls_of
from scfm_circuits.circuits.case_study import case_study
from scfm_circuits.circuits.planted_genes import named_right
from scfm_circuits.common.labels import normal_label
from scfm_circuits.common.profile import Profile, load_profile
from scfm_circuits.models.answers import label_probability, predict_answers

ODD = ["CD19+ B ", "hematopoietic multipotent progenitor cell", "B", "B cell", "B cell, naive",
       "B cell. naive", "B cell.", "CD4$+$ T", "a|b `c` *d*", "Mu\u0308ller  glia", "細胞 🧬",
       "nan", "-", "St. x. y.", "T\u200b cell", "{label}", "\\frac{a}{b}", "<b>T</b>",
       "a very long name " * 30, ".", "?!", "é" * 50]


class Perfect(nn.Module):
    """Gives back each cell's training text, token by token; `ends`: with its end of text."""

    def __init__(self, corpus: Corpus, *, ends: bool = True) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.size, self.texts = len(corpus.tokenizer), {}
        more = [] if ends else corpus.tokenizer(" And. so on.")["input_ids"] * 20
        for cell in range(len(corpus)):
            start, end = int(corpus.answer_start[cell]), int(corpus.answer_end[cell]) + 1
            tokens = corpus.tokens[cell].tolist()
            rest = tokens[start : end + 1] if ends else tokens[start:end] + more
            assert self.texts.setdefault(tuple(tokens[:start]), rest) == rest

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> Any:
        rest = (past_key_values if past_key_values is not None
                else self.texts[tuple(input_ids[0].tolist())])
        logits = torch.zeros(1, input_ids.shape[1], self.size)
        logits[0, -1, rest[0]] = 1
        return SimpleNamespace(logits=logits, past_key_values=rest[1:])


def corpus_of(labels: list[str], n: int, profile: Profile) -> Corpus:
    return build_corpus(ranked(tiny_cells(n, labels=labels), profile.genes_per_cell), profile)


def accuracy(corpus: Corpus, **options: Any) -> float:
    cells = np.flatnonzero(corpus.held_out)
    said = predict_answers(Perfect(corpus, **options), corpus, cells)
    return float(np.mean(said == corpus.labels[cells]))


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Corpus, Profile]:
    """Cells of odd labels, read from a file."""
    n = 4 * len(ODD)
    cells = tiny_cells(n, labels=ODD)
    labels = [ODD[i % len(ODD)] for i in range(n)]
    anndata.AnnData(cells.expression, obs=pd.DataFrame({"type": labels}, index=cells.cell_ids),
                    var=pd.DataFrame(index=list(cells.symbols))).write_h5ad(tmp_path / "odd.h5ad")
    profile = tiny_profile(
        monkeypatch, tmp_path, cells=str(tmp_path / "odd.h5ad"), matrix="X", label_column="type",
        validation_share=0.6, vocabulary_size=320, case_type=" CD19+  B\n", seed=1)
    return load_corpus(profile), profile


def test_a_perfect_model_is_right_for_odd_labels(read: tuple[Corpus, Profile]) -> None:
    corpus, profile = read
    assert set(corpus.labels) == {normal_label(label) for label in ODD}
    assert set(corpus.labels[corpus.held_out]) == set(corpus.labels)
    assert accuracy(corpus) == 1
    model = Perfect(corpus)
    assert predict_answers(model, corpus, range(len(corpus))) == corpus.labels.tolist()
    study = case_study(calls_of(model, corpus, profile))  # type: ignore[arg-type]
    assert study.prediction == study.truth == profile.case_type == "CD19+ B"
    assert "names exactly" in study.origin and "none" not in study.origin
    right = named_right(model, corpus, 1)  # type: ignore[arg-type]
    assert set(corpus.labels[right]) == set(corpus.labels)


def test_a_perfect_model_that_goes_on_after_its_answer_is_right(read: tuple[Corpus, Profile]
                                                                ) -> None:
    # Of labels that continue one another the longest that is there is taken.
    assert accuracy(read[0], ends=False) == 1


def test_the_pages_say_which_labels_were_rewritten(tmp_path: Path, read: tuple[Corpus, Profile]
                                                   ) -> None:
    said = [one for one in read[0].decisions if "labels were written" in one]
    assert len(said) == 1 and "4 of 22" in said[0] and "are one type" not in said[0]


@pytest.mark.parametrize("response", [" {label}.", " {label}", " It is a {label}, I think.",
                                      "{label}!", " <{label}>.\n"])
def test_a_perfect_model_is_right_whatever_the_response(response: str) -> None:
    profile = load_profile("smoke", {
        "genes_per_cell": 6, "max_cells": None, "validation_share": 0.5, "response": response,
        "case_type": "B cell"})
    corpus = corpus_of(["B cell", "B cell. x", "T"], 24, profile)
    assert accuracy(corpus) == 1 and accuracy(corpus, ends=False) == 1
    calls = calls_of(Perfect(corpus), corpus, profile)  # type: ignore[arg-type]
    assert case_study(calls).prediction == "B cell"


@settings(max_examples=25)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40).map(normal_label),
                min_size=2, max_size=5, unique=True))
def test_a_perfect_model_is_right_for_any_labels(labels: list[str]) -> None:
    profile = load_profile("smoke", {"genes_per_cell": 6, "max_cells": None,
                                     "validation_share": 0.5, "vocabulary_size": 300})
    assert accuracy(corpus_of(labels, 12, profile)) == 1


@pytest.mark.parametrize("labels", [["B", "T<|endoftext|>x"], ["<|endoftext|>", "B"]])
def test_a_label_that_ends_a_text_is_refused(labels: list[str]) -> None:
    profile = load_profile("smoke", {"genes_per_cell": 6, "max_cells": None})
    with pytest.raises(InputError, match=r"holds '<\|endoftext\|>'.*rename it"):
        corpus_of(labels, 12, profile)


def test_a_model_that_ends_nowhere_gives_a_bounded_answer() -> None:
    profile = load_profile("smoke", {"genes_per_cell": 6, "max_cells": None,
                                     "validation_share": 0.5})
    corpus = corpus_of(["B cell", "CD4+ T cell"], 8, profile)
    model = Perfect(corpus)
    token = corpus.tokenizer(" CD8A")["input_ids"][-1]
    model.texts = {key: [token] * 1000 for key in model.texts}
    longest = np.max(corpus.answer_end - corpus.answer_start) + 2
    answers = predict_answers(model, corpus, range(3))
    assert {len(corpus.tokenizer(one)["input_ids"]) for one in answers} <= {max(24, int(longest))}


def test_the_probability_of_a_label_is_that_of_its_tokens_in_one_pass(corpus: Corpus, model: Any
                                                                      ) -> None:
    for cell in range(4):
        start, stop = int(corpus.answer_start[cell]), int(corpus.answer_end[cell]) + 1
        tokens = torch.from_numpy(np.array(corpus.tokens[cell][:stop]))
        with torch.no_grad():
            chances = model(input_ids=tokens[None]).logits[0].double().softmax(-1)
        expected = chances[torch.arange(start - 1, stop - 1), tokens[start:]].prod()
        found = label_probability(model, corpus, cell)
        assert found == pytest.approx(float(expected), rel=1e-4) and 0 < found < 1
