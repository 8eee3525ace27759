"""Files that laboratories have: read rightly, or refused truly, and by every reader alike."""

import ctypes
import fcntl
import gzip
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import Cells, read_cells
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm_circuits import InputError
from scfm_circuits.book.first_profile import profile_fields
from scfm_circuits.cells import h5ad
from scfm_circuits.cells.reading import describe_cells
from scfm_circuits.common.profile import Profile, load_profile

SYMBOLS = ["CD3D", "MS4A1", "LYZ", "NKG7", "GNLY"]
N = 12
KINDS = {"dense": np.asarray, "csr": sp.csr_matrix, "csc": sp.csc_matrix}
each_kind = pytest.mark.parametrize("kind", KINDS)
ZSTD = 32015


def values() -> np.ndarray:
    x = np.random.default_rng(0).integers(0, 5, (N, 5)).astype(np.float32)
    x[:, 0] += 1
    return x


def some_data(kind: str = "dense") -> anndata.AnnData:
    """Twelve cells, five genes, counts in X; columns of obs and var that nobody needs."""
    return anndata.AnnData(
        KINDS[kind](values()),
        obs=pd.DataFrame({"type": list("aabb") * 3, "other": range(N)},
                         index=[f"c{i}" for i in range(N)]),
        var=pd.DataFrame({"length": range(5)}, index=SYMBOLS))


def edited(folder: Path, data: anndata.AnnData, **changed: Any) -> Path:
    """The file of `data` with parts of it written anew; a function changes what is there.

    A part's name has `__` for each `/`.
    """
    path = folder / "mine.h5ad"
    data.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for part, new in changed.items():
            place = part.replace("__", "/")
            about = dict(file[place].attrs)
            new = new(file[place][:]) if callable(new) else new
            del file[place]
            file[place] = new
            file[place].attrs.update(about)
    return path


def profile_of(path: Path, **fields: Any) -> Profile:
    return load_profile("smoke", {"cells": str(path), "matrix": "X", "label_column": "type",
                                  "max_cells": None, **fields})


def read(path: Path, **fields: Any) -> Cells:
    return read_cells(profile_of(path, **fields))


def refusal(reader: Callable[[], Any], path: Path) -> str:
    with pytest.raises(InputError) as caught:
        reader()
    message = str(caught.value)
    assert path.name in message and "\n" not in message and caught.value.__cause__ is None
    assert message.endswith(".") and not re.search(r"[.!?] [A-Z]", message)
    return message


def refused_by_all(path: Path, told: str, **fields: Any) -> None:
    """`make profile`, `make plan` and chapter 01 refuse the file, and say so."""
    profile = profile_of(path, **fields)
    for reader in (lambda: profile_fields(path), lambda: describe_cells(profile),
                   lambda: read_cells(profile)):
        assert told in refusal(reader, path)


# --- files that are something else ---------------------------------------------------------------


@pytest.mark.parametrize(("content", "told"), [
    (b"", "the file is empty; fetch it again"),
    (gzip.compress(b"an .h5ad", mtime=0), "compressed as a whole; unpack it with gunzip"),
    (b"PK\x03\x04 zip", "a zip archive"),
    (b"\n<!DOCTYPE html><p>Sign in", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "`git lfs pull`"),
    (b"gene,c0\nCD3D,1\n", "not HDF5 (it begins with b'gene,c0"),
])
def test_contents_that_are_no_hdf5(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "mine.h5ad"
    path.write_bytes(content)
    refused_by_all(path, told)


@pytest.mark.parametrize(("groups", "told"), [
    (["matrix/barcodes", "matrix/data"], "scanpy.read_10x_h5("),
    (["row_attrs", "col_attrs", "matrix"], "anndata.io.read_loom("),
    (["mod/rna", "obs", "var"], "mudata.read_h5ad("),
    (["cell.names", "meta.data"], "SeuratDisk::Convert("),
    (["X"], "no table of cells (obs)"),
    (["obs"], "no table of genes (var)"),
])
@pytest.mark.parametrize("name", ["mine.h5ad", "mine.h5"])
def test_hdf5_of_other_kinds(tmp_path: Path, name: str, groups: list[str], told: str) -> None:
    path = tmp_path / name
    with h5py.File(path, "w") as file:
        for group in groups:
            file.create_group(group)
    plain = "no table" in told and name == "mine.h5"
    refused_by_all(path, "not called .h5ad" if plain else told)


@pytest.mark.parametrize(("inside", "told"), [
    (".zgroup", "read_zarr"), ("zarr.json", "read_zarr"), ("matrix.mtx.gz", "read_10x_mtx"),
    ("readme.txt", "are a folder"),
])
def test_folders(tmp_path: Path, inside: str, told: str) -> None:
    path = tmp_path / "mine.h5ad"
    path.mkdir()
    (path / inside).touch()
    refused_by_all(path, told)


def test_a_link_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mine.h5ad"
    path.symlink_to(tmp_path / "gone.h5ad")
    refused_by_all(path, "gone.h5ad, which is not there")


def test_another_program_writes_the_file(tmp_path: Path) -> None:
    path = edited(tmp_path, some_data())
    with open(path, "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # as HDF5 does while it writes
        refused_by_all(path, "another program has it open for writing")
    assert len(read(path)) == N


@pytest.mark.parametrize(("error", "told"), [
    (PermissionError(13, "Permission denied"), "you may not read it"),
    (OSError(37, "No locks available"), "HDF5_USE_FILE_LOCKING=FALSE"),
    (MemoryError(), "memory is too small"),
])
def test_what_else_may_keep_a_file_from_being_read(tmp_path: Path, error: Exception, told: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise error

    path = edited(tmp_path, some_data())
    monkeypatch.setattr(h5py, "File", refuse)
    refused_by_all(path, told)


# --- files that contradict themselves ------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("shape", [(N - 1, 5), (N + 1, 5), (N, 4), (N, 6), (5, N)])
def test_x_of_another_shape_than_obs_and_var(tmp_path: Path, kind: str, shape: tuple[int, int]
                                             ) -> None:
    path = tmp_path / "mine.h5ad"
    data = some_data(kind)
    data.write_h5ad(path)
    anndata.AnnData(KINDS[kind](np.ones(shape, np.float32))).write_h5ad(tmp_path / "other.h5ad")
    with h5py.File(path, "r+") as file, h5py.File(tmp_path / "other.h5ad") as other:
        del file["X"]
        other.copy("X", file)
    with pytest.raises(ValueError):
        anndata.read_h5ad(path)
    refused_by_all(path, f"X has the shape {shape[0]} x {shape[1]}, but there are 12 cells in obs "
                         "and 5 genes in var")


@pytest.mark.parametrize(("changed", "told"), [
    ({"layers__counts": np.ones((N, 6))}, "layers['counts'] has the shape 12 x 6"),
    ({"raw__X": np.ones((N, 4))}, "raw has the shape 12 x 4, but there are 12 cells in obs and 5 "
                                  "genes in raw.var"),
    ({"raw__X": np.ones((N - 3, 5))}, "raw has the shape 9 x 5"),
    ({"X": np.ones(N)}, "X has the shape 12,"),
    ({"X": np.ones((N, 5, 2))}, "X has the shape 12 x 5 x 2"),
    ({"obs___index": np.array([f"c{i}" for i in range(N + 2)], object),
      "obs__type": np.array(["a"] * (N + 2), object)}, "14 cells in obs"),
    ({"var___index": np.array([*SYMBOLS, "FOXO1"], object), "var__length": np.arange(6)},
     "6 genes in var"),
])
def test_parts_of_other_shapes(tmp_path: Path, changed: dict[str, np.ndarray], told: str) -> None:
    data = some_data()
    data.raw, data.layers["counts"] = data, data.X.copy()
    refused_by_all(edited(tmp_path, data, **changed), told)


def ends(change: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], np.ndarray]:
    def changed(indptr: np.ndarray) -> np.ndarray:
        change(indptr)
        return indptr
    return changed


@pytest.mark.parametrize("kind", ["csr", "csc"])
@pytest.mark.parametrize("changed", [
    {"X__indptr": ends(lambda p: p.__setitem__(3, p[4] + 1))},
    {"X__indptr": ends(lambda p: p.__setitem__(-1, p[-1] + 1))},
    {"X__indptr": ends(lambda p: p.__setitem__(0, 1))},
    {"X__indptr": lambda p: p[:-1]},
    {"X__data": lambda x: x[:-1]},
    {"X__indices": lambda x: x[:-1]},
])
def test_pointers_that_do_not_fit(tmp_path: Path, kind: str, changed: dict[str, Any]) -> None:
    refused_by_all(edited(tmp_path, some_data(kind), **changed), "pointers of X (indptr)")


@pytest.mark.parametrize("kind", ["csr", "csc"])
@pytest.mark.parametrize("index", [-1, N])
@pytest.mark.parametrize("old", [False, True])
def test_values_of_a_gene_that_is_not_there(tmp_path: Path, kind: str, index: int, old: bool
                                            ) -> None:
    path = edited(tmp_path, some_data(kind), X__indices=lambda x: np.where(x == x[3], index, x))
    if old:  # read whole, by anndata
        with h5py.File(path, "r+") as file:
            for name in ("obs", "var"):
                index = file[name]["_index"][:].astype("S9")
                words = file["obs/type/codes"][:] if name == "obs" else np.arange(5)
                del file[name]
                file[name] = np.array(list(zip(index, words, strict=True)),
                                      [("index", "S9"), ("type", "i4")])
    assert "indices" in refusal(lambda: read(path), path)


@pytest.mark.parametrize("part", ["X", "obs/other", "X/data"])
def test_a_damaged_chunk(tmp_path: Path, part: str) -> None:
    data = some_data("csr" if part == "X/data" else "dense")
    path = tmp_path / "mine.h5ad"
    data.write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        chunk = file[part].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 3 : chunk.byte_offset + chunk.size - 3] = bytes(chunk.size - 6)
    path.write_bytes(content)
    if part == "obs/other":
        assert any("obs['other']" in one for one in read(path).decisions)
    else:
        assert "the file is damaged or cut short: fetch it again" in refusal(
            lambda: read(path), path)


# --- what nobody asks for ------------------------------------------------------------------------


def unknown(path: Path, part: str) -> Path:
    with h5py.File(path, "r+") as file:
        file[part].attrs["encoding-type"] = "of the future"
    return path


@pytest.mark.parametrize(("part", "called"), [
    ("obs/other", "obs['other']"), ("var/length", "var['length']"),
    ("layers/counts", "layers['counts']"), ("raw/X", "raw"),
    ("raw/var/length", "raw.var['length']"),
])
def test_a_part_that_nobody_asks_for_is_left_aside(tmp_path: Path, part: str, called: str) -> None:
    data = some_data("csr")
    data.raw, data.layers["counts"] = data, data.X.copy()
    path = unknown(edited(tmp_path, data), part)
    cells = read(path)
    np.testing.assert_array_equal(cells.expression.toarray(), values())
    assert any(one.startswith("Left aside") and called in one for one in cells.decisions)
    assert profile_fields(path)["label_column"].value == "type"


@pytest.mark.parametrize(("part", "fields", "told"), [
    ("X", {}, "X cannot be read (its encoding"),
    ("obs/type", {}, "obs['type'] cannot be read"),
    ("var/name", {"symbol_column": "name"}, "var['name'] cannot be read"),
])
def test_a_part_that_is_asked_for_and_cannot_be_read(tmp_path: Path, part: str,
                                                     fields: dict[str, str], told: str) -> None:
    data = some_data("csr")
    data.var["name"] = SYMBOLS
    path = unknown(edited(tmp_path, data), part)
    profile = profile_of(path, **fields)
    assert told in refusal(lambda: describe_cells(profile), path)
    assert told in refusal(lambda: read_cells(profile), path)
    if not fields:
        assert told.split(" (")[0] in refusal(lambda: profile_fields(path), path)


@pytest.mark.parametrize("change", [
    {"obs__other": np.arange(N + 3)}, {"obs__other": np.full(N, b"\xff\xfe")},
])
def test_an_odd_column_that_nobody_asks_for(tmp_path: Path, change: dict[str, np.ndarray]) -> None:
    assert len(read(edited(tmp_path, some_data(), **change))) == N


@pytest.mark.parametrize("kind", [np.full((N, 5), b"word"), np.ones((N, 5), complex)])
def test_a_matrix_without_numbers(tmp_path: Path, kind: np.ndarray) -> None:
    refused_by_all(edited(tmp_path, some_data(), X=kind), "it holds no numbers")


# --- filters of HDF5 -----------------------------------------------------------------------------


def filtered(path: Path, part: str, number: int) -> Path:
    """The same file with one part in a chunk that an HDF5 filter has to read."""
    with h5py.File(path, "r+") as file:
        content, about = file[part][:], dict(file[part].attrs)
        del file[part]
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_chunk(content.shape)
        made.set_filter(number, h5py.h5z.FLAG_OPTIONAL)
        place = h5py.h5d.create(file.id, part.encode(), h5py.h5t.py_create(content.dtype),
                                h5py.h5s.create_simple(content.shape), made)
        # Bytes reversed: what reads them without the filter reads something else.
        place.write_direct_chunk((0,) * content.ndim, content.tobytes()[::-1])
        file[part].attrs.update(about)
    return path


@pytest.fixture
def no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)  # importing it fails
    if h5py.h5z.filter_avail(ZSTD):
        pytest.skip("zstd is here without hdf5plugin")


@pytest.mark.usefixtures("no_plugin")
@pytest.mark.parametrize(("kind", "part"), [
    ("dense", "X"), ("csr", "X/data"), ("csr", "X/indices"), ("csc", "X/indptr"),
])
@pytest.mark.parametrize(("number", "name"), [(ZSTD, "zstd"), (40_000, "not known")])
def test_a_filter_that_is_not_here(tmp_path: Path, kind: str, part: str, number: int, name: str
                                   ) -> None:
    path = filtered(edited(tmp_path, some_data(kind)), part, number)
    refused_by_all(path, f"HDF5 filter {number} ({name if number == ZSTD else 'of a kind that is'}"
                   [:30])
    profile = profile_of(path)
    assert "install hdf5plugin" in refusal(lambda: describe_cells(profile), path)


@pytest.mark.usefixtures("no_plugin")
@pytest.mark.parametrize("part", ["obs/other", "var/length"])
def test_a_filter_of_what_nobody_asks_for(tmp_path: Path, part: str) -> None:
    path = filtered(edited(tmp_path, some_data()), part, ZSTD)
    assert any("zstd" in one for one in read(path).decisions)


class _Filter(ctypes.Structure):
    """HDF5's `H5Z_class2_t`."""

    kind = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p,
                            ctypes.c_size_t, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
    _fields_ = [("version", ctypes.c_int), ("id", ctypes.c_int), ("encoder", ctypes.c_uint),
                ("decoder", ctypes.c_uint), ("name", ctypes.c_char_p),
                ("can_apply", ctypes.c_void_p), ("set_local", ctypes.c_void_p), ("filter", kind)]


@pytest.mark.parametrize(("kind", "part"), [
    ("dense", "X"), ("csr", "X/data"), ("csr", "X/indptr"), ("dense", "obs/other"),
    ("dense", "obs/type/codes"),
])
def test_a_filter_that_hdf5plugin_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         kind: str, part: str) -> None:
    """A stand-in for the package: on import it registers a filter of zstd's number."""
    path = filtered(edited(tmp_path, some_data(kind)), part, number := 40_001)

    def reverse(_flags: int, _n: int, _values: int, size: int, _held: int, place: Any) -> int:
        content = ctypes.string_at(place[0], size)
        ctypes.memmove(place[0], content[::-1], size)
        return size

    made = _Filter(1, number, 1, 1, b"reverse", None, None, _Filter.kind(reverse))

    class Finder:
        def find_spec(self, name: str, *_: Any) -> Any:
            if name == "hdf5plugin":
                h5py.h5z.register_filter(ctypes.addressof(made))
            return None

    monkeypatch.delitem(sys.modules, "hdf5plugin", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    try:
        cells = read(path)
    finally:
        h5py.h5z.unregister_filter(number)
    np.testing.assert_array_equal(cells.expression.toarray(), values())
    assert not any("Left aside" in one for one in cells.decisions)
    assert cells.labels.tolist() == list("aabb") * 3


def test_the_real_hdf5plugin(tmp_path: Path) -> None:
    hdf5plugin = pytest.importorskip("hdf5plugin")
    path = edited(tmp_path, some_data())
    with h5py.File(path, "r+") as file:
        about = dict(file["X"].attrs)
        del file["X"]
        file.create_dataset("X", data=values(), **hdf5plugin.Zstd()).attrs.update(about)
    np.testing.assert_array_equal(read(path).expression.toarray(), values())


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "g", ">f4", ">f8", "?", "i1", "u1", "<i2",
                                   ">i4", "u4", "i8", "u8"])
@each_kind
def test_numbers_of_any_kind(tmp_path: Path, kind: str, dtype: str) -> None:
    path = edited(tmp_path, some_data(kind),
                  **{"X" if kind == "dense" else "X__data": lambda x: x.astype(dtype)})
    expected = values().astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(read(path).expression.toarray(), expected)
    assert profile_fields(path)["matrix"].value == "X" and describe_cells(profile_of(path))


@pytest.mark.parametrize("dtype", ["i4", "i8", "u4", "u8", ">i8", "u2"])
@pytest.mark.parametrize("kind", ["csr", "csc"])
def test_indices_of_any_kind_in_any_order(tmp_path: Path, kind: str, dtype: str) -> None:
    with_order = some_data(kind)
    ends = with_order.X.indptr
    order = np.concatenate([np.arange(b - 1, a - 1, -1) for a, b in pairwise(ends)])
    path = edited(tmp_path, with_order, X__data=lambda x: x[order],
                  X__indices=lambda x: x[order].astype(dtype),
                  X__indptr=lambda x: x.astype(dtype))
    np.testing.assert_array_equal(read(path).expression.toarray(), values())


def test_odd_tables(tmp_path: Path) -> None:
    data = some_data()
    data.obs_names = ["same"] * N
    data.obs["type"] = pd.Categorical(list("aabb") * 3,
                                      ["a", "b", *(f"never {i}" for i in range(100_000))])
    cells = read(edited(tmp_path, data))
    assert cells.labels.tolist() == list("aabb") * 3 and len(set(cells.cell_ids)) == N


def test_cells_that_are_numbered(tmp_path: Path) -> None:
    path = edited(tmp_path, some_data(), obs___index=np.arange(N))
    with h5py.File(path, "r+") as file:
        file["obs/_index"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    assert read(path).cell_ids.tolist() == [str(i) for i in range(N)]


@pytest.mark.parametrize("sparse", [False, True])
def test_a_file_of_an_anndata_before_its_tables_were_groups(tmp_path: Path, sparse: bool) -> None:
    path = tmp_path / "mine.h5ad"
    with h5py.File(path, "w") as file:
        if sparse:
            matrix = sp.csr_matrix(values())
            group = file.create_group("X")
            group.attrs.update({"h5sparse_format": "csr", "h5sparse_shape": matrix.shape})
            for name in ("data", "indices", "indptr"):
                group[name] = getattr(matrix, name)
        else:
            file["X"] = values()
        file["obs"] = np.array([(b"c%d" % i, i % 2) for i in range(N)],
                               [("index", "S5"), ("type", "i1")])
        file["var"] = np.array([(one.encode(),) for one in SYMBOLS], [("index", "S9")])
        file["uns/type_categories"] = np.array([b"a", b"b"])
    cells = read(path)
    np.testing.assert_array_equal(cells.expression.toarray(), values())
    assert cells.labels.tolist() == list("ab") * 6 and cells.symbols == tuple(SYMBOLS)
    with h5py.File(path, "r+") as file:
        del file["var"]
        file["var"] = np.array([(b"CD3D",)] * 4, [("index", "S9")])
    refused_by_all(path, "(5), but has 4 rows")


@each_kind
def test_a_file_that_was_refused_is_let_go_of(tmp_path: Path, kind: str) -> None:
    path = unknown(edited(tmp_path, some_data(kind)), "X")
    refused_by_all(path, "encoding 'of the future' is not known")
    h5py.File(path, "r+").close()  # an error if anybody has it open


# --- any file ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(shape=st.tuples(st.integers(1, 7), st.integers(1, 6)), kind=st.sampled_from([*KINDS]),
       place=st.sampled_from(["X", "raw/X", "layers/counts"]), seed=st.integers(0, 99),
       dtype=st.sampled_from(["f4", "f8", "i2", "u1", "i8"]), rows=st.integers(1, 8),
       chunks=st.booleans(), off=st.sampled_from([(0, 0)] * 6 + [(1, 0), (0, 1), (-1, 0), (0, -1)]))
def test_a_file_is_read_in_parts_as_anndata_reads_it_whole(
        tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int], kind: str, place: str,
        seed: int, dtype: str, rows: int, chunks: bool, off: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    held = tuple(np.maximum(np.add(shape, off), 0))
    x = (rng.integers(0, 9, held) * (rng.random(held) < 0.5)).astype(dtype)
    x[:, :1] += 1  # no cell is empty, while it has a gene
    path = tmp_path_factory.mktemp("any") / "mine.h5ad"
    data = anndata.AnnData(
        np.ones(shape, np.float32),
        obs=pd.DataFrame({"type": ["a"] * shape[0]}, index=[f"c{i}" for i in range(shape[0])]),
        var=pd.DataFrame(index=[f"GENE{i}" for i in range(shape[1])]))
    data.raw, data.layers["counts"] = data, data.X
    data.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file[place]
        anndata.io.write_elem(file, place, KINDS[kind](x), dataset_kwargs={
            "compression": "gzip"} if chunks else {})
    name = place.split("/")[0 if place.startswith("raw") else -1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h5ad, "_CHUNK_ROWS", rows)
        try:
            whole = anndata.read_h5ad(path)
        except ValueError:
            assert "contradict themselves" in refusal(lambda: read(path, matrix=name), path)
            return
        if 0 in held:
            assert "nothing to read" in refusal(lambda: read(path, matrix=name), path)
            return
        found = read(path, matrix=name).expression.toarray()
    matrix = {"X": whole.X, "raw": whole.raw.X, "counts": whole.layers["counts"]}[name]
    expected = matrix.toarray() if sp.issparse(matrix) else matrix
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize("name", ["seurat.rds", "all.RData"])
def test_objects_of_r_are_told_as_such(tmp_path: Path, name: str) -> None:
    """They are gzip files, so it was said to unpack them, which gives no .h5ad."""
    (tmp_path / name).write_bytes(b"\x1f\x8b\x08" + bytes(60))
    with pytest.raises(InputError, match=r"are an object of R.*convert them there"):
        h5ad.open_h5ad(tmp_path / name)
