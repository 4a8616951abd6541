"""Prompts of a scorer's own: where they come from, and how the model is given them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from heretic_ds.errors import UserError
from heretic_ds.foreign.text import in_one_line
from heretic_ds.prompts.batching import PromptSet, context_of
from heretic_ds.prompts.sources import Prompts, read_prompts
from heretic_ds.scoring.base import DistributionScorer, Scorer
from heretic_ds.settings import PromptSource
from heretic_ds.settings.nodes import options_of

USUAL = ("target.eval", "baseline.eval")
"""Lists of prompts that a scorer can name."""


@dataclass
class OwnPrompts:
    """What scorers are given in the place of target or baseline prompts, by their names."""

    asked: dict[str, Prompts] = field(default_factory=dict)
    """Prompts that are put to the model."""
    read: dict[str, Prompts] = field(default_factory=dict)
    """Texts that it is given as they are."""
    usual: dict[str, str] = field(default_factory=dict)
    """Names of the usual lists that others have; of every scorer that has neither."""


def setting_of(scorer: Scorer | DistributionScorer) -> str:
    """The override prefix that messages about a scorer's prompts name."""
    return f"scoring.scorers.{scorer.name}.prompts"


def read_own_prompts(scorers: Sequence[Scorer | DistributionScorer]) -> OwnPrompts:
    """Read what scorers name as their own prompts. Raises UserError, naming the scorer."""
    found = OwnPrompts()
    for scorer in scorers:
        source = _source(scorer.options.prompts, setting_of(scorer))
        reads = isinstance(scorer, DistributionScorer) and scorer.reads_text > 0
        if isinstance(source, PromptSource):
            (found.read if reads else found.asked)[scorer.name] = read_prompts(source, setting_of(scorer))
        else:
            found.usual[scorer.name] = source or USUAL[isinstance(scorer, DistributionScorer)]
    return found


def as_text(texts: Sequence[str], most: int, tokenizer: Any, config: PreTrainedConfig) -> PromptSet:
    """Texts as a model reads them: of each the first token, and at most ``most`` of those that follow."""
    most = min(most, (context_of(config) or most + 1) - 1)
    rows = [tokenizer(text)["input_ids"][: most + 1] for text in texts]
    return PromptSet(list(texts), [row[:1] for row in rows], [row[1:] for row in rows])


def _source(given: Any, setting: str) -> PromptSource | str | None:
    """The source, or the name of one of the usual lists."""
    if given is None or given in USUAL:
        return given
    if isinstance(given, str):
        return PromptSource(source=given)
    if not isinstance(given, Mapping):
        raise UserError(
            f"{setting} is {in_one_line(str(given), 60)}; give {' or '.join(USUAL)}, a file, or {{source: ...}}"
        )
    return options_of(PromptSource, given, setting)
