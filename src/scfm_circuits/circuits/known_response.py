"""Where the answer is known: do circuits, knock-outs and features find the genes of a response?

The profile names them (`known_response`, `known_terms`), and `case_type` is the label that
responds. All that is reported is of held-out cells. The rules, fixed before any result was seen:

1. `CELLS` held-out cells, each label in turn; in all of them the contrast of the response's label
   is read, so that a positive number speaks for the response whatever the cell is.
2. A gene's score in a cell counts as 0 where the cell has it not, and is averaged over all these
   cells. Genes are ranked by that, the largest first (`known_ranks`).
3. The null: as many genes at random, each of about as many of the cells as a known one is.
4. Lists of the profile's `list_size` best genes are tested for the known terms, against all genes
   that stand in the cells.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from tqdm import tqdm

from scfm_circuits import InputError
from scfm_circuits.cells.prompts import answered_prompt
from scfm_circuits.circuits import knock_out
from scfm_circuits.circuits.contrast import contrast_of
from scfm_circuits.circuits.direct_effects import direct_effects, sources_of
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.perturbed_cells import (
    LEVEL,
    Twice,
    by_gene,
    called_of_shuffled,
    perturbed,
    twice,
)
from scfm_circuits.circuits.studies import studied_cells
from scfm_circuits.common.randomness import generator
from scfm_circuits.enrichment.terms import term_table
from scfm_circuits.features.gene_lists import gene_lists
from scfm_circuits.features.unit_scores import aurocs, read_units
from scfm_circuits.models.known_types import ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile
    from scfm_circuits.enrichment.gene_sets import GeneSets
    from scfm_circuits.features.statistics import FeatureStatistics
    from scfm_circuits.transcoders.transcoder import Transcoders

CELLS, TOP, NEAREST, DRAWS = 40, 10, 20, 10_000
"""Cells whose genes are taken out; features shown; genes at least among which one as frequent as a
known one is drawn; draws of such genes."""
DIFFERENCE = "difference"
CIRCUIT = ("paths", "written")
SCORES = {name: what for name, what in knock_out.SCORES.items()
          if name not in ("nodes", "nodes_signed")} | {
    DIFFERENCE: "no model: how much more often in such training cells"}
"""What each score of a gene is: circuits' first, then what is had without one."""
MEASURED = {"effect": "measured: the gene taken out", "own": "measured: its own part",
            "position": "measured: the part of moved positions"}


class ResponseStudy(NamedTuple):
    """Every gene of some held-out cells: what taking it out does, and what scores say of it."""

    genes: pd.DataFrame
    """A row per cell and gene: as `perturbed_cells.perturbed`, then `score_` with each of
    `SCORES`."""
    by_gene: pd.DataFrame
    """`perturbed_cells.by_gene`, with the means of the scores."""
    cells: pd.DataFrame
    """`knock_out.KnockOuts.cells` against the whole effect and against its own part (column truth).
    """
    summary: pd.DataFrame
    """`knock_out.summarised` against either (column truth), with spearman_both_low and
    spearman_both_high, the interval over cells and genes (`perturbed_cells.Twice`)."""
    contributions: pd.DataFrame
    """A row per cell type and feature that is active in any of the cells: cell_type, layer,
    feature, contribution (what it writes straight to the contrast, nats, mean over cells)."""


def response_study(model: "PreTrainedModel", transcoders: "Transcoders", corpus: "Corpus",
                   profile: "Profile", most: int = CELLS) -> ResponseStudy:
    """Take every gene out of `response_cells`, and score it; raises InputError as they do."""
    cells = response_cells(corpus, most)
    genes = perturbed(model, corpus, profile, cells, profile.case_type)
    scores, contributions = _scored(model, transcoders, corpus, profile, cells)
    genes = pd.concat([genes, scores], axis=1)
    compared = [[one.assign(truth=truth) for one in knock_out.compared(
        genes, profile.seed, truth=truth, scores=SCORES)] for truth in ("effect", "own")]
    by_cell, summary = (pd.concat(some, ignore_index=True) for some in zip(*compared, strict=True))
    drawn = _correlations(genes, twice(genes, profile.seed))
    for column, at in (("spearman_both_low", 2.5), ("spearman_both_high", 97.5)):
        summary[column] = [np.percentile(drawn[truth, name][1:], at)
                           for truth, name in summary[["truth", "score"]].to_numpy()]
    table = by_gene(genes, profile.seed, [f"score_{name}" for name in SCORES])
    return ResponseStudy(genes, table, by_cell, summary, contributions)


def response_cells(corpus: "Corpus", most: int = CELLS) -> list[int]:
    """The first `most` held-out cells, each label in turn, that have `knock_out.LEAST` genes;
    InputError if there is none."""
    cells = [int(cell) for cell in studied_cells(corpus, most, most)
             if len(corpus.gene_ids_of(int(cell))) >= knock_out.LEAST]
    if not cells:
        raise InputError(f"No held-out cell has {knock_out.LEAST} genes, so none can be taken out; "
                         "raise `genes_per_cell`.")
    return cells


def _scored(model: "PreTrainedModel", transcoders: "Transcoders", corpus: "Corpus",
            profile: "Profile", cells: Sequence[int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The scores of `ResponseStudy.genes`, in its order, and `contributions`."""
    more_often, rows = presence_difference(corpus, profile.case_type), []
    shape = transcoders.n_layers, transcoders.n_features
    labels = np.unique(corpus.labels[cells])
    sums = {str(label): np.zeros(shape) for label in labels}
    for cell in tqdm(cells, desc="circuits", unit="cell"):
        ids = corpus.gene_ids_of(cell)
        prompt = answered_prompt(corpus, profile, cell, profile.case_type)
        contrast = contrast_of(corpus, prompt)
        frozen = freeze(model, transcoders, prompt.encoded.tokens)
        scores = knock_out.gene_scores(model, frozen, prompt, contrast, None, ids)
        rows.append(pd.DataFrame({f"score_{name}": (
            more_often[ids] if name == DIFFERENCE else scores[name]) for name in SCORES}))
        _, reading = contrast.start(frozen)
        sources = sources_of(frozen, [reading])
        [row], _ = direct_effects(frozen, sources, [reading])
        np.add.at(sums[str(corpus.labels[cell])], (sources.layer, sources.feature),
                  row[: sources.errors].double().cpu().numpy())
    parts = []
    for label, found in sums.items():
        layer, feature = np.nonzero(found)
        parts.append(pd.DataFrame({
            "cell_type": label, "layer": layer, "feature": feature, "contribution":
            found[layer, feature] / (corpus.labels[cells] == label).sum()}))
    return pd.concat(rows, ignore_index=True), pd.concat(parts, ignore_index=True)


def presence_difference(corpus: "Corpus", label: str) -> np.ndarray:
    """(n_symbols,) share of a label's training cells that have a gene in their sentence, less that
    of all other training cells. 0 if there are none of either."""
    training = np.flatnonzero(~corpus.held_out)
    found = np.zeros((2, len(corpus.symbols)))
    own = corpus.labels[training] == label
    for side, cells in enumerate((training[~own], training[own])):
        for cell in cells:
            found[side, corpus.gene_ids_of(int(cell))] += 1 / len(cells)
    return found[1] - found[0] if own.any() and not own.all() else 0 * found[0]


# --- the known genes -----------------------------------------------------------------------------


class KnownRanks(NamedTuple):
    """Where the known genes stand among all genes, by every score and by what was measured."""

    genes: pd.DataFrame
    """A row per way and gene: by, what, gene, cells (that have it), value (mean over all cells),
    rank (1: speaks most for the response; half ranks for equals), of (how many genes)."""
    summary: pd.DataFrame
    """A row per way: by, what, median_rank, null (its median), null_low, null_high (its middle
    95 %), p (share of random sets of genes as frequent whose median rank is as low), of."""


def known_ranks(study: ResponseStudy, known: Sequence[str], seed: int) -> KnownRanks:
    """Rank the known genes. Those that stand in none of the cells come last, with a value of 0.

    Raises InputError if none of them stands in a cell.
    """
    table = study.by_gene.set_index("gene")
    present = [gene for gene in known if gene in table.index]
    if not present:
        raise InputError("None of the profile's `known_response` stands in the sentence of a cell "
                         "that was looked at; correct its symbols or raise `genes_per_cell`.")
    at = table.index.get_indexer(pd.Index(present))
    absent = len(known) - len(present)
    alike = _as_frequent(table["cells"].to_numpy(), at)
    rng = generator(seed, "genes as frequent")
    drawn = np.stack([rng.choice(some, DRAWS) for some in alike], axis=1)
    rows, summary = [], []
    for by, what in {**MEASURED, **SCORES}.items():
        value = _value(table, by, study.genes["cell"].nunique())
        rank = rankdata(-value)
        rows += [(by, what, gene, int(table["cells"].iloc[place]), value[place], rank[place],
                  len(table)) for gene, place in zip(present, at, strict=True)]
        rows += [(by, what, gene, 0, 0.0, float(len(table)), len(table))
                 for gene in known if gene not in present]
        # A known gene that no cell has comes last, and so does the one drawn for it.
        every = np.append(rank, np.full(absent, float(len(table))))
        last = np.arange(len(rank), len(every))
        null = np.median(every[np.hstack([drawn, np.tile(last, (len(drawn), 1))])], axis=1)
        median = float(np.median(every[[*at, *last]]))
        low, middle, high = np.percentile(null, [2.5, 50, 97.5])
        summary.append((by, what, median, middle, low, high,
                        (1 + (null <= median).sum()) / (1 + DRAWS), len(table)))
    return KnownRanks(
        pd.DataFrame(rows, columns=["by", "what", "gene", "cells", "value", "rank", "of"]),
        pd.DataFrame(summary, columns=["by", "what", "median_rank", "null", "null_low",
                                       "null_high", "p", "of"]))


def _value(table: pd.DataFrame, by: str, cells: int) -> np.ndarray:
    """(n_genes,) a score's mean over all cells, a gene counting 0 where it is not."""
    if by == DIFFERENCE:  # has seen all cells already
        return table[f"score_{by}"].to_numpy()
    column = by if by in MEASURED else f"score_{by}"
    return (table[column] * table["cells"] / cells).to_numpy()


def _as_frequent(cells: np.ndarray, known: np.ndarray) -> list[np.ndarray]:
    """For each known gene, the `NEAREST` other genes that stand in about as many cells, and all
    that are as near as the last of them, so that no order of the genes decides."""
    others = np.setdiff1d(np.arange(len(cells)), known)
    found = []
    for one in known:
        distance = np.abs(cells[others] - cells[one])
        found.append(others[distance <= np.sort(distance)[:NEAREST][-1]])
    return found


def enriched(study: ResponseStudy, library: "GeneSets", terms: Sequence[str], size: int
             ) -> pd.DataFrame:
    """Are the best genes by each score those of the known terms? Hypergeometric, against all genes
    in the cells; Benjamini-Hochberg over all terms of the library that hold one of them.

    Of every way the `size` best genes; and the genes that a test over cells calls and that speak
    for the response: ours (q, and own_q of their own part), and Geneformer's (pooled_q). Columns:
    list, genes, term, n_overlap, p, q, place (among all terms, by p), and the list's best_term.
    """
    table = study.by_gene.set_index("gene")
    lists: dict[str, list[str]] = {}
    for by, what in {**MEASURED, **SCORES}.items():
        value = pd.Series(_value(table, by, study.genes["cell"].nunique()), table.index)
        lists[what] = value.sort_values(ascending=False, kind="stable").index[:size].tolist()
    for column, part, name in (("q", "effect", "called by the paired test"),
                               ("own_q", "own", "called by the paired test of own parts"),
                               ("pooled_q", "effect", "called by the pooled test")):
        lists[name] = table.index[(table[column] < LEVEL) & (table[part] > 0)].tolist()
    rows = []
    for name, genes in lists.items():
        found = term_table(genes, library, background=table.index.tolist(), family="all")
        best = found["Term"].iloc[0] if len(found) else ""
        for term in terms:
            hit = np.flatnonzero(found["Term"] == term)
            overlap, p, q, place = (
                (int(found["n_overlap"].iloc[hit[0]]), float(found["P-value"].iloc[hit[0]]),
                 float(found["Adjusted P-value"].iloc[hit[0]]), int(hit[0]) + 1)
                if len(hit) else (0, 1.0, 1.0, None))
            rows.append((name, len(genes), term, overlap, p, q, place, best))
    return pd.DataFrame(rows, columns=["list", "genes", "term", "n_overlap", "p", "q", "place",
                                       "best_term"])


# --- features ------------------------------------------------------------------------------------

WAYS = ("mean", "largest", "last")
"""How a feature is read in a cell, over the question's tokens (`unit_scores`)."""


def telling_features(model: "PreTrainedModel", transcoders: "Transcoders",
                     statistics: "FeatureStatistics", corpus: "Corpus", profile: "Profile",
                     top: int = TOP) -> tuple[pd.DataFrame, Mapping[str, float]]:
    """Features that tell the response's cells from others: chosen on training cells, scored on
    held-out ones.

    As many training cells as held-out ones, evenly spaced. A feature is read in three ways, of
    which the best is chosen with it. Columns: layer, feature, read (`WAYS`), fires_for (the
    response or not), training_auroc, held_out_auroc (above 1/2: it tells as it did in training),
    known (genes of `known_response` in its gene list), genes (the first of that list). And the
    held-out AUROC of the best single gene, chosen in the same way, with its name's place in
    `corpus.symbols`.
    """
    held_out = np.flatnonzero(corpus.held_out)
    training = corpus.training_cells(len(held_out))
    truth, other = (corpus.labels[some] == profile.case_type for some in (training, held_out))
    for some, which in ((truth, "training"), (other, "held-out")):
        if some.all() or not some.any():
            raise InputError(f"The {which} cells are all or none of them {profile.case_type!r}; "
                             "use more cells or set `sampling: stratified`.")
    both = np.concatenate([training, held_out])
    [units] = read_units(model, corpus, both, {"features": transcoders.layer_activations},
                         profile.forward_cells).values()
    found = _chosen(units, len(training), truth, other)
    layer, rest = np.divmod(found["unit"].to_numpy(), len(WAYS) * transcoders.n_features)
    way, feature = np.divmod(rest, transcoders.n_features)
    table = found.drop(columns="unit").assign(layer=layer, feature=feature,
                                              read=np.array(WAYS)[way])
    table = table.drop_duplicates(["layer", "feature"]).head(top).reset_index(drop=True)
    lists = [gene_lists(statistics, int(layer), np.array([feature]), corpus, profile)[0]
             for layer, feature in table[["layer", "feature"]].to_numpy()]
    table["known"] = [", ".join(gene for gene in profile.known_response if gene in genes)
                      for genes in lists]
    table["genes"] = [", ".join(genes[:6]) for genes in lists]
    order = ["layer", "feature", "read", "fires_for", "training_auroc", "held_out_auroc", "known",
             "genes"]
    return table[order], _best_gene(corpus, both, len(training), truth, other)


def _chosen(units: np.ndarray, n_training: int, truth: np.ndarray, other: np.ndarray
            ) -> pd.DataFrame:
    """Units (n_cells, n_units) from the one that tells training cells best; equal ones in order."""
    area = aurocs(rankdata(units[:n_training], axis=0), truth)
    order = np.argsort(-np.abs(area - 0.5), kind="stable")[:1000]
    held_out = aurocs(rankdata(units[n_training:][:, order], axis=0), other)
    towards = area[order] >= 0.5
    return pd.DataFrame({
        "unit": order, "fires_for": np.where(towards, "the response", "the others"),
        "training_auroc": np.where(towards, area[order], 1 - area[order]),
        "held_out_auroc": np.where(towards, held_out, 1 - held_out)})


def _best_gene(corpus: "Corpus", cells: np.ndarray, n_training: int, truth: np.ndarray,
               other: np.ndarray) -> dict[str, float]:
    seen = ranks(corpus, cells)
    used = np.unique(seen.indices)
    best = _chosen(seen[:, used].toarray(), n_training, truth, other).iloc[0]
    return {"gene": float(used[int(best["unit"])]), **{
        name: float(best[name]) for name in ("training_auroc", "held_out_auroc")}}


# --- what a page says ----------------------------------------------------------------------------


def numbers(study: ResponseStudy, seed: int) -> dict[str, str | int | float]:
    """What a page says of deletions: cells, genes of a cell (median), genes in all; per truth
    (effect, own) the best circuit's score and the best rival with their rank correlations, and who
    is ahead; the parts' rank correlations with the whole effect within cells, and the share of its
    variance within cells that goes with each; genes that either test calls, and calls of shuffled
    effects. Intervals are over cells and genes."""
    genes, table, both = study.genes, study.by_gene, twice(study.genes, seed)
    drawn = _correlations(genes, both)
    found: dict[str, str | int | float] = {
        "cells": genes["cell"].nunique(), "in_all": len(table),
        "genes": float(genes.groupby("cell").size().median())}
    for truth in ("effect", "own"):
        cells, summary = (one[one["truth"] == truth] for one in (study.cells, study.summary))
        best = knock_out.winners(cells, summary, seed)["spearman"]
        for side, name in (("circuit", best.circuit), ("rival", best.rival)):
            found[f"{truth}_{side}"] = SCORES[name]
            found[f"{truth}_{side}_spearman"] = _said(drawn[truth, name])
        low, high = np.percentile((drawn[truth, best.circuit] - drawn[truth, best.rival])[1:],
                                  [2.5, 97.5])
        found[f"{truth}_ahead"] = (
            "the circuit is ahead" if low > 0 else "the rival is ahead" if high < 0 else
            "neither is clearly ahead")
        low, high = summary["spearman_null_low"].min(), summary["spearman_null_high"].max()
        found[f"{truth}_shuffled"] = f"{low:.2f} to {high:.2f}"
    for part in ("own", "position"):
        found[f"{part}_spearman"] = _said(drawn["effect", part])
        share = both.share(genes[part].to_numpy(), genes["effect"].to_numpy())
        low, high = 100 * np.percentile(share[1:], [2.5, 97.5])
        found[f"{part}_share"] = f"{100 * share[0]:.0f} % ({low:.0f} to {high:.0f} %)"
        found[f"{part}_size"] = float(genes[part].abs().median())
    found["effect_size"] = float(genes["effect"].abs().median())
    tested = table["q"].notna()
    paired, pooled = called_of_shuffled(genes, seed)
    return found | {
        "tested": int(tested.sum()), "paired": int((table["q"] < LEVEL).sum()),
        "own_paired": int((table["own_q"] < LEVEL).sum()),
        "pooled": int((table["pooled_q"] < LEVEL).sum()), "shuffled_paired": paired,
        "shuffled_pooled": pooled}


def terms_shown(terms: pd.DataFrame, lists: Mapping[str, str]) -> pd.DataFrame:
    """`enriched` with a row per term, a column for each of some lists (by its name, as the page
    calls it), and in it q with the genes shared."""
    rows = terms[terms["list"].isin(list(lists))]
    said = [f"{row.q:.2g} ({row.n_overlap})" for row in rows.itertuples()]
    return rows.assign(list=rows["list"].map(dict(lists)), said=said).pivot_table(
        index="term", columns="list", values="said", aggfunc="first", sort=False).reset_index()


def best_terms(terms: pd.DataFrame) -> pd.DataFrame:
    """Of each list of `enriched` the known term with the smallest p: list, genes, q, and the list's
    best_term."""
    best = terms.loc[terms.groupby("list", sort=False)["p"].idxmin()]
    return best[["list", "genes", "q", "best_term"]]


def _correlations(genes: pd.DataFrame, both: Twice) -> dict[tuple[str, str], np.ndarray]:
    """(1 + draws,) mean rank correlation within cells, by truth and score; of the parts of effects
    with the whole too. Ranks are those of the cells as they are."""
    ranks = {name: genes.groupby("cell")[name].rank().to_numpy() for name in (
        *MEASURED, *(f"score_{name}" for name in SCORES))}
    found = {(truth, name): both.correlation(ranks[truth], ranks[f"score_{name}"])
             for truth in ("effect", "own") for name in SCORES}
    return found | {("effect", part): both.correlation(ranks["effect"], ranks[part])
                    for part in ("own", "position")}


def _said(drawn: np.ndarray) -> str:
    return knock_out.with_interval(drawn[0], *np.percentile(drawn[1:], [2.5, 97.5]))


def ranks_said(ranks: KnownRanks, by: str) -> str:
    """The known genes with their ranks by one score, the best first: "ISG15 (1), IFI6 (7)"."""
    own = ranks.genes[ranks.genes["by"] == by].sort_values("rank", kind="stable")
    return ", ".join(f"{row.gene} ({row.rank:,.0f})" for row in own.itertuples())


def best_rival(ranks: KnownRanks) -> str:
    """Of the scores that need no circuit, the one with the lowest median rank of known genes."""
    rivals = [name for name in SCORES if name not in CIRCUIT]
    medians = ranks.summary.set_index("by")["median_rank"]
    return str(medians[rivals].idxmin())
