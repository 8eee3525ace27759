"""Cells: what is read, and how every unusable file ends in one sentence."""

import re
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import Cells, read_cells
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm_circuits import InputError
from scfm_circuits.cells import h5ad
from scfm_circuits.cells.reading import draw_cells, read_ranked
from scfm_circuits.common.profile import load_profile

SYMBOLS = ["CD3D", "MS4A1", "hla-dqa1", "LYZ"]


def some_data() -> anndata.AnnData:
    """Six cells, four genes, counts in X, and the symbols of four genes in `var`."""
    values = np.random.default_rng(0).integers(0, 5, (6, 4)).astype(np.float32)
    values[:, 0] += 1
    return anndata.AnnData(
        values, obs=pd.DataFrame({"type": list("aabbcc")}, index=[f"c{i}" for i in range(6)]),
        var=pd.DataFrame({"name": SYMBOLS}, index=SYMBOLS))


def fields_of(path: Path | str) -> dict[str, Any]:
    return {"cells": str(path), "matrix": "X", "label_column": "type", "max_cells": None}


def read(path: Path | str, **overrides: Any) -> Cells:
    return read_cells(load_profile("smoke", {**fields_of(path), **overrides}))


def written(folder: Path, data: anndata.AnnData) -> Path:
    data.write_h5ad(folder / "mine.h5ad")
    return folder / "mine.h5ad"


def refusal(path: Path, **overrides: Any) -> str:
    """The message with which the file is refused: one sentence that names the file."""
    with pytest.raises(InputError) as caught:
        read(path, **overrides)
    message = str(caught.value)
    assert path.name in message and "\n" not in message
    assert message.endswith(".") and not re.search(r"[.!?] [A-Z]", message)
    assert caught.value.__cause__ is None
    return message


# --- files that cannot be read -------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    assert "check `cells` in the profile" in refusal(tmp_path / "none.h5ad")


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "cells.csv").write_text("a,b\n1,2\n")
    assert ("give `pbmc68k_reduced`, `baron_pancreas`, `planted` or the path of an .h5ad file"
            in refusal(tmp_path / "cells.csv"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_a_truncated_file(tmp_path: Path, share: float) -> None:
    path = written(tmp_path, some_data())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "fetch it again" in refusal(path)


@pytest.mark.parametrize("content", [b"not hdf5 at all\n", b"PK\x03\x04 zip"])
def test_a_file_that_is_no_h5ad(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.h5ad"
    path.write_bytes(content)
    assert "cannot be read as .h5ad" in refusal(path)


# --- files that hold the wrong things ------------------------------------------------------------


def test_no_raw_no_such_layer(tmp_path: Path) -> None:
    data = some_data()
    data.layers["counts"] = data.X.copy()
    path = written(tmp_path, data)
    assert "to X or counts." in refusal(path, matrix="raw")
    assert "to X or counts." in refusal(path, matrix="scvi")
    assert len(read(path, matrix="counts")) == 6


def test_no_x(tmp_path: Path) -> None:
    data = anndata.AnnData(obs=some_data().obs, var=some_data().var,
                           layers={"counts": some_data().X})
    assert "set `matrix` in the profile to counts." in refusal(written(tmp_path, data))
    del data.layers["counts"]
    assert "no X; there is no other expression" in refusal(written(tmp_path, data))


def test_raw_brings_its_own_genes(tmp_path: Path) -> None:
    data = some_data()
    data.raw = data
    path = written(tmp_path, data[:, :2].copy())
    assert read(path, matrix="raw").symbols == ("CD3D", "MS4A1", "HLA-DQA1", "LYZ")
    assert read(path, matrix="X").symbols == ("CD3D", "MS4A1")


@pytest.mark.parametrize(("names", "told"), [
    (["ENSG00000167286", "ENSG00000156738.17", "ENSG00000196735", "LYZ"], "Ensembl"),
    (["ENSMUSG00000032094"] * 4, "Ensembl"),
    (["CD3D", "", "HLA-DQA1", "LYZ"], "1 of 4 genes without a symbol"),
    (["CD3D", " ", "nan", "LYZ"], "2 of 4 genes without a symbol"),
    (["CD3D", "MS4A1 (CD20)", "HLA-DQA1", "LYZ"], "'MS4A1 (CD20)'"),
    (["CD3D", "CD3\tE", "HLA-DQA1", "LYZ"], "space"),
    (["CD3D", "cd3d", "HLA-DQA1", "LYZ"], "such as CD3D); set `duplicate_symbols: sum`"),
])
def test_names_that_are_no_symbols(tmp_path: Path, names: list[str], told: str) -> None:
    data = some_data()
    data.var["name"] = names
    assert told in refusal(written(tmp_path, data), symbol_column="name")


def test_missing_symbols_of_a_categorical_column(tmp_path: Path) -> None:
    data = some_data()
    data.var["name"] = pd.Categorical(["CD3D", None, "LYZ", "NKG7"])
    assert "1 of 4 genes without a symbol" in refusal(written(tmp_path, data), symbol_column="name")


def test_no_such_symbol_column(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, some_data()), symbol_column="feature_name")
    assert "'feature_name'" in message and "the columns are name" in message


def test_no_such_label_column(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, some_data()), label_column="cell_type")
    assert "'cell_type'" in message and "columns are type" in message
    assert "`label_column`" in message


def test_cells_without_a_label(tmp_path: Path) -> None:
    data = some_data()
    data.obs["type"] = pd.Categorical(["a", None, "b", "b", None, "c"])
    assert "2 cells without a label" in refusal(written(tmp_path, data))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("value", "told"), [
    (np.nan, "NaN, infinite or above 3e+38 (1 of the 24 in rows 0 to 5; the first is nan in row 3"),
    (np.inf, "the first is inf in row 3, column 2"), (-np.inf, "the first is -inf in row 3"),
    (-0.5, "negative expression values (1 of the 24 in rows 0 to 5; the first is -0.5 in row 3, "
           "column 2)"),
])
def test_values_that_cannot_be_ranked(tmp_path: Path, value: float, told: str, sparse: bool
                                      ) -> None:
    data = some_data()
    data.X[3, 2] = value
    if sparse:
        data.X = sp.csr_matrix(data.X)
    message = refusal(written(tmp_path, data))
    assert told in message and "`matrix`" in message


def many_cells(n: int = 40) -> anndata.AnnData:
    times = n // 6 + 1
    obs = pd.DataFrame({"type": list("aabbcc") * times}, index=[f"c{i}" for i in range(6 * times)])
    return anndata.AnnData(np.tile(some_data().X, (times, 1)), obs=obs, var=some_data().var)[
        :n].copy()


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_cells_without_genes_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          kind: Callable, rows: int) -> None:
    monkeypatch.setattr(h5ad, "_CHUNK_ROWS", rows)
    data = many_cells()
    expected = data.X.copy()
    expected[[4, 5, 30]] = 0
    data.X = kind(expected)
    path = written(tmp_path, data)
    kept = np.delete(np.arange(40), [4, 5, 30])
    cells = read(path)
    assert cells.cell_ids.tolist() == [f"c{i}" for i in kept]
    assert cells.labels.tolist() == data.obs["type"].to_numpy()[kept].tolist()
    np.testing.assert_array_equal(cells.expression.toarray(), expected[kept])
    assert any("3 of 40 cells were left out, as no gene is expressed in them (the first is row 4)"
               in one for one in cells.decisions)
    # A cell's ties are decided by its row, so what is left out beside it changes nothing.
    data.X = many_cells().X
    whole = read_ranked(load_profile("smoke", fields_of(written(tmp_path, data)))).ranking
    data.X = kind(expected)
    some = read_ranked(load_profile("smoke", fields_of(written(tmp_path, data)))).ranking
    np.testing.assert_array_equal(some, whole[kept])


def test_a_cell_whose_only_gene_is_left_out_is_left_out_too(tmp_path: Path) -> None:
    data = many_cells()
    names = [f"GENE{i}" for i in range(20)]
    values = np.zeros((40, 20), np.float32)
    values[:, 0], values[7, 0], values[:, 3] = 1, 0, 2
    names[3] = ""
    path = written(tmp_path, anndata.AnnData(values, obs=data.obs, var=pd.DataFrame(index=names)))
    cells = read(path)
    assert len(cells) == 39 and "c7" not in cells.cell_ids
    assert len(cells.symbols) == 19 and cells.expression.max() == 1


def test_many_cells_without_genes_are_refused(tmp_path: Path) -> None:
    data = some_data()
    data.X[4] = 0
    message = refusal(written(tmp_path, data))
    assert "1 of 6 cells" in message and "row 4" in message


def test_a_few_negative_values_are_counted_and_found(tmp_path: Path) -> None:
    data = many_cells(400)
    data.X[25, 1] = -0.25
    message = refusal(written(tmp_path, data))
    assert "1 of the 1,600 in rows 0 to 399; the first is -0.25 in row 25, column 1" in message
    assert "too few for values that were scaled" in message
    data.X -= data.X.mean(axis=0)
    assert "scaled or centred" in refusal(written(tmp_path, data))


def test_values_that_single_precision_cannot_hold(tmp_path: Path) -> None:
    data = some_data()
    data.X = data.X.astype(float)
    data.X[2, 1] = 1e200
    assert "above 3e+38 (1 of the 24" in refusal(written(tmp_path, data))


def test_no_cells_at_all(tmp_path: Path) -> None:
    assert "0 cells and 4 genes" in refusal(written(tmp_path, some_data()[:0].copy()))


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_values_symbols_and_labels_come_through(tmp_path: Path, kind: Callable) -> None:
    data = some_data()
    expected = data.X.copy()
    data.X = kind(data.X)
    cells = read(written(tmp_path, data))
    assert isinstance(cells.expression, sp.csr_matrix) and cells.expression.dtype == np.float32
    np.testing.assert_array_equal(cells.expression.toarray(), expected)
    assert (cells.expression.data > 0).all()
    assert cells.symbols == ("CD3D", "MS4A1", "HLA-DQA1", "LYZ")
    assert cells.labels.tolist() == list("aabbcc")
    assert cells.cell_ids.tolist() == [f"c{i}" for i in range(6)]


def test_a_value_stored_in_two_parts_is_one_value(tmp_path: Path) -> None:
    # A sparse matrix may hold an entry twice; their sum is meant.
    data = some_data()
    data.X = sp.csr_matrix((np.array([1, 2, 4, 3, 3, 3, 3, 3], np.float32),
                            np.array([1, 1, 0, 0, 0, 0, 0, 0]), np.array([0, 3, 4, 5, 6, 7, 8])),
                           shape=(6, 4))
    cells = read(written(tmp_path, data))
    assert cells.expression.nnz == 7
    assert cells.expression[0].toarray().tolist() == [[4, 3, 0, 0]]


def test_duplicate_symbols_are_added_up(tmp_path: Path) -> None:
    data = some_data()
    data.var["name"] = ["B", "a", "A", "C"]
    cells = read(written(tmp_path, data), symbol_column="name", duplicate_symbols="sum")
    assert cells.symbols == ("A", "B", "C")
    expected = np.stack([data.X[:, 1] + data.X[:, 2], data.X[:, 0], data.X[:, 3]], axis=1)
    np.testing.assert_array_equal(cells.expression.toarray(), expected)
    assert any("1 repeated symbols were added up" in one for one in cells.decisions)


def test_a_draw_of_cells_is_seeded_nested_and_in_order(tmp_path: Path) -> None:
    path = written(tmp_path, some_data())
    draws = [read(path, max_cells=n).cell_ids.tolist() for n in (2, 3, 5, 6, 100)]
    for smaller, larger in pairwise(draws):
        assert set(smaller) <= set(larger)
        assert smaller == sorted(smaller)
    assert [len(one) for one in draws] == [2, 3, 5, 6, 6]
    assert read(path, max_cells=3).cell_ids.tolist() == draws[1]
    others = {tuple(read(path, max_cells=3, seed=seed).cell_ids) for seed in range(8)}
    assert len(others) > 1
    one = read(path, max_cells=3)
    everything = read(path)
    rows = [everything.cell_ids.tolist().index(name) for name in one.cell_ids]
    np.testing.assert_array_equal(one.expression.toarray(), everything.expression[rows].toarray())
    assert one.labels.tolist() == everything.labels[rows].tolist()
    assert any("3 of 6 cells" in decision for decision in one.decisions)


def test_the_bundled_pbmcs_are_read() -> None:
    cells = read_cells(load_profile("pbmc"))
    assert cells.expression.shape == (700, 765) and len(set(cells.symbols)) == 765
    assert len(set(cells.labels)) == 10 and "CD14+ Monocyte" in cells.labels
    # Raw: nonnegative and sparse, not the scaled X of the same file.
    assert cells.expression.data.min() > 0
    assert 0.05 < cells.expression.nnz / (700 * 765) < 0.9


# --- files larger than memory --------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize("matrix", ["X", "raw", "counts"])
def test_chunks_of_any_size_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          kind: Callable, matrix: str) -> None:
    data = some_data()
    expected = data.X.copy()
    data.X = kind(data.X)
    data.raw, data.layers["counts"] = data, data.X.copy()
    path = written(tmp_path, data)
    for rows in (1, 2, 4, 100):
        monkeypatch.setattr(h5ad, "_CHUNK_ROWS", rows)
        assert (read(path, matrix=matrix).expression.toarray() == expected).all()
        some = read(path, matrix=matrix, max_cells=3)
        chosen = [int(name[1:]) for name in some.cell_ids]
        assert (some.expression.toarray() == expected[chosen]).all()


def test_rows_that_were_not_drawn_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                               ) -> None:
    data = some_data()
    path = written(tmp_path, data)
    kept = int(read(path, max_cells=1).cell_ids[0][1:])
    data.X[np.arange(6) != kept] = np.nan
    monkeypatch.setattr(h5ad, "_CHUNK_ROWS", 1)
    assert read(written(tmp_path, data), max_cells=1).expression.sum() == data.X[kept].sum()


def test_too_much_ordered_by_gene_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                             ) -> None:
    data = some_data()
    data.X = sp.csc_matrix(data.X)
    monkeypatch.setattr(h5ad, "_CSC_VALUES", data.X.nnz - 1)
    assert "store the matrix as csr" in refusal(written(tmp_path, data))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99),
       data=st.data())
def test_a_stratified_draw_takes_as_many_of_each_type(sizes: list[int], seed: int, data: Any
                                                      ) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    n = data.draw(st.integers(1, len(labels)))
    chosen = draw_cells(labels, n, "stratified", seed)
    assert len(chosen) == n and (np.diff(chosen) > 0).all()
    taken = np.bincount(labels[chosen], minlength=len(sizes))
    # A type of which cells are left over has as many as any other, but for the last round.
    assert all(taken[i] == sizes[i] or taken[i] >= taken.max() - 1 for i in range(len(sizes)))
    assert set(draw_cells(labels, n - 1, "stratified", seed)) <= set(chosen)


# --- the kinds of file that laboratories have ----------------------------------------------------


def test_ensembl_ids_with_symbols_in_a_known_column(tmp_path: Path) -> None:
    data = some_data()
    data.var["gene_name-new"] = ["CD3D", "C1orf112", "ENSG00000196735.3", "LYZ"]
    data.var.index = [f"ENSG0000016728{i}" for i in range(4)]
    cells = read(written(tmp_path, data))
    assert cells.symbols == ("CD3D", "C1ORF112", "ENSG00000196735", "LYZ")
    assert any("gene_name-new" in one for one in cells.decisions)


def test_a_known_column_that_lacks_symbols_is_passed_over(tmp_path: Path) -> None:
    data = some_data()
    data.var.index = [f"ENSG0000016728{i}" for i in range(4)]
    data.var["feature_name"] = ["CD3D", None, "LYZ", "NKG7"]
    assert read(written(tmp_path, data)).symbols == ("CD3D", "MS4A1", "HLA-DQA1", "LYZ")
    # The only one is not: what it lacks can be mended.
    del data.var["name"]
    assert "1 of 4 genes without a symbol of one word in feature_name" in refusal(
        written(tmp_path, data))


def test_the_page_says_which_column_holds_the_symbols(tmp_path: Path) -> None:
    path = written(tmp_path, some_data())
    assert "Symbols are taken from the var column name." in read(path, symbol_column="name"
                                                                 ).decisions
    assert not any("column" in one for one in read(path).decisions)


def test_counts_and_normalised_values_are_told_apart(tmp_path: Path) -> None:
    data = some_data()
    assert any("raw counts" in one for one in read(written(tmp_path, data)).decisions)
    data.X = np.log1p(data.X / data.X.sum(axis=1, keepdims=True) * 1e4)
    cells = read(written(tmp_path, data))
    assert any("normalised already" in one for one in cells.decisions)
    np.testing.assert_array_equal(cells.expression.toarray(), data.X)


def test_duplicate_symbols_are_numbered_as_scanpy_does(tmp_path: Path) -> None:
    data = some_data()
    data.var["name"] = ["B", "a", "A", "C"]
    cells = read(written(tmp_path, data), symbol_column="name", duplicate_symbols="unique")
    assert cells.symbols == ("B", "A", "A-1", "C")
    np.testing.assert_array_equal(cells.expression.toarray(), data.X)


def test_an_empty_category_is_no_label(tmp_path: Path) -> None:
    data = some_data()
    data.obs["type"] = pd.Categorical(list("aabbcc"), categories=list("abcd"))
    assert set(read(written(tmp_path, data), max_cells=3, sampling="stratified").labels) == set(
        "abc")


def test_cells_that_share_an_identifier_are_numbered(tmp_path: Path) -> None:
    data = some_data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata says that they are not unique
        data.obs_names = ["a", "b", "a", "a", "", "a-1"]
        cells = read(written(tmp_path, data))
    assert len(set(cells.cell_ids)) == 6 and cells.cell_ids.tolist()[:2] == ["a", "b"]
    assert any("3 cells have an identifier that another has too" in one for one in cells.decisions)
    other = read(written(tmp_path, some_data()))
    assert other.cell_ids.tolist() == [f"c{i}" for i in range(6)]
    assert not any("identifier" in one for one in other.decisions)


def test_a_file_of_odd_columns_is_refused_on_one_line(tmp_path: Path) -> None:
    data = some_data()
    for number in range(100):
        data.obs[f"column\n{number}\x1b[31m. Odd"] = "x"
        data.var[f"column\n{number}\x1b[31m"] = "x"
    path = written(tmp_path, data)
    for fields in ({"label_column": "none"}, {"symbol_column": "none"}, {"matrix": "none"},
                   {"symbol_column": "column\n1\x1b[31m"}):
        with pytest.raises(InputError) as caught:
            read(path, **fields)
        message = str(caught.value)
        assert message.isprintable() and len(message) < 1_500
