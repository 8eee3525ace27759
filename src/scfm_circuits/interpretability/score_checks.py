"""Is the automatic score right? Against features made to be known, the paper's rows, the planted.

- Features are made that fire on some genes, families or sub-words of the run's own corpus, with and
  without other mentions mixed in. How often does the verdict name what they are?
- Table 3 describes 20 features in words ("PN token in PTPN family genes"). Features that fire just
  as described, on every occurrence, are made on the run's own corpus and scored; the verdict stands
  beside the paper's Yes or No. `data/paper/table3_reading.csv` is our reading of these words.
- In simulated cells the genes of every program are known. Features whose gene list matches a
  program should be scored gene- or family-level, or be predicted by the program, more often than
  features that match none and than decoys.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.cells.simulated import Plan
from scfm_circuits.cells.tokens import token_texts
from scfm_circuits.common.profile import ROOT, Profile
from scfm_circuits.common.randomness import generator
from scfm_circuits.enrichment.controls.layer_counts import tester_of
from scfm_circuits.enrichment.gene_sets import gene_sets_from_dict
from scfm_circuits.enrichment.null_lists import ragged
from scfm_circuits.enrichment.rules import RULES
from scfm_circuits.features.gene_lists import gene_list_ids
from scfm_circuits.features.statistics import FeatureStatistics
from scfm_circuits.interpretability.deck import FEATURE, RANDOM
from scfm_circuits.interpretability.explanations import AT_MOST
from scfm_circuits.interpretability.mentions import SplitPairs
from scfm_circuits.interpretability.scores import (
    EITHER,
    FAMILY,
    GENE,
    MARGIN,
    MIN_FIRED,
    NONE,
    RARE,
    SUB_WORD,
    FeatureScores,
    Kinds,
    corpus_kinds,
    score_counts,
)

PURITIES = (1.0, 0.7)
"""Shares of a made feature's activations that are where it is said to fire."""
READING = ROOT / "data" / "paper" / "table3_reading.csv"


class Checks(NamedTuple):
    """The score on features of which it is known what they are.

    made: `known_feature_table`. table3: `table3_check`. judged: `table3_summary`.
    """

    made: pd.DataFrame
    table3: pd.DataFrame
    judged: pd.DataFrame

    def made_shares(self) -> dict[str, float | None]:
        """Shares of made features' verdicts; None where none could be made.

        Keys: what they fire on and their purity without its point, as in `gene_07` (called gene-
        or family-level) and `gene_07_either`.
        """
        found: dict[str, float | None] = {}
        for kind in ("gene", "family", "token"):
            for purity in PURITIES:
                of = self.made[(self.made["fires_on"] == kind) & (self.made["purity"] == purity)]
                name = f"{kind}_{purity:g}".replace("0.", "0")
                for suffix, column in (("", "gene_or_family"), ("_either", "either")):
                    found[name + suffix] = float(of[column].iloc[0]) if len(of) else None
        return found

    def called(self, judgement: str) -> tuple[int, int]:
        """Of the paper's rows so judged (Yes or No), how many are scored gene- or family-level, and
        how many could be made."""
        row = self.judged[self.judged["paper"] == judgement].drop(columns="paper")
        return int(row[[GENE, FAMILY]].to_numpy().sum()), int(row.to_numpy().sum())


def check_scores(statistics: FeatureStatistics, corpus: Corpus, profile: Profile,
                 plan: Plan | None, table3: pd.DataFrame) -> Checks:
    """Score features made to be known, and features that fire as the paper's Table 3 describes."""
    kinds = corpus_kinds(statistics, corpus, profile, program_sets(plan))
    texts = token_texts(corpus.tokenizer, np.unique(kinds.pairs.token))
    check = table3_check(table3, read_reading(READING), kinds, texts, corpus.symbols)
    return Checks(known_feature_table(kinds, profile.seed), check, table3_summary(check))


# --- features made to be known -------------------------------------------------------------------


def known_items(kind: str, kinds: Kinds) -> np.ndarray:
    """Items that a made feature may fire on.

    Families of at least two genes, and sub-words in genes of more families than an explanation may
    name: otherwise no one could tell what the feature is. All must stand in held-out cells.
    """
    items, present = kinds.items[kind], kinds.pairs.held_out_mentions
    item = np.repeat(np.arange(len(items.names)), np.diff(items.item_indptr))
    n = len(items.names)
    enough = np.bincount(item, present[items.item_genes], minlength=n) >= MIN_FIRED
    there = present[items.item_genes] > 0
    if kind == "family":
        return np.flatnonzero(enough & (np.bincount(item[there], minlength=n) >= 2))
    if kind == "token":
        families = kinds.items["family"]
        first = families.gene_items[families.gene_indptr[:-1]]
        met = np.unique(np.stack([item, first[items.item_genes]])[:, there], axis=1)[0]
        return np.flatnonzero(enough & (np.bincount(met, minlength=n) > AT_MOST))
    return np.flatnonzero(enough)


def made_features(kind: str, kinds: Kinds, n: int, purity: float, rng: np.random.Generator
                  ) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Counts of up to n features that fire on one to three items of a kind, training and held out.

    A feature of genes fires on all of their tokens, one of sub-words on these tokens; on each
    occurrence with the same probability, from 0.7 to 1. purity: share of its activations that are
    there; the others are spread over all tokens.
    """
    pairs, items, allowed = kinds.pairs, kinds.items[kind], known_items(kind, kinds)
    place = np.searchsorted(np.unique(pairs.token), pairs.token)
    total = pairs.train_count + pairs.held_out_count
    rows = []
    for _ in range(n if len(allowed) else 0):
        chosen = rng.permutation(allowed)[: rng.integers(1, AT_MOST + 1)]
        genes = np.concatenate([items.item_genes[items.item_indptr[i] : items.item_indptr[i + 1]]
                                for i in chosen])
        inside = np.isin(place, chosen) if kind == "token" else np.isin(pairs.gene, genes)
        rate = np.where(inside, rng.uniform(0.7, 1), 0.0)
        other = total[~inside].sum()
        if other:
            rate[~inside] = min(1.0, (1 / purity - 1) * (rate * total).sum() / other)
        rows.append([rng.binomial(count, rate) for count in (pairs.train_count,
                                                             pairs.held_out_count)])
    made = np.array(rows, np.int64).reshape(-1, 2, len(pairs.pair))
    return sp.csr_matrix(made[:, 0]), sp.csr_matrix(made[:, 1])


MADE = ("fires_on", "purity", "features", "gene_or_family", "either", "sub_word", "none")
"""Columns of the verdicts on made features, also where none could be made."""


def known_feature_table(kinds: Kinds, seed: int, n: int = 100) -> pd.DataFrame:
    """Verdicts on features of which it is known what they fire on.

    Columns: fires_on (a kind of items), purity, features (with a verdict), gene_or_family, either,
    sub_word, none (shares); if programs are a kind, program_beyond_sub_words too (see
    `planted_score_table`). No rows for a kind of which the corpus has no fitting item.
    """
    rows = []
    for place, kind in enumerate(kinds.items):
        for purity in PURITIES:
            rng = generator(seed, "features with known items", place)
            made = made_features(kind, kinds, n, purity, rng)
            if made[0].shape[0]:
                scores = score_counts(*made, kinds)
                told = scores[scores["verdict"] != RARE]
                rows.append({"fires_on": kind, "purity": purity, "features": len(told),
                             **_shares(told)})
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=MADE)


def _shares(told: pd.DataFrame) -> dict[str, float]:
    share = told["verdict"].value_counts(normalize=True)
    found = {"gene_or_family": share.get(GENE, 0.0) + share.get(FAMILY, 0.0),
             "either": share.get(EITHER, 0.0), "sub_word": share.get(SUB_WORD, 0.0),
             "none": share.get(NONE, 0.0)}
    if "program_f1" in told:
        # Where there are no sub-words, genes are what is named otherwise.
        other = told["token_f1"].fillna(told["gene_f1"]).fillna(0)
        beyond = told["program_f1"].fillna(0) >= other + MARGIN
        found["program_beyond_sub_words"] = float(beyond.mean())
    return found


# --- the paper's Table 3 -------------------------------------------------------------------------


def described_pairs(token: str, position: str, genes: str, pairs: SplitPairs,
                    texts: Sequence[str], symbols: np.ndarray) -> np.ndarray:
    """(n_pairs,) bool: the pairs on which a described feature fires.

    token: without the space that a first token carries; position: `any`, or `last` of its gene;
    genes: symbols or patterns such as `PTPN*`, between spaces; texts: of the distinct tokens of
    `pairs`, by ascending id, a leading space shown as `_`.
    """
    is_token = np.array([text.removeprefix("_") == token for text in texts], bool)
    patterns = genes.split()
    fits = np.array([any(fnmatchcase(str(symbol).upper(), one) for one in patterns)
                     and (position == "any" or str(symbol).endswith(token))
                     for symbol in symbols], bool)
    place = np.searchsorted(np.unique(pairs.token), pairs.token)
    return np.logical_and(is_token[place], fits[pairs.gene])


def read_reading(path: str | Path) -> pd.DataFrame:
    """Our reading of Table 3's words; columns feature, token, position, genes."""
    return pd.read_csv(path, dtype={"token": str, "genes": str}, keep_default_na=False)


def table3_check(table3: pd.DataFrame, reading: pd.DataFrame, kinds: Kinds, texts: Sequence[str],
                 symbols: np.ndarray) -> pd.DataFrame:
    """Scores of features that fire as the rows of Table 3 describe.

    Columns: feature, activating_tokens, paper (Yes or No), described_genes (of the corpus, that
    hold the token and fit the description), token_genes (that hold the token), gene_f1, family_f1,
    token_f1, verdict (missing if the corpus has no such gene with such a token).
    """
    pairs = kinds.pairs
    rows = [described_pairs(row["token"], row["position"], row["genes"], pairs, texts, symbols)
            for row in reading.to_dict("records")]
    fires = np.array(rows, bool).reshape(len(reading), len(pairs.pair))
    scores = score_counts(sp.csr_matrix(fires * pairs.train_count),
                          sp.csr_matrix(fires * pairs.held_out_count), kinds)
    frame = table3.set_index("feature").loc[reading["feature"]].reset_index()
    held = [described_pairs(row["token"], "any", "*", pairs, texts, symbols)
            for row in reading.to_dict("records")]
    found = pd.Series(fires.any(axis=1))
    result = pd.DataFrame({
        "feature": frame["feature"], "activating_tokens": frame["activating_tokens"],
        "paper": frame["gene_level_interpretable"],
        "described_genes": [len(np.unique(pairs.gene[row])) for row in fires],
        "token_genes": [len(np.unique(pairs.gene[row])) for row in held],
        **{name: scores[name].where(found) for name in ("gene_f1", "family_f1", "token_f1")}})
    result["verdict"] = scores["verdict"].where(found & (scores["verdict"] != RARE))
    return result


def table3_summary(check: pd.DataFrame) -> pd.DataFrame:
    """How many of the paper's Yes and No rows get which verdict; columns paper, and verdicts."""
    told = check.dropna(subset="verdict")
    order = [GENE, FAMILY, EITHER, SUB_WORD, NONE]
    counts = pd.crosstab(told["paper"], told["verdict"]).reindex(columns=order, fill_value=0)
    return counts.reindex(["Yes", "No"], fill_value=0).rename_axis(columns=None).reset_index()


# --- planted programs ----------------------------------------------------------------------------


def program_sets(plan: Plan | None) -> dict[str, dict[str, Sequence[str]]] | None:
    """Planted programs, if there are any, as one more kind of explanation (`corpus_kinds`)."""
    return {"program": {one.name: one.genes for one in plan.programs}} if plan else None


def program_shares(planted: pd.DataFrame, made: pd.DataFrame) -> dict[str, float]:
    """Shares of features that naming programs predicts better than naming sub-words.

    planted: from `planted_score_table`. made: from `known_feature_table`. Keys: sources (those of
    their features whose program is known), `decoys` of either kind whatever their lists match,
    `made` to fire on programs alone.
    """
    share = "program_beyond_sub_words"
    known = planted[planted["program"] == "known"]
    decoys = planted[planted["source"] != FEATURE]
    ideal = made[(made["fires_on"] == "program") & (made["purity"] == 1)]
    return {**dict(zip(known["source"], known[share], strict=True)),
            "decoys": float((decoys[share] * decoys["features"]).sum() / decoys["features"].sum()),
            "made": float(ideal[share].mean())}


def planted_score_table(scores: FeatureScores, statistics: Mapping[str, FeatureStatistics],
                        corpus: Corpus, profile: Profile, plan: Plan) -> pd.DataFrame:
    """Verdicts of features whose planted program is known, of the others, and of decoys.

    A feature's program is known if its gene list (by occurrence) has one among its terms under the
    rule `corpus`. statistics: those of the features and of the untrained encoder, by source.

    Columns: source, program (known or not), features (with a verdict), gene_or_family, either,
    sub_word, none (shares), program_beyond_sub_words (share whose firing naming programs predicts
    better than naming sub-words, by the margin), program_auroc (median).
    """
    everything = pd.concat([scores.features.assign(source=FEATURE), scores.decoys])
    told = everything[everything["verdict"] != RARE].reset_index(drop=True)
    told["program"] = ""
    library = gene_sets_from_dict("planted programs",
                                  {one.name: one.genes for one in plan.programs})
    tester = tester_of(RULES["corpus"], [library], corpus, profile.fdr)
    by_gene = profile.model_copy(update={"gene_rule": "occurrence"})
    for source, one in statistics.items():
        for layer, part in told[told["source"] == source].groupby("layer"):
            lists = ragged(gene_list_ids(one, int(str(layer)), part["feature"].to_numpy(), corpus,
                                         by_gene))
            called, _ = tester.counted(lists)
            told.loc[part.index, "program"] = np.where(called, "known", "none matches")
    told.loc[told["source"] == RANDOM, "program"] = "there is none"
    rows = []
    for named, part in told.groupby(["source", "program"], sort=False):
        rows.append({"source": named[0], "program": named[1], "features": len(part),
                     **_shares(part), "program_auroc": part["program_auroc"].median()})
    table = pd.DataFrame(rows)
    return table.sort_values(["source", "program"], key=lambda column: column.map(
        {FEATURE: 0, "known": 0}).fillna(1), kind="stable", ignore_index=True)
