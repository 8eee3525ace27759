"""The interactive circuit of a page: its data and the script that draws it."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scfm_circuits.report.tables import script_call, version_of

LIBRARY = "vendor/d3/d3.min.js"
"""Where the pages find d3. It is loaded when a circuit comes near, not on every page."""


def circuit_script(name: str, view: Mapping[str, Any]) -> str:
    """The view as a script: `companionCircuit("<name>", {...});` around ASCII JSON."""
    return script_call("companionCircuit", name, dict(view))


class Choice(NamedTuple):
    """A circuit that a reader can choose. title: as the list calls it, untrusted; script: the text
    of `circuits/<name>.js`."""

    name: str
    title: str
    script: str


def circuit_bundle(view: Mapping[str, Any], caption: str | None, choices: Sequence[Choice]
                   ) -> dict[str, str]:
    """MIME bundle of the box that circuit.js fills.

    choices: the circuits to choose from, the first of which is shown; view: that of the first.
    Without the script, a sentence leads to its files, `circuits/<name>.json` and `.graphml`.
    """
    name = choices[0].name
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
