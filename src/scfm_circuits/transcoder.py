"""Transcoders of all layers as one stack.

A transcoder reads an MLP's input and writes an estimate of its output through wide, sparsely
active features (paper, Equations 1, 2 and 4):

    z = ReLU(W_enc (x - b_in) + b_enc),    y_hat = W_dec^T z + b_dec

b_in is the mean input and is not trained; saved files fold it into b_enc.
Imports neither scanpy nor gseapy, so it runs on a bare GPU machine.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scfm_circuits import InputError
from scfm_circuits.files import read_json, write_atomic, write_json


class Transcoders(nn.Module):
    """One transcoder per MLP layer, stacked so that a batch passes all of them in one product.

    W_enc, W_dec: (n_layers, n_features, d_model), a feature's reading and writing direction.
    b_enc: (n_layers, n_features); b_in, b_dec: (n_layers, d_model).
    """

    b_in: Tensor

    def __init__(self, n_layers: int, d_model: int, n_features: int) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.empty(n_layers, n_features, d_model))
        self.W_dec = nn.Parameter(torch.empty(n_layers, n_features, d_model))
        self.b_enc = nn.Parameter(torch.zeros(n_layers, n_features))
        self.b_dec = nn.Parameter(torch.zeros(n_layers, d_model))
        self.register_buffer("b_in", torch.zeros(n_layers, d_model))

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.W_enc.shape[0]

    @property
    def n_features(self) -> int:
        """Features per layer (the paper's hidden dimension)."""
        return self.W_enc.shape[1]

    @property
    def d_model(self) -> int:
        """Residual width of the model."""
        return self.W_enc.shape[2]

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> "Transcoders":
        """Random start: encoder entries of variance 2 / n_features, unit decoder rows, no biases.

        The encoder's scale is that of the code the paper's settings come from
        (transcoder_circuits), whose rows have norm sqrt(2 d_model / n_features).
        """
        self.W_enc.normal_(generator=generator).mul_((2 / self.n_features) ** 0.5)
        self.W_dec.normal_(generator=generator)
        self.normalise_decoder()
        for bias in (self.b_enc, self.b_dec, self.b_in):
            bias.zero_()
        return self

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Give each feature's writing direction norm 1."""
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8))

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Take from W_dec's gradient what would only change the rows' norms."""
        gradient = self.W_dec.grad
        if gradient is not None:
            along = (gradient * self.W_dec).sum(dim=-1, keepdim=True)
            gradient.addcmul_(self.W_dec, along, value=-1)

    def pre_activations(self, x: Tensor) -> Tensor:
        """(n_layers, n_tokens, d_model) inputs -> (n_layers, n_tokens, n_features)."""
        centred = x - self.b_in[:, None]
        return torch.baddbmm(self.b_enc[:, None], centred, self.W_enc.mT)

    def encode(self, x: Tensor) -> Tensor:
        """Activations z of all layers' features (Equation 1)."""
        return self.pre_activations(x).relu()

    def decode(self, z: Tensor) -> Tensor:
        """(n_layers, n_tokens, n_features) activations -> estimated MLP outputs (Equation 2)."""
        return torch.baddbmm(self.b_dec[:, None], z, self.W_dec)

    def forward(self, x: Tensor) -> Tensor:
        """Estimated MLP outputs for the inputs of all layers."""
        return self.decode(self.encode(x))

    def layer_pre_activations(self, layer: int, x: Tensor) -> Tensor:
        """(..., d_model) inputs of one layer -> (..., n_features)."""
        return nn.functional.linear(x - self.b_in[layer], self.W_enc[layer], self.b_enc[layer])

    def replacement(self, layer: int, x: Tensor) -> Tensor:
        """One layer's estimate in place of its MLP: (..., d_model) -> (..., d_model)."""
        z = self.layer_pre_activations(layer, x).relu()
        return z @ self.W_dec[layer] + self.b_dec[layer]

    def folded_encoder_bias(self) -> Tensor:
        """(n_layers, n_features): b_enc - W_enc b_in, the bias of an encoder without b_in."""
        return self.b_enc - torch.einsum("lfd,ld->lf", self.W_enc, self.b_in)


def save_transcoders(transcoders: Transcoders, folder: Path, model_name: str,
                     record: Mapping[str, Any]) -> None:
    """Write the layout that circuit-tracer loads, and our own record beside it.

    config.yaml names the hooks; layer_<i>.safetensors holds W_enc, W_dec (n_features, d_model),
    b_enc (n_features,) with b_in folded in, and b_dec (d_model,). training.json is `record` and the
    number of layers, by which a missing last file is noticed.
    """
    bias = transcoders.folded_encoder_bias()
    for layer in range(transcoders.n_layers):
        tensors = {
            "W_enc": transcoders.W_enc[layer], "W_dec": transcoders.W_dec[layer],
            "b_enc": bias[layer], "b_dec": transcoders.b_dec[layer],
        }
        save_file({key: value.detach().float().cpu().contiguous() for key, value in
                   tensors.items()}, folder / f"layer_{layer}.safetensors")
    write_atomic(folder / "config.yaml", yaml.safe_dump({
        "model_kind": "transcoder_set",
        "model_name": model_name,
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "scan": None,
    }, sort_keys=True))
    write_json(folder / "training.json", {**record, "n_layers": transcoders.n_layers})


def load_transcoders(folder: Path) -> Transcoders:
    """Read `save_transcoders`' layout; b_in comes back as zero, folded into b_enc.

    Raises InputError if files are missing, broken or of unequal shapes.
    """
    found = len(list(folder.glob("layer_*.safetensors")))
    wanted = read_json(folder / "training.json").get("n_layers", found)
    paths = [folder / f"layer_{layer}.safetensors" for layer in range(wanted)]
    if not paths or not all(path.is_file() for path in paths):
        raise InputError(f"There are no complete transcoders in {folder}; run the training "
                         "chapter first.")
    try:
        layers = [load_file(path) for path in paths]
        stacked = {key: torch.stack([layer[key] for layer in layers])
                   for key in ("W_enc", "W_dec", "b_enc", "b_dec")}
        n_layers, n_features, d_model = stacked["W_enc"].shape
        transcoders = Transcoders(n_layers, d_model, n_features)
        transcoders.load_state_dict({**stacked, "b_in": torch.zeros(n_layers, d_model)})
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"The transcoders in {folder} are broken ({reason}); delete the folder "
                         "and run the training chapter again.") from None
    return transcoders.requires_grad_(False).eval()
