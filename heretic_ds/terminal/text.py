"""Text of models, prompts and files on its way to a terminal."""

from __future__ import annotations

from collections.abc import Callable

from heretic_ds.foreign import text as foreign

Write = Callable[[str], None]
"""Takes the next piece of a text."""


def printable(text: str) -> str:
    """`text` as a terminal may show it, as by :func:`heretic_ds.foreign.text.printable`; line ends of Windows become
    line feeds. Works on a text piece by piece."""
    return foreign.printable(text.replace("\r", ""))


def valid(text: str) -> str:
    """`text` as it was typed, where bytes that are no UTF-8 arrive as lone surrogates: these become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
