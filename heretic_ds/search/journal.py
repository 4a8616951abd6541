"""The study on disk: an Optuna journal that survives a kill at any moment; ``optuna-dashboard`` opens it."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection

from heretic_ds.errors import UserError
from heretic_ds.foreign.disk import writing
from heretic_ds.foreign.reading import MEBIBYTE, loads, read_bytes

STUDY_NAME = "heretic_ds"
DIRECTIONS = [StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]
METRIC_NAMES = ["refusals (share of the original's)", "KL divergence (aimed)"]
_SPACE_ATTRIBUTE = "search_space"
_STUDY_MADE, _TRIAL_MADE = 0, 4
"""Codes of the records of a journal that begin with these."""
_LIMIT = 1024 * MEBIBYTE
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
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:  # that do not fit together
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
    """Cut off a last line that a kill left half written: the next record would be glued to it.

    All other damage is something else's work, and trials may be missing or stand in other places: it is refused.
    """
    if not path.exists():
        return
    content = read_bytes(path, _LIMIT, _ADVICE)
    lines = content.split(b"\n")
    trials: Counter[str] = Counter()
    for number, line in enumerate(lines[:-1], start=1):
        record = _record(line)
        if record is None or (number == 1 and record.get("op_code") != _STUDY_MADE):
            raise UserError(f"{path} is damaged at line {number}; {_ADVICE}")
        if record.get("op_code") == _TRIAL_MADE:
            study, index = str(record.get("study_id")), _index(record)
            if index not in (None, trials[study]):
                raise UserError(
                    f"{path} is damaged at line {number}: trial {index} stands where trial {trials[study]} belongs; "
                    f"{_ADVICE}"
                )
            trials[study] += 1
    if lines[-1]:
        with writing(path.parent, "run.dir"), path.open("r+b") as file:
            file.truncate(len(content) - len(lines[-1]))
            os.fsync(file.fileno())


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _index(record: dict[str, Any]) -> Any:
    """The number that a trial was kept with; None where it was not, as by earlier versions and other programs."""
    attributes = record.get("user_attrs")
    return attributes.get("index") if isinstance(attributes, dict) else None
