"""What the original model makes of a set of prompts, kept so that passes of edited models need not repeat it.

Shapes: N kept tokens (those that all prompts begin with once, then each prompt's own, then one of zeros), B rows, S own
positions, C columns, D width, H heads, K width of a key or value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heretic_ds.prompts import TokenRows
from heretic_ds.runner.rows import Row


class Layout(NamedTuple):
    """Rows of a batch: the columns of shared tokens, a row's padding, its own tokens."""

    index_BS: Tensor
    """Where in N own tokens lie."""
    position_BS: Tensor
    mask_BC: Tensor


class Kept:
    """What is kept of one set of prompts."""

    def __init__(self, prompts: TokenRows, shared: int, boundaries: Sequence[int], pad_id: int, device: Any) -> None:
        """All prompts begin with ``shared`` tokens; inputs of the blocks ``boundaries`` are to be kept."""
        self.shared, self.boundaries = list(prompts[0][:shared]), tuple(boundaries)
        self._start: dict[tuple[int, ...], int] = {}
        """By prompt: where in N the tokens lie that it does not share."""
        tokens = list(self.shared)
        for prompt in prompts:
            if self._start.setdefault(tuple(prompt), len(tokens)) == len(tokens):
                tokens += prompt[shared:]
        self.tokens_N = torch.tensor([*tokens, pad_id], device=device)
        self.hidden_ND: dict[int, Tensor] = {}
        """By boundary."""
        self.keys_NHK: dict[int, Tensor] = {}
        self.values_NHK: dict[int, Tensor] = {}
        """By block."""
        self.rest: tuple[None, ...] | None = None
        """What follows the stream in a block's output; None where it is the output."""

    def put(self, rows: Sequence[Row], *states: dict[int, Tensor]) -> None:
        """Keep what one whole pass over some of the prompts, padded on the left, left behind: inputs of blocks, keys
        and values [B, S, ...]."""
        starts, shared = [self._start[tuple(row.prompt)] for row in rows], len(self.shared)
        for kept, given in zip((self.hidden_ND, self.keys_NHK, self.values_NHK), states, strict=True):
            for at, given_BS in given.items():
                if at not in kept:
                    kept[at] = given_BS.new_zeros(len(self.tokens_N), *given_BS.shape[2:])
                for row, start, given_S in zip(rows, starts, given_BS, strict=True):
                    own = given_S[-len(row.prompt) :]
                    kept[at][:shared], kept[at][start : start + len(own) - shared] = own[:shared], own[shared:]

    @property
    def token_bytes(self) -> tuple[int, int]:
        """What a token takes at most: as the input of a block, and as its key and value in one."""
        pairs = zip(self.keys_NHK.values(), self.values_NHK.values(), strict=True)
        of_keys = max((keys[0].nbytes + values[0].nbytes for keys, values in pairs), default=0)
        return max((hidden_ND[0].nbytes for hidden_ND in self.hidden_ND.values()), default=0), of_keys

    @property
    def bytes(self) -> int:
        return sum(each.nbytes for kept in (self.hidden_ND, self.keys_NHK, self.values_NHK) for each in kept.values())

    def knows(self, rows: Sequence[Row], own: int) -> bool:
        """Whether all rows are among those kept, with at least so many tokens of their own."""
        least = len(self.shared) + own
        return all(tuple(row.prompt) in self._start and len(row.prompt) >= least for row in rows)

    def layout(self, rows: Sequence[Row]) -> Layout:
        """Known rows as a batch."""
        starts, lengths = [self._start[tuple(row.prompt)] for row in rows], [len(row.prompt) for row in rows]
        device, shared, longest = self.tokens_N.device, len(self.shared), max(lengths)
        start_B1, length_B1 = (torch.tensor(each, device=device)[:, None] for each in (starts, lengths))
        position_BS = torch.arange(shared, longest, device=device) + length_B1 - longest
        own_BS = position_BS >= shared
        index_BS = torch.where(own_BS, start_B1 + position_BS - shared, len(self.tokens_N) - 1)
        mask_BC = torch.nn.functional.pad(own_BS.long(), (shared, 0), value=1)
        return Layout(index_BS, torch.where(own_BS, position_BS, 0), mask_BC)


def picked(states_ND: Tensor, index_BS: Tensor) -> Tensor:
    """Kept states [B, S, ...] of the tokens at an index."""
    return states_ND.index_select(0, index_BS.reshape(-1)).view(*index_BS.shape, *states_ND.shape[1:])


def shared_beginning(prompts: TokenRows) -> int:
    """How many tokens all prompts begin with; at least one token of each is not counted."""
    first, last = min(map(list, prompts)), max(map(list, prompts))  # between them, in this order, are all others
    most = min(map(len, prompts)) - 1
    return next((at for at in range(most) if first[at] != last[at]), most)


def boundaries_within(
    blocks: int, bytes_each: int, bytes_below: int, most: int, alike: Callable[[float], float] = lambda value: value
) -> tuple[int, ...]:
    """Evenly spaced blocks, as many as memory allows, whose inputs are to be kept.

    An input takes ``bytes_each``; what is kept of every block below the last boundary, ``bytes_below``. ``alike`` makes
    one rank's number that of all ranks that have to come to the same blocks.
    """

    def fits(step: int) -> bool:
        chosen = range(step, blocks, step)
        return len(chosen) * bytes_each + chosen[-1] * bytes_below <= most

    step = int(alike(next(filter(fits, range(1, blocks)), blocks)))
    return tuple(range(step, blocks, step))
