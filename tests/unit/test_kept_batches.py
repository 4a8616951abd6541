"""Batch sizes that were measured for a model on a machine are used again, where all that they depend on is the same."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from heretic_ds.job import Job
from heretic_ds.placements import placements_of
from heretic_ds.planner import KeptBatches, batches, calibrate
from heretic_ds.prompts import ChatFormat
from heretic_ds.world import World
from tests import families
from tests.conftest import ComposeSettings

FREE = 1_000_000


@pytest.fixture
def job(tmp_path: Path, compose_settings: ComposeSettings, monkeypatch: pytest.MonkeyPatch) -> Job:
    """On a tiny model, with a cache folder to itself, and a million bytes of free memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(batches, "free_bytes", lambda device: FREE)
    families.save("llama", tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("Sow plums.\nPlant leeks in May.\n")
    sources = [
        f"prompts.{kind}.{part}.source={tmp_path}/prompts.txt"
        for kind in ("target", "baseline")
        for part in ("train", "eval")
    ]
    return Job.check(compose_settings(*sources, model=tmp_path / "model"), World())


def kept(job: Job, sizes: dict[str, int] | None = None, taken: int = 1000, **engine: Any) -> KeptBatches:
    """The sizes of an engine that has measured some, or none."""
    measured: Any = SimpleNamespace(
        batch_sizes=dict(sizes or {}),
        batch_bytes=dict.fromkeys(sizes or {}, taken),
        degree=1,
        dtype=torch.float32,
    )
    for name, value in engine.items():
        setattr(measured, name, value)
    return KeptBatches(job, measured, placements_of(job.settings)["evaluate"].layout(1))


def known(job: Job, **engine: Any) -> dict[str, int]:
    """What an engine that has measured nothing is given."""
    return kept(job, **engine).used()._engine.batch_sizes


def test_what_was_measured_is_used_again(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    assert known(job) == {}
    kept(job, {"kl": 48, "generate": 96}).keep()
    with caplog.at_level(logging.INFO):
        assert known(job) == {"kl": 48, "generate": 96}
    assert "batch size for distributions: 48 rows (as measured before)" in caplog.messages
    assert "batch size for answers: 96 rows (as measured before)" in caplog.messages
    file = kept(job).file
    assert file.parent == calibrate.cache_folder() and file.name.startswith("batches-")
    assert str(job.opened.source.folder) not in file.read_text()  # an edited copy elsewhere has the same shapes
    written = file.stat().st_mtime_ns
    kept(job).used().keep()
    assert file.stat().st_mtime_ns == written


def other_prompts(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.texts["target.eval"][0] += " And pears."


def longer_answers(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.settings.generation.max_new_tokens += 1


def other_memory(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "host_memory", lambda: 2**40)


def other_versions(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "package_versions", lambda more: {"torch": "9.9"})


def other_threads(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)


def other_processor(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "processor", lambda: "another one")


def other_ranks(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


def other_shapes(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    name, info = next(iter(job.opened.headers.items()))
    monkeypatch.setattr(job, "opened", replace(job.opened, headers={name: replace(info, shape=(1, 2))}))


def other_template(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "A long preamble. " * 20 + "{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(job, "chat", ChatFormat(job.opened.tokenizer, replace(job.settings.prompts, template=long)))


@pytest.mark.parametrize(
    "change",
    [
        other_prompts, longer_answers, other_memory, other_versions, other_threads, other_processor, other_ranks,
        other_shapes, other_template,
    ],
)  # fmt: skip
def test_sizes_of_other_circumstances_are_not_used(
    change: Callable[[Job, pytest.MonkeyPatch], None], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(job, {"kl": 48}).keep()
    assert known(job) == {"kl": 48}
    change(job, monkeypatch)
    assert known(job) == {}


def test_sizes_of_another_layout_or_dtype_are_not_used(job: Job) -> None:
    kept(job, {"kl": 48}).keep()
    assert known(job, degree=2) == {} and known(job, dtype=torch.bfloat16) == {}


def test_a_size_that_the_user_gives_counts(job: Job) -> None:
    kept(job, {"kl": 48}).keep()
    job.settings.generation.batch_size = 3
    assert known(job) == {}


def test_no_more_memory_is_taken_than_is_free_today(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is measured on such a day does not take the place of what was measured on a better one."""
    kept(job, {"kl": 48}, taken=FREE // 2).keep()
    kept(job, {"generate": 9}, taken=10).keep()  # of a process that did not ask before
    kept(job, {"kl": 48}, taken=FREE // 2).keep()
    assert known(job) == {"kl": 48}
    monkeypatch.setattr(batches, "free_bytes", lambda device: FREE - 2)
    assert known(job) == {}
    short = kept(job, {"kl": 24}, taken=FREE // 4)
    short._phases = batches._read(short.file)
    short.keep()
    monkeypatch.setattr(batches, "free_bytes", lambda device: FREE)
    assert known(job) == {"kl": 48}


def test_a_size_that_was_halved_today_is_whole_another_day(job: Job) -> None:
    """Where what batches take is not asked, as on CUDA."""
    kept(job, {"kl": 48}, taken=0).keep()
    halved = kept(job).used()
    halved._engine.batch_sizes["kl"] = 24
    halved.keep()
    assert known(job) == {"kl": 48}
    kept(job, {"kl": 96}, taken=0).keep()
    assert known(job) == {"kl": 96}


def test_rows_of_the_run_folder_are_not_kept_with_the_bytes_of_others(job: Job) -> None:
    kept(job, {"kl": 48, "generate": 9}).keep()
    going_on = kept(job).used()
    going_on.prefer({"kl": 12, "generate": 9})
    assert going_on._engine.batch_sizes == {"kl": 12, "generate": 9}
    assert going_on._engine.batch_bytes == {"generate": 1000}
    going_on.keep()
    assert known(job) == {"kl": 48, "generate": 9}


def test_no_scorer_is_asked(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """What scorers tell of themselves may be asked of the hub, by one rank alone."""
    monkeypatch.setattr(Job, "inputs", lambda job: pytest.fail("asked"))
    kept(job)


def test_a_folder_that_may_not_be_looked_into_holds_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", refused)
    assert batches._read(tmp_path / "batches-1.json") == {}
    assert calibrate._load(tmp_path / "machine-1.json") is None


@pytest.mark.parametrize("content", ["[]", "{", '{"phases": {"kl": 7}}', '{"phases": {"kl": {"rows": 7}}}', "{}"])
def test_a_damaged_file_is_measured_anew(content: str, job: Job) -> None:
    kept(job, {"kl": 48}).keep()
    file = kept(job).file
    file.write_text(content)
    assert known(job) == {}
    kept(job, {"kl": 48}).keep()
    assert json.loads(file.read_text())["phases"] == {"kl": {"rows": 48, "bytes": 1000}}


def test_a_folder_that_takes_no_file_is_only_a_warning(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    kept(job, {"kl": 48}).keep()
    assert "what was measured cannot be kept in" in caplog.text
