"""What training costs, as tables beside the chapter that trains: the run's and a benchmark's."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from scfm_circuits.common.files import read_json, time_in_words
from scfm_circuits.common.profile import ROOT
from scfm_circuits.transcoders.training.cost import TrainingCost

if TYPE_CHECKING:
    from scfm_circuits.report.report import Report, Shown

BENCHMARK = ROOT / "results" / "bench" / "training.json"

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


def cost_table(run: TrainingCost, paper: TrainingCost) -> pd.DataFrame:
    """A run's cost beside the paper's, which is projected at the run's operations per second."""
    rows = [("tokens", f"{run.tokens:,}", f"{paper.tokens:,}"),
            ("floating-point operations", f"{run.operations:.3g}", f"{paper.operations:.3g}"),
            ("time", time_in_words(run.seconds), f"{time_in_words(paper.seconds)}, projected"),
            ("tokens per second", f"{run.tokens / run.seconds:,.0f}", "not named"),
            ("operations per second", f"{run.operations / run.seconds:.3g}", "as this run")]
    return pd.DataFrame(rows, columns=["measure", "this run", "the paper's size"])


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


def shown_benchmark(report: "Report") -> "Shown | None":
    """The benchmark's figures as a table with its machine, or how to get them."""
    found = benchmark_table(BENCHMARK)
    if found is None:
        return report.warning("The benchmark was not run on this machine; "
                              "`make bench BENCH=training` runs it in a few minutes.")
    frame, where = found
    return report.show(frame, caption=f"make bench BENCH=training, at the paper's layer size, on "
                                      f"{where}")
