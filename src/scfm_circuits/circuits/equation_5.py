"""The paper's Equation 5 as printed, beside the exact contributions."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scfm_circuits.circuits.attribution import Contributions
from scfm_circuits.circuits.frozen import Frozen


@torch.no_grad()
def equation_5(frozen: Frozen, layer: int, feature: int, position: int) -> Tensor:
    """The paper's Equation 5 as printed: z * (f_dec . f_enc), (layer, n_features).

    It reads the residual stream as if there were no norm before the MLP; kept for comparison.
    """
    t = frozen.transcoders
    return frozen.activations[:layer, position] * torch.einsum(
        "lfd,d->lf", t.W_dec[:layer], t.W_enc[layer, feature])


class Equation5(NamedTuple):
    """The paper's Equation 5 beside the exact contributions, over the features active at a token.

    correlation: NaN for fewer than three of them. ratio: of the sums over all features; NaN if the
    exact one is 0.
    """

    correlation: float
    ratio: float


def compare_equation_5(frozen: Frozen, parts: Contributions, layer: int, feature: int,
                       position: int) -> Equation5:
    """Equation 5 as printed against `parts`, the exact contributions to the same feature."""
    raw = equation_5(frozen, layer, feature, position).flatten().cpu().numpy()
    exact = parts.features.flatten().cpu().numpy()
    active = frozen.activations[:layer, position].flatten().cpu().numpy() > 0
    agreement = np.corrcoef(raw[active], exact[active])[0, 1] if active.sum() > 2 else np.nan
    return Equation5(float(agreement), float(raw.sum() / exact.sum()) if exact.sum() else np.nan)
