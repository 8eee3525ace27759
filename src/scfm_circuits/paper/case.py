"""How often other genes get the paper's term: the case study's enrichment beside chance.

The case study reports "Endothelial cell: heart" for the nine genes of its circuit. Two of the nine
carry it. Here the same test runs on lists that share less and less with the circuit: its anchor
gene with random genes, its anchor with other genes of the prompt, any genes of the prompt (either
can hold more of the circuit's genes), and random genes alone. Each is tested under every rule in
`rules.RULES` and with the Benjamini-Hochberg (BH) family exchanged, because that choice
decides the outcome.

A random gene is drawn from what the rule's background says could have been drawn: where that is a
number, from as many genes as it says, of which those beyond the library's own match no term.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from scfm_circuits import InputError
from scfm_circuits.common.intervals import wilson_interval
from scfm_circuits.common.randomness import generator
from scfm_circuits.enrichment.background import (
    Background,
    Encoded,
    encode_ids,
    gene_ids,
    prepare_background,
)
from scfm_circuits.enrichment.gene_sets import GeneSets
from scfm_circuits.enrichment.null_lists import Ragged, uniform_null
from scfm_circuits.enrichment.over_representation import over_representation
from scfm_circuits.enrichment.rules import RULES, Rule
from scfm_circuits.enrichment.terms import term_fdr, term_table
from scfm_circuits.paper.exhibits import PAPER, PaperTables

ANY_TERM = "any term"
LEVEL = 0.05
"""The paper's FDR."""


class CaseRule(NamedTuple):
    """A rule that can be applied to the case, with its background."""

    rule: Rule
    universe: Background

    @property
    def label(self) -> str:
        """Rule, number of background genes and BH family in few words."""
        tests = "the terms hit" if self.rule.family == "hit" else "all terms"
        return f"{self.rule.name}: {self.universe.total:,} genes, BH over {tests}"


def case_rules(
    library: GeneSets, genes: Collection[str], corpus_genes: Collection[str]
) -> list[CaseRule]:
    """Every rule that can be applied to `genes`, as it is and with the BH family exchanged.

    A rule whose background is the corpus is left out unless the corpus holds all the genes: the
    others could not have been drawn.

    Raises:
        InputError: as `prepare_background`.
    """
    settings = []
    in_corpus = {gene.upper() for gene in genes} <= {gene.upper() for gene in corpus_genes}
    for rule in RULES.values():
        if rule.background == "corpus" and not in_corpus:
            continue
        universe = prepare_background(library, rule.background_for(corpus_genes))
        exchanged = replace(rule, family="all" if rule.family == "hit" else "hit")
        settings += [CaseRule(rule, universe), CaseRule(exchanged, universe)]
    return settings


def named_term(library: GeneSets, printed: str) -> str | None:
    """The library's name of a term that is printed with other capitals or spaces; None for none."""

    def plain(name: str) -> str:
        return "".join(name.lower().split())

    return next((term for term in library.terms if plain(term) == plain(printed)), None)


def case_nulls(
    settings: Sequence[CaseRule],
    term: str,
    genes: Sequence[str],
    prompt: Sequence[str],
    *,
    draws: int,
    seed: int,
) -> pd.DataFrame:
    """How often the term, or any term, has an adjusted p below LEVEL for lists other than `genes`.

    Args:
        settings: from `case_rules`.
        term: the library's name of the paper's term.
        genes: the circuit's genes; the first is the anchor that two of the nulls keep.
        prompt: the genes of the prompt.
        draws: lists per null; `genes` themselves are one list.
        seed: the same seed gives the same lists, and the same ones to both BH families.

    Returns:
        One row per setting and kind of list (circuit, anchor_random, anchor_prompt, prompt,
        random): kind, list (in words), called (which term), rule, bh_family, background_genes,
        draws, n_called, percent, and low and high of its 95 % Wilson interval in percent (missing
        for the circuit's genes themselves, where nothing is drawn).

    Raises:
        InputError: no draws, fewer genes to draw from than a list has, or as `term_fdr`.
    """
    if draws < 1:
        raise InputError(f"The number of draws is {draws}; use at least 1.")
    rows = []
    for setting in settings:
        universe, family = setting.universe, setting.rule.family
        for kind, (words, called, lists) in _case_lists(setting, genes, prompt, term, draws,
                                                        seed).items():
            if called == ANY_TERM:
                q = over_representation(lists, universe.library, background=universe,
                                        family=family, alpha=LEVEL).min_q
            else:
                q = term_fdr(lists, universe.library, term, background=universe, family=family)
            n, k = q.size, int(np.count_nonzero(q < LEVEL))
            low, high = wilson_interval(k, n) if n > 1 else (np.nan, np.nan)
            rows.append((kind, words, called, setting.rule.name, family, universe.total, n, k,
                         100 * k / n, 100 * low, 100 * high))
    return pd.DataFrame(rows, columns=[
        "kind", "list", "called", "rule", "bh_family", "background_genes", "draws", "n_called",
        "percent", "low", "high"])


def _case_lists(
    setting: CaseRule, genes: Sequence[str], prompt: Sequence[str], term: str, draws: int,
    seed: int,
) -> Mapping[str, tuple[str, str, Encoded]]:
    """By kind: the list in words, which term is asked of it, and its draws."""
    genes, prompt = ([gene.upper() for gene in symbols] for symbols in (genes, prompt))
    anchor, n, some = genes[0], len(genes), _drawn_from(setting.universe)
    kinds: dict[str, tuple[str, str, Sequence[str], str | None, int]] = {
        "circuit": (f"the {n} genes of the circuit", term, genes, anchor, 1),
        "anchor_random": (f"{anchor} and {n - 1} random genes", term, some, anchor, draws),
        "anchor_prompt": (f"{anchor} and {n - 1} other genes of the prompt", term, prompt, anchor,
                          draws),
        "prompt": (f"any {n} genes of the prompt", term, prompt, None, draws),
        "random": (f"{n} random genes", ANY_TERM, some, None, draws),
    }
    return {
        kind: (words, called, _encoded(setting.universe, pool, kept, n, count,
                                       generator(seed, "null lists of the case", i)))
        for i, (kind, (words, called, pool, kept, count)) in enumerate(kinds.items())
    }


def _drawn_from(universe: Background) -> list[str]:
    """The genes a random list can hold under this background, nameless ones filled in."""
    if universe.symbols is not None:
        return sorted(universe.symbols)
    known = universe.library.genes
    if len(known) > universe.total:
        raise InputError(
            f"A background of {universe.total:,} genes is fewer than the {len(known):,} of "
            f"{universe.library.name}, so a random gene has no meaning; raise the number."
        )
    return [*known, *(f"NAMELESS {i}" for i in range(universe.total - len(known)))]


def _encoded(
    universe: Background, pool: Sequence[str], kept: str | None, length: int, draws: int,
    rng: np.random.Generator,
) -> Encoded:
    """`draws` lists of `length` genes from the pool, the first of them `kept` if it is given."""
    pool = [gene for gene in pool if gene != kept]
    n = length - (kept is not None)
    ids = uniform_null(np.full(draws, n), len(pool), rng).ids.reshape(draws, n)
    if kept is not None:
        ids = np.column_stack([np.full(draws, len(pool)), ids])
        pool = [*pool, kept]
    lists = Ragged(np.arange(draws + 1) * length, ids.ravel())
    return encode_ids(lists, gene_ids(pool, universe))


def null_row(table: pd.DataFrame, kind: str, rule: str = "enrichr", family: str = "hit"
             ) -> pd.Series:
    """The row of `case_nulls` of one kind of list, under one rule and BH family.

    Raises:
        InputError: the table has no such row.
    """
    rows = table[(table["kind"] == kind) & (table["rule"] == rule)
                 & (table["bh_family"] == family)]
    if rows.empty:
        raise InputError(f"The nulls have no list {kind!r} under {rule!r}, BH over {family!r}.")
    return rows.iloc[0]


def in_words(row: pd.Series) -> str:
    """A rate with its interval, "86.7 % (85.1 to 88.1)"; yes or no where nothing was drawn."""
    if row["draws"] == 1:
        return "yes" if row["n_called"] else "no"
    return f"{row['percent']:.1f} % ({row['low']:.1f} to {row['high']:.1f})"


def rates_by_rule(table: pd.DataFrame, settings: Sequence[CaseRule]) -> pd.DataFrame:
    """`case_nulls` for reading: a row per list, a column per setting, rates in words."""
    shown = table[["list", "called"]].drop_duplicates(ignore_index=True)
    for one in settings:
        rows = table[(table["rule"] == one.rule.name) & (table["bh_family"] == one.rule.family)]
        shown[one.label] = [in_words(row) for _, row in rows.iterrows()]
    return shown


def combined_score(overlap: int, term: int, query: int, population: int) -> tuple[float, float]:
    """The Enrichr server's Combined Score, -ln(p) x odds ratio, and its one-sided Fisher p."""
    p = float(stats.hypergeom.sf(overlap - 1, population, term, query))
    outside = population - term - query + overlap
    odds = overlap * outside / max((query - overlap) * (term - overlap), 1)
    return -math.log(p) * odds, p


def server_case() -> pd.DataFrame:
    """The paper's nine genes under the Enrichr server's formula, from overlap counts alone.

    `cellmarker_overlaps.csv` has, for each of the terms of CellMarker_Augmented_2021 that hold one
    of the nine, the overlap and the term's size; only the paper's term is named. So the case can be
    computed where the library, which may not be passed on, is not at hand.

    Returns one row per term: overlap, term_size, term, p (one-sided Fisher, N = 20,000), FDR
    (BH over these terms), score; smallest p first.
    """
    nine = len(pd.read_csv(PAPER / "circuit_genes.csv"))
    table = pd.read_csv(PAPER / "cellmarker_overlaps.csv", keep_default_na=False)
    scored = [combined_score(int(x), int(size), nine, 20_000)
              for x, size in zip(table["overlap"], table["term_size"], strict=True)]
    table["score"], table["p"] = [score for score, _ in scored], [p for _, p in scored]
    table["FDR"] = stats.false_discovery_control(table["p"])
    return table.sort_values("p", kind="stable", ignore_index=True)


# --- the case as a whole -------------------------------------------------------------------------

LIBRARY = "CellMarker_Augmented_2021"
TERM_IN_PROMPT = 4
"""Genes of the paper's term among the 64 of its prompt, counted from the library, as
`cellmarker_overlaps.csv` is."""
_OURS = {"Term": "term", "n_overlap": "overlap", "P-value": "p", "Adjusted P-value": "FDR",
         "Combined Score": "score"}


class PaperCase(NamedTuple):
    """The paper's own case, from the genes that it prints."""

    table: pd.DataFrame
    """The paper's term under each rule, a row each, and as printed in the last."""
    server: pd.DataFrame
    """`server_case`: all terms that hold one of the nine genes."""
    settings: list[CaseRule]
    """The rules that the library at hand allows; none without the real one."""
    term: str | None
    """The library's name of the paper's term."""
    nine: list[str]
    prompt: list[str]

    @property
    def ours(self) -> pd.Series:
        """The row of the server's rule."""
        return self.table.iloc[0]

    @property
    def score_is_highest(self) -> bool:
        """Whether no term below the level has a higher score."""
        return bool(self.ours["score"] >= self.ours["highest score below 0.05"])

    @property
    def single_gene(self) -> int:
        """Terms below the level that hold one of the nine genes only."""
        return int(((self.server["FDR"] < LEVEL) & (self.server["overlap"] == 1)).sum())

    @property
    def corpus_left_out(self) -> bool:
        """Whether the rule `corpus` could not be applied, though the library is at hand."""
        return bool(self.settings) and all(one.rule.name != "corpus" for one in self.settings)

    def nulls(self, draws: int, seed: int) -> pd.DataFrame:
        """`case_nulls` under every rule; no rows without the library or the term in it."""
        return case_nulls(self.settings if self.term else [], self.term or "", self.nine,
                          self.prompt, draws=draws, seed=seed)


def paper_case(library: GeneSets, corpus_genes: Collection[str], paper: PaperTables) -> PaperCase:
    """The paper's term for its nine genes, and for all genes of its prompt, under each rule.

    library: `LIBRARY`; where another stands in for it, or it has more genes than the server's
    background, the server's rule alone is computed, from overlap counts. A rule whose background
    has fewer genes than the list is left out. corpus_genes: symbols of the genes that occur in this
    run's cells.
    """
    nine, prompt = paper.circuit["gene"].tolist(), list(paper.prompt_genes)
    server = server_case()
    settings = [] if library.source == "bundled" else [
        one for one in case_rules(library, nine, corpus_genes)
        if len(nine) <= one.universe.total >= len(one.universe.symbols or library.genes)]
    if settings and settings[0].rule.name != "enrichr":
        settings = []

    def terms(genes: Collection[str], setting: CaseRule) -> pd.DataFrame:
        return term_table(genes, library, background=setting.universe, family=setting.rule.family,
                          odds=setting.rule.odds).rename(columns=_OURS)

    rows = [_case_row("nine genes, enrichr: 20,000 genes, BH over the terms hit", server)]
    # The first setting is the server's, which overlap counts alone have given.
    rows += [_case_row(f"nine genes, {one.label}", terms(nine, one)) for one in settings[1:]]
    rows += [_case_row(f"all genes of the prompt, {one.label}", terms(prompt, one))
             for one in settings[:1]]
    printed = {"setting": "the paper, as printed", "FDR": float(paper.case["fdr"]),
               "score": float(paper.case["enrichment_score"])}
    return PaperCase(pd.DataFrame([*rows, printed]), server, settings,
                     named_term(library, paper.case["term"]) if settings else None, nine, prompt)


def term_overlap(library: GeneSets, printed: str, drawn: Collection[str], of: Collection[str]
                 ) -> dict[str, int]:
    """Genes of a term, by its printed name, among those drawn and all they were drawn from.

    Keys: found, named, drawn, of; nothing if the library has no such term.
    """
    term = named_term(library, printed)
    if term is None:
        return {}
    members = set(library.term_members(library.terms.index(term)))
    inside = [sum(gene.upper() in members for gene in genes) for genes in (drawn, of)]
    return {"found": inside[0], "named": inside[1], "drawn": len(drawn), "of": len(of)}


def _case_row(setting: str, table: pd.DataFrame) -> dict[str, Any]:
    """The paper's term in a table of all terms hit."""
    # A table without a row has no text in its columns.
    named = table["term"].astype(str).str.lower().str.replace(" ", "")
    found = named == "endothelialcell:heart"
    below, term = table[table["FDR"] < LEVEL], table[found].head(1)
    return {"setting": setting, "rank by p": term.index[0] + 1 if len(term) else None,
            "terms hit": len(table),
            **term.reindex(columns=["overlap", "term_size", "p", "FDR", "score"]).sum(min_count=1),
            "terms below 0.05": len(below), "highest score below 0.05": below["score"].max()}
