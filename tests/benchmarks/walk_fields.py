"""Every numeric field of the profile at its smallest and largest value: does it end in a book?

    python tests/benchmarks/walk_fields.py [--fields model_layers seed] [--seconds 300] [--plan]

Run by hand; with `--plan` nothing is run but the plan, in minutes. Each value is set in a profile
smaller than `smoke`; what the plan refuses is not run. Of what it lets through, the chapters are
run one after another in one process, those only that read the field or follow one that does
(`book.chapters`), on the results of a run without it. A field without a bound is taken at `LARGE`;
a run that the plan or the clock finds too long is left there.
Writes results/bench/fields.json: for each field and value, `book`, or the sentence and where it was
said (`profile`, `plan`, or the chapter, which is too late), or the traceback's last line.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import yaml

from scfm_circuits import InputError
from scfm_circuits.book.chapters import Run, inputs_of, load_run
from scfm_circuits.common.files import write_json
from scfm_circuits.common.profile import Profile, load_profile

LARGE = 10**9
EPSILON = 1e-9
BASE = {"extends": "smoke", "max_cells": 80, "model_steps": 8, "training_tokens": 8192,
        "variant_tokens": 1024, "null_draws": 39, "reinitialised_control": False,
        "prerank_features": 1, "human_layer": 0}
"""What makes `smoke` cheaper still."""


def ends(field: str) -> list[Any]:
    """The smallest and the largest value that the field's type allows."""
    about = Profile.model_json_schema()["properties"][field]
    for one in about.get("anyOf", [about]):
        kind = one.get("type")
        if kind == "integer":
            return [one.get("minimum", one.get("exclusiveMinimum", -LARGE)),
                    one["exclusiveMaximum"] - 1 if "exclusiveMaximum" in one
                    else one.get("maximum", LARGE)]
        if kind == "number":
            low = one.get("minimum", one["exclusiveMinimum"] + EPSILON
                          if "exclusiveMinimum" in one else -float(LARGE))
            high = one.get("maximum", one["exclusiveMaximum"] - EPSILON
                           if "exclusiveMaximum" in one else float(LARGE))
            return [float(low), float(high)]
    return []


def stale(run: Run, base: Run) -> list[Path]:
    """The notebooks that read what differs, and those that follow one that does."""
    found: list[str] = []
    for notebook in run.notebooks:
        differs = inputs_of(run, notebook)["profile"] != inputs_of(base, notebook)["profile"]
        if differs or {*found} & {*notebook.after}:
            found.append(notebook.name)
    return [one.path for one in run.notebooks if one.name in found]


def chapter(path: Path, profile: str) -> None:
    """Run a notebook's cells in this process."""
    code = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines()
                     if not line.startswith(("%", "!", "profile = ")))
    exec(compile(code, str(path), "exec"), {"__name__": "__main__", "profile": profile})


def work(profile: str, base: str | None, seconds: float, told: Any) -> None:
    """Plan and run one profile; sends what is under way, and in the end how it ended."""
    import matplotlib

    matplotlib.use("Agg")
    with contextlib.suppress(OSError):
        os.dup2(os.open(f"{profile}.log", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
    place = "profile"
    try:
        run = load_run(profile)
        # All chapters show the name.
        alike = run if base is None else Run(base, {}, load_profile(base).model_copy(
            update={"name": run.profile.name}), run.notebooks)
        paths = [one.path for one in run.notebooks] if base is None else stale(run, alike)
        place = "plan"
        told.send((place, ""))
        from scfm_circuits.book.preflight import run_cost

        cost = run_cost(run.profile, run.notebooks,
                        [one.name for one in run.notebooks if one.path in paths])
        if cost.refusal:
            raise InputError(cost.refusal)
        if cost.seconds > seconds + 300:
            told.send(("plan", f"lets it run, for about {cost.seconds / 3600:.3g} hours"))
            return
        for path in paths:
            place = path.stem
            told.send((place, ""))
            chapter(path, profile)
        told.send(("book", f"{len(paths)} chapters"))
    except InputError as error:
        told.send((place, f"sentence: {error}"))
    except BaseException as error:
        traceback.print_exc()
        told.send((place, f"TRACEBACK: {type(error).__name__}: {error}"))


def outcome(profile: Path, base: Path | None, seconds: float) -> tuple[str, str, float]:
    """Where one profile ended, how, and after how many seconds."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=work, args=(str(profile), str(base) if base else None,
                                                 seconds, theirs))
    began, place, said = time.perf_counter(), "profile", ""
    process.start()
    theirs.close()
    try:
        while ours.poll(max(0.0, began + seconds - time.perf_counter())):
            place, said = ours.recv()
            if said:
                break
        else:
            said = f"not ended after {seconds:.0f} seconds"
    except EOFError:
        said = f"TRACEBACK: the process died ({process.exitcode})"
    process.kill()
    process.join()
    return place, said, time.perf_counter() - began


def planned(profile: Path) -> tuple[str, str, float]:
    """What the profile and the plan say, in this process."""
    from scfm_circuits.book import preflight

    place, began = "profile", time.perf_counter()
    try:
        run = load_run(str(profile))
        place = "plan"
        cost = preflight.run_cost(run.profile, run.notebooks)
        said = f"sentence: {cost.refusal}" if cost.refusal else f"about {cost.seconds:.0f} seconds"
    except InputError as error:
        said = f"sentence: {error}"
    except Exception as error:
        traceback.print_exc()
        said = f"TRACEBACK: {type(error).__name__}: {error}"
    return place, said, time.perf_counter() - began


def walk(fields: list[str], seconds: float, folder: Path, output: Path, plan: bool) -> None:
    """All fields, one after another; figures are written as they come."""
    os.environ["SCFM_RESULTS"] = str(folder / "results")
    base = folder / "walk.yml"
    base.write_text(yaml.safe_dump(BASE))
    found: dict[str, Any] = {"base": planned(base) if plan else outcome(base, None, 10 * seconds)}
    print("base", *found["base"], flush=True)
    if not plan and found["base"][0] != "book":
        sys.exit((folder / "walk.yml.log").read_text()[-3000:])
    for field in fields:
        for value in ends(field):
            profile = folder / "one.yml"
            profile.write_text(yaml.safe_dump({"extends": str(base), field: value}))
            if plan:
                place, said, took = planned(profile)
            else:
                results = folder / "results" / "one"
                shutil.rmtree(results, ignore_errors=True)
                shutil.copytree(folder / "results" / "walk", results)
                (results / "profile.json").unlink(missing_ok=True)
                Path(f"{profile}.log").unlink(missing_ok=True)
                place, said, took = outcome(profile, base, seconds)
            found[f"{field}={value:g}"] = [place, said, round(took)]
            print(f"{field}={value:g}: {place}: {' '.join(said.split())[:300]} ({took:.0f} s)",
                  flush=True)
            write_json(output, json.loads(json.dumps(found)))


def main() -> None:
    """Walk over the fields named, or all that hold a number."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    numeric = [field for field in Profile.model_fields if ends(field)]
    parser.add_argument("--fields", nargs="+", choices=numeric, default=numeric)
    parser.add_argument("--seconds", type=float, default=300.0, help="for one value")
    parser.add_argument("--plan", action="store_true", help="run nothing but the plan")
    parser.add_argument("--output", type=Path, default=Path("results/bench/fields.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        walk(given.fields, given.seconds, Path(folder), given.output, given.plan)


if __name__ == "__main__":
    main()
