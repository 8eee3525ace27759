"""Taking optimizer steps: which layers pass together, compiled or not, dense or sparse.

On a CPU a step goes through the layers one at a time: the gradients of one layer are used up before
the next one's are made, so memory does not grow with depth; and where few features are active, it
goes over these alone (`sparse_gradients`). On a GPU all layers pass together, so that the host is
never waited for, and what is not a product is done by kernels of its own (`gpu_gradients`), which
go over active entries where these are few (`gpu_entries`); where kernels cannot be had or do not
fit the variant, the two functions of `gradients` are compiled.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim.adam import adam

from scfm_circuits.common.randomness import torch_seed
from scfm_circuits.transcoders.training.activation_buffer import Take, reason, taken
from scfm_circuits.transcoders.training.gradients import (
    BETAS,
    EPSILON,
    Losses,
    Measures,
    Objective,
    adam_rows,
    check_loss,
    corrected,
    follow_threshold,
    gradients,
    without_parallel,
)
from scfm_circuits.transcoders.transcoder import (
    INITIAL_THRESHOLD,
    Transcoders,
    Variant,
    unit_rows,
)

if TYPE_CHECKING:
    from scfm_circuits.transcoders.training.gpu_gradients import GpuSteps
    from scfm_circuits.transcoders.training.sparse_gradients import SparseSteps

Way = Literal["plain", "sparse", "compiled", "kernels"]
"""How steps are taken. All have one signature (`DenseSteps.step`); `Stepper` chooses once."""


class DenseSteps:
    """Steps of some layers by the dense gradients and PyTorch's own Adam.

    trained, mean, square: the trained tensors and Adam's moments of them, by name.
    """

    take: Take = staticmethod(taken)
    """How a batch's tokens are taken out of the buffer."""

    def __init__(self, trained: dict[str, Tensor], mean: dict[str, Tensor],
                 square: dict[str, Tensor], variant: Variant) -> None:
        self.trained, self.mean, self.square, self.variant = trained, mean, square, variant

    def step(self, layers: slice, weights: dict[str, Tensor], objective: Objective, x: Tensor,
             y: Tensor, numbers: tuple[float, int], measured: bool) -> Measures:
        """A step of some layers, whose tensors are `weights`; numbers: learning rate, step from 1.

        The rest is as for `gradients`, and so is what is measured.
        """
        found, measures = gradients(weights, self.variant, objective, x, y, measured)
        self.update(layers, found, numbers)
        return measures

    def update(self, layers: slice, found: dict[str, Tensor], numbers: tuple[float, int]) -> None:
        """Adam on some layers' tensors, from their gradients."""
        for name, gradient in found.items():
            moments = (store[name][layers] for store in (self.trained, self.mean, self.square))
            self.adam(numbers, name == "W_dec", gradient, *moments)

    def adam(self, numbers: tuple[float, int], unit: bool, gradient: Tensor, weight: Tensor,
             mean: Tensor, square: Tensor) -> None:
        """Adam on one tensor; unit: whether its rows are kept at norm 1."""
        gradient = gradient.to(weight.dtype)
        if unit:
            without_parallel(gradient, weight)
        # Adam adds 1 to the number of steps itself.
        steps = [torch.full((), float(numbers[1] - 1), device=weight.device)]
        adam([weight], [gradient], [mean], [square], [], steps, fused=True, amsgrad=False,
             beta1=BETAS[0], beta2=BETAS[1], lr=numbers[0], weight_decay=0.0, eps=EPSILON,
             maximize=False)
        if unit:
            unit_rows(weight)


class CompiledSteps(DenseSteps):
    """Dense steps whose two functions are compiled.

    A compiler that cannot, at once or at a later shape, is said once and done without.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.compiled: dict[Callable, Callable] = {
            function: torch.compile(function, dynamic=False) for function in (gradients, adam_rows)}

    def step(self, layers: slice, weights: dict[str, Tensor], objective: Objective, x: Tensor,
             y: Tensor, numbers: tuple[float, int], measured: bool) -> Measures:
        # A tensor: what is compiled holds for all of its values.
        objective = Objective(objective.loss, torch.full(
            (), float(objective.l1_coefficient), dtype=weights["b_enc"].dtype, device=x.device))
        given = weights, self.variant, objective, x, y, measured
        found, measures = self._called(gradients, *given) or gradients(*given)
        self.update(layers, found, numbers)
        return measures

    def adam(self, numbers: tuple[float, int], unit: bool, gradient: Tensor, weight: Tensor,
             mean: Tensor, square: Tensor) -> None:
        scalars = [torch.full((), value, dtype=weight.dtype, device=weight.device)
                   for value in corrected(*numbers)]
        if not self._called(adam_rows, weight, gradient, mean, square, *scalars, unit):
            super().adam(numbers, unit, gradient, weight, mean, square)

    def _called(self, function: Callable, *arguments: object) -> Any:
        """What the compiled function gives; None if there is none, or compiling it fails."""
        if function not in self.compiled:
            return None
        try:
            return self.compiled[function](*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler fails in many ways; what is really wrong comes back
            print(f"{function.__name__} could not be compiled and is done without "
                  f"({reason(error)}).")
            del self.compiled[function]
            return None


class Stepper:
    """Takes optimizer steps on transcoders; holds Adam's state and nothing of the data.

    precision: type of the products (the weights and Adam stay as they are). layers_at_once: layers
    that share each product; None: one on a CPU, all on a GPU. way: None: the kernels on a GPU, over
    active entries on a CPU. Where the kernels cannot be had or do not fit the variant or the
    weights' type, steps are compiled; where entries cannot be gone over, they are plain.
    """

    def __init__(self, transcoders: Transcoders, loss: str,
                 precision: torch.dtype | None = None, layers_at_once: int | None = None,
                 way: Way | None = None) -> None:
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
        self.way = self._chosen(way or ("kernels" if on_gpu else "sparse"))

    def _chosen(self, way: Way) -> "DenseSteps | GpuSteps | SparseSteps":
        """What takes the steps; and a sentence if the kernels for a GPU cannot be had."""
        t, threshold = self.transcoders, self.transcoders.activation.threshold
        given = self.trained, self.mean, self.square, t.variant
        if way == "kernels" and t.W_enc.dtype == torch.float32 and threshold is None:
            try:
                from scfm_circuits.transcoders.training.gpu_gradients import GpuSteps

                return GpuSteps(*given, self.precision)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # see `CompiledSteps`
                print(f"The kernels for a GPU are done without ({reason(error)}).")
        if way in ("kernels", "compiled"):
            return CompiledSteps(*given)
        if way == "sparse" and self.precision == t.W_enc.dtype and (
                self.layers_at_once == 1 and threshold != "trained"):
            with contextlib.suppress(ImportError):  # a machine without numba does without
                from scfm_circuits.transcoders.training.sparse_gradients import SparseSteps

                return SparseSteps(DenseSteps(*given))
        return DenseSteps(*given)

    @property
    def take(self) -> Take:
        """How a batch's tokens are taken out of the buffer."""
        return self.way.take

    def expect(self, active: float) -> None:
        """How many features are active on a token, as last measured.

        The kernels choose by it how a step is taken; by nothing that depends on time, so that the
        same run gives the same numbers.
        """
        expect = getattr(self.way, "expect", None)
        if expect is not None:
            expect(active)

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
        objective, found = Objective(self.loss, l1_coefficient), []
        for layers in self.slices():
            weights = {name: tensor[layers] for name, tensor in
                       (*self.trained.items(), *self.transcoders.named_buffers())}
            x, y = sites(layers)
            found.append(self.way.step(layers, weights, objective, x.to(self.precision), y,
                                       (rate, number), measured))
            if self.transcoders.activation.threshold == "followed":
                follow_threshold(weights["log_threshold"], found[-1].smallest)
        if len(found) == 1:
            return found[0]
        return Measures(
            Losses(*(torch.cat(parts) for parts in zip(*(one.losses for one in found),
                                                       strict=True))),
            *(torch.cat(parts) for parts in zip(*(one[1:] for one in found), strict=True)))


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
