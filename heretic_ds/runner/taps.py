"""Taps on the residual stream: the last position of each prompt, nothing else kept.

Shapes: B prompts, S positions, L blocks, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from heretic_ds.ablation import winsorize
from heretic_ds.anatomy import Anatomy
from heretic_ds.prompts import TokenRows
from heretic_ds.runner.rows import Row, rows_of
from heretic_ds.world import Replicas

TakeResiduals = Callable[[Sequence[int], Tensor], None]
"""Takes the residuals [L+1, B, D], float32 on the host, of the prompts at these B places of the caller's list."""

BYTES_ON_THE_WAY = 2**28
"""About how many bytes of residuals the rank that takes them gets at once, from all replicas together."""

Passes = Callable[[Sequence[Row]], Iterator[tuple[Sequence[Row], Tensor]]]
"""Runs rows in batches and gives each batch with its residuals [B, L+1, D]."""


class Taps:
    """The residuals of the last position that one forward pass left behind, in stream order."""

    def __init__(self, n_blocks: int) -> None:
        self._residual_BD: list[Tensor | None] = [None] * (n_blocks + 1)

    def put(self, entry: int, hidden_BSD: Tensor) -> None:
        """Keep the last position of one tapped tensor; a copy, so that the whole tensor can be freed."""
        self._residual_BD[entry] = hidden_BSD[:, -1].clone()

    def take(self) -> Tensor:
        """Residuals [B, L+1, D] of the last forward pass, which the taps then forget."""
        missing = [entry for entry, residual in enumerate(self._residual_BD) if residual is None]
        if missing:
            raise RuntimeError(f"the forward pass never reached stream entries {missing}")
        residual_BLD = torch.stack([r for r in self._residual_BD if r is not None], dim=1)
        self._residual_BD = [None] * len(self._residual_BD)
        return residual_BLD


def _first_tensor(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


@contextmanager
def tapped(model: nn.Module, anatomy: Anatomy) -> Iterator[Taps]:
    """Tap the stream while the context lasts: what enters block 0, what leaves every block but the last, and what
    leaves the final norm (the entries transformers calls ``hidden_states``)."""
    taps = Taps(anatomy.n_blocks)
    blocks = model.get_submodule(anatomy.blocks)

    def before_first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taps.put(0, args[0] if args else kwargs["hidden_states"])

    def after(entry: int) -> Any:
        return lambda module, args, output: taps.put(entry, _first_tensor(output))

    with ExitStack() as stack:
        first = next(iter(blocks.children()))
        handles = [first.register_forward_pre_hook(before_first, with_kwargs=True)]
        handles += [
            block.register_forward_hook(after(i + 1))
            for i, block in enumerate(blocks.children())
            if i + 1 < anatomy.n_blocks
        ]
        handles.append(model.get_submodule(anatomy.final_norm).register_forward_hook(after(anatomy.n_blocks)))
        for handle in handles:
            stack.callback(handle.remove)
        yield taps


def to_rank_0(
    prompts: TokenRows,
    anatomy: Anatomy,
    shares: Replicas,
    passes: Passes,
    joined: Callable[[Tensor], Tensor],
    take: TakeResiduals,
    winsorize_quantile: float,
) -> None:
    """Give rank 0 the residuals of all prompts, a part of every replica's share at a time.

    So hosts hold :data:`BYTES_ON_THE_WAY` at most, or one prompt's where that is more: rank 0 of all replicas together,
    every other one of its own. ``joined`` makes a table whole of which a rank knows some entries.
    """
    entries, share = anatomy.n_blocks + 1, shares.share(len(prompts))
    together = max(1, BYTES_ON_THE_WAY // (entries * anatomy.width * torch.float32.itemsize * shares.count))
    for start in range(0, len(share), together):
        rows = rows_of([prompts[index] for index in share[start : start + together]])
        own_LBD = torch.zeros(entries, len(rows), anatomy.width)
        for batch, residual_BLD in passes(rows):
            kept_BLD = winsorize(residual_BLD.float(), winsorize_quantile)
            own_LBD[:, [row.index for row in batch]] = kept_BLD.transpose(0, 1).cpu()
        for replica, found_LBD in enumerate(shares.brought(joined(own_LBD))):
            places = range(start * shares.count + replica, len(prompts), shares.count)[: len(rows)]
            if places:
                take(places, found_LBD[:, : len(places)])
