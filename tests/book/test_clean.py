"""`make clean`: what it removes, what it says, and what it leaves alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scfm_circuits import InputError
from scfm_circuits.__main__ import main
from scfm_circuits.book import clean as cleaning
from scfm_circuits.book.clean import clean
from scfm_circuits.common.files import only_one, write_json

HOLD = """import sys, time
from pathlib import Path
from scfm_circuits.common.files import only_one
with only_one(Path(sys.argv[1]), "training into"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SCFM_RESULTS", raising=False)
    for name in ("demo", "a", "a+0f", "a+1e", "ab", "b"):
        (tmp_path / "results" / name / "tables").mkdir(parents=True)
        (tmp_path / "results" / name / "tables" / "a.csv").write_text("a\n")
    for name in ("src/room/__pycache__", "tests", "book/_build/html"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def left(root: Path) -> set[str]:
    return {path.name for path in (root / "results").iterdir()}


@pytest.mark.parametrize(("profile", "gone"), [
    ("a", {"a"}), ("some/where/a.yml", {"a"}), ("a.yaml", {"a"}), ("a+0f", {"a+0f"}),
    ("a+*", {"a+0f", "a+1e"}), ("none", set()),
])
def test_what_is_named_is_removed_and_said(root: Path, profile: str, gone: set[str]) -> None:
    before = left(root)
    said = clean(profile, root)
    assert left(root) == before - gone
    removed = said[0].removeprefix("Removed ").rstrip(".").split(", ")
    assert removed == ["book/_build", *(f"results/{name}" for name in sorted(gone)),
                       "Python's caches"]
    assert not (root / "book" / "_build").exists() and (root / "book").exists()
    # Runs with PARAMS were removed too, and not a word was said.
    assert [line for line in said if "a+0f, a+1e" in line] == (said[1:] if gone == {"a"} else [])


@pytest.mark.parametrize("profile", [
    "", "a/", "..", ".", "*", "a b", "../results", ".yml", "x/...yml", "a'; echo b", "a*", "+*",
])
def test_what_is_no_profile_removes_nothing(root: Path, profile: str) -> None:
    before = left(root)
    with pytest.raises(InputError, match="Nothing was removed: PROFILE is"):
        clean(profile, root)
    assert left(root) == before and (root / "book" / "_build").exists()


def test_results_are_where_the_environment_says(root: Path, monkeypatch: pytest.MonkeyPatch
                                                ) -> None:
    elsewhere = root.parent / f"{root.name}-elsewhere"
    (elsewhere / "a").mkdir(parents=True)
    monkeypatch.setenv("SCFM_RESULTS", str(elsewhere))
    assert str(elsewhere / "a") in clean("a", root)[0]
    assert not (elsewhere / "a").exists() and "a" in left(root)


def test_of_a_link_the_link_is_removed(root: Path) -> None:
    disk = root / "disk"
    disk.mkdir()
    (disk / "weights").write_text("w")
    (root / "results" / "linked").symlink_to(disk)
    clean("linked", root)
    assert "linked" not in left(root) and (disk / "weights").exists()


def test_what_runs_is_left_and_a_killed_run_holds_nothing(root: Path) -> None:
    folder = root / "results" / "a"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], text=True,
                          stdout=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stdout.readline() == "held\n"
        with pytest.raises(InputError) as told:
            clean("a", root)
        assert f"results/a stays: Another run is training into {folder}; wait" in str(told.value)
        assert "Removed book/_build" in str(told.value)
        assert (folder / "tables" / "a.csv").exists()
        os.kill(run.pid, signal.SIGKILL)
    assert (folder / ".lock").exists()
    assert "results/a" in clean("a", root)[0] and not folder.exists()


def test_pages_that_are_being_built_are_left(root: Path) -> None:
    with (only_one(root / "book" / "_build" / "smoke", "building pages into"),
          only_one(root / "results" / "a", "building pages from", reads=True),
          pytest.raises(InputError) as told):
        clean("a", root)
    for name in ("book/_build", "results/a"):
        assert f"{name} stays: Another run is building pages" in str(told.value)
        assert (root / name).exists()


def test_what_cannot_be_removed_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cleaning, "_remove", refuse)
    with pytest.raises(InputError, match=r"results/a stays: it cannot be removed .Permission"):
        clean("a", root)


def test_results_of_another_file_are_not_removed_by_path(root: Path) -> None:
    for folder in ("heart", "lung"):
        (root / folder).mkdir()
        (root / folder / "a.yml").write_text("extends: demo\n")
    write_json(root / "results" / "a" / "profile.json", {"file": "heart/a.yml"})
    with pytest.raises(InputError, match=r"Nothing was removed: .* results of .*heart/a.yml"):
        clean("lung/a.yml", root)
    assert "a" in left(root) and (root / "book" / "_build").exists()
    clean("heart/a.yml", root)
    assert "a" not in left(root)


def test_a_run_that_waited_at_the_door_does_not_hold_what_is_gone(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the lock and holding it, the folder is removed."""
    import fcntl

    folder, real, removed = tmp_path / "a", fcntl.flock, []

    def late(handle: object, how: int) -> None:
        if not removed:
            removed.append(time.monotonic())
            (folder / ".lock").unlink()
            folder.rmdir()
        real(handle, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    with only_one(folder, "training into"):
        monkeypatch.setattr(fcntl, "flock", real)
        with pytest.raises(InputError, match="Another run is training into"), \
                only_one(folder, "removing"):
            raise AssertionError("held twice")


def test_a_training_holds_its_results(root: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SCFM_RESULTS", str(root / "results"))
    with only_one(root / "results" / "smoke", "executing notebooks into"):
        assert main(["train", "--profile", "smoke"]) == 1
    assert "Another run is executing notebooks into" in capsys.readouterr().err
    assert {path.name for path in (root / "results" / "smoke").iterdir()} == {".lock"}
