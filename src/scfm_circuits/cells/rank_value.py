"""Rank-value encoding: genes by their counts over medians, each gene a token.

Geneformer's tokenizer divides counts by the cell's total too, which changes no order within a cell
and is left out here. What it leaves open is the order of genes whose quotients are equal: here it
is drawn as for cell sentences (`ranking`). Tokens and medians come from dictionaries, or are made
of the training cells. Source: Theodoris et al. 2023; Geneformer, tokenizer.py.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.stats import rankdata

from scfm_circuits import InputError
from scfm_circuits.cells.binned import TOLD as BINS_TOLD
from scfm_circuits.cells.dictionaries import GeneTokens, read_gene_tokens
from scfm_circuits.cells.ranking import top_genes
from scfm_circuits.cells.tokens import Made, Prompts, in_memory
from scfm_circuits.common.encodings import BINNED, ENSEMBL, GENE_TOKENS, RANK_VALUE
from scfm_circuits.common.labels import listed, normal_label
from scfm_circuits.common.profile import Profile

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerFast


_CELLS = 4096


class Coded(NamedTuple):
    """The genes of some cells that have a token.

    symbols, tokens: n_genes; medians: (n_genes,), None where values are not divided; join:
    (n_columns, n_genes), by which expression is multiplied: columns without a token are left out,
    those of one token added up; decisions: sentences for the page.
    """

    symbols: list[str]
    tokens: tuple[int, ...]
    medians: np.ndarray | None
    join: sp.csr_matrix
    decisions: list[str]


def coded_genes(variables: "pd.DataFrame", symbols: Sequence[str], profile: Profile, where: str
                ) -> Coded:
    """Find the token of every column: by its Ensembl identifier, or by its symbol.

    variables: the var table; symbols: of its rows, `""` for none, or identifiers in their place.
    Raises InputError as
    `read_gene_tokens`, if there are no identifiers and no names to find them by, or no gene has a
    token.
    """
    known, binned = read_gene_tokens(profile), profile.encoding == BINNED
    identifiers, source = (symbols, "symbols") if binned else _identifiers(
        variables, symbols, profile, where)
    found = [known.names.get(one, one) for one in identifiers]
    columns = [column for column, one in enumerate(found) if one in known.genes]
    if not columns:
        example = next((one for one in identifiers if one), "none")
        fields = "`symbol_column`" if binned else "`ensembl_column`, `gene_mapping`"
        raise InputError(f"No gene of {where} has a token in {profile.token_dictionary!r} (genes "
                         f"are found by {source}, such as {normal_label(example)}); check "
                         f"{fields} and `token_dictionary` in the profile.")
    genes = list(dict.fromkeys(found[column] for column in columns))  # in the file's order
    place = {gene: i for i, gene in enumerate(genes)}
    names: dict[str, str] = {}
    for column in columns:
        names.setdefault(found[column], symbols[column] or found[column])
    named = _named(names, known) if all(map(ENSEMBL.match, names.values())) else []
    decisions = [
        f"{len(columns):,} of {len(found):,} genes have a token and are used; they were found by "
        f"{source}." + (f" {len(columns) - len(genes):,} share the token of another and were added "
                        "up." if len(columns) > len(genes) else ""),
        *named, BINS_TOLD if binned else
        "Genes are ranked by their counts over their medians (rank-value encoding)."]
    join = sp.csr_matrix((np.ones(len(columns), np.float32),
                          (columns, [place[found[column]] for column in columns])),
                         shape=(len(found), len(genes)))
    return Coded(_one_name_each(genes, names), tuple(known.genes[gene] for gene in genes),
                 None if binned else np.array([known.medians[gene] for gene in genes]), join,
                 decisions)


def _named(names: dict[str, str], known: GeneTokens) -> list[str]:
    """Give genes that the cells call by Ensembl identifiers alone the only name that the dictionary
    of names has for them; a gene of several names keeps its identifier. A sentence on that.

    names: by identifier, changed in place.
    """
    only: dict[str, str] = {}
    for name, gene in known.names.items():
        if not ENSEMBL.match(name):
            only[gene] = "" if gene in only else name
    taken = {gene: only[gene] for gene in names if only.get(gene)}
    names.update(taken)
    left = len(names) - len(taken)
    return ["The cells name genes by Ensembl identifiers alone" + (
        f", and {len(taken):,} are called by their names in the dictionary of names"
        if taken else "") + (
        f". {left:,} are called by their identifiers, in which no gene set finds them: name a "
        "`symbol_column`, or as `gene_mapping` a dictionary with one name for each gene, such as "
        "Geneformer's gene_name_id_dict." if left else ".")]


def _identifiers(variables: "pd.DataFrame", symbols: Sequence[str], profile: Profile, where: str
                 ) -> tuple[list[str], str]:
    """What each column is found by, in capitals, and what that is called in a sentence."""
    column = profile.ensembl_column
    if column is not None and column not in variables.columns:
        raise InputError(f"{where} has no var column {column!r} for Ensembl identifiers; the "
                         f"columns are {listed(variables.columns)}; set `ensembl_column` in the "
                         "profile.")
    entries = variables.index if column is None else variables[column]
    # The version behind a point is not part of the identifier.
    words = [str(one).strip().upper().split(".")[0] for one in entries]
    if 2 * sum(bool(ENSEMBL.match(one)) for one in words) > len(words):
        return words, f"the Ensembl identifiers in {column or 'the var index'}"
    if column is not None:
        example = next((one for one in words if one), "nothing")
        raise InputError(f"The var column {column!r} of {where} holds {normal_label(example)} and "
                         "the like, not Ensembl identifiers; set `ensembl_column` to a column that "
                         "does, or leave it out and set `gene_mapping`.")
    if profile.gene_mapping is None:
        raise InputError(f"{where} names its genes by symbols, and the model's tokens by Ensembl "
                         "identifiers; set `ensembl_column` to a var column that holds these "
                         f"(columns: {listed(variables.columns)}), or `gene_mapping` to the "
                         "model's dictionary of names.")
    return list(symbols), "symbols through the dictionary of names"


def _one_name_each(genes: Sequence[str], names: dict[str, str]) -> list[str]:
    """Symbols of the genes; a gene whose symbol another has too is called by its identifier."""
    taken: set[str] = set()
    found = []
    for gene in genes:
        found.append(gene if names[gene] in taken else names[gene])
        taken.add(found[-1])
    return found


def own_genes(counts: sp.csr_matrix, rows: np.ndarray, profile: Profile
              ) -> tuple[np.ndarray, np.ndarray]:
    """The genes that get a token where no dictionary is at hand, ascending, and their medians.

    As Geneformer's, a median is that of the gene's share of a cell's counts, times 10,000, over the
    cells that express it. Ranked by these, some genes are among the first `genes_per_cell` in more
    cells than others; those that are so most often get a token, as many as `vocabulary_size`
    leaves room for beside the special tokens.
    counts: (n_cells, n_genes) of the training cells alone; rows: (n_cells,) theirs in their file.
    """
    totals = np.asarray(counts.sum(axis=1), np.float64).ravel()
    columns = sp.csc_matrix(sp.diags(1e4 / totals) @ counts)
    medians = np.array([np.median(columns.data[start:stop]) if stop > start else 0.0
                        for start, stop in zip(columns.indptr, columns.indptr[1:], strict=False)])
    there = np.flatnonzero(medians)
    ranked = top_genes(as_ranks(sp.csr_matrix(counts[:, there]), medians[there]), rows,
                       profile.genes_per_cell, profile.seed)
    often = np.bincount(ranked[ranked >= 0], minlength=len(there))
    room = profile.vocabulary_size - len(RANK_VALUE[profile.encoding].special)
    chosen = np.argsort(-often, kind="stable")[:room]
    chosen = there[np.sort(chosen[often[chosen] > 0])]
    return chosen, medians[chosen]


def own_tokens(profile: Profile, symbols: Sequence[str]) -> GeneTokens:
    """The dictionary of genes that get a token here, behind the special ones; medians are with the
    ranking, which is all that they are for."""
    special = {name: i for i, name in enumerate(RANK_VALUE[profile.encoding].special)}
    return GeneTokens({one: len(special) + i for i, one in enumerate(symbols)}, special, {}, {})


def as_ranks(counts: sp.csr_matrix, medians: np.ndarray) -> sp.csr_matrix:
    """Sparse rows with, for each count, the rank of its quotient in the row: 1 for the smallest,
    equal ones alike.

    Quotients are compared in double precision, ranks are whole numbers that single precision holds.
    counts: (n_cells, n_genes), above zero; medians: (n_genes,).
    """
    quotients = counts.data.astype(np.float64) / medians[counts.indices]
    ranks = np.concatenate([rankdata(one, "dense") for one in
                            np.split(quotients, counts.indptr[1:-1])]).astype(np.float32)
    return sp.csr_matrix((ranks, counts.indices, counts.indptr), counts.shape)


def gene_tokenizer(known: GeneTokens, symbols: Sequence[str], tokens: Sequence[int]
                   ) -> "PreTrainedTokenizerFast":
    """The model's tokens as a tokenizer, which is asked for their texts and their number.

    A gene's text is its symbol among the cells, or its Ensembl identifier if they lack it. What
    ends a text, and fills it up, is the padding.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    texts = dict(zip(tokens, symbols, strict=True))
    fixed = known.special | {gene: token for gene, token in known.genes.items()
                             if texts.get(token, gene) == gene}
    vocabulary = dict(fixed)
    for gene, token in known.genes.items():
        if gene not in fixed:
            vocabulary[gene if texts[token] in fixed else texts[token]] = token
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        bos_token="<pad>", eos_token="<pad>", unk_token="<pad>")


def encode_ranked(encoding: str, known: GeneTokens, tokens: Sequence[int], ranking: np.ndarray,
                  made: Made = in_memory, levels: np.ndarray | None = None) -> Prompts:
    """All cells as their genes' tokens, with what the encoding puts before and after them.

    encoding: in `GENE_TOKENS`; tokens: of each gene; ranking: (n_cells, k) gene ids, -1 after the
    last; levels: (n_cells, k) of these genes under `binned`, where a token is the gene's plus as
    many times the number of tokens. There is no answer: `answer_start` is the length and
    `answer_end` one less.
    """
    way, each = GENE_TOKENS[encoding], np.append(np.asarray(tokens, np.int64), -1)
    before, after = ([known.special[name] for name in names] for names in (way.before, way.after))
    sizes = (ranking >= 0).sum(axis=1)
    lengths = sizes + len(before) + len(after)
    shape = len(ranking), int(lengths.max())
    prompts = Prompts(made("tokens", shape, np.int64), made("mask", shape, np.bool_),
                      made("gene", shape, np.int32), made("place", shape, np.int16),
                      lengths, lengths - 1)
    at, head = np.arange(shape[1]), len(before)
    for start in range(0, len(ranking), _CELLS):
        block = slice(start, start + _CELLS)
        length, size = lengths[block, None], sizes[block, None]
        gene = np.full((len(size), shape[1]), -1, np.int32)
        part = ranking[block, : shape[1] - head]
        gene[:, head : head + part.shape[1]] = part
        ids = np.where(gene >= 0, each[gene], known.special["<pad>"])
        ids[:, :head] = before
        if levels is not None:
            ids[:, head : head + part.shape[1]] += (
                len(known.genes) + len(known.special)) * levels[block, : part.shape[1]]
        for i, token in enumerate(after):
            np.put_along_axis(ids, head + size + i, token, axis=1)
        prompts.tokens[block], prompts.gene[block] = ids, gene
        prompts.place[block] = np.where(gene >= 0, 0, -1)
        prompts.mask[block] = at < length
    return prompts
