"""What training costs in floating-point operations, and what a benchmark measured of it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

def training_operations(n_layers: int, d_model: int, n_features: int, tokens: int,
                        layer_weights: int | None = None, forward_tokens: int | None = None
                        ) -> float:
    """Floating-point operations of training transcoders on all layers from one forward pass.

    A step has five products of n_tokens x d_model x n_features per layer (two forward, three
    backward); the model's forward pass has two operations per weight and token. Attention's own
    products, a few per cent of the pass on sentences of 200 tokens, are left out, and the logits,
    which are not computed. The paper's size gives 1.57e17.

    layer_weights: entries of a layer's matrices in the model; by default GPT-NeoX's 12 d_model^2.
    forward_tokens: tokens that pass the model, fewer than `tokens` if a buffer keeps them all.
    """
    weights = 12 * d_model**2 if layer_weights is None else layer_weights
    passing = tokens if forward_tokens is None else forward_tokens
    return float(n_layers * (10 * tokens * d_model * n_features + 2 * passing * weights))


def layer_weights(model: "PreTrainedModel") -> int:
    """Entries of the matrices of one of the model's layers, on average."""
    from scfm_circuits.models.architectures import decoder_layers

    layers = decoder_layers(model)
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters()
               if parameter.ndim == 2) // len(layers)
