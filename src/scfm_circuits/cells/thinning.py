"""Cells as if they had been sequenced a little less deeply: in training no sentence comes twice.

Of the molecules that were counted a share is kept at random, so each count becomes a binomial draw,
and the genes are ranked anew.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.sparse as sp

from scfm_circuits import InputError
from scfm_circuits.cells.ranking import top_genes
from scfm_circuits.cells.tokens import Prompts, encode_all, question
from scfm_circuits.common.profile import Profile

if TYPE_CHECKING:
    from scfm_circuits.cells.corpus import Corpus


class Counts(NamedTuple):
    """Counts of the corpus's cells: (n_cells, m) sparse, and the (m,) gene ids of their columns."""

    values: sp.csr_matrix
    genes: np.ndarray


def read_counts(profile: Profile, corpus: "Corpus") -> Counts | None:
    """The cells' counts of the genes that stand in any sentence; None if values are no counts.

    Other genes are left out: the tokenizer, and what is counted later, knows these alone. Raises
    InputError as `reading.read_chunks`, or if the cells are not the corpus's any more.
    """
    from scfm_circuits.cells.reading import read_chunks

    genes, parts = corpus.occurring, []
    about = read_chunks(profile, lambda rows, part: parts.append(sp.csr_matrix(part[:, genes])))
    if not np.array_equal(about.cell_ids, corpus.cell_ids):
        raise InputError(f"The cells {profile.cells} have changed since their sentences were made; "
                         "run the same command again.")
    values = sp.csr_matrix(sp.vstack(parts, format="csr"))
    whole = np.array_equal(values.data, np.rint(values.data))
    return Counts(values, genes) if whole else None


def thinned(counts: Counts, cells: np.ndarray, least: float, k: int, rng: np.random.Generator
            ) -> np.ndarray:
    """(n, k) gene ids of some cells' thinned sentences, most expressed first, -1 after the last.

    Each cell keeps a share of its molecules that is drawn evenly between `least` and 1. A cell of
    which nothing would be left keeps all.
    """
    part = counts.values[cells]
    sizes = np.diff(part.indptr)
    kept = rng.binomial(part.data.astype(np.int64),
                        np.repeat(rng.uniform(least, 1, len(cells)), sizes))
    row = np.repeat(np.arange(len(cells)), sizes)
    bare = np.bincount(row, weights=kept, minlength=len(cells)) == 0
    part.data = np.where(bare[row], part.data, kept).astype(np.float32)
    part.eliminate_zeros()
    found = top_genes(part, np.arange(len(cells)), k, int(rng.integers(2**31)))
    return np.where(found >= 0, counts.genes[found], -1).astype(np.int32)


def thinned_prompts(corpus: "Corpus", profile: Profile, counts: Counts, cells: np.ndarray,
                    rng: np.random.Generator) -> Prompts:
    """`thinned` sentences of some cells as prompts with their answers."""
    ranking = thinned(counts, cells, profile.model_thinning, profile.genes_per_cell, rng)
    answers = [profile.response.replace("{label}", label) for label in corpus.labels[cells]]
    return encode_all(corpus.tokenizer, question(profile), corpus.symbols, ranking, answers)
