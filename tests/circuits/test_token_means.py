"""Kinds are the same in every cell, and means are over the tokens of a kind."""

import numpy as np
import pytest
import torch
from helpers import model_for, tiny_corpus, tiny_profile, tiny_transcoders

from scfm_circuits.cells.prompts import answered_prompt
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.interventions import held_at_means
from scfm_circuits.circuits.token_means import mean_activations, token_kinds
from scfm_circuits.transcoders.transcoder import Variant


def test_kinds_are_the_same_word_for_word_whatever_the_number_of_genes():
    # word word | genes, white space that belongs to none | question | answer
    first = token_kinds(np.array([-1, -1, 3, 3, -1, 4, -1, -1, -1, -1, -1]),
                        np.array([-1, -1, 0, 1, -1, 0, -1, -1, -1, -1, -1]), 8)
    second = token_kinds(np.array([-1, -1, 7, -1, -1, -1]), np.array([-1, -1, 0, -1, -1, -1]), 5)
    assert first[:2].tolist() == second[:2].tolist()
    assert len({*first[:2], *first[6:8], *range(4)}) == 8, "each word is a kind of its own"
    assert first[2:6].tolist() == [0, 1, 1, 0]
    assert second[2] == 0
    assert first[6:8].tolist() == second[3:5].tolist()
    assert first[8:].tolist() == [2, 2, 3]
    assert second[5] == 3


def test_a_prompt_without_an_answer_has_its_words_only():
    kinds = token_kinds(np.array([2, -1, -1]), np.array([0, -1, -1]), 3)
    assert kinds.tolist() == token_kinds(np.array([2, -1, -1, -1]), np.array([0, -1, -1, -1]),
                                         3)[:3].tolist()


@pytest.mark.parametrize("variant", [Variant(), Variant("topk", 4)], ids=str)
def test_means_are_over_tokens_of_a_kind(monkeypatch, tmp_path, variant):
    corpus = tiny_corpus(9)
    model = model_for(corpus)
    transcoders = tiny_transcoders(model, variant=variant)
    cells = np.array([0, 3, 5, 8])
    means = mean_activations(model, transcoders, corpus, cells, forward_cells=3)
    sums: dict[int, list[np.ndarray]] = {}
    for cell in cells:
        n = int(corpus.answer_end[cell]) + 1
        ids = torch.from_numpy(corpus.tokens[cell, :n])
        z = freeze(model, transcoders, ids).activations.numpy()
        kinds = token_kinds(corpus.gene[cell, :n], corpus.place[cell, :n],
                            int(corpus.answer_start[cell]))
        for position, kind in enumerate(kinds):
            sums.setdefault(int(kind), []).append(z[:, position])
    assert means.counts.tolist() == [len(sums.get(k, [])) for k in range(len(means.counts))]
    for kind, found in sums.items():
        np.testing.assert_allclose(means.activations[:, kind], np.mean(found, axis=0), atol=1e-10)
    # A cell's prompt, made anew for tracing, has the kinds of the corpus.
    profile = tiny_profile(monkeypatch, tmp_path)
    case = answered_prompt(corpus, profile, 1, str(corpus.labels[1]))
    kinds = token_kinds(case.encoded.gene, case.encoded.place, case.answer_start)
    run = freeze(model, transcoders, case.encoded.tokens)
    assert held_at_means(run, means, kinds).mlp_out.shape == run.mlp_out.shape
    assert kinds[case.position] == 3
