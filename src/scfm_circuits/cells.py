"""Cells in: the bundled PBMCs, simulated ones or an `.h5ad` file, checked before any computing.

Cell sentences rank genes within a cell, so any increasing transformation of a cell's values
(library-size scaling, log1p) leaves them as they are; what matters is that the values are not
centred or scaled per gene. Negative values give that away and are refused.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from scfm_circuits import InputError
from scfm_circuits.profile import BUNDLED_CELLS, PLANTED_CELLS, ROOT, Profile, cells_path

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

_ENSEMBL = re.compile(r"^ENS[A-Z]*G\d{6,}", re.IGNORECASE)


@dataclass(frozen=True)
class Cells:
    """Expression of checked cells.

    expression: (n_cells, n_genes) sparse rows, float32, nonnegative, explicit zeros removed.
    symbols: n_genes upper-case gene symbols, unique.
    labels, cell_ids: (n_cells,) cell types and identifiers.
    decisions: one sentence for each choice made while reading, for the page.
    """

    expression: sp.csr_matrix
    symbols: tuple[str, ...]
    labels: np.ndarray
    cell_ids: np.ndarray
    decisions: tuple[str, ...]

    def __len__(self) -> int:
        return int(self.expression.shape[0])


def read_cells(profile: Profile) -> Cells:
    """Read, check and subsample the profile's cells.

    Raises InputError for a file that is missing, truncated or holds no usable expression,
    symbols or labels; see the helpers below for the single checks.
    """
    data = _open(profile)
    where = profile.cells
    matrix, variables = _matrix(data, profile.matrix, where)
    symbols, decisions = _symbols(variables, profile.symbol_column, where)
    labels = _labels(data.obs, profile.label_column, where)
    matrix = _checked(matrix, where)
    matrix, symbols, summed = _merge_duplicates(matrix, symbols, profile.duplicate_symbols, where)
    decisions += summed
    cell_ids = data.obs_names.to_numpy().astype(str)
    if profile.max_cells is not None and profile.max_cells < matrix.shape[0]:
        chosen = np.random.default_rng([profile.seed, 1]).permutation(matrix.shape[0])
        chosen = np.sort(chosen[: profile.max_cells])
        decisions.append(f"{len(chosen):,} of {matrix.shape[0]:,} cells were drawn at random.")
        matrix, labels, cell_ids = matrix[chosen], labels[chosen], cell_ids[chosen]
    used = np.asarray((matrix > 0).sum(axis=0)).ravel() > 0
    if not used.all():
        decisions.append(f"{int((~used).sum()):,} genes are not seen in any of these cells.")
    decisions.append(
        "Genes are ranked within each cell, which no library-size scaling or log changes; "
        "the values are used as they are."
    )
    return Cells(matrix, tuple(symbols), labels, cell_ids, tuple(decisions))


def _open(profile: Profile) -> "AnnData":
    """The profile's cells as AnnData, or InputError if the file cannot be read."""
    path = cells_path(profile, ROOT)
    if path is None:
        import warnings

        import scanpy

        with warnings.catch_warnings():
            # scanpy's own file predates its own conventions, and says so at each reading.
            warnings.simplefilter("ignore")
            return scanpy.datasets.pbmc68k_reduced()
    if profile.cells == PLANTED_CELLS:
        from scfm_circuits.planted_cells import planted_cells, read_plan

        return planted_cells(profile.seed, plan=read_plan(path))
    if path.suffix != ".h5ad":
        raise InputError(f"Profile field `cells` is {profile.cells!r}; give `{BUNDLED_CELLS}`, "
                         f"`{PLANTED_CELLS}` or the path of an .h5ad file.")
    if not path.is_file():
        raise InputError(f"The cells {path} do not exist; check `cells` in the profile.")
    import anndata

    try:
        return anndata.read_h5ad(path)
    except Exception as error:  # h5py and anndata raise many kinds for a broken file
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error)
        raise InputError(f"The cells {path} cannot be read as .h5ad ({reason}); the file may be "
                         "truncated: fetch it again.") from None


def _matrix(data: "AnnData", name: str, where: str) -> tuple[Any, "pd.DataFrame"]:
    if name == "raw":
        if data.raw is None:
            raise InputError(f"{where} has no `raw` matrix; set `matrix` in the profile to X"
                             + "".join(f" or {key}" for key in data.layers) + ".")
        return data.raw.X, data.raw.var
    if name == "X":
        if data.X is None:
            raise InputError(f"{where} has no X; set `matrix` in the profile to "
                             + " or ".join(["raw", *data.layers]) + ".")
        return data.X, data.var
    if name not in data.layers:
        known = ", ".join(["X", "raw", *data.layers])
        raise InputError(f"{where} has no layer {name!r}; set `matrix` in the profile to one of "
                         f"{known}.")
    return data.layers[name], data.var


def _symbols(variables: "pd.DataFrame", column: str | None, where: str
             ) -> tuple[list[str], list[str]]:
    """Upper-case symbols of all columns; refuses Ensembl identifiers and empty names."""
    if column is None:
        raw = variables.index.to_series().astype(str)
    elif column in variables.columns:
        raw = variables[column].astype(str)
    else:
        known = ", ".join(map(str, variables.columns)) or "none"
        raise InputError(f"{where} has no var column {column!r} for gene symbols; the columns are "
                         f"{known}; set `symbol_column` in the profile.")
    symbols = [symbol.strip().upper() for symbol in raw]
    missing = sum(symbol in ("", "NAN", "NONE", "<NA>") for symbol in symbols)
    if missing:
        raise InputError(f"{where} has {missing:,} genes without a symbol in "
                         f"{column or 'the var index'}; fill them or set `symbol_column`.")
    if any(re.search(r"\s", symbol) for symbol in symbols):
        bad = next(symbol for symbol in symbols if re.search(r"\s", symbol))
        raise InputError(f"{where} has a gene symbol with a space in it ({bad!r}); a sentence "
                         "separates genes by spaces, so rename it.")
    ensembl = sum(bool(_ENSEMBL.match(symbol)) for symbol in symbols)
    if ensembl > len(symbols) / 2:
        known = ", ".join(map(str, variables.columns)) or "none"
        raise InputError(f"{where} names its genes by Ensembl identifiers, not symbols; set "
                         f"`symbol_column` in the profile to a var column with symbols "
                         f"(columns: {known}).")
    return symbols, []


def _labels(observations: "pd.DataFrame", column: str, where: str) -> np.ndarray:
    if column not in observations.columns:
        known = ", ".join(map(str, observations.columns)) or "none"
        raise InputError(f"{where} has no obs column {column!r} for cell types; the columns are "
                         f"{known}; set `label_column` in the profile.")
    if observations[column].isna().any():
        raise InputError(f"{where} has {int(observations[column].isna().sum()):,} cells without "
                         f"a label in {column!r}; drop them or label them.")
    return observations[column].astype(str).to_numpy().astype(str)


def _checked(matrix: Any, where: str) -> sp.csr_matrix:
    """The matrix as sparse rows; refuses NaN, infinite and negative values and empty cells."""
    sparse = sp.csr_matrix(matrix, dtype=np.float32)
    if sparse.shape[0] == 0 or sparse.shape[1] == 0:
        raise InputError(f"{where} holds {sparse.shape[0]} cells and {sparse.shape[1]} genes; "
                         "there is nothing to read.")
    if not np.isfinite(sparse.data).all():
        raise InputError(f"{where} has NaN or infinite expression values; choose another `matrix` "
                         "or replace them.")
    if (sparse.data < 0).any():
        raise InputError(f"{where} has negative expression values, so it was scaled or centred "
                         "per gene, which destroys the ranking; set `matrix` to counts or "
                         "log-normalised values.")
    sparse.eliminate_zeros()
    sparse.sort_indices()
    empty = np.flatnonzero(np.diff(sparse.indptr) == 0)
    if len(empty):
        raise InputError(f"{where} has {len(empty):,} cells in which no gene is expressed (the "
                         f"first is row {empty[0]}); filter them out.")
    return sparse


def _merge_duplicates(matrix: sp.csr_matrix, symbols: list[str], rule: str, where: str
                      ) -> tuple[sp.csr_matrix, list[str], list[str]]:
    """Refuse repeated symbols, or add up the columns that share one."""
    unique, inverse, counts = np.unique(symbols, return_inverse=True, return_counts=True)
    if len(unique) == len(symbols):
        return matrix, symbols, []
    repeated = unique[counts > 1]
    if rule == "error":
        named = ", ".join(repeated[:3])
        raise InputError(f"{where} has {len(repeated):,} gene symbols more than once (such as "
                         f"{named}); set `duplicate_symbols: sum` in the profile to add them up.")
    join = sp.csr_matrix((np.ones(len(symbols), np.float32), (np.arange(len(symbols)), inverse)))
    merged = sp.csr_matrix(matrix @ join)
    merged.sort_indices()
    return merged, unique.tolist(), [f"{len(repeated):,} repeated symbols were added up."]
