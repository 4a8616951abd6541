"""Finds the text that a model starts every answer with, so that the first token after it matters."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from heretic_ds.prompts.chat import ChatFormat
from heretic_ds.settings import ThinkingMarker

# Closing a chain of thought uncovers what answers start with, which is looked for once more.
_MOST_ROUNDS = 2
_WORD = r"[\w'’-]"
_BROKEN = "\ufffd"
"""In the place of a character of which only the first bytes are there."""

_TOKENS_AFTER_PARTING = 4
"""Tokens that answers go on for once they differ."""


class Parting:
    """Which answers need go no further, for the sake of what all of them begin with: told while they are generated."""

    def __init__(self, text_of: Callable[[Sequence[int]], str]) -> None:
        """``text_of`` gives the text of an answer, or of its beginning."""
        self._text_of = text_of
        self._alike: list[int] = []
        """The tokens that all answers seen so far begin with, as far as these go."""
        self._parted = False
        """Whether they have been seen to end."""

    def __call__(self, answers: Sequence[Sequence[int]]) -> list[bool]:
        """Take what some answers begin with, and say of each whether it goes on beyond what all begin with.

        A little beyond: tokens that differ may begin with the same characters, and those are still common.
        """
        self.see(answers)
        enough = len(self._alike) + _TOKENS_AFTER_PARTING
        return [self._parted and len(answer) > enough for answer in answers]

    def see(self, answers: Sequence[Sequence[int]]) -> None:
        """Take answers, or what some begin with, as token ids. Blank ones tell nothing: they have no prefix."""
        for answer in answers:
            if not self._text_of(answer).strip():
                continue
            shorter, longer = sorted((self._alike, list(answer)), key=len)
            at = next((at for at, token in enumerate(shorter) if token != longer[at]), None)
            if at is not None:
                self._alike, self._parted = shorter[:at], True
            elif not self._parted:
                self._alike = longer


def start_apart(answers: Sequence[str]) -> bool:
    """Whether answers have no prefix in common, whatever others say: two of them begin with different characters."""
    first = {answer[0] for answer in answers if answer.strip()}
    return len(first) > 1 and _BROKEN not in first  # which may become any character as an answer goes on


def detect_response_prefix(chat: ChatFormat, answer: Callable[[ChatFormat], Sequence[str]]) -> str:
    """The response prefix of a model; ``answer`` returns its answers to prompts put in a given format.

    The answers are wanted as text with their special tokens (``decode_answers(..., keep_special=True)``). A
    chain-of-thought block that the generation prompt opens is closed before anything is asked; one that the
    answers open is closed, and the model is asked again for what it then starts with.
    """
    prefix = chat.closing_prefix()
    for _ in range(_MOST_ROUNDS):
        found = find_response_prefix(answer(chat.with_prefix(prefix)), chat.thinking)
        prefix += found
        if not any(found.endswith(marker.closed) for marker in chat.thinking):
            break
    return prefix


def find_response_prefix(answers: Sequence[str], thinking: Sequence[ThinkingMarker]) -> str:
    """The text that all answers start with; an opened chain-of-thought block is replaced by the closed one.

    Blank answers are passed over. The common text is taken back to where a tokenizer would also end a token:
    to the end of a word that is common as a whole, and to the front of spaces, which belong to the word that
    follows. Where nothing would be left to say in one of the answers, there is no prefix: it would be the
    answer.
    """
    spoken = [answer for answer in answers if answer.strip()]
    common = os.path.commonprefix(spoken)  # noqa: RUF071 (these are no paths: character by character is right)
    opened = [(common.find(marker.open), marker) for marker in thinking if marker.open in common]
    if opened:
        start, marker = min(opened, key=lambda item: item[0])
        end = marker.closed.removeprefix(marker.open).strip()
        if not end or end not in common[start:]:
            return common[:start] + marker.closed
    prefix = _whole_tokens(common, spoken)
    return prefix if all(answer[len(prefix) :].strip() for answer in spoken) else ""


def _whole_tokens(common: str, answers: Sequence[str]) -> str:
    """The common text without a word, or a run of line breaks, that goes on in one of the answers."""
    following = [answer[len(common) : len(common) + 1] for answer in answers]
    prefix = common.rstrip(_BROKEN)
    if any(re.match(_WORD, character) for character in following):
        prefix = re.sub(_WORD + r"+\Z", "", prefix)
    if any(character.isspace() for character in following):
        prefix = prefix.rstrip()
    return prefix.rstrip(" \t")
