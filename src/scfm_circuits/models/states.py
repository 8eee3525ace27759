"""Where a model puts a cell, if it is asked nothing in words: types as places of its embedding.

A cell's embedding is the mean, over the tokens of its genes, of what the model's body gives
(transformers' `last_hidden_state`); special tokens are left out. So users of Geneformer embed cells
(Theodoris et al. 2023). A type's place is the mean embedding of its training cells. A cell is named
by the nearest place, and `axis` is the straight line from all other types to one: linear, so it can
be taken apart exactly.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.kept import kept_arrays
from scfm_circuits.common.profile import Profile
from scfm_circuits.models.architectures import decoder
from scfm_circuits.models.loading import model_stamp
from scfm_circuits.models.mlp_sites import batches, counting_precision, device_of

PLACED = 20_000
"""Training cells that places are means of, at most; evenly spaced in the corpus."""


class States(NamedTuple):
    """The types' places: types, (n_types,) in alphabetical order; places, (n_types, d_model)."""

    types: np.ndarray
    places: np.ndarray

    def nearest(self, points: Any) -> np.ndarray:
        """(n,) the type whose place is nearest to each point, the first by alphabet of equally near
        ones; points: (n, d_model), which may be sparse."""
        distance = (self.places**2).sum(axis=1) - 2 * (points @ self.places.T)
        return self.types[distance.argmin(axis=1)]

    def axis(self, label: str) -> tuple[np.ndarray, float]:
        """(d_model,) w and b of `w . embedding + b`, which is 1 at the type's place and -1 at the
        mean of the other types' places: how far a cell lies on the type's side.

        InputError if no training cell is of the type, or of any other.
        """
        own = self.types == label
        if not own.any() or own.all():
            raise InputError(f"No training cell is {'' if own.any() else 'not '}of a type other "
                             f"than {label!r}, so no direction leads to it; use more cells, or "
                             "name another `case_type`.")
        to, away = self.places[own][0], self.places[~own].mean(axis=0)
        across = to - away
        w = 2 * across / max(float(across @ across), 1e-30)
        return w, -float(w @ (to + away)) / 2


def mean_over_genes(hidden: Tensor, of_gene: Tensor) -> Tensor:
    """(n, d_model) mean of hidden (n, length, d_model) over the tokens of genes, (n, length)."""
    weight = of_gene.to(hidden.dtype)
    return torch.einsum("nl,nld->nd", weight, hidden) / weight.sum(dim=1, keepdim=True)


def genes_at(corpus: Corpus, rows: np.ndarray, length: int, device: torch.device) -> Tensor:
    """(n, length) bool: the tokens of genes."""
    return torch.from_numpy(np.asarray(corpus.gene[rows, :length] >= 0)).to(device)


@torch.no_grad()
def embeddings(model: nn.Module, corpus: Corpus, cells: np.ndarray, forward_cells: int
               ) -> np.ndarray:
    """(n_cells, d_model) float64: the cells' embeddings."""
    config: Any = model.config
    found = [np.zeros((0, config.hidden_size))]
    for rows, tokens, mask in tqdm(batches(corpus, cells, forward_cells, device_of(model)),
                                   "embeddings", unit="batch", leave=False):
        with counting_precision(model):  # type: ignore[arg-type]
            hidden = decoder(model)(input_ids=tokens, attention_mask=mask,
                                    use_cache=False).last_hidden_state
        of_gene = genes_at(corpus, rows, tokens.shape[1], tokens.device)
        found.append(mean_over_genes(hidden.double(), of_gene).cpu().numpy())
    return np.concatenate(found)


def placed_cells(corpus: Corpus) -> np.ndarray:
    """The training cells that places are means of."""
    return corpus.training_cells(PLACED)


def means_by_type(points: Any, labels: np.ndarray) -> States:
    """Each type's mean of points (n, d), which may be sparse."""
    from scipy.sparse import csr_array

    types, which = np.unique(labels, return_inverse=True)
    one_of_each = csr_array((np.ones(len(which)), (which, np.arange(len(which)))))
    sums: Any = one_of_each @ points
    sums = sums.toarray() if hasattr(sums, "toarray") else sums
    return States(types.astype(str), sums / np.bincount(which)[:, None])


def find_states(model: nn.Module, corpus: Corpus, forward_cells: int) -> States:
    """The types' places in a model's embedding."""
    cells = placed_cells(corpus)
    return means_by_type(embeddings(model, corpus, cells, forward_cells), corpus.labels[cells])


def get_states(model: nn.Module, corpus: Corpus, profile: Profile) -> States:
    """`find_states` of the profile's model, kept in its results."""
    return kept_arrays(profile.results / "states.npz", model_stamp(profile, corpus),
                       lambda: find_states(model, corpus, profile.forward_cells), States._asdict,
                       lambda stored: States(stored["types"], stored["places"]))
