"""Which gene program matches each live feature's list best, where the programs are known.

Only for simulated cells. The programs serve as a gene-set library of the enrichment engine; beside
the features stand the null lists and the features that learnt nothing of `layer_counts`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.cells.simulated import Plan
from scfm_circuits.common.profile import Profile
from scfm_circuits.common.randomness import generator
from scfm_circuits.enrichment.controls.layer_counts import (
    NULLS,
    Tester,
    layer_controls,
    null_source,
    testers,
)
from scfm_circuits.enrichment.controls.tables import FEATURES, column_name, verdict_table
from scfm_circuits.enrichment.gene_sets import GeneSets, gene_sets_from_dict
from scfm_circuits.enrichment.null_lists import Ragged, ragged
from scfm_circuits.enrichment.significance import percent, ratio
from scfm_circuits.features.gene_lists import gene_list_ids
from scfm_circuits.features.statistics import FeatureStatistics


def programs_library(plan: Plan) -> GeneSets:
    """The programs as a gene-set library, a term each."""
    return gene_sets_from_dict("planted programs", {one.name: one.genes for one in plan.programs})


class ProgramMatches(NamedTuple):
    """Features' gene lists against the programs, see `program_matches`."""

    features: pd.DataFrame
    """One row per live feature: `verdict_table`, and program (the best one), kind, best_p, best_q,
    overlap, list_genes, matched."""
    programs: pd.DataFrame
    """One row per program: who matches it, the best list, and what null lists have."""
    lists: pd.DataFrame
    """One row per kind of lists: share matching a program, programs matched."""


def program_matches(statistics: FeatureStatistics, baselines: Mapping[str, FeatureStatistics],
                    corpus: Corpus, profile: Profile, plan: Plan, draws: int = 20
                    ) -> ProgramMatches:
    """The best program of every live feature (cut of Table 4), beside the controls.

    Lists are made under the profile's gene rule, and tested under the rule `corpus`: the corpus's
    genes as background, Benjamini-Hochberg over all programs. A list matches its best program if
    that q is below the profile's FDR; whether a feature is beyond all controls is decided as in
    `verdict_table`, with the programs as the only library. For each kind of null lists every live
    feature has `draws` lists, one in each draw, so a draw is a whole set of features.

    Columns of `programs`: program, kind, cell_types, genes (planted), corpus_genes (that occur in
    prompts), features (that match it best), and of them ahead_of_controls (p_controls below
    the FDR before correction over features) and beyond_all_controls; best_layer, best_feature,
    best_overlap, best_list_genes, best_precision (overlap / list) and best_recall (overlap /
    corpus_genes) of the match with the smallest p; and for each control <control>_features and
    <control>_recall, the number of matches and the best one's recall (0 where none matches), for
    null lists as means over draws.
    Columns of `lists`: lists, tested, matched, percentage, programs (that have a match; null lists:
    mean over draws), own_programs (of them, those planted for one cell type).
    """
    ready = testers([programs_library(plan)], corpus, profile)
    tester = next(one for one in ready if one.rule == "corpus")
    program_of = _program_of(corpus, plan)
    everything: dict[str, FeatureStatistics] = {FEATURES: statistics, **baselines}
    found: dict[str, list[pd.DataFrame]] = {name: [] for name in (FEATURES, *NULLS, *baselines)}
    layers = []
    for layer in range(len(statistics.fired)):
        layers.append(layer_controls(statistics, baselines, layer, corpus, profile, ready))
        for name, one in everything.items():
            chosen = np.flatnonzero(one.live(profile.live_cut_table4)[layer])
            own = ragged(gene_list_ids(one, layer, chosen, corpus, profile))
            matched = _matched(own, tester, program_of)
            found[name].append(matched.assign(layer=layer, feature=chosen, draw=0))
            if name != FEATURES or not len(chosen):
                continue
            source = null_source(statistics, layer, chosen, own, corpus, profile)
            for i, kind in enumerate(NULLS):
                rng = generator(profile.seed, "null lists of programs", layer, i)
                matched = _matched(source.draw(kind, rng, draws), tester, program_of)
                found[kind].append(matched.assign(draw=np.repeat(np.arange(draws), len(chosen))))
    tables = {name: pd.concat(parts, ignore_index=True) for name, parts in found.items() if parts}
    verdicts = verdict_table(layers, list(baselines), profile)
    features = verdicts.merge(tables[FEATURES].drop(columns="draw"), on=["layer", "feature"],
                              validate="one_to_one")
    return ProgramMatches(_named(features, plan), _program_table(features, tables, corpus, plan,
                                                                 draws, profile.fdr),
                          _list_table(tables, plan, draws))


def _program_of(corpus: Corpus, plan: Plan) -> np.ndarray:
    """(n_genes,) index of the program of each of the corpus's genes, -1 for none."""
    place = {gene.upper(): i for i, one in enumerate(plan.programs) for gene in one.genes}
    return np.array([place.get(str(symbol).upper(), -1) for symbol in corpus.symbols])


def _matched(lists: Ragged, tester: Tester, program_of: np.ndarray) -> pd.DataFrame:
    """For each list: best (program's index, -1 for none), best_p, best_q, overlap, list_genes,
    matched."""
    result = tester.tested(lists)[0]
    row = np.repeat(np.arange(lists.lengths.size), lists.lengths)
    # Programs share no gene, so a gene counts for the best program or for none.
    inside = program_of[lists.ids] == np.where(result.best_term < 0, -2, result.best_term)[row]
    overlap = np.bincount(row, weights=inside, minlength=lists.lengths.size).astype(int)
    return pd.DataFrame({"best": result.best_term, "best_p": result.min_p, "best_q": result.min_q,
                         "overlap": overlap, "list_genes": lists.lengths,
                         "matched": result.n_significant > 0})


def _named(features: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    names = np.array([*(one.name for one in plan.programs), ""])
    kinds = np.array([*(one.kind for one in plan.programs), ""])
    best = features["best"].to_numpy()
    return features.drop(columns="best").assign(program=names[best], kind=kinds[best])


def _program_table(features: pd.DataFrame, tables: Mapping[str, pd.DataFrame], corpus: Corpus,
                   plan: Plan, draws: int, fdr: float) -> pd.DataFrame:
    program_of = _program_of(corpus, plan)[corpus.occurring]
    rows = []
    for i, program in enumerate(plan.programs):
        n_genes = int((program_of == i).sum())
        own = features[(features["best"] == i) & features["matched"]]
        row = {"program": program.name, "kind": program.kind,
               "cell_types": "; ".join(program.cell_types), "genes": len(program.genes),
               "corpus_genes": n_genes, "features": len(own),
               "ahead_of_controls": int((own["p_controls"] < fdr).sum()),
               "beyond_all_controls": int(own["beyond_all_controls"].sum())}
        best = own.sort_values(["best_p", "layer", "feature"]).head(1)
        for name in ("layer", "feature", "overlap", "list_genes"):
            row[f"best_{name}"] = int(best[name].iloc[0]) if len(best) else None
        row["best_precision"] = _best(best, "list_genes")
        row["best_recall"] = _best(best.assign(n=n_genes), "n")
        for name, table in tables.items():
            if name != FEATURES:
                n = draws if name in NULLS else 1
                null = table[(table["best"] == i) & table["matched"]]
                first = null.sort_values("best_p", kind="stable").groupby("draw").head(1)
                row[f"{column_name(name)}_features"] = len(null) / n
                row[f"{column_name(name)}_recall"] = ratio(first["overlap"].sum() / n, n_genes)
        rows.append(row)
    table = pd.DataFrame(rows)
    whole = ["best_layer", "best_feature", "best_overlap", "best_list_genes"]
    return table.astype(dict.fromkeys(whole, "Int64"))


def _best(best: pd.DataFrame, of: str) -> float:
    return ratio(best["overlap"].iloc[0], best[of].iloc[0]) if len(best) else np.nan


def _list_table(tables: Mapping[str, pd.DataFrame], plan: Plan, draws: int) -> pd.DataFrame:
    rows = []
    own = [i for i, program in enumerate(plan.programs) if program.kind == "own"]
    for name, table in tables.items():
        n = draws if name in NULLS else 1
        hit = table[table["matched"]]
        programs = hit.groupby("draw")["best"].nunique().sum() / n
        planted = hit[hit["best"].isin(own)].groupby("draw")["best"].nunique().sum() / n
        rows.append((name, len(table), len(hit), 100 * ratio(len(hit), len(table)), programs,
                     planted))
    return pd.DataFrame(rows, columns=["lists", "tested", "matched", "percentage", "programs",
                                       "own_programs"])


def feature_figures(matches: ProgramMatches) -> dict[str, float]:
    """What `program_matches` says, for a page.

    Keys: features, matched (percent), ahead (percent, of every control, one by one), beyond
    (number, after correction), own_programs (matched by a feature), best_recall, best_precision
    (medians over the programs of one type of the best feature's list), best_recall_control (of the
    control that does best).
    """
    lists = matches.lists.set_index("lists")
    matched, own_programs = map(float, lists.loc[FEATURES, ["percentage", "own_programs"]])
    own = matches.programs[matches.programs["kind"] == "own"]
    recalls = own[[f"{column_name(str(name))}_recall" for name in lists.index.drop(FEATURES)]]
    n = len(matches.features)
    return {
        "features": n, "matched": matched,
        "ahead": 100 * int(matches.programs["ahead_of_controls"].sum()) / n,
        "beyond": int(matches.features["beyond_all_controls"].sum()),
        "own_programs": own_programs,
        "best_recall": float(own["best_recall"].fillna(0).median()),
        "best_precision": float(own["best_precision"].median()),
        "best_recall_control": float(recalls.median().max())}


def features_in_prose(matches: ProgramMatches, types: int) -> str:
    """What `program_matches` says, for a page. types: how many cell types there are."""
    said = feature_figures(matches)
    others = "; ".join(f"{row.lists} {row.percentage:.1f} % and {row.own_programs:.1f}"
                       for row in matches.lists.itertuples() if row.lists != FEATURES)
    return (
        f"Of {said['features']:,} live features {said['matched']:.1f} % "
        f"match a program. {said['ahead']:.1f} % match one and are ahead of every control at the "
        f"same level, one by one; after correction over all features {said['beyond']:,} are. Of "
        f"the {types} programs that are planted for one cell type "
        f"{said['own_programs']:.0f} have a feature that matches. For lists that no "
        "trained feature made, the share that matches and the number of these programs matched "
        f"are: {others}. The best feature of such a program lists a median of "
        f"{percent(said['best_recall'])} of its genes (with "
        f"{percent(said['best_precision'])} of the list in the program), the best list of "
        f"the control that does best {percent(said['best_recall_control'])}.")
