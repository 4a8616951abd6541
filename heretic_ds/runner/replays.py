"""Whether an engine's steps of decoding are replayed: what stands in the way is said once, and eager steps go on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from heretic_ds.anatomy import Anatomy, has_expert_dispatch
from heretic_ds.checkpoint.fitness import first_line
from heretic_ds.edits.experts import base_implementation
from heretic_ds.prompts import TokenRows
from heretic_ds.runner.caches import POSITIONAL_LAYERS
from heretic_ds.runner.closeness import distance, is_rounding
from heretic_ds.runner.decode import finished_answers as eager_answers
from heretic_ds.runner.forward import Forward, Prefill, rope_depends_on_length
from heretic_ds.runner.graphs import CannotReplay, CudaGraphs, MakeGraph, NoRoom, ReplayedSteps
from heretic_ds.runner.memory import is_out_of_memory, release_memory, spares
from heretic_ds.runner.slot_decoding import Assign, replayed_answers
from heretic_ds.runner.slots import Slots
from heretic_ds.scoring.base import Decided

log = logging.getLogger(__name__)

_MASKED_ATTENTION = frozenset({"eager", "sdpa"})
"""Implementations of attention that take a mask of what each row sees."""
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_STEADY_EXPERTS = frozenset({"batched_mm", "grouped_mm"})
"""Implementations of experts that do the same work whatever the tokens are."""
_GROUPED_PRODUCTS = (torch.bfloat16, (9, 0))
"""The dtype, and the least compute capability, of grouped products that PyTorch computes in one kernel. Others are
loops over the groups, whose sizes the host has to know."""
_HALVINGS = 2
"""Times that fewer rows are tried where memory runs out, before steps are eager."""
_PROBE_LENGTHS = (11, 5, 8)


class Replays:
    """Replayed steps of one engine, from the first time they are asked for until they fail or are no longer wanted."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, wanted: bool) -> None:
        self._model, self._anatomy = model, anatomy
        self._steps: ReplayedSteps | None = None
        self._over = not wanted
        self._most, self._halvings = sys.maxsize, _HALVINGS
        """Rows at most, and how often they may still be halved."""
        if wanted:
            spares.add(self)

    def steps(self) -> ReplayedSteps | None:
        """Steps to decode with; None where they have to be eager."""
        if self._steps is None and not self._over:
            self._begin()
        return self._steps

    def finished_answers(
        self,
        prompts: TokenRows,
        pad_id: int,
        ends: Collection[int],
        max_new_tokens: int,
        decided: Decided | None,
        rows_at_once: int,
        on_rows: Assign,
        kind: int = 0,
        prefill: Prefill | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """What :func:`heretic_ds.runner.decode.finished_answers` gives, by replayed steps as long as they work.

        ``kind`` is that of :meth:`ReplayedSteps.step`.
        """
        left, limits = dict.fromkeys(range(len(prompts))), (pad_id, ends, max_new_tokens, decided)

        def begun_anew() -> tuple[list[int], list[Sequence[int]], Assign]:
            rest = list(left)
            return rest, [prompts[row] for row in rest], lambda at, into=None: on_rows([rest[p] for p in at], into)

        while left and (steps := self.steps()) is not None:
            rest, rows, on_rest = begun_anew()
            most, failure = min(rows_at_once, self._most, len(rest)), None
            steps.forget(below=kind)
            try:
                for position, answer in replayed_answers(
                    self._model, steps, rows, *limits, most, on_rest, kind, prefill
                ):
                    del left[rest[position]]
                    yield rest[position], answer
            except CannotReplay as caught:
                failure = caught.with_traceback(None)
            if failure is None:
                return
            self._after(failure, most)  # outside the handler, where the traceback no longer holds tensors
        rest, rows, on_rest = begun_anew()
        for position, answer in eager_answers(
            self._model, rows, *limits, rows_at_once=rows_at_once, on_rows=on_rest, prefill=prefill
        ):
            yield rest[position], answer

    def _after(self, failure: CannotReplay, rows: int) -> None:
        """Go on with half as many rows, where that may help and has not been tried often; else without."""
        if not isinstance(failure, NoRoom) or rows == 1 or not self._halvings:
            self.give_up(str(failure))
            return
        self._halvings, self._most = self._halvings - 1, rows // 2
        self.lend()
        log.info("CUDA graphs of %d rows: %s; going on with %d", rows, failure, self._most)

    def _begin(self) -> None:
        device = next(self._model.parameters()).device
        if maker_for(device) is None:  # nothing was to be expected there
            self._over = True
            return
        found = obstacle(self._model, self._anatomy) or self._difference()
        if found is not None:
            self.give_up(found)
            return
        self._steps = ReplayedSteps(self._model, lambda: _maker(device))

    def _difference(self) -> str | None:
        """What a step over slots does otherwise than one over the model's own cache; None where it does the same."""
        failed = None
        try:
            error, rounding = probe(self._model)
        except Exception as failure:  # of the model's own code, which was not written for such a cache or mask
            failed = f"a trial step failed ({type(failure).__name__}: {first_line(failure)})"
            if is_out_of_memory(failure):
                failed = "memory ran out in a trial step"
        if failed is not None:  # outside the handler, where the traceback no longer holds tensors
            release_memory()
            return failed
        if not is_rounding(error, rounding):
            return f"a trial step gave other logits (off by {error:.2g} of their spread)"
        return None

    def give_up(self, reason: str) -> None:
        """Go on without, and say why; memory is given back."""
        log.warning("decoding without CUDA graphs: %s", reason)
        self.close()

    def give_back(self) -> bool:
        """Go on without, where memory has run out; whether that frees any."""
        if self._steps is None:
            return False
        self.give_up("memory ran out beside what replayed steps keep")
        return True

    def lend(self) -> None:
        """Free slots and graphs, which are made anew when rows come; for when none are in flight."""
        if self._steps is not None:
            self._steps.close()
            release_memory()

    def forget(self) -> None:
        """Drop what was captured: the edits that it refers to are no longer there."""
        if self._steps is not None:
            self._steps.forget()

    def close(self) -> None:
        """Give back all memory; steps are eager from now on."""
        self._over = True
        if self._steps is not None:
            self._steps.close()
            self._steps = None
            release_memory()


def maker_for(device: torch.device) -> MakeGraph | None:
    """What makes graphs on a device; None where there are none."""
    return CudaGraphs(device) if device.type == "cuda" else None


def _maker(device: torch.device) -> MakeGraph:
    maker = maker_for(device)
    if maker is None:
        raise RuntimeError(f"{device} has no graphs")
    return maker


def obstacle(model: PreTrainedModel, anatomy: Anatomy) -> str | None:
    """Why the steps of a model cannot be replayed; None where nothing is known against it."""
    config: Any = model.config.get_text_config(decoder=True)
    layers = {type(layer) for layer in DynamicCache(config=config).layers} - set(POSITIONAL_LAYERS)
    if layers:
        return f"the model's cache has layers with a state of their own ({_names(kind.__name__ for kind in layers)})"
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if kinds:
        return f"the model has layers of {_names(kinds)}"
    if not Forward(model).takes_positions:
        return "the model takes positions from the mask alone"
    if config._attn_implementation not in _MASKED_ATTENTION:
        return f"the attention {config._attn_implementation} takes no mask of what each row sees"
    if rope_depends_on_length(config):
        return "the model's rotary frequencies depend on the longest row"
    for writer in anatomy.writers:
        if writer.experts is not None or "*" in writer.path.split("."):
            experts = model.get_submodule(writer.module)
            chosen = base_implementation(experts) if has_expert_dispatch(experts) else "eager"
            if chosen not in _STEADY_EXPERTS:
                return f"which experts run depends on the tokens (experts implementation {chosen})"
            weight = next(experts.parameters())
            if chosen == "grouped_mm" and waits_for_groups(weight.device, weight.dtype):
                return f"the host waits for the sizes of grouped products of {weight.dtype} on this device"
    return None


def waits_for_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether grouped products are known to make the host wait for a device; a warm-up finds out about the others."""
    one_kernel, capability = _GROUPED_PRODUCTS
    return device.type == "cuda" and (dtype != one_kernel or torch.cuda.get_device_capability(device) < capability)


def _names(names: Any) -> str:
    return ", ".join(sorted(names))


@torch.inference_mode()
def probe(model: PreTrainedModel) -> tuple[float, float]:
    """How far the logits of one step over slots are from those over the model's own cache, as a part of their spread;
    and how far those are from the same with more padding, which is rounding alone.

    Three rows of unlike lengths, each with columns behind it that are not its own.
    """
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config(decoder=True)
    rows = [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in _PROBE_LENGTHS]
    prefill, cache = Prefill(model, pad_id=0), DynamicCache(config=config)
    begun = prefill(rows, cache)
    token_B = begun.logits_BV.argmax(dim=-1)
    expected_BV = prefill.step(begun, token_B, cache)
    cache = DynamicCache(config=config)
    begun = prefill([*rows, rows[0] + rows[1]], cache)
    padded_BV = prefill.step(begun, torch.cat([token_B, token_B[:1]]), cache)[: len(rows)]
    slots, order = Slots(model, len(rows) + 1, 2 * max(_PROBE_LENGTHS)), [2, 0, 1]
    cache = slots.prompt_cache()
    prefill(rows, cache)
    slots.join(cache, _PROBE_LENGTHS, token_B, order)
    found_BV = slots.logits(slots.rows, slots.columns)[order]
    return distance(found_BV, expected_BV), distance(padded_BV, expected_BV)
