"""Models without their weights: what is known of them, and what is fetched for it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import NotASafetensorsRepoError

from heretic_ds.anatomy import find_anatomy
from heretic_ds.checkpoint import downloads, source
from heretic_ds.checkpoint.open import ModelChoice, open_model
from heretic_ds.checkpoint.outline import Outline, outline_model
from heretic_ds.errors import UserError
from heretic_ds.planner import facts_of
from tests import families
from tests.conftest import ComposeSettings

CPU = torch.device("cpu")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return families.save("mixtral", tmp_path / "whole")


@pytest.fixture
def bare(whole: Path, tmp_path: Path) -> Path:
    """The same model's configuration, without weights and tokenizer."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(whole / "config.json", folder)
    return folder


def shapes(outline: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in outline.skeleton().named_parameters()}


def test_the_configuration_alone_tells_shapes_and_writers(whole: Path, bare: Path) -> None:
    opened, outline = open_model(ModelChoice(str(whole), device="cpu")), outline_model(ModelChoice(str(bare)), CPU)
    assert outline.headers == {} and outline.dtypes == opened.dtypes
    assert shapes(outline) == shapes(opened)
    assert all(parameter.is_meta for parameter in outline.skeleton().parameters())
    assert find_anatomy(outline.skeleton()).writers == find_anatomy(opened.skeleton()).writers
    expected, taken = shapes(outline), outline.skeleton()
    taken.set_submodule(
        find_anatomy(taken).embedding, torch.nn.Identity()
    )  # as pipelines do to find out whether they serve it
    assert shapes(outline) == expected and len(expected) > len(dict(taken.named_parameters()))
    assert Outline.of(opened).headers == opened.headers


def test_whole_files_are_read_and_others_are_not_missed(whole: Path) -> None:
    assert outline_model(ModelChoice(str(whole)), CPU).headers == open_model(ModelChoice(str(whole))).headers
    (whole / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert outline_model(ModelChoice(str(whole)), CPU).headers == {}


def test_experts_are_taken_to_lie_apart_where_no_file_tells(
    whole: Path, bare: Path, compose_settings: ComposeSettings
) -> None:
    """Most checkpoints keep them so, and merging them takes memory."""
    merges = {}
    for folder in (whole, bare):
        outline = outline_model(ModelChoice(str(folder)), CPU)
        merges[folder.name] = facts_of(outline, find_anatomy(outline.skeleton()), compose_settings()).merges_experts
    apart = any(".experts.0." in name for name in open_model(ModelChoice(str(whole))).headers)
    assert merges == {"whole": apart, "bare": True}


def test_a_gpu_elsewhere_runs_the_models_own_dtype(bare: Path) -> None:
    config = json.loads((bare / "config.json").read_text())
    for dtype in ("float16", "bfloat16"):
        (bare / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
        outline = outline_model(ModelChoice(str(bare)), torch.device("cuda"))
        assert outline.dtypes == [getattr(torch, dtype)]
    assert outline_model(ModelChoice(str(bare), dtype="float32"), torch.device("cuda")).dtypes == [torch.float32]


def test_of_a_hub_model_no_weights_are_fetched(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str], tqdm_class: type) -> str:
        asked.append((name, revision, allow_patterns))
        return str(bare)

    tensors = {"lm_head.weight": SimpleNamespace(shape=[7, 32], dtype="BF16")}
    found = SimpleNamespace(files_metadata={"model-1.safetensors": SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr(downloads, "snapshot_download", snapshot)
    monkeypatch.setattr(source, "get_safetensors_metadata", lambda name, revision: found)
    outline = outline_model(ModelChoice("org/name", revision="v1"), CPU)
    [(name, revision, patterns)] = asked
    assert (name, revision) == ("org/name", "v1")
    assert "config.json" in patterns and not [each for each in patterns if "safetensors" in each or "bin" in each]
    assert outline.headers == {"lm_head.weight": source.TensorInfo((7, 32), "BF16", "model-1.safetensors", 0)}
    assert (outline.source.name, outline.source.is_hub) == ("org/name", True)

    def pickled(name: str, revision: str) -> None:
        raise NotASafetensorsRepoError(name)

    monkeypatch.setattr(source, "get_safetensors_metadata", pickled)
    assert outline_model(ModelChoice("org/name"), CPU).headers == {}


@pytest.mark.parametrize(("stated", "files", "told"), [
    ({"quant_method": "fp8"}, [], "quantised with fp8 already"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, [], "stored in 8 bits"),
    (None, ["pytorch_model.bin"], "pickled ones alone"),
    (None, ["model.safetensors", "pytorch_model.bin"], None),
    (None, [], None),
])  # fmt: skip
def test_a_plan_refuses_the_packing_that_a_run_refuses(
    stated: dict[str, Any] | None, files: list[str], told: str | None, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not bitsandbytes is installed where it is made."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | ({"quantization_config": stated} if stated else {})))
    for file in files:
        (bare / file).write_text("version https://git-lfs.github.com/spec/v1\n")
    choice = ModelChoice(str(bare), quantization="bnb_4bit")
    if told is None:
        assert outline_model(choice, CPU).choice == choice
        return
    with pytest.raises(UserError, match=told):
        outline_model(choice, CPU)
