"""Is a circuit what the model uses? Change its features in the model and see what the target does.

- `scale_features` multiplies what features write by a factor, in the real model: attention,
  LayerNorm and the MLPs' other features then respond as they will. 0 takes a feature away, 2
  doubles it. The activation scaled is the one the feature has by then, not the one it had before: a
  feature that has already fallen silent because others were taken away has nothing left to lose.
- `scale_each` does the same with one feature at a time, the others left alone: the smallest change
  there is, and the fairest test of a linear prediction.
- `circuit_alone` is the converse: every feature outside the circuit is held at its mean, and the
  circuit's features run. MLPs are replaced by their transcoders plus the error that these made in
  the clean run, which is kept as it was.

The prediction is the change in the frozen linear model, where only attention carries the difference
on. `matched_features` draws circuits to compare with.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from scfm_circuits import InputError
from scfm_circuits.circuits.attribution import Reading, through_attention
from scfm_circuits.circuits.direct_effects import direct_effects, sources_of
from scfm_circuits.circuits.frozen import Frozen
from scfm_circuits.circuits.token_means import Means
from scfm_circuits.models.mlp_sites import hooked, site_hooks
from scfm_circuits.transcoders.transcoder import Transcoders

Edit = Callable[[Tensor, Tensor], Tensor]
"""From an MLP's input and output (n_pos, d_model) to what takes the output's place."""


class FeatureAt(NamedTuple):
    """A feature at a token."""

    layer: int
    feature: int
    position: int


class Call(Protocol):
    """What is read of a text at some tokens, such as `contrast.Contrast`."""

    @property
    def places(self) -> list[int]:
        """The tokens."""
        ...

    def read(self, model: nn.Module, hidden: Tensor, at: Tensor) -> Tensor:
        """(n,) what is read of texts: hidden, (n, n_pos, d_model) from the model's body; at, (n,
        n_pos) bool the tokens."""
        ...

    def start(self, frozen: Frozen) -> tuple[Any, Reading]:
        """The `Node` at which a circuit of it ends, and its reading in the linear model."""
        ...


def at_places(places: Sequence[int], like: Tensor) -> Tensor:
    """(1, n_pos) bool: True at the places of a text; like: (n_pos, ...)."""
    at = torch.zeros(1, len(like), dtype=torch.bool, device=like.device)
    at[0, list(places)] = True
    return at


class Effect(NamedTuple):
    """A target's value before (a pre-activation, or a call's), and how it changes: as predicted and
    as measured."""

    before: float
    predicted_change: float
    measured_change: float


# --- what features write, and the prediction -----------------------------------------------------


@torch.no_grad()
def written_by(frozen: Frozen, features: Sequence[FeatureAt]) -> Tensor:
    """(n_layers, n_pos, d_model): the sum of what the features write."""
    total = torch.zeros_like(frozen.mlp_out)
    for layer, feature, position in features:
        z = frozen.activations[layer, position, feature]
        total[layer, position] += z * frozen.transcoders.W_dec[layer, feature]
    return total


@torch.no_grad()
def frozen_change(frozen: Frozen, change: Tensor, reading: Reading) -> float:
    """What a change of the MLPs' outputs (n_layers, n_pos, d_model) does to a reading, in the
    linear model with attention patterns and the norms' scales frozen."""
    stream = torch.zeros_like(frozen.residual[0])
    for layer in range(max(reading.mlp_limit, reading.attention_limit)):
        from_attention = through_attention(frozen, layer, stream)
        if layer < reading.attention_limit:
            stream = frozen.across(frozen.middle[layer], stream + from_attention)
        if layer < reading.mlp_limit:
            stream = frozen.across(frozen.end[layer], stream + change[layer])
    return float((stream[reading.position] * reading.vector).sum() if isinstance(
        reading.position, list) else stream[reading.position] @ reading.vector)


# --- the real model ------------------------------------------------------------------------------


@torch.no_grad()
def _read_with(model: nn.Module, frozen: Frozen, edits: Mapping[int, Edit],
               target: FeatureAt | Call) -> float:
    """The target in the real model with MLP outputs edited on the way."""
    seen: list[Tensor] = []
    handles = site_hooks(model, lambda layer, read, wrote: edits[layer](read[0], wrote[0])[None],
                         edits)
    if isinstance(target, FeatureAt):
        handles += site_hooks(model, lambda layer, read, wrote: seen.append(
            read[0, target.position]), [target.layer])
    with hooked(handles):
        # Without the unembedding, of which no more than one token's is read.
        final = model.base_model(  # type: ignore[operator]
            input_ids=frozen.tokens[None], use_cache=False).last_hidden_state[0]
    if isinstance(target, FeatureAt):
        t = frozen.transcoders
        return float(t.layer_pre_activations(target.layer, seen[0])[target.feature])
    return float(target.read(model, final[None], at_places(target.places, final))[0])


def _places(frozen: Frozen, copies: Sequence[Sequence[FeatureAt]]) -> dict[int, Tensor]:
    """By layer (3, n) the features in some copies of the text: which copy, position, feature."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for copy, features in enumerate(copies):
        for layer, feature, position in features:
            found.setdefault(layer, []).append((copy, position, feature))
    return {layer: torch.tensor(rows, device=frozen.tokens.device).T
            for layer, rows in found.items()}


def _live(t: Transcoders, layer: int, features: Tensor, x: Tensor) -> Tensor:
    """(n,) the activation of each of n features on an MLP's input of its own, x (n, d_model)."""
    if not t.activation.only_cuts:  # whether one is active may depend on all of a token's
        return t.layer_activations(layer, x).gather(1, features[:, None])[:, 0]
    centred = x - t.b_in[layer]
    return ((centred * t.W_enc[layer, features]).sum(dim=-1) + t.b_enc[layer, features]).relu()


def scale_features(model: nn.Module, frozen: Frozen, features: Sequence[FeatureAt], factor: float,
                   target: FeatureAt, reading: Reading) -> Effect:
    """Multiply what the features write by `factor` and read the target's pre-activation.

    reading: the target's direction. The prediction is that of the frozen linear model with the
    features' clean activations.
    """
    before = float(reading.value)
    predicted = frozen_change(frozen, (factor - 1) * written_by(frozen, features), reading)
    [after] = _scaled_copies(model, frozen, [features], factor, target)
    return Effect(before, predicted, after - before)


def scale_each(model: nn.Module, frozen: Frozen, features: Sequence[FeatureAt],
               factors: Sequence[float], target: FeatureAt, reading: Reading, batch: int
               ) -> list[list[Effect]]:
    """By factor, `scale_features` of each feature by itself; `batch` copies of the text pass
    together."""
    before = float(reading.value)
    written = predicted_each(frozen, features, reading)
    found = []
    for factor in factors:
        after = [value for start in range(0, len(features), batch) for value in _scaled_copies(
            model, frozen, [[one] for one in features[start : start + batch]], factor, target)]
        found.append([Effect(before, (factor - 1) * one, value - before)
                      for one, value in zip(written, after, strict=True)])
    return found


@torch.no_grad()
def _scaled_copies(model: nn.Module, frozen: Frozen, copies: Sequence[Sequence[FeatureAt]],
                   factor: float, target: FeatureAt) -> list[float]:
    """The target's pre-activation in copies of the text, in each of which some are scaled."""
    t, seen, places = frozen.transcoders, list[Tensor](), _places(frozen, copies)

    def edited(layer: int, read: Tensor, output: Tensor) -> Tensor:
        copy, position, feature = places[layer]
        z = _live(t, layer, feature, read[copy, position])
        return output.index_put((copy, position), (factor - 1) * z[:, None]
                                * t.W_dec[layer, feature], accumulate=True)

    with hooked([*site_hooks(model, edited, places), *site_hooks(
            model, lambda layer, read, wrote: seen.append(read[:, target.position]),
            [target.layer])]):
        model.base_model(  # type: ignore[operator]
            input_ids=frozen.tokens.expand(len(copies), -1), use_cache=False)
    return t.layer_pre_activations(target.layer, seen[0])[:, target.feature].tolist()


@torch.no_grad()
def predicted_each(frozen: Frozen, features: Sequence[FeatureAt], reading: Reading) -> list[float]:
    """What each feature writes gives the reading in the frozen linear model."""
    sources = sources_of(frozen, [reading])
    effects = direct_effects(frozen, sources, [reading])[0][0].tolist()
    columns = {FeatureAt(*place): column for column, place in enumerate(zip(
        sources.layer.tolist(), sources.feature.tolist(), sources.position.tolist(), strict=True))}
    # One that is silent writes nothing, and one above the reading does not reach it.
    return [effects[columns[one]] if one in columns else 0.0 for one in features]


# --- the circuit alone ---------------------------------------------------------------------------

class HeldAtMeans(NamedTuple):
    """One text with all features at their means.

    means: (n_layers, n_kinds, n_features); kinds: (n_pos,). mlp_out: (n_layers, n_pos, d_model)
    what the transcoders write at the means, plus the clean run's error.
    """

    means: Tensor
    kinds: Tensor
    mlp_out: Tensor


@torch.no_grad()
def held_at_means(frozen: Frozen, means: Means, kinds: np.ndarray) -> HeldAtMeans:
    """All features at the means of their tokens' kinds.

    Raises InputError if the text has a kind of token that was not averaged over.
    """
    places = means.places(kinds)
    t = frozen.transcoders
    written = torch.stack([means.activations[layer][places] @ t.W_dec[layer] + t.b_dec[layer]
                           for layer in range(t.n_layers)])
    return HeldAtMeans(means.activations, places, written + frozen.error)


def circuit_alone(model: nn.Module, frozen: Frozen, features: Sequence[FeatureAt],
                  target: FeatureAt | Call, reading: Reading, held: HeldAtMeans) -> Effect:
    """Run the circuit's features, hold all others at their means, and read the target.

    A change of 0 says that the circuit gives the target all of its pre-activation. Errors are
    those of the clean run, so that with all features in the circuit nothing changes.
    """
    t = frozen.transcoders
    places = _places(frozen, [features])

    def freed(layer: int, z: Tensor) -> Tensor:
        _, positions, indices = places[layer]
        beyond = (z - held.means[layer, held.kinds[positions], indices])[:, None]
        return held.mlp_out[layer].index_add(0, positions, beyond * t.W_dec[layer, indices])

    def edit(layer: int) -> Edit:
        def edited(x: Tensor, output: Tensor) -> Tensor:
            if layer not in places:
                return held.mlp_out[layer]
            _, positions, indices = places[layer]
            return freed(layer, _live(t, layer, indices, x[positions]))

        return edited

    clean = held.mlp_out.clone()
    for layer, (_, positions, indices) in places.items():
        clean[layer] = freed(layer, frozen.activations[layer, positions, indices])
    before = float(reading.value)
    after = _read_with(model, frozen, {layer: edit(layer) for layer in range(reading.mlp_limit)},
                       target)
    return Effect(before, frozen_change(frozen, clean - frozen.mlp_out, reading), after - before)


class Kept(NamedTuple):
    """What is left of a target: in the whole model, with the circuit's features alone, and with no
    circuit at all, where every feature is held at its mean; in the target's own units."""

    whole: float
    circuit: float
    nothing: float

    @property
    def faithfulness(self) -> float | None:
        """Of what features do for the target, the share that the circuit's do alone (Marks et al.,
        arXiv:2403.19647): 1 is all of it, 0 no more than with none. None where features
        do nothing."""
        gap = self.whole - self.nothing
        return (self.circuit - self.nothing) / gap if gap else None


def kept_alone(model: nn.Module, frozen: Frozen, features: Sequence[FeatureAt],
               target: FeatureAt | Call, reading: Reading, held: HeldAtMeans) -> Kept:
    """`circuit_alone`, beside the same without any feature of the circuit."""
    circuit, nothing = (circuit_alone(model, frozen, some, target, reading, held)
                        for some in (features, ()))
    return Kept(circuit.before, circuit.before + circuit.measured_change,
                nothing.before + nothing.measured_change)


# --- circuits to compare with --------------------------------------------------------------------


def matched_features(frozen: Frozen, features: Sequence[FeatureAt], target: FeatureAt,
                     rng: np.random.Generator, *, within: str = "token", nearest: int = 3
                     ) -> list[FeatureAt]:
    """For each feature another of its layer that writes about as much: a random circuit.

    The draw is among the `nearest` active ones by the ratio of what they write (z ||d||).
    within: `token` draws at the feature's own token, and from the layer's other tokens up to the
    target's only where there is no other one; `layer` draws from all of these tokens at once, which
    matches sizes better: a circuit tends to hold all that is strong at its last token. Features of
    the circuit, and the target, are not drawn, and none twice. The largest choose first, because
    they have the fewest equals. Drawn features stand in the order of those they stand for; one for
    which nothing is left is missing.
    """
    if within not in ("token", "layer"):
        raise InputError(f"`within` is {within!r}; use `token` or `layer`.")
    end, norms = target.position + 1, frozen.transcoders.W_dec.norm(dim=-1)
    # Per layer the active features that may be drawn: (n, 2) positions and indices, log sizes.
    pools: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    taken = {*features, target}
    for layer in sorted({feature.layer for feature in features}):
        sizes = frozen.activations[layer, :end] * norms[layer]
        places = torch.nonzero(sizes)
        kept = np.array([FeatureAt(layer, f, p) not in taken for p, f in places.tolist()], bool)
        pools[layer] = (places.cpu().numpy()[kept],
                        sizes[places[:, 0], places[:, 1]].log().cpu().numpy()[kept])
    own = [float((frozen.activations[layer, position, feature] * norms[layer, feature]).clamp_min(
        1e-30).log()) for layer, feature, position in features]
    drawn: dict[int, FeatureAt] = {}
    for place in np.argsort(-np.array(own), kind="stable"):
        layer, _, position = features[place]
        free, log_sizes = pools[layer]
        here = np.flatnonzero(free[:, 0] == position)
        pool = here if within == "token" and len(here) else np.arange(len(free))
        if not len(pool):
            continue
        closest = pool[np.argsort(np.abs(log_sizes[pool] - own[place]), kind="stable")[:nearest]]
        choice = closest[rng.integers(len(closest))]
        drawn[int(place)] = FeatureAt(layer, int(free[choice, 1]), int(free[choice, 0]))
        pools[layer] = np.delete(free, choice, axis=0), np.delete(log_sizes, choice)
    return [drawn[place] for place in sorted(drawn)]


_ALONE = ("alone", "alone, own kind")


class Comparison(NamedTuple):
    """Effects of one intervention with a circuit's features, or with random ones of one kind.

    features: `circuit`, `none`, or a kind of random circuits. intervention: `ablation`, `doubling`,
    `alone` (all others at their means over all tokens) or `alone, own kind` (over tokens of the
    same kind). All changes are shares of the target's pre-activation: means over the random
    circuits, with the range of what was measured. size: what the features write, relative to the
    circuit's own (sum of z ||d||).
    """

    features: str
    intervention: str
    circuits: int
    n_features: float
    size: float
    predicted: float
    measured: float
    lowest: float
    highest: float


def compare_interventions(
    model: nn.Module, frozen: Frozen, features: Sequence[FeatureAt], target: FeatureAt,
    reading: Reading, means: Means, kinds: np.ndarray, rng: np.random.Generator, *, draws: int = 5,
) -> list[Comparison]:
    """Ablate, double and run alone a circuit, and `draws` random circuits of either sort.

    kinds: the text's `token_means.token_kinds`. `same token` and `same size` are
    `matched_features` within the token and the layer; `none` is the model with all features at
    their means. `alone, own kind` is for the circuit and `none` only.
    """
    held = dict(zip(_ALONE, (held_at_means(frozen, means.over_all_tokens(), np.zeros_like(kinds)),
                             held_at_means(frozen, means, kinds)), strict=True))
    whole = max(_total_size(frozen, features), 1e-30)

    def effect(name: str, chosen: Sequence[FeatureAt]) -> Effect:
        if name in held:
            return circuit_alone(model, frozen, chosen, target, reading, held[name])
        factor = {"ablation": 0.0, "doubling": 2.0}[name]
        return scale_features(model, frozen, chosen, factor, target, reading)

    def row(kind: str, name: str, sets: Sequence[Sequence[FeatureAt]]) -> Comparison:
        effects = [effect(name, one) for one in sets]
        measured = [one.measured_change / one.before for one in effects]
        return Comparison(
            kind, name, len(sets), float(np.mean([len(one) for one in sets])),
            float(np.mean([_total_size(frozen, one) for one in sets])) / whole,
            float(np.mean([one.predicted_change / one.before for one in effects])),
            float(np.mean(measured)), min(measured), max(measured))

    found = [row("circuit", name, [features]) for name in ("ablation", "doubling", *_ALONE)]
    found += [row("none", name, [()]) for name in _ALONE]
    for kind, within in (("same token", "token"), ("same size", "layer")):
        sets = [matched_features(frozen, features, target, rng, within=within)
                for _ in range(draws)]
        found += [row(kind, name, sets) for name in ("ablation", "doubling", "alone")]
    return found


def _total_size(frozen: Frozen, features: Sequence[FeatureAt]) -> float:
    norms = frozen.transcoders.W_dec.norm(dim=-1)
    return sum(float(frozen.activations[layer, position, feature] * norms[layer, feature])
               for layer, feature, position in features)
