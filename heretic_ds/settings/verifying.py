"""The group ``verify`` of :mod:`heretic_ds.settings`."""

from __future__ import annotations

from dataclasses import dataclass

from heretic_ds.settings.fields import within

AUTO_TEST, NO_TEST = "auto", "none"
"""What ``prompts.target.test.source`` may be beside a source of its own."""


@dataclass
class VerifySettings:
    """The final scores: of the export, read from disk again, beside the original, on prompts that the search never
    saw; ``docs/scores.md`` says what they mean."""

    final: bool = True
    """Score the export once more after it is written."""
    answer_tokens: int = within(256, ge=1)
    """Longest answer for these scores, in tokens; shorter where the model's context has no room for it."""
    kl_tokens: int = within(32, ge=1)
    """First tokens of the original's own answers, over which KL divergence and perplexity are taken."""
    resamples: int = within(2000, ge=100)
    """Bootstrap samples of the prompts that an interval is drawn from."""
    seed: int = within(0, ge=0)
    """Seed of these samples."""
    prompts: int = within(100, ge=1)
    """Most prompts of each kind that ``prompts.target.test.source=auto`` and ``prompts.baseline.test.source=auto``
    take."""
