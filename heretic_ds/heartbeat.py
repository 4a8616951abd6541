"""Waiting for long work of other ranks: for as long as they live, which their heartbeats tell.

A collective fails where one rank comes to it later than its timeout, or hangs where another has died. Work that some
ranks do while the others have nothing to do, such as downloading a model, may take hours. So it is waited for outside
of any collective, in the store through which ranks found each other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch.distributed as dist

from heretic_ds.errors import RankFailed

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
SILENT_SECONDS = 300.0
"""A rank that has been silent for so long is taken for dead. Hearts are threads, and stand still while one call holds
Python's lock, or while the machine swaps: minutes are no proof of death, but there is no hurry. Launchers notice a dead
process at once, and so does everyone where it is rank 0, which keeps the store."""
LATE_SECONDS = 1800.0
"""So much later than another a rank may come to the work, as to a collective."""
TELL_SECONDS = 30.0
_LONGEST_PAUSE = 0.5


class Heartbeats:
    """What one rank does and sees of long work; every rank enters the same pieces of work, in the same order."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store, self._rank = store, rank
        self._works = 0

    @contextmanager
    def together(self, what: str, workers: Sequence[int]) -> Iterator[None]:
        """Inside, this rank does its part of ``what``, if it is one of the ``workers``; then it waits for all of them.

        Raises RankFailed where one of them is not heard of any more. A worker that leaves by an error counts as done:
        the ranks tell each other of it afterwards.
        """
        self._works += 1
        if self._rank in workers:
            through, key = threading.Event(), self._key("beats", self._rank)
            with self._reaching(what):
                self._store.add(key, 1)
            threading.Thread(target=self._beat, args=(key, through), name="heartbeat", daemon=True).start()
            try:
                yield
            finally:
                through.set()
                with self._reaching(what):
                    self._store.set(self._key("done", self._rank), "")
        else:
            yield
        with self._reaching(what):
            for worker in workers:
                self._wait_for(worker, what)

    def _key(self, kind: str, rank: int) -> str:
        return f"{kind} {self._works} {rank}"

    def _beat(self, key: str, through: threading.Event) -> None:
        with suppress(RuntimeError):  # the store is gone, as this rank's main thread will notice
            while not through.wait(BEAT_SECONDS):
                self._store.add(key, 1)

    def _wait_for(self, worker: int, what: str) -> None:
        started = heard = told = time.monotonic()
        beats, pause = 0, 0.001
        while not self._store.check([self._key("done", worker)]):
            now, count = time.monotonic(), self._store.add(self._key("beats", worker), 0)
            if count != beats:
                beats, heard = count, now
            elif now - heard > (SILENT_SECONDS if beats else LATE_SECONDS):
                raise RankFailed(
                    f"rank {worker} has not been heard of for {now - heard:.0f} s while it was {what}: "
                    "it has died, or hangs"
                )
            if now - told > TELL_SECONDS:
                told = now
                log.info("waiting for rank %d, which is %s (for %.0f s so far)", worker, what, now - started)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    @contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        """Say what it means where the store is gone."""
        try:
            yield
        except RuntimeError as error:
            raise RankFailed(f"rank 0 ended while ranks were {what}") from error
