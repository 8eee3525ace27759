"""An automatic score beside the human evaluation: what predicts where a feature fires?

The paper calls a feature gene-level interpretable if it fires "consistently on tokens of specific
genes or gene families", and not if it fires on a sub-word wherever that stands. Here that is
measured for every live feature of every layer. Phases:

1. a gene's mention in a cell is the unit: does the feature fire on it or not;
2. three explanations, each of up to three genes, families or sub-word tokens, are chosen on the
   training cells (`explanations`);
3. each predicts the held-out cells' mentions: precision, recall, F1, AUROC;
4. a verdict: which kind predicts better than the others by a margin (`verdicts`).

The same is done for features of an untrained encoder and for random tokens that fire as often.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from tqdm import tqdm

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.cells.tokens import token_texts
from scfm_circuits.common.files import digest
from scfm_circuits.common.kept import stamp_of
from scfm_circuits.common.randomness import generator
from scfm_circuits.features.baselines import untrained_encoder, untrained_statistics
from scfm_circuits.features.statistics import FeatureStatistics
from scfm_circuits.interpretability.deck import FEATURE, RANDOM, UNTRAINED
from scfm_circuits.interpretability.explanations import (
    Items,
    description_bits,
    explain,
    family_items,
    items_from,
    read_gene_groups,
)
from scfm_circuits.interpretability.mentions import (
    SplitPairs,
    get_held_out_counts,
    mentions_fired,
    split_pairs,
)
from scfm_circuits.transcoders.training.settings import Control
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM

    from scfm_circuits.common.profile import Profile

KINDS = ("gene", "family", "token")
"""Kinds of explanations that every feature gets."""
GENE, FAMILY, SUB_WORD, EITHER, NONE, RARE = (
    "gene", "family", "sub-word", "either", "none", "too rare")
VERDICTS = (GENE, FAMILY, SUB_WORD, EITHER, NONE, RARE)
"""See `verdicts`."""
MARGIN = 0.1
"""By how much of F1 one explanation must do better than another."""
ENOUGH_F1 = 0.5
"""An explanation must reach this F1 on held-out cells to count as one."""
MIN_FIRED = 5
"""Held-out mentions that a feature must fire on to get a verdict."""
RANDOM_TOKENS = 3
"""A decoy of random tokens has at least so many of them."""
DECOYS = 256
"""Decoys of either kind that are scored in each layer, at most."""
_FEATURES_AT_ONCE = 2048


class Kinds(NamedTuple):
    """What may explain a feature: the items of each kind, and the pairs that mentions come from."""

    items: Mapping[str, Items]
    pairs: SplitPairs


def corpus_kinds(statistics: FeatureStatistics, corpus: Corpus, profile: "Profile",
                 sets: Mapping[str, Mapping[str, Sequence[str]]] | None = None) -> Kinds:
    """Genes, families and tokens of the corpus.

    sets: more kinds, for each the genes of its items by name (the planted programs, say).

    Raises:
        InputError: `gene_groups` is not such a table.
    """
    groups = read_gene_groups(profile.gene_groups) if profile.gene_groups is not None else None
    pairs = split_pairs(statistics, corpus)
    tokens = np.unique(pairs.token)
    items = gene_kinds(pairs, corpus.symbols, token_texts(corpus.tokenizer, tokens), groups)
    for kind, named in (sets or {}).items():
        items[kind] = set_items(named, corpus.symbols)
    return Kinds(items, pairs)


def gene_kinds(pairs: SplitPairs, symbols: np.ndarray, texts: Sequence[str],
               groups: Mapping[str, Sequence[str]] | None = None) -> dict[str, Items]:
    """The items of `KINDS`; texts: those of the distinct tokens of `pairs`, by ascending id.

    Where every gene is one token and every token one gene, there are no sub-words to be named.
    """
    n = len(symbols)
    distinct = np.unique(pairs.token)
    token = np.searchsorted(distinct, pairs.token)
    sub_words = not len(distinct) == len(np.unique(pairs.gene)) == len(pairs.pair)
    return {"gene": items_from(symbols.tolist(), np.arange(n), np.arange(n), n),
            "family": family_items(symbols, groups),
            "token": items_from(texts, token, pairs.gene, n) if sub_words
            else items_from([], token[:0], pairs.gene[:0], n)}


def set_items(named: Mapping[str, Sequence[str]], symbols: np.ndarray) -> Items:
    """Gene sets as items, those without a gene of the corpus too."""
    place = {str(symbol).upper(): gene for gene, symbol in enumerate(symbols)}
    pairs = np.array([(i, place[gene.upper()]) for i, genes in enumerate(named.values())
                      for gene in genes if gene.upper() in place], np.int64).reshape(-1, 2)
    return items_from(list(named), pairs[:, 0], pairs[:, 1], len(symbols))


# --- scoring -------------------------------------------------------------------------------------


def score_counts(train: sp.csr_matrix, held_out: sp.csr_matrix, kinds: Kinds) -> pd.DataFrame:
    """Score features by their counts on `kinds.pairs`, (n, n_pairs) in training and held out.

    Columns: train_fired, held_out_fired (mentions), held_out_rate (share of all mentions), for each
    kind <kind>_items (names, "; " between), _n_items, _bits, _precision, _recall, _f1, _auroc, and
    for `KINDS` a verdict.
    """
    pairs = kinds.pairs
    before = mentions_fired(train, pairs.gene, pairs.train_mentions)
    after = mentions_fired(held_out, pairs.gene, pairs.held_out_mentions)
    fired = [np.asarray(np.add.reduceat(np.append(one.fired, 0.0), one.indptr[:-1])
                        * (np.diff(one.indptr) > 0)) for one in (before, after)]
    columns: dict[str, object] = {
        "train_fired": fired[0].astype(int), "held_out_fired": fired[1].astype(int),
        "held_out_rate": fired[1] / max(float(after.present.sum()), 1.0)}
    for kind, items in kinds.items.items():
        found = explain(before, after, items)
        columns |= {
            f"{kind}_items": ["; ".join(items.names[row[row >= 0]]) for row in found.items],
            f"{kind}_n_items": found.size,
            f"{kind}_bits": description_bits(found.size, len(items.names)),
            f"{kind}_precision": found.precision, f"{kind}_recall": found.recall,
            f"{kind}_f1": found.f1, f"{kind}_auroc": found.auroc}
    frame = pd.DataFrame(columns)
    frame["verdict"] = verdicts(frame)
    return frame


def verdicts(scores: pd.DataFrame, margin: float = MARGIN) -> np.ndarray:
    """What explains each feature, by F1 on held-out cells; one of `VERDICTS`.

    - `gene` or `family`: naming genes or families predicts better than naming sub-words, by the
      margin; `family` if families do better than genes, by the margin. These two are what the paper
      calls gene-level interpretable.
    - `sub-word`: naming sub-words predicts better than either, by the margin.
    - `either`: something explains it, but these cells do not tell which, as where a token stands in
      the genes of one family alone.
    - `none`: no explanation reaches `ENOUGH_F1`, or none beats "fires on every gene" by the margin.
    - `too rare`: it fires on fewer than `MIN_FIRED` held-out mentions.

    Where genes are tokens (`gene_kinds`) no feature is `sub-word` or `either`.
    """
    gene, family, token = (scores[f"{kind}_f1"].fillna(0).to_numpy() for kind in KINDS)
    rate = scores["held_out_rate"].to_numpy()
    level = np.maximum(gene, family)
    needed = np.maximum(ENOUGH_F1, 2 * rate / (1 + rate) + margin)
    return np.select(
        [scores["held_out_fired"].to_numpy() < MIN_FIRED, np.maximum(level, token) < needed,
         (level >= token + margin) & (family >= gene + margin), level >= token + margin,
         token >= level + margin],
        [RARE, NONE, FAMILY, GENE, SUB_WORD], EITHER)


def score_features(statistics: FeatureStatistics, held_out: Sequence[sp.csr_matrix], kinds: Kinds,
                   live: np.ndarray) -> pd.DataFrame:
    """`score_counts` for the features that are live, (n_layers, n_features) bool.

    Columns before its own: layer, feature, log10_E_f, in_genes (share of its activations that are
    inside genes: the score is about these alone).
    """
    parts = []
    with tqdm(total=int(live.sum()), desc="scores", unit="feature") as bar:
        for layer, chosen in _blocks(live):
            counts = statistics.counts[layer][chosen]
            inside = counts[:, kinds.pairs.pair]
            after = held_out[layer][chosen][:, kinds.pairs.pair]
            before = sp.csr_matrix(inside - after)
            before.eliminate_zeros()
            fired = np.maximum(statistics.fired[layer, chosen], 1)
            parts.append(_of_features(
                score_counts(before, after, kinds), statistics, layer, chosen,
                np.asarray(inside.sum(axis=1)).ravel() / fired))
            bar.update(len(chosen))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _of_features(scores: pd.DataFrame, statistics: FeatureStatistics, layer: int,
                 features: np.ndarray, in_genes: np.ndarray | float) -> pd.DataFrame:
    """The scores behind the columns of `score_features` that say whose they are."""
    return pd.concat([pd.DataFrame({
        "layer": layer, "feature": features,
        "log10_E_f": statistics.log10_frequency[layer, features], "in_genes": in_genes}), scores],
        axis=1)


def _blocks(live: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Layers and some of their live features at a time, so that memory is bounded."""
    for layer, row in enumerate(live):
        chosen = np.flatnonzero(row)
        for start in range(0, len(chosen), _FEATURES_AT_ONCE):
            yield layer, chosen[start : start + _FEATURES_AT_ONCE]


# --- decoys --------------------------------------------------------------------------------------


def draw_tokens(occurrences: np.ndarray, wanted: float, rng: np.random.Generator
                ) -> tuple[np.ndarray, float]:
    """Random tokens for a decoy that fires `wanted` times, and how likely it fires on each.

    Tokens are drawn until there are at least three of them and they occur that often together; on
    each occurrence the decoy fires with the same probability. occurrences: (n_tokens,).
    """
    drawn = rng.permutation(len(occurrences))
    sums = np.cumsum(occurrences[drawn])
    n = min(max(RANDOM_TOKENS, int(np.searchsorted(sums, wanted)) + 1), len(drawn))
    return drawn[:n], min(1.0, wanted / sums[n - 1])


def random_token_counts(pairs: SplitPairs, fired: np.ndarray, rng: np.random.Generator
                        ) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Counts of decoys that fire on random tokens, (n, n_pairs) in training and held out.

    fired: (n,) how often each shall fire inside genes. See `draw_tokens`.
    """
    tokens, place = np.unique(pairs.token, return_inverse=True)
    occurrences = np.bincount(place, pairs.train_count + pairs.held_out_count)
    by_token = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[by_token], np.arange(len(tokens) + 1))
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for wanted in fired:
        drawn, rate = draw_tokens(occurrences, wanted, rng)
        columns = np.sort(np.concatenate([by_token[starts[i] : starts[i + 1]] for i in drawn]))
        rows.append((columns, rng.binomial(pairs.train_count[columns], rate),
                     rng.binomial(pairs.held_out_count[columns], rate)))
    indptr = np.append(0, np.cumsum([len(one[0]) for one in rows])).astype(np.int64)
    indices = np.concatenate([one[0] for one in rows] or [np.zeros(0, np.int64)])
    made = []
    for which in (1, 2):
        data = np.concatenate([one[which] for one in rows] or [np.zeros(0, np.int64)])
        made.append(sp.csr_matrix((data, indices, indptr), (len(rows), len(pairs.pair))))
        made[-1].eliminate_zeros()
    return made[0], made[1]


def score_random_tokens(statistics: FeatureStatistics, kinds: Kinds, live: np.ndarray, seed: int
                        ) -> pd.DataFrame:
    """`score_features` of decoys that fire on random tokens as often as live features do.

    Each matches one of up to `DECOYS` live features of the layer, drawn at random (column feature).
    """
    parts = []
    for layer, row in enumerate(live):
        rng = generator(seed, "scores of random tokens", layer)
        chosen = np.sort(rng.permutation(np.flatnonzero(row))[:DECOYS])
        inside = statistics.counts[layer][chosen][:, kinds.pairs.pair]
        train, held_out = random_token_counts(kinds.pairs, np.asarray(inside.sum(axis=1)).ravel(),
                                              rng)
        parts.append(_of_features(score_counts(train, held_out, kinds), statistics, layer, chosen,
                                  1.0))
    return pd.concat(parts, ignore_index=True)


# --- everything ----------------------------------------------------------------------------------


class FeatureScores(NamedTuple):
    """Scores of the live features, and of the decoys with a column source."""

    features: pd.DataFrame
    decoys: pd.DataFrame


def feature_scores(model: "GPTNeoXForCausalLM", transcoders: Transcoders,
                   statistics: FeatureStatistics, corpus: Corpus, profile: "Profile",
                   sets: Mapping[str, Mapping[str, Sequence[str]]] | None = None) -> FeatureScores:
    """Scores of every live feature of every layer (cut of Figure 3), and of decoys beside them.

    sets: as in `corpus_kinds`. The untrained encoder is that of the controls, as wide as the
    transcoders.
    """
    kinds = corpus_kinds(statistics, corpus, profile, sets)
    held_out = get_held_out_counts(model, transcoders, corpus, profile)
    live = statistics.live(profile.live_cut)
    features = score_features(statistics, held_out, kinds, live)
    features.insert(3, "live_table4", features["log10_E_f"] >= profile.live_cut_table4)
    n = transcoders.n_features
    other = untrained_statistics(model, statistics, corpus, profile, n_features=n)
    encoder = untrained_encoder(model, statistics, corpus, profile, n)
    fired = digest(np.ascontiguousarray(other.fired).tobytes())
    counted = get_held_out_counts(model, encoder, corpus, profile, Control(
        "untrained", stamp_of(profile, (), ("features/baselines",), counted=fired)))
    some = np.zeros_like(live)
    for layer, row in enumerate(other.live(profile.live_cut)):
        rng = generator(profile.seed, "scored features of the untrained encoder", layer)
        some[layer, rng.permutation(np.flatnonzero(row))[:DECOYS]] = True
    return FeatureScores(features, pd.concat([
        score_features(other, counted, kinds, some).assign(source=UNTRAINED),
        score_random_tokens(statistics, kinds, live, profile.seed).assign(source=RANDOM)],
        ignore_index=True))


def margin_table(scores: FeatureScores) -> pd.DataFrame:
    """`verdict_shares` over all layers under half the margin, the margin, and twice the margin."""
    parts = [verdict_shares(scores, margin).assign(margin=margin)
             for margin in (MARGIN / 2, MARGIN, 2 * MARGIN)]
    table = pd.concat(parts)
    table = table[table["layer"] == "all"].drop(columns="layer")
    table.insert(1, "margin", table.pop("margin"))
    return table


def level_shares(shares: pd.DataFrame) -> dict[str, float | None]:
    """Shares of the verdicts over all layers as flat values; None where none has a verdict.

    shares: from `verdict_shares`. Keys: `<features, untrained or random>.<gene_level, sub_word,
    either or none>`; gene_level is what the paper calls so, `gene` and `family` together.
    """
    overall = {row["source"]: row for row in shares[shares["layer"] == "all"].to_dict("records")}
    parts = {"gene_level": [GENE, FAMILY], "sub_word": [SUB_WORD], "either": [EITHER],
             "none": [NONE]}
    found: dict[str, float | None] = {}
    for source, name in ((FEATURE, "features"), (UNTRAINED, "untrained"), (RANDOM, "random")):
        row = overall.get(source, {"scored": 0})
        for part, named in parts.items():
            found[f"{name}.{part}"] = sum(row[one] for one in named) if row["scored"] else None
    return found


def verdict_shares(scores: FeatureScores, margin: float = MARGIN) -> pd.DataFrame:
    """By source and layer, and over all layers: the shares of the verdicts other than `too rare`.

    Columns: source, layer ("all": every layer), scored (features with a verdict), too_rare, and a
    share for each other verdict.
    """
    everything = pd.concat([scores.features.assign(source=FEATURE), scores.decoys],
                           ignore_index=True)
    everything["verdict"] = verdicts(everything, margin)
    rows = []
    for source, part in everything.groupby("source", sort=False):
        for layer, one in [*part.groupby("layer"), ("all", part)]:
            told = one[one["verdict"] != RARE]
            shares = {verdict: (told["verdict"] == verdict).mean() if len(told) else np.nan
                      for verdict in VERDICTS if verdict != RARE}
            rows.append({"source": source, "layer": layer, "scored": len(told),
                         "too_rare": len(one) - len(told), **shares})
    return pd.DataFrame(rows)
