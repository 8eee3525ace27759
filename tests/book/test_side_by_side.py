"""Chapters side by side: order, threads, failures, interruptions, on tiny notebooks."""

import io
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scfm_circuits.book import execution, side_by_side
from scfm_circuits.book.chapters import NOTEBOOKS, Notebook, of_profile, read_notebooks
from scfm_circuits.book.screen import CLEARED, Screen
from scfm_circuits.common import kept
from scfm_circuits.common.profile import load_profile
from tests.book.test_cli import Project, Terminal, project  # noqa: F401  (a fixture)

TELL = """# %%
import os
import time

def tell(name):
    open(name, "w").close()

def wait_for(name):
    until = time.monotonic() + 60
    while not os.path.exists(name):
        assert time.monotonic() < until, f"no {name}"
        time.sleep(0.01)
"""


def diamond(project: Project, left: str = "", right: str = "") -> None:  # noqa: F811
    """Four notebooks: two in the middle that follow the first, and one that follows both."""
    project.notebook("01_first")
    project.notebook("02_left", f"{TELL}\n{left}\n", header="{after: [01_first]}")
    project.notebook("03_right", f"{TELL}\n{right}\n", header="{after: [01_first]}")
    project.notebook("04_last", header="{after: [02_left, 03_right]}")


def test_chapters_that_do_not_follow_one_another_run_at_once(project: Project) -> None:  # noqa: F811
    meet = "tell('{}')\nwait_for('{}')"
    diamond(project, meet.format("left", "right"), meet.format("right", "left"))
    code, told, _ = project.command("execute", "--jobs", "2")
    assert code == 0 and project.command("check")[0] == 0
    names = project.executed()
    assert names[0] == "01_first" and names[-1] == "04_last" and len(names) == 4
    # The last chapter's record has those of this execution before it.
    records = {name: execution.read_record(project.output(name)) for name in names}
    assert records["04_last"]["after"] == {
        name: records[name]["run_id"] for name in ("02_left", "03_right")}
    assert re.findall(r"^\[(\d)/4\]", told, re.M) == ["1", "2", "3", "4"]


def test_what_runs_beside_a_failure_is_finished_and_kept(project: Project) -> None:  # noqa: F811
    diamond(project, "wait_for('right')\n1 / 0",
            "tell('right')\nwait_for('results/tiny/failed/02_left.ipynb')")
    code, told, error = project.command("execute", "--jobs", "2")
    assert code == 1 and "02_left failed: ZeroDivisionError" in error
    assert error.count(execution.RETRY) == 1
    assert "02_left failed" in told and "03_right done in" in told
    assert project.output("03_right").exists() and not project.output("04_last").exists()
    project.executed()
    diamond_again = project.root / "notebooks" / "02_left.py"
    diamond_again.write_text(diamond_again.read_text().replace("1 / 0", ""))
    assert project.command("execute")[0] == 0 and project.executed() == ["02_left", "04_last"]


def test_two_failures_are_both_told(project: Project) -> None:  # noqa: F811
    diamond(project, "tell('left')\nwait_for('right')\n1 / 0",
            "tell('right')\nwait_for('left')\n[][0]")
    code, _, error = project.command("execute", "--jobs", "2")
    assert code == 1 and error.count(execution.RETRY) == 1
    assert "02_left failed: ZeroDivisionError" in error and "03_right failed: IndexError" in error


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("deaf", [False, True])
def test_an_interruption_ends_every_kernel(
    project: Project, monkeypatch: pytest.MonkeyPatch, number: int, code: int,  # noqa: F811
    deaf: bool
) -> None:
    if deaf:  # a kernel that does not end by itself
        monkeypatch.setattr(side_by_side, "PATIENCE", 0.1)
    ears = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" if deaf else ""
    wait = ears + "open('{0}-part', 'w').write(str(os.getpid()))\nos.rename('{0}-part', '{0}')\n" \
        "time.sleep(60)"
    diamond(project, wait.format("left"), wait.format("right"))
    pids = [project.root / "left", project.root / "right"]

    def interrupt() -> None:
        until = time.monotonic() + 60
        while not all(path.exists() for path in pids) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        got = project.command("execute", "--jobs", "2")[0]
    except SystemExit as end:
        got = end.code  # type: ignore[assignment]
    thread.join()
    assert got == code
    for path in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    assert project.output("01_first").exists() and not project.output("03_right").exists()
    assert not (project.root / "results" / "tiny" / "running" / "02_left.ipynb").exists()


def test_a_kernel_that_starts_after_the_end_was_asked_for_is_killed() -> None:
    kernels = side_by_side.Kernels()
    kernels.end(signal.SIGINT)
    with kernels.one() as started:
        late = subprocess.Popen(["sleep", "60"], start_new_session=True)
        started(late.pid)
        assert late.wait() == -signal.SIGKILL


def test_threads_depend_on_the_notebooks_and_the_machine_alone(
    project: Project, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    monkeypatch.setattr(side_by_side, "cores", lambda: 4)
    monkeypatch.setattr(side_by_side, "memory_total", lambda: side_by_side.ROOMY)
    say = (f"with open('threads', 'a') as file:\n"
           f"    file.write(' '.join(os.environ[one] for one in {execution.THREADS}) + ' ')")
    diamond(project, say, say)
    for jobs in ("1", "2"):
        assert project.command("execute", "--jobs", jobs)[0] == 0
        found = {name: execution.read_record(project.output(name))["threads"]
                 for name in ("01_first", "02_left", "03_right", "04_last")}
        assert found == {"01_first": 4, "02_left": 2, "03_right": 2, "04_last": 4}
        project.touch("02_left")
        project.touch("03_right")
    assert (project.root / "threads").read_text().split() == ["2"] * 16


@pytest.mark.parametrize(("cores", "memory", "jobs", "share"), [
    (1, 64, 1, 1), (2, 64, 2, 1), (3, 64, 2, 1), (16, 64, 2, 8), (16, 4, 1, 16)])
def test_how_many_chapters_a_machine_runs_at_once(
    monkeypatch: pytest.MonkeyPatch, cores: int, memory: int, jobs: int, share: int
) -> None:
    monkeypatch.setattr(side_by_side, "cores", lambda: cores)
    monkeypatch.setattr(side_by_side, "memory_total", lambda: memory * 2**30)
    assert side_by_side.usual_jobs() == jobs
    # The ledger is the last chapter where others do not apply; nothing else can run beside it.
    threads = side_by_side.threads_of(of_profile(read_notebooks(NOTEBOOKS), load_profile("pbmc")))
    assert threads.pop("01_cells_and_model") == threads.pop("12_claims") == cores
    assert {*threads.values()} == {share}
    threads = side_by_side.threads_of([*read_notebooks(NOTEBOOKS)])
    assert threads.pop("01_cells_and_model") == cores and {*threads.values()} == {share}


def test_the_real_chapters_follow_those_that_make_what_they_use() -> None:
    """What is used by two chapters at once would be made by both."""
    notebooks = [*read_notebooks(NOTEBOOKS)]
    stands_on = side_by_side.before(notebooks)
    made_by = {"corpus": 1, "model": 1, "known_types": 1, "only_guesses": 1, "transcoders": 2,
               "statistics": 4}
    numbers = {name: int(name[:2]) for name in stands_on}
    for one in notebooks:
        used = {*re.findall(r"chapter\.(\w+)", one.path.read_text())}
        needed = {made_by[part] for part in used & {*made_by}} - {numbers[one.name]}
        assert needed <= {numbers[name] for name in stands_on[one.name]}, one.name


def notebook(number: int, after: Sequence[int]) -> Notebook:
    return Notebook(Path(f"{number:02}.py"), tuple(f"{one:02}" for one in after))


@st.composite
def graphs(draw: st.DrawFn) -> list[Notebook]:
    n = draw(st.integers(1, 8))
    return [notebook(i, sorted(draw(st.sets(st.integers(0, i - 1), max_size=3))) if i else ())
            for i in range(n)]


@given(graphs(), st.integers(1, 4), st.data())
def test_any_order_keeps_the_rules(notebooks: list[Notebook], jobs: int, data: st.DataObject
                                   ) -> None:
    names = [one.name for one in notebooks]
    stale = {*data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))}
    bad = data.draw(st.none() | st.sampled_from(sorted(stale)))
    stands_on = side_by_side.before(notebooks)
    lock, running, done, most = threading.Lock(), set[str](), set[str](), 0

    def work(one: Notebook) -> None:
        nonlocal most
        with lock:
            assert stands_on[one.name] & stale <= done
            running.add(one.name)
            most = max(most, len(running))
        time.sleep(0)
        with lock:
            running.remove(one.name)
            if one.name == bad:
                raise ZeroDivisionError
            done.add(one.name)

    failed = side_by_side.run_all([one for one in notebooks if one.name in stale], stands_on, jobs,
                                  work, lambda number: None)
    assert most <= jobs and not running
    if bad is None:
        assert failed == [] and done == stale
    else:
        assert [type(one) for one in failed] == [ZeroDivisionError]
        assert not any(bad in stands_on[name] for name in done)


@given(graphs(), st.integers(1, 4), st.data())
def test_the_time_side_by_side_is_that_of_the_same_order(notebooks: list[Notebook], jobs: int,
                                                         data: st.DataObject) -> None:
    stands_on = side_by_side.before(notebooks)
    seconds = {one.name: float(data.draw(st.integers(1, 9))) for one in notebooks}
    path: dict[str, float] = {}  # until a notebook is done, if nothing but its own past counts
    for one in notebooks:
        path[one.name] = seconds[one.name] + max((path[name] for name in one.after), default=0.0)
    total, longest = sum(seconds.values()), max(path.values())
    found = side_by_side.length(notebooks, stands_on, jobs, seconds)
    # Graham's bound: no core is idle but where the longest path is under way.
    assert max(longest, total / jobs) <= found <= total / jobs + longest * (jobs - 1) / jobs + 1e-9
    assert side_by_side.length(notebooks, stands_on, len(notebooks), seconds) == longest
    pairs = side_by_side.pairs_at_once(notebooks, stands_on)
    assert bool(pairs) == (longest < total)


def test_a_long_chapter_is_not_left_to_run_alone() -> None:
    """04 is followed by none, and takes as long as the others together."""
    notebooks = [notebook(0, ()), *(notebook(i, [0]) for i in (1, 2, 3, 4)),
                 notebook(5, [0, 1, 2, 3])]
    seconds = {one.name: 2.0 for one in notebooks} | {"04": 8.0}
    stands_on, begun = side_by_side.before(notebooks), list[str]()
    assert side_by_side.length(notebooks, stands_on, 2, seconds) == 2 + 8
    # Whatever they are expected to take, the first two are the first of `length`'s order.
    for expected, first in ((seconds, ["00", "04"]), ({}, ["00", "01"])):
        begun.clear()
        assert side_by_side.run_all(notebooks, stands_on, 1, lambda one: begun.append(one.name),
                                    lambda number: None, expected) == []
        assert begun[:2] == first and sorted(begun) == sorted(stands_on)


def test_what_two_chapters_need_is_made_once(tmp_path: Path) -> None:
    path, stamp, made, second = tmp_path / "shared.npz", {"of": 1}, [], threading.Event()

    def make() -> np.ndarray:
        made.append(1)
        if len(made) > 1:
            second.set()
        second.wait(0.3)  # long enough for the other to come and make it too
        return np.arange(3)

    def get() -> None:
        found.append(kept.kept_arrays(path, stamp, make, lambda one: {"it": one},
                                      lambda arrays: arrays["it"]))

    found: list[np.ndarray] = []
    threads = [threading.Thread(target=get) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert made == [1] and [one.tolist() for one in found] == [[0, 1, 2]] * 2


def test_gene_sets_are_fetched_before_any_chapter(
    project: Project, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    asked = []

    def load(name: str, folder: object = None) -> None:
        asked.append((name, project.executed()))

    monkeypatch.setattr("scfm_circuits.enrichment.gene_sets.load_library", load)
    project.notebook("01_first", header="{libraries: [one_library]}")
    assert project.command("execute")[0] == 0
    assert asked == [("one_library", [])] and project.executed() == ["01_first"]


def test_several_chapters_share_one_line_of_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    screen = Screen(terminal)

    def last() -> str:
        return terminal.getvalue().split("\n")[-1].split(CLEARED)[-1]

    with screen.of_chapter("06_enrichment") as six, screen.of_chapter("09_variants") as nine:
        assert six is not None and nine is not None
        six.bar.write("\r06_enrichment: 1/9")
        nine.bar.write("\r09_variants: 2/9")
        assert last() == "06_enrichment: 1/  09_variants: 2/9"
        nine.cells.write("\rsteps: 10 %\x1b[A\r\nstep")  # a line that stays, and a new one
        assert f"{CLEARED}steps: 10 %\n" in terminal.getvalue()
        assert last() == "06_enrichment: 1/  09 step" and "\x1b[A" not in terminal.getvalue()
        screen.say("a message")
        assert last() == "06_enrichment: 1/  09 step"
    assert last() == "" and capsys.readouterr().out == "a message\n"
    with Screen(io.StringIO()).of_chapter("06_enrichment") as unseen:
        assert unseen is None
