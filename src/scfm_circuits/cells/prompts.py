"""Prompts with an answer: what a circuit is traced on, and an intervention measured on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.cells.tokens import Encoded, encode_prompt, question, token_texts
from scfm_circuits.common.profile import Profile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class AnsweredPrompt(NamedTuple):
    """A sentence's prompt with an answer: tokens, their texts and genes, the target's position.

    Where nothing is asked in words there is no answer: `answer_start` is the length, and `position`
    the last token.
    """

    encoded: Encoded
    texts: list[str]
    genes: list[str | None]
    answer_start: int
    position: int


def answered_sentence(tokenizer: "PreTrainedTokenizerFast", profile: Profile, genes: Sequence[str],
                      gene_ids: Sequence[int] | np.ndarray, answer: str) -> AnsweredPrompt:
    """A sentence's prompt followed by the given answer, as the case study traces it.

    `position` is where the profile's `case_position` reads the target: the answer's last token, or
    the prompt's.
    """
    encoded, start = encode_prompt(tokenizer, question(profile), genes, gene_ids,
                                   profile.response.replace("{label}", answer))
    position = len(encoded.tokens) - 1 if profile.case_position == "answer" else start - 1
    names = dict(zip(gene_ids, genes, strict=True))
    return AnsweredPrompt(encoded, token_texts(tokenizer, encoded.tokens),
                          [names.get(gene) for gene in encoded.gene], start, position)


def answered_prompt(corpus: Corpus, profile: Profile, cell: int, answer: str) -> AnsweredPrompt:
    """`answered_sentence` of a cell of the corpus, with the corpus's gene ids; where genes are
    tokens, the cell as it is, since nothing is asked in words and no answer follows."""
    if not corpus.has_answers:
        n = int(corpus.lengths[cell])
        encoded = Encoded(*(getattr(corpus, name)[cell, :n] for name in Encoded._fields))
        return AnsweredPrompt(encoded, corpus.pieces(cell), [
            str(corpus.symbols[gene]) if gene >= 0 else None for gene in encoded.gene], n, n - 1)
    return answered_sentence(corpus.tokenizer, profile, corpus.genes_of(cell),
                             corpus.gene_ids_of(cell), answer)
