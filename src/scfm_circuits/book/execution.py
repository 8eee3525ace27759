"""Executing the stale notebooks of one run, each into its place only when it is good.

Those that do not follow one another run side by side (`side_by_side`).

A notebook is executed under a temporary name, after its earlier execution has been removed. It
appears in `results/<profile>/notebooks/` only after it has passed the gate; otherwise the partial
output is kept in `results/<profile>/failed/` and the notebook stays stale, so that the same command
tries it again.
"""

import contextlib
import itertools
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

from scfm_circuits import InputError
from scfm_circuits.book import gate, provenance, side_by_side
from scfm_circuits.book.chapters import (
    CACHED,
    Notebook,
    Run,
    gene_set_inputs,
    inputs_of,
    libraries_asked_for,
    plan,
    read_again,
    read_record,
)
from scfm_circuits.book.screen import Live, Screen
from scfm_circuits.common.files import (
    NOTES,
    OWNER,
    files_of,
    flush,
    only_one,
    size_of_file,
    sweep,
    write_atomic,
)
from scfm_circuits.common.profile import ROOT, own_results, profile_path
from scfm_circuits.report.live_curves import UNWATCHED

CELL_SECONDS = 3600
"""A cell that runs longer than this fails; $SCFM_CELL_SECONDS or `--cell-seconds` change it."""
TIMES_EXPECTED = 5
"""A run that is expected to take long: a cell of it may take this many times as long."""

RETRY = "Earlier chapters are kept; run the same command again to retry."
THREADS = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"
"""Environment variables that say how many threads a process has."""


AT_ONCE = "__import__('atexit').register(__import__('os')._exit, 0);"
"""A kernel's first line: as the last thing at its end, it goes at once. To take down torch and all
else that is loaded, piece by piece, takes Python more than a second in each chapter."""


class ExecutionFailed(Exception):
    """A notebook could not be executed or did not pass the gate; the message is for a person."""


def execute(run: Run, *, cell_seconds: int | None = None,
            expected: Mapping[str, float] = MappingProxyType({}), jobs: int | None = None
            ) -> list[str]:
    """Execute the stale notebooks, once cells, model and gene sets are there; returns their names.

    cell_seconds: how long a cell may take; by default what the environment says, or an hour, or
    several times what the whole run is expected to take. expected: seconds of each chapter, by
    name. jobs: how many run at once; by default as many as the machine allows (`side_by_side`).
    Raises ExecutionFailed if one fails: those that run are finished and no other is started,
    finished ones are kept, its partial output is moved to `results/<profile>/failed/`, and the next
    call tries it again. Raises KeyboardInterrupt on Ctrl-C and SystemExit on SIGTERM, when all
    kernels have ended.
    """
    limit = cell_seconds or _seconds_from_environment(
        max(CELL_SECONDS, round(TIMES_EXPECTED * sum(expected.values()))))
    if not plan(run) and not _leftovers(run):
        with contextlib.suppress(OSError):  # what is finished may be read-only
            own_results(run.profile, run.profile_name)
        return []
    with only_one(run.profile.results, "executing notebooks into"):
        stale = plan(run)
        # Before any chapter reads the values of one that has another name now.
        for leftover in _leftovers(run):
            leftover.unlink()
        if stale:
            from scfm_circuits.book.downloads import (
                fetch_cells,
                fetch_dictionaries,
                fetch_model,
            )

            fetch_dictionaries(run.profile)
            fetch_model(run.profile)
            fetch_cells(run.profile)
            sweep(run.profile.results)
            _fetch_gene_sets(run, [notebook for notebook, _ in stale])
            # What is made again is not to be read as it was, nor found damaged by the ledger.
            for notebook, _ in stale:
                (run.profile.results / "values" / f"{notebook.name}.json").unlink(missing_ok=True)
            _execute_all(run, dict(stale), limit, jobs or side_by_side.usual_jobs(), expected)
        return [notebook.name for notebook, _ in stale]


def _fetch_gene_sets(run: Run, stale: Sequence[Notebook]) -> None:
    """Have the gene sets that chapters ask for, where they can be had: chapters that fetched the
    same one at once would be in each other's way."""
    names = {name for one in stale for name in libraries_asked_for(one, run.profile)}
    if names:
        from scfm_circuits.enrichment.gene_sets import load_library

        for name in sorted(names):
            # A library that cannot be used is an error of the chapter that reads it.
            with contextlib.suppress(InputError):
                load_library(name, run.profile.gene_sets)


def _execute_all(run: Run, stale: Mapping[Notebook, str], limit: int, jobs: int,
                 expected: Mapping[str, float]) -> None:
    """Execute notebooks, each when those that it follows are done; stale: with the reasons."""
    from scfm_circuits.transcoders.training.interrupts import stops_heeded

    kernels, threads = side_by_side.Kernels(), side_by_side.threads_of(run.notebooks)
    begun = itertools.count(1)
    # Its warning about parameters without a default is no news: the profile has checked them.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    # String hashing differs between processes otherwise, and with it the order of sets.
    os.environ.setdefault("PYTHONHASHSEED", "0")
    screen = Screen(sys.stderr)
    with stops_heeded():

        def work(notebook: Notebook) -> None:
            screen.say(f"[{next(begun)}/{len(stale)}] {notebook.name}: {stale[notebook]}")
            try:
                with kernels.one() as started, screen.of_chapter(notebook.name) as live:
                    kernel = _Kernel(threads[notebook.name], started, live)
                    seconds = _execute_one(_as_it_is_now(run), notebook, limit, kernel)
            except BaseException:
                if kernels.ending:  # whatever its end looks like from here
                    raise KeyboardInterrupt from None
                screen.say(f"      {notebook.name} failed")
                raise
            screen.say(f"      {notebook.name} done in {seconds:.1f} s")

        failed = side_by_side.run_all([*stale], side_by_side.before(run.notebooks), jobs, work,
                                      kernels.end, expected)
    if not failed:
        return
    messages = [str(one).removesuffix(RETRY) for one in failed if isinstance(one, ExecutionFailed)]
    if len(messages) < len(failed) or len(failed) == 1:
        raise next((one for one in failed if isinstance(one, KeyboardInterrupt)), failed[0])
    raise ExecutionFailed("".join(messages) + RETRY)


def _leftovers(run: Run) -> list[Path]:
    """Executed notebooks that the book no longer has, and their values."""
    known, results = {notebook.name for notebook in run.notebooks}, run.profile.results
    return [path for path in (*(results / "notebooks").glob("*.ipynb"),
                              *(results / "values").glob("*.json")) if path.stem not in known]


def _as_it_is_now(run: Run) -> Run:
    """The run with the profile that the next notebook will read; it may change during a run."""
    now = read_again(run)
    if now.profile != run.profile:
        # Only the notebook's kernel would read it again: its record would name the old settings.
        raise ExecutionFailed("Changed while running: profile; run "
                              f"`{run.command('book')}` again.")
    return now


def _seconds_from_environment(default: int) -> int:
    text = os.environ.get("SCFM_CELL_SECONDS", str(default))
    if not text.isdigit() or int(text) == 0:
        raise InputError(f"SCFM_CELL_SECONDS is {text!r}; it must be a whole number of seconds.")
    return int(text)


def _prepared(run: Run, notebook: Notebook) -> Any:
    """The notebook as papermill takes it, with the same cell ids at every conversion."""
    import jupytext

    node = jupytext.read(notebook.path)
    for index, cell in enumerate(node.cells):
        cell["id"] = f"{notebook.name}-{index}"[-64:]
    node.metadata["kernelspec"] = {
        "name": "python3", "display_name": "Python 3", "language": "python",
    }
    node.metadata.pop("scfm", None)
    return node


def _record(run: Run, notebook: Notebook, seconds: float, git: Mapping[str, Any],
            inputs: dict[str, str]) -> dict[str, Any]:
    after = {name: read_record(run.output(name)).get("run_id") for name in notebook.after}
    return {
        "run_id": uuid.uuid4().hex,
        "title": notebook.title,
        "inputs": inputs,
        "after": after,
        "seconds": round(seconds, 2),
        "executed_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "profile": run.profile.name,
        "profile_title": run.profile.title,
        "overrides": dict(run.overrides),
        "seed": run.profile.seed,
        "cells_are": run.profile.cells_are,
        "cells_name": run.profile.cells_name,
        "git": dict(git),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
    }


class _Kernel(NamedTuple):
    """How a chapter's kernel runs: its threads, what is told its process group, and where its bars
    and messages go, if anybody looks on."""

    threads: int
    started: Callable[[int], None]
    live: Live | None


def _execute_one(run: Run, notebook: Notebook, limit: int, kernel: _Kernel) -> float:
    """Run one notebook and put it in place if it passes the gate; returns the wall seconds."""
    import nbformat
    import papermill

    final = run.output(notebook.name)
    partial = run.profile.results / "running" / final.name
    partial.parent.mkdir(parents=True, exist_ok=True)
    notes = partial.with_suffix(".notes")
    notes.write_text("")
    # What the notebook was before it ran: an edit during the run leaves it stale.
    inputs, git = inputs_of(run, notebook), provenance.git_state(ROOT)
    node = _prepared(run, notebook)
    # From here on files of the earlier execution are overwritten; if this one fails, its record
    # must not vouch for the mixture.
    final.unlink(missing_ok=True)
    live = kernel.live
    started = time.perf_counter()
    try:
        with open(partial.with_suffix(".log"), "w") as log:
            papermill.execute_notebook(
                node, str(partial.absolute()), parameters=_parameters(run), kernel_name="python3",
                kernel_manager_class=_kernel_manager(log, notes, kernel),
                execution_timeout=limit, stderr_file=live and live.cells,
                progress_bar={"leave": False, "desc": notebook.name, "file": live.bar,
                              "position": 0} if live else False,
            )
        executed = nbformat.read(partial, as_version=4)
        seconds = time.perf_counter() - started
        _tidy(executed, notebook, final)
        # The cache as the notebook leaves it: what it downloads itself is no change.
        inputs[CACHED] = gene_set_inputs(run, notebook)[CACHED]
        executed.metadata["scfm"] = {**_record(run, notebook, seconds, git, inputs),
                                     "threads": kernel.threads,
                                     "files": _results(run, notebook, notes)}
        problems = gate.problems(executed, known_parameters=_parameters(run))
        problems += gate.missing_products(run.profile.results, notebook.produces)
        if problems:
            raise ExecutionFailed("; ".join(problems))
        write_atomic(final, nbformat.writes(executed) + "\n")
    except BaseException as error:
        kept = _keep_failed(run, partial)
        if isinstance(error, KeyboardInterrupt) or _ename(error) == "KeyboardInterrupt":
            raise KeyboardInterrupt from None
        raise ExecutionFailed(_failure(notebook, error, kept, limit)) from None
    notes.unlink()
    for suffix in (".ipynb", ".log"):
        partial.with_suffix(suffix).unlink(missing_ok=True)
        (run.profile.results / "failed" / final.name).with_suffix(suffix).unlink(missing_ok=True)
    return seconds


def _results(run: Run, notebook: Notebook, notes: Path) -> dict[str, int]:
    """Bytes of each result that the notebook wrote or read again, by its place under
    `results/<profile>/`; from its notes, and where these have nothing that it declares, by that.

    All of them are on the disk when this returns, so the record vouches for nothing that a failure
    of power could take.
    """
    top = run.profile.results.absolute()
    noted = {one for line in notes.read_text(encoding="utf-8").splitlines()
             for one in files_of(Path(line)) if one.is_relative_to(top)} - {top / OWNER}
    for pattern in notebook.produces:
        there = {one for one in top.glob(pattern) if one.is_file()}
        noted |= set() if there & noted else there
    for path in noted:
        flush(path)
    return {path.relative_to(top).as_posix(): size_of_file(path) for path in sorted(noted)}


def _kernel_manager(log: IO[str], notes: Path, kernel: _Kernel) -> type:
    """A kernel manager whose kernels run where the project is, with so many threads, write their
    own messages to `log`, know that nobody looks on, and note their results in `notes`.

    On an interruption or a crash a kernel prints a traceback from inside a library, which would
    bury our one sentence on the terminal. What cells print is in the notebook either way.
    """
    from jupyter_client.manager import AsyncKernelManager

    class Quiet(AsyncKernelManager):
        async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]
            options["env"] = {**(options.get("env") or os.environ), UNWATCHED: "1",
                              NOTES: str(notes.absolute()),
                              **dict.fromkeys(THREADS, str(kernel.threads))}
            options["extra_arguments"] = [*options.get("extra_arguments", ()),
                                          f"--IPKernelApp.exec_lines={AT_ONCE}"]
            # papermill's `cwd` would change the folder of all that run in this process.
            await super().start_kernel(**{**options, "cwd": str(ROOT)}, stderr=log)
            local: Any = self.provisioner
            kernel.started(local.pgid)

    return Quiet


def _parameters(run: Run) -> dict[str, Any]:
    name = run.profile_name
    path = profile_path(name)
    # A profile given by a path relative to the caller's folder must be found from the kernel's.
    return {"profile": name if path.parent.name == "profiles" and path.stem == name
            else str(path.resolve()), "overrides": dict(run.overrides)}


def _tidy(executed: Any, notebook: Notebook, final: Path) -> None:
    """Make what papermill adds the same on every machine; `input_path` is the whole notebook."""
    for cell in executed.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell["id"] = f"{notebook.name}-parameters"[-64:]
    details = executed.metadata["papermill"]
    details["input_path"] = notebook.path.name
    details["output_path"] = final.name
    details.get("environment_variables", {}).clear()


def _keep_failed(run: Run, partial: Path) -> Path | None:
    if not partial.exists():
        return None
    kept = run.profile.results / "failed" / partial.name
    kept.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".ipynb", ".log"):
        shutil.move(partial.with_suffix(suffix), kept.with_suffix(suffix))
    return kept


def _ename(error: BaseException) -> str:
    return str(getattr(error, "ename", ""))


def _failure(notebook: Notebook, error: BaseException, kept: Path | None, limit: int) -> str:
    """What the terminal says about a failed chapter."""
    if isinstance(error, ExecutionFailed):
        what = f"it ran, but did not pass the checks: {error}"
    elif _ename(error) == "InputError":
        what = str(getattr(error, "evalue", ""))
    elif _ename(error):
        traceback = getattr(error, "traceback", [])
        tail = "\n".join(gate.without_colours("\n".join(traceback)).splitlines()[-12:])
        what = f"{_ename(error)}: {getattr(error, 'evalue', '')}\n{tail}"
    elif type(error).__name__ == "CellTimeoutError":
        what = (f"a cell ran longer than {limit} s; set SCFM_CELL_SECONDS to allow more.")
    elif type(error).__name__ == "DeadKernelError":
        what = "the kernel died, most likely because memory ran out."
    else:
        what = f"{type(error).__name__}: {error}"
    where = f"Its partial output: {os.path.relpath(kept)}\n" if kept else ""
    return f"{notebook.name} failed: {what}\n{where}{RETRY}"
