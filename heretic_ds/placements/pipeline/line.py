"""What the stages of one replica tell each other: hidden states to the next one, tokens and numbers from the last one.

Hidden states are sent without waiting, so that a stage begins its next pass while the one after it works; tokens are
told to all stages over the host, never logits. Shapes: B rows, S positions, D width, L blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from heretic_ds.runner.comm import Comm

_UNDER_WAY = 4
"""Most hidden states that are kept because the next stage may not have taken them yet."""


class Line:
    """The ranks with the stages of one replica, in the order of the blocks."""

    def __init__(self, group: dist.ProcessGroup, comm: Comm) -> None:
        """``comm`` is that of the engine, whose partners may be more ranks than ``group``, which makes up the line."""
        self._group, self._comm = group, comm
        self.stage, self.stages = dist.get_rank(group), dist.get_world_size(group)
        self._sent: deque[tuple[Any, Tensor]] = deque()

    @property
    def first(self) -> bool:
        """Whether this is the first stage."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether this is the last stage."""
        return self.stage == self.stages - 1

    def receive(self, like: Tensor) -> Tensor:
        """What the stage before sent, of the shape of a placeholder [B, S, D]."""
        hidden_BSD = torch.empty_like(like, memory_format=torch.contiguous_format)
        for _ in range(self.stage):  # memory is there now: what was announced will be taken
            self._comm.meet()
        dist.recv(hidden_BSD, group=self._group, group_src=self.stage - 1)
        return hidden_BSD

    def send(self, hidden_BSD: Tensor) -> None:
        """Hand hidden states on to the next stage."""
        hidden_BSD = hidden_BSD.contiguous()
        self._comm.meet()
        self._sent.append((dist.isend(hidden_BSD, group=self._group, group_dst=self.stage + 1), hidden_BSD))
        while len(self._sent) > _UNDER_WAY:
            self._sent.popleft()[0].wait()
        for _ in range(self.stage + 1, self.stages - 1):  # where later stages hand on
            self._comm.meet()

    def tokens(self, logits_BV: Tensor) -> Callable[[], Tensor]:
        """The likeliest tokens [B] by the last stage's logits, on every stage; what is returned waits for them."""
        rows, device = len(logits_BV), logits_BV.device
        token_B = logits_BV.argmax(dim=-1).cpu() if self.last else torch.empty(rows, dtype=torch.int64)
        self._comm.meet()
        told = dist.broadcast(token_B, group=self._group, group_src=self.stages - 1, async_op=True)

        def wait() -> Tensor:
            told.wait()
            return token_B.to(device)

        return wait

    def told(self, values: Tensor) -> Tensor:
        """Numbers on the host, from the last stage."""
        dist.broadcast(values, group=self._group, group_src=self.stages - 1)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all stages' numbers on the host."""
        dist.all_reduce(values, group=self._group)
        return values

    def settle(self) -> None:
        """Wait until all that was sent has been taken."""
        while self._sent:
            self._sent.popleft()[0].wait()
