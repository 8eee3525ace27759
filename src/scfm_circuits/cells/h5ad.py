"""Opening an `.h5ad` file without loading it: obs and var whole, expression by rows.

Row-ordered (csr) and dense matrices are read in chunks of rows. A column-ordered (csc) matrix has
no rows to read one after the other: it is loaded whole up to `_CSC_VALUES` values.

This is the one place where a file is checked, whoever reads it. What anndata compares when it loads
a file is compared here (the shapes of X, raw and layers with obs and var), and what it leaves to
scipy too (the pointers and indices of sparse matrices).
"""

import contextlib
import errno
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np
import scipy.sparse as sp
from tqdm import tqdm

from scfm_circuits import InputError
from scfm_circuits.common.files import first_line

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

_CHUNK_ROWS = 4096
_CSC_VALUES = 200_000_000
_HDF5 = b"\x89HDF\r\n\x1a\n"
_BEGINNINGS = {
    b"": ("is empty", "fetch it again"),
    b"\x1f\x8b": ("is compressed as a whole", "unpack it with gunzip"),
    b"PK": ("is a zip archive", "unpack it"),
    b"<": ("is a web page, not data", "fetch it again, signed in if its site asks for that"),
    b"version https://git-lfs": ("is a pointer of Git LFS, not data", "run `git lfs pull`"),
}
"""What a file is that begins so, and what to do."""
_MTX = ("a folder of 10x Genomics", "scanpy.read_10x_mtx({path!r}).write_h5ad('cells.h5ad')")
_ZARR = ("a zarr store", "anndata.io.read_zarr({path!r}).write_h5ad('cells.h5ad')")
_OTHERS = {
    "matrix.mtx": _MTX, "matrix.mtx.gz": _MTX, ".zgroup": _ZARR, "zarr.json": _ZARR,
    "matrix/barcodes": ("a file of 10x Genomics",
                        "scanpy.read_10x_h5({path!r}).write_h5ad('cells.h5ad')"),
    "row_attrs": ("a loom file", "anndata.io.read_loom({path!r}).write_h5ad('cells.h5ad')"),
    "mod": ("a file of several modalities (MuData)",
            "mudata.read_h5ad({path!r}, mod='rna').write_h5ad('cells.h5ad')"),
    "cell.names": ("an h5Seurat file", "SeuratDisk::Convert({path!r}, dest = 'h5ad') in R"),
}
"""Other kinds by what a folder or an HDF5 file of the kind holds, and how to convert them."""
_FILTERS = {307: "bzip2", 32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32013: "zfp",
            32015: "zstd", 32026: "blosc2"}
"""Registered HDF5 filters that the package hdf5plugin brings, by number."""


@dataclass(frozen=True)
class StoredSparse:
    """A sparse matrix in the file, of which slices of rows can be taken if it is row-ordered.

    group: its `data` and `indices`; order: `csr` or `csc`; shape: (n_cells, n_genes); indptr: where
    each row (csr) or column (csc) begins, and the end.
    """

    group: h5py.Group
    order: str
    shape: tuple[int, int]
    indptr: np.ndarray

    def __getitem__(self, rows: slice) -> sp.csr_matrix:
        start, stop, _ = rows.indices(self.shape[0])
        part = sp.csr_matrix(self._values(self.indptr[start : stop + 1]),
                             shape=(stop - start, self.shape[1]))
        part.check_format()
        return part

    def loaded(self) -> sp.csr_matrix:
        """The whole matrix, by rows."""
        kind = sp.csr_matrix if self.order == "csr" else sp.csc_matrix
        whole = kind(self._values(self.indptr), shape=self.shape)
        whole.check_format()  # before anything walks along its indices
        return whole.tocsr()

    def _values(self, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values as float32 (scipy has neither float16 nor foreign byte orders), indices, ends."""
        part = slice(int(ends[0]), int(ends[-1]))
        ends = ends - ends[0]
        with np.errstate(over="ignore"):  # what becomes infinite is refused as such
            return (self.group["data"][part].astype(np.float32, copy=False),
                    self.group["indices"][part],
                    ends.astype(np.int32) if ends[-1] < 2**31 else ends)


class Opened(NamedTuple):
    """A data set whose expression has not been read.

    obs: one row per cell. matrices: by name (X, raw or a layer) the matrix, or its place in the
    file, and the var table of its columns. close: lets go of the file. aside: what cannot be read
    and need not be, such as `obs['x']` or `layers['x']`, and why.
    """

    obs: "pd.DataFrame"
    matrices: Mapping[str, tuple[Any, "pd.DataFrame"]]
    close: Callable[[], None]
    aside: Mapping[str, str]


def part_of(matrix: str) -> str:
    """The part of the file that holds a matrix, as `Opened.aside` names it."""
    return matrix if matrix in ("X", "raw") else f"layers[{matrix!r}]"


def in_memory(data: "AnnData") -> Opened:
    """The same view of data that are in memory already."""
    matrices = {} if data.X is None else {"X": (data.X, data.var)}
    if data.raw is not None:
        matrices["raw"] = (data.raw.X, data.raw.var)
    for name, layer in data.layers.items():
        matrices.setdefault(str(name), (layer, data.var))
    return Opened(data.obs, matrices, lambda: None, {})


@contextlib.contextmanager
def unreadable(path: Path | str) -> Iterator[None]:
    """An InputError about the file for whatever goes wrong while it is read."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # h5py and anndata raise many kinds for a broken file
        raise InputError(f"The cells {path} cannot be read as .h5ad{_mend(error)}.") from None


def _mend(error: Exception) -> str:
    """The end of a sentence: why a file cannot be read, and what to do."""
    if isinstance(error, BlockingIOError) or "already open for write" in str(error):
        return (": another program has it open for writing, or ended without closing it; wait "
                "until it is done, or write the file again")
    if isinstance(error, PermissionError):
        return ": you may not read it; ask its owner for the permission"
    if isinstance(error, OSError) and error.errno == errno.ENOLCK:
        return ": its file system has no locks; set HDF5_USE_FILE_LOCKING=FALSE"
    if isinstance(error, MemoryError):
        return ": memory is too small for it; store its matrices as csr, or fewer cells"
    damaged = isinstance(error, (OSError, RuntimeError))
    return f" ({_why(error)}); " + (
        "the file is damaged or cut short: fetch it again" if damaged
        else "write it again with the anndata that made it, or fetch it again")


def _why(error: Exception) -> str:
    """What an error says, as part of a sentence."""
    if type(error).__name__ == "IORegistryError":
        return "this anndata does not know its encoding"
    return re.split(r"[.!?] (?=[A-Z])", first_line(error))[0].rstrip(".")


def open_h5ad(path: Path, give: str = "give the path of one") -> Opened:
    """The file's obs and var, and where its matrices are.

    give: the end of a sentence, what to give instead of a path that is none of an .h5ad.

    Raises InputError if the file is not there, is of another kind, cannot be read, or contradicts
    itself. What cannot be read but may not be asked for is set aside.
    """
    import anndata

    _check_place(path, give)
    with unreadable(path), warnings.catch_warnings():
        # anndata tells how old a file is, and what has moved in parts that nobody asks for here.
        warnings.simplefilter("ignore")
        file = h5py.File(path, "r")
        try:
            _check_kind(path, file)
            if path.suffix != ".h5ad":
                raise InputError(f"The cells {path} are not called .h5ad; {give}.")
            if "raw.X" not in file and not isinstance(file.get("obs"), h5py.Dataset):
                return _opened(file, path)
            # Written before anndata 0.7: anndata alone knows how, and reads and checks it whole.
            file.close()
            return in_memory(anndata.read_h5ad(path))
        except BaseException:
            file.close()
            raise


def _check_place(path: Path, give: str) -> None:
    """InputError unless there is a file that begins as HDF5 does."""
    if path.is_dir():
        _check_kind(path, {one.name for one in path.iterdir()})
        raise InputError(f"The cells {path} are a folder; {give}.")
    if not path.is_file():
        gone = f"are a link to {path.readlink()}, which is not there" if path.is_symlink() else (
            "do not exist")
        raise InputError(f"The cells {path} {gone}; {give}.")
    if path.suffix.lower() in (".rds", ".rda", ".rdata", ".robj"):
        raise InputError(f"The cells {path} are an object of R, not an .h5ad; convert them there, "
                         "as with zellkonverter::writeH5AD.")
    with unreadable(path), open(path, "rb") as handle:
        begins = handle.read(64)
    if begins.startswith(_HDF5):
        return
    kind = [what for start, what in _BEGINNINGS.items()
            if (begins.lstrip().startswith(start) if start else not begins)]
    if kind:
        raise InputError(f"The cells {path} cannot be read as .h5ad: the file {kind[0][0]}; "
                         f"{kind[0][1]}.")
    if path.suffix != ".h5ad":
        raise InputError(f"The cells {path} are not an .h5ad file; {give}.")
    # HDF5 allows a foreign beginning; h5py looks for what follows it.
    if not h5py.is_hdf5(path):
        raise InputError(f"The cells {path} cannot be read as .h5ad: the file is not HDF5 (it "
                         f"begins with {begins[:12]!r}); check what it is, or fetch it again.")


def _check_kind(path: Path, holds: Any) -> None:
    """InputError for a folder or an HDF5 file of another kind. holds: what is in it."""
    for sign, (kind, convert) in _OTHERS.items():
        if sign in holds:
            raise InputError(f"The cells {path} are {kind}, not an .h5ad; convert them with "
                             f"{convert.format(path=str(path))}.")


# --- the parts of a file -------------------------------------------------------------------------


def _opened(file: h5py.File, path: Path) -> Opened:
    """The parts of a file that an anndata since 0.7 wrote."""
    for name, what in (("obs", "cells"), ("var", "genes")):
        if name not in file:
            raise InputError(f"The cells {path} have no table of {what} ({name}), as an .h5ad "
                             "has; check what the file is.")
    aside: dict[str, str] = {}
    obs, var = (_table(file[name], name, path, aside) for name in ("obs", "var"))
    places = {"X": (part_of("X"), "X", var)} if "X" in file else {}
    if isinstance(file.get("raw"), h5py.Group):
        with _set_aside("raw", aside):
            places["raw"] = ("raw", "raw/X", _table(file["raw/var"], "raw.var", path, aside))
    for name in file.get("layers", {}):
        # A layer called X is not X.
        places.setdefault(name, (part_of(name), f"layers/{name}", var))
    matrices = {}
    for name, (called, place, genes) in places.items():
        with _set_aside(called, aside):
            if file[place].attrs.get("encoding-type") != "null":
                matrices[name] = (_matrix(file[place], called, (len(obs), len(genes)), path), genes)
    return Opened(obs, matrices, file.close, aside)


@contextlib.contextmanager
def _set_aside(called: str, aside: dict[str, str]) -> Iterator[None]:
    """Note under `called` why a part cannot be read that may not be asked for."""
    try:
        yield
    except InputError:  # the file contradicts itself
        raise
    except Exception as error:  # as many kinds as for the whole file
        aside[called] = _why(error)


def _table(place: h5py.Group, called: str, path: Path, aside: dict[str, str]) -> "pd.DataFrame":
    """obs, var or raw.var, without columns that cannot be read."""
    import pandas as pd
    from anndata.io import read_elem

    with contextlib.suppress(Exception):
        _check_filters(place)
        return read_elem(place)
    if place.attrs.get("encoding-version") != "0.2.0":  # columns may have been kept otherwise
        return read_elem(place)
    try:
        _check_filters(place[place.attrs["_index"]])
        index = pd.Index(read_elem(place[place.attrs["_index"]]))
    except Exception as error:
        raise InputError(f"The cells {path} cannot be read, as the index of {called} cannot "
                         f"({_why(error)}).") from None
    columns = {}
    for name in place.attrs["column-order"]:
        with _set_aside(f"{called}[{name!r}]", aside):
            _check_filters(place[name])
            columns[name] = pd.Series(read_elem(place[name]), index=index)
    return pd.DataFrame(columns, index=index)


def _matrix(place: Any, called: str, shape: tuple[int, int], path: Path) -> Any:
    """A matrix's place in the file, checked; shape: of obs and var.

    InputError if it contradicts them or itself, another error if it cannot be read.
    """
    _check_filters(place)
    values, matrix = place, place
    sparse = isinstance(place, h5py.Group)
    order = str(place.attrs.get("encoding-type", "none" if sparse else "array"))
    if order not in (("csr_matrix", "csc_matrix") if sparse else ("array",)):
        raise ValueError(f"its encoding {order!r} is not known")
    if sparse:
        values, indptr = place["data"], place["indptr"][:].astype(np.int64)
        n_cells, n_genes = map(int, place.attrs["shape"])
        matrix = StoredSparse(place, order[:3], (n_cells, n_genes), indptr)
    if values.dtype.kind not in "buif":
        raise ValueError(f"it holds no numbers, but {values.dtype}")
    if matrix.shape != shape:
        raise InputError(f"The cells {path} contradict themselves: {called} has the shape "
                         f"{_by(matrix.shape)}, but there are {shape[0]:,} cells in obs and "
                         f"{shape[1]:,} genes in {'raw.' * (called == 'raw')}var; fetch the "
                         "file again, or make it anew.")
    if isinstance(matrix, StoredSparse):
        n = matrix.shape[matrix.order == "csc"]
        held = {len(place[name]) for name in ("data", "indices")}
        if not (len(indptr) == n + 1 and indptr[0] == 0 and (np.diff(indptr) >= 0).all()
                and len(held) == 1 and indptr[-1] <= max(held)):
            raise InputError(f"The cells {path} contradict themselves: the pointers of {called} "
                             "(indptr) do not fit its values; fetch the file again, or make it "
                             "anew.")
    return matrix


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{one:,}" for one in shape) or "of a single value"


def _check_filters(place: Any) -> None:
    """ValueError if a part of the file needs an HDF5 filter that is not here.

    Those of the package hdf5plugin are made known if it is installed.
    """
    parts = [place]
    if isinstance(place, h5py.Group):
        place.visititems(lambda _, one: parts.append(one))
    for one in parts:
        if not isinstance(one, h5py.Dataset):
            continue
        made = one.id.get_create_plist()
        for index in range(made.get_nfilters()):
            number = made.get_filter(index)[0]
            if h5py.h5z.filter_avail(number):
                continue
            with contextlib.suppress(ImportError):
                import hdf5plugin  # noqa: F401 (it registers its filters)
            if not h5py.h5z.filter_avail(number):
                name = _FILTERS.get(number, "of a kind that is not known")
                raise ValueError(f"it is compressed by the HDF5 filter {number} ({name}): install "
                                 "hdf5plugin, or write the file again with compression='gzip'")


def by_gene(matrix: Any, where: str) -> bool:
    """Whether a stored matrix has no rows that can be read one by one; InputError if it is too
    large to be read whole."""
    if not isinstance(matrix, StoredSparse) or matrix.order == "csr":
        return False
    n_values = int(matrix.indptr[-1])
    if n_values > _CSC_VALUES:
        raise InputError(f"{where} holds {n_values:,} values ordered by gene (csc), which cannot "
                         "be read cell by cell; store the matrix as csr.")
    return True


def stored_in_rows(matrix: Any) -> np.ndarray | None:
    """(n_cells,) how many values each row has stored, where that is known without reading them."""
    if isinstance(matrix, StoredSparse):
        return None if matrix.order == "csc" else np.diff(matrix.indptr)
    return np.diff(matrix.tocsr().indptr) if hasattr(matrix, "tocsr") else None


def row_chunks(matrix: Any, rows: np.ndarray, where: str, size: int = _CHUNK_ROWS
               ) -> Iterator[tuple[slice, Any]]:
    """The chosen rows, chunk by chunk in the file's order: (their part of `rows`, values).

    matrix: as in `Opened`; rows: ascending row numbers; size: rows of a chunk, of which those
    without a chosen row are not read. A chunk's rows depend on the file alone, so that memory is
    bounded however many are chosen. InputError if a part cannot be read.
    """
    with unreadable(where):
        if by_gene(matrix, where):
            matrix = matrix.loaded()
        elif isinstance(matrix, (sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array)):
            matrix.check_format()
            matrix = matrix.tocsr()
    starts = np.unique(rows // size) * size
    for start in tqdm(starts, desc="cells", unit="chunk", disable=len(starts) < 2 or size == 1):
        stop = min(start + size, matrix.shape[0])
        a, b = np.searchsorted(rows, [start, stop])
        with unreadable(where):
            values = matrix[int(start):int(stop)][rows[a:b] - start]
        yield slice(int(a), int(b)), values
