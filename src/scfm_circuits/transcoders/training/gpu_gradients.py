"""A step's work on a GPU, in as few passes over memory as can be.

Between the products stand three kernels, each of which reads and writes its tensors once:

1. `error`: the residual, and the loss's gradient in the estimate.
2. `cut`: the gradient in the activations, 0 where they are 0; its sums, and how often each fired.
3. `adam`: Adam on rows, which may be kept at norm 1, and the weights' copies in the products' type,
   so that no step begins by making them.

The first product adds the bias and cuts at 0 itself (cublasLt). Adam can run beside the products of
other layers: it needs the memory, they the tensor cores. On a few of the multiprocessors it is as
fast as the products leave it time.

Written in Triton, which comes with PyTorch for a GPU; without it `stepper` does without.
Imports neither scanpy nor gseapy, so it runs on a bare GPU machine.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from scfm_circuits.transcoders.activations import keep_largest
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

ACTIVATIONS = ("relu", "topk")
"""Those whose steps can be taken so; the gradient reaches the others' thresholds too."""
WIDE = ("W_enc", "W_dec", "W_skip")
"""The tensors that products read."""
_FLAT = 1024
"""Numbers that a program of `adam` takes at once of a tensor whose rows do not matter."""

Update = Callable[[str, Tensor], None]
"""What is done with the gradient of a trained tensor, by name."""


class GpuStep:
    """Takes steps of some layers of `trained`, of which it keeps copies in the products' type.

    trained, mean, square: the trained tensors and Adam's moments of them by name, float32.
    precision: type of the products. beside: programs of Adam that run beside the products of the
    layers that follow, in a stream of their own; 0: after their own, with the whole GPU.
    Raises what the compiler raises if it cannot.
    """

    def __init__(self, trained: dict[str, Tensor], mean: dict[str, Tensor],
                 square: dict[str, Tensor], precision: torch.dtype, beside: int = 0) -> None:
        self.trained, self.mean, self.square, self.beside = trained, mean, square, beside
        self.copies = {name: trained[name] if precision == trained[name].dtype else
                       torch.empty_like(trained[name], dtype=precision)
                       for name in WIDE if name in trained}
        self._seen: dict[str, int] = {}
        device = trained["W_enc"].device
        self._side = torch.cuda.Stream(device, priority=-1) if beside else None
        _try(precision, trained["W_enc"].shape[-1], device)

    @contextlib.contextmanager
    def copied(self) -> Iterator[None]:
        """A block of steps: at its begin the copies are what the weights are; at its end all is
        done, for what is then given to the GPU."""
        for name, copy in self.copies.items():
            # In-place operations count themselves; our kernel does not, and copies as it writes.
            version = self.trained[name]._version
            if copy is not self.trained[name] and self._seen.get(name) != version:
                copy.copy_(self.trained[name])
                self._seen[name] = version
        yield
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)

    def step(self, layers: slice, weights: dict[str, Tensor], variant: Variant,
             objective: Objective, x: Tensor, y: Tensor, numbers: tuple[float, int],
             measured: bool) -> Measures:
        """A step of some layers, whose tensors are `weights`; numbers: learning rate, step from 1.

        The rest is as for `training_step.gradients`, and so is what is measured.
        """
        factors = corrected(*numbers)
        return gradients(weights, {name: copy[layers] for name, copy in self.copies.items()},
                         variant, objective, x, y, measured,
                         lambda name, gradient: self._update(layers, name, gradient, factors))

    def _update(self, layers: slice, name: str, gradient: Tensor, factors: tuple[float, float]
                ) -> None:
        copy = self.copies.get(name, self.trained[name])
        weight, mean, square, copy = (store[layers] for store in (
            self.trained[name], self.mean[name], self.square[name], copy))
        if self._side is None:
            adam(gradient, weight, mean, square, copy, factors, name == "W_dec")
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            adam(gradient, weight, mean, square, copy, factors, name == "W_dec", self.beside)
        gradient.record_stream(self._side)


def gradients(weights: dict[str, Tensor], copies: dict[str, Tensor], variant: Variant,
              objective: Objective, x: Tensor, y: Tensor, measured: bool, update: Update
              ) -> Measures:
    """As `training_step.gradients`, but each gradient is handed to `update` when it is there.

    `update` may change the tensor at once: no later part reads it.
    """
    kind, full, n = x.dtype, weights["b_enc"].dtype, x.shape[1]
    centred = x - weights["b_in"].to(kind)[:, None]
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
    penalty = float(objective.l1_coefficient) / n if variant.activation == "relu" else 0.0
    sums, counts = cut(inner, z, penalty)
    update("W_enc", torch.bmm(inner.mT, centred))
    update("b_enc", sums)
    if not measured:
        return unmeasured(counts > 0, sums.new_zeros(len(sums)), residual)
    y = y.to(full)
    weight = torch.full((), float(objective.l1_coefficient), device=y.device, dtype=full)
    return measure(z, residual, y, token_weights(objective.loss, y), variant, weight, True)


def encoded(centred: Tensor, encoder: Tensor, bias: Tensor, variant: Variant) -> Tensor:
    """Activations (n_layers, n_tokens, n_features) of centred inputs; all in one type.

    Bias and ReLU belong to the product, which is made layer by layer: only so can it have them.
    """
    z = centred.new_empty((*centred.shape[:2], encoder.shape[1]))
    for layer in range(len(z)):
        torch.ops.aten._addmm_activation.out(bias[layer], centred[layer], encoder[layer].mT,
                                             out=z[layer])
    return z if variant.activation == "relu" else keep_largest(z, variant.k)


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
         factors: tuple[float, float], unit: bool, programs: int | None = None) -> None:
    """`training_step.adam_rows`; and the weight's copy, which may be the weight itself.

    All of one shape, contiguous. factors: see `training_step.corrected`. programs: how many share
    the rows; None: one for each.
    """
    width = weight.shape[-1] if unit else _FLAT
    rows = triton.cdiv(weight.numel(), width)
    _adam[(min(rows, programs or rows),)](
        gradient.contiguous(), weight, mean, square, copy, *factors, rows, width,
        weight.numel(), *BETAS, EPSILON, unit, copy.data_ptr() != weight.data_ptr(),
        triton.next_power_of_2(width))


def _try(precision: torch.dtype, width: int, device: torch.device) -> None:
    """Compile the kernels, on a few numbers."""
    z = torch.ones((1, 16, 16), device=device, dtype=precision)
    wide = torch.ones((1, 16, width), device=device, dtype=precision)
    cut(z.clone(), z, 0.5)
    error(wide.clone(), wide, True)
    weight, mean, square = torch.ones((3, 1, 16, width), device=device)
    for unit in (False, True):
        adam(wide, weight, mean, square, wide.clone(), (0.5, 0.5), unit)


# --- kernels -------------------------------------------------------------------------------------


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
def _adam(gradient, weight, mean, square, copy, rate, spread, rows, width, size,  # type: ignore[no-untyped-def]
          BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, UNIT: tl.constexpr,
          COPIED: tl.constexpr, BLOCK: tl.constexpr):
    """Every so manieth row."""
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * width + columns
        within = (columns < width) & (at < size)
        g = tl.load(gradient + at, mask=within, other=0).to(tl.float32)
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
        tl.store(mean + at, m, mask=within)
        tl.store(square + at, s, mask=within)
        tl.store(weight + at, w, mask=within)
        if COPIED:
            tl.store(copy + at, w.to(copy.dtype.element_ty), mask=within)
