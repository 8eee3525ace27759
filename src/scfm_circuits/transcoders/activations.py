"""What makes a dictionary's activations sparse: an object for each activation function.

All else asks the object, so a new activation is a class here, its name in `Name`, and an entry in
ACTIVATIONS. They stand in one file because each is a few lines and they are read side by side.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Name = Literal["relu", "topk", "batchtopk", "jumprelu"]

BANDWIDTH = 0.05
"""Width of the window around its threshold in which a pre-activation's place reaches the
threshold's gradient, in units of pre-activations (Rajamanoharan et al., arXiv:2407.14435)."""


class Activation:
    """z from pre-activations (n_layers, n_tokens, n_features), and how it is trained."""

    threshold: Literal["trained", "followed"] | None = None
    """Whether each feature has a threshold: one that a gradient trains, or one that follows the
    batches and takes their place after training."""
    penalised: Literal["l1", "l0"] | None = None
    """What the penalty weighs: the sum of z, or the number of active features; None where k says
    how many are active."""
    layout: Literal["relu", "topk"] | None = None
    """What circuit-tracer's config.yaml calls it; None where it follows from the thresholds."""
    only_cuts = False
    """Whether z is the pre-activation cut at 0 and nothing else, whatever the other features do."""

    def select(self, z: Tensor, k: int) -> Tensor:
        """What is kept of nonnegative z, which may be overwritten."""
        return z

    def in_training(self, pre: Tensor, k: int, log_threshold: Tensor | None) -> Tensor:
        """z of a batch; overwrites `pre`. log_threshold: (n_layers, n_features) if there is one."""
        return self.select(pre.relu_(), k)

    def after_training(self, pre: Tensor, k: int, log_threshold: Tensor | None) -> Tensor:
        """z after training. log_threshold: if there is one, of a shape that fits `pre`'s."""
        if log_threshold is None:
            return self.select(pre.relu(), k)
        return pre * (pre > log_threshold.exp())

    def penalty(self, l0: Tensor, l1: Tensor) -> Tensor:
        """(n_layers,) what is penalised, of the means over tokens of L0 and of ||z||_1."""
        return {"l0": l0, "l1": l1}[self.penalised] if self.penalised else torch.zeros_like(l0)

    def threshold_gradient(self, inner: Tensor, pre: Tensor, log_threshold: Tensor, weight: Tensor
                           ) -> Tensor:
        """(n_layers, n_features) the loss's gradient in log_threshold, where it is trained.

        inner: the loss's gradient in z. weight: the penalty's, over the number of tokens.
        """
        raise NotImplementedError


class ReLU(Activation):
    """The paper's (Equation 1), with an L1 penalty."""

    penalised = "l1"
    layout = "relu"
    only_cuts = True


class TopK(Activation):
    """Each token keeps its k largest positive pre-activations."""

    layout = "topk"

    def select(self, z: Tensor, k: int) -> Tensor:
        return keep_largest(z, k)


class BatchTopK(Activation):
    """A batch keeps k per token on average (Bussmann et al., arXiv:2412.06410)."""

    threshold = "followed"

    def select(self, z: Tensor, k: int) -> Tensor:
        return keep_largest(z.flatten(1), k * z.shape[1]).view_as(z)


class JumpReLU(Activation):
    """A feature is silent below a threshold of its own (Rajamanoharan et al., arXiv:2407.14435)."""

    threshold = "trained"
    penalised = "l0"

    def in_training(self, pre: Tensor, k: int, log_threshold: Tensor | None) -> Tensor:
        assert log_threshold is not None
        return pre * (pre > log_threshold.exp().to(pre.dtype)[:, None])

    def threshold_gradient(self, inner: Tensor, pre: Tensor, log_threshold: Tensor, weight: Tensor
                           ) -> Tensor:
        kind, full = inner.dtype, log_threshold.dtype
        threshold = log_threshold.exp().to(kind)
        near = (pre - threshold[:, None]).abs() < BANDWIDTH / 2
        pull = (inner * threshold[:, None] + weight.to(kind)) * near
        return -pull.sum(dim=1, dtype=full) / BANDWIDTH * threshold.to(full)


ACTIVATIONS: Mapping[str, Activation] = {
    "relu": ReLU(), "topk": TopK(), "batchtopk": BatchTopK(), "jumprelu": JumpReLU()}


def keep_largest(z: Tensor, k: int) -> Tensor:
    """z with all but the k largest entries of each row set to 0; ties fall to one of them."""
    if k >= z.shape[-1]:
        return z
    values, where = z.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(z).scatter_(-1, where, values)
