"""A whole job with the screened strategy: what it leaves, that it goes on exactly, and that ranks change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from heretic_ds.search.objective import Objective
from heretic_ds.search.screened.candidates import FIRST
from heretic_ds.search.screened.screening import Screening
from tests.e2e.conftest import Heretic, Material, read_results

TRIALS, EACH, PASS = 5, 2, 2


def words(material: Material, folder: str, *more: str) -> list[str]:
    return material.words(
        material.model("llama"), "search.strategy=screened", f"search.candidates={EACH}", f"search.trials={TRIALS}",
        f"search.trials_per_pass={PASS}", f"run.dir={folder}", *more,
    )  # fmt: skip


def trials_in(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in trial.items() if key != "seconds"} for trial in read_results(folder)["trials"]
    ]


def screened_in(folder: Path) -> int:
    lines = (folder / "screening.journal").read_text().splitlines()
    return sum(json.loads(line)["op_code"] == 4 for line in lines)


def test_trials_are_scored_candidates(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    outcome = heretic(*words(material, "run"))
    assert outcome.status == 0, outcome.err
    results = read_results(tmp_path / "run")
    assert [trial["index"] for trial in results["trials"]] == list(range(TRIALS))
    assert screened_in(tmp_path / "run") == FIRST + 4 * EACH  # what the last pass, of the fifth trial, was chosen from
    assert outcome.out.count("trial ") >= TRIALS and f"{TRIALS} of {TRIALS} done" in outcome.out
    again = heretic(*words(material, "run"))
    assert again.status == 0 and "finished" in again.out + again.err
    other = heretic(*words(material, "run", "search.strategy=direct"))
    assert other.status == 2 and "search.strategy" in other.err


ENDS: tuple[tuple[Any, str, int], ...] = ((Screening, "of", 3), (Screening, "of", 7), (Objective, "score", 1))
"""In the middle of the first screening, and again; in a pass of trials: which call of what, counted from each start."""


def test_interrupted_it_goes_on(
    heretic: Heretic, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name, last in ENDS:
        calls, real = 0, getattr(owner, name)

        def ended(*arguments: Any, last: int = last, real: Any = real) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                raise KeyboardInterrupt
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, ended)
            assert heretic(*words(material, "parts")).status != 0
        assert calls == last
    assert heretic(*words(material, "parts")).status == 0
    assert heretic(*words(material, "whole")).status == 0
    assert trials_in(tmp_path / "parts") == trials_in(tmp_path / "whole")
    assert screened_in(tmp_path / "parts") == screened_in(tmp_path / "whole")


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_two_ranks_search_as_one_does(start: Any, heretic: Heretic, material: Material, tmp_path: Path) -> None:
    assert heretic(*words(material, "one")).status == 0
    command = start(words(material, "two", "run.launch=2"))
    assert command.end() == 0, command.said()
    one, two = trials_in(tmp_path / "one"), trials_in(tmp_path / "two")
    assert [trial["profiles"] for trial in two] == [trial["profiles"] for trial in one]
    assert [trial["refusals"] for trial in two] == [trial["refusals"] for trial in one]
    assert [trial["kl"] for trial in two] == pytest.approx([trial["kl"] for trial in one], rel=1e-4, abs=1e-6)
