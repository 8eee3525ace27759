"""Which chapters run now, how many at once, and with how many threads each.

A chapter starts when those that it follows are done. Sums made in another number of threads differ
in their last digits, and training makes more of that; so how many threads a chapter has depends on
the machine and on what the chapter follows, never on what happens to run beside it.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import combinations
from pathlib import Path
from types import MappingProxyType

from scfm_circuits.book.chapters import Notebook

PATIENCE = 10.0
"""Seconds that kernels have to end by themselves, say with a checkpoint, before they are killed."""
ROOMY = 6 * 2**30
"""Bytes of memory of a machine on which two chapters can run at once."""


# --- the machine ---------------------------------------------------------------------------------


def cores() -> int:
    """Cores that this process may use, or the threads that OMP_NUM_THREADS leaves it."""
    from scfm_circuits.common.compiled import n_threads

    return n_threads()


def memory_total() -> int:
    """Bytes of memory of the machine, or of this container."""
    import psutil

    return min([int(psutil.virtual_memory().total), *group_limits()])


def group_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
                 ) -> list[int]:
    """The limits in bytes of this process's control groups (containers, batch jobs)."""
    found = []
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, kinds, path = line.split(":", 2)
        # Version 2 has one tree, version 1 one for each kind.
        base, name = (root / "memory", "limit_in_bytes") if kinds else (root, "max")
        place = base / path.strip("/")
        for folder in (place, *place.parents):
            limit = folder / f"memory.{name}"
            if kinds in ("", "memory") and folder.is_relative_to(base) and limit.is_file():
                found += [int(limit.read_text())] if limit.read_text().strip().isdigit() else []
    return found


def usual_jobs() -> int:
    """Chapters that this machine runs at once: two, or one where cores or memory are few."""
    return 2 if cores() > 1 and memory_total() >= ROOMY else 1


# --- order and threads ---------------------------------------------------------------------------


def before(notebooks: Sequence[Notebook]) -> dict[str, set[str]]:
    """By name, all that a notebook stands on: those that it follows, those that they follow ...

    notebooks: each after those that it follows.
    """
    found: dict[str, set[str]] = {}
    for one in notebooks:
        found[one.name] = {*one.after}.union(*(found[name] for name in one.after))
    return found


def threads_of(notebooks: Sequence[Notebook]) -> dict[str, int]:
    """Threads of each notebook's kernel: all cores where no other can run beside it, else its share
    of them. However many chapters run at once in the end, the numbers stay the same."""
    stands_on, all_cores = before(notebooks), cores()
    share = max(1, all_cores // usual_jobs())
    return {name: all_cores if all(
        other in own or name in stands_on[other] for other in stands_on if other != name) else share
        for name, own in stands_on.items()}


def longest_first(notebooks: Sequence[Notebook], stands_on: Mapping[str, set[str]],
            seconds: Mapping[str, float]) -> list[Notebook]:
    """The notebooks, first those from which it is longest to the end, so that no long one is left
    to run alone. seconds: of each; one that has none counts as 1."""
    left: dict[str, float] = {}
    for one in reversed(notebooks):
        left[one.name] = seconds.get(one.name, 1.0) + max(
            (left[name] for name in left if one.name in stands_on[name]), default=0.0)
    return sorted(notebooks, key=lambda one: -left[one.name])


def startable(waiting: Sequence[Notebook], running: Iterable[str],
              stands_on: Mapping[str, set[str]]) -> list[Notebook]:
    """Those that wait for nothing but their turn."""
    busy = {*running, *(one.name for one in waiting)}
    return [one for one in waiting if not busy & stands_on[one.name]]


def length(notebooks: Sequence[Notebook], stands_on: Mapping[str, set[str]], jobs: int,
           seconds: Mapping[str, float]) -> float:
    """Seconds that `run_all` takes if each notebook takes its `seconds`."""
    waiting = longest_first(notebooks, stands_on, seconds)
    running, now = list[tuple[float, str]](), 0.0
    while waiting or running:
        names = [name for _, name in running]
        for one in startable(waiting, names, stands_on)[: jobs - len(running)]:
            waiting.remove(one)
            running.append((now + seconds[one.name], one.name))
        running.sort()
        now, _ = running.pop(0)
    return now


def pairs_at_once(notebooks: Sequence[Notebook], stands_on: Mapping[str, set[str]]
                  ) -> list[tuple[str, str]]:
    """Names of every two that may run at once."""
    return [(one.name, other.name) for one, other in combinations(notebooks, 2)
            if one.name not in stands_on[other.name] and other.name not in stands_on[one.name]]


def run_all(notebooks: Sequence[Notebook], stands_on: Mapping[str, set[str]], jobs: int,
            work: Callable[[Notebook], None], end: Callable[[int], None],
            seconds: Mapping[str, float] = MappingProxyType({})) -> list[BaseException]:
    """Do the work of each notebook when that of those before it is done, `jobs` at once.

    After a failure nothing else is started, and what runs is finished. Of several that could start,
    the first by `longest_first` does. stands_on: see `before`. work: done in a thread. end: called
    with a signal's number, it passes that on to all that runs; first SIGINT, and SIGKILL if they
    take their time. seconds: what each is expected to take. Returns what went wrong.
    """
    waiting = longest_first(notebooks, stands_on, seconds)
    running: dict[Future[None], Notebook] = {}
    failed: list[BaseException] = []
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while running or (waiting and not failed):
                ready = startable(waiting, [one.name for one in running.values()], stands_on)
                for one in ready[: 0 if failed else jobs - len(running)]:
                    waiting.remove(one)
                    running[pool.submit(work, one)] = one
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[done]
                    problem = done.exception()
                    failed += [problem] if problem is not None else []
        except BaseException:
            end(signal.SIGINT)
            try:
                wait(running, PATIENCE)
            finally:
                end(signal.SIGKILL)
            raise
    return failed


class Kernels:
    """The kernels that run, as process groups, so that all can be ended together."""

    def __init__(self) -> None:
        self.ending = False
        self._groups: set[int] = set()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def one(self) -> Iterator[Callable[[int], None]]:
        """For a chapter: yields what is told its kernel's process group."""
        own: list[int] = []

        def started(group: int) -> None:
            own.append(group)
            with self._lock:
                self._groups.add(group)
            if self.ending:  # it was asked for before
                self.end(signal.SIGKILL)

        try:
            yield started
        finally:
            with self._lock:
                self._groups.difference_update(own)

    def end(self, number: int) -> None:
        """Send a signal to all."""
        self.ending = True
        with self._lock:
            for group in self._groups:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, number)
