"""What the original model makes of a set of prompts, kept so that passes of edited models need not repeat it.

Shapes: N kept tokens (those that all prompts begin with once, then the others row after row, then one of zeros), B
rows, S positions, D width, H heads, K width of a key or value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heretic_ds.prompts import TokenRows, pad_left
from heretic_ds.runner.caches import Padded

_LAYOUTS = 64
"""Batches whose layouts are kept."""


@dataclass(frozen=True)
class Layout:
    """Rows of a batch, padded on the left; whole, or without the tokens that they share."""

    input_ids_BS: Tensor
    position_ids_BS: Tensor
    index_BS: Tensor
    """Where in N the tokens lie."""
    mask_BS: Tensor
    """Of whole rows: with columns for shared tokens, between padding and the row."""
    padded: Padded
    """Its padded rows, where they are not whole."""


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
        self.rest: tuple[None, ...] | None = None
        """What follows the stream in a block's output; None where it is the output."""
        self._start: dict[tuple[int, ...], int] = {}
        """Where in N the tokens lie that a row does not share."""
        self._filled = shared
        self._layouts: dict[tuple[object, ...], Layout] = {}

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

    def layout(self, rows: TokenRows, whole: bool, pad_id: int, device: torch.device) -> Layout:
        """A batch of known rows, ``whole`` or without what they share. Every trial has the same ones: they are kept."""
        starts = [self._start[tuple(row)] for row in rows]
        key = whole, pad_id, device, *starts
        if key not in self._layouts:
            if len(self._layouts) == _LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
            self._layouts[key] = self._laid_out(rows, starts, whole, pad_id, device)
        return self._layouts[key]

    def _laid_out(
        self, rows: TokenRows, starts: Sequence[int], whole: bool, pad_id: int, device: torch.device
    ) -> Layout:
        begin, before = (list(range(self.shared)), 0) if whole else ([], self.shared)
        own = [range(start, start + len(row) - self.shared) for start, row in zip(starts, rows, strict=True)]
        longest, padding = len(begin) + max(map(len, own)), self.tokens - 1
        index = [[padding] * (longest - len(begin) - len(each)) + begin + list(each) for each in own]
        batch = pad_left([row[before:] for row in rows], pad_id)
        paddings = [longest - len(begin) - len(each) for each in own]
        mask_BS = (torch.arange(before + longest) >= torch.tensor(paddings)[:, None]).long()
        return Layout(
            batch.input_ids_BS.to(device),
            (batch.position_ids_BS + before).to(device),
            torch.tensor(index, device=device),
            mask_BS.to(device),
            Padded.of(paddings, before, device),
        )


def gathered(states_ND: Tensor, index_BS: Tensor) -> Tensor:
    """Kept states [B, S, ...] of the tokens at an index."""
    return states_ND.index_select(0, index_BS.reshape(-1)).view(*index_BS.shape, *states_ND.shape[1:])
