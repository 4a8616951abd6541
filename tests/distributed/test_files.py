"""Exports that all ranks write side by side: the bytes of one process, one matrix in memory, all or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from heretic_ds.world import World
from tests import families
from tests.distributed import files_ranks as work
from tests.distributed.ranks import ROOT

pytestmark = pytest.mark.distributed

MEGABYTES = 2**20


def save_in_files(family: str, folder: Path, size: str = "20KB") -> Path:
    """A tiny model in several weight files."""
    families.build(family).save_pretrained(folder, max_shard_size=size)
    families.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_in_files("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_two_ranks_write_what_one_writes(ranks, family, dtype, tmp_path):
    source = save_in_files(family, tmp_path / "original")
    work.export(World(), str(source), str(tmp_path / "one"), dtype)
    target = tmp_path / "two"
    written = ranks(2).run(work.files_written, source=str(source), target=str(target), dtype=dtype)
    assert work.digests(target) == work.digests(tmp_path / "one")
    assert len(written[0]) > 0 and len(written[1]) > 0 and not set(written[0]) & set(written[1])
    assert {*written[0], *written[1]} == {file.name for file in source.glob("*.safetensors")}
    loads = [sum((target / file).stat().st_size for file in files) for files in written]
    largest = max(file.stat().st_size for file in source.glob("*.safetensors"))
    assert abs(loads[0] - loads[1]) <= largest


def test_ranks_that_see_no_folder_leave_the_work_to_others(ranks, llama, tmp_path):
    work.export(World(), str(llama), str(tmp_path / "one"))
    arguments = {"source": str(llama), "target": str(tmp_path / "two"), "dtype": "float32", "blind": (1,)}
    first, second = ranks(2).run(work.files_written, **arguments)
    assert second == [] and len(first) == len(list(llama.glob("*.safetensors")))
    assert work.digests(tmp_path / "two") == work.digests(tmp_path / "one")


@pytest.mark.parametrize("where", [0, 1])
def test_a_full_disk_is_told_by_all_and_leaves_nothing(ranks, llama, where, tmp_path):
    target = tmp_path / "model"
    work.export(World(), str(llama), str(target))
    before = work.digests(target)
    said = ranks(2).run(work.failure, source=str(llama), target=str(target), where=where, kind="full")
    assert said[0] == said[1] and said[0].startswith(f"user: export.dir={target} could not be written")
    assert "No space left on device" in said[0] and "as it was" in said[0]
    assert work.digests(target) == before and [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_mistake_on_one_rank_leaves_nothing(ranks, llama, tmp_path):
    said = ranks(2).run(work.failure, source=str(llama), target=str(tmp_path / "model"), where=1, kind="mistake")
    assert all("a deliberate mistake" in each and each.startswith("other") for each in said)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """`wide("1GB")`: a model's folder and its largest tensor's bytes, with weight files up to a size."""
    known = {}

    def of_size(size):
        if size not in known:
            folder = tmp_path_factory.mktemp("wide")
            known[size] = folder, work.save_wide(folder, max_shard_size=size)
        return known[size]

    return of_size


def bound(largest: int) -> float:
    """The matrix that is edited, some rows of it as they are computed, and buffers: far from a file of 200 MB."""
    return largest + 40 * MEGABYTES


def test_one_process_takes_one_matrix_of_memory(wide, tmp_path):
    folder, largest = wide("1GB")
    file = folder / "model.safetensors"
    assert file.stat().st_size > 2 * bound(largest) and largest > 30 * MEGABYTES
    ended = subprocess.run(
        [sys.executable, "-m", "tests.distributed.files_ranks", str(folder), str(tmp_path / "model")],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split()[-1]) <= bound(largest)
    assert load_file(tmp_path / "model" / file.name).keys() == load_file(file).keys()


def test_two_ranks_take_one_matrix_each(ranks, wide, tmp_path):
    folder, largest = wide("110MB")
    assert len(list(folder.glob("*.safetensors"))) == 2
    for peak in ranks(2).run(work.peak_of_export, source=str(folder), target=str(tmp_path / "model")):
        assert peak <= bound(largest)
