"""The written profile: what is chosen from a file, and that the reader takes it as it is."""

import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import yaml
from helpers import Cells, read_cells
from hypothesis import given
from hypothesis import strategies as st

from scfm_circuits import InputError
from scfm_circuits.__main__ import main
from scfm_circuits.book.first_profile import (
    Choice,
    choose_case,
    choose_labels,
    profile_text,
    write_profile,
)
from scfm_circuits.cells.corpus import split_cells
from scfm_circuits.cells.reading import draw_cells
from scfm_circuits.cells.symbols import SYMBOL_COLUMNS
from scfm_circuits.common import manifest
from scfm_circuits.common.labels import normal_label
from scfm_circuits.common.profile import ROOT, Profile, load_profile

SYMBOLS = ["CD3D", "MS4A1", "LYZ", "NKG7"]
ENSEMBL = [f"ENSG{number:011d}" for number in range(4)]


def counts(n_cells: int = 60) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 9, (n_cells, 4)).astype(np.float32)
    values[:, 0] += 1
    return values


def some_data(values: Any = None, names: list[str] = SYMBOLS, **obs: Any) -> anndata.AnnData:
    """Sixty cells of four genes; two in three are of the type `b`, unless `obs` says otherwise."""
    values = counts() if values is None else values
    obs = obs or {"cell_type": ["a", "b", "b"] * 20}
    index = [f"c{i}" for i in range(values.shape[0])]
    return anndata.AnnData(values, obs=pd.DataFrame(obs, index=index),
                           var=pd.DataFrame(index=names))


def written(folder: Path, data: anndata.AnnData, **options: Any) -> tuple[Profile, Cells]:
    """The profile written for `data`, and the cells that the reader gives under it."""
    data.write_h5ad(folder / "cells.h5ad")
    profile = write_profile(folder / "cells.h5ad", folder / "mine.yml", **options)
    assert profile == load_profile(str(folder / "mine.yml"))
    return profile, read_cells(profile)


def refusal(folder: Path, data: anndata.AnnData) -> str:
    with pytest.raises(InputError) as caught:
        written(folder, data)
    message = str(caught.value)
    assert "cells.h5ad" in message and "\n" not in message and message.endswith(".")
    assert not (folder / "mine.yml").exists()
    return message


# --- the matrix ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_counts_in_x_however_they_are_stored(tmp_path: Path, kind: Any) -> None:
    profile, cells = written(tmp_path, some_data(kind(counts())))
    assert (profile.matrix, profile.symbol_column, profile.label_column) == ("X", None, "cell_type")
    np.testing.assert_array_equal(cells.expression.toarray(), counts())
    assert cells.symbols == tuple(SYMBOLS)
    assert profile.cells_name == "cells of cells.h5ad" and profile.genes_per_cell == 64


def test_scaled_values_are_passed_over_for_counts_in_a_layer(tmp_path: Path) -> None:
    scaled = counts() - counts().mean(axis=0)
    data = some_data(scaled)
    data.layers["scaled too"] = scaled
    data.layers["unspliced"] = np.ones_like(scaled)
    data.layers["counts"] = sp.csr_matrix(counts())
    profile, cells = written(tmp_path, data)
    assert profile.matrix == "counts"
    np.testing.assert_array_equal(cells.expression.toarray(), counts())


def test_counts_in_x_go_before_normalised_values_in_raw(tmp_path: Path) -> None:
    data = some_data(np.log1p(counts() / 3))
    data.raw = data
    data.X = counts()
    assert written(tmp_path, data)[0].matrix == "X"


def test_raw_has_genes_of_its_own(tmp_path: Path) -> None:
    data = some_data(names=ENSEMBL)
    data.var["feature_name"] = SYMBOLS
    data.raw = data
    data = data[:, :2].copy()
    data.X = data.X - 3
    profile, cells = written(tmp_path, data)
    assert (profile.matrix, profile.symbol_column) == ("raw", "feature_name")
    assert cells.symbols == tuple(SYMBOLS)


def test_normalised_values_alone_are_taken(tmp_path: Path) -> None:
    data = some_data(np.log1p(counts() / 3))
    data.layers["unspliced"] = np.ones_like(data.X)
    assert written(tmp_path, data)[0].matrix == "X"


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix])
def test_a_value_that_is_looked_at_is_counted_once(tmp_path: Path, kind: Any) -> None:
    values = counts() + 1
    values[30, 2] = -1
    message = refusal(tmp_path, some_data(kind(values)))
    assert "1 of 240 values looked at" in message and "mend them" in message
    assert "mend them" not in refusal(tmp_path, some_data(kind(values - 5)))


def test_zeros_and_ones_are_taken_last_and_with_a_warning(tmp_path: Path) -> None:
    ones = (counts() > 4).astype(np.float32)
    ones[:, 0] = 1
    data = some_data(ones)
    data.layers["log"] = np.log1p(counts())
    profile, cells = written(tmp_path, data)
    assert profile.matrix == "log" and not any("0 or 1" in one for one in cells.decisions)
    profile, cells = written(tmp_path, some_data(ones), overwrite=True)
    assert profile.matrix == "X"
    assert any("all values are 0 or 1" in one for one in cells.decisions)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_a_file_with_scaled_values_alone_is_refused(tmp_path: Path, value: float) -> None:
    values = counts()
    values[-1, -1] = value
    assert "counts or log-normalised" in refusal(tmp_path, some_data(values))


def test_a_file_of_an_old_anndata(tmp_path: Path) -> None:
    """scanpy's own file was written before anndata 0.7; what its other parts lack is no news."""
    import scanpy

    path = Path(scanpy.__file__).parent / "datasets" / "10x_pbmc68k_reduced.h5ad"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile = write_profile(path, tmp_path / "mine.yml")
    assert (profile.matrix, profile.label_column) == ("raw", "bulk_labels")
    text = (tmp_path / "mine.yml").read_text()
    assert "'X': unusable, as " in text and "; 'raw': normalised" in text
    cells = read_cells(profile)
    assert cells.expression.shape == (700, 765) and profile.case_type in cells.labels


def test_the_layer_called_x_is_not_x(tmp_path: Path) -> None:
    data = some_data()
    data.layers["X"] = data.layers["raw"] = counts() - 3
    profile, cells = written(tmp_path, data)
    assert profile.matrix == "X"
    np.testing.assert_array_equal(cells.expression.toarray(), counts())


@pytest.mark.parametrize("shape", [(0, 4), (60, 0)])
def test_an_empty_file(tmp_path: Path, shape: tuple[int, int]) -> None:
    message = refusal(tmp_path, some_data()[: shape[0], : shape[1]].copy())
    assert f"{shape[0]} cells and {shape[1]} genes" in message


def test_a_file_without_values(tmp_path: Path) -> None:
    data = some_data()
    assert "neither X, raw nor a layer" in refusal(tmp_path, anndata.AnnData(obs=data.obs,
                                                                             var=data.var))


# --- genes ---------------------------------------------------------------------------------------


def test_ensembl_identifiers_in_the_index(tmp_path: Path) -> None:
    data = some_data(names=ENSEMBL)
    data.var["gene_ids"] = ENSEMBL
    data.var["chromosome name"] = ["chr one"] * 4
    data.var["Feature_Name"] = pd.Categorical(SYMBOLS)
    profile, cells = written(tmp_path, data)
    assert profile.symbol_column == "Feature_Name" and cells.symbols == tuple(SYMBOLS)


@pytest.mark.parametrize("name", ["g{}", "gene_{}", "LOC{}", "hg38-{}"])
def test_genes_that_are_numbered_in_the_index(tmp_path: Path, name: str) -> None:
    data = some_data(names=[name.format(number) for number in range(4)])
    data.var["biotype"] = ["a", "b", "c", "d"]
    profile, _ = written(tmp_path, data)  # the index, where there is nothing better
    assert profile.symbol_column is None
    data.var["gene_symbol"] = SYMBOLS
    profile, cells = written(tmp_path, data, overwrite=True)
    assert profile.symbol_column == "gene_symbol" and cells.symbols == tuple(SYMBOLS)
    assert "also possible: 'the index (null)', 'biotype'" in (tmp_path / "mine.yml").read_text()


@pytest.mark.parametrize("column", SYMBOL_COLUMNS)
def test_writer_and_reader_know_the_same_columns(tmp_path: Path, column: str) -> None:
    data = some_data(names=ENSEMBL)
    data.var["another"] = ["A", "B", "C", "D"]
    data.var[column.title()] = SYMBOLS
    profile, cells = written(tmp_path, data)
    assert profile.symbol_column == column.title() and cells.symbols == tuple(SYMBOLS)
    unnamed = profile.model_copy(update={"symbol_column": None})
    assert read_cells(unnamed).symbols == tuple(SYMBOLS)


def test_the_heart_cell_atlas_own_column_goes_first(tmp_path: Path) -> None:
    data = some_data(names=ENSEMBL)
    for column in ("feature_name", "gene_name", "gene_name-new"):
        data.var[column] = [f"{symbol}.{column}" for symbol in SYMBOLS]
    data.var["gene_name-new"] = SYMBOLS
    profile, cells = written(tmp_path, data)
    assert profile.symbol_column == "gene_name-new" and cells.symbols == tuple(SYMBOLS)
    assert read_cells(profile.model_copy(update={"symbol_column": None})).symbols == cells.symbols


def test_no_symbols_anywhere(tmp_path: Path) -> None:
    data = some_data(names=ENSEMBL)
    data.var["length"] = range(4)
    data.var["symbol"] = ["CD3D", None, "LYZ", "NKG7"]
    assert "1 of 4 genes without a symbol of one word in symbol" in refusal(tmp_path, data)
    del data.var["symbol"]
    # Symbols that were added after `raw` was set are not in its own table of genes.
    data.raw = data
    data.var["symbol"] = SYMBOLS
    message = refusal(tmp_path, data)
    assert "the index of raw.var holds identifiers" in message and "a column to raw.var" in message


@pytest.mark.parametrize("column", [None, "feature_name"])
def test_genes_without_a_symbol_are_counted(tmp_path: Path, column: str | None) -> None:
    """It said that the index holds identifiers, such as its first symbol."""
    symbols = [f"GENE{number}" for number in range(20)]
    symbols[3:8] = ["", "nan", "A B", "", ""]
    names = symbols if column is None else [f"ENSG{number:011d}" for number in range(20)]
    data = some_data(np.ones((60, 20)) + np.arange(20), names)
    if column:
        data.var[column] = symbols
    message = refusal(tmp_path, data)
    assert "5 of 20 genes without a symbol of one word" in message
    assert (column or "the index of var") in message and "holds identifiers" not in message


def test_repeated_symbols_are_added_up(tmp_path: Path) -> None:
    data = some_data(names=["CD3D", "cd3d", "LYZ", "NKG7"])
    profile, cells = written(tmp_path, data)
    assert profile.duplicate_symbols == "sum" and cells.expression.shape == (60, 3)


# --- for models whose tokens are genes -----------------------------------------------------------


@pytest.mark.parametrize(("base", "index", "columns", "fields"), [
    ("geneformer", SYMBOLS, {"gene_ids": ENSEMBL}, ("gene_ids", None, None)),
    ("geneformer", ENSEMBL, {"symbol": SYMBOLS}, (None, None, "symbol")),
    ("maxtoki", [f"{one}.7" for one in ENSEMBL], {}, (None, "geneformer_v2_names", None)),
    ("geneformer_v1", ENSEMBL, {"length": range(4)}, (None, "geneformer_v1_names", None)),
    ("geneformer_v1", SYMBOLS, {}, (None, "geneformer_v1_mapping", None)),
    ("maxtoki", range(4), {"symbol": SYMBOLS}, (None, "geneformer_v2_mapping", "symbol")),
])
def test_how_genes_are_found_by_a_model_of_gene_tokens(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        base: str, index: Any, columns: dict[str, Any], fields: tuple[str | None, ...]) -> None:
    monkeypatch.setenv("SCFM_CACHE", str(tmp_path / "cache"))  # dictionaries are not here yet
    data = some_data(names=[str(one) for one in index])
    for name, entries in columns.items():
        data.var[name] = entries
    data.layers["counts"] = data.X
    data.X = np.log1p(data.X)
    data.write_h5ad(tmp_path / "cells.h5ad")
    out = str(tmp_path / "mine.yml")
    assert main(["profile", str(tmp_path / "cells.h5ad"), "--out", out, "--extends", base]) == 0
    found, settings = load_profile(out), load_profile(base)
    assert (found.ensembl_column, found.gene_mapping, found.symbol_column) == fields
    assert (found.matrix, found.encoding, found.model) == ("counts", base.replace(
        "geneformer", "geneformer_v2").replace("v2_v1", "v1"), settings.model)
    for name in {found.gene_mapping} - {None}:
        assert manifest.entry("dictionaries", name) is not None
    assert f"  ensembl_column: {fields[0]!r}\n" in capsys.readouterr().out


@pytest.mark.parametrize("base", ["smoke_decoder", "smoke_encoder"])
@pytest.mark.parametrize("identified", [False, True])
def test_a_model_that_makes_its_own_dictionary_needs_no_other(
    tmp_path: Path, base: str, identified: bool
) -> None:
    data = some_data()
    if identified:
        data.var["gene_ids"] = ENSEMBL
    profile, cells = written(tmp_path, data, base=base)
    assert profile.gene_mapping is None and profile.ensembl_column is None
    assert profile.token_dictionary == "train" and cells.symbols == tuple(SYMBOLS)
    assert "ensembl_column" not in (tmp_path / "mine.yml").read_text()


def test_a_model_that_ranks_counts_is_given_no_other_values(tmp_path: Path) -> None:
    data = some_data(np.log1p(counts()), names=ENSEMBL)
    data.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(InputError, match=r"\(X is normalised\); put counts into X, raw"):
        write_profile(tmp_path / "cells.h5ad", tmp_path / "other.yml", "geneformer")
    data.var_names = [f"{i}" for i in range(4)]
    data.X = counts()
    data.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(InputError, match="no gene symbols: the index of var holds identifiers"):
        write_profile(tmp_path / "cells.h5ad", tmp_path / "other.yml", "geneformer")


# --- labels --------------------------------------------------------------------------------------


def test_the_known_column_goes_first_and_clusters_last(tmp_path: Path) -> None:
    obs = {"leiden": ["0", "1", "2"] * 20, "donor_id": ["x", "y", "y"] * 20,
           "n_genes": range(60), "cell_type_ontology_term_id": ["CL:1", "CL:2", "CL:2"] * 20,
           "compartment": ["p", "q", "q"] * 20, "CellType": ["a", "b", "b"] * 20}
    frame = pd.DataFrame(obs)
    assert written(tmp_path, some_data(**obs))[0].label_column == "CellType"
    for column in ("CellType", "cell_type_ontology_term_id", "compartment", "leiden"):
        assert choose_labels(frame, "file").value == column
        frame = frame.drop(columns=column)
    with pytest.raises(InputError, match="no usable column of cell types"):
        choose_labels(frame, "file")


@pytest.mark.parametrize(("types", "n", "told"), [(20, 3, True), (2, 30, False), (3, 20, True)])
def test_many_types_of_few_cells_are_told(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], types: int, n: int, told: bool) -> None:
    some_data(cell_type=[f"type {kind}" for kind in range(types)] * n).write_h5ad(
        tmp_path / "cells.h5ad")
    assert main(["profile", str(tmp_path / "cells.h5ad"), "--out", str(tmp_path / "mine.yml")]) == 0
    sentence = f"{types} of {types} types have fewer than 30 cells"
    for text in (capsys.readouterr().out, (tmp_path / "mine.yml").read_text()):
        assert (sentence in text) == told


def test_empty_categories_are_no_types(tmp_path: Path) -> None:
    data = some_data(cell_type=pd.Categorical(["a", "b", "b"] * 20, ["a", "b", "never"]),
                     annotation=pd.Categorical(["one"] * 60, ["one", "none"]))
    profile, _ = written(tmp_path, data)
    assert (profile.label_column, profile.case_type) == ("cell_type", "b")
    assert "never" not in (tmp_path / "mine.yml").read_text()


def test_cells_without_a_label(tmp_path: Path) -> None:
    data = some_data(cell_type=[None, "b", "c"] * 20)
    assert "'cell_type'" in refusal(tmp_path, data)


def test_a_file_without_labels(tmp_path: Path) -> None:
    message = refusal(tmp_path, some_data(n_genes=range(60), x=np.linspace(0, 1, 60)))
    assert "no usable column" in message and "if 'n_genes', 'x' (numbers or" in message


@pytest.mark.parametrize(("labels", "told"), [
    (["T"] * 60, "'cell_type' has 1 label;"),
    ([f"cell {number}" for number in range(300)], "'cell_type' has 300 labels;"),
    ([f"cell {number}" for number in range(2001)], "'cell_type' has 2,001 labels;"),
    (["nan", "unknown"] * 30, "'cell_type' names no type;")])
def test_why_a_column_holds_no_types(labels: list[str], told: str) -> None:
    table = pd.DataFrame({"donor": (["a", "b"] * len(labels))[: len(labels)], "cell_type": labels})
    with pytest.raises(InputError, match=told):
        choose_labels(table, "cells.h5ad")


@pytest.mark.parametrize("kinds", [[True, False], [0, 1], [1.0, 2.0]])
def test_labels_that_are_no_words_are_named(tmp_path: Path, kinds: list[Any]) -> None:
    message = refusal(tmp_path, some_data(leiden=kinds * 30, constant=[1] * 60))
    assert "if 'leiden' (numbers or true and false) is meant, name it as `label_column`" in message
    # And so it can be read.
    assert "constant'" not in message.split("if 'leiden'")[1]
    fields = {"cells": str(tmp_path / "cells.h5ad"), "matrix": "X", "label_column": "leiden"}
    assert set(read_cells(load_profile("smoke", fields)).labels) == set(map(str, kinds))


ODD = ["<b onclick=x>T", "a: b # c", "it's \"quoted\"", "two\nlines", "1e-4", "yes", "\u2028x",
       "- y", "{genes}", "back\\slash", "ü 細胞 🧬", "end\x85\x07"]


@pytest.mark.parametrize("label", ODD)
def test_odd_labels_and_columns_break_no_profile(tmp_path: Path, label: str) -> None:
    data = some_data(**{"cell_type": ["a", label, label] * 20, f"{label} type": ["p", "q"] * 30})
    profile, cells = written(tmp_path, data)
    assert profile.case_type == normal_label(label) and profile.case_type in cells.labels
    assert len(yaml.safe_load((tmp_path / "mine.yml").read_text())) == 9


@pytest.mark.parametrize("none", ["nan", "Unknown", "NA", " ", "n/a", "-"])
def test_a_label_that_names_no_type_is_not_offered(tmp_path: Path, none: str) -> None:
    data = some_data(cell_type=[none, none, none, "b", "c"] * 12)
    profile, cells = written(tmp_path, data)
    assert profile.case_type in ("b", "c") and normal_label(none) in cells.labels
    text = (tmp_path / "mine.yml").read_text()
    assert "36 cells have a label that names no type" in text
    assert f"other types: '{'bc'.replace(profile.case_type, '')}'" in text


def test_a_column_that_names_no_type_is_passed_over(tmp_path: Path) -> None:
    none = ["nan", "unknown", "unknown "] * 20
    assert "no usable column" in refusal(tmp_path, some_data(cell_type=none))
    profile, _ = written(tmp_path, some_data(cell_type=none, annotation=["p", "q", "q"] * 20))
    assert (profile.label_column, profile.case_type) == ("annotation", "q")


def test_labels_that_are_written_in_two_ways_are_one_type(tmp_path: Path) -> None:
    profile, cells = written(tmp_path, some_data(cell_type=["b ", "b", "c", "c", "c"] * 12))
    assert set(cells.labels) == {"b", "c"}
    assert "# 2 types" in (tmp_path / "mine.yml").read_text()
    assert profile.case_type == "c"
    (tmp_path / "alone").mkdir()
    one = some_data(cell_type=["b ", "b", "b\t"] * 20)
    assert "no usable column" in refusal(tmp_path / "alone", one)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_as_it_was(text: str) -> None:
    read = yaml.safe_load(profile_text({"case_type": Choice(text, repr(text)),
                                        "symbol_column": Choice(None, "")}))
    assert read == {"extends": "demo", "case_type": text, "symbol_column": None}


@given(st.integers(30, 300), st.integers(2, 12), st.integers(0, 99))
def test_the_traced_type_has_held_out_cells(n_cells: int, n_types: int, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, n_types, n_cells).astype(str)
    base = load_profile("demo", {"seed": seed})
    case, most = choose_case(labels, base)
    assert most is None
    held = labels[split_cells(n_cells, base.validation_share, seed)]
    assert case.value in held


@given(st.integers(30, 300), st.sampled_from(["uniform", "stratified"]), st.integers(0, 99))
def test_the_traced_type_is_held_out_of_those_that_the_base_draws(n_cells: int, sampling: str,
                                                                  seed: int) -> None:
    # Of thirty cells three are held out, so that few of the eight types are among them.
    labels = np.random.default_rng(seed).integers(0, 8, n_cells).astype(str)
    base = load_profile("demo", {"seed": seed, "max_cells": 30, "sampling": sampling})
    case, most = choose_case(labels, base)
    assert most is None
    drawn = labels[draw_cells(labels, 30, sampling, seed)]
    assert case.value in drawn[split_cells(30, base.validation_share, seed)]


def test_of_many_cells_some_are_drawn(tmp_path: Path) -> None:
    rare = [f"type {number % 190}" for number in range(30_000)]
    _, most = choose_case(np.array(rare), load_profile("demo"))
    assert most is not None and 5_000 < most.value < 30_000
    data = some_data(counts(6_000), cell_type=["a", "b", "b"] * 2_000)
    profile, cells = written(tmp_path, data)
    held = cells.labels[split_cells(len(cells), profile.validation_share, profile.seed)]
    assert len(cells) == profile.max_cells == 5_000 and profile.case_type in held


# --- the command ---------------------------------------------------------------------------------


def test_what_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some_data().write_h5ad(tmp_path / "cells.h5ad")
    out = tmp_path / "mine.yml"
    out.write_text("mine")
    given = ["profile", str(tmp_path / "cells.h5ad"), "--out", str(out)]
    assert main(given) == 1 and out.read_text() == "mine"
    assert "OVERWRITE=1" in capsys.readouterr().err
    assert main([*given, "--overwrite"]) == 0
    assert load_profile(str(out)).case_type == "b"
    assert f"make book PROFILE={out}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mine.txt", "-x.yml", "demo.yml", "a b.yml"])
def test_names_that_no_profile_may_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="OUT is"):
        write_profile(tmp_path / "cells.h5ad", tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"no hdf5", None])
def test_broken_files(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "cells.h5ad"
    some_data().write_h5ad(path)
    path.write_bytes(path.read_bytes()[:3000] if content is None else content)
    with pytest.raises(InputError, match=r"cannot be read as \.h5ad"):
        write_profile(path, tmp_path / "mine.yml")
    with pytest.raises(InputError, match="do not exist"):
        write_profile(tmp_path / "none.h5ad", tmp_path / "mine.yml")


def test_what_reading_leaves_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                         ) -> None:
    names = [*(f"Gene{i}" for i in range(18)), "1-Mar", ""]
    data = some_data(np.repeat(counts(), 5, axis=1), names)
    data.obs["odd"] = range(60)
    data.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        file["obs/odd"].attrs["encoding-type"] = "of the future"
    out = str(tmp_path / "mine.yml")
    assert main(["profile", str(tmp_path / "cells.h5ad"), "--out", out]) == 0
    told = capsys.readouterr().out
    for part in ("1 of 20 genes were left out", "'1-Mar'", "such as 'Gene0'", "obs['odd']"):
        assert part in told
    decisions = read_cells(load_profile(out)).decisions
    assert all(f"  {one}\n" in told for one in decisions[:-1]) and len(decisions) == 5


def test_a_base_is_found_from_where_the_command_is_given(tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a: b # c"
    folder.mkdir()
    (folder / "base.yml").write_text("extends: demo\nseed: 7\n", encoding="utf-8")
    some_data().write_h5ad(folder / "cells.h5ad")
    monkeypatch.chdir(folder)
    assert main(["profile", "cells.h5ad", "--out", "own.yml", "--extends", "base.yml"]) == 0
    monkeypatch.chdir(tmp_path)
    assert load_profile(str(folder / "own.yml")).seed == 7


@pytest.mark.parametrize("there", [False, True])
def test_cells_that_reading_refuses_leave_no_profile(tmp_path: Path, there: bool) -> None:
    values = counts()
    values[:20] = 0
    some_data(sp.csr_matrix(values)).write_h5ad(tmp_path / "cells.h5ad")
    out = tmp_path / "own.yml"
    if there:
        out.write_text("extends: demo\n")
    words = ["profile", str(tmp_path / "cells.h5ad"), "--out", str(out), "--overwrite"]
    assert main(words) == 1 and out.exists() == there


def test_the_command_that_is_printed_can_be_typed(tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine & yours"
    folder.mkdir()
    some_data().write_h5ad(folder / "cells.h5ad")
    assert main(["profile", str(folder / "cells.h5ad"), "--out", str(folder / "own.yml")]) == 0
    command = capsys.readouterr().out.strip().rpartition("then: ")[2]
    assert shlex.split(command) == ["make", "book", f"PROFILE={folder / 'own.yml'}"]


def test_make_hands_paths_over_as_they_are(tmp_path: Path) -> None:
    name = 'it\'s "$(touch ran)" `touch ran`; touch ran.h5ad'
    some_data().write_h5ad(tmp_path / name)
    # Its own copy of the targets, with the environment that runs this test.
    for file in ("requirements.lock", "pyproject.toml"):
        (tmp_path / file).touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / ".ready").touch()
    done = subprocess.run(
        ["make", "-C", str(tmp_path), "-f", str(ROOT / "Makefile"), "profile",
         f"H5AD={name}", "OUT=own.yml", "EXTENDS=pbmc"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    assert done.returncode == 0, done.stderr
    assert load_profile(str(tmp_path / "own.yml")).cells == str((tmp_path / name).resolve())
    assert yaml.safe_load((tmp_path / "own.yml").read_text())["extends"] == "pbmc"
    assert not (tmp_path / "ran").exists()
