"""Is the automatic score right? Against the paper's printed rows, and against planted programs.

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
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scfm_circuits.controls import testers
from scfm_circuits.enrichment import ragged
from scfm_circuits.feature_scores import (
    EITHER,
    FAMILY,
    GENE,
    MARGIN,
    NONE,
    RARE,
    SUB_WORD,
    FeatureScores,
    Kinds,
    score_counts,
)
from scfm_circuits.features import FeatureStatistics, gene_list_ids
from scfm_circuits.held_out_counts import SplitPairs
from scfm_circuits.planted_cells import Plan
from scfm_circuits.planted_truth import programs_library
from scfm_circuits.rating_deck import FEATURE, RANDOM
from scfm_circuits.sentences import Corpus

if TYPE_CHECKING:
    from scfm_circuits.profile import Profile


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


def program_sets(plan: Plan) -> dict[str, dict[str, Sequence[str]]]:
    """The planted programs as one more kind of explanation, for `feature_scores.corpus_kinds`."""
    return {"program": {one.name: one.genes for one in plan.programs}}


def planted_score_table(scores: FeatureScores, statistics: Mapping[str, FeatureStatistics],
                        corpus: Corpus, profile: "Profile", plan: Plan) -> pd.DataFrame:
    """Verdicts of features whose planted program is known, of the others, and of decoys.

    A feature's program is known if its gene list (by occurrence) matches one, as in
    `planted_truth.program_matches`. statistics: those of the features and of the untrained encoder,
    by source.

    Columns: source, program (known or not), features (with a verdict), gene_or_family, either,
    sub_word, none (shares), program_beyond_sub_words (share whose firing naming programs predicts
    better than naming sub-words, by the margin), program_auroc (median).
    """
    everything = pd.concat([scores.features.assign(source=FEATURE), scores.decoys])
    told = everything[everything["verdict"] != RARE].reset_index(drop=True)
    told["program"] = ""
    tester = next(one for one in testers([programs_library(plan)], corpus, profile)
                  if one.rule == "corpus")
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
        share = part["verdict"].value_counts(normalize=True)
        beyond = part["program_f1"].fillna(0) >= part["token_f1"].fillna(0) + MARGIN
        rows.append((*tuple(named), len(part), share.get(GENE, 0.0) + share.get(FAMILY, 0.0),
                     share.get(EITHER, 0.0), share.get(SUB_WORD, 0.0), share.get(NONE, 0.0),
                     beyond.mean(), part["program_auroc"].median()))
    table = pd.DataFrame(rows, columns=[
        "source", "program", "features", "gene_or_family", "either", "sub_word", "none",
        "program_beyond_sub_words", "program_auroc"])
    return table.sort_values(["source", "program"], key=lambda column: column.map(
        {FEATURE: 0, "known": 0}).fillna(1), kind="stable", ignore_index=True)
