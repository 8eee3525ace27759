"""Mathematics without a network: MathJax copied beside the pages from an installed wheel.

Only the one script the pages load, its fonts and the TeX extensions it fetches when a formula uses
one are taken (2 of 24 MB). They do not go into a static folder, because Jupyter Book adds every
script it finds there to every page.
"""

import importlib.util
import shutil
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

SCRIPT = "tex-mml-chtml.js"
FOLDERS = ("output/chtml/fonts", "input/tex/extensions")


def installed_mathjax() -> Path:
    """The wheel's MathJax folder."""
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise ExtensionError("sphinx-mathjax-offline is not installed; see requirements.lock")
    return Path(spec.origin).parent / "static" / "mathjax"


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Put the script and its fonts where `mathjax_path` points."""
    if error is not None or app.builder.format != "html":
        return
    source, target = installed_mathjax(), Path(app.outdir) / "vendor" / "mathjax"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / SCRIPT, target / SCRIPT)
    for folder in FOLDERS:
        shutil.copytree(source / folder, target / folder, dirs_exist_ok=True)


def setup(app: Sphinx) -> dict[str, object]:
    """Register with Sphinx."""
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
