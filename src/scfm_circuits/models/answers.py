"""Asking the model for a cell's type, and what it answers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from scfm_circuits.common.randomness import generator
from scfm_circuits.models.mlp_sites import device_of

if TYPE_CHECKING:
    from scfm_circuits.cells.corpus import Corpus


class Answered(NamedTuple):
    """What the model answers for held-out cells, and what would be right."""

    accuracy: float
    """Share of the answers that are the cell's label to the letter."""
    majority: float
    """Share of the cells for which always answering the training cells' commonest type is right."""
    by_type: dict[str, np.ndarray]
    """Columns of a table with a row for each true type, in alphabetical order: cell type, cells,
    right (how many), commonest_answer (of equally common ones the first by alphabet)."""


def held_out_answers(model: nn.Module, corpus: "Corpus", seed: int, most: int = 500) -> Answered:
    """Ask the model for the types of the held-out cells, or of `most` of them drawn at random."""
    held_out = np.flatnonzero(corpus.held_out)
    cells = np.sort(generator(seed, "cells asked for their type").permutation(held_out)[:most])
    answers, truth = np.array(predict_answers(model, corpus, cells)), corpus.labels[cells]
    right, types = answers == truth, np.unique(truth)
    return Answered(float(right.mean()),
                    float(np.mean(truth == _commonest(corpus.labels[~corpus.held_out]))), {
        "cell type": types,
        "cells": np.array([np.sum(truth == one) for one in types]),
        "right": np.array([np.sum(right[truth == one]) for one in types]),
        "commonest_answer": np.array([_commonest(answers[truth == one]) for one in types])})


def _commonest(texts: np.ndarray) -> str:
    """The commonest text; of equally common ones the first by alphabet."""
    values, counts = np.unique(texts, return_counts=True)
    return str(values[counts.argmax()])


@torch.no_grad()
def predict_answers(model: nn.Module, corpus: "Corpus",
                    cells: Sequence[int] | np.ndarray, new_tokens: int = 24) -> list[str]:
    """The model's own answer to each cell's prompt, decoded greedily, without its full stop."""
    answers = []
    for cell in cells:
        prompt = corpus.tokens[cell][: corpus.answer_start[cell]]
        answers.append(answer_prompt(model, corpus.tokenizer, prompt, new_tokens))
    return answers


@torch.no_grad()
def answer_prompt(model: nn.Module, tokenizer, prompt: np.ndarray,  # type: ignore[no-untyped-def]
                  new_tokens: int = 24) -> str:
    """Greedy answer to one tokenized prompt (length,), without the full stop that ends it.

    A cell type may hold a full stop of its own, so the model's end of text ends the answer; one
    that goes on beyond `new_tokens` is cut at its first full stop.
    """
    tokens = torch.from_numpy(np.asarray(prompt))[None].to(device_of(model))
    past, produced, ended = None, [], False
    for _ in range(new_tokens):
        output = model(input_ids=tokens, past_key_values=past, use_cache=True)
        past, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
        ended = int(tokens) == tokenizer.eos_token_id
        if ended:
            break
        produced.append(int(tokens))
    text = tokenizer.decode(produced, clean_up_tokenization_spaces=False).strip()
    return (text.removesuffix(".") if ended else text.partition(".")[0]).strip()
