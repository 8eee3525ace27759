"""Tiny random models, cells and corpora for identities."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from scfm_circuits.cells.corpus import Corpus, build_corpus
from scfm_circuits.cells.ranking import top_genes
from scfm_circuits.cells.reading import About, RankedCells, read_chunks
from scfm_circuits.circuits.attribution import logit_direction
from scfm_circuits.circuits.circuit import Node
from scfm_circuits.circuits.frozen import Frozen
from scfm_circuits.circuits.graph import Target
from scfm_circuits.common.profile import Profile, load_profile
from scfm_circuits.transcoders.training.run import TrainingRun
from scfm_circuits.transcoders.transcoder import Transcoders, Variant

torch.set_num_threads(1)  # the models are too small to share out

GENES = ("CD3D", "CD8A", "MS4A1", "LYZ", "NKG7", "GNLY", "HLA-DQA1", "HLA-DRA", "MT-CO1",
         "C1ORF112", "RP11-291B21.2", "FOXO1", "FOXP3", "S100A8", "S100A9", "PSD3")
LABELS = ("CD4+ T cell", "B cell", "CD34+", "Dendritic {cell}")

TRAINING = {"batch_tokens": 32, "buffer_tokens": 64, "training_tokens": 32 * 14,
            "warmup_steps": 5, "expansion": 2, "forward_cells": 3, "learning_rate": 1e-2}
"""A profile's fields for training in a moment: 14 steps."""


def tiny_model(*, layers: int = 3, width: int = 16, heads: int = 2, vocabulary: int = 40,
               parallel: bool = True, seed: int = 0, dtype: torch.dtype = torch.float64
               ) -> GPTNeoXForCausalLM:
    """A random GPT-NeoX whose LayerNorm gains and all biases are random too."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=2 * width, max_position_embeddings=64,
        use_parallel_residual=parallel, attn_implementation="eager", bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config).to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        scale = 0.3 if name.endswith("bias") or "norm" in name else 0.0
        parameter.mul_(8 if parameter.ndim > 1 else 1).add_(
            scale * torch.randn(parameter.shape, dtype=dtype))
    return model


def tiny_transcoders(model: GPTNeoXForCausalLM, features: int = 24, seed: int = 1,
                     variant: Variant = Variant()) -> Transcoders:  # noqa: B008 (a tuple)
    """Random transcoders with random biases, in the model's precision."""
    config = model.config
    transcoders = Transcoders(config.num_hidden_layers, config.hidden_size, features, variant)
    transcoders.to(next(model.parameters()).dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*transcoders.parameters(), transcoders.b_in):
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.5)
    return transcoders


def logit_targets(frozen: Frozen, position: int, *, share: float = 0.95, most: int = 10
                  ) -> list[Target]:
    """The likeliest next tokens, weighted by probability: those that reach `share`, at most `most`
    (circuit-tracer's `desired_logit_prob` and `max_n_logits`). Each is read less the mean logit."""
    probability = frozen.logits[position].double().softmax(-1)
    top = torch.topk(probability, min(most, len(probability)))
    enough = int((top.values.cumsum(0) < share).sum()) + 1
    targets = []
    for weight, token in zip(top.values[:enough].tolist(), top.indices[:enough].tolist(),
                             strict=True):
        reading = logit_direction(frozen, token, position)
        node = Node.of_logit(token, position, len(frozen.weights), reading.value)
        targets.append(Target(node, reading, weight))
    return targets


def tokens(n: int, vocabulary: int = 40, seed: int = 2) -> np.ndarray:
    """n random token ids."""
    return np.random.default_rng(seed).integers(0, vocabulary, n)


def tiny_profile(monkeypatch: pytest.MonkeyPatch, results: Path, **overrides: Any) -> Profile:
    """The smoke profile, smaller still, with its results under `results`."""
    monkeypatch.setenv("SCFM_RESULTS", str(results))
    return load_profile("smoke", {"genes_per_cell": 6, "max_cells": None, "model_thinning": 1.0,
                                  **overrides})


@dataclass(frozen=True)
class Cells(About):
    """Expression of checked cells, (n_cells, n_genes) sparse rows."""

    expression: sp.csr_matrix


def read_cells(profile: Profile) -> Cells:
    """The profile's cells with all of their expression."""
    parts: list[sp.csr_matrix] = []
    about = read_chunks(profile, lambda _, part: parts.append(part))
    return Cells(**vars(about), expression=sp.csr_matrix(sp.vstack(parts, format="csr")))


def tiny_cells(n: int = 12, genes: Sequence[str] = GENES, labels: Sequence[str] = LABELS,
               seed: int = 3) -> Cells:
    """n random cells of small counts with many ties; a cell expresses 2 to all genes."""
    rng = np.random.default_rng(seed)
    values = np.zeros((n, len(genes)), np.float32)
    for row in values:
        chosen = rng.permutation(len(genes))[: rng.integers(2, len(genes) + 1)]
        row[chosen] = rng.integers(1, 4, len(chosen))
    return Cells(tuple(genes), np.array([labels[i % len(labels)] for i in range(n)]),
                 np.array([f"cell{i}" for i in range(n)]), ("simulated",), sp.csr_matrix(values))


def tiny_corpus(n: int = 12, seed: int = 3, **overrides: Any) -> Corpus:
    """`tiny_cells` as prompts of up to 6 genes, with a small tokenizer trained on them."""
    fields = {"genes_per_cell": 6, "max_cells": None, "validation_share": 0.25, **overrides}
    profile = load_profile("smoke", fields)
    return build_corpus(ranked(tiny_cells(n, seed=seed), profile.genes_per_cell, profile.seed),
                        profile)


def ranked(cells: Cells, k: int, seed: int = 0) -> RankedCells:
    """The cells as the genes of their sentences."""
    ranking = top_genes(cells.expression, np.arange(len(cells)), k, seed)
    return RankedCells(cells.symbols, cells.labels, cells.cell_ids, cells.decisions, ranking)


def model_for(corpus: Corpus, **options: Any) -> GPTNeoXForCausalLM:
    """`tiny_model` with a row for each of the corpus's tokens."""
    return tiny_model(vocabulary=len(corpus.tokenizer), **{"layers": 2, **options})


def before_each_step(monkeypatch: pytest.MonkeyPatch, told: Callable[[TrainingRun], None]) -> None:
    """Have `told` called with the run before each training step; it may raise to prevent it."""
    step = TrainingRun.train_step

    def stepping(self: TrainingRun, *args: Any, **options: Any) -> Any:
        told(self)
        return step(self, *args, **options)

    monkeypatch.setattr(TrainingRun, "train_step", stepping)


@dataclass
class MadeUp:
    """As much of a corpus as gene lists need: ids of the genes of tokens, and their places."""

    symbols: np.ndarray
    gene: np.ndarray
    place: np.ndarray
    mask: np.ndarray
    occurring = Corpus.occurring
    occurring_symbols = Corpus.occurring_symbols
    cells_with = Corpus.cells_with
