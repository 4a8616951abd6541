"""The screened search: many candidates are compared without generating, those that could be on the front are scored.

Two studies, each of which goes on after any kill: that of the candidates, in a journal of its own, and that of the
trials. A candidate is an edit with two numbers, how likely the original's answers still are and the KL divergence, both
on a part of the prompts. Before a pass of trials a fixed number of candidates has been screened, which follows from the
number of trials before it; the pass then takes those that :mod:`heretic_ds.search.screened.choice` picks, given what
all trials before it scored. Candidates are asked for by a model of what they would be scored, given the same trials. So
whatever is asked for depends on what the two journals hold and on nothing else. Where a kill cut a pass in which
several candidates were screened together, the last digits of those that are screened again can differ: other edits are
computed beside them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, Trial

from heretic_ds.ablation import Edit
from heretic_ds.errors import UserError
from heretic_ds.foreign.disk import writing
from heretic_ds.search.journal import About, tell
from heretic_ds.search.proposals import Sampled, Space, waits
from heretic_ds.search.screened.choice import Candidate, known_scores, pick, predict
from heretic_ds.search.screened.modelled import Modelled
from heretic_ds.search.screened.surrogate import features
from heretic_ds.search.space import GLOBAL, MAX_WEIGHT_RANGES, PER_LAYER, edit_of, search_space
from heretic_ds.search.study import Search, open_journal, refuse_nothing
from heretic_ds.search.trials import Ask, TrialRecord, TrialScores
from heretic_ds.settings import SearchSettings

log = logging.getLogger(__name__)

FIRST, STARTUP = 32, 12
"""Candidates that are screened before the first trial, and how many of them at random."""
_FIRST_ATTRIBUTE, _FIRST_UNTOLD = "screened_before_trials", 16
"""Where a study keeps how many it began with, and how many that was before studies kept it."""
_MEASURE_ATTRIBUTE, _MEASURE = "refusal_likelihood", "beginnings of answers"
"""Where a study keeps what its candidates are compared by beside KL; studies of earlier versions do not say."""
WARM_PLACES = (0.5, 0.6, 0.7, 0.8)
"""Blocks whose direction the warm starts take for all blocks, as shares of the last one."""


def warm_starts(n_layers: int) -> list[dict[str, Any]]:
    """Parameters of edits that are worth trying on any model: weight 1 in every block, by each block's own direction,
    and by that of a few blocks."""
    last = n_layers - 1
    full: dict[str, Any] = {}
    for component in MAX_WEIGHT_RANGES:
        full |= {
            f"{component}.max_weight": 1.0,
            f"{component}.max_weight_position": 0.6 * last,
            f"{component}.min_weight_fraction": 1.0,
            f"{component}.min_weight_distance": max(0.6 * last, 1.0),
        }
    scopes = [(PER_LAYER, 0.7), *((GLOBAL, place) for place in WARM_PLACES)]
    return [{"direction_scope": scope, "direction_index": place * last, **full} for scope, place in scopes]


class Candidates:
    """The candidates of a screened search, and the choice among them: proposes the trials of a :class:`Search`."""

    def __init__(
        self,
        journal: Path,
        n_layers: int,
        settings: SearchSettings,
        original_refusals: float,
        per_pass: int,
        about: About | None = None,
    ) -> None:
        """``per_pass`` candidates are screened together; arguments as of :class:`Search`."""
        refuse_nothing(original_refusals)  # shares are of them
        self._path, self._settings, self._original = journal, settings, original_refusals
        self._n_layers, self._per_pass, self._about = n_layers, per_pass, about or About()
        self._space: Space = search_space(n_layers)
        self._otherwise = Sampled(settings, self._space)
        self._names: dict[tuple[str, int], str] = {}
        self._expected: tuple[tuple[int, int], np.ndarray | None] = (0, 0), None
        """Scores that were expected last: by how many trials, of how many candidates."""

    def begin(self, trials: Mapping[int, TrialRecord]) -> None:
        """Open the journal, given the trials that are recorded. Raises UserError."""
        self._trials = dict(trials)
        about = replace(self._about, name=f"{self._about.name}, screened", scorer="refusal likelihood")
        study = open_journal(self._path, self._n_layers, about)
        begun = bool(study.get_trials(deepcopy=False))
        measure = study.user_attrs.get(_MEASURE_ATTRIBUTE, "" if begun else _MEASURE)
        if measure != _MEASURE and len(trials) < self._settings.trials:
            log.warning("%s: candidates of another version were compared by another likelihood", self._path)
        self._first = study.user_attrs.get(_FIRST_ATTRIBUTE, _FIRST_UNTOLD if begun else FIRST)
        if type(self._first) is not int or self._first < 1:
            raise UserError(f"{self._path} is damaged ({_FIRST_ATTRIBUTE} is {self._first!r}); give another run.dir")
        with writing(self._path.parent, "run.dir"):
            tell(study, {_FIRST_ATTRIBUTE: self._first, _MEASURE_ATTRIBUTE: measure})
        sampled = replace(self._settings, startup_trials=STARTUP, trials=1)
        propose = Modelled(sampled, self._space, self._n_layers, warm_starts(self._n_layers), self._expect)
        self._study = Search(self._path, self._n_layers, sampled, 1.0, self._per_pass, about, propose, study)

    def ask(self, trials: Mapping[int, TrialRecord]) -> list[Ask]:
        """Candidates to be screened before the next trial is chosen; empty where enough are."""
        self._trials = dict(trials)
        self._study.trials = self._due(len(self._before(len(self._study.records))))
        return self._study.ask(self._study.remaining)  # those after them depend on more trials

    def tell(self, asks: Sequence[Ask], scores: Sequence[TrialScores], seconds: float) -> None:
        """Keep what candidates were screened by: ``refusals`` is the refusal likelihood."""
        for ask, found in zip(asks, scores, strict=True):
            self._study.tell(ask, found, seconds)

    def __call__(self, study: optuna.Study, index: int, records: Mapping[int, TrialRecord]) -> Trial:
        """The most promising candidate that is no trial yet."""
        if not waits(study, index) and (params := self._choose(study.get_trials(deepcopy=False), records)):
            study.enqueue_trial(params)
        return self._otherwise(study, index, records)

    def _due(self, trials: int) -> int:
        """How many candidates are screened before the trial after so many is chosen."""
        return self._first + trials * self._settings.candidates

    def _before(self, screened: int) -> dict[int, TrialRecord]:
        """Trials of the whole passes that are over when the candidate after so many is asked for; all, where no more
        candidates are due."""
        before: dict[int, TrialRecord] = {}
        for _, together in groupby(sorted(self._trials), key=lambda index: self._trials[index].pass_):
            if self._due(len(before)) > screened:
                break
            before |= {index: self._trials[index] for index in together}
        return before

    def _choose(self, trials: Sequence[FrozenTrial], records: Mapping[int, TrialRecord]) -> dict[str, Any] | None:
        """Parameters of a candidate, given all trials that were asked for and the records of those before this pass;
        None where all are trials, or failed."""
        screened = [record for record in self._study.records[: self._due(len(records))] if record.complete]
        asked = self._study.asked
        if len(self._study.records) < self._due(len(records)):
            raise UserError(
                f"{self._path} does not hold what the trials were chosen from; give another run.dir, or remove it and "
                f"the study beside it"
            )
        params = [asked[record.index] for record in screened]
        begun = [edit_of(trial.params) for trial in trials if trial.number not in records and trial.params]
        candidates = self._candidates(screened, records, begun)
        if all(candidate.taken for candidate in candidates):
            return None
        return params[pick(candidates, self._settings.kl_target, features(params, self._n_layers))]

    def _candidates(
        self, screened: Sequence[TrialRecord], trials: Mapping[int, TrialRecord], begun: Sequence[Edit] = ()
    ) -> list[Candidate]:
        """What was screened, with what is known of it by trials, and which of it will be one."""
        told = {self._name_of("trial", trial): trial for trial in trials.values()}
        coming = {_name(edit) for edit in begun}
        candidates = []
        for record in screened:
            name = self._name_of("candidate", record)
            candidate = Candidate(float(record.refusals or 0), float(record.kl or 0), name in told or name in coming)
            if (trial := told.get(name)) is not None and trial.complete:
                share = float(trial.refusals or 0) / self._original
                candidate = replace(candidate, share=share, scored_kl=float(trial.kl or 0))
            candidates.append(candidate)
        return candidates

    def _expect(
        self, screened: Sequence[TrialRecord], params: Sequence[Mapping[str, Any]], count: int
    ) -> np.ndarray | None:
        """Scores that candidates had or are expected to have as trials, [N, 2], when so many had been screened; None
        where no trial says anything of them."""
        trials = self._before(count)
        known = len(trials), count
        if self._expected[0] != known:
            candidates = self._candidates(screened, trials)
            scores_N2 = None
            if any(candidate.share is not None for candidate in candidates):
                scores_N2 = known_scores(candidates, predict(candidates, features(params, self._n_layers)))
            self._expected = known, scores_N2
        return self._expected[1]

    def _name_of(self, kind: str, record: TrialRecord) -> str:
        """The name of the record's edit, found once."""
        place = kind, record.index
        if place not in self._names:
            self._names[place] = _name(record.edit)
        return self._names[place]


def _name(edit: Edit) -> str:
    """Tells an edit from others."""
    return json.dumps(edit.to_dict())
