"""Stages by themselves: where a run works, what it may replace, how it chooses, and what it leaves after an end."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from heretic_ds.ablation import Edit, Profile
from heretic_ds.errors import SearchFailed, UserError
from heretic_ds.search.loop import run_search
from heretic_ds.search.trials import TrialRecord, TrialScores
from heretic_ds.settings import Settings
from heretic_ds.stages import opening
from heretic_ds.stages.finish import finish, objective_of, select_and_verify
from heretic_ds.stages.fixed import fixed_edit, named_edit
from heretic_ds.stages.opening import Run, already_finished, export_dir, may_replace, refuse_used_export_folder, run_dir
from heretic_ds.world import World
from tests.conftest import ComposeSettings

WORLD = World()
PROFILE = {"max_weight": 1.0, "max_weight_position": 2.0, "min_weight": 0.5, "min_weight_distance": 1.5}
FIXED = [f"ablation.profiles.mlp.{key}={value}" for key, value in PROFILE.items()]


@pytest.fixture
def settings(compose_settings: ComposeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ComposeSettings:
    """Settings as composed, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return compose_settings


def record(index: int, refusals: float, kl: float) -> TrialRecord:
    edit = Edit(float(index), {"mlp": Profile(**PROFILE)})
    return TrialRecord(index, index, "complete", edit, refusals, kl, {"refusals": refusals}, 0.1)


# Where a run works


def test_default_folders(settings: ComposeSettings) -> None:
    assert run_dir(settings(model="org/some-model")) == Path("runs/some-model")
    assert run_dir(settings(model="models/mine/")) == Path("runs/mine")
    assert run_dir(settings("task=evaluate", model="org/some-model")) == Path("runs/some-model-evaluate")
    assert run_dir(settings("task=export", model="org/some-model")) == Path("runs/some-model")
    assert run_dir(settings("run.dir='~/x'")) == Path.home() / "x"
    assert export_dir(settings("run.dir=x")) == Path("x/model")
    assert export_dir(settings("run.dir=x", "export.dir='~/y'")) == Path.home() / "y"


# What may be replaced


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder `x` with an export in it."""
    model = tmp_path / "x" / "model"
    model.mkdir(parents=True)
    (tmp_path / "x" / "measured.json").write_text('{"run_id": "abc"}')
    (model / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (model / "heretic_ds.json").write_text('{"run_id": "abc", "trial": 4}')
    return model


@pytest.mark.parametrize(
    ("words", "may"),
    [
        ([], True),
        (["task=export", "export.trial=4"], True),
        (["task=export", "export.trial=5"], False),
        (["task=export", *FIXED], False),
        (["task=export", "export.trial=5", "export.overwrite=true"], True),
        (["export.dir=elsewhere"], False),
    ],
)
def test_a_run_may_replace_its_own_export(
    words: list[str], may: bool, settings: ComposeSettings, exported: Path
) -> None:
    assert may_replace(settings("run.dir=x", *words)) is may


@pytest.mark.parametrize("manifest", ['{"run_id": "other", "trial": 4}', '{"trial": 4}', None])
def test_a_run_may_not_replace_the_export_of_another(
    manifest: str | None, settings: ComposeSettings, exported: Path
) -> None:
    (exported / "heretic_ds.json").unlink() if manifest is None else (exported / "heretic_ds.json").write_text(manifest)
    assert not may_replace(settings("run.dir=x"))
    with pytest.raises(UserError, match=r"exists and is not empty.*export\.overwrite=true"):
        refuse_used_export_folder(settings("run.dir=x"), WORLD)


def test_what_a_user_added_to_an_export_is_kept(settings: ComposeSettings, exported: Path) -> None:
    refuse_used_export_folder(settings("run.dir=x"), WORLD)
    (exported / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"also holds notes\.md"):
        refuse_used_export_folder(settings("run.dir=x"), WORLD)


def test_finished_means_asked_for_the_same_and_exported(
    settings: ComposeSettings, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings("run.dir=x", "search.trials=4")
    results = {"finished": opening.request(asked, opening.export_dir(asked)), "verified": None}
    (exported.parent / "results.json").write_text(json.dumps(results))
    (exported.parent / "fingerprint.json").write_text(json.dumps(opening.fingerprint(asked)))
    assert already_finished(asked, WORLD) is None  # the export has lost its weights
    monkeypatch.setattr(opening, "holds_export", lambda folder, form: True)
    assert already_finished(asked, WORLD) == results
    assert already_finished(settings("run.dir=x", "search.trials=5"), WORLD) is None
    assert already_finished(settings("run.dir=x", "search.trials=4", "search.seed=1"), WORLD) is None
    assert already_finished(settings("run.dir=x", "search.trials=4", "generation.batch_size=7"), WORLD) == results
    (exported / "heretic_ds.json").unlink()
    assert already_finished(asked, WORLD) is None


# Edits that the user names


def test_a_fixed_edit(settings: ComposeSettings) -> None:
    assert fixed_edit(settings("task=evaluate")) is None
    assert fixed_edit(settings("task=evaluate", *FIXED)) == Edit(None, {"mlp": Profile(**PROFILE)})
    named = settings("task=export", "ablation.direction_index=1.5", *FIXED)
    assert named_edit(named, WORLD) == (Edit(1.5, {"mlp": Profile(**PROFILE)}), None)


def test_an_edit_by_its_trial(settings: ComposeSettings, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    failed = record(1, 0, 0.0).to_dict() | {"state": "failed"}
    results = {"trials": [record(0, 3, 0.1).to_dict(), failed, record(2, 1, 0.2).to_dict()]}
    (tmp_path / "x" / "results.json").write_text(json.dumps(results))
    chosen = ["run.dir=x", "task=export"]
    wanted = record(2, 1, 0.2)
    assert named_edit(settings(*chosen, "export.trial=2"), WORLD) == (wanted.edit, wanted)
    for trial in (1, 3):
        with pytest.raises(UserError, match=rf"export\.trial={trial}: x has no finished trial .* are 0 to 2"):
            named_edit(settings(*chosen, f"export.trial={trial}"), WORLD)
    with pytest.raises(UserError, match=r"export\.trial=0: y holds no trials.*run\.dir"):
        named_edit(settings("run.dir=y", "task=export", "export.trial=0"), WORLD)
    with pytest.raises(UserError, match=r"no edit was named: give export\.trial=<index>"):
        named_edit(settings(*chosen), WORLD)


# The choice


class FakeRun(SimpleNamespace):
    """What the last stages read and add to."""

    def __init__(self, settings: Settings, records: list[TrialRecord]) -> None:
        super().__init__(
            settings=settings, records=records, folder=None, console=Console(quiet=True), path=Path("x"), saved=[],
            applied=[], scorer="refusals", world=WORLD, results={
                "selected": None, "verified": None, "baseline": {"refusals": 8}, "prompts": {"target_eval": 10},
                "timings": {},
            },
        )  # fmt: skip
        self.engine = SimpleNamespace(apply=self.applied.append, restore=lambda: self.applied.append(None))
        self.job = SimpleNamespace(texts={"target.eval": ["How are you?"] * 10}, packed=frozenset(), held_as="none")

    def timed(self, phase: str) -> Any:
        return Run.timed(self, phase)  # type: ignore[arg-type]

    def save(self, finished: bool = False) -> None:
        self.saved.append(finished)


class Verified:
    """An objective that finds, on edited weights, what it is given for each of the verifications."""

    original_answers, answers = ["no"] * 10, ["fine"] * 10
    original = TrialScores(8, 0.0)

    def __init__(self, *scores: tuple[float, float]) -> None:
        self.scores = list(scores)

    def score(self, edits: list[Edit | None]) -> list[TrialScores]:
        assert edits == [None]
        refusals, kl = self.scores.pop(0)
        return [TrialScores(refusals, kl, {"refusals": refusals})]

    def examples(self, most: int) -> list[dict[str, str]]:
        return [{"prompt": "a", "original": "b", "edited": f"{len(self.scores)} left"}][:most]


RECORDS = [record(0, 4, 0.01), record(1, 1, 0.08), record(2, 2, 0.05), record(3, 0, 0.5)]


def choose(settings: Settings, *verified: tuple[float, float]) -> tuple[TrialRecord, FakeRun]:
    run = FakeRun(settings, RECORDS)
    return select_and_verify(run, Verified(*verified)), run  # type: ignore[arg-type]


def test_the_fewest_refusals_within_the_limit_are_chosen(settings: ComposeSettings) -> None:
    chosen, run = choose(settings("export.max_kl=0.1"), (1, 0.09))
    assert chosen.index == 1 and run.results["selected"] == 1 and run.applied == [RECORDS[1].edit]
    assert run.results["verified"] == {"refusals": 1, "kl": 0.09, "scores": {"refusals": 1}}


def test_a_trial_beyond_the_limit_on_edited_weights_gives_way(settings: ComposeSettings) -> None:
    chosen, run = choose(settings("export.max_kl=0.1"), (1, 0.11), (2, 0.1))
    assert chosen.index == 2 and run.applied == [RECORDS[1].edit, RECORDS[2].edit]


def test_all_ranks_go_by_the_kl_of_the_one_that_decides(settings: ComposeSettings) -> None:
    run = FakeRun(settings("export.max_kl=0.1"), RECORDS)
    told = [0.11, 0.1]
    run.world = SimpleNamespace(same=lambda value: told.pop(0))
    chosen = select_and_verify(run, Verified((1, 0.1), (2, 0.11)))  # type: ignore[arg-type]
    assert chosen.index == 2 and run.applied == [RECORDS[1].edit, RECORDS[2].edit]


def test_where_none_is_left_the_closest_is_named_and_the_weights_come_back(settings: ComposeSettings) -> None:
    run = FakeRun(settings("export.max_kl=0.1"), RECORDS)
    with pytest.raises(SearchFailed, match=r"export\.max_kl=0\.1: the closest was trial 0 with KL 0\.01"):
        select_and_verify(run, Verified((1, 0.2), (2, 0.2), (4, 0.2)))  # type: ignore[arg-type]
    assert run.results["verified"] is None and run.results["selected"] is None
    assert run.applied[-1] is None and run.saved == [False] and run.results["pareto"] == [3, 1, 2, 0]
    with pytest.raises(SearchFailed, match="no trial was finished"):
        select_and_verify(FakeRun(settings(), []), Verified())  # type: ignore[arg-type]


def test_a_named_trial_is_taken_whatever_its_scores(settings: ComposeSettings) -> None:
    chosen, _ = choose(settings("export.max_kl=0.1", "export.trial=3"), (0, 0.9))
    assert chosen.index == 3
    with pytest.raises(UserError, match=r"export\.trial=9: the search has no finished trial"):
        choose(settings("export.trial=9"))


@pytest.mark.parametrize(("words", "finished"), [(["search.trials=4"], True), (["search.trials=5"], False)])
def test_a_stopped_search_is_not_finished(words: list[str], finished: bool, settings: ComposeSettings) -> None:
    run = FakeRun(settings(*words), RECORDS)
    run.results["verified"] = {"refusals": 1, "kl": 0.05}
    assert finish(run) == (0.1, 0.05)  # type: ignore[arg-type]
    assert run.saved == [finished]
    evaluated = FakeRun(settings("task=evaluate", *words), [])
    assert finish(evaluated) is None and evaluated.saved == [True]  # type: ignore[arg-type]


# The model's layouts


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The phases for which an engine is built, and closed, from now on."""
    phases: list[str] = []

    def build(job: Any, phase: str) -> Any:
        phases.append(phase)
        closed = f"{phase} closed"
        return SimpleNamespace(batch_sizes={}, degree=1, dtype=torch.float32, close=lambda: phases.append(closed))

    monkeypatch.setattr(opening, "build_engine", build)

    def kept(job: Any, engine: Any, layout: Any) -> Any:  # the real one: test_kept_batches.py
        return SimpleNamespace(used=lambda: SimpleNamespace(prefer=engine.batch_sizes.update, keep=lambda: None))

    monkeypatch.setattr(opening, "KeptBatches", kept)
    return phases


def run_of(chosen: Settings, device: str = "cpu", ranks: int = 1) -> Run:
    """A run whose folder has a batch size for the model on one rank of the CPU."""
    opened = SimpleNamespace(device=torch.device(device))
    job = SimpleNamespace(settings=chosen, world=World(size=ranks), opened=opened, held_as="none")
    run = Run(job, Console(quiet=True))  # type: ignore[arg-type]
    run.results = {"timings": {}, "world": {"capture": {}, "evaluate": {}}}
    run.measured = {"batch_sizes": {"replicated, 1 of 1 ranks, cpu": {"generate": 7}}}
    return run


def test_phases_placed_alike_share_an_engine(settings: ComposeSettings, built: list[str]) -> None:
    whole = ["capture=replicated", "evaluate=replicated"]
    run = run_of(settings(*whole))
    assert run.lay_out("capture") is run.lay_out("evaluate") is run.engine
    assert built == ["capture"] and run.engine.batch_sizes == {"generate": 7}
    assert run.results["dtype"] == "float32"  # what was loaded, whatever was to be tried first
    run = run_of(settings("capture=replicated", "evaluate=tensor_parallel"))
    run.lay_out("capture")
    run.lay_out("evaluate")
    assert built[1:] == ["capture", "capture closed", "evaluate"]
    assert run.engine.batch_sizes == {}  # sizes measured on one placement say nothing about another
    elsewhere = run_of(settings(*whole), "meta")
    assert elsewhere.lay_out("evaluate").batch_sizes == {}  # nor on another device
    given = run_of(settings(*whole, "generation.batch_size=3"))
    given.use_measured({"batch_sizes": {"replicated, 1 of 1 ranks, cpu": {"generate": 7}}})
    assert given.lay_out("evaluate").batch_sizes == {}  # the size that the user gave is the engine's business


@pytest.mark.parametrize(
    ("words", "shared"),
    [
        (["capture=tensor_parallel", "evaluate=tensor_parallel", "evaluate.degree=4"], True),
        (["capture=tensor_parallel", "evaluate=tensor_parallel", "evaluate.degree=2"], False),
        (["capture=tensor_parallel", "evaluate=tensor_parallel", "evaluate.backend=hf_plan"], False),
        (["capture=tensor_parallel", "capture.parity_check=false", "evaluate=tensor_parallel"], False),
        (["capture=zero3", "evaluate=tensor_parallel"], False),
        (["capture=replicated", "capture.degree=1", "evaluate=replicated"], True),
    ],
)
def test_a_model_is_laid_out_anew_where_any_option_differs_and_not_for_another_way_to_write_it(
    words: list[str], shared: bool, settings: ComposeSettings, built: list[str]
) -> None:
    run = run_of(settings(*words), ranks=4)
    run.lay_out("capture")
    run.lay_out("evaluate")
    assert built == (["capture"] if shared else ["capture", "capture closed", "evaluate"])


# Ctrl-C


class EndlessSearch:
    """A study with one more trial to come, always."""

    remaining = 1

    def __init__(self) -> None:
        self.told: list[int] = []

    def ask(self) -> list[Any]:
        return [SimpleNamespace(index=len(self.told), edit=None)]

    def knows(self, ask: Any) -> bool:
        return ask.index in self.told

    def tell(self, ask: Any, scores: Any, seconds: float) -> int:
        self.told.append(ask.index)
        return ask.index


class Interrupted:
    """An objective during which Ctrl-C is pressed, so many times in the pass of this number."""

    screening = None

    def __init__(self, pass_: int, times: int) -> None:
        self.pass_, self.times, self.passes = pass_, times, 0

    def score(self, edits: list[Any]) -> list[Any]:
        if self.passes == self.pass_:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
        self.passes += 1
        return ["scores"] * len(edits)


def test_the_first_interrupt_ends_the_search_after_the_pass_in_flight() -> None:
    search, seen = EndlessSearch(), []
    handler = signal.getsignal(signal.SIGINT)
    assert run_search(WORLD, search, Interrupted(2, times=1), seen.extend) is False  # type: ignore[arg-type]
    assert search.told == seen == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_second_interrupt_ends_everything() -> None:
    search, seen = EndlessSearch(), []
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_search(WORLD, search, Interrupted(1, times=2), seen.extend)  # type: ignore[arg-type]
    assert search.told == seen == [0]
    assert signal.getsignal(signal.SIGINT) is handler


# What a sweep minimises


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        (None, 0.25),
        ({"combine": "sum", "direction": "minimize", "count": 8}, 0.25),
        ({"combine": "sum", "direction": "maximize", "count": 4}, -0.5),
        ({"combine": "mean", "direction": "minimize", "count": 8}, 2.0),
        ({"combine": None, "direction": "maximize", "count": 8}, -2.0),
    ],
)
def test_a_sweep_minimises_what_is_worse(scorer: dict[str, Any] | None, expected: float) -> None:
    results: dict[str, Any] = {"verified": {"refusals": 2, "kl": 0.5}, "prompts": {"target_eval": 8}}
    results |= {} if scorer is None else {"scorers": [scorer, {"combine": "sum"}]}
    assert objective_of(results) == (expected, 0.5)
