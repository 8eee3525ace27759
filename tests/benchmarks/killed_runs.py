"""kill -9 at random moments of `make book PROFILE=smoke`: what do the runs after it end with?

    python tests/benchmarks/killed_runs.py FOLDER [--kills 100] [--seed 0]

First a run that nobody disturbs, into FOLDER/undisturbed. Then runs into FOLDER/killed: each is
killed at a moment after the start of its first stale chapter, drawn from 0 to 2 times what that
chapter took undisturbed, so that every chapter is met, and now and then the pages; one in ten is
killed before any chapter. In turn all its processes are killed, or the command alone (its kernel is
left to itself), or the kernel alone. The next run begins at once. One that ends before its moment
has to leave the tables of the undisturbed run, but for columns of clock time (`seconds...`); then
all begins anew. Called again, it goes on; --kills is how many there are to be in all.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

KINDS = ("all processes", "the command", "the kernel")
BEFORE = "before any chapter"
CHAPTER = re.compile(r"\[\d+/\d+\] (\S+): (.*)")


class Book:
    """`make book PROFILE=smoke` into a folder, as a process; `said` grows while it runs."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "SCFM_RESULTS": str(folder / "results")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scfm_circuits", "book", "--profile", "smoke", "--output",
             str(folder / "pages")], env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.said: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.said.extend(iter(self.process.stdout.readline, ""))

    @property
    def chapters(self) -> list[str]:
        """The chapters begun so far."""
        return [found.group(1) for line in self.said if (found := CHAPTER.match(line))]

    def over(self, seconds: float) -> bool:
        """Whether it has ended, after at most so many seconds."""
        until = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        return self.process.poll() is not None

    def kill(self, kind: str) -> None:
        """kill -9; where that is not the command itself, wait until it has ended too."""
        every = psutil.Process(self.process.pid).children(recursive=True)
        kernels = [one for one in every if _is_kernel(one)]
        if kind != "the kernel" or not kernels:
            self.process.kill()
        for one in every if kind == "all processes" else kernels if kind == "the kernel" else ():
            _gone(one, signal.SIGKILL)
        # A kernel that was just ending is not missed: then the run goes on.
        if not self.over(20):
            self.process.kill()
        self.process.wait(timeout=120)


def _is_kernel(process: psutil.Process) -> bool:
    try:
        return "ipykernel_launcher" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _gone(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)


def tables(folder: Path) -> dict[str, list[list[str]]]:
    """All tables of a run without columns of clock time, by name."""
    return {path.name: rows_of(path) for path in
            sorted([*folder.glob("results/smoke/tables/*.csv"),
                    *folder.glob("results/smoke/claims.csv")])}


def rows_of(path: Path) -> list[list[str]]:
    """A table's rows without columns of clock time."""
    with open(path, encoding="utf-8", newline="") as handle:
        header, *rows = csv.reader(handle)
    kept = [i for i, name in enumerate(header) if not name.startswith("seconds")]
    return [[row[i] for i in kept] for row in (header, *rows)]


def undisturbed(folder: Path) -> dict[str, float]:
    """Seconds of each chapter of the run that nobody disturbs, made unless it is there."""
    place = folder / "results" / "smoke" / "provenance.json"
    if not place.is_file():
        print("A run that nobody disturbs", flush=True)
        book = Book(folder)
        if book.process.wait() != 0:
            raise SystemExit("".join(book.said))
    seconds: dict[str, float] = json.loads(place.read_text())["seconds"]
    return seconds


def one_run(folder: Path, took: dict[str, float], number: int, seed: int) -> dict[str, Any]:
    """A run, killed at its moment if it has not ended before; what happened."""
    draw = random.Random(f"{seed} {number}")
    kind, early = KINDS[number % len(KINDS)], draw.random() < 0.1
    book, share = Book(folder), draw.random()
    if not book.over(6 * share if early else 0):
        while not early and not book.chapters and not book.over(0):
            time.sleep(0.02)
        if not early and book.chapters:
            book.over(2 * share * took[book.chapters[0]])
    ended = book.process.poll() is not None
    if not ended:
        book.kill(kind)
    # A kernel that is left to itself holds the pipe, and the next run is not to wait for it.
    book.reader.join(timeout=30 if ended else 0.2)
    said = "".join(book.said)
    return {"number": number, "kind": kind, "chapters": book.chapters, "ended": ended,
            "code": book.process.returncode, "traceback": "Traceback" in said, "said": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no run begins")
    chosen = parser.parse_args()
    folder, log = chosen.folder.resolve() / "killed", chosen.folder.resolve() / "runs.jsonl"
    took = undisturbed(chosen.folder.resolve() / "undisturbed")
    wanted = tables(chosen.folder.resolve() / "undisturbed")
    runs = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    until = time.monotonic() + 60 * chosen.minutes
    while True:
        finish = sum(not run["ended"] for run in runs) >= chosen.kills
        if (finish and runs[-1]["ended"]) or time.monotonic() > until:
            break
        run = one_run(folder, {name: 1e6 for name in took} if finish else took, len(runs),
                      chosen.seed)
        if run["ended"]:
            found = tables(folder)
            run["differ"] = sorted(name for name in {*found, *wanted}
                                   if found.get(name) != wanted.get(name))
        bad = run["traceback"] or run.get("differ") or (run["ended"] and run["code"])
        print(f"{len(runs)}: {'ended' if run['ended'] else run['kind'] + ' killed'} in "
              f"{run['chapters'][-1] if run['chapters'] else BEFORE}"
              f"{', differing: ' + str(run['differ']) if run.get('differ') else ''}", flush=True)
        runs.append(run)
        with open(log, "a") as handle:
            handle.write(json.dumps(run) + "\n")
        if bad:
            raise SystemExit(f"This should not be:\n{run['said']}")
        if run["ended"]:
            shutil.rmtree(folder)
    kills = [run for run in runs if not run["ended"]]
    where = Counter((run["chapters"] or [BEFORE])[-1] for run in kills)
    print(f"{len(kills)} kills ({dict(Counter(run['kind'] for run in kills))}), "
          f"{len(runs) - len(kills)} runs ended, each with the tables of the undisturbed one.")
    for chapter, count in sorted(where.items()):
        print(f"  {count:3} {chapter}")


if __name__ == "__main__":
    main()
