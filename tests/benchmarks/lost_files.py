"""Each result of PROFILE=smoke deleted, emptied and cut: is it seen, and does `make book` mend it?

    python tests/benchmarks/lost_files.py FOLDER

FOLDER/results/smoke: a finished run, made unless it is there. First each file alone, in each way:
what `make book` would execute first and why (`plan`), and of what is kept between chapters, whether
it would still be taken for whole. Then three times the real command, over many at once, in another
way each time: every table, figure and other file that chapters write, and one file of two of three
of the kept results (the other third shows that one is mended alone). FOLDER/lost_files.csv has a
row for each file and way.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from killed_runs import rows_of

from scfm_circuits.book.chapters import load_run, plan, read_record
from scfm_circuits.common import kept

WAYS: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink, "emptied": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2)}
RECORDS = ("corpus.json", "training.json")
COLUMNS = ("file", "way", "chapter", "told", "as_kept", "mended_in_round", "same_again")


def make_book(folder: Path) -> tuple[int, str, float]:
    """`make book PROFILE=smoke` into the folder: exit code, what it says, seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "scfm_circuits", "book", "--profile", "smoke", "--output",
         str(folder / "pages")], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def kept_unit(results: Path, name: str) -> str:
    """The kept file or folder that a file belongs to; nothing for what chapters write."""
    path = results / name
    if path.suffix == ".npz":
        return name
    record = any((path.parent / one).is_file() for one in RECORDS)
    return path.parent.relative_to(results).as_posix() if record else ""


def taken_for_whole(results: Path, whole: Path, unit: str) -> bool:
    """Whether the stage would take the kept result as it is; whole: an undamaged copy of all."""
    with contextlib.redirect_stdout(io.StringIO()):
        if unit.endswith(".npz"):
            import numpy as np

            with np.load(whole / unit) as stored:
                stamp = json.loads(str(stored["stamp"]))
            return kept.read_arrays(results / unit, stamp) is not None
        record = next(one for one in RECORDS if (whole / unit / one).is_file())
        stamp = json.loads((whole / unit / record).read_text())["stamp"]
        return kept.read_record(results / unit / record, stamp) is not None


def each_alone(results: Path, whole: Path, files: list[str]) -> list[dict[str, Any]]:
    """A row for each file and way: what would be executed first, and why."""
    found = []
    for name in files:
        for way, lose in WAYS.items():
            lose(results / name)
            stale, unit = plan(load_run("smoke")), kept_unit(whole, name)
            first = (stale[0][0].name, stale[0][1]) if stale else ("", "nothing")
            row = dict(zip(COLUMNS, (name, way, *first), strict=False))
            if unit:
                row["as_kept"] = "whole" if taken_for_whole(results, whole, unit) else "not whole"
            found.append(row)
            shutil.copy2(whole / name, results / name)
    return found


def same(path: Path, was: Path) -> bool:
    """Whether a file is as before, but for columns and entries of clock time."""
    if not path.is_file():
        return False
    if path.suffix == ".csv":
        return rows_of(path) == rows_of(was)
    if path.name in RECORDS:
        one, other = ({key: value for key, value in json.loads(file.read_text()).items()
                       if not key.startswith("seconds")} for file in (path, was))
        return one == other
    return path.read_bytes() == was.read_bytes()


def one_round(number: int, folder: Path, whole: Path, rows: list[dict[str, Any]]) -> None:
    """Damage many files, run the command, and enter into the rows what became of them."""
    results, units, damaged = folder / "results" / "smoke", {}, []
    for place, name in enumerate(dict.fromkeys(row["file"] for row in rows)):
        unit, way = kept_unit(whole, name), [*WAYS][(place + number) % len(WAYS)]
        # Of a kept result one file, another one each time; in each round a third stays whole.
        if unit:
            index = units.setdefault(unit, len(units))
            inside = [one for one in sorted({row["file"] for row in rows})
                      if kept_unit(whole, one) == unit]
            if index % 3 == number or name != inside[(index + number) % len(inside)]:
                continue
        elif name == "provenance.json" or name.startswith("notebooks/"):
            continue
        WAYS[way](results / name)
        damaged.append((name, way))
    code, said, seconds = make_book(folder)
    print(f"Round {number + 1}: {len(damaged)} files damaged, `make book` took {seconds:.0f} s "
          f"(exit code {code}).", flush=True)
    if code or "Traceback" in said:
        raise SystemExit(f"This should not be:\n{said}")
    for row in rows:
        if (row["file"], row["way"]) in damaged:
            row["mended_in_round"] = number + 1
            row["same_again"] = same(results / row["file"], whole / row["file"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=len(WAYS), help="runs of the real command")
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    os.environ["SCFM_RESULTS"] = str(folder / "results")
    results, whole = folder / "results" / "smoke", folder / "whole"
    code, said, seconds = make_book(folder)
    if code:
        raise SystemExit(said)
    code, said, seconds = make_book(folder)
    print(f"{said.strip()} ({seconds:.2f} s with nothing to do)", flush=True)
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(results, whole)
    run = load_run("smoke")
    listed = {name for one in run.notebooks
              for name in (read_record(run.output(one.name)) or {})["files"]}
    files = [path.relative_to(whole).as_posix() for path in sorted(whole.rglob("*"))
             if path.is_file() and not path.name.startswith(".")]
    print(f"{len(files)} files; no chapter lists {sorted({*files} - listed)}", flush=True)
    rows = each_alone(results, whole, files)
    unseen = [row for row in rows if row["told"] == "nothing"]
    print(f"{len(rows)} losses: {len(rows) - len(unseen)} seen; not seen: "
          f"{sorted({row['file'] for row in unseen})}; kept and taken for whole: "
          f"{sorted({row['file'] for row in rows if row.get('as_kept') == 'whole'})}.", flush=True)
    for number in range(chosen.rounds):
        one_round(number, folder, whole, rows)
    with open(folder / "lost_files.csv", "w", newline="") as handle:
        table = csv.DictWriter(handle, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    mended = [row for row in rows if "same_again" in row]
    print(f"{len(mended)} mended by the command, {sum(row['same_again'] for row in mended)} as "
          f"before; else: {sorted({row['file'] for row in mended if not row['same_again']})}.")


if __name__ == "__main__":
    main()
