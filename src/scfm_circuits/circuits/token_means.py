"""Mean activations of features by kind of token: what an intervention holds the others at.

A feature of the full stop has another mean on genes than on the full stop. Averaged over the tokens
of one kind, means keep what the text's form brings and lose what is a single cell's own.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.cells.prompts import AnsweredPrompt
from scfm_circuits.common.profile import Profile
from scfm_circuits.common.randomness import generator
from scfm_circuits.models.mlp_sites import batches, device_of, mlp_sites
from scfm_circuits.transcoders.transcoder import Transcoders

MEAN_CELLS = 100
"""Training cells that means are taken over."""
_FIRST_PIECE, _LATER_PIECE, _ANSWER, _ANSWER_END, _FIRST_WORD = range(5)


def token_kinds(gene: np.ndarray, place: np.ndarray, answer_start: int) -> np.ndarray:
    """(n_pos,) what kind of token stands where in a prompt with its answer; ints from 0.

    A gene's first piece, its later pieces, the answer's last token and its other tokens are one
    kind each. Every word of the prompt is a kind of its own, counted from the prompt's end if it
    stands after the genes and from its start if before, so that it is the same in every cell.
    gene, place: as in a Corpus, for the tokens up to the answer's end.
    """
    n, at = len(gene), np.arange(len(gene))
    genes = np.flatnonzero(gene >= 0)
    first = genes[0] if len(genes) else 0
    from_end, from_start = answer_start - 1 - at, at
    word = np.where(at < first, 2 * from_start + 1, 2 * from_end)
    kinds = np.where(gene < 0, _FIRST_WORD + word, np.where(place == 0, _FIRST_PIECE, _LATER_PIECE))
    # White space between two genes that belongs to neither.
    inner = (gene < 0) & (at > first) & (at < (genes[-1] if len(genes) else 0))
    kinds[inner] = _LATER_PIECE
    kinds[answer_start:] = _ANSWER
    kinds[n - 1] = _ANSWER_END if answer_start < n else kinds[n - 1]
    return kinds


def prompt_kinds(prompt: AnsweredPrompt) -> np.ndarray:
    """`token_kinds` of a prompt with its answer."""
    return token_kinds(prompt.encoded.gene, prompt.encoded.place, prompt.answer_start)


class Means(NamedTuple):
    """Mean activations by kind of token, and what else is averaged on the way.

    activations: (n_layers, n_kinds, n_features); counts: (n_kinds,) tokens averaged. outputs:
    (n_layers, n_kinds, d_model) of the MLPs; firing: (n_layers, n_features) share of all tokens on
    which a feature is active.
    """

    activations: Tensor
    counts: Tensor
    outputs: Tensor = torch.empty(0)
    firing: Tensor = torch.empty(0)

    def places(self, kinds: np.ndarray | Tensor) -> Tensor:
        """The kinds as indices of `activations`; InputError for one that was not averaged over."""
        found = torch.as_tensor(kinds).to(self.counts.device)
        known = found < len(self.counts)
        if not (known.all() and (self.counts[found] > 0).all()):
            raise InputError("The text has a word where no cell averaged over has one; take means "
                             "over cells with the same `prompt`.")
        return found

    def over_all_tokens(self) -> "Means":
        """The mean over all tokens as that of one kind, 0."""
        share = (self.counts / self.counts.sum()).to(self.activations.dtype)
        return Means(torch.einsum("k,lkf->lf", share, self.activations)[:, None],
                     self.counts.sum()[None])


def cells_averaged(corpus: Corpus, rng: np.random.Generator) -> np.ndarray:
    """Up to `MEAN_CELLS` training cells, drawn at random, in the corpus's order."""
    return np.sort(rng.permutation(np.flatnonzero(~corpus.held_out))[:MEAN_CELLS])


def study_means(model: nn.Module, transcoders: Transcoders, corpus: Corpus, profile: Profile
                ) -> Means:
    """`mean_activations` of the cells that every study of interventions averages over."""
    cells = cells_averaged(corpus, generator(profile.seed, "interventions"))
    return mean_activations(model, transcoders, corpus, cells, profile.forward_cells)


def kinds_of(corpus: Corpus, cells: np.ndarray) -> np.ndarray:
    """(n_cells, length) `token_kinds` of each cell's text up to its answer's end; -1 behind it."""
    kinds = np.full((len(cells), corpus.tokens.shape[1]), -1, np.int32)
    for row, cell in zip(kinds, cells, strict=True):
        end = corpus.answer_end[cell] + 1
        row[:end] = token_kinds(corpus.gene[cell, :end], corpus.place[cell, :end],
                                int(corpus.answer_start[cell]))
    return kinds


@torch.no_grad()
def mean_activations(model: nn.Module, transcoders: Transcoders, corpus: Corpus,
                     cells: np.ndarray, forward_cells: int) -> Means:
    """Means over the cells, on every kind of token (`token_kinds`)."""
    kinds = kinds_of(corpus, cells)
    n_kinds, device = int(kinds.max()) + 1, device_of(model)
    total = torch.zeros(transcoders.n_layers, n_kinds, transcoders.n_features, device=device,
                        dtype=transcoders.W_enc.dtype)
    counts = torch.zeros(n_kinds, dtype=torch.int64, device=device)
    written = total.new_zeros(transcoders.n_layers, n_kinds, transcoders.d_model)
    firing = total.new_zeros(transcoders.n_layers, transcoders.n_features)
    done = 0
    for rows, tokens, _ in batches(corpus, cells, forward_cells, device):
        kind = torch.from_numpy(kinds[done : done + len(rows), : tokens.shape[1]]).to(device)
        done += len(rows)
        # The end of the text is left out: no target is read there.
        inputs, outputs = mlp_sites(model, tokens, kind >= 0)
        chosen = kind[kind >= 0]
        counts += torch.bincount(chosen, minlength=n_kinds)
        for layer in range(transcoders.n_layers):
            z = transcoders.layer_activations(layer, inputs[layer])
            total[layer].index_add_(0, chosen, z)
            written[layer].index_add_(0, chosen, outputs[layer].to(written))
            firing[layer] += (z > 0).sum(dim=0)
    each = counts.clamp_min(1)[:, None]
    return Means(total / each, counts, written / each, firing / counts.sum())
