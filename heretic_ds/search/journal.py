"""The study on disk: an Optuna journal that survives a kill at any moment; ``optuna-dashboard`` opens it."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection

from heretic_ds.errors import UserError

STUDY_NAME = "heretic_ds"
DIRECTIONS = [StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]
METRIC_NAMES = ["refusals (share of the original's)", "KL divergence (aimed)"]
_SPACE_ATTRIBUTE = "search_space"
_ADVICE = "give another run.dir, or remove this file to search anew"


def quiet_optuna() -> None:
    """Keep Optuna's own log lines and its notes on experimental arguments off the terminal."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def open_study(path: Path, space: dict[str, Any]) -> optuna.Study:
    """Open the journal at ``path``, or start it, and return its study.

    The caller must be the only writer (it holds the run folder's lock): a lock file found here belongs to a
    killed process, and Optuna would wait half a minute for it. ``space`` is the JSON form of the search
    space; UserError where the journal was made for another one or is damaged.
    """
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    _repair(path)
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
    except (AssertionError, LookupError, TypeError, ValueError) as error:  # records that do not fit together
        raise UserError(f"{path} is damaged ({error!r}); {_ADVICE}") from error
    if STUDY_NAME in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=STUDY_NAME, storage=storage)
    else:
        study = optuna.create_study(study_name=STUDY_NAME, directions=DIRECTIONS, storage=storage)
    if study.metric_names is None:
        study.set_metric_names(METRIC_NAMES)
    stored = study.user_attrs.get(_SPACE_ATTRIBUTE)
    if stored is None:
        study.set_user_attr(_SPACE_ATTRIBUTE, space)
    elif stored != space:
        names = sorted(name for name in {*stored, *space} if stored.get(name) != space.get(name))
        raise UserError(
            f"{path} holds a study over another search space (different: {', '.join(names)}); "
            "give another run.dir, or remove this folder"
        )
    return study


def _repair(path: Path) -> None:
    """Cut off a last line that a kill left half written: the next record would be glued to it."""
    if not path.exists():
        return
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if line.endswith(b"\n") and _is_record(line):
            continue
        if number < len(lines):
            raise UserError(f"{path} is damaged at line {number}; {_ADVICE}")
        with path.open("r+b") as file:
            file.truncate(len(content) - len(line))
            os.fsync(file.fileno())


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
