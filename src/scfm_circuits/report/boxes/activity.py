"""What features do in single cells: how often in each cell type, and texts with every activation.

Two passes over few cells: `read_activity` looks at some of every type and finds, for each feature,
firings of several strengths; `contexts_at` reads what a feature does on all tokens around a place.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.profile import Profile
from scfm_circuits.features.contexts import pieces_around
from scfm_circuits.features.counting import activation_edges
from scfm_circuits.features.statistics import FeatureStatistics
from scfm_circuits.models.mlp_sites import batches, device_of, mlp_sites
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PER_TYPE, MOST = 20, 400
"""Cells of each type that are looked at, the first in the corpus's order; of all types together."""
STRATA, WINDOW = 3, 8
"""Parts of a feature's activations of which a firing is shown; tokens on either side of one."""
FeaturePlace = tuple[int, int, int, int]
"""A feature's layer and index, and a cell and the position of a token in it."""


class Activity(NamedTuple):
    """What every feature does in the cells that were looked at.

    types: each cell type with the cells looked at. share: (n_layers, n_features, n_types) share of
    the type's tokens on which the feature is active. samples: (n_layers, n_features, STRATA, 2)
    cell and position of the firing nearest to the middle of each part of its activations, the
    strongest part first; -1 where there is none.
    """

    types: tuple[tuple[str, int], ...]
    share: np.ndarray
    samples: np.ndarray

    def of(self, layer: int, feature: int) -> list[list[Any]]:
        """[type, share, cells] of a feature, the type in which it is most active first."""
        rows = [[name, float(share), cells] for (name, cells), share in
                zip(self.types, self.share[layer, feature], strict=True)]
        return sorted(rows, key=lambda row: (-row[1], row[0]))

    @property
    def note(self) -> str:
        """How the shares were read, as a page says it."""
        most = max((cells for _, cells in self.types), default=0)
        return f"Share of the tokens on which it is active, in the first {most} cells of each type."


def looked_at(labels: np.ndarray, per_type: int = PER_TYPE, most: int = MOST) -> np.ndarray:
    """The first cells of every type, `per_type` of each or fewer if they would be over `most`; at
    least one of each. Sorted by type."""
    types, place = np.unique(labels, return_inverse=True)
    n = max(1, min(per_type, most // max(len(types), 1)))
    return np.concatenate([np.flatnonzero(place == i)[:n] for i in range(len(types))])


def levels(histogram: np.ndarray) -> np.ndarray:
    """(..., STRATA) activations in the middle of the parts, the strongest part first.

    histogram: (..., n_bins) counts of activations. Parts are of equal count, levels as exact as
    the bins of `activation_edges`: each is the middle of the bin that holds it.
    """
    above = np.cumsum(histogram[..., ::-1], axis=-1)
    middles = (activation_edges()[:-1] * 2**0.25)[::-1]
    wanted = above[..., -1:, None] * (np.arange(STRATA) + 0.5) / STRATA
    return middles[(above[..., None] <= wanted).sum(axis=-2).clip(max=len(middles) - 1)]


@torch.no_grad()
def read_activity(model: "PreTrainedModel", transcoders: Transcoders,
                  statistics: FeatureStatistics, corpus: Corpus, profile: Profile, *,
                  samples: bool = True) -> Activity:
    """One pass over the first cells of every type; without `samples` in half of the time."""
    cells = looked_at(corpus.labels)
    names, place = np.unique(corpus.labels[cells], return_inverse=True)
    shape = (*statistics.fired.shape, len(names))
    active, tokens_of = np.zeros(shape), np.zeros(len(names))
    wanted = torch.from_numpy(levels(statistics.activation_histogram)).float()
    best = torch.full((*shape[:2], STRATA), torch.inf)
    places = np.full((*shape[:2], STRATA, 2), -1)
    device, first = device_of(model), 0
    for rows, tokens, mask in batches(corpus, cells, profile.forward_cells, device):
        sites = transcoders.variant.read(*mlp_sites(model, tokens, mask))
        row, position = np.nonzero(mask.cpu().numpy())
        one_type = torch.from_numpy(place[first + row]).to(device)
        by_type = torch.nn.functional.one_hot(one_type, len(names)).float().T
        tokens_of += by_type.sum(1).cpu().numpy()
        for layer in range(shape[0]):
            z = transcoders.layer_activations(layer, sites[layer]).float()
            active[layer] += (by_type @ (z > 0).float()).T.cpu().numpy()
            if samples:
                _keep_nearest(z.cpu(), wanted[layer], best[layer], places[layer], rows[row],
                              position)
        first += len(rows)
    return Activity(tuple((str(name), int((place == i).sum())) for i, name in enumerate(names)),
                    (active / np.maximum(tokens_of, 1)).astype(np.float32), places)


def _keep_nearest(z: torch.Tensor, wanted: torch.Tensor, best: torch.Tensor,
                  places: np.ndarray, cell: np.ndarray, position: np.ndarray) -> None:
    """Keep each feature's firings nearest to its levels; z: (n_tokens, n_features)."""
    token, feature = z.nonzero(as_tuple=True)
    for part in range(STRATA):
        away = (z[token, feature] - wanted[feature, part]).abs()
        nearest = torch.full((z.shape[1],), torch.inf).scatter_reduce(0, feature, away, "amin")
        # Of equals the first token: backwards, the last one written is the first.
        hits = (away == nearest[feature]).nonzero()[:, 0].flip(0)
        where = np.zeros(z.shape[1], np.int64)
        where[feature[hits].numpy()] = token[hits].numpy()
        better = nearest < best[:, part]
        best[better, part] = nearest[better]
        chosen = where[better.numpy()]
        places[better.numpy(), part] = np.stack([cell[chosen], position[chosen]], axis=1)


@torch.no_grad()
def contexts_at(model: "PreTrainedModel", transcoders: Transcoders, corpus: Corpus,
                places: Sequence[FeaturePlace], forward_cells: int) -> list[list[Any]]:
    """For each place [activation, the cell's label, [[token, activation, gene], ...]].

    One pass over the cells of the places. The tokens are those up to `WINDOW` before and behind.
    """
    if not places:
        return []
    layers, features, cells, positions = np.array(places).T
    around = np.zeros((len(places), 2 * WINDOW + 1), np.float32)
    steps = np.arange(-WINDOW, WINDOW + 1)
    needed = np.unique(cells)
    for rows, tokens, mask in batches(corpus, needed, forward_cells, device_of(model)):
        sites = transcoders.variant.read(*mlp_sites(model, tokens, mask))
        # The tokens of a batch stand cell after cell, without padding.
        starts = np.concatenate([[0], np.cumsum(corpus.lengths[rows])])
        here = np.flatnonzero(np.isin(cells, rows))
        at = np.searchsorted(rows, cells[here])
        for layer in np.unique(layers[here]):
            own = layers[here] == layer
            chosen, row = here[own], at[own]
            place = positions[chosen, None] + steps
            inside = (place >= 0) & (place < corpus.lengths[rows[row]][:, None])
            flat = np.where(inside, starts[row][:, None] + place, 0)
            z = transcoders.layer_activations(int(layer), sites[int(layer)])
            found = z[torch.from_numpy(flat), torch.from_numpy(features[chosen])[:, None]]
            around[chosen] = np.where(inside, found.float().cpu().numpy(), 0)
    return [_context(corpus, int(cell), int(position), values)
            for cell, position, values in zip(cells, positions, around, strict=True)]


def _context(corpus: Corpus, cell: int, position: int, values: np.ndarray) -> list[Any]:
    start, pieces = pieces_around(corpus, cell, position, WINDOW)
    shown = [[text, float(f"{values[place - position + WINDOW]:.3g}"),
              str(corpus.symbols[corpus.gene[cell, place]]) if corpus.gene[cell, place] >= 0
              else ""] for place, text in enumerate(pieces, start)]
    return [float(f"{values[WINDOW]:.4g}"), str(corpus.labels[cell]), shown]
