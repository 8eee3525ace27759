"""Somebody's own `.h5ad`: from the file to a built book, by the commands that `make` runs.

Four kinds of file are common in laboratories: indexed by Ensembl identifiers, with symbols that
repeat, with normalised values alone, with a categorical label that has empty categories. What the
writer and the reader make of each is tested beside them. A whole book takes more than a minute even
at this size (each of its chapters imports torch and transformers), so one book, which has a token
for each gene, stands for two kinds, and some chapters of another for the other two.
"""

import html
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import yaml

from scfm_circuits.book.chapters import NOTEBOOKS, of_profile, read_notebooks
from scfm_circuits.common.profile import ROOT, Profile, load_profile

EMPTY = "Never seen <cell>"
SMALL = {
    "extends": "smoke", "max_cells": None, "genes_per_cell": 8, "vocabulary_size": 320,
    "model_width": 16, "model_steps": 5, "model_batch_cells": 8, "expansion": 2,
    "training_tokens": 2048, "batch_tokens": 256, "buffer_tokens": 1024, "warmup_steps": 2,
    "dead_after_tokens": 1024, "variant_tokens": 512, "human_features": 2, "human_decoys": 0,
    "contexts_per_feature": 2, "reinitialised_control": False, "prerank_features": 0,
    "null_draws": 21, "circuit_branches": 3, "circuit_depth": 2, "circuit_nodes": 12,
    "graph_features": 20,
}
"""Fields of a profile whose book is executed in the shortest time; no number means anything."""


def some_pbmcs(n: int = 120) -> anndata.AnnData:
    """Real cells with log-normalised values, their symbols as the index, and `cell_type`."""
    import scanpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file that scanpy carries is an old one
        data = scanpy.datasets.pbmc68k_reduced()
    chosen = np.sort(np.random.default_rng(0).permutation(len(data))[:n])
    labels = data.obs["bulk_labels"].astype(str).to_numpy()[chosen]
    return anndata.AnnData(data.raw.X[chosen].toarray(),
                           obs=pd.DataFrame({"cell_type": labels}, index=data.obs_names[chosen]),
                           var=pd.DataFrame(index=data.raw.var_names))


def identifiers_and_repeated_symbols(path: Path) -> None:
    """Counts of genes by Ensembl identifier, of which thirty have another's symbol."""
    data = some_pbmcs()
    symbols = data.var_names.to_numpy().astype(object)
    symbols[1:60:2] = symbols[0:60:2]
    data.var["biotype"] = "protein_coding"
    data.var["feature_name"] = pd.Categorical(symbols)
    data.var_names = [f"ENSG{number:011d}" for number in range(1, len(symbols) + 1)]
    data.X = sp.csr_matrix(np.rint(np.expm1(data.X)))
    data.write_h5ad(path)


ODD = {"Dendritic": "CD4$+$  T |", "CD14+ Monocyte": r"$$ \frac{a}{b} `c`", "CD19+ B": "nan",
       "CD8+ Cytotoxic T": "<b onclick=x>[y](http://z) *w*</b>"}
"""What some types are called instead, in the second file."""


def normalised_values_and_odd_labels(path: Path) -> None:
    """Log-normalised values alone, odd labels, a type that no cell has; and a library of one's own
    beside it, in which none of the paper's genes is."""
    data = some_pbmcs()
    labels = data.obs["cell_type"].replace(ODD)
    labels.iloc[::3] += " "
    (path.parent / "sets").mkdir()
    (path.parent / "sets" / "CellMarker_Augmented_2021.gmt").write_text(
        f'"$a$ | <i>b</i>"\t{data.var_names[0]}\tLYZ\tCD3D\r"other"\tCD3D\tLYZ\tCD3E\r')
    data.obs["cell_type"] = pd.Categorical(labels, [EMPTY, *sorted(set(labels))])
    data.write_h5ad(path)


def ran(tmp_path: Path, *words: str) -> None:
    """`python` of these words, without gene sets but those beside the cells and without network."""
    sets = tmp_path / "sets"
    settings = {**os.environ, "SCFM_RESULTS": str(tmp_path / "results"), "OMP_NUM_THREADS": "1",
                "SCFM_GENE_SETS": str(sets) if sets.is_dir() else "",
                "SCFM_CACHE": str(tmp_path / "cache"), "SCFM_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=settings, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def profiled(tmp_path: Path, tokenizer: str, **fields: str | None) -> Profile:
    """The profile that `make profile` writes for `cells.h5ad` there, which has these fields."""
    (tmp_path / "small.yml").write_text(yaml.safe_dump({**SMALL, "tokenizer": tokenizer}))
    path = str(tmp_path / "mine.yml")
    ran(tmp_path, "-m", "scfm_circuits", "profile", str(tmp_path / "cells.h5ad"), "--out", path,
        "--extends", str(tmp_path / "small.yml"))
    written = load_profile(path)
    assert {"matrix": "X", "label_column": "cell_type", **fields}.items() <= dict(written).items()
    return written


EXECUTE = """
import sys
from dataclasses import replace
from scfm_circuits.book.chapters import load_run
from scfm_circuits.book.execution import execute
run = load_run(sys.argv[1])
execute(replace(run, notebooks=[one for one in run.notebooks if one.name[:2] in sys.argv[2:]]))
"""
"""Some chapters of a profile are executed, given by their numbers."""


def test_a_file_of_identifiers_is_read_and_explained(tmp_path: Path) -> None:
    """The case study, what it follows, and the chapter on gene sets, of which none is here."""
    identifiers_and_repeated_symbols(tmp_path / "cells.h5ad")
    written = profiled(tmp_path, "train", symbol_column="feature_name", duplicate_symbols="sum")
    ran(tmp_path, "-c", EXECUTE, str(tmp_path / "mine.yml"), "01", "02", "04", "06", "07")
    notebooks = {path.stem[:2]: html.unescape(json.dumps(json.loads(path.read_text())["cells"]))
                 for path in tmp_path.glob("results/mine/notebooks/*.ipynb")}
    assert sorted(notebooks) == ["01", "02", "04", "06", "07"]
    for sentence in ("Symbols are taken from the var column feature_name.",
                     "30 repeated symbols were added up.",
                     "The values are whole numbers, so raw counts."):
        assert sentence in notebooks["01"]
    assert written.case_type in notebooks["07"]
    assert "has no column of descriptions" not in notebooks["07"]


def test_a_file_of_odd_labels_makes_a_book(tmp_path: Path) -> None:
    """`make profile`, then `make book`."""
    normalised_values_and_odd_labels(tmp_path / "cells.h5ad")
    written = profiled(tmp_path, "genes", symbol_column=None, duplicate_symbols="error",
                       case_type="CD4$+$ T |")
    ran(tmp_path, "-m", "scfm_circuits", "book", "--profile", str(tmp_path / "mine.yml"),
        "--output", str(tmp_path / "built"))
    pages = tmp_path / "built" / "html"
    page = html.unescape((pages / "01_cells_and_model.html").read_text(encoding="utf-8"))
    for sentence in ("The values are not whole numbers, so normalised already.",
                     "'CD4$+$  T |' and 'CD4$+$  T | ' are one type, 'CD4$+$ T |'"):
        assert sentence in page, page
    assert "cells of cells.h5ad" in page and f" {written.case_type}.\n" in page
    case = html.unescape((pages / "07_endothelial_case_study.html").read_text(encoding="utf-8"))
    assert written.case_type in case and "has no column of descriptions" in case
    for notebook in of_profile(read_notebooks(NOTEBOOKS), written):
        assert (pages / f"{notebook.page}.html").is_file()
    # A type that no cell has is in no file but the cells'.
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".h5ad"]
    assert not [path for path in kept if b"Never seen" in path.read_bytes()]
