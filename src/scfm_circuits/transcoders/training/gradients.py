"""One optimizer step of a stack of transcoders, with the gradient written out.

1. Forward: pre-activations, activations z, estimate: two products.
2. The loss and its gradient in the estimate.
3. Backward: W_dec's gradient, z's, W_enc's: three products. Nothing is differentiated in x.
4. Adam, with writing directions kept at norm 1.

The five products are the step's cost (2 x 5 n_tokens n_features d_model operations a layer);
everything else is passes over what they made, as few as there can be. With a graph recorded by
autograd there would be about twice as many, and as many more large tensors. `optimizer` puts the
parts together.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from scfm_circuits import InputError
from scfm_circuits.transcoders.activations import ACTIVATIONS
from scfm_circuits.transcoders.transcoder import Variant

if TYPE_CHECKING:
    from scfm_circuits.transcoders.active_entries import Active

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Adam's."""


class Objective(NamedTuple):
    """What is minimised: `loss` by name (see `transcoder_losses`), and the penalty's weight."""

    loss: str
    l1_coefficient: float | Tensor


class Losses(NamedTuple):
    """Parts of the loss per layer, each (n_layers,): what is minimised is their sum."""

    reconstruction: Tensor
    sparsity: Tensor


class Measures(NamedTuple):
    """What a step found out on its batch.

    losses: see `Losses`. fired: (n_layers, n_features) bool, active on any token. l0, fvu:
    (n_layers,) mean number of active features, fraction of the outputs' variance unexplained.
    smallest: (n_layers,) smallest activation above 0, for `batchtopk`; else 0. residual:
    (n_layers, n_tokens, d_model) estimate minus output.
    """

    losses: Losses
    fired: Tensor
    l0: Tensor
    fvu: Tensor
    smallest: Tensor
    residual: Tensor


def check_loss(name: str) -> None:
    """InputError for a loss that is not known."""
    if name not in ("normalized", "equation4"):
        raise InputError(f"There is no loss {name!r}; known are normalized and equation4.")


def token_weights(name: str, y: Tensor) -> Tensor | float:
    """What a token's squared error is multiplied by: (n_layers, n_tokens, 1), or 1."""
    if name == "equation4":
        return 1.0
    return 1 / (y.norm(dim=-1, keepdim=True).clamp_min(1e-6) * y.shape[-1])


def transcoder_losses(name: str, l1_coefficient: float, y: Tensor, estimate: Tensor, z: Tensor
                      ) -> Losses:
    """The two losses by name, as means over tokens.

    `equation4` (paper): ||y_hat - y||^2 + lambda ||z||_1.
    `normalized` (the code the paper's settings come from): ||y_hat - y||^2 / (d ||y||)
    + lambda ||z||_1, so the same lambda weighs d ||y|| times more, a thousandfold at d = 1024.

    y, estimate: (n_layers, n_tokens, d_model); z: (n_layers, n_tokens, n_features), nonnegative.
    """
    check_loss(name)
    squared = (estimate - y).square().sum(dim=-1, keepdim=True) * token_weights(name, y)
    return Losses(squared.mean(dim=(1, 2)), l1_coefficient * z.sum(dim=-1).mean(dim=-1))


# --- forward and backward ------------------------------------------------------------------------


class Forward(NamedTuple):
    """What a batch is encoded to: centred inputs, pre-activations, and activations z.

    centred: (n_layers, n_tokens, d_model); pre, z: (n_layers, n_tokens, n_features), which may be
    one and the same tensor.
    """

    centred: Tensor
    pre: Tensor
    z: Tensor


def forward(weights: dict[str, Tensor], variant: Variant, x: Tensor) -> Forward:
    """Activations of inputs x (n_layers, n_tokens, d_model), in the type of x."""
    kind = x.dtype
    centred = x - weights["b_in"].to(kind)[:, None]
    pre = torch.baddbmm(weights["b_enc"].to(kind)[:, None], centred, weights["W_enc"].to(kind).mT)
    return Forward(centred, pre, ACTIVATIONS[variant.activation].in_training(
        pre, variant.k, weights.get("log_threshold")))


def gradients(weights: dict[str, Tensor], variant: Variant, objective: Objective, x: Tensor,
              y: Tensor, measured: bool = True) -> tuple[dict[str, Tensor], Measures]:
    """The loss's gradient in each trained tensor, and what was found out on the way.

    weights: the tensors of `Transcoders` for some layers, by name. x, y: (n_layers, n_tokens,
    d_model). Products are computed in the type of x, sums of them and everything else in the type
    of the weights. The penalty is lambda times the mean over tokens of ||z||_1 (ReLU), of L0
    (JumpReLU: its gradient reaches the thresholds through a window of width `BANDWIDTH`), or
    nothing, where k says how many features are active. measured: whether `l0`, `fvu` and the
    losses are wanted, which takes passes over z and y; without it they are 0.
    """
    return backward(weights, variant, objective, forward(weights, variant, x), y, measured)


def backward(weights: dict[str, Tensor], variant: Variant, objective: Objective, encoded: Forward,
             y: Tensor, measured: bool) -> tuple[dict[str, Tensor], Measures]:
    """`gradients` from what `forward` gave."""
    centred, pre, z = encoded
    kind, full, n = z.dtype, weights["b_enc"].dtype, z.shape[1]
    activation = ACTIVATIONS[variant.activation]
    decoder = weights["W_dec"].to(kind)
    estimate = torch.baddbmm(weights["b_dec"].to(kind)[:, None], z, decoder)
    if variant.skip:
        estimate = estimate.baddbmm(centred, weights["W_skip"].to(kind).mT)
    y = y.to(full)
    residual = estimate.to(full) - y
    scale = token_weights(objective.loss, y)
    outer = (residual * (2 / n * scale)).to(kind)

    found = {"W_dec": torch.bmm(z.mT, outer), "b_dec": outer.sum(dim=1, dtype=full)}
    if variant.skip:
        found["W_skip"] = torch.bmm(outer.mT, centred)
    inner = torch.bmm(outer, decoder.mT)
    weight = torch.as_tensor(objective.l1_coefficient, device=z.device, dtype=full)
    if activation.penalised == "l1":
        inner = inner.add_((weight / n).to(kind))
    if activation.threshold == "trained":
        found["log_threshold"] = activation.threshold_gradient(
            inner, pre, weights["log_threshold"], weight / n)
    # ReLU's derivative, which is also that of the other activations: z is 0 where they cut.
    inner = torch.ops.aten.threshold_backward(inner, z, 0)
    found["W_enc"] = torch.bmm(inner.mT, centred)
    found["b_enc"] = inner.sum(dim=1, dtype=full)
    return found, measure(z, residual, y, scale, variant, weight, measured)


def measure(z: Tensor, residual: Tensor, y: Tensor, scale: Tensor | float, variant: Variant,
            weight: Tensor, measured: bool) -> Measures:
    """Which features fired, and the other measures if they are wanted."""
    n, totals = z.shape[1], z.sum(dim=1, dtype=weight.dtype)
    smallest = totals.new_zeros(len(totals))
    if ACTIVATIONS[variant.activation].threshold == "followed":
        smallest = torch.where(z > 0, z, torch.inf).amin(dim=(1, 2)).to(weight.dtype)
    found = unmeasured(totals > 0, smallest, residual)
    if not measured:
        return found
    l0 = (z > 0).sum(dim=(1, 2)).to(weight.dtype) / n
    return with_losses(found, y, scale, variant, weight, l0, totals.sum(dim=1) / n)


def sparse_measures(active: "Active", residual: Tensor, y: Tensor, scale: Tensor,
                    variant: Variant, weight: Tensor, n_features: int, measured: bool) -> Measures:
    """`measure` of one layer from its active entries."""
    n, value = y.shape[1], torch.from_numpy(active.value)
    fired = torch.zeros(1, n_features, dtype=torch.bool)
    fired[0, torch.from_numpy(active.feature).long()] = True
    smallest = value.new_zeros(1)
    if ACTIVATIONS[variant.activation].threshold == "followed" and len(value):
        smallest = value.min()[None]
    found = unmeasured(fired, smallest, residual)
    if not measured:
        return found
    l0 = value.new_full((1,), len(value) / n)
    return with_losses(found, y, scale, variant, weight, l0, value.sum()[None] / n)


def unmeasured(fired: Tensor, smallest: Tensor, residual: Tensor) -> Measures:
    """Measures of a step whose losses, L0 and FVU are not wanted: they are 0."""
    none = torch.zeros_like(smallest)
    return Measures(Losses(none, none), fired, none, none, smallest, residual)


def with_losses(found: Measures, y: Tensor, scale: Tensor | float, variant: Variant,
                weight: Tensor, l0: Tensor, l1: Tensor) -> Measures:
    """Measures with their losses, L0 and FVU; l0, l1: (n_layers,) means over tokens."""
    squared = found.residual.square().sum(dim=-1, keepdim=True)
    penalty = ACTIVATIONS[variant.activation].penalty(l0, l1)
    variance = (y - y.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
    fvu = squared.sum(dim=(1, 2)) / variance.clamp_min(1e-12)
    losses = Losses((squared * scale).mean(dim=(1, 2)), weight * penalty)
    # Made anew: compilers of torch before 2.13 fail on a `_replace`.
    return Measures(losses, found.fired, l0, fvu, found.smallest, found.residual)


def follow_threshold(log_threshold: Tensor, smallest: Tensor, rate: float = 0.05) -> None:
    """Move `batchtopk`'s thresholds (n_layers, n_features) towards a batch's smallest activation.

    smallest: (n_layers,) smallest z that the batch kept; what is averaged is its logarithm. Where
    it is 0 or infinite nothing was active, and the threshold stays.
    """
    known = smallest.isfinite() & (smallest > 0)
    wanted = torch.where(known, smallest, log_threshold[:, 0].exp())
    log_threshold.lerp_(wanted.log()[:, None].expand_as(log_threshold), rate)


# --- Adam ----------------------------------------------------------------------------------------


def without_parallel(gradient: Tensor, weight: Tensor) -> Tensor:
    """A gradient of unit rows without what would only change their norms; overwrites it."""
    along = torch.linalg.vecdot(gradient, weight)[..., None]
    return gradient.addcmul_(weight, along, value=-1)


def corrected(rate: float, number: int) -> tuple[float, float]:
    """(rate, spread) of step `number`, from 1: Adam's corrections for moments that began at 0.

    The learning rate over 1 - beta_1^number, and 1 over the root of 1 - beta_2^number.
    """
    return rate / (1 - BETAS[0] ** number), (1 - BETAS[1] ** number) ** -0.5


def adam_rows(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: Tensor,
              spread: Tensor, unit: bool) -> bool:
    """Adam on some rows in plain operations, for a compiler to fuse into one pass over them.

    rate, spread: scalar tensors, see `corrected`. unit: whether the rows are kept at norm 1.
    Returns True: it was done.
    """
    gradient = gradient.to(weight.dtype)
    if unit:
        gradient = gradient - weight * (gradient * weight).sum(dim=-1, keepdim=True)
    new_mean = mean + (gradient - mean) * (1 - BETAS[0])
    new_square = square * BETAS[1] + gradient * gradient * (1 - BETAS[1])
    moved = weight - rate * new_mean / (new_square.sqrt() * spread + EPSILON)
    if unit:
        moved = moved / moved.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    mean.copy_(new_mean)
    square.copy_(new_square)
    weight.copy_(moved)
    return True
