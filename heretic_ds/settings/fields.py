"""What fields of settings are made with."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any


def within(default: Any, **limits: Any) -> Any:
    """A field that takes one of its ``choices``, or numbers within ``ge``, ``gt``, ``le`` and ``lt``; null is free.

    ``words`` are what a message says that a number has to be, where the bounds alone do not say it well.
    """
    return field(default=default, metadata=limits)


FINITE = {"gt": -math.inf, "lt": math.inf, "words": "a finite number"}
