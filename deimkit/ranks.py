"""The processes that train one detector together: which one this is, and how they agree."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deimkit.errors import DeimkitError

T = TypeVar("T")
_stores: list[dist.Store] = []  # where the processes leave notes, once they have joined
NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # "1" lets torchrun begin every attempt with a store of its own
TIMEOUT = 1800.0  # seconds that one process waits for the others; DEIMKIT_TIMEOUT says otherwise


@dataclass(frozen=True)
class Ranks:
    """One of `world` processes, the `rank`-th; on its machine the `local`-th. Alone unless `join` found others.

    Everything that they do together they must do in the same order, whatever happens to one of them.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @staticmethod
    def join() -> Ranks:
        """This process among those that torchrun started with it; alone where it was started otherwise.

        Small numbers on the CPU go over gloo, gradients on GPUs over NCCL.
        """
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return ALONE
        ranks = Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        if not dist.is_initialized():
            patience = timedelta(seconds=float(os.environ.get("DEIMKIT_TIMEOUT", TIMEOUT)))
            store, rank, world = next(dist.rendezvous("env://", timeout=patience))
            if os.environ.get(NEW_STORE) != "1":  # then this one knows where those listened that were lost, too
                store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            _stores[:] = [store]
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=store,
                rank=rank,
                world_size=world,
                timeout=patience,
            )
        return ranks

    @staticmethod
    def leave() -> None:
        """Part from the others, at the end of the program."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def restarted(self) -> bool:
        """Whether torchrun started these processes again, after one was lost."""
        return self.many and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    @property
    def many(self) -> bool:
        """Whether there are others."""
        return self.world > 1

    def beat(self, where: str) -> None:
        """Let the others know how far this process is, for the day when it is missed."""
        if self.many:
            _stores[0].set(f"beat {self.rank}", json.dumps([where, time.time()]))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of their `values`, without gradient; a tensor of its own."""
        total = values.detach().clone()
        if self.many:
            with self._missing_nobody():
                dist.all_reduce(total)
        return total

    def most(self, value: int) -> int:
        """The largest `value` of any process."""
        if not self.many:
            return value
        found = torch.tensor(value)
        with self._missing_nobody():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def gather(self, value: Any) -> list[Any]:
        """What every process brings, in order of rank, to every process; for what can be pickled."""
        found = [value]
        if self.many:
            found = [None] * self.world
            with self._missing_nobody():
                dist.all_gather_object(found, value)
        return found

    @contextmanager
    def _missing_nobody(self) -> Iterator[None]:
        """A block in which all processes meet; `DeimkitError` says who did not come, and where it was last heard of."""
        try:
            yield
        except RuntimeError as error:
            first_line = str(error).splitlines()[0][:200]
            raise DeimkitError(
                f"Process {self.rank} of {self.world} lost the others: {self._heard()} ({first_line})"
            ) from error

    def _heard(self) -> str:
        """Of every other process, how far it was at its last beat, the longest silent first."""
        beats = []
        for rank in set(range(self.world)) - {self.rank}:
            key = f"beat {rank}"
            where, when = json.loads(_stores[0].get(key)) if _stores[0].check([key]) else ("its start", time.time())
            beats.append(
                (time.time() - when, f"process {rank} was last heard of {time.time() - when:.0f} s ago, at {where}")
            )
        return "; ".join(said for _, said in sorted(beats, reverse=True))

    def agree(self, failure: DeimkitError | None) -> None:
        """Raise `failure`, or that of another process if one has failed; return if none has."""
        if self.many and int(self.sum(torch.tensor(int(failure is not None)))):
            failures = [error for error in self.gather(failure) if error is not None]
            failure = failure or failures[0]
        if failure is not None:
            raise failure

    def once(self, do: Callable[[], T]) -> T | None:
        """What `do` returns, done by the first process alone; None in the others, where its error is raised too."""
        result, failure = None, None
        try:
            if self.main:
                result = do()
        except DeimkitError as error:
            failure = error
        self.agree(failure)
        return result

    def mine(self, values: Tensor) -> Tensor:
        """This process's share of the rows of `values`, of which all processes have as many."""
        return values.chunk(self.world)[self.rank] if self.many else values


ALONE = Ranks()
