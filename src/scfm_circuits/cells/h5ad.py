"""Opening an `.h5ad` file without loading it: obs and var whole, expression by rows.

Row-ordered (csr) and dense matrices are read in chunks of rows. A column-ordered (csc) matrix has
no rows to read one after the other: it is loaded whole up to `_CSC_VALUES` values.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np
import scipy.sparse as sp
from tqdm.auto import tqdm

from scfm_circuits import InputError
from scfm_circuits.common.files import first_line

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

_CHUNK_ROWS = 4096
_CSC_VALUES = 200_000_000


class Opened(NamedTuple):
    """A data set whose expression has not been read.

    obs: one row per cell. matrices: by name (X, raw or a layer) the matrix, or its place in the
    file, and the var table of its columns. close: lets go of the file.
    """

    obs: "pd.DataFrame"
    matrices: Mapping[str, tuple[Any, "pd.DataFrame"]]
    close: Callable[[], None]


def in_memory(data: "AnnData") -> Opened:
    """The same view of data that are in memory already."""
    matrices = {} if data.X is None else {"X": (data.X, data.var)}
    if data.raw is not None:
        matrices["raw"] = (data.raw.X, data.raw.var)
    for name, layer in data.layers.items():
        matrices.setdefault(str(name), (layer, data.var))
    return Opened(data.obs, matrices, lambda: None)


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """An InputError about the file for whatever goes wrong while it is read."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # h5py and anndata raise many kinds for a broken file
        raise InputError(f"The cells {path} cannot be read as .h5ad ({first_line(error)}); the "
                         "file may be truncated: fetch it again.") from None


def open_h5ad(path: Path) -> Opened:
    """The file's obs and var, and where its matrices are; InputError if it cannot be read."""
    import anndata
    import pandas as pd
    from anndata.io import read_elem

    with unreadable(path), warnings.catch_warnings():
        # anndata tells how old a file is, and what has moved in parts that nobody asks for here.
        warnings.simplefilter("ignore")
        file = h5py.File(path, "r")
        try:
            obs, var = read_elem(file["obs"]), read_elem(file["var"])
            if not isinstance(obs, pd.DataFrame) or "raw.X" in file:
                # Written before anndata 0.7: anndata alone knows how, and reads it whole.
                file.close()
                return in_memory(anndata.read_h5ad(path))
            places = {"X": (file["X"], var)} if "X" in file else {}
            if isinstance(file.get("raw"), h5py.Group):
                places["raw"] = (file["raw/X"], read_elem(file["raw/var"]))
            for name, layer in file.get("layers", {}).items():
                places.setdefault(name, (layer, var))  # a layer called X is not X
            matrices = {name: (_lazy(place), about) for name, (place, about) in places.items()
                        if place.attrs.get("encoding-type") != "null"}
        except BaseException:
            file.close()
            raise
    return Opened(obs, matrices, file.close)


def _lazy(place: Any) -> Any:
    from anndata.io import sparse_dataset

    return sparse_dataset(place) if isinstance(place, h5py.Group) else place


def row_chunks(matrix: Any, rows: np.ndarray, where: str) -> Iterator[tuple[slice, Any]]:
    """The chosen rows, chunk by chunk in the file's order: (their part of `rows`, values).

    matrix: as in `Opened`; rows: ascending row numbers. Chunks without a chosen row are not read.
    A chunk's rows depend on the file alone, so that memory is bounded however many are chosen.
    """
    stored = not sp.issparse(matrix)  # in the file, or dense
    if stored and getattr(matrix, "format", None) == "csc":
        n_values = len(matrix.group["data"])
        if n_values > _CSC_VALUES:
            raise InputError(f"{where} holds {n_values:,} values ordered by gene (csc), which "
                             "cannot be read cell by cell; store the matrix as csr.")
        matrix, stored = matrix.to_memory(), False
    if not stored:  # sparse and in memory
        matrix = matrix.tocsr()
    starts = np.unique(rows // _CHUNK_ROWS) * _CHUNK_ROWS
    for start in tqdm(starts, desc="cells", unit="chunk", disable=len(starts) < 2):
        stop = min(start + _CHUNK_ROWS, matrix.shape[0])
        a, b = np.searchsorted(rows, [start, stop])
        yield slice(int(a), int(b)), matrix[int(start):int(stop)][rows[a:b] - start]
