"""The studies behind Table 4's chapter, one function each, which return tables for the page.

1. `table4_study`: the features' own lists beside every control, layer by layer and one by one.
2. Is the test itself right (`nominal_level`), and what do its choices do (`choices`)?
3. Would a feature that is what it ought to be pass the controls (`planted_passing`)?
4. What is left as more is demanded (`demands`), and every feature's terms (`feature_tables`)?
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.intervals import wilson_interval
from scfm_circuits.common.profile import Profile
from scfm_circuits.common.randomness import generator
from scfm_circuits.enrichment.controls.joint_null import some_of
from scfm_circuits.enrichment.controls.layer_counts import (
    BAND_DRAWS,
    NULLS,
    LayerControls,
    Tester,
    get_controls,
    layer_controls,
    null_source,
    tester_of,
    testers,
)
from scfm_circuits.enrichment.controls.planted_features import planted_statistics
from scfm_circuits.enrichment.controls.tables import (
    FEATURES,
    detectable,
    pooled,
    share_table,
    smallest_possible_p,
    table4,
    verdict_table,
)
from scfm_circuits.enrichment.gene_sets import GeneSets
from scfm_circuits.enrichment.null_lists import ragged, uniform_null
from scfm_circuits.enrichment.rules import RULES
from scfm_circuits.enrichment.terms import top_terms
from scfm_circuits.features.contexts import top_tokens
from scfm_circuits.features.gene_lists import check_live, gene_list_ids, gene_lists
from scfm_circuits.features.statistics import FeatureStatistics

Baselines = Mapping[str, FeatureStatistics]

PURITIES = (1.0, 0.5, 0.25)
"""Shares of a planted feature's genes that are its term's."""
_LISTS = {"top 10": ("top", 10), "top 30": ("top", 30), "top 100": ("top", 100),
          "half of the activations": ("share", 0), "all activating genes": ("all", 0)}


def library_table(libraries: Sequence[GeneSets], corpus: Corpus) -> pd.DataFrame:
    """One row per library: its size, its source, and how many of the corpus's genes it lacks."""
    symbols = corpus.occurring_symbols
    return pd.DataFrame([{
        "library": one.name, "terms": len(one.terms), "genes": len(one.genes), "from": one.source,
        "corpus genes": len(symbols),
        "not in the library": sum(symbol.upper() not in one.index for symbol in symbols),
        "sha256": one.sha256[:12],
    } for one in libraries])


# --- Table 4 and its controls --------------------------------------------------------------------


class Table4Study(NamedTuple):
    """Table 4 beside every control."""

    counted: list[LayerControls]
    """Under the profile's gene rule, layer by layer, with the draws that the bands need."""
    shares: pd.DataFrame
    """`share_table` of these."""
    by_occurrence: pd.DataFrame
    """`share_table` under the gene rule `occurrence`."""
    verdicts: pd.DataFrame
    """`verdict_table` under the gene rule `occurrence` with all draws: a row per live feature."""
    table: pd.DataFrame
    """`tables.table4` of both: a row per layer."""
    median_length: float
    """Genes of the median list."""
    band_draws: int
    """Draws of a whole layer that the null bands are taken from."""
    smallest_possible_p: float
    """The smallest p against all controls that so few null lists and baseline features allow."""


def table4_study(statistics: FeatureStatistics, baselines: Baselines, corpus: Corpus,
                 profile: Profile, libraries: Sequence[GeneSets]) -> Table4Study:
    """Count every live feature's list beside its controls, or read what was counted before.

    Raises:
        InputError: no layer has a live feature.
    """
    cut = profile.live_cut_table4
    check_live(statistics, int(statistics.live(cut).sum(axis=1).argmax()), cut)
    # Table 4 needs the draws of the bands; the features one by one need all of them.
    few = profile.model_copy(update={"null_draws": min(BAND_DRAWS, profile.null_draws)})
    counted = get_controls(statistics, baselines, corpus, few, libraries)
    one_by_one = get_controls(statistics, baselines, corpus, by_occurrence(profile), libraries)
    shares = share_table(counted, list(baselines), profile)
    verdicts = verdict_table(one_by_one, list(baselines), profile)
    return Table4Study(
        counted, shares, share_table(one_by_one, list(baselines), profile), verdicts,
        table4(shares, verdicts, profile),
        float(np.median(np.concatenate([one.lengths for one in counted]))), few.null_draws,
        smallest_possible_p(one_by_one, list(baselines), profile.null_draws))


def by_gene_rule(study: Table4Study, profile: Profile) -> pd.DataFrame:
    """The shares under the profile's gene rule, and under `occurrence` if that is another; its
    name is the first column. Under the other gene rule only the rule `corpus`."""
    tables = {profile.gene_rule: study.shares}
    if profile.gene_rule != "occurrence":
        tables["occurrence"] = study.by_occurrence[study.by_occurrence["rule"] == "corpus"]
    return pd.concat([one.assign(gene_rule=rule)[["gene_rule", *one]]
                      for rule, one in tables.items()], ignore_index=True)


def every_rule(study: Table4Study, profile: Profile) -> pd.DataFrame:
    """For reading: a row per kind of lists, a column per rule and gene rule."""
    return pd.DataFrame({
        f"% by {rule}, genes by {gene_rule}": together(part).percentages[rule]
        for gene_rule, shares in by_gene_rule(study, profile).groupby("gene_rule", sort=False)
        for rule, part in shares.groupby("rule", sort=False)}).rename_axis("lists").reset_index()


def by_occurrence(profile: Profile) -> Profile:
    """The profile with the gene rule `occurrence`: a token counts for the gene it stood in."""
    return profile.model_copy(update={"gene_rule": "occurrence"})


def beside_paper(table: pd.DataFrame, printed: pd.DataFrame | None) -> pd.DataFrame:
    """`tables.table4` for reading, with the paper's layer at the same relative depth.

    printed: the paper's Table 4, a row per layer: layer, total, interpretable, percentage; None
    where this run's is not comparable with it, and stands alone.
    """
    own = pd.DataFrame({
        "layer": table["layer"], "live": table["live"], "interpretable": table["interpretable"],
        "%": table["percentage"].round(2)})
    if printed is None:
        return own
    depth = np.rint(np.linspace(0, len(printed) - 1, len(table))).astype(int)
    beside = printed.iloc[depth].reset_index(drop=True)
    return own.assign(**{
        "paper: layer": beside["layer"], "paper: live": beside["total"],
        "paper: interpretable": beside["interpretable"], "paper: %": beside["percentage"]})


class Together(NamedTuple):
    """All layers together, by rule: what the features are ahead of, and by how much."""

    percentages: pd.DataFrame
    """(kinds of lists, rules) percentage called interpretable."""
    highest: pd.Series
    """By rule, the control that scores highest."""
    lead: pd.Series
    """By rule, the features' percentage points ahead of it; negative: behind."""


def together(shares: pd.DataFrame) -> Together:
    """`share_table` with all layers together, and the features against the highest control."""
    sums = pooled(shares)
    wide = sums.pivot(index="lists", columns="rule", values="percentage").reindex(
        index=sums["lists"].unique(), columns=sums["rule"].unique())
    controls = wide.drop(index=FEATURES)
    return Together(wide, controls.idxmax(), (wide.loc[FEATURES] - controls).min())


# --- the test itself, and its choices ------------------------------------------------------------


def nominal_level(libraries: Sequence[GeneSets], corpus: Corpus, profile: Profile,
                  draws: int = 2000) -> pd.DataFrame:
    """Uniformly random lists of the corpus's genes called interpretable, library by library.

    Lists of 10, 30, 100 and 300 genes, each below half of the genes that occur; no rows if that
    leaves none. Columns: rule, library, genes, lists, called, percentage, lower_95, upper_95.
    """
    used = corpus.occurring
    rng = generator(profile.seed, "lists at the nominal level")
    ready, rows = testers(libraries, corpus, profile), []
    for length in (n for n in (10, 30, 100, 300) if n < len(used) / 2):
        drawn = uniform_null([length] * draws, len(used), rng)
        random_lists = drawn._replace(ids=used[drawn.ids])
        for tester in ready:
            for library, result in zip(libraries, tester.tested(random_lists), strict=True):
                hits = int((result.n_significant > 0).sum())
                low, high = wilson_interval(hits, draws)
                rows.append({"rule": tester.rule, "library": library.name, "genes": length,
                             "lists": draws, "called": hits, "percentage": 100 * hits / draws,
                             "lower_95": 100 * low, "upper_95": 100 * high})
    table = pd.DataFrame(rows)
    return table.sort_values(["rule", "library"], kind="stable") if rows else table


def choices(kinds: Mapping[str, FeatureStatistics], corpus: Corpus, profile: Profile,
            libraries: Sequence[GeneSets]) -> pd.DataFrame:
    """Share of lists called interpretable under other choices than the profile's, one at a time.

    kinds: statistics by name, those of the trained features (FEATURES) first. Lists made by other
    rules are tested under the profile's rule; backgrounds and Benjamini-Hochberg families are
    exchanged for the profile's own lists. Columns: choice, live and hits (of the trained features),
    percentage, then the percentage of each other kind and, where the lists change, of one draw of
    frequency-matched and of token-preserving lists of the trained features. Of other kinds and for
    draws at most MOST_LISTS lists a layer.
    """
    rule = RULES[profile.enrichment_rule]

    def tester(**other: Any) -> Tester:
        return tester_of(replace(rule, **other), libraries, corpus, profile.fdr)

    own = tester()
    tried = [(label, profile.model_copy(update=update), own, True)
             for label, update in _other_lists(profile, own, len(corpus.occurring)).items()]
    for label, other in (("20000", tester(background=20_000)),
                         ("corpus genes", tester(background="corpus"))):
        tried += [(f"background {label}, BH over {one.family} terms", profile, one, False)
                  for one in (replace(other, family="hit"), replace(other, family="all"))]
    return pd.DataFrame([{"choice": label, **_under(kinds, corpus, used, asked, with_nulls)}
                         for label, used, asked, with_nulls in tried])


def _other_lists(profile: Profile, own: Tester, n_genes: int) -> dict[str, dict[str, Any]]:
    """What each choice of list changes in the profile."""
    found: dict[str, dict[str, Any]] = {
        f"list: {label}": {"list_rule": rule, "list_size": size or profile.list_size,
                           "list_share": 0.5}
        for label, (rule, size) in _LISTS.items()}
    largest = max(int(one.universe.sizes.max()) for one in own.genes)
    if n_genes + largest > min(one.universe.total for one in own.genes):
        del found["list: all activating genes"]  # no longer a draw from the background
    if profile.gene_score != "count":
        del found["list: half of the activations"]
    other = "occurrence" if profile.gene_rule == "token" else "token"
    found[f"gene rule: {other}"] = {"gene_rule": other}
    if profile.containment == "token":
        found["gene rule: token, by letters"] = {"gene_rule": "token", "containment": "letters"}
    for score, label in (("count", "how often"), ("rate", "rate"), ("z", "excess over its mean")):
        if score != profile.gene_score:
            for gene_rule in ("token", "occurrence"):
                found[f"genes ranked by {label}, gene rule: {gene_rule}"] = {
                    "gene_rule": gene_rule, "gene_score": score, "list_rule": "top"}
    return found


def _under(kinds: Mapping[str, FeatureStatistics], corpus: Corpus, profile: Profile,
           asked: Tester, with_nulls: bool) -> dict[str, Any]:
    """One row of `choices` but its name."""
    counts = {kind: np.zeros(2, np.int64) for kind in kinds}
    nulls = {kind: np.zeros(2, np.int64) for kind in NULLS[1:] if with_nulls}
    rng = generator(profile.seed, "null lists under other choices")
    for layer in range(len(kinds[FEATURES].fired)):
        for kind, statistics in kinds.items():
            features = np.flatnonzero(statistics.live(profile.live_cut_table4)[layer])
            if kind != FEATURES:
                features = some_of(features)
            lists = ragged(gene_list_ids(statistics, layer, features, corpus, profile))
            counts[kind] += len(lists.lengths), asked.counted(lists)[0].sum()
        if not nulls:
            continue
        statistics = kinds[FEATURES]
        features = some_of(np.flatnonzero(statistics.live(profile.live_cut_table4)[layer]))
        given = ragged(gene_list_ids(statistics, layer, features, corpus, profile))
        source = null_source(statistics, layer, features, given, corpus, profile)
        for kind, sums in nulls.items():
            drawn = source.draw(kind, rng, 1)
            sums += len(drawn.lengths), asked.counted(drawn)[0].sum()
    live, hits = counts.pop(FEATURES)
    percentages = {kind: 100 * called / tested if tested else np.nan
                   for kind, (tested, called) in {**counts, **nulls}.items()}
    return {"live": int(live), "hits": int(hits),
            "percentage": 100 * hits / live if live else np.nan, **percentages}


# --- would a good feature pass? ------------------------------------------------------------------


class PlantedPassing(NamedTuple):
    """What the controls say of features that are what a feature ought to be."""

    table: pd.DataFrame
    """One row per gene rule and purity; empty if nothing could be planted."""
    ahead: dict[str, int]
    """By gene rule, how many pure planted features are ahead of all controls (uncorrected)."""
    planted: dict[str, int]
    """By gene rule, how many there are."""
    median_genes: float
    needed: int | None
    """How many more features as good as a pure planted one it would take for them to be beyond all
    controls after correction (`tables.detectable`); None if none would do."""

    @property
    def tested(self) -> bool:
        """Whether anything was planted: a term of the right size that makes a live feature."""
        return len(self.table) > 0


def planted_passing(statistics: FeatureStatistics, baselines: Baselines, corpus: Corpus,
                    profile: Profile, libraries: Sequence[GeneSets], verdicts: pd.DataFrame
                    ) -> PlantedPassing:
    """Put planted features through the lists, tests and controls of layer `human_layer`.

    verdicts: of the trained features, from `table4_study`.
    """
    ready = testers(libraries, corpus, profile)
    plantings = {purity: planted_statistics(statistics, corpus, libraries, profile, purity=purity)
                 for purity in PURITIES}
    rows, pure = [], {}
    for gene_rule in ("token", "occurrence"):
        used_rule = profile.model_copy(update={"gene_rule": gene_rule})
        for purity, (planted, terms) in plantings.items():
            if terms.empty:
                continue
            found = verdict_table([layer_controls(
                planted, baselines, profile.human_layer, corpus, used_rule, ready)],
                list(baselines), profile)
            ahead = int((found["p_controls"] < profile.fdr).sum())
            low, high = wilson_interval(ahead, len(found))
            rows.append([gene_rule, 100 * purity, len(found),
                         100 * found["interpretable_enrichr"].mean(),
                         100 * found["interpretable_corpus"].mean(),
                         100 * ahead / len(found), 100 * low, 100 * high])
            if purity == 1:
                pure[gene_rule] = found
    table = pd.DataFrame(rows, columns=[
        "gene rule", "% of its genes in the term", "planted", "% with a term, enrichr",
        "% with a term, corpus", "% ahead of all controls", "lower_95", "upper_95"])
    best = pure.get("occurrence")
    needed = None if best is None else detectable(
        verdicts, float(best["p_controls"].median()), profile.fdr)
    return PlantedPassing(
        table, {rule: int((found["p_controls"] < profile.fdr).sum())
                for rule, found in pure.items()},
        {rule: len(found) for rule, found in pure.items()},
        float(plantings[PURITIES[-1]][1]["n_genes"].median()), needed)


# --- feature by feature --------------------------------------------------------------------------


def demands(verdicts: pd.DataFrame, n_layers: int, fdr: float) -> dict[str, list[float]]:
    """Percentage of each layer's live features left as more is demanded, the least first."""
    nulls = ["p_uniform", "p_frequency_matched", "p_token_preserving"]
    met = {
        f"a term at FDR < {fdr:g}, rule enrichr": verdicts["interpretable_enrichr"],
        "and under the rule corpus": verdicts["interpretable_corpus"],
        "and ahead of its null lists (uncorrected)": verdicts[nulls].max(axis=1) < fdr,
        "and ahead of all controls (uncorrected)": verdicts["p_controls"] < fdr,
        "beyond all controls, corrected over features": verdicts["beyond_all_controls"],
    }
    kept = np.cumprod(list(met.values()), axis=0, dtype=bool)
    return {label: (100 * pd.Series(left).groupby(verdicts["layer"]).mean().reindex(
        range(n_layers))).tolist() for label, left in zip(met, kept, strict=True)}


class FeatureTables(NamedTuple):
    """Every live feature, furthest ahead of its controls first, and its terms."""

    features: pd.DataFrame
    """`verdict_table` with tokens, genes, table4_interpretable, log10_E_f, and of the best term
    under the rule `corpus` Term, library and Overlap (missing without a hit)."""
    terms: pd.DataFrame
    """The three best terms of each library for every feature: layer, feature, library, and the
    columns of `terms.top_terms`."""

    def page(self) -> pd.DataFrame:
        """`features` with the columns of the page's table, in its order."""
        table = self.features
        q, p = ([name for name in table if str(name).startswith(start)
                 and name not in ("p_controls", "q_controls")] for start in ("q_", "p_"))
        return table[[
            "layer", "feature", "table4_interpretable", "beyond_all_controls", "p_controls",
            "q_controls", *q, "Term", "library", "Overlap", "tokens", "genes", "log10_E_f",
            "n_genes", *p, "p",
        ]].rename(columns={"Term": "best_term", "Overlap": "overlap"})


def feature_tables(study: Table4Study, statistics: FeatureStatistics, corpus: Corpus,
                   profile: Profile, libraries: Sequence[GeneSets]) -> FeatureTables:
    """Tokens, genes and best terms of every live feature under the gene rule `occurrence`."""
    rule = RULES["corpus"]
    symbols, tokens, genes, terms = corpus.occurring_symbols, [], [], []
    for layer, one in enumerate(study.counted):
        tokens += top_tokens(statistics, layer, one.features, corpus)
        of_layer = gene_lists(statistics, layer, one.features, corpus, by_occurrence(profile))
        genes += [" ".join(names) for names in of_layer]
        for library in libraries:
            found = top_terms(of_layer, library, family=rule.family,
                              background=rule.background_for(symbols), odds=rule.odds, k=3)
            found.insert(0, "library", library.name)
            found.insert(0, "feature", one.features[found.pop("list")])
            found.insert(0, "layer", layer)
            terms.append(found)
    every = pd.concat(terms, ignore_index=True)
    first = every.sort_values(["P-value", "rank"], kind="stable").drop_duplicates(
        ["layer", "feature"])
    verdicts = study.verdicts
    features = verdicts.assign(
        tokens=tokens, genes=genes,
        table4_interpretable=np.concatenate([one.called[0] for one in study.counted]),
        log10_E_f=statistics.log10_frequency[verdicts["layer"], verdicts["feature"]],
    ).merge(first[["layer", "feature", "Term", "library", "Overlap"]],
            on=["layer", "feature"], how="left", validate="one_to_one")
    return FeatureTables(features.sort_values(["p_controls", "p", "layer", "feature"],
                                              ignore_index=True), every)
