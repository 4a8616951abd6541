"""Asking a model the harness's tasks, and what two models' answers to the same questions say of their difference."""

from __future__ import annotations

import importlib.util
import logging
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

from heretic_ds import progress
from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import path_of, reading
from heretic_ds.settings.benchmark import BenchmarkSettings

log = logging.getLogger(__name__)

HARNESS = "lm_eval"
_ADVICE = "see which there are by `lm_eval ls tasks`, or give the folder of your own as benchmark.include"


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    filter: str
    """How answers were read where a task reads them in several ways; ``none`` as a rule."""
    value: float
    error: float | None
    """Standard error, as the harness gives it."""
    questions: int
    each: tuple[float, ...] | None = None
    """The metric of every question, in order, where the value is their mean."""
    group: str | None = None
    """The nearest group with scores that the task is in."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is a score of."""
        return self.task, self.metric, self.filter


class Harness:
    """The tasks that the settings name, ready to be asked."""

    def __init__(self, chosen: BenchmarkSettings) -> None:
        """Raises UserError where the harness is missing, or has no such tasks."""
        if not chosen.tasks:
            raise UserError("task=benchmark has nothing to ask: give benchmark=heretic, or benchmark.tasks=[gsm8k,...]")
        if importlib.util.find_spec(HARNESS) is None:
            raise UserError('task=benchmark needs lm-evaluation-harness: pip install "heretic-ds[eval]"')
        self._chosen = chosen
        folder = None if chosen.include is None else path_of(chosen.include, "benchmark.include")
        if folder is not None and not folder.is_dir():
            raise UserError(f"benchmark.include={chosen.include} is no folder; give one that holds tasks in YAML files")
        from lm_eval.tasks import TaskManager

        with reading(f"benchmark.include={chosen.include}", "mend its YAML files", "cannot be read"):
            self._manager = TaskManager(include_path=None if folder is None else str(folder))
        unknown = [name for name in chosen.tasks if name not in self._manager.all_tasks]
        if unknown:
            raise UserError(f"benchmark.tasks: the harness has no task {unknown[0]!r}; {_ADVICE}")

    def load(self) -> dict[str, Any]:
        """The tasks, their data sets read. Raises UserError."""
        with reading(f"benchmark.tasks={list(self._chosen.tasks)}", "leave out what cannot be had", "cannot be read"):
            found: dict[str, Any] = self._manager.load(list(self._chosen.tasks))
        unsafe = [name for name, task in found["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
        if unsafe and not self._chosen.allow_code:
            raise UserError(
                f"benchmark.tasks: {unsafe[0]} runs the code that the model answers with; leave it out, or set "
                "benchmark.allow_code=true on a machine that may be harmed"
            )
        return found

    def answer_tokens(self) -> int:
        """Tokens of the longest answer that a task wants. Raises UserError where answers are to be drawn at random."""
        from heretic_ds.harness.model import wanted

        lengths = [
            wanted(task.config.generation_kwargs or {})[0]
            for task in self.load()["tasks"].values()
            if task.get_config("output_type") == "generate_until"
        ]
        return max(lengths, default=1)

    def ask(self, model: Any) -> list[Score]:
        """Every score of a model, on rank 0; an empty list on others. Every rank calls it. Raises UserError."""
        from lm_eval import simple_evaluate

        chosen, asked = self._chosen, "benchmark.tasks"
        with (
            progress.work("benchmarks"),
            _quietly(),
            reading(asked, "leave out the task at fault", "cannot be asked"),
        ):
            results = simple_evaluate(
                model,
                tasks=list(chosen.tasks),
                num_fewshot=chosen.fewshot,
                limit=chosen.limit,
                apply_chat_template=chosen.chat_template,
                fewshot_as_multiturn=chosen.chat_template,
                task_manager=self._manager,
                confirm_run_unsafe_code=chosen.allow_code,
            )
        return [] if results is None else list(_scores(results))


def _scores(results: Mapping[str, Any]) -> Iterator[Score]:
    groups = results.get("groups", {})
    parents = {child: group for group, children in results.get("group_subtasks", {}).items() for child in children}
    for task, numbers in {**groups, **results["results"]}.items():
        group = parents.get(task)
        while group is not None and group not in groups:
            group = parents.get(group)
        samples = (results.get("samples") or {}).get(task, [])
        for name, value in numbers.items():
            metric, _, filter_ = name.partition(",")
            if not filter_ or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}_stderr,{filter_}")
            each = [sample[metric] for sample in samples if sample["filter"] == filter_ and metric in sample]
            yield Score(
                task,
                metric,
                filter_,
                float(value),
                float(error) if isinstance(error, int | float) else None,
                len(each) or int(numbers.get("sample_len", 0)),
                _mean_of(each, float(value)),
                group,
            )


def _mean_of(each: Sequence[Any], value: float) -> tuple[float, ...] | None:
    """The questions' own values, where the score is their mean."""
    if not each or not all(isinstance(one, int | float) for one in each):
        return None
    return tuple(map(float, each)) if math.isclose(statistics.fmean(each), value, abs_tol=1e-9) else None


def difference(original: Score, other: Score) -> tuple[float, float | None]:
    """How much higher the other's value is, and the standard error of that.

    Of two models that answer the same questions it is that of the questions' own differences, sd / sqrt(n); where a
    score is no mean over questions, sqrt(e1^2 + e2^2) of two independent samples, which is too large as a rule.
    """
    change = other.value - original.value
    if original.each and other.each and len(original.each) == len(other.each) > 1:
        changes = [b - a for a, b in zip(original.each, other.each, strict=True)]
        return change, statistics.stdev(changes) / math.sqrt(len(changes))
    if original.error is None or other.error is None:
        return change, None
    return change, math.hypot(original.error, other.error)


@contextmanager
def _quietly() -> Iterator[None]:
    """While open, the harness draws no bars of its own beside this package's line, and does not ask git, the compiler
    and the driver about this machine, which takes seconds and is in ``results.json``."""
    with ExitStack() as stack:
        for name in ("get_git_commit_hash", "add_env_info", "add_tokenizer_info"):
            stack.enter_context(patch(f"{HARNESS}.evaluator.{name}", lambda *given: None))
        for name, module in list(sys.modules.items()):
            bar = getattr(module, "tqdm", None) if name.split(".")[0] == HARNESS else None
            if callable(bar):
                stack.enter_context(patch.object(module, "tqdm", partial(bar, disable=True)))
        yield
