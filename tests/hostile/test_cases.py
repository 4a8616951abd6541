"""Hostile files, one after another: each ends the command with one line and status 2, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.hostile.cases_model import config_cases, template_cases, tokenizer_cases, weight_cases
from tests.hostile.cases_packed import packed_cases
from tests.hostile.cases_run import path_cases, prompt_cases, run_folder_cases
from tests.hostile.harness import Case, Ended

CASES = [
    *config_cases(),
    *weight_cases(),
    *packed_cases(),
    *tokenizer_cases(),
    *template_cases(),
    *prompt_cases(),
    *path_cases(),
    *run_folder_cases(),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_line(case: Case, judged: Callable[[Case], Ended]) -> None:
    judged(case)


def test_there_are_as_many_as_promised() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 250
