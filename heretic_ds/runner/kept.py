"""What the original model makes of a set of prompts, kept so that passes of edited models need not repeat it.

Shapes: N kept tokens (those that all prompts begin with once, then each prompt's own, then one of zeros), B rows, S
positions, C columns, D width, H heads, K width of a key or value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heretic_ds.prompts import TokenRows
from heretic_ds.runner.rows import Row

Pairs = list[tuple[Tensor, Tensor]]
"""Keys and values by block."""


@dataclass
class Kept:
    """What the original model makes of one set of prompts."""

    shared: list[int]
    """Tokens that all prompts begin with."""
    boundaries: tuple[int, ...]
    """Blocks whose inputs are kept; keys and values are, of the blocks below the last: of all tokens for prompts that
    are answered, else of those shared."""
    answers: bool
    tokens_N: Tensor
    start: dict[tuple[int, ...], int]
    """By prompt: where in N the tokens lie that it does not share."""
    hidden_ND: dict[int, Tensor] = field(default_factory=dict)
    """By boundary."""
    pairs_NHK: Pairs = field(default_factory=list)
    rest: tuple[None, ...] | None = None
    """What follows the stream in a block's output; None where it is the output."""

    @classmethod
    def of(
        cls,
        prompts: TokenRows,
        shared: int,
        boundaries: tuple[int, ...],
        answers: bool,
        pad_id: int,
        device: torch.device,
    ) -> Kept:
        """Room for the states of prompts; ``pad_1`` holds the token that pads."""
        tokens, start = list(prompts[0][:shared]), dict[tuple[int, ...], int]()
        for prompt in prompts:
            if start.setdefault(tuple(prompt), len(tokens)) == len(tokens):
                tokens += prompt[shared:]
        return cls(
            list(prompts[0][:shared]), boundaries, answers, torch.tensor([*tokens, pad_id], device=device), start
        )

    def put(self, rows: Sequence[Row], hidden_BSD: dict[int, Tensor], pairs_BHSK: Pairs) -> None:
        """Keep what one whole pass over some of the prompts, padded on the left, left behind."""
        count, shared = len(self.tokens_N), len(self.shared)
        given = [states for _, states in sorted(hidden_BSD.items())]
        given += [each.transpose(1, 2) for pair in pairs_BHSK for each in pair]
        of_keys = count if self.answers else shared
        if not self.hidden_ND:
            self.hidden_ND = {at: x.new_zeros(count, x.shape[-1]) for at, x in sorted(hidden_BSD.items())}
            self.pairs_NHK = [tuple(x.new_zeros(of_keys, x.shape[1], x.shape[3]) for x in p) for p in pairs_BHSK]  # type: ignore[misc]
        kept = [*self.hidden_ND.values(), *(each for pair in self.pairs_NHK for each in pair)]
        for place, row in enumerate(rows):
            own, start = len(row.prompt) - shared, self.start[tuple(row.prompt)]
            for kept_N, states in zip(kept, given, strict=True):
                if place == 0:
                    kept_N[:shared] = states[place, -len(row.prompt) :][:shared]
                if len(kept_N) == count:
                    kept_N[start : start + own] = states[place, -own:]

    @property
    def bytes(self) -> int:
        tensors = [*self.hidden_ND.values(), *(each for pair in self.pairs_NHK for each in pair)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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


def keys_and_values(layers: Sequence[Any]) -> Pairs:
    """Keys and values [B, H, S, K] of layers. Raises NotImplementedError where one has none of its own, as in models
    whose blocks share them; passes over such prompts have to be whole."""
    without = [block for block, layer in enumerate(layers) if not layer.is_initialized]
    if without:
        raise NotImplementedError(f"the blocks {without} have no keys of their own")
    return [(layer.keys, layer.values) for layer in layers]


def hold(layer: Any, keys_BHCK: Tensor, values_BHCK: Tensor) -> None:
    """Give a layer of a cache these keys and values, to which passes add theirs."""
    layer.lazy_initialization(keys_BHCK, values_BHCK)
    layer.keys, layer.values = keys_BHCK, values_BHCK


def picked(states_ND: Tensor, index_BS: Tensor) -> Tensor:
    """Kept states [B, S, ...] of the tokens at an index."""
    return states_ND.index_select(0, index_BS.reshape(-1)).view(*index_BS.shape, *states_ND.shape[1:])
