"""The page of downloads: every file of a run under its chapter, with a line on what it holds.

What a file holds is what its chapter says of it: the caption of the table or figure, else the
section that writes it. Captions and headings may quote labels of strangers and are escaped.
"""

import ast
import html
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scfm_circuits.book.chapters import Notebook, Run
from scfm_circuits.common.files import read_json

_KINDS = {"table": "tables", "browse": "tables", "figure": "figures"}
"""Folder of the files that a method of `Report` writes."""
_CAPTION = re.compile(r'<p class="table-caption[^>]*>(.*?)</p>.*?downloads/tables/([\w.-]+)\.csv"',
                      re.DOTALL)
_OUTPUT = re.compile(r'Output "(.*)" \(p=')


class Made(NamedTuple):
    """What a chapter says of a file that it writes."""

    notebook: Notebook
    text: str


def download_list(run: Run, paths: Iterable[Path]) -> str:
    """Markdown with a heading for each chapter and HTML lists of links to its files.

    paths: result files, under the run's results.
    """
    names: dict[str, list[str]] = {}
    for path in sorted(paths):
        # What a browsable table or a circuit loads, and a figure on a phone: the CSV, the JSON and
        # the figure itself are for people.
        if path.suffix != ".js" and path.parent.name != "narrow":
            name = path.relative_to(run.profile.results).as_posix()
            names.setdefault(name.rpartition(".")[0], []).append(name)
    made = described(run)
    lines = ["## The run as a whole", ""]
    whole = {"claims": "Every claim of the paper with ours and the verdict",
             "provenance": "Commit, versions, machine, times and checksums of the run"}
    lines += _list((whole.get(stem, _of_circuit(run, stem)), files) for stem, files in names.items()
                   if stem not in made and not stem.startswith("values/"))
    for notebook in run.notebooks:
        own = [(made[stem].text, files) for stem, files in names.items()
               if stem in made and made[stem].notebook == notebook]
        values = f"values/{notebook.name}"
        own += [("The numbers in its text", names[values])] if values in names else []
        own += [("The chapter as a notebook", [f"notebooks/{notebook.path.name}"])]
        lines += [f"## {notebook.title}", "", *_list(own)]
    return "\n".join(lines)


def _list(items: Iterable[tuple[str, list[str]]]) -> list[str]:
    """What is in the files, and a link to each; nothing if there is none."""
    rows = "".join(
        f"<li>{html.escape(text)}<br>" + " ".join(
            f'<a href="downloads/{html.escape(name, quote=True)}">'
            f"{html.escape(name.rpartition('/')[2])}</a>" for name in files) + "</li>"
        for text, files in items)
    return [f'<ul class="downloads">{rows}</ul>', ""] if rows else []


def described(run: Run) -> dict[str, Made]:
    """What each file holds, by its path under the results without the ending."""
    found: dict[str, Made] = {}
    for notebook in run.notebooks:
        executed = read_json(run.output(notebook.name))
        for stem, text in _of_chapter(executed.get("cells", [])):
            found.setdefault(stem, Made(notebook, text))
        if any(one.startswith("circuits/") for one in notebook.produces):
            for path in (run.profile.results / "circuits").glob("*.json"):
                stem = f"circuits/{path.stem}"
                found.setdefault(stem, Made(notebook, _of_circuit(run, stem)))
    return found


def _of_chapter(cells: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Stem and description of every table and figure that the cells' code names."""
    section = ""
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            section = (re.findall(r"^#+ (.*)", source, re.MULTILINE) or [section])[-1]
            continue
        printed = {name: html.unescape(caption) for output in cell.get("outputs", [])
                   for caption, name in _CAPTION.findall(
                       "".join(output.get("data", {}).get("text/html", "")))}
        figure = cell.get("metadata", {}).get("mystnb", {}).get("figure", {}).get("caption", "")
        for method, name, caption in _calls(source):
            text = figure if method == "figure" else printed.get(name, caption)
            yield f"{_KINDS[method]}/{name}", (text.partition(". ")[0].rstrip(".")
                                               or f"Of the section “{section}”")


def _calls(source: str) -> Iterator[tuple[str, str, str]]:
    """Method, name and constant caption (or nothing) of each call that writes a table or figure."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a magic of IPython
        return
    for node in ast.walk(tree):
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                and node.func.attr in _KINDS and node.args
                and isinstance(node.args[0], ast.Constant)):
            captions = [one.value.value for one in node.keywords if one.arg == "caption"
                        and isinstance(one.value, ast.Constant)]
            yield node.func.attr, str(node.args[0].value), str((captions or [""])[0] or "")


def _of_circuit(run: Run, stem: str) -> str:
    """What a circuit's file says that it leads to; nothing for another file."""
    graph = read_json(run.profile.results / f"{stem}.json") if stem.startswith("circuits/") else {}
    ends = [match[1].strip("_ ") for node in graph.get("nodes", [])
            if (match := _OUTPUT.match(str(node.get("clerp"))))]
    what = "Pruned graph" if stem.endswith("_graph") else "Circuit"
    if not ends:
        return f"{what} of a feature" if graph else ""
    return f"{what} of the call “{ends[0]}”: JSON for Neuronpedia, GraphML for Cytoscape or Gephi"
