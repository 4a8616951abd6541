"""The command line: what becomes of the model, of mistakes, of failures, and of sweeps."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

import heretic_ds
from heretic_ds import __version__, cli
from heretic_ds.cli.command import _imports
from heretic_ds.cli.errors import setting_types
from heretic_ds.cli.help import EXAMPLES, GROUPS, HERETIC_OPTIONS, OFTEN_CHANGED
from heretic_ds.conf_files import choices
from heretic_ds.errors import RankFailed, SearchFailed, UserError
from heretic_ds.settings import Settings
from tests.conftest import RunCommand

Run = Callable[[Settings], "tuple[float, float] | None"]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Run], None]:
    """`pipeline(run)` puts a function in the place of the pipeline's, and the test into an empty folder."""
    monkeypatch.chdir(tmp_path)

    def replace(run: Run) -> None:
        module = ModuleType("heretic_ds.pipeline")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "heretic_ds.pipeline", module)
        monkeypatch.setattr(heretic_ds, "pipeline", module, raising=False)

    return replace


@pytest.fixture
def never(pipeline: Callable[[Run], None]) -> None:
    """A pipeline that must not be reached."""

    def run(settings: Settings) -> None:
        raise AssertionError("the pipeline ran")

    pipeline(run)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr."""
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    return line


# The model


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["org/name"], ["model.path='org/name'"]),
        (["search.trials=3", "my model"], ["search.trials=3", "model.path='my model'"]),
        (["+a.b=1", "~c", "m"], ["+a.b=1", "~c", "model.path='m'"]),
        (["it's"], [r"model.path='it\'s'"]),
        (["model.path=m"], ["model.path=m"]),
        ([], []),
    ],
)
def test_the_bare_word_is_the_model(words: list[str], overrides: list[str]) -> None:
    assert cli.expand_model(words) == overrides


@given(st.text(st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(" '\"\\,[]{}:"), min_size=1))
def test_any_model_name_survives_the_grammar(name: str) -> None:
    if "=" in name or name[0] in "+~" or "${" in name or name in cli.TASKS:
        return
    [override] = OverridesParser.create().parse_overrides(cli.expand_model([name]))
    assert override.value() == name
    assert not override.is_sweep_override()


@pytest.mark.parametrize(
    "arguments",
    [
        ["folder", "search.trials=7", "task=evaluate"],
        ["search.trials=7", "folder", "task=evaluate"],
        ["search.trials=7", "--run", "folder", "task=evaluate"],
    ],
)
def test_the_pipeline_gets_checked_settings(pipeline: Callable[[Run], None], arguments: list[str]) -> None:
    seen: list[Settings] = []
    pipeline(seen.append)
    assert cli.main(arguments) == 0
    [settings] = seen
    assert type(settings) is Settings
    assert (settings.model.path, settings.search.trials, settings.task.name) == ("folder", 7, "evaluate")
    assert list(Path.cwd().iterdir()) == [], "a single run writes nothing but its run folder"


# Mistakes


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search.trials=3"], "no model given; the usage is: heretic-ds <model>"),
        (["--model", "m"], "--model is an option of Heretic; here the same is written: heretic-ds m"),
        (
            ["--model", "org/m", "--n-trials", "50", "export.max_kl=1"],
            "--model, --n-trials are options of Heretic; here the same is written: heretic-ds org/m search.trials=50 "
            "export.max_kl=1",
        ),
        (["m", "--n-trials=50"], "heretic-ds m search.trials=50"),
        (["--n_trials", "50"], "heretic-ds MODEL search.trials=50"),
        (["m", "--quantization", "bnb_4bit"], "heretic-ds m model.quantization=bnb_4bit"),
        (
            ["m", "--trust-remote-code", "--system-prompt", "be brief"],
            "trust_remote_code=true 'prompts.system=be brief'",
        ),
        (["m", "--n-trials"], "heretic-ds m search.trials=..."),
        (["m", "n"], "unexpected argument 'n' after the model 'm'"),
        (["evaluate"], "'evaluate' is a task, not a model; write heretic-ds <model> task=evaluate"),
        (["m", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["m", "--config-dir", "nowhere"], "nowhere' not found"),
        (["m", "--multirun", "--cfg", "job"], "Only one of"),
        (["m", "search.trails=3"], "no setting search.trails; did you mean search.trials?"),
        (["m", "max_kl=3"], "no setting max_kl; did you mean export.max_kl?"),
        (["m", "generation.max_tokens=3"], "did you mean generation.max_new_tokens?"),
        (["m", "taks=evaluate"], "no setting taks; did you mean task?"),
        (["m", "+search.x=1"], "no setting search.x; search has strategy, trials, startup_trials"),
        (["m", "+qqq=1"], "no setting qqq; heretic-ds --cfg job lists the keys"),
        (["m", "search.trials=many"], "search.trials=many does not fit: search.trials takes a whole number"),
        (["m", "search.trials=1.5"], "search.trials takes a whole number"),
        (["m", "search.trials=null"], "search.trials takes a whole number"),
        (["m", "export.trial=x"], "export.trial takes a whole number, or null"),
        (["m", "export.max_kl=x"], "export.max_kl takes a number"),
        (["m", "direction.orthogonalize=maybe"], "direction.orthogonalize takes true or false"),
        (["m", "scoring.scorers=refusals"], "scoring.scorers takes a list, as in [a,b]"),
        (["m", "search=fast"], "search takes a group of settings (search.strategy, "),
        (["m", "search.trials=1,2"], "search.trials=1,2 gives several values; add --multirun"),
        (["m", "search.trials=-1"], "search.trials is -1; it has to be at least 1"),
        (
            ["m", "task=train"],
            "no task=train; choose one of abliterate, benchmark, chat, evaluate, export, geometry, plan",
        ),
        (["m", "+task=evaluate"], "write task=evaluate"),
        (["m", "capture=zero33"], "no capture=zero33; choose one of auto, expert_parallel, "),
        (["m", "hydra/launcher=none"], "no hydra/launcher=none; choose one of basic"),
        (["m", "a==b"], "cannot read the override a==b"),
        (["m", "model.revision=${nothing}"], "model.revision: Interpolation key 'nothing' not found"),
        (
            ["m", "prompts.target.train.split=train[:400]"],
            "\"prompts.target.train.split='train[:400]'\", or choose the rows with prompts.target.train.slice=:400",
        ),
        (["m", "-m", "search.trials=1,many"], "search.trials=many does not fit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    line = one_line(capsys)
    assert line.startswith("heretic-ds: ")
    assert message in line


@pytest.mark.usefixtures("never")
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "local" / "default.yaml"
    file.parent.mkdir()
    file.write_text("# @package _global_\nsearch:\n  trials: [1\n")
    assert cli.main(["m", "--config-dir", str(tmp_path)]) == 2
    line = one_line(capsys)
    assert "default.yaml, line 4" in line


@pytest.mark.usefixtures("never")
def test_an_unknown_key_in_a_file_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "local" / "default.yaml"
    file.parent.mkdir()
    file.write_text("# @package _global_\nsearch:\n  trails: 3\n")
    assert cli.main(["m", "--config-dir", str(tmp_path)]) == 2
    assert "in local/default.yaml: there is no setting search.trails; did you mean search.trials?" in one_line(capsys)


def test_personal_defaults_are_read(pipeline: Callable[[Run], None], tmp_path: Path) -> None:
    file = tmp_path / "local" / "default.yaml"
    file.parent.mkdir()
    file.write_text("# @package _global_\nsearch:\n  trials: 33\n  seed: 4\n")
    seen: list[Settings] = []
    pipeline(seen.append)
    assert cli.main(["m", "--config-dir", str(tmp_path), "search.seed=5"]) == 0
    assert (seen[0].search.trials, seen[0].search.seed) == (33, 5)


def test_a_real_process_ends_like_that(run_command: RunCommand, tmp_path: Path) -> None:
    ended = run_command("m", "search.trails=3")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == "heretic-ds: there is no setting search.trails; did you mean search.trials?\n"
    assert list(tmp_path.iterdir()) == []


# Failures


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("two\nlines"), 2, "heretic-ds: two lines"),
        (SearchFailed("nothing close enough"), 1, "heretic-ds: nothing close enough"),
        (KeyboardInterrupt(), 130, "heretic-ds: interrupted"),
    ],
)
def test_an_expected_end_is_one_line(
    pipeline: Callable[[Run], None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    line: str,
) -> None:
    def run(settings: Settings) -> None:
        raise error

    pipeline(run)
    assert cli.main(["m"]) == status
    assert one_line(capsys) == line


@pytest.mark.parametrize("error", [RuntimeError("broken"), ValueError("broken"), KeyError("broken")])
def test_anything_else_keeps_its_traceback(
    pipeline: Callable[[Run], None], capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def run(settings: Settings) -> None:
        raise error

    pipeline(run)
    assert cli.main(["m"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "in run\n" in shown
    assert "broken" in shown.splitlines()[-1]


@pytest.mark.usefixtures("never")
def test_the_failure_of_another_rank_is_told_in_its_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    said = "rank 1 failed:\nTraceback (most recent call last):\n  ...\nRuntimeError: broken"
    assert cli.report(RankFailed(said)) == 1
    assert capsys.readouterr().err == said + "\n"


def test_other_ranks_say_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["m", "search.trials=-1"]) == 2
    assert capsys.readouterr().err == ""


# Sweeps


def rows_of_the_sweep() -> list[dict[str, object]]:
    """What the jobs of the only sweep under the current folder recorded."""
    [file] = Path("runs/sweeps").glob("*/summary.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_bad_job_does_not_end_a_sweep(pipeline: Callable[[Run], None], capsys: pytest.CaptureFixture[str]) -> None:
    failures: dict[int, BaseException] = {
        1: UserError("the folder is gone"),
        2: RuntimeError("broken"),
        3: SystemExit(2),
        4: SearchFailed("none close enough"),
    }

    def run(settings: Settings) -> tuple[float, float]:
        if settings.search.seed in failures:
            raise failures[settings.search.seed]
        return 0.25, 0.125

    pipeline(run)
    assert cli.main(["m", "--multirun", "search.seed=0,1,2,3,4,5"]) == 1
    rows = rows_of_the_sweep()
    assert [row["job"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["status"] for row in rows] == [0, 2, 1, 1, 1, 0]
    assert [row["refusal_rate"] for row in rows] == [0.25, None, None, None, None, 0.25]
    assert [row["message"] for row in rows] == [
        None,
        "the folder is gone",
        "RuntimeError: broken",
        "SystemExit: 2",
        "none close enough",
        None,
    ]
    shown = capsys.readouterr()
    assert "heretic-ds: the folder is gone\n" in shown.err
    assert "6 jobs, 4 failed" in shown.out
    assert "none close enough" in shown.out


def test_a_sweep_without_failures_is_status_0(pipeline: Callable[[Run], None]) -> None:
    pipeline(lambda settings: (0.0, 0.5))
    assert cli.main(["m", "-m", "search.seed=0,1", "ablation.row_norm=none,full"]) == 0
    assert [row["overrides"] for row in rows_of_the_sweep()] == [
        ["model.path='m'", f"search.seed={seed}", f"ablation.row_norm={mode}"]
        for seed in (0, 1)
        for mode in ("none", "full")
    ]


def test_jobs_of_a_sweep_work_in_folders_of_their_own(pipeline: Callable[[Run], None]) -> None:
    folders: list[str | None] = []
    pipeline(lambda settings: folders.append(settings.run.dir))
    assert cli.main(["experiment=demo", "-m", "search.seed=0,1"]) == 0
    sweep = next(Path("runs/sweeps").iterdir())
    assert folders == [str(sweep / "0"), str(sweep / "1")]


@pytest.mark.parametrize("words", [[], ["run.interactive=true"]])
def test_no_job_of_a_sweep_opens_the_menu(pipeline: Callable[[Run], None], words: list[str]) -> None:
    seen: list[bool | None] = []
    pipeline(lambda settings: seen.append(settings.run.interactive))
    assert cli.main(["m", "--multirun", "search.seed=0,1", *words]) == 0
    assert seen == [False, False]


def test_a_run_folder_given_for_a_sweep_is_kept(pipeline: Callable[[Run], None]) -> None:
    folders: list[str | None] = []
    pipeline(lambda settings: folders.append(settings.run.dir))
    assert cli.main(["m", "-m", "run.dir=here,there"]) == 0
    assert folders == ["here", "there"]


def test_a_sweeper_gets_the_objective(pipeline: Callable[[Run], None], monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    returned: list[object] = []
    launch = BasicLauncher.launch

    def listening(self: BasicLauncher, *args: object, **kwargs: object) -> object:
        jobs = launch(self, *args, **kwargs)  # type: ignore[arg-type]
        returned.extend(job.return_value for job in jobs)
        return jobs

    def run(settings: Settings) -> tuple[float, float]:
        if settings.search.seed:
            raise UserError("no")
        return 0.5, 0.25

    monkeypatch.setattr(BasicLauncher, "launch", listening)
    pipeline(run)
    assert cli.main(["m", "-m", "search.seed=0,1"]) == 1
    assert returned[0] == (0.5, 0.25)
    assert str(returned[1]) == "(nan, nan)"


# Asking


def test_without_arguments_help_is_shown_and_a_model_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    shown = capsys.readouterr()
    assert "heretic-ds experiment=demo" in shown.out
    assert shown.err.startswith("heretic-ds: no model given") and len(shown.err.splitlines()) == 1


def test_the_examples_and_options_of_the_help_are_right() -> None:
    """What it names can be given: every example composes, every option of Heretic is a key that exists."""
    for command, _ in EXAMPLES:
        assert cli.compose(command.split()[1:]).model.path
    for key, _ in OFTEN_CHANGED:
        assert key.partition("=")[0] in setting_types()
    for ours in HERETIC_OPTIONS.values():
        key = ours.partition("=")[0]
        assert key in ("{}", "task", "evaluate") or key in setting_types(), key
    for group, _ in GROUPS:
        assert choices(group), group


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"heretic-ds {__version__}\n"


def test_help_explains_the_command_and_is_quick(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom heretic_ds.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "slow = {'torch', 'transformers', 'hydra', 'omegaconf', 'optuna', 'matplotlib'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    start = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=cli.conf_dir().parent, capture_output=True, text=True, timeout=60
    )
    seconds = time.perf_counter() - start
    assert ended.returncode == 0, ended.stderr
    for expected in (
        "heretic-ds <model>",
        "task        what a command does: abliterate, benchmark, chat, evaluate, export",
        "docs/configuration.md",
    ):
        assert expected in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 120
    assert seconds < 20, "importing something large?"


def test_cfg_prints_the_configuration_of_the_job(run_command: RunCommand, tmp_path: Path) -> None:
    ended = run_command("--cfg", "job", "m", "search.trials=3")
    assert ended.returncode == 0, ended.stderr
    assert "model:\n  path: m\n" in ended.stdout
    assert "search:\n  strategy: auto\n  trials: 3\n" in ended.stdout
    assert "hydra" not in ended.stdout
    assert list(tmp_path.iterdir()) == []


def test_no_garbage_is_collected_while_many_modules_are_imported() -> None:
    """And what they made is not looked through again; whatever happens, collecting goes on afterwards."""
    before = gc.get_freeze_count()
    with _imports("json"):  # which is there
        assert gc.isenabled() and gc.get_freeze_count() == before
    with pytest.raises(ImportError), _imports("not.there"):
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() == before
    with _imports("not.there"):
        pass
    assert gc.isenabled() and gc.get_freeze_count() > before
    gc.unfreeze()
