"""The command on a pretended CUDA device: everything is where CUDA wants it, and results are those of the CPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import families
from tests.conftest import ROOT
from tests.e2e.conftest import Heretic, Material, read_results
from tests.unit import test_kernel_inject

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler; install one, or name it in CXX"
)


def on_pretended_device(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL
    )


USUAL = (
    "search.trials=3", "generation.max_new_tokens=7", "model.dtype=float32",
    "prompts.system=Answer in one short line of plain words",  # enough for what all prompts begin with to be kept
)  # fmt: skip


def trials_are_those_of_the_cpu(heretic: Heretic, words: list[str], folder: Path, *on_device: str) -> str:
    """What the run on the pretended device said; ``on_device`` are words for it alone."""
    assert heretic(*words, *USUAL, f"run.dir={folder}/cpu").status == 0
    done = on_pretended_device(
        "-m", "tests.pretend_cuda", *words, *USUAL, "model.device=cuda", f"run.dir={folder}/cuda", *on_device
    )
    assert done.returncode == 0, done.stdout + done.stderr
    of_cpu, of_cuda = (read_results(folder / device)["trials"] for device in ("cpu", "cuda"))
    for trial, expected in zip(of_cuda, of_cpu, strict=True):
        assert (trial["profiles"], trial["refusals"]) == (expected["profiles"], expected["refusals"])
        assert abs(trial["kl"] - expected["kl"]) <= 1e-6 + 1e-4 * expected["kl"]
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("family", "more", "graphs"),
    [
        ("llama", ("search.trials_per_pass=3", "generation.batch_size=0"), True),
        ("mixtral", ("search.trials_per_pass=2", "ablation.row_norm=full"), False),  # float32: grouped products ask
    ],
)
def test_the_whole_job(
    heretic: Heretic, material: Material, tmp_path: Path, family: str, more: tuple[str, ...], graphs: bool
) -> None:
    words = material.words(material.model(family), *more)
    said = trials_are_those_of_the_cpu(heretic, words, tmp_path)
    counted = re.search(r"(\d+) graphs captured, (\d+) times replayed", said)
    assert counted and all((int(count) > 0) is graphs for count in counted.groups()), said
    assert ("decoding without CUDA graphs" in said) is not graphs
    assert "in every pass" not in said  # which prompts would be, where a pass that starts late fails


def test_the_whole_job_with_injected_kernels(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    """With what stands in for the kernels alone."""
    model = tmp_path / "model"
    test_kernel_inject.build("qwen2").save_pretrained(model)
    families.tokenizer().save_pretrained(model)
    words = material.words(model, "search.trials_per_pass=1")
    said = trials_are_those_of_the_cpu(heretic, words, tmp_path, "evaluate=kernel_inject")
    assert "the injected kernels give the model's own logits" in said


_OPERATIONS = """
import torch
from tests import pretend_cuda

def refused(operations, why):
    for operation in operations:
        try:
            eval(operation)
        except RuntimeError as error:
            assert why in str(error), (operation, error)
        else:
            raise AssertionError(f"{operation} was not refused")


pretend_cuda.give_devices()
here = torch.arange(3)
with pretend_cuda.pretended():
    there = torch.ones(3, 3, device="cuda", dtype=torch.int64)
    assert there.device.type == "cuda" and there.cpu().device.type == "cpu"
    for operation in ("there[:, here]", "there + here.sum()", "there.copy_(here)", "there.tolist()"):
        eval(operation)
    mixed = ("there + here", "there.index_select(0, here)", "torch.cat([there[0], here])", "here[there[0]]")
    refused(mixed, "on the same device")
    torch.cuda.set_sync_debug_mode("error")
    for operation in ("there.to('cpu', non_blocking=True)", "here.to('cuda', non_blocking=True)", "there[:, there[0]]"):
        eval(operation)
    waiting = (
        "there.tolist()", "there[0, 0].item()", "there.cpu()", "there[there > 0]", "there[:, here]", "there[:, [0, 1]]",
        "here.to('cuda')", "torch.tensor([1, 2], device='cuda')", "torch.bincount(there[0])", "there.copy_(here)",
    )
    refused(waiting, "synchronizing")
"""


def test_it_refuses_what_cuda_refuses() -> None:
    done = on_pretended_device("-c", _OPERATIONS)
    assert done.returncode == 0, done.stderr
