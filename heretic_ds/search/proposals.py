"""Where a study's next edit comes from: a sampler that learns from its trials, or parameters that are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import Trial

from heretic_ds.search.trials import Ask, TrialRecord, TrialScores
from heretic_ds.settings import SearchSettings

Space = Mapping[str, BaseDistribution]


class Proposes(Protocol):
    """Asks an in-memory study for one more trial.

    What it asks for depends on the arguments, on what the study was asked for before and on what it keeps on disk, so
    that a search that was killed asks for the same again. ``records`` are of trials of earlier passes.
    """

    def begin(self, trials: Mapping[int, TrialRecord]) -> None:
        """Get ready, once, before anything is asked for; ``trials`` are the records of passes that are complete."""
        ...

    def __call__(self, study: optuna.Study, index: int, records: Mapping[int, TrialRecord]) -> Trial:
        """The trial of that index; one of that index that waits in the study comes first."""
        ...

    def ask(self, trials: Mapping[int, TrialRecord]) -> list[Ask]:
        """What has to be screened before the trial after these is proposed, as many at a time as share a pass."""
        ...

    def tell(self, asks: Sequence[Ask], scores: Sequence[TrialScores], seconds: float) -> None:
        """Keep what was screened; each took so many seconds."""
        ...


class Sampled:
    """Proposes what a multivariate TPE sampler draws, made anew for every trial from (seed, index); before that, what
    is given, one set of parameters a trial."""

    def __init__(self, settings: SearchSettings, space: Space, first: Sequence[Mapping[str, Any]] = ()) -> None:
        self._settings, self._space, self._first = settings, dict(space), first

    def begin(self, trials: Mapping[int, TrialRecord]) -> None:
        """It is ready."""

    def __call__(self, study: optuna.Study, index: int, records: Mapping[int, TrialRecord]) -> Trial:
        seed = int(np.random.SeedSequence([self._settings.seed, index]).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=self._settings.startup_trials,
            multivariate=True,
            constant_liar=True,  # spreads the trials of one pass; with one trial in flight it changes nothing
        )
        if index < len(self._first) and not waits(study, index):
            study.enqueue_trial(dict(self._first[index]))
        return study.ask(fixed_distributions=self._space)

    def ask(self, trials: Mapping[int, TrialRecord]) -> list[Ask]:
        """Nothing has to be screened."""
        return []

    def tell(self, asks: Sequence[Ask], scores: Sequence[TrialScores], seconds: float) -> None:
        """Nothing was screened."""


def waits(study: optuna.Study, index: int) -> bool:
    """Whether a trial of that index is in the study already, and waits to be asked for."""
    return index < len(study.get_trials(deepcopy=False))
