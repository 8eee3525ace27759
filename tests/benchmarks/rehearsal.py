"""A rehearsal of the profile `paper`, `geneformer` or `maxtoki` with stand-ins of its shape.

Neither the real model nor the real atlas is needed: the cells are simulated, with the atlas's
columns, and the model is of C2S-Pythia-410m's architecture with random weights. No number of such a
run means anything; what it shows is that every chapter executes at that size, in how much memory
and in what time.

    python tests/benchmarks/rehearsal.py FOLDER [--like geneformer] [--tokenizer FOLDER]
    make book PROFILE=FOLDER/rehearsal.yml

Those of models whose tokens are genes have dictionaries of the real size, made up, and cells with
so many molecules that they fill the model's 4,096 tokens.

What cannot be rehearsed at random weights is how sparse trained transcoders are: a few steps on
random activations leave thousands of features active on every token, a hundred times more than the
paper's. So TopK stands in for ReLU, with the paper's order of active features; and as nearly all of
these features fire now and then, the cuts of what is live are set so that about as many are live as
in the paper's Table 4 (17,000 of 196,608).
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import yaml

from scfm_circuits.cells.tokens import load_tokenizer, train_tokenizer
from scfm_circuits.common.encodings import RANK_VALUE

TYPES = {"Ventricular Cardiomyocyte": 0.27, "Fibroblast": 0.20, "Endothelial cell": 0.19,
         "Mural cell": 0.15, "Myeloid": 0.08, "Atrial Cardiomyocyte": 0.06, "Lymphoid": 0.05}
"""Labels of the atlas's `cell_type` and their rough shares."""
STEMS = ("KIF", "ZNF", "PTPN", "COL", "SLC", "LAM", "RPS", "RPL", "MT-ND", "HLA-D", "TMEM", "FOXO")


class Size(NamedTuple):
    """How large the stand-ins are.

    cells: those that the run uses, of which one held out must be an `Endothelial cell`; tokens: for
    training; molecules: of a cell.
    """

    cells: int = 36
    genes: int = 32_732
    layers: int = 24
    width: int = 1024
    heads: int = 16
    vocabulary_rows: int = 50_304
    tokens: int = 8192
    molecules: int = 4000


LIKE = {
    "geneformer": Size(layers=12, width=768, heads=12, vocabulary_rows=20_275, molecules=60_000),
    "maxtoki": Size(layers=11, width=1232, heads=8, vocabulary_rows=20_275, molecules=60_000),
}
"""Of the models whose tokens are genes."""


def symbols(n: int, known: Sequence[str], rng: np.random.Generator) -> list[str]:
    """n gene symbols: known ones (the paper's Figure 4), made ones, one that stands twice."""
    made = [f"{STEMS[i % len(STEMS)]}{1 + i // len(STEMS)}" for i in range(n)]
    names = list(dict.fromkeys([*known, "C1orf112", *made]))[: n - 1]
    return [str(name) for name in rng.permutation([*names, names[0]])]


def write_cells(path: Path, size: Size, known: Sequence[str], seed: int = 0) -> None:
    """An .h5ad with the atlas's columns: Ensembl ids, `gene_name-new`, `cell_type`, raw counts."""
    import anndata as ad

    rng = np.random.default_rng(seed)
    names = symbols(size.genes, known, rng)
    n = 2 * size.cells
    labels = rng.choice(list(TYPES), size=n, p=np.array([*TYPES.values()]) / sum(TYPES.values()))
    base = rng.lognormal(-2.5, 2, size=size.genes)
    base[np.isin(names, list(known))] *= 20
    programs = {label: rng.choice(size.genes, max(5, size.genes // 160), replace=False)
                for label in TYPES}
    rows = []
    for label in labels:
        mean = base.copy()
        mean[programs[str(label)]] *= 20
        seen = rng.poisson(size.molecules * mean / mean.sum())
        rows.append(sp.csr_matrix(seen.astype(np.float32)))
    ad.AnnData(
        sp.vstack(rows).tocsr(),
        obs=pd.DataFrame({"cell_type": pd.Categorical(labels, [*TYPES, "Not in this file"])},
                         index=[f"cell{i}" for i in range(n)]),
        var=pd.DataFrame({"gene_name-new": names},
                         index=[f"ENSG{i:011d}" for i in range(size.genes)])).write_h5ad(path)


def write_model(folder: Path, size: Size, tokenizer: str | None, names: Sequence[str],
                seed: int = 0) -> None:
    """A GPT-NeoX of random weights with a tokenizer: one given, or a BPE trained on the genes."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    rows = size.vocabulary_rows
    GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=rows, hidden_size=size.width, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, intermediate_size=4 * size.width, rotary_pct=0.25,
        max_position_embeddings=2048, use_parallel_residual=True, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    found = load_tokenizer(tokenizer) if tokenizer else train_tokenizer(
        [" ".join(names), "The corresponding cell type is:", *TYPES], min(rows, 2000))
    found.save_pretrained(folder)


def write_gene_model(folder: Path, like: str, size: Size, seed: int = 0) -> dict[str, str]:
    """A BERT of Geneformer V2's shape or a Llama of MaxToki's, of random weights, and dictionaries;
    returns the profile's fields that name these."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    encoding = {"geneformer": "geneformer_v2"}.get(like, like)
    special = RANK_VALUE[encoding].special
    genes = [f"ENSG{i:011d}" for i in range(size.genes)][: size.vocabulary_rows - len(special)]
    shared: dict[str, Any] = dict(
        vocab_size=len(genes) + len(special), hidden_size=size.width, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, max_position_embeddings=4096, pad_token_id=0)
    torch.manual_seed(seed)
    if like == "geneformer":
        model: Any = BertForMaskedLM(BertConfig(
            **shared, intermediate_size=4 * size.width, hidden_act="relu", layer_norm_eps=1e-12))
    else:
        model = LlamaForCausalLM(LlamaConfig(
            **shared, intermediate_size=2 * size.width, bos_token_id=2, eos_token_id=3,
            tie_word_embeddings=False))
    model.save_pretrained(folder / "model")
    medians = np.random.default_rng(seed).lognormal(0, 0.5, len(genes))
    content = {"token_dictionary": {one: i for i, one in enumerate((*special, *genes))},
               "gene_medians": dict(zip(genes, medians.tolist(), strict=True))}
    for field, one in content.items():
        (folder / f"{field}.json").write_text(json.dumps(one), encoding="utf-8")
    return {field: str(folder / f"{field}.json") for field in content} | {"extends": like,
                                                                         "model_subfolder": ""}


def write_profile(path: Path, size: Size, cells: Path, model: Path,
                  more: Mapping[str, Any] = MappingProxyType({})) -> None:
    """`paper` with the stand-ins in place of the data and the model, and few tokens; more: fields
    that differ."""
    fields = {
        "extends": "paper", "title": "rehearsal with random weights; no number here means anything",
        "cells": str(cells), "cells_are": "simulated",
        "cells_name": "simulated cells of the atlas's shape", "model": str(model),
        "tokenizer": str(model), "model_revision": None, "model_layers": size.layers,
        "max_cells": size.cells, "validation_share": 0.1, "training_tokens": size.tokens,
        "buffer_tokens": 8192, "warmup_steps": 1, "dead_after_tokens": 4096, "forward_cells": 4,
        "activation": "topk", "active_features": 48, "learning_rate": 0.001,
        "live_cut": -2.0, "live_cut_table4": -1.8,
        "human_layer": min(12, size.layers - 1), **more,
    }
    path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")


def write_rehearsal(folder: Path, size: Size, tokenizer: str | None = None, like: str = "paper"
                    ) -> Path:
    """All stand-ins into a folder; returns the profile's path. like: the profile's name."""
    root = Path(__file__).resolve().parents[2]
    known = pd.read_csv(root / "data" / "paper" / "figure4_genes.csv")["gene"].tolist()
    folder.mkdir(parents=True, exist_ok=True)
    write_cells(folder / "cells.h5ad", size, known)
    if like != "paper":
        more = {**write_gene_model(folder, like, size), "tokenizer": "train", "forward_cells": 1,
                "variant_cells": size.cells}
        write_profile(folder / "rehearsal.yml", size, folder / "cells.h5ad", folder / "model", more)
        return folder / "rehearsal.yml"
    write_model(folder / "model", size, tokenizer, symbols(size.genes, known,
                                                           np.random.default_rng(0)))
    write_profile(folder / "rehearsal.yml", size, folder / "cells.h5ad", folder / "model")
    return folder / "rehearsal.yml"


def main(given: Sequence[str] | None = None) -> int:
    """Write the stand-ins and say how to run them."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", help="folder with C2S-Pythia's tokenizer.json (default: one "
                        "trained on the simulated genes)")
    parser.add_argument("--like", choices=["paper", *LIKE], default="paper")
    for name in Size._fields:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="default: the profile's")
    arguments = vars(parser.parse_args(given))
    folder, tokenizer, like = (arguments.pop(one) for one in ("folder", "tokenizer", "like"))
    size = LIKE.get(like, Size())._replace(**{
        name: value for name, value in arguments.items() if value is not None})
    print(f"make book PROFILE={write_rehearsal(folder.resolve(), size, tokenizer, like)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
