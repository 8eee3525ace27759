"""Every gene of many cells taken out: kept cell by cell, and what holds over cells.

A cell is one observation, however many genes it has: a gene's mean effect has an interval over
resampled cells, and its test is paired within cells. Geneformer's statistic stands beside it, which
compares a gene's effects with those of all other perturbations pooled (Wilcoxon's rank-sum test;
in_silico_perturber_stats.py), as if each were an observation of its own.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from tqdm import tqdm

from scfm_circuits.circuits.perturbation import (
    How,
    changed,
    deletions,
    encoder_of,
    of_call,
    responses,
)
from scfm_circuits.common.files import digest
from scfm_circuits.common.intervals import bootstrap_interval, resampled
from scfm_circuits.common.kept import kept_arrays
from scfm_circuits.common.randomness import generator
from scfm_circuits.enrichment.significance import benjamini_hochberg
from scfm_circuits.models.loading import model_stamp

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile

LEAST, DRAWS, SHUFFLES, LEVEL = 6, 1_000, 20, 0.05
"""Cells that a gene must be in to be tested (with fewer no p could be below `LEVEL`); resamples of
cells; shuffles for the tests' null; the level of q below which a gene is called."""


class Cost(NamedTuple):
    """What perturbing cells takes: passes of the model, and tokens in all of them."""

    texts: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.texts:,} texts, {self.tokens / 1e6:.1f} M tokens"


def cost_of(corpus: "Corpus", cells: Sequence[int] | np.ndarray) -> Cost:
    """What `perturbed` will take, for cells that are not kept yet."""
    genes = np.array([len(corpus.gene_ids_of(int(cell))) for cell in cells], np.int64)
    texts = 1 + 2 * genes
    return Cost(int(texts.sum()), int((texts * corpus.lengths[np.asarray(cells)]).sum()))


def perturbed(model: "PreTrainedModel", corpus: "Corpus", profile: "Profile",
              cells: Sequence[int] | np.ndarray, answer: str) -> pd.DataFrame:
    """Take every gene of some cells out, and read how far a label is ahead of all others.

    answer: the label, the same for all cells, so that a positive effect speaks for it everywhere.
    Each cell is kept in `results/<profile>/perturbation/` as soon as it is done; a run that was cut
    off goes on there.

    Returns a row per cell and gene: cell, cell_type, gene, rank (from 1), effect, own, position
    (nats; see `perturbation`).
    """
    stamp = model_stamp(profile, corpus) | {"answer": answer, "fields": [
        profile.prompt, profile.response, profile.organism]}
    folder, parts = profile.results / "perturbation", []
    bar = tqdm(cells, desc=f"deletions ({cost_of(corpus, cells)})", unit="cell")
    for cell in map(int, bar):
        def made(cell: int = cell) -> tuple[np.ndarray, np.ndarray]:
            encoder = encoder_of(corpus, profile, cell, answer)
            assert encoder.contrast is not None
            return deletions(model, encoder, corpus.gene_ids_of(cell), of_call(encoder.contrast),
                             profile.forward_cells, split=True)

        name = str(corpus.cell_ids[cell])
        effect, own = kept_arrays(
            folder / f"{digest(name)}.npz", {**stamp, "cell": name}, made,
            lambda found: {"effect": found[0], "own": found[1]},
            lambda stored: (stored["effect"], stored["own"]))
        parts.append(pd.DataFrame({
            "cell": name, "cell_type": str(corpus.labels[cell]), "gene": corpus.genes_of(cell),
            "rank": np.arange(1, len(effect) + 1), "effect": effect, "own": own,
            "position": effect - own}))
    return pd.concat(parts, ignore_index=True)


# --- over cells ----------------------------------------------------------------------------------


def by_gene(table: pd.DataFrame, seed: int, values: Sequence[str] = ()) -> pd.DataFrame:
    """What each gene does over the cells of `perturbed`, the largest total effect first.

    values: further columns to be averaged. Columns: gene, cells (that have it); effect, low, high:
    its mean over these, and the 95 % interval over resampled cells (nan for a single cell); own and
    position, its parts; total: the effects' sum over all cells of the table, by their number; the
    mean of each of `values`; p, q: signed-rank test over cells of the effect less the median effect
    in the same cell, and Benjamini-Hochberg over genes; own_p, own_q: the same of its own part;
    pooled_p, pooled_q: Geneformer's rank-sum test of the effect (see above). Genes in fewer than
    `LEAST` cells have no p.
    """
    cells = table["cell"].nunique()
    grouped = table.groupby("gene", sort=True)
    found = grouped[["effect", "own", "position", *values]].mean()
    found.insert(0, "cells", grouped.size())
    found["total"] = grouped["effect"].sum() / cells
    found["low"], found["high"] = np.nan, np.nan
    effects = {gene: part.to_numpy() for gene, part in grouped["effect"]}
    for n in map(int, found["cells"].unique()):
        names = found.index[found["cells"] == n]
        if n > 1:
            counts = resampled(generator(seed, "resampled perturbed cells"), n, DRAWS)
            some = np.stack([effects[gene] for gene in names])
            _, found.loc[names, "low"], found.loc[names, "high"] = bootstrap_interval(some, counts)
    tested = found.index[found["cells"] >= LEAST]
    place = table["gene"].map({gene: i for i, gene in enumerate(tested)})
    cell, at = table["cell"].to_numpy(), place.to_numpy()
    p, pooled = _tests(cell, at, table["effect"].to_numpy(), len(tested))
    own, _ = _tests(cell, at, table["own"].to_numpy(), len(tested))
    for name, one in (("", p), ("own_", own), ("pooled_", pooled)):
        found[f"{name}p"] = pd.Series(one, tested, dtype=float)
        found[f"{name}q"] = pd.Series(benjamini_hochberg(one), tested, dtype=float)
    order = ["cells", "effect", "low", "high", "own", "position", "total", *values, "p", "q",
             "own_p", "own_q", "pooled_p", "pooled_q"]
    return found[order].sort_values("total", ascending=False, kind="stable").reset_index()


def called_of_shuffled(table: pd.DataFrame, seed: int) -> tuple[float, float]:
    """How many genes either test calls at `LEVEL` when each cell's effects are dealt out to its
    genes at random, the mean over `SHUFFLES`: paired within cells, and pooled."""
    counts = table["gene"].value_counts()
    tested = counts.index[counts >= LEAST].sort_values()
    place = table["gene"].map({gene: i for i, gene in enumerate(tested)}).to_numpy()
    cell, effect = table["cell"].to_numpy(), table["effect"].to_numpy()
    rng, called = generator(seed, "shuffled perturbations"), np.zeros(2)
    which = pd.factorize(cell)[0]
    for _ in range(SHUFFLES):
        # By a random key within each cell.
        order = np.lexsort((rng.random(len(cell)), which))
        dealt = np.empty_like(effect)
        dealt[np.argsort(which, kind="stable")] = effect[order]
        called += [(benjamini_hochberg(p) < LEVEL).sum()
                   for p in _tests(cell, place, dealt, len(tested))]
    paired, pooled = called / SHUFFLES
    return float(paired), float(pooled)


def _tests(cell: np.ndarray, place: np.ndarray, effect: np.ndarray, n: int
           ) -> tuple[np.ndarray, np.ndarray]:
    """(n,) p of each tested gene by signed ranks within cells, and by rank sums over all.

    place: (n_rows,) which tested gene a row is of; nan for none.
    """
    middle = pd.Series(effect).groupby(cell).transform("median").to_numpy()
    excess, ranks, every = effect - middle, stats.rankdata(effect), len(effect)
    is_tested = ~np.isnan(place)
    rows = np.flatnonzero(is_tested)[np.argsort(place[is_tested], kind="stable")]
    sizes = np.bincount(place[is_tested].astype(int), minlength=n)
    paired, pooled = np.ones(n), np.ones(n)
    ends = np.cumsum(sizes)
    for size in np.unique(sizes):
        genes = np.flatnonzero(sizes == size)
        at = rows[(ends[genes] - size)[:, None] + np.arange(size)]
        if np.any(excess[at]):
            paired[genes] = _signed_rank(excess[at])
        # As scipy.stats.ranksums of the gene's effects and all others.
        expected, spread = size * (every + 1) / 2, size * (every - size) * (every + 1) / 12
        pooled[genes] = 2 * stats.norm.sf(np.abs(ranks[at].sum(axis=1) - expected)
                                          / np.sqrt(max(spread, 1e-30)))
    return paired, pooled


def _signed_rank(values: np.ndarray) -> np.ndarray:
    """(n_genes,) two-sided p of Wilcoxon's signed-rank test of (n_genes, n_cells) against 0, by the
    normal approximation with its correction for continuity; values of 0 share their rank's halves.
    """
    n = values.shape[1]
    ranks = stats.rankdata(np.abs(values), axis=1)
    above = (ranks * (np.sign(values) + 1) / 2).sum(axis=1)
    spread = np.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    z = np.maximum(np.abs(above - n * (n + 1) / 4) - 0.5, 0) / spread
    return 2 * stats.norm.sf(z)


# --- cells and genes resampled together ----------------------------------------------------------


class Twice(NamedTuple):
    """Resamples of cells and, at once, of genes: one gene stands in many cells, so what is seen of
    it there is seen once. The first of the resamples is the table as it is.

    Owen (2007), the pigeonhole bootstrap: rather too wide than too narrow. order: (n_rows,) rows
    cell by cell; rows, cells: (1 + draws, n_rows) and (1 + draws, n_cells) how often each row's
    gene and each cell is drawn; starts: (n_cells,) each cell's first row.
    """

    order: np.ndarray
    rows: np.ndarray
    cells: np.ndarray
    starts: np.ndarray

    def products(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """(1 + draws, n_cells) sums of products of x and y (n_rows,), each less its mean in the
        cell."""
        x, y = x[self.order], y[self.order]
        columns = np.stack([np.ones(len(x)), x, y, x * y], axis=1)
        ends = [*self.starts[1:].tolist(), len(x)]
        n, sum_x, sum_y, both = np.stack([
            self.rows[:, a:b] @ columns[a:b] for a, b in zip(self.starts, ends, strict=True)
        ]).transpose(2, 1, 0)
        return np.asarray(both - sum_x * sum_y / np.maximum(n, 1))

    def correlation(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """(1 + draws,) correlation of x and y within a cell, mean over cells; 0 where either is the
        same in the whole cell."""
        spread = np.sqrt(np.maximum(self.products(x, x) * self.products(y, y), 0))
        found = np.where(spread > 1e-12, self.products(x, y) / np.maximum(spread, 1e-12), 0.0)
        return np.asarray((self.cells * found).sum(axis=1) / self.cells.sum(axis=1))

    def share(self, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        """(1 + draws,) of the variance of `whole` within cells, the share that goes with a part of
        it: those of parts that add up to it add up to 1."""
        mine, every = ((self.cells * self.products(one, whole)).sum(axis=1)
                       for one in (part, whole))
        return np.asarray(mine / np.maximum(every, 1e-30))


def twice(table: pd.DataFrame, seed: int, draws: int = DRAWS) -> Twice:
    """Resamples of the cells and genes of a table with a row per cell and gene."""
    cell, gene = (pd.factorize(table[name])[0] for name in ("cell", "gene"))
    order, rng = np.argsort(cell, kind="stable"), generator(seed, "resampled cells and genes")
    counts = [np.vstack([np.ones(n), resampled(rng, n, draws)])
              for n in (int(cell.max()) + 1, int(gene.max()) + 1)]
    return Twice(order, counts[1][:, gene[order]], counts[0],
                 np.searchsorted(cell[order], np.arange(counts[0].shape[1])))


# --- genes together ------------------------------------------------------------------------------

RANDOM_SETS, NEAR = 5, 6
"""Random sets of genes beside the known ones; genes among which one like a known one is drawn."""


def changed_together(model: "PreTrainedModel", corpus: "Corpus", profile: "Profile",
                     cells: Sequence[int] | np.ndarray, answer: str, known: Sequence[str]
                     ) -> pd.DataFrame:
    """Delete all known genes of a cell at once, and move them all to its front, whether it has them
    or not; beside each, random genes.

    In place of each known gene that is deleted, one of the `NEAR` others nearest to its place in
    the cell; of one moved to the front, one of the `NEAR` others that stand in as nearly as many
    training cells. `RANDOM_SETS` draws of either. answer: the label that is read.

    Returns a row per cell, how (delete, front) and draw (-1: the known genes): cell, cell_type,
    how, draw, genes (how many are changed), before, after (nats). A cell without a known gene has
    no row for delete, nor has one with no other.
    """
    place = {symbol: i for i, symbol in enumerate(corpus.symbols)}
    ids = np.array([place[gene] for gene in known if gene in place], np.int64)
    training = corpus.gene[~corpus.held_out]
    firsts = training[(training >= 0) & (corpus.place[~corpus.held_out] == 0)]
    counts = np.bincount(firsts, minlength=len(corpus.symbols))
    counts[counts == 0] = -(10**9)  # genes that no training cell has are no match
    as_frequent, rows = [_nearest(counts, gene, ids) for gene in ids], []
    for cell in tqdm(map(int, cells), desc="genes together", unit="cell", total=len(cells)):
        rng = generator(profile.seed, "random genes changed", cell)
        own = corpus.gene_ids_of(cell)
        encoder = encoder_of(corpus, profile, cell, answer)
        assert encoder.contrast is not None
        here = np.flatnonzero(np.isin(own, ids))
        sets: list[tuple[How, int, np.ndarray]] = []
        if 0 < len(here) < len(own) - NEAR:
            beside = [_nearest(np.arange(len(own)), int(one), here) for one in here]
            sets += [("delete", draw, own[here if draw < 0 else _one_of_each(rng, beside)])
                     for draw in range(-1, RANDOM_SETS)]
        sets += [("front", draw, ids if draw < 0 else _one_of_each(rng, as_frequent))
                 for draw in range(-1, RANDOM_SETS)]
        texts = [encoder.encode(own), *(encoder.encode(changed(own, genes, how, len(own)))
                                        for how, _, genes in sets)]
        read = responses(model, texts, of_call(encoder.contrast), profile.forward_cells)
        rows += [(str(corpus.cell_ids[cell]), str(corpus.labels[cell]), how, draw, len(genes),
                  read[0], after) for (how, draw, genes), after in zip(sets, read[1:], strict=True)]
    return pd.DataFrame(rows, columns=["cell", "cell_type", "how", "draw", "genes", "before",
                                       "after"])


def _nearest(values: np.ndarray, one: int, without: np.ndarray) -> np.ndarray:
    """The `NEAR` places whose values are nearest to that of one, none of `without`."""
    order = np.argsort(np.abs(values - values[one]), kind="stable")
    return order[~np.isin(order, without)][:NEAR]


def _one_of_each(rng: np.random.Generator, sets: Sequence[np.ndarray]) -> np.ndarray:
    """One of each set, no place twice as long as there is another."""
    found: list[int] = []
    for some in sets:
        left = some[~np.isin(some, found)]
        found.append(int(rng.choice(left if len(left) else some)))
    return np.array(found)


def together_by_type(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """`changed_together` by how and cell type, for the known genes and for random ones (mean of a
    cell's draws): cells, genes (mean), called_before and called_after (share of cells whose call
    is the label's), change (mean of after less before) with low and high, its 95 % interval over
    resampled cells."""
    table = table.assign(which=np.where(table["draw"] < 0, "known", "random"),
                         change=table["after"] - table["before"], said=table["before"] > 0,
                         then=table["after"] > 0)
    per_cell = table.groupby(["how", "cell_type", "which", "cell"], sort=True)[
        ["genes", "change", "said", "then"]].mean().reset_index()
    rows = []
    for keys, part in per_cell.groupby(["how", "cell_type", "which"], sort=True):
        n = len(part)
        counts = resampled(generator(seed, "resampled perturbed cells"), n, DRAWS)
        change, low, high = bootstrap_interval(part["change"].to_numpy(), counts)
        rows.append((*keys, n, part["genes"].mean(), part["said"].mean(), part["then"].mean(),
                     float(change), float(low), float(high)))
    return pd.DataFrame(rows, columns=["how", "cell_type", "which", "cells", "genes",
                                       "called_before", "called_after", "change", "low", "high"])
