"""The group ``benchmark`` of :mod:`heretic_ds.settings`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from heretic_ds.settings.fields import within


@dataclass
class BenchmarkSettings:
    """What ``task=benchmark`` asks the original and the exported model, by lm-evaluation-harness (extra ``eval``)."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks and groups of the harness, or of your own in ``include``."""
    include: Optional[str] = None
    """Folder with tasks of your own, in the harness's YAML files; their ``!function`` lines run as Python code."""
    models: str = within("both", choices=("both", "original", "export"))
    """``both`` (side by side), ``original`` or ``export``: the model in ``export.dir``."""
    limit: Optional[int] = within(None, ge=1)
    """Questions of each task, the first ones; null: all of them, which is what others can compare with."""
    fewshot: Optional[int] = within(None, ge=0)
    """Solved examples before each question; null: each task's own number."""
    chat_template: bool = True
    """Whether questions are put by the model's chat template, examples as turns of the conversation."""
    allow_code: bool = False
    """Whether tasks may run that execute the code that a model answers with."""
