"""A plan as text: a table for each phase, a row for each placement with the best of its options."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from heretic_ds.placements.costs import Cost
from heretic_ds.planner import Candidate, Plan

_GIB = 2**30
_WIDE = 120
"""Columns from which on options, what lies in memory, and why something does not fit, stand in the table; else below
it, so that no name is broken."""
_NARROW = 80
"""Columns below which names of columns are short."""
_SHORT = {"GiB a rank": "GiB", "all trials": "all"}
_TITLES = {
    "capture": "capture: the residuals of all training prompts",
    "evaluate": "evaluate: trials of edits, each with its answers and distributions",
}
_SECONDS = {"capture": ("load", "capture"), "evaluate": ("load", "a trial", "all trials")}


def machine_line(plan: Plan) -> str:
    """What the plan is for: ``llama with hardware=h100x8: 8 ranks, each on a GPU of 79.2 GiB``."""
    machine = plan.machine
    nodes = "" if machine.nodes == 1 else f" on {machine.nodes} computers"
    kind = {"cuda": "a GPU", "cpu": "a share of the cores"}[machine.device]
    counted = f"{plan.ranks} ranks{nodes}, each" if plan.ranks > 1 else "1 rank"
    memory = f"{_in_gib(machine.device_memory)} GiB"
    return f"{plan.model} with hardware={machine.name}: {counted} on {kind} with {memory}"


def phase_table(plan: Plan, phase: str, width: int) -> Group:
    """All placements of a phase, what is chosen first, for a console of so many columns."""
    wide, narrow, rows = width >= _WIDE, width < _NARROW, best_of_each(plan, phase)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 0 if narrow else 1))
    table.add_column("placement", no_wrap=not wide)
    for name in ("GiB a rank", *_SECONDS[phase]):
        table.add_column(_SHORT.get(name, name) if narrow else name, justify="right", no_wrap=True)
    for name in ("of which GiB", "fits") if wide else ("fits",):
        table.add_column(name, no_wrap=not wide)
    for candidate in rows:
        taken = candidate == plan.chosen.get(phase)
        verdict = "chosen" if taken else "yes" if candidate.fits else "no"
        reason = f"{verdict}: {candidate.why}" if verdict == "no" else verdict
        last = [_kinds(candidate.cost), reason] if wide else [verdict]
        cells = [_name(candidate, taken, with_options=wide), *_figures(candidate), *last]
        table.add_row(*map(Text, cells), style="bold" if taken else None)
    notes = [] if wide else list(_notes(rows))
    return Group(Text(_TITLES[phase], style="bold"), table, *notes, Text())


def best_of_each(plan: Plan, phase: str) -> Sequence[Candidate]:
    """A phase's candidates, the best of each placement: the one that is chosen, else the fastest that fits, else the
    one that needs the least memory. They are in that order, too."""

    def order(candidate: Candidate) -> tuple[bool, bool, bool, float, int, int]:
        cost = candidate.cost
        return (
            candidate != plan.chosen.get(phase),
            not candidate.fits,
            cost is None,
            candidate.seconds if candidate.fits else 0.0,
            len(candidate.options) if candidate.fits else 0,
            0 if cost is None else sum(cost.bytes.values()),
        )

    best: dict[str, Candidate] = {}
    for candidate in sorted((each for each in plan.candidates if each.phase == phase), key=order):
        best.setdefault(candidate.placement, candidate)
    return list(best.values())


def duration(seconds: float) -> str:
    """``0.031 s``, ``12 s``, ``5.0 min``, ``3.1 h``."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _notes(rows: Sequence[Candidate]) -> Iterator[Padding]:
    """Below a narrow table: its options, what lies in memory, and why something does not fit."""
    for candidate in rows:
        name = _name(candidate, False).strip()
        told = [candidate.why] if not candidate.fits else []
        if candidate.cost is not None:
            told.insert(0, f"{_kinds(candidate.cost)} (GiB)")
        yield Padding(Text(f"{name}: {'; '.join(told)}"), (0, 0, 0, 2))


def _figures(candidate: Candidate) -> list[str]:
    cost, names = candidate.cost, _SECONDS[candidate.phase]
    if cost is None:
        return ["-"] * (1 + len(names))
    each = cost.seconds["capture" if candidate.phase == "capture" else "trial"]
    in_all = "-" if math.isinf(candidate.seconds) else duration(candidate.seconds)
    shown = [duration(cost.seconds["load"]), duration(each), in_all]
    return [_in_gib(sum(cost.bytes.values())), *shown[: len(names)]]


def _kinds(cost: Cost | None) -> str:
    if cost is None:
        return "-"
    on_host = _listed(cost.host)
    return f"{_listed(cost.bytes)}; on the host {on_host}" if on_host else _listed(cost.bytes)


def _listed(sizes: Mapping[str, int]) -> str:
    """The largest first, without what is next to nothing."""
    ordered = sorted(((size, name) for name, size in sizes.items() if size > _GIB / 1000), reverse=True)
    return ", ".join(f"{name} {_in_gib(size)}" for size, name in ordered)


def _in_gib(number: float) -> str:
    value = number / _GIB
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _name(candidate: Candidate, taken: bool, with_options: bool = True) -> str:
    given = candidate.options.items() if candidate.cost is not None and with_options else ()
    options = "".join(f" {name} {value}" for name, value in given)
    return f"{'* ' if taken else '  '}{candidate.placement}{options}"
