"""Executing, gating and building, on tiny notebooks of their own."""

import io
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from browser import opened
from hypothesis import given
from hypothesis import strategies as st

from scfm_circuits import InputError
from scfm_circuits.__main__ import main
from scfm_circuits.book import chapters as freshness
from scfm_circuits.book import cli as book
from scfm_circuits.book import execution, front_page, gate, pages, screen
from scfm_circuits.book.chapters import load_run, plan
from scfm_circuits.common import files, kept, manifest, profile
from scfm_circuits.common.files import write_json
from scfm_circuits.common.profile import Profile
from scfm_circuits.common.profile_files import parse_overrides, split_pairs
from scfm_circuits.report import tables as report_tables

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = '# %% tags=["parameters"]\nprofile = "tiny"\noverrides = {}\n'
HOSTILE = "<script>alert('cells')</script> & \"co\""
# Each execution leaves a line, so tests count executions and not seconds.
COUNT = "# %%\nwith open('count.txt', 'a') as log:\n    log.write('{name} ')\n"


COMMANDS = {"plan": ["plan"], **{step: ["book", step] for step in ("all", "execute", "check",
                                                                    "build")}}


class Project:
    """A folder with notebooks, a profile and a book, and the commands run on it."""

    def __init__(self, root: Path, capture: Callable[[], tuple[str, str]]) -> None:
        self.root = root
        self.capture = capture

    def notebook(self, name: str, body: str = "", header: str = "") -> None:
        head = f"# ---\n# jupyter:\n#   scfm: {header}\n# ---\n" if header else ""
        path = self.root / "notebooks" / f"{name}.py"
        path.write_text(f"{head}# %% [markdown]\n# # Chapter {name}\n\n{PARAMETERS}\n"
                        f"{COUNT.format(name=name)}\n{body}", encoding="utf-8")

    def touch(self, name: str) -> None:
        later = time.time_ns() + 10**9
        os.utime(self.root / "notebooks" / f"{name}.py", ns=(later, later))

    def command(self, *words: str) -> tuple[int, str, str]:
        code = main([*COMMANDS[words[0]], *words[1:], "--profile", "tiny"])
        return (code, *self.capture())

    def executed(self) -> list[str]:
        """Names executed since the last call."""
        log = self.root / "count.txt"
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return names

    def output(self, name: str, folder: str = "notebooks") -> Path:
        return self.root / "results" / "tiny" / folder / f"{name}.ipynb"


def make_project(root: Path, patch: pytest.MonkeyPatch,
                 capture: Callable[[], tuple[str, str]]) -> Project:
    (root / "notebooks" / "profiles").mkdir(parents=True)
    shutil.copy(ROOT / "notebooks" / "profiles" / "demo.yml", root / "notebooks" / "profiles")
    (root / "notebooks" / "profiles" / "tiny.yml").write_text(
        f"extends: demo\ncells_name: {json.dumps(HOSTILE)}\ntitle: {json.dumps(HOSTILE)}\n")
    (root / "requirements.lock").write_text("a==1\n")
    for module in (manifest, profile, freshness, execution, pages, report_tables):
        patch.setattr(module, "ROOT", root)
    patch.setattr(profile, "PROFILES", root / "notebooks" / "profiles")
    patch.setattr(freshness, "NOTEBOOKS", root / "notebooks")
    (root / "package").mkdir()
    (root / "package" / "science.py").write_text("x = 1\n")
    patch.setattr(kept, "PACKAGE", root / "package")
    patch.setattr(pages, "BOOK", root / "book")
    # What a run would cost is told of the real notebooks (test_preflight).
    patch.setattr(book, "announce", lambda run, jobs: ({}, jobs))
    patch.setenv("SCFM_ROOT", str(root))
    patch.setenv("SCFM_GENE_SETS", "")
    patch.setenv("SCFM_CACHE", str(root / "cache"))
    patch.delenv("SCFM_RESULTS", raising=False)
    return Project(root, capture)


@pytest.fixture
def project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Project:
    return make_project(tmp_path, monkeypatch, lambda: tuple(capfd.readouterr()))  # type: ignore[arg-type, return-value]


def test_only_what_is_stale_is_executed(project: Project) -> None:
    project.notebook("01_first")
    project.notebook("02_second", header="{after: [01_first]}")
    project.notebook("03_apart", header="{after: []}")
    code, told, _ = project.command("execute", "--jobs", "1")
    assert code == 0 and sorted(project.executed()) == ["01_first", "02_second", "03_apart"]
    assert "02_second: not executed yet" in told

    code, told, _ = project.command("execute")
    assert (code, project.executed()) == (0, []) and "up to date" in told

    project.touch("01_first")
    _, told, _ = project.command("execute")
    assert project.executed() == ["01_first", "02_second"]
    assert "01_first: notebook touched" in told and "02_second: follows 01_first" in told
    assert project.command("check")[0] == 0


def test_a_failing_notebook_leaves_no_output_and_is_tried_again(project: Project) -> None:
    project.notebook("01_first")
    project.notebook("02_second", "# %%\n1 / 0\n")
    project.notebook("03_third")
    for _ in range(2):
        code, _, told = project.command("execute")
        assert code == 1
        assert "02_second failed: ZeroDivisionError: division by zero" in told
        assert "Earlier chapters are kept; run the same command again to retry." in told
        assert not project.output("02_second").exists()
        assert project.output("02_second", "failed").exists()
        assert "failed/02_second.ipynb" in told
    assert project.executed() == ["01_first", "02_second", "02_second"]
    assert project.command("check")[0] == 1

    project.notebook("02_second", "# %%\n1 / 1\n")
    assert project.command("execute")[0] == 0
    assert project.executed() == ["02_second", "03_third"]
    assert not project.output("02_second", "failed").exists()


@pytest.mark.parametrize(("body", "code", "told", "untold"), [
    ("from scfm_circuits import InputError\nraise InputError('No such column `x`.')", 1,
     "01_first failed: No such column `x`.\n", "Traceback"),
    ("import time\ntime.sleep(60)", 1, "a cell ran longer than 1 s", "Traceback"),
    ("raise KeyboardInterrupt", 130, "Interrupted; what is finished is kept", "Traceback"),
    ("import os\nos._exit(1)", 1, "the kernel died", "Traceback"),
    ("import os\nos.write(2, b'kernel' b' noise')\n1 / 0", 1, "ZeroDivisionError", "kernel noise"),
    ("from IPython.display import Image, display\ndisplay(Image(b'\\x89PNG', format='png'))", 1,
     "shows a figure without alternative text", "Traceback"),
])
def test_an_ending_is_told_in_one_sentence(
    project: Project, body: str, code: int, told: str, untold: str
) -> None:
    project.notebook("01_first", f"# %%\n{body}\n")
    got, _, error = project.command("execute", "--cell-seconds", "1")
    assert got == code and told in error and untold not in error
    assert not project.output("01_first").exists()


TEARDOWN = """# %%
import atexit
import string

class Slow:
    def __del__(self, path="torn_down.txt", open=open):
        open(path, "w").close()

string.slow = Slow()
atexit.register(lambda: open("ended.txt", "w").close())
"""


def test_a_kernel_ends_without_taking_down_what_it_has_loaded(project: Project) -> None:
    project.notebook("01_first", TEARDOWN)
    assert project.command("execute")[0] == 0
    assert (project.root / "ended.txt").exists()
    assert not (project.root / "torn_down.txt").exists()


@pytest.mark.parametrize(("words", "told"), [
    (["-p", "sed=1"], "did you mean seed"),
    (["-p", "seed=x"], "`seed`"),
    (["-p", "seed"], "key=value"),
    (["-p", "seed=[1"], "cannot be read"),
    (["--cell-seconds", "0"], "at least 1"),
    (["--jobs", "0"], "at least 1"),
    (["--jobs", "two"], "JOBS (--jobs) is 'two'; it must be a whole number"),
])
def test_wrong_parameters_end_before_anything_runs(
    project: Project, words: list[str], told: str
) -> None:
    project.notebook("01_first")
    code, _, error = project.command("execute", *words)
    assert code == 1 and told in error and error.count("\n") == 1
    assert project.executed() == [] and not (project.root / "results").exists()


def test_wrong_notebooks_end_before_anything_runs(project: Project) -> None:
    assert "There are no notebooks" in project.command("execute")[2]
    path = project.root / "notebooks" / "01_first.py"
    path.write_text("# %%\nprofile = 'tiny'\n")
    assert 'no cell tagged "parameters"' in project.command("execute")[2]
    project.notebook("01_first", header="{after: [02_second]}")
    assert "is no notebook before it" in project.command("execute")[2]
    project.notebook("01_first", header="{before: [02_second]}")
    assert "unknown key scfm.before" in project.command("execute")[2]


def test_overrides_reach_the_notebook_and_have_results_of_their_own(project: Project) -> None:
    project.notebook("01_first", (
        "# %%\nfrom scfm_circuits.report.chapter import open_chapter\n"
        "own = open_chapter('01_first', profile, overrides).profile\n"
        "print('seed is', own.seed, 'rate', own.learning_rate, 'sets', own.gene_sets, own.name)\n"))
    words = ["-p", "seed=7", "-p", "learning_rate=1e-4", "-p", "gene_sets=null"]
    assert project.command("execute", *words)[0] == 0
    (path,) = (project.root / "results").glob("tiny+*/notebooks/01_first.ipynb")
    own = path.parents[1].name  # which the notebook finds as the command has
    assert f"seed is 7 rate 0.0001 sets None {own}" in path.read_text()
    assert not project.output("01_first").exists()
    assert project.command("check", *words)[0] == 0


def test_whose_results_they_are_is_written_down_again(project: Project) -> None:
    project.notebook("01_first", "# %%\nfrom scfm_circuits.report.chapter import open_chapter\n"
                                 "open_chapter('01_first', profile, overrides)\n")
    assert project.command("execute")[0] == 0
    owner = project.root / "results" / "tiny" / files.OWNER
    before = owner.read_text()
    owner.unlink()
    assert "up to date" in project.command("execute")[1]
    assert owner.read_text() == before


def change_package(project: Project) -> None:
    (project.root / "package" / "science.py").write_text("x = 2\n")


def change_profile(project: Project) -> None:
    with open(project.root / "notebooks" / "profiles" / "demo.yml", "a") as file:
        file.write("\nseed: 3\n")


def change_cells(project: Project) -> None:
    (project.root / "cells.h5ad").write_text("other")


def change_lock(project: Project) -> None:
    (project.root / "requirements.lock").write_text("a==2\n")


def change_product(project: Project) -> None:
    (project.root / "results" / "tiny" / "tables" / "a.csv").unlink()


def change_output(project: Project) -> None:
    project.output("01_first").write_text("{}")


def test_every_kind_of_change_is_noticed(project: Project) -> None:
    body = ("# %%\nimport os\nos.makedirs('results/tiny/tables', exist_ok=True)\n"
            "open('results/tiny/tables/a.csv', 'w').close()\n")
    project.notebook("01_first", body, header="{produces: [tables/a.csv]}")
    changes = {
        change_package: "package (common) changed", change_profile: "profile changed",
        change_cells: "cells changed", change_lock: "lock changed",
        change_product: "tables/a.csv is missing", change_output: "not executed yet",
    }
    (project.root / "cells.h5ad").write_text("cells")
    with open(project.root / "notebooks" / "profiles" / "tiny.yml", "a") as file:
        file.write("cells: cells.h5ad\n")
    assert project.command("execute")[0] == 0
    # What only drives the notebooks changes no number.
    (project.root / "package" / "book").mkdir()
    (project.root / "package" / "book" / "cli.py").write_text("x = 2\n")
    executed, produced = project.output("01_first").read_text(), load_run("tiny")
    assert plan(produced) == []
    for change, reason in changes.items():
        change(project)
        run = load_run("tiny")
        assert [why for _, why in plan(run)] == [reason]
        code, _, told = project.command("check")
        assert code == 1 and f"01_first: {reason}" in told
        # As if it had been executed with this input.
        node = json.loads(executed)
        node["metadata"]["scfm"]["inputs"] = freshness.inputs_of(run, run.notebooks[0])
        project.output("01_first").write_text(json.dumps(node))
        (project.root / "results" / "tiny" / "tables" / "a.csv").touch()
        assert plan(run) == []


KEEP = (
    "# %%\nfrom pathlib import Path\nfrom scfm_circuits.common import files, kept\n"
    "from scfm_circuits.report.chapter import open_chapter\n"
    "report = open_chapter('{name}', profile, overrides)\n"
    "folder, stamp = report.profile.results / 'kept', {{'a': 1}}\n"
    "if kept.read_record(folder / 'record.json', stamp) is None:\n"
    "    for i in range(2):\n"
    "        files.write_atomic(folder / f'part_{{i}}.txt', 'all')\n"
    "    kept.write_record(folder / 'record.json', {{'stamp': stamp}})\n"
    "kept.kept_arrays(folder.with_suffix('.npz'), stamp, lambda: 1, lambda one: {{'x': one}},\n"
    "                 lambda arrays: int(arrays['x']))\n"
    "report.value('{name}.one', 1)\n")


LOSSES: list[Callable[[Path], object]] = [
    Path.unlink, lambda path: path.write_bytes(b""),
    lambda path: os.truncate(path, path.stat().st_size // 2)]


def test_a_chapter_stands_on_every_file_that_it_wrote_or_read_again(project: Project) -> None:
    project.notebook("01_first", KEEP.format(name="01_first"),
                     header="{produces: [kept/part_*.txt]}")
    project.notebook("02_second", KEEP.format(name="02_second"), header="{after: []}")
    results = project.root / "results" / "tiny"
    assert project.command("execute")[0] == 0
    (results / "notes.txt").write_text("mine")  # no chapter's
    shared = ["kept.npz", "kept/part_0.txt", "kept/part_1.txt", "kept/record.json"]
    for name in ("01_first", "02_second"):
        record = freshness.read_record(project.output(name))
        assert sorted(record["files"]) == [*shared, f"values/{name}.json"]
    lost = {file: ["01_first", "02_second"] for file in shared}
    files = {**lost, "values/02_second.json": ["02_second"]}
    for number, (file, chapters) in enumerate(files.items()):
        content = (results / file).read_bytes()
        project.executed()
        # The last of the losses, another one for each file, is mended.
        for lose in (*LOSSES[number % 3:], *LOSSES[: number % 3]):
            (results / file).write_bytes(content)
            assert project.command("check")[0] == 0
            lose(results / file)
            there = (results / file).exists()
            code, _, told = project.command("check")
            assert code == 1 and [line.strip() for line in told.splitlines()[1:]] == [
                f"{name}: {file} is {'not as it was written' if there else 'missing'}"
                for name in chapters]
        assert project.command("execute", "--jobs", "1")[0] == 0
        assert project.executed() == chapters and (results / file).read_bytes() == content
        assert project.command("check")[0] == 0


def test_a_changed_cells_file_is_noticed_wherever_it_is(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(project.root / "home"))
    (project.root / "home").mkdir()
    project.notebook("01_first")
    # A file of that name in the current folder is not the profile's.
    monkeypatch.chdir(project.root / "package")
    (project.root / "package" / "x.h5ad").write_text("another")
    for cells, place in (("~/x.h5ad", project.root / "home"), ("x.h5ad", project.root)):
        profiles = project.root / "notebooks" / "profiles"
        (profiles / "tiny.yml").write_text(f"extends: demo\ncells: {cells}\n")
        run = load_run("tiny")
        seen = {freshness.inputs_of(run, run.notebooks[0])["cells"]}
        for text in ("a", "bc"):
            (place / "x.h5ad").write_text(text)
            seen.add(freshness.inputs_of(run, run.notebooks[0])["cells"])
        assert len(seen) == 3


def test_cached_gene_sets_make_only_the_chapters_that_ask_for_them_stale(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = manifest.gene_set_cache()
    # As a download in the course of the chapter.
    fetch = (f"# %%\nfrom pathlib import Path\nPath({str(cache)!r}).mkdir(parents=True)\n"
             f"Path({str(cache / 'KEGG_2021_Human.gmt')!r}).write_text('a')\n")
    project.notebook("01_none")
    project.notebook("02_by_field", fetch, header="{after: [], libraries: [libraries]}")
    project.notebook("03_by_name", header="{after: [], libraries: [Some_2020]}")
    assert project.command("execute")[0] == 0
    (cache / "Unasked_2020.gmt").write_text("a")
    assert plan(load_run("tiny")) == []
    stale = []
    for name, chapter in {"Some_2020": "03_by_name", "KEGG_2021_Human": "02_by_field"}.items():
        (cache / f"{name}.gmt").write_text("more")
        stale = sorted([*stale, (chapter, "gene-set cache changed")])
        assert [(one.name, why) for one, why in plan(load_run("tiny"))] == stale
    # A folder that is searched first hides the cache.
    monkeypatch.setenv("SCFM_GENE_SETS", str(project.root / "sets"))
    (project.root / "sets").mkdir()
    (project.root / "sets" / "Some_2020.gmt").write_text("a")
    found = [freshness.gene_set_inputs(load_run("tiny"), one)
             for one in load_run("tiny").notebooks]
    assert [one["gene sets"] != "none" for one in found] == [False, False, True]
    assert [one["gene-set cache"] != "none" for one in found] == [False, True, False]


def test_which_libraries_the_real_chapters_ask_for() -> None:
    run = load_run("demo")
    asked = {notebook.name: freshness.libraries_asked_for(notebook, run.profile)
             for notebook in run.notebooks}
    assert asked["09_variants"] == asked["06_enrichment"] == sorted(run.profile.libraries)
    assert run.profile.case_library in asked["07_endothelial_case_study"]
    for notebook in run.notebooks:
        loads = re.search(r"\.library\(|\.libraries\b", notebook.path.read_text())
        assert bool(asked[notebook.name]) == bool(loads), notebook.name


def test_a_failure_over_old_results_leaves_nothing_that_counts_as_fresh(project: Project) -> None:
    project.notebook("01_first")
    project.notebook("02_second")
    assert project.command("execute")[0] == 0
    whole = (project.root / "notebooks" / "01_first.py").read_text()
    stat = (project.root / "notebooks" / "01_first.py").stat()
    project.notebook("01_first", "# %%\n1 / 0\n")
    assert project.command("execute")[0] == 1
    # The source is as it was, and older than the execution; its files may be overwritten.
    (project.root / "notebooks" / "01_first.py").write_text(whole)
    os.utime(project.root / "notebooks" / "01_first.py", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    told = project.command("plan")[1]
    assert told == "01_first: not executed yet\n02_second: follows 01_first\n"
    assert not project.output("01_first").exists()


CHANGE = "# %%\nwith open('package/science.py', 'a') as file:\n    file.write('y = 1\\n')\n"


@pytest.mark.parametrize("changing", ["01_first", "02_second"])
def test_inputs_that_change_during_the_run_are_noticed(project: Project, changing: str) -> None:
    for name in ("01_first", "02_second", "03_third"):
        project.notebook(name, CHANGE if name == changing else "", header="{after: []}")
    code, _, told = project.command("all", "--jobs", "1")
    assert code == 1 and told == (
        "Changed while running: package (common); run `make book PROFILE=tiny` again.\n")
    project.notebook(changing, header="{after: []}")
    project.executed()
    # What ran after the change ran with what is there now.
    names = ["01_first", "02_second", "03_third"]
    assert project.command("execute", "--jobs", "1")[0] == 0
    assert project.executed() == names[: names.index(changing) + 1]
    assert project.command("check")[0] == 0


def test_a_profile_that_changes_during_the_run_ends_it(project: Project) -> None:
    project.notebook("01_first", (
        "# %%\nwith open('notebooks/profiles/tiny.yml', 'a') as file:\n"
        "    file.write('seed: 3\\n')\n"))
    project.notebook("02_second", header="{after: []}")
    code, _, told = project.command("execute", "--jobs", "1")
    assert code == 1 and told == (
        "Changed while running: profile; run `make book PROFILE=tiny` again.\n")
    assert project.executed() == ["01_first"]


def test_what_to_run_names_the_profile_and_its_overrides(project: Project) -> None:
    """What is said to be run, typed as it stands, is of this run and not of the default one."""
    project.notebook("01_first")
    for words, typed in ([], ""), (["-p", "seed=1", "-p", "case_type=CD14+ Monocyte"],
                                   " PARAMS=\"seed=1 'case_type=CD14+ Monocyte'\""):
        told = project.command("check", *words)[2]
        assert f"run `make notebooks PROFILE=tiny{typed}` first:\n" in told


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["1e4", "it's", 'a "b" $c `d` \\', "null", "#", "", " a  b ", "a=b"])


@given(st.fixed_dictionaries({}, optional={
    "case_type": ANY_TEXT, "prompt": ANY_TEXT, "case_sentence": st.none() | ANY_TEXT,
    "seed": st.integers(), "reinitialised_control": st.booleans(), "fdr": st.floats(0, 1),
    "libraries": st.lists(ANY_TEXT, max_size=2)}))
def test_a_command_as_typed_is_read_as_it_was(overrides: dict[str, Any]) -> None:
    run = replace(load_run("demo"), profile_name="a b.yml", overrides=overrides)
    words = subprocess.run(["sh", "-c", f"printf '%s\\0' {run.command('book')}"], text=True,
                           capture_output=True, check=True).stdout.split("\0")[:-1]
    assert words[:3] == ["make", "book", "PROFILE=a b.yml"]
    text = "".join(words[3:]).removeprefix("PARAMS=")
    read = parse_overrides(split_pairs(text), Profile.model_fields)
    assert read == overrides and len(words) == 3 + bool(overrides)
    assert [*map(type, read.values())] == [*map(type, overrides.values())]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_and_messages_of_cells_reach_a_terminal_only(
    project: Project, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    project.notebook("01_first", (
        "# %%\nimport sys\nprint('Downloading', file=sys.stderr)\n"
        "print('shown', 'in the notebook')\n"
        "for step in range(3):\n"
        "    print(f'\\rstep {step}', end='', file=sys.stderr, flush=True)\n"))
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    assert main(["book", "execute", "--profile", "tiny"]) == 0
    told = stderr.getvalue()
    if terminal:
        assert f"{screen.CLEARED}Downloading\n" in told
        assert f"{screen.CLEARED}step 1{screen.CLEARED}step 2" in told.replace(
            2 * screen.CLEARED, screen.CLEARED)
        # The bar that was not ended does not share its line with what follows.
        assert told.endswith(screen.CLEARED)
    else:
        assert told == ""
    assert "shown in the notebook" not in told
    assert "shown in the notebook" in project.output("01_first").read_text()


def test_a_folder_is_held_by_one_run(tmp_path: Path) -> None:
    def held() -> AbstractContextManager[None]:
        return files.only_one(tmp_path, "building pages into")

    with held(), pytest.raises(InputError, match="Another run is building pages into"), held():
        raise AssertionError("held twice")
    with held():
        pass


@pytest.fixture
def paged(project: Project) -> Project:
    """A project with a chapter and pages that took no builder to make."""
    project.notebook("01_first")
    (project.root / "book").mkdir()
    (project.root / "book" / "_toc.yml").write_text("root: 01_first\n")
    return project


def fake_builder(source: Path, work: Path) -> Path:
    (work / "_build" / "html").mkdir(parents=True)
    (work / "_build" / "html" / "index.html").write_text("new")
    return work / "_build" / "html"


def fail_in_notebook(project: Project) -> None:
    project.notebook("01_first", "# %%\n1 / 0\n")


def fail_in_gate(project: Project) -> None:
    project.notebook("01_first", header="{produces: [never.csv]}")


def fail_in_build(project: Project) -> None:
    (project.root / "book" / "_toc.yml").write_text("root: gone\n")


@pytest.mark.parametrize("fail", [fail_in_notebook, fail_in_gate, fail_in_build])
def test_pages_stand_only_if_the_run_ended_well(
    paged: Project, monkeypatch: pytest.MonkeyPatch, fail: Callable[[Project], None]
) -> None:
    monkeypatch.setattr(pages, "_run_jupyter_book", fake_builder)
    output = paged.root / "out"
    words = ["all", "--output", str(output)]
    assert paged.command(*words)[0] == 0
    assert (output / "html" / "index.html").is_file() and not (output / "html-old").exists()
    (output / "html" / "index.html").write_text("earlier")
    fail(paged)
    for _ in range(2):
        assert paged.command(*words)[0] == 1
        assert not (output / "html").exists() and not (output / pages.STAMP).exists()
        assert (output / "html-old" / "index.html").read_text() == "earlier"
    paged.notebook("01_first")
    (paged.root / "book" / "_toc.yml").write_text("root: 01_first\n")
    assert paged.command(*words)[0] == 0
    assert (output / "html" / "index.html").read_text() == "new"
    assert not (output / "html-old").exists()


@pytest.mark.parametrize("holds", [True, False, None])
def test_a_cell_is_shown_only_if_its_value_holds(project: Project, holds: bool | None) -> None:
    tag = 'tags=["hide-input", "only-if:a.tested"]'
    project.notebook("01_first", f"# %% [markdown] {tag}\n# The text\n\n# %% {tag}\nthe_code = 1\n"
                                 "\n# %%\nafter = 2\n")
    project.command("execute")
    run = load_run("tiny")
    values = run.profile.results / "values" / "01_first.json"
    values.parent.mkdir(parents=True, exist_ok=True)
    values.write_text(json.dumps({"a.tested": holds, "b": 1}))
    (project.root / "staged").mkdir()
    pages._stage_notebook(run, run.notebooks[0], project.root / "staged")
    staged = (project.root / "staged" / "01_first.ipynb").read_text()
    assert ("The text" in staged) == ("the_code" in staged) == bool(holds)
    assert "after = 2" in staged and "The text" in run.output("01_first").read_text()
    values.write_text("{}")
    with pytest.raises(InputError, match=r"01_first is to be shown only if 'a\.tested' holds"):
        pages._stage_notebook(run, run.notebooks[0], project.root / "staged")


def test_a_notebook_may_be_shown_on_a_page_of_another_name(project: Project) -> None:
    project.notebook("01_first", "# %% [markdown]\n# <!-- generated: features -->\n",
                     header="{page: all}")
    project.command("execute")
    run = load_run("tiny")
    staged = project.root / "staged"
    staged.mkdir()
    (run.profile.results / "values").mkdir(exist_ok=True)
    (run.profile.results / "values" / "01_first.json").write_text("{}")
    pages._stage_notebook(run, run.notebooks[0], staged)
    assert [path.name for path in staged.iterdir()] == ["all.ipynb"]
    assert "This run has no feature pages." in (staged / "all.ipynb").read_text()


def staged_cells(project: Project, body: str, values: dict[str, bool]) -> list[str]:
    """The sources of a notebook's cells as they are staged."""
    project.notebook("01_first", body)
    project.command("execute")
    run = load_run("tiny")
    write_json(run.profile.results / "values" / "01_first.json", values)
    (project.root / "staged").mkdir(exist_ok=True)
    pages._stage_notebook(run, run.notebooks[0], project.root / "staged")
    staged = json.loads((project.root / "staged" / "01_first.ipynb").read_text())
    return ["".join(cell["source"]) for cell in staged["cells"]]


def test_a_fold_goes_on_to_the_next_fold_or_heading(project: Project) -> None:
    cells = staged_cells(project, """
# %% [markdown] tags=["fold:More & more"]
# Folded.

# %%
1 + 1

# %% [markdown] tags=["unfold"]
# Seen.

# %% tags=["fold:Not to be seen", "only-if:tested"]
2 + 2

# %% tags=["fold:Nothing in it"]
x = 3

# %% [markdown]
# ## A heading
""", {"tested": False})
    begin = '<details class="fold"><summary>More &amp; more</summary>'
    assert cells[-7:] == [begin, "Folded.", "1 + 1", "</details>",
                          "Seen.", "x = 3", "## A heading"]


def test_a_page_has_what_a_cell_prints_but_no_log_lines(project: Project) -> None:
    staged_cells(project, "\n# %%\nprint('the prompt')\n\n# %%\nimport sys\n"
                          "_ = sys.stdout.write('a log line')\n", {})
    staged = (project.root / "staged" / "01_first.ipynb").read_text()
    outputs = [output for cell in json.loads(staged)["cells"] for output in cell.get("outputs", [])]
    assert [output["text"] for output in outputs] == [["the prompt\n"]]


def test_a_fold_does_not_tear_a_section(project: Project) -> None:
    with pytest.raises(InputError, match=r"'## Torn' of 01_first is inside the fold 'More'"):
        staged_cells(project, """
# %% [markdown] tags=["fold:More"]
# Folded.
#
# ## Torn
""", {})


def test_the_last_line_says_which_gene_sets_are_missing(
    paged: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_run_jupyter_book", fake_builder)
    words = ["all", "--output", str(paged.root / "out")]
    assert "gene sets" not in paged.command(*words)[1]  # no chapter asks for any
    paged.notebook("01_first", header="{libraries: [libraries, Mine_2020, bundled_markers]}")
    for _ in range(2):  # also where everything is up to date
        told = [line for line in paged.command(*words)[1].splitlines() if "gene sets" in line]
        assert len(told) == 1 and "make data" in told[0] and "SCFM_GENE_SETS" in told[0]
        for name in ("GO_Biological_Process_2025", "KEGG_2021_Human", "Mine_2020"):
            assert name in told[0]
        assert "bundled_markers" not in told[0]
    folder = paged.root / "cache" / "gene-sets"
    folder.mkdir(parents=True)
    for name in ("GO_Biological_Process_2025", "KEGG_2021_Human", "Mine_2020"):
        (folder / f"{name}.gmt").write_text("T\t\tVWF\n")
    assert "gene sets" not in paged.command(*words)[1].splitlines()[-1]


def test_two_runs_do_not_build_into_one_folder(
    paged: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_run_jupyter_book", fake_builder)
    words = ["all", "--output", str(paged.root / "out")]
    with files.only_one(paged.root / "out", "building pages into"):
        code, _, told = paged.command(*words)
    assert code == 1 and "Another run is building pages into" in told
    assert paged.command(*words)[0] == 0


def make_read_only(patch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Let nothing be written into the folders; permissions would not bind root."""

    def guarded(call: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def guard(path: Any, *rest: Any, **named: Any) -> Any:
            inside = isinstance(path, str | os.PathLike) and any(
                Path(path).is_relative_to(folder) for folder in folders)
            if inside and writes(path, *rest):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *rest, **named)
        return guard

    opens = guarded(io.open, lambda path, mode="r", *rest: bool({*mode} & {*"wax+"}))
    patch.setattr("builtins.open", opens)
    patch.setattr(io, "open", opens)
    patch.setattr(os, "open", guarded(os.open, lambda path, flags, *rest: bool(
        flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))))
    patch.setattr(os, "mkdir", guarded(os.mkdir, lambda path, *rest: not Path(path).exists()))
    for name in ("unlink", "rename", "replace", "rmdir"):
        patch.setattr(os, name, guarded(getattr(os, name), lambda *rest: True))


def test_what_is_finished_may_be_read_only(paged: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_run_jupyter_book", fake_builder)
    paged.notebook("02_second")
    (paged.root / "book" / "_toc.yml").write_text(
        "root: 01_first\nparts: [{chapters: [{file: 02_second}]}]\n")
    output, results = paged.root / "out", paged.root / "results" / "tiny"
    words = ["all", "--output", str(output)]
    assert paged.command(*words)[0] == 0
    paged.executed()
    with monkeypatch.context() as patch:
        make_read_only(patch, output, results)
        for step, told in (("check", "2 chapters of tiny pass the gate."), ("all", "up to date"),
                           ("build", "up to date"), ("execute", "up to date")):
            code, said, error = paged.command(step, *words[1:])
            assert (code, error) == (0, "") and told in said, step
        assert paged.executed() == []
    # Pages can be built from results that nobody can write.
    shutil.rmtree(output)
    with monkeypatch.context() as patch:
        make_read_only(patch, results)
        assert paged.command(*words)[0] == 0 and (output / "html").exists()
    for folder, step in ((results, "all"), (results, "execute"), (output, "all")):
        paged.touch("02_second")
        with monkeypatch.context() as patch:
            make_read_only(patch, folder)
            code, _, error = paged.command(step, *words[1:])
        assert code == 1 and error.count("\n") == 1, (folder, step)
        assert f"Nothing can be written into {folder}" in error and "Permission denied" in error
    assert paged.executed() == []
    assert paged.command(*words)[0] == 0 and paged.executed() == ["02_second"]


def test_a_disk_that_is_full_is_told_in_one_sentence(paged: Project,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_run_jupyter_book", fake_builder)

    def full(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(book, "write_json", full)
    code, _, error = paged.command("all", "--output", str(paged.root / "out"))
    assert code == 1 and error.count("\n") == 1
    assert error.startswith(f"{paged.root / 'results' / 'tiny' / 'provenance.json'} cannot be read "
                            "or written (No space left on device); ")


def test_two_profiles_of_one_name_do_not_share_results(project: Project) -> None:
    project.notebook("01_first", (
        "# %%\nfrom scfm_circuits.report.chapter import open_chapter\n"
        "open_chapter('01_first', profile, overrides)\n"))
    files = {name: project.root / name / "mine.yml" for name in ("heart", "lung")}
    for path in files.values():
        path.parent.mkdir()
        path.write_text(f"extends: demo\ntitle: {path.parent.name}\n")

    def run(name: str, *words: str) -> tuple[int, str]:
        code = main(["book", "execute", "--profile", str(files[name]), *words])
        return code, project.capture()[1]

    results = project.root / "results" / "mine"
    assert run("heart")[0] == 0 and (results / "notebooks" / "01_first.ipynb").exists()
    assert json.loads((results / "profile.json").read_text()) == {"file": "heart/mine.yml"}
    project.executed()
    code, told = run("lung")
    assert code == 1 and told.count("\n") == 1 and project.executed() == []
    assert f"{results} holds the results of {files['heart']}, which {files['lung']} would" in told
    for command in ("plan", "data"):
        assert main([command, "--profile", str(files["lung"])]) == 1
        assert "holds the results of" in project.capture()[1]
    # A run with overrides has results of its own, which are one file's too.
    assert run("heart", "-p", "seed=1")[0] == 0
    assert run("lung", "-p", "seed=1")[0] == 1 and run("lung", "-p", "seed=2")[0] == 0
    assert run("heart")[0] == 0
    # A file that is renamed or gone owns nothing any more.
    files["heart"].unlink()
    assert run("lung")[0] == 0
    assert json.loads((results / "profile.json").read_text()) == {"file": "lung/mine.yml"}


def test_only_claims_tested_on_the_model_are_counted(project: Project) -> None:
    project.notebook("01_first")
    folder = project.root / "results" / "tiny"
    folder.mkdir(parents=True)
    lines = ["Table 1,off,tested", "Table 1,match,tested", "Fig. 2,off,tested",
             "Table 1,match,recomputed", "a|b,not measured,tested", "Table 2,off,recomputed",
             "Table 2,not a test,transcription", "Table 3,not a test,setting"]
    (folder / "claims.csv").write_text("exhibit,verdict,standing\n" + "\n".join(lines) + "\n")
    table = [[cell.strip() for cell in line.strip("|").split(" | ")]
             for line in front_page.verdict_counts(load_run("tiny").profile.results).splitlines()]
    assert table[0] == ["Exhibit", "match", "off", "not measured"]
    assert table[2:] == [["Table 1", "1", "1", ""], ["Fig. 2", "", "1", ""],
                         ["a\\|b", "", "", "1"], ["**all**", "1", "2", "1"]]


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    """An executed notebook as the gate wants it."""
    figure = {"output_type": "display_data", "data": {"image/png": "x"}, "metadata": {}}
    done = {"papermill": {"status": "completed"}}
    alt = {"image": {"alt": "A line."}, "figure": {"caption": "A line."}}
    cell = {"cell_type": "code", "source": "1", "outputs": []}
    return {
        "cells": [
            {**cell, "execution_count": 1, "metadata": done},
            {"cell_type": "markdown", "source": "# A", "metadata": {}},
            {**cell, "execution_count": 2, "metadata": {**done, "mystnb": alt},
             "outputs": [figure]},
            {**cell, "execution_count": None, "source": " \n", "metadata": {}},
        ],
        "metadata": {"papermill": {"parameters": {"profile": "tiny"}, "exception": None},
                     "scfm": {}},
    }


def test_the_gate_lets_a_good_notebook_through(good: dict[str, Any]) -> None:
    assert gate.problems(good, ["profile"]) == []


ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "\x1b[31mbad\x1b[0m",
         "traceback": []}


@pytest.mark.parametrize(("path", "value", "told"), [
    (["cells", 0, "outputs"], [ERROR], "cell 0: ended in ValueError: bad"),
    (["cells", 0, "execution_count"], None, "cell 0: was not executed"),
    (["cells", 0, "execution_count"], 2, "cell 0: was executed out of order"),
    (["cells", 2, "execution_count"], 3, "cell 2: was executed out of order"),
    (["cells", 0, "metadata", "papermill", "status"], "pending", "has the status 'pending'"),
    (["cells", 0, "metadata", "papermill", "status"], "failed", "has the status 'failed'"),
    (["cells", 2, "metadata", "mystnb", "image", "alt"], " ", "without alternative text"),
    (["cells", 2, "metadata", "mystnb", "figure"], {}, "without a caption"),
    (["metadata", "papermill", "exception"], True, "recorded an exception"),
    (["metadata", "papermill", "parameters"], {"sed": 1}, "unknown parameter 'sed'"),
])
def test_the_gate_refuses(good: dict[str, Any], path: list[Any], value: Any, told: str) -> None:
    bad = json.loads(json.dumps(good))
    place = bad
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    (problem,) = gate.problems(bad, ["profile"])
    assert told in problem


def test_the_gate_wants_an_execution_record(good: dict[str, Any]) -> None:
    bad = json.loads(json.dumps(good))
    del bad["metadata"]["scfm"]
    assert gate.problems(bad, ["profile"]) == ["it has no execution record"]


def test_a_value_belongs_to_one_chapter(project: Project) -> None:
    glue = "# %%\nfrom myst_nb import glue\nglue('loss', 1, display=False)\n"
    project.notebook("01_first", glue)
    project.notebook("02_second", glue)
    assert project.command("execute")[0] == 0
    code, _, told = project.command("check")
    assert code == 1 and "02_second: the value 'loss' is also one of 01_first" in told


def test_what_a_renamed_chapter_left_is_read_by_none(project: Project) -> None:
    """Its values would contradict those that the chapter writes under its new name."""
    values = project.root / "results" / "tiny" / "values"
    write = f"# %%\nfrom pathlib import Path\nfolder = Path({str(values)!r})\n"
    project.notebook("01_first", write + "folder.mkdir()\n(folder / '01_first.json').touch()\n")
    assert project.command("execute")[0] == 0 and (values / "01_first.json").exists()
    (project.root / "notebooks" / "01_first.py").unlink()
    project.notebook("02_second", write + "assert [*folder.iterdir()] == []\n")
    code, _, told = project.command("execute")
    assert code == 0, told
    assert not project.output("01_first").exists()


def test_values_of_what_runs_again_are_gone_before_any_chapter_reads_them(project: Project) -> None:
    """The ledger reads those of all chapters; a damaged one of its own stopped it for ever."""
    values = project.root / "results" / "tiny" / "values"
    read = ("# %%\nimport json\nfrom pathlib import Path\n"
            f"for one in Path({str(values)!r}).glob('*.json'):\n"
            "    if json.loads(one.read_text())['from'] != 'now':\n"
            "        raise ValueError('old')\n")
    write = "# %%\nfrom scfm_circuits.common.files import write_json\n"
    for name in ("01_first", "02_second"):
        project.notebook(name, f"{read}{write}write_json(Path({str(values / name)!r} + '.json'), "
                               "{'from': 'now'})\n", "{after: []}")
    assert project.command("execute", "--jobs", "1")[0] == 0
    (values / "01_first.json").write_text("")
    assert project.command("execute", "--jobs", "1")[0] == 0
    for name in ("01_first", "02_second"):
        project.touch(name)
        write_json(values / f"{name}.json", {"from": "another run"})
    assert project.command("execute", "--jobs", "1")[0] == 0
    assert project.executed().count("02_second") == 2


# --- pages ----------------------------------------------------------------------------------------

# A feature on a hostile token gives the target three of its four units.
CIRCUIT = (
    "from scfm_circuits.circuits.exports import save_both\n"
    "from scfm_circuits.circuits.view import circuit_view\n"
    "from scfm_circuits.circuits.circuit import Circuit, Edge, Expansion, Node\n"
    "from scfm_circuits.report.boxes.circuit import Choice\n"
    f"texts = [{HOSTILE!r}, '.']\n"
    "nodes = {'L1_F7_P1': Node('L1_F7_P1', 'feature', 1, 1, 1, 7, 4.0),\n"
    "         'L0_F3_P1': Node('L0_F3_P1', 'feature', 0, 1, 1, 3, 2.0),\n"
    "         'E_P0': Node('E_P0', 'embedding', -1, 0, 0, 5, 1.0)}\n"
    "edges = [Edge('L0_F3_P1', 'L1_F7_P1', 3.0), Edge('E_P0', 'L0_F3_P1', 2.0)]\n"
    "sums = {'L1_F7_P1': Expansion('L1_F7_P1', 4.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0, 4.0),\n"
    "        'L0_F3_P1': Expansion('L0_F3_P1', 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0)}\n"
    "circuit = Circuit('L1_F7_P1', nodes, edges, sums)\n"
    "save_both(report.profile.results, 'case', circuit, texts, [None, None], slug='case',\n"
    "          scan='scfm-tiny')\n"
    "case = Choice('case', 'case', circuit_view(circuit, texts, [None, None]))\n"
    "display(report.circuit(case, caption='All'))\n"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A book of one chapter with the real configuration, extensions and style."""
    with pytest.MonkeyPatch.context() as patch:
        project = make_project(tmp_path_factory.mktemp("book"), patch, lambda: ("", ""))
        folder = project.root / "book"
        shutil.copytree(ROOT / "book", folder,
                        ignore=shutil.ignore_patterns("_build", "*.md", "__pycache__"))
        (folder / "references.bib").touch()
        (folder / "intro.md").write_text(
            "# Intro\n\nLoss {glue:text}`01_first.ipynb::t.loss:s`, $x^2$. "
            "[elsewhere](https://example.org)\n\n<!-- generated: verdicts -->\n\n"
            "<!-- generated: exhibits -->\n\n<!-- generated: downloads -->\n")
        (folder / "_toc.yml").write_text(
            "format: jb-book\nroot: intro\nparts: [{chapters: [{file: 01_first}]}]\n")
        project.notebook("01_first", (
            "# %%\nimport base64, os\nfrom IPython.display import Image\n"
            "from scfm_circuits.report.chapter import open_chapter\n"
            "report = open_chapter('01_first', profile, overrides)\n"
            "report.value('t.loss', 0.25)\n"
            f"{CIRCUIT}"
            "\n# %%\n"
            "import pandas\n"
            "frame = pandas.DataFrame({'x': range(60)})\n"
            "shown = report.browse('many', frame, caption='Numbers <i>. More.')\n"
            "display(shown)\n"
            "report.value('t.count', 4646)\n"
            "report.value('t.small', 8.03e-4, '8.03e-04')\n"
            "with open(report.profile.results / 'claims.csv', 'w') as file:\n"
            "    file.write('exhibit,verdict,standing\\nT 1,match,tested\\n<b>,off,tested\\n')\n"
            "\n# %% [markdown]\n# Count {glue:text}`t.count`, small {glue:text}`t.small`.\n"
            '\n# %% mystnb={"image": {"alt": "A dot."}, "figure": {"caption": "A dot."}}\n'
            f"Image(base64.b64decode('{PIXEL}'), format='png')\n"
        ), header='{exhibits: "Fig. 9", modules: [cells], produces: [claims.csv]}')
        assert main(["book", "all", "--profile", "tiny", "--output", str(folder / "_build")]) == 0
        yield project


PIXEL = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJ"
         "RU5ErkJggg==")


def test_every_page_says_what_and_whence_and_escapes_it(built: Project) -> None:
    html = built.root / "book" / "_build" / "html"
    for name in ("intro", "01_first", "search", "genindex"):
        text = (html / f"{name}.html").read_text(encoding="utf-8")
        assert "REAL cells" in text and 'class="provenance"' in text
        assert "<script>alert" not in text and "&lt;script&gt;alert" in text
        assert "DEMO MODEL" in text and "seed 0" in text
    chapter = (html / "01_first.html").read_text(encoding="utf-8")
    assert 'href="downloads/notebooks/01_first.py"' in chapter
    assert 'alt="A dot."' in chapter and "thebe_js_url" not in chapter.lower()
    provenance = json.loads((html / "downloads" / "provenance.json").read_text())
    assert provenance["profile"] == "tiny" and provenance["seconds"]["01_first"] > 0


def test_generated_parts(built: Project) -> None:
    html = built.root / "book" / "_build" / "html"
    text = (html / "intro.html").read_text(encoding="utf-8")
    assert ">0.25</span>" in text and "generated:" not in text
    assert "&lt;b&gt;" in text and "Chapter 01_first" in text and "Fig. 9" in text
    # The glue role evaluates what it is given; numbers must read as they were written.
    chapter = (html / "01_first.html").read_text(encoding="utf-8")
    assert ">4,646</span>" in chapter
    assert ">8.03\xa0×\xa010<sup>\N{MINUS SIGN}4</sup></span>" in chapter
    assert 'href="downloads/values/01_first.json"' in text
    assert (html / "downloads" / "claims.csv").is_file()


def test_each_file_to_download_is_described(built: Project) -> None:
    text = (built.root / "book" / "_build" / "html" / "intro.html").read_text(encoding="utf-8")
    for what, name in (("Every claim of the paper", "claims.csv"),
                       ("Numbers &lt;i&gt;", "many.csv"),
                       ("Circuit of a feature", "circuits/case.graphml"),
                       ("The chapter as a notebook", "01_first.py")):
        (item,) = re.findall(rf"<li>((?:(?!<br).)*)<br/?>(?:(?!</li>).)*{name}\"", text)
        assert item.startswith(what), item


def test_a_browsable_table_finds_its_script_and_its_data(built: Project) -> None:
    html = built.root / "book" / "_build" / "html"
    chapter = (html / "01_first.html").read_text(encoding="utf-8")
    assert 'data-source="downloads/tables/many.js?v=' in chapter
    assert re.search(r'<script src="_static/browse\.js[?"]', chapter)
    assert (html / "_static" / "browse.js").is_file()
    assert (html / "downloads" / "tables" / "many.js").is_file()
    # For people there is the CSV.
    listed = re.findall(r'href="(downloads/tables/[^"]*)"', (html / "intro.html").read_text())
    assert listed == ["downloads/tables/many.csv"]


def test_a_circuit_finds_its_script_its_library_and_its_data(built: Project) -> None:
    html = built.root / "book" / "_build" / "html"
    chapter = (html / "01_first.html").read_text(encoding="utf-8")
    (box,) = re.findall(r'<[^>]* data-library="[^"]*"[^>]*>', chapter)
    (choices,) = re.findall(r'data-choices="([^"]*)"', box)
    ((name, _, source),) = json.loads(unescape(choices))
    files = [source.partition("?")[0], *re.findall(r'data-library="([^"]*)"', box)]
    assert name == "case" and files == ["downloads/circuits/case.js", "vendor/d3/d3.min.js"]
    scripts = re.findall(r'<script src="(_static/(?:circuit\w*|dom|evidence)\.js)[?"]', chapter)
    links = re.findall(r'href="(downloads/circuits/[^"]*)"', chapter)
    assert len(scripts) == 5 and len(links) == 2
    files += scripts + links
    assert all((html / name).is_file() for name in files)
    assert (html / "vendor" / "d3" / "LICENSE").is_file()
    # For people there are the exports.
    listed = re.findall(r'href="(downloads/circuits/[^"]*)"', (html / "intro.html").read_text())
    assert listed == ["downloads/circuits/case.graphml", "downloads/circuits/case.json"]
    assert {*listed} <= {*files}


def test_a_circuit_is_drawn_in_the_built_page(built: Project, tmp_path: Path) -> None:
    # The browser leaves files of its own beside the page.
    html = tmp_path / "html"
    shutil.copytree(built.root / "book" / "_build" / "html", html)
    page = opened(html / "01_first.html", "--host-resolver-rules=MAP * ~NOTFOUND",
                  marker='data-source="downloads/circuits/case.js', budget=30_000)
    assert "2 of 2 edges and 3 of 3 nodes shown." in page
    labels = re.findall(r'class="node[^"]*"[^>]* aria-label="([^"]*)"', page)
    assert sorted(label.split(",")[0] for label in labels) == ["Feature 3", "Feature 7",
                                                               "Token embedding"]
    assert "<script>alert" not in page


def test_pages_fetch_nothing_and_bring_their_mathematics(built: Project) -> None:
    html = built.root / "book" / "_build" / "html"
    assert list(pages.foreign_requests(html)) == []
    assert "vendor/mathjax/tex-mml-chtml.js" in (html / "intro.html").read_text()
    assert (html / "vendor" / "mathjax" / "tex-mml-chtml.js").stat().st_size > 500_000
    assert list((html / "vendor" / "mathjax").rglob("*.woff"))


def test_an_unchanged_book_is_not_built_again(
    built: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(pages, "_run_jupyter_book", never)
    assert main(["book", "all", "--profile", "tiny", "--output",
                      str(built.root / "book" / "_build")]) == 0
    assert "Everything is up to date" in capsys.readouterr().out


def test_a_failed_build_leaves_no_pages(
    built: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    page = built.root / "book" / "intro.md"
    page.write_text("# Intro\n\n{nosuchrole}`x`\n")
    output = built.root / "book" / "_build"
    for _ in range(2):
        assert main(["book", "build", "--profile", "tiny", "--output", str(output)]) == 1
        assert "intro.md:3: WARNING: Unknown interpreted text role" in capsys.readouterr().err
        assert not (output / "html").exists()


def test_the_contents_list_every_notebook(built: Project) -> None:
    toc = built.root / "book" / "_toc.yml"
    toc.write_text("format: jb-book\nroot: intro\n")
    run = load_run("tiny")
    with pytest.raises(Exception, match="does not list the notebook 01_first"):
        pages._check_contents(run)
    toc.write_text("format: jb-book\nroot: intro\n"
                   "parts: [{chapters: [{file: 01_first}, {file: gone}]}]\n")
    with pytest.raises(Exception, match="lists gone"):
        pages._check_contents(run)


def test_a_chapter_is_only_in_the_books_to_which_it_applies(
        paged: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    paged.notebook("02_pairs", header="{after: [01_first], applies: human_decoys}")
    paged.notebook("03_last")
    linked = paged.root / "book" / "linked.md"
    linked.write_text("See {doc}`02_pairs`, {doc}`those <02_pairs>` and {doc}`03_last`.\n\n"
                      "<!-- generated: exhibits -->\n")
    (paged.root / "book" / "_toc.yml").write_text(
        "format: jb-book\nroot: 01_first\nparts:\n"
        "- {caption: A, chapters: [{file: 03_last}]}\n"
        "- {caption: B, chapters: [{file: 02_pairs}]}\n")
    monkeypatch.setattr(pages, "_run_jupyter_book", fake_builder)
    words = ["all", "--output", str(paged.root / "out"), "-p"]
    assert paged.command(*words, "human_decoys=0")[0] == 0
    assert paged.executed() == ["01_first", "03_last"]
    run = load_run("tiny", {"human_decoys": 0})
    assert [one.after for one in run.notebooks] == [(), ("01_first",)]
    pages.stage(run, paged.root / "staged")
    assert "02_pairs" not in (paged.root / "staged" / "_toc.yml").read_text()
    assert "caption: B" not in (paged.root / "staged" / "_toc.yml").read_text()
    # No link leads to it, and the exhibit map says that it is not there.
    said = (paged.root / "staged" / "linked.md").read_text()
    assert "{doc}`03_last`" in said and "`02_pairs" not in said
    assert said.count("(which does not apply to this profile)") == 2
    assert "This profile's book has no chapter “Chapter 02_pairs”: it does not apply." in said

    assert paged.command(*words, "human_decoys=9")[0] == 0
    assert {"02_pairs", "03_last"} <= set(paged.executed())
    paged.notebook("02_pairs", header="{applies: nothing_known}")
    with pytest.raises(Exception, match="applies: nothing_known, which is no field or property"):
        load_run("tiny")


@pytest.mark.parametrize("text", [
    '<script src="https://cdn.example.org/a.js"></script>', "<img alt='' src='//example.org/a'>",
    '<link rel="stylesheet" href="http://example.org/a.css">',
])
def test_foreign_requests_are_found(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.html").write_text(f"<a href='https://example.org'>fine</a>{text}")
    assert len(list(pages.foreign_requests(tmp_path))) == 1
    (tmp_path / "a.html").write_text("")
    (tmp_path / "a.css").write_text("@font-face { src: url('https://example.org/f.woff') }")
    assert len(list(pages.foreign_requests(tmp_path))) == 1
