"""The gate between execution and the book: what an executed notebook must satisfy.

papermill's own metadata is not enough: a cell that timed out is marked `completed`, and a notebook
full of tracebacks renders without a warning. So the outputs themselves are looked at.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def without_colours(text: str) -> str:
    """The text without terminal escape codes."""
    return _COLOURS.sub("", text)


def problems(notebook: Mapping[str, Any], known_parameters: Iterable[str]) -> list[str]:
    """Everything that keeps the notebook out of the book, one phrase each.

    notebook: an executed notebook, as nbformat or json reads it.
    known_parameters: the names that may have been handed to it.
    """
    found: list[str] = []
    cells = [(index, cell) for index, cell in enumerate(notebook["cells"])
             if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    for number, (index, cell) in enumerate(cells, 1):
        found += [f"cell {index}: {problem}" for problem in _cell_problems(cell, number)]
    details = notebook["metadata"].get("papermill", {})
    if details.get("exception"):
        found.append("papermill recorded an exception")
    if "scfm" not in notebook["metadata"]:
        found.append("it has no execution record")
    unknown = sorted(set(details.get("parameters", {})) - set(known_parameters))
    if unknown:
        found.append(f"it was given the unknown parameter {unknown[0]!r}")
    return found


def _cell_problems(cell: Mapping[str, Any], number: int) -> Iterable[str]:
    if cell.get("execution_count") is None:
        yield "was not executed"
    elif cell["execution_count"] != number:
        yield f"was executed out of order ([{cell['execution_count']}], expected [{number}])"
    status = cell["metadata"].get("papermill", {}).get("status", "completed")
    if status != "completed":
        yield f"has the status {status!r}"
    shown = [output for output in cell["outputs"] if "scrapbook" not in output.get("metadata", {})]
    for output in shown:
        if output["output_type"] == "error":
            yield f"ended in {output['ename']}: {without_colours(str(output['evalue']))}"
    if any(kind.startswith("image/") for output in shown for kind in output.get("data", {})):
        display = cell["metadata"].get("mystnb", {})
        if not str(display.get("image", {}).get("alt", "")).strip():
            yield "shows a figure without alternative text (mystnb image.alt)"
        if not str(display.get("figure", {}).get("caption", "")).strip():
            yield "shows a figure without a caption (mystnb figure.caption)"


def glued_keys(notebook: Mapping[str, Any]) -> set[str]:
    """Names under which the notebook's values are available to the prose."""
    return {output["metadata"]["scrapbook"]["name"] for cell in notebook["cells"]
            for output in cell.get("outputs", []) if "scrapbook" in output.get("metadata", {})}


def missing_products(results: Path, patterns: Iterable[str]) -> list[str]:
    """Declared result files that are not there."""
    return [f"it did not write {pattern}" for pattern in patterns
            if not any(results.glob(pattern))]
