"""Text that others wrote, on its way to a terminal or a log."""

from __future__ import annotations

_SEEN = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "\u2421"}
_SEEN |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")
_SEEN |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
_SEEN |= {ord("\n"): "\n", ord("\t"): "\t"}


def printable(text: str) -> str:
    """Text as a terminal may show it: control characters become signs that can be seen, such as ␛.

    Line breaks and tabs stay. What turns the order of writing around (U+202A to U+202E, U+2066 to U+2069), with which
    text does not read as it is, and halves of surrogate pairs, which no file takes, become U+FFFD.
    """
    return text if text.isascii() and text.isprintable() else text.translate(_SEEN)


def in_one_line(text: str, limit: int = 300) -> str:
    """:func:`printable` text as one line, cut where it is longer than ``limit`` characters."""
    line = " ".join(printable(text[: 4 * limit]).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
