"""Functions run in real processes of their own, which share no lock with the tests or each other.

A process that is killed keeps a lock for ever that others share with it; forked from the tests it
would share theirs (tqdm's, for one), and their threads would be missing. So each is forked from a
server that has imported what they need and done nothing else.
"""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from scfm_circuits.transcoders.training.processes import Ranks, started

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["hypothesis", "pytest", "scfm_circuits.__main__",
                                "scfm_circuits.cells.reading", "scfm_circuits.circuits.graph",
                                "scfm_circuits.transcoders.training.run",
                                "transformers.models.gpt_neox.modeling_gpt_neox"])


def _called(content: bytes, variables: dict[str, str], *more: Any) -> None:
    os.environ.clear()
    os.environ.update(variables)
    function, arguments = pickle.loads(content)
    function(*arguments, *more)


def child(function: Callable[..., Any], *arguments: Any, pipe: Connection | None = None
          ) -> BaseProcess:
    """A process that runs a function of a module; its exit code is 0, or that of the SystemExit.

    It has copies of the arguments and of the environment, and the end of a pipe if one is given.
    """
    content = pickle.dumps((function, arguments))  # multiprocessing's would share tensors' memory
    process = _SERVER.Process(target=_called, daemon=True, args=(
        content, dict(os.environ), *([] if pipe is None else [pipe])))
    process.start()
    return process


def wait_for(file: Path, size: int = 0) -> None:
    """Return when a process has written so many bytes into a file."""
    until = time.monotonic() + 60
    while not (file.exists() and file.stat().st_size >= size):
        assert time.monotonic() < until, f"nothing comes to {file}"
        time.sleep(0.002)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _rank(rank: int, size: int, port: int, function: Callable[..., Any],
          arguments: tuple[Any, ...], before: Callable[[], None] | None, answer: Connection
          ) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        if before:
            before()
        with started() as ranks:
            result = function(ranks, *arguments)
    except BaseException as error:
        result = error if isinstance(error, (KeyboardInterrupt, OSError, SystemExit, ValueError)
                                     ) else RuntimeError(traceback.format_exc())
    answer.send_bytes(pickle.dumps(result))  # `send` would share tensors' memory, which goes


def in_ranks(size: int, function: Callable[..., Any], *arguments: Any, seconds: float = 60,
             before: Callable[[], None] | None = None) -> list[Any]:
    """What function(ranks, *arguments) gives in each of `size` processes, or the error raised.

    before: what each does before it joins the others.
    """
    if size == 1:
        return [function(Ranks(), *arguments)]
    port, pipes = free_port(), [_SERVER.Pipe(duplex=False) for _ in range(size)]
    processes = [child(_rank, rank, size, port, function, arguments, before, pipe=pipe[1])
                 for rank, pipe in enumerate(pipes)]
    try:
        answers = []
        for pipe in pipes:
            if not pipe[0].poll(seconds):
                raise TimeoutError("a process gives no answer")
            answers.append(pickle.loads(pipe[0].recv_bytes()))
        return answers
    finally:
        for process in processes:
            process.join(5)
            process.kill()
