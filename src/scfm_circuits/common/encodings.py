"""How a cell becomes tokens: as a sentence of gene names, or by rank-value encoding.

Rank-value encoding (Theodoris et al. 2023, Geneformer) divides a cell's raw counts by each gene's
median among the cells that express it in the model's training data, and takes the genes, each a
token, from the largest quotient down. So a gene that is high everywhere does not come first.
"""

import re
from typing import Final, NamedTuple

ENSEMBL = re.compile(r"^ENS[A-Z]*G\d{6,}", re.IGNORECASE)
"""The beginning of a gene's Ensembl identifier, of any species."""
CELL_SENTENCE: Final = "cell_sentence"


class RankValue(NamedTuple):
    """One model's way of it: the special tokens of its dictionary, those that stand before and
    after each cell's genes, and the tokens that a cell has at most."""

    special: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    most: int


RANK_VALUE = {
    "geneformer_v1": RankValue(("<pad>", "<mask>"), (), (), 2048),
    "geneformer_v2": RankValue(("<pad>", "<mask>", "<cls>", "<eos>"), ("<cls>",), ("<eos>",), 4096),
    "maxtoki": RankValue(("<pad>", "<mask>", "<bos>", "<eos>"), ("<bos>",), ("<eos>",), 4096),
}
"""By the profile's `encoding`. Sources: Geneformer, tokenizer.py; MaxToki's token dictionary."""
OWN_DICTIONARY: Final = "train"
"""The `token_dictionary` that a run makes of its own training cells."""
MARKS = frozenset(("<cls>", "<bos>", "<eos>"))
"""Special tokens that tell one dictionary from another."""
