"""Made-up cells and dictionaries of a model that has genes as tokens."""

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from scfm_circuits.cells.corpus import Corpus, load_corpus
from scfm_circuits.common.encodings import BINNED, GENE_TOKENS, RANK_VALUE
from scfm_circuits.common.profile import Profile, load_profile
from scfm_circuits.models.scgpt import ScGPT, ScGPTConfig

GENES = [f"ENSG{i:011d}" for i in range(1, 9)]
SCGPT_SPECIAL = GENE_TOKENS[BINNED].special
NAMES = ["VWF", "PECAM1", "INS", "GCG", "B2M", "TMSB4X", "PLVAP", "FLT1"]


def dictionaries(folder: Path, encoding: str = "geneformer_v2", **changed: Any) -> dict[str, str]:
    """Made-up dictionaries of eight genes; profile fields by their files."""
    special = RANK_VALUE[encoding].special
    content = {
        "token_dictionary": {key: i for i, key in enumerate((*special, *GENES))},
        "gene_medians": {gene: 0.5 + i for i, gene in enumerate(GENES)},
        "gene_mapping": dict(zip(NAMES, GENES, strict=True)) | {"F8VWF": GENES[0]}, **changed}
    fields = {"encoding": encoding}
    for field, one in content.items():
        path = folder / f"{field}.json"
        path.write_text(json.dumps(one))
        fields[field] = str(path)
    return fields


def scgpt(folder: Path, names: Any = NAMES, special: tuple[str, ...] = SCGPT_SPECIAL
          ) -> dict[str, str]:
    """A made-up vocabulary, special tokens last as in scGPT's, and an untrained model of it;
    profile fields by their files."""
    vocabulary = {name: i for i, name in enumerate((*names, *special))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    torch.manual_seed(0)
    ScGPT(ScGPTConfig(len(vocabulary), 16, 2, 2, 16, architectures=["ScGPT"])).save_pretrained(
        folder / "model")
    return {"encoding": "binned", "token_dictionary": str(folder / "vocab.json"),
            "model": str(folder / "model"), "model_layers": 2, "human_layer": 1}


def cells(folder: Path, values: np.ndarray, names: list[str] = NAMES, **columns: list[str]) -> str:
    data = anndata.AnnData(sp.csr_matrix(values.astype(np.float32)), obs=pd.DataFrame(
        {"type": ["a", "b"] * (len(values) // 2)}, index=[f"c{i}" for i in range(len(values))]),
        var=pd.DataFrame(columns, index=names))
    data.write_h5ad(folder / "mine.h5ad")
    return str(folder / "mine.h5ad")


def profile_of(path: str, fields: dict[str, str], **more: Any) -> Profile:
    return load_profile("smoke", {
        "cells": path, "matrix": "X", "label_column": "type", "case_type": "a", "max_cells": None,
        "genes_per_cell": 8, "model_thinning": 1.0, "validation_share": 0.5, **fields, **more})


def counts(n: int = 8, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).integers(0, 30, (n, len(GENES)))
    found[:, 0] += 1
    return found


def gene_corpus(folder: Path, encoding: str, n: int = 8, seed: int = 0, **more: Any
                ) -> tuple[Profile, Corpus]:
    """A profile and the corpus of n made-up cells, which are of several lengths; SCFM_RESULTS must
    name a folder of the test's own."""
    values = counts(n, seed)
    values[1::2, 4:] = 0
    profile = profile_of(cells(folder, values), dictionaries(folder, encoding), **more)
    return profile, load_corpus(profile)
