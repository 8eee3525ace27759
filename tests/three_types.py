"""Cells of three types as gene tokens, and tiny models that read them: a decoder and an encoder."""

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from tiny_architectures import tiny

from scfm_circuits.cells.corpus import Corpus, load_corpus
from scfm_circuits.common.encodings import RANK_VALUE
from scfm_circuits.common.profile import Profile, load_profile

FAMILIES = {"maxtoki": "llama", "geneformer_v2": "bert", "geneformer_v1": "bert"}
"""The family of model that each encoding is read by."""
NAMES = [f"GENE{i}" for i in range(14)]
TYPES = ("alpha", "beta", "gamma")


def gene_profile(folder: Path, encoding: str, n: int = 36, **more: Any) -> Profile:
    """A profile of n cells of three types, each with genes of its own, written into `folder`."""
    rng = np.random.default_rng(1)
    values = rng.integers(0, 4, (n, len(NAMES)))
    for row, own in enumerate(values):
        own[4 * (row % 3) : 4 * (row % 3) + 4] += rng.integers(3, 9, 4)
    data = anndata.AnnData(sp.csr_matrix(values.astype(np.float32)), obs=pd.DataFrame(
        {"type": [TYPES[i % 3] for i in range(n)]}, index=[f"c{i}" for i in range(n)]),
        var=pd.DataFrame(index=NAMES))
    data.write_h5ad(folder / "cells.h5ad")
    genes = [f"ENSG{i:011d}" for i in range(len(NAMES))]
    files = {"token_dictionary": {key: i for i, key in enumerate(
                 (*RANK_VALUE[encoding].special, *genes))},
             "gene_medians": {gene: 1.0 + i % 3 for i, gene in enumerate(genes)},
             "gene_mapping": dict(zip(NAMES, genes, strict=True))}
    for field, content in files.items():
        (folder / f"{field}.json").write_text(json.dumps(content))
    return load_profile("smoke", {
        "encoding": encoding, "cells": str(folder / "cells.h5ad"), "matrix": "X",
        "label_column": "type", "case_type": "beta", "max_cells": None, "genes_per_cell": 9,
        "model_thinning": 1.0, "validation_share": 0.5, "forward_cells": 4,
        **{field: str(folder / f"{field}.json") for field in files}, **more})


def gene_corpus(folder: Path, encoding: str, **more: Any) -> tuple[Profile, Corpus]:
    """`gene_profile` and its cells."""
    profile = gene_profile(folder, encoding, **more)
    return profile, load_corpus(profile)


def gene_model(encoding: str, corpus: Corpus, dtype: torch.dtype = torch.float64, **more: Any
               ) -> Any:
    """A random model of the encoding's family with a row for each token."""
    return tiny(FAMILIES[encoding], vocabulary=len(corpus.tokenizer), dtype=dtype,
                **{"layers": 2, **more})
