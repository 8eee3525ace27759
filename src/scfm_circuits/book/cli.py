"""The book from end to end: execute the stale notebooks, gate them, build the pages."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scfm_circuits import InputError
from scfm_circuits.book import gate, provenance
from scfm_circuits.book.chapters import (
    Run,
    changed_inputs,
    libraries_asked_for,
    plan,
    read_again,
    read_record,
)
from scfm_circuits.book.execution import ExecutionFailed, execute
from scfm_circuits.common.files import read_json, write_json


def check(run: Run, just_executed: Sequence[str] = ()) -> None:
    """The gate over the whole run; ExecutionFailed with one line per problem.

    Every chapter must be executed, fresh and whole (`gate.problems`), every declared file there.
    The inputs are looked at again, as they may have changed since the run was read. On success the
    run's `provenance.json` is written.

    just_executed: names of the notebooks that this command has executed before it.
    """
    run = read_again(run)
    stale = plan(run)
    changed = {kind for notebook, _ in stale if notebook.name in just_executed
               for kind in changed_inputs(run, notebook, read_record(run.output(notebook.name)))}
    if changed:
        raise ExecutionFailed(
            f"Changed while running: {', '.join(sorted(changed))}; run `{run.command('book')}` "
            "again."
        )
    problems = [f"{notebook.name}: {reason}" for notebook, reason in stale]
    if problems:
        raise ExecutionFailed(
            f"The executed chapters are not up to date; run `{run.command('notebooks')}` first:\n  "
            + "\n  ".join(problems)
        )
    records: dict[str, dict[str, Any]] = {}
    glued: dict[str, str] = {}
    for notebook in run.notebooks:
        path = run.output(notebook.name)
        executed = json.loads(path.read_text(encoding="utf-8"))
        found = gate.problems(executed, known_parameters=("profile", "overrides"))
        problems += [f"{notebook.name}: {problem}" for problem in found]
        for key in gate.glued_keys(executed):
            other = glued.setdefault(key, notebook.name)
            if other != notebook.name:
                problems.append(f"{notebook.name}: the value {key!r} is also one of {other}")
        records[notebook.name] = read_record(path)
    if problems:
        raise ExecutionFailed("The gate refuses the book:\n  " + "\n  ".join(problems))
    order = [notebook.name for notebook in run.notebooks]
    path, found_now = run.profile.results / "provenance.json", provenance.summary(records, order)
    if read_json(path) != found_now:  # finished results may be read-only
        write_json(path, found_now)


def announce(run: Run, jobs: int | None = None) -> tuple[dict[str, float], int | None]:
    """Say what the stale chapters will cost; returns the seconds of each by name, and how many are
    best run at once, if that is known.

    Raises InputError if they cannot fit, or if it is seen already that they will fail.
    """
    if not plan(run):
        return {}, jobs
    # In a process of its own, which gives a GPU and the memory of the libraries back.
    words = [sys.executable, "-m", "scfm_circuits", "plan", "--cost", "--profile", run.profile_name]
    words += ["--jobs", str(jobs)] if jobs else []
    for key, value in run.overrides.items():
        words += ["-p", f"{key}={json.dumps(value)}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):  # an estimate that fails must not keep anybody from work
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"What this run costs cannot be told ({reason}).", flush=True)
        return {}, jobs
    if found["text"]:
        print(found["text"], flush=True)
    if found["refusal"]:
        raise InputError(found["refusal"])
    return found["each"], int(found["jobs"])


def show_plan(run: Run, jobs: int | None = None) -> None:
    """Print which chapters are stale, why, and what they cost; InputError as `announce`."""
    stale = plan(run)
    for notebook, reason in stale:
        print(f"{notebook.name}: {reason}")
    if not stale:
        print(f"Every notebook of {run.profile.name} is up to date; nothing would be executed.")
    announce(run, jobs)


def show_cost(run: Run, jobs: int | None = None) -> None:
    """Print `preflight.run_cost` of the stale chapters as JSON."""
    from scfm_circuits.book.preflight import Cost, run_cost

    try:
        cost = run_cost(run.profile, run.notebooks, [one.name for one, _ in plan(run)], jobs)
    except InputError as error:
        cost = Cost("", str(error), 0.0, {})
    print(json.dumps(cost._asdict()))


def missing_gene_sets(run: Run) -> str | None:
    """One line if gene sets that a chapter asks for are not here, and how to get them; or None."""
    from scfm_circuits.enrichment.gene_sets import BUNDLED_LIBRARY, local_copy

    asked = {name for notebook in run.notebooks
             for name in libraries_asked_for(notebook, run.profile)} - {BUNDLED_LIBRARY}
    names = sorted(name for name in asked if local_copy(name, run.profile.gene_sets) is None)
    if not names:
        return None
    return (f"Missing: the gene sets {', '.join(names)}, for which a small bundled library stood "
            f"in. With a network, `{run.command('data')}` fetches them; else put <name>.gmt files "
            f"into a folder and name it in SCFM_GENE_SETS; then `{run.command('book')}` again.")


def make(run: Run, step: str, output: Path, cell_seconds: int | None = None,
         jobs: int | None = None) -> None:
    """One step of the book, or `all`: `execute` the stale chapters, `check` them, `build` pages.

    output: the folder that receives `html/`. cell_seconds, jobs: as for `execute`. Raises
    InputError and ExecutionFailed.
    """
    if cell_seconds is not None and cell_seconds < 1:
        raise InputError("--cell-seconds must be at least 1.")
    executed: list[str] = []
    expected, jobs = announce(run, jobs) if step in ("all", "execute") else ({}, jobs)
    if step in ("all", "build"):
        from scfm_circuits.book import pages

        # From now on there are pages only if this run ends well.
        pages.set_aside_unless_fresh(run, output)
    if step in ("all", "execute"):
        executed = execute(run, cell_seconds=cell_seconds, expected=expected, jobs=jobs)
        if not executed and step == "execute":
            print(f"Every notebook of {run.profile.name} is up to date.")
    if step == "execute":
        return
    check(run, executed)
    if step == "check":
        print(f"{len(run.notebooks)} chapters of {run.profile.name} pass the gate.")
        return
    built = pages.build(run, output)
    lacking = missing_gene_sets(run)
    if lacking:
        print(lacking)
    print(f"{'Built' if built or executed else 'Everything is up to date'}: "
          f"{os.path.relpath(output / 'html' / 'index.html')}")
