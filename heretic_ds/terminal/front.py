"""What the menu says of the trials on the front: their scores, which one the rule takes, what its KL means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from heretic_ds.search.pareto import candidates, closest

if TYPE_CHECKING:
    from heretic_ds.search.trials import TrialRecord

REFUSALS = "refusals"


def trial_label(record: TrialRecord, scorer: str = REFUSALS) -> str:
    """A trial with its two scores: ``trial 7: 1 refusal, KL 0.0625``."""
    return f"trial {record.index}: {_score(record, scorer)}, KL {_kl(record)}"


def rule_choice(records: Sequence[TrialRecord], max_kl: float) -> int | None:
    """Index of the trial that a run without a menu would try first; None where none is within `max_kl` (nats)."""
    first = next(iter(candidates(records, max_kl)), None)
    return None if first is None else first.index


def about_the_rule(records: Sequence[TrialRecord], max_kl: float, scorer: str = REFUSALS) -> str:
    """Which trial a run without a menu would choose and why, and what its KL means; empty without finished trials."""
    first = next(iter(candidates(records, max_kl)), None)
    if first is not None:
        best = "most" if first.maximize else "fewest"
        chosen = f"a run without a menu would choose trial {first.index}: the {best} {scorer} with a KL of at most"
        return f"{chosen} {max_kl:g} (export.max_kl). {_meaning(first)}"
    nearest = closest(records)
    if nearest is None:
        return ""
    none = f"no trial has a KL of at most {max_kl:g} (export.max_kl); the closest is trial {nearest.index}"
    return f"{none}. {_meaning(nearest)}"


def most_moved(kl: float) -> float:
    """Largest share of probability that can lie on other tokens, in [0, 1], given a KL divergence in nats.

    The total variation distance is at most √(KL / 2) (Pinsker) and at most √(1 - exp(-KL)) (Bretagnolle and Huber).
    Both are concave, so they bound the mean distance over prompts by the mean KL too.
    """
    return min(math.sqrt(kl / 2), math.sqrt(-math.expm1(-kl)))


def _meaning(record: TrialRecord) -> str:
    if record.kl is None:
        return ""
    return (
        f"Its KL of {_kl(record)} means that at most {_percent(most_moved(record.kl))} of the probability of an "
        "answer's first token moved to other tokens, on average over the baseline prompts."
    )


def _percent(share: float) -> str:
    """In percent with two digits, rounded up, so that what is said stays a bound."""
    if share == 0.0:
        return "0 %"
    step = 10.0 ** (math.floor(math.log10(100 * share)) - 1)
    return f"{math.ceil(100 * share / step) * step:.3g} %"


def _score(record: TrialRecord, scorer: str) -> str:
    if record.refusals is None:
        return f"{scorer} unknown"
    if scorer != REFUSALS:
        return f"{scorer} {record.refusals:g}"
    return f"{record.refusals:g} refusal" + ("" if record.refusals == 1 else "s")


def _kl(record: TrialRecord) -> str:
    return "unknown" if record.kl is None else f"{record.kl:.3g}"
