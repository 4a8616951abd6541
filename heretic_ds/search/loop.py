"""The search loop: ask, evaluate, tell, until the study is complete or the user stops it."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from heretic_ds.search.objective import Objective
from heretic_ds.search.screened.screening import Screening
from heretic_ds.search.study import Search
from heretic_ds.search.trials import Ask, TrialRecord, TrialScores
from heretic_ds.world import World

log = logging.getLogger(__name__)


@contextmanager
def first_interrupt_stops() -> Iterator[threading.Event]:
    """While the context lasts the first Ctrl-C only makes a request to stop; the second interrupts as usual."""
    request = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if request.is_set():
            signal.signal(signal.SIGINT, previous)
            raise KeyboardInterrupt
        request.set()
        log.warning("stopping after the pass in flight; Ctrl-C again ends everything")

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, previous)


def run_search(
    world: World, search: Search | None, objective: Objective, on_trials: Callable[[list[TrialRecord]], None]
) -> bool:
    """Evaluate passes until the study is complete; False where the user stopped it before.

    The rank that decides holds ``search``; all ranks evaluate, and all call ``on_trials`` with the finished trials of
    each pass. A trial's seconds are its share of its pass, and of the screening before it.
    """
    with first_interrupt_stops() as stop:
        while True:
            started = time.perf_counter()
            if objective.screening is not None:
                _screen(world, search, objective.screening, stop)
            if not (asks := world.decide(lambda: [] if stop.is_set() or search is None else search.ask())):
                break
            scores = objective.score([ask.edit for ask in asks])
            seconds = (time.perf_counter() - started) / len(asks)
            on_trials(world.decide(lambda: _tell(search, asks, scores, seconds)))  # noqa: B023 - called at once
    return world.decide(lambda: search is not None and search.remaining == 0)


def _screen(world: World, search: Search | None, screening: Screening, stop: threading.Event) -> None:
    """Screen what the next pass of trials is chosen from; a user's request to stop is heard in between."""

    def tell(asks: list[Ask], scores: list[TrialScores], seconds: float) -> None:
        if search is not None:
            search.tell_screened(asks, scores, seconds)

    while asks := world.decide(lambda: [] if stop.is_set() or search is None else search.to_screen()):
        started = time.perf_counter()
        scores = screening.of([ask.edit for ask in asks])
        seconds = (time.perf_counter() - started) / len(asks)
        world.decide(lambda: tell(asks, scores, seconds))  # noqa: B023 - called at once


def _tell(search: Search | None, asks: list[Ask], scores: list[TrialScores], seconds: float) -> list[TrialRecord]:
    if search is None:
        raise RuntimeError("the rank that decides holds the study")
    told = zip(asks, scores, strict=True)
    return [search.tell(ask, trial_scores, seconds) for ask, trial_scores in told if not search.knows(ask)]
