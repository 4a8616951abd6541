"""``capture=auto evaluate=auto`` on real ranks: one decides, all follow, and a run that goes on keeps what it had."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import families
from tests.distributed import auto_ranks
from tests.distributed.auto_ranks import open_run
from tests.distributed.ranks import Ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

Open = Callable[..., dict[str, Any]]


@pytest.fixture
def open_on(ranks: Callable[[int], Ranks], tmp_path: Path) -> Open:
    """`open_on(2, "evaluate=auto")`: how the ranks of a run lie, which all of them have to say alike."""
    families.save("llama", tmp_path / "llama")
    words = auto_ranks.prompt_words(tmp_path)

    def run(count: int, *more: str) -> dict[str, Any]:
        first, *others = ranks(count).run(open_run, model=str(tmp_path / "llama"), words=[*words, *more])
        for other in others:
            assert other.get("placed") == first.get("placed") and other.get("error") == first.get("error")
        return first

    return run


def placements(found: dict[str, Any]) -> tuple[str, str]:
    assert "placed" in found, found
    return found["placed"]["capture"]["placement"], found["placed"]["evaluate"]["placement"]


def test_what_fits_lies_whole_on_every_rank_and_the_folder_keeps_it(open_on: Open, tmp_path: Path) -> None:
    found = open_on(2)
    assert placements(found) == ("replicated", "replicated")
    assert [line for line in found["said"] if line.startswith("capture and evaluate=replicated for llama")]
    kept = json.loads((tmp_path / "run" / "measured.json").read_text())["placements"]
    assert (kept["ranks"], kept["device"]) == (2, "cpu") and "it fits on one device" in kept["why"]

    kept["chosen"]["evaluate"] = {
        "_target_": "heretic_ds.placements.tensor_parallel.TensorParallel",
        "degree": 2,
        "backend": "auto",
        "parity_check": False,
    }
    file = tmp_path / "run" / "measured.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "placements": kept}))
    again = open_on(2)
    assert placements(again) == ("replicated", "tensor_parallel")  # what was kept counts, whatever the planner thinks
    assert "capture=replicated evaluate=tensor_parallel, as when this run began" in again["said"]
    assert json.loads(file.read_text())["placements"] == kept

    other = open_on(2, "evaluate.degree=1")  # something else is asked
    assert placements(other) == ("replicated", "replicated")


def test_other_ranks_are_a_reason_to_choose_anew(open_on: Open, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert placements(open_on(2)) == ("replicated", "replicated")
    file = tmp_path / "run" / "measured.json"
    kept = json.loads(file.read_text())
    kept["placements"] |= {"ranks": 3}
    kept["placements"]["chosen"]["evaluate"] = {"_target_": "nowhere.Class"}
    file.write_text(json.dumps(kept))
    found = open_on(2)
    assert placements(found) == ("replicated", "replicated")
    told = "this run's placements were chosen for 3 ranks on cpu, and are chosen anew for 2 on cpu"
    assert told in found["said"]
    assert json.loads(file.read_text())["placements"]["ranks"] == 2


def test_memory_decides(open_on: Open) -> None:
    """A machine that does not hold what it would take twice: the planner's arithmetic, on ranks of this one."""
    described = ["hardware=cpu_server", "hardware.nodes=1", "hardware.devices_per_node=2"]
    short = open_on(2, *described, "hardware.host_memory=1e8", "hardware.device_memory=5e7")
    assert "nothing holds llama" in short["error"] and "name placements for capture and evaluate" in short["error"]
    assert "placed" in open_on(2, *described)


def test_what_is_named_stays_beside_what_is_chosen(open_on: Open) -> None:
    found = open_on(2, "capture=zero3")
    assert placements(found) == ("zero3", "replicated")
    assert set(found["kept"]["asked"]) == {"capture", "evaluate"}
    assert found["kept"]["asked"]["capture"]["_target_"].endswith("Zero3")
    degree = open_on(2, "evaluate.degree=3")["error"]
    assert degree.startswith("evaluate.degree=3 does not divide the world size 2")


def test_a_degree_rules_out_what_cannot_have_it(open_on: Open) -> None:
    found = open_on(2, "evaluate.degree=2", "capture.degree=2")
    assert "replicated" not in placements(found)
    assert found["placed"]["evaluate"]["degree"] == 2


def test_pickled_weights_are_not_cut(open_on: Open, tmp_path: Path) -> None:
    """Parts of them cannot be read, which no placement's own check says."""
    file = tmp_path / "llama" / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    assert "has only pickled weights" in open_on(2)["error"]
    found = open_on(2, "evaluate.degree=2", "model.allow_pickle=true")
    assert found["error"].startswith("no placement for evaluate serves llama: ")
    assert "has no safetensors weights" in found["error"]
    assert placements(open_on(2, "model.allow_pickle=true")) == ("replicated", "replicated")


def test_nothing_is_kept_of_what_was_named(open_on: Open, tmp_path: Path) -> None:
    found = open_on(2, "capture=replicated", "evaluate=replicated")
    assert placements(found) == ("replicated", "replicated") and found["kept"] is None
    assert "placements" not in json.loads((tmp_path / "run" / "measured.json").read_text())
