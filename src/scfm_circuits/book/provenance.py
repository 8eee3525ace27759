"""Where a run's numbers come from: commit, versions, machine, time."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "transformers", "tokenizers", "scanpy", "anndata", "numpy", "scipy", "pandas",
    "gseapy", "scikit-learn", "matplotlib", "papermill", "jupyter-book",
)


def git_state(root: Path) -> dict[str, Any]:
    """Commit of the checkout and whether it has changes; `commit` is None without a repository."""

    def ask(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    changes = ask("status", "--porcelain") if commit else None
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def versions() -> dict[str, str]:
    """Versions of the packages that the numbers depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """System and processors; no host or user name."""
    return {"platform": platform.platform(), "processor": platform.machine(),
            "cpus": os.cpu_count()}


def summary(records: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> dict[str, Any]:
    """One run's provenance from the execution records of its chapters.

    records: by notebook name. The newest chapter speaks for what all have in common; `commits`
    lists every commit that chapters were executed at.
    """
    newest = max((records[name] for name in order), key=lambda record: record["executed_at"])
    keep = ("profile", "profile_title", "overrides", "seed", "cells_are", "cells_name", "versions",
            "machine")
    commits = sorted({records[name]["git"]["commit"] or "" for name in order} - {""})
    seconds = {name: records[name]["seconds"] for name in order}
    return {
        **{key: newest[key] for key in keep},
        "commit": newest["git"]["commit"],
        "dirty": any(records[name]["git"]["dirty"] for name in order),
        "commits": commits,
        "seconds": seconds,
        "seconds_total": round(sum(seconds.values()), 2),
        "executed_at": newest["executed_at"],
        "titles": {name: records[name]["title"] for name in order},
    }
