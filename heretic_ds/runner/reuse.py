"""Passes over known prompts that begin where an edited model begins to differ from the original.

Two parts of such a pass need not be computed for every trial and every row. Up to the first block that an edit changes,
the residual stream is the original model's, which is kept: the inputs of some blocks, and what attention needs of the
blocks before. And the tokens that all prompts begin with, a system prompt and a template's, are passed over once a
trial: rows attend to their keys and values, which lie in the first columns, before a row's padding.

Whether a model takes its passes apart like that is tried out on the original, once, on a few of the prompts.

Shapes: T trials of a pass, B rows, S own positions, C columns, D width, H heads, K width of a key or value, P shared
tokens, N kept tokens (:mod:`heretic_ds.runner.kept`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from heretic_ds.ablation import Edit
from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint.fitness import first_line
from heretic_ds.memory import is_out_of_memory
from heretic_ds.prompts import TokenRows
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.forward import Begun, Forward, rope_depends_on_length
from heretic_ds.runner.kept import Kept, Pairs, boundaries_within, hold, keys_and_values, picked, shared_beginning
from heretic_ds.runner.parity import distance, is_rounding
from heretic_ds.runner.rows import PASS_IN_TOKENS, Row

log = logging.getLogger(__name__)

_SETS = 2
"""Sets of prompts whose states are kept: those that answers are counted on, and those that KL is taken on."""
_LEAST_BYTES, _SHARE_OF_WEIGHTS = 64 * 2**20, 0.1
"""Memory that kept states of one set of prompts may take: this, or that share of the weights if it is more."""


@dataclass
class _Pass:
    """The trials in hand, and what passes of theirs begin with."""

    kept: Kept
    start: int
    """The first block that is computed; below it states are kept ones."""
    trials: int
    shared: Pairs | None = None
    """Keys and values [T, H, P, K] of shared tokens; None until they are needed."""


class Reuse(Forward):
    """Passes over prompts, from their first token through all blocks unless more is known of them."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, pad_id: int, wanted: bool, comm: Comm) -> None:
        super().__init__(model, pad_id)
        self._comm = comm
        self._config: Any = model.config.get_text_config(decoder=True)
        self.wanted = wanted and not rope_depends_on_length(self._config)
        self._blocks: list[Any] = list(model.get_submodule(anatomy.blocks).children())
        self._written = sorted({(writer.block, writer.component) for writer in anatomy.writers})
        self._kept: dict[tuple[bool, tuple[tuple[int, ...], ...]], Kept | None] = {}
        """By set and whether it is answered; None where nothing is to be gained."""
        self._ways: dict[bool, tuple[bool, bool]] = {}
        """By whether prompts are answered: whether the model's passes may leave out blocks, and shared tokens."""
        self._pass: _Pass | None = None

    def wants(self, prompts: TokenRows, answers: bool) -> bool:
        """Whether :meth:`learn` should be called, with the same arguments, before passes over a set of prompts."""
        return self.wanted and len(prompts) > 1 and _key(prompts, answers) not in self._kept

    @torch.inference_mode()
    def learn(
        self, prompts: TokenRows, answers: bool, over: Callable[[Callable[[Sequence[Row]], object]], object]
    ) -> None:
        """Keep what the model, which has to be the original at present, makes of a set of prompts.

        ``answers``: whether they will be answered, not only scored by their distributions. ``over`` is to call the
        function that it is given with all rows, in batches.
        """
        while len(self._kept) >= _SETS:
            del self._kept[next(iter(self._kept))]
        key = _key(prompts, answers)
        self._kept[key] = None
        if answers not in self._ways:
            self._ways[answers] = self._tried(prompts, answers)
        kept = self._planned(prompts, answers, *self._ways[answers])
        if kept is None:
            return
        over(lambda rows: self._learn(kept, rows))
        if self.wanted:  # memory may have run out on the way
            self._kept[key] = kept
            log.debug("%d prompts: %.1f MiB of states kept", len(prompts), kept.bytes / 2**20)

    @contextmanager
    def using(self, prompts: TokenRows, answers: bool, edits: Sequence[Edit | None]) -> Iterator[None]:
        """While the context lasts, passes over some of the prompts that were learned are those of models with the
        edits."""
        kept, given = self._kept.get(_key(prompts, answers)), [edit for edit in edits if edit is not None]
        if self.wanted and kept is not None and given:
            changed = (at for at, component in self._written if any(edit.strength(component, at) for edit in given))
            first = next(changed, len(self._blocks))
            self._pass = _Pass(kept, max((b for b in kept.boundaries if b <= first), default=0), len(edits))
        try:
            yield
        finally:
            self._pass = None

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row], cache: DynamicCache | None = None, last: int | None = None) -> Begun:
        now, layers = self._pass, cache.layers if cache is not None else []
        known = now is not None and all(tuple(row.prompt) in now.kept.start for row in rows)
        if now is None or not known or any(type(layer) is not DynamicLayer for layer in layers):
            return super().__call__(rows, cache, last)
        kept, shared = now.kept, len(now.kept.shared)
        if shared and now.shared is None:
            now.shared = self._shared_keys(now)
        self.assign(rows)
        start_B1 = torch.tensor([[kept.start[tuple(row.prompt)]] for row in rows], device=self.device)
        own_B1 = torch.tensor([[len(row.prompt) - shared] for row in rows], device=self.device)
        column_S = torch.arange(max(len(row.prompt) for row in rows) - shared, device=self.device)
        at_BS = column_S + own_B1 - len(column_S)  # of the row's own tokens; negative in its padding
        index_BS = torch.where(at_BS >= 0, start_B1 + at_BS, len(kept.tokens_N) - 1)
        position_BS = torch.where(at_BS >= 0, at_BS + shared, 0)
        mask_BC = torch.nn.functional.pad((at_BS >= 0).long(), (shared, 0), value=1)
        work = self.growing_cache() if cache is None and shared else cache
        if shared and now.shared is not None and work is not None:
            trial_B = torch.tensor([row.trial if now.trials > 1 else 0 for row in rows], device=self.device)
            for layer, pair in zip(work.layers, now.shared, strict=True):
                hold(
                    layer, *(each.expand(len(rows), -1, -1, -1) if now.trials == 1 else each[trial_B] for each in pair)
                )
        ids_BS = kept.tokens_N[index_BS]
        with self._from_block(now, lambda hidden_ND: picked(hidden_ND, index_BS)):
            logits = self.logits(ids_BS, mask_BC, position_BS, work, last)
        if cache is not None:  # what the blocks that were left out would have put there
            for layer, pair in zip(cache.layers[: now.start], kept.pairs_NHK, strict=False):
                whole = [picked(each, index_BS).transpose(1, 2) for each in pair]
                begin = [each[:shared].transpose(0, 1).expand(len(rows), -1, -1, -1) for each in pair]
                hold(layer, *(torch.cat(both, dim=2) for both in zip(begin, whole, strict=True)))
        return Begun(logits, mask_BC, position_BS[:, -1:])

    def evict(self) -> bool:
        """Go on without, where memory has run out; whether that frees any."""
        any_kept = any(kept is not None for kept in self._kept.values())
        self.close()
        return any_kept

    def rest(self) -> None:
        """Free what is kept; it is learned anew when it is needed."""
        self._kept.clear()

    def close(self) -> None:
        """Keep nothing any longer."""
        self.wanted, self._pass = False, None
        self._kept.clear()

    def _shared_keys(self, now: _Pass) -> Pairs:
        """Keys and values of shared tokens, from one pass for all trials."""
        kept, count, work = now.kept, now.trials, self.growing_cache()
        self.assign([Row(kept.shared, trial=trial) for trial in range(count)])
        ids_TP = torch.tensor([kept.shared] * count, device=self.device)
        position_TP = torch.arange(len(kept.shared), device=self.device).expand(count, -1)
        with self._from_block(now, lambda hidden_ND: hidden_ND[: len(kept.shared)].expand(count, -1, -1)):
            self.logits(ids_TP, torch.ones_like(ids_TP), position_TP, work)
        below = [
            tuple(each[: len(kept.shared)].transpose(0, 1).expand(count, -1, -1, -1) for each in pair)
            for pair in kept.pairs_NHK[: now.start]
        ]
        return [*below, *keys_and_values(work.layers[now.start :])]  # type: ignore[list-item]

    @contextmanager
    def _from_block(self, now: _Pass, pick: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While the context lasts, the blocks before the first computed one give what was kept, of picked tokens."""
        if not now.start:
            yield
            return
        hidden_BSD, rest, blocks = pick(now.kept.hidden_ND[now.start]), now.kept.rest, self._blocks[: now.start]
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

    def _planned(
        self, prompts: TokenRows, answers: bool, blocks: bool, share: bool, shared: int | None = None
    ) -> Kept | None:
        """What is to be kept of a set of prompts; None where nothing is gained."""
        if shared is None:
            shared = self._worth_sharing(prompts) if share else 0
        boundaries: tuple[int, ...] = ()
        if blocks and (self.keeps_positions or not answers):
            tokens = sum(map(len, prompts))
            weights = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
            of_input, of_keys = self._bytes(prompts[0][:2])
            boundaries = boundaries_within(
                len(self._blocks),
                tokens * of_input,
                (tokens if answers else shared) * of_keys,
                max(_LEAST_BYTES, int(_SHARE_OF_WEIGHTS * weights)),
                self._comm.alike,
            )
        return (
            Kept.of(prompts, shared, boundaries, answers, self._pad_id, self.device) if shared or boundaries else None
        )

    def _worth_sharing(self, prompts: TokenRows) -> int:
        """How many tokens all prompts begin with, where passing over them once is worth a pass."""
        window = getattr(self._config, "sliding_window", None)
        if not self.keeps_positions or (window and max(map(len, prompts)) > window):
            return 0  # between shared tokens and a row's own lies padding, which a window would count
        shared = shared_beginning(prompts)
        return shared if shared * (len(prompts) - 1) > PASS_IN_TOKENS else 0

    def _bytes(self, prompt: Sequence[int]) -> tuple[int, int]:
        """Bytes of one token, from a pass over a short row: of a block's input, and of its key and value in a block."""
        cache, inputs = self.growing_cache() if self.keeps_positions else None, {}
        with self._noting(range(1, len(self._blocks) + 1), lambda at, output, rest: inputs.update({at: output})):
            super().__call__([Row(prompt)], cache)
        pairs = [] if cache is None else keys_and_values(cache.layers)
        if cache is not None and len(pairs) < len(self._blocks):
            raise NotImplementedError(f"only {len(pairs)} of {len(self._blocks)} blocks have keys of their own")
        of_keys = max((sum(each.numel() * each.element_size() for each in pair) for pair in pairs), default=0)
        of_input = max(each.numel() * each.element_size() for each in inputs.values())
        return of_input // len(prompt), of_keys // len(prompt)

    def _learn(self, kept: Kept, rows: Sequence[Row]) -> None:
        """Keep the states of a batch."""
        hidden_BSD: dict[int, Tensor] = {}

        def note(boundary: int, output_BSD: Tensor, rest: tuple[None, ...] | None) -> None:
            hidden_BSD[boundary], kept.rest = output_BSD, rest

        keys = bool(kept.boundaries) and (kept.answers or bool(kept.shared))
        cache = self.growing_cache() if keys else None
        with self._noting(kept.boundaries, note):
            super().__call__(rows, cache)
        kept.put(rows, hidden_BSD, [] if cache is None else keys_and_values(cache.layers)[: kept.boundaries[-1]])

    @contextmanager
    def _noting(
        self, boundaries: Sequence[int], note: Callable[[int, Tensor, tuple[None, ...] | None], object]
    ) -> Iterator[None]:
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
            yield

    def _tried(self, prompts: TokenRows, answers: bool) -> tuple[bool, bool]:
        """Whether passes of this model may leave out blocks, and whether shared tokens."""
        by_length = sorted(prompts, key=len)
        sample = [Row(by_length[place]) for place in (-1, 0, len(prompts) // 2)]
        shared, reason = self._worth_sharing(prompts), ""
        for blocks, share in ((True, True), (True, False), (False, True)) if shared else ((True, False),):
            ok, found = self._comm.attempt(lambda: self._difference(sample, answers, blocks, shared if share else 0))  # noqa: B023
            reason = reason or (found if ok else "memory ran out") or ""
            if ok and found is None:
                break
        else:
            blocks = share = False
        if reason and not blocks:
            log.info("the blocks before an edit are computed in every pass: %s", reason)
        if reason and shared and not share:
            log.info("the tokens that all prompts begin with are computed in every pass: %s", reason)
        return blocks, share

    def _difference(self, sample: list[Row], answers: bool, blocks: bool, shared: int) -> str | None:
        """What passes over a few prompts that leave out blocks, or shared tokens, do otherwise; None where they do the
        same. All boundaries are tried, since a block may read what any other has noted; with a step after it the last.
        """
        try:
            kept = self._planned([row.prompt for row in sample], answers, blocks, True, shared)
            if kept is None:
                return None
            self._learn(kept, sample)
            expected_BV = {step: self._logits(sample, step) for step in {False, answers}}
            alone_BV = torch.cat([self._logits([row], answers) for row in sample])
            rounding, error = distance(alone_BV, expected_BV[answers]), 0.0
            for start, step in [*((b, False) for b in kept.boundaries), (max(kept.boundaries, default=0), answers)]:
                self._pass = _Pass(kept, start, 1)
                error = max(error, distance(self._logits(sample, step), expected_BV[step]))
        except Exception as failure:  # of the model's own code, which was not written for a pass in parts
            if is_out_of_memory(failure):
                raise
            return self._agreed(f"a trial pass failed ({type(failure).__name__}: {first_line(failure)})")
        finally:
            self._pass = None
        told = f"a trial pass gave other logits (off by {error:.2g} of their spread, {rounding:.2g} by rounding)"
        return self._agreed(None if is_rounding(error, rounding) else told)

    def _agreed(self, failed: str | None) -> str | None:
        """What the replica's first rank found, for all of its ranks."""
        if self._comm.alike(failed is None):
            return None
        return failed or "a trial pass failed on another rank"

    def _logits(self, rows: Sequence[Row], step: bool) -> Tensor:
        """Logits [B, V] after each row; with a ``step`` after one more token, which attends to the row's keys."""
        if not step:
            return self(rows).logits_BV
        cache = self.growing_cache() if self.keeps_positions else self.own_cache()
        begun = self(rows, cache)
        token_B = torch.tensor([row.prompt[-1] for row in rows], device=self.device)
        return self.step(begun, token_B, cache)


def _key(prompts: TokenRows, answers: bool) -> tuple[bool, tuple[tuple[int, ...], ...]]:
    return answers, tuple(map(tuple, prompts))
