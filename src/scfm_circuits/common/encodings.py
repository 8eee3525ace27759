"""How a cell becomes tokens: as a sentence of gene names, by rank-value encoding, or in bins.

Rank-value encoding (Theodoris et al. 2023, Geneformer) divides a cell's raw counts by each gene's
median among the cells that express it in the model's training data, and takes the genes, each a
token, from the largest quotient down. So a gene that is high everywhere does not come first.

Binning (Cui et al. 2024, scGPT) gives each gene that a cell expresses a level from 1 to 50, by the
quantiles of the cell's own values; a token is a gene at a level.
"""

import re
from typing import Final, NamedTuple

ENSEMBL = re.compile(r"^ENS[A-Z]*G\d{6,}", re.IGNORECASE)
"""The beginning of a gene's Ensembl identifier, of any species."""
CELL_SENTENCE: Final = "cell_sentence"
BINNED: Final = "binned"
LEVELS: Final = 51
"""Levels of a gene under `BINNED`, 0 among them, which special tokens have."""


class GenesAsTokens(NamedTuple):
    """One model's way of it: the special tokens of its dictionary, those that stand before and
    after each cell's genes, and the tokens that a cell has at most."""

    special: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    most: int


RANK_VALUE = {
    "geneformer_v1": GenesAsTokens(("<pad>", "<mask>"), (), (), 2048),
    "geneformer_v2": GenesAsTokens(("<pad>", "<mask>", "<cls>", "<eos>"), ("<cls>",), ("<eos>",),
                                   4096),
    "maxtoki": GenesAsTokens(("<pad>", "<mask>", "<bos>", "<eos>"), ("<bos>",), ("<eos>",), 4096),
}
"""By the profile's `encoding`. Sources: Geneformer, tokenizer.py; MaxToki's token dictionary."""
GENE_TOKENS = RANK_VALUE | {
    BINNED: GenesAsTokens(("<pad>", "<cls>", "<eoc>"), ("<cls>",), (), 1200)}
"""All ways in which a gene is a token. Source of the last: scGPT's vocab.json and args.json."""
OWN_DICTIONARY: Final = "train"
"""The `token_dictionary` that a run makes of its own training cells."""
MARKS = frozenset(("<cls>", "<bos>", "<eos>"))
"""Special tokens that tell one dictionary from another."""
