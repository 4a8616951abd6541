"""Final scores in the order and the words in which people read them: on the card, in tables, on the report's page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from heretic_ds.foreign.text import in_one_line

_LABELS = {
    "kl_first_token": "KL divergence, first token",
    "kl": "KL divergence, {kl_tokens} tokens",
    "perplexity": "perplexity of the original's answers",
    "tokens": "tokens of an answer",
    "token_repetition": "repetition",
}
"""Of scores that are not a scorer's own, in their order."""


@dataclass(frozen=True)
class FinalRow:
    """One final score."""

    kind: str
    """Of the prompts: ``target`` or ``baseline``."""
    name: str
    label: str
    prompts: int
    counts: bool
    """Whether it counts prompts."""
    original: Mapping[str, float | None] | None
    """``score`` with the ends ``low`` and ``high`` of its interval; None of a comparison."""
    edited: Mapping[str, float | None]
    change: Mapping[str, float | None] | None


def final_rows(final: Mapping[str, Any]) -> Iterator[FinalRow]:
    """The rows of ``final`` in ``results.json``: by kind of prompts, scorers' own scores first."""
    for kind, scores in final["scores"].items():
        order = [name for name in scores if name not in _LABELS] + [name for name in _LABELS if name in scores]
        for name in order:
            found = scores[name]
            yield FinalRow(
                kind=kind,
                name=name,
                label=worded(_LABELS, name, final),
                prompts=found["prompts"] or final["prompts"][kind]["prompts"],
                counts=found["combine"] == "sum",
                original=found["original"],
                edited=found["edited"],
                change=found["change"],
            )


def worded(labels: Mapping[str, str], name: str, final: Mapping[str, Any]) -> str:
    """What a score is called: by a table of ours, else its scorer's own name, in one line."""
    return labels[name].format(kl_tokens=final["kl_tokens"]) if name in labels else in_one_line(name, 80)


def number_text(value: float | None, counts: bool = False, digits: int = 3) -> str:
    """A number with so many digits that count; of counts, which may be large, one place."""
    if value is None:
        return "-"
    if counts:
        return f"{value:.1f}".removesuffix(".0")
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def range_text(scored: Mapping[str, float | None], counts: bool = False, between: str = " to ", digits: int = 3) -> str:
    """``0.9 to 1.2``; empty where there is no interval."""
    low, high = scored["low"], scored["high"]
    if low is None or high is None:
        return ""
    low_text, high_text = (number_text(end, counts, digits) for end in (low, high))
    return f"{low_text}{between}{high_text}"
