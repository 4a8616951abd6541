"""The choice among finished trials, on raw refusals and raw KL."""

from __future__ import annotations

from collections.abc import Iterable

from heretic_ds.search.trials import TrialRecord


def _scored(records: Iterable[TrialRecord]) -> list[tuple[float, float, int, TrialRecord]]:
    """Complete trials with their two numbers, of which less is better, and their index, in the order in which they are
    to be tried."""
    return sorted(
        (record.aim, record.kl, record.index, record)
        for record in records
        if record.complete and record.refusals is not None and record.kl is not None
    )


def pareto_front(records: Iterable[TrialRecord]) -> list[int]:
    """Indices of the trials that no other trial beats, from the fewest refusals (of a first scorer that is maximised:
    from the highest number) to the lowest KL.

    A trial is beaten by one that is at least as good in both numbers and better in one. Of trials with equal
    numbers the first one stands for all.
    """
    front, lowest_kl = [], float("inf")
    for _, kl, index, _ in _scored(records):
        if kl < lowest_kl:
            front.append(index)
            lowest_kl = kl
    return front


def candidates(records: Iterable[TrialRecord], max_kl: float) -> list[TrialRecord]:
    """Trials with a KL of at most ``max_kl`` (nats) in the order in which they are to be tried.

    Fewest refusals first, ties to the lower KL, then to the earlier trial. The rest of the list is for when
    the first one's KL, measured again on really edited weights, turns out above ``max_kl``.
    """
    return [record for _, kl, _, record in _scored(records) if kl <= max_kl]


def closest(records: Iterable[TrialRecord]) -> TrialRecord | None:
    """The trial with the lowest KL, to name when none is within the limit; None without complete trials."""
    return min(_scored(records), key=lambda entry: entry[1], default=(None,))[-1]
