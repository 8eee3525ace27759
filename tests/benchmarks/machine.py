"""What the benchmarks ask of the machine: its processor, and how much memory a part of one took;
and how they say which part is under way."""

import contextlib
import gc
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MIB = 2**20


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Print a part's name before it starts, and how long it took."""
    print(f"{name} ...", flush=True)
    began = time.perf_counter()
    yield
    print(f"({name} took {time.perf_counter() - began:.0f} seconds)", flush=True)


def cpu_model() -> str:
    """Name of the processor, as far as the system tells."""
    return _cpu_line("model name") or platform.processor()


def cpu_has(flag: str) -> bool | None:
    """Whether the processor has a feature such as `avx512_bf16`; None where that is not told."""
    flags = _cpu_line("flags")
    return flag in flags.split() if flags else None


def multiplies_bfloat16() -> bool:
    """Whether the processor says that it multiplies bfloat16; others emulate it, many times slower
    than float32."""
    flags = (_cpu_line("flags") or _cpu_line("Features")).split()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & {*flags})


def _cpu_line(key: str) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def peak_mib() -> float:
    """Peak resident memory of this process so far, or since `reset_peak` where that works."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    if found:
        return int(found[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 if sys.platform == "linux" else 1024**2)


def reset_peak() -> float | None:
    """Let the peak start anew at what is resident now, and return that; None if it cannot be."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def above(before: float | None) -> float | None:
    """Peak memory since `reset_peak`, above what was resident then."""
    return None if before is None else max(peak_mib() - before, 0.0)
