"""A step's work on a GPU over active entries: where few features are active, as late in a training.

Of the five products only the first is made. The others would multiply by 0 nearly everywhere: with
50 of 8,192 features active, they cost more than going over the entries, and what is known feature
by feature need not be written down to be read again. Four kernels:

1. `_of_tokens`, `_of_features`: which features each token has, and which tokens each feature has.
2. `_token`: a token's estimate, residual, the loss's gradient in the estimate, and from this the
   gradient in its active activations.
3. `_feature`: a feature's gradients in both directions, and Adam on both at once.

Entries are taken in one order, so a step gives the same numbers again. There is room for all of
them, so any number of active features is right; many are slower than products. Written in Triton,
as `gpu_gradients`. Imports neither scanpy nor gseapy, so it runs on a bare GPU machine.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from scfm_circuits.transcoders.training.gradients import BETAS, EPSILON

SEGMENTS = 4
"""Parts of a batch's tokens in which a feature's are counted at once; `_feature` knows there are 4.
"""
# These were the fastest of seven each on an H200, at the paper's size; 8 warps took several times
# as long, and asking for a feature's weights before its entries are gone over a tenth longer.
TOKEN_ROWS, TOKEN_WARPS = 4, 2
"""Rows of the decoder that a token takes at once, and by how many warps."""
FEATURE_ROWS, FEATURE_WARPS = 2, 4
"""Tokens that a feature takes at once, and by how many warps."""


class Entries(NamedTuple):
    """Where z (n_layers, n_tokens, n_features) is positive; integers.

    features: (n_layers, n_tokens, n_features), each token's in order, `of_token` (n_layers,
    n_tokens) of them. tokens: (n_layers, n_features, SEGMENTS, n_tokens / SEGMENTS or more), each
    feature's in order, `of_feature` (n_layers, n_features, SEGMENTS) of them in each segment. What
    stands behind is not set.
    """

    features: Tensor
    of_token: Tensor
    tokens: Tensor
    of_feature: Tensor


def entries(z: Tensor) -> Entries:
    """The active entries of z, contiguous and not negative; what is not a number counts."""
    n_layers, n, n_features = z.shape
    length = -(-n // SEGMENTS)
    segments = n_layers, n_features, SEGMENTS
    found = Entries(
        z.new_empty(z.shape, dtype=_index(n_features)),
        z.new_empty((n_layers, n), dtype=torch.int32),
        z.new_empty((*segments, length), dtype=_index(n)),
        z.new_empty(segments, dtype=torch.int32))
    _of_tokens[(n_layers * n,)](z, found.features, found.of_token, n_features, 256)
    _of_features[(triton.cdiv(n_features, 256), SEGMENTS, n_layers)](
        z, found.tokens, found.of_feature, n, n_features, length, 16, 256, num_warps=1)
    return found


def _index(n: int) -> torch.dtype:
    """The smallest type that holds numbers below n."""
    return torch.int16 if n <= 2**15 else torch.int32


def estimated(z: Tensor, found: Entries, decoder: Tensor, base: Tensor, y: Tensor,
              normalized: bool, penalty: float) -> tuple[Tensor, Tensor, Tensor]:
    """(residual, outer, inner): what is missed, and the loss's gradients in estimate and z.

    decoder: (n_layers, n_features, d_model) in z's type. base: what estimates begin with,
    (n_layers, d_model), or (n_layers, n_tokens, d_model) if each token has its own. y: (n_layers,
    n_tokens, d_model). penalty: added to the gradient in active z. residual is float32, the rest of
    z's type; inner, of z's shape, is set where z is active and nowhere else.
    """
    n_layers, n, n_features = z.shape
    width = decoder.shape[-1]
    residual = torch.empty((n_layers, n, width), device=z.device, dtype=torch.float32)
    outer, inner = torch.empty_like(residual, dtype=z.dtype), torch.empty_like(z)
    base, y = base.contiguous(), y.contiguous()
    own = base.dim() == 3
    _token[(n, n_layers)](
        z, found.features, found.of_token, decoder, base, y, residual, outer, inner, 2 / n,
        penalty, n, n_features, width, (n if own else 1) * width, width if own else 0, normalized,
        TOKEN_ROWS, triton.next_power_of_2(width), num_warps=TOKEN_WARPS)
    return residual, outer, inner


class Adams(NamedTuple):
    """Weights (n_layers, n_features, d_model), Adam's moments of them, and their copies."""

    weight: Tensor
    mean: Tensor
    square: Tensor
    copy: Tensor


def moved(z: Tensor, inner: Tensor, found: Entries, centred: Tensor, outer: Tensor,
          encoder: Adams, decoder: Adams, factors: tuple[float, float]) -> Tensor:
    """Adam on encoder and decoder, whose rows stay at norm 1; returns the gradient in the biases.

    centred, outer: (n_layers, n_tokens, d_model), contiguous. factors: see `gradients.corrected`.
    Returns (n_layers, n_features) in float32.
    """
    n_layers, n, n_features = z.shape
    width, bias = centred.shape[-1], torch.empty_like(found.of_feature[..., 0], dtype=torch.float32)
    copied = encoder.copy.data_ptr() != encoder.weight.data_ptr()
    _feature[(n_features, n_layers)](
        z, inner, found.tokens, found.of_feature, centred, outer, bias, *encoder, *decoder,
        *factors, n, n_features, width, found.tokens.shape[-1], *BETAS, EPSILON, copied,
        FEATURE_ROWS, triton.next_power_of_2(width), num_warps=FEATURE_WARPS)
    return bias


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _of_tokens(z, features, of_token, n_features, PIECES: tl.constexpr):  # type: ignore[no-untyped-def]
    """A token of a layer, in pieces of eight features: what is summed over is an eighth as long."""
    row = tl.program_id(0).to(tl.int64)
    before = 0
    for first in range(0, n_features, 8 * PIECES):
        at = first + 8 * tl.arange(0, PIECES)[:, None] + tl.arange(0, 8)[None, :]
        value = tl.load(z + row * n_features + at, mask=at < n_features, other=0)
        active = (value != 0).to(tl.int32)
        of_piece = tl.sum(active, 1)
        start = before + tl.cumsum(of_piece, 0) - of_piece
        place = start[:, None] + tl.cumsum(active, 1) - 1
        tl.store(features + row * n_features + place, at.to(features.dtype.element_ty),
                 mask=active > 0)
        before += tl.sum(of_piece, 0)
    tl.store(of_token + row, before)


@triton.jit
def _of_features(z, tokens, of_feature, n, n_features, length, TOKENS: tl.constexpr,  # type: ignore[no-untyped-def]
                 FEATURES: tl.constexpr):
    """Some features of a layer, over a segment of the tokens."""
    at = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    segment, layer = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n_segments = tl.num_programs(1)
    feature = (layer * n_features + at) * n_segments + segment
    before = tl.zeros((FEATURES,), tl.int32)
    for first in range(0, length, TOKENS):
        number = segment * length + first + tl.arange(0, TOKENS)
        within = ((first + tl.arange(0, TOKENS) < length) & (number < n))[:, None] & (
            at < n_features)[None, :]
        value = tl.load(z + (layer * n + number[:, None]) * n_features + at[None, :], mask=within,
                        other=0)
        active = (value != 0).to(tl.int32)
        place = before[None, :] + tl.cumsum(active, 0) - 1
        token = tl.broadcast_to(number[:, None], (TOKENS, FEATURES))
        tl.store(tokens + feature[None, :] * length + place, token.to(tokens.dtype.element_ty),
                 mask=active > 0)
        before += tl.sum(active, 0)
    tl.store(of_feature + feature, before, mask=at < n_features)


@triton.jit
def _token(z, features, of_token, decoder, base, y, residual, outer, inner, factor, penalty, n,  # type: ignore[no-untyped-def]
           n_features, width, base_layer, base_token, NORMALIZED: tl.constexpr,
           ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A token of a layer."""
    layer = tl.program_id(1).to(tl.int64)
    row = layer * n + tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    within = columns < width
    there = tl.load(of_token + row)
    estimate = tl.load(base + layer * base_layer + tl.program_id(0) * base_token + columns,
                       mask=within, other=0).to(tl.float32)
    for first in range(0, there, ROWS):
        entry = first + tl.arange(0, ROWS)
        known = entry < there
        feature = tl.load(features + row * n_features + entry, mask=known, other=0).to(tl.int64)
        value = tl.load(z + row * n_features + feature, mask=known, other=0).to(tl.float32)
        written = tl.load(decoder + (layer * n_features + feature)[:, None] * width
                          + columns[None, :], mask=known[:, None] & within[None, :], other=0)
        estimate += tl.sum(value[:, None] * written.to(tl.float32), axis=0)
    target = tl.load(y + row * width + columns, mask=within, other=0).to(tl.float32)
    missing = estimate - target
    tl.store(residual + row * width + columns, missing, mask=within)
    if NORMALIZED:
        factor = factor / (tl.maximum(tl.sqrt(tl.sum(target * target)), 1e-6) * width)
    wanted = (missing * factor).to(outer.dtype.element_ty)
    tl.store(outer + row * width + columns, wanted, mask=within)
    rounded = wanted.to(tl.float32)
    for first in range(0, there, ROWS):
        entry = first + tl.arange(0, ROWS)
        known = entry < there
        feature = tl.load(features + row * n_features + entry, mask=known, other=0).to(tl.int64)
        written = tl.load(decoder + (layer * n_features + feature)[:, None] * width
                          + columns[None, :], mask=known[:, None] & within[None, :], other=0)
        found = tl.sum(rounded[None, :] * written.to(tl.float32), axis=1) + penalty
        tl.store(inner + row * n_features + feature, found.to(inner.dtype.element_ty), mask=known)


@triton.jit
def adam_row(g, weight, mean, square, copy, at, within, rate, spread, BETA1: tl.constexpr,  # type: ignore[no-untyped-def]
             BETA2: tl.constexpr, EPS: tl.constexpr, UNIT: tl.constexpr, COPIED: tl.constexpr):
    """Adam on a row, from its gradient: weights, moments, and the weights' copy."""
    w = tl.load(weight + at, mask=within, other=0)
    m = tl.load(mean + at, mask=within, other=0)
    s = tl.load(square + at, mask=within, other=0)
    if UNIT:
        g -= w * tl.sum(g * w)
    m += (g - m) * (1 - BETA1)
    s = s * BETA2 + g * g * (1 - BETA2)
    w -= rate * m / (tl.sqrt(s) * spread + EPS)
    if UNIT:
        w = w / tl.maximum(tl.sqrt(tl.sum(w * w)), 1e-8)
    tl.store(weight + at, w, mask=within)
    tl.store(mean + at, m, mask=within)
    tl.store(square + at, s, mask=within)
    if COPIED:
        tl.store(copy + at, w.to(copy.dtype.element_ty), mask=within)


@triton.jit
def _feature(z, inner, tokens, of_feature, centred, outer, bias, e_weight, e_mean, e_square,  # type: ignore[no-untyped-def]
             e_copy, d_weight, d_mean, d_square, d_copy, rate, spread, n, n_features, width,
             length, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
             COPIED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A feature of a layer."""
    layer = tl.program_id(1).to(tl.int64)
    feature = layer * n_features + tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    within = columns < width
    first_of_1 = tl.load(of_feature + feature * 4)
    first_of_2 = first_of_1 + tl.load(of_feature + feature * 4 + 1)
    first_of_3 = first_of_2 + tl.load(of_feature + feature * 4 + 2)
    there = first_of_3 + tl.load(of_feature + feature * 4 + 3)
    e_gradient = tl.zeros((BLOCK,), tl.float32)
    d_gradient = tl.zeros((BLOCK,), tl.float32)
    b_gradient = tl.zeros((ROWS,), tl.float32)
    for first in range(0, there, ROWS):
        entry = first + tl.arange(0, ROWS)
        known = entry < there
        place = tl.where(entry >= first_of_1, entry - first_of_1 + length, entry)
        place = tl.where(entry >= first_of_2, entry - first_of_2 + 2 * length, place)
        place = tl.where(entry >= first_of_3, entry - first_of_3 + 3 * length, place)
        token = tl.load(tokens + feature * 4 * length + place, mask=known, other=0).to(tl.int64)
        row = layer * n + token
        at = row * n_features + tl.program_id(0)
        value = tl.load(z + at, mask=known, other=0).to(tl.float32)
        slope = tl.load(inner + at, mask=known, other=0).to(tl.float32)
        cells = row[:, None] * width + columns[None, :]
        shown = known[:, None] & within[None, :]
        wanted = tl.load(outer + cells, mask=shown, other=0).to(tl.float32)
        read = tl.load(centred + cells, mask=shown, other=0).to(tl.float32)
        d_gradient += tl.sum(value[:, None] * wanted, axis=0)
        e_gradient += tl.sum(slope[:, None] * read, axis=0)
        b_gradient += slope
    tl.store(bias + feature, tl.sum(b_gradient, axis=0))
    at = feature * width + columns
    adam_row(d_gradient, d_weight, d_mean, d_square, d_copy, at, within, rate, spread, BETA1, BETA2,
             EPS, True, COPIED)
    adam_row(e_gradient, e_weight, e_mean, e_square, e_copy, at, within, rate, spread, BETA1, BETA2,
             EPS, False, COPIED)
