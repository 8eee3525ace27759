"""What features fire on in the held-out cells alone, beside the counts over all cells.

Statistics count all cells together. To choose an explanation on some cells and to score it on
others, one more pass over the held-out cells is enough: the training cells' counts are the
difference.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scfm_circuits.cells.corpus import Corpus, of_cells
from scfm_circuits.common.kept import kept_arrays, stamp_of
from scfm_circuits.features.counting import count_activations
from scfm_circuits.features.pair_counts import pack_matrices, unpack_matrices
from scfm_circuits.features.statistics import FeatureStatistics, corpus_pairs, gene_digest
from scfm_circuits.transcoders.training.settings import Control, stage_folder, training_stamp
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM

    from scfm_circuits.common.profile import Profile

_ROOMS = ("features", "interpretability/mentions", "transcoders/active_entries")


class Mentions(NamedTuple):
    """On which mentions of genes n features fire, over some cells.

    indptr, gene, fired: sparse (n, n_genes), mentions of the gene on which the feature fires.
    present: (n_genes,) mentions of each gene.
    """

    indptr: NDArray[np.int64]
    gene: NDArray[np.int64]
    fired: NDArray[np.float64]
    present: NDArray[np.float64]


def as_arrays(matrix: Any) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """A csr matrix's (indptr, indices, data) in the types that the loops are compiled for."""
    return (matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64),
            matrix.data.astype(np.float64))


def get_held_out_counts(model: "GPTNeoXForCausalLM", transcoders: Transcoders, corpus: Corpus,
                        profile: "Profile", control: Control | None = None
                        ) -> tuple[sp.csr_matrix, ...]:
    """Per layer (n_features, n_pairs) how often a feature is active on a pair in held-out cells.

    Pairs are those of `FeatureStatistics`. Kept in `held_out_counts.npz` beside its file.
    """
    path = stage_folder(profile, control) / "held_out_counts.npz"
    stamp = stamp_of(profile, ("forward_cells",), _ROOMS, genes=gene_digest(corpus),
                     transcoders=training_stamp(profile, corpus, control))
    tokens, _, _, index = corpus_pairs(corpus)
    shape = transcoders.n_features, len(tokens)
    return kept_arrays(path, stamp, lambda: count_held_out(
        model, transcoders, corpus, profile.forward_cells, index, len(tokens)),
        pack_matrices, lambda arrays: unpack_matrices(arrays, shape))


def count_held_out(model: "GPTNeoXForCausalLM", transcoders: Transcoders, corpus: Corpus,
                   forward_cells: int, index: np.ndarray, n_pairs: int
                   ) -> tuple[sp.csr_matrix, ...]:
    """The pass itself; index: (n_cells, length) the pair of each token, from `corpus_pairs`."""
    rows = np.flatnonzero(corpus.held_out)
    totals = count_activations(model, transcoders, of_cells(corpus, rows), index[rows], n_pairs,
                               forward_cells, 1, progress=True)
    return totals.counts.matrices()


# --- mentions of genes ---------------------------------------------------------------------------


class SplitPairs(NamedTuple):
    """The pairs of token and gene inside genes, in training and in held-out cells.

    pair: (n,) their places among the corpus's pairs, gene by gene; token, gene: (n,) ids.
    train_count, held_out_count: (n,) occurrences. train_mentions, held_out_mentions: (n_genes,) in
    how many cells each gene stands.
    """

    pair: np.ndarray
    token: np.ndarray
    gene: np.ndarray
    train_count: np.ndarray
    held_out_count: np.ndarray
    train_mentions: np.ndarray
    held_out_mentions: np.ndarray


def split_pairs(statistics: FeatureStatistics, corpus: Corpus) -> SplitPairs:
    """The corpus's pairs inside genes, split by cell."""
    _, _, counts, index = corpus_pairs(corpus)
    held_out = np.bincount(index[corpus.held_out][corpus.mask[corpus.held_out]],
                           minlength=len(counts))
    pair = np.flatnonzero(statistics.pair_gene >= 0)
    pair = pair[np.argsort(statistics.pair_gene[pair], kind="stable")]
    stands = (corpus.place == 0) & corpus.mask
    mentions = [np.bincount(corpus.gene[stands & (corpus.held_out == which)[:, None]],
                            minlength=len(corpus.symbols)) for which in (False, True)]
    return SplitPairs(pair, statistics.pair_token[pair], statistics.pair_gene[pair],
                      (counts - held_out)[pair], held_out[pair], *mentions)


def mentions_fired(counts: sp.csr_matrix, gene: np.ndarray, present: np.ndarray) -> Mentions:
    """On which mentions of genes features fire, from counts by pair.

    counts: (n, n_pairs) of pairs ordered by `gene`, (n_pairs,). present: (n_genes,) mentions of
    each gene. A feature fires on as many mentions of a gene as it does on that one of the gene's
    tokens on which it fires most: counts by pair do not tell which tokens stood together.
    """
    counts = counts.tocsr()
    counts.sort_indices()
    row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    genes = gene[counts.indices]
    first = np.flatnonzero(np.append(True, (genes[1:] != genes[:-1]) | (row[1:] != row[:-1]))
                           ) if len(genes) else np.zeros(0, np.int64)
    largest = np.maximum.reduceat(counts.data, first) if len(first) else counts.data
    # A name that holds a token twice has it fire twice in one mention.
    fired = np.minimum(largest, present[genes[first]])
    shape = counts.shape[0], len(present)
    matrix = sp.csr_matrix((fired, (row[first], genes[first])), shape=shape)
    matrix.eliminate_zeros()
    return Mentions(*as_arrays(matrix), present.astype(np.float64))
