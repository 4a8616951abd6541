"""The one door for files that others made: what is read is bounded, and what goes wrong is one sentence.

``tests/unit/test_foreign.py`` holds that the rest of the package opens no such file: readers of libraries are called
within :func:`reading`, everything else goes through the functions here.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from heretic_ds.errors import UserError
from heretic_ds.foreign.text import in_one_line
from heretic_ds.foreign.ulimits import limit_reached

AGAIN = "download or copy it again"
MEBIBYTE = 2**20
JSON_LIMIT = 256 * MEBIBYTE
"""Bytes of the largest JSON file that is read: an index of a million tensors takes half of it."""
_DEEPEST = 100
"""Levels of JSON: what is read is walked and copied by functions that call themselves for each."""


@contextmanager
def reading(place: object, advice: str = AGAIN, found: str = "cannot be read") -> Iterator[None]:
    """While open, whatever a reader raises is a UserError with the place, what is wrong there, and what to do.

    ``found`` says what is wrong in general, the error says why.
    Readers of foreign formats raise what they like: errors of their own with no common base, IndexError and KeyError
    where a number points nowhere, RecursionError and MemoryError where nesting and sizes are made up, and those written
    in Rust a panic, which is no Exception.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if limit := limit_reached(error):
            raise UserError(f"{place} {found}: {limit}") from error
        raise UserError(f"{place} {found}: {reason(error)}; {advice}") from error


def reason(error: BaseException) -> str:
    """What an error of a reader means, in words."""
    if limit := limit_reached(error):
        return limit
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, at line {error.lineno}, column {error.colno}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem}, at line {error.problem_mark.line + 1}"
    if isinstance(error, ValueError) and "integer string conversion" in str(error):
        return "a number has thousands of digits"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = in_one_line(lines[0]) if lines else ""
    plain = isinstance(error, ValueError | TypeError | RuntimeError | ImportError) and told
    return told if plain else f"{type(error).__name__}: {told}" if told else type(error).__name__


def path_of(text: str, setting: str) -> Path:
    """A path that the user gave for a setting, with ``~`` and ``~name`` put in. Raises UserError where it is none."""
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no such user
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{setting}={in_one_line(text, 120)} is no path: {why}; give another one") from error
    return path


def read_bytes(file: Path, limit: int, advice: str = AGAIN) -> bytes:
    """The content of an ordinary file of at most ``limit`` bytes. Raises UserError."""
    with reading(file, advice):
        # Without waiting: a pipe nobody writes to would be waited for without end.
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{file} is no ordinary file; {advice}")
            content = stream.read(limit + 1) if found.st_size <= limit else b""
        if max(found.st_size, len(content)) > limit:
            raise UserError(f"{file} is larger than {limit / MEBIBYTE:g} MiB, the most that is read; {advice}")
        return content


def read_text(
    file: Path, limit: int = 64 * MEBIBYTE, advice: str = AGAIN, *, encoding: str = "utf-8", errors: str = "strict"
) -> str:
    """The text of a file, whose line ends become line feeds. Raises UserError."""
    with reading(file, advice):
        text = read_bytes(file, limit, advice).decode(encoding, errors)
        return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str | bytes, place: object, advice: str = AGAIN) -> Any:
    """:func:`loads`, whose errors are a UserError that names ``place``."""
    with reading(place, advice, "cannot be read as JSON"):
        return loads(text)


def loads(text: str | bytes) -> Any:
    """JSON that is nested at most a hundred levels deep. Raises ValueError or RecursionError."""
    content = json.loads(text)
    if _is_deep(content):
        raise RecursionError
    return content


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _members(outer) if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _members(outer: Any) -> Iterable[Any]:
    return outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ()


def read_json(file: Path, advice: str = AGAIN, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """A JSON object from a file; UserError where it is anything else."""
    content = parse_json(read_text(file, limit, advice, encoding="utf-8-sig"), file, advice)
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a JSON {type(content).__name__}, where an object is expected; {advice}")
    return content


def check_shape(value: Any, shape: Any, place: str, advice: str) -> None:
    """Raise UserError where a value read from JSON has another shape than it must have.

    A shape is a type or a tuple of types; ``[shape]`` for a list; ``{str: shape}`` for an object with any keys; an
    object with names for one whose keys, where they are there, have these shapes.
    """
    if isinstance(shape, list):
        _expect(value, list, place, advice)
        for index, inner in enumerate(value):
            check_shape(inner, shape[0], f"{place}[{index}]", advice)
    elif isinstance(shape, dict):
        _expect(value, dict, place, advice)
        for name, inner in value.items():
            if (known := shape.get(str, shape.get(name))) is not None:
                check_shape(inner, known, f"{place}.{name}", advice)
    else:
        _expect(value, shape, place, advice)


NUMBER, NOTHING = (int, float), type(None)


def _expect(value: Any, kind: Any, place: str, advice: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{place} is {in_one_line(json.dumps(value), 60)}, which does not belong there; {advice}")
