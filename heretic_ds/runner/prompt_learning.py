"""How the states of a set of prompts come to be kept: what is worth it, and the passes that leave it behind.

Shapes: B rows, S positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from heretic_ds.prompts import TokenRows
from heretic_ds.runner.caches import growing_cache, keeps_positions, keys_and_values
from heretic_ds.runner.forward import Prefill
from heretic_ds.runner.padding import PASS_IN_TOKENS
from heretic_ds.runner.prompt_states import PromptStates

_LEAST_BYTES, _SHARE_OF_WEIGHTS = 64 * 2**20, 0.1
"""Memory that kept states of one set of prompts may take: this, or that share of the weights if it is more."""


def shared_beginning(rows: TokenRows) -> int:
    """How many tokens all rows begin with; at least one token of each row is not counted."""
    first, last = min(map(list, rows)), max(map(list, rows))  # between them, in this order, are all others
    most = min(map(len, rows)) - 1
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


class Learning:
    """Passes of the original model over a set of prompts."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Any], pad_id: int) -> None:
        self._model, self._blocks, self._prefill = model, blocks, Prefill(model, pad_id)

    def planned(self, rows: TokenRows, answers: bool, alike: Callable[[float], float]) -> PromptStates | None:
        """What is to be kept of a set of prompts; None where nothing is gained. ``alike`` is :class:`HeadStart`'s."""
        keys_kept = keeps_positions(self._model)
        shared = shared_beginning(rows) if keys_kept else 0
        if shared * (len(rows) - 1) <= PASS_IN_TOKENS:
            shared = 0
        tokens = sum(map(len, rows))
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self._model.parameters())
        boundaries: tuple[int, ...] = ()
        if keys_kept or not answers:
            of_input, of_keys = self._bytes(rows[0][:2], keys_kept)
            boundaries = boundaries_within(
                len(self._blocks),
                tokens * of_input,
                (tokens if answers else shared) * of_keys,
                max(_LEAST_BYTES, int(_SHARE_OF_WEIGHTS * weights)),
                alike,
            )
        return PromptStates(rows, shared, boundaries, answers) if shared or boundaries else None

    def _bytes(self, row: Sequence[int], keys_kept: bool) -> tuple[int, int]:
        """Bytes of one token, from a pass over a short row: of a block's input, and of its key and value in a block."""
        cache, inputs = growing_cache(self._model) if keys_kept else None, {}
        with self._noting(range(1, len(self._blocks) + 1), lambda at, output, rest: inputs.update({at: output})):
            self._prefill([row], cache)
        pairs = [] if cache is None else keys_and_values(cache)
        of_keys = max((sum(each.numel() * each.element_size() for each in pair) for pair in pairs), default=0)
        of_input = max(each.numel() * each.element_size() for each in inputs.values())
        if keys_kept and len(pairs) < len(self._blocks):
            raise NotImplementedError(f"only {len(pairs)} of {len(self._blocks)} blocks have keys of their own")
        return of_input // len(row), of_keys // len(row)

    def keep(self, states: PromptStates, rows: TokenRows) -> None:
        """Keep the states of a batch."""
        hidden_BSD: dict[int, Tensor] = {}

        def note(boundary: int, output_BSD: Tensor, rest: tuple[None, ...] | None) -> None:
            hidden_BSD[boundary], states.rest = output_BSD, rest

        cache = growing_cache(self._model) if states.keeps_keys else None
        with self._noting(states.boundaries, note):
            self._prefill(rows, cache)
        states.put(rows, hidden_BSD, [] if cache is None else keys_and_values(cache)[: states.boundaries[-1]])

    def _noting(
        self, boundaries: Sequence[int], note: Callable[[int, Tensor, tuple[None, ...] | None], object]
    ) -> ExitStack:
        """While the context lasts, note what enters the blocks ``boundaries``, and what else leaves the one before."""

        def hook(boundary: int) -> Callable[..., None]:
            def told(module: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, tuple):
                    if any(other is not None for other in output[1:]):
                        raise NotImplementedError("a block gives more than the residual stream to the next")
                    note(boundary, output[0], (None,) * (len(output) - 1))
                else:
                    note(boundary, output, None)

            return told

        with ExitStack() as stack:
            for boundary in boundaries:
                stack.callback(self._blocks[boundary - 1].register_forward_hook(hook(boundary)).remove)
            return stack.pop_all()
