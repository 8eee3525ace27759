"""Several processes that train one set of transcoders, each its own layers.

Layers share no parameter, so nothing is exchanged for the optimizer's sake: a process holds some
layers, and at the end each writes the files of its own. What they share is the model's forward
pass: each runs some of the cells, and hands the other layers' activations to their owners.
`torchrun` starts the processes.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from scfm_circuits import InputError

T = TypeVar("T")

SHARE_GPUS = "SCFM_SHARE_GPUS"
"""Environment variable: 1 lets more processes than there are GPUs share them."""


class FailedElsewhere(InputError):
    """Another process has failed and said why."""


class Ranks(NamedTuple):
    """This process among those that work together: its number, and how many there are.

    through_host: whether what is exchanged passes through the host's memory, because NCCL does not
    join processes that share a GPU.
    """

    rank: int = 0
    size: int = 1
    through_host: bool = False

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks and writes what all share."""
        return self.rank == 0

    def layers(self, n_layers: int, rank: int | None = None) -> range:
        """A process's layers (default: this one's): contiguous, as many as others' or one more."""
        rank = self.rank if rank is None else rank
        return range(n_layers * rank // self.size, n_layers * (rank + 1) // self.size)

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in order, at every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Hand each process its part; returns what each process has handed to this one.

        parts, shapes: one per process, what it is to have, and the shape of what comes from it.
        """
        sent = torch.cat([part.reshape(-1) for part in parts])
        device = sent.device
        sent = sent.cpu() if self.through_host else sent
        sizes = [math.prod(shape) for shape in shapes]
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts])
        return [one.view(*shape) for one, shape in
                zip(received.to(device).split(sizes), shapes, strict=True)]

    def after_first(self, function: Callable[[], T]) -> T:
        """A function's value, which the others compute when the first process has.

        For what the first one writes and all then read. Raises FailedElsewhere where it was the
        first that failed.
        """
        value, failed = None, True
        try:
            if self.first:
                value = function()
            failed = False
        finally:
            failed = self.gather(failed)[0]
        if self.first:
            return value  # type: ignore[return-value]
        if failed:
            raise FailedElsewhere("The first process has failed.")
        return function()


ALONE = Ranks()
"""A process that works with no other."""


def _take_gpu() -> bool:
    """Make this process's GPU the current one, if there are GPUs; whether it has one alone.

    Raises InputError, in the machine's first process, where there are more processes than GPUs and
    they may not share; FailedElsewhere in the others.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local = int(os.environ["LOCAL_RANK"])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if not gpus:
        return False
    if here > gpus and os.environ.get(SHARE_GPUS) != "1":
        if local:
            raise FailedElsewhere("The first process has said what is wrong.")
        raise InputError(
            f"{here} processes were started, but this machine has {gpus} GPU"
            f"{'s' if gpus > 1 else ''}; start at most {gpus} (`--nproc-per-node {gpus}`), let "
            f"them share with {SHARE_GPUS}=1, or use the processor: CUDA_VISIBLE_DEVICES=.")
    torch.cuda.set_device(local % gpus)
    return here <= gpus


@contextlib.contextmanager
def started() -> Iterator[Ranks]:
    """Join the processes that `torchrun` started; alone if it did not start this one.

    Raises InputError where there are GPUs, but fewer than processes (see `SHARE_GPUS`).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    own_gpu = _take_gpu()
    # gloo beside nccl: what is exchanged as Python objects need not pass the GPU. A process that
    # ends is noticed at once; the time limit is for one that works, and that may take long.
    dist.init_process_group("cpu:gloo,cuda:nccl" if own_gpu else "gloo",
                            timeout=timedelta(days=7))
    try:
        ranks = Ranks(dist.get_rank(), dist.get_world_size(),
                      torch.cuda.is_available() and not own_gpu)
        # One that ended at once, as with settings that are refused, would break the joining of
        # those that still connect, and they would tell of that and not of the settings.
        ranks.barrier()
        yield ranks
    finally:
        dist.destroy_process_group()
