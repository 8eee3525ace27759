"""Simple explanations of a feature: "it fires on these genes / families / sub-words".

All three kinds are sets of genes, so one can be held against the other: a gene, the genes of a
family, the genes whose name contains a token. Each kind is given equal freedom, up to `AT_MOST`
items (the paper's Table 3 names at most three genes or families in a row).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scfm_circuits import InputError
from scfm_circuits.common.compiled import compiled
from scfm_circuits.common.files import first_line
from scfm_circuits.common.profile import located
from scfm_circuits.interpretability.mentions import Mentions

AT_MOST = 3
"""Items that an explanation may name."""

_HYPHENATED = re.compile(r"([A-Z]{2,})-[A-Z]")
_BEFORE_DIGIT = re.compile(r"([A-Z-]*[A-Z])-?(?=[0-9])")


class Items(NamedTuple):
    """The items of one kind, each a set of genes; a gene may be in several or in none.

    names: what the page calls them. item_indptr, item_genes: the genes of each item; gene_indptr,
    gene_items: the items of each gene.
    """

    names: NDArray[np.str_]
    item_indptr: NDArray[np.int64]
    item_genes: NDArray[np.int64]
    gene_indptr: NDArray[np.int64]
    gene_items: NDArray[np.int64]


def items_from(names: Sequence[str], item: np.ndarray, gene: np.ndarray, n_genes: int) -> Items:
    """Items of which `item[i]` holds `gene[i]`; a pair that is given twice counts once."""
    pairs = np.unique(np.stack([item, gene]).astype(np.int64), axis=1)
    by_gene = pairs[:, np.lexsort((pairs[0], pairs[1]))]
    return Items(np.array(names, dtype=str),
                 np.searchsorted(pairs[0], np.arange(len(names) + 1)), pairs[1].copy(),
                 np.searchsorted(by_gene[1], np.arange(n_genes + 1)), by_gene[0].copy())


# --- families ------------------------------------------------------------------------------------


def family_stem(symbol: str) -> str:
    """The part of a symbol that its family shares, by spelling alone; upper case.

    1. Letters, a hyphen, a letter: what stands before the hyphen (HLA-DRA: HLA, MT-ND4: MT).
    2. Else what stands before the first digit, of at least two letters (ZBTB20: ZBTB, RPS3A: RPS,
       HSP90AA1: HSP, CSNK1A1: CSNK, NKX2-5: NKX).
    3. Else, if there is no digit, the symbol without its last letter if three are left (TNNT: TNN,
       PTPRC: PTPR).
    4. Else the symbol itself (C1orf112, ABL).

    Spelling is no biology: CASP3 and CAST do not meet here, and neither do ACTB and ACTA2, while
    clones such as RP11-291B21.2 share RP. A table of gene groups does better.
    """
    upper = symbol.upper()
    if found := _HYPHENATED.match(upper):
        return found.group(1)
    if found := _BEFORE_DIGIT.match(upper):
        return found.group(1) if len(found.group(1)) >= 2 else upper
    if upper.isalpha() and len(upper) >= 4:
        return upper[:-1]
    return upper


def read_gene_groups(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Groups of genes (HGNC's, say) from a table with the columns symbol and group: group, symbols.

    path: the profile's `gene_groups`, from the project's folder if relative. Comma- or
    tab-separated, by suffix .csv or not; a gene may be in several groups, a row each.

    Raises:
        InputError: no such file, not such a table, or no group in it.
    """
    path = located("gene_groups", str(path))
    separator = "," if path.suffix.lower() == ".csv" else "\t"
    try:
        frame = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputError(f"The gene groups {path} cannot be read ({first_line(error)}); "
                         "`gene_groups` takes a .csv or .tsv with the columns symbol and group."
                         ) from None
    frame.columns = [str(name).strip().lower() for name in frame.columns]
    if any((frame.columns == name).sum() != 1 for name in ("symbol", "group")):
        raise InputError(f"The gene groups {path} have the columns {', '.join(frame.columns)}; "
                         "needed are symbol and group, each once.")
    given = frame[["symbol", "group"]].apply(lambda column: column.str.strip())
    given = given[(given != "").all(axis=1)]
    if given.empty:
        raise InputError(f"The gene groups {path} name no gene with a group; fill both columns.")
    return {str(group): tuple(dict.fromkeys(part["symbol"].str.upper()))
            for group, part in given.groupby("group")}


def family_items(symbols: Sequence[str] | np.ndarray,
                 groups: Mapping[str, Sequence[str]] | None = None) -> Items:
    """The families of the genes: their shared stems, and the groups of a table if there is one.

    A gene whose stem no other gene has is a family of one. A group that holds exactly the genes of
    a stem takes its place.
    """
    members: dict[str, list[int]] = {}
    for gene, symbol in enumerate(symbols):
        members.setdefault(family_stem(str(symbol)), []).append(gene)
    place = {str(symbol).upper(): gene for gene, symbol in enumerate(symbols)}
    found = {tuple(genes): f"{stem}*" if len(genes) > 1 else str(symbols[genes[0]])
             for stem, genes in members.items()}
    for group, named in (groups or {}).items():
        genes = sorted(place[symbol.upper()] for symbol in named if symbol.upper() in place)
        if genes:
            found[tuple(genes)] = group
    lengths = [len(genes) for genes in found]
    return items_from(list(found.values()), np.repeat(np.arange(len(found)), lengths),
                      np.concatenate([np.array(genes, np.int64) for genes in found] or
                                     [np.zeros(0, np.int64)]), len(symbols))


class Explained(NamedTuple):
    """For each of n features, the items chosen on some mentions, and their score on others.

    items: (n, AT_MOST) chosen, in this order; -1: no more. precision, recall, f1, auroc: (n,); nan
    where nothing was there to be right or wrong about, or to be named.
    """

    items: NDArray[np.int64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    auroc: NDArray[np.float64]

    @property
    def size(self) -> NDArray[np.int64]:
        """(n,) number of items."""
        return (self.items >= 0).sum(axis=1)


def explain(train: Mentions, held_out: Mentions, items: Items) -> Explained:
    """Choose items for each feature on the training mentions and score them on the held-out ones.

    The prediction is that the feature fires on every mention of the items' genes and on no other.
    Items are added one by one, each time the one with the best F1 on the training mentions, while
    that rises, up to `AT_MOST`; of equals the first. AUROC: a mention's score is the feature's
    firing rate in training on the genes that the first item that holds it has brought, and on the
    rest for all others; ties count half.
    """
    n, n_genes, n_items = len(train.indptr) - 1, len(train.present), len(items.names)
    choice = _Choice(np.full((n, AT_MOST), -1, np.int64),
                     *(np.zeros((n, AT_MOST + 1)) for _ in range(3)))
    item = np.repeat(np.arange(n_items), np.diff(items.item_indptr))
    size = np.bincount(item, train.present[items.item_genes], n_items).astype(np.float64)
    _choose(train, held_out, _Index(*items[1:]), _Scratch(
        np.zeros(n_genes), np.zeros(n_genes), np.zeros(n_genes, np.bool_),
        np.empty(n_genes, np.int64), np.zeros(n_items), size, np.empty(n_items, np.int64)), choice)
    chosen, rate, hit, seen = choice
    missed = seen - hit
    positive, predicted = hit.sum(axis=1), seen[:, :-1].sum(axis=1)
    right = hit[:, :-1].sum(axis=1)
    higher = rate[:, :, None] > rate[:, None, :]
    equal = rate[:, :, None] == rate[:, None, :]
    won = np.einsum("ni,nj,nij->n", hit, missed, higher + 0.5 * equal)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Explained(chosen, right / predicted, right / positive,
                         np.where((positive > 0) & (n_items > 0),
                                  2 * right / (predicted + positive), np.nan),
                         won / (positive * missed.sum(axis=1)))


def description_bits(n_chosen: np.ndarray, n_items: int) -> np.ndarray:
    """log2 of the number of ways to choose so many of `n_items`: what naming them costs."""
    from scipy.special import gammaln

    ways = gammaln(n_items + 1) - gammaln(n_chosen + 1) - gammaln(n_items - n_chosen + 1)
    return np.asarray(ways / np.log(2))


# --- choosing, compiled --------------------------------------------------------------------------


class _Index(NamedTuple):
    """The items without their names; as in `Items`."""

    item_indptr: NDArray[np.int64]
    item_genes: NDArray[np.int64]
    gene_indptr: NDArray[np.int64]
    gene_items: NDArray[np.int64]


class _Scratch(NamedTuple):
    """What is known of the feature at hand; between features as at the start.

    fired, held_fired: (n_genes,) mentions on which it fires, in training and held out. covered:
    (n_genes,) whether an item chosen holds the gene; order: those genes, to undo it. gain, left:
    (n_items,) mentions of the genes of an item that are not covered, in training: on which the
    feature fires, and all. touched: the items on whose genes it fires, ascending.
    """

    fired: NDArray[np.float64]
    held_fired: NDArray[np.float64]
    covered: NDArray[np.bool_]
    order: NDArray[np.int64]
    gain: NDArray[np.float64]
    left: NDArray[np.float64]
    touched: NDArray[np.int64]


class _Choice(NamedTuple):
    """items: (n, AT_MOST). By item, and last for the mentions that no item covers, (n, AT_MOST + 1)
    each: rate (of firing in training), hit (held-out firing) and seen (held-out mentions)."""

    items: NDArray[np.int64]
    rate: NDArray[np.float64]
    hit: NDArray[np.float64]
    seen: NDArray[np.float64]


@compiled
def _choose(train, held_out, index, scratch, choice):  # type: ignore[no-untyped-def]
    """Fills `choice`, feature by feature."""
    last = choice.items.shape[1]
    everything, held_everything = train.present.sum(), held_out.present.sum()
    for f in range(len(train.indptr) - 1):
        total, held_total, n_touched = _take_up(f, train, held_out, index, scratch)
        right = predicted = best = held_right = held_predicted = 0.0
        n_covered = 0
        for step in range(last):
            item, best = _best_item(scratch, n_touched, right, predicted, total, best)
            if item < 0:
                break
            choice.items[f, step] = item
            choice.rate[f, step] = scratch.gain[item] / scratch.left[item]
            right += scratch.gain[item]
            predicted += scratch.left[item]
            n_covered, choice.hit[f, step], choice.seen[f, step] = _cover(
                item, n_covered, train.present, held_out.present, index, scratch)
            held_right += choice.hit[f, step]
            held_predicted += choice.seen[f, step]
        if everything > predicted:
            choice.rate[f, last] = (total - right) / (everything - predicted)
        choice.hit[f, last] = held_total - held_right
        choice.seen[f, last] = held_everything - held_predicted
        _let_go(f, train, held_out, index, scratch, n_touched, n_covered)


@compiled
def _take_up(f, train, held_out, index, scratch):  # type: ignore[no-untyped-def]
    """Enter a feature's firing; returns how often it fires, in training and held out, and the
    number of items touched."""
    total = held_total = 0.0
    n_touched = 0
    for a in range(train.indptr[f], train.indptr[f + 1]):
        gene, fired = train.gene[a], train.fired[a]
        scratch.fired[gene] = fired
        total += fired
        for b in range(index.gene_indptr[gene], index.gene_indptr[gene + 1]):
            item = index.gene_items[b]
            if scratch.gain[item] == 0:
                scratch.touched[n_touched] = item
                n_touched += 1
            scratch.gain[item] += fired
    for a in range(held_out.indptr[f], held_out.indptr[f + 1]):
        scratch.held_fired[held_out.gene[a]] = held_out.fired[a]
        held_total += held_out.fired[a]
    scratch.touched[:n_touched].sort()
    return total, held_total, n_touched


@compiled
def _best_item(scratch, n_touched, right, predicted, total, best):  # type: ignore[no-untyped-def]
    """The item that raises F1 above `best` most, or -1, and the F1 with it."""
    found = -1
    for item in scratch.touched[:n_touched]:
        if scratch.gain[item] <= 0:
            continue
        f1 = 2 * (right + scratch.gain[item]) / (predicted + scratch.left[item] + total)
        if f1 > best * (1 + 1e-12):
            best, found = f1, item
    return found, best


@compiled
def _cover(item, n_covered, present, held_present, index, scratch):  # type: ignore[no-untyped-def]
    """Cover an item's genes; returns the number of genes covered so far and, of the held-out
    mentions newly covered, those on which the feature fires, and all."""
    hit = seen = 0.0
    for a in range(index.item_indptr[item], index.item_indptr[item + 1]):
        gene = index.item_genes[a]
        if scratch.covered[gene]:
            continue
        scratch.covered[gene] = True
        scratch.order[n_covered] = gene
        n_covered += 1
        hit += scratch.held_fired[gene]
        seen += held_present[gene]
        for b in range(index.gene_indptr[gene], index.gene_indptr[gene + 1]):
            scratch.left[index.gene_items[b]] -= present[gene]
            scratch.gain[index.gene_items[b]] -= scratch.fired[gene]
    return n_covered, hit, seen


@compiled
def _let_go(f, train, held_out, index, scratch, n_touched, n_covered):  # type: ignore[no-untyped-def]
    """Undo what `_take_up` and `_cover` did."""
    for gene in scratch.order[:n_covered]:
        scratch.covered[gene] = False
        for b in range(index.gene_indptr[gene], index.gene_indptr[gene + 1]):
            scratch.left[index.gene_items[b]] += train.present[gene]
    scratch.gain[scratch.touched[:n_touched]] = 0.0
    scratch.fired[train.gene[train.indptr[f] : train.indptr[f + 1]]] = 0.0
    scratch.held_fired[held_out.gene[held_out.indptr[f] : held_out.indptr[f + 1]]] = 0.0
