"""Asking the model for a cell's type, and what it answers."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from scfm_circuits.common.labels import normal_label
from scfm_circuits.models.mlp_sites import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from scfm_circuits.cells.corpus import Corpus

SHORTEST = 24
"""Tokens that an answer may have where every label has fewer."""


def predict_answers(model: nn.Module, corpus: "Corpus", cells: Sequence[int] | np.ndarray
                    ) -> list[str]:
    """The model's own answer to each cell's prompt, decoded greedily: a label of the corpus where
    the model gives back what a cell of that label is trained on, else its words.
    """
    return answer_prompts(model, corpus, [corpus.tokens[cell][: corpus.answer_start[cell]]
                                          for cell in cells])


def answer_prompts(model: nn.Module, corpus: "Corpus", prompts: Sequence[np.ndarray]
                   ) -> list[str]:
    """`predict_answers` to prompts that need not be the corpus's, each (length,) tokens."""
    _, one_of_each = np.unique(corpus.labels, return_index=True)
    taught = {}
    for cell in one_of_each:
        tokens = corpus.tokens[cell][corpus.answer_start[cell] : corpus.answer_end[cell] + 1]
        taught[_text(corpus.tokenizer, tokens.tolist())] = str(corpus.labels[cell])
    longest = int(np.max(corpus.answer_end - corpus.answer_start)) + 2  # and the end of text
    return [answer_prompt(model, corpus.tokenizer, prompt, max(SHORTEST, longest), taught)
            for prompt in prompts]


@torch.no_grad()
def answer_prompt(model: nn.Module, tokenizer: "PreTrainedTokenizerFast", prompt: np.ndarray,
                  new_tokens: int = SHORTEST, taught: Mapping[str, str] = MappingProxyType({})
                  ) -> str:
    """Greedy answer to one tokenized prompt (length,).

    taught: labels by the text that a cell of each is trained on; an answer that is one of these, or
    goes on behind one of these beyond `new_tokens`, is that label. Any other is the model's words,
    written as labels are, without the full stop that ends them. A cell type may hold a full stop of
    its own, so the model's end of text ends the answer; other words that go on are cut at their
    first full stop.
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
    text = _text(tokenizer, produced)
    if ended:
        return taught[text] if text in taught else normal_label(text.removesuffix("."))
    begun = max((one for one in taught if _continues(text, one)), key=len, default=None)
    return normal_label(text.partition(".")[0]) if begun is None else taught[begun]


@torch.no_grad()
def label_probability(model: nn.Module, corpus: "Corpus", cell: int) -> float:
    """Probability that the model answers a cell's prompt with its label: of all tokens of the
    answer that it is trained on, its full stop included, one after the other."""
    tokens = torch.from_numpy(np.asarray(corpus.tokens[cell]))[None].to(device_of(model))
    start, stop = int(corpus.answer_start[cell]), int(corpus.answer_end[cell]) + 1
    asked, past, total = tokens[:, :start], None, 0.0
    for wanted in tokens[0, start:stop]:
        output = model(input_ids=asked, past_key_values=past, use_cache=True)
        total += float(output.logits[0, -1].double().log_softmax(-1)[wanted])
        past, asked = output.past_key_values, wanted[None, None]
    return float(np.exp(total))


def _text(tokenizer: "PreTrainedTokenizerFast", tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False)).strip()


def _continues(text: str, start: str) -> bool:
    """Whether a text goes on behind `start`, which must not end within one of its words."""
    return text.startswith(start) and not (text[len(start) :][:1].isalnum()
                                           and start[-1:].isalnum())
