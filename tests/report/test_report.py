"""What notebooks hand to the book: files, escaped tables, values."""

import json
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from scfm_circuits import InputError
from scfm_circuits.common.profile import load_profile
from scfm_circuits.report.headings import heading
from scfm_circuits.report.plots.style import panels
from scfm_circuits.report.report import Report, readable


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path))
    return Report(load_profile("smoke"), "03_validation")


class Reader(HTMLParser):
    """Collects tags and the text of cells."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th", "p"):
            self.cells.append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "p"):
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.cells[-1] += data


@given(  # what stands between backticks is shown as code
    st.text(st.characters(codec="utf-8", exclude_characters="\r\0`"), max_size=30),
    st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=30),
)
def test_any_text_stays_text(cell: str, caption: str) -> None:
    shown = Report(load_profile("smoke"), "c").show(
        pd.DataFrame({cell: [cell]}), caption=caption)
    page = Reader(shown.bundle["text/html"])
    assert page.cells == [caption, heading(cell), cell]
    assert [tag for tag, _ in page.tags] == [
        "p", "div", "table", "thead", "tr", "th", "tbody", "tr", "td"]


def test_a_caption_stands_above_the_box_that_scrolls_and_names_it(report: Report) -> None:
    frame = pd.DataFrame({"x": [1]})
    one, other = (report.show(frame, caption=text).bundle["text/html"] for text in "AB")
    page = Reader(one)
    (first, caption), (second, box), (third, table) = page.tags[:3]
    assert (first, second, third) == ("p", "div", "table")
    assert caption["id"] == box["aria-labelledby"] == table["aria-labelledby"]
    assert caption["id"] != Reader(other).tags[0][1]["id"]
    assert one == report.show(frame, caption="A").bundle["text/html"]
    without = Reader(report.table("numbers", frame).bundle["text/html"])
    assert without.tags[0][0] == "div" and without.tags[0][1]["aria-label"] == "numbers"


def test_a_table_is_written_in_full_and_shown_in_part(report: Report, tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": np.arange(5) / 3, "name": list("abcde")})
    shown = report.table("numbers", frame, caption="Thirds", rows=2, digits=3)
    path = tmp_path / "smoke" / "tables" / "numbers.csv"
    raw = path.read_bytes()
    assert raw.startswith(b"x,name\n0,a\n0.3333333333,b\n") and b"\r" not in raw
    pd.testing.assert_frame_equal(pd.read_csv(path), frame, rtol=1e-9)
    page = Reader(shown.bundle["text/html"])
    assert page.cells == ["Thirds", "x", "name", "0", "a", "0.333", "b",
                          "2 of 5 rows; numbers.csv"]
    assert ("a", {"href": "downloads/tables/numbers.csv"}) in page.tags
    assert "c  " not in shown.bundle["text/plain"]


def test_the_page_has_words_over_columns_and_the_file_their_names(
    report: Report, tmp_path: Path
) -> None:
    frame = pd.DataFrame({"l0": [1.5], "held_out": [2], "T_cell": [3]})
    page = Reader(report.table("numbers", frame).bundle["text/html"])
    assert page.cells[:3] == ["L0", "held out", "T_cell"]
    assert (tmp_path / "smoke" / "tables" / "numbers.csv").read_text().startswith(
        "l0,held_out,T_cell")


def test_a_table_without_rows_is_a_link_to_its_file(report: Report) -> None:
    shown = report.table("numbers", pd.DataFrame({"x": range(1500)}), rows=0).bundle["text/html"]
    page = Reader(shown)
    assert page.cells == ["1,500 rows in numbers.csv"]
    assert ("a", {"href": "downloads/tables/numbers.csv"}) in page.tags


def test_a_file_has_no_two_columns_of_one_name(report: Report) -> None:
    frame = pd.DataFrame([["a", "b", "c"]], columns=["target", "source", "target"])
    for write in (report.table, report.browse):
        with pytest.raises(InputError, match="two columns 'target'"):
            write("edges", frame)


def test_missing_numbers_are_blank(report: Report) -> None:
    shown = report.show(pd.DataFrame({"x": [np.nan, 12345.678], "y": [None, "a"]}))
    assert Reader(shown.bundle["text/html"]).cells == ["x", "y", "", "", "12,346", "a"]


def test_figures_are_the_same_bytes_every_time(report: Report, tmp_path: Path) -> None:
    def drawn() -> tuple[bytes, bytes]:
        figure, [axes] = panels(1)  # a figure of the book has its theme from the start
        axes.plot([1, 2, 4], label="a")
        report.figure("line", figure)
        folder = tmp_path / "smoke" / "figures"
        return (folder / "line.png").read_bytes(), (folder / "line.svg").read_bytes()

    first = drawn()
    assert first == drawn()
    assert first[0].startswith(b"\x89PNG") and b"<svg" in first[1]
    corner = imread(BytesIO(first[0]))[0, 0]
    assert corner[3] == 0, "the page's own ground is seen through it"


def test_a_wide_figure_has_a_narrow_file_as_long_as_it_is_wide(report: Report, tmp_path: Path
                                                               ) -> None:
    narrow = tmp_path / "smoke" / "figures" / "narrow" / "line.png"
    for width, there in ((12, True), (3, False)):
        figure = Figure(figsize=(width, 3), layout="constrained")
        figure.subplots(1, 2)
        shown = report.figure("line", figure)
        assert narrow.exists() == there
        # The page's picture is the wide one.
        assert shown.metadata["image/png"]["width"] == pytest.approx(100 * width, abs=40)


def test_a_figure_is_shown_once(report: Report) -> None:
    import matplotlib

    matplotlib.use("Agg", force=True)
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.plot([1, 2])
    shown = report.figure("line", figure)
    # The inline backend shows what pyplot still holds at the end of a cell.
    assert not plt.fignum_exists(figure.number)
    bundle, metadata = shown._repr_mimebundle_()
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert 100 < metadata["image/png"]["width"] < 1000


def test_values_are_kept_as_plain_json(report: Report, tmp_path: Path) -> None:
    report.value("loss", np.float32(0.25))
    report.values({"nan": float("nan"), "count": np.int64(3), "ok": np.bool_(True)}, prefix="t.")
    kept = json.loads((tmp_path / "smoke" / "values" / "03_validation.json").read_text())
    assert kept == {"loss": 0.25, "t.nan": None, "t.count": 3, "t.ok": True}


@pytest.mark.parametrize(("value", "text"), [
    (1234567, "1,234,567"), (0.123456, "0.1235"), (12345.6, "12,346"), (True, "yes"),
    (None, "n/a"), ("a", "a"), (0.0013, "0.0013"),
])
def test_readable(value: object, text: str) -> None:
    assert readable(value) == text


@pytest.mark.parametrize(("value", "digits", "text"), [
    (99.78, 2, "100"), (-99.78, 2, "-100"), (99.4, 2, "99"), (9999.7, 4, "10,000"),
    (0.996, 2, "1"), (2e12, 2, "2e+12"), (float("inf"), 2, "inf"),
])
def test_a_number_is_not_written_as_a_power_where_it_rounds_up(
    value: float, digits: int, text: str
) -> None:
    assert readable(value, digits) == text


@pytest.mark.parametrize("name", ["a/b", "../x", "", "a:b", ".hidden"])
def test_names_that_are_no_names(report: Report, name: str) -> None:
    with pytest.raises(InputError, match="must be made of letters"):
        report.value(name, 1)
    with pytest.raises(InputError, match="must be made of letters"):
        report.table(name, pd.DataFrame())


def test_only_small_profiles_are_not_comparable() -> None:
    note = Report(load_profile("smoke"), "c").not_comparable()
    assert note is not None and "2 layers" in note.bundle["text/plain"]
    assert Report(load_profile("paper"), "c").not_comparable() is None


def test_a_value_that_no_file_can_hold_is_refused_and_not_kept(report: Report) -> None:
    with pytest.raises(InputError, match="value odd is of the type complex"):
        report.value("odd", 1j)
    report.value("even", 2)
    kept = report.profile.results / "values" / "03_validation.json"
    assert json.loads(kept.read_text()) == {"even": 2}


def test_a_table_that_cannot_be_shown_as_asked_is_not_written(report: Report) -> None:
    with pytest.raises(KeyError, match="b"):
        report.table("own", pd.DataFrame({"a": [1, 2]}), columns={"b": "B"})
    assert not (report.profile.results / "tables").exists()


def test_a_table_of_no_file_has_chosen_columns_too(report: Report) -> None:
    shown = report.show(pd.DataFrame({"a": [1], "b": [2]}), columns={"b": "B"}).bundle["text/html"]
    assert ">B</th>" in shown and "<td" in shown and ">a</th>" not in shown
