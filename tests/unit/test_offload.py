"""Where cut weights rest, which settings say so, and what is gathered at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from heretic_ds.errors import UserError
from heretic_ds.placements.zero3 import Zero3
from heretic_ds.placements.zero3.offload import check_offload, load_reader, offload_section
from heretic_ds.placements.zero3.partitions import deepspeed_config, gathered_at_once

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("capture.offload=disk", "choose one of none, cpu, nvme"),
        ("capture.offload=nvme", "needs capture.nvme_path"),
        ("capture.nvme_path=/tmp", "without capture.offload=nvme"),
        ("capture.prefetch_bucket_size=-1", "at least 0"),
        ("capture.max_live_parameters=-1", "at least 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(compose_settings, override, complaint):
    with pytest.raises(UserError, match=complaint):
        compose_settings("capture=zero3", override)


def test_only_zero3_has_an_offload(compose_settings):
    compose_settings("capture=zero3", "capture.offload=cpu")
    with pytest.raises(UserError, match=r"capture\.offload=cpu is for capture=.*zero3 alone, but capture is auto"):
        compose_settings("capture.offload=cpu")


def test_only_capture_can_be_cut(compose_settings):
    with pytest.raises(UserError, match=r"^evaluate=zero3: zero3 serves capture only; choose one of auto, exp"):
        compose_settings("evaluate._target_=heretic_ds.placements.zero3.Zero3")


def test_settings_reach_deepspeed():
    skeleton, anatomy = nn.Module(), SimpleNamespace(blocks="blocks")
    skeleton.add_module("blocks", nn.ModuleList([nn.Sequential(nn.Linear(2, 2))]))
    options = Zero3.Options(
        prefetch_bucket_size=1, param_persistence_threshold=2, max_live_parameters=3, max_reuse_distance=4
    )
    config = deepspeed_config(options, skeleton, anatomy, torch.bfloat16, 2)  # type: ignore[arg-type]
    zero = config["zero_optimization"]
    numbers = ("prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
    assert [zero[f"stage3_{name}"] for name in numbers] == [1, 2, 3, 4]
    assert zero["stage"] == 3 and "offload_param" not in zero
    assert config["bf16"]["enabled"] and not config["fp16"]["enabled"]


def block(*children: nn.Module) -> nn.Module:
    made = nn.Module()
    for index, child in enumerate(children):
        made.add_module(str(index), child)
    return made


def test_parts_of_a_block_are_gathered_at_once():
    attention, mlp = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    plain = block(attention, mlp, nn.ReLU())
    choosy = block(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))  # experts that tokens choose
    model = nn.Module()
    model.add_module("blocks", nn.ModuleList([plain, choosy]))
    found = gathered_at_once(model, SimpleNamespace(blocks="blocks"))  # type: ignore[arg-type]
    assert [id(part) for part in found] == [id(attention), id(mlp), id(choosy)]


def test_a_buffer_holds_the_largest_part(tmp_path):
    skeleton = nn.Sequential(nn.Linear(9, 11, device="meta"), nn.Linear(2, 2, device="meta"))
    assert offload_section(Zero3.Options(), skeleton, parts=3, ranks=2) == {}
    on_disk = Zero3.Options(offload="nvme", nvme_path=str(tmp_path), pin_memory=False)
    fields = offload_section(on_disk, skeleton, parts=3, ranks=2)["offload_param"]
    assert fields["buffer_size"] > 99 / 2 and fields["buffer_count"] > 3
    assert fields["device"] == "nvme" and fields["nvme_path"] == str(tmp_path) and fields["pin_memory"] is False


def test_an_offload_that_cannot_be_done_is_refused(tmp_path):
    check_offload(Zero3.Options(), CPU)
    with pytest.raises(UserError, match=r"capture\.offload=cpu keeps weights in host memory"):
        check_offload(Zero3.Options(offload="cpu"), CPU)
    check_offload(Zero3.Options(offload="cpu"), torch.device("cuda"))
    with pytest.raises(UserError, match="is no folder"):
        check_offload(Zero3.Options(offload="nvme", nvme_path=str(tmp_path / "missing")), CPU)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(UserError, match=r"cannot be written to \(Permission denied\)"):
        check_offload(Zero3.Options(offload="nvme", nvme_path=str(tmp_path)), CPU)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(UserError, match="install libaio-dev"):
        check_offload(Zero3.Options(offload="nvme", nvme_path=str(tmp_path)), CPU)

    def broken(self, verbose=False):
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    monkeypatch.setattr(AsyncIOBuilder, "load", broken)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    check_offload(Zero3.Options(offload="nvme", nvme_path=str(tmp_path)), CPU)  # builds nothing
    load_reader(Zero3.Options())
    with pytest.raises(UserError, match=r"\(no compiler\)"):
        load_reader(Zero3.Options(offload="nvme", nvme_path=str(tmp_path)))
