"""Null gene lists and the statistics that compare a feature's result with them.

Each null answers "could a list made without the model have done as well?", holding one more thing
fixed than the one before:
- `uniform_null`: the list's length. A correct test must come out near its nominal level here.
- `frequency_matched_null`: also how often its genes occur in the corpus.
- `token_preserving_null`: also that a feature fires on tokens, and a token stands for a family of
  genes that share a piece of their name.

Lists are `Ragged`: integer ids into whatever the caller counts as genes (or tokens). Everything is
drawn from the generator handed in, so a seed fixes the result.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scfm_circuits import InputError, enrichment_kernels

IntArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.floating[Any]]


class Ragged(NamedTuple):
    """Lists of integer ids of different lengths, one behind the other."""

    indptr: IntArray
    """Where each list starts in `ids`, (n_lists + 1,)."""
    ids: IntArray
    """The ids of all lists, (indptr[-1],)."""

    @property
    def lengths(self) -> IntArray:
        """Length of each list, (n_lists,)."""
        return np.diff(self.indptr)


def ragged(lists: Iterable[ArrayLike]) -> Ragged:
    """`Ragged` from a sequence of integer lists or arrays."""
    arrays = [np.asarray(ids, dtype=np.int64).ravel() for ids in lists]
    flat = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
    return Ragged(_indptr([len(ids) for ids in arrays]), flat)


def _indptr(lengths: ArrayLike) -> IntArray:
    lengths = np.asarray(lengths, dtype=np.int64)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])


def uniform_null(lengths: ArrayLike, genes: int, rng: np.random.Generator) -> Ragged:
    """Lists of distinct genes drawn uniformly, one for each length.

    Controls for list length alone: under a correct rule the share of significant lists must be
    near its nominal level, so this tests the machinery rather than the feature.

    Args:
        lengths: list lengths, (n_lists,).
        genes: how many genes there are; ids are 0..genes-1.
        rng: source of randomness.

    Raises:
        InputError: a list is longer than there are genes.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and (lengths.min() < 0 or lengths.max() > genes):
        raise InputError(
            f"Cannot draw a null list of {int(lengths.max())} distinct genes from {genes}; use the "
            "same genes for the lists and for the null."
        )
    indptr = _indptr(lengths)
    one_bin = np.zeros(max(genes, 1), dtype=np.int64)
    # Which genes are replaced does not matter when all share one bin.
    return _resample(Ragged(indptr, np.zeros(indptr[-1], dtype=np.int64)), one_bin, rng)


def frequency_matched_null(
    lists: Ragged, gene_frequency: ArrayLike, n_bins: int, rng: np.random.Generator
) -> Ragged:
    """Replace each gene by a random gene of similar corpus frequency; no repeats within a list.

    Controls for length and for how often the genes occur: lists ranked by activation favour
    frequent genes, and frequent genes are those of well-annotated processes.

    Args:
        lists: gene ids, distinct within a list.
        gene_frequency: corpus frequency of every gene, (n_genes,).
        n_bins: number of equally filled frequency bins within which genes are exchanged.
        rng: source of randomness.

    Raises:
        InputError: an id without a frequency, a repeated id, or no bins.
    """
    frequency = np.asarray(gene_frequency, dtype=np.float64)
    _check_ids(lists, frequency.size, "gene")
    return _resample(lists, _quantile_bins(frequency, n_bins), rng)


def token_preserving_null(
    feature_tokens: Ragged,
    token_frequency: ArrayLike,
    family_size: ArrayLike,
    families: Ragged,
    rng: np.random.Generator,
    n_bins: int = 10,
) -> Ragged:
    """Gene lists of as many random tokens as the feature has, alike in frequency and family size.

    Controls for sub-words: a token stands for the family of genes whose names contain it, families
    share functions, so even one token with no model behind it is "enriched". A feature must do
    better than random tokens to say something about biology.

    Tokens are exchanged within cells of a grid, frequency bins by family-size bins; a token alone
    in its cell stays, which makes the control stricter. The null list is the union of the drawn
    tokens' families and can differ in length from the feature's own list.

    Args:
        feature_tokens: token ids each feature fires on, distinct within a feature.
        token_frequency: corpus frequency of every token, (n_tokens,).
        family_size: number of genes containing each token, (n_tokens,); tokens of size 0 (prompt
            words) are never drawn and must not be among a feature's tokens.
        families: gene ids of every token, n_tokens lists.
        rng: source of randomness.
        n_bins: bins of frequency, and of family size.

    Returns:
        Distinct gene ids per feature.

    Raises:
        InputError: shapes that disagree, a token without a family, or a repeated token.
    """
    frequency = np.asarray(token_frequency, dtype=np.float64)
    sizes = np.asarray(family_size, dtype=np.int64)
    if not frequency.size == sizes.size == families.lengths.size:
        raise InputError(
            f"Token frequencies ({frequency.size}), family sizes ({sizes.size}) and families "
            f"({families.lengths.size}) must describe the same tokens; pass one of each per token."
        )
    _check_ids(feature_tokens, sizes.size, "token")
    if (sizes[feature_tokens.ids] == 0).any():
        raise InputError(
            "A feature's tokens include one that belongs to no gene; leave prompt words out."
        )
    with_family = np.flatnonzero(sizes > 0)
    cells = np.full(sizes.size, -1, dtype=np.int64)
    frequency_bin = _quantile_bins(frequency[with_family], n_bins)
    size_bin = _quantile_bins(sizes[with_family].astype(np.float64), n_bins)
    cells[with_family] = frequency_bin * n_bins + size_bin
    tokens = _resample(feature_tokens, cells, rng)
    n_genes = int(families.ids.max()) + 1 if families.ids.size else 0
    arguments = (tokens.indptr, tokens.ids, families.indptr, families.ids, n_genes)
    counted = enrichment_kernels.union_of_families(*arguments, np.empty(0, np.int64), False)
    genes = np.empty(counted[-1], dtype=np.int64)
    return Ragged(enrichment_kernels.union_of_families(*arguments, genes, True), genes)


def _check_ids(lists: Ragged, n_items: int, noun: str) -> None:
    if lists.ids.size and (lists.ids.min() < 0 or lists.ids.max() >= n_items):
        raise InputError(
            f"The lists name a {noun} outside 0..{n_items - 1}; give a frequency for every {noun}."
        )
    keys = np.repeat(np.arange(lists.lengths.size), lists.lengths) * n_items + lists.ids
    if np.unique(keys).size < keys.size:
        raise InputError(f"A list names the same {noun} twice; pass each {noun} once per list.")


def _quantile_bins(values: FloatArray, n_bins: int) -> IntArray:
    """Bin of each value, 0..n_bins-1, about equally filled; equal values share a bin."""
    if n_bins < 1:
        raise InputError(f"The number of bins is {n_bins}; use at least 1.")
    if not values.size:
        return np.zeros(0, dtype=np.int64)
    inner = np.quantile(values, np.linspace(0, 1, n_bins + 1)[1:-1])
    return np.searchsorted(inner, values, side="right")


def _resample(lists: Ragged, item_bin: IntArray, rng: np.random.Generator) -> Ragged:
    """Exchange each id for a random item of the same bin; items of bin -1 are never drawn."""
    items = np.argsort(item_bin, kind="stable")[np.count_nonzero(item_bin < 0) :]
    bin_start = _indptr(np.bincount(item_bin[items], minlength=1))
    drawn = np.empty(lists.ids.size, dtype=np.int64)
    enrichment_kernels.sample_within_bins(
        np.asarray(lists.indptr, dtype=np.int64),
        np.asarray(lists.ids, dtype=np.int64),
        item_bin,
        bin_start,
        items,
        rng.random(lists.ids.size),
        drawn,
    )
    return Ragged(lists.indptr, drawn)


def benjamini_hochberg(p_values: ArrayLike) -> FloatArray:
    """Benjamini-Hochberg adjusted p-values, in the order given (empty in, empty out)."""
    from scipy.stats import false_discovery_control

    p = np.asarray(p_values, dtype=np.float64)
    return false_discovery_control(p) if p.size else p


def empirical_p(observed: ArrayLike, null: ArrayLike) -> FloatArray:
    """Share of null values at most as large as the observed one, never 0: (1 + #) / (1 + n).

    Args:
        observed: smallest p (or q) of each feature, (n_features,), or a single value, ().
        null: the same of its null lists, (n_features, n_null), or (n_null,) to share them.

    Raises:
        InputError: there is no null value.
    """
    draws = np.asarray(null, dtype=np.float64)
    if draws.shape[-1:] in {(), (0,)}:
        raise InputError("An empirical p-value needs at least one null list; raise their number.")
    below = draws <= np.asarray(observed, dtype=np.float64)[..., np.newaxis]
    return (1 + below.sum(axis=-1)) / (1 + draws.shape[-1])


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of the share k / n; (0, 1) when nothing was counted.

    Raises:
        InputError: counts that are negative or k > n.
    """
    if not 0 <= k <= n:
        raise InputError(f"{k} of {n} is not a share; give 0 <= k <= n.")
    if n == 0:
        return 0.0, 1.0
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(k, n, alpha=1 - confidence, method="wilson")
    return float(low), float(high)


def symbols_of(lists: Ragged, genes: Sequence[str]) -> list[list[str]]:
    """The lists as gene symbols, for reading or for `term_table`."""
    names = np.asarray(genes, dtype=object)[lists.ids]
    starts = lists.indptr.tolist()
    return [names[a:b].tolist() for a, b in pairwise(starts)]
