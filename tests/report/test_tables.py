"""Tables that can be browsed: their files, what a browser may read in them, and a real browser."""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest
from browser import ANSWER, answer_in, driven, opened
from hypothesis import given
from hypothesis import strategies as st

from scfm_circuits import InputError
from scfm_circuits.common.profile import load_profile
from scfm_circuits.report.headings import heading
from scfm_circuits.report.report import Report, Shown
from scfm_circuits.report.tables import Grouped, data_script, shown_columns

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = ("</script><img src=x onerror=\"document.title='broken'\">' \\ \u2028 \u2029 <!-- ]]> "
           "$x$ &lt;")
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path))
    return Report(load_profile("smoke"), "06_enrichment")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "smoke" / "tables"


def parsed(script: str) -> tuple[str, dict[str, Any]]:
    match = re.fullmatch(r'companionTable\(("[^"]*"), (\{.*\})\);\n', script)
    assert match, script[:80]
    return json.loads(match[1]), json.loads(match[2])


def rows_of(table: dict[str, Any]) -> list[tuple[str, ...]]:
    """The texts row by row, as the browser puts them together."""
    columns = [["" if code < 0 else column["values"][code] for code in column["codes"]]
               for column in table["columns"]]
    return list(zip(*columns, strict=True))


def features(rows: int) -> pd.DataFrame:
    """What a chapter would show: numbers, flags, long texts and missing values."""
    generator = np.random.default_rng(0)
    frame = pd.DataFrame({
        "layer": np.arange(rows) % 3,
        "q": 10.0 ** generator.uniform(-30, 0, rows),
        "genes": [" ".join(f"GENE{number}" for number in generator.integers(0, 99, 12))
                  for _ in range(rows)],
        "term": [f"Term {index % 7} (GO:{index % 7:07d})" for index in range(rows)],
        "go": [f"GO:{index % 7:07d}" for index in range(rows)],
        "beyond": generator.random(rows) < 0.5,
    })
    frame.loc[2, ["q", "term", "go"]] = [np.nan, None, None]
    frame.loc[5, "genes"] = HOSTILE
    return frame


def test_the_csv_is_that_of_a_plain_table(report: Report, folder: Path) -> None:
    frame = features(60)
    report.browse("features", frame)
    written = (folder / "features.csv").read_bytes()
    report.table("features", frame)
    assert (folder / "features.csv").read_bytes() == written


def test_the_first_rows_are_an_ordinary_table(report: Report) -> None:
    frame = features(60).drop(columns="genes")
    browsed = report.browse("features", frame, caption="All", rows=10).bundle
    table = report.table("features", frame, caption="All", rows=10).bundle
    box, _, rest = browsed["text/html"].partition("\n")
    assert re.fullmatch(
        r'<div class="browse" data-table="features" '
        r'data-source="downloads/tables/features\.js\?v=[0-9a-f]{12}" data-rows="10">', box)
    assert rest == table["text/html"] + "\n</div>"
    assert browsed["text/plain"] == table["text/plain"]


def test_the_data_file_holds_every_row_as_the_page_shows_it(report: Report, folder: Path) -> None:
    frame = features(60)
    odd = [np.bool_(True), np.int64(4), None, "", 2.5, "text"]
    frame["odd"] = pd.Series(odd * 10, dtype=object)
    report.browse("features", frame, digits=3)
    name, table = parsed((folder / "features.js").read_text(encoding="ascii"))
    columns = shown_columns(frame, 3)
    assert name == "features" and table["rows"] == 60
    assert rows_of(table) == list(zip(*(column.texts for column in columns), strict=True))
    shown = {column["name"]: column for column in table["columns"]}
    assert [column["name"] for column in table["columns"]] == list(frame.columns)
    assert rows_of(table)[2][1] == "" and rows_of(table)[5][2] == HOSTILE
    assert float(rows_of(table)[0][1]) == pytest.approx(frame["q"][0], rel=5e-3)
    assert [row[-1] for row in rows_of(table)[:6]] == ["yes", "4", "", "", "2.5", "text"]
    chosen = {name for name, column in shown.items() if column["choose"]}
    assert chosen == {"layer", "term", "go", "beyond", "odd"}
    assert set(shown["beyond"]["values"]) == {"yes", "no"}


def test_a_page_has_words_for_flags_libraries_and_intervals(report: Report) -> None:
    frame = pd.DataFrame({"library": ["KEGG_2021_Human", None], "same_sign_low": [0.25, np.nan],
                          "same_sign_high": [0.5, 1.0], "lower_95": [1, 2],
                          "note": ["`field` <b>", "plain"], "upper_95": [3, 4],
                          "good": [True, False]})
    text = report.table("words", frame, caption="<All>").bundle["text/html"]
    heads = re.findall(r"<th [^>]*>([^<]*)<", text)
    # Bounds that do not stand side by side are left as they are.
    assert heads == ["library", "right signs, 95 % interval", "95 % from", "note", "95 % to",
                     "good"]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", text)
    assert cells == ["KEGG 2021 Human", "0.25 to 0.5", "1", "<code>field</code> &lt;b&gt;", "3",
                     "yes", "", "1", "2", "plain", "4", "no"]
    alone = report.table("words", frame, caption="<All>", rows=0).bundle["text/html"]
    assert '<p class="table-note">&lt;All&gt;: 2 rows in ' in alone


def test_a_few_rows_offer_no_choice(report: Report, folder: Path) -> None:
    report.browse("few", features(6)[["layer", "go"]])
    _, table = parsed((folder / "few.js").read_text(encoding="ascii"))
    assert [column["choose"] for column in table["columns"]] == [True, False]


@given(st.lists(st.floats(allow_infinity=False) | st.none(), min_size=1))
def test_codes_sort_as_the_numbers_do(numbers: list[float | None]) -> None:
    frame = pd.DataFrame({"x": np.array(numbers, dtype=float)})
    _, table = parsed(data_script("t", shown_columns(frame, 2), {}))
    codes = table["columns"][0]["codes"]
    shown = sorted((index for index in range(len(codes)) if codes[index] >= 0),
                   key=lambda index: codes[index])
    assert [frame["x"][index] for index in shown] == sorted(frame["x"].dropna())
    assert (np.array(codes) < 0).tolist() == frame["x"].isna().tolist()


def test_texts_sort_without_case_and_with_numbers_by_size() -> None:
    frame = pd.DataFrame({"x": ["L10F2", "l2f30", "b", "L2F4", "A", "9" * 5000, ""]})
    _, table = parsed(data_script("t", shown_columns(frame, 4), {}))
    assert table["columns"][0]["values"] == ["9" * 5000, "A", "b", "L2F4", "l2f30", "L10F2"]


@given(TEXT, TEXT, TEXT)
def test_no_text_ends_the_script_or_the_cell(name: str, cell: str, long: str) -> None:
    frame = pd.DataFrame([[cell, long + HOSTILE]], columns=[name, HOSTILE])
    script = data_script("t", shown_columns(frame, 4), {})
    assert script.isascii() and not set("<>&") & set(script) and script.count("\n") == 1
    _, table = parsed(script)
    assert [column["name"] for column in table["columns"]] == [heading(name), HOSTILE]
    assert rows_of(table) == [(cell, long + HOSTILE)]


def test_the_static_rows_are_escaped(report: Report) -> None:
    frame = pd.DataFrame({HOSTILE: [HOSTILE], "go": ['"><b>']})
    text = report.browse("h", frame, caption=HOSTILE, links={"go": "https://a.org/{go}"}).bundle[
        "text/html"]
    assert not re.search(r"<(?:script|img|b)\b", text)
    escaped = html.escape(HOSTILE)
    assert f'<td class="long"><div class="clamp" title="{escaped}">{escaped}</div></td>' in text
    assert '<a href="https://a.org/%22%3E%3Cb%3E">&quot;&gt;&lt;b&gt;</a>' in text


def test_links_take_other_columns_texts(report: Report, folder: Path) -> None:
    links = {"term": "https://a.org/term/{go}?layer={layer}", "layer": "chapter.html#{layer}"}
    text = report.browse("features", features(60), rows=4, links=links).bundle["text/html"]
    assert '<a href="https://a.org/term/GO%3A0000001?layer=1">Term 1' in text
    # The third row has no term.
    assert text.count("https://a.org/") == 3 and text.count('"chapter.html#') == 4
    _, table = parsed((folder / "features.js").read_text(encoding="ascii"))
    parts = {column["name"]: column["link"] for column in table["columns"] if column["link"]}
    assert parts == {"term": ["https://a.org/term/", 4, "?layer=", 0],
                     "layer": ["chapter.html#", 0]}


def test_a_name_that_is_none(report: Report) -> None:
    with pytest.raises(InputError, match="must be made of letters"):
        report.browse("../t", pd.DataFrame({"x": [1]}))


@pytest.mark.parametrize("frame", [pd.DataFrame(), pd.DataFrame({"x": []})])
def test_empty_tables(report: Report, folder: Path, frame: pd.DataFrame) -> None:
    report.browse("none", frame)
    _, table = parsed((folder / "none.js").read_text(encoding="ascii"))
    assert table["rows"] == 0 and len(table["columns"]) == frame.shape[1]


# --- a real browser -------------------------------------------------------------------------------

DRIVER = r"""
const told = [];
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const all = (selector) => [...document.querySelectorAll(`.browse ${selector}`)];
function tell(step) {
  told.push([step, all("[role=status]")[0].textContent,
             all("tbody tr").map((row) => [...row.children].map((cell) => cell.textContent))]);
}
async function search(words) {
  all("input[type=search]")[0].value = words;
  all("input[type=search]")[0].dispatchEvent(new Event("input"));
  await pause(300);
}
const press = (name) => all("button").find((button) => button.textContent === name).click();
async function drive() {
  for (let wait = 0; wait < 800 && !all("[role=status]").length; wait++) await pause(50);
  tell("start");
  press("Next"); tell("next"); press("Previous"); press("Previous"); tell("back");
  press("q"); tell("up"); press("q"); tell("down");
  told.push(all("th").map((head) => head.getAttribute("aria-sort")));
  press("q"); tell("as it was");
  await search("onerror <IMG"); tell("search");
  await search("nowhere"); tell("nothing");
  press("Reset");
  const [layer] = all("select");
  layer.value = "1"; layer.dispatchEvent(new Event("change")); tell("layer");
  press("Reset"); tell("reset");
  told.push(all("tbody a").map((link) => link.getAttribute("href")));
  return { told, foreign: all(":is(img, script, b)").length, title: document.title };
}
drive().catch((error) => String(error)).then(answered);
"""


def paged(shown: Shown, folder: Path, root: Path, scripts: str = "") -> str:
    """The address of a page with this table and these scripts."""
    shutil.copytree(folder, root / "downloads" / "tables")
    for name in ("browse.js", "dom.js"):
        shutil.copy(ROOT / "book" / "_static" / name, root)
    page = root / "page.html"
    page.write_text(
        '<!doctype html><meta charset="utf-8"><title>Features</title>'
        '<script src="dom.js"></script><script src="browse.js"></script>'
        f'{shown.bundle["text/html"]}{scripts}')
    return page.as_uri()


def test_a_browser_searches_sorts_chooses_and_pages(
    report: Report, folder: Path, tmp_path: Path
) -> None:
    frame = features(60)
    shown = report.browse("features", frame, rows=25, links={"term": "https://a.org/{go}"})
    paged(shown, folder, tmp_path, f"<script>{ANSWER}{DRIVER}</script>")
    page = opened(tmp_path / "page.html", marker="<title>Features</title>", budget=60_000)
    answer = answer_in(page)
    assert isinstance(answer, dict), answer
    told = {step[0]: step[1:] for step in answer["told"] if len(step) == 3 and step[0]}
    (marks,) = (step for step in answer["told"] if "descending" in step)
    links = answer["told"][-1]

    texts = [list(row) for row in
             zip(*(column.texts for column in shown_columns(frame, 4)), strict=True)]
    order = frame["q"].sort_values(na_position="last").index
    falling = frame["q"].sort_values(ascending=False, na_position="last").index
    assert told["start"] == ["rows 1 to 25 of 60", texts[:25]]
    assert told["next"] == ["rows 26 to 50 of 60", texts[25:50]]
    assert told["back"] == told["reset"] == told["as it was"] == told["start"]
    assert told["up"][1] == [texts[index] for index in order[:25]]
    assert told["down"][1] == [texts[index] for index in falling[:25]]
    assert marks == [None, "descending", None, None, None, None]
    assert told["search"] == ["rows 1 to 1 of 1 found in 60", [texts[5]]]
    assert told["nothing"] == ["no row of 60 found", []]
    assert told["layer"] == ["rows 1 to 20 of 20 found in 60", texts[1::3]]
    assert links == [f"https://a.org/{quote(text)}" for text in frame["go"][:25].dropna()]
    assert answer["foreign"] == 0 and answer["title"] == "Features"


def test_negative_numbers_have_a_minus_sign_and_either_sign_finds_them(
    report: Report, folder: Path, tmp_path: Path
) -> None:
    frame = pd.DataFrame({"gene": ["IL-2", "A", "B"], "change": [0.5, -2.0, -10.0],
                          "share": ["-3 (-5 to 1)", "4", "n/a"]})
    address = paged(report.browse("changes", frame), folder, tmp_path)
    assert "-2" in (folder / "changes.csv").read_text()
    rows = "[...document.querySelectorAll('tbody tr')].map((row) => row.innerText)"
    with driven(tmp_path / "browser") as tab:
        tab.open(address)
        tab.until("document.querySelector('[role=status]')?.textContent")
        assert tab.run(rows)[0].split("\t") == ["IL-2", "0.5", "\u22123 (\u22125 to 1)"]
        tab.run("[...document.querySelectorAll('thead button')][1].click()")
        assert [row.split("\t")[1] for row in tab.run(rows)] == ["\u221210", "\u22122", "0.5"]
        for asked in ("-10", "\u221210"):
            tab.run(f"""{{ const box = document.querySelector('input[type=search]');
                box.value = '{asked}'; box.dispatchEvent(new Event('input')); }}""")
            tab.until("document.querySelectorAll('tbody tr').length === 1")
            assert tab.run(rows)[0].startswith("B")
            tab.run("""[...document.querySelectorAll('button')].find(
                (one) => one.textContent === 'Reset').click()""")


def test_groups_stay_together_rows_open_and_the_address_keeps_the_choice(
    report: Report, folder: Path, tmp_path: Path
) -> None:
    frame = features(30).drop(2).sort_values("layer", kind="stable")[
        ["layer", "q", "go", "genes", "beyond"]]
    shown = report.browse("claims", frame, rows=30, grouped=Grouped("layer", ["genes", "beyond"],
                                                                    ["go", "beyond"]))
    address = paged(shown, folder, tmp_path)
    rows = "[...document.querySelectorAll('tbody tr')].map((row) => row.textContent)"
    listed = "document.querySelector('[role=status]')?.textContent"
    with driven(tmp_path / "browser") as tab:
        tab.open(address)
        tab.until(listed)
        texts = tab.run(rows)
        assert [text for text in texts if len(text) < 6] == ["0 10", "1 10", "2 9"]
        assert len(texts) == 32 and tab.run("location.hash") == ""
        assert tab.run("[...document.querySelectorAll('select')].length") == 2
        # Sorted, each group by itself: the smallest q of each stands below its heading.
        tab.run("[...document.querySelectorAll('thead button')][1].click()")
        texts = tab.run(rows)
        (column,) = (one for one in shown_columns(frame, 4) if one.name == "q")
        for layer, heading in enumerate(("0 10", "1 10", "2 9")):
            first = texts[texts.index(heading) + 1]
            least = frame.loc[frame["layer"] == layer, "q"].min()
            assert first.startswith(column.texts[column.values.index(least)])
        tab.run("document.querySelectorAll('td.opens button')[0].click()")
        assert "GENE" in tab.run("document.querySelector('tr.unfolded').textContent")
        tab.run("document.querySelectorAll('td.opens button')[0].click()")
        assert tab.run("!document.querySelector('tr.unfolded')")
        tab.run("""{ const [list] = document.querySelectorAll('select');
            list.value = '1'; list.dispatchEvent(new Event('change')); }""")
        chosen = tab.run(rows)
        assert tab.run("location.hash") == "#go=GO%3A0000001&sort=q" and len(chosen) < 12
        tab.open("about:blank")
        tab.open(f"{address}#go=GO%3A0000001&sort=q")
        tab.until(listed)
        assert tab.run(rows) == chosen
        # A link in the page leads to rows as well; what the table does not know is left alone.
        tab.run("location.hash = 'beyond=yes'")
        tab.until(f"{listed}.includes('found')")
        assert tab.run(rows) != chosen
        before = tab.run(rows)
        tab.run("location.hash = 'a-heading'")
        assert tab.run(rows) == before and tab.errors == []


def test_a_page_may_show_some_columns_by_other_names_and_the_file_has_all(
    report: Report, folder: Path
) -> None:
    frame = pd.DataFrame({"q": [0.5], "place": [3], "gene": ["A"]})
    shown = report.table("some", frame, columns={"gene": "gene", "q": "FDR"}).bundle["text/html"]
    assert re.findall(r"<th [^>]*>([^<]*)<", shown) == ["gene", "FDR"] and ">3<" not in shown
    assert (folder / "some.csv").read_text() == "q,place,gene\n0.5,3,A\n"
