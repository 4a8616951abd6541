"""`task=upload` against a stand-in for the hub."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import RunCommand
from tests.e2e.conftest import Heretic, Material
from tests.e2e.fake_hub import TOKEN, FakeHub
from tests.e2e.test_fixed_edit import EDIT

pytestmark = pytest.mark.slow


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def exported(material: Material, heretic: Heretic, tmp_path: Path) -> Path:
    words = ("task=export", "scoring.markers=[e]", *EDIT, "run.dir=run", "ablation.row_norm=pre", "export.format=both")
    outcome = heretic(*material.words(material.model("llama"), *words))
    assert outcome.status == 0, outcome.err
    return tmp_path / "run" / "model"


@pytest.fixture
def upload(hub: FakeHub, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch):
    """The command in a process of its own: the hub's address is read when its library is imported."""
    environment = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def run(*words: str):
        done = run_command("some/model", "task=upload", "run.dir=run", *words)
        assert TOKEN not in done.stdout + done.stderr
        return done

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_all_of_an_export_is_uploaded(exported: Path, upload, hub: FakeHub) -> None:
    done = upload("export.repo=lab/edited", "export.private=false")
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/lab/edited" in done.stdout + done.stderr
    repository = hub.repositories["lab/edited"]
    files = files_of(exported)
    assert {"README.md", "heretic_ds.json", "model.safetensors", "reproduce/directions.safetensors"} <= files.keys()
    assert "adapter/adapter_model.safetensors" in files and repository.files == files
    assert not repository.private and repository.commits == 1
    again = upload("export.repo=lab/edited")
    assert again.returncode == 0 and repository.commits == 2, again.stderr


def test_a_repository_of_ones_own_is_private_and_named_after_the_model(exported: Path, upload, hub: FakeHub) -> None:
    done = upload()
    assert done.returncode == 0, done.stderr
    [(name, repository)] = hub.repositories.items()
    assert name == "tester/llama-layers4-abliterated" and repository.private


def test_what_is_refused(exported: Path, upload, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert upload("export.repo=lab/other").returncode == 0
    hub.repositories["lab/other"].files = {"thesis.pdf": b"mine"}
    refused = upload("export.repo=lab/other")
    assert refused.returncode == 2 and "exists and holds other files (thesis.pdf)" in refused.stderr
    assert hub.repositories["lab/other"].files == {"thesis.pdf": b"mine"}
    assert upload("export.repo=lab/other", "export.overwrite=true").returncode == 0
    for words, told in (
        (("export.repo='a b'",), "is no repository's name"),
        (("export.dir=nowhere",), "holds no export that is whole"),
    ):
        done = upload(*words)
        assert done.returncode == 2 and told in done.stderr, done.stderr
    hub.refuse_writing = True
    done = upload("export.repo=lab/new")
    assert done.returncode == 2 and "the hub did not take the upload" in done.stderr, done.stderr
    assert "hf auth login" in done.stderr
    monkeypatch.delenv("HF_TOKEN")
    done = upload("export.repo=lab/new")
    assert done.returncode == 2 and "needs to know you: log in" in done.stderr, done.stderr
