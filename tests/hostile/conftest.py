"""What hostile cases start from, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from heretic_ds.settings import Settings
from tests.conftest import ComposeSettings
from tests.hostile.harness import Case, Ended, Place, command, copy_of, files_below, prepare, run_in_copy, settings_for


@pytest.fixture(scope="session")
def base(compose_settings: ComposeSettings) -> Iterator[Settings]:
    """Settings that cases start from; templates get less time than a user's."""
    import heretic_ds.pipeline  # noqa: F401 (copies of this process have it then)
    from heretic_ds.foreign import limits

    limits.SECONDS, before = 1, limits.SECONDS
    yield compose_settings("experiment=demo", model="model")
    limits.SECONDS = before


@pytest.fixture(scope="session")
def untouched(tmp_path_factory: pytest.TempPathFactory, base: Settings) -> Path:
    """A folder with a model, prompts and a run of two trials, made where all cases are put: a run knows its paths."""
    folder = tmp_path_factory.mktemp("hostile") / "case"
    folder.mkdir()
    prepare(folder)
    ended = run_in_copy(folder, lambda: command(settings_for(base, {})))
    assert ended.status == 0, ended.err + ended.out
    assert ended.err == "", ended.err
    return folder.rename(folder.with_name("untouched"))


@pytest.fixture
def judged(untouched: Path, base: Settings) -> Callable[[Case], Ended]:
    """Run a case and hold it to what every one of them has to show: one line, no traceback, nothing written."""

    def judge(case: Case) -> Ended:
        place: Place = copy_of(untouched, untouched.with_name("case"), case.after_run)
        if case.spoil is not None:
            case.spoil(place)
        given = {"search.trials": 3} | case.given if case.after_run else case.given
        before = files_below(place.root)
        ended = run_in_copy(place.root, lambda: command(settings_for(base, given)))
        told = f"\n--- out\n{ended.out[-3000:]}\n--- err\n{ended.err[-6000:]}"
        assert ended.status == case.status, told
        assert ended.seconds < 20, told
        for text in (ended.out, ended.err):
            assert "Traceback" not in text and not any(sign in text for sign in "\x1b\x07\x9b\r\x08"), told
        if case.status == 0:
            assert ended.err == "", told
            assert case.said in ended.out, told
            return ended
        lines = ended.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("heretic-ds: ") and len(lines[0]) < 700, told
        assert case.said in lines[0], told
        after = files_below(place.root)
        changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
        assert not {name for name in changed if not (case.after_run and name in WRITTEN_BY_OPENING)}, changed
        return ended

    return judge


@pytest.fixture
def place(untouched: Path) -> Place:
    """Where cases are put."""
    return Place(untouched.with_name("case"))


WRITTEN_BY_OPENING = {"run/.lock", "run/run.log", "run/config.yaml", "run/results.json", "run/measured.json"}
"""What a command that goes on in a run folder may touch before it meets the mistake."""
