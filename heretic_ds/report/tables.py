"""Trials as text: one line each while the search runs, and the Pareto front as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from heretic_ds.ablation.edit import Edit
from heretic_ds.ablation.profile import Profile
from heretic_ds.search.trials import TrialRecord


def kl_text(kl: float | None) -> str:
    """A KL divergence in nats with three significant digits."""
    return "-" if kl is None else f"{kl:.3g}"


def direction_text(edit: Edit) -> str:
    """Which direction an edit uses."""
    return "per layer" if edit.direction_index is None else f"global {edit.direction_index:.2f}"


def profile_text(profile: Profile | None) -> str:
    """``1.20 at 14.3, to 0.40 within 6.1``: largest weight and layer, weight at the foot and its distance."""
    if profile is None:
        return "-"
    if profile.max_weight == 0.0 and profile.min_weight == 0.0:
        return "not edited"
    return (
        f"{profile.max_weight:.2f} at {profile.max_weight_position:.1f}, "
        f"to {profile.min_weight:.2f} within {profile.min_weight_distance:.1f}"
    )


REFUSALS = "refusals"
"""Name of the scorer that counts prompts, so that its scores can be told as a share of them."""


def _score(number: float | None, prompts: int, scorer: str, width: int = 0) -> str:
    """A first score: ``3/100`` where it counts prompts, else a bare number."""
    text = f"{'-' if number is None else f'{number:g}':>{width}}"
    return f"{text}/{prompts}" if scorer == REFUSALS else text


def trial_line(record: TrialRecord, total: int, prompts: int, scorer: str = REFUSALS) -> str:
    """One finished trial in one line, of ``total`` trials and with ``prompts`` target eval prompts.

    ``scorer`` is the name of the first scorer, whose scores a record keeps as its ``refusals``. Trials are
    numbered as everywhere (from 0), so that the number can be given to ``export.trial``.
    """
    head = f"trial {record.index:>{len(str(total))}}"
    if not record.complete:
        return f"{head}  failed  {record.seconds:.1f} s"
    width = len(str(prompts))
    profiles = "  ".join(f"{name} {profile_text(profile)}" for name, profile in record.edit.profiles.items())
    return (
        f"{head}  {scorer} {_score(record.refusals, prompts, scorer, width)}  KL {kl_text(record.kl):<8}  "
        f"{record.seconds:.1f} s  {direction_text(record.edit)}  {profiles}"
    )


def pareto_table(
    records: Iterable[TrialRecord],
    front: Sequence[int],
    baseline_refusals: float,
    prompts: int,
    selected: int | None = None,
    scorer: str = REFUSALS,
) -> Table:
    """The Pareto front, fewest refusals first, below the original model; the selected trial is marked.

    Args:
        records: all finished trials.
        front: indices in the order of rows, from :func:`heretic_ds.search.pareto.pareto_front`.
        baseline_refusals: the original model's.
        prompts: number of target eval prompts.
        selected: index of the trial that is or would be exported.
        scorer: name of the first scorer, whose scores stand where refusals do.
    """
    by_index = {record.index: record for record in records}
    table = Table(title="Pareto front: trials that no other trial beats", title_justify="left")
    table.add_column("trial", justify="right")
    table.add_column(scorer, justify="right")
    table.add_column("KL (nats)", justify="right")
    table.add_column("direction")
    components = list(by_index[front[0]].edit.profiles) if front else []
    for component in components:
        table.add_column(f"{component}: weight at layer")
    table.add_row("original", _score(baseline_refusals, prompts, scorer), "0", *[""] * (1 + len(components)))
    table.add_section()
    for index in front:
        record = by_index[index]
        chosen = index == selected
        table.add_row(
            Text(f"* {index}" if chosen else str(index)),
            _score(record.refusals, prompts, scorer),
            kl_text(record.kl),
            direction_text(record.edit),
            *[profile_text(record.edit.profiles.get(component)) for component in components],
            style="bold" if chosen else None,
        )
    if selected is not None:
        table.caption = "* selected"
        table.caption_justify = "left"
    return table
