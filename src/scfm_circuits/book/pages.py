"""Building the pages: stage prose and executed notebooks, run Jupyter Book, check, swap in.

1. Stage a clean source folder: `book/` plus the executed notebooks, side by side.
2. Fill the generated parts of the prose (exhibit map, verdicts, downloads) from the run.
3. Run Jupyter Book with every warning an error.
4. Refuse pages that would fetch anything from another host.
5. Move the result to `html/`.

`html/` stands only if it shows a whole run: before anything stale is executed or built, the earlier
pages are moved to `html-old/`, and they are removed when the new ones are there.
"""

import hashlib
import html
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from scfm_circuits import InputError
from scfm_circuits.book import chapters, front_page, search_words
from scfm_circuits.book.chapters import Notebook, Run, plan, read_notebooks, read_record
from scfm_circuits.book.execution import ExecutionFailed
from scfm_circuits.book.gate import without_colours
from scfm_circuits.book.result_files import download_list
from scfm_circuits.common.files import only_one, read_json, sha256_of_file, write_atomic, write_json
from scfm_circuits.common.profile import ROOT
from scfm_circuits.report.boxes.feature_files import FOLDER, index_box
from scfm_circuits.report.boxes.rating import rating_box

BOOK = ROOT / "book"
STAMP = "built.json"
DOWNLOADS = ("tables/*.csv", "tables/*.js", "figures/*.png", "figures/*.svg",
             "figures/narrow/*.png", "circuits/*.json", "circuits/*.graphml", "circuits/*.js",
             "feature_pages/*.js", "values/*.json", "claims.csv", "provenance.json")
"""Results that are copied beside the pages; transcoder weights stay where they are."""
ONLY_IF = "only-if:"
"""Begins a tag: the cell is shown only if a value of its chapter, named behind it, is true."""
FOLD, UNFOLD = "fold:", "unfold"
"""Begin and end a fold: it has the title behind `fold:`, and ends before a heading as well."""
# In <a> an address is only followed on a click; in these it is fetched with the page.
_FETCHED = re.compile(
    r"<(?:script|img|iframe|source|audio|video|embed|object|link)\b[^>]*?"
    r"\b(?:src|href|data)\s*=\s*[\"']?\s*(?:https?:)?//[^>]*>", re.IGNORECASE,
)
_FETCHED_BY_CSS = re.compile(r"(?:url\(|@import\s)\s*[\"']?(?:https?:)?//", re.IGNORECASE)


def build(run: Run, output: Path) -> bool:
    """Build `<output>/html`; returns False if it already shows exactly this run.

    Raises ExecutionFailed with the builder's warnings if there is one, InputError if the table of
    contents does not list the notebooks or another run is building into the folder.
    """
    output = output.resolve()
    if _shows(output, fingerprint(run)):
        return False  # what is finished may be read-only
    with (only_one(output, "building pages into"),
          only_one(run.profile.results, "building pages from", reads=True)):
        content = fingerprint(run)
        if _shows(output, content):
            return False
        _set_aside(output)
        _check_contents(run)
        _build(run, output)
        write_json(output / STAMP, {"content": content, "profile": run.profile.name})
        shutil.rmtree(output / "html-old", ignore_errors=True)
        return True


def set_aside_unless_fresh(run: Run, output: Path) -> None:
    """Move `<output>/html` to `html-old` if it does not show this run as it now is.

    Raises InputError, before anything is executed, if pages could not be built into the folder.
    """
    output = output.resolve()
    if plan(run) or not _shows(output, fingerprint(run)):
        with only_one(output, "building pages into"):
            _set_aside(output)


def _shows(output: Path, content: str) -> bool:
    return ((output / "html" / "index.html").is_file()
            and read_json(output / STAMP).get("content") == content)


def _set_aside(output: Path) -> None:
    (output / STAMP).unlink(missing_ok=True)
    if (output / "html").exists():
        shutil.rmtree(output / "html-old", ignore_errors=True)
        (output / "html").rename(output / "html-old")


def _build(run: Run, output: Path) -> None:
    """Stage, build and check in `<output>/work`, then move the pages to `<output>/html`."""
    work = output / "work"
    shutil.rmtree(work, ignore_errors=True)
    source = work / "source"
    stage(run, source)
    built = _run_jupyter_book(source, work)
    foreign = sorted(foreign_requests(built))
    if foreign:
        raise ExecutionFailed("The pages would fetch from other hosts:\n  " + "\n  ".join(foreign))
    built.rename(output / "html")
    shutil.rmtree(work)


def fingerprint(run: Run) -> str:
    """Hash of everything that the pages are made from."""
    files = [path for path in sorted(BOOK.rglob("*")) if path.is_file()
             and "_build" not in path.parts and "__pycache__" not in path.parts]
    files += [run.output(notebook.name) for notebook in run.notebooks]
    files += sorted(_downloads(run))
    files += sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(run.profile.name.encode())
    for path in files:
        digest.update(f"{path.name}\0{sha256_of_file(path)}\n".encode())
    return digest.hexdigest()


def _downloads(run: Run) -> Iterator[Path]:
    for pattern in DOWNLOADS:
        yield from run.profile.results.glob(pattern)


def _check_contents(run: Run) -> None:
    """Every notebook is in the table of contents, and nothing in it is missing."""
    contents = _contents()
    listed = {contents["root"], *(one["file"] for part in contents.get("parts", ())
                                  for one in part["chapters"])}
    notebooks = {notebook.page for notebook in read_notebooks(chapters.NOTEBOOKS)}
    pages = {path.stem for path in BOOK.glob("*.md")}
    unlisted, missing = notebooks - listed, listed - notebooks - pages
    if unlisted:
        raise InputError(f"book/_toc.yml does not list the notebook {min(unlisted)}.")
    if missing:
        raise InputError(f"book/_toc.yml lists {min(missing)}, which is no page and no notebook.")


def _contents() -> dict[str, Any]:
    contents: dict[str, Any] = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
    return contents


def _without(contents: dict[str, Any], pages: Collection[str]) -> dict[str, Any]:
    """A table of contents without some pages, and without the parts that have no other."""
    parts = [{**part, "chapters": [one for one in part["chapters"] if one["file"] not in pages]}
             for part in contents.get("parts", ())]
    return {**contents, **({"parts": [one for one in parts if one["chapters"]]} if parts else {})}


def stage(run: Run, source: Path) -> None:
    """Lay out what Jupyter Book reads: pages and notebooks flat, downloads under `_extra/`."""
    shutil.copytree(BOOK, source, ignore=shutil.ignore_patterns("_build", "__pycache__"))
    (source / "_toc.yml").write_text(yaml.safe_dump(_without(_contents(), _lacking(run)),
                                                    sort_keys=False), encoding="utf-8")
    for page in source.glob("*.md"):
        page.write_text(_filled(run, page.read_text(encoding="utf-8")), encoding="utf-8")
    for notebook in run.notebooks:
        _stage_notebook(run, notebook, source)
    downloads = source / "_extra" / "downloads"
    for path in _downloads(run):
        target = downloads / path.relative_to(run.profile.results)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (downloads / "notebooks").mkdir(parents=True, exist_ok=True)
    for notebook in run.notebooks:
        shutil.copyfile(notebook.path, downloads / "notebooks" / notebook.path.name)
    write_atomic(source / "_extra" / search_words.FILE, search_words.script(run.profile.results))
    # What the local Sphinx extensions show on the pages.
    records = {notebook.page: {**read_record(run.output(notebook.name)),
                               "source": notebook.path.name}
               for notebook in run.notebooks}
    write_json(source / "companion.json", {
        "run": read_json(run.profile.results / "provenance.json"),
        "chapters": records,
        # What a model is that the run trains itself; nothing is said of one that is loaded.
        "model": (f"of {run.profile.model_layers} layers" if run.profile.model == "train"
                  else None),
        "narrow": _narrow_figures(run.profile.results / "figures"),
    })


def _narrow_figures(folder: Path) -> dict[str, str]:
    """Where the phone's version of a figure is, by the name that the builder gives the figure's
    file: the SHA-256 of its content."""
    return {sha256_of_file(folder / path.name): f"downloads/figures/narrow/{path.name}"
            for path in folder.glob("narrow/*.png") if (folder / path.name).is_file()}


def _stage_notebook(run: Run, notebook: Notebook, source: Path) -> None:
    """Copy a notebook with its generated parts filled, without the cells that only carry
    papermill's parameters, and without those of what this run could not test: `only-if:KEY` among
    their tags names a value of the chapter.

    What a cell tagged `fold:TITLE` begins is folded under that title until the next fold, heading
    or cell tagged `unfold`.

    Raises InputError for a tag whose value the chapter does not keep, or a heading inside a fold.
    """
    name = notebook.name
    node = read_json(run.output(name))
    values = read_json(run.profile.results / "values" / f"{name}.json")
    cells: list[dict[str, Any]] = []
    folds: list[str | None] = []
    fold = None
    for cell in node["cells"]:
        tags = cell["metadata"].setdefault("tags", [])
        if {"parameters", "injected-parameters"} & set(tags):
            tags.append("remove-cell")
        # Hidden by one switch a page (book.js) instead of a bar a cell.
        tags[:] = [tag for tag in tags if tag not in ("hide-input", "remove-input")]
        conditions = [tag.removeprefix(ONLY_IF) for tag in tags if tag.startswith(ONLY_IF)]
        for key in conditions:
            if key not in values:
                raise InputError(f"A cell of {name} is to be shown only if {key!r} holds, and the "
                                 "chapter keeps no such value; correct its tag.")
        if cell["cell_type"] == "markdown":
            cell["source"] = _filled(run, "".join(cell["source"]))
        elif "print(" not in "".join(cell["source"]):  # what functions say while they work
            cell["outputs"] = [one for one in cell["outputs"] if one["output_type"] != "stream"]
        fold = _fold_at(cell, fold, name)
        if all(values[key] for key in conditions):
            cells.append(cell)
            folds.append(fold)
    write_atomic(source / f"{notebook.page}.ipynb",
                 json.dumps({**node, "cells": list(_folded(cells, folds))}, indent=1))


def _fold_at(cell: dict[str, Any], before: str | None, name: str) -> str | None:
    """Title of the fold that a cell of the notebook `name` is in; before: its predecessor's.

    Raises InputError for a heading inside a fold: a page's sections cannot be torn apart.
    """
    tags = cell["metadata"]["tags"]
    titles = [tag.removeprefix(FOLD) for tag in tags if tag.startswith(FOLD)]
    text = "".join(cell["source"]) if cell["cell_type"] == "markdown" else ""
    headings = re.findall(r"^#+ .*", text, re.MULTILINE)
    if not titles and (UNFOLD in tags or text.startswith("#")):
        return None
    fold = titles[0] if titles else before
    if fold and headings:
        raise InputError(f"The heading {headings[0]!r} of {name} is inside the fold {fold!r}; "
                         "begin a cell with it, without a fold.")
    return fold


def _folded(cells: list[dict[str, Any]], folds: list[str | None]) -> Iterator[dict[str, Any]]:
    """The cells, with those of a fold in a <details>; a fold that would be empty is left out."""
    numbers = itertools.count()

    def raw(text: str) -> dict[str, Any]:
        return {"cell_type": "markdown", "id": f"fold-{next(numbers)}", "metadata": {},
                "source": text}

    for title, pairs in itertools.groupby(zip(cells, folds, strict=True), lambda pair: pair[1]):
        group = [cell for cell, _ in pairs]
        if title and any(map(_to_be_seen, group)):
            yield raw(f'<details class="fold"><summary>{html.escape(title)}</summary>')
            yield from group
            yield raw("</details>")
        else:
            yield from group


def _to_be_seen(cell: Mapping[str, Any]) -> bool:
    """Whether a reader sees anything of the cell while code is hidden."""
    if cell["cell_type"] == "markdown":
        return bool("".join(cell["source"]).strip())
    return any("scrapbook" not in output.get("metadata", {}) for output in cell["outputs"])


# --- generated parts of the prose ----------------------------------------------------------------


def _filled(run: Run, text: str) -> str:
    """The page with its generated parts in place of `<!-- generated: name -->`."""
    results = run.profile.results
    parts = {"model": lambda: front_page.model_box(run.profile),
             "findings": lambda: front_page.findings(run.profile),
             "picture": lambda: front_page.picture(run.profile),
             "verdicts": lambda: front_page.verdict_counts(results),
             "imprint": lambda: front_page.imprint(results),
             "exhibits": lambda: exhibit_map(run),
             "downloads": lambda: download_list(run, _downloads(run)),
             "features": lambda: index_box(results / FOLDER),
             "rating": lambda: rating_box(results / "human_eval" / "deck.json")}

    def part(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in parts:
            raise InputError(f"A page asks for the generated part {name!r}, which does not exist.")
        return parts[name]()

    return _without_links(run, re.sub(r"<!-- generated: ([\w-]+) -->", part, text))


def _lacking(run: Run) -> dict[str, str]:
    """The chapters that this profile's book does not have: their titles by page."""
    own = {one.page for one in run.notebooks}
    return {one.page: one.title for one in read_notebooks(chapters.NOTEBOOKS)
            if one.page not in own}


def _without_links(run: Run, text: str) -> str:
    """The text with the titles of chapters that this book lacks in the place of links to them."""
    for page, title in _lacking(run).items():
        text = re.sub(rf"{{doc}}`(?:[^`<]*<)?{re.escape(page)}>?`",
                      f"“{title}” (which does not apply to this profile)", text)
    return text


def exhibit_map(run: Run) -> str:
    """Exhibit, chapter and run time of every notebook as a Markdown table, with its modules and
    files folded."""
    rows = []
    for notebook in run.notebooks:
        record = read_record(run.output(notebook.name))
        made = [", ".join(f"`{module}`" for module in notebook.modules),
                *(f"`{pattern}`" for pattern in notebook.produces)]
        rows.append([
            notebook.exhibits or "beyond the paper",
            f"[{front_page.cell(record['title'])}]({notebook.page}.ipynb)",
            f"{record['seconds']:.0f} s",
            f"<details><summary>modules and files</summary>{'<br>'.join(made)}</details>",
        ])
    others = [f"“{title}”" for title in _lacking(run).values()]
    said = (f"\n\nThis profile's book has no chapter{'s' * (len(others) > 1)} "
            f"{' and '.join(others)}: "
            f"{'it does' if len(others) == 1 else 'they do'} not apply." if others else "")
    return front_page.markdown_table(["Paper", "Chapter", "Run time", "Made by"], rows) + said


# --- the builder ---------------------------------------------------------------------------------


def _run_jupyter_book(source: Path, work: Path) -> Path:
    """Build with warnings as errors; the folder of the pages."""
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()",
               "build", str(source), "--path-output", str(work),
               "-W", "-n", "--keep-going", "--all", "--quiet"]
    answer = subprocess.run(command, capture_output=True, text=True)
    built = work / "_build" / "html"
    log = work.parent / "build.log"
    if answer.returncode == 0 and (built / "index.html").is_file():
        log.unlink(missing_ok=True)
        return built
    write_atomic(log, answer.stdout + answer.stderr)
    text = without_colours(answer.stderr + answer.stdout)
    told = [line.replace(f"{source}/", "") for line in text.splitlines()
            if "WARNING" in line or "ERROR" in line] or text.splitlines()[-15:]
    raise ExecutionFailed("The book was not built; the whole log is in "
                          f"{log}:\n  " + "\n  ".join(told[:30]))


def foreign_requests(folder: Path) -> Iterator[str]:
    """Everything in the pages that a browser would fetch from another host on opening them."""
    for page in folder.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for match in _FETCHED.finditer(text):
            if 'rel="canonical"' not in match.group(0):
                yield f"{page.relative_to(folder)}: {match.group(0)[:120]}"
    for sheet in folder.rglob("*.css"):
        match_css = _FETCHED_BY_CSS.search(sheet.read_text(encoding="utf-8", errors="replace"))
        if match_css:
            yield f"{sheet.relative_to(folder)}: {match_css.group(0)}"
