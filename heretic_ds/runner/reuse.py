"""Passes over known prompts that begin where an edited model begins to differ from the original.

Two parts of such a pass need not be computed for every trial and every row. Up to the first block that an edit changes
the residual stream is the original model's, which is kept (:mod:`heretic_ds.runner.prompt_states`). And the tokens
that all prompts begin with, a system prompt and a template's, are passed over once a trial: rows attend to their keys
and values.

Whether a model takes its passes apart like that is tried out on the original, on a few of the prompts.

Shapes: T trials of a pass, B rows, S positions, D width, H heads, K width of a key or value, P shared tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from heretic_ds.ablation import Edit
from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint.fitness import first_line
from heretic_ds.prompts import TokenRows
from heretic_ds.runner.caches import (
    Padded,
    StartedLayer,
    cache_of,
    growing_cache,
    keys_and_values,
    new_cache,
    take,
)
from heretic_ds.runner.closeness import distance, is_rounding
from heretic_ds.runner.forward import Begun, Prefill, rope_depends_on_length
from heretic_ds.runner.memory import is_out_of_memory, release_memory, spares
from heretic_ds.runner.prompt_learning import Learning
from heretic_ds.runner.prompt_states import PromptStates, gathered
from heretic_ds.runner.slot_decoding import Assign
from heretic_ds.world import ALONE, Replicas

log = logging.getLogger(__name__)

_SETS = 2
"""Sets of prompts whose states are kept: those that answers are counted on, and those that KL is taken on."""

SharedKeys = list[tuple[Tensor, Tensor]]
"""By block, the keys and values [T, H, P, K] of shared tokens."""

_Key = tuple[bool, tuple[tuple[int, ...], ...]]
"""A set of prompts, and whether they are answered."""


class _Trials:
    """The trials in hand, and what passes of theirs begin with."""

    def __init__(self, states: PromptStates, start: int, count: int, assign: Assign) -> None:
        self.states, self.count = states, count
        self.start = start
        """The first block that is computed; below it states are kept ones."""
        self.rows: Sequence[int] = []
        """The trial of each row of the coming pass."""
        self.shared: SharedKeys | None = None
        """None until they are needed."""
        self.assign = assign

    def tell(self, rows: Sequence[int], into: Tensor | None = None) -> None:
        """Take the trial of each row of the coming passes."""
        self.rows = list(rows)
        self.assign(rows, into)


class HeadStart(Prefill):
    """Passes over prompts, from their first token through all blocks unless more is known of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        pad_id: int,
        wanted: bool,
        replicas: Replicas = ALONE,
    ) -> None:
        """Ranks of one replica run the same passes."""
        super().__init__(model, pad_id)
        wanted = wanted and not rope_depends_on_length(model.config.get_text_config(decoder=True))
        self._alike, self.wanted = replicas.alike, wanted
        self._blocks: list[Any] = list(model.get_submodule(anatomy.blocks).children())
        self._written = sorted({(writer.block, writer.component) for writer in anatomy.writers})
        self._kept: dict[_Key, PromptStates | None] = {}
        """By set; None where nothing is to be gained."""
        self._trials: _Trials | None = None
        self._over = not wanted
        if wanted and replicas.inside is None:  # else the others would go on with what this rank no longer has
            spares.add(self)

    def wants(self, rows: TokenRows, answers: bool) -> bool:
        """Whether :meth:`learn` should be called, with the same arguments, before passes over a set of prompts."""
        if self._over or len(rows) == 1:
            return False
        return _key(rows, answers) not in self._kept

    @torch.inference_mode()
    def learn(
        self, rows: TokenRows, answers: bool, in_batches: Callable[[Callable[[TokenRows], TokenRows]], object]
    ) -> None:
        """Keep what the model, which has to be the original at present, makes of a set of prompts.

        ``answers``: whether they will be answered, not only scored by their first token. ``in_batches`` is to call the
        function that it is given with all rows, in batches.
        """
        while len(self._kept) >= _SETS:
            del self._kept[next(iter(self._kept))]
        learning, failed = Learning(self._model, self._blocks, self._pad_id), None
        key, states = _key(rows, answers), None

        def keep(batch: TokenRows) -> TokenRows:
            if states is not None and not self._over:
                learning.keep(states, batch)
            return batch

        self._kept[key] = None
        try:
            states = self._kept[key] = learning.planned(rows, answers, self._alike)
            if states is not None:
                in_batches(keep)
        except Exception as failure:  # of the model's own code, which was not written for being looked into
            failed = _told(failure)
        if failed is not None:  # outside the handler, where the traceback no longer holds tensors
            release_memory()
            self._kept[key] = None
            log.info("passes over %d prompts go through the whole model: %s", len(rows), failed)
        if self._over or self._kept[key] is None or states is None:
            return
        for what in ("the blocks before an edit", "the tokens that all prompts begin with"):
            blocks = what.startswith("the blocks")
            if not (states.boundaries if blocks else states.passes_share):
                continue
            if (reason := self._difference(rows, states, blocks)) is None:
                continue
            log.info("%s are computed in every pass: %s", what, reason)
            if blocks:
                states.forget_blocks()
            else:
                states.passes_share = False
        log.debug("%d prompts: %.1f MiB of states kept", len(rows), states.bytes / 2**20)

    @contextmanager
    def of(self, rows: TokenRows, answers: bool, edits: Sequence[Edit | None], assign: Assign) -> Iterator[Assign]:
        """While the context lasts, passes over some of the rows that were learned are those of models with the edits.

        Gives the function to be told each row's edit before each pass, in place of ``assign``.
        """
        states, first = self._kept.get(_key(rows, answers)), self._first_edited(edits)
        if self._over or states is None or first is None:
            yield assign
            return
        start = max((block for block in states.boundaries if block <= first), default=0)
        self._trials = _Trials(states, start, len(edits), assign)
        try:
            yield self._trials.tell
        finally:
            self._trials = None

    @torch.inference_mode()
    def __call__(self, rows: TokenRows, cache: DynamicCache | None = None) -> Begun:
        trials = self._trials
        if trials is None or not trials.states.knows(rows):
            return super().__call__(rows, cache)
        return self._from_there(trials, rows, cache)

    def give_back(self) -> bool:
        """Go on without, where memory has run out; whether that frees any."""
        any_kept = any(states is not None for states in self._kept.values())
        self.close()
        return any_kept

    def lend(self) -> None:
        """Free what is kept; it is learned anew when it is needed."""
        self._kept.clear()

    def close(self) -> None:
        """Keep nothing any longer."""
        self._over, self._trials = True, None
        self._kept.clear()

    def _from_there(self, trials: _Trials, rows: TokenRows, cache: DynamicCache | None) -> Begun:
        """A pass over rows without what is known."""
        states, start = trials.states, trials.start
        shared = self._shared_keys(trials) if states.passes_share else []
        laid_out = states.layout(rows, not shared, self._pad_id, self._device)
        work = self._started(trials, shared, laid_out.padded) if shared else cache
        logits_BV = self._pass(
            laid_out.input_ids_BS, laid_out.mask_BS, laid_out.position_ids_BS, work, start,
            lambda hidden_ND: gathered(hidden_ND, laid_out.index_BS),
        )  # fmt: skip
        if cache is not None:
            self._hand_over(trials, rows, work, cache)
        return Begun(logits_BV, laid_out.mask_BS, laid_out.position_ids_BS[:, -1:])

    def _started(self, trials: _Trials, shared: SharedKeys, padded: Padded) -> DynamicCache:
        """A cache in which the shared tokens of each row's trial lie before the row's own."""
        trial_B = None if trials.count == 1 else torch.tensor(trials.rows, device=self._device)
        return cache_of([StartedLayer(pair, trial_B, padded) for pair in shared])

    def _pass(
        self,
        input_ids_BS: Tensor,
        mask_BS: Tensor,
        position_BS: Tensor,
        cache: DynamicCache | None,
        start: int,
        rows_of: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Logits [B, V] of a pass from block ``start`` on; ``rows_of`` picks its tokens' states from kept ones."""
        kept: dict[str, Any] = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
        with ExitStack() as stack:
            if start and self._trials is not None:
                hidden_BSD = rows_of(self._trials.states.hidden_ND[start])
                stack.enter_context(_giving(self._blocks[:start], hidden_BSD, self._trials.states.rest))
            return self._forward(input_ids_BS, mask_BS, position_BS, **kept)

    def _shared_keys(self, trials: _Trials) -> SharedKeys:
        """Keys and values of shared tokens, from one pass for all trials."""
        if trials.shared is not None:
            return trials.shared
        states, start, count = trials.states, trials.start, trials.count
        trials.assign(range(count))
        ids_TP = torch.tensor([states.shared_tokens] * count, device=self._device)
        position_TP = torch.arange(states.shared, device=self._device).expand(count, -1)
        work = growing_cache(self._model)
        self._pass(
            ids_TP, torch.ones_like(ids_TP), position_TP, work, start,
            lambda hidden_ND: torch.stack([hidden_ND[: states.shared]] * count),
        )  # fmt: skip
        of_all = [
            [kept_NHK[: states.shared].transpose(0, 1).expand(count, -1, -1, -1) for kept_NHK in kept[:start]]
            for kept in (states.keys_NHK, states.values_NHK)
        ]
        trials.shared = [*zip(*of_all, strict=True), *keys_and_values(cache_of(work.layers[start:]))]
        trials.assign(trials.rows)
        return trials.shared

    def _hand_over(self, trials: _Trials, rows: TokenRows, work: DynamicCache | None, cache: DynamicCache) -> None:
        """Give the caller's cache the keys and values that it does not have yet."""
        states = trials.states
        if trials.start:
            index_BS = states.layout(rows, True, self._pad_id, self._device).index_BS
            for block in range(trials.start):
                keys, values = (
                    gathered(kept[block], index_BS).transpose(1, 2) for kept in (states.keys_NHK, states.values_NHK)
                )
                take(cache, block, (keys, values), keys.shape[2])
        for block, layer in enumerate([] if work is None or work is cache else work.layers):
            if isinstance(layer, StartedLayer) and layer.memory is not None and layer.keys is not None:
                take(cache, block, layer.memory, layer.keys.shape[2])

    def _first_edited(self, edits: Sequence[Edit | None]) -> int | None:
        """The first block that any of the edits changes; None where there is no edit."""
        given = [edit for edit in edits if edit is not None]
        changed = (
            block for block, component in self._written if any(edit.strength(component, block) for edit in given)
        )
        return next(changed, len(self._blocks)) if given else None

    def _difference(self, rows: TokenRows, states: PromptStates, blocks: bool) -> str | None:
        """What a pass without ``blocks``, or else shared tokens, does otherwise; None where it does the same.

        All boundaries are tried, since a block may read what any other has noted; with a step after it the last one.
        """
        by_length = sorted(rows, key=len)
        sample = [by_length[-1], by_length[0], by_length[len(rows) // 2]]
        shares, states.passes_share = states.passes_share, not blocks
        failed, error, rounding = None, 0.0, 0.0
        try:
            expected_BV = {step: self._logits(sample, step) for step in {False, states.answers}}
            alone_BV = torch.cat([self._logits([row], states.answers) for row in sample])
            rounding = distance(alone_BV, expected_BV[states.answers])
            tried = [(start, False) for start in states.boundaries] if blocks else []
            for start, step in [*tried, (tried[-1][0] if tried else 0, states.answers)]:
                self._trials = _Trials(states, start, 1, lambda rows, into=None: None)
                self._trials.rows = [0] * len(sample)
                error = max(error, distance(self._logits(sample, step), expected_BV[step]))
        except Exception as failure:  # of the model's own code, which was not written for a pass in parts
            failed = f"a trial pass failed ({_told(failure)})"
        finally:
            self._trials, states.passes_share = None, shares
        if failed is not None:  # outside the handler, where the traceback no longer holds tensors
            release_memory()
        elif not is_rounding(error, rounding):
            failed = f"a trial pass gave other logits (off by {error:.2g} of their spread, {rounding:.2g} by rounding)"
        if self._alike(failed is None):
            return None
        return failed or "a trial pass failed on another rank"

    def _logits(self, rows: TokenRows, step: bool) -> Tensor:
        """Logits [B, V] after each row; with a ``step`` after one more token, which attends to the row's keys."""
        if not step:
            return self(rows).logits_BV
        cache = new_cache(self._model)
        begun = self(rows, cache)
        token_B = torch.tensor([row[-1] for row in rows], device=self._device)
        return self.step(begun, token_B, cache)


@contextmanager
def _giving(blocks: Sequence[Any], hidden_BSD: Tensor, rest: tuple[None, ...] | None) -> Iterator[None]:
    """While the context lasts, blocks compute nothing and give the same output."""
    output = hidden_BSD if rest is None else (hidden_BSD, *rest)
    replaced = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for block, forward in zip(blocks, replaced, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _told(failure: Exception) -> str:
    return "memory ran out" if is_out_of_memory(failure) else f"{type(failure).__name__}: {first_line(failure)}"


def _key(rows: TokenRows, answers: bool) -> _Key:
    return answers, tuple(map(tuple, rows))
