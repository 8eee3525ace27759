"""Cells in: those that packages carry, simulated ones or an `.h5ad` file, checked before use.

Cell sentences rank genes within a cell, so any increasing transformation of a cell's values
(library-size scaling, log1p) leaves them as they are; what matters is that the values are not
centred or scaled per gene. Negative values give that away and are refused.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from scfm_circuits import InputError
from scfm_circuits.cells.binned import levels_of
from scfm_circuits.cells.corpus import split_cells
from scfm_circuits.cells.h5ad import (
    Opened,
    by_gene,
    in_memory,
    open_h5ad,
    part_of,
    row_chunks,
    stored_in_rows,
)
from scfm_circuits.cells.rank_value import as_ranks, coded_genes, own_genes, own_tokens
from scfm_circuits.cells.ranking import checked_rows, first_odd, top_genes
from scfm_circuits.cells.symbols import (
    MOST_LEFT_OUT,
    gene_symbols,
    hyphens_missing,
    hyphens_restored,
    merge_duplicates,
)
from scfm_circuits.common import manifest
from scfm_circuits.common.encodings import BINNED, CELL_SENTENCE, OWN_DICTIONARY, RANK_VALUE
from scfm_circuits.common.labels import doubtful_labels, listed, normal_label, normal_labels
from scfm_circuits.common.profile import (
    CELLS_NAMES,
    PACKAGED_CELLS,
    PLANTED_CELLS,
    Profile,
    cells_path,
)
from scfm_circuits.common.randomness import generator

if TYPE_CHECKING:
    import pandas as pd

@dataclass(frozen=True)
class About:
    """What is known of cells beside their expression.

    symbols: n_genes upper-case gene symbols, unique. labels, cell_ids: (n_cells,) cell types and
    identifiers. decisions: one sentence for each choice made while reading, for the page. tokens:
    the model's token of each gene, where genes are tokens; else empty.
    """

    symbols: tuple[str, ...]
    labels: np.ndarray
    cell_ids: np.ndarray
    decisions: tuple[str, ...]
    tokens: tuple[int, ...] = field(default=(), kw_only=True)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class RankedCells(About):
    """Checked cells, each as its most expressed genes.

    ranking: (n_cells, k) int32 gene ids, most expressed first, -1 after the last. levels: (n_cells,
    k) of these genes, where the encoding has levels.
    """

    ranking: np.ndarray
    levels: np.ndarray | None = None


LOOKED_AT = 32
"""Cells of which the expression is looked at before all are read."""
Take = Callable[[np.ndarray, sp.csr_matrix], None]
"""Gets some cells' rows in the file and their expression: sparse, float32, above zero."""


def read_ranked(profile: Profile) -> RankedCells:
    """Choose, read and check the profile's cells, and rank each one's genes.

    Each chunk's cells are ranked (`ranking.top_genes`) and let go: what is held is the genes of the
    sentences, however many cells there are. Raises InputError as `read_chunks`.
    """
    if profile.token_dictionary == OWN_DICTIONARY:
        return _ranked_by_own_medians(profile)
    parts: list[np.ndarray] = []
    levels: list[np.ndarray] = []

    def take(rows: np.ndarray, part: sp.csr_matrix) -> None:
        parts.append(top_genes(part, rows, profile.genes_per_cell, profile.seed))
        if profile.encoding == BINNED:
            levels.append(levels_of(part, parts[-1]))

    about = read_chunks(profile, take, over_medians=True)
    return RankedCells(**vars(about), ranking=np.concatenate(parts),
                       levels=np.concatenate(levels) if levels else None)


def _ranked_by_own_medians(profile: Profile) -> RankedCells:
    """The cells as genes over medians of the training cells (`own_genes`); all counts are held.

    Raises InputError for a cell in which no gene has a token.
    """
    parts: list[tuple[np.ndarray, sp.csr_matrix]] = []
    about = read_chunks(profile, lambda rows, part: parts.append((rows, part)))
    rows = np.concatenate([one for one, _ in parts])
    counts = sp.csr_matrix(sp.vstack([one for _, one in parts], format="csr"))
    train = ~split_cells(len(about), profile.validation_share, profile.seed)
    genes, medians = own_genes(counts[train], rows[train], profile)
    quotients = as_ranks(sp.csr_matrix(counts[:, genes]), medians)
    bare = np.flatnonzero(np.diff(quotients.indptr) == 0)
    if len(bare):
        raise InputError(f"In {len(bare):,} cells of {profile.cells} (the first is row "
                         f"{rows[bare[0]]:,}) no gene has one of the {profile.vocabulary_size:,} "
                         "tokens that the training cells give; raise `vocabulary_size`.")
    symbols = tuple(about.symbols[gene] for gene in genes)
    decisions = (*about.decisions, f"{len(genes):,} of {len(about.symbols):,} genes have a token: "
                 f"those that are most often among the first {profile.genes_per_cell:,} of the "
                 f"{train.sum():,} training cells. Genes are ranked by their counts over their "
                 "medians in those that express them (rank-value encoding).")
    return RankedCells(symbols, about.labels, about.cell_ids, decisions,
                       top_genes(quotients, rows, profile.genes_per_cell, profile.seed),
                       tokens=tuple(own_tokens(profile, symbols).genes.values()))


def read_chunks(profile: Profile, take: Take, *, over_medians: bool = False) -> About:
    """Hand the profile's cells to `take`, chunk by chunk, and say what else is known of them.

    over_medians: under a rank-value encoding, values are what genes are ranked by, not counts.

    Cells are chosen from obs alone, and only chunks of the file that hold a chosen one are read,
    and only these cells' values checked. Raises InputError for a file that is missing, truncated or
    holds no usable expression, symbols or labels; see the helpers below for the single checks.
    """
    with closing(_open(profile)) as data:
        return _read_opened(data, profile, take, over_medians)


class _Parts(NamedTuple):
    """What of opened cells can be checked without reading their expression.

    join: as from `merge_duplicates`. decisions: sentences for the page. tokens, medians: of each
    gene, where genes are tokens.
    """

    matrix: Any
    symbols: list[str]
    join: sp.csr_matrix | None
    labels: np.ndarray
    decisions: list[str]
    tokens: tuple[int, ...] = ()
    medians: np.ndarray | None = None


def _parts(data: Opened, profile: Profile) -> _Parts:
    where = profile.cells
    _readable(data, part_of(profile.matrix), "matrix", where)
    _readable(data, f"obs[{profile.label_column!r}]", "label_column", where)
    table = "raw.var" if profile.matrix == "raw" else "var"
    _readable(data, f"{table}[{profile.symbol_column!r}]", "symbol_column", where)
    matrix, variables = _matrix(data, profile.matrix, where)
    symbols, decisions = gene_symbols(variables, profile.symbol_column, where,
                                      or_identifiers=profile.encoding in RANK_VALUE)
    if profile.symbol_rule == "r_names":
        symbols, restored = hyphens_restored(symbols)
        decisions += restored
    else:
        decisions += hyphens_missing(symbols)
    labels, rewritten = _labels(data.obs, profile.label_column, where)
    if 0 in matrix.shape:
        raise InputError(f"{where} holds {matrix.shape[0]} cells and {matrix.shape[1]} genes; "
                         "there is nothing to read.")
    aside = [f"Left aside, as it cannot be read: {unread}." for unread in [
        "; ".join(f"{part} ({why})" for part, why in data.aside.items())] if unread] + rewritten
    if profile.encoding != CELL_SENTENCE and profile.token_dictionary != OWN_DICTIONARY:
        coded = coded_genes(variables, symbols, profile, where)
        return _Parts(matrix, coded.symbols, coded.join, labels,
                      decisions + coded.decisions + aside, coded.tokens, coded.medians)
    symbols, join, merged = merge_duplicates(symbols, profile.duplicate_symbols, where)
    return _Parts(matrix, symbols, join, labels, decisions + merged + aside)


def _readable(data: Opened, part: str, field: str, where: str) -> None:
    if part in data.aside:
        raise InputError(f"In {where} {part} cannot be read ({data.aside[part]}); mend the file, "
                         f"or set `{field}` in the profile to something else.")


class Description(NamedTuple):
    """What is known of cells from their tables and a look at `LOOKED_AT` of them.

    n_cells: all that there are. symbols: n_genes. labels: of the cells that the profile draws.
    decisions: as of `About`, as far as they are made without expression. expressed: how many genes
    each cell that was looked at expresses, of those that have a token; none where cells cannot be
    read one by one. most: about how many of these any drawn cell expresses at most.
    """

    n_cells: int
    symbols: list[str]
    labels: np.ndarray
    decisions: list[str]
    expressed: np.ndarray
    most: int


def describe_cells(profile: Profile) -> Description:
    """Look at the profile's cells, checked as `read_chunks` does; of their expression, that of some
    cells, evenly spaced among those that are drawn."""
    with closing(_open(profile)) as data:
        parts = _parts(data, profile)
        drawn = _drawn(parts.labels, profile)
        places = np.linspace(0, len(drawn) - 1, min(len(drawn), LOOKED_AT))
        rows = drawn[places.round().astype(int)]
        expressed, stored = _expressed(parts, rows, profile), stored_in_rows(parts.matrix)
    if len(expressed) and not expressed.any():
        raise InputError(f"In none of the {len(rows):,} cells of {profile.cells} that were looked "
                         "at a gene is expressed; set `matrix` in the profile to something else.")
    bare = rows[expressed == 0] if len(expressed) else rows[:0]
    if stored is not None:
        bare = np.union1d(bare, drawn[stored[drawn] == 0])
    _check_empty(bare, len(drawn), profile.cells, "at least ")
    most = len(parts.symbols)
    if stored is not None:
        # Some of what is stored is of genes without a token, in all cells about as much.
        share = (expressed / stored[rows].clip(min=1)).max()
        most = min(most, math.ceil(share * stored[drawn].max()))
    return Description(len(parts.labels), parts.symbols, parts.labels[drawn], parts.decisions,
                       expressed, most)


def _expressed(parts: _Parts, rows: np.ndarray, profile: Profile) -> np.ndarray:
    """(n_rows,) genes that each cell expresses, or none where cells cannot be read one by one;
    InputError as where all are read."""
    where, found = profile.cells, [np.zeros(0, np.int64)]

    def take(rows: np.ndarray, part: sp.csr_matrix) -> None:
        found.append(np.diff(part.indptr))

    if not by_gene(parts.matrix, where):
        checked = _counted(take, None, where) if profile.encoding in RANK_VALUE else take
        for some, values in row_chunks(parts.matrix, rows, where, size=1):
            checked(rows[some], checked_rows(values, rows[some], where, parts.join))
    return np.concatenate(found)


def _drawn(labels: np.ndarray, profile: Profile) -> np.ndarray:
    """Row numbers, ascending, of the cells that are used."""
    if profile.max_cells is None or profile.max_cells >= len(labels):
        return np.arange(len(labels))
    return draw_cells(labels, profile.max_cells, profile.sampling, profile.seed)


def _read_opened(data: Opened, profile: Profile, take: Take, over_medians: bool) -> About:
    where = profile.cells
    parts = _parts(data, profile)
    symbols, labels, decisions = parts.symbols, parts.labels, parts.decisions
    medians = parts.medians
    if profile.encoding in RANK_VALUE:
        take = _counted(take, medians if over_medians else None, where)
    cell_ids, repeated = _cell_ids(data.obs.index)
    decisions = [*decisions, *repeated]
    chosen = _drawn(labels, profile)
    if len(chosen) < len(labels):
        how = "at random" if profile.sampling == "uniform" else "equally from each cell type"
        decisions.append(f"{len(chosen):,} of {len(labels):,} cells were drawn {how}.")
    n_seen, counts, most, empty = _expression(parts.matrix, chosen, parts.join, where, len(symbols),
                                              take)
    if len(empty):
        decisions.append(f"{len(empty):,} of {len(chosen):,} cells were left out, as no gene is "
                         f"expressed in them (the first is row {empty[0]}).")
        chosen = chosen[~np.isin(chosen, empty)]
    if n_seen < len(symbols):
        decisions.append(f"{len(symbols) - n_seen:,} genes are not seen in any of these cells.")
    if profile.encoding not in RANK_VALUE:
        decisions.append(("The values are whole numbers, so raw counts. " if counts else
                          "The values are not whole numbers, so normalised already. ")
                         + "Genes are ranked within each cell, which no library-size scaling or "
                         "log changes; the values are used as they are.")
    if counts and most <= 1:
        decisions.append("Warning: all values are 0 or 1, which puts a cell's genes into no order, "
                         "so theirs is random; set `matrix` to counts if there are any.")
    return About(tuple(symbols), labels[chosen], cell_ids[chosen], tuple(decisions),
                 tokens=parts.tokens)


def _counted(take: Take, medians: np.ndarray | None, where: str) -> Take:
    """`take` that refuses what is no raw count, and gets, with medians, what genes are ranked by.
    """
    def checked(rows: np.ndarray, part: sp.csr_matrix) -> None:
        odd = part.data != np.rint(part.data)
        if odd.any():
            raise InputError(f"{where} has values that are not whole numbers "
                             f"({first_odd(part, odd, rows)}), and rank-value encoding divides raw "
                             "counts by medians, which logged or scaled values must not be; set "
                             "`matrix` in the profile to the counts.")
        take(rows, part if medians is None else as_ranks(part, medians))

    return checked


def _cell_ids(index: "pd.Index") -> tuple[np.ndarray, list[str]]:
    """(n_cells,) identifiers; repeated ones are numbered, and a sentence says so.

    Tables are grouped by them, so two cells of one name would be taken for one.
    """
    names = index.astype(str)
    repeated = int(names.duplicated(keep=False).sum())
    if not repeated:
        return names.to_numpy().astype(str), []
    from anndata.utils import make_index_unique

    return make_index_unique(names).to_numpy().astype(str), [
        f"{repeated:,} cells have an identifier that another has too; these were numbered (A, A-1, "
        "...)."]


def draw_cells(labels: np.ndarray, n: int, sampling: str, seed: int) -> np.ndarray:
    """Row numbers, ascending, of n cells; fewer cells are among more with the same seed.

    sampling: `uniform`, or `stratified`: as many of each label, as far as there are any.
    """
    order = generator(seed, "drawn cells").permutation(len(labels))
    if sampling == "stratified":
        turn = np.empty(len(labels), np.int64)
        for label in np.unique(labels):
            members = labels[order] == label
            turn[members] = np.arange(members.sum())
        order = order[np.argsort(turn, kind="stable")]
    return np.sort(order[:n])


def _expression(matrix: Any, chosen: np.ndarray, join: sp.csr_matrix | None, where: str,
                n_genes: int, take: Take) -> tuple[int, bool, float, list[int]]:
    """Hand on the chosen cells' checked expression, chunk by chunk, symbols joined by `join`.

    Cells without expression are not handed on. Returns how many genes any cell expresses, whether
    all values are whole numbers, the largest, and the rows of the cells without.
    """
    seen, whole, most = np.zeros(n_genes, bool), True, 0.0
    empty: list[int] = []
    for some, values in row_chunks(matrix, chosen, where):
        part = checked_rows(values, chosen[some], where, join)
        seen[part.indices] = True
        whole = whole and np.array_equal(part.data, np.rint(part.data))
        most = max(most, float(part.data.max(initial=0)))
        filled = np.diff(part.indptr) > 0
        if filled.all():
            take(chosen[some], part)
        else:
            empty += chosen[some][~filled].tolist()
            take(chosen[some][filled], part[filled])
    _check_empty(empty, len(chosen), where)
    return int(seen.sum()), whole, most, empty


def _check_empty(empty: Sequence[int] | np.ndarray, n_cells: int, where: str, least: str = ""
                 ) -> None:
    """InputError if in many of the cells no gene is expressed.

    empty: their rows; least: `at least `, if there may be more.
    """
    if len(empty) > MOST_LEFT_OUT * n_cells:
        raise InputError(f"In {least}{len(empty):,} of {n_cells:,} cells of {where} no gene is "
                         f"expressed (the first is row {empty[0]}); filter them out.")


def _open(profile: Profile) -> Opened:
    """The profile's cells, not read yet if they are a file; InputError if it cannot be read."""
    path = cells_path(profile)
    if profile.cells == PACKAGED_CELLS:
        from scfm_circuits.cells.packaged import open_packaged

        return open_packaged()
    listed = manifest.entry("cells", profile.cells)
    if listed is not None and path is not None and "members" in listed:
        from scfm_circuits.cells.packaged import open_wheel

        return open_wheel(profile.cells, listed, path)
    if path is None:
        import warnings

        import scanpy

        with warnings.catch_warnings():
            # scanpy's own file predates its own conventions, and says so at each reading.
            warnings.simplefilter("ignore")
            return in_memory(scanpy.datasets.pbmc68k_reduced())
    if profile.cells == PLANTED_CELLS:
        from scfm_circuits.cells.simulated import planted_cells, read_plan

        return in_memory(planted_cells(profile.seed, plan=read_plan(path)))
    return open_h5ad(path, "check `cells` in the profile: give "
                     f"{', '.join(f'`{one}`' for one in CELLS_NAMES)} or the path of an .h5ad file")


def _matrix(data: Opened, name: str, where: str) -> tuple[Any, "pd.DataFrame"]:
    if name in data.matrices:
        return data.matrices[name]
    missing = {"raw": "`raw` matrix", "X": "X"}.get(name, f"layer {name!r}")
    there = " or ".join(map(normal_label, data.matrices))
    mend = (f"set `matrix` in the profile to {there}" if there
            else "there is no other expression in it, so choose another file")
    raise InputError(f"{where} has no {missing}; {mend}.")


def _labels(observations: "pd.DataFrame", column: str, where: str
            ) -> tuple[np.ndarray, list[str]]:
    """Each cell's label, as `normal_labels` writes it, and what to say of them; refuses cells
    without one."""
    if column not in observations.columns:
        known = listed(observations.columns)
        raise InputError(f"{where} has no obs column {column!r} for cell types; the columns are "
                         f"{known}; set `label_column` in the profile.")
    if observations[column].isna().any():
        raise InputError(f"{where} has {int(observations[column].isna().sum()):,} cells without "
                         f"a label in {column!r}; drop them or label them.")
    labels, rewritten = normal_labels(observations[column].astype(str))
    return labels, rewritten + doubtful_labels(labels)
