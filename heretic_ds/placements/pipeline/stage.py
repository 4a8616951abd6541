"""One stage of a pipeline: the blocks on this rank, and what stands in for all that lies elsewhere.

Every rank runs the decoder's own forward, so that masks, positions and rotary embeddings are a family's own everywhere.
Blocks elsewhere hand on what they get; the first block here takes the hidden states of the stage before instead.

Shapes: B rows, S positions, D width, V vocabulary, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint.shards import share
from heretic_ds.placements.pipeline.line import Line
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.reuse import Reuse
from heretic_ds.runner.rows import Row


@dataclass(frozen=True)
class Stage:
    """The blocks of a model that are here."""

    blocks: range
    total: int
    """Blocks of the model, L."""
    tuples: bool
    """Whether a block's output is a tuple that begins with the stream."""

    @property
    def elsewhere(self) -> list[int]:
        """Blocks that are not here."""
        return [block for block in range(self.total) if block not in self.blocks]

    @property
    def entries(self) -> slice:
        """Of the L+1 entries of the stream those known here: what leaves a block, and what enters the first one."""
        return slice(self.blocks.start + 1 if self.blocks.start else 0, self.blocks.stop + 1)

    def anatomy(self, whole: Anatomy) -> Anatomy:
        """The model's, with the writers that are here."""
        return replace(whole, writers=tuple(w for w in whole.writers if w.block in self.blocks))


class NoEmbedding(nn.Module):
    """In the place of an embedding that is elsewhere: zeros [B, S, D]."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._width, self._dtype = width, dtype

    def forward(self, ids_BS: Tensor) -> Tensor:
        return torch.zeros(*ids_BS.shape, self._width, dtype=self._dtype, device=ids_BS.device)


class NoHead(nn.Module):
    """In the place of a head that is elsewhere: a vocabulary of one token, [B, S, 1]."""

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        return hidden_BSD[..., :1]


def head_path(model: PreTrainedModel) -> str | None:
    """Path of the output head; None where a model has none."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None)


def keep_stage(model: PreTrainedModel, anatomy: Anatomy, stage: Stage) -> None:
    """Leave of an empty model what one stage holds: its blocks, at the ends embedding, final norm and head, and the
    little that lies outside of all these.

    Blocks elsewhere stay in their list, with what the decoder asks of them, but without weights.
    """
    blocks = list(model.get_submodule(anatomy.blocks).children())
    for index in stage.elsewhere:
        _empty(blocks[index], stage.tuples)
    if 0 not in stage.blocks:
        embedding: Any = model.get_submodule(anatomy.embedding)
        model.set_submodule(anatomy.embedding, NoEmbedding(embedding.embedding_dim, embedding.weight.dtype))
    if stage.total - 1 not in stage.blocks:
        head = head_path(model)
        if head is not None:
            model.set_submodule(head, NoHead())
        if not anatomy.final_norm.startswith(f"{anatomy.blocks}."):
            model.set_submodule(anatomy.final_norm, nn.Identity())


def _empty(block: Any, tuples: bool) -> None:
    """Take a block's weights; what it is given it hands on."""

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        hidden_BSD = args[0] if args else kwargs["hidden_states"]
        return (hidden_BSD,) if tuples else hidden_BSD

    for children in (block._modules, block._parameters, block._buffers):
        children.clear()
    block.forward = hand_on


def connect(model: PreTrainedModel, anatomy: Anatomy, stage: Stage, line: Line) -> None:
    """Let the first block here take what the stage before sends, and hand on what leaves the last one."""
    blocks = list(model.get_submodule(anatomy.blocks).children())

    def receive(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (line.receive(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": line.receive(kwargs["hidden_states"])}

    def send(module: nn.Module, args: Any, output: Any) -> None:
        line.send(output[0] if stage.tuples else output)

    if not line.first:
        blocks[stage.blocks.start].register_forward_pre_hook(receive, with_kwargs=True)
    if not line.last:
        blocks[stage.blocks.stop - 1].register_forward_hook(send)


def fill_elsewhere(cache: DynamicCache, stage: Stage, ids_BS: Tensor, dtype: torch.dtype) -> None:
    """Let the layers of a cache whose blocks are elsewhere know of how many rows and columns a pass was.

    Of models that ask the cache how long it is most ask its first layer. One number a column, not none: a layer without
    numbers says that it is empty, and keeps rows that leave.
    """
    column_B1S1 = torch.zeros(len(ids_BS), 1, ids_BS.shape[1], 1, dtype=dtype, device=ids_BS.device)
    layers: list[Any] = cache.layers
    for block in stage.elsewhere:
        layers[block].update(column_B1S1, column_B1S1)


class StagedForward(Reuse):
    """Passes of a model of which one stage is here. All stages run the same passes in the same order."""

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        pad_id: int,
        wanted: bool,
        comm: Comm,
        *,
        stage: Stage,
        line: Line,
        microbatches: int,
    ) -> None:
        """A batch has as many parts as ``microbatches``, or as rows where these are fewer."""
        super().__init__(model, anatomy, pad_id, False, comm)  # what is kept of a pass would have to travel too
        self._stage, self._line, self._microbatches = stage, line, microbatches
        self.knows_logits = line.last

    def logits(
        self, input_ids_BS: Tensor, mask_BS: Any, position_ids_BS: Tensor, cache: Any = None, last: int | None = None
    ) -> Tensor:
        logits = super().logits(input_ids_BS, mask_BS, position_ids_BS, cache, last)
        if cache is not None:
            fill_elsewhere(cache, self._stage, input_ids_BS, logits.dtype)
        return logits

    def parts(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        count = min(self._microbatches, len(rows))
        bounds = [share(len(rows), part, count) for part in range(count)]
        return [rows[start:stop] for start, stop in bounds]

    def choose(self, logits_BV: Tensor) -> Any:
        return self._line.tokens(logits_BV)

    def told(self, values: Tensor) -> Tensor:
        return self._line.told(values)

    def joined(self, stream_LD: Tensor) -> Tensor:
        known_LD = torch.zeros_like(stream_LD)  # what passes through here of other entries is no part of the sum
        known_LD[self._stage.entries] = stream_LD[self._stage.entries]
        return self._line.sum(known_LD)
