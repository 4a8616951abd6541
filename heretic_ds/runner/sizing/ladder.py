"""Which batch sizes are worth trying, one after another, and which of those that were tried is best."""

from __future__ import annotations

_STEP = 4
"""How many times as many rows are tried after a size that was a gain."""
_GAIN = 1.02
"""By how much a larger batch has to be faster to be worth its memory."""
_WORTH_TRYING = 1.25
"""How many times as many rows a size has to have, to be tried after one that was a gain."""
_TELLING = 16
"""Rows from which on two sizes tell what a larger one can gain at most."""
_REFINED = 2
"""Sizes that are tried between the best and one that was no gain."""


class Ladder:
    """Sizes up to ``most``: four times as many rows as long as that is a gain, then some between.

    A size that is no gain is tried once more: something else may have disturbed it. The first size is ``first``; where
    memory does not hold it, or more rows than that are no gain, fewer are tried.
    """

    def __init__(self, most: int, first: int = 1) -> None:
        self.most = most
        """The largest size that is tried; it may be set lower at any time."""
        self.best = 0
        """The size with the highest rate so far; 0 before memory has held any."""
        self._rate = 0.0
        """Of the best."""
        self._last: tuple[float, float] | None = None
        """Amount and seconds of the last size that was a gain."""
        self._doubted: int | None = None
        """A size that was no gain when it was tried for the first time."""
        self._above: int | None = None
        """The least size above the best that was no gain."""
        self._below = first
        """The largest size below those that were tried; 0 where fewer rows are known to be no gain."""
        self._refined = 0
        self._clear = False

    @property
    def next(self) -> int | None:
        """The size to try next; None where it is clear which one is best."""
        if self._doubted is not None:
            return self._doubted
        if not self.best:
            return min(self._below, self.most) or None
        ended = self._clear or self.best >= self.most or (self.best > 1 and self.most < _WORTH_TRYING * self.best)
        if self._above is None and not ended:
            return min(_STEP * self.best, self.most)
        if self._below or ended or self._above is None:
            return self._below or None
        between = min(2 * self.best, (self.best + self._above) // 2)
        return between if self._refined < _REFINED and self.best < between <= self.most else None

    def note(self, size: int, amount: float, seconds: float) -> None:
        """Take how long a size took for an amount of work; infinitely long where memory did not hold it."""
        again, self._doubted = size == self._doubted, None
        gain, fewer = amount / seconds > _GAIN * self._rate, size < self.best
        if not (gain or fewer or again) and amount / seconds:
            self._doubted = size
            return
        if self._above is not None and self.best and not fewer:
            self._refined += 1
        if gain:
            self._clear = self._above is None and self._gains_little(size, amount, seconds)
            self._above = self.best if fewer else self._above
            self._below = 0 if self.best and not fewer else size // _STEP
            self.best, self._rate, self._last = size, amount / seconds, (amount, seconds)
        elif fewer:
            self._below = 0
        else:
            self._above, self._below = size, self._below if self.best else size // _STEP

    def _gains_little(self, size: int, amount: float, seconds: float) -> bool:
        """Whether no larger size can be worth it, if more rows go on to cost as much each as they did from the size
        before to this one."""
        if size < _TELLING or self._last is None or amount <= self._last[0]:
            return False
        each = (seconds - self._last[1]) / (amount - self._last[0])
        return each > 0 and seconds < _GAIN * each * amount
