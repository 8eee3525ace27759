"""What training costs in floating-point operations, and what a benchmark measured of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from scfm_circuits.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.report import Report, Shown


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
    from scfm_circuits.architectures import decoder_layers

    layers = decoder_layers(model)
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters()
               if parameter.ndim == 2) // len(layers)


def time_in_words(seconds: float) -> str:
    """A duration in the unit that suits it: `40 seconds`, `3.2 hours`, `36 days`."""
    units = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
    unit, length = next((pair for pair in units if seconds >= 2 * pair[1]), units[-1])
    number = seconds / length
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"


_ROWS = (
    ("fraction_of_matmul_peak", "share of the matrix-product limit"),
    ("fraction_of_matmul_peak_50_active", "the same, 50 features active"),
    ("fraction_of_matmul_peak_of_the_step", "the same, step alone"),
    ("fraction_of_matmul_peak_bfloat16", "the same in bfloat16"),
    ("tokens_per_second", "tokens per second, 24 layers"),
    ("projected_minutes_for_60m_tokens", "minutes for 60 M tokens, 24 layers"),
    ("peak_memory_mib", "peak memory (MiB)"),
    ("ratio_vs_autograd", "speed over the same step by autograd"),
    ("ratio_vs_autograd_50_active", "the same, 50 features active"),
    ("ratio_vs_sparsify", "speed over sparsify (TopK)"),
    ("memory_ratio_vs_sparsify", "sparsify's memory over ours"),
)


def benchmark_table(path: Path) -> tuple[pd.DataFrame, str] | None:
    """What `make bench BENCH=training` measured, and on which machine; None if it was not run.

    A figure that was extrapolated from fewer layers says so.
    """
    found = read_json(path)
    if not found:
        return None
    rows: list[dict[str, Any]] = []
    for key, what in _ROWS:
        value = found.get(key)
        if value is None:
            value = next((found[other] for other in found if other.endswith("extrapolated_from_"
                         f"{found.get('layers')}") and other.startswith(f"{key}_24")), None)
            what += f" (extrapolated from {found.get('layers')})"
        if isinstance(value, int | float):
            rows.append({"measure": what, "value": float(value)})
    device = found.get("device")
    where = (f"{found.get('cpu')}, {found.get('threads')} threads" if device in (None, "cpu")
             else f"{device}")
    return pd.DataFrame(rows, columns=["measure", "value"]), where


def shown_benchmark(report: "Report", path: Path) -> "Shown | None":
    """The benchmark's figures as a table with its machine, or how to get them."""
    found = benchmark_table(path)
    if found is None:
        return report.warning("It was not run on this machine: `make bench BENCH=training` does, "
                              "in a few minutes.")
    frame, where = found
    return report.show(frame, caption=f"make bench BENCH=training, at the paper's layer size, on "
                                      f"{where}")
