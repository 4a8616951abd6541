"""Objectives of searches that take edits as a search draws them and cost microseconds.

``analytic``: a model of 32 blocks and 100 prompts, another one for every seed. A behaviour lies over some blocks in the
later half; what an edit removes of it is 1 - (1 - λa)² where it acts, a how well its direction fits; every prompt gives
way at a threshold of its own, so that refusals fall along an S, in whole prompts. KL is quadratic in what is taken out,
as KL is around any model, more in early blocks and in the MLP, and grows faster where much is taken. Best edits trade:
no refusals cost a few tenths of a nat, as published searches on real models show.

``recorded``: scores of the demo model, which ``record`` took of edits drawn at random, interpolated between them with a
Gaussian kernel over the blocks' strengths and the place of the direction, each scope by itself. The demo's KL is scaled
to where real models' is, or the search would be under its target from the start. Its behaviour hangs on one planted
direction: most edits remove all of it or nothing, so its front is short.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

TABLE = Path(__file__).resolve().parent / "results" / "search_quality_trials.json"
COMPONENTS = ("attention", "mlp")
KL_SCALE = 1000.0
"""By which the demo's KL of some 1e-4 nats is multiplied."""


class Problem(Protocol):
    """Something to search on."""

    layers: int
    original_refusals: float

    def score(self, edit: Any) -> Any:
        """The edit's :class:`heretic_ds.search.trials.TrialScores`."""

    def described(self) -> dict[str, Any]:
        """What results say of it."""


def _scores(refusals: float, kl: float) -> Any:
    from heretic_ds.search.trials import TrialScores

    return TrialScores(refusals=float(refusals), kl=float(kl))


def strengths(edit: Any, layers: int) -> np.ndarray:
    """λ of each component in each block, [2, L]."""
    return np.array([[edit.strength(component, block) for block in range(layers)] for component in COMPONENTS])


class Analytic:
    """A made-up model, whose numbers are drawn from the seed."""

    layers, prompts = 32, 100

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng([seed, 7])
        last, block_L = self.layers - 1, np.arange(self.layers)
        behaviour_L = np.exp(-(((block_L - draw.uniform(0.5, 0.75) * last) / (draw.uniform(0.12, 0.22) * last)) ** 2))
        self._behaviour_L = behaviour_L / behaviour_L.sum()
        self._share_2 = np.array([share := draw.uniform(0.45, 0.75), 1 - share])
        self._best_index, self._width = draw.uniform(0.45, 0.85) * last, draw.uniform(0.15, 0.4) * last
        self._own_fit = draw.uniform(0.6, 0.95)
        self._threshold_P = np.sort(draw.normal(0.6, 0.13, self.prompts))
        harm_L = 1.5 - block_L / last
        self._harm_2L = np.outer([draw.uniform(0.5, 1.0), draw.uniform(1.0, 2.0)], harm_L / harm_L.sum())
        self._kl = draw.uniform(0.3, 0.8)
        self.original_refusals = float((self._threshold_P > 0).sum())

    def removed(self, edit: Any) -> float:
        """What an edit removes of the behaviour, as a share."""
        strength_2L, index = strengths(edit, self.layers), edit.direction_index
        fit = self._own_fit if index is None else np.exp(-(((index - self._best_index) / self._width) ** 2))
        return float((self._share_2[:, None] * self._behaviour_L * (1 - (1 - strength_2L * fit) ** 2)).sum())

    def score(self, edit: Any) -> Any:
        strength_2L, removed = strengths(edit, self.layers), self.removed(edit)
        harm = (self._harm_2L * strength_2L**2).sum()
        return _scores((self._threshold_P > removed).sum(), self._kl * harm * (1 + harm))

    def described(self) -> dict[str, Any]:
        return {"blocks": self.layers, "prompts": self.prompts, "instances": "another one for every seed"}


class Recorded:
    """The demo model's scores, interpolated."""

    def __init__(self, table: Mapping[str, Any], width: float = 0.6, ridge: float = 1e-2) -> None:
        from heretic_ds.ablation import Edit

        self.layers, self.original_refusals = int(table["layers"]), float(table["original_refusals"])
        self._width = width
        edits = [Edit.from_dict(entry) for entry in table["trials"]]
        scores_N2 = np.array([[e["refusals"], np.log(KL_SCALE * max(e["kl"], 1e-9))] for e in table["trials"]])
        self._known: dict[bool, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for scope in (False, True):
            chosen = [at for at, edit in enumerate(edits) if (edit.direction_index is None) == scope]
            at_NF = np.array([self._features(edits[at]) for at in chosen])
            mean_2 = scores_N2[chosen].mean(axis=0)
            kernel_NN = self._kernel(at_NF, at_NF) + ridge * np.eye(len(chosen))
            weights_N2 = np.linalg.solve(kernel_NN, scores_N2[chosen] - mean_2)
            self._known[scope] = at_NF, weights_N2, mean_2
        self.trials = len(edits)

    def _features(self, edit: Any) -> np.ndarray:
        index = 0.0 if edit.direction_index is None else edit.direction_index
        return np.append(strengths(edit, self.layers).ravel(), index)

    def _kernel(self, first_NF: np.ndarray, second_MF: np.ndarray) -> np.ndarray:
        square_NM = ((first_NF[:, None] - second_MF[None]) ** 2).sum(-1)
        return np.exp(-square_NM / (2 * self._width**2 * first_NF.shape[1] / 4))

    def predict(self, edit: Any) -> tuple[float, float]:
        """Refusals and scaled KL."""
        at_NF, weights_N2, mean_2 = self._known[edit.direction_index is None]
        refusals, log_kl = (self._kernel(self._features(edit)[None], at_NF) @ weights_N2 + mean_2)[0]
        return float(np.clip(round(refusals), 0, self.original_refusals)), float(np.exp(log_kl))

    def score(self, edit: Any) -> Any:
        return _scores(*self.predict(edit))

    def described(self) -> dict[str, Any]:
        return {"blocks": self.layers, "recorded_edits": self.trials, "kl_scaled_by": KL_SCALE} | held_out_error()


@lru_cache
def _recorded() -> Recorded:
    return Recorded(json.loads(TABLE.read_text()))


@lru_cache
def held_out_error() -> dict[str, float]:
    """How far the interpolation is off on a fifth of the recorded edits that it is not given."""
    from heretic_ds.ablation import Edit

    table = json.loads(TABLE.read_text())
    told, kept = [t for i, t in enumerate(table["trials"]) if i % 5], table["trials"][::5]
    model = Recorded({**table, "trials": told})
    found = [model.predict(Edit.from_dict(entry)) for entry in kept]
    refusals = [abs(f[0] - entry["refusals"]) for f, entry in zip(found, kept, strict=True)]
    logs = [abs(np.log10(f[1] / KL_SCALE / entry["kl"])) for f, entry in zip(found, kept, strict=True)]
    return {
        "median_error_of_refusals": float(np.median(refusals)),
        "mean_error_of_refusals": round(float(np.mean(refusals)), 2),
        "median_error_of_kl_in_decades": round(float(np.median(logs)), 3),
    }


PROBLEMS = ("recorded", "analytic")


def problem(name: str, seed: int) -> Problem:
    """The objective of that name for a seed."""
    return _recorded() if name == "recorded" else Analytic(seed)


def searched(problem: Problem, settings: Any) -> list[tuple[float, float]]:
    """Share of refusals and KL of each trial of a search that scores all it asks for."""
    from heretic_ds.search.study import Search

    with tempfile.TemporaryDirectory() as folder:
        search = Search(Path(folder) / "study.journal", problem.layers, settings, problem.original_refusals)
        while asks := search.ask():
            for ask in asks:
                search.tell(ask, problem.score(ask.edit), 0.0)
        return [(r.refusals / problem.original_refusals, r.kl) for r in search.records if r.complete]


def random_edits(layers: int, count: int) -> list[Any]:
    """Edits drawn from the search's space, as its first trials are."""
    from heretic_ds.search.space import edit_of, search_space

    draw, edits = np.random.default_rng(0), []
    for _ in range(count):
        params = {
            name: draw.choice(space.choices) if hasattr(space, "choices") else draw.uniform(space.low, space.high)
            for name, space in search_space(layers).items()
        }
        edits.append(edit_of(params))
    return edits


def record(count: int, target: Path) -> None:
    """Score random edits of the demo model and write them down."""
    import torch

    from heretic_ds.cli import compose
    from heretic_ds.report.console import console_of, messages_to
    from heretic_ds.stages.measure import capture_directions, find_response_prefix, measure_original
    from heretic_ds.stages.opening import opened
    from heretic_ds.world import World

    torch.set_num_threads(1)
    world = World.join()
    with tempfile.TemporaryDirectory() as folder:
        settings = compose(["experiment=demo", f"run.dir={folder}/run", "run.interactive=false"])
        with messages_to(console_of(world)) as console, opened(settings, world, console) as run:
            find_response_prefix(run)
            capture_directions(run)
            objective = measure_original(run)
            layers = run.job.anatomy.n_blocks
            trials = []
            for edit in random_edits(layers, count):
                score = objective.score([edit])[0]
                trials.append({**_rounded(edit.to_dict()), "refusals": score.refusals, "kl": float(f"{score.kl:.6g}")})
            table = {
                "what": "scores of random edits of the demo model, float32, the demo's settings",
                "layers": layers,
                "original_refusals": objective.original.refusals,
            }
    lines = ",\n".join("  " + json.dumps(trial) for trial in trials)
    head = json.dumps(table, indent=1)[:-2]
    target.write_text(f'{head},\n "trials": [\n{lines}\n ]\n}}\n')


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    return round(value, 4) if isinstance(value, float) else value
