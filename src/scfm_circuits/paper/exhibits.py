"""The paper's tables and case study as printed, read and checked."""

from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from scfm_circuits.common.profile import ROOT

PAPER = ROOT / "data" / "paper"

MODEL_WIDTH = 1024
"""Residual width of Pythia-410m."""


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


def read_paper(folder: str | Path = PAPER) -> PaperTables:
    """Read `data/paper/*.csv` (or another `folder` of the same files)."""

    def read(name: str) -> pd.DataFrame:
        return pd.read_csv(Path(folder, f"{name}.csv"), keep_default_na=False)

    def pairs(name: str) -> dict[str, Any]:
        return dict(read(name).itertuples(index=False, name=None))

    loss, kl, settings = ({key: float(value) for key, value in pairs(name).items()}
                          for name in ("table1", "table2", "hyperparameters"))
    return PaperTables(loss, kl, read("table3"), read("table4"), settings,
                       tuple(read("figure4_genes")["gene"]), read("circuit_genes"),
                       pairs("case_study"))
