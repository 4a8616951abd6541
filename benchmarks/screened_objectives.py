"""Problems for ``screened_choice.py``: what scores an edit, and what it is screened by, at no cost.

``analytic``: the one of ``search_objectives.py`` with smaller KL and a likelihood. ``real``: SmolLM2-135M-Instruct, as
``refusal_likelihood.py`` recorded 200 random edits of it, interpolated between them. It is about as hard as the model
itself: docs/performance.md has both figures.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from search_objectives import Analytic, random_edits, strengths

RECORD = Path(__file__).resolve().parent / "results" / "refusal_likelihood.json"


class Screenable(Analytic):
    """An analytic problem of 80 prompts whose edits have a refusal likelihood too.

    KL divergences are those of good edits of SmolLM2-135M-Instruct, hundredths of a nat, smaller than its parent's. The
    likelihood is that of an eighth of the prompts, drawn at random: a soft step at each one's threshold, shifted a
    little, on a floor, as that model has it where hardly anything is declined; the KL of a part of the prompts lies up
    to 12 % from that of all.
    """

    prompts = 80

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        draw = np.random.default_rng([seed, 11])
        self._kl = draw.uniform(0.04, 0.12)
        self._softness = draw.uniform(0.02, 0.05)
        self._shift_P = draw.normal(0, 0.04, self.prompts)
        self._floor = draw.uniform(0, 0.15)
        self._part = draw.permutation(self.prompts)[: self.prompts // 8]

    def screen(self, edit: Any) -> Any:
        """What a candidate is compared by, as :class:`heretic_ds.search.trials.TrialScores`."""
        from heretic_ds.search.trials import TrialScores

        removed, strength = self.removed(edit), strengths(edit, self.layers).sum()
        threshold = (self._threshold_P + self._shift_P)[self._part]
        kept = 1 / (1 + np.exp((removed - threshold) / self._softness))
        likelihood = self._floor + (1 - self._floor) * float(kept.mean())
        return TrialScores(likelihood, self.score(edit).kl * math.exp(0.12 * math.sin(50 * removed + 7 * strength)))


@lru_cache(maxsize=1)
def _record(layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of the recorded edits [N, F], and [N, 4]: logit of the share, log KL, logit of the likelihood, log of
    the KL of a part of the prompts."""
    scores_N4 = np.array(json.loads(RECORD.read_text())["models"]["real"]["scores"])
    count_N, kl_N, likelihood_N, part_N = scores_N4.T
    share_N, likelihood_N = (count_N + 0.5) / (Replayed.prompts + 1), likelihood_N.clip(0.01, 0.995)
    outputs = (_logit(share_N), np.log(kl_N), _logit(likelihood_N), np.log(part_N))
    return _features(random_edits(layers, len(scores_N4)), layers), np.stack(outputs, axis=1)


class Replayed:
    """A real model's scores between 200 edits of it: of every seed other 170 of them, and other smooth residuals.

    Between edits kernels of two widths interpolate, narrower and wider than the search's own. Where few edits lie
    nothing is known, so that random ripples stand for what an interpolation leaves out; those of likelihood and count
    are independent of each other.
    """

    layers, prompts, original_refusals = 30, 80, 80.0

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng([seed, 3])
        known_NF, outputs_N4 = _record(self.layers)
        chosen = draw.permutation(len(known_NF))[:170]
        self._known_NF, outputs_N4 = known_NF[chosen], outputs_N4[chosen]
        self._mean_4, self._spread_4 = outputs_N4.mean(axis=0), outputs_N4.std(axis=0)
        kernel_NN = _kernel(self._known_NF, self._known_NF) + 0.01 * np.eye(len(chosen))
        self._weight_N4 = np.linalg.solve(kernel_NN, (outputs_N4 - self._mean_4) / self._spread_4)
        self._wave_FR, self._phase_R = draw.normal(0, 4, (known_NF.shape[1], 40)), draw.uniform(0, 2 * np.pi, 40)
        self._height_R4 = draw.normal(0, math.sqrt(2 / 40), (40, 4)) * [0.35, 0.14, 0.12, 0.14]

    def _at(self, edit: Any) -> np.ndarray:
        asked_1F = _features([edit], self.layers)
        smooth_4 = (_kernel(asked_1F, self._known_NF) @ self._weight_N4)[0] * self._spread_4 + self._mean_4
        ripple_4 = (np.cos(asked_1F @ self._wave_FR + self._phase_R) @ self._height_R4)[0]
        found_4: np.ndarray = smooth_4 + ripple_4
        return found_4

    def score(self, edit: Any) -> Any:
        """The edit's :class:`heretic_ds.search.trials.TrialScores`."""
        from heretic_ds.search.trials import TrialScores

        logit, log_kl = self._at(edit)[:2]
        return TrialScores(float(math.floor((self.prompts + 1) / (1 + math.exp(-logit)))), math.exp(log_kl))

    def screen(self, edit: Any) -> Any:
        """What it would be compared by."""
        from heretic_ds.search.trials import TrialScores

        logit, log_kl = self._at(edit)[2:]
        return TrialScores(1 / (1 + math.exp(-logit)), math.exp(log_kl))


PROBLEMS: dict[str, Any] = {"analytic": Screenable, "real": Replayed}


def _features(edits: list[Any], layers: int) -> np.ndarray:
    """Strengths in all blocks as root mean squares over them, the direction's block as a share, and its scope."""
    rows = []
    for edit in edits:
        index = edit.direction_index
        scope = [0.0, 3.0] if index is None else [2.0 * index / (layers - 1), 0.0]
        rows.append([*(strengths(edit, layers).reshape(-1) / math.sqrt(layers)), *scope])
    return np.array(rows)


def _kernel(first_NF: np.ndarray, second_MF: np.ndarray) -> np.ndarray:
    square_NM = ((first_NF[:, None] - second_MF) ** 2).sum(axis=2)
    kernel_NM: np.ndarray = 0.7 * np.exp(-square_NM / (2 * 0.25**2)) + 0.3 * np.exp(-square_NM / (2 * 0.75**2))
    return kernel_NM


def _logit(share_N: np.ndarray) -> np.ndarray:
    logit_N: np.ndarray = np.log(share_N / (1 - share_N))
    return logit_N
