"""The story of each task: which stages it goes through, in which order, and what it returns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from heretic_ds import pipeline
from heretic_ds.errors import SearchFailed
from tests.conftest import ComposeSettings

RESULTS = {"verified": {"refusals": 2, "kl": 0.5}, "prompts": {"target_eval": 8}}
MEASURES = ["find_response_prefix", "capture_directions", "measure_original"]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stages that only say that they were there; `told.answers` holds what one of them returns instead of its name."""
    story = SimpleNamespace(names=[], answers={"wants_menu": False, "already_finished": None})
    story.answers |= {
        "named_edit": ("edit", SimpleNamespace(index=3)),
        "select_and_verify": SimpleNamespace(edit="edit", index=3),
        "objective_of": lambda results: (results["verified"]["refusals"] / 8, results["verified"]["kl"]),
    }

    def stage(name: str) -> Any:
        def told_of(*arguments: Any) -> Any:
            story.names.append(name)
            answer = story.answers.get(name, name)
            if isinstance(answer, Exception):
                raise answer
            return answer(*arguments) if callable(answer) else answer

        return told_of

    @contextmanager
    def opened(*arguments: Any) -> Iterator[Any]:
        story.names.append("opened")
        yield SimpleNamespace(results=RESULTS, save=lambda: None)
        story.names.append("closed")

    for name, found in vars(pipeline).copy().items():
        if getattr(found, "__module__", "").startswith("heretic_ds.stages."):
            monkeypatch.setattr(pipeline, name, stage(name))
    monkeypatch.setattr(pipeline, "opened", opened)
    monkeypatch.setattr(pipeline, "settle_strategy", lambda settings, _: settings)
    monkeypatch.setattr(pipeline, "counted_here", nullcontext)
    return story


def test_abliterate(told: SimpleNamespace, compose_settings: ComposeSettings) -> None:
    assert pipeline.run(compose_settings()) == "finish"  # type: ignore[comparison-overlap]
    assert told.names == [
        "check_tracking", "wants_menu", "already_finished", "refuse_used_export_folder", "opened", *MEASURES,
        "search_edits", "select_and_verify", "report_front", "export_edited", "final_scores", "write_report", "finish",
        "closed",
    ]  # fmt: skip


def test_a_finished_run_opens_nothing_and_returns_its_scores(
    told: SimpleNamespace, compose_settings: ComposeSettings
) -> None:
    told.answers["already_finished"] = RESULTS
    assert pipeline.run(compose_settings()) == (0.25, 0.5)
    assert "opened" not in told.names


def test_nothing_is_exported_where_nothing_was_found(told: SimpleNamespace, compose_settings: ComposeSettings) -> None:
    told.answers["select_and_verify"] = SearchFailed("none")
    with pytest.raises(SearchFailed):
        pipeline.run(compose_settings())
    assert "export_edited" not in told.names and "finish" not in told.names


def test_the_menu_takes_over_after_the_search(told: SimpleNamespace, compose_settings: ComposeSettings) -> None:
    told.answers["wants_menu"] = True
    assert pipeline.run(compose_settings()) == "menu"  # type: ignore[comparison-overlap]
    assert told.names == ["check_tracking", "wants_menu", "opened", *MEASURES, "search_edits", "menu", "closed"]


def test_evaluate(told: SimpleNamespace, compose_settings: ComposeSettings) -> None:
    pipeline.run(compose_settings("task=evaluate"))
    assert told.names == [
        "opened", "find_response_prefix", "fixed_directions", "measure_original", "score_fixed_edit", "finish",
        "closed",
    ]  # fmt: skip


def test_export_names_its_edit_and_checks_its_folder_before_anything_is_loaded(
    told: SimpleNamespace, compose_settings: ComposeSettings
) -> None:
    assert pipeline.run(compose_settings("task=export", "export.trial=3")) == (0.25, 0.5)
    assert told.names == [
        "named_edit", "refuse_used_export_folder", "opened", "find_response_prefix", "fixed_directions",
        "measure_original", "verify_named", "export_edited", "final_scores", "objective_of", "closed",
    ]  # fmt: skip


def test_chat(told: SimpleNamespace, compose_settings: ComposeSettings) -> None:
    pipeline.run(compose_settings("task=chat"))
    assert told.names == ["talk"]


def test_libraries_draw_no_bars_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils.logging

    from heretic_ds.report.library_bars import counted_here

    transformers.utils.logging.enable_progress_bar()
    monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS", raising=False)
    with counted_here():
        assert not transformers.utils.logging.is_progress_bar_enabled()
        assert os.environ.pop("HF_DATASETS_DISABLE_PROGRESS_BARS") == "1"


def test_what_the_settings_leave_open_is_settled_before_a_task_begins(
    told: SimpleNamespace, compose_settings: ComposeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled, given = compose_settings("task=chat", "search.strategy=direct"), list[object]()
    monkeypatch.setattr(pipeline, "settle_strategy", lambda *_: settled)
    monkeypatch.setitem(pipeline._TASKS, "chat", lambda settings, *_: given.append(settings))
    pipeline.run(compose_settings("task=chat"))
    assert given == [settled] and given[0] is settled and not told.names
