"""Proposes what a model of all edits so far expects to add most to their front. D parameters, N edits, M others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, Trial

from heretic_ds.search.proposals import Sampled, Space, waits
from heretic_ds.search.screened.area import LEAST_KL, MOST_KL, front, gains, height
from heretic_ds.search.screened.surrogate import Surrogate, features
from heretic_ds.search.space import GLOBAL, PER_LAYER
from heretic_ds.search.trials import TrialRecord
from heretic_ds.settings import SearchSettings

_ASKED = 200
"""Edits that the model is asked about for each that it proposes, and how many of them are drawn at random."""
_AT_RANDOM = 60
_LEARNED = 192
"""Most edits that it learns from: the front, and the latest."""
_HOPE = 0.5
"""Standard deviations by which its expectations are lowered: what it does not know may be good."""
_AS_NONE = 0.02
"""Likelihood that is as good as none."""
_STEPS, _CHANGED = (0.4, 0.12, 0.04), 0.4
"""Deviations by which parameters of edits on the front are changed, as shares of their ranges, and how many of them."""


Expect = Callable[[Sequence[TrialRecord], Sequence[Mapping[str, Any]], int], np.ndarray | None]
"""Share of refusals and KL [N, 2] that screened edits are expected to be scored, from their records and parameters, by
what was known when so many edits had been screened; None where no trial says anything of them."""


class Modelled(Sampled):
    """Proposes the first ones as :class:`Sampled` does, the others by a Gaussian process over what edits do. It learns
    what edits are expected to be scored, and what they were screened by as long as nothing is.

    Each of many edits, random ones and those that are like edits on the front, is expected to have the process's mean
    less half of its deviation; proposed is the one that would add most to the dominated area. Edits that were asked for
    and are not known yet count as what is expected of them.
    """

    def __init__(
        self,
        settings: SearchSettings,
        space: Space,
        n_layers: int,
        first: Sequence[Mapping[str, Any]] = (),
        expect: Expect = lambda screened, params, count: None,
    ) -> None:
        super().__init__(settings, space, first)
        self._n_layers, self._expect = n_layers, expect

    def __call__(self, study: optuna.Study, index: int, records: Mapping[int, TrialRecord]) -> Trial:
        if index >= self._settings.startup_trials and index >= len(self._first) and not waits(study, index):
            draw = np.random.default_rng([self._settings.seed, index])
            trials = [trial for trial in study.get_trials(deepcopy=False) if trial.params]
            if params := self._best(trials, records, draw):
                study.enqueue_trial(params)
        return super().__call__(study, index, records)

    def _best(
        self, trials: Sequence[FrozenTrial], records: Mapping[int, TrialRecord], draw: np.random.Generator
    ) -> dict[str, Any] | None:
        known = [trial for trial in trials if trial.number in records and records[trial.number].complete]
        if not known:
            return None
        found = [records[trial.number] for trial in known]
        scores_N2 = self._expect(found, [trial.params for trial in known], len(records))
        if scores_N2 is None:
            likelihood_N, kl_N = np.array([[record.refusals, record.kl] for record in found], dtype=float).T
        else:
            # _points takes it off again.
            likelihood_N, kl_N = _AS_NONE + scores_N2[:, 0], scores_N2[:, 1]
        kl_N = kl_N.clip(min=LEAST_KL)
        points_N2 = self._points(likelihood_N, kl_N)
        best = front(points_N2, self._most)
        best = best if len(best) else np.array([points_N2.sum(axis=1).argmin()])
        learned = sorted({*best.tolist(), *range(len(known))[-_LEARNED:]})
        outputs_N2 = np.stack([_logit(likelihood_N), np.log10(kl_N)], axis=1)
        known_NF = features([known[at].params for at in learned], self._n_layers)
        model = Surrogate(known_NF, outputs_N2[learned])
        pending = [trial.params for trial in trials if trial.number not in records]
        points_N2 = np.concatenate([points_N2, self._expected(model, pending, 0.0)]) if pending else points_N2
        asked = self._asked(np.array([self._units(known[at].params) for at in best]), draw)
        return asked[int(gains(self._expected(model, asked, _HOPE), points_N2, self._most).argmax())]

    def _expected(self, model: Surrogate, params: Sequence[Mapping[str, Any]], hope: float) -> np.ndarray:
        mean_M2, deviation_M2 = model.at(features(params, self._n_layers))
        expected_M2 = mean_M2 - hope * deviation_M2
        return self._points(1 / (1 + np.exp(-expected_M2[:, 0])), 10 ** expected_M2[:, 1])

    @property
    def _most(self) -> float:
        return float(height(np.array(MOST_KL), self._settings.kl_target))

    def _points(self, likelihood_N: np.ndarray, kl_N: np.ndarray) -> np.ndarray:
        heights_N = height(kl_N, self._settings.kl_target)
        return np.stack([(likelihood_N - _AS_NONE).clip(min=0), heights_N], axis=1)

    def _asked(self, front_SD: np.ndarray, draw: np.random.Generator) -> list[dict[str, Any]]:
        """Parameters of edits: some at random, the others children of one or two edits of the front."""
        wide = front_SD.shape[1]
        random_MD, count = draw.random((_AT_RANDOM, wide)), _ASKED - _AT_RANDOM
        one_MD, other_MD = (front_SD[draw.integers(len(front_SD), size=count)] for _ in range(2))
        mixed_MD = (draw.random((count, wide)) < 0.5) & (draw.random((count, 1)) < 0.5)
        child_MD = np.where(mixed_MD, other_MD, one_MD)
        changed_MD = draw.random((count, wide)) < _CHANGED
        changed_MD[np.arange(count), draw.integers(wide, size=count)] = True
        step_M1 = draw.choice(_STEPS, size=(count, 1))
        child_MD = np.abs(child_MD + changed_MD * step_M1 * draw.standard_normal((count, wide)))
        return [self._params(each_D) for each_D in np.concatenate([random_MD, (1 - np.abs(1 - child_MD)).clip(0, 1)])]

    def _units(self, params: Mapping[str, Any]) -> np.ndarray:
        """Parameters as shares of their ranges; the scope is 0.25 for a global direction, 0.75 for layers' own."""
        return np.array(
            [
                (params[name] - space.low) / (space.high - space.low or 1.0)
                if isinstance(space, FloatDistribution)
                else (0.75 if params[name] == PER_LAYER else 0.25)
                for name, space in self._space.items()
            ]
        )

    def _params(self, units_D: np.ndarray) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for unit, (name, space) in zip(units_D.tolist(), self._space.items(), strict=True):
            if isinstance(space, FloatDistribution):
                given[name] = min(max(space.low + unit * (space.high - space.low), space.low), space.high)
            else:
                given[name] = PER_LAYER if unit > 0.5 else GLOBAL
        return given


def _logit(share_N: np.ndarray) -> np.ndarray:
    share_N = share_N.clip(0.005, 0.995)
    logit_N: np.ndarray = np.log(share_N / (1 - share_N))
    return logit_N
