"""A search that is ended again and again comes to the trials of one that was left alone."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Heretic, Material, Started, files_below, outcome_of, read_results

TRIALS, PASS = 40, 3


@pytest.fixture
def words(material: Material, tmp_path: Path) -> list[str]:
    """A study of 40 trials that each take a tenth of a second: no answer stops early, and batches are small."""
    return material.words(
        material.model("llama"), f"search.trials={TRIALS}", "search.startup_trials=10",
        f"search.trials_per_pass={PASS}", "generation.max_new_tokens=24", "generation.batch_size=3",
        "generation.early_stop=false", "run.dir=interrupted",
    )  # fmt: skip


class Sequel:
    """One command, started again after each end."""

    def __init__(self, words: list[str], start: Any, folder: Path) -> None:
        self.words, self.start, self.folder = words, start, folder
        self.random = random.Random()

    def finished_trials(self) -> int:
        """Trials that the journal holds."""
        journal = self.folder / "study.journal"
        return journal.read_bytes().count(b'"kl":') if journal.exists() else 0

    def run_until(self, least: int) -> Started:
        """The command, at a random moment after it has finished this trial."""
        command: Started = self.start(self.words)
        moment = least + self.random.randint(0, 2)
        command.wait_until(lambda: self.finished_trials() >= moment)
        time.sleep(self.random.uniform(0, 0.3))
        assert command.process.poll() is None, f"it ended by itself:\n{command.said()}"
        return command

    def check_whole(self) -> dict[str, Any]:
        """The results after an end: a whole file, or none where the first pass was cut; trials from the first on."""
        if not (self.folder / "results.json").exists():
            assert self.finished_trials() < PASS
            return {}
        results = read_results(self.folder)
        assert [trial["index"] for trial in results["trials"]] == list(range(len(results["trials"])))
        assert 0 <= self.finished_trials() - len(results["trials"]) <= PASS
        return results


@pytest.mark.slow
@pytest.mark.timeout(1500)  # on an idle core it takes a minute
def test_ended_at_random_moments(words: list[str], start, heretic: Heretic, tmp_path: Path) -> None:
    sequel = Sequel(words, start, tmp_path / "interrupted")
    for least in (1, 7, 13):
        command = sequel.run_until(least)
        command.send(signal.SIGKILL)
        assert command.end() == -signal.SIGKILL
        sequel.check_whole()

    command = sequel.run_until(19)
    command.send(signal.SIGTERM)
    assert command.end() == -signal.SIGTERM
    sequel.check_whole()

    command = sequel.run_until(25)
    command.send(signal.SIGINT)
    command.wait_until(lambda: "Ctrl-C again ends everything" in command.said())
    command.send(signal.SIGINT)
    assert command.end() == 130
    assert command.said().splitlines()[-1] == "heretic-ds: interrupted"
    sequel.check_whole()
    assert not (sequel.folder / "model").exists()

    command = sequel.run_until(31)
    command.send(signal.SIGINT)
    assert command.end() == 0, command.said()
    stopped = sequel.check_whole()
    assert len(stopped["trials"]) < TRIALS and stopped["selected"] is not None
    assert "the same command goes on" in command.said()
    assert (sequel.folder / "model" / "model.safetensors").is_file()

    assert heretic(*words).status == 0
    assert heretic(*words, "run.dir=whole").status == 0
    resumed, whole = (read_results(tmp_path / name) for name in ("interrupted", "whole"))
    assert len(whole["trials"]) == TRIALS
    assert outcome_of(resumed["trials"]) == outcome_of(whole["trials"])
    for key in ("baseline", "pareto", "selected", "verified"):
        assert resumed[key] == whole[key], key
    assert {trial["state"] for trial in whole["trials"]} == {"complete"}
    assert len({trial["kl"] for trial in whole["trials"]}) == TRIALS
    manifests = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("interrupted", "whole")]
    assert manifests[0] == manifests[1]

    before = files_below(tmp_path)
    again = heretic(*words)
    assert again.status == 0 and "is finished" in again.out and "nothing was done" in again.out
    assert files_below(tmp_path) == before


def test_an_end_before_the_report_is_made_up_for(
    material: Material, heretic: Heretic, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run is finished only once its report is there."""
    from heretic_ds import pipeline

    def end(run: Any) -> None:
        raise KeyboardInterrupt

    small = ("search.trials=2", "search.startup_trials=1", "run.dir=run")
    words = material.words(material.model("llama"), *small)
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "write_report", end)
        assert heretic(*words).status == 130
    trials = outcome_of(read_results(tmp_path / "run")["trials"])
    assert len(trials) == 2 and not (tmp_path / "run" / "report.html").exists()
    assert heretic(*words).status == 0
    assert (tmp_path / "run" / "report.html").is_file()
    assert outcome_of(read_results(tmp_path / "run")["trials"]) == trials
    again = heretic(*words)
    assert again.status == 0 and "is finished" in again.out
