"""The one program: `python -m scfm_circuits {book,train,data,profile,plan}`.

Errors that a person can mend end in one sentence on the terminal and 1; an interruption in 130.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scfm_circuits import InputError
from scfm_circuits.book.chapters import load_run
from scfm_circuits.book.execution import ExecutionFailed
from scfm_circuits.common.profile import ROOT, Profile, load_profile
from scfm_circuits.common.profile_files import parse_overrides, split_pairs

# What a command needs beyond these is imported when it is asked for: an up-to-date book answers at
# once, and training runs where there is no scanpy.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scfm_circuits", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=about, description=about)

    def of_profile(name: str, about: str) -> argparse.ArgumentParser:
        own = command(name, about)
        own.add_argument("--profile", default="demo", help="name or .yml file (default: demo)")
        own.add_argument("-p", dest="parameters", action="append", default=[], metavar="KEY=VALUE",
                         help="override a field of the profile; may be repeated")
        own.add_argument("--params", default="", metavar="PAIRS",
                         help="several of these in one text, as make takes them")
        return own

    book = of_profile("book", "execute the stale notebooks, check them, build the pages")
    book.add_argument("step", nargs="?", choices=["all", "execute", "check", "build"],
                      default="all")
    book.add_argument("--cell-seconds", type=int, default=None,
                      help="a cell that runs longer fails (default: $SCFM_CELL_SECONDS, or an hour "
                      "and more if the run is expected to take long)")
    book.add_argument("--output", type=Path, default=ROOT / "book" / "_build",
                      help="folder that receives html/ (default: book/_build)")
    of_profile("train", "train the transcoders alone, also in several processes with torchrun")
    of_profile("data", "fetch and verify cells, model and gene sets")
    cost = of_profile("plan", "what would be executed, why, and what it would cost")
    for one in (book, cost):
        one.add_argument("--jobs", default=None, metavar="N",
                         help="chapters that run at once, where none follows another (default: 2, "
                         "or 1 where cores or memory are few)")
    cost.add_argument("--cost", action="store_true", help="the cost alone, as JSON")
    writer = command("profile", "write a first profile for your own .h5ad file")
    writer.add_argument("h5ad", nargs="?", default=os.environ.get("H5AD", ""))
    writer.add_argument("--out", default=os.environ.get("OUT") or "mine.yml")
    writer.add_argument("--extends", default=os.environ.get("EXTENDS") or "demo",
                        help="the profile it is based on")
    writer.add_argument("--overwrite", action="store_true",
                        default=os.environ.get("OVERWRITE", "") not in ("", "0"))
    return parser


def _perform(given: argparse.Namespace) -> None:
    if given.command == "profile":
        from scfm_circuits.book.first_profile import first_profile

        first_profile(given.h5ad, given.out, given.extends, given.overwrite)
        return
    overrides: dict[str, Any] = parse_overrides(
        [*split_pairs(given.params), *given.parameters], Profile.model_fields)
    if given.command == "train":
        from scfm_circuits.transcoders.training.run import train

        train(given.profile, overrides)
    elif given.command == "data":
        from scfm_circuits.book.downloads import fetch_data

        fetch_data(load_profile(given.profile, overrides))
    else:
        from scfm_circuits.book import cli as book

        if given.jobs is not None and not re.fullmatch("0*[1-9][0-9]{0,8}", given.jobs):
            raise InputError(f"JOBS (--jobs) is {given.jobs!r}; it must be a whole number, at "
                             "least 1.")
        jobs = None if given.jobs is None else int(given.jobs)
        run = load_run(given.profile, overrides)
        if given.command == "book":
            book.make(run, given.step, given.output, given.cell_seconds, jobs)
        else:
            (book.show_cost if given.cost else book.show_plan)(run, jobs)


def main(given: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(given)
    try:
        _perform(arguments)
    except (InputError, ExecutionFailed) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or 'A file'} cannot be read or written "
              f"({error.strerror or error}); check its permissions and the room on its disk.",
              file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; what is finished is kept, run the same command again to go on.",
              file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
