"""The planner's parts: costs beside what is really laid out, plans, descriptions of machines, measurements of this."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from heretic_ds.errors import UserError
from heretic_ds.placements.base import Engine, Placement
from heretic_ds.placements.costs import Cost, Facts, Resources, Use, Work, divisors, estimate
from heretic_ds.placements.costs.machine import LIBRARIES
from heretic_ds.placements.costs.memory import ALLOCATOR, UNEVEN
from heretic_ds.placements.fsdp import Fsdp
from heretic_ds.placements.fsdp.units import bytes_cut
from heretic_ds.placements.replicated import Replicated
from heretic_ds.placements.tensor_parallel import TensorParallel
from heretic_ds.placements.tensor_pipeline import TensorPipeline
from heretic_ds.placements.zero3 import Zero3
from heretic_ds.planner import calibrate, machine_here, machine_of, make_plan, placements_for, work_of
from heretic_ds.settings import Settings, conf_dir
from tests import families
from tests.planned_models import facts_for, planned

MACHINES = sorted(file.stem for file in (conf_dir() / "hardware").glob("*.yaml") if OmegaConf.load(file).get("nodes"))


def machine(name: str) -> Any:
    return machine_of(OmegaConf.load(conf_dir() / "hardware" / f"{name}.yaml"))


def small(family: str) -> Facts:
    """A tiny model of a family, as the planner sees it."""
    return facts_for(family, families.build(family).config, torch.float32)


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "mixtral", "qwen3_moe", "gpt_neox", "deepseek_v2", "deepseek_v3", "phi3"]
)
def test_facts_are_those_of_the_model(family: str) -> None:
    """Parts add up to the model, and a token's keys and values are what a cache takes."""
    facts = small(family)
    beside = facts.embedding + (0 if facts.tied else facts.head)
    assert sum(facts.blocks) + beside <= facts.weights <= sum(facts.blocks) + beside + 0.1 * facts.weights
    assert (facts.experts is not None) is (family in ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"))
    if facts.experts is not None:
        assert 0 < facts.experts.bytes < facts.weights
        assert facts.experts.touched(1) == pytest.approx(facts.experts.per_token)
        assert facts.experts.touched(10_000) == pytest.approx(facts.experts.number)
    model = families.build(family)
    cache = model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    taken = sum(each.nbytes for layer in cache.layers for each in (layer.keys, layer.values))
    assert 3 * facts.cached == taken


def test_equal_parts_are_counted_with_their_padding() -> None:
    """FSDP cuts rows, and what does not divide is padded."""
    facts = small("llama")
    assert bytes_cut(facts.model, 2) == facts.weights // 2  # all of its rows are even numbers
    assert facts.weights / 3 < bytes_cut(facts.model, 3) < 1.1 * facts.weights / 3


def test_the_largest_batch_that_fits_is_taken() -> None:
    """As memory shrinks batches do, until none fits, and the reason names both sizes."""
    facts, gpu = planned("8B"), machine("rtx4090")
    rows, choice = [], {"evaluate": [Replicated], "capture": [Replicated]}
    for memory in (40e9, 26e9, 22e9, 18e9):
        chosen = make_plan(facts, replace(gpu, device_memory=memory), 1, choice).chosen["evaluate"]
        rows.append(chosen.cost.batch if chosen is not None and chosen.cost is not None else 0)
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == 256
    assert rows[-1] == 0
    given = make_plan(facts.with_batch(3), gpu, 1, choice).chosen["evaluate"]
    assert given is not None and given.cost is not None and given.cost.batch == 3


def test_what_the_check_refuses_is_not_chosen() -> None:
    """The next best is, and where all are refused none."""
    facts, gpus = planned("8B"), machine("h100x8")
    choice = {phase: [Replicated, TensorParallel, Fsdp] for phase in ("evaluate", "capture")}

    def refuse(*names: str) -> Any:
        def check(placement: Placement, ranks: int) -> None:
            if placement.name in names:
                raise UserError(f"{placement.name} is not to be had")

        return make_plan(facts, gpus, None, choice, check).chosen["evaluate"]

    assert refuse().placement == "replicated"
    assert refuse("replicated").placement == "tensor_parallel"
    assert refuse("replicated", "tensor_parallel").placement == "fsdp"
    assert refuse("replicated", "tensor_parallel", "fsdp") is None


def test_devices_that_would_do_pass_the_check_too() -> None:
    """A count on which all that fits is refused is not named."""
    facts, gpu = planned("32B"), machine("rtx4090")
    choice = {phase: [Replicated, TensorParallel, Fsdp] for phase in ("evaluate", "capture")}

    def check(placement: Placement, ranks: int) -> None:
        if placement.name == "fsdp" or ranks < 8:
            raise UserError(f"{placement.name} does not serve this on {ranks} ranks")

    assert make_plan(facts, gpu, None, choice).smallest_devices == 4
    assert make_plan(facts, gpu, None, choice, check).smallest_devices == 8


def test_options_that_are_given_stay() -> None:
    """A placement that is made already is the only one of its phase, and keeps its options."""
    given = TensorParallel("evaluate", TensorParallel.Options(degree=2))
    plan = make_plan(planned("8B"), machine("h100x8"), None, {"evaluate": [given], "capture": [Replicated, Zero3]})
    assert plan.chosen["evaluate"] is not None and plan.chosen["evaluate"].made is given
    assert plan.chosen["capture"] is not None and plan.chosen["capture"].placement == "replicated"


class Mute(Placement):
    """Says nothing of what it takes."""

    name, phases = "mute", frozenset({"capture", "evaluate"})

    def build(self, job: Any) -> Engine:
        raise NotImplementedError


class Alike(Replicated):
    """Takes what ``replicated`` does, and is simpler or not."""

    name, whole, burden = "alike", False, 5

    @classmethod
    def variants(cls, phase: str, facts: Facts, resources: Resources) -> list[dict[str, Any]]:
        return [{}]

    def cost(self, facts: Facts, resources: Resources) -> Cost:
        return estimate(facts, resources, self.phase, Use(facts.weights, resources.ranks, reuses=True))


class Simpler(Alike):
    """The same, with less that can go wrong, and a tenth of a percent more to compute."""

    name, burden = "simpler", 4

    def cost(self, facts: Facts, resources: Resources) -> Cost:
        cost = super().cost(facts, resources)
        return replace(cost, seconds={name: 1.001 * value for name, value in cost.seconds.items()})


def test_a_placement_that_says_nothing_is_told_of_and_not_chosen() -> None:
    """One from outside the package may leave its cost open."""
    choice = {phase: [Mute, Simpler] for phase in ("evaluate", "capture")}
    plan = make_plan(planned("1B"), machine("h100x8"), None, choice)
    assert {c.placement: c.why for c in plan.candidates}["mute"] == "mute does not say what it takes"
    assert plan.chosen["evaluate"] is not None and plan.chosen["evaluate"].placement == "simpler"


def test_ties_go_to_the_simpler() -> None:
    """Within a tenth of the same time; one that is really faster wins."""
    for order in ([Alike, Simpler], [Simpler, Alike]):
        plan = make_plan(planned("1B"), machine("h100x8"), None, {"evaluate": order, "capture": order})
        assert plan.chosen["evaluate"] is not None and plan.chosen["evaluate"].placement == "simpler"


def test_a_plan_is_plain_json() -> None:
    """With every candidate, whether it fits, and what it takes."""
    choice = {phase: placements_for(phase) for phase in ("capture", "evaluate")}
    told = json.loads(json.dumps(make_plan(planned("70B"), machine("h100x8"), None, choice).as_json(), allow_nan=False))
    assert told["chosen"]["evaluate"]["cost"]["bytes"]["weights"] > 30e9
    assert told["machine"]["nodes"] == 1 and told["ranks"] == 8 and told["smallest_devices"] is None
    assert {each["placement"] for each in told["candidates"]} >= {"replicated", "tensor_parallel", "fsdp", "zero3"}


@pytest.mark.parametrize("name", MACHINES)
def test_described_machines_are_whole_and_have_sources(name: str) -> None:
    """Every number is there, and comments say where it is from."""
    described = machine(name)
    assert described.name == name and described.devices == described.nodes * described.devices_per_node
    text = (conf_dir() / "hardware" / f"{name}.yaml").read_text()
    assert text.count("#") >= 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_bandwidth": None}, "hardware.memory_bandwidth is missing; set it to a number above 0"),
        ({"process_memory": 0}, "hardware.process_memory is 0; set it to a number above 0"),
        ({"nodes": 0}, "hardware.nodes is 0; set it to a number above 0"),
        ({"nodes": 1.5}, "hardware.nodes is 1.5; set it to a whole number"),
        ({"flops_16bit": "fast"}, "hardware.flops_16bit is fast"),
        ({"device": "tpu"}, "hardware.device, which is cpu or cuda"),
        ({"memory": 1}, "there is no setting hardware.memory"),
    ],
)
def test_descriptions_with_mistakes_are_refused(change: dict[str, Any], message: str) -> None:
    """Each by one sentence that names the key."""
    given = {**asdict(machine("h100x8")), **change}
    with pytest.raises(UserError, match=message):
        machine_of({key: value for key, value in given.items() if value is not None})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Measurements of a moment, kept in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "_MOST_SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "_MATRIX", {"cpu": 64})
    monkeypatch.setattr(calibrate, "_STREAM_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(calibrate, "resident_memory", lambda: 2**29)
    return tmp_path / "heretic_ds"


def test_this_machine_is_measured_once(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time it is read; other thread counts are other machines."""
    here = machine_here(torch.device("cpu"))
    assert here.device == "cpu" and here.devices == 1 and here.flops_32bit > 1e6
    monkeypatch.setattr(calibrate, "_measure", lambda *args: pytest.fail("measured twice"))
    assert machine_here(torch.device("cpu")) == here
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(pytest.fail.Exception):
        machine_here(torch.device("cpu"))


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"name": "local"}'])
def test_a_damaged_cache_is_measured_anew(quick: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever lies there, and it is right afterwards."""
    machine_here(torch.device("cpu"))
    (file,) = quick.iterdir()
    file.write_text(damage)
    found = machine_here(torch.device("cpu"))
    assert "measured anew" in caplog.text
    assert replace(machine_of(json.loads(file.read_text())), process_memory=2**29) == found


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    quick: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file lies where the folder would be."""
    quick.write_text("")
    assert machine_here(torch.device("cpu")).name == "local"
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize(("kind", "ranks"), [(Replicated, 2), (TensorParallel, 2), (Fsdp, 2), (TensorPipeline, 4)])
def test_what_is_installed_is_in_the_plan(
    quick: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Placement], ranks: int
) -> None:
    """What a process has imported is asked of it each time, and not kept: packages come and go."""
    facts, taken = small("llama"), []
    for size in (300 * 2**20, 500 * 2**20):
        monkeypatch.setattr(calibrate, "resident_memory", lambda size=size: size)
        cost = kind("evaluate", kind.Options()).cost(facts, Resources(machine_here(torch.device("cpu")), ranks))
        assert cost is not None
        taken.append(sum(cost.host.values()) + sum(cost.bytes.values()))
    assert taken[1] - taken[0] == 200 * 2**20


def test_described_machines_have_a_process_of_this_package_alone() -> None:
    """Unless its description says what a process takes."""
    given = asdict(machine("cpu_server"))
    del given["process_memory"]
    for here, taken in ((machine_of(given), LIBRARIES), (machine_of({**given, "process_memory": 1e9}), 10**9)):
        cost = Replicated("capture", Replicated.Options()).cost(small("llama"), Resources(here, 2))
        assert cost.host["libraries"] == taken + ALLOCATOR


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_originals_are_kept_of_what_is_edited_in_place(family: str) -> None:
    """Of packed weights none are; fused experts are never packed."""
    plain, packed = small(family), replace(small(family), packing="bnb_8bit", _known={})
    found = []
    for facts in (plain, packed):
        cost = Replicated("evaluate", Replicated.Options()).cost(facts, Resources(machine("h100x8"), 1))
        found.append(cost.host.get("originals", 0))
    writers = plain.anatomy.writers
    experts = sum(plain.sizes[writer.weight] for writer in writers if writer.experts is not None)
    assert found == [sum(plain.sizes[writer.weight] for writer in writers), experts]
    assert (experts > 0) is (family == "mixtral") and packed.packed


def test_work_follows_settings_and_prompts() -> None:
    """Without prompts usual numbers are assumed."""
    settings = Settings()
    settings.generation.max_new_tokens, settings.search.trials_per_pass = 33, "2"
    lengths = {"target.train": [3, 5], "baseline.train": [4], "target.eval": [10], "baseline.eval": [2, 6]}
    work = work_of(settings, lengths)
    assert (work.train_prompts, work.target_prompts, work.baseline_prompts) == (3, 1, 2)
    assert (work.prompt_tokens, work.longest_prompt) == (5.0, 10)
    assert (work.new_tokens, work.together) == (33, 2)
    assert work_of(Settings()).train_prompts == Work().train_prompts


def test_slower_links_cost_split_models_more_than_replicas() -> None:
    """Seconds of a trial on a tenth of the bandwidth and ten times the latency."""
    fast = machine("h100x8")
    slow = replace(fast, link_bandwidth=fast.link_bandwidth / 10, link_latency=10 * fast.link_latency)
    facts = planned("8B").with_batch(32)

    def trial(placement: Placement, here: Any) -> float:
        cost = placement.cost(facts, Resources(here, 8))
        assert cost is not None
        return cost.seconds["trial"]

    whole = Replicated("evaluate", Replicated.Options())
    split = TensorParallel("evaluate", TensorParallel.Options(degree=8))
    assert trial(whole, slow) == trial(whole, fast)
    assert trial(split, slow) > 1.5 * trial(split, fast)


def test_divisors() -> None:
    """In order, each once."""
    assert [divisors(n) for n in (1, 12, 16)] == [[1], [1, 2, 3, 4, 6, 12], [1, 2, 4, 8, 16]]


def test_experts_take_more_than_their_mean_of_memory() -> None:
    """The allocator holds more where tokens come and go unevenly, and a rank's own experts may get twice the mean."""
    here = Resources(machine("h100x8"), 8)

    def evaluated(facts: Facts, sharers: int = 1) -> Cost:
        return estimate(facts.with_batch(8), here, "evaluate", Use(facts.weights, 8, sharers=sharers))

    experts = planned("8x7B")
    of_allocator = [evaluated(facts).host["libraries"] for facts in (planned("8B"), experts)]
    assert of_allocator[1] - of_allocator[0] == UNEVEN
    alone, shared, more = (evaluated(experts, sharers).bytes["activations"] for sharers in (1, 2, 8))
    assert alone < shared == more < 2 * alone
