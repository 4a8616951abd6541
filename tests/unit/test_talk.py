"""What the menu's choices do: saving again to a folder of its own, and uploading."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from heretic_ds.errors import UserError
from heretic_ds.export import upload
from heretic_ds.settings import Settings
from heretic_ds.stages import talk
from heretic_ds.terminal.menu import MenuActions


class Started:
    """A menu whose saved models are two small files."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.saved: list[tuple[int, Path]] = []
        self.uploaded: list[str] = []
        settings: Any = Settings()
        settings.run.dir, settings.model.path, settings.task.against = str(folder / "run"), "lab/tiny", None
        source = SimpleNamespace(folder=folder / "original")
        job = SimpleNamespace(opened=SimpleNamespace(source=source), packed=frozenset())
        record = SimpleNamespace(index=7, edit=None)
        self.run: Any = SimpleNamespace(
            results={}, records=[record], settings=settings, job=job, scorer="judge", console=None, save=lambda: None
        )
        for name in ("earlier_outcome", "report_front", "write_report", "_score_what_was_saved", "asker_at"):
            monkeypatch.setattr(talk, name, lambda *_: {})
        monkeypatch.setattr(talk, "verify", lambda *_: SimpleNamespace(refusals=0.25, kl=0.01))
        monkeypatch.setattr(talk, "pareto_front", lambda records: [7])
        monkeypatch.setattr(talk, "model_title", lambda job: "lab/tiny")
        monkeypatch.setattr(talk, "objective_of", lambda results: None)
        monkeypatch.setattr(talk, "export_edited", self._export)
        monkeypatch.setattr(talk, "upload_export", self._upload)

    def use(self, choices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have the menu do what ``choices`` does with its actions."""
        monkeypatch.setattr(talk, "run_menu", lambda actions, *_: choices(actions))
        talk.menu(self.run, None, SimpleNamespace())  # type: ignore[arg-type]

    def _export(self, run: Any, edit: Any, index: int, target: Path) -> Path:
        target.mkdir(exist_ok=True)
        (target / "config.json").write_text('{"model_type": "llama"}')
        self.saved.append((index, target))
        return target

    def _upload(self, folder: Path, repository: str, *_: bool) -> str:
        self.uploaded.append(repository)
        return "address"


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Started:
    monkeypatch.setattr(upload, "get_token", lambda: "token")
    return Started(tmp_path, monkeypatch)


def test_a_folder_that_the_menu_saved_to_may_be_uploaded_from(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def choices(actions: MenuActions) -> None:
        actions.save(7, str(tmp_path / "mine"))
        actions.upload(7, str(tmp_path / "mine"), "lab/mine", True)

    started.use(choices, monkeypatch)
    assert started.saved == [(7, tmp_path / "mine")] * 2 and started.uploaded == ["lab/mine"]
    assert "trial 7 on edited weights: 0.25 judge, KL 0.01" in caplog.messages


def test_a_folder_of_somebody_else_is_left_alone(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="exists and is not empty"):
        started.use(lambda actions: actions.save(7, str(tmp_path / "theirs")), monkeypatch)


@pytest.mark.parametrize(("repository", "token", "told"), [("a b", "token", "no repository's name"),
                                                           ("lab/mine", None, "log in")])  # fmt: skip
def test_what_the_hub_will_not_take_is_said_before_anything_is_saved(
    repository: str, token: str | None, told: str, started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "get_token", lambda: token)
    with pytest.raises(UserError, match=told):
        started.use(lambda actions: actions.upload(7, str(tmp_path / "mine"), repository, True), monkeypatch)
    assert not started.saved and not (tmp_path / "mine").exists()
