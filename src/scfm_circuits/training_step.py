"""One optimizer step of a stack of transcoders, with the gradient written out.

1. Forward: pre-activations, activations z, estimate: two products.
2. The loss and its gradient in the estimate.
3. Backward: W_dec's gradient, z's, W_enc's: three products. Nothing is differentiated in x.
4. Adam, with writing directions kept at norm 1.

The five products are the step's cost (2 x 5 n_tokens n_features d_model operations a layer);
everything else is passes over what they made, as few as there can be. With a graph recorded by
autograd there would be about twice as many, and as many more large tensors.

On a CPU a step goes through the layers one at a time: the gradients of one layer are used up before
the next one's are made, so memory does not grow with depth. On a GPU all layers pass together and
each of the two functions is compiled, so that what is not a product is fused: there are then a few
dozen launches in a step whatever the number of layers, and the host never waits.
Imports neither scanpy nor gseapy, so it runs on a bare GPU machine.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam

from scfm_circuits import InputError
from scfm_circuits.transcoder import INITIAL_THRESHOLD, Transcoders, Variant, keep_largest

if TYPE_CHECKING:
    from scfm_circuits.active_features import Active

BETAS, EPSILON = (0.9, 0.999), 1e-8
BANDWIDTH = 0.05
"""Width of the window around a JumpReLU threshold in which its gradient is estimated."""


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


def _weights(name: str, y: Tensor) -> Tensor | float:
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
    squared = (estimate - y).square().sum(dim=-1, keepdim=True) * _weights(name, y)
    return Losses(squared.mean(dim=(1, 2)), l1_coefficient * z.sum(dim=-1).mean(dim=-1))


# --- forward and backward ------------------------------------------------------------------------


def _activate(pre: Tensor, variant: Variant, log_threshold: Tensor | None) -> Tensor:
    """z of pre-activations (n_layers, n_tokens, n_features), which a ReLU overwrites."""
    if variant.activation == "relu":
        return pre.relu_()
    if variant.activation == "topk":
        return keep_largest(pre.relu_(), variant.k)
    if variant.activation == "batchtopk":
        flat = pre.relu_().flatten(1)
        return keep_largest(flat, variant.k * pre.shape[1]).view_as(pre)
    assert log_threshold is not None
    return pre * (pre > log_threshold.exp().to(pre.dtype)[:, None])


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
    return Forward(centred, pre, _activate(pre, variant, weights.get("log_threshold")))


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
    decoder = weights["W_dec"].to(kind)
    estimate = torch.baddbmm(weights["b_dec"].to(kind)[:, None], z, decoder)
    if variant.skip:
        estimate = estimate.baddbmm(centred, weights["W_skip"].to(kind).mT)
    y = y.to(full)
    residual = estimate.to(full) - y
    scale = _weights(objective.loss, y)
    outer = (residual * (2 / n * scale)).to(kind)

    found = {"W_dec": torch.bmm(z.mT, outer), "b_dec": outer.sum(dim=1, dtype=full)}
    if variant.skip:
        found["W_skip"] = torch.bmm(outer.mT, centred)
    inner = torch.bmm(outer, decoder.mT)
    weight = torch.as_tensor(objective.l1_coefficient, device=z.device, dtype=full)
    if variant.activation == "relu":
        inner = inner.add_((weight / n).to(kind))
    if variant.activation == "jumprelu":
        threshold = weights["log_threshold"].exp().to(kind)
        near = (pre - threshold[:, None]).abs() < BANDWIDTH / 2
        pull = (inner * threshold[:, None] + (weight / n).to(kind)) * near
        found["log_threshold"] = -pull.sum(dim=1, dtype=full) / BANDWIDTH * threshold.to(full)
    # ReLU's derivative, which is also that of the other activations: z is 0 where they cut.
    inner = torch.ops.aten.threshold_backward(inner, z, 0)
    found["W_enc"] = torch.bmm(inner.mT, centred)
    found["b_enc"] = inner.sum(dim=1, dtype=full)
    return found, _measure(z, residual, y, scale, variant, weight, measured)


def _measure(z: Tensor, residual: Tensor, y: Tensor, scale: Tensor | float, variant: Variant,
             weight: Tensor, measured: bool) -> Measures:
    """Which features fired, and the other measures if they are wanted."""
    totals = z.sum(dim=1, dtype=weight.dtype)
    none = totals.new_zeros(len(totals))
    smallest = none
    if variant.activation == "batchtopk":
        smallest = torch.where(z > 0, z, torch.inf).amin(dim=(1, 2)).to(weight.dtype)
    if not measured:
        return Measures(Losses(none, none), totals > 0, none, none, smallest, residual)
    squared = residual.square().sum(dim=-1, keepdim=True)
    l0 = (z > 0).sum(dim=(1, 2)).to(weight.dtype) / z.shape[1]
    penalty = {"relu": totals.sum(dim=1) / z.shape[1], "jumprelu": l0}.get(
        variant.activation, none)
    variance = (y - y.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
    fvu = squared.sum(dim=(1, 2)) / variance.clamp_min(1e-12)
    losses = Losses((squared * scale).mean(dim=(1, 2)), weight * penalty)
    return Measures(losses, totals > 0, l0, fvu, smallest, residual)


def _sparse_measures(active: "Active", residual: Tensor, y: Tensor, scale: Tensor,
                     variant: Variant, objective: Objective, n_features: int, measured: bool
                     ) -> Measures:
    """`_measure` of one layer from its active entries."""
    value = torch.from_numpy(active.value)
    fired = torch.zeros(1, n_features, dtype=torch.bool)
    fired[0, torch.from_numpy(active.feature).long()] = True
    n, none = y.shape[1], value.new_zeros(1)
    smallest = none
    if variant.activation == "batchtopk" and len(value):
        smallest = value.min()[None]
    if not measured:
        return Measures(Losses(none, none), fired, none, none, smallest, residual)
    squared = residual.square().sum(dim=-1, keepdim=True)
    penalty = value.sum()[None] / n if variant.activation == "relu" else none
    variance = (y - y.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
    return Measures(
        Losses((squared * scale).mean(dim=(1, 2)), objective.l1_coefficient * penalty), fired,
        none + len(value) / n, squared.sum(dim=(1, 2)) / variance.clamp_min(1e-12), smallest,
        residual)


def follow_threshold(log_threshold: Tensor, smallest: Tensor, rate: float = 0.05) -> None:
    """Move `batchtopk`'s thresholds (n_layers, n_features) towards a batch's smallest activation.

    smallest: (n_layers,) smallest z that the batch kept; what is averaged is its logarithm. Where
    it is 0 or infinite nothing was active, and the threshold stays.
    """
    known = smallest.isfinite() & (smallest > 0)
    wanted = torch.where(known, smallest, log_threshold[:, 0].exp())
    log_threshold.lerp_(wanted.log()[:, None].expand_as(log_threshold), rate)


# --- Adam ----------------------------------------------------------------------------------------


def unit_rows(weight: Tensor) -> Tensor:
    """Each row divided by its norm, in place."""
    return weight.div_(weight.norm(dim=-1, keepdim=True).clamp_min(1e-8))


def without_parallel(gradient: Tensor, weight: Tensor) -> Tensor:
    """A gradient of unit rows without what would only change their norms; overwrites it."""
    along = torch.linalg.vecdot(gradient, weight)[..., None]
    return gradient.addcmul_(weight, along, value=-1)


def adam_rows(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: Tensor,
              spread: Tensor, unit: bool) -> bool:
    """Adam on some rows in plain operations, for a compiler to fuse into one pass over them.

    rate, spread: scalar tensors, the learning rate over 1 - beta_1^step, and 1 over the root of
    1 - beta_2^step. unit: whether the rows are kept at norm 1. Returns True: it was done.
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


class Stepper:
    """Takes optimizer steps on transcoders; holds Adam's state and nothing of the data.

    precision: type of the products (the weights and Adam stay as they are). layers_at_once: layers
    that share each product; None: one on a CPU, all on a GPU. compiled: whether the two functions
    are compiled; None: on a GPU. A compiler that cannot is said once, and done without. sparse:
    whether a CPU may go over active entries only, where these are few (`sparse_step`).
    """

    def __init__(self, transcoders: Transcoders, loss: str,
                 precision: torch.dtype | None = None, layers_at_once: int | None = None,
                 compiled: bool | None = None, sparse: bool = True) -> None:
        check_loss(loss)
        self.transcoders, self.loss = transcoders, loss
        self.trained = {name: parameter.data for name, parameter in transcoders.named_parameters()}
        self.mean = {name: torch.zeros_like(tensor) for name, tensor in self.trained.items()}
        self.square = {name: torch.zeros_like(tensor) for name, tensor in self.trained.items()}
        on_gpu = transcoders.W_enc.is_cuda
        self.precision = precision or transcoders.W_enc.dtype
        self.layers_at_once = layers_at_once or (transcoders.n_layers if on_gpu else 1)
        self._compiled: dict[Callable, Callable] = {}
        if on_gpu if compiled is None else compiled:
            self._compiled = {function: torch.compile(function, dynamic=False)
                              for function in (gradients, adam_rows)}
        self._sparse = None
        if sparse and not on_gpu and self.precision == transcoders.W_enc.dtype and (
                self.layers_at_once == 1 and transcoders.variant.activation != "jumprelu"):
            with contextlib.suppress(ImportError):  # a machine without numba does without
                from scfm_circuits import sparse_step

                self._sparse = sparse_step

    def slices(self) -> Iterator[slice]:
        """The layers that pass together."""
        for first in range(0, self.transcoders.n_layers, self.layers_at_once):
            yield slice(first, min(first + self.layers_at_once, self.transcoders.n_layers))

    @torch.no_grad()
    def step(self, sites: Callable[[slice], tuple[Tensor, Tensor]], rate: float,
             l1_coefficient: float, number: int, measured: bool = True) -> Measures:
        """One step of all layers.

        sites: gives the inputs and outputs (n_layers of the slice, n_tokens, d_model) of some
        layers. rate: learning rate. number: which step this is, from 1. measured: whether losses,
        L0 and FVU are wanted (see `gradients`).
        """
        found = [self._step(layers, *sites(layers), rate, l1_coefficient, number, measured)
                 for layers in self.slices()]
        if len(found) == 1:
            return found[0]
        return Measures(
            Losses(*(torch.cat(parts) for parts in zip(*(one.losses for one in found),
                                                       strict=True))),
            *(torch.cat(parts) for parts in zip(*(one[1:] for one in found), strict=True)))

    def _step(self, layers: slice, x: Tensor, y: Tensor, rate: float, l1_coefficient: float,
              number: int, measured: bool) -> Measures:
        t = self.transcoders
        weights = {name: tensor[layers] for name, tensor in
                   (*self.trained.items(), *t.named_buffers())}
        weight = torch.full((), l1_coefficient, dtype=t.b_enc.dtype, device=x.device)
        objective, x = Objective(self.loss, weight), x.to(self.precision)
        given = (weights, t.variant, objective, x, y, measured)
        result = self._call(gradients, *given)
        if result is None:
            encoded = forward(weights, t.variant, x)
            result = self._sparse_step(layers, weights, objective, encoded, y, rate, number,
                                       measured)
            if result is None:
                result = backward(weights, t.variant, objective, encoded, y, measured)
        found, measures = result
        if t.variant.activation == "batchtopk":
            follow_threshold(weights["log_threshold"], measures.smallest)
        self._update(layers, found, rate, number)
        return measures

    def _sparse_step(self, layers: slice, weights: dict[str, Tensor], objective: Objective,
                     encoded: Forward, y: Tensor, rate: float, number: int,
                     measured: bool) -> tuple[dict[str, Tensor], Measures] | None:
        """The features' part of a step of one layer, if few enough are active.

        Returns the gradients of the other tensors, and what was measured; None if it was not done.
        """
        active = self._sparse.active_entries(encoded.z[0]) if self._sparse is not None else None
        if active is None:
            return None
        assert self._sparse is not None
        variant, n = self.transcoders.variant, y.shape[1]
        base = weights["b_dec"][:, None].expand(y.shape)
        if variant.skip:
            base = base.baddbmm(encoded.centred, weights["W_skip"].mT)
        y = y.to(base.dtype)
        scale = torch.as_tensor(_weights(objective.loss, y), dtype=y.dtype).expand(1, n, 1)
        penalty = float(objective.l1_coefficient) / n if variant.activation == "relu" else 0.0
        residual, outer, inner = self._sparse.backward(
            active, weights["W_dec"][0], base[0].contiguous(), y[0].contiguous(),
            (scale[0, :, 0] * (2 / n)).to(y.dtype).contiguous(), penalty)
        moments = [[store[name][layers][0] for store in (self.trained, self.mean, self.square)]
                   for name in ("W_enc", "W_dec", "b_enc")]
        self._sparse.update(active, inner, outer, encoded.centred[0], *moments,
                            self._sparse.Rates(rate / (1 - BETAS[0] ** number),
                                               (1 - BETAS[1] ** number) ** -0.5, *BETAS, EPSILON))
        found = {"b_dec": outer.sum(dim=0)[None]}
        if variant.skip:
            found["W_skip"] = (outer.mT @ encoded.centred[0])[None]
        return found, _sparse_measures(active, residual[None], y, scale, variant, objective,
                                       weights["b_enc"].shape[1], measured)

    def _update(self, layers: slice, found: dict[str, Tensor], rate: float, number: int) -> None:
        """Adam on some layers' tensors, compiled or PyTorch's own fused one."""
        for name, gradient in found.items():
            weight, mean, square = (store[name][layers] for store in
                                    (self.trained, self.mean, self.square))
            unit = name == "W_dec"
            corrected = rate / (1 - BETAS[0] ** number), (1 - BETAS[1] ** number) ** -0.5
            scalars = [torch.full((), value, dtype=weight.dtype, device=weight.device)
                       for value in corrected]
            if self._call(adam_rows, weight, gradient, mean, square, *scalars, unit):
                continue
            gradient = gradient.to(weight.dtype)
            if unit:
                without_parallel(gradient, weight)
            # Adam adds 1 to the number of steps itself.
            steps = [torch.full((), float(number - 1), device=weight.device)]
            adam([weight], [gradient], [mean], [square], [], steps, fused=True, amsgrad=False,
                 beta1=BETAS[0], beta2=BETAS[1], lr=rate, weight_decay=0.0, eps=EPSILON,
                 maximize=False)
            if unit:
                unit_rows(weight)

    def _call(self, function: Callable, *arguments: object):  # type: ignore[no-untyped-def]
        """What the compiled function gives; None if there is none, or compiling it fails."""
        if function not in self._compiled:
            return None
        try:
            return self._compiled[function](*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0][:200]
            print(f"{function.__name__} could not be compiled and is done without ({reason}).")
            del self._compiled[function]
            return None


# --- dead features -------------------------------------------------------------------------------


@torch.no_grad()
def resample(stepper: Stepper, dead: Tensor, x: Tensor, residual: Tensor, seed: list[int],
             first_layer: int = 0) -> None:
    """Give dead features a new start at tokens that are explained badly.

    As Bricken et al. (Towards Monosemanticity, 2023) do for autoencoders: tokens are drawn with a
    chance proportional to their squared squared error. A transcoder's feature then reads the
    token's centred input, at a fifth of the other features' norm, and writes what is missing.

    dead: (n_layers, n_features) bool. x, residual: (n_layers, n_tokens, d_model), the inputs and
    estimate minus output. first_layer: number of the first of them in the model.
    """
    t, generator = stepper.trained, torch.Generator()
    for layer in range(len(dead)):
        which = dead[layer].nonzero()[:, 0]
        if len(which) in (0, dead.shape[1]):
            continue
        own = np.random.SeedSequence([*seed, first_layer + layer]).generate_state(1)
        generator.manual_seed(int(own[0]))
        chance = residual[layer].square().sum(dim=-1).square().double().cpu()
        if not 0 < float(chance.sum()) < float("inf"):  # nothing is missing, or it diverges
            continue
        tokens = torch.multinomial(chance, len(which), replacement=True, generator=generator)
        tokens = tokens.to(x.device)
        read = x[layer, tokens].to(t["W_enc"].dtype) - stepper.transcoders.b_in[layer]
        norm = t["W_enc"][layer, ~dead[layer]].norm(dim=-1).mean()
        t["W_enc"][layer, which] = unit_rows(read) * (0.2 * norm)
        t["W_dec"][layer, which] = unit_rows(-residual[layer, tokens])
        t["b_enc"][layer, which] = 0
        names = ["W_enc", "W_dec", "b_enc"]
        if "log_threshold" in t:
            t["log_threshold"][layer, which] = math.log(INITIAL_THRESHOLD)
            names.append("log_threshold")
        for name in names:
            stepper.mean[name][layer, which] = 0
            stepper.square[name][layer, which] = 0
