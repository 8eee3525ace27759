"""The book from end to end: execute the stale notebooks, gate them, build the pages.

    python -m scfm_circuits.book.cli {all,execute,check,build,plan} --profile demo [-p ...]

`all` is what `make book` runs. Errors a person can mend end in one sentence on the terminal.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scfm_circuits import InputError
from scfm_circuits.book import gate, provenance
from scfm_circuits.book.chapters import Run, changed_inputs, load_run, plan, read_record, rehashed
from scfm_circuits.book.execution import ExecutionFailed, execute
from scfm_circuits.common.files import write_json
from scfm_circuits.common.profile import ROOT, add_profile_arguments, parse_overrides


def check(run: Run, just_executed: Sequence[str] = ()) -> None:
    """The gate over the whole run; ExecutionFailed with one line per problem.

    Every chapter must be executed, fresh and whole (`gate.problems`), every declared file there.
    The inputs are looked at again, as they may have changed since the run was read. On success the
    run's `provenance.json` is written.

    just_executed: names of the notebooks that this command has executed before it.
    """
    run = rehashed(run)
    stale = plan(run)
    changed = {kind for notebook, _ in stale if notebook.name in just_executed
               for kind in changed_inputs(run, notebook,
                                          read_record(run.output(notebook.name)) or {})}
    if changed:
        raise ExecutionFailed(
            f"Changed while running: {', '.join(sorted(changed))}; run `make book` again."
        )
    problems = [f"{notebook.name}: {reason}" for notebook, reason in stale]
    if problems:
        raise ExecutionFailed(
            "The executed chapters are not up to date; run `make notebooks` first:\n  "
            + "\n  ".join(problems)
        )
    known = {"profile", *run.overrides}
    records: dict[str, dict[str, Any]] = {}
    glued: dict[str, str] = {}
    for notebook in run.notebooks:
        path = run.output(notebook.name)
        executed = json.loads(path.read_text(encoding="utf-8"))
        found = gate.problems(executed, known)
        found += gate.missing_products(run.profile.results, notebook.produces)
        problems += [f"{notebook.name}: {problem}" for problem in found]
        for key in gate.glued_keys(executed):
            other = glued.setdefault(key, notebook.name)
            if other != notebook.name:
                problems.append(f"{notebook.name}: the value {key!r} is also one of {other}")
        records[notebook.name] = read_record(path) or {}
    if problems:
        raise ExecutionFailed("The gate refuses the book:\n  " + "\n  ".join(problems))
    order = [notebook.name for notebook in run.notebooks]
    write_json(run.profile.results / "provenance.json", provenance.summary(records, order))


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scfm_circuits.book.cli", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["all", "execute", "check", "build", "plan"])
    add_profile_arguments(parser)
    parser.add_argument("--cell-seconds", type=int, default=None,
                        help="a cell that runs longer fails (default: $SCFM_CELL_SECONDS, or an "
                        "hour and more if a chapter is expected to take long)")
    parser.add_argument("--output", type=Path, default=ROOT / "book" / "_build",
                        help="folder that receives html/ (default: book/_build)")
    return parser.parse_args(given)


def _announce(run: Run) -> float:
    """Say what the stale chapters will cost; returns the seconds of the longest, 0 without any.

    Raises InputError if they cannot fit, or if it is seen already that they will fail.
    """
    stale = [notebook.name for notebook, _ in plan(run)]
    if not stale:
        return 0.0
    # In a process of its own, which gives back what it takes: see `run_plan.main`.
    words = [sys.executable, "-m", "scfm_circuits.book.run_plan", "--profile", run.profile_name]
    for key, value in run.overrides.items():
        words += ["-p", f"{key}={json.dumps(value)}"]
    done = subprocess.run([*words, "--stale", *stale], capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):  # an estimate that fails must not keep anybody from work
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"What this run costs cannot be told ({reason}).", flush=True)
        return 0.0
    if found["text"]:
        print(found["text"], flush=True)
    if found["refusal"]:
        raise InputError(found["refusal"])
    return float(found["longest"])


def _perform(arguments: argparse.Namespace) -> None:
    if arguments.cell_seconds is not None and arguments.cell_seconds < 1:
        raise InputError("--cell-seconds must be at least 1.")
    run = load_run(arguments.profile, parse_overrides(arguments.parameters))
    if arguments.command == "plan":
        stale = plan(run)
        for notebook, reason in stale:
            print(f"{notebook.name}: {reason}")
        if not stale:
            print(f"Every notebook of {run.profile.name} is up to date; nothing would be executed.")
        _announce(run)
        return
    executed: list[str] = []
    expected = _announce(run) if arguments.command in ("all", "execute") else 0.0
    if arguments.command in ("all", "build"):
        from scfm_circuits.book import pages

        # From now on there are pages only if this run ends well.
        pages.set_aside_unless_fresh(run, arguments.output)
    if arguments.command in ("all", "execute"):
        executed = execute(run, cell_seconds=arguments.cell_seconds, expected=expected)
        if not executed and arguments.command == "execute":
            print(f"Every notebook of {run.profile.name} is up to date.")
    if arguments.command == "execute":
        return
    check(run, executed)
    if arguments.command == "check":
        print(f"{len(run.notebooks)} chapters of {run.profile.name} pass the gate.")
        return
    index = arguments.output / "html" / "index.html"
    built = pages.build(run, arguments.output)
    print(f"{'Built' if built or executed else 'Everything is up to date'}: "
          f"{os.path.relpath(index)}")


def main(given: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 1 on an error that was explained, 130 if interrupted."""
    arguments = _arguments(given)
    try:
        _perform(arguments)
    except (InputError, ExecutionFailed) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; finished chapters are kept, run the same command again to go on.",
              file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
