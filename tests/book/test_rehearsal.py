"""The profile `paper` at a small size: every chapter executes on stand-ins of the atlas's shape."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from scfm_circuits.common.profile import ROOT
from tests.benchmarks.rehearsal import Size, write_rehearsal

SMALL = Size(cells=60, genes=900, layers=3, width=32, heads=2, vocabulary_rows=50_304, tokens=4096)


def test_every_chapter_executes_and_every_table_has_its_shape(tmp_path: Path) -> None:
    """All layers and features of a model that is loaded, not trained, with the paper's settings."""
    profile = write_rehearsal(tmp_path / "stand-ins", SMALL, os.environ.get("SCFM_TOKENIZER"))
    results = tmp_path / "results"
    # The other books of the tests have models in float32.
    with open(profile, "a") as file:
        file.write("model_precision: bfloat16\n")
    done = subprocess.run(
        [sys.executable, "-m", "scfm_circuits", "book", "execute", "--profile", str(profile)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "SCFM_RESULTS": str(results), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    tables = results / "rehearsal" / "tables"
    layers = list(range(SMALL.layers))
    table4 = pd.read_csv(tables / "table4.csv")
    assert table4["layer"].tolist() == layers and (table4["live"] > 0).all()
    assert set(layers) <= set(pd.read_csv(tables / "validation_layers.csv")["layer"])
    training = json.loads((results / "rehearsal" / "transcoders" / "training.json").read_text())
    assert len(training["history"][-1]["l0"]) == SMALL.layers
    scores = pd.read_csv(tables / "feature_scores.csv")
    assert set(scores["layer"]) == set(layers)
    claims = pd.read_csv(results / "rehearsal" / "claims.csv")
    assert len(claims) > 100 and not (claims["verdict"] == "match").all()
