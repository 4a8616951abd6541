"""The search: a multi-objective study that asks for edits and keeps their scores, exact after any kill.

How resume is exact. Asking happens on an in-memory copy of the study, with a sampler made anew for every trial from
(seed, trial index), so an ask depends on the finished trials and nothing else: no clock, no sampler state. (In a
screened search trials depend on candidates, too, and these on the trials before them.) Only finished trials are
appended to the journal, in order, one record (one line) each. After a kill the journal therefore holds a prefix of the
uninterrupted study. Where that prefix ends inside a pass, the pass is asked again from the state before it, which gives
the same edits, and only the missing ones are handed out. Where it gives others (another version asked, or a journal was
brought back), recorded trials stay what they are.

Two studies, two kinds of values. The in-memory study has what the sampler minimises; the journal, which people look at,
has raw refusals and raw KL, and the minimised numbers as an attribute, from which the in-memory study is made again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, TrialState

from heretic_ds.ablation.edit import Edit
from heretic_ds.errors import UserError
from heretic_ds.foreign.disk import writing
from heretic_ds.search.journal import DIRECTIONS, MINIMISED, About, open_study, quiet_optuna
from heretic_ds.search.proposals import Proposes, Sampled
from heretic_ds.search.space import edit_of, known_params, search_space
from heretic_ds.search.trials import COMPLETE, FAILED, Ask, TrialRecord, TrialScores, plain
from heretic_ds.settings import SearchSettings

logger = logging.getLogger(__name__)

_Values = tuple[float, float]
_KEPT = ("index", "refusals", "kl", "scores", "seconds", "pass", "maximize")
"""What the journal keeps of a trial's record beside its parameters."""

_FAILED_TRIAL = optuna.trial.create_trial(state=TrialState.FAIL)
"""Keeps a number taken in the in-memory study; samplers leave failed trials out."""


def objectives(scores: TrialScores, baseline_refusals: float, kl_target: float) -> tuple[float, float]:
    """The two numbers the sampler minimises: r = refusals / refusals of the original, and the aimed KL.

    Below ``kl_target`` the second is r x kl_target: there a smaller KL is worth nothing, fewer refusals are. Of a first
    scorer that is maximised r is negated, and the original's number may be anything.
    """
    ratio = (
        -scores.refusals / (abs(baseline_refusals) or 1.0) if scores.maximize else scores.refusals / baseline_refusals
    )
    return ratio, scores.kl if scores.kl >= kl_target else ratio * kl_target


def refuse_nothing(baseline_refusals: float, maximize: bool = False) -> None:
    """Raise UserError where the original model's refusals leave nothing to search for."""
    if baseline_refusals <= 0 and not maximize:
        raise UserError(
            "the original model shows none of the behaviour on the target eval prompts, so there is "
            "nothing to search for; change prompts.target.eval or scoring.markers"
        )


def open_journal(journal: Path, n_layers: int, about: About | None = None) -> optuna.Study:
    """The study on disk, over the edits of a model of so many blocks. Raises UserError."""
    space = {name: distribution_to_json(distribution) for name, distribution in search_space(n_layers).items()}
    return open_study(journal, space, about or About())


class Search:
    """Asks for edits, is told their scores, and can be closed or killed and opened again at any moment.

    Args:
        journal: the study's file; started where it does not exist. The caller is its only writer.
        n_layers: blocks of the model.
        settings: the ``search`` group. ``trials`` may differ from earlier runs in the same folder; a pass in flight
            is completed as it was asked, later passes have ``trials_per_pass`` trials.
        baseline_refusals: the original model's refusals on the target eval prompts, above 0.
        trials_per_pass: of new passes, where the settings leave it open.
        about: what the study tells of itself.
        propose: where edits come from; a sampler by default.
        study: what :func:`open_journal` gave for the same arguments, where it is open already.

    Raises:
        UserError: the journal is damaged or belongs to another search space.
    """

    def __init__(
        self,
        journal: Path,
        n_layers: int,
        settings: SearchSettings,
        baseline_refusals: float,
        trials_per_pass: int | None = None,
        about: About | None = None,
        propose: Proposes | None = None,
        study: optuna.Study | None = None,
    ) -> None:
        refuse_nothing(baseline_refusals, about is not None and about.maximize)
        quiet_optuna()
        self.trials = settings.trials
        """Number of trials to reach, those of earlier runs included; may be raised at any time."""
        self._settings = settings
        self._per_pass = int(settings.trials_per_pass) if trials_per_pass is None else trials_per_pass
        self._baseline_refusals = baseline_refusals
        self._space = search_space(n_layers)
        self._propose = propose or Sampled(settings, self._space)
        self._path = journal
        self._journal = study or open_journal(journal, n_layers, about)
        self._records: dict[int, TrialRecord] = {}
        self._unstored: dict[int, tuple[TrialRecord, _Values | None, str]] = {}
        self._pass: list[Ask] = []
        self._resumes_pass = False
        self._unfinished: dict[int, FrozenTrial] = {}
        """Trials that something else left running or waiting in the journal, by index."""
        trials = self._journal.get_trials(deepcopy=False)
        cut = self._cut_pass(trials)
        earlier = trials[: len(trials) - len(cut)]
        self._restore(earlier)
        self._propose.begin(self._records)
        self._mirror = self._mirror_of(earlier)
        if cut:
            self._resume_pass(earlier, cut)

    @property
    def records(self) -> list[TrialRecord]:
        """Finished trials, by index."""
        return [self._records[index] for index in sorted(self._records)]

    @property
    def asked(self) -> list[dict[str, Any]]:
        """Parameters of all trials that were asked for, by index."""
        return [trial.params for trial in self._mirror.get_trials(deepcopy=False)]

    @property
    def study(self) -> optuna.Study:
        """The study on disk, for those who add to what it tells of itself."""
        return self._journal

    @property
    def remaining(self) -> int:
        """Trials still to finish."""
        return max(0, self.trials - len(self._records))

    def ask(self, most: int | None = None) -> list[Ask]:
        """The next trials to evaluate together, at most ``trials_per_pass``; empty when the study is
        complete. A new pass has at most ``most``, where that is given.

        A pass is always asked for in full and cut here, so that raising ``trials`` later gives the trials
        that a longer study would have had. Asking again before telling gives the same trials again. Of a pass that
        an end cut short, the trials that are recorded are asked for too: the last digits of scores depend on what is
        computed beside them.
        """
        if self.remaining == 0:
            return []
        if not self._outstanding():
            self._begin_pass(self._per_pass if most is None else min(self._per_pass, most))
        allowed = self.remaining - len(self._unstored)
        asks = self._outstanding()[: min(self._per_pass, allowed)]
        again = self._resumes_pass and asks == self._outstanding() and len(self._pass) <= self._per_pass
        return list(self._pass) if again else asks

    def to_screen(self) -> list[Ask]:
        """What has to be screened before the next pass of trials is asked for; empty where enough is."""
        return [] if self.remaining == 0 or self._outstanding() else self._propose.ask(self._records)

    def tell_screened(self, asks: Sequence[Ask], scores: Sequence[TrialScores], seconds: float) -> None:
        """Keep what was screened; each took so many seconds."""
        self._propose.tell(asks, scores, seconds)

    def knows(self, ask: Ask) -> bool:
        """Whether a trial is recorded already; telling its scores again changes nothing."""
        return ask.index in self._records

    def tell(self, ask: Ask, scores: TrialScores | None, seconds: float) -> TrialRecord:
        """Keep one trial's scores; None, or scores that are not finite, make it a failed trial, never chosen.

        Trials of a pass may be told in any order: they reach the journal in theirs, so that it stays a
        prefix.
        """
        if self.knows(ask):
            return self._records[ask.index]
        scores, failure = scores and plain(scores), ""
        if scores is not None and not scores.usable:
            failure = f"scores are not finite: refusals {scores.refusals}, KL {scores.kl}"
            logger.warning("trial %d failed: %s", ask.index, failure)
            scores = None
        target = self._settings.kl_target
        values = None if scores is None else objectives(scores, self._baseline_refusals, target)
        record = _record(ask, scores, seconds)
        self._unstored[ask.index] = (record, values, failure)
        for planned in self._pass:
            if planned.index in self._records:
                continue
            if planned.index not in self._unstored:
                break
            self._store(*self._unstored.pop(planned.index))
        return self._records.get(ask.index, record)

    def _outstanding(self) -> list[Ask]:
        done = {*self._records, *self._unstored}
        return [ask for ask in self._pass if ask.index not in done]

    def _begin_pass(self, trials: int) -> None:
        pass_ = 1 + max((record.pass_ for record in self._records.values()), default=-1)
        # A trial that something else left unfinished is a pass of its own: it was not asked with the others'
        # state.
        count = 1 if self._unfinished else trials
        self._resumes_pass = False
        self._pass = [self._sample(pass_) for _ in range(count)]

    def _sample(self, pass_: int) -> Ask:
        """Ask the in-memory study for one trial."""
        index = min(self._unfinished, default=len(self._mirror.get_trials(deepcopy=False)))
        trial = self._propose(self._mirror, index, self._records)
        return Ask(index=trial.number, edit=edit_of(trial.params), pass_=pass_)

    def _store(self, record: TrialRecord, values: _Values | None, failure: str) -> None:
        """Journal first, then memory: what the journal does not hold is asked again after a kill."""
        index, entry = record.index, record.to_dict()
        raw = None if record.refusals is None or record.kl is None else [float(record.refusals), float(record.kl)]
        attributes = {name: entry[name] for name in _KEPT if name in entry}
        if values is not None:
            attributes[MINIMISED] = list(values)
        if failure:
            attributes["failure"] = failure
        left = self._unfinished.pop(index, None)
        if left is None:
            attributes["pass_first"], attributes["pass_size"] = self._pass[0].index, len(self._pass)
        finished = optuna.trial.create_trial(
            state=TrialState.FAIL if values is None else TrialState.COMPLETE,
            values=raw,
            params=self._mirror.get_trials(deepcopy=False)[index].params,
            distributions=self._space,
            user_attrs=attributes,
        )
        with writing(self._path.parent, "run.dir"):
            if left is None:
                self._append(index, finished)
            else:
                self._finish(left, finished)
        self._mirror.tell(index, values, finished.state)
        self._records[index] = record

    def _append(self, index: int, trial: FrozenTrial) -> None:
        """Append one finished trial to the journal: one record, so a kill leaves all of it or none."""
        now = datetime.now()
        trial.datetime_start, trial.datetime_complete = now - timedelta(seconds=trial.user_attrs["seconds"]), now
        self._journal.add_trial(trial)
        found = len(self._journal.get_trials(deepcopy=False))
        if found != index + 1:
            raise UserError(
                f"another program added trials to {self._path} during the search (found {found}, expected "
                f"{index + 1}); stop it and run the same command again"
            )

    def _finish(self, left: FrozenTrial, trial: FrozenTrial) -> None:
        """Finish a trial that something else left unfinished as ``trial``; its state comes last."""
        storage, trial_id = self._journal._storage, left._trial_id
        if left.state == TrialState.WAITING:
            storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        for name, distribution in self._space.items():
            storage.set_trial_param(trial_id, name, distribution.to_internal_repr(trial.params[name]), distribution)
        for name, value in trial.user_attrs.items():
            storage.set_trial_user_attr(trial_id, name, value)
        storage.set_trial_state_values(trial_id, trial.state, trial.values)

    def _restore(self, trials: Sequence[FrozenTrial]) -> None:
        """Records of the journal's finished trials; the others are finished first."""
        for trial in trials:
            if trial.state.is_finished():
                self._records[trial.number] = self._restored(trial)
            else:
                self._unfinished[trial.number] = trial

    def _mirror_of(self, trials: Sequence[FrozenTrial]) -> optuna.Study:
        """The in-memory study after these trials."""
        mirror = optuna.create_study(directions=DIRECTIONS)
        for trial in trials:
            if trial.state.is_finished():
                mirror.add_trial(self._mirrored(trial) if self._records[trial.number].complete else _FAILED_TRIAL)
            else:
                params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
                mirror.enqueue_trial(known_params(params, self._space))
        return mirror

    def _resume_pass(self, earlier: Sequence[FrozenTrial], cut: Sequence[FrozenTrial]) -> None:
        """Ask again for the pass that an end cut short. Trials that are recorded stay what they are."""
        pass_, size = cut[0].user_attrs["pass"], cut[0].user_attrs["pass_size"]
        self._resumes_pass = True
        self._pass = [self._sample(pass_) for _ in range(size)]
        asked = self._mirror.get_trials(deepcopy=False)
        if others := [trial.number for trial in cut if asked[trial.number].params != trial.params]:
            logger.warning(
                "trial %d of %s was asked for with other parameters than now: the study goes on, but will differ from "
                "an uninterrupted one (was heretic-ds, Optuna or numpy updated? was a journal brought back?)",
                others[0],
                self._path.name,
            )
            self._mirror = self._mirror_of(earlier)
            for trial in cut:
                self._mirror.enqueue_trial(known_params(trial.params, self._space))
                self._mirror.ask(fixed_distributions=self._space)
            recorded = [Ask(trial.number, edit_of(trial.params), pass_) for trial in cut]
            self._pass = [*recorded, *(self._sample(pass_) for _ in range(size - len(cut)))]
        for trial in cut:
            self._mirror.tell(trial.number, trial.user_attrs.get(MINIMISED), trial.state)
            self._records[trial.number] = self._restored(trial)

    def _mirrored(self, trial: FrozenTrial) -> FrozenTrial:
        """The trial with exactly this space's parameters: others would change the sampler's space."""
        params = known_params(trial.params, self._space)
        return optuna.trial.create_trial(params=params, distributions=self._space, values=trial.user_attrs[MINIMISED])

    def _cut_pass(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """The journal's last trials, where they are the beginning of a pass that was not told in full."""
        if not trials or "pass_first" not in trials[-1].user_attrs:
            return []
        attributes = trials[-1].user_attrs
        cut = trials[attributes["pass_first"] :]
        is_one_pass = all(trial.user_attrs.get("pass_first") == attributes["pass_first"] for trial in cut)
        earlier_are_finished = all(trial.state.is_finished() for trial in trials)
        return cut if len(cut) < attributes["pass_size"] and is_one_pass and earlier_are_finished else []

    def _restored(self, trial: FrozenTrial) -> TrialRecord:
        """A journal trial's record; one that something else finished without scores counts as failed."""
        attributes = trial.user_attrs
        has_params = known_params(trial.params, self._space).keys() == self._space.keys()
        edit = edit_of(trial.params) if has_params else Edit(direction_index=None, profiles={})
        ask = Ask(index=trial.number, edit=edit, pass_=attributes.get("pass", 0))
        scores = None
        if trial.state == TrialState.COMPLETE and has_params and attributes.get("kl") is not None:
            kept = attributes.get("scores", {}), attributes.get("maximize", False)
            scores = TrialScores(attributes["refusals"], attributes["kl"], *kept)
        return _record(ask, scores, attributes.get("seconds", 0.0))


def _record(ask: Ask, scores: TrialScores | None, seconds: float) -> TrialRecord:
    """A finished trial's record; without scores it has failed."""
    if scores is None:
        return TrialRecord(ask.index, ask.pass_, FAILED, ask.edit, None, None, {}, seconds)
    numbers = scores.refusals, scores.kl, dict(scores.scores)
    return TrialRecord(ask.index, ask.pass_, COMPLETE, ask.edit, *numbers, seconds, scores.maximize)
