"""A plan as text: a table for each phase, a row for each placement with the best of its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from heretic_ds.placements.costs import Cost
from heretic_ds.planner import Candidate, Plan

_GIB = 2**30
_WIDE = 120
"""Columns from which on what lies in memory has a column of its own."""
_MEANINGS = {"capture": "residuals of all training prompts", "evaluate": "one trial, of many"}


def machine_line(plan: Plan) -> str:
    """What the plan is for: ``llama on h100x8: 8 cuda devices of 79.6 GiB, 1 node``."""
    machine = plan.machine
    nodes = "" if machine.nodes == 1 else f" on {machine.nodes} computers"
    kind = {"cuda": "GPU", "cpu": "part of a CPU"}[machine.device]
    counted = f"{plan.ranks} ranks" if plan.ranks > 1 else "1 rank"
    return f"{plan.model} with hardware={machine.name}: {counted}{nodes}, each a {kind} with {gib(machine.device_memory)}"


def phase_table(plan: Plan, phase: str, width: int) -> Table:
    """All placements of a phase, the fastest that fit first, in a table that a console of so many columns can show."""
    wide = width >= _WIDE
    title = f"{phase}: {_MEANINGS[phase]}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    table.add_column("placement", no_wrap=True)
    for name in ("GiB a rank", "load", "phase"):
        table.add_column(name, justify="right", no_wrap=not wide)
    if wide:
        table.add_column("of which GiB", ratio=2)
    table.add_column("fits", ratio=2, overflow="fold")
    chosen = plan.chosen.get(phase)
    for candidate in best_of_each(plan, phase):
        cost, taken = candidate.cost, candidate == chosen
        figures = ["-"] * 3 if cost is None else _figures(cost, phase)
        kinds = "" if cost is None else _kinds(cost)
        verdict = _verdict(candidate, taken)
        last = [kinds, verdict] if wide else [f"{verdict}\n{kinds}" if kinds else verdict]
        table.add_row(Text(_name(candidate, taken)), *figures, *map(Text, last), style="bold" if taken else None)
    return table


def best_of_each(plan: Plan, phase: str) -> Sequence[Candidate]:
    """A phase's candidates, the best of each placement: the one that is chosen, else the fastest that fits, else the
    one that needs the least memory. The fastest come first."""

    def order(candidate: Candidate) -> tuple[bool, bool, bool, float, int]:
        cost = candidate.cost
        return (
            candidate != plan.chosen.get(phase),
            not candidate.fits,
            cost is None,
            candidate.seconds if candidate.fits else 0.0,
            0 if cost is None else sum(cost.bytes.values()),
        )

    best: dict[str, Candidate] = {}
    for candidate in sorted((each for each in plan.candidates if each.phase == phase), key=order):
        best.setdefault(candidate.placement, candidate)
    return list(best.values())


def gib(number: float) -> str:
    """``79.6 GiB``."""
    return f"{_in_gib(number)} GiB"


def duration(seconds: float) -> str:
    """``0.031 s``, ``12 s``, ``5.0 min``, ``3.1 h``."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _figures(cost: Cost, phase: str) -> list[str]:
    passed = cost.seconds["capture" if phase == "capture" else "trial"]
    return [_in_gib(sum(cost.bytes.values())), duration(cost.seconds["load"]), duration(passed)]


def _kinds(cost: Cost) -> str:
    told = _listed(cost.bytes)
    on_host = {name: size for name, size in cost.host.items() if size}
    return f"{told}; host: {_listed(on_host)}" if on_host else told


def _listed(sizes: Mapping[str, int]) -> str:
    ordered = sorted(((size, name) for name, size in sizes.items() if size), reverse=True)
    return ", ".join(f"{name} {_in_gib(size)}" for size, name in ordered)


def _in_gib(number: float) -> str:
    value = number / _GIB
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _name(candidate: Candidate, taken: bool) -> str:
    options = ", ".join(f"{name} {value}" for name, value in candidate.options.items())
    return f"{'* ' if taken else '  '}{candidate.placement}{f' ({options})' if options else ''}"


def _verdict(candidate: Candidate, taken: bool) -> str:
    if taken:
        return "yes, chosen"
    return f"yes: {candidate.why}" if candidate.fits else f"no: {candidate.why}"
