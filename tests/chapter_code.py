"""A chapter's code, executed in this process on a few cells."""

import os
from typing import Any

SMALL = {"genes_per_cell": 24, "vocabulary_size": 400, "model_layers": 2, "model_width": 32,
         "model_heads": 2, "model_steps": 20, "human_layer": 1, "expansion": 2,
         "training_tokens": 4096, "batch_tokens": 512, "buffer_tokens": 4096, "warmup_steps": 2,
         "null_draws": 21}


def executed(notebook: Any, **more: Any) -> dict[str, Any]:
    """The names that all code of a notebook of the profile `interferon` leaves.

    The cells are real where `SCFM_INTERFERON` names them, and simulated elsewhere. more: fields
    beside `SMALL`.
    """
    path = os.environ.get("SCFM_INTERFERON")
    cells = {"cells": path} if path else {
        "cells": "planted", "cells_are": "simulated", "label_column": "cell_type",
        "case_type": "endothelial cell of artery", "known_response": ["VWF", "PECAM1", "CDH5"]}
    names: dict[str, Any] = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
        if "parameters" in cell.metadata.get("tags", []):
            names["overrides"] = {**SMALL, **cells, **more}
    return names
