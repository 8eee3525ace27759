"""The call is read where the answer parts from the other labels, and its parts add up to it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import model_for, tiny_corpus, tiny_profile, tiny_transcoders, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_architectures import FAMILIES, LinearModel, tiny

from scfm_circuits.cells.prompts import AnsweredPrompt, answered_prompt
from scfm_circuits.circuits.attribution import contributions, logit_direction
from scfm_circuits.circuits.calls import trace_call
from scfm_circuits.circuits.contrast import (
    Contrast,
    answers_by_label,
    contrast_of,
)
from scfm_circuits.circuits.direct_effects import direct_effects, sources_of
from scfm_circuits.circuits.frozen import freeze

END = 0


def corpus_of(answers: dict[str, list[int]]) -> Any:
    """As much of a corpus as a contrast needs: one cell of each label, answered at place 2."""
    width = 3 + max(map(len, answers.values()))
    rows = np.full((len(answers), width), END)
    for row, answer in zip(rows, answers.values(), strict=True):
        row[:2], row[2 : 2 + len(answer)] = 99, answer
    ends = np.array([1 + len(answer) for answer in answers.values()])
    return SimpleNamespace(tokens=rows, labels=np.array(list(answers)),
                           answer_start=np.full(len(answers), 2), answer_end=ends,
                           tokenizer=SimpleNamespace(eos_token_id=END))


def prompt_of(answer: list[int]) -> AnsweredPrompt:
    encoded: Any = SimpleNamespace(tokens=np.array([99, 99, *answer]))
    return AnsweredPrompt(encoded, [], [], 2, 1 + len(answer))


BLOOD = {"CD14+": [5, 14, 8], "CD19+ B": [5, 19, 7, 8], "CD19+ T": [5, 19, 6, 8],
         "CD34+": [5, 34, 8], "Dendritic": [9, 8]}


@pytest.mark.parametrize(("answer", "position", "token", "others"), [
    ([5, 14, 8], 2, 14, {19: ("CD19+ B", "CD19+ T"), 34: ("CD34+",)}),
    # A shared beginning, on which four of five labels are of one mind, is no call ...
    ([5, 19, 7, 8], 2, 19, {14: ("CD14+",), 34: ("CD34+",)}),
    # ... but for the label that does not share it, it is.
    ([9, 8], 1, 9, {5: ("CD14+", "CD19+ B", "CD19+ T", "CD34+")}),
    # The model's own words: no label, or the beginning of one.
    ([7, 8], 1, 7, {5: ("CD14+", "CD19+ B", "CD19+ T", "CD34+"), 9: ("Dendritic",)}),
    ([5], 2, END, {14: ("CD14+",), 19: ("CD19+ B", "CD19+ T"), 34: ("CD34+",)}),
])
def test_it_stands_where_most_labels_part(answer, position, token, others):
    found = contrast_of(corpus_of(BLOOD), prompt_of(answer))
    assert (found.position, found.token) == (position, token)
    assert dict(zip(found.others, found.labels, strict=True)) == others


def test_a_label_that_goes_on_parts_at_the_others_end():
    corpus = corpus_of({"T": [4], "T cell": [4, 6]})
    assert contrast_of(corpus, prompt_of([4]))[:3] == (2, END, (6,))
    assert contrast_of(corpus, prompt_of([4, 6]))[:3] == (2, 6, (END,))


def test_a_run_of_one_type_has_no_contrast_but_a_reading():
    found = contrast_of(corpus_of({"B": [4, 8]}), prompt_of([4, 8]))
    assert found == Contrast(1, 4)
    logits = torch.randn(3, 12, dtype=torch.float64)
    assert torch.equal(found.of(logits), logits[:, 4] - logits.mean(dim=1))


def test_it_is_the_log_odds_among_the_tokens_that_labels_offer():
    logits = torch.randn(12, dtype=torch.float64)
    contrast = Contrast(1, 4, (2, 9))
    p = logits[[4, 2, 9]].softmax(-1)
    assert float(contrast.of(logits)) == pytest.approx(float((p[0] / (1 - p[0])).log()))


def test_answers_are_those_that_cells_are_trained_on():
    corpus = tiny_corpus(16)
    for label, answer in answers_by_label(corpus).items():
        text = corpus.tokenizer.decode(answer[:-1], clean_up_tokenization_spaces=False)
        assert text.strip() == f"{label}." and answer[-1] == corpus.tokenizer.eos_token_id


@settings(max_examples=40, deadline=None)
@given(family=st.sampled_from(FAMILIES), layers=st.integers(1, 3), n=st.integers(1, 8),
       others=st.lists(st.integers(0, 39).filter(lambda token: token != 7), min_size=0,
                       max_size=6, unique=True), seed=st.integers(0, 10_000))
def test_its_reading_is_the_gradient_and_closes(family, layers, n, others, seed):
    shape = {"layers": layers, "heads": 2, "value_heads": 1, "head_size": 6, "seed": seed}
    model = tiny(family, **shape)
    run = freeze(model, tiny_transcoders(model, seed=seed), tokens(n, seed=seed))
    contrast = Contrast(n - 1, 7, tuple(others))
    node, reading = contrast.start(run)
    assert reading.value == pytest.approx(float(contrast.of(run.logits[n - 1])), abs=1e-12)
    assert node.value == float(reading.value)
    assert abs(contributions(run, reading).total() - reading.value) < 1e-10
    # Autograd through transformers' own code, with patterns and scales frozen.
    linear = LinearModel(tiny(family, **shape), run)
    leaves = [part.clone().requires_grad_() for part in (run.residual[0], run.mlp_out)]
    of_embedding, of_mlp = torch.autograd.grad(
        contrast.of(linear(*leaves).logits[n - 1]), leaves)
    sources = sources_of(run, [reading])
    effects, constant = (part[0] for part in direct_effects(run, sources, [reading]))
    assert abs(effects.sum() + constant - reading.value) < 1e-10
    written = torch.einsum("lfd,lnd->lnf", run.transcoders.W_dec, of_mlp) * run.activations
    assert torch.allclose(effects[: sources.n_active], written[run.activations > 0], atol=1e-10)
    assert torch.allclose(effects[sources.embeddings :], (run.residual[0] * of_embedding).sum(-1),
                          atol=1e-10)


def test_against_one_token_it_is_the_difference_of_two_logits():
    model = tiny("parallel", layers=2, heads=2, value_heads=2, head_size=4, seed=0)
    run = freeze(model, tiny_transcoders(model), tokens(5))
    one, two = (logit_direction(run, token, 4) for token in (7, 3))
    both = logit_direction(run, 7, 4, [3])
    assert torch.allclose(both.vector, one.vector - two.vector, atol=1e-12)
    assert torch.allclose(both.value, one.value - two.value, atol=1e-12)


def test_the_circuit_of_a_call_starts_at_it(monkeypatch, tmp_path):
    corpus = tiny_corpus(16)
    model = model_for(corpus)
    profile = tiny_profile(monkeypatch, tmp_path, circuit_nodes=30)
    case = answered_prompt(corpus, profile, 1, str(corpus.labels[1]))
    run = freeze(model, tiny_transcoders(model), case.encoded.tokens)
    contrast = contrast_of(corpus, case)
    circuit = trace_call(run, contrast, profile)
    target = circuit.nodes[circuit.target]
    assert (target.kind, target.position, target.index) == (
        "logit", contrast.position, contrast.token)
    assert contrast.position >= case.answer_start - 1 and contrast.others
    assert circuit.closure_max_relative < 1e-10 and len(circuit.nodes) > 5
