"""A step's work on a CPU when few features are active: over active entries, not over all of them.

Of a step's five products only the first, which finds out which features are active, needs all
entries. With 50 of 8,192 active the other four are mostly products with zero. Two passes take their
place, exact up to the order of summation:

1. Token by token: the estimate, the loss's gradient in it, and in each active entry.
2. Feature by feature: the gradient of its two directions and its bias, and Adam on them at once.
   The gradients of a layer are never stored.

Compiled by numba, which a bare GPU machine need not have: `optimizer` does without.
"""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, get_num_threads

from scfm_circuits.common.compiled import compiled, share_out
from scfm_circuits.transcoders.activations import ACTIVATIONS
from scfm_circuits.transcoders.active_entries import Active, find_active
from scfm_circuits.transcoders.training.gradients import (
    BETAS,
    EPSILON,
    Measures,
    Objective,
    backward,
    corrected,
    forward,
    sparse_measures,
    token_weights,
)

if TYPE_CHECKING:
    from scfm_circuits.transcoders.training.optimizer import DenseSteps

DENSITY = 0.1
"""Share of active entries up to which this is faster than the dense products."""


class Entries(NamedTuple):
    """Active entries, feature by feature; tokens ascend within each.

    start: (n_features + 1,) where each feature's begin; token, value, inner: (n_active,) each one's
    token, activation, and the loss's gradient in it.
    """

    start: np.ndarray
    token: np.ndarray
    value: np.ndarray
    inner: np.ndarray


class Moments(NamedTuple):
    """A layer's tensor and Adam's two moments of it, which a step overwrites."""

    weight: np.ndarray
    mean: np.ndarray
    square: np.ndarray


class Rates(NamedTuple):
    """Adam's numbers for one step: see `gradients.corrected` and `adam_rows`."""

    rate: float
    spread: float
    beta1: float
    beta2: float
    epsilon: float


_fast = partial(compiled, fastmath={"reassoc", "contract", "nsz"})
"""Compile; sums may be reordered (in one way only), so that they use the whole vector unit."""


class SparseSteps:
    """Steps of one layer over its active entries, where they are few; dense ones where not."""

    def __init__(self, dense: "DenseSteps") -> None:
        self.dense, self.take = dense, dense.take

    def step(self, layers: slice, weights: dict[str, Tensor], objective: Objective, x: Tensor,
             y: Tensor, numbers: tuple[float, int], measured: bool) -> Measures:
        """See `DenseSteps.step`."""
        variant = self.dense.variant
        encoded = forward(weights, variant, x)
        active = active_entries(encoded.z[0])
        if active is None:
            found, measures = backward(weights, variant, objective, encoded, y, measured)
            self.dense.update(layers, found, numbers)
            return measures
        base = weights["b_dec"][:, None].expand(y.shape)
        if variant.skip:
            base = base.baddbmm(encoded.centred, weights["W_skip"].mT)
        y, n = y.to(base.dtype), y.shape[1]
        scale = torch.as_tensor(token_weights(objective.loss, y), dtype=y.dtype).expand(1, n, 1)
        weight = torch.as_tensor(objective.l1_coefficient, dtype=y.dtype)
        penalised = ACTIVATIONS[variant.activation].penalised
        residual, outer, inner = sparse_backward(
            active, weights["W_dec"][0], base[0].contiguous(), y[0].contiguous(),
            (scale[0, :, 0] * (2 / n)).to(y.dtype).contiguous(),
            float(weight) / n if penalised == "l1" else 0.0)
        encoder, decoder, bias = (
            [store[name][layers][0] for store in (
                self.dense.trained, self.dense.mean, self.dense.square)]
            for name in ("W_enc", "W_dec", "b_enc"))
        update(active, inner, outer, encoded.centred[0], encoder, decoder, bias,
               Rates(*corrected(*numbers), *BETAS, EPSILON))
        found = {"b_dec": outer.sum(dim=0)[None]}
        if variant.skip:
            found["W_skip"] = (outer.mT @ encoded.centred[0])[None]
        self.dense.update(layers, found, numbers)
        return sparse_measures(active, residual[None], y, scale, variant, weight,
                               weights["b_enc"].shape[1], measured)


def active_entries(z: Tensor) -> Active | None:
    """The entries above zero of (n_tokens, n_features), or None if there are too many."""
    return find_active(z.numpy(), get_num_threads(), int(DENSITY * z.numel()))


def sparse_backward(active: Active, decoder: Tensor, base: Tensor, y: Tensor, scale: Tensor,
                    penalty: float) -> tuple[Tensor, Tensor, np.ndarray]:
    """What stands between an estimate and the gradients.

    decoder: (n_features, d_model). base: (n_tokens, d_model), the estimate without features. scale:
    (n_tokens,) twice the weight of each token's squared error. penalty: what each active entry
    costs per unit. Returns (residual, outer, inner): estimate minus y and the loss's gradient in
    the estimate, both (n_tokens, d_model), and in the active entries, (n_active,).
    """
    residual, outer = base.clone(), base.new_empty(base.shape)
    inner = np.empty_like(active.value)
    arrays = [part.numpy() for part in (decoder, y, scale, residual, outer)]
    share_out(len(y), get_num_threads(), lambda first, last: _tokens(
        first, last, active, *arrays, arrays[0].dtype.type(penalty), inner))
    return residual, outer, inner


def update(active: Active, inner: np.ndarray, outer: Tensor, centred: Tensor,
           encoder: list[Tensor], decoder: list[Tensor], bias: list[Tensor], rates: Rates) -> None:
    """Adam on a layer's directions and encoder biases, with unit writing directions.

    outer, centred: (n_tokens, d_model), the loss's gradient in the estimate, and centred inputs.
    encoder, decoder, bias: the tensor and Adam's two moments of it, which are overwritten.
    """
    n_features = len(bias[0])
    entries = _by_feature(active, inner, n_features)
    numbers = Rates(*(active.value.dtype.type(number) for number in rates))
    tensors = [Moments(*(part.numpy() for part in one)) for one in (encoder, decoder, bias)]
    around = outer.numpy(), centred.numpy()
    share_out(n_features, get_num_threads(), lambda first, last: _features(
        first, last, entries, *around, *tensors, numbers))


# --- kernels -------------------------------------------------------------------------------------


@_fast
def _tokens(first, last, active, decoder, y, scale, residual, outer, penalty, inner):  # type: ignore[no-untyped-def]
    start, feature, value = active.start, active.feature, active.value
    d = y.shape[1]
    for t in range(first, last):
        for e in range(start[t], start[t + 1]):
            row, v = decoder[feature[e]], value[e]
            for j in range(d):
                residual[t, j] += v * row[j]
        for j in range(d):
            residual[t, j] -= y[t, j]
            outer[t, j] = residual[t, j] * scale[t]
        for e in range(start[t], start[t + 1]):
            row = decoder[feature[e]]
            total = penalty
            for j in range(d):
                total += outer[t, j] * row[j]
            inner[e] = total


@_fast
def _by_feature(active, inner, n_features):  # type: ignore[no-untyped-def]
    """The active entries, feature by feature."""
    start, feature = active.start, active.feature
    begin = np.zeros(n_features + 1, np.int64)
    for e in range(len(feature)):
        begin[feature[e] + 1] += 1
    for f in range(n_features):
        begin[f + 1] += begin[f]
    at = begin[:-1].copy()
    token = np.empty(len(feature), np.int32)
    value, gradient = np.empty_like(active.value), np.empty_like(inner)
    for t in range(len(start) - 1):
        for e in range(start[t], start[t + 1]):
            f = feature[e]
            token[at[f]], value[at[f]], gradient[at[f]] = t, active.value[e], inner[e]
            at[f] += 1
    return Entries(begin, token, value, gradient)


@_fast
def _features(first, last, entries, outer, centred, encoder, decoder, biases, rates):  # type: ignore[no-untyped-def]
    start, token, value, inner = entries
    enc, enc_mean, enc_square = encoder
    dec, dec_mean, dec_square = decoder
    bias, bias_mean, bias_square = biases
    rate, spread, beta1, beta2, epsilon = rates
    d = enc.shape[1]
    for_enc, for_dec = np.empty(d, enc.dtype), np.empty(d, enc.dtype)
    zero, one = enc.dtype.type(0), enc.dtype.type(1)
    for f in range(first, last):
        for_enc[:], for_dec[:], for_bias = zero, zero, zero
        for i in range(start[f], start[f + 1]):
            t, v, g = token[i], value[i], inner[i]
            for_bias += g
            for j in range(d):
                for_dec[j] += v * outer[t, j]
                for_enc[j] += g * centred[t, j]
        along = zero
        for j in range(d):
            along += for_dec[j] * dec[f, j]
        norm = zero
        for j in range(d):
            g = for_enc[j]
            enc_mean[f, j] += (g - enc_mean[f, j]) * (one - beta1)
            enc_square[f, j] = enc_square[f, j] * beta2 + g * g * (one - beta2)
            enc[f, j] -= rate * enc_mean[f, j] / (np.sqrt(enc_square[f, j]) * spread + epsilon)
        for j in range(d):
            g = for_dec[j] - dec[f, j] * along
            dec_mean[f, j] += (g - dec_mean[f, j]) * (one - beta1)
            dec_square[f, j] = dec_square[f, j] * beta2 + g * g * (one - beta2)
            dec[f, j] -= rate * dec_mean[f, j] / (np.sqrt(dec_square[f, j]) * spread + epsilon)
            norm += dec[f, j] * dec[f, j]
        norm = max(np.sqrt(norm), enc.dtype.type(1e-8))
        for j in range(d):
            dec[f, j] /= norm
        bias_mean[f] += (for_bias - bias_mean[f]) * (one - beta1)
        bias_square[f] = bias_square[f] * beta2 + for_bias * for_bias * (one - beta2)
        bias[f] -= rate * bias_mean[f] / (np.sqrt(bias_square[f]) * spread + epsilon)
