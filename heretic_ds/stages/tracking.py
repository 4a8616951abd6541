"""Those who follow a search beside the run folder: the study's page in optuna-dashboard, and a tracker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heretic_ds import __version__
from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import path_of
from heretic_ds.run_folder import FINGERPRINT_NAME, MEASURED_NAME
from heretic_ds.search.dashboard import keep_files, save_note
from heretic_ds.search.journal import About
from heretic_ds.settings import Settings
from heretic_ds.settings.scoring import MAXIMIZE
from heretic_ds.stages.facts import model_title, parameters
from heretic_ds.stages.sharing.packing import how_edited
from heretic_ds.tracking import has_dashboard, make_tracker
from heretic_ds.tracking.base import RunFacts, Tracker
from heretic_ds.world import World

if TYPE_CHECKING:
    from heretic_ds.search.study import Search
    from heretic_ds.search.trials import TrialRecord
    from heretic_ds.stages.opening import Run

log = logging.getLogger(__name__)

_TRACKED = "tracking"
"""Of what a run folder remembers: who was told of how many trials, and as what."""


def check_tracking(settings: Settings, world: World) -> None:
    """Refuse trackers that are not there before anything is loaded."""
    world.decide(lambda: make_tracker(settings.tracking) and None)


def about(run: Run) -> About:
    """What the study tells of the run."""
    results = run.results
    attributes = {
        "model": run.settings.model.path,
        "original": results["baseline"]["refusals"],
        "target_prompts": results["prompts"]["target_eval"],
        "kl_target": run.settings.search.kl_target,
        "command": results["command"],
        "heretic_ds": __version__,
    }
    return About(model_title(run.job), run.scorer, attributes, run.job.scorers[0].direction == MAXIMIZE)


class Following:
    """Tells everybody who follows a search; rank 0 alone has one.

    What goes wrong with one of them once it has started is one warning, and the search goes on without it. The same
    command later tells it of what it missed.
    """

    def __init__(self, run: Run, search: Search) -> None:
        self._run, self._search = run, search
        self._shown = run.settings.tracking.dashboard
        self._shown = has_dashboard() if self._shown is None else self._shown
        self._tracker = make_tracker(run.settings.tracking)
        self._told = 0

    def start(self) -> None:
        """Begin, or go on where an earlier part of the search was left. Raises UserError where a tracker cannot."""
        self._show(files=False)
        if self._tracker is None:
            return
        name, before = self._run.settings.tracking.name, self._run.measured.get(_TRACKED, {})
        known = before if before.get("name") == name else {}
        facts = self._facts(known.get("run"), min(known.get("trials", 0), len(self._run.records)))
        self._told = facts.told
        try:
            identity = self._tracker.start(facts)
        except Exception as error:
            raise UserError(f"tracking={name} cannot start: {_line(error)}; set tracking=none, or mend it") from error
        self._known = {"name": name, "run": identity}
        self.trials(self._run.records[self._told :])

    def trials(self, records: Sequence[TrialRecord]) -> None:
        """Tell of finished trials, in their order."""
        for record in records:
            if not self._attempt(partial(_tell_of, record)):
                return
            self._told = record.index + 1
        if self._tracker is not None:
            self._run.remember(**{_TRACKED: {**self._known, "trials": self._told}})

    def end(self) -> None:
        """Tell of the outcome."""
        self._show(files=True)
        self._attempt(
            lambda tracker: tracker.end(self._run.results, self._files("*.json", "*.png", "*.html", "*.yaml"))
        )

    def interrupted(self) -> None:
        """The command ends otherwise."""
        self._attempt(lambda tracker: tracker.interrupted())

    def _attempt(self, call: Callable[[Tracker], Any]) -> bool:
        """Whether there is a tracker, and it took what it was told."""
        if self._tracker is None:
            return False
        try:
            call(self._tracker)
        except Exception as error:  # a full disk, a server that is gone: whatever it is, the search is worth more
            self._tracker, name = None, self._run.settings.tracking.name
            log.warning("tracking=%s failed (%s); the search goes on without it", name, _line(error))
            return False
        return True

    def _show(self, files: bool) -> None:
        """Bring the study's note and files for optuna-dashboard up to date."""
        if not self._shown:
            return
        try:
            save_note(self._search.study, self._note())
            if files and (folder := self._run.folder) is not None:
                keep_files(self._search.study, folder.artifacts, self._files("*.png", "*.html"))
        except Exception as error:  # as above
            self._shown = False
            log.warning("the study's page for optuna-dashboard is not up to date: %s", _line(error))

    def _files(self, *patterns: str) -> list[Path]:
        """Files that the run folder holds, by name."""
        found = {file for pattern in patterns for file in self._run.path.glob(pattern)}
        return sorted(file for file in found if file.name not in (MEASURED_NAME, FINGERPRINT_NAME))

    def _facts(self, run: str | None, told: int) -> RunFacts:
        settings, results = self._run.settings, self._run.results
        folder = settings.tracking.dir
        placed = {f"{phase}.placement": results["world"][phase]["placement"] for phase in ("capture", "evaluate")}
        told_too = {"ranks": results["world"]["size"], "dtype": results["dtype"], "os": results["machine"]["os"]}
        versions = {f"version.{name}": version for name, version in results["versions"].items()}
        return RunFacts(
            model=model_title(self._run.job),
            folder=self._run.path / "tracking" if folder is None else path_of(folder, "tracking.dir"),
            parameters={**parameters(settings), **placed, **told_too, **versions},
            command=results["command"],
            run=run,
            told=told,
        )

    def _note(self) -> str:
        """The study's note, in Markdown."""
        run, results = self._run, self._run.results
        scorer, prompts = run.scorer, results["prompts"]["target_eval"]
        lines = [
            f"**{_code(model_title(run.job))}**, searched by heretic_ds {__version__}",
            f"Values are raw: {_code(scorer)} on {prompts} target prompts (the original model: "
            f"{results['baseline']['refusals']:g}) and the KL divergence from the original model in nats. The sampler "
            "minimises the attribute `minimised` instead: the share of the original's, and a KL divergence that "
            f"counts from {run.settings.search.kl_target:g} up.",
        ]
        verified = results["verified"]
        if verified is not None and results["selected"] is not None:
            lines.append(
                f"Trial {results['selected']} was chosen; {how_edited(run)} it has {verified['refusals']:g} "
                f"{_code(scorer)} at a KL divergence of {verified['kl']:.3g}."
            )
        return "\n\n".join([*lines, f"    {results['command']}"])


def _tell_of(record: TrialRecord, tracker: Tracker) -> None:
    tracker.trial(record)


def _code(text: str) -> str:
    """Any text as code in Markdown."""
    return f"`{' '.join(text.replace('`', '').split())}`"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
