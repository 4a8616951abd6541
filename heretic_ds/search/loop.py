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
from heretic_ds.search.study import Search
from heretic_ds.search.trials import TrialRecord

log = logging.getLogger(__name__)


class StopRequest:
    """Whether the user has asked the search to end."""

    def __init__(self) -> None:
        self.made = False


@contextmanager
def first_interrupt_stops() -> Iterator[StopRequest]:
    """While the context lasts the first Ctrl-C only makes a request to stop; the second interrupts as usual."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if request.made:
            signal.signal(signal.SIGINT, previous)
            raise KeyboardInterrupt
        request.made = True
        log.warning("stopping after the pass in flight; Ctrl-C again ends everything")

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, previous)


def run_search(search: Search, objective: Objective, on_trial: Callable[[TrialRecord], None]) -> bool:
    """Evaluate passes until the study is complete; False where the user stopped it before.

    ``on_trial`` is called with each finished trial. A trial's seconds are its share of its pass.
    """
    with first_interrupt_stops() as stop:
        while (asks := search.ask()) and not stop.made:
            started = time.perf_counter()
            scores = objective.score([ask.edit for ask in asks])
            seconds = (time.perf_counter() - started) / len(asks)
            for ask, trial_scores in zip(asks, scores, strict=True):
                on_trial(search.tell(ask, trial_scores, seconds))
    return search.remaining == 0
