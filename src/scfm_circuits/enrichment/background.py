"""What over-representation is computed from: a library seen against a background, encoded lists.

`prepare_background` decides which genes could have been drawn and which terms are tested;
`encode_lists` turns lists of symbols into the library's gene ids under that decision.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scfm_circuits import InputError
from scfm_circuits.enrichment import kernels
from scfm_circuits.enrichment.gene_sets import GeneSets
from scfm_circuits.enrichment.null_lists import Ragged, ragged
from scfm_circuits.enrichment.significance import IntArray

Family = Literal["hit", "all"]

MAX_BACKGROUND = 1_000_000
"""Largest background accepted as a number; no genome has that many genes."""


@dataclass(frozen=True, eq=False)
class Background:
    """A library seen against a background: what is drawn from, and which terms are tested."""

    library: GeneSets
    total: int
    """Number of background genes N."""
    symbols: frozenset[str] | None
    """Upper-case background symbols; None if only their number is given (nothing is filtered)."""
    known: NDArray[np.bool_]
    """Which of the library's genes are in the background, (n_genes,)."""
    sizes: IntArray
    """Genes of each term within the background, 0 for a term without one, (n_terms,)."""
    gene_indptr: IntArray
    """Where each gene's terms start in `gene_terms`, (n_genes + 1,)."""
    gene_terms: IntArray
    """Terms of each gene, (sizes.sum(),)."""

    @property
    def n_terms(self) -> int:
        """Number of terms that can be tested: the BH family "all"."""
        return int(np.count_nonzero(self.sizes))

    @cached_property
    def log_factorials(self) -> tuple[NDArray[np.int64], float]:
        """Table and unit, see `kernels.log_factorial_table`."""
        return kernels.log_factorial_table(self.total)

    @cached_property
    def term_index(self) -> kernels.TermIndex:
        """The same terms in the form the compiled engine walks."""
        distinct, size_class = np.unique(self.sizes, return_inverse=True)
        return kernels.TermIndex(self.gene_indptr, self.gene_terms,
                                            size_class.astype(np.int32), distinct)

    def setting(self, family: Family, alpha: float) -> kernels.Setting:
        """What the compiled engine has to know beside the terms."""
        n_tests = self.n_terms if family == "all" else 0
        return kernels.Setting(self.total, *self.log_factorials, n_tests, alpha)


class Encoded(NamedTuple):
    """Gene lists as the library's gene ids; repeats and genes outside the background dropped."""

    indptr: IntArray
    """Where each list starts in `ids`, (n_lists + 1,)."""
    ids: IntArray
    """Gene ids of all lists, unique within a list, (indptr[-1],)."""
    n_query: IntArray
    """Number of genes of each list that count as drawn, n of the test, (n_lists,)."""


def prepare_background(
    library: GeneSets, background: int | Collection[str] | Background | None
) -> Background:
    """Fix what lists are drawn from; pass the result as `background` to reuse it for many calls.

    Args:
        library: the gene sets.
        background: a number N (nothing is filtered, unknown symbols count, as at Enrichr and
            gseapy with a number), the symbols drawn from (lists and terms are restricted to them),
            or None for the union of the library (gseapy's default).

    Raises:
        InputError: a background that is a string, empty, smaller than a term, or shares no gene
            with the library.
    """
    if isinstance(background, Background):
        if background.library is not library:
            raise InputError(
                f"The background was prepared for library {background.library.name}, not for "
                f"{library.name}; prepare one for each library."
            )
        return background
    total, symbols = _background_genes(library, background)
    owners = np.repeat(np.arange(len(library)), library.sizes)
    known = np.ones(len(library.genes), dtype=bool)
    if symbols is not None:
        known = np.fromiter((gene in symbols for gene in library.genes), bool, len(library.genes))
    kept = known[library.term_genes]
    sizes = np.bincount(owners[kept], minlength=len(library))
    if not sizes.any():
        raise InputError(
            f"No term of {library.name} can be tested: none shares a gene with the {total:,} "
            "background genes; check that both use gene symbols."
        )
    _check_fits(library, total, sizes)
    genes = library.term_genes[kept]
    order = np.argsort(genes, kind="stable")
    counts = np.bincount(genes, minlength=len(library.genes))
    return Background(
        library, total, symbols, known, sizes, np.concatenate([[0], np.cumsum(counts)]),
        owners[kept][order].astype(np.int32),
    )  # fmt: skip


def _background_genes(
    library: GeneSets, background: int | Collection[str] | None
) -> tuple[int, frozenset[str] | None]:
    """Number of background genes, and their symbols unless only a number is given."""
    if background is None:
        return len(library.genes), frozenset(library.genes)
    if isinstance(background, int | np.integer) and not isinstance(background, bool):
        if not 0 < background <= MAX_BACKGROUND:
            raise InputError(
                f"A background of {int(background):,} genes makes no sense; give a number from 1 "
                f"to {MAX_BACKGROUND:,}, or the genes themselves."
            )
        return int(background), None
    if isinstance(background, str | bytes | bool) or not isinstance(background, Collection):
        raise InputError(
            f"The background is {background!r:.60}; give a number of genes, a collection of "
            "symbols, or None for the library's genes."
        )
    symbols = frozenset(_upper(symbol) for symbol in background)
    if not symbols:
        raise InputError("The background holds no gene; pass the genes the lists are drawn from.")
    return len(symbols), symbols


def _check_fits(library: GeneSets, total: int, sizes: IntArray) -> None:
    largest = int(sizes.argmax())
    if sizes[largest] > total:
        raise InputError(
            f"The background of {total:,} genes is smaller than the term "
            f"{library.terms[largest]!r} of {library.name} ({sizes[largest]:,} genes); give the "
            "number of genes that the lists could have been drawn from."
        )


def _upper(symbol: Any) -> str:
    if not isinstance(symbol, str) or not symbol.strip():
        raise InputError(
            f"{symbol!r:.60} is not a gene symbol; remove missing values and empty entries."
        )
    return symbol.strip().upper()


def encode_lists(
    lists: Sequence[Collection[str]],
    library: GeneSets,
    background: int | Collection[str] | Background | None,
) -> Encoded:
    """Turn lists of symbols into gene ids: upper-cased, repeats dropped, background applied.

    Raises:
        InputError: a list that is one string, an entry that is no symbol, or as
            `prepare_background`.
    """
    universe = prepare_background(library, background)
    for i, genes in enumerate(lists):
        if isinstance(genes, str | bytes):
            raise InputError(f"Gene list {i} is one string; pass a list of symbols for each list.")
    place: dict[str, int] = {}
    try:
        ids = [[place.setdefault(symbol, len(place)) for symbol in genes] for genes in lists]
    except TypeError:  # a list in the list
        for genes in lists:
            list(map(_upper, genes))
        raise
    return encode_ids(ragged(ids), gene_ids(list(place), universe))


class GeneIds(NamedTuple):
    """The genes that lists name by id, as a library and a background know them."""

    universe: Background
    canonical: IntArray
    """The same number for all spellings of a symbol, (n_genes,)."""
    counts: NDArray[np.bool_]
    """Whether each canonical gene counts as drawn."""
    gene: IntArray
    """The library's id of each canonical gene, -1 for none."""


def gene_ids(genes: Sequence[str], universe: Background) -> GeneIds:
    """Look the symbols up once, for many calls of `encode_ids`."""
    place: dict[str, int] = {}  # one for all spellings of a symbol (C1orf112, C1ORF112)
    canonical = [place.setdefault(_upper(gene), len(place)) for gene in genes]
    known = [universe.symbols is None or name in universe.symbols for name in place]
    gene = [universe.library.index.get(name, -1) for name in place]
    return GeneIds(universe, np.array(canonical, np.int64), np.array(known, np.bool_),
                   np.array(gene, np.int32))


def encode_ids(lists: Ragged, genes: GeneIds) -> Encoded:
    """As `encode_lists`, for lists that are ids into `genes` already (the nulls): far faster.

    Raises InputError for an id outside `genes`.
    """
    n_genes = genes.canonical.size
    if lists.ids.size and not 0 <= lists.ids.min() <= lists.ids.max() < n_genes:
        raise InputError(f"The lists hold an id outside the {n_genes} genes they refer to.")
    indptr = np.asarray(lists.indptr, dtype=np.int64)
    symbols = genes.canonical[lists.ids]
    ids, n_query = np.empty(symbols.size, np.int32), np.zeros(indptr.size - 1, np.int64)
    starts = kernels.compact_lists(indptr, symbols, genes.counts, genes.gene, ids, n_query)
    return Encoded(starts, ids[: starts[-1]], n_query)
