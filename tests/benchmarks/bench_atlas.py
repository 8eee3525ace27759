"""From an atlas on disk to a stored corpus of 60 M tokens: memory, speed, and Cell2Sentence's way.

A simulated .h5ad of the Heart Cell Atlas's shape (704,296 cells, 32,732 genes, csr counts) is
written block by block, or as many of its cells as the disk has room for; then the book's own
`load_corpus` draws the cells of the profile `paper`, ranks, tokenizes and stores them, in a process
of its own whose peak memory is read at the end. Beside it, on the same machine and the same rows of
the matrix, the sentences as Cell2Sentence makes them (Levine et al. 2024, `generate_sentences`:
shuffle a cell's genes, sort them all with a stable sort, join all their names), restated here.

    python tests/benchmarks/bench_atlas.py [--cells 704296] [--folder FOLDER]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import yaml
from machine import cpu_model, part, peak_mib
from rehearsal import TYPES, symbols

from scfm_circuits.common.files import write_json
from scfm_circuits.common.profile import ROOT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ATLAS_CELLS, ATLAS_GENES, PER_CELL = 704_296, 32_732, 2_000
BLOCK = 4096
TOKENS = 60_000_000


def write_atlas(path: Path, n_cells: int) -> int:
    """A csr .h5ad of the atlas's columns; returns the number of values. Not compressed."""
    import anndata as ad

    rng = np.random.default_rng(0)
    known = pd.read_csv(ROOT / "data" / "paper" / "figure4_genes.csv")["gene"].tolist()
    labels = pd.Categorical(rng.choice(list(TYPES), size=n_cells, p=np.array([*TYPES.values()])
                                       / sum(TYPES.values())), [*TYPES, "Not in this file"])
    ad.AnnData(obs=pd.DataFrame({"cell_type": labels},
                                index=[f"cell{i}" for i in range(n_cells)]),
               var=pd.DataFrame({"gene_name-new": symbols(ATLAS_GENES, known, rng)},
                                index=[f"ENSG{i:011d}" for i in range(ATLAS_GENES)])
               ).write_h5ad(path)
    weight = rng.lognormal(0, 1.7, ATLAS_GENES)
    cumulative = np.cumsum(weight / weight.sum())
    indptr = [0]
    with h5py.File(path, "r+") as file:
        if "X" in file:
            del file["X"]
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0",
                            "shape": np.array([n_cells, ATLAS_GENES])})
        data = group.create_dataset("data", (0,), np.float32, maxshape=(None,), chunks=(1 << 20,))
        indices = group.create_dataset("indices", (0,), np.int32, maxshape=(None,),
                                       chunks=(1 << 20,))
        for start in range(0, n_cells, BLOCK):
            rows = min(BLOCK, n_cells - start)
            drawn = np.searchsorted(cumulative, rng.random((rows, int(1.45 * PER_CELL))))
            drawn.sort(axis=1)
            drawn = np.minimum(drawn, ATLAS_GENES - 1)
            first = np.ones(drawn.shape, bool)
            first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
            # A gene drawn several times has that many counts.
            place = np.flatnonzero(first.ravel())
            counts = np.diff(np.append(place, drawn.size)).astype(np.float32)
            size = len(data)
            data.resize((size + len(place),))
            indices.resize((size + len(place),))
            data[size:], indices[size:] = counts, drawn.ravel()[place].astype(np.int32)
            indptr += (size + np.cumsum(first.sum(axis=1))).tolist()
        group.create_dataset("indptr", data=np.array(indptr, np.int64))
        return indptr[-1]


def cell2sentence(matrix: sp.csr_matrix, names: list[str], seed: int = 42) -> list[str]:
    """Cell2Sentence's sentences: all expressed genes of a cell, ties in random order.

    The operations are those of `generate_sentences` in the authors' package (Levine et al. 2024),
    one cell after another: scikit-learn's `shuffle` of a row's columns and values together, numpy's
    stable argsort of the negated values, names looked up in a Python list and joined by spaces.
    What they do besides is left out, which makes their side faster here, if by little: a tqdm bar,
    an index into `indptr` for each end of a row, the list of names made anew for each matrix.
    The generator is seeded as theirs, but is not numpy's global one.
    """
    from sklearn.utils import shuffle

    state = np.random.RandomState(seed)
    found = []
    for start, stop in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
        genes, values = shuffle(matrix.indices[start:stop], matrix.data[start:stop],
                                random_state=state)
        falling = genes[np.argsort(-values, kind="stable")]
        found.append(" ".join([names[gene] for gene in falling]))
    return found


def sentence_speeds(path: Path, rows: int = 8192) -> dict[str, float]:
    """Cells per second of both ways on the same rows in memory: to a cell's genes as text.

    Ours orders and names the first 64 genes of a cell, which are all that a prompt takes, in one
    thread per core; theirs orders and names all of them in one thread, as the package does.
    """
    from scfm_circuits.cells.corpus import sentence_texts
    from scfm_circuits.cells.h5ad import open_h5ad
    from scfm_circuits.cells.ranking import top_genes

    opened = open_h5ad(path)
    matrix, about = opened.matrices["X"]
    part = matrix[:rows]
    opened.close()
    names = about["gene_name-new"].astype(str).tolist()
    numbers = np.arange(part.shape[0])
    top_genes(part[:10], numbers[:10], 64, 0)
    times = {"ours": [], "cell2sentence": []}
    for _ in range(3):
        began = time.perf_counter()
        ours = list(sentence_texts(top_genes(part, numbers, 64, 0), names))
        times["ours"].append(time.perf_counter() - began)
        began = time.perf_counter()
        theirs = cell2sentence(part, names)
        times["cell2sentence"].append(time.perf_counter() - began)
        if len(ours) != len(theirs):
            raise AssertionError("both ways must give a sentence for each cell")
    ours_s, theirs_s = (min(times[name]) for name in ("ours", "cell2sentence"))
    return {"sentence_cells_per_second": part.shape[0] / ours_s,
            "cell2sentence_cells_per_second": part.shape[0] / theirs_s,
            "ratio_vs_cell2sentence": theirs_s / ours_s}


def small_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """A BPE of the size of a demo's, trained on the file's gene symbols."""
    from scfm_circuits.cells.h5ad import open_h5ad
    from scfm_circuits.cells.tokens import train_tokenizer

    opened = open_h5ad(path)
    names = opened.matrices["X"][1]["gene_name-new"].astype(str)
    opened.close()
    return train_tokenizer([" ".join(names), "The corresponding cell type is:", *TYPES], 2000)


def child(profile: str) -> None:
    """Build the corpus and say what it took; run in a process of its own."""
    from scfm_circuits.cells.corpus import load_corpus
    from scfm_circuits.common.profile import load_profile

    began = time.perf_counter()
    corpus = load_corpus(load_profile(profile))
    seconds = time.perf_counter() - began
    tokens = sum(int(corpus.mask[a : a + BLOCK].sum()) for a in range(0, len(corpus), BLOCK))
    print(json.dumps({"corpus_cells": len(corpus), "tokens": tokens, "seconds": seconds,
                      "peak_rss_mib": peak_mib()}))


def measured(folder: Path, cells: int, tokenizer: str | None) -> dict[str, object]:
    """Write the atlas, build the corpus in another process, compare sentences.

    tokenizer: folder of the real one; without it, one trained on the atlas's symbols stands in.
    """
    real = tokenizer is not None
    atlas = folder / "atlas.h5ad"
    with part(f"writing {cells:,} cells"):
        values = write_atlas(atlas, cells)
    if tokenizer is None:
        tokenizer = str(folder / "tokenizer")
        with part("training a tokenizer"):
            small_tokenizer(atlas).save_pretrained(tokenizer)
    profile = folder / "atlas.yml"
    profile.write_text(yaml.safe_dump({
        "extends": "paper", "cells": str(atlas), "cells_are": "simulated",
        "cells_name": "simulated cells of the atlas's shape", "model_revision": None,
        "tokenizer": tokenizer, "max_cells": min(316_000, cells)}))
    with part("corpus"):
        done = subprocess.run(
            [sys.executable, __file__, "--child", str(profile)], stdout=subprocess.PIPE, text=True,
            check=True, env={**os.environ, "SCFM_RESULTS": str(folder / "results")})
    with part("sentences, ours and Cell2Sentence's"):
        speeds = sentence_speeds(atlas)
    found = json.loads(done.stdout.splitlines()[-1])
    stored = sum(one.stat().st_size for one in folder.glob("results/*/corpus/*"))
    return {"cells_in_file": cells, "share_of_the_atlas": cells / ATLAS_CELLS, "values": values,
            "file_bytes": atlas.stat().st_size, **found, "corpus_bytes": stored,
            "cells_per_second": found["corpus_cells"] / found["seconds"],
            "tokens_per_second": found["tokens"] / found["seconds"],
            "share_of_60M_tokens": found["tokens"] / TOKENS, **speeds,
            "real_tokenizer": real, "cpu": cpu_model(), "cores": os.cpu_count()}


def main() -> None:
    """Measure and write `results/bench/atlas.json`."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=ATLAS_CELLS)
    parser.add_argument("--folder", help="where the atlas is written, 12 GB of it (default: the "
                        "system's temporary folder)")
    parser.add_argument("--output", type=Path, default=Path("results/bench/atlas.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        fits = int(0.5 * free / (8 * PER_CELL))
        if fits < given.cells:
            print(f"The disk has room for {fits:,} of {given.cells:,} cells.")
        found = measured(Path(folder), min(given.cells, fits), os.environ.get("SCFM_TOKENIZER"))
    for name, value in found.items():
        print(f"{name:32} {value:,.4g}" if isinstance(value, float) else f"{name:32} {value}")
    write_json(given.output, found)


if __name__ == "__main__":
    main()
