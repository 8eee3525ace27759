"""The interactive circuit of a page: its data and the script that draws it."""

import html
from collections.abc import Mapping
from typing import Any

from scfm_circuits.report.tables import script_call, version_of

LIBRARY = "vendor/d3/d3.min.js"
"""Where the pages find d3. It is loaded when a circuit comes near, not on every page."""


def circuit_script(name: str, view: Mapping[str, Any]) -> str:
    """The view as a script: `companionCircuit("<name>", {...});` around ASCII JSON."""
    return script_call("companionCircuit", name, dict(view))


def circuit_bundle(name: str, view: Mapping[str, Any], caption: str | None, script: str
                   ) -> dict[str, str]:
    """MIME bundle of the box that circuit.js fills.

    Without the script, a sentence leads to the circuit's file, `circuits/<name>.json`.
    """
    counted = f"{len(view['edges']):,} of {view['total_edges']:,} edges"
    title = f'<p class="table-caption">{html.escape(caption)}</p>\n' if caption else ""
    lines = [caption, f"<Circuit {name}: {counted}>"]
    return {
        # The reserved class keeps MathJax away from dollar signs in labels.
        "text/html": (
            f'<div class="circuit mathjax_ignore" data-circuit="{name}" '
            f'data-source="downloads/circuits/{name}.js?v={version_of(script)}" '
            f'data-library="{LIBRARY}">\n'
            f'{title}<p class="table-note"><span class="circuit-fallback">Where scripts run, this '
            f"is a figure to explore ({counted}); the static figure shows the same circuit. "
            f'</span>The circuit as a file: <a href="downloads/circuits/{name}.json">{name}.json'
            "</a></p>\n</div>"),
        "text/plain": "\n".join(line for line in lines if line),
    }
