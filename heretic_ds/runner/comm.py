"""What ranks that run one model's passes tell each other: whose prompts are whose, who goes on, where memory ran out.

A rank that runs out of memory in the middle of a pass leaves the others waiting in a collective. So, until a pass of a
size has gone well on all of them, ranks exchange a flag on the host before every collective: one of the same size
whatever comes next, by which a failure is known to all before any of them goes on (:meth:`Comm.attempt`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from heretic_ds.memory import is_out_of_memory
from heretic_ds.world import ALONE as ONE_REPLICA
from heretic_ds.world import Replicas, World

T = TypeVar("T")

_COLLECTIVES = tuple(
    name
    for name in (
        "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "all_to_all_single", "broadcast",
    )
    if hasattr(dist, name)
)  # fmt: skip
"""Those that a pass may take; versions of PyTorch call some by other names."""
_sum_up = dist.all_reduce if dist.is_available() else None
"""The function itself, whatever is put in its place while passes are guarded."""


_ONE_RANK = World()


class PeerRanOut(MemoryError):
    """Memory ran out on another rank of this pass, or whatever else failed there in a first one."""

    def __init__(self, by_all: bool) -> None:
        """``by_all``: all partners know; else those nearby do."""
        super().__init__()
        self.by_all = by_all


@dataclass(frozen=True)
class Comm:
    """One engine's ranks."""

    shares: Replicas = ONE_REPLICA
    """Which prompts are this rank's work, and how results come together."""
    degree: int = 1
    """Ranks that hold one replica of the model together."""
    partners: dist.ProcessGroup | None = None
    """The ranks without which this one cannot run a pass; None where there are none."""
    lockstep: bool = False
    """Whether partners work on prompts of their own, and so have to run equally many passes."""
    world: World = _ONE_RANK
    owners: tuple[Any, ...] = ()
    """Objects that keep collective functions of their own: a library's."""
    near: dist.ProcessGroup | None = None
    """Those of the partners with whom this one has collectives in the middle of a pass, where the others meanwhile do
    other work and only meet it in between (:meth:`meet`); None: all partners."""
    _gone_well: set[Hashable] = field(default_factory=set)
    """Sizes of passes that no rank failed."""
    _guarded: list[bool] = field(default_factory=lambda: [False])
    """Whether a pass is guarded at present."""

    @classmethod
    def of_replicas(cls, world: World, degree: int | None, setting: str) -> Comm:
        """Replicas of the model whose ranks run the same passes. Raises UserError, naming ``setting``, where the world
        does not divide."""
        replicas = world.replicas(degree, setting)
        return cls(replicas, replicas.degree, replicas.inside, world=world)

    @classmethod
    def in_lockstep(cls, world: World, degree: int, owners: Sequence[Any] = ()) -> Comm:
        """All ranks, each at work on prompts of its own, in step with the others."""
        partners = dist.group.WORLD if world.size > 1 else None
        return cls(world.replicas(1, "degree"), degree, partners, True, world, tuple(owners))

    def anyone(self, flag: bool) -> bool:
        """Whether the flag is set on any partner that works on prompts of its own.

        In a guarded pass the question comes first, as before any collective: the flag of a partner whose memory has run
        out would be taken for an answer.
        """
        if not self.lockstep:
            return flag
        if self._guarded[0]:
            self._ask()
        return self.any_partner(flag)

    def alike(self, value: float) -> float:
        """One partner's number on all of them, for what they have to do alike."""
        return self.shares.alike(value)

    def least(self, value: float) -> float:
        """The least of all ranks' numbers."""
        return min(self.world.gather(value))

    def most(self, value: float) -> float:
        """The largest of all ranks' numbers."""
        return max(self.world.gather(value))

    def attempt(self, work: Callable[[], T], size: Hashable = None) -> tuple[bool, T | None]:
        """Whether memory held what the work took on every partner, and what it gave.

        Partners call it together. Work of a ``size`` that has gone well before (None: of a new one) is not guarded: if
        memory runs out in it on one rank after all, that rank's MemoryError tells of it, and the others cannot.
        """
        guarded = self.partners is not None and self.anyone(size is None or size not in self._gone_well)
        value, failed, told = None, False, None
        with self._guard() if guarded else nullcontext():
            try:
                value = work()
            except PeerRanOut as error:
                failed, told = True, error
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.partners is not None and not guarded:
                    raise MemoryError("memory ran out in a pass that other ranks are part of") from error
                failed = True
        if guarded and (told is None or not told.by_all):
            failed = self._heard(failed, among_near=told is None)
        if failed:
            return False, None
        if self.partners is not None and size is not None:
            self._gone_well.add(size)
        return True, value

    def agree(self, work: Callable[[], T]) -> T:
        """What work with collectives gives; an error on any rank is raised on every rank, as by :meth:`World.agree`.

        Every rank of the world calls it. It is for first passes, in which anything may fail on one rank alone: partners
        learn of it before their next collective, instead of waiting there.
        """
        value, error, told = None, None, None
        with self._guard() if self.partners is not None else nullcontext():
            try:
                value = work()
            except PeerRanOut as peer:
                told = peer
            except Exception as caught:
                error = caught
        if told is None or not told.by_all:
            self._heard(told is not None or error is not None, among_near=told is None)

        def outcome() -> T:
            if error is not None:
                raise error
            return value  # type: ignore[return-value]  # without one there is an error, of this rank or another

        return self.world.agree(outcome)

    def meet(self) -> None:
        """All partners come to this point of a pass, at which some of them are about to wait for others.

        Raises PeerRanOut where memory ran out on one of them; without a guard, and between them, nothing is exchanged.
        """
        if self._guarded[0] and self._heard(False):
            raise PeerRanOut(by_all=True)

    def _heard(self, failed: bool, among_near: bool = True) -> bool:
        """Whether any partner failed; those nearby tell each other first, as they also do within a pass."""
        if self.near is not None and among_near:
            failed = _any_of(self.near, failed)
        return self.any_partner(failed)

    def any_partner(self, flag: bool) -> bool:
        """Whether the flag is set on any partner; exchanged on the host."""
        return flag if self.partners is None else _any_of(self.partners, flag)

    def _ask(self) -> None:
        """Raise where a partner, of those nearby, has told that it takes no further part in this pass."""
        if self.near is not None and _any_of(self.near, False):
            raise PeerRanOut(by_all=False)
        if self.near is None and self.any_partner(False):
            raise PeerRanOut(by_all=True)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """While the context lasts, every collective begins with the question whether all partners take part in it."""

        def guarded(collective: Callable[..., Any]) -> Callable[..., Any]:
            def asks_first(*args: Any, **kwargs: Any) -> Any:
                self._ask()
                return collective(*args, **kwargs)

            return asks_first

        known = {id(getattr(dist, name)): getattr(dist, name) for name in _COLLECTIVES}
        replaced = [(dist, name, getattr(dist, name)) for name in _COLLECTIVES]
        replaced += [
            (owner, name, value) for owner in self.owners for name, value in vars(owner).items() if id(value) in known
        ]
        for owner, name, function in replaced:
            setattr(owner, name, guarded(function))
        self._guarded[0] = True
        try:
            yield
        finally:
            self._guarded[0] = False
            for owner, name, function in replaced:
                setattr(owner, name, function)


ALONE = Comm()
"""A model that lies whole in this process, which is the only one."""


def _any_of(group: dist.ProcessGroup, flag: bool) -> bool:
    if _sum_up is None:
        return flag
    count = torch.tensor([int(flag)])
    _sum_up(count, group=group)
    return count.item() > 0
