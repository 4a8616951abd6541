"""Those who follow a search: what they are told, what happens when they fail, and the real ones, read back by their own
libraries."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import pytest

from heretic_ds.report import command_line
from tests.e2e.conftest import Heretic, Material, read_results
from tests.e2e.followers import Recorder


@pytest.fixture
def told() -> Iterator[list[tuple[str, Any]]]:
    """What the trackers of :mod:`tests.e2e.followers` were told."""
    Recorder.told.clear()
    yield Recorder.told
    Recorder.told.clear()


@pytest.fixture
def words(material: Material) -> list[str]:
    return material.words(material.model("llama"), "run.dir=run", "search.trials=4", "tracking.dashboard=false")


def needs(module: str, extra: str) -> Any:
    """The module of a tracker; the test is skipped where it is not installed."""
    return pytest.importorskip(module, reason=f'needs {module}: pip install "heretic-ds[{extra}]"')


def study_of(folder: Path) -> optuna.Study:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "study.journal")))
    return optuna.load_study(study_name=None, storage=storage)


def test_a_tracker_is_told_of_the_search(heretic: Heretic, words: list[str], told: list[Any], tmp_path: Path) -> None:
    ours = "tracking.name=tests.e2e.followers.Recorder"
    assert heretic(*words, ours).status == 0
    results, facts = read_results("run"), told[0][1]
    assert [kind for kind, _ in told] == ["start", "trial", "trial", "trial", "trial", "end"]
    assert (facts.run, facts.told, facts.folder) == (None, 0, Path("run/tracking"))
    assert facts.parameters["search.trials"] == 4 and facts.parameters["evaluate.placement"] == "replicated"
    assert facts.command == results["command"] and f" {ours}" in facts.command
    for (_, (index, numbers)), trial in zip(told[1:5], results["trials"], strict=True):
        assert (index, numbers["refusals"], numbers["kl"]) == (trial["index"], trial["refusals"], trial["kl"])
        assert numbers["edit/mlp/max_weight"] == trial["profiles"]["mlp"]["max_weight"]
    chosen, files = told[5][1]
    assert chosen == results["selected"]
    assert {"results.json", "pareto.png", "config.yaml"} <= set(files) and "measured.json" not in files

    del told[:]
    assert heretic(*words, ours, "search.trials=6").status == 0
    assert [kind for kind, _ in told] == ["start", "trial", "trial", "end"]
    assert (told[0][1].run, told[0][1].told, told[1][1][0]) == ("the run", 4, 4)


def test_a_tracker_that_fails_is_one_warning(heretic: Heretic, words: list[str], told: list[Any]) -> None:
    outcome = heretic(*words, "tracking.name=tests.e2e.followers.Failing")
    assert outcome.status == 0 and outcome.out.count("No space left on device") == 1
    assert "the search goes on without it" in outcome.out
    assert len(read_results("run")["trials"]) == 4
    assert [kind for kind, _ in told] == ["start", "trial", "trial"]
    assert heretic(*words, "search.trials=5", "tracking.name=tests.e2e.followers.Recorder").status == 0
    assert [what[0] for kind, what in told if kind == "trial"] == [0, 1, 0, 1, 2, 3, 4]  # another tracker: all of them


def test_what_was_missed_is_told_later(heretic: Heretic, words: list[str], told: list[Any]) -> None:
    failing = "tracking.name=tests.e2e.followers.Failing"
    assert heretic(*words, failing).status == 0
    del told[:]
    assert heretic(*words, failing, "search.trials=5").status == 0
    assert (told[0][1].run, told[0][1].told) == ("the run", 2)


def test_a_tracker_that_cannot_start_ends_the_command(heretic: Heretic, words: list[str], told: list[Any]) -> None:
    outcome = heretic(*words, "tracking.name=tests.e2e.followers.Refusing")
    assert outcome.status == 2
    [line] = outcome.err.splitlines()
    assert "cannot start: ConnectionError: no route to host; set tracking=none" in line
    assert heretic(*words).status == 0


def test_an_error_is_told_too(heretic: Heretic, words: list[str], told: list[Any]) -> None:
    outcome = heretic(*words, "tracking.name=tests.e2e.followers.Recorder", "export.max_kl=1e-9")
    assert outcome.status == 1
    assert [kind for kind, _ in told] == ["start", *["trial"] * 4, "interrupted"]


@pytest.mark.parametrize(
    ("words_of_it", "module", "command"),
    [
        (["tracking=tensorboard"], "tensorboard", 'pip install "heretic-ds[track]"'),
        (["tracking=mlflow"], "mlflow", 'pip install "heretic-ds[mlflow]"'),
        (["tracking=trackio"], "trackio", 'pip install "heretic-ds[trackio]"'),
        (["tracking=wandb"], "wandb", 'pip install "heretic-ds[wandb]"'),
        (["tracking.dashboard=true"], "optuna_dashboard", 'pip install "heretic-ds[track]"'),
    ],
)
def test_a_missing_extra_is_one_line_before_anything_is_loaded(
    heretic: Heretic,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words_of_it: list[str],
    module: str,
    command: str,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == module else found(name, *more))
    monkeypatch.setattr("heretic_ds.stages.opening.Job.check", lambda *_: pytest.fail("something was loaded"))
    outcome = heretic(*words[:-1], *words_of_it)
    assert outcome.status == 2
    [line] = outcome.err.splitlines()
    assert line.endswith(f"which is not installed: {command}")
    assert not (tmp_path / "run").exists()


def test_tensorboard(heretic: Heretic, words: list[str]) -> None:
    needs("tensorboard", "track")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert heretic(*words, "tracking=tensorboard").status == 0
    assert heretic(*words, "tracking=tensorboard", "search.trials=6").status == 0
    events = EventAccumulator("run/tracking", size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    results = read_results("run")
    for name, key in (("refusals", "refusals"), ("kl", "kl"), ("seconds", "seconds")):
        scalars = [(event.step, event.value) for event in events.Scalars(name)]
        assert scalars == [(t["index"], pytest.approx(t[key], rel=1e-6)) for t in results["trials"]]
    assert events.Scalars("verified/refusals")[-1].value == results["verified"]["refusals"]
    assert events.Images("pareto") and events.Tensors("settings/text_summary")


def test_mlflow(heretic: Heretic, words: list[str], tmp_path: Path) -> None:
    mlflow = needs("mlflow", "mlflow")
    assert heretic(*words, "tracking=mlflow", "tracking.project=kitchen").status == 0
    assert heretic(*words, "tracking=mlflow", "tracking.project=kitchen", "search.trials=6").status == 0
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "run" / "tracking").as_uri())
    experiment = client.get_experiment_by_name("kitchen")
    [run] = client.search_runs([experiment.experiment_id])
    results = read_results("run")
    assert run.info.status == "FINISHED" and run.data.tags["command"].startswith("heretic-ds ")
    assert run.data.params["search.seed"] == "0" and run.data.params["evaluate.placement"] == "replicated"
    for name in ("refusals", "kl"):
        history = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        assert sorted(history) == [(trial["index"], trial[name]) for trial in results["trials"]]
    assert run.data.metrics["verified/kl"] == results["verified"]["kl"]
    assert {"pareto.png", "results.json"} <= {file.path for file in client.list_artifacts(run.info.run_id)}


def get(app: Any, path: str) -> bytes:
    """What optuna-dashboard's application answers to GET."""
    environment: dict[str, Any] = {}
    setup_testing_defaults(environment)
    environment |= {"PATH_INFO": path, "wsgi.input": io.BytesIO(), "QUERY_STRING": ""}
    statuses: list[str] = []
    answer = b"".join(app(environment, lambda status, headers, *_: statuses.append(status)))
    assert statuses[0].startswith("200"), (statuses, answer)
    return answer


def test_optuna_dashboard_shows_the_truth(heretic: Heretic, words: list[str], tmp_path: Path) -> None:
    dashboard = needs("optuna_dashboard", "track")
    from optuna.artifacts import FileSystemArtifactStore

    model = Path(words[0])
    assert heretic(*words[:-1], "tracking.dashboard=true").status == 0
    results, folder = read_results("run"), tmp_path / "run"
    store = FileSystemArtifactStore(folder / "artifacts")
    app = dashboard.wsgi(study_of(folder)._storage, artifact_store=store)
    [summary] = json.loads(get(app, "/api/studies"))["study_summaries"]
    assert summary["study_name"] == model.name
    detail = json.loads(get(app, f"/api/studies/{summary['study_id']}"))
    shown = {trial["number"]: trial["values"] for trial in detail["trials"]}
    assert shown == {trial["index"]: [trial["refusals"], trial["kl"]] for trial in results["trials"]}
    assert sorted(trial["number"] for trial in detail["best_trials"]) == sorted(results["pareto"])
    assert f"Trial {results['selected']} was chosen" in detail["note"]["body"]
    assert f"`{model.name}`" in detail["note"]["body"] and results["command"] in detail["note"]["body"]
    [picture] = [artifact for artifact in detail["artifacts"] if artifact["filename"] == "pareto.png"]
    kept = get(app, f"/artifacts/{summary['study_id']}/{picture['artifact_id']}")
    assert kept == (folder / "pareto.png").read_bytes()

    study = study_of(folder)
    dashboard.save_note(study, "my own words")
    assert heretic(*words[:-1], "tracking.dashboard=true", "search.trials=6").status == 0
    detail = json.loads(get(dashboard.wsgi(study_of(folder)._storage, artifact_store=store), "/api/studies/0"))
    assert detail["note"]["body"] == "my own words"
    [picture] = [artifact for artifact in detail["artifacts"] if artifact["filename"] == "pareto.png"]
    assert (folder / "artifacts" / picture["artifact_id"]).read_bytes() == (folder / "pareto.png").read_bytes()


STAGES = (
    "version: ",
    "model: ",
    "device: ",
    "capture=",
    "loaded in ",
    "directions: ",
    "the original model: ",
    "trial 0",
)
"""What a run's log has, in this order."""


def test_records_of_circumstances(heretic: Heretic, words: list[str], tmp_path: Path) -> None:
    """What results.json and run.log say of machine and command, without secrets."""
    secret = "hf_" + "x" * 30
    outcome = heretic(*words, f"prompts.system=never say {secret}")
    assert outcome.status == 0
    results, log = read_results("run"), (tmp_path / "run" / "run.log").read_text()
    assert {"os", "cpu", "cores", "memory_bytes", "gpus", "cuda"} == results["machine"].keys()
    assert results["devices"] == [{"device": "cpu", "threads": 1}] and results["dtype"] == "float32"
    assert results["batch_sizes"]["replicated, 1 of 1 ranks, cpu"]["generate"] == 5
    assert results["response_prefix"] == ""
    assert {"python", "torch", "deepspeed", "optuna", "heretic-ds"} <= results["versions"].keys()
    assert (
        results["command"].startswith(f"heretic-ds {words[0]} ")
        and "'prompts.system=never say ***'" in results["command"]
    )
    for name in ("results.json", "run.log", "config.yaml", "report.html"):  # the last two are sent to trackers
        assert secret not in (tmp_path / "run" / name).read_text()
    lines = [line.split(": ", 1)[1] for line in log.splitlines()]
    assert f"command: {results['command']}" in lines
    assert any(line.startswith("machine: ") and results["machine"]["os"] in line for line in lines)
    for name in ("model", "device", "target.train"):
        assert len([line for line in lines if line.startswith(f"{name}: ")]) == 1, name
    assert len([line for line in lines if line.endswith(", since there is one rank")]) == 1
    assert any(line.startswith("target.train: ") and " prompts of " in line for line in lines)
    stages = [next(at for at, line in enumerate(lines) if line.startswith(each)) for each in STAGES]
    assert stages == sorted(stages)
    times = [line[:23] for line in log.splitlines()]
    assert times == sorted(times)
    assert any(line.startswith("batch sizes: {") and "'generate': 5" in line for line in lines)
    told = [line for line in lines if line.startswith("trial ") and ": refusals " in line]
    assert [line.split(":")[0] for line in told] == [f"trial {index}" for index in range(4)]
    assert all(f"KL {trial['kl']:.6g}" in line for line, trial in zip(told, results["trials"], strict=True))


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("search.trials=5", "search.trials=5"),
        ("generation.max_new_tokens=40", "generation.max_new_tokens=40"),
        ("+hub.token=abc", "+hub.token=***"),
        ("my_password=x y", "my_password=***"),
        ("tracking.uri=https://ann:pw@host:5000/x", "tracking.uri=https://***@host:5000/x"),
        ("prompts.system=hf_abcdefghijklmnopqrstuv", "prompts.system=***"),
        ("owner/tokenizer-sk-small", "owner/tokenizer-sk-small"),
        ("api_key=", "api_key="),
    ],
)
def test_secrets_in_a_command_line(word: str, shown: str) -> None:
    assert command_line.without_secrets(word) == shown


def test_the_command_line_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    command_line.note(["a model", "prompts.system='say \"no\"'"])
    assert command_line.typed() == "heretic-ds 'a model' 'prompts.system='\"'\"'say \"no\"'\"'\"''"
