"""One optimizer step at a given size, by this package and by others, for `bench_training`.

Weights and tokens are random and seeded. A learning rate near 0 keeps the share of active features
where it was set; the work is the same.
"""

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scfm_circuits.common.profile import load_profile
from scfm_circuits.transcoders.training.gradients import transcoder_losses
from scfm_circuits.transcoders.training.optimizer import DenseSteps, Stepper
from scfm_circuits.transcoders.transcoder import Transcoders, Variant

PAPER = load_profile("paper")
RATE, K = 1e-9, 32
Step = Callable[[], Any]


class Size(NamedTuple):
    """What is measured: all layers' sizes, and how many layers in which part."""

    device: str
    layers: int
    sparsify_layers: int
    width: int
    expansion: int
    tokens: int

    @property
    def features(self) -> int:
        """Transcoder width."""
        return self.width * self.expansion


def batch(size: Size, n_layers: int) -> tuple[Tensor, Tensor]:
    """Random inputs and outputs (n_layers, n_tokens, width), as of MLPs behind a LayerNorm."""
    generator = torch.Generator(size.device).manual_seed(0)
    x, y = torch.randn(2, n_layers, size.tokens, size.width, generator=generator,
                       device=size.device)
    return x, 0.1 * y


@torch.no_grad()
def activate(transcoders: Transcoders, x: Tensor, active: int | None) -> None:
    """Set the encoder biases so that `active` features of a token are active; None: about half."""
    transcoders.b_enc.zero_()
    if active is None:
        return
    for layer in range(transcoders.n_layers):
        pre = transcoders.layer_pre_activations(layer, x[layer].float()).flatten()
        pre = pre[: 2**22]
        below = len(pre) - active * len(pre) // transcoders.n_features
        transcoders.b_enc[layer] = -pre.kthvalue(below).values


def ours(size: Size, n_layers: int, variant: Variant, active: int | None = None,
         **options: Any) -> Step:
    """A step of this package."""
    x, y = batch(size, n_layers)
    transcoders = Transcoders(n_layers, size.width, size.features, variant).to(size.device)
    activate(transcoders.initialise(0), x, active)
    stepper = Stepper(transcoders, PAPER.loss, **options)
    if active is not None:
        stepper.expect(active)
    silent = torch.zeros(n_layers, size.features, dtype=torch.int64, device=size.device)

    def run() -> None:
        found = stepper.step(lambda layers: (x[layers], y[layers]), RATE, PAPER.l1_coefficient, 1,
                             measured=False)
        silent.add_(size.tokens).masked_fill_(found.fired, 0)

    return run


def products(size: Size, n_layers: int, dtype: torch.dtype, at_once: int) -> Step:
    """The step's five products on tensors that are there already."""
    x, outer = (part.to(dtype) for part in batch(size, n_layers))
    generator = torch.Generator(size.device).manual_seed(1)
    shape, given = (at_once, size.features, size.width), {"device": size.device, "dtype": dtype}
    encoder, decoder = torch.randn(2, *shape, generator=generator, **given)
    z = torch.randn(at_once, size.tokens, size.features, generator=generator, **given).relu_()

    def run() -> None:
        for first in range(0, n_layers, at_once):
            inputs, gradient = x[first : first + at_once], outer[first : first + at_once]
            torch.bmm(inputs, encoder.mT)
            torch.bmm(z, decoder)
            torch.bmm(z.mT, gradient)
            torch.bmm(gradient, decoder.mT)
            torch.bmm(z.mT, inputs)

    return run


@torch.no_grad()
def parts(size: Size, dtype: torch.dtype) -> dict[str, Step]:
    """What a step on a GPU is made of, part by part, and what some parts stand in for (`_plain`).

    Each runs on tensors that are there already. `copy_of_z`: reads and writes as much as
    activations take, for the memory's rate.
    """
    from scfm_circuits.transcoders.training import gpu_gradients

    x, y = (part.to(dtype) for part in batch(size, size.layers))
    t = Transcoders(size.layers, size.width, size.features).to(size.device).initialise(0)
    stepper = Stepper(t, PAPER.loss, dtype, way="kernels")
    fused = stepper.way
    assert isinstance(fused, gpu_gradients.GpuSteps)
    plain = DenseSteps(stepper.trained, stepper.mean, stepper.square, Variant())
    fused.copy()
    encoder, decoder = fused.copies["W_enc"], fused.copies["W_dec"]
    bias, z = t.b_enc.to(dtype), gpu_gradients.encoded(x, encoder, t.b_enc.to(dtype), Variant())
    outer = torch.bmm(z, decoder)
    inner, other = torch.bmm(outer, decoder.mT), torch.empty_like(z)
    gradient = torch.bmm(z.mT, outer)
    chosen = torch.randperm(4 * size.tokens, device=size.device)[: size.tokens]
    fill = torch.randn(size.layers, 4 * size.tokens, size.width, device=size.device, dtype=dtype)

    def adam() -> None:
        for name in ("W_enc", "W_dec"):
            gpu_gradients.adam(gradient, stepper.trained[name], stepper.mean[name],
                               stepper.square[name], fused.copies[name], (RATE, 1.0),
                               name == "W_dec")

    def cut_plain() -> None:
        found = torch.ops.aten.threshold_backward(inner, z, 0)
        found.sum(dim=1, dtype=torch.float32)
        z.sum(dim=1, dtype=torch.float32)

    return {
        "gather": lambda: (fused.take(fill, chosen), fused.take(fill, chosen)),
        "gather_plain": lambda: (fill[:, chosen], fill[:, chosen]),
        "centre": lambda: gpu_gradients.rows(x, less=t.b_in.to(dtype)),
        "centre_plain": lambda: x - t.b_in.to(dtype)[:, None],
        "encode": lambda: gpu_gradients.encoded(x, encoder, bias, Variant()),
        "encode_plain": lambda: torch.baddbmm(bias[:, None], x, encoder.mT).relu_(),
        "encode_product": lambda: torch.bmm(x, encoder.mT),
        "estimate": lambda: torch.baddbmm(t.b_dec.to(dtype)[:, None], z, decoder),
        "error": lambda: gpu_gradients.error(outer, y, True),
        "decoder_gradient": lambda: torch.bmm(z.mT, outer),
        "inner": lambda: torch.bmm(outer, decoder.mT),
        "cut": lambda: gpu_gradients.cut(inner, z, 0.0),
        "cut_plain": cut_plain,
        "encoder_gradient": lambda: torch.bmm(inner.mT, x),
        "adam": adam,
        "adam_plain": lambda: plain.update(
            slice(None), {"W_enc": gradient, "W_dec": gradient}, (RATE, 1)),
        "casts": lambda: (t.W_enc.to(dtype), t.W_dec.to(dtype)),
        "copy_of_z": lambda: other.copy_(z),
    }


def autograd(size: Size, n_layers: int, active: int | None = None) -> Step:
    """The step as it was: a graph recorded by autograd, float32, PyTorch's fused Adam."""
    x, y = batch(size, n_layers)
    transcoders = Transcoders(n_layers, size.width, size.features).to(size.device)
    activate(transcoders.initialise(0), x, active)
    optimizer = torch.optim.Adam(transcoders.parameters(), lr=RATE, fused=True)
    silent = torch.zeros(n_layers, size.features, dtype=torch.int64, device=size.device)
    decoder = transcoders.W_dec

    def run() -> None:
        z = transcoders.encode(x)
        estimate = transcoders.decode(z)
        losses = transcoder_losses(PAPER.loss, PAPER.l1_coefficient, y, estimate, z)
        optimizer.zero_grad(set_to_none=True)
        (losses.reconstruction.sum() + losses.sparsity.sum()).backward()
        with torch.no_grad():
            gradient = decoder.grad
            assert gradient is not None
            along = (gradient * decoder).sum(dim=-1, keepdim=True)
            gradient.addcmul_(decoder, along, value=-1)
            optimizer.step()
            transcoders.normalise_decoder()
            silent.add_(size.tokens).masked_fill_((z > 0).any(dim=1), 0)

    return run


def sparsify_step(size: Size, n_layers: int) -> Step:
    """What sparsify's Trainer does with a batch: a SparseCoder per layer, then Adam on all.

    Its Trainer takes torch.optim.Adam with default options; `fused` is faster and is in its favour.
    """
    from sparsify import SparseCoder, TranscoderConfig

    x, y = batch(size, n_layers)
    torch.manual_seed(0)
    config = TranscoderConfig(expansion_factor=size.expansion, k=K)
    coders = [SparseCoder(size.width, config, size.device, dtype=torch.float32)
              for _ in range(n_layers)]
    optimizer = torch.optim.Adam([{"params": coder.parameters()} for coder in coders], lr=RATE,
                                 fused=True)
    silent = torch.zeros(n_layers, size.features, dtype=torch.int64, device=size.device)

    def run() -> None:
        fired = torch.zeros_like(silent, dtype=torch.bool)
        for layer, coder in enumerate(coders):
            variance = (y[layer] - y[layer].mean(0)).pow(2).sum()
            out = coder(x[layer], y[layer], total_variance=variance)
            fired[layer, out.latent_indices.flatten()] = True
            out.fvu.backward()
        optimizer.step()
        optimizer.zero_grad()
        silent.add_(size.tokens).masked_fill_(fired, 0)

    return run


def sparsify_version() -> str | None:
    """Its version, if it can be imported here."""
    return version("eai-sparsify") if importlib.util.find_spec("sparsify") else None
