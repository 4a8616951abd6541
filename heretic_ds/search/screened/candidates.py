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
from heretic_ds.search.screened.choice import Candidate, pick, predict, scores
from heretic_ds.search.screened.modelled import Modelled
from heretic_ds.search.screened.surrogate import features
from heretic_ds.search.space import GLOBAL, MAX_WEIGHT_RANGES, PER_LAYER, edit_of, search_space
from heretic_ds.search.study import Search, refuse_nothing
from heretic_ds.search.trials import Ask, TrialRecord, TrialScores
from heretic_ds.settings import SearchSettings

FIRST, STARTUP = 32, 12
"""Candidates that are screened before the first trial, and how many of them at random."""
_FIRST_ATTRIBUTE, _FIRST_UNTOLD = "screened_before_trials", 16
"""Where a study keeps how many it began with, and how many that was before studies kept it."""
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
        refuse_nothing(original_refusals)  # before there is a file
        self._path, self._settings, self._original = journal, settings, original_refusals
        self._n_layers, self._per_pass, self._about = n_layers, per_pass, about or About()
        self._space: Space = search_space(n_layers)
        self._otherwise = Sampled(settings, self._space)
        self._trials: Mapping[int, TrialRecord] = {}

    def begin(self, trials: Mapping[int, TrialRecord]) -> None:
        """Open the journal, given the trials that are recorded. Raises UserError."""
        self._trials = dict(trials)
        sampled = replace(self._settings, startup_trials=STARTUP, trials=1)
        about = replace(self._about, name=f"{self._about.name}, screened", scorer="refusal likelihood")
        propose = Modelled(sampled, self._space, self._n_layers, warm_starts(self._n_layers), self._scores)
        self._study = Search(self._path, self._n_layers, sampled, 1.0, self._per_pass, about, propose)
        known = self._study.study.user_attrs
        self._first = known.get(_FIRST_ATTRIBUTE, _FIRST_UNTOLD if self._study.asked else FIRST)
        if type(self._first) is not int or self._first < 1:
            raise UserError(f"{self._path} is damaged ({_FIRST_ATTRIBUTE} is {self._first!r}); give another run.dir")
        with writing(self._path.parent, "run.dir"):
            tell(self._study.study, {_FIRST_ATTRIBUTE: self._first})

    def ask(self, trials: Mapping[int, TrialRecord]) -> list[Ask]:
        """Candidates to be screened before the next trial is chosen; empty where enough are."""
        self._trials = self._before_next(trials)
        self._study.trials = self._due(len(self._trials))
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

    def _before_next(self, trials: Mapping[int, TrialRecord]) -> dict[int, TrialRecord]:
        """Those trials after which the next candidates are due: all, unless candidates that were screened are gone."""
        asked, before = len(self._study.records), dict[int, TrialRecord]()
        for _, together in groupby(sorted(trials), key=lambda index: trials[index].pass_):
            if self._due(len(before)) > asked:
                break
            before |= {index: trials[index] for index in together}
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
        told, coming = {_key(trial.edit): trial for trial in trials.values()}, {_key(edit) for edit in begun}
        candidates = []
        for record in screened:
            key = _key(record.edit)
            candidate = Candidate(float(record.refusals or 0), float(record.kl or 0), key in told or key in coming)
            if (trial := told.get(key)) is not None and trial.complete:
                share = float(trial.refusals or 0) / self._original
                candidate = replace(candidate, share=share, scored_kl=float(trial.kl or 0))
            candidates.append(candidate)
        return candidates

    def _scores(self, screened: Sequence[TrialRecord], params: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
        """Share of refusals and KL [N, 2] of what was screened, by the trials so far; None where none says anything."""
        candidates = self._candidates(screened, self._trials)
        if all(candidate.share is None for candidate in candidates):
            return None
        return scores(candidates, predict(candidates, features(params, self._n_layers)))


def _key(edit: Edit) -> str:
    return json.dumps(edit.to_dict())
