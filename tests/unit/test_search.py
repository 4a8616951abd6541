"""The search: its space, its objectives, and that a study killed anywhere ends as if nothing had happened."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest

import heretic_ds
from heretic_ds.ablation.edit import Edit
from heretic_ds.errors import UserError
from heretic_ds.search.journal import MINIMISED, About
from heretic_ds.search.pareto import pareto_front
from heretic_ds.search.space import edit_of, search_space
from heretic_ds.search.study import Search, objectives
from heretic_ds.search.trials import Ask, TrialRecord, TrialScores
from heretic_ds.settings import SearchSettings

LAYERS = 12


def settings(trials: int = 40, per_pass: int = 1, seed: int = 0, startup: int = 10) -> SearchSettings:
    return SearchSettings(trials=trials, startup_trials=startup, seed=seed, trials_per_pass=per_pass)


def cheap_scores(edit: Edit) -> TrialScores:
    """A smooth stand-in for a model: stronger edits leave fewer refusals and a larger KL."""
    strength = sum(profile.weight(layer) for profile in edit.profiles.values() for layer in range(LAYERS))
    offset = 0.0 if edit.direction_index is None else abs(edit.direction_index - 6.0)
    refusals = round(60 / (1 + math.exp(strength - 6 + offset)))
    return TrialScores(refusals, 1e-3 * strength**1.5 + 1e-4 * offset, {"refusals": refusals})


def run(search: Search, stop_after: int | None = None) -> list[TrialRecord]:
    while asks := search.ask():
        for ask in asks:
            if ask.index == 7:
                search.tell(ask, TrialScores(3, float("nan")), seconds=0.5)
            else:
                search.tell(ask, cheap_scores(ask.edit), seconds=0.5)
            if stop_after is not None and len(search.records) >= stop_after:
                return search.records
    return search.records


def open_search(path: Path, **kwargs: int) -> Search:
    return Search(path, LAYERS, settings(**kwargs), baseline_refusals=60)


def study_of(path: Path, name: str = About().name) -> optuna.Study:
    """The journal's study, read by Optuna alone."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    return optuna.load_study(study_name=name, storage=storage)


def trials_of(path: Path, name: str = About().name) -> list[tuple[object, ...]]:
    """What the journal holds; times aside."""
    return [(t.number, t.state.name, t.params, t.values, t.user_attrs) for t in study_of(path, name).trials]


@pytest.mark.parametrize("n_layers", [1, 2, 3, 32])
def test_every_draw_is_an_edit_within_the_ranges(tmp_path: Path, n_layers: int) -> None:
    search = Search(tmp_path / "study.journal", n_layers, settings(trials=50, startup=30), baseline_refusals=10)
    last = n_layers - 1
    scopes, clamped = set(), 0
    while asks := search.ask():
        (ask,) = asks
        scopes.add(ask.edit.direction_index is None)
        if ask.edit.direction_index is not None:
            assert 0.4 * last <= ask.edit.direction_index <= 0.9 * last
        for component, low in (("attention", 0.8), ("mlp", 0.0)):
            profile = ask.edit.profiles[component]
            assert low <= profile.max_weight <= 1.5
            assert 0.6 * last <= profile.max_weight_position <= last
            assert 0.0 <= profile.min_weight <= profile.max_weight
            assert 1.0 <= profile.min_weight_distance <= max(0.6 * last, 1.0)
        clamped += ask.edit.profiles["mlp"].max_weight == 0.0
        search.tell(ask, TrialScores(ask.index % 7, 0.01 * (ask.index % 5)), seconds=0.0)
    assert len(search.records) == 50
    assert scopes == {True, False}
    assert clamped > 0


def test_min_weight_is_a_fraction_of_the_clamped_maximum() -> None:
    params = {name: 1.0 for name in search_space(LAYERS)}
    params |= {"direction_scope": "global", "direction_index": 5.5, "attention.max_weight": 1.2}
    params |= {"attention.min_weight_fraction": 0.25, "mlp.max_weight": -0.1}
    edit = edit_of(params)
    assert edit.direction_index == 5.5
    assert edit.profiles["attention"].min_weight == pytest.approx(0.3)
    assert edit.profiles["mlp"].max_weight == 0.0 == edit.profiles["mlp"].min_weight
    assert edit_of(params | {"direction_scope": "per layer"}).direction_index is None


def test_objectives_stop_chasing_a_small_kl() -> None:
    assert objectives(TrialScores(15, 0.5), 60, 0.01) == (0.25, 0.5)
    assert objectives(TrialScores(15, 0.01), 60, 0.01) == (0.25, 0.01)
    assert objectives(TrialScores(15, 0.0099), 60, 0.01) == (0.25, 0.0025)


def test_a_first_scorer_that_is_maximised(tmp_path: Path) -> None:
    """People see raw numbers, Optuna too; the sampler gets negated ones. An original of 0 is nothing to stop at."""
    assert objectives(TrialScores(15, 0.5, maximize=True), 60, 0.01) == (-0.25, 0.5)
    assert objectives(TrialScores(15, 0.0099, maximize=True), -60, 0.01) == (-0.25, -0.0025)
    assert objectives(TrialScores(15, 0.5, maximize=True), 0, 0.01) == (-15, 0.5)
    path, about = tmp_path / "study.journal", About("owner/model", maximize=True)

    def opened() -> Search:
        return Search(path, LAYERS, settings(), baseline_refusals=0, about=about)

    search = opened()
    for number, kl in ((3, 0.2), (8, 0.3), (5, 0.1), (8, 0.4)):
        [ask] = search.ask()
        search.tell(ask, TrialScores(number, kl, maximize=True), seconds=0.5)
    found = opened().records
    assert found == search.records and [each.refusals for each in found] == [3, 8, 5, 8]
    assert pareto_front(found) == [1, 2] and found[1].to_dict()["maximize"]
    study = study_of(path, "owner/model")
    assert [each.number for each in study.best_trials] == [1, 2] and study.trials[1].values == [8, 0.3]
    assert study.trials[1].user_attrs[MINIMISED] == [-8, 0.3]


def test_record_has_the_keys_of_the_results_file(tmp_path: Path) -> None:
    search = open_search(tmp_path / "study.journal")
    (ask,) = search.ask()
    record = search.tell(ask, TrialScores(3, 0.02, {"refusals": np.int64(3), "other": np.float32("nan")}), 1.5)
    entry = json.loads(json.dumps(record.to_dict(), allow_nan=False))
    assert list(entry) == [
        "index", "pass", "state", "direction_index", "profiles", "refusals", "kl", "scores", "seconds",
    ]  # fmt: skip
    assert (entry["index"], entry["pass"], entry["state"]) == (0, 0, "complete")
    assert (entry["refusals"], entry["kl"], entry["seconds"]) == (3, 0.02, 1.5)
    assert entry["scores"] == {"refusals": 3, "other": None}
    assert set(entry["profiles"]["mlp"]) == {
        "max_weight", "max_weight_position", "min_weight", "min_weight_distance",
    }  # fmt: skip
    assert TrialRecord.from_dict(entry) == record
    assert search.records == [record]


@pytest.mark.parametrize("scores", [None, TrialScores(3, float("nan")), TrialScores(float("inf"), 0.1)])
def test_a_trial_without_finite_scores_is_failed(tmp_path: Path, scores: TrialScores | None) -> None:
    search = open_search(tmp_path / "study.journal", trials=2)
    record = search.tell(search.ask()[0], scores, seconds=1.0)
    assert (record.state, record.refusals, record.kl) == ("failed", None, None)
    assert trials_of(tmp_path / "study.journal")[0][1] == "FAIL"
    assert open_search(tmp_path / "study.journal", trials=2).records == [record]
    assert search.remaining == 1


def test_seed_decides_the_edits(tmp_path: Path) -> None:
    first, same, other = (
        run(open_search(tmp_path / name, trials=14, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == same
    assert all(one.edit != two.edit for one, two in zip(first, other, strict=True))
    assert len({record.edit.profiles["attention"] for record in first}) == 14


def test_the_sampler_learns(tmp_path: Path) -> None:
    """After the random start, trials crowd where both objectives are low."""

    def loss(record: TrialRecord) -> float:
        scores = TrialScores(record.refusals or 0, record.kl or 0)
        return sum(objectives(scores, 60, 0.01)) if record.complete else 1.0

    records = run(open_search(tmp_path / "study.journal", trials=80, startup=20, per_pass=4, seed=3))
    start = sum(loss(record) for record in records[:20]) / 20
    end = sum(loss(record) for record in records[-20:]) / 20
    assert end < start / 2


@pytest.mark.parametrize("per_pass", [1, 4])
@pytest.mark.parametrize("stops", [[1, 9, 10, 13], [6, 7, 8, 26, 39]])
def test_closing_anywhere_changes_nothing(tmp_path: Path, per_pass: int, stops: list[int]) -> None:
    whole = run(open_search(tmp_path / "whole", per_pass=per_pass))
    for stop in stops:
        run(open_search(tmp_path / "parts", per_pass=per_pass), stop_after=stop)
        assert len(open_search(tmp_path / "parts", per_pass=per_pass).records) == stop
    assert run(open_search(tmp_path / "parts", per_pass=per_pass)) == whole
    assert trials_of(tmp_path / "parts") == trials_of(tmp_path / "whole")


def test_a_cut_pass_is_computed_whole_again(tmp_path: Path) -> None:
    """What is computed beside a trial decides its scores' last digits; those that are recorded stay."""
    run(open_search(tmp_path / "study.journal", per_pass=4), stop_after=18)
    search = open_search(tmp_path / "study.journal", per_pass=4)
    asks, before = search.ask(), search.records
    assert [ask.index for ask in asks] == [16, 17, 18, 19]
    assert [search.knows(ask) for ask in asks] == [True, True, False, False]
    assert search.tell(asks[0], None, 9.0) == before[16] and search.records == before
    for ask in asks[2:]:
        search.tell(ask, cheap_scores(ask.edit), 0.1)
    assert [ask.index for ask in search.ask()] == [20, 21, 22, 23]


def test_a_cut_pass_keeps_its_size_when_trials_per_pass_changes(tmp_path: Path) -> None:
    whole = run(open_search(tmp_path / "whole", per_pass=4))
    run(open_search(tmp_path / "parts", per_pass=4), stop_after=18)
    resumed = open_search(tmp_path / "parts", per_pass=1)
    for _ in range(2):
        (ask,) = resumed.ask()
        assert (ask.edit, ask.pass_) == (whole[ask.index].edit, 4)
        resumed.tell(ask, cheap_scores(ask.edit), seconds=0.5)
    assert [ask.pass_ for ask in resumed.ask()] == [5]


def test_more_trials_than_first_planned_are_those_of_a_longer_study(tmp_path: Path) -> None:
    whole = run(open_search(tmp_path / "whole", trials=24, per_pass=4))
    search = open_search(tmp_path / "grown", trials=14, per_pass=4)
    assert run(search) == whole[:14]
    assert search.ask() == [] and search.remaining == 0
    search.trials = 19
    assert run(search) == whole[:19]
    again = open_search(tmp_path / "grown", trials=24, per_pass=4)
    assert [ask.index for ask in again.ask()] == [16, 17, 18, 19]
    assert run(again) == whole


def test_asking_twice_gives_the_same_trials(tmp_path: Path) -> None:
    search = open_search(tmp_path / "study.journal", per_pass=4)
    asks = search.ask()
    assert [ask.index for ask in asks] == [0, 1, 2, 3]
    assert search.ask() == asks
    search.tell(asks[2], cheap_scores(asks[2].edit), 0.5)
    assert search.ask() == [asks[0], asks[1], asks[3]]


def test_trials_told_out_of_order_reach_the_journal_in_order(tmp_path: Path) -> None:
    whole = run(open_search(tmp_path / "whole", trials=12, per_pass=4))
    search = open_search(tmp_path / "shuffled", trials=12, per_pass=4)
    while asks := search.ask():
        for ask in reversed(asks):
            scores = TrialScores(3, float("nan")) if ask.index == 7 else cheap_scores(ask.edit)
            search.tell(ask, scores, 0.5)
            done = [number for number, *_ in trials_of(tmp_path / "shuffled")]
            assert done == list(range(len(done)))
    assert search.records == whole
    assert trials_of(tmp_path / "shuffled") == trials_of(tmp_path / "whole")


def test_a_half_written_line_and_a_stale_lock_are_cleared(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    whole = run(open_search(tmp_path / "whole"))
    run(open_search(path), stop_after=12)
    complete = path.read_bytes()
    lines = complete.splitlines(keepends=True)
    for tail in (lines[-1][: len(lines[-1]) // 2], lines[-1][:-1], b"\0\0\0\0"):
        path.write_bytes(complete + tail)
        os.symlink(path, tmp_path / "study.journal.lock")
        start = time.monotonic()
        search = open_search(path)
        assert time.monotonic() - start < 5
        assert len(search.records) == 12
        assert path.read_bytes() == complete
    assert run(search) == whole


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    run(open_search(path), stop_after=3)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3][:20] + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match="damaged at line 4"):
        open_search(path)


def test_another_model_depth_is_refused(tmp_path: Path) -> None:
    run(open_search(tmp_path / "study.journal"), stop_after=1)
    with pytest.raises(UserError, match="direction_index"):
        Search(tmp_path / "study.journal", LAYERS + 1, settings(), baseline_refusals=60)


def test_nothing_to_search_for_without_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to search for"):
        Search(tmp_path / "study.journal", LAYERS, settings(), baseline_refusals=0)
    assert list(tmp_path.iterdir()) == []


def test_a_cut_pass_that_would_now_be_asked_for_otherwise_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after an update of what proposes them; another seed stands in for that."""
    path = tmp_path / "study.journal"
    first = open_search(path, trials=8, per_pass=4, seed=0)
    first.tell(first.ask()[0], TrialScores(refusals=3, kl=0.1), 0.0)
    assert open_search(path, trials=8, per_pass=4, seed=0).ask() and not caplog.messages
    other = open_search(path, trials=8, per_pass=4, seed=1)
    assert other.asked[0] == trials_of(path)[0][2]  # what was scored, not what would be asked for now
    assert edit_of(other.asked[0]) == other.records[0].edit and [ask.index for ask in other.ask()] == [0, 1, 2, 3]
    told = [message for message in caplog.messages if message.startswith("trial 0 of study.journal was asked for")]
    assert len(told) == 1 and "was heretic-ds, Optuna or numpy updated?" in told[0]


def test_trials_left_running_are_evaluated_again(tmp_path: Path) -> None:
    """Another Optuna program was killed at work: its half sampled trials keep what they have."""
    path = tmp_path / "study.journal"
    run(open_search(path), stop_after=3)
    study = study_of(path)
    sampled = study.ask(fixed_distributions=search_space(LAYERS)).params
    study.ask().suggest_float("attention.max_weight", 0.8, 1.5)
    study.enqueue_trial({"mlp.max_weight": 0.5, "unknown": 0.5})
    queued = study.ask()
    queued.suggest_float("unknown", 0, 1)
    study.enqueue_trial({"mlp.max_weight": 0.75})

    search = open_search(path, trials=9, per_pass=2)
    assert [record.index for record in search.records] == [0, 1, 2]
    (first,) = search.ask()
    assert first == Ask(index=3, edit=edit_of(sampled), pass_=3)
    assert [record.index for record in run(search)] == list(range(9))
    assert search.records[5].edit.profiles["mlp"].max_weight == 0.5
    assert search.records[6].edit.profiles["mlp"].max_weight == 0.75
    assert [record.pass_ for record in search.records] == [0, 1, 2, 3, 4, 5, 6, 7, 7]
    assert all(state in ("COMPLETE", "FAIL") for _, state, *_ in trials_of(path))
    assert open_search(path, trials=9, per_pass=2).records == search.records


def test_trials_finished_by_something_else_are_never_chosen(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    run(open_search(path), stop_after=2)
    study = study_of(path)
    study.tell(study.ask(fixed_distributions=search_space(LAYERS)), [0.1, 0.1])
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    search = open_search(path, trials=12)
    assert [record.state for record in search.records] == ["complete", "complete", "failed", "failed"]
    assert len(run(search)) == 12


def test_the_study_on_disk_tells_raw_scores(tmp_path: Path) -> None:
    """Its best trials are the front; what the sampler minimised is beside."""
    about = About("owner/model", "refusals", {"model": "owner/model", "original": 60})
    path = tmp_path / "study.journal"
    search = Search(path, LAYERS, settings(trials=40, per_pass=4), baseline_refusals=60, about=about)
    records = run(search)
    study = study_of(path, "owner/model")
    assert study.metric_names == ["refusals", "KL divergence (nats)"]
    assert (study.user_attrs["model"], study.user_attrs["original"]) == ("owner/model", 60)
    for record, trial in zip(records, study.trials, strict=True):
        if record.complete:
            assert trial.values == [record.refusals, record.kl]
            scores = TrialScores(record.refusals or 0, record.kl or 0)
            assert trial.user_attrs[MINIMISED] == list(objectives(scores, 60, 0.01))
        else:
            assert trial.values is None and MINIMISED not in trial.user_attrs
    front = pareto_front(records)
    assert sorted(front) == [trial.number for trial in study.best_trials] and len(front) > 3
    lines = path.read_bytes()
    Search(path, LAYERS, settings(trials=40, per_pass=4), baseline_refusals=60, about=about)
    assert path.read_bytes() == lines  # nothing new to tell


def asked_of_a_reference(records: list[TrialRecord], baseline: float, startup: int, per_pass: int) -> list[dict]:
    """What Optuna alone asks for, on a study of minimised values, one sampler from (seed, index) each, given the scores
    that these trials got."""
    study = optuna.create_study(directions=["minimize", "minimize"])
    asked: list[dict] = []
    for first in range(0, len(records), per_pass):
        for index in range(first, first + per_pass):
            seed = int(np.random.SeedSequence([0, index]).generate_state(1)[0])
            study.sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True
            )
            asked.append(study.ask(fixed_distributions=search_space(LAYERS)).params)
        for record in records[first : first + per_pass]:
            if record.refusals is None or record.kl is None:
                study.tell(record.index, state=optuna.trial.TrialState.FAIL)
                continue
            share = record.refusals / baseline
            study.tell(record.index, [share, record.kl if record.kl >= 0.01 else share * 0.01])
    return asked


@pytest.mark.parametrize("per_pass", [1, 4])
def test_the_sampler_sees_what_it_minimises(tmp_path: Path, per_pass: int) -> None:
    search = open_search(tmp_path / "study.journal", per_pass=per_pass)
    records = run(search)
    asked = asked_of_a_reference(records, 60, startup=10, per_pass=per_pass)
    assert [trial.params for trial in study_of(tmp_path / "study.journal").trials] == asked
    assert {record.kl >= 0.01 for record in records if record.kl is not None} == {True, False}


OLD_JOURNAL = Path(__file__).parent / "study_of_0_1.journal.gz"
"""Written by version 0.1, whose values were what its sampler minimised: `open_search(path, per_pass=4)` above, all 40
trials."""


def old_journal(path: Path, trials: int) -> Path:
    """The old journal as it was after so many trials; its first three lines are the study's own."""
    lines = gzip.decompress(OLD_JOURNAL.read_bytes()).splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: 3 + trials]))
    return path


def test_the_trials_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """The same seed, the same scores, the same trials, to the last digit of a common machine."""
    before = trials_of(old_journal(tmp_path / "old", 40))
    run(open_search(tmp_path / "new", per_pass=4))
    for old, new in zip(before, trials_of(tmp_path / "new"), strict=True):
        assert old[:2] == new[:2]
        for name, value in old[2].items():  # type: ignore[attr-defined]
            assert new[2][name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-9))  # type: ignore[index]
        assert new[3] == (None if old[3] is None else [new[4]["refusals"], new[4]["kl"]])  # type: ignore[index]
        if old[3] is not None:
            assert new[4][MINIMISED] == pytest.approx(old[3], rel=1e-9)  # type: ignore[index]


@pytest.mark.parametrize("trials", [6, 18, 40])
def test_an_old_journal_is_gone_on_with(tmp_path: Path, trials: int) -> None:
    """Also one that was cut in the middle of a pass, or that another program left a trial in."""
    whole = run(open_search(tmp_path / "whole", per_pass=4))
    path = old_journal(tmp_path / "study.journal", trials)
    search = Search(path, LAYERS, settings(per_pass=4), baseline_refusals=60, about=About("owner/model"))
    study = study_of(path, "owner/model")
    assert [trial.number for trial in study.best_trials] == sorted(pareto_front(search.records))
    assert study.metric_names == ["refusals", "KL divergence (nats)"]
    records = run(search)
    assert [(r.index, r.pass_, r.state, r.refusals) for r in records] == [
        (r.index, r.pass_, r.state, r.refusals) for r in whole
    ]
    assert [r.kl or 0.0 for r in records] == pytest.approx([r.kl or 0.0 for r in whole], rel=1e-6)
    assert not [file.name for file in tmp_path.iterdir() if "tmp" in file.name]


def test_an_old_journal_keeps_what_another_program_left_in_it(tmp_path: Path) -> None:
    path = old_journal(tmp_path / "study.journal", 8)
    study = study_of(path)
    study.set_user_attr("mine", [1, 2])
    study.enqueue_trial({"mlp.max_weight": 0.75})
    study.enqueue_trial({"mlp.max_weight": 0.5})
    study.ask().suggest_float("mlp.max_weight", -0.25, 1.5)
    search = open_search(path, per_pass=4, trials=12)
    assert study_of(path).user_attrs["mine"] == [1, 2]
    weights = [record.edit.profiles["mlp"].max_weight for record in run(search)[8:10]]
    assert weights == [0.75, 0.5]


def test_an_old_journal_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while it is written anew leaves the old one, and the next start does it again."""
    path = old_journal(tmp_path / "study.journal", 8)
    before, whole = path.read_bytes(), optuna.Study.add_trial

    def killed(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if trial.number == 5:
            raise KeyboardInterrupt
        whole(study, trial)

    monkeypatch.setattr(optuna.Study, "add_trial", killed)
    with pytest.raises(KeyboardInterrupt):
        open_search(path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert len(open_search(path).records) == 8 and b'"minimised"' in path.read_bytes()


CHILD = """
import os, signal, sys, time
from pathlib import Path
from optuna.storages.journal import JournalFileBackend
sys.path.insert(0, {tests!r})
import test_search as t

journal, per_pass, cut = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
append, calls = JournalFileBackend.append_logs, 0

def dying_append(self, logs):
    global calls
    calls += 1
    if calls == cut:
        self._lock.acquire()
        line = __import__("json").dumps(logs[0]).encode()
        with open(journal, "ab") as file:
            file.write(line[: len(line) // 3])
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, logs)

JournalFileBackend.append_logs = dying_append
scores = t.cheap_scores
t.cheap_scores = lambda edit: time.sleep(0.01) or scores(edit)
t.run(t.open_search(journal, per_pass=per_pass))
"""


def start_child(journal: Path, per_pass: int, cut: int = -1) -> subprocess.Popen[bytes]:
    code = CHILD.format(tests=str(Path(__file__).parent))
    package = str(Path(heretic_ds.__file__).parents[1])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": package}
    return subprocess.Popen([sys.executable, "-c", code, str(journal), str(per_pass), str(cut)], env=env)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("per_pass", [1, 4])
def test_sigkill_at_random_moments(tmp_path: Path, per_pass: int) -> None:
    """Two kills while trials run, one in the middle of an append; then the trials of a quiet study."""
    whole = run(open_search(tmp_path / "whole", per_pass=per_pass))
    journal = tmp_path / "killed"
    for target in sorted(random.sample(range(5, 34), 2)):
        child = start_child(journal, per_pass)
        deadline = time.monotonic() + 60
        while lines_in(journal) < target and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))
        child.send_signal(signal.SIGKILL)
        assert child.wait(60) == -signal.SIGKILL, "the study ended before it was killed"
        assert target <= lines_in(journal) < 43
    before = journal.read_bytes()
    assert start_child(journal, per_pass, cut=random.randint(1, 3)).wait(60) == -signal.SIGKILL
    assert not journal.read_bytes().endswith(b"\n")
    assert (tmp_path / "killed.lock").is_symlink()
    assert journal.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert run(open_search(journal, per_pass=per_pass)) == whole
    assert trials_of(journal) == trials_of(tmp_path / "whole")
