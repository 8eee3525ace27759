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
from scfm_circuits.transcoders.training.optimizer import Stepper
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
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, n_layers, size.tokens, size.width, generator=generator)
    return x.to(size.device), 0.1 * y.to(size.device)


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
    silent = torch.zeros(n_layers, size.features, dtype=torch.int64, device=size.device)

    def run() -> None:
        found = stepper.step(lambda layers: (x[layers], y[layers]), RATE, PAPER.l1_coefficient, 1,
                             measured=False)
        silent.add_(size.tokens).masked_fill_(found.fired, 0)

    return run


def products(size: Size, n_layers: int, dtype: torch.dtype, at_once: int) -> Step:
    """The step's five products on tensors that are there already."""
    x, outer = (part.to(dtype) for part in batch(size, n_layers))
    generator = torch.Generator().manual_seed(1)
    shape = (at_once, size.features, size.width)
    encoder, decoder = torch.randn(2, *shape, generator=generator).to(size.device, dtype)
    z = torch.randn(at_once, size.tokens, size.features, generator=generator)
    z = z.relu_().to(size.device, dtype)

    def run() -> None:
        for first in range(0, n_layers, at_once):
            inputs, gradient = x[first : first + at_once], outer[first : first + at_once]
            torch.bmm(inputs, encoder.mT)
            torch.bmm(z, decoder)
            torch.bmm(z.mT, gradient)
            torch.bmm(gradient, decoder.mT)
            torch.bmm(z.mT, inputs)

    return run


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
