"""Direct effects on readings, through all attention paths of the frozen linear model.

A reading direction is pushed down the layers: what it reads of a layer's attention is added to what
it reads of the stream. That gives, for each reading, a (n_pos, d_model) pull on the stream below
each layer, and its product with what an MLP's features, its error and the embeddings wrote there
are their effects. This is the gradient of the frozen linear model in closed form.

The constant is what the biases give along the way, never the rest. `total_pulls` and `all_paths` go
on through the features, as if those that are active were linear.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scfm_circuits.circuits.attribution import Reading
from scfm_circuits.circuits.frozen import AtTokens, Frozen

# --- sources -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sources:
    """All that writes into the stream upstream of some readings, numbered as columns of a row.

    First active features by (layer, position, feature), then errors by (layer, position), then
    embeddings by (leaf, position): tokens', and those of positions where there are any. layer,
    position, feature, activation: (n_active,). starts: where the features of (layer, position)
    begin, (n_layers * n_pos + 1,).
    """

    layer: np.ndarray
    position: np.ndarray
    feature: np.ndarray
    activation: Tensor
    starts: np.ndarray
    n_layers: int
    n_pos: int
    n_leaves: int = 1

    @property
    def n_active(self) -> int:
        """Number of active features."""
        return len(self.layer)

    @property
    def errors(self) -> int:
        """The first error's column."""
        return self.n_active

    @property
    def embeddings(self) -> int:
        """The first embedding's column."""
        return self.n_active + self.n_layers * self.n_pos

    @property
    def count(self) -> int:
        """Number of columns."""
        return self.embeddings + self.n_leaves * self.n_pos


def extent(frozen: Frozen, readings: Sequence[Reading]) -> tuple[int, int]:
    """Layers and positions that can reach any of the readings."""
    last = (max(one.last_position for one in readings) if frozen.causal
            else len(frozen.tokens) - 1)
    return max(one.mlp_limit for one in readings), last + 1


@torch.no_grad()
def sources_of(frozen: Frozen, readings: Sequence[Reading]) -> Sources:
    """Everything upstream of the readings."""
    n_layers, n_pos = extent(frozen, readings)
    z = frozen.activations[:n_layers, :n_pos]
    places = torch.nonzero(z > 0)
    layer, position, feature = (column.cpu().numpy() for column in places.unbind(dim=1))
    counts = np.bincount(layer * n_pos + position, minlength=n_layers * n_pos)
    return Sources(layer, position, feature, z[tuple(places.unbind(dim=1))],
                   np.concatenate([[0], np.cumsum(counts)]), n_layers, n_pos, len(frozen.leaves))


# --- rows ----------------------------------------------------------------------------------------


@torch.no_grad()
def direct_effects(frozen: Frozen, sources: Sources, readings: Sequence[Reading]
                   ) -> tuple[Tensor, Tensor]:
    """(n_readings, sources.count) effects of all sources on each reading through all attention
    paths, and (n_readings,) what the biases give. Exact: the gradient of the frozen linear model,
    times what each source wrote."""
    effects, constant, leaves = _swept(
        frozen, readings, sources.count, lambda layer, pull, effects: _read_mlp(
            frozen, sources, layer, pull, effects))
    for leaf, part in enumerate(leaves):
        at = sources.embeddings + leaf * sources.n_pos
        effects[:, at:at + part.shape[1]] = part
    return effects, constant


class WholeSum(NamedTuple):
    """What adds up to a reading, or to the sum of some, through all attention paths, by where it
    was written.

    leaves: (n_leaves, n_pos) of tokens' embeddings and, where there are any, of positions'. Of an
    encoder of rank values that is which gene, and which rank. features, errors: (n_layers, n_pos);
    constant: () biases, and what is embedded whatever the token.
    """

    leaves: Tensor
    features: Tensor
    errors: Tensor
    constant: Tensor

    def total(self) -> Tensor:
        """The sum of all parts: the readings' values, added up."""
        return self.leaves.sum() + self.features.sum() + self.errors.sum() + self.constant


@torch.no_grad()
def whole_sums(frozen: Frozen, readings: Sequence[Reading]) -> list[WholeSum]:
    """Split each of some readings by what was written where; exact."""
    n_layers, n_pos = extent(frozen, readings)
    by_features = frozen.mlp_out - frozen.error - frozen.transcoders.b_dec[:, None]
    written = torch.stack([by_features, frozen.error])[:, :, :n_pos]

    def read(layer: int, pull: Tensor, effects: Tensor) -> None:
        effects.view(len(pull), 2, n_layers, n_pos)[:, :, layer] = torch.einsum(
            "bsd,wsd->bws", pull, written[:, layer])

    effects, constant, leaves = _swept(frozen, readings, 2 * n_layers * n_pos, read)
    features, errors = effects.view(len(readings), 2, n_layers, n_pos).unbind(dim=1)
    return [WholeSum(leaves[:, row], features[row], errors[row], constant[row])
            for row in range(len(readings))]


def _swept(frozen: Frozen, readings: Sequence[Reading], n_columns: int,
           read: Callable[[int, Tensor, Tensor], None]) -> tuple[Tensor, Tensor, Tensor]:
    """(n_readings, n_columns) what `read` fills in, (n_readings,) what the biases give, and
    (n_leaves, n_readings, n_pos) what the embeddings do.

    read: is given a layer, the pulls on what its MLP writes and their rows of the first.
    """
    # Deep readings first, so that those that see a layer are always the leading ones.
    order = sorted(range(len(readings)), reverse=True, key=lambda i: (
        readings[i].attention_limit, readings[i].mlp_limit))
    deep = [readings[i] for i in order]
    n_pos = extent(frozen, deep)[1]
    pull = deep[0].vector.new_zeros(len(deep), n_pos, deep[0].vector.shape[-1])
    for row, one in enumerate(deep):
        pull[row, one.position] = one.vector
    effects = pull.new_zeros(len(deep), n_columns)
    constant = torch.stack([one.constant for one in deep])
    for layer in range(deep[0].attention_limit - 1, -1, -1):
        if seen := sum(one.mlp_limit > layer for one in deep):
            _across(frozen.end[layer], pull[:seen], constant[:seen])
            read(layer, pull[:seen], effects[:seen])
            constant[:seen] += pull[:seen].sum(dim=1) @ frozen.transcoders.b_dec[layer]
        seen = sum(one.attention_limit > layer for one in deep)
        _across(frozen.middle[layer], pull[:seen], constant[:seen])
        _pull_through_attention(frozen, layer, pull[:seen], constant[:seen])
    leaves = _leaf_effects(frozen, pull, constant)
    back = torch.tensor(np.argsort(order), device=pull.device)
    return effects[back], constant[back], leaves[:, back]


def _across(norm: AtTokens | None, pull: Tensor, constant: Tensor) -> None:
    """Take each pull back through a norm that may stand on the stream; add what its bias gives."""
    if norm is not None:
        constant += pull.sum(dim=1) @ norm.norm.bias
        pull.copy_(norm.back(pull))


def _leaf_effects(frozen: Frozen, pull: Tensor, constant: Tensor) -> Tensor:
    """(n_leaves, n_readings, n_pos) what the leaves give pulls on the stream that enters the first
    layer; add what is the same for all tokens."""
    n_pos, pull = pull.shape[1], pull.clone() if frozen.entry else pull
    _across(frozen.entry, pull, constant)
    if frozen.same is not None:
        constant += torch.einsum("bsd,sd->b", pull, frozen.same[:n_pos])
    return torch.stack([torch.einsum("bsd,sd->bs", pull, leaf[:n_pos]) for leaf in frozen.leaves])


def _read_mlp(frozen: Frozen, sources: Sources, layer: int, pull: Tensor, effects: Tensor
              ) -> None:
    """Fill in what one layer's features and errors give."""
    t, n_pos = frozen.transcoders, pull.shape[1]
    for position in range(n_pos):
        place = layer * sources.n_pos + position
        first, last = int(sources.starts[place]), int(sources.starts[place + 1])
        if last > first:
            writes = t.W_dec[layer, torch.from_numpy(sources.feature[first:last]).to(pull.device)]
            effects[:, first:last] = pull[:, position] @ writes.T * sources.activation[first:last]
    at = sources.errors + layer * sources.n_pos
    effects[:, at:at + n_pos] = torch.einsum("bsd,sd->bs", pull, frozen.error[layer, :n_pos])


def _pull_through_attention(frozen: Frozen, layer: int, pull: Tensor, constant: Tensor) -> None:
    """Add to each pull what it reads through one layer's attention; add that layer's biases."""
    w, norm, n_pos = frozen.weights[layer], frozen.first[layer], pull.shape[1]
    pattern = frozen.patterns[layer, :, :n_pos, :n_pos]
    # What attention writes may pass a norm of its own.
    written = pull.clone() if frozen.behind[layer] else pull
    _across(frozen.behind[layer], written, constant)
    arriving = torch.einsum("btd,hdk->bhtk", written, w.w_o)
    reads = torch.einsum("hts,bhtk->bhsk", pattern, arriving)
    at_norm = torch.einsum("bhsk,hkd->bsd", reads, w.w_v)
    constant += (written.sum(dim=1) @ w.b_o + torch.einsum("bhsk,hk->b", reads, w.b_v)
                 + at_norm.sum(dim=1) @ norm.norm.bias)
    pull += norm.back(at_norm)


# --- through the features ------------------------------------------------------------------------


def total_pulls(frozen: Frozen, reading: Reading) -> Tensor:
    """(n_layers, n_pos, d_model): what a reading reads of each MLP's output, on all paths.

    Through attention, and through later layers' active features, which pass a change on as they
    are; patterns, the norms' scales and the transcoders' errors are frozen. A feature's total
    effect is its activation times the product of its decoder row and the pull where it writes.
    """
    return _pulled_through(frozen, reading)[0]


def all_paths(frozen: Frozen, reading: Reading) -> Tensor:
    """(n_pos,) what each token's own embedding gives a reading along all paths of the frozen model.

    Paths run as in `total_pulls`. Biases and errors start paths of their own, which are not counted
    here. The product of the embeddings with the gradient of the linear replacement model.
    """
    return _pulled_through(frozen, reading)[1]


@torch.no_grad()
def _pulled_through(frozen: Frozen, reading: Reading) -> tuple[Tensor, Tensor]:
    """`total_pulls` and `all_paths`. An active feature passes on what its encoder reads: its row of
    W_enc, pulled back through the frozen norm, times what is read of its decoder row."""
    t = frozen.transcoders
    pull = reading.vector.new_zeros(1, *frozen.residual.shape[1:])
    pull[0, reading.position] = reading.vector
    pulls = pull.new_zeros(t.n_layers, *pull.shape[1:])
    unused = pull.new_zeros(1)
    for layer in range(reading.attention_limit - 1, -1, -1):
        through = torch.zeros_like(pull)
        if layer < reading.mlp_limit:
            _across(frozen.end[layer], pull, unused)
            pulls[layer] = pull[0]
            active = (frozen.activations[layer] > 0).to(pull)
            at_norm = (pull[0] @ t.W_dec[layer].T * active) @ t.W_enc[layer]
            through = frozen.second[layer].back(at_norm)[None]
        if not frozen.parallel:  # the MLP reads what this layer's attention wrote
            pull = pull + through
        _across(frozen.middle[layer], pull, unused)
        _pull_through_attention(frozen, layer, pull, unused)
        if frozen.parallel:
            pull = pull + through
    return pulls, _leaf_effects(frozen, pull, unused).sum(dim=0)[0]
