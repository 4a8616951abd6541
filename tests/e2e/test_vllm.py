"""The whole job with vLLM as the engine that evaluates; and what becomes of it where vLLM fails, or the job does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import families
from tests.e2e.conftest import Heretic, Material, Started, read_results

SECONDS_TO_END = 60
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def words(python: str, *more: str) -> list[str]:
    """The demo job, made short, that evaluates in vLLM."""
    return [
        "experiment=demo", "evaluate=vllm", f"evaluate.python={python}", "evaluate.kv_cache_gib=0.25", "run.dir=run",
        "search.startup_trials=2", "generation.max_new_tokens=12", "export.max_kl=50", "model.device=cpu",
        "verify.answer_tokens=12", "prompts.response_prefix=", "run.interactive=false",
        *(f"prompts.{kind}.{part}.slice=0:24" for kind in ("target", "baseline") for part in ("train", "eval", "test")),
        *more,
    ]  # fmt: skip


def of_vllm(started: Started) -> list[psutil.Process]:
    """vLLM's processes below a command, its own first."""
    try:
        below = psutil.Process(started.process.pid).children(recursive=True)
        mine = [process for process in below if "heretic_vllm" in process.cmdline()]
        return mine and [mine[0], *mine[0].children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def test_the_demo_runs_on_it(vllm_python: str, heretic: Heretic) -> None:
    ended = heretic(*words(vllm_python, "search.trials=4", "search.trials_per_pass=2", "model.dtype=float32"))
    assert ended.status == 0, ended.err
    results = read_results("run")
    assert results["world"]["evaluate"] == {"placement": "vllm", "degree": 1}
    assert [trial["pass"] for trial in results["trials"]] == [0, 0, 1, 1]
    [selected] = [trial for trial in results["trials"] if trial["index"] == results["selected"]]
    assert results["verified"]["refusals"] == selected["refusals"]
    assert results["verified"]["kl"] == pytest.approx(selected["kl"], abs=1e-6, rel=1e-4)
    assert (Path("run") / "model" / "model.safetensors").is_file()
    edit = [f"ablation.direction_index={selected['direction_index'] if selected['direction_index'] else 'null'}"]
    for component, profile in selected["profiles"].items():
        edit += [f"ablation.profiles.{component}.{key}={value}" for key, value in profile.items()]
    again = ("task=evaluate", "model.dtype=float32", "run.dir=again", *edit)
    ended = heretic(*(word for word in words(vllm_python) if not word.startswith(("evaluate", "run.dir"))), *again)
    assert ended.status == 0, ended.err
    [scored] = read_results("again")["trials"]
    assert scored["refusals"] == selected["refusals"]
    assert scored["kl"] == pytest.approx(selected["kl"], abs=1e-6, rel=1e-4)


def test_what_vllm_refuses_is_one_line(vllm_python: str, heretic: Heretic, material: Material) -> None:
    given = ("evaluate=vllm", f"evaluate.python={vllm_python}", "run.dir=run")
    narrow = heretic(*material.words(material.model("llama"), *given))
    assert narrow.status == 2
    [line] = narrow.err.splitlines()
    assert line.startswith("heretic-ds: vLLM does not serve this model (") and "set evaluate=replicated" in line
    large = heretic(*material.words(material.model("llama", width=128), *given, "evaluate.kv_cache_gib=1e6"))
    assert large.status == 2
    [line] = large.err.splitlines()
    assert line.startswith("heretic-ds: vLLM has too little memory (") and "lower evaluate." in line


@pytest.mark.parametrize("split", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_killed_process_of_vllm_ends_the_job_in_one_line_and_loses_nothing(
    split: int, vllm_python: str, start: Callable[[list[str]], Started], tmp_path: Path
) -> None:
    given = words(vllm_python, "search.trials=2000", f"evaluate.tensor_parallel={split}")
    job, journal = start(given), tmp_path / "run" / "study.journal"
    job.wait_until(lambda: journal.exists() and len(journal.read_text().splitlines()) > 4)
    processes = of_vllm(job)
    victims = [process for process in processes if "VLLM::Worker" in " ".join(process.cmdline())] or processes
    victims[-1].kill()
    assert job.end(SECONDS_TO_END) == 1
    last = job.said().splitlines()[-1]
    assert last.startswith("heretic-ds: vLLM") and ("was ended by SIGKILL" in last or split == 2)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    done = len(read_results(tmp_path / "run")["trials"])
    assert done > 0
    again = start([*given[:-2], f"search.trials={done + 1}"])
    assert again.end(SECONDS_TO_END * 3) == 0
    assert len(read_results(tmp_path / "run")["trials"]) == done + 1


@pytest.mark.parametrize("split", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_vllm_ends_with_a_killed_job(
    split: int, vllm_python: str, start: Callable[[list[str]], Started], tmp_path: Path
) -> None:
    job = start(words(vllm_python, "search.trials=2000", f"evaluate.tensor_parallel={split}"))
    job.wait_until(lambda: (tmp_path / "run" / "study.journal").exists())
    processes = of_vllm(job)
    assert len(processes) >= split
    os.kill(job.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + SECONDS_TO_END
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        assert time.monotonic() < deadline, [process for process in processes if process.is_running()]
        time.sleep(0.2)


def test_a_pass_that_runs_out_of_memory_is_one_line(
    vllm_python: str, start: Callable[[list[str]], Started], tmp_path: Path
) -> None:
    """Memory of vLLM's process ends while it serves."""
    families.save("llama", tmp_path / "model", width=128)
    job = start(words(vllm_python, "search.trials=2000"))
    job.wait_until(lambda: (tmp_path / "run" / "study.journal").exists())
    [server, *_] = of_vllm(job)
    used = server.memory_info().vms
    psutil.Process(server.pid).rlimit(psutil.RLIMIT_AS, (used, used))
    assert job.end(SECONDS_TO_END) in (1, 2)
    last = job.said().splitlines()[-1]
    assert last.startswith("heretic-ds: vLLM")
