"""Batch sizes told from the memory of small batches."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from heretic_ds import memory
from heretic_ds.memory import give_back_memory, peak_memory
from heretic_ds.runner.sizing import measure
from heretic_ds.runner.sizing.measure import WorkingMemory, working_memory
from heretic_ds.stages.start import _device

CPU = torch.device("cpu")


def test_rows_that_fit_follow_the_memory_of_small_batches(monkeypatch):
    peaks = {1: 10_000, 3: 32_000, 4: 43_000}
    seen: list[int] = []

    def peak_of(run, device):
        run()
        return peaks[seen[-1]]

    monkeypatch.setattr(measure, "peak_of", peak_of)
    found = working_memory(seen.append, 512, CPU)
    assert seen == [1, 1, 4] and [found.of(rows) for rows in (1, 2, 4)] == [10_000, 21_000, 43_000]
    assert found.rows_within(2_000_000) == 1 + (1_000_000 - 10_000) // 11_000  # half of what is free
    assert found.rows_within(4_000) == 1
    assert working_memory(seen.append, 3, CPU) == WorkingMemory(10_000, 11_000)
    seen.clear()
    assert working_memory(seen.append, 1, CPU) is None and seen == [1]
    monkeypatch.setattr(measure, "peak_of", lambda run, device: run())
    assert working_memory(seen.append, 512, CPU) is None


def test_a_peak_is_measured_and_earlier_ones_are_not_forgotten():
    give_back_memory()
    earlier = torch.ones(2**25)
    highest = peak_memory()["host"]
    del earlier
    give_back_memory()
    peak = memory.peak_of(lambda: torch.ones(2**24).sum(), CPU)
    assert peak is not None and 60e6 < peak < 100e6
    assert peak_memory()["host"] >= highest
    assert memory.free_bytes(CPU) > 0


def test_free_memory_of_the_host_is_shared_by_the_ranks_of_the_machine(monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=4_000_003))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert memory.free_bytes(CPU) == 4_000_003
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_bytes(CPU) == 1_000_000


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_host_peak_is_in_bytes_where_the_system_counts_in_kibibytes_and_where_not(platform, unit, monkeypatch):
    monkeypatch.setitem(memory._highest, "host", 0)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=7_000_000))
    monkeypatch.setattr(memory.sys, "platform", platform)
    assert peak_memory()["host"] == 7_000_000 * unit


def test_where_the_system_keeps_no_peak_what_is_used_now_counts(monkeypatch):
    monkeypatch.setitem(memory._highest, "host", 0)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(memory.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=5)))
    assert peak_memory()["host"] == 5


def test_a_peak_is_this_processs_own_whatever_started_it():
    """What the system tells of a process counts the one that it was forked from, until it runs another program."""
    taken = torch.ones(2**26)  # 256 MiB in the process that starts the other
    code = (
        "import torch; from heretic_ds.memory import peak_of;"
        "print(peak_of(lambda: torch.ones(2**22).sum(), torch.device('cpu')))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(taken) == 2**26 and 2**24 <= int(ended.stdout) < 2**26


def group(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{value}\n")


def test_limits_of_a_container_count(tmp_path: Path) -> None:
    """The limit of a group above counts too; files that were only read are free memory."""
    groups, own = tmp_path / "groups", tmp_path / "own"
    group(groups / "job", memory_max=1000, memory_current=700, memory_stat="anon 100\ninactive_file 300")
    group(groups / "job" / "step", memory_max="max", memory_current=600)
    own.write_text("0::/job/step\n")
    assert memory._limits(groups, own) == [(1000, 400)]
    own.write_text("0::/not/to/be/seen/from/inside\n")
    assert memory._limits(groups, own) == []
    group(groups, memory_max=800, memory_current=50)
    assert memory._limits(groups, own) == [(800, 50)]
    assert memory._limits(groups, tmp_path / "no such file") == []


def test_limits_of_the_first_version_of_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "own"
    for name, value in (("limit_in_bytes", 500), ("usage_in_bytes", 90), ("stat", "total_inactive_file 40")):
        group(tmp_path / "memory" / "job", **{f"memory_{name}": value})
    own.write_text("4:cpu,memory:/job\n3:cpuset:/job\n1:name=systemd:/\n0::/\n")
    assert memory._limits(tmp_path, own) == [(500, 50)]


def test_free_memory_is_what_a_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_limits", lambda: [(2**62, 0), (5000, 3000)])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (memory.free_bytes(CPU), memory.host_memory()) == (1000, 5000)
    monkeypatch.setattr(memory, "_limits", lambda: [(5000, 6000)])
    assert memory.free_bytes(CPU) == 0


def test_the_start_tells_of_what_a_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_limits", lambda: [(3 * 2**30, 2**30)])
    assert _device(CPU).endswith(", 2.0 of 3.0 GiB free")
