"""All that a machine with a GPU is to show, in one run of some minutes.

    make gpu-check
    PYTHONPATH=src python tests/benchmarks/gpu_check.py [--parts tests,rehearsal] [--seconds 480]

Parts, in this order, each with a limit of its own within `--seconds`:

- environment: versions, the card, and its two ceilings (a copy, a product in bfloat16);
- tests: those marked `gpu`, among them a training step against float64;
- training: `bench_training`, against the bare products and against sparsify;
- passes: `bench_passes`, what counting features and Tables 1 and 2 take over all cells;
- rehearsal: the chapters on stand-ins of the paper's size (`rehearsal`), several at once, with
  the seconds of each and the memory of all; one that fails does not keep the others from being
  tried;
- suite: the unit tests, which run on the processor wherever they run.

With `--beside` the suite runs while the chapters do: sooner done, and their seconds are then upper
bounds. `--small` is for trying the script out where there is no GPU. Everything goes into one JSON,
which is written anew after each part and each chapter, so that what is cut short loses only itself.
It needs no `make` and no network: any Python with the packages does, with the package on the path.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from machine import cpu_model
from rehearsal import Size, write_rehearsal

from scfm_circuits import InputError
from scfm_circuits.book.chapters import Run, load_run, read_record
from scfm_circuits.book.execution import ExecutionFailed, execute
from scfm_circuits.book.gate import without_colours
from scfm_circuits.common.files import read_json, write_json
from scfm_circuits.common.profile import ROOT

PARTS = ("environment", "tests", "training", "passes", "rehearsal", "suite")
LIMITS = {"tests": 120, "training": 150, "passes": 60, "rehearsal": 360, "suite": 240}
"""Seconds that a part may take at most."""
IMPORTED = ("scanpy", "gseapy", "papermill", "jupytext", "ipykernel", "seaborn", "statsmodels.api",
            "sklearn", "numba", "networkx", "myst_nb.ext.glue", "tqdm", "pydantic", "safetensors",
            "tokenizers", "threadpoolctl")
"""What chapters need, also deep within: told before anything is measured."""
TAIL = 4000
"""Characters of output that are kept of what failed."""
SMALL = Size(cells=60, genes=900, layers=3, width=32, heads=2, tokens=4096)


class Options(NamedTuple):
    """What is asked for; `end` by the clock of `time.monotonic`."""

    parts: tuple[str, ...]
    end: float
    small: bool
    beside: bool
    workers: int
    at_once: int
    size: Size
    work: Path
    output: Path

    def seconds(self, part: str) -> float:
        """How long a part may take now; a machine without a GPU has its time."""
        limit = float("inf") if self.small else LIMITS[part]
        return max(1.0, min(limit, self.end - time.monotonic()))


# --- processes ------------------------------------------------------------------------------------


def environment_of_children() -> dict[str, str]:
    """The environment with absolute paths, as notebooks' kernels start elsewhere."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = dict.fromkeys([str(ROOT / "src"), *(str(Path(one).resolve()) for one in given if one)])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


class Child:
    """A process whose output goes to a file, and that ends, with all it started, at its limit."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self.log, self.began = log, time.monotonic()
        with open(log, "w") as handle:
            self._process = subprocess.Popen(
                [sys.executable, *words], stdout=handle, stderr=subprocess.STDOUT, cwd=ROOT,
                env=environment_of_children(), start_new_session=True)

    def result(self, seconds: float) -> dict[str, Any]:
        """Its exit code (None: it was ended at the limit), seconds, and output where it failed."""
        code: int | None = None
        try:
            code = self._process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        found: dict[str, Any] = {"exit_code": code,
                                 "seconds": round(time.monotonic() - self.began, 1)}
        return found if code == 0 else {**found, "output": self.text()[-TAIL:]}

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def pytest_figures(child: Child, seconds: float) -> dict[str, Any]:
    """How the tests ended: counts, names of those that failed, the last line."""
    found = child.result(seconds)
    lines = child.text().splitlines()
    last = next((line for line in reversed(lines)
                 if re.search(r"\d+ (passed|failed|skipped|deselected)|no tests ran", line)), "")
    counts = {what: int(n) for n, what in re.findall(
        r"(\d+) (passed|failed|skipped|errors?|xfailed)", last)}
    bad = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {**found, **counts, "summary": last.strip(" ="), "not_passed": bad[:60]}


# --- parts ----------------------------------------------------------------------------------------


def not_there() -> list[str]:
    """What the chapters import, as their kernels do, and this machine lacks."""
    code = ("import sys\nfor name in sys.argv[1:]:\n try: __import__(name)\n"
            " except ImportError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code, *IMPORTED], capture_output=True, text=True,
                          env=environment_of_children(), check=False)
    return done.stdout.splitlines()


def environment(options: Options) -> dict[str, Any]:
    """Versions, machine, and the card's ceilings."""
    names = ("torch", "numpy", "pandas", "transformers", "scanpy", "numba", "scipy")
    on_gpu = torch.cuda.is_available()
    found: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
        "cpu": cpu_model(), "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }
    if on_gpu:
        found |= {"cuda": torch.version.cuda, "gpus": torch.cuda.device_count(),
                  "gpu_memory_gib": round(torch.cuda.mem_get_info()[1] / 2**30, 1),
                  "driver": _smi("driver_version"), **_ceilings()}
        torch.cuda.empty_cache()  # the other parts have processes of their own
    return found


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _smi(field: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"],
                          capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _ceilings() -> dict[str, float]:
    """Bytes per second of a copy (read and written), operations per second of a product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    large = torch.randn(2**29, device="cuda")
    other = torch.empty_like(large)

    def seconds(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(13):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        return sorted(times[3:])[5]

    return {"copy_bytes_per_second": 2 * large.nbytes / seconds(lambda: other.copy_(large)),
            "bf16_operations_per_second": 2 * 8192**3 / seconds(lambda: a @ b)}


def tests(options: Options) -> dict[str, Any]:
    """Those marked `gpu`; several at once, as most of their time is the compiler's."""
    at_once = max(1, min(6, (os.cpu_count() or 1) // 2))
    words = ["-m", "gpu", "-n", str(at_once), "-p", "no:cacheprovider", "-rfE", "--durations=8"]
    child = Child(["-m", "pytest", *words, "tests"], options.work / "tests.log")
    return pytest_figures(child, options.seconds("tests"))


def training(options: Options) -> dict[str, Any]:
    """`bench_training`."""
    small = ["--width", "64", "--rounds", "1", "--tokens", "256"]
    return benchmark("training", options, small, "--quick")


def passes(options: Options) -> dict[str, Any]:
    """`bench_passes`."""
    return benchmark("passes", options, ["--width", "64"])


def benchmark(name: str, options: Options, small: Sequence[str], *more: str) -> dict[str, Any]:
    """A benchmark's figures, also those that it had printed when it was ended."""
    path = options.work / f"{name}.json"
    words = [f"tests/benchmarks/bench_{name}.py", "--output", str(path), *more]
    child = Child([*words, *(small if options.small else ())], options.work / f"{name}.log")
    found = child.result(options.seconds(name))
    printed = dict(re.findall(r"^(\w+): (\S+)$", child.text(), re.MULTILINE))
    return {**found, **(read_json(path) or {"printed": printed})}


def suite(options: Options) -> Child:
    """The unit tests on the processor."""
    words = ["-m", "pytest", "-n", str(options.workers), "-rfE", "-p", "no:cacheprovider", "tests"]
    if find_spec("jupyter_book") is None:  # one test builds pages
        words += ["--ignore", "tests/book/test_own_cells.py"]
    if options.small:
        words += ["-k", "test_transcoder or test_processes and gpu"]
    return Child(words, options.work / "suite.log")


# --- the rehearsal --------------------------------------------------------------------------------


class Watch:
    """Samples, while a block runs, of the card's memory and use and of the kernel's memory."""

    def __init__(self) -> None:
        self._gpu: list[tuple[int, int]] = []
        self._rss = 0
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=one, daemon=True)
                         for one in (self._watch_gpu, self._watch_memory)]

    def __enter__(self) -> "Watch":
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for one in self._threads:
            one.join(3)

    def _watch_gpu(self) -> None:
        while torch.cuda.is_available() and not self._ended.wait(0.4):
            line = (_smi("memory.used,utilization.gpu") or "").splitlines()[:1]
            numbers = re.findall(r"\d+", line[0]) if line else []
            if len(numbers) == 2:
                self._gpu.append((int(numbers[0]), int(numbers[1])))

    def _watch_memory(self) -> None:
        while not self._ended.wait(0.4):
            total = 0
            for child in psutil.Process().children():
                try:
                    if "ipykernel" in " ".join(child.cmdline()):
                        total += child.memory_info().rss
                except psutil.Error:
                    continue
            self._rss = max(self._rss, total)

    def figures(self) -> dict[str, Any]:
        """Peaks in MiB, and the mean use of the card in percent."""
        used = [use for _, use in self._gpu]
        return {"peak_gpu_mib": max((memory for memory, _ in self._gpu), default=None),
                "mean_gpu_percent": round(sum(used) / len(used), 1) if used else None,
                "peak_rss_mib": round(self._rss / 2**20)}


def rehearsal(options: Options, told: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The chapters, several at once; `told` is called with what is known when some have ended.

    One that fails is left out, and those that follow it are tried without it.
    """
    began, until = time.monotonic(), time.monotonic() + options.seconds("rehearsal")
    os.environ.update(environment_of_children(), SCFM_RESULTS=str(options.work / "results"))
    profile = write_rehearsal(options.work / "stand-ins", options.size,
                              os.environ.get("SCFM_TOKENIZER"))
    run = load_run(str(profile))
    found: dict[str, Any] = {"size": options.size._asdict(), "at_once": options.at_once,
                             "chapters": {}, "executed": 0,
                             "seconds_of_stand_ins": round(time.monotonic() - began, 1)}
    bad: dict[str, str] = {}
    with Watch() as watch:
        while (left := until - time.monotonic()) > (1 if options.small else 15):
            message = tried(without(run, bad), int(left), options.at_once)
            new = {name for name in failures(run) if name not in bad} if message else set()
            bad |= dict.fromkeys(new, message)
            found["chapters"] = {one.name: row(run, one.name, bad) for one in run.notebooks}
            found["executed"] = sum(one["ok"] for one in found["chapters"].values())
            found |= watch.figures() | {"seconds": round(time.monotonic() - began, 1)}
            told(found)
            if not new:
                break
    return found


def tried(run: Run, limit: int, at_once: int) -> str:
    """Execute what is stale; why that failed, or nothing."""
    try:
        execute(run, cell_seconds=limit, jobs=at_once)
    except (ExecutionFailed, InputError) as error:
        return str(error)
    return ""


def without(run: Run, bad: Mapping[str, str]) -> Run:
    """The run without chapters that failed."""
    return replace(run, notebooks=tuple(
        replace(one, after=tuple(name for name in one.after if name not in bad))
        for one in run.notebooks if one.name not in bad))


def failures(run: Run) -> list[str]:
    """Chapters whose partial output was kept."""
    return [path.stem for path in (run.profile.results / "failed").glob("*.ipynb")]


def row(run: Run, name: str, bad: Mapping[str, str]) -> dict[str, Any]:
    """What is known of a chapter: whether it went well, its seconds and slowest cells."""
    path = run.output(name)
    record = read_record(path)
    if record is not None and name not in bad:
        return {"ok": True, "seconds": record["seconds"], "slowest_cells": slowest(cells_of(path))}
    found = {"ok": False, "message": bad.get(name, "not reached")[:TAIL]}
    path = run.profile.results / "failed" / path.name
    if path.is_file():
        found["traceback"] = traceback_of(cells_of(path))[-TAIL:]
    return found


def cells_of(path: Path) -> list[dict[str, Any]]:
    """The cells of a notebook's file."""
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found


def slowest(cells: Sequence[Mapping[str, Any]], n: int = 4) -> list[dict[str, Any]]:
    """The cells that took longest: seconds, and their first line."""
    timed = [(cell["metadata"].get("papermill", {}).get("duration") or 0.0,
              "".join(cell["source"]).splitlines()) for cell in cells
             if cell["cell_type"] == "code"]
    return [{"seconds": round(seconds, 1), "cell": lines[0][:90] if lines else ""}
            for seconds, lines in sorted(timed, key=lambda one: -one[0])[:n] if seconds >= 0.5]


def traceback_of(cells: Sequence[Mapping[str, Any]]) -> str:
    """The traceback in a notebook that failed."""
    return "\n".join(without_colours("\n".join(output["traceback"])) for cell in cells
                     for output in cell.get("outputs", ()) if output["output_type"] == "error")


# --- everything -----------------------------------------------------------------------------------


def check(options: Options) -> dict[str, Any]:
    """All parts asked for, written as they come."""
    began, found = time.monotonic(), dict[str, Any]()

    def keep(part: str, figures: Mapping[str, Any]) -> None:
        found[part] = dict(figures)
        found["seconds"] = round(time.monotonic() - began, 1)
        write_json(options.output, found)

    beside = options.beside and {"rehearsal", "suite"} <= set(options.parts)
    for name, part in (("environment", environment), ("tests", tests), ("training", training),
                       ("passes", passes)):
        if name in options.parts:
            print(f"{name} ...", flush=True)
            keep(name, part(options))
    running = suite(options) if beside else None
    if "rehearsal" in options.parts:
        print("rehearsal ...", flush=True)
        keep("rehearsal", rehearsal(options, lambda figures: keep(
            "rehearsal", {**figures, "suite_beside": beside})) | {"suite_beside": beside})
    if "suite" in options.parts:
        print("suite ...", flush=True)
        keep("suite", pytest_figures(running or suite(options), options.seconds("suite")))
    return found


def summary(found: Mapping[str, Any]) -> str:
    """A few lines for the end of the terminal."""
    lines = [f"all parts: {found.get('seconds')} s"]
    for part in ("tests", "suite"):
        if part in found:
            lines += [f"{part}: {found[part]['summary'] or 'no summary'} (exit code "
                      f"{found[part]['exit_code']})", *found[part]["not_passed"][:20]]
    for part in ("training", "passes"):
        if part in found:
            lines += [f"{part}: exit code {found[part]['exit_code']}"]
            lines += [f"  {key}: {value}" for key, value in found[part].items()
                      if isinstance(value, float) and key not in ("seconds",)]
    for name, row in found.get("rehearsal", {}).get("chapters", {}).items():
        lines.append(f"{name}: {'ok' if row['ok'] else 'FAILED'} {row.get('seconds')} s")
        lines += [] if row["ok"] else [f"  {row['message'][:600]}"]
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> int:
    """Read the options and do it; 0 where everything that was asked for went well."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: all)")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything")
    parser.add_argument("--small", action="store_true", help="tiny stand-ins, a few tests")
    parser.add_argument("--beside", action="store_true", help="the suite beside the chapters")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 4))
    parser.add_argument("--at-once", type=int, default=max(1, min(6, (os.cpu_count() or 1) // 2)),
                        help="chapters that run at once")
    parser.add_argument("--cells", type=int, default=Size().cells, help="cells of the rehearsal")
    parser.add_argument("--tokens", type=int, default=Size().tokens, help="tokens it trains on")
    parser.add_argument("--width", type=int, default=Size().width, help="width of its model; a "
                        "narrow one takes less time, at the same number of layers")
    parser.add_argument("--output", type=Path, default=ROOT / "results/bench/gpu_check.json")
    parser.add_argument("--work", type=Path, help="folder for stand-ins and logs (default: a "
                        "temporary one, removed at the end)")
    chosen = parser.parse_args(given)
    if chosen.cells < Size().cells:
        parser.error(f"with fewer than {Size().cells} cells none of the traced type is held out")
    if "rehearsal" in chosen.parts.split(",") and (lacking := not_there()):
        parser.error("the chapters need packages that are not here: " + "; ".join(lacking))
    parts = tuple(part for part in PARTS if part in chosen.parts.split(","))
    if unknown := set(chosen.parts.split(",")) - set(PARTS):
        parser.error(f"there is no part {min(unknown)!r}; parts are {', '.join(PARTS)}")
    size = SMALL if chosen.small else Size(
        cells=chosen.cells, tokens=chosen.tokens, width=chosen.width,
        heads=max(1, chosen.width // 64))
    with tempfile.TemporaryDirectory() as temporary:
        work = (chosen.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        found = check(Options(parts, time.monotonic() + chosen.seconds, chosen.small,
                              chosen.beside, chosen.workers, chosen.at_once, size, work,
                              chosen.output.resolve()))
    print(summary(found))
    codes = [figures["exit_code"] for figures in found.values()
             if isinstance(figures, dict) and "exit_code" in figures]
    executed = all(row["ok"] for row in found.get("rehearsal", {}).get("chapters", {}).values())
    return 0 if executed and all(code in (0, 5) for code in codes) else 1


if __name__ == "__main__":
    sys.exit(main())
