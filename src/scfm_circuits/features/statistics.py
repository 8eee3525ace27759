"""Counts over the corpus: E(f), E(f, t), L0, the strongest activations of each feature.

E(f) is the share of tokens on which feature f is active (paper, Figure 3), counted over every
token of the corpus that is not padding. E(f, t) is kept as counts per pair of token and gene, from
which both readings of the paper's gene rule follow. `counting` does the counting.
"""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.cells.tokens import without_levels
from scfm_circuits.common.files import digest
from scfm_circuits.common.kept import Stamp, if_current, kept_arrays, stamp_of
from scfm_circuits.features.counting import count_activations, unpack_best
from scfm_circuits.features.pair_counts import pack_matrices, unpack_matrices
from scfm_circuits.transcoders.training.settings import Control, stage_folder, training_stamp
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.common.profile import Profile

_CELLS = 4096
_ROOMS = ("features", "transcoders/active_entries")


def _none() -> np.ndarray:
    return np.zeros((0, 0, 0))


@dataclass(frozen=True)
class FeatureStatistics:
    """Counts over the corpus.

    n_tokens: tokens counted. fired: (n_layers, n_features) tokens on which a feature is active.
    pair_token, pair_gene, pair_count: (n_pairs,) the pairs of token id and gene id (-1: no gene)
    in the corpus, and how often each occurs. counts: per layer (n_features, n_pairs) sparse, how
    often a feature is active on a pair. l0_histogram: (n_layers, n_features + 1) tokens by their
    number of active features.

    activation_sum: (n_layers, n_features) sum of a feature's activations. activation_histogram:
    (n_layers, n_features, n_bins) how many lie in each of the bins that `activation_edges` bounds.
    context_activation, context_cell, context_position: (n_layers, n_features, n) each feature's
    strongest activations, at most one per cell, strongest first, with the cell (-1: there are no
    more) and the token's place in it. All are empty in statistics that no activations were at hand
    for.
    """

    n_tokens: int
    fired: np.ndarray
    pair_token: np.ndarray
    pair_gene: np.ndarray
    pair_count: np.ndarray
    counts: tuple[sp.csr_matrix, ...]
    l0_histogram: np.ndarray
    activation_sum: np.ndarray = field(default_factory=_none)
    activation_histogram: np.ndarray = field(default_factory=_none)
    context_activation: np.ndarray = field(default_factory=_none)
    context_cell: np.ndarray = field(default_factory=_none)
    context_position: np.ndarray = field(default_factory=_none)

    @property
    def frequency(self) -> np.ndarray:
        """(n_layers, n_features) E(f)."""
        return self.fired / self.n_tokens

    @property
    def log10_frequency(self) -> np.ndarray:
        """log10 E(f); -10 for a feature that never fires, as in the code the paper builds on."""
        return np.log10(self.frequency + 1e-10)

    def live(self, cut: float) -> np.ndarray:
        """(n_layers, n_features) bool: log10 E(f) >= cut."""
        return self.log10_frequency >= cut

    @property
    def mostly_outside_genes(self) -> np.ndarray:
        """(n_layers, n_features) bool: under half of the tokens that a feature is active on stand
        in genes; the rest are the question, the answer and the text's end. False if it is silent.
        """
        genes = (self.pair_gene >= 0).astype(np.int64)
        inside = np.stack([one.astype(np.int64) @ genes for one in self.counts])
        return 2 * inside < self.fired

    @property
    def mean_activation(self) -> np.ndarray:
        """(n_layers, n_features) mean over the tokens a feature is active on; 0 if there are none.

        The largest activation is `context_activation[..., 0]`.
        """
        return self.activation_sum / np.maximum(self.fired, 1)

    @property
    def l0(self) -> np.ndarray:
        """(n_layers,) mean number of active features per token (Figure 2)."""
        return self.l0_histogram @ np.arange(self.l0_histogram.shape[1]) / self.n_tokens

    def l0_quantiles(self, levels: tuple[float, ...]) -> np.ndarray:
        """(n_layers, len(levels)) quantiles over tokens of the number of active features."""
        cumulative = np.cumsum(self.l0_histogram, axis=1) / self.n_tokens
        return np.stack([(cumulative < level).sum(axis=1) for level in levels], axis=1)


def corpus_pairs(corpus: Corpus) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct pairs of token and gene: (tokens, genes, counts, pair index of each position).

    A large corpus is gone through in blocks of cells, twice: its tokens are not sorted all at once.
    """
    n_genes = len(corpus.symbols) + 1
    blocks = [slice(start, start + _CELLS) for start in range(0, len(corpus), _CELLS)]

    def keys(block: slice) -> np.ndarray:
        tokens = without_levels(corpus.tokenizer, corpus.tokens[block])
        return (tokens * n_genes + (corpus.gene[block] + 1))[corpus.mask[block]]

    unique = np.zeros(0, np.int64)
    for block in blocks:
        unique = np.union1d(unique, keys(block))
    counts = np.zeros(len(unique), np.int64)
    index = np.full(corpus.mask.shape, -1, np.int32)
    for block in blocks:
        place = np.searchsorted(unique, keys(block))
        counts += np.bincount(place, minlength=len(unique))
        index[block][corpus.mask[block]] = place
    return unique // n_genes, (unique % n_genes - 1).astype(np.int32), counts, index


def count_features(model: "PreTrainedModel", transcoders: Transcoders, corpus: Corpus,
                   forward_cells: int, n_contexts: int = 5, *, progress: bool = True
                   ) -> FeatureStatistics:
    """One pass over all cells."""
    tokens_of, genes_of, counts_of, index = corpus_pairs(corpus)
    totals = count_activations(model, transcoders, corpus, index, len(tokens_of), forward_cells,
                               n_contexts, progress)
    arrays = {key: tensor.cpu().numpy() for key, tensor in totals.tensors.items()}
    activation, position = unpack_best(arrays["best"])
    return FeatureStatistics(
        n_tokens=int(corpus.mask.sum()), fired=arrays["histogram"].sum(axis=2),
        pair_token=tokens_of, pair_gene=genes_of, pair_count=counts_of,
        counts=totals.counts.matrices(), l0_histogram=arrays["l0"],
        activation_sum=arrays["total"], activation_histogram=arrays["histogram"],
        context_activation=activation, context_position=position,
        context_cell=np.where(activation > 0, arrays["best_cell"], -1),
    )


def gene_digest(corpus: Corpus) -> str:
    """A short hash of which gene each token stands in."""
    return digest(np.ascontiguousarray(corpus.gene).tobytes())


def _stamp(corpus: Corpus, profile: "Profile", control: Control | None) -> Stamp:
    """What counts depend on: the transcoders, this module, and which gene each token stands in."""
    return stamp_of(profile, ("contexts_per_feature", "forward_cells"), _ROOMS,
                    transcoders=training_stamp(profile, corpus, control), genes=gene_digest(corpus))


def stored_statistics(corpus: Corpus, profile: "Profile", control: Control | None = None
                      ) -> FeatureStatistics | None:
    """The statistics that `get_statistics` stored, if they are current."""
    path = stage_folder(profile, control) / "features.npz"
    return if_current(path, _stamp(corpus, profile, control), _statistics)


def get_statistics(model: "PreTrainedModel", transcoders: Transcoders, corpus: Corpus,
                   profile: "Profile", control: Control | None = None) -> FeatureStatistics:
    """The profile's statistics: from `results/<profile>/features.npz` if current, else counted.

    With `control`, those of that control's transcoders, stored in its own folder.
    """
    path, stamp = stage_folder(profile, control) / "features.npz", _stamp(corpus, profile, control)
    return kept_arrays(path, stamp, lambda: count_features(
        model, transcoders, corpus, profile.forward_cells, profile.contexts_per_feature),
        _arrays, _statistics)


def _arrays(statistics: FeatureStatistics) -> dict[str, Any]:
    plain = {key: value for key, value in vars(statistics).items() if key != "counts"}
    return plain | pack_matrices(statistics.counts)


def _statistics(arrays: dict[str, np.ndarray]) -> FeatureStatistics:
    shape = arrays["fired"].shape[1], len(arrays["pair_token"])
    plain: dict[str, Any] = {one.name: arrays[one.name] for one in
                             fields(FeatureStatistics) if one.name != "counts"}
    return FeatureStatistics(**{**plain, "n_tokens": int(plain["n_tokens"])},
                             counts=unpack_matrices(arrays, shape))
