"""Which placement serves each phase best on a machine: by bytes, then by seconds.

A placement that needs more memory than there is, or that refuses the model, is not chosen. A model that fits on one
device lies whole on each: prompts are independent, so that such ranks need nothing of one another. Of other placements
the one that is done first is chosen, and of those that are done within a tenth of the same time the simplest. The phase
that captures takes the engine of the phase that evaluates unless another saves more time than loading it costs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from heretic_ds.errors import UserError
from heretic_ds.placements.base import Placement
from heretic_ds.placements.costs import Cost, Facts, Machine, Resources

log = logging.getLogger(__name__)

ALIKE = 1.1
"""Times that differ by less than that are taken for the same."""
BATCHES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""Rows a batch that are tried, the largest that fits being taken."""
LEAST_ROWS = 8
"""Rows of a batch that a whole model has to leave room for."""
MOST_NODES = 64
"""Computers up to which is looked for how many would do."""

Check = Callable[[Placement, int], object]
"""Raises UserError for a placement that this job, on so many ranks, cannot have."""


@dataclass(frozen=True)
class Candidate:
    """A placement with its options, for one phase."""

    phase: str
    placement: str
    options: Mapping[str, Any]
    """Those that differ from the defaults, such as ``{"degree": 4}``."""
    cost: Cost | None
    fits: bool
    why: str
    """Why it is not chosen, or what it takes."""
    made: Placement | None = field(default=None, repr=False, compare=False)
    seconds: float = float("inf")
    """Of the whole phase with loading."""


Acceptance = Callable[[Candidate, Callable[..., None]], bool]
"""Whether a candidate passes the check; a refusal is said by the second argument, a method of a logger."""


@dataclass(frozen=True)
class Plan:
    """What could be chosen, and what is."""

    model: str
    machine: Machine
    ranks: int
    candidates: Sequence[Candidate]
    chosen: Mapping[str, Candidate | None]
    """By phase."""
    sentence: str
    """The choice and its reason."""
    smallest_devices: int | None
    """Where nothing fits: how many such devices would do, if any number does."""

    def as_json(self) -> dict[str, Any]:
        """All of it, for a file."""
        return {
            "model": self.model,
            "machine": asdict(self.machine),
            "ranks": self.ranks,
            "candidates": [_told(candidate) for candidate in self.candidates],
            "chosen": {phase: each and _told(each) for phase, each in self.chosen.items()},
            "sentence": self.sentence,
            "smallest_devices": self.smallest_devices,
        }


def make_plan(
    facts: Facts,
    machine: Machine,
    ranks: int | None,
    placements: Mapping[str, Sequence[type[Placement] | Placement]],
    check: Check | None = None,
) -> Plan:
    """The plan for a model on a machine.

    ``ranks`` are those that the job has; None: one for each device. ``placements`` are those to choose from by phase:
    classes, whose options are tried out, or one that is made already and stays as it is.
    """
    resources = Resources(machine, ranks or machine.devices)
    found: list[Candidate] = []
    chosen: dict[str, Candidate | None] = {}
    for phase in sorted(placements, reverse=True):  # the engine that evaluates may capture as well
        tried = list(_candidates(facts, resources, phase, placements[phase]))
        found += tried
        prompts = facts.work.train_prompts if phase == "capture" else facts.work.target_prompts
        least = min(LEAST_ROWS, facts.work.batch or LEAST_ROWS, math.ceil(prompts / resources.ranks))
        accepted = _acceptance(check, resources.ranks)
        chosen[phase] = _best(tried, chosen.get("evaluate"), least, accepted)
    given = [phase for phase, each in placements.items() if len(each) == 1 and isinstance(each[0], Placement)]
    missing = any(each is None for each in chosen.values())
    smallest = _smallest(facts, machine, resources.ranks, placements, check) if missing else None
    return Plan(
        model=facts.name,
        machine=machine,
        ranks=resources.ranks,
        candidates=found,
        chosen=chosen,
        sentence=_sentence(facts, resources, found, chosen, smallest, given),
        smallest_devices=smallest,
    )


def _candidates(
    facts: Facts, resources: Resources, phase: str, placements: Sequence[type[Placement] | Placement]
) -> Iterator[Candidate]:
    for placement in placements:
        if isinstance(placement, Placement):
            yield _candidate(facts, resources, placement, {})
            continue
        for options in placement.variants(phase, facts, resources):
            yield _candidate(facts, resources, placement(phase, placement.Options(**options)), options)


def _candidate(facts: Facts, resources: Resources, placement: Placement, options: Mapping[str, Any]) -> Candidate:
    """A placement with the largest batch that fits."""

    def made(cost: Cost | None, why: str, seconds: float = math.inf) -> Candidate:
        fits = not math.isinf(seconds)
        return Candidate(placement.phase, placement.name, options, cost, fits, why, placement, seconds)

    cost, short = None, None
    if obstacle := placement.obstacle_to_packing(facts.packing):
        return made(None, obstacle)
    batches = [facts.work.batch] if facts.work.batch else BATCHES
    try:
        for rows in batches:
            cost = placement.cost(facts.with_batch(rows), resources)
            if cost is None:
                return made(None, f"{placement.name} does not say what it takes")
            short = cost.fits(resources)
            if short is None:
                break
    except UserError as error:
        return made(None, str(error))
    if short is not None or cost is None:
        return made(cost, short or "")
    return made(cost, "", _seconds(facts, cost))


def _seconds(facts: Facts, cost: Cost) -> float:
    """Of the whole phase, loading included."""
    return cost.seconds["load"] + cost.seconds.get("capture", 0.0) + facts.work.trials * cost.seconds.get("trial", 0.0)


def _best(
    tried: Sequence[Candidate], evaluating: Candidate | None, least: int, accepted: Acceptance
) -> Candidate | None:
    """A whole model on each rank where that fits, with at least so many rows; else the candidate that is done first."""

    def seconds(candidate: Candidate) -> float:
        loaded = evaluating is not None and (evaluating.placement, evaluating.options) == (
            candidate.placement,
            candidate.options,
        )
        return candidate.seconds - (candidate.cost.seconds["load"] if loaded and candidate.cost else 0.0)

    left = [candidate for candidate in tried if candidate.fits]
    whole = [each for each in left if each.made and each.made.whole and each.cost and each.cost.batch >= least]
    return _first(whole, seconds, accepted) or _first(left, seconds, accepted)


def _first(tried: Sequence[Candidate], seconds: Callable[[Candidate], float], accepted: Acceptance) -> Candidate | None:
    """The fastest of those that pass the check, or a simpler one that takes hardly longer."""
    left = list(tried)
    while left:
        soonest = min(map(seconds, left))
        alike = [candidate for candidate in left if seconds(candidate) <= ALIKE * soonest]
        best = min(alike, key=lambda candidate: (_burden(candidate), seconds(candidate)))
        if accepted(best, log.info):
            return best
        left.remove(best)
    return None


def _burden(candidate: Candidate) -> int:
    return candidate.made.burden if candidate.made else 0


def _acceptance(check: Check | None, ranks: int) -> Acceptance:
    def accepted(candidate: Candidate, say: Callable[..., None]) -> bool:
        if check is None or candidate.made is None:
            return True
        try:
            check(candidate.made, ranks)
        except UserError as error:
            say("%s=%s cannot be chosen: %s", candidate.phase, candidate.placement, error)
            return False
        return True

    return accepted


def _smallest(
    facts: Facts,
    machine: Machine,
    ranks: int,
    placements: Mapping[str, Sequence[type[Placement] | Placement]],
    check: Check | None,
) -> int | None:
    """The least number of such devices, on as many computers as they need, on which every phase finds a placement."""
    here = machine.devices_per_node
    least = facts.with_batch(1)
    counts = [*range(1, here), *(nodes * here for nodes in range(1, MOST_NODES + 1))]
    for count in counts:
        if count <= ranks or _is_short(facts, machine, count):
            continue
        larger = replace(machine, nodes=max(1, count // here), devices_per_node=min(count, here))
        resources, accepted = Resources(larger, count), _acceptance(check, count)
        served = (
            any(each.fits and accepted(each, log.debug) for each in _candidates(least, resources, phase, given))
            for phase, given in placements.items()
        )
        if all(served):
            return count
    return None


def _is_short(facts: Facts, machine: Machine, count: int) -> bool:
    """Whether the weights alone are more than so many devices hold: all rest there while answers are given."""
    everywhere = count / machine.devices_per_node * machine.host_memory if machine.device == "cpu" else math.inf
    return facts.held > min(count * machine.device_memory, everywhere)


def _sentence(
    facts: Facts,
    resources: Resources,
    tried: Sequence[Candidate],
    chosen: Mapping[str, Candidate | None],
    smallest: int | None,
    given: Sequence[str],
) -> str:
    """The choice and its reason, which is the user's for the phases that are ``given``."""
    machine, devices = resources.machine, _counted(resources)
    size = f"{facts.name} ({facts.held / 2**30:.1f} GiB of weights)"
    evaluate, capture = chosen.get("evaluate"), chosen.get("capture")
    if evaluate is None or capture is None:
        advice = f"{smallest} such devices would" if smallest else f"{MOST_NODES} such computers do not, either"
        during = "" if evaluate is capture else " while edits are evaluated" if capture else " during the capture"
        return f"nothing holds {size}{during} on {devices}; {advice}"
    same = (evaluate.placement, evaluate.options) == (capture.placement, capture.options)
    first = (
        f"capture and evaluate={_named(evaluate)}"
        if same
        else f"capture={_named(capture)}, evaluate={_named(evaluate)}"
    )
    if len(given) == 2:
        return f"{first} for {size} on {devices}: as given"
    open_ = capture if "evaluate" in given else evaluate
    known = f"{given[0]} as given; {open_.phase}: " if given else ""
    return f"{first} for {size} on {devices}: {known}{_reason(machine, tried, open_)}"


def _counted(resources: Resources) -> str:
    return f"{resources.ranks} device{'' if resources.ranks == 1 else 's'} of {resources.machine.name}"


def _named(candidate: Candidate) -> str:
    options = ", ".join(f"{name} {value}" for name, value in candidate.options.items())
    return f"{candidate.placement} ({options})" if options else candidate.placement


def _reason(machine: Machine, tried: Sequence[Candidate], best: Candidate) -> str:
    """Why a candidate was chosen for its phase."""
    others = [c for c in tried if c.phase == best.phase and c is not best]
    wholes = [c for c in others if c.made is not None and c.made.whole and c.cost is not None]
    whole = min(wholes, key=_burden, default=None)
    if best.made is not None and best.made.whole:
        return "it fits on one device, and every rank works on prompts of its own"
    second = min((c for c in others if c.fits and c.placement != best.placement), key=lambda c: c.seconds, default=None)
    short = f"{whole.placement} {whole.why}" if whole is not None and not whole.fits else "the fastest that fits"
    if second is None:
        return f"{short}, and nothing else fits"
    ratio = second.seconds / best.seconds
    beside = "about as fast as" if ratio < ALIKE else f"{ratio:.1f} times as fast as"
    return f"{short}; {beside} {_named(second)}"


def _told(candidate: Candidate) -> dict[str, Any]:
    """A candidate as plain values."""
    fields = ("phase", "placement", "fits", "why")
    told: dict[str, Any] = {name: getattr(candidate, name) for name in fields}
    told["options"] = dict(candidate.options)
    told["cost"] = asdict(candidate.cost) if candidate.cost else None
    told["seconds"] = None if math.isinf(candidate.seconds) else candidate.seconds
    return told
