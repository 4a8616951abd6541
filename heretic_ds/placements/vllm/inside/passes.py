"""What a forward pass of vLLM computes, for whom, and under which edits; and what is read of its logits.

Shapes: N tokens of a pass, D width, V vocabulary, K positions that are read of a row, T trials.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heretic_ds.ablation.divergence import first_token_kl, log_probabilities
from heretic_ds.edits.experts import ExpertEdit
from heretic_ds.edits.outputs import DenseEdit, OutputEdits
from heretic_ds.edits.tables import Rows

_NUMBERS_AT_ONCE = 1 << 24
"""Logits that are computed at one time, since each needs several numbers for the moment: vLLM leaves no memory for
them."""


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens of one row in a pass."""

    trial: int
    index: int
    """Of the row in the list of prompts."""
    start: int
    """Position of the first one in its row."""
    count: int


def name_of(trial: int, index: int) -> str:
    """Name of the request for a row; vLLM appends to it."""
    return f"{trial}|{index}|"


class Steps:
    """Knows whose tokens a pass of vLLM's first model runner computes; passes that warm it up are nobody's."""

    def __init__(self, runner: Any) -> None:
        self._runner, self._scheduled = runner, None
        execute = runner.execute_model

        def noting(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self._scheduled = scheduler_output.num_scheduled_tokens
            try:
                return execute(scheduler_output, *args, **kwargs)
            finally:
                self._scheduled = None

        runner.execute_model = noting

    def spans(self) -> list[Span]:
        """The rows of the pass that is being computed, in the order of its tokens."""
        if self._scheduled is None:
            return []
        batch, spans = self._runner.input_batch, []
        for place, name in enumerate(batch.req_ids):
            trial, index, _ = name.split("|")
            start = int(batch.num_computed_tokens_cpu[place])
            spans.append(Span(int(trial), int(index), start, self._scheduled[name]))
        return spans


class Tokens(Rows):
    """The trial of every token; a pass may end with some that belong to none."""

    def of(self, count: int) -> Tensor:
        missing = count - len(self._trial_B)
        return self._trial_B if missing == 0 else nn.functional.pad(self._trial_B, (0, missing))


class VllmOutputEdits(OutputEdits):
    """Edits of the outputs of vLLM's layers, a trial for each token."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._rows = Tokens(next(self._model.parameters()).device)
        routed = [self._model.get_submodule(w.module) for w in self._anatomy.writers if w.experts is not None]
        self._covered = {id(inner) for module in routed for inner in module.modules() if inner is not module}
        """Shared experts, which experts' modules add to their own output: one edit serves both."""

    def _attach(self, writer: Any, edit: DenseEdit | ExpertEdit, stack: ExitStack) -> None:
        module = self._model.get_submodule(writer.module)
        if id(module) in self._covered:
            return
        if not isinstance(edit, DenseEdit):
            raise RuntimeError(f"outputs of {writer.module} cannot be edited expert by expert")
        stack.callback(module.register_forward_hook(_on_first(edit)).remove)


def _on_first(edit: DenseEdit) -> Callable[[nn.Module, Any, Any], Any]:
    """A hook for layers that return their bias beside their output."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return edit(module, args, output[0]), *output[1:]
        return edit(module, args, output)

    return hook


class Reader:
    """Takes logits at the last K positions of every row of a pass, wherever vLLM cuts rows into passes."""

    def __init__(self, model: Any, vocabulary: int, lengths: Sequence[int], counts: Sequence[int]) -> None:
        """Lengths of the rows, and K of each."""
        self._model, self._at_once = model, max(1, _NUMBERS_AT_ONCE // vocabulary)
        self._first, self._counts = [n - k for n, k in zip(lengths, counts, strict=True)], counts

    def read(self, spans: Sequence[Span], hidden_ND: Tensor) -> None:
        """Read what is wanted of one pass. All ranks compute the logits, but one gets them."""
        places, whose, offset = [], [], 0
        for span in spans:
            start = max(self._first[span.index], span.start)
            for position in range(start, span.start + span.count):
                places.append(offset + position - span.start)
                whose.append((span.trial, span.index, position - self._first[span.index]))
            offset += span.count
        for begin in range(0, len(places), self._at_once):
            some = slice(begin, begin + self._at_once)
            logits_BV = self._model.compute_logits(hidden_ND[places[some]])
            if logits_BV is not None:
                self.take(whose[some], logits_BV)

    def take(self, whose: Sequence[tuple[int, int, int]], logits_BV: Tensor) -> None:
        """Take logits by trial, row and place among its K positions."""
        raise NotImplementedError

    def taken(self) -> list[tuple[int, int, bytes]]:
        """What has become of rows that are complete, as trial, row, and bytes; and forget it."""
        return []


class References(Reader):
    """Keeps log-probabilities of rows [K, V], float32 on the host."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept: dict[int, Tensor] = {}

    def take(self, whose: Sequence[tuple[int, int, int]], logits_BV: Tensor) -> None:
        for (_, index, place), each_V in zip(whose, log_probabilities(logits_BV).cpu(), strict=True):
            if index not in self.kept:
                self.kept[index] = each_V.new_empty(self._counts[index], len(each_V))
            self.kept[index][place] = each_V


class Divergences(Reader):
    """Compares rows with references of theirs; of a row the mean over its positions, as float64."""

    def __init__(self, *args: Any, references: References) -> None:
        super().__init__(*args)
        self._kept = references.kept
        self._found: dict[tuple[int, int], dict[int, float]] = {}
        """By trial and row, and by place, since vLLM computes places of a row that it has put off once more."""

    def take(self, whose: Sequence[tuple[int, int, int]], logits_BV: Tensor) -> None:
        reference_BV = torch.stack([self._kept[index][place] for _, index, place in whose]).to(logits_BV.device)
        for (trial, index, place), value in zip(whose, first_token_kl(reference_BV, logits_BV).tolist(), strict=True):
            self._found.setdefault((trial, index), {})[place] = value

    def taken(self) -> list[tuple[int, int, bytes]]:
        result = []
        for key in [key for key, found in self._found.items() if len(found) == self._counts[key[1]]]:
            values = [value for _, value in sorted(self._found.pop(key).items())]
            result.append((*key, torch.tensor(values, dtype=torch.float64).mean().numpy().tobytes()))
        return result


class Logits(Reader):
    """Hands out logits [K, V] themselves, float32, for who compares them elsewhere."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._found: dict[tuple[int, int], dict[int, Tensor]] = {}

    def take(self, whose: Sequence[tuple[int, int, int]], logits_BV: Tensor) -> None:
        for (trial, index, place), each_V in zip(whose, logits_BV.float().cpu(), strict=True):
            self._found.setdefault((trial, index), {})[place] = each_V

    def taken(self) -> list[tuple[int, int, bytes]]:
        result = []
        for key in [key for key, found in self._found.items() if len(found) == self._counts[key[1]]]:
            found = self._found.pop(key)
            result.append((*key, torch.stack([found[place] for place in sorted(found)]).numpy().tobytes()))
        return result
