"""Transcoders of all layers as one stack.

A transcoder reads an MLP's input and writes an estimate of its output through wide, sparsely
active features (paper, Equations 1, 2 and 4):

    z = ReLU(W_enc (x - b_in) + b_enc),    y_hat = W_dec^T z + b_dec

b_in is the mean input and is not trained; saved files fold it into b_enc. `Variant` names what
else can be trained: other activations, a linear path around the features, and the sparse
autoencoder of Equations 1 to 3, which reads what it estimates.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scfm_circuits import InputError
from scfm_circuits.common.files import read_json, write_atomic
from scfm_circuits.common.kept import write_record
from scfm_circuits.transcoders.activations import ACTIVATIONS, Name

INITIAL_THRESHOLD = 1e-3
"""Where the thresholds of `jumprelu` and `batchtopk` start, in units of pre-activations."""


class Variant(NamedTuple):
    """Which kind of dictionary is trained; the default is the paper's transcoder.

    activation: what makes z sparse. `relu`; `topk`: each token keeps its k largest positive
    pre-activations; `batchtopk`: a batch keeps k per token on average, and a threshold learnt in
    training takes the batch's place afterwards (Bussmann et al., arXiv:2412.06410); `jumprelu`: a
    feature has a threshold of its own below which it is silent (Rajamanoharan et al.,
    arXiv:2407.14435).
    skip: a linear map from input to output beside the features (Paulo et al., arXiv:2501.18823).
    site: `transcoder` reads the MLP's input; `sae` reads the output that it estimates.
    """

    activation: Name = "relu"
    k: int = 32
    skip: bool = False
    site: Literal["transcoder", "sae"] = "transcoder"

    def read(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """What is read of an MLP's inputs and outputs: an autoencoder reads what it estimates."""
        return outputs if self.site == "sae" else inputs


class Transcoders(nn.Module):
    """One transcoder per MLP layer, stacked so that a batch passes all of them in one product.

    W_enc, W_dec: (n_layers, n_features, d_model), a feature's reading and writing direction.
    b_enc: (n_layers, n_features); b_in, b_dec: (n_layers, d_model). If the variant has them,
    W_skip: (n_layers, d_model, d_model), rows are outputs; log_threshold: (n_layers, n_features),
    logarithm of the pre-activation below which a feature is silent.
    """

    b_in: Tensor

    def __init__(self, n_layers: int, d_model: int, n_features: int,
                 variant: Variant = Variant()) -> None:  # noqa: B008 (a tuple)
        super().__init__()
        self.variant = variant
        self.W_enc = nn.Parameter(torch.empty(n_layers, n_features, d_model))
        self.W_dec = nn.Parameter(torch.empty(n_layers, n_features, d_model))
        self.b_enc = nn.Parameter(torch.zeros(n_layers, n_features))
        self.b_dec = nn.Parameter(torch.zeros(n_layers, d_model))
        self.register_buffer("b_in", torch.zeros(n_layers, d_model))
        if variant.skip:
            self.W_skip = nn.Parameter(torch.zeros(n_layers, d_model, d_model))
        self.activation = ACTIVATIONS[variant.activation]
        if self.activation.threshold:
            start = torch.full((n_layers, n_features), INITIAL_THRESHOLD).log()
            if self.activation.threshold == "trained":
                self.log_threshold = nn.Parameter(start)
            else:  # follows the batches, not a gradient
                self.register_buffer("log_threshold", start)

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
    def initialise(self, seed: int, first_layer: int = 0) -> "Transcoders":
        """Random start: encoder entries of variance 2 / n_features, unit decoder rows, no biases.

        The encoder's scale is that of the code the paper's settings come from
        (transcoder_circuits), whose rows have norm sqrt(2 d_model / n_features). Each layer has
        random numbers of its own, so a stack that begins at `first_layer` of a model starts as the
        same layers of the whole stack do.
        """
        for layer in range(self.n_layers):
            generator = torch.Generator(self.W_enc.device)
            generator.manual_seed(seed * 100_003 + first_layer + layer)
            self.W_enc[layer].normal_(generator=generator).mul_((2 / self.n_features) ** 0.5)
            self.W_dec[layer].normal_(generator=generator)
        self.normalise_decoder()
        for bias in (self.b_enc, self.b_dec, self.b_in):
            bias.zero_()
        return self

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Give each feature's writing direction norm 1."""
        unit_rows(self.W_dec)

    def pre_activations(self, x: Tensor) -> Tensor:
        """(n_layers, n_tokens, d_model) inputs -> (n_layers, n_tokens, n_features)."""
        centred = x - self.b_in[:, None]
        return torch.baddbmm(self.b_enc[:, None], centred, self.W_enc.mT)

    def activate(self, pre: Tensor, layers: int | slice = slice(None)) -> Tensor:
        """Activations z of pre-activations (n_layers, n_tokens, n_features), or of one layer.

        layers: which layers of the stack these are; an int takes (..., n_features).
        """
        threshold = None
        if self.activation.threshold:
            threshold = self.log_threshold[layers]
            threshold = threshold if isinstance(layers, int) else threshold[:, None]
        return self.activation.after_training(pre, self.variant.k, threshold)

    def encode(self, x: Tensor) -> Tensor:
        """Activations z of all layers' features (Equation 1)."""
        return self.activate(self.pre_activations(x))

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """(n_layers, n_tokens, n_features) activations -> estimated MLP outputs (Equation 2).

        x: the inputs, by which a variant with a skip path adds what passes the features by;
        without them, what the features alone write.
        """
        estimate = torch.baddbmm(self.b_dec[:, None], z, self.W_dec)
        if self.variant.skip and x is not None:
            estimate = estimate + (x - self.b_in[:, None]) @ self.W_skip.mT
        return estimate

    def forward(self, x: Tensor) -> Tensor:
        """Estimated MLP outputs for the inputs of all layers."""
        return self.decode(self.encode(x), x)

    def layer_pre_activations(self, layer: int, x: Tensor, features: Tensor | None = None
                              ) -> Tensor:
        """(..., d_model) inputs of one layer -> (..., n_features), of all or of some, (n,)."""
        rows = slice(None) if features is None else features
        return nn.functional.linear(x - self.b_in[layer], self.W_enc[layer, rows],
                                    self.b_enc[layer, rows])

    def layer_activations(self, layer: int, x: Tensor, features: Tensor | None = None) -> Tensor:
        """Activations z of one layer's features, or of some: (..., d_model) -> (..., n_features).

        features: (n,) indices, of which only the encoder's rows are computed where they suffice.
        """
        if self.activation.only_cuts:
            return self.layer_pre_activations(layer, x, features).relu()
        # Whether one is active may depend on all of a token's.
        z = self.activate(self.layer_pre_activations(layer, x), layer)
        return z if features is None else z[..., features]

    def replacement(self, layer: int, x: Tensor) -> Tensor:
        """One layer's estimate in place of its MLP, in the type of x, (..., d_model)."""
        return self.layer_estimate(layer, x).to(x.dtype)

    def layer_estimate(self, layer: int, x: Tensor) -> Tensor:
        """One layer's estimate: (..., d_model) -> (..., d_model), in the transcoders' own type."""
        estimate = self.layer_activations(layer, x) @ self.W_dec[layer] + self.b_dec[layer]
        if self.variant.skip:
            estimate = estimate + (x - self.b_in[layer]) @ self.W_skip[layer].mT
        return estimate


def unit_rows(weight: Tensor) -> Tensor:
    """Each row divided by its norm, in place."""
    return weight.div_(weight.norm(dim=-1, keepdim=True).clamp_min(1e-8))


def _silent_features(variant: Variant) -> int:
    """How many features of zeros the files hold after the trained ones.

    circuit-tracer's TopK keeps the k largest pre-activations, negative ones among them; ours keeps
    positive ones. With k features whose pre-activation is 0 no negative one is ever among the k, so
    both say the same.
    """
    return variant.k if ACTIVATIONS[variant.activation].layout == "topk" else 0


def layer_tensors(transcoders: Transcoders) -> list[dict[str, Tensor]]:
    """What the file of each layer holds, on the CPU in float32: see `save_transcoders`."""
    t = transcoders
    # Layer by layer: a batched product's last digits depend on how many layers there are.
    folded = t.b_enc - torch.stack([weight @ mean for weight, mean in
                                    zip(t.W_enc, t.b_in, strict=True)])
    parts = {"W_enc": t.W_enc, "W_dec": t.W_dec, "b_enc": folded, "b_dec": t.b_dec}
    if t.variant.skip:
        parts["W_skip"] = t.W_skip
        parts["b_dec"] = t.b_dec - torch.stack([weight @ mean for weight, mean in
                                                zip(t.W_skip, t.b_in, strict=True)])
    if hasattr(t, "log_threshold"):
        parts["activation_function.threshold"] = t.log_threshold.exp()
    if silent := _silent_features(t.variant):
        parts |= {key: nn.functional.pad(parts[key], (0,) * (2 * parts[key].dim() - 3) + (silent,))
                  for key in ("W_enc", "W_dec", "b_enc")}
    return [{key: value[layer].detach().float().cpu().contiguous()
             for key, value in parts.items()} for layer in range(t.n_layers)]


def save_layers(transcoders: Transcoders, folder: Path, first_layer: int = 0) -> None:
    """The layers' files alone; the stack's first one is the model's layer `first_layer`."""
    for layer, tensors in enumerate(layer_tensors(transcoders), first_layer):
        save_file(tensors, folder / f"layer_{layer}.safetensors")


def save_config(folder: Path, model_name: str, variant: Variant, written: str = "mlp.hook_out"
                ) -> None:
    """config.yaml beside the layers' files, if it is not there as it has to be.

    written: where circuit-tracer finds what an MLP writes to the stream (`Architecture.written`).
    What it says is known without them, so training.json does not list it: where it is lost, nothing
    has to be trained again.
    """
    read = "mlp.hook_in" if variant.site == "transcoder" else written
    layout = ACTIVATIONS[variant.activation].layout
    activation: dict[str, Any] = {"activation": layout} if layout else {}
    if layout == "topk":
        activation["k"] = variant.k
    text = yaml.safe_dump({
        "model_kind": "transcoder_set",
        "model_name": model_name,
        "feature_input_hook": read,
        "feature_output_hook": written,
        "scan": None,
        **activation,
    }, sort_keys=True)
    path = folder / "config.yaml"
    if not path.is_file() or path.read_bytes() != text.encode():
        write_atomic(path, text)


def save_record(folder: Path, record: Mapping[str, Any], variant: Variant, n_layers: int) -> None:
    """training.json beside the layers' files: see `save_transcoders`."""
    write_record(folder / "training.json",
                 {**record, "n_layers": n_layers, "variant": variant._asdict()})


def save_transcoders(transcoders: Transcoders, folder: Path, model_name: str,
                     record: Mapping[str, Any], written: str = "mlp.hook_out") -> None:
    """Write the layout that circuit-tracer loads, and our own record beside it.

    config.yaml names the hooks (`save_config`); layer_<i>.safetensors holds W_enc, W_dec
    (n_features, d_model), b_enc (n_features,) with b_in folded in, and b_dec (d_model,); W_skip
    (d_model, d_model) and activation_function.threshold (n_features,) where the variant has them.
    TopK's files end with k silent features, `_silent_features`. training.json is `record`, the
    variant, and the number of layers, by which a missing last file is noticed.
    """
    save_layers(transcoders, folder)
    save_record(folder, record, transcoders.variant, transcoders.n_layers)
    save_config(folder, model_name, transcoders.variant, written)


def load_transcoders(folder: Path) -> Transcoders:
    """Read `save_transcoders`' layout; b_in comes back as zero, folded into b_enc.

    Raises InputError if files are missing, broken or of unequal shapes.
    """
    record = read_json(folder / "training.json")
    wanted = record.get("n_layers", len(list(folder.glob("layer_*.safetensors"))))
    paths = [folder / f"layer_{layer}.safetensors" for layer in range(wanted)]
    if not paths or not all(path.is_file() for path in paths):
        raise InputError(f"There are no complete transcoders in {folder}; run the training "
                         "chapter first.")
    try:
        variant = Variant(**record.get("variant", {}))
        layers = [load_file(path) for path in paths]
        # What is stacked is let go at once: two whole sets are never held.
        stacked = {key: torch.stack([layer.pop(key) for layer in layers])
                   for key in [*layers[0]]}
        if "activation_function.threshold" in stacked:
            stacked["log_threshold"] = stacked.pop("activation_function.threshold").log()
        if silent := _silent_features(variant):
            stacked |= {key: stacked[key][:, :-silent].clone()
                        for key in ("W_enc", "W_dec", "b_enc")}
        n_layers, n_features, d_model = stacked["W_enc"].shape
        transcoders = Transcoders(n_layers, d_model, n_features, variant)
        transcoders.load_state_dict({**stacked, "b_in": torch.zeros(n_layers, d_model)},
                                    assign=True)
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"The transcoders in {folder} are broken ({reason}); delete the folder "
                         "and run the training chapter again.") from None
    return transcoders.requires_grad_(False).eval()
