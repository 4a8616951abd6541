"""Text of models, prompts and files on its way to a terminal."""

from __future__ import annotations

from collections.abc import Callable

Write = Callable[[str], None]
"""Takes the next piece of a text."""

_SEEN = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "\u2421"}
_SEEN |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")
_SEEN |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}


def printable(text: str) -> str:
    """`text` as a terminal may show it: control characters become signs that can be seen, such as ␛.

    Line breaks and tabs stay. What turns the order of writing around (U+202A to U+202E, U+2066 to U+2069) is a control
    character too, for text would not be read as it is. Works on a text piece by piece.
    """
    return text.translate(_SEEN)


def valid(text: str) -> str:
    """`text` as it was typed, where bytes that are no UTF-8 arrive as lone surrogates: these become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
