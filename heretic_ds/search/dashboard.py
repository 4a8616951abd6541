"""What optuna-dashboard shows of a study beside its trials: a note, and files such as the front's picture.

optuna-dashboard runs/<model>/study.journal --artifact-dir runs/<model>/artifacts
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact

from heretic_ds.search.journal import tell

_NOTE_VERSION = "dashboard:note_ver"
"""Of the study's system attributes: counts how often its note was saved, by whomever."""


def save_note(study: optuna.Study, markdown: str) -> None:
    """Save the study's note, unless somebody changed the last one that was saved here. Needs optuna-dashboard."""
    import optuna_dashboard

    def version() -> int:
        return int(study._storage.get_study_system_attrs(study._study_id).get(_NOTE_VERSION, 0))

    if version() == study.user_attrs.get("note_version", 0) and study.user_attrs.get("note") != markdown:
        optuna_dashboard.save_note(study, markdown)
        tell(study, {"note": markdown, "note_version": version()})


def keep_files(study: optuna.Study, folder: Path, files: Iterable[Path]) -> None:
    """Make files, of which there may be some, artifacts of the study; ``folder`` is the artifacts' own.

    A file that was one already replaces it.
    """
    folder.mkdir(exist_ok=True)
    store, known = FileSystemArtifactStore(folder), dict(study.user_attrs.get("files", {}))
    for file in files:
        if not file.is_file():
            continue
        if file.name in known:
            with file.open("rb") as content:
                store.write(known[file.name], content)
        else:
            known[file.name] = upload_artifact(artifact_store=store, file_path=str(file), study_or_trial=study)
    tell(study, {"files": known})
