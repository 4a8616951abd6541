"""``task=plan``: figures for machines that are elsewhere and models that are not here, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from heretic_ds.conf_files import choice
from heretic_ds.placements.costs import Machine
from tests.e2e.conftest import Heretic, Material, files_below

Plan = dict[str, Any]


@pytest.fixture
def model(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of which nothing but its configuration is there."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    folder.mkdir()
    shutil.copy(material.model("llama") / "config.json", folder)
    return folder


@pytest.fixture
def large(model: Path) -> Path:
    """One of 70 billion parameters."""
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "dtype": "bfloat16"}
    config |= {"tie_word_embeddings": False}
    config.pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config))
    return model


def without_progress(text: str) -> str:
    """What was said, without how long it took to find out on a slow machine."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.endswith("so far)\n"))


@pytest.fixture
def planned(heretic: Heretic, tmp_path: Path) -> Callable[..., Plan]:
    """`planned(model, "hardware=h100x8")`: the plan as JSON, and what was printed as ``text``; nothing else written."""

    def run(model: Path, *words: str) -> Plan:
        before = files_below(tmp_path)
        outcome = heretic(model, "task=plan", "plan.json=plan.json", *words)
        assert (outcome.status, outcome.err) == (0, "")
        after = files_below(tmp_path)
        after.pop("plan.json")
        before.pop("plan.json", None)
        assert after == before
        plan: Plan = json.loads((tmp_path / "plan.json").read_text())
        return {**plan, "text": without_progress(outcome.out)}

    return run


def test_a_configuration_alone_is_planned_for(model: Path, planned: Callable[..., Plan]) -> None:
    plan = planned(model, "hardware=h100x8")
    assert (plan["ranks"], plan["smallest_devices"]) == (8, None)
    described = choice("hardware", "h100x8")
    assert plan["machine"] == {entry.name: described.get(entry.name, entry.default) for entry in fields(Machine)}
    assert {phase: each["placement"] for phase, each in plan["chosen"].items()} == dict.fromkeys(
        ("capture", "evaluate"), "replicated"
    )
    names = {(each["phase"], each["placement"]) for each in plan["candidates"]}
    assert {("capture", "zero3"), ("evaluate", "tensor_parallel"), ("evaluate", "kernel_inject")} <= names
    assert not any(name == "auto" for _, name in names)
    for each in plan["candidates"]:
        assert each["fits"] or each["why"], each
        if each["fits"]:
            assert each["cost"]["bytes"]["weights"] >= 0 and each["seconds"] > 0
    assert plan["sentence"].startswith("capture and evaluate=replicated for llama")


def test_what_is_printed_is_plain_in_a_pipe_and_says_all(model: Path, planned: Callable[..., Plan]) -> None:
    plan = planned(model, "hardware=rtx4090x2")
    text = plan["text"]
    assert "\x1b" not in text
    assert text.splitlines()[0] == "llama with hardware=rtx4090x2: 2 ranks, each on a GPU with 23.9 GiB"
    assert text.rstrip().endswith(plan["sentence"])
    for phase in ("capture", "evaluate"):
        rows = text.split(f"{phase}: ")[1].split("\n\n")[0].splitlines()
        placements = {each["placement"] for each in plan["candidates"] if each["phase"] == phase}
        named = [row.lstrip("* ").split()[0] for row in rows[3:] if row[:3].strip()]
        assert sorted(named) == sorted(placements)
        assert sum("chosen" in row for row in rows) == 1
    [refused] = [line for line in text.splitlines() if "expert_parallel" in line and "capture=" in line]
    assert "no: " in refused


@pytest.mark.parametrize("columns", [60, 80])
def test_narrow_terminals_lose_nothing(
    columns: int, large: Path, heretic: Heretic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every figure of the wide table, and no name of a placement in two pieces."""
    monkeypatch.setattr("heretic_ds.pipeline.console_of", lambda world: Console(width=columns))
    outcome = heretic(large, "task=plan", "hardware=h100x8")
    assert outcome.status == 0, outcome.err
    machine, *lines, sentence = without_progress(outcome.out).splitlines()
    assert max(map(len, lines)) <= columns and "…" not in outcome.out
    text = " ".join(outcome.out.split())
    assert "keys and values" in text and "replicated: " in text and "of a device's 79.2 GiB" in text
    assert ("GiB a rank" in text and "all trials" in text) or columns == 60
    first = [line.lstrip("* ").split()[0] for line in lines if line.strip()]
    for placement in ("tensor_parallel", "tensor_pipeline", "expert_parallel", "kernel_inject", "pipeline", "fsdp"):
        assert placement in first, placement
    assert machine.startswith("llama with") and sentence.startswith("capture")  # for tools: one line each


def test_what_does_not_fit_names_how_many_would_do(
    large: Path, heretic: Heretic, planned: Callable[..., Plan], tmp_path: Path
) -> None:
    outcome = heretic(large, "task=plan", "hardware=rtx4090", "plan.json=plan.json")
    assert outcome.status == 2
    [line] = outcome.err.splitlines()
    plan = json.loads((tmp_path / "plan.json").read_text())
    needed = plan["smallest_devices"]
    assert needed > 1 and f"{needed} such devices would" in line and "nothing holds llama" in line
    assert plan["chosen"]["evaluate"] is None
    assert "no: " in outcome.out  # the tables say why
    enough = planned(large, "hardware=rtx4090", f"hardware.devices_per_node={needed}", "hardware.host_memory=1e12")
    assert enough["ranks"] == needed and enough["chosen"]["evaluate"]["fits"]


def test_what_is_given_is_kept_and_the_rest_is_chosen(large: Path, planned: Callable[..., Plan]) -> None:
    plan = planned(large, "hardware=h100x8", "capture=zero3", "evaluate.degree=8")
    assert {each["placement"] for each in plan["candidates"] if each["phase"] == "capture"} == {"zero3"}
    assert plan["chosen"]["evaluate"]["placement"] != "replicated"
    kinds = {each["placement"] for each in plan["candidates"] if each["phase"] == "evaluate"}
    assert "tensor_parallel" in kinds and not {"replicated", "kernel_inject"} & kinds


def test_prompts_are_counted_where_they_are_here(
    model: Path, material: Material, planned: Callable[..., Plan], tmp_path: Path
) -> None:
    """A trial on ten times as many prompts takes longer, whether they are files or rows of a data set elsewhere."""

    def seconds(*words: str) -> float:
        return float(planned(model, "hardware=rtx4090", *words)["chosen"]["evaluate"]["cost"]["seconds"]["trial"])

    for kind in ("target", "baseline"):
        for lines in (300, 3000):
            (tmp_path / f"{kind}{lines}.txt").write_text("a plum\n" * lines)
    short, long = (
        [
            f"prompts.{kind}.eval.{key}"
            for kind in ("target", "baseline")
            for key in (f"source={kind}{n}.txt", "slice=null", "split=train")
        ]
        for n in (300, 3000)
    )
    assert seconds(*long) > 5 * seconds(*short)
    cut = [f"prompts.{kind}.eval.slice=0:3000" for kind in ("target", "baseline")]
    assert seconds(*cut) > 5 * seconds()


def test_this_machine_is_measured_once(
    model: Path, planned: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    here = ("model.device=cpu", "hardware.process_memory=4e8")  # what is asked each time
    first = planned(model, *here)
    assert first["machine"]["name"] == "local" and "measured this machine" in first["text"]
    again = planned(model, *here)
    assert again["machine"] == first["machine"] and "measured this machine" not in again["text"]
    told = planned(model, *here, "hardware.link_bandwidth=5e10", "hardware.devices_per_node=4")
    assert told["machine"] == first["machine"] | {"link_bandwidth": 5e10, "devices_per_node": 4}
    assert told["ranks"] == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hardware=h100"], "there is no hardware=h100; choose one of cpu_server, h100x8,"),
        (["hardware=h100x8", "hardware.link_bandwidth=null"], "hardware.link_bandwidth is missing; set it to a number"),
        (["hardware=rtx4090", "hardware.nodes=none"], "hardware.nodes is none; set it to a number above 0"),
        (["hardware.device_memory=-1"], "hardware.device_memory is -1; set it to a number above 0"),
        (["hardware.flops=1"], "there is no setting hardware.flops; "),
        (["plan.jason=x"], "there is no setting plan.jason; did you mean plan.json?"),
        (["plan.json=nowhere/x.json"], "plan.json=nowhere/x.json cannot be written: nowhere is no folder"),
        (["hardware=h100x8", "evaluate.degree=3"], "evaluate.degree=3 does not divide the world size 8"),
        (["hardware=h100x8", "evaluate.offload=cpu"], "evaluate.offload=cpu is for evaluate="),
        (["hardware=h100x8", "prompts.target.train.split=x[", "prompts.target.train.source=p.txt"], "cannot read"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, model: Path, heretic: Heretic, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n")
    before = files_below(tmp_path)
    outcome = heretic(model, "task=plan", *words)
    assert outcome.status == 2, outcome.out
    [line] = outcome.err.splitlines()
    assert line.startswith("heretic-ds: ") and said in line
    assert files_below(tmp_path) == before


def test_models_that_cannot_be_planned_for(model: Path, heretic: Heretic, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    outcome = heretic(model, "task=plan", "hardware=h100x8")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert f"{model} has no config.json" in outcome.err
    outcome = heretic(tmp_path / "nowhere", "task=plan", "hardware=h100x8")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1) and "there is no such folder" in outcome.err
    outcome = heretic("nobody/nothing", "task=plan", "hardware=h100x8")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1) and "the hub cannot be reached" in outcome.err
    outcome = heretic("some-model", "search.trials=3", "plan.json=x")
    assert outcome.status == 2 and "plan.json is set, but task=abliterate makes no plan" in outcome.err
