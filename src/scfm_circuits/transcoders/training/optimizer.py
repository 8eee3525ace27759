"""Taking optimizer steps: which layers pass together, compiled or not, dense or sparse.

On a CPU a step goes through the layers one at a time: the gradients of one layer are used up before
the next one's are made, so memory does not grow with depth; and where few features are active, it
goes over these alone (`sparse_gradients`). On a GPU all layers pass together, so that the host is
never waited for, and what is not a product is done by kernels of its own (`gpu_gradients`); where
these cannot be had or do not fit the variant, the two functions of `gradients` are compiled.
Imports neither scanpy nor gseapy, so it runs on a bare GPU machine.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.adam import adam

from scfm_circuits.common.randomness import torch_seed
from scfm_circuits.transcoders.training.activation_buffer import Take, taken
from scfm_circuits.transcoders.training.gradients import (
    BETAS,
    EPSILON,
    Forward,
    Losses,
    Measures,
    Objective,
    adam_rows,
    backward,
    check_loss,
    corrected,
    follow_threshold,
    forward,
    gradients,
    sparse_measures,
    token_weights,
    without_parallel,
)
from scfm_circuits.transcoders.transcoder import INITIAL_THRESHOLD, Transcoders, unit_rows

if TYPE_CHECKING:
    from scfm_circuits.transcoders.training.gpu_gradients import GpuStep

class Stepper:
    """Takes optimizer steps on transcoders; holds Adam's state and nothing of the data.

    precision: type of the products (the weights and Adam stay as they are). layers_at_once: layers
    that share each product; None: one on a CPU, all on a GPU. fused: whether the kernels of
    `gpu_gradients` are used, where the variant and the weights' type allow it; None: on a GPU.
    compiled: whether the two functions are compiled; None: on a GPU. A compiler that cannot is said
    once, and done without.
    sparse: whether a CPU may go over active entries only, where these are few (`sparse_gradients`).
    """

    def __init__(self, transcoders: Transcoders, loss: str,
                 precision: torch.dtype | None = None, layers_at_once: int | None = None,
                 compiled: bool | None = None, sparse: bool = True,
                 fused: bool | None = None) -> None:
        check_loss(loss)
        self.transcoders, self.loss = transcoders, loss
        # Detached, not `.data`: what changes a weight elsewhere is counted here too.
        self.trained = {name: parameter.detach()
                        for name, parameter in transcoders.named_parameters()}
        self.mean = {name: torch.zeros_like(tensor) for name, tensor in self.trained.items()}
        self.square = {name: torch.zeros_like(tensor) for name, tensor in self.trained.items()}
        on_gpu = transcoders.W_enc.is_cuda
        self.precision = precision or transcoders.W_enc.dtype
        self.layers_at_once = layers_at_once or (transcoders.n_layers if on_gpu else 1)
        self._compiled: dict[Callable, Callable] = {}
        if on_gpu if compiled is None else compiled:
            self._compiled = {function: torch.compile(function, dynamic=False)
                              for function in (gradients, adam_rows)}
        self._fused = self._kernels() if (on_gpu if fused is None else fused) else None
        self._sparse = None
        if sparse and not on_gpu and self.precision == transcoders.W_enc.dtype and (
                self.layers_at_once == 1 and transcoders.activation.threshold != "trained"):
            with contextlib.suppress(ImportError):  # a machine without numba does without
                from scfm_circuits.transcoders.training import sparse_gradients

                self._sparse = sparse_gradients

    def _kernels(self) -> "GpuStep | None":
        """The kernels for a GPU; None, and a sentence, if they cannot be had."""
        t = self.transcoders
        if t.W_enc.dtype != torch.float32:
            return None
        try:
            from scfm_circuits.transcoders.training.gpu_gradients import ACTIVATIONS, GpuStep

            if t.variant.activation not in ACTIVATIONS:
                return None
            return GpuStep(self.trained, self.mean, self.square, self.precision)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # see `_call`
            print(f"The kernels for a GPU are done without ({_reason(error)}).")
            return None

    @property
    def take(self) -> Take:
        """How a batch's tokens are taken out of the buffer."""
        return taken if self._fused is None else self._fused.take

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
        if self._fused is not None:
            self._fused.copy()
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
        if self._fused is not None:
            return self._fused.step(layers, weights, t.variant,
                                    Objective(self.loss, l1_coefficient), x.to(self.precision), y,
                                    (rate, number), measured)
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
        if t.activation.threshold == "followed":
            follow_threshold(weights["log_threshold"], measures.smallest)
        self._update(layers, found, rate, number)
        return measures

    def _sparse_step(self, layers: slice, weights: dict[str, Tensor], objective: Objective,
                     encoded: Forward, y: Tensor, rate: float, number: int,
                     measured: bool) -> tuple[dict[str, Tensor], Measures] | None:
        """The features' part of a step of one layer, if few enough are active.

        Returns the gradients of the other tensors, and what was measured; None if it was not done.
        """
        if self._sparse is None:
            return None
        active = self._sparse.active_entries(encoded.z[0])
        if active is None:
            return None
        variant, n = self.transcoders.variant, y.shape[1]
        base = weights["b_dec"][:, None].expand(y.shape)
        if variant.skip:
            base = base.baddbmm(encoded.centred, weights["W_skip"].mT)
        y = y.to(base.dtype)
        scale = torch.as_tensor(token_weights(objective.loss, y), dtype=y.dtype).expand(1, n, 1)
        weight = torch.as_tensor(objective.l1_coefficient, dtype=y.dtype)
        penalty = float(weight) / n if self.transcoders.activation.penalised == "l1" else 0.0
        residual, outer, inner = self._sparse.backward(
            active, weights["W_dec"][0], base[0].contiguous(), y[0].contiguous(),
            (scale[0, :, 0] * (2 / n)).to(y.dtype).contiguous(), penalty)
        moments = [[store[name][layers][0] for store in (self.trained, self.mean, self.square)]
                   for name in ("W_enc", "W_dec", "b_enc")]
        self._sparse.update(active, inner, outer, encoded.centred[0], *moments,
                            self._sparse.Rates(*corrected(rate, number), *BETAS, EPSILON))
        found = {"b_dec": outer.sum(dim=0)[None]}
        if variant.skip:
            found["W_skip"] = (outer.mT @ encoded.centred[0])[None]
        return found, sparse_measures(active, residual[None], y, scale, variant, weight,
                                      weights["b_enc"].shape[1], measured)

    def _update(self, layers: slice, found: dict[str, Tensor], rate: float, number: int) -> None:
        """Adam on some layers' tensors, compiled or PyTorch's own fused one."""
        for name, gradient in found.items():
            weight, mean, square = (store[name][layers] for store in
                                    (self.trained, self.mean, self.square))
            unit = name == "W_dec"
            if adam_rows in self._compiled:
                scalars = [torch.full((), value, dtype=weight.dtype, device=weight.device)
                           for value in corrected(rate, number)]
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
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler fails in many ways; what is really wrong comes back
            print(f"{function.__name__} could not be compiled and is done without "
                  f"({_reason(error)}).")
            del self._compiled[function]
            return None


def _reason(error: Exception) -> str:
    """The first line of what an exception says, or else its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@torch.no_grad()
def resample(stepper: Stepper, dead: Tensor, x: Tensor, residual: Tensor, seed: int, step: int,
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
        generator.manual_seed(torch_seed(seed, "resampled features", step, first_layer + layer))
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
