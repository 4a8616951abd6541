"""The ranks of one job: who decides, which ranks hold a replica of the model together, who works on which prompts.

All rank arithmetic is here. A phase lays the world out as ``count`` replicas of ``degree`` ranks each, consecutive
ranks making up one replica, so that a replica's traffic stays inside a node where it can.
"""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from heretic_ds import progress
from heretic_ds.errors import RankFailed, SearchFailed, UnfitDtype, UserError
from heretic_ds.foreign.ulimits import limit_reached
from heretic_ds.heartbeat import Heartbeats

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=30)
"""Longest wait in a collective, and for all ranks to be started. Ranks come to one as far apart as their shares of a
pass differ, which on CPUs takes many minutes; work that is longer on one rank by its nature is named, and waited for
outside of any collective. Where a rank dies its peers notice at once under gloo, and launchers always."""


@dataclass(frozen=True)
class Replicas:
    """How one phase lies on the world: ``count`` replicas of the model, ``degree`` ranks each."""

    count: int
    degree: int
    index: int
    """The replica that this rank belongs to."""
    member: int
    """This rank's place within its replica."""
    inside: dist.ProcessGroup | None
    """The ranks of this replica; None where it is one rank."""
    across: dist.ProcessGroup | None
    """The ranks with this rank's place in every replica; None where there is one replica."""

    def share(self, n: int) -> list[int]:
        """Indices of the items, of ``n``, that this replica works on.

        Every replica gets equally many, so that all take part in equally many collectives: where ``n`` does not
        divide, the last item of a share is repeated, or the first of all for a replica left with none.
        """
        each = -(-n // self.count)
        mine = list(range(self.index, n, self.count))
        return mine + [mine[-1] if mine else 0] * (each - len(mine))

    def own(self, n: int) -> int:
        """How many items of :meth:`share` are this replica's; the rest are repeats."""
        return len(range(self.index, n, self.count))

    def gather(self, items: Sequence[T], n: int) -> list[T]:
        """All ``n`` results in order, from every replica's results for its :meth:`share`."""
        if self.across is None:
            return list(items)[:n]
        shares: list[Any] = [None] * self.count
        dist.all_gather_object(shares, list(items), group=self.across)
        return [shares[i % self.count][i // self.count] for i in range(n)]

    def brought(self, tensor: Tensor) -> list[Tensor]:
        """The host tensors of all replicas, alike in shape, by replica: on rank 0, none elsewhere. All call it."""
        if self.member:
            return []
        if self.across is None:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.count)] if self.index == 0 else None
        dist.gather(tensor, found, dst=dist.get_global_rank(self.across, 0), group=self.across)
        return found or []

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a host tensor over replicas."""
        if self.across is not None:
            dist.all_reduce(tensor, group=self.across)
        return tensor

    def alike(self, value: float) -> float:
        """The value of the replica's first rank, on all of its ranks."""
        if self.inside is None:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=dist.get_global_rank(self.inside, 0), group=self.inside)
        return told[0]


@dataclass(frozen=True)
class Mesh:
    """Replicas as grids: some stages of equally many consecutive ranks each."""

    replicas: Replicas
    near: Replicas
    """As if each stage were a replica: the ranks of this rank's stage are those inside."""
    line: dist.ProcessGroup | None
    """Of each stage of this rank's replica, in their order, the rank with this one's place; None where there is one
    stage."""


ALONE = Replicas(count=1, degree=1, index=0, member=0, inside=None, across=None)
"""One replica on one rank."""


@dataclass(frozen=True)
class Machine:
    """The ranks that run on one machine."""

    ranks: tuple[int, ...]
    """In ascending order."""
    group: dist.ProcessGroup | None
    """None where it is one rank."""
    most: int
    """How many ranks the machine with the most of them has."""


@dataclass(frozen=True)
class _Problem:
    """An error as other ranks are told of it: exceptions hold what cannot be pickled, or cannot be made anew of it."""

    rank: int
    kind: type[Exception]
    text: str

    @classmethod
    def of(cls, error: Exception | None, rank: int) -> _Problem | None:
        if error is None:
            return None
        for kind in (UnfitDtype, UserError, SearchFailed, RankFailed):
            if isinstance(error, kind):
                return cls(rank, kind, str(error))
        if limit := limit_reached(error):
            return cls(rank, UserError, f"rank {rank}: {limit}")
        told = "".join(traceback.format_exception(error)).rstrip()
        return cls(rank, RankFailed, f"rank {rank} failed:\n{told}")


@dataclass(frozen=True)
class World:
    """This process among the ranks of the job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    _layouts: dict[int, Replicas] = field(default_factory=dict, repr=False, compare=False)
    """By degree: process groups hold connections and buffers, so each is made once."""
    _machine: list[Machine] = field(default_factory=list, repr=False, compare=False)
    """This rank's, once it was asked for."""
    _meshes: dict[tuple[int, int], Mesh] = field(default_factory=dict, repr=False, compare=False)
    """By ranks a stage and stages."""
    _hearts: Heartbeats | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise UserError(f"RANK={self.rank} is not below WORLD_SIZE={self.size}; start ranks with the launcher")

    @classmethod
    def join(cls, meeting: str = "env://") -> World:
        """The world that the launcher's environment describes; a world of one without a launcher.

        Ranks find each other as the URL ``meeting`` says. Whoever joins again, without having left, gets the same one.
        """
        global _joined
        world = cls(
            rank=int(os.environ.get("RANK", 0)),
            size=int(os.environ.get("WORLD_SIZE", 1)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        )
        if world.size == 1:
            return world
        if _joined is None:
            if torch.cuda.is_available():
                torch.cuda.set_device(world.local_rank)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            where: dict[str, Any] = {"rank": world.rank, "world_size": world.size, "timeout": _TIMEOUT}
            dist.init_process_group(backend, init_method=meeting, **where)
            store, _, _ = next(dist.rendezvous(meeting, **where))
            _joined = replace(world, _hearts=Heartbeats(dist.PrefixStore("hearts", store), world.rank))
        return _joined

    @property
    def decides(self) -> bool:
        """Whether this rank asks the study, writes files and speaks; the others follow."""
        return self.rank == 0

    def degree(self, degree: int | None, setting: str) -> int:
        """Ranks of one replica; see :meth:`replicas`."""
        degree = self.size if degree is None else degree
        if degree < 1 or self.size % degree:
            raise UserError(
                f"{setting}={degree} does not divide the world size {self.size}: world size = data parallel size x "
                f"{setting}; choose a divisor of {self.size}, or start another number of ranks"
            )
        return degree

    def replicas(self, degree: int | None, setting: str) -> Replicas:
        """The layout of a phase; ``degree`` None takes the whole world for one replica.

        Raises UserError, naming ``setting``, where the world does not divide. Every rank has to call it.
        """
        degree = self.degree(degree, setting)
        if degree not in self._layouts:
            count = self.size // degree
            index, member = divmod(self.rank, degree)
            inside = self._own_group([range(replica * degree, (replica + 1) * degree) for replica in range(count)])
            across = self._own_group([range(place, self.size, degree) for place in range(degree)])
            self._layouts[degree] = Replicas(count, degree, index, member, inside, across)
        return self._layouts[degree]

    def mesh(self, width: int, stages: int, setting: str) -> Mesh:
        """The layout of a phase whose replicas are ``stages`` of ``width`` ranks each.

        Raises UserError, naming ``setting``, where the world does not divide. Every rank has to call it.
        """
        replicas = self.replicas(width * stages, setting)
        if (width, stages) not in self._meshes:
            starts = range(0, self.size, width * stages)
            lines = [range(start + at, start + width * stages, width) for start in starts for at in range(width)]
            near, line = self.replicas(width, setting), self._own_group(lines)
            self._meshes[width, stages] = Mesh(replicas, near, line)
        return self._meshes[width, stages]

    def _own_group(self, groups: Iterable[Sequence[int]]) -> dist.ProcessGroup | None:
        """Of these groups, which every rank takes part in making, this rank's own; None where that is alone."""
        own = None
        for ranks in groups:
            if len(ranks) > 1:
                made = dist.group.WORLD if len(ranks) == self.size else dist.new_group(list(ranks))
                own = made if self.rank in ranks else own
        return own

    def machine(self) -> Machine:
        """The ranks that run on this rank's machine, which is known by its name. Every rank has to call it."""
        if not self._machine:
            names = self.gather(socket.gethostname())
            machines = [
                tuple(rank for rank in range(self.size) if names[rank] == name) for name in dict.fromkeys(names)
            ]
            own = next(ranks for ranks in machines if self.rank in ranks)
            self._machine.append(Machine(own, self._own_group(machines), max(map(len, machines))))
        return self._machine[0]

    def decide(self, make: Callable[[], T], what: str | None = None) -> T:
        """What rank 0 makes, on every rank. An error there is raised on every rank: see :meth:`agree`.

        ``what`` names work that may take long, as in "downloading the model": the others wait for as long as it takes,
        and whoever shows what is in hand shows it.
        """
        if self.size == 1:
            with self._waiting(what, [0]):
                return make()

        def packed() -> tuple[T, bytes]:
            made = make()
            try:
                return made, pickle.dumps(made)
            except Exception as error:
                raise TypeError(f"what rank 0 made cannot be sent to the other ranks: {error}") from error

        with self._waiting(what, [0]):
            made, error = _attempt(packed) if self.decides else (None, None)
        told: list[Any] = [made and made[1], _Problem.of(error, self.rank)]
        dist.broadcast_object_list(told, src=0)
        self._raise_first(told[1:], error)
        return made[0] if made is not None else pickle.loads(told[0])

    def agree(self, work: Callable[[], T], what: str | None = None) -> T:
        """Each rank's own result; an error on any rank is raised on every rank, that of the lowest rank first.

        It is raised as it is where it was made; elsewhere as the same kind of error where it is one of
        :mod:`heretic_ds.errors`, else as RankFailed with that rank's traceback. For work without collectives, such as
        reading files: a rank that failed alone would leave the others waiting. ``what`` is that of :meth:`decide`.
        """
        if self.size == 1:
            with self._waiting(what, [0]):
                return work()
        with self._waiting(what, range(self.size)):
            result, error = _attempt(work)
        self._raise_first(self.gather(_Problem.of(error, self.rank)), error)
        return result  # type: ignore[return-value]

    @contextmanager
    def _waiting(self, what: str | None, workers: Sequence[int]) -> Iterator[None]:
        """Afterwards all workers have done what they do inside, which may take long where it has a name."""
        if what is None:
            yield
            return
        with progress.work(what), self._hearts.together(what, workers) if self._hearts is not None else nullcontext():
            yield

    def _raise_first(self, told: Sequence[_Problem | None], own: Exception | None) -> None:
        """Raise the first problem that a rank told of; ``own`` is the error behind what this rank told."""
        first = next(filter(None, told), None)
        if first is None:
            return
        if own is not None and first.rank == self.rank:
            raise own
        raise first.kind(first.text) from own

    def gather(self, item: T) -> list[T]:
        """Every rank's item, by rank, on every rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def same(self, value: float) -> float:
        """Rank 0's value."""
        return self.decide(lambda: value)

    def leave(self) -> None:
        """End this process's part in the job, and close every process group."""
        global _joined
        _joined = None
        self._layouts.clear()
        self._machine.clear()
        self._meshes.clear()
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


_joined: World | None = None
"""The world that this process is in, as it is in one default process group."""


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of some work, and its error."""
    try:
        return work(), None
    except Exception as error:
        return None, error
