"""The prompt whose call is traced: a held-out cell's, or a sentence from a file (Figure 4).

The paper traces one prompt, which its Figure 4 prints. With the paper's model and tokenizer that
very sentence can be traced; any other run takes a cell of its own. What may be traced in it, how
special that is and what its circuit says is in `case_targets`.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from scfm_circuits import InputError
from scfm_circuits.cells.prompts import AnsweredPrompt, answered_sentence
from scfm_circuits.cells.tokens import encode_prompt, question
from scfm_circuits.circuits.calls import Calls
from scfm_circuits.common.profile import located
from scfm_circuits.models.answers import answer_prompts

_CANDIDATES = 100
"""Held-out cells of the type, in the file's order, among which one is chosen."""


class CaseStudy(NamedTuple):
    """A prompt and the model's own answer to it.

    prompt: tokens, texts and genes, the answer's start and the position of the target.
    sentence: its genes in rank order; prediction: the answer without its full stop, or the nearest
    type; truth: the cell's label; origin: where the sentence is from, as the page says it.
    """

    prompt: AnsweredPrompt
    sentence: list[str]
    prediction: str
    truth: str
    origin: str


def case_study(calls: Calls) -> CaseStudy:
    """The profile's case, called by the model.

    With `case_sentence` it is that file's genes, labelled `case_type`. Else it is neither the
    clearest cell nor the first: of the held-out cells of the type `case_type` (the first
    `_CANDIDATES`) that the model names rightly, or of all if it names none so, the one whose
    label has the median probability, or state call (the lower of two). The rule looks at no feature
    or circuit. Raises InputError for a file that holds no sentence.
    """
    model, corpus, profile = calls.model, calls.corpus, calls.profile
    if profile.case_sentence is not None:
        sentence = read_sentence(profile.case_sentence)
        ids = range(len(sentence))
        # A prompt that names the number of genes names that of this sentence.
        named = profile.model_copy(update={"genes_per_cell": len(sentence)})
        asked, _ = encode_prompt(corpus.tokenizer, question(named), sentence, ids)
        [prediction] = answer_prompts(model, corpus, [asked.tokens])
        prompt = answered_sentence(corpus.tokenizer, named, sentence, ids, prediction)
        return CaseStudy(prompt, sentence, prediction, profile.case_type,
                         f"that of {Path(profile.case_sentence).name}")
    tried = np.flatnonzero(corpus.held_out & (corpus.labels == profile.case_type))[:_CANDIDATES]
    answers = calls.said(tried)
    right = np.flatnonzero(answers == profile.case_type)
    among = right if len(right) else np.arange(len(tried))
    chances = calls.sureness(tried[among])
    middle = int(np.argsort(chances, kind="stable")[(len(among) - 1) // 2])
    cell, prediction = int(tried[among[middle]]), str(answers[among[middle]])
    which = (f"{len(right)} of {len(tried)} held-out cells of that type that {calls.named}"
             if len(right) else f"{len(tried)} held-out cells of that type, {calls.none_named}")
    return CaseStudy(calls.prompt(cell, prediction), corpus.genes_of(cell),
                     prediction, str(corpus.labels[cell]),
                     f"that of the cell {calls.median_of} ({chances[middle]:.2g}) among the "
                     f"{which}")


def read_sentence(name: str) -> list[str]:
    """The genes of a CSV file's column `gene`, top to bottom, upper case.

    name: its path, from the project's root if relative. Raises InputError for a file without such a
    column, or in which a gene is empty, repeated or holds a space.
    """
    path = located("case_sentence", name)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise InputError(f"The sentence {path} does not exist; check `case_sentence` in the "
                         "profile.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"The sentence {path} is not readable CSV ({error}); check "
                         "`case_sentence` in the profile.") from None
    if "gene" not in table.columns:
        raise InputError(f"The sentence {path} has no column `gene`; write one gene a row under "
                         "that heading, the most expressed first.")
    genes = [gene.strip().upper() for gene in table["gene"]]
    bad = next((gene for place, gene in enumerate(genes)
                if not gene or len(gene.split()) > 1 or gene in genes[:place]), None)
    if bad is not None or not genes:
        wrong = "no gene" if not genes else f"the gene {bad[:40]!r}" if bad else "an empty gene"
        raise InputError(f"The sentence {path} holds {wrong}; each row is one gene without a "
                         "space, and no gene comes twice.")
    return genes
