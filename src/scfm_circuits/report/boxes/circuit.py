"""The interactive circuit of a page: its data and the script that draws it."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scfm_circuits.report.tables import script_call, version_of

LIBRARY = "vendor/d3/d3.min.js"
"""Where the pages find d3. It is loaded when a circuit comes near, not on every page."""


class Choice(NamedTuple):
    """A circuit that a reader can choose: the name of its files, what the list calls it
    (untrusted), and what `view.circuit_view` gives."""

    name: str
    title: str
    view: Mapping[str, Any]

    @property
    def script(self) -> str:
        """The view as a script: `companionCircuit("<name>", {...});` around ASCII JSON."""
        return script_call("companionCircuit", self.name, dict(self.view))


def circuit_bundle(choices: Sequence[Choice], caption: str | None) -> dict[str, str]:
    """MIME bundle of the box that circuit.js fills.

    choices: the circuits to choose from, the first of which is shown. Without the script, a
    sentence leads to its files, `circuits/<name>.json` and `.graphml`.
    """
    name, _, view = choices[0]
    counted = f"{len(view['edges']):,} of {view['total_edges']:,} edges"
    title = f'<p class="table-caption">{html.escape(caption)}</p>\n' if caption else ""
    lines = [caption, f"<Circuit {name}: {counted}; {len(choices)} to choose from>"]
    listed = json.dumps([[one.name, one.title, f"downloads/circuits/{one.name}.js?v="
                          f"{version_of(one.script)}"] for one in choices])
    files = " and ".join(
        f'<a data-file="{kind}" href="downloads/circuits/{name}.{kind}">{name}.{kind}</a> ({what})'
        for kind, what in (("json", "for Neuronpedia, attention heads folded away"),
                           ("graphml", "every node")))
    return {
        # The reserved class keeps MathJax away from dollar signs in labels.
        "text/html": (
            f'<div class="circuit mathjax_ignore" data-choices="{html.escape(listed)}" '
            f'data-library="{LIBRARY}">\n'
            f'{title}<p class="table-note"><span class="circuit-fallback">Where scripts run, this '
            f"is a figure to explore ({counted}); the static figure shows the same circuit. "
            f"</span>The circuit as a file: {files}</p>\n</div>"),
        "text/plain": "\n".join(line for line in lines if line),
    }
