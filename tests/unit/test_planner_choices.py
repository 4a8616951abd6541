"""What ``auto`` chooses: published shapes of models on described machines, each with the expected choice and why.

The expectations follow from bytes and seconds. A model that fits on one device lies whole on each of them. One that
does not is split where links are fast, laid out in stages where they are slow, and in both ways over computers.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from omegaconf import OmegaConf

from heretic_ds.placements.costs import Machine
from heretic_ds.planner import Plan, machine_of, make_plan, placements_for
from heretic_ds.settings import conf_dir
from tests.planned_models import planned

WHOLE = "every rank works on prompts of its own"
PCIE, NVLINK, NODES = "2 devices of rtx4090x2", "8 devices of h100x8", "32 devices of h100x8x4"

CASES = [
    # model, machine, what is chosen for both phases, a part of the sentence
    ("1B", "rtx4090", "replicated", WHOLE),
    ("1B", "rtx4090x2", "replicated", PCIE),
    ("1B", "h100x8", "replicated", NVLINK),
    ("1B", "h100x8x4", "replicated", NODES),
    ("1B", "cpu_server", "replicated", WHOLE),
    ("8B", "rtx4090", "replicated", "15.0 GiB of weights"),
    ("8B", "rtx4090x2", "replicated", WHOLE),
    ("8B", "h100x8", "replicated", WHOLE),
    ("8B", "h100x8x4", "replicated", WHOLE),
    ("8B", "cpu_server", "replicated", WHOLE),
    ("14B", "rtx4090", None, "nothing holds 14B .* on 1 device of rtx4090; 2 such devices would"),
    ("14B", "rtx4090x2", "pipeline degree=2", "replicated needs .* GiB.*; .* times as fast as tensor_parallel"),
    ("14B", "h100x8", "replicated", WHOLE),
    ("32B", "rtx4090", None, "4 such devices would"),
    ("32B", "rtx4090x2", None, "4 such devices would"),
    ("32B", "h100x8", "replicated", WHOLE),
    ("32B", "h100x8x4", "replicated", WHOLE),
    ("32B", "cpu_server", "replicated", WHOLE),
    ("70B", "rtx4090", None, "8 such devices would"),
    ("70B", "rtx4090x2", None, "8 such devices would"),
    ("70B", "h100x8", "tensor_parallel degree=4", "replicated needs 134 GiB of a device's 79.2 GiB"),
    ("70B", "h100x8x4", "tensor_parallel degree=8", "about as fast as pipeline"),
    ("70B", "cpu_server", "replicated", WHOLE),
    ("70B", "8 computers", "pipeline degree=4", "times as fast as tensor_parallel"),
    ("70B", "8 over PCIe", "pipeline degree=4", "times as fast as tensor_p"),
    ("405B", "h100x8", None, "nothing holds 405B .* on 8 devices of h100x8; 16 such devices would"),
    ("405B", "h100x8x4", "tensor_pipeline tensor_degree=8 pipeline_degree=2", "times as fast as pipeline"),
    ("405B", "cpu_server", None, "4 such devices would"),
    ("8x7B", "rtx4090x2", None, "6 such devices would"),
    ("8x7B", "h100x8", "tensor_parallel degree=4", "as fast as expert_parallel"),
    ("8x7B", "h100x8x4", "tensor_parallel degree=8", "replicated needs"),
    ("8x7B", "cpu_server", "replicated", WHOLE),
    ("30B-A3B", "rtx4090x2", None, "4 such devices would"),
    ("30B-A3B", "h100x8", "replicated", WHOLE),
    ("30B-A3B", "cpu_server", "replicated", WHOLE),
    ("235B-A22B", "h100x8", "tensor_pipeline tensor_degree=4 pipeline_degree=2", "times as fast as pipeline"),
    ("235B-A22B", "h100x8x4", "tensor_pipeline tensor_degree=4 pipeline_degree=4", "as fast as expert_parallel"),
    ("235B-A22B", "cpu_server", "expert_parallel degree=2", "2 ranks need .* of a host's 954 GiB"),
    ("671B", "rtx4090", None, "64 such computers do not, either"),
    ("671B", "h100x8", None, "32 such devices would"),
    ("671B", "h100x8x4", "tensor_pipeline tensor_degree=8 pipeline_degree=4", "as fast as tensor_parallel"),
    ("671B", "cpu_server", None, "6 such devices would"),
    ("1T", "h100x8x4", None, "nothing holds 1T .* on 32 devices of h100x8x4; 56 such devices would"),
    ("1T", "cpu_server", None, "8 such devices would"),
]


@cache
def machine(name: str) -> Machine:
    """A described machine, or one of two that are made of one by worse ways between its devices."""
    if name == "8 computers":  # of one device each, on a network of 10 Gbit/s
        return replace(machine("h100x8"), name=name, nodes=8, devices_per_node=1, network_bandwidth=1.2e9)
    if name == "8 over PCIe":
        return replace(machine("h100x8"), name=name, link_bandwidth=25e9)
    return machine_of(OmegaConf.load(conf_dir() / "hardware" / f"{name}.yaml"))


def plan_for(model: str, name: str, ranks: int | None = None) -> Plan:
    """The plan among all placements that there are."""
    choice = {phase: placements_for(phase) for phase in ("capture", "evaluate")}
    return make_plan(planned(model), machine(name), ranks, choice)


def told(plan: Plan, phase: str) -> str | None:
    """A choice with its options."""
    chosen = plan.chosen[phase]
    return chosen and " ".join([chosen.placement, *(f"{name}={value}" for name, value in chosen.options.items())])


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.parametrize(("model", "name", "expected", "why"), CASES, ids=lambda value: str(value)[:30])
def test_choice_and_reason(model: str, name: str, expected: str | None, why: str) -> None:
    """Both phases share one placement, and the sentence says what it is and why."""
    plan = plan_for(model, name)
    assert told(plan, "evaluate") == expected, plan.sentence
    if expected is not None:
        assert told(plan, "capture") == expected, plan.sentence
        assert plan.sentence.startswith(f"capture and evaluate={expected.split()[0]}")
        assert plan.smallest_devices is None
    assert re.search(why, plan.sentence), plan.sentence


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("evaluate",), "evaluate as given; capture: "),
        (("capture",), "capture as given; evaluate: "),
        (("capture", "evaluate"), "as given"),
    ],
)
def test_what_the_user_gives_needs_no_reason(given: tuple[str, ...], why: str) -> None:
    """Nothing else was tried for it; so it is not said that nothing else fits."""
    choice: dict[str, Any] = {phase: placements_for(phase) for phase in ("capture", "evaluate")}
    [pipeline] = [kind for kind in choice["evaluate"] if kind.name == "pipeline"]
    choice |= {phase: [pipeline(phase, pipeline.Options(degree=8))] for phase in given}
    sentence = make_plan(planned("70B"), machine("h100x8"), None, choice).sentence
    reason = sentence.split(" of h100x8: ")[1]
    assert reason.startswith(why) and (len(given) < 2 or reason == why), sentence
    assert "nothing else fits" not in reason, sentence


@pytest.mark.parametrize("name", ["h100x8", "cpu_server", "8 computers"])
@pytest.mark.parametrize("model", ["8B", "70B", "8x7B"])
def test_what_is_chosen_fits(model: str, name: str) -> None:
    """By the bytes that the plan itself says, a tenth of each memory is left; what does not fit says why."""
    plan, here = plan_for(model, name), machine(name)
    for candidate in plan.candidates:
        if candidate.cost is None:
            assert not candidate.fits
            assert candidate.why
            continue
        device, host = sum(candidate.cost.bytes.values()), sum(candidate.cost.host.values())
        total = here.devices_per_node * (device + host if here.device == "cpu" else host)
        room = (here.device == "cpu" or device <= 0.9 * here.device_memory) and total <= 0.9 * here.host_memory
        assert candidate.fits is room or here.device == "cpu", candidate
        assert candidate.fits is not bool(candidate.why)
    assert all(chosen is None or chosen.fits for chosen in plan.chosen.values())


def test_one_rank_is_replicated() -> None:
    """Without ranks nothing else is chosen, wherever it fits."""
    for name in ("rtx4090", "rtx4090x2", "h100x8", "cpu_server"):
        assert told(plan_for("8B", name, ranks=1), "evaluate") == "replicated"
