"""Functions run in real processes of their own: forked, so that nothing is imported again."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from scfm_circuits.transcoders.training.processes import Ranks, started

_FORK = multiprocessing.get_context("fork")


def child(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A process that runs a function; its exit code is 0, or that of the SystemExit raised."""
    process = _FORK.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _rank(rank: int, size: int, port: int, answer: Connection, function: Callable[..., Any],
          arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        with started() as ranks:
            result = function(ranks, *arguments)
    except BaseException as error:
        result = error if isinstance(error, (KeyboardInterrupt, OSError, SystemExit, ValueError)
                                     ) else RuntimeError(traceback.format_exc())
    answer.send_bytes(pickle.dumps(result))  # `send` would share tensors' memory, which goes


def in_ranks(size: int, function: Callable[..., Any], *arguments: Any, seconds: float = 60
             ) -> list[Any]:
    """What function(ranks, *arguments) gives in each of `size` processes, or the error raised."""
    if size == 1:
        return [function(Ranks(), *arguments)]
    port, pipes = free_port(), [_FORK.Pipe(duplex=False) for _ in range(size)]
    processes = [child(_rank, rank, size, port, pipe[1], function, arguments)
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
