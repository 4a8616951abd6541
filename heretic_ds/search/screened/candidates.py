"""The screened search: many candidates are compared without generating, those that could be on the front are scored.

Two studies, each of which goes on after any kill: that of the candidates, in a journal of its own, and that of the
trials. A candidate is an edit with two numbers, how likely the original's answers still are and the KL divergence, both
on a part of the prompts. Candidates are asked for by a sampler that learns from candidates alone. Before a pass of
trials a fixed number of them has been screened, which follows from the number of trials before it; the pass then takes
those that :mod:`heretic_ds.search.screened.choice` picks, given what all trials before it scored. So whatever is asked
for depends on what the two journals hold and on nothing else. Where a kill cut a pass in which several candidates were
screened together, the last digits of those that are screened again can differ: other edits are computed beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial

from heretic_ds.ablation import Edit
from heretic_ds.errors import UserError
from heretic_ds.foreign.disk import writing
from heretic_ds.search.journal import About, tell
from heretic_ds.search.proposals import Sampled, Space, waits
from heretic_ds.search.screened.choice import Candidate, pick
from heretic_ds.search.screened.modelled import Modelled
from heretic_ds.search.screened.surrogate import features
from heretic_ds.search.space import GLOBAL, MAX_WEIGHT_RANGES, PER_LAYER, edit_of, search_space
from heretic_ds.search.study import Search, refuse_nothing
from heretic_ds.search.trials import Ask, TrialRecord, TrialScores
from heretic_ds.settings import SearchSettings

FIRST, STARTUP = 24, 12
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
        self._n_layers = n_layers
        self._space: Space = search_space(n_layers)
        sampled = replace(settings, startup_trials=STARTUP, trials=1)
        about = about or About()
        about = replace(about, name=f"{about.name}, screened", scorer="refusal likelihood")
        propose = Modelled(sampled, self._space, n_layers, warm_starts(n_layers))
        self._study = Search(journal, n_layers, sampled, 1.0, per_pass, about, propose)
        known = self._study.study.user_attrs
        self._first = known.get(_FIRST_ATTRIBUTE, _FIRST_UNTOLD if self._study.asked else FIRST)
        if type(self._first) is not int or self._first < 1:
            raise UserError(f"{journal} is damaged ({_FIRST_ATTRIBUTE} is {self._first!r}); give another run.dir")
        with writing(journal.parent, "run.dir"):
            tell(self._study.study, {_FIRST_ATTRIBUTE: self._first})
        self._otherwise = Sampled(settings, self._space)

    def ask(self, trials: int) -> list[Ask]:
        """Candidates to be screened before the trial after so many is chosen; empty where enough are."""
        self._study.trials = self._due(trials)
        return self._study.ask()

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
        told = {_key(record.edit): record for record in records.values()}
        coming = {_key(edit_of(trial.params)) for trial in trials if trial.number not in records and trial.params}
        candidates = []
        for record in screened:
            key = _key(record.edit)
            candidate = Candidate(float(record.refusals or 0), float(record.kl or 0), key in told or key in coming)
            if (trial := told.get(key)) is not None and trial.complete:
                share = float(trial.refusals or 0) / self._original
                candidate = replace(candidate, share=share, scored_kl=float(trial.kl or 0))
            candidates.append(candidate)
        if all(candidate.taken for candidate in candidates):
            return None
        params = [asked[record.index] for record in screened]
        return params[pick(candidates, self._settings.kl_target, features(params, self._n_layers))]


def _key(edit: Edit) -> str:
    return json.dumps(edit.to_dict())
