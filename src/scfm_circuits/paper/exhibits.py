"""The paper's tables and case study as printed, read and checked."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from scfm_circuits import InputError
from scfm_circuits.common.profile import ROOT

PAPER = ROOT / "data" / "paper"

MODEL_WIDTH = 1024
"""Residual width of Pythia-410m."""

COLUMNS = {
    "table1": ("configuration", "validation_loss"),
    "table2": ("configuration", "mean_kl"),
    "table3": ("feature", "log10_E_f", "activating_tokens", "gene_level_interpretable"),
    "table4": ("layer", "total", "interpretable", "fraction", "percentage"),
    "hyperparameters": ("parameter", "value"),
    "figure4_genes": ("rank", "gene"),
    "circuit_genes": ("gene", "literature"),
    "case_study": ("item", "value"),
}


class PaperTables(NamedTuple):
    """The paper's exhibits as printed (arXiv:2509.14723)."""

    loss: dict[str, float]
    """Table 1: mean validation loss in nats per token, by model configuration."""
    kl: dict[str, float]
    """Table 2: mean KL(original || modified) in nats per token, by model configuration."""
    table3: pd.DataFrame
    """Table 3: 20 rows of feature, log10_E_f, activating_tokens, gene_level_interpretable."""
    table4: pd.DataFrame
    """Table 4: 24 rows of layer, total, interpretable, fraction, percentage."""
    settings: dict[str, float]
    """Training hyperparameters and cuts named in the text."""
    prompt_genes: tuple[str, ...]
    """Figure 4: the 64 genes of the case study's cell sentence, in order."""
    circuit: pd.DataFrame
    """The 9 gene nodes of the circuit; literature says "yes" for the four the text discusses."""
    case: dict[str, str]
    """The case study's other statements, as text."""


def _read(folder: Path, name: str) -> pd.DataFrame:
    path = folder / f"{name}.csv"
    if not path.is_file():
        raise InputError(f"{path} is missing; restore data/paper from the repository.")
    try:
        frame = pd.read_csv(path, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable CSV file: {error}.") from error
    if tuple(frame.columns) != COLUMNS[name]:
        raise InputError(
            f"{path} has the columns {', '.join(map(str, frame.columns))}; "
            f"it must have {', '.join(COLUMNS[name])}."
        )
    return frame


def read_paper(folder: str | Path | None = None) -> PaperTables:
    """Read `data/paper/*.csv` (or another `folder` of the same files).

    Raises InputError if a file is missing, is not CSV, or has other columns.
    """
    folder = PAPER if folder is None else Path(folder)
    frames = {name: _read(folder, name) for name in COLUMNS}

    def column_by(name: str, key: str, value: str) -> dict[str, float]:
        return dict(zip(frames[name][key], frames[name][value].astype(float), strict=True))

    try:
        return PaperTables(
            loss=column_by("table1", "configuration", "validation_loss"),
            kl=column_by("table2", "configuration", "mean_kl"),
            table3=frames["table3"],
            table4=frames["table4"],
            settings=column_by("hyperparameters", "parameter", "value"),
            prompt_genes=tuple(frames["figure4_genes"]["gene"]),
            circuit=frames["circuit_genes"],
            case=dict(zip(frames["case_study"]["item"], frames["case_study"]["value"],
                          strict=True)),
        )
    except ValueError as error:
        raise InputError(f"A file in {folder} holds text where a number belongs: {error}.") \
            from error
