"""What the original model makes of a set of prompts, kept so that passes of edited models need not repeat it.

Shapes: N kept tokens (those that all prompts begin with once, then the others row after row, then one of zeros), B
rows, S positions, D width, H heads, K width of a key or value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heretic_ds.engines.protocol import TokenRows


def shared_beginning(rows: TokenRows) -> int:
    """How many tokens all rows begin with; at least one token of each row is not counted."""
    first, last = min(map(list, rows)), max(map(list, rows))  # between them, in this order, are all others
    most = min(map(len, rows)) - 1
    return next((at for at in range(most) if first[at] != last[at]), most)


class PromptStates:
    """Kept states of one set of prompts."""

    def __init__(self, rows: TokenRows, shared: int, boundaries: tuple[int, ...], answers: bool) -> None:
        """``shared`` tokens lie at the beginning of all rows. Inputs of the blocks ``boundaries`` are kept, and of the
        blocks below the last one keys and values: of all tokens for prompts that get ``answers``, else of those shared.
        """
        self.shared, self.boundaries, self.answers = shared, boundaries, answers
        self.shared_tokens = list(rows[0][:shared])
        self.tokens = shared + sum(len(row) - shared for row in rows) + 1
        """N."""
        self.passes_share = shared > 0
        """Whether passes are to make use of what is shared."""
        self.hidden_ND: dict[int, Tensor] = {}
        """By boundary."""
        self.keys_NHK: list[Tensor] = []
        self.values_NHK: list[Tensor] = []
        """By block. Where they are of shared tokens alone there are that many instead of N."""
        self._start: dict[tuple[int, ...], int] = {}
        """Where in N the tokens lie that a row does not share."""
        self._filled = shared

    @property
    def keeps_keys(self) -> bool:
        """Whether keys and values are kept."""
        return bool(self.boundaries) and (self.answers or self.shared > 0)

    @property
    def bytes(self) -> int:
        """Of all kept states."""
        tensors = [*self.hidden_ND.values(), *self.keys_NHK, *self.values_NHK]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def knows(self, rows: TokenRows) -> bool:
        """Whether all rows are among those kept."""
        return all(tuple(row) in self._start for row in rows)

    def put(
        self,
        rows: TokenRows,
        hidden_BSD: dict[int, Tensor],
        keys_and_values_BHSK: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        """Keep what one pass over some of the rows, padded on the left, left behind: inputs by boundary, keys and
        values by block."""
        of_keys = self.tokens if self.answers else self.shared
        pairs = []
        for at, states in hidden_BSD.items():
            if at not in self.hidden_ND:
                self.hidden_ND[at] = states.new_zeros(self.tokens, *states.shape[2:])
            pairs.append((self.hidden_ND[at], states))
        for kept, given in zip((self.keys_NHK, self.values_NHK), zip(*keys_and_values_BHSK, strict=True), strict=False):
            if not kept:
                kept += [each.new_zeros(of_keys, each.shape[1], each.shape[3]) for each in given]
            pairs += [(one, each.transpose(1, 2)) for one, each in zip(kept, given, strict=True)]
        for position, row in enumerate(rows):
            start, own = self._filled, len(row) - self.shared
            for kept_N, states in pairs:
                if not self._start:
                    kept_N[: self.shared] = states[position, -len(row) :][: self.shared]
                if len(kept_N) == self.tokens:
                    kept_N[start : start + own] = states[position, -own:]
            self._start[tuple(row)], self._filled = start, start + own

    def forget_blocks(self) -> None:
        """Keep nothing of blocks any longer: passes go through all of them."""
        self.boundaries = ()
        self.hidden_ND, self.keys_NHK, self.values_NHK = {}, [], []

    def index(self, rows: TokenRows, whole: bool, device: torch.device) -> Tensor:
        """Where in N the tokens of rows lie, [B, S], padded on the left: of ``whole`` rows, or what is not shared."""
        begin = list(range(self.shared)) if whole else []
        tokens = [[*begin, *range(start, start + own)] for start, own in map(self._own, rows)]
        longest, padding = max(map(len, tokens)), self.tokens - 1
        return torch.tensor([[padding] * (longest - len(each)) + each for each in tokens], device=device)

    def _own(self, row: Sequence[int]) -> tuple[int, int]:
        return self._start[tuple(row)], len(row) - self.shared


def gathered(states_ND: Tensor, index_BS: Tensor) -> Tensor:
    """Kept states [B, S, ...] of the tokens at an index."""
    return states_ND.index_select(0, index_BS.reshape(-1)).view(*index_BS.shape, *states_ND.shape[1:])


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


def padding_first(lengths: Sequence[int], shared: int, device: torch.device) -> Tensor | None:
    """Where columns that hold shared tokens, padding, and rows of some ``lengths`` lie, [B, S], so that padding comes
    first. None where it does, or there is none."""
    longest = max(lengths)
    if not shared or min(lengths) == longest:
        return None
    padding_B1 = longest - torch.tensor(lengths, device=device)[:, None]
    column_S = torch.arange(shared + longest, device=device)
    behind_BS = torch.where(column_S < padding_B1 + shared, column_S - padding_B1, column_S)
    return torch.where(column_S < padding_B1, shared + column_S, behind_BS)


def columns_taken(states_BHSK: Tensor, column_BS: Tensor | None) -> Tensor:
    """Keys or values [B, H, S, K], the columns of each row in the order that is given, if any."""
    if column_BS is None:
        return states_BHSK
    rows, heads, columns, size = states_BHSK.shape
    line_BH1 = torch.arange(rows * heads, device=column_BS.device).view(rows, heads, 1) * columns
    index_BHS = line_BH1 + column_BS[:, None]  # whole vectors of K numbers are copied, not one number at a time
    return states_BHSK.reshape(-1, size).index_select(0, index_BHS.reshape(-1)).view(states_BHSK.shape)
