"""One transcoder layer written out plainly: autograd and PyTorch's unfused Adam, in float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scfm_circuits.transcoders.activations import BANDWIDTH
from scfm_circuits.transcoders.transcoder import Transcoders, Variant


def rectangle(u: Tensor) -> Tensor:
    """The kernel K of arXiv:2407.14435: 1 within half a unit of 0."""
    return ((u > -0.5) & (u < 0.5)).to(u.dtype)


class JumpReLU(torch.autograd.Function):
    """x H(x - theta), with the pseudo-derivative of arXiv:2407.14435, Equation 11."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(x, theta)
        return x * (x > theta)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, theta = ctx.saved_tensors
        window = rectangle((x - theta) / BANDWIDTH)
        return (x > theta) * gradients[0], -(theta / BANDWIDTH) * window * gradients[0]


class Step(torch.autograd.Function):
    """H(x - theta), with the pseudo-derivative of arXiv:2407.14435, Equation 12."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(x, theta)
        return (x > theta).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, theta = ctx.saved_tensors
        window = rectangle((x - theta) / BANDWIDTH)
        return torch.zeros_like(x), -(1 / BANDWIDTH) * window * gradients[0]


class Taken(NamedTuple):
    """What a step of a plain layer found: its loss, z, estimate, and gradients by name."""

    loss: float
    z: Tensor
    estimate: Tensor
    gradients: dict[str, Tensor]


class PlainLayer:
    """One layer of a stack, trained alone."""

    def __init__(self, t: Transcoders, layer: int, loss: str) -> None:
        self.variant, self.loss_name = t.variant, loss
        self.parts = {name: one[layer].detach().clone().requires_grad_()
                      for name, one in t.named_parameters()}
        self.b_in = t.b_in[layer].clone()
        self.adam = torch.optim.Adam(list(self.parts.values()), lr=1.0, foreach=False, fused=False)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z (n_tokens, n_features), and what is penalised for each token (n_tokens,)."""
        pre = nn.functional.linear(x - self.b_in, self.parts["W_enc"], self.parts["b_enc"])
        kind, none = self.variant.activation, torch.zeros(len(x), dtype=x.dtype)
        if kind == "jumprelu":
            theta = self.parts["log_threshold"].exp().expand_as(pre)
            return JumpReLU.apply(pre, theta), Step.apply(pre, theta).sum(dim=1)
        z = torch.relu(pre)
        if kind == "relu":
            return z, z.abs().sum(dim=1)
        if kind == "topk":
            kept = torch.zeros_like(z)
            for row in range(len(z)):
                kept[row, z[row].argsort(descending=True)[: self.variant.k]] = 1
        else:
            order = z.flatten().argsort(descending=True)[: self.variant.k * len(z)]
            kept = torch.zeros(z.numel(), dtype=z.dtype)
            kept[order] = 1
        return z * kept.view_as(z), none

    def step(self, x: Tensor, y: Tensor, rate: float, l1_coefficient: float) -> Taken:
        """One step of Adam on (n_tokens, d_model) inputs and outputs."""
        z, penalised = self.encode(x)
        estimate = z @ self.parts["W_dec"] + self.parts["b_dec"]
        if self.variant.skip:
            estimate = estimate + (x - self.b_in) @ self.parts["W_skip"].T
        squared = ((estimate - y) ** 2).sum(dim=1)
        if self.loss_name == "normalized":
            squared = squared / (y.shape[1] * (y**2).sum(dim=1).sqrt())
        loss = (squared + l1_coefficient * penalised).mean()
        self.adam.zero_grad()
        loss.backward()
        found = {name: one.grad.clone() for name, one in self.parts.items()}
        decoder = self.parts["W_dec"]
        for row in range(len(decoder)):
            unit = decoder.detach()[row]
            decoder.grad[row] -= (decoder.grad[row] @ unit) * unit
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        with torch.no_grad():
            for row in range(len(decoder)):
                decoder[row] /= decoder[row].norm()
        return Taken(float(loss.detach()), z.detach(), estimate.detach(), found)


# --- transcoders and batches to hold against it ---------------------------------------------------

LOSSES = ("normalized", "equation4")
VARIANTS = (Variant(), Variant("topk", 3), Variant("batchtopk", 2), Variant("jumprelu"),
            Variant("relu", skip=True), Variant("topk", 2, skip=True),
            Variant("batchtopk", 3, skip=True), Variant("jumprelu", skip=True))


def stack(variant: Variant = Variant(), layers: int = 2, d: int = 5, f: int = 9,  # noqa: B008
          seed: int = 0, dtype: torch.dtype = torch.float64) -> Transcoders:
    """Random transcoders with unit writing directions and random biases."""
    t = Transcoders(layers, d, f, variant).to(dtype).requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for name, part in (*t.named_parameters(), *t.named_buffers()):
        if name != "log_threshold":
            part.copy_(torch.randn(part.shape, generator=g, dtype=dtype) * 0.5)
    if variant.activation == "jumprelu":  # so high that the window is met on both sides
        t.log_threshold.copy_((0.3 + torch.rand(layers, f, generator=g, dtype=dtype)).log())
    t.normalise_decoder()
    return t


def pairs(layers: int, n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random inputs and outputs."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, layers, n, d, generator=g, dtype=torch.float64)
    return x, y


def given_sites(x: Tensor, y: Tensor) -> Callable[[slice], tuple[Tensor, Tensor]]:
    return lambda layers: (x[layers], y[layers])
