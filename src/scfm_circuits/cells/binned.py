"""Levels of genes under scGPT's encoding: the bin of a value among the quantiles of its own cell.

The 50 edges are the quantiles 0, 1/49, ... 1 of the values that a cell expresses among genes with a
token. Many values are equal to edges, and often to several: scGPT draws at random, and without a
seed, one of the bins that such a value may be in; here it is in the last of them, which is its own
rule `side="one"`, so that two runs agree. A gene's level is then as high as scGPT would ever put
it. Any increasing transformation of the values leaves levels as they are. A cell with more genes
than the model takes gives its most expressed ones, where scGPT draws; levels are of all.
Source: bowang-lab/scGPT, scgpt/preprocess.py (`binning`), scgpt/data_collator.py.
"""

import numpy as np
import scipy.sparse as sp

from scfm_circuits.common.encodings import LEVELS

TOLD = ("A gene's level is its bin among the quantiles of the cell's own values; a value at an "
        "edge is in the bin above it, where scGPT draws one at random, and of more genes than are "
        "taken the most expressed ones are, where scGPT draws them.")


def levels_of(expression: sp.csr_matrix, ranking: np.ndarray) -> np.ndarray:
    """(n_cells, k) int64 levels, 1 to 50, of each cell's ranked genes; 0 after the last.

    expression: (n_cells, n_genes), above zero; ranking: (n_cells, k) gene ids, -1 after the last.
    """
    found = np.zeros(ranking.shape, np.int64)
    level = np.zeros(expression.shape[1], np.int64)
    for row, genes in enumerate(ranking):
        cell = slice(*expression.indptr[row : row + 2])
        values = expression.data[cell].astype(np.float64)
        if not len(values):
            continue
        edges = np.quantile(values, np.linspace(0, 1, LEVELS - 1))
        level[expression.indices[cell]] = np.digitize(values, edges)
        found[row] = np.where(genes >= 0, level[genes], 0)
    return found
