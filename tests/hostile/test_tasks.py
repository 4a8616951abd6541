"""Hostile models put to the other tasks, which read their files in ways of their own: one line, or all is well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from heretic_ds.settings import Settings
from tests.conftest import ComposeSettings
from tests.hostile.cases_model import config_cases, template_cases, tokenizer_cases, weight_cases
from tests.hostile.harness import Case, Place, command, copy_of, files_below, run_in_copy, settings_for

MODELS = [*config_cases(), *weight_cases()]
SOME = [*MODELS[::12], *tokenizer_cases()[::6], *template_cases()[::6]]
"""Of each kind a few: the other tasks read most files as a search does, which all cases are put to."""

Put = Callable[[Case, Settings, str], None]


@pytest.fixture
def put(untouched: Path) -> Put:
    """`put(case, settings, task)`: the task over a hostile model."""

    def judge(case: Case, settings: Settings, task: str) -> None:
        place: Place = copy_of(untouched, untouched.with_name("case"), with_run=False)
        if case.spoil is not None:
            case.spoil(place)
        before = files_below(place.root)
        given = settings_for(settings, {"export.dir": "out", **case.given, "task.name": task})
        ended = run_in_copy(place.root, lambda: command(given))
        told = f"\n--- out\n{ended.out[-3000:]}\n--- err\n{ended.err[-6000:]}"
        assert ended.seconds < 20 and "Traceback" not in ended.out + ended.err, told
        assert not any(sign in ended.out + ended.err for sign in "\x1b\x07\x9b\r\x08"), told
        lines = ended.err.splitlines()
        if ended.status == 0:
            assert lines == [], told
            return
        assert ended.status == 2 and len(lines) == 1 and lines[0].startswith("heretic-ds: "), told
        assert len(lines[0]) < 700 and files_below(place.root) == before, told

    return judge


@pytest.fixture(scope="module")
def planning(base: Settings, compose_settings: ComposeSettings) -> Settings:
    """For a machine that is described, so that none is measured."""
    return compose_settings("experiment=demo", "task=plan", "hardware=h100x8", model="model")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.thorough] * (place % 8 != 0)) for place, case in enumerate(MODELS)],
    ids=[case.name for case in MODELS],
)
def test_plan(case: Case, put: Put, planning: Settings) -> None:
    put(case, planning, "plan")


@pytest.mark.parametrize("task", ["evaluate", "geometry"])
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_others(case: Case, task: str, put: Put, base: Settings) -> None:
    put(case, base, task)
