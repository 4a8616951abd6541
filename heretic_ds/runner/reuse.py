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
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from heretic_ds.ablation import Edit
from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint.fitness import first_line
from heretic_ds.memory import release_memory
from heretic_ds.prompts import TokenRows
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.forward import Begun, Forward, rope_depends_on_length
from heretic_ds.runner.kept import Kept, boundaries_within, picked, shared_beginning
from heretic_ds.runner.parity import distance, is_rounding
from heretic_ds.runner.rows import PASS_IN_TOKENS, Row

log = logging.getLogger(__name__)

_SETS = 6
"""Sets of prompts whose states are kept: those that answers are counted on, those that KL is taken on, those that edits
are screened on, the first two with answers behind them, and some of scorers' own. Of more, each is learned anew before
every pass over it."""
_LEAST_BYTES, _SHARE_OF_WEIGHTS = 64 * 2**20, 0.1
"""Memory that kept states of one set of prompts may take: this, or that share of the weights if it is more."""


@dataclass
class _Pass:
    """The trials in hand, and what passes of theirs begin with."""

    kept: Kept
    start: int
    """The first block that is computed; below it states are kept ones."""
    trials: int
    shared: list[tuple[Tensor, Tensor]] | None = None
    """By block, keys and values [T, H, P, K] of shared tokens; None until they are needed."""


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
        """Whether the model's passes may leave out blocks, and shared tokens; by whether there were any to try."""
        self._token_bytes = 0, 0
        """See :attr:`Kept.token_bytes`."""
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
        key, shared = _key(prompts, answers), self._worth_sharing(prompts)
        self._kept[key] = None
        if bool(shared) not in self._ways:
            self._ways[bool(shared)] = self._tried(prompts, shared)
        blocks, share = self._ways[bool(shared)]
        boundaries = self._boundaries(prompts, answers) if blocks and (self.keeps_positions or not answers) else ()
        if not boundaries and not (shared and share):
            return
        kept = self._kept[key] = Kept(prompts, shared * share, boundaries, self._pad_id, self.device)

        def learn(rows: Sequence[Row]) -> None:
            if self.wanted and not self._comm.attempt(lambda: self._learn(kept, rows, answers))[0]:
                log.info("passes over prompts go through the whole model: memory ran out")
                self.close()

        if boundaries:
            over(learn)
        log.debug("%d prompts: %.1f MiB of states kept", len(prompts), kept.bytes / 2**20)

    @contextmanager
    def using(self, prompts: TokenRows, answers: bool, edits: Sequence[Edit | None]) -> Iterator[None]:
        """While the context lasts, passes over some of the prompts that were learned are those of models with the
        edits."""
        kept, given = self._kept.get(_key(prompts, answers)), [edit for edit in edits if edit is not None]
        if kept is not None and given:
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
        known = now is not None and now.kept.knows(rows, own=last or 1)
        if now is None or not known or any(type(layer) is not DynamicLayer for layer in layers):
            return super().__call__(rows, cache, last)
        kept, pairs, work = now.kept, self._shared_keys(now) if now.kept.shared else [], cache
        index_BS, position_BS, mask_BC = kept.layout(rows)
        if pairs:
            work = self.growing_cache() if cache is None else cache
            trial_B = torch.tensor([row.trial for row in rows], device=self.device)
            for layer, pair in zip(work.layers, pairs, strict=True):
                of_rows = (each[trial_B] if now.trials > 1 else each.expand(len(rows), -1, -1, -1) for each in pair)
                _hold(layer, *of_rows)
        self.assign(rows)
        logits = self._late(now, index_BS, position_BS, mask_BC, work, last)
        shared_BP = torch.arange(len(kept.shared), device=self.device).expand(len(rows), -1)
        index_BC = torch.cat([shared_BP, index_BS], dim=1)
        for block, layer in enumerate(layers[: now.start]):  # what blocks that were left out would have put there
            _hold(layer, *(picked(each[block], index_BC).transpose(1, 2) for each in (kept.keys_NHK, kept.values_NHK)))
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

    def _shared_keys(self, now: _Pass) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of shared tokens, from one pass for all trials."""
        if now.shared is None:
            work, trials = self.growing_cache(), range(now.trials)
            self.assign([Row(now.kept.shared, trial=trial) for trial in trials])
            index_TP = torch.arange(len(now.kept.shared), device=self.device).expand(len(trials), -1)
            self._late(now, index_TP, index_TP, torch.ones_like(index_TP), work)
            computed: list[Any] = work.layers[now.start :]
            layers = computed[:1] * now.start + computed  # no more than the number of columns matters below
            now.shared = [(layer.keys, layer.values) for layer in layers]
        return now.shared

    def _late(
        self,
        now: _Pass,
        index_BS: Tensor,
        position_BS: Tensor,
        mask_BC: Tensor,
        cache: DynamicCache | None,
        last: int | None = None,
    ) -> Tensor:
        """Logits after kept tokens, by a pass in which the blocks before the first computed one give what was kept."""
        with ExitStack() as stack:
            if now.start:
                hidden_BSD = picked(now.kept.hidden_ND[now.start], index_BS)
                output = hidden_BSD if now.kept.rest is None else (hidden_BSD, *now.kept.rest)
                for own in (block.__dict__ for block in self._blocks[: now.start]):
                    stack.callback(own.update, {name: own.pop(name) for name in ("forward",) if name in own})
                    stack.callback(own.pop, "forward")
                    own["forward"] = lambda *args, **kwargs: output
            return self.logits(now.kept.tokens_N[index_BS], mask_BC, position_BS, cache, last)

    def _worth_sharing(self, prompts: TokenRows) -> int:
        """How many tokens all prompts begin with, where passing over them once is worth a pass."""
        window = getattr(self._config, "sliding_window", None)
        if not self.keeps_positions or (window and max(map(len, prompts)) >= window):
            return 0  # between shared tokens and a row's own lies padding, which a window would count
        shared = shared_beginning(prompts)
        return shared if shared * (len(prompts) - 1) > PASS_IN_TOKENS else 0

    def _boundaries(self, prompts: TokenRows, answers: bool) -> tuple[int, ...]:
        """The blocks whose inputs are to be kept of a set of prompts."""
        tokens, weights = sum(map(len, prompts)), sum(parameter.nbytes for parameter in self.model.parameters())
        of_input, of_keys = self._token_bytes
        most = max(_LEAST_BYTES, int(_SHARE_OF_WEIGHTS * weights))
        below = answers * tokens * of_keys
        return boundaries_within(len(self._blocks), tokens * of_input, below, most, self._comm.alike)

    def _learn(self, kept: Kept, rows: Sequence[Row], answers: bool) -> None:
        """Keep the states of a batch; keys and values only of rows that get answers."""
        outputs: dict[int, Any] = {}
        cache = self.growing_cache() if answers and kept.boundaries else None
        with ExitStack() as stack:
            for at in kept.boundaries:
                hook = self._blocks[at - 1].register_forward_hook(lambda _, args, out, at=at: outputs.update({at: out}))
                stack.callback(hook.remove)
            super().__call__(rows, cache)
        for at, output in outputs.items():
            if isinstance(output, tuple):
                outputs[at], *rest = output
                if any(other is not None for other in rest):
                    raise NotImplementedError("a block gives more than the residual stream to the next")
                kept.rest = (None,) * len(rest)
        layers: list[Any] = [] if cache is None else cache.layers[: kept.boundaries[-1]]
        keys, values = (
            {at: getattr(layer, name).transpose(1, 2) for at, layer in enumerate(layers)} for name in ("keys", "values")
        )
        kept.put(rows, outputs, keys, values)

    def _tried(self, prompts: TokenRows, shared: int) -> tuple[bool, bool]:
        """Whether passes of this model may leave out blocks, and whether shared tokens."""
        by_length, reason = sorted(prompts, key=len), None
        sample = [Row(by_length[place]) for place in (-1, 0, len(prompts) // 2)]
        for blocks, share in ((True, True), (True, False), (False, True)) if shared else ((True, False),):
            try:
                ok, failed = self._comm.attempt(lambda: self._difference(sample, blocks, shared * share))  # noqa: B023
                failed = failed if ok else "memory ran out"
            except Exception as failure:  # of the model's own code, which was not written for a pass in parts
                failed = f"a trial pass failed ({type(failure).__name__}: {first_line(failure)})"
            if self._comm.alike(failed is None):
                break
            release_memory()  # outside the handler, where the traceback no longer holds tensors
            reason = reason or failed or "a trial pass failed on another rank"
        else:
            blocks = share = False
        if reason and not blocks:
            log.info("the blocks before an edit are computed in every pass: %s", reason)
        if reason and shared and not share:
            log.info("the tokens that all prompts begin with are computed in every pass: %s", reason)
        return blocks, share

    def _difference(self, sample: list[Row], blocks: bool, shared: int) -> str | None:
        """What passes over a few prompts that leave out blocks, or shared tokens, do otherwise; None where they do the
        same. All boundaries are tried, since a block may read what any other has noted; with a step after it the last.
        """
        prompts, last, step = [row.prompt for row in sample], blocks * (len(self._blocks) - 1), self.keeps_positions
        kept = Kept(prompts, shared, range(1, last + 1), self._pad_id, self.device)
        self._learn(kept, sample, step)
        self._token_bytes = kept.token_bytes
        expected_BV = {after: self._logits(sample, after) for after in {False, step}}
        alone_BV = torch.cat([self._logits([row], step) for row in sample])
        rounding, error = distance(alone_BV, expected_BV[step]), 0.0
        try:
            for start, after in [*((start, False) for start in range(not shared, last + 1)), (last, step)]:
                self._pass = _Pass(kept, start, 1)
                error = max(error, distance(self._logits(sample, after), expected_BV[after]))
        finally:
            self._pass = None
        if is_rounding(error, rounding):
            return None
        return f"a trial pass gave other logits (off by {error:.2g} of their spread, {rounding:.2g} by rounding)"

    def _logits(self, rows: Sequence[Row], step: bool) -> Tensor:
        """Logits [B, V] after each row; with a ``step`` after one more token, which attends to the row's keys."""
        if not step:
            return self(rows).logits_BV
        cache = self.growing_cache()
        begun = self(rows, cache)
        token_B = torch.tensor([row.prompt[-1] for row in rows], device=self.device)
        return self.step(begun, token_B, cache)


def _hold(layer: Any, keys_BHCK: Tensor, values_BHCK: Tensor) -> None:
    """Give a layer of a cache these keys and values, to which a pass adds its own."""
    layer.lazy_initialization(keys_BHCK, values_BHCK)
    layer.keys, layer.values = keys_BHCK, values_BHCK


def _key(prompts: TokenRows, answers: bool) -> tuple[bool, tuple[tuple[int, ...], ...]]:
    return answers, tuple(map(tuple, prompts))
