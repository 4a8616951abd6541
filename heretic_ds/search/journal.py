"""The study on disk: an Optuna journal that survives a kill at any moment; ``optuna-dashboard`` opens it.

A trial's values are the raw scores that people compare: refusals (or what the first scorer counts) and the KL
divergence, so Optuna's best trials are the front of :mod:`heretic_ds.search.pareto`. What the sampler minimised stands
beside them as the attribute ``minimised``. In journals of earlier versions that was the trial's values: they are
written anew when they are opened.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from heretic_ds.errors import UserError
from heretic_ds.foreign.disk import writing
from heretic_ds.foreign.reading import MEBIBYTE, loads, read_bytes

log = logging.getLogger(__name__)

DIRECTIONS = [StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]
"""Of what the sampler minimises."""
KL_NAME = "KL divergence (nats)"
MINIMISED = "minimised"
"""Attribute of a trial: the two numbers that the sampler minimises, see :func:`heretic_ds.search.study.objectives`."""
_SPACE_ATTRIBUTE = "search_space"
_STUDY_MADE, _TRIAL_MADE = 0, 4
"""Codes of the records of a journal that begin with these."""
_LIMIT = 1024 * MEBIBYTE
_ADVICE = "give another run.dir, or remove this file to search anew"


@dataclass(frozen=True)
class About:
    """What a study tells of itself to those who open it by Optuna or its dashboard."""

    name: str = "heretic_ds"
    """The study's name: that of the model."""
    scorer: str = "refusals"
    """Name of the first scorer, whose scores are the first values."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of the study, as JSON takes them."""
    maximize: bool = False
    """Whether a larger score is better."""

    @property
    def directions(self) -> list[StudyDirection]:
        """Of the two values."""
        return [StudyDirection.MAXIMIZE if self.maximize else StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]


def quiet_optuna() -> None:
    """Keep Optuna's own log lines and its notes on experimental arguments off the terminal."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def open_study(path: Path, space: dict[str, Any], about: About) -> optuna.Study:
    """Open the journal at ``path``, or start it, and return its study.

    The caller must be the only writer of trials (it holds the run folder's lock): a lock file found here belongs to a
    killed process, and Optuna would wait half a minute for it. ``space`` is the JSON form of the search
    space; UserError where the journal was made for another one or is damaged.
    """
    for lock in path.parent.glob(f"{path.name}.lock*"):  # one that was being given back has another end
        lock.unlink()
    _repair(path)
    with writing(path.parent, "run.dir"):
        study = _study_in(path, about)
        if any(_has_old_values(trial) for trial in study.get_trials(deepcopy=False)):
            _write_anew(path, study, about)
            study = _study_in(path, about)
        if study.metric_names is None:
            study.set_metric_names([about.scorer, KL_NAME])
    stored = study.user_attrs.get(_SPACE_ATTRIBUTE)
    if stored is not None and stored != space:
        names = sorted(name for name in {*stored, *space} if stored.get(name) != space.get(name))
        raise UserError(
            f"{path} holds a study over another search space (different: {', '.join(names)}); "
            "give another run.dir, or remove this folder"
        )
    with writing(path.parent, "run.dir"):
        tell(study, {_SPACE_ATTRIBUTE: space, **about.attributes})
    return study


def tell(study: optuna.Study, attributes: Mapping[str, Any]) -> None:
    """Set attributes of a study; the journal gets a line only for those that change."""
    known = study.user_attrs
    for name, value in attributes.items():
        if name not in known or known[name] != value:
            study.set_user_attr(name, value)


def _study_in(path: Path, about: About) -> optuna.Study:
    """The search's study in a journal, whatever it is called; a new one where there is none."""
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:  # that do not fit together
        raise UserError(f"{path} is damaged ({error!r}); {_ADVICE}") from error
    names = optuna.get_all_study_names(storage)
    if not names:
        return optuna.create_study(study_name=about.name, directions=about.directions, storage=storage)
    studies = [optuna.load_study(study_name=name, storage=storage) for name in names]
    return next((study for study in studies if _SPACE_ATTRIBUTE in study.user_attrs), studies[0])


def _has_old_values(trial: FrozenTrial) -> bool:
    """Whether a trial of ours was finished by a version that had what the sampler minimised as its values."""
    attributes = trial.user_attrs
    return trial.state == TrialState.COMPLETE and attributes.get("kl") is not None and MINIMISED not in attributes


def _write_anew(path: Path, study: optuna.Study, about: About) -> None:
    """Replace a journal by one with raw values, in one step. Nothing is lost: the old values become an attribute."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.unlink(missing_ok=True)
    unfinished.with_name(unfinished.name + ".lock").unlink(missing_ok=True)
    storage = JournalStorage(JournalFileBackend(str(unfinished)))
    copy = optuna.create_study(study_name=about.name, directions=about.directions, storage=storage)
    for name, value in study._storage.get_study_system_attrs(study._study_id).items():
        storage.set_study_system_attr(copy._study_id, name, value)
    copy.set_metric_names([about.scorer, KL_NAME])
    tell(copy, study.user_attrs)
    for trial in study.get_trials():
        if _has_old_values(trial):
            trial.set_user_attr(MINIMISED, trial.values)
            trial.values = [float(trial.user_attrs["refusals"]), float(trial.user_attrs["kl"])]
        copy.add_trial(trial)
    os.replace(unfinished, path)
    log.info("%s was written anew: the values of its trials are now raw scores, as optuna-dashboard shows them", path)


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
