"""Whether a model's blocks can lie on different ranks: asked of the model itself, without its weights.

The decoder's own forward runs without any block, embedding or head, once over padded prompts and once for a next token.
What blocks are given is looked at: all that comes of the stream has to be their first argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint.fitness import first_line
from heretic_ds.errors import UserError
from heretic_ds.placements.pipeline.stage import Stage, fill_elsewhere, head_path, keep_stage
from heretic_ds.runner.forward import Forward
from heretic_ds.runner.rows import Row


class CannotStage(UserError):
    """Why a model's blocks cannot lie on different ranks; the placement adds what to set instead."""


def outputs_are_tuples(model: PreTrainedModel, anatomy: Anatomy) -> bool:
    """Whether a block's output is a tuple that begins with the stream, or the stream itself.

    ``model`` is empty, and of no other use afterwards. Raises CannotStage where blocks hand on more than the stream, or
    the decoder needs more of them than their outputs.
    """
    if head_path(model) is None:
        raise CannotStage("it has no output head of its own")
    forward = Forward(model, pad_id=0)
    if not forward.keeps_positions:
        kinds = sorted({kind.__name__ for kind in forward.layer_kinds if "Dynamic" not in kind.__name__})
        raise CannotStage(f"its cache has layers with a state of their own ({', '.join(kinds)})")
    if len(forward.layer_kinds) != anatomy.n_blocks:
        raise CannotStage("some of its blocks use the keys and values of others")
    _without_weights(model, anatomy)
    failed: Exception | None = None
    for tuples in (False, True):
        try:
            if _hands_on(model, anatomy, tuples):
                return tuples
        except CannotStage:
            raise
        except Exception as failure:  # of the model's own code, which was not written for blocks that are elsewhere
            failed = failed or failure
    if failed is not None:
        raise CannotStage(f"its decoder does not run without them ({type(failed).__name__}: {first_line(failed)})")
    raise CannotStage("its decoder does more between blocks than to hand on the stream")


def _without_weights(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Leave nothing but what lies outside of blocks, embedding and head, and that as zeros which take no memory."""
    keep_stage(model, anatomy, Stage(range(0), anatomy.n_blocks, tuples=False))
    model.register_parameter("on_the_host", nn.Parameter(torch.zeros(0)))  # models are asked where their weights are
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[attribute] = nn.Parameter(zeros, requires_grad=False)
        for attribute, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[attribute] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)


def _hands_on(model: PreTrainedModel, anatomy: Anatomy, tuples: bool) -> bool:
    """Whether each block gets what the one before gave, the stream; its gradient tells what comes of it."""
    stage = Stage(range(0), anatomy.n_blocks, tuples)
    blocks: list[Any] = list(model.get_submodule(anatomy.blocks).children())
    given: list[tuple[Tensor, Any]] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        hidden_BSD = args[0] if args else kwargs.pop("hidden_states")
        given.append((hidden_BSD, (args[1:], kwargs)))
        output_BSD = hidden_BSD + 0
        return (output_BSD,) if tuples else output_BSD

    for block in blocks:
        block.forward = noted
    embedding = model.get_submodule(anatomy.embedding)
    hook = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    outputs: list[Tensor] = []
    hooks = [hook, *(block.register_forward_hook(lambda m, a, out: outputs.append(out)) for block in blocks)]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            _prompts_and_a_step(Forward(model, pad_id=0), stage)
    finally:
        for each in hooks:
            each.remove()
    if any(tensor.requires_grad for _, rest in given for tensor in _tensors(rest)):
        raise CannotStage("its blocks are given more of the stream than what the block before gave")
    stream = [output[0] if tuples else output for output in outputs]
    following = [hidden for at, (hidden, _) in enumerate(given) if at % len(blocks)]
    before = [output for at, output in enumerate(stream) if (at + 1) % len(blocks)]
    return all(hidden is output and hidden.dim() == 3 for hidden, output in zip(following, before, strict=True))


def _prompts_and_a_step(forward: Forward, stage: Stage) -> None:
    rows, cache = [Row([1, 2, 3]), Row([4])], forward.own_cache()
    begun = forward(rows, cache)
    fill_elsewhere(cache, stage, begun.mask_BS, begun.logits_BV.dtype)
    forward.step(begun, torch.tensor([1, 2]), cache)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors within arguments, a cache's left out."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple) and not isinstance(value, Cache):
        for each in value:
            yield from _tensors(each)
