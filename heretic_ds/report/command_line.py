"""The command line as it was typed, for the records of a run: quoted for a shell, and without secrets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

PROGRAM, HIDDEN = "heretic-ds", "***"

_SECRET_KEY = re.compile(r"(^|[._-])(token|password|passwd|secret|credentials?|api_?key)$", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s'\"]+@")
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf|api_org|gh[a-z]|github_pat|glpat|sk|xox[a-z]|wandb_v1)[_-][A-Za-z0-9_-]{16,}"
)
"""What services begin their tokens with: the Hugging Face hub, GitHub, GitLab, OpenAI, Slack, Weights & Biases."""

_given: list[str] = []


def note(words: Sequence[str]) -> None:
    """Keep the words of the command that begins, those after the program's name."""
    _given[:] = words


def typed() -> str:
    """The command that began last, as a shell would take it; only the program's name where none was noted."""
    return shlex.join([PROGRAM, *map(without_secrets, _given)])


def without_secrets(word: str) -> str:
    """A word of a command line with what is secret in it hidden: the values of keys that are called so, a user and
    password in an address, and tokens that are known by their beginnings."""
    key, equals, value = word.partition("=")
    if equals and value and _SECRET_KEY.search(key.lstrip("+")):
        return f"{key}={HIDDEN}"
    return hide_secrets(word)


def hide_secrets(text: str) -> str:
    """Text, such as a configuration, in which a user and password in an address, and tokens that are known by their
    beginnings, are hidden."""
    return _TOKEN.sub(HIDDEN, _CREDENTIALS.sub(f"{HIDDEN}@", text))
