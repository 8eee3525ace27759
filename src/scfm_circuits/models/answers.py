"""Asking the model for a cell's type, and what it answers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from scfm_circuits.models.mlp_sites import device_of

if TYPE_CHECKING:
    from scfm_circuits.cells.corpus import Corpus

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
