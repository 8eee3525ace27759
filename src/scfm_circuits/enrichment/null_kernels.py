"""Compiled inner loops that draw null gene lists; see `null_lists` for what they mean."""

import numpy as np

from scfm_circuits.common.compiled import compiled


@compiled
def sample_within_bins(indptr, ids, item_bin, bin_start, items, uniforms, out):  # type: ignore[no-untyped-def]
    """Replace each id by a random item of its own bin, without repeats within a list.

    `items` lists all items bin by bin, `bin_start` (n_bins + 1,) where each bin starts; `uniforms`
    (ids' size) are draws from [0, 1). A partial Fisher-Yates shuffle of the bin: `items` may start
    in any order, so it is left shuffled for the next list. Fills `out`.
    """
    taken = np.zeros(bin_start.size, np.int64)
    for i in range(indptr.size - 1):
        for position in range(indptr[i], indptr[i + 1]):
            b = item_bin[ids[position]]
            first = bin_start[b] + taken[b]
            chosen = first + np.int64(uniforms[position] * (bin_start[b + 1] - first))
            items[first], items[chosen] = items[chosen], items[first]
            out[position] = items[first]
            taken[b] += 1
        for position in range(indptr[i], indptr[i + 1]):
            taken[item_bin[ids[position]]] = 0


@compiled
def _score_genes(tokens, counts, families, by_token, touched, score, inside):  # type: ignore[no-untyped-def]
    """Add each token's count to the genes of its family; returns how many genes were touched.

    `inside` gets the share of the count that falls to each gene, as the token's occurrences do;
    `score` the whole count (rule `token`) or the same share (rule `occurrence`).
    """
    n_touched = 0
    for k in range(tokens.size):
        for j in range(families.indptr[tokens[k]], families.indptr[tokens[k] + 1]):
            gene = families.genes[j]
            if inside[gene] == 0.0:
                touched[n_touched] = gene
                n_touched += 1
            part = counts[k] * families.shares[j]
            inside[gene] += part
            score[gene] += counts[k] if by_token else part
    return n_touched


@compiled
def _select(genes, keys, wanted, out):  # type: ignore[no-untyped-def]
    """Write the `wanted` genes of highest key to `out` (all if there are fewer); their number."""
    n = genes.size
    if wanted >= n:
        out[:n] = genes
        return n
    # No sorting: whatever is above the wanted place, and as many of those that tie with it.
    bound = np.partition(keys, n - wanted)[n - wanted]
    written = 0
    for k in range(n):
        if keys[k] > bound:
            out[written] = genes[k]
            written += 1
    for k in range(n):
        if written == wanted:
            break
        if keys[k] == bound:
            out[written] = genes[k]
            written += 1
    return wanted


@compiled
def lists_of_tokens(indptr, tokens, counts, families, n_genes, by_token, lengths, out):  # type: ignore[no-untyped-def]
    """The first `lengths` genes that each feature's tokens and counts rank, as `gene_lists` ranks.

    Ties in the score are broken by what falls inside the gene. Fills `out`; returns the indptr.
    """
    starts = np.zeros(indptr.size, np.int64)
    touched = np.empty(n_genes, np.int64)
    score, inside = np.zeros(n_genes), np.zeros(n_genes)
    for i in range(indptr.size - 1):
        own = slice(indptr[i], indptr[i + 1])
        n = _score_genes(tokens[own], counts[own], families, by_token, touched, score, inside)
        genes = touched[:n]
        keys = score[genes]
        if by_token and n:
            # Counts are whole numbers: less than one half added keeps their order.
            second = inside[genes]
            keys = keys + second * (0.4999 / second.max())
        written = 0
        if lengths[i]:
            written = _select(genes, keys, lengths[i], out[starts[i] :])
        starts[i + 1] = starts[i] + written
        for gene in genes:
            score[gene] = 0.0
            inside[gene] = 0.0
    return starts
