"""Heretic's (PyPI ``heretic-llm``) own search for ``time_to_front.py``: its command, as it comes, until its last trial.

It runs in an environment of its own (``make bench-setup``). Its settings are what this project's search of the same
model is given: prompts, markers, length of answers, number of trials, seed; all else is its default. The command asks
what to do next when its trials are done, so it is ended then. When each was done is read from the journal that it
keeps; its processor seconds are looked up while it runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_DONE = '"op_code":6'
_LOOK = 0.1
"""Seconds between looks."""


def theirs(seed: int, trials: int, startup: int, python: Path, folder: Path) -> dict[str, Any]:
    """One search on the demo model."""
    from against_heretic_models import CASES, prepare

    told = prepare(CASES["demo"], folder / "prompts")
    (folder / "config.toml").write_text(_toml(_settings(told, seed, trials, startup, folder)))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "PYTHONPATH": ""}
    started, looks = time.time(), [(0.0, 0.0)]
    with (folder / "log").open("w") as log:
        command = [str(python.absolute().parent / "heretic")]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=folder
        )
        try:
            while process.poll() is None and _finished(folder) < trials:
                looks.append((time.time(), _processor_seconds(process.pid)))
                time.sleep(_LOOK)
            looks.append((time.time(), looks[-1][1]))
        finally:
            process.kill()
            process.wait()
    if _finished(folder) < trials:
        raise RuntimeError("\n".join((folder / "log").read_text().splitlines()[-15:]))
    return {**_searched(folder, looks), "started": [started, 0.0]}


def _settings(told: Mapping[str, Any], seed: int, trials: int, startup: int, folder: Path) -> dict[str, Any]:
    def data(kind: str, part: str) -> dict[str, str]:
        place, count = told["prompts"][f"{kind}.{part}"], told["counts"][f"{kind}_{part}"]
        return {"dataset": place["folder"], "split": f"{place['split']}[:{count}]", "column": "text"}

    return {
        "model": told["model"],
        "dtypes": [told["case"]["dtype"]],
        "device_map": "cpu",
        "max_response_length": told["case"]["new_tokens"],
        "n_trials": trials,
        "n_startup_trials": startup,
        "seed": seed,
        "study_checkpoint_dir": str(folder / "checkpoints"),
        "refusal_markers": told["markers"],
        "system_prompt": told["system"],
        "good_prompts": data("baseline", "train"),
        "bad_prompts": data("target", "train"),
        "good_evaluation_prompts": data("baseline", "eval"),
        "bad_evaluation_prompts": data("target", "eval"),
    }


def _toml(settings: Mapping[str, Any]) -> str:
    """Plain values, then tables; strings and lists of JSON are those of TOML."""
    plain = [f"{name} = {json.dumps(value)}" for name, value in settings.items() if not isinstance(value, dict)]
    for name, table in settings.items():
        if isinstance(table, dict):
            plain += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(plain) + "\n"


def _journals(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("*.jsonl"))


def _finished(folder: Path) -> int:
    return sum(file.read_text().replace(" ", "").count(_DONE) for file in _journals(folder))


def _processor_seconds(pid: int) -> float:
    """Of a process and of those that it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _searched(folder: Path, looks: list[tuple[float, float]]) -> dict[str, Any]:
    """What the journal tells."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    [file] = _journals(folder)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(file)))
    [name] = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=name, storage=storage).get_trials(states=[optuna.trial.TrialState.COMPLETE])
    times = [when for when, _ in looks]

    def at(moment: Any) -> list[float]:
        when = moment.timestamp()
        return [when, looks[min(bisect_left(times, when), len(looks) - 1)][1]]

    scored = [
        {
            "at": at(trial.datetime_complete),
            "share": trial.user_attrs["refusals"] / trial.user_attrs["base_refusals"],
            "kl": trial.user_attrs["kl_divergence"],
        }
        for trial in trials
    ]
    begun = at(trials[0].datetime_start)
    return {"search": begun, "ready": begun, "trials": scored}
