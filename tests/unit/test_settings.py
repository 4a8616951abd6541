"""The settings: promised defaults, mistakes that are refused by name, a reference that is current."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from heretic_ds.cli.errors import setting_types
from heretic_ds.errors import UserError
from heretic_ds.placements import placements_of
from heretic_ds.settings import PHASES, TASKS, ModelSettings, ProfileSettings, Settings, conf_dir
from heretic_ds.settings.checks import validate
from tests.conftest import ROOT, ComposeSettings

AUTO, REPLICATED = "heretic_ds.placements.auto.Auto", "heretic_ds.placements.replicated.Replicated"

PROMISED_DEFAULTS = {
    "task.name": "abliterate",
    "model.dtype": "auto",
    "model.trust_remote_code": False,
    "prompts.response_prefix": "auto",
    "capture._target_": AUTO,
    "evaluate._target_": AUTO,
    "direction.method": "mean_difference",
    "direction.orthogonalize": True,
    "direction.winsorize_quantile": 1.0,
    "ablation.rank": 1,
    "ablation.row_norm": "full",
    "ablation.through_norm": False,
    "ablation.direction_index": None,
    "search.strategy": "auto",
    "search.trials": 200,
    "search.startup_trials": 60,
    "search.seed": 0,
    "search.trials_per_pass": "auto",
    "search.kl_target": 0.01,
    "generation.max_new_tokens": 100,
    "generation.batch_size": 0,
    "scoring.scorers": ["refusals"],
    "export.dir": None,
    "export.max_kl": 0.1,
    "export.overwrite": False,
    "run.dir": None,
}

COMPLETE_PROFILE = ProfileSettings(1.0, 3.0, 0.2, 2.0)


def settings_with(**values: object) -> Settings:
    """Settings that pass, with some changed: `search__trials=5` is search.trials."""
    placed = {phase: {"_target_": REPLICATED} for phase in PHASES}
    config = OmegaConf.structured(Settings(model=ModelSettings(path="model"), **placed))
    for prompts in ("target", "baseline"):
        for part in ("train", "eval"):
            config.prompts[prompts][part].source = "prompts.txt"
    for key, value in values.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    settings = OmegaConf.to_object(config)
    assert isinstance(settings, Settings)
    return settings


def check(**values: object) -> None:
    """Refuse what the command line would refuse."""
    settings = settings_with(**values)
    validate(settings)
    placements_of(settings)


def test_composed_defaults_are_the_promised_ones(compose_settings: ComposeSettings) -> None:
    composed = OmegaConf.structured(compose_settings())
    assert {key: OmegaConf.select(composed, key) for key in PROMISED_DEFAULTS} == PROMISED_DEFAULTS


@pytest.mark.parametrize("task", TASKS)
def test_each_task_is_a_choice_of_its_group(compose_settings: ComposeSettings, task: str) -> None:
    assert compose_settings(f"task={task}").task.name == task


def test_the_demo_experiment_names_files_that_exist(compose_settings: ComposeSettings) -> None:
    from heretic_ds.cli import compose

    settings = compose(["experiment=demo"])
    assert (settings.search.trials, settings.search.startup_trials) == (40, 10)
    assert (settings.model.dtype, settings.run.dir) == ("float32", "runs/demo")
    sources = [
        getattr(getattr(settings.prompts, kind), part).source
        for kind in ("target", "baseline")
        for part in ("train", "eval")
    ]
    files = [path.removeprefix("pkg://") for path in (settings.model.path, *sources)]
    assert not [path for path in files if not (ROOT / path).exists()]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"model__device": "cuda:1"},
        {"search__startup_trials": 0, "search__trials": 1},
        {"capture__degree": 1},
        {"direction__winsorize_quantile": 0.5},
        {"direction__method": "som", "ablation__rank": 4},
        {"export__max_kl": 1e9},
        {"task__name": "evaluate", "ablation__profiles__mlp": COMPLETE_PROFILE},
        {
            "task__name": "export",
            "ablation__profiles__attention": COMPLETE_PROFILE,
            "ablation__direction_index": 2.5,
        },
        {"task__name": "export", "export__trial": 0},
        {"task__name": "chat", "export__trial": 0},
    ],
)
def test_good_settings_pass(values: dict[str, object]) -> None:
    check(**values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task.name", "train"),
        ("task.answer_tokens", 0),
        ("model.path", " "),
        ("model.dtype", "float64"),
        ("model.device", "gpu"),
        ("evaluate.degree", 2),
        ("ablation.row_norm", "half"),
        ("ablation.rank", 0),
        ("ablation.rank", 2),
        ("direction.method", "median"),
        ("direction.groups", 2),
        ("scoring.scorers", []),
        ("search.trials", 0),
        ("search.trials", -3),
        ("search.startup_trials", -1),
        ("search.trials_per_pass", 0),
        ("search.trials_per_pass", "many"),
        ("search.trials_per_pass", 1.5),
        ("search.seed", -1),
        ("search.kl_target", 0.0),
        ("search.kl_target", float("nan")),
        ("generation.max_new_tokens", 0),
        ("generation.batch_size", -1),
        ("export.trial", -1),
        ("export.max_kl", 0.0),
        ("export.max_kl", float("nan")),
        ("export.max_kl", float("inf")),
        ("direction.winsorize_quantile", 0.0),
        ("direction.winsorize_quantile", 1.5),
        ("ablation.direction_index", -0.5),
        ("ablation.direction_index", 1.0),
    ],
)
def test_a_bad_value_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^{key} is ") as refused:
        check(**{key.replace(".", "__"): value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["capture.backend=autotp"],
            "capture.backend=autotp is for capture=tensor_parallel alone, but capture is",
        ),
        (["evaluate.parity_check=false"], "is for evaluate=expert_parallel or "),
        (["evaluate.nvme_path=x"], "there is no setting evaluate.nvme_path; evaluate=auto has degree"),
        (["evaluate.offload=cpu"], "evaluate.offload=cpu is for evaluate=fsdp alone, but evaluate is auto"),
        (["capture=zero3", "capture.ofload=cpu"], "there is no setting capture.ofload; did you mean capture.offload?"),
        (["+capture.x=1"], "there is no setting capture.x; capture=auto has degree"),
        (["capture.degree=two"], "capture.degree=two does not fit: capture.degree takes a whole number, or null"),
        (["capture=zero3", "capture.pin_memory=maybe"], "capture.pin_memory takes true or false"),
        (["capture=zero3", "capture.offload=null"], "capture.offload=null does not fit: capture.offload takes text"),
        (["capture=zero3", "capture.offload.x=1"], "does not fit: capture.offload takes text"),
        (["evaluate=kernel_inject", "evaluate.degree=2"], "but a kernel_inject model lies on one rank; leave it null"),
        (["capture._target_=nowhere.Class"], "capture._target_: nowhere.Class cannot be imported: No module named"),
        (["capture._target_=json.dumps"], "json.dumps is not a class derived from heretic_ds.placements.Placement"),
        (["~capture"], "capture._target_: None cannot be imported"),
    ],
)
def test_a_placement_says_what_is_wrong_with_its_options(words: list[str], said: str, compose_settings) -> None:
    with pytest.raises(UserError) as refused:
        compose_settings(*words)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (ProfileSettings(max_weight=1.0), "lacks max_weight_position, min_weight, min_weight_distance"),
        (ProfileSettings(None, 3.0, 0.2, 2.0), "lacks max_weight;"),
        (ProfileSettings(1.0, 3.0, 0.2, 0.0), "min_weight_distance is 0.0"),
        (ProfileSettings(1.0, float("nan"), 0.2, 1.0), "max_weight_position is nan"),
        (ProfileSettings(float("inf"), 3.0, 0.2, 1.0), "max_weight is inf"),
    ],
)
@pytest.mark.parametrize("component", ["attention", "mlp"])
def test_a_profile_is_complete_and_finite(profile: ProfileSettings, message: str, component: str) -> None:
    settings = settings_with(task__name="evaluate", **{f"ablation__profiles__{component}": profile})
    with pytest.raises(UserError, match=rf"^ablation\.profiles\.{component}.*{message}"):
        validate(settings)


@pytest.mark.parametrize("key", ["ablation.profiles.mlp", "ablation.profiles.attention"])
def test_a_search_takes_no_fixed_edit(key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key} is set, but task=abliterate"):
        validate(settings_with(**{key.replace(".", "__"): COMPLETE_PROFILE}))


def test_a_direction_alone_edits_nothing() -> None:
    with pytest.raises(UserError, match="nothing would be edited"):
        validate(settings_with(task__name="evaluate", ablation__direction_index=1.0))


@pytest.mark.parametrize("task", ["export", "chat"])
def test_a_task_takes_one_edit_only(task: str) -> None:
    with pytest.raises(UserError, match=rf"^export\.trial and ablation\.profiles both name an edit for task={task}"):
        validate(settings_with(task__name=task, export__trial=3, ablation__profiles__mlp=COMPLETE_PROFILE))


def test_rows_of_no_source_cannot_be_chosen() -> None:
    settings = settings_with(prompts__target__test__slice="0:5")
    with pytest.raises(UserError, match=r"prompts\.target\.test\.source is auto"):
        validate(settings)
    settings.prompts.target.test.source = "held_out.txt"
    validate(settings)


def test_a_trial_is_not_evaluated_again() -> None:
    with pytest.raises(UserError, match=r"^export\.trial is set, but task=evaluate scores the fixed edit of ablation"):
        validate(settings_with(task__name="evaluate", export__trial=3))


@pytest.mark.parametrize("file", [file for phase in PHASES for file in sorted((conf_dir() / phase).glob("*.yaml"))])
def test_a_placements_file_gives_all_its_options_with_their_defaults(file: Path) -> None:
    given = OmegaConf.to_container(OmegaConf.load(file))
    placement = placements_of(settings_with(capture__degree=1, **{file.parent.name: given}))[file.parent.name]
    assert placement.name == file.stem
    assert given == {"_target_": given["_target_"], **vars(type(placement).Options())}


def test_the_configuration_reference_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    fresh = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["render"]()
    assert page == fresh + "\n", "docs/configuration.md is out of date: run `make docs`"
    undocumented = [key for key in setting_types() if "." in key and f"| `{key}` |" not in page]
    sections = {key.rpartition(".")[0] for key in setting_types()}
    assert not set(undocumented) - sections
    assert "|  |" not in page, "a setting or a choice has no description"


def test_every_choice_has_a_file_that_composes(compose_settings: ComposeSettings) -> None:
    groups = [path for path in conf_dir().iterdir() if path.is_dir() and path.name not in ("hydra", "local")]
    choices = [f"{group.name}={file.stem}" for group in groups for file in group.glob("[!_]*.yaml")]
    assert {"task=abliterate", "capture=replicated", "experiment=demo"} <= set(choices)
    for choice in choices:
        compose_settings(choice)
