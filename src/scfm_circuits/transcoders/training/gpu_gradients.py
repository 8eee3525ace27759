"""A step's work on a GPU, in as few passes over memory as can be.

Between the products stand four kernels, each of which reads and writes its tensors once:

1. `rows`: a batch's tokens out of the buffer, of all layers; and the inputs less their mean.
2. `error`: the residual, and the loss's gradient in the estimate.
3. `cut`: the gradient in the activations, 0 where they are 0; its sums, and how often each fired.
4. `adam`: Adam on rows, which may be kept at norm 1, and the weights' copies in the products' type,
   so that no step begins by making them.

The first product adds the bias and cuts at 0 itself (cublasLt). All layers pass together. In
groups, with Adam of one group beside the products of the next in a stream of its own, a step took
longer on an H200 (10.0 to 11.6 ms, not 9.8): the products leave Adam no multiprocessor to run on.
Where few features are active, only that product is made, and `gpu_entries` does the rest.

Written in Triton, which comes with PyTorch for a GPU; without it `optimizer` does without.
Imports neither scanpy nor gseapy, so it runs on a bare GPU machine.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from scfm_circuits.transcoders.activations import ACTIVATIONS
from scfm_circuits.transcoders.training.gpu_entries import (
    Adams,
    adam_row,
    entries,
    estimated,
    moved,
)
from scfm_circuits.transcoders.training.gradients import (
    BETAS,
    EPSILON,
    Measures,
    Objective,
    corrected,
    measure,
    token_weights,
    unmeasured,
)
from scfm_circuits.transcoders.transcoder import Variant

WIDE = ("W_enc", "W_dec", "W_skip")
"""The tensors that products read."""
_FLAT = 1024
"""Numbers that a program of `adam` takes of a tensor whose rows do not matter."""

FEW = 1 / 96
"""Share of features active on a token up to which going over them takes less time than products: on
an H200, of 8,192, with 50 active 7.4 ms against 9.1 a step, with 100 active 9.7 against 9.1."""

Update = Callable[[str, Tensor], None]
"""What is done with the gradient of a trained tensor, by name."""


class GpuSteps:
    """Takes steps of some layers of `trained`, of which it keeps copies in the products' type.

    trained, mean, square: the trained tensors and Adam's moments of them by name, float32. variant:
    one whose activation has no thresholds; a gradient reaches those too. precision: type of the
    products. Raises what the compiler raises if it cannot.
    """

    def __init__(self, trained: dict[str, Tensor], mean: dict[str, Tensor],
                 square: dict[str, Tensor], variant: Variant, precision: torch.dtype) -> None:
        self.trained, self.mean, self.square, self.variant = trained, mean, square, variant
        self.copies = {name: trained[name] if precision == trained[name].dtype else
                       torch.empty_like(trained[name], dtype=precision)
                       for name in WIDE if name in trained}
        self._seen: dict[str, int] = {}
        self.few = False
        _try(precision, trained["W_enc"].shape[-1], trained["W_enc"].device)

    def copy(self) -> None:
        """Make the copies what the weights are, where these were changed elsewhere."""
        for name, copy in self.copies.items():
            # In-place operations count themselves; our kernel does not, and copies as it writes.
            version = self.trained[name]._version
            if copy is not self.trained[name] and self._seen.get(name) != version:
                copy.copy_(self.trained[name])
                self._seen[name] = version

    def take(self, part: Tensor, chosen: Tensor) -> Tensor:
        """See `activation_buffer.taken`."""
        return rows(part, chosen)

    def step(self, layers: slice, weights: dict[str, Tensor], objective: Objective, x: Tensor,
             y: Tensor, numbers: tuple[float, int], measured: bool) -> Measures:
        """See `optimizer.DenseSteps.step`."""
        self.copy()
        given = weights, {name: copy[layers] for name, copy in self.copies.items()}, objective
        factors = corrected(*numbers)
        if self.few:
            return self._by_entries(layers, *given, x, y, factors, measured)
        return gradients(*given[:2], self.variant, objective, x, y, measured,
                         lambda name, gradient: self._update(layers, name, gradient, factors))

    def expect(self, active: float) -> None:
        """How many features are active on a token, as last measured: what steps go over."""
        self.few = active <= FEW * self.trained["W_enc"].shape[1]

    def _by_entries(self, layers: slice, weights: dict[str, Tensor], copies: dict[str, Tensor],
                    objective: Objective, x: Tensor, y: Tensor, factors: tuple[float, float],
                    measured: bool) -> Measures:
        """A step as `gradients` makes it, over active entries."""
        kind, full, n = x.dtype, weights["b_enc"].dtype, x.shape[1]
        centred = rows(x, less=weights["b_in"].to(kind))
        z = encoded(centred, copies["W_enc"], weights["b_enc"].to(kind), self.variant)
        found, base = entries(z), weights["b_dec"].to(kind)
        if self.variant.skip:
            base = torch.baddbmm(base[:, None], centred, copies["W_skip"].mT)
        residual, outer, inner = estimated(
            z, found, copies["W_dec"], base, y, objective.loss == "normalized",
            _penalty(self.variant, objective, n))
        encoder, decoder = (Adams(*(store[name][layers] for store in (
            self.trained, self.mean, self.square, self.copies))) for name in ("W_enc", "W_dec"))
        sums = moved(z, inner, found, centred, outer, encoder, decoder, factors)
        self._update(layers, "b_dec", outer.sum(dim=1, dtype=full), factors)
        self._update(layers, "b_enc", sums, factors)
        if self.variant.skip:
            self._update(layers, "W_skip", torch.bmm(outer.mT, centred), factors)
        fired = found.of_feature.sum(dim=-1) > 0
        return _measures(z, residual, fired, y, self.variant, objective, measured)

    def _update(self, layers: slice, name: str, gradient: Tensor, factors: tuple[float, float]
                ) -> None:
        copy = self.copies.get(name, self.trained[name])
        weight, mean, square, copy = (store[layers] for store in (
            self.trained[name], self.mean[name], self.square[name], copy))
        adam(gradient, weight, mean, square, copy, factors, name == "W_dec")


def gradients(weights: dict[str, Tensor], copies: dict[str, Tensor], variant: Variant,
              objective: Objective, x: Tensor, y: Tensor, measured: bool, update: Update
              ) -> Measures:
    """As `gradients.gradients`, but each gradient is handed to `update` when it is there.

    `update` may change the tensor at once: no later part reads it.
    """
    kind, full, n = x.dtype, weights["b_enc"].dtype, x.shape[1]
    centred = rows(x, less=weights["b_in"].to(kind))
    z = encoded(centred, copies["W_enc"], weights["b_enc"].to(kind), variant)
    estimate = torch.baddbmm(weights["b_dec"].to(kind)[:, None], z, copies["W_dec"])
    if variant.skip:
        estimate = estimate.baddbmm_(centred, copies["W_skip"].mT)
    residual, outer = error(estimate, y, objective.loss == "normalized")
    inner = torch.bmm(outer, copies["W_dec"].mT)
    update("W_dec", torch.bmm(z.mT, outer))
    update("b_dec", outer.sum(dim=1, dtype=full))
    if variant.skip:
        update("W_skip", torch.bmm(outer.mT, centred))
    sums, counts = cut(inner, z, _penalty(variant, objective, n))
    update("W_enc", torch.bmm(inner.mT, centred))
    update("b_enc", sums)
    return _measures(z, residual, counts > 0, y, variant, objective, measured)


def _penalty(variant: Variant, objective: Objective, n: int) -> float:
    """What the penalty adds to the gradient in an active activation, of n tokens."""
    penalised = ACTIVATIONS[variant.activation].penalised
    return float(objective.l1_coefficient) / n if penalised == "l1" else 0.0


def _measures(z: Tensor, residual: Tensor, fired: Tensor, y: Tensor, variant: Variant,
              objective: Objective, measured: bool) -> Measures:
    """Which features fired, and the other measures if they are wanted."""
    if not measured:
        return unmeasured(fired, residual.new_zeros(len(residual)), residual)
    y = y.to(residual.dtype)
    weight = residual.new_full((), float(objective.l1_coefficient))
    return measure(z, residual, y, token_weights(objective.loss, y), variant, weight, True)


def rows(source: Tensor, chosen: Tensor | None = None, less: Tensor | None = None) -> Tensor:
    """`source[:, chosen]` (all tokens if None), less `less`; in the type of the source.

    source: (n_layers, n_tokens, d_model), whose tokens are contiguous. chosen: (n,) which tokens.
    less: (n_layers, d_model).
    """
    n_layers, n, width = source.shape
    n = n if chosen is None else len(chosen)
    out = torch.empty((n_layers, n, width), device=source.device, dtype=source.dtype)
    source = source if source.stride()[1:] == (width, 1) else source.contiguous()
    _rows[(n, n_layers)](source, out if chosen is None else chosen, out if less is None else less,
                         out, source.stride(0), n, width, chosen is not None, less is not None,
                         triton.next_power_of_2(width))
    return out


def encoded(centred: Tensor, encoder: Tensor, bias: Tensor, variant: Variant) -> Tensor:
    """Activations (n_layers, n_tokens, n_features) of centred inputs; all in one type.

    Bias and ReLU belong to the product, which is made layer by layer: only so can it have them.
    """
    z = centred.new_empty((*centred.shape[:2], encoder.shape[1]))
    for layer in range(len(z)):
        torch.ops.aten._addmm_activation.out(bias[layer], centred[layer], encoder[layer].mT,
                                             out=z[layer])
    return ACTIVATIONS[variant.activation].select(z, variant.k)


def error(estimate: Tensor, y: Tensor, normalized: bool) -> tuple[Tensor, Tensor]:
    """(residual, outer): estimate minus y in float32, and the loss's gradient in the estimate.

    estimate, y: (n_layers, n_tokens, d_model), contiguous. outer takes the estimate's place.
    """
    residual = torch.empty_like(estimate, dtype=torch.float32)
    n, width = estimate.shape[1:]
    _error[(estimate.shape[0] * n,)](estimate, y.contiguous(), residual, 2 / n, width,
                                     normalized, triton.next_power_of_2(width))
    return residual, estimate


def cut(inner: Tensor, z: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Add the penalty to the gradient `inner` in z, and set it to 0 where z is; in place.

    inner, z: (n_layers, n_tokens, n_features), contiguous. Returns its sums over tokens in float32
    and how many tokens each feature is active on: (n_layers, n_features) each.
    """
    n_layers, n, n_features = z.shape
    sums = torch.empty((n_layers, n_features), device=z.device, dtype=torch.float32)
    counts = torch.empty_like(sums, dtype=torch.int32)
    _cut[(triton.cdiv(n_features, 128), n_layers)](inner, z, sums, counts, penalty, n, n_features,
                                                   16, 128)
    return sums, counts


def adam(gradient: Tensor, weight: Tensor, mean: Tensor, square: Tensor, copy: Tensor,
         factors: tuple[float, float], unit: bool) -> None:
    """`gradients.adam_rows`; and the weight's copy, which may be the weight itself.

    All of one shape, contiguous. factors: see `gradients.corrected`.
    """
    width = weight.shape[-1] if unit else _FLAT
    _adam[(triton.cdiv(weight.numel(), width),)](
        gradient.contiguous(), weight, mean, square, copy, *factors, width, weight.numel(), *BETAS,
        EPSILON, unit, copy.data_ptr() != weight.data_ptr(), triton.next_power_of_2(width))


def _try(precision: torch.dtype, width: int, device: torch.device) -> None:
    """Compile the kernels, on a few numbers."""
    z = torch.ones((1, 16, 16), device=device, dtype=precision)
    wide = torch.ones((1, 16, width), device=device, dtype=precision)
    cut(z.clone(), z, 0.5)
    error(wide.clone(), wide, True)
    rows(wide, torch.arange(4, device=device))
    rows(wide, less=wide[:, 0])
    weight, mean, square = torch.ones((3, 1, 16, width), device=device)
    for unit in (False, True):
        adam(wide, weight, mean, square, wide.clone(), (0.5, 0.5), unit)


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _rows(source, chosen, less, out, layer_stride, n, width, CHOSEN: tl.constexpr,  # type: ignore[no-untyped-def]
          LESS: tl.constexpr, BLOCK: tl.constexpr):
    """A token of a layer."""
    token, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    within = columns < width
    place = token.to(tl.int64)
    if CHOSEN:
        place = tl.load(chosen + token)
    values = tl.load(source + layer * layer_stride + place * width + columns, mask=within, other=0)
    if LESS:
        mean = tl.load(less + layer * width + columns, mask=within, other=0)
        values = (values.to(tl.float32) - mean.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + (layer * n + token) * width + columns, values, mask=within)


@triton.jit
def _error(estimate, y, residual, factor, width, NORMALIZED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A token of a layer: a row."""
    columns = tl.arange(0, BLOCK)
    within = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    target = tl.load(y + at, mask=within, other=0).to(tl.float32)
    missing = tl.load(estimate + at, mask=within, other=0).to(tl.float32) - target
    tl.store(residual + at, missing, mask=within)
    if NORMALIZED:
        factor = factor / (tl.maximum(tl.sqrt(tl.sum(target * target)), 1e-6) * width)
    outer = missing * factor
    tl.store(estimate + at, outer.to(estimate.dtype.element_ty), mask=within)


@triton.jit
def _cut(inner, z, sums, counts, penalty, n, n_features, TOKENS: tl.constexpr,  # type: ignore[no-untyped-def]
         FEATURES: tl.constexpr):
    """Some features of a layer, over all tokens."""
    features = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    layer = tl.program_id(1).to(tl.int64)
    total = tl.zeros((TOKENS, FEATURES), tl.float32)
    fired = tl.zeros((TOKENS, FEATURES), tl.int32)
    for first in range(0, n, TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        at = (layer * n + tokens[:, None]) * n_features + features[None, :]
        within = (tokens < n)[:, None] & (features < n_features)[None, :]
        active = tl.load(z + at, mask=within, other=0).to(tl.float32) > 0
        gradient = tl.load(inner + at, mask=within, other=0).to(tl.float32) + penalty
        gradient = tl.where(active, gradient, 0.0)
        tl.store(inner + at, gradient.to(inner.dtype.element_ty), mask=within)
        total += gradient
        fired += active.to(tl.int32)
    out = layer * n_features + features
    tl.store(sums + out, tl.sum(total, axis=0), mask=features < n_features)
    tl.store(counts + out, tl.sum(fired, axis=0), mask=features < n_features)


@triton.jit
def _adam(gradient, weight, mean, square, copy, rate, spread, width, size,  # type: ignore[no-untyped-def]
          BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, UNIT: tl.constexpr,
          COPIED: tl.constexpr, BLOCK: tl.constexpr):
    """A row."""
    columns = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * width + columns
    within = (columns < width) & (at < size)
    g = tl.load(gradient + at, mask=within, other=0).to(tl.float32)
    adam_row(g, weight, mean, square, copy, at, within, rate, spread, BETA1, BETA2, EPS, UNIT,
             COPIED)
