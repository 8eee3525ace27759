"""The pages as a reader has them: opened from disk, in a browser, in both colour modes.

The pages are a book of all chapters' titles over the real prose, or the book that
`SCFM_BUILT_BOOK` names (`make smoke` names the one it has built).
"""

import json
import os
import re
from base64 import b64encode
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import yaml
from browser import Tab, driven

from scfm_circuits.book import pages
from scfm_circuits.book.chapters import NOTEBOOKS, Run, load_run, read_notebooks
from scfm_circuits.common.files import write_json
from scfm_circuits.report.report import Report, Shown

WIDE = pd.DataFrame({"model": ["a", "b"], "paper": [0.5, 0.25], "held_out": [1, 2],
                     **{f"a column with a long name, {i}": [i, i + 1] for i in range(9)}})
# What axe complains about in the theme: a rule and a class.
THEIR_LOGO = ("region", "navbar-brand")


def executed(title: str, outputs: list[Shown]) -> dict[str, Any]:
    """A notebook as execution leaves it: a title, code with these outputs, code with none."""
    def code(tag: str, shown: list[Shown]) -> dict[str, Any]:
        return {"cell_type": "code", "id": tag, "metadata": {"tags": [tag]}, "execution_count": 1,
                "source": "x = 1\ny = 2", "outputs": [
                    {"output_type": "display_data", "metadata": one.metadata, "data": {
                        kind: b64encode(data).decode() if isinstance(data, bytes) else data
                        for kind, data in one.bundle.items()}} for one in shown]}

    return {"nbformat": 4, "nbformat_minor": 5, "cells": [
        {"cell_type": "markdown", "id": "t", "metadata": {}, "source": f"# {title}\n\nText.\n"},
        code("hide-input", outputs), code("remove-input", []), code("open", [])],
        "metadata": {"language_info": {"name": "python", "pygments_lexer": "ipython3"}, "scfm": {
            "title": title, "executed_at": "2026-01-01", "seconds": 1.0}}}


def write_run(run: Run) -> None:
    """Results of all chapters without executing any."""
    report = Report(run.profile, "03_validation")
    for notebook in run.notebooks:
        outputs = [report.show(WIDE, caption="The paper's beside ours")]
        if notebook.name == "03_validation":
            figure, _ = plt.subplots(1, 3, figsize=(12, 3), constrained_layout=True)
            outputs.append(report.figure("wide", figure))
        write_json(run.output(notebook.name), executed(notebook.title, outputs))
        write_json(run.profile.results / "values" / f"{notebook.name}.json", {})
    write_json(run.profile.results / "values" / "06_enrichment.json", {
        f"controls.enrichr.{name}": 50.0 for name in ("features", "untrained-encoder", "uniform")})
    tables = run.profile.results / "tables"
    tables.mkdir()
    pd.DataFrame({"gene": ["VWF", "ACTB"], "contribution": [1.0, -1.0]}).to_csv(
        tables / "case_call_genes.csv", index=False)
    pd.DataFrame({"layer": [1, 1], "feature": [20, 7], "genes": ["VWF PLVAP", "VWF"],
                  "best_term": ["a <b>term</b>", ""]}).to_csv(tables / "features.csv", index=False)
    plot = plt.figure(figsize=(4, 4))
    report.figure("call_sentence", plot)
    write_json(run.profile.results / "provenance.json", {
        "profile": run.profile.name, "cells_are": "real", "cells_name": "cells of a test",
        "overrides": {}, "seed": 0, "versions": {}, "seconds_total": 1.0, "commit": "0" * 40,
        "machine": {"cpus": 2}})


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built pages."""
    if named := os.environ.get("SCFM_BUILT_BOOK"):
        return Path(named).resolve()
    root = tmp_path_factory.mktemp("book")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCFM_RESULTS", str(root / "results"))
        run = load_run("demo")
        write_run(run)
        pages.stage(run, root / "source")
        return pages._run_jupyter_book(root / "source", root)


@pytest.fixture(scope="module")
def tab(book: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with driven(tmp_path_factory.mktemp("browser")) as one:
        one.screen(1280)
        one.open((book / "intro.html").as_uri())
        if not one.run("document.querySelector('.bd-article') !== null"):
            pytest.skip("Chromium does not open files of a temporary folder here")
        yield one


def named(book: Path) -> list[str]:
    """All pages but `index`, which only leads to the first."""
    return sorted(path.stem for path in book.glob("*.html") if path.stem != "index")


def chapter_of(book: Path) -> str:
    return (book / "03_validation.html").as_uri()


# --- every page ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_write_no_errors_and_can_be_read_by_all(book: Path, tab: Tab, dark: bool) -> None:
    """axe-core's rules; in the dark mode those of contrast, as nothing else is different."""
    found = find_spec("axe_core_python")
    if found is None or found.origin is None:
        pytest.skip("axe-core-python is not installed (requirements-dev.lock)")
    axe = (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")
    options = {"resultTypes": ["violations"], **({"runOnly": ["color-contrast"]} if dark else {})}
    tab.screen(1280, dark=dark)
    told = {}
    for name in named(book):
        tab.open((book / f"{name}.html").as_uri())
        # A colour that is still on its way from one mode to the other is nobody's contrast.
        tab.run("document.head.appendChild(Object.assign(document.createElement('style'), "
                "{textContent: '*, ::before, ::after {transition: none !important}'})); 0")
        tab.run("new Promise(done => setTimeout(() => requestAnimationFrame(() => done(0)), 100))")
        tab.run(f"{axe}; 0")
        found_here = tab.run(
            f"axe.run({json.dumps(options)}).then("
            "all => all.violations.flatMap(rule => rule.nodes.map("
            "node => `${rule.id}: ${node.html.slice(0, 300)}`)))")
        found_here = [one for one in found_here if not all(part in one for part in THEIR_LOGO)]
        if found_here or tab.errors:
            told[name] = [*found_here, *tab.errors]
    assert told == {}


class Links(HTMLParser):
    """The addresses that a page names and the places in it that can be named."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: set[str] = set()
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = dict(attrs)
        self.places |= {name for key in ("id", "name") if (name := said.get(key))}
        self.addresses |= {name for key in ("href", "src") if (name := said.get(key))}


def test_every_link_leads_somewhere(book: Path) -> None:
    read = {path.name: Links(path) for path in book.glob("*.html")}
    broken = []
    for page, links in read.items():
        for address in links.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            path, place = unquote(parts.path) or page, unquote(parts.fragment)
            # What features.js and browse.js show is named behind the mark.
            kept_by_script = re.match(r"L\d+\.F\d+|\w+=", place) and path in (
                "features.html", "12_claims.html")
            if not (book / path).is_file() or (
                    place and path in read and not kept_by_script
                    and place not in read[path].places):
                broken.append(f"{page}: {address}")
    assert not broken and len(read) > 10


def test_chapters_carry_the_numbers_of_their_files(book: Path) -> None:
    parts = yaml.safe_load((pages.BOOK / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    chapters = [one["file"] for part in parts if "numbered" in part for one in part["chapters"]]
    # A chapter that applies to some profiles only is in their books.
    named = {one.page: one.name for one in read_notebooks(NOTEBOOKS)
             if (book / f"{one.page}.html").is_file()}
    assert len(named) > 5 and named.keys() <= {*chapters}
    for page, name in named.items():
        title = re.search(r"<title>(.*?)</title>", (book / f"{page}.html").read_text("utf-8"))
        assert title and title[1].startswith(f"{int(name[:2])}. "), title


def test_columns_and_headings_have_words_and_not_names_of_the_code(book: Path) -> None:
    heads = [(path.stem, head) for path in sorted(book.glob("[0-9]*.html")) for head in re.findall(
        r"<(?:th|h[1-4])\b[^>]*>([^<]*)<", path.read_text(encoding="utf-8"))]
    assert len(heads) > 20
    assert [one for one in heads if re.search(r"[a-z0-9]_[a-z0-9]", one[1])] == []


# --- the code switch and the banner --------------------------------------------------------------

BANNER = ("(({top, bottom}) => [top, bottom])("
          "document.querySelector('.bd-header-announcement').getBoundingClientRect())")
SHOWN = "document.querySelector('.bd-article .cell_input').checkVisibility()"


def test_code_is_shown_by_one_switch_that_remembers(book: Path, tab: Tab) -> None:
    tab.screen(1280)
    tab.open(chapter_of(book))
    assert not tab.run(SHOWN) and tab.run("!document.querySelector('details.hide')")
    tab.run("document.querySelector('.code-switch').focus()")
    key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
    tab.call("Input.dispatchKeyEvent", type="keyDown", **key)
    tab.call("Input.dispatchKeyEvent", type="keyUp", **key)
    assert tab.run(SHOWN)
    assert tab.run("document.querySelector('.code-switch').ariaChecked") == "true"
    tab.open((book / "04_sparsity.html").as_uri())
    assert tab.run(SHOWN)
    tab.run("document.querySelector('.code-switch').click()")
    tab.open(chapter_of(book))
    assert not tab.run(SHOWN)
    tab.open((book / "glossary.html").as_uri())  # it has no code, so it has no switch
    assert tab.run("!document.querySelector('.code-switch')")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_banner_stays_in_view_and_covers_nothing(book: Path, tab: Tab, width: int) -> None:
    tab.screen(width)
    tab.open((book / "reproduce.html").as_uri())
    top, low = tab.run(BANNER)
    assert top == 0
    assert 0 < low < 50
    last = "[...document.querySelectorAll('.bd-article h2')].at(-2)"
    tab.run(f"location.hash = {last}.parentElement.id")
    tab.until("scrollY > 500")
    bottom, heading = tab.run(
        "[document.querySelector('.bd-header-article').getBoundingClientRect().bottom,"
        f" {last}.getBoundingClientRect().top]")
    assert tab.run(BANNER) == [0, low] and low < bottom <= heading
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")


def test_the_papers_numbers_are_in_sight_on_a_phone(book: Path, tab: Tab) -> None:
    tab.screen(390)
    tab.open(chapter_of(book))
    hidden = tab.run("""[...document.querySelectorAll('table.dataframe')].filter((table) =>
      !table.closest('.browse') && /paper/i.test(table.tHead.textContent)).flatMap((table) =>
      [...table.tBodies[0].querySelectorAll('td')]).filter((cell) =>
      cell.getBoundingClientRect().right > innerWidth).map((cell) => cell.textContent)""")
    assert hidden == []
    labels = tab.run("[...document.querySelectorAll('table.stacks td')].map((cell) =>"
                     " getComputedStyle(cell, '::before').content)")
    assert '"paper"' in labels and "none" not in labels


def test_a_table_that_goes_on_says_so(book: Path, tab: Tab) -> None:
    tab.screen(390)
    tab.open((book / "exhibits.html").as_uri())
    box = "document.querySelector('.pst-scrollable-table-container')"
    tab.until(f"{box}.classList.contains('goes-on')")
    tab.run(f"{box}.scrollTo(99999, 0)")
    tab.until(f"!{box}.classList.contains('goes-on')")


def test_a_formula_that_goes_on_says_so(book: Path, tab: Tab) -> None:
    tab.screen(390)
    tab.open((book / "02_training.html").as_uri())
    if not tab.run("document.querySelector('div.math') !== null"):
        pytest.skip("this book has no chapter with a formula (SCFM_BUILT_BOOK names one)")
    tab.until("!!(window.box = document.querySelector('div.math mjx-container.goes-on'))")
    assert tab.run("box.scrollWidth > box.clientWidth")
    tab.run("box.scrollTo(99999, 0)")
    tab.until("!box.classList.contains('goes-on')")


def test_the_next_pages_name_stays_in_the_page(book: Path, tab: Tab) -> None:
    tab.screen(390)
    for name in named(book):
        tab.open((book / f"{name}.html").as_uri())
        cut = tab.run("""[...document.querySelectorAll('.prev-next-area a')].flatMap((link) => {
          const { left, right } = link.getBoundingClientRect();
          return [...link.querySelectorAll('i, p')].filter((part) => {
            const at = part.getBoundingClientRect();
            return at.left < left - 1 || at.right > Math.min(right, innerWidth) + 1;
          }).map((part) => part.outerHTML);
        })""")
        assert cut == [], name


def test_a_phone_gets_the_narrow_figure_and_the_dark_mode_light_lines(book: Path, tab: Tab
                                                                       ) -> None:
    wide = sorted(path.name for path in (book / "downloads" / "figures" / "narrow").glob("*.png"))
    page = book / ("03_validation.html" if "wide.png" in wide else "06_enrichment.html")
    shown = "[...document.querySelectorAll('picture img')].map((one) => one.currentSrc)"
    for width, dark in ((390, False), (1280, True)):
        tab.screen(width, dark=dark)
        tab.open(page.as_uri())
        tab.run("Promise.all([...document.images].map((one) => one.decode())).then(() => 0)")
        sources = tab.run(shown)
        assert wide and sources
        assert all(("/narrow/" in source) == (width == 390) for source in sources)
        assert tab.run("[...document.querySelectorAll('picture img')].every((one) => "
                       "one.getBoundingClientRect().right <= innerWidth)")
        assert ("invert" in tab.run("getComputedStyle(document.querySelector('picture img')).filter"
                                    )) == dark


def test_no_caption_of_the_sidebar_runs_over_its_edge(book: Path, tab: Tab) -> None:
    for width in (1280, 1000):
        tab.screen(width)
        tab.open((book / "intro.html").as_uri())
        over = tab.run("""(() => { const edge = document.querySelector('.bd-sidebar-primary')
          .getBoundingClientRect().right;
          return [...document.querySelectorAll('.bd-sidebar-primary .caption-text')].filter((one) =>
            one.getBoundingClientRect().right > edge - 6).map((one) => one.textContent); })()""")
        assert over == []


# --- the front page and the search ---------------------------------------------------------------


def test_the_front_page_starts_with_what_was_found(book: Path, tab: Tab) -> None:
    tab.screen(1280)
    tab.open((book / "intro.html").as_uri())
    assert tab.run("document.querySelectorAll('.findings li').length") == 3
    # The first finding and the picture are on the first screen; the starts lead somewhere.
    assert tab.run("['.findings li', '.hero img'].every((one) => "
                   "document.querySelector(one).getBoundingClientRect().top < innerHeight)")
    assert tab.run("document.querySelector('.hero img').naturalWidth > 100")
    assert len(tab.run("[...document.querySelectorAll('.start a')].map((a) => a.href)")) == 4


def test_search_finds_genes_terms_and_features(book: Path, tab: Tab) -> None:
    words = json.loads(re.fullmatch(r'companionSearch\("words", (.*)\);\s*',
                                    (book / "search_words.js").read_text())[1])
    gene, term, feature = words["genes"][0][0], words["terms"][0][0], words["features"][0]
    for asked, note in ((gene.lower(), "gene, in the lists of"), (term, "best term of"),
                        (feature.lower(), "feature")):
        tab.open((book / "search.html").as_uri() + f"?q={quote(asked)}")
        tab.until("document.querySelector('.found-in-run li') !== null")
        first, leads = tab.run("(({textContent, firstChild}) => [textContent, firstChild.hash])("
                               "document.querySelector('.found-in-run li'))")
        assert first.lower().startswith(f"{asked.lower()} {note}") and leads
        assert tab.errors == []
    # The search's own results: pages.
    tab.open((book / "search.html").as_uri() + "?q=transcoder")
    tab.until("document.querySelectorAll('#search-results li a').length > 2")
    assert tab.errors == []
