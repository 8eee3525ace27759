"""What the front page says follows from the run's values, and only from them."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from sphinx.application import Sphinx

from scfm_circuits.book import front_page, search_words
from scfm_circuits.common.files import write_json
from scfm_circuits.common.profile import ROOT, Profile, load_profile

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Profile:
    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path))
    return load_profile("demo")


def keep(profile: Profile, chapter: str, **values: object) -> None:
    write_json(profile.results / "values" / f"{chapter}.json",
               {name.replace("__", "."): value for name, value in values.items()})


def test_each_claim_is_answered_by_numbers_of_the_run(profile: Profile) -> None:
    enrichr = {"features": 97.6, "untrained-encoder": 98.2, "uniform": 64.1}
    keep(profile, "06_enrichment", **{f"controls__enrichr__{k}": v for k, v in enrichr.items()})
    keep(profile, "05_human_evaluation", human__rate=None, score__features__gene_level=0.0128,
         score__features__either=0.241, score__untrained__gene_level=0.0158,
         score__untrained__either=0.352)
    keep(profile, "07_endothelial_case_study", call__whole=7.395, call__keeps=5.359,
         call__nothing_keeps=5.888, call__best_term=HOSTILE, call__p_random=0.0959)
    text = front_page.findings(profile)
    for number in ("98 %", "64 %", "1.3 %", "1.6 %", "5.4", "7.4", "5.9", "0.096",
                   "24 %", "35 %"):
        assert number in text
    assert "<script" not in text
    assert "Nobody has" in text and "stand-in" not in text and "7.4 nats" in text
    keep(profile, "07_endothelial_case_study", call__whole=2.0, call__keeps=-1.4,
         call__nothing_keeps=-1.4)
    assert "kept" not in front_page.findings(profile)  # less than nothing cannot be kept
    keep(profile, "07_endothelial_case_study", call__whole=2.5, call__keeps=1.0,
         call__nothing_keeps=0.5, call__unit="units")
    assert "2.5 units" in front_page.findings(profile)
    keep(profile, "06_enrichment", enrichment__stand_in=True,
         **{f"controls__enrichr__{k}": v for k, v in enrichr.items()})
    keep(profile, "05_human_evaluation", human__rate=0.25)
    text = front_page.findings(profile)
    assert "stand-in" in text and "25%" not in text and "25 %" in text


def test_what_a_run_lacks_is_not_said(profile: Profile) -> None:
    text = front_page.findings(profile)
    assert text.count("<li>") == 3 and text.count("This run has no number for it.") == 2
    assert "Nobody has" in text and front_page.picture(profile) == ""
    assert search_words.script(profile.results).startswith('companionSearch("words"')


def test_a_model_of_the_runs_own_is_called_a_demo_model(profile: Profile) -> None:
    assert "Demo model." in front_page.model_box(profile)
    other = front_page.model_box(profile.model_copy(
        update={"model": "owner/model", "cells_name": HOSTILE}))
    assert "Demo" not in other and "owner/model" in other and "<script" not in other


def test_the_picture_names_the_genes_that_speak_for_the_call(profile: Profile) -> None:
    (profile.results / "figures").mkdir(parents=True)
    (profile.results / front_page.PICTURE).touch()
    (profile.results / "tables").mkdir()
    (profile.results / "tables" / "case_call_genes.csv").write_text(
        f"gene,contribution\nLOW,0.5\nAGAINST,-3\n{HOSTILE},2\n")
    keep(profile, "07_endothelial_case_study", case__prediction=HOSTILE)
    text = front_page.picture(profile)
    assert "<script" not in text and "AGAINST" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; and LOW speak for it" in text
    assert "made the model say" in text and "direct attention" in text
    keep(profile, "07_endothelial_case_study", case__prediction="beta", call__by_state=True)
    text = front_page.picture(profile)
    assert "made the model call the cell “beta”" in text and "direct attention" not in text


def test_words_of_the_search_count_features(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "features.csv").write_text(
        "layer,feature,genes,best_term\n0,3,A B,t\n1,4,A,\n")
    said = search_words.script(tmp_path)
    assert '["A",2]' in said and '["t",1]' in said and '["L0.F3","L1.F4"]' in said


def test_numbers_of_a_page_are_printed_as_such_and_code_is_left_alone() -> None:
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    try:
        from companion import typeset
    finally:
        sys.path.pop(0)
    text = ('<p title="5 % 1e-07">p = <span>5.9e-26</span>, <span>70</span> %, 1e+17; 5 %s L0e-1 '
            'v2e-05</p><pre>1e-05 5 %<b>1 %</b> -3</pre>')
    assert typeset(text) == (
        '<p title="5 % 1e-07">p = <span>5.9\xa0×\xa010<sup>\u221226</sup></span>, <span>70</span>'
        '\xa0%, 1\xa0×\xa010<sup>17</sup>; 5 %s L0e-1 v2e-05</p><pre>1e-05 5 %<b>1 %</b> -3</pre>')


@pytest.mark.parametrize(("text", "shown"), [
    ("<td>-0.3</td><td>x</td>", "<td>\u22120.3</td><td>x</td>"),
    ("<p>by -12 (-20 to -3), [-1, 2]</p>",
     "<p>by \u221212 (\u221220 to \u22123), [\u22121, 2]</p>"),
    ("<p>-1.5e-07</p>", "<p>\u22121.5\xa0×\xa010<sup>\u22127</sup></p>"),
    *[(one, one) for one in (
        "<p>IL-2, 3-5, CD4+-1, log10 E(f) - 3, -log10, --5</p>", "<p><i>MHC</i>-2</p>",
        '<td data-sort="-0.3">x</td>', "<code>-1</code>", r"<span>\(-1\)</span>")],
])
def test_a_negative_number_has_a_minus_sign_and_a_name_its_hyphen(text: str, shown: str) -> None:
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    try:
        from companion import typeset
    finally:
        sys.path.pop(0)
    assert typeset(text) == shown


def test_a_chapter_keeps_the_number_of_its_file_where_one_before_it_is_lacking(tmp_path: Path
                                                                               ) -> None:
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    try:
        from companion import own_numbers
    finally:
        sys.path.pop(0)
    (tmp_path / "index.rst").write_text(
        "Book\n====\n\n.. toctree::\n   :numbered: 1\n\n   01_a\n   03_c\n")
    for name in ("01_a", "03_c"):
        (tmp_path / f"{name}.rst").write_text(f"Chapter\n=======\n\nPart\n----\n\n{name}\n")
    app: Any = Sphinx(tmp_path, None, tmp_path / "out", tmp_path / "trees", "html", status=None,
                      confoverrides={"project": "book", "html_theme": "basic"})
    app.companion = {"chapters": {name: {"source": f"{name}.py"} for name in ("01_a", "03_c")}}
    app.connect("env-get-updated", own_numbers, priority=900)
    app.build()
    titles = {page: re.search(r"<title>(\d*)", (tmp_path / "out" / f"{page}.html").read_text())
              for page in ("01_a", "03_c")}
    assert {page: found and found[1] for page, found in titles.items()} == {
        "01_a": "1", "03_c": "3"}
    assert re.findall(r">(\d)\. Chapter", (tmp_path / "out" / "index.html").read_text())[:2] == [
        "1", "3"]
