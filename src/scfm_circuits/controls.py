"""Gene lists that no trained feature made, to set beside those of the features.

Each control holds one more thing fixed: the lists' lengths, the genes' frequency in the corpus, the
number and kind of tokens, the architecture. All go through the same enrichment rule.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
import torch

from scfm_circuits.enrichment import (
    GeneSets,
    Ragged,
    Rule,
    encode_ids,
    frequency_matched_null,
    over_representation,
    prepare_background,
    ragged,
    uniform_null,
)
from scfm_circuits.features import FeatureStatistics, count_features, gene_list_ids
from scfm_circuits.language_model import batches, device_of, mlp_sites
from scfm_circuits.sentences import Corpus
from scfm_circuits.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM

    from scfm_circuits.profile import Profile


def control_lists(statistics: FeatureStatistics, untrained: FeatureStatistics, layer: int,
                  corpus: Corpus, profile: "Profile", draws: int) -> dict[str, Ragged]:
    """The layer's live features' gene lists and `draws` control lists for each, by name."""
    rng = np.random.default_rng([profile.seed, 9, layer])
    live = np.flatnonzero(statistics.live(profile.live_cut_table4)[layer])
    own = ragged(gene_list_ids(statistics, layer, live, corpus, profile))
    occurrences = np.bincount(corpus.gene[corpus.gene >= 0], minlength=len(corpus.symbols))
    used = np.flatnonzero(occurrences)
    uniform, matched, moved = [], [], []
    for _ in range(draws):
        drawn = uniform_null(own.lengths, len(used), rng)
        uniform.append(Ragged(drawn.indptr, used[drawn.ids]))
        # The bins are those of genes that occur: the others cannot be on a list.
        place = np.searchsorted(used, own.ids)
        alike = frequency_matched_null(Ragged(own.indptr, place), occurrences[used], 20, rng)
        matched.append(Ragged(alike.indptr, used[alike.ids]))
        other = exchange_tokens(statistics, layer, rng)
        moved.append(ragged(gene_list_ids(other, layer, live, corpus, profile)))
    random_live = np.flatnonzero(untrained.live(profile.live_cut_table4)[layer])
    return {
        "features": own, "uniform": _joined(uniform), "frequency-matched": _joined(matched),
        "token-preserving": _joined(moved),
        "untrained encoder": ragged(gene_list_ids(untrained, layer, random_live, corpus, profile)),
    }


def _joined(parts: Sequence[Ragged]) -> Ragged:
    lengths = np.concatenate([part.lengths for part in parts])
    return Ragged(np.concatenate([[0], np.cumsum(lengths)]),
                  np.concatenate([part.ids for part in parts]))


def exchange_tokens(statistics: FeatureStatistics, layer: int, rng: np.random.Generator,
                    n_bins: int = 8) -> FeatureStatistics:
    """The statistics with every gene token's activations moved to another token.

    Tokens are exchanged within a grid of corpus frequency and number of genes that contain them, so
    a feature keeps its number of tokens, their counts and what kind of tokens they are, and loses
    which tokens they are. Only pairs inside genes are kept.
    """
    inside = np.flatnonzero(statistics.pair_gene >= 0)
    tokens, token = np.unique(statistics.pair_token[inside], return_inverse=True)
    counts = statistics.counts[layer][:, inside]
    ones = np.ones(len(inside), np.int64)
    by_token = counts @ sp.csr_matrix((ones, (np.arange(len(inside)), token)))
    frequency = np.bincount(token, weights=statistics.pair_count[inside])
    family = np.bincount(token)
    cell = _ranks(frequency, n_bins) * n_bins + _ranks(family, n_bins)
    target = np.arange(len(tokens))
    for members in (np.flatnonzero(cell == one) for one in np.unique(cell)):
        target[members] = rng.permutation(members)
    # A token's activations are spread over its genes as its occurrences are.
    spread = sp.csr_matrix((statistics.pair_count[inside] / frequency[token],
                            (token, np.arange(len(inside)))))
    moved = by_token @ sp.csr_matrix((np.ones(len(tokens)), (np.arange(len(tokens)), target)))
    matrices = list(statistics.counts)
    matrices[layer] = sp.csr_matrix(moved @ spread)
    return replace(statistics, pair_token=statistics.pair_token[inside],
                   pair_gene=statistics.pair_gene[inside],
                   pair_count=statistics.pair_count[inside], counts=tuple(matrices))


def _ranks(values: np.ndarray, n_bins: int) -> np.ndarray:
    """Equal-sized bins by rank, ties in one bin."""
    quantiles = np.quantile(values, np.linspace(0, 1, n_bins + 1)[1:-1])
    return np.searchsorted(quantiles, values, side="left")


@torch.no_grad()
def untrained_statistics(model: "GPTNeoXForCausalLM", statistics: FeatureStatistics,
                         corpus: Corpus, profile: "Profile", n_features: int = 256
                         ) -> FeatureStatistics:
    """Statistics of an encoder that was initialised as for training, and not trained.

    Its features' thresholds are set so that they fire as often as live trained features of the
    same layer, drawn at random, do: they differ in what they fire on, not in how often.
    """
    d_model, n_layers = model.config.hidden_size, len(statistics.fired)
    untrained = Transcoders(n_layers, d_model, n_features).to(device_of(model))
    generator = torch.Generator(device_of(model)).manual_seed(profile.seed + 1)
    untrained.initialise(generator)
    rng = np.random.default_rng([profile.seed, 10])
    some = np.flatnonzero(~corpus.held_out)[: profile.forward_cells]
    _, tokens, mask = next(iter(batches(corpus, some, len(some), device_of(model))))
    inputs = mlp_sites(model, tokens, mask).inputs
    untrained.b_in.copy_(inputs.mean(dim=1))
    pre = untrained.pre_activations(inputs)
    live = statistics.live(profile.live_cut_table4)
    for layer in range(n_layers):
        rates = statistics.frequency[layer][live[layer]]
        if not len(rates):
            continue
        wanted = np.clip(rng.choice(rates, n_features), 0, 1)
        ordered = pre[layer].sort(dim=0, descending=True).values
        rank = np.minimum((wanted * len(ordered)).round().astype(int), len(ordered) - 1)
        columns = torch.arange(n_features, device=ordered.device)
        untrained.b_enc[layer] = -ordered[torch.from_numpy(rank).to(ordered.device), columns]
    return count_features(model, untrained, corpus, profile.forward_cells)


def enriched_share(lists: Ragged, symbols: np.ndarray, libraries: Sequence[GeneSets], rule: Rule,
                   corpus_genes: Sequence[str], fdr: float) -> np.ndarray:
    """(n_lists,) bool: whether a list has a significant term in one of the libraries."""
    hit = np.zeros(len(lists.lengths), bool)
    for library in libraries:
        background = prepare_background(library, rule.background_for(corpus_genes))
        encoded = encode_ids(lists, symbols.tolist(), library, background)
        result = over_representation(encoded, library, background=background, family=rule.family,
                                     alpha=fdr)
        hit |= result.n_significant > 0
    return hit
