"""What a chapter opens: each part made once, when first asked for, and numbers as they read."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import GENES, model_for, tiny_corpus, tiny_profile, tiny_transcoders

from scfm_circuits import InputError
from scfm_circuits.cells import corpus as corpora
from scfm_circuits.common.profile import BUNDLED_CELLS, PLANTED_CELLS, ROOT
from scfm_circuits.features import baselines
from scfm_circuits.features import statistics as counts
from scfm_circuits.models import loading
from scfm_circuits.models.known_types import Said, known_types
from scfm_circuits.models.small_models import TrainingCurve
from scfm_circuits.report import report as reports
from scfm_circuits.report.chapter import Chapter, open_chapter
from scfm_circuits.transcoders.training import run as training


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that are made, in order, in place of those that take long."""
    corpus = tiny_corpus(14)
    model = model_for(corpus)
    parts: dict[Any, tuple[str, Any]] = {
        corpora: ("load_corpus", corpus),
        loading: ("get_model", (model, TrainingCurve([1], [2.0]))),
        training: ("get_transcoders", (tiny_transcoders(model), [{"step": 1}])),
        counts: ("get_statistics", "counted"),
        baselines: ("untrained_statistics", "untrained")}
    calls: list[str] = []

    def instead(name: str, result: Any) -> Any:
        return lambda *given, **options: calls.append(name) or result

    for module, (name, result) in parts.items():
        monkeypatch.setattr(module, name, instead(name, result))
    monkeypatch.setattr(baselines, "reinitialised_statistics",
                        instead("reinitialised_statistics", "re-initialised"))
    return calls


def chapter(monkeypatch: pytest.MonkeyPatch, folder: Path, **overrides: Any) -> Chapter:
    return Chapter(tiny_profile(monkeypatch, folder, **overrides), "04_sparsity")


def test_parts_are_made_once_and_in_order_when_first_asked_for(
    made: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened = chapter(monkeypatch, tmp_path)
    assert opened.not_comparable() is not None and made == []
    assert opened.statistics is opened.statistics is not None
    assert sorted(made) == sorted({"load_corpus", "get_model", "get_transcoders",
                                   "get_statistics"}) and made[-1] == "get_statistics"
    assert opened.history == [{"step": 1}] and opened.model_curve.loss == [2.0]
    assert opened.held_out.tolist() == np.flatnonzero(opened.corpus.held_out).tolist()
    assert len(made) == 4


@pytest.mark.parametrize("guessing", [True, False])
def test_a_model_that_guesses_is_said_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, guessing: bool
) -> None:
    opened = chapter(monkeypatch, tmp_path)
    corpus = tiny_corpus(80, validation_share=0.5)
    corpus.labels[corpus.labels == "B cell"] = "<b>"  # a label is a stranger's text
    cells = np.flatnonzero(corpus.held_out)
    opened.known_types = known_types(corpus, Said(
        cells, np.full(len(cells), "<b>") if guessing else corpus.labels[cells],
        corpus.labels[cells]))._replace(commonest="<b>")
    box = opened.only_guesses()
    assert (box is not None) == guessing
    if box is not None:
        assert "does not know these types" in box.bundle["text/html"]
        assert "<b>" not in box.bundle["text/html"] and "&lt;b&gt;" in box.bundle["text/html"]


@pytest.mark.parametrize("also", [False, True])
def test_the_second_baseline_is_the_profiles_choice(
    made: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, also: bool
) -> None:
    opened = chapter(monkeypatch, tmp_path, reinitialised_control=also)
    assert opened.untrained == "untrained" and "reinitialised_statistics" not in made
    assert opened.baselines == {"untrained encoder": "untrained", **(
        {"re-initialised model": "re-initialised"} if also else {})}
    assert made.count("untrained_statistics") == 1


def test_a_library_that_stands_in_for_two_counts_once_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SCFM_GENE_SETS", str(tmp_path))
    for name in ("One_2020", "Two_2020"):
        (tmp_path / f"{name}.gmt").write_text("T cells\t\tCD3D\tCD8A\n")
    (tmp_path / "Three_2020.gmt").write_text("B cells\t\tMS4A1\tCD8A\n")
    opened = chapter(monkeypatch, tmp_path, libraries=["One_2020", "Three_2020", "Two_2020"])
    assert [one.content_sha256 for one in opened.libraries] == [
        opened.library(name).content_sha256 for name in ("Two_2020", "Three_2020")]
    assert opened.library_warnings() is None and not opened.stand_in()


def test_one_box_says_which_libraries_are_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SCFM_OFFLINE", "1")
    monkeypatch.setenv("SCFM_GENE_SETS", str(tmp_path))
    monkeypatch.setenv("SCFM_CACHE", str(tmp_path / "none"))
    (tmp_path / "Here_2020.gmt").write_text("T cells\t\tCD3D\tCD8A\n")
    opened = chapter(monkeypatch, tmp_path, libraries=["One_2020", "Here_2020", "Two_2020"])
    box = opened.library_warnings()
    assert box is not None and box.bundle["text/html"].count("<p ") == 1
    text = box.bundle["text/plain"]
    assert "One_2020 and Two_2020 are not available" in text and "Here_2020" not in text
    assert "One_2020.gmt and Two_2020.gmt" in text and "SCFM_GENE_SETS" in text
    assert opened.stand_in() and opened.stand_in("One_2020") and not opened.stand_in("Here_2020")
    assert opened.library_warnings("Here_2020") is None and len(opened.libraries) == 2


def test_programs_are_known_of_simulated_cells_alone(monkeypatch: pytest.MonkeyPatch,
                                                     tmp_path: Path) -> None:
    assert chapter(monkeypatch, tmp_path, cells=BUNDLED_CELLS).plan is None
    planted = open_chapter("05_human_evaluation", "planted").plan
    assert planted is not None and len(planted.programs) > 3
    assert open_chapter("05_human_evaluation", "planted").profile.cells == PLANTED_CELLS


def test_an_unknown_override_is_refused_in_one_sentence() -> None:
    assert open_chapter("04_sparsity", "demo", {"seed": 5}).profile.seed == 5
    with pytest.raises(InputError, match="Unknown profile field `sed` in an override"):
        open_chapter("04_sparsity", "demo", {"sed": 1})


def test_numbers_read_as_asked_and_are_kept_in_full(monkeypatch: pytest.MonkeyPatch,
                                                    tmp_path: Path) -> None:
    said: dict[str, str] = {}
    monkeypatch.setattr(reports, "_glue", said.__setitem__)
    opened = chapter(monkeypatch, tmp_path)
    opened.percent("share", 1 / 3)
    opened.percent("share.fine", 1 / 3, 1)
    opened.percent("share.below", -0.001)
    opened.percent("share.none", None, missing="nobody")
    opened.percent("share.nan", np.float64("nan"))
    opened.rounded("many", 12345.678)
    opened.rounded("few", np.float64(0.256), 2)
    opened.rounded("unknown", float("nan"), 1)
    opened.p_value("p", 0.012345)
    opened.p_value("p.none", None)
    opened.values({"a": np.int64(4646), "b": True}, prefix="of.")
    assert said == {
        "share": "33 %", "share.fine": "33.3 %", "share.below": "0 %",
        "share.none": "nobody", "share.nan": "n/a",
        "many": "12,346", "few": "0.26", "unknown": "n/a", "p": "0.012", "p.none": "n/a",
        "of.a": "4,646", "of.b": "yes"}
    kept = json.loads((opened.profile.results / "values" / "04_sparsity.json").read_text())
    assert kept == {"share": 1 / 3, "share.fine": 1 / 3, "share.below": -0.001,
                    "share.none": None, "share.nan": None,
                    "many": 12345.678, "few": 0.256, "unknown": None, "p": 0.012345,
                    "p.none": None, "of.a": 4646, "of.b": True}


def test_whatever_a_notebook_shows_is_the_last_of_its_cell() -> None:
    # IPython shows the value of a cell's last statement only, and none of an `if` or a loop.
    lost = []
    for path in sorted((ROOT / "notebooks").glob("*.py")):
        for cell in re.split(r"^# %%.*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            statements = ast.parse(cell).body
            for node in ast.walk(ast.Module(statements[:-1] + [
                    one for one in statements[-1:] if not isinstance(one, ast.Expr)], [])):
                if (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                        and ast.unparse(node.func.value) == "chapter"
                        and node.func.attr in ("show", "table", "browse", "figure")
                        and not any(one.arg == "rows" and ast.literal_eval(one.value) == 0
                                    for one in node.keywords
                                    if isinstance(one.value, ast.Constant))):
                    lost.append(f"{path.stem}: {ast.unparse(node)[:60]}")
    assert lost == []


def test_the_example_in_the_book_runs(made: list[str], monkeypatch: pytest.MonkeyPatch,
                                      tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is printed, on a tiny model in the place of a run's own."""
    tiny_profile(monkeypatch, tmp_path)
    (tmp_path / "KEGG_2021_Human.gmt").write_text("\t".join(["a term", "", "INS", *GENES]))
    monkeypatch.setenv("SCFM_GENE_SETS", str(tmp_path))
    page = (ROOT / "book" / "your_cells.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    found: dict[str, Any] = {}
    exec(example.replace('"mine.yml"', '"smoke"'), found)
    shown = capsys.readouterr().out
    assert "Term" in shown and "contribution" in shown and "tensor([" in shown
    call, frozen, model = found["call"], found["frozen"], found["model"]
    before = call.of(frozen.logits[call.position])
    assert found["lost"].shape == found["genes"].shape and (found["lost"] != 0).any()
    assert found["states"].shape == (1, *frozen.final.shape)
    assert not before.isclose(call.of(model.get_output_embeddings()(
        found["states"][0, call.position])))
