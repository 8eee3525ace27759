"""Null gene lists and the statistics that compare a feature's result with them.

Each null answers "could a list made without the model have done as well?", holding one more thing
fixed than the one before:
- `uniform_null`: the list's length. A correct test must come out near its nominal level here.
- `frequency_matched_null`: also how often its genes occur in the corpus.
- `token_preserving_null`: also that a feature fires on tokens, so often on each, and that a token
  stands for a family of genes that share a piece of their name.

Lists are `Ragged`: integer ids into whatever the caller counts as genes (or tokens). Everything is
drawn from the generator handed in, so a seed fixes the result.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike

from scfm_circuits import InputError
from scfm_circuits.common.compiled import compiled
from scfm_circuits.enrichment.significance import FloatArray, IntArray


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


def uniform_null(lengths: ArrayLike, genes: int, rng: np.random.Generator, draws: int = 1
                 ) -> Ragged:
    """Lists of distinct genes drawn uniformly, one for each length.

    Controls for list length alone: under a correct rule the share of significant lists must be
    near its nominal level, so this tests the machinery rather than the feature.

    Args:
        lengths: list lengths, (n_lists,).
        genes: how many genes there are; ids are 0..genes-1.
        rng: source of randomness.
        draws: null lists for each length; the result has `draws` blocks of n_lists.

    Raises:
        InputError: a list is longer than there are genes.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and (lengths.min() < 0 or lengths.max() > genes):
        raise InputError(
            f"Cannot draw a null list of {int(lengths.max())} distinct genes from {genes}; use the "
            "same genes for the lists and for the null."
        )
    indptr = _indptr(np.tile(lengths, draws))
    one_bin = np.zeros(max(genes, 1), dtype=np.int64)
    # Which genes are replaced does not matter when all share one bin.
    return _resample(Ragged(indptr, np.zeros(indptr[-1], dtype=np.int64)), one_bin, rng)


def frequency_matched_null(lists: Ragged, gene_frequency: ArrayLike, n_bins: int,
                           rng: np.random.Generator, draws: int = 1) -> Ragged:
    """Replace each gene by a random gene of similar corpus frequency; no repeats within a list.

    Controls for length and for how often the genes occur: lists ranked by activation favour
    frequent genes, and frequent genes are those of well-annotated processes.

    Args:
        lists: gene ids, distinct within a list.
        gene_frequency: corpus frequency of every gene, (n_genes,).
        n_bins: number of equally filled frequency bins within which genes are exchanged.
        rng: source of randomness.
        draws: null lists for each list; the result has `draws` blocks of n_lists.

    Raises:
        InputError: an id without a frequency, a repeated id, or no bins.
    """
    frequency = np.asarray(gene_frequency, dtype=np.float64)
    _check_ids(lists, frequency.size, "gene")
    return _resample(_repeated(lists, draws), quantile_bins(frequency, n_bins), rng)


def own_kept(lists: Ragged, gene_frequency: ArrayLike, n_bins: int) -> FloatArray:
    """Share of a list's own genes that a frequency-matched list of it holds, on average over draws.

    Of a bin's n genes k are replaced by k of them at random, which holds k / n of them again. Where
    few genes are as common as the list's own, the null is like the list, and so conservative.

    Args: as for `frequency_matched_null`; with one bin it is a uniform null's share.

    Returns:
        (n_lists,), NaN for an empty list.
    """
    bins = quantile_bins(np.asarray(gene_frequency, dtype=np.float64), n_bins)
    sizes, n_lists = np.bincount(bins, minlength=n_bins), len(lists.lengths)
    place = np.repeat(np.arange(n_lists), lists.lengths) * len(sizes) + bins[lists.ids]
    own = np.bincount(place, minlength=n_lists * len(sizes)).reshape(n_lists, len(sizes))
    with np.errstate(invalid="ignore"):
        return np.asarray((own**2 / np.maximum(sizes, 1)).sum(axis=1) / lists.lengths)


class TokenFamilies(NamedTuple):
    """The tokens that occur in genes, each with its family: the genes that contain it."""

    indptr: IntArray
    """Where each token's family starts in `genes` and `shares`, (n_tokens + 1,)."""
    genes: IntArray
    """Gene ids, distinct within a family, (indptr[-1],)."""
    shares: FloatArray
    """Share of the token's occurrences that stand in that gene, (indptr[-1],)."""
    occurrences: FloatArray
    """How often each token occurs in genes, (n_tokens,)."""
    cell: IntArray
    """Which tokens may stand in for each other: bin of frequency by bin of family size."""


def token_families(pair_token: ArrayLike, pair_gene: ArrayLike, pair_count: ArrayLike,
                   n_bins: int = 8, contains: sp.csr_matrix | None = None) -> TokenFamilies:
    """`TokenFamilies` from the distinct pairs of token and gene and how often each occurs.

    Args:
        pair_token: places 0..n_tokens-1, every one of them in use, (n_pairs,).
        pair_gene: gene ids, (n_pairs,).
        pair_count: occurrences, at least 1, (n_pairs,).
        n_bins: bins of frequency, and of family size.
        contains: (n_tokens, n_genes) the families, if they hold genes beside those of the pairs;
            in these a token has no share.

    Raises:
        InputError: a pair twice, a token without a gene, or no bins.
    """
    token, gene = (np.asarray(values, dtype=np.int64) for values in (pair_token, pair_gene))
    count = np.asarray(pair_count, dtype=np.float64)
    sizes = np.bincount(token)
    if (sizes == 0).any() or (count <= 0).any():
        raise InputError("A token belongs to no gene; leave out tokens that stand in none.")
    order = np.argsort(token, kind="stable")
    _check_ids(Ragged(_indptr(sizes), gene[order]), int(gene.max(initial=0)) + 1, "gene")
    frequency = np.bincount(token, weights=count)
    if contains is not None:
        own = sp.csr_matrix((count, (token, gene)), contains.shape)
        sizes = np.diff(contains.indptr)
        token, gene = np.repeat(np.arange(len(sizes)), sizes), contains.indices.astype(np.int64)
        count, order = np.asarray(own[token, gene]).ravel(), np.arange(len(token))
    size_bin = quantile_bins(np.asarray(sizes, dtype=np.float64), n_bins)
    cell = quantile_bins(frequency.astype(np.float64), n_bins) * n_bins + size_bin
    return TokenFamilies(_indptr(sizes), gene[order], (count / frequency[token])[order],
                         frequency.astype(np.float64), cell)


SCORES = ("count", "rate", "z")


class Ranking(NamedTuple):
    """How genes are ranked by what their tokens are given."""

    by_token: bool
    """Whether a gene is given the whole counts of its tokens, or what falls inside it."""
    score: int
    """Place in SCORES."""
    least: float
    """Counts below which a gene is not listed by rate or z."""
    occurrences: FloatArray
    """How often the tokens occur whose counts a gene is given, (n_genes,)."""


class TokenCounts(NamedTuple):
    """How often each feature fires on each token."""

    indptr: IntArray
    """Where each feature's tokens start, (n_features + 1,)."""
    tokens: IntArray
    """Tokens, distinct within a feature, as places in `TokenFamilies`, (indptr[-1],)."""
    counts: FloatArray
    """How often the feature fires on that token, above 0, (indptr[-1],)."""


def token_preserving_null(
    features: TokenCounts, families: TokenFamilies, lengths: ArrayLike, rng: np.random.Generator,
    *, n_genes: int, by_token: bool = True, draws: int = 1, score: str = "count",
    least: float = 1,
) -> Ragged:
    """Gene lists of features that fire as often, on as many tokens of the same kind.

    Controls for sub-words: a token stands for the family of genes whose names contain it, families
    share functions, so even one token with no model behind it is "enriched". A feature must do
    better than random tokens to say something about biology.

    Each token hands its count to a random token of its cell (like in frequency and family size); a
    token alone in its cell stays, which makes the control stricter. Within a token's family the
    count falls to the genes as the token's occurrences do: the null knows tokens, not genes. The
    genes are ranked as those of a feature are, and the first as many as the feature lists are
    taken, so length is held fixed (fewer if the tokens have fewer genes).

    Args:
        features: tokens and counts of each feature.
        families: the genes of each token.
        lengths: genes on each feature's own list, (n_features,).
        rng: source of randomness.
        n_genes: how many genes there are.
        by_token: a gene's score is the counts of all its tokens (gene rule `token`), or only what
            falls inside the gene (`occurrence`).
        score: what becomes of that score: `count`, `rate` or `z`, as in `gene_lists.gene_scores`.
        least: counts below which a gene is not listed by rate or z.
        draws: null lists for each feature; the result has `draws` blocks of n_features.

    Raises:
        InputError: a token twice in a feature or outside the families.
    """
    _check_ids(Ragged(features.indptr, features.tokens), families.cell.size, "token")
    own = _repeated(Ragged(features.indptr, features.tokens), draws)
    tokens = _resample(own, families.cell, rng)
    wanted = np.tile(np.asarray(lengths, dtype=np.int64), draws)
    genes = np.empty(int(wanted.sum()), dtype=np.int64)
    counts = np.tile(np.asarray(features.counts, dtype=np.float64), draws)
    ranking = Ranking(by_token, SCORES.index(score), float(least),
                      _occurrences(families, n_genes, by_token))
    indptr = _lists_of_tokens(TokenCounts(tokens.indptr, tokens.ids, counts), families, ranking,
                              wanted, genes)
    return Ragged(indptr, genes[: indptr[-1]])


def _occurrences(families: TokenFamilies, n_genes: int, by_token: bool) -> FloatArray:
    """(n_genes,) how often the tokens occur whose counts a gene is given."""
    times = np.repeat(families.occurrences, np.diff(families.indptr))
    weights = times if by_token else times * families.shares
    return np.bincount(families.genes, weights, n_genes).astype(np.float64)


def _repeated(lists: Ragged, draws: int) -> Ragged:
    """The lists `draws` times, one block after another."""
    indptr = np.asarray(lists.indptr, dtype=np.int64)
    ids = np.asarray(lists.ids, dtype=np.int64)
    if draws == 1:
        return Ragged(indptr, ids)
    return Ragged(_indptr(np.tile(np.diff(indptr), draws)), np.tile(ids, draws))


def _check_ids(lists: Ragged, n_items: int, noun: str) -> None:
    if lists.ids.size and (lists.ids.min() < 0 or lists.ids.max() >= n_items):
        raise InputError(
            f"The lists name a {noun} outside 0..{n_items - 1}; give a frequency for every {noun}."
        )
    keys = np.repeat(np.arange(lists.lengths.size), lists.lengths) * n_items + lists.ids
    if np.unique(keys).size < keys.size:
        raise InputError(f"A list names the same {noun} twice; pass each {noun} once per list.")


def quantile_bins(values: FloatArray, n_bins: int) -> IntArray:
    """Bin of each value, 0..n_bins-1, about equally filled; equal values share a bin."""
    if n_bins < 1:
        raise InputError(f"The number of bins is {n_bins}; use at least 1.")
    if not values.size:
        return np.zeros(0, dtype=np.int64)
    inner = np.quantile(values, np.linspace(0, 1, n_bins + 1)[1:-1])
    return np.searchsorted(inner, values, side="right")


def _resample(lists: Ragged, item_bin: IntArray, rng: np.random.Generator) -> Ragged:
    """Exchange each id for a random item of the same bin."""
    items = np.argsort(item_bin, kind="stable")
    bin_start = _indptr(np.bincount(item_bin, minlength=1))
    indptr, ids = (np.asarray(part, dtype=np.int64) for part in lists)
    drawn = np.empty(ids.size, dtype=np.int64)
    _sample_within_bins(Ragged(indptr, ids), item_bin, bin_start, items, rng.random(ids.size),
                        drawn)
    return Ragged(lists.indptr, drawn)


# --- compiled loops ------------------------------------------------------------------------------


@compiled
def _sample_within_bins(lists, item_bin, bin_start, items, uniforms, out):  # type: ignore[no-untyped-def]
    """Replace each id by a random item of its own bin, without repeats within a list.

    `items` lists all items bin by bin, `bin_start` (n_bins + 1,) where each bin starts; `uniforms`
    (ids' size) are draws from [0, 1). A partial Fisher-Yates shuffle of the bin: `items` may start
    in any order, so it is left shuffled for the next list. Fills `out`.
    """
    taken = np.zeros(bin_start.size, np.int64)
    for i in range(lists.indptr.size - 1):
        own = range(lists.indptr[i], lists.indptr[i + 1])
        for position in own:
            b = item_bin[lists.ids[position]]
            first = bin_start[b] + taken[b]
            chosen = first + np.int64(uniforms[position] * (bin_start[b + 1] - first))
            items[first], items[chosen] = items[chosen], items[first]
            out[position] = items[first]
            taken[b] += 1
        for position in own:
            taken[item_bin[lists.ids[position]]] = 0


@compiled
def _score_genes(tokens, counts, families, by_token, touched, score, inside):  # type: ignore[no-untyped-def]
    """Add each token's count to the genes of its family; returns how many genes were touched.

    `inside` gets the share of the count that falls to each gene, as the token's occurrences do;
    `score` the whole count (rule `token`) or the same share (rule `occurrence`).
    """
    n_touched = 0
    for k in range(tokens.size):
        for j in range(families.indptr[tokens[k]], families.indptr[tokens[k] + 1]):
            gene = families.genes[j]
            if score[gene] == 0.0:
                touched[n_touched] = gene
                n_touched += 1
            part = counts[k] * families.shares[j]
            inside[gene] += part
            score[gene] += counts[k] if by_token else part
    return n_touched


@compiled
def _select(genes, keys, wanted, out):  # type: ignore[no-untyped-def]
    """Write the `wanted` genes of highest key to `out` (all if there are fewer); their number."""
    n = genes.size
    if wanted >= n:
        out[:n] = genes
        return n
    # No sorting: whatever is above the wanted place, and as many of those that tie with it.
    bound = np.partition(keys, n - wanted)[n - wanted]
    written = 0
    for k in range(n):
        if keys[k] > bound:
            out[written] = genes[k]
            written += 1
    for k in range(n):
        if written == wanted:
            break
        if keys[k] == bound:
            out[written] = genes[k]
            written += 1
    return wanted


@compiled
def _listed(n_touched, touched, score, inside, mean, ranking, keys):  # type: ignore[no-untyped-def]
    """Write the keys of the genes that can be listed, which come first in `touched`; their number.

    Counts tie: what falls inside the gene breaks the tie. mean: the feature's rate over all genes.
    """
    if ranking.score == 0:
        most = 1e-300
        for k in range(n_touched):
            keys[k] = score[touched[k]]
            most = max(most, inside[touched[k]])
        if ranking.by_token:
            # Counts are whole numbers: less than one half added keeps their order.
            for k in range(n_touched):
                keys[k] += inside[touched[k]] * (0.4999 / most)
        return n_touched
    listed = 0
    for k in range(n_touched):
        gene = touched[k]
        times = ranking.occurrences[gene]
        value = score[gene] / times
        if ranking.score == 2:
            value = (score[gene] - times * mean) / np.sqrt(max(times * mean * (1.0 - mean), 1e-12))
        if score[gene] >= ranking.least and value > 0.0:
            keys[listed] = value
            touched[k], touched[listed] = touched[listed], gene
            listed += 1
    return listed


@compiled
def _lists_of_tokens(features, families, ranking, lengths, out):  # type: ignore[no-untyped-def]
    """The first `lengths` genes that each feature's tokens and counts rank, as `gene_lists` ranks.

    Fills `out`; returns the indptr.
    """
    starts = np.zeros(features.indptr.size, np.int64)
    n_genes = ranking.occurrences.size
    touched, keys = np.empty(n_genes, np.int64), np.empty(n_genes)
    score, inside = np.zeros(n_genes), np.zeros(n_genes)
    everywhere = families.occurrences.sum()
    for i in range(features.indptr.size - 1):
        own = slice(features.indptr[i], features.indptr[i + 1])
        counts = features.counts[own]
        n = _score_genes(features.tokens[own], counts, families, ranking.by_token, touched, score,
                         inside)
        listed = _listed(n, touched, score, inside, counts.sum() / everywhere, ranking, keys)
        written = 0
        if lengths[i]:
            written = _select(touched[:listed], keys[:listed], lengths[i], out[starts[i] :])
        starts[i + 1] = starts[i] + written
        for gene in touched[:n]:
            score[gene] = 0.0
            inside[gene] = 0.0
    return starts
