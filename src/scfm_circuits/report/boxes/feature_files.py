"""The files behind `features.html`: scripts with one call each, in parts of limited size.

A page opened from disk may load a script but not fetch a file, so each part is a script with one
call, `companionFeatures(kind, number, value)`. `manifest.js` names the parts: `index_*.js` hold the
rows of the searchable table, `panels_*.js` what opens behind a row. Texts come from strangers (gene
sets, labels): the scripts are ASCII JSON, and the page sets them as text.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from scfm_circuits import InputError
from scfm_circuits.common.files import atomic_folder, write_atomic
from scfm_circuits.report.tables import plain, script_call, script_json, version_of

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "feature_pages"
PART_BYTES = 1_000_000
"""No script is longer, unless a single row is."""
PANELS_PER_PART = 250
MAX_TEXT = 160


class IndexColumn(NamedTuple):
    """A column of the index. kind: `number`, `text`, or `flag`; filter: how it can be narrowed."""

    name: str
    title: str
    kind: str
    filter: str = ""
    """`choose` one of its values, `positive` (yes, or above zero), or nothing."""


def write_pages(folder: Path, columns: Sequence[IndexColumn], index: "pd.DataFrame",
                panels: Iterable[Mapping[str, Any]], edges: Iterable[float], *,
                curated: Sequence[Sequence[Any]] = (), types_note: str = "") -> dict[str, Any]:
    """Write the parts and `manifest.js` into `folder`, in one step; returns the manifest.

    index: one row per panel, in the panels' order, with `layer`, `feature` and all columns.
    edges: bounds of the bins of the panels' histograms. curated: features to start with, [layer,
    feature, title, the rule that chose it]; types_note: how activity by cell type was read.
    """
    # Enough digits that the order is that of the numbers; the page shows four.
    records = [[plain(float(f"{value:.9g}")) if isinstance(value, float) else plain(value)
                for value in row]
               for row in index[["feature", *(one.name for one in columns)]].itertuples(
                   index=False, name=None)]
    with atomic_folder(folder) as temporary:
        manifest: dict[str, Any] = {
            "rows": len(index), "columns": [one._asdict() for one in columns],
            "edges": [short(edge) for edge in edges],
            "curated": [list(one) for one in curated], "types_note": types_note,
            "index": _write_parts(temporary, "index", records, len(records)),
            "panels": _write_parts(temporary, "panels", panels, PANELS_PER_PART),
        }
        if sum(rows for _, rows in manifest["panels"]) != len(index):
            raise InputError("The index and the panels of the features differ in number.")
        write_atomic(temporary / "manifest.js",
                     script_call("companionFeatures", "manifest", 0, manifest))
    return manifest


def _write_parts(folder: Path, kind: str, rows: Iterable[Any], most: int) -> list[list[Any]]:
    """Scripts of at most PART_BYTES and `most` rows each; their addresses and numbers of rows."""
    parts: list[list[Any]] = []
    waiting: list[str] = []
    size = 0

    def flush() -> None:
        body = f'companionFeatures("{kind}", {len(parts)}, [{",".join(waiting)}]);\n'
        name = f"{kind}_{len(parts):03}.js"
        write_atomic(folder / name, body)
        parts.append([f"{name}?v={version_of(body)}", len(waiting)])
        waiting.clear()

    for row in rows:
        text = script_json(row)
        if waiting and (size + len(text) > PART_BYTES or len(waiting) == most):
            flush()
            size = 0
        waiting.append(text)
        size += len(text) + 1
    if waiting:
        flush()
    return parts


def index_box(folder: Path) -> str:
    """The HTML of the box that features.js fills; a sentence where the run has no such files."""
    manifest = folder / "manifest.js"
    if not manifest.is_file():
        return "This run has no feature pages."
    version = version_of(manifest.read_bytes())
    return (f'<div id="feature-index" class="features mathjax_ignore" '
            f'data-source="downloads/{FOLDER}/" data-version="{version}"><p>The index needs '
            'scripts; the same features are in <a href="downloads/tables/features.csv">'
            "features.csv</a>.</p></div>")


def short(number: Any) -> float | None:
    """Four significant digits: what a reader can use; None for a missing number."""
    value = float(number)
    return float(f"{value:.4g}") if math.isfinite(value) else None


def cut(text: Any) -> str:
    """A text of at most `MAX_TEXT` characters; empty for a missing one."""
    text = "" if text is None or text != text else str(text)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
