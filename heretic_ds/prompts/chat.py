"""Puts a prompt to a chat model: its chat template, and the text that every answer is made to start with."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from heretic_ds.errors import UserError
from heretic_ds.foreign import limits
from heretic_ds.foreign.limits import TooMuch, in_child
from heretic_ds.foreign.reading import MEBIBYTE, path_of, read_text, reason
from heretic_ds.settings import AUTO, PromptSettings, ThinkingMarker

log = logging.getLogger(__name__)

_PROBE = "Which vegetables grow in the shade?"
_TEMPLATE_LIMIT = MEBIBYTE
_AT_ONCE = 1000
"""Conversations that one process renders: to copy this one takes as long as many of them."""
_CHARACTERS = 2**24
"""Of conversations that one process renders, whose answer has room for some ten times as many."""
_IN_TIME = 250
"""Conversations for which it has the time that a process is given."""
_ROOM = 100_000
"""Characters that a template may add to a conversation, or ten times the conversation's own where that is more."""


class TemplateFailed(UserError):
    """A chat template gave no text for a conversation."""


class ChatFormat:
    """Renders prompts as token ids for one tokenizer.

    The chat template is tried out once, here: where it refuses or drops the system role, the system prompt is
    put before the user's message instead, which is said once; where it only takes messages made of parts, as
    those of vision-language models do, the prompt is given as a text part.

    ``response_prefix`` is text that follows the generation prompt; None takes ``settings.response_prefix``,
    where ``auto`` stands for none as long as it has not been found
    (:func:`heretic_ds.prompts.detect_response_prefix`).

    Raises UserError where there is no chat template, or none that renders a prompt.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: PromptSettings, response_prefix: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.thinking: Sequence[ThinkingMarker] = settings.thinking
        if not all(marker.open.strip() for marker in self.thinking):
            raise UserError("prompts.thinking has a marker without `open`; give the text that opens the block")
        given = "" if settings.response_prefix == AUTO else settings.response_prefix
        self.response_prefix = given if response_prefix is None else response_prefix
        self._rendered: dict[str, str] = {}
        """By conversation: a template that is a program gives the same text each time, and runs once for each."""
        self._tokens: dict[str, list[int]] = {}
        """By text: every stage asks for those of the same prompts."""
        self._folds_systems: bool | None = None
        """Whether system turns of others' conversations are folded; None: not yet tried out."""
        self._template = None if settings.template is None else _read_template(settings.template)
        if self._template is None and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "the model has no chat template; set prompts.template to a Jinja chat template or to a file "
                "that holds one"
            )
        self._use_system(settings.system)

    def with_system(self, system: str | None) -> ChatFormat:
        """The same format with another system prompt (None: none). Raises UserError where it cannot be rendered."""
        other = copy.copy(self)
        other._use_system(system)
        return other

    def with_prefix(self, response_prefix: str) -> ChatFormat:
        """The same format with another response prefix."""
        other = copy.copy(self)
        other.response_prefix = response_prefix
        return other

    def messages(self, prompt: str) -> list[dict[str, Any]]:
        """The conversation that the template is given: the system prompt, if any, and the user's turn."""
        return self._messages(prompt, self._system_folded, self._in_parts)

    def render(self, prompt: str) -> str:
        """The prompt as text, ending where the answer starts; the response prefix is included.

        Raises UserError where the template cannot render this prompt.
        """
        return self._apply_template(self.messages(prompt)) + self.response_prefix

    def render_conversation(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """A whole conversation, turns with ``role`` and ``content``, as text, without ``prompts.system`` and without a
        response prefix. It ends where an answer starts, or in the middle of its last turn, which is to be continued.

        A system turn is put before the user's first message where the template takes none. Raises UserError where the
        template cannot render it.
        """
        turns = [(each["role"], each["content"]) for each in messages]
        if turns[0][0] == "system" and self._must_fold(turns[0][1]):
            system = turns.pop(0)[1]
            first = next((place for place, (role, _) in enumerate(turns) if role == "user"), None)
            if first is None:
                turns.insert(0, ("user", system))
            else:
                turns[first] = ("user", f"{system}\n\n{turns[first][1]}")
        return self._apply_to_all([[message(*turn, self._in_parts) for turn in turns]], add_generation_prompt)[0]

    def _must_fold(self, system: str) -> bool:
        if self._folds_systems is None and system.strip():
            self._folds_systems = self.with_system(system)._system_folded
        return bool(self._folds_systems)

    def prepare(self, prompts: Sequence[str]) -> None:
        """Render prompts together, which takes hardly longer than one. Raises UserError as :meth:`render` does."""
        self._apply_to_all([self.messages(prompt) for prompt in prompts])

    def encode(self, prompt: str) -> list[int]:
        """Token ids of :meth:`render`.

        Template and response prefix are tokenised as one text, as the model saw such turns in training:
        tokens may span the border between them. Special tokens come from the template alone, so that there is
        one beginning-of-text token and not two.
        """
        text = self.render(prompt)
        if text not in self._tokens:
            self._tokens[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(self._tokens[text])

    @property
    def added_characters(self) -> int:
        """How much longer a prompt is as the model is given it, without a response prefix."""
        return len(self._apply_template(self.messages(_PROBE))) - len(_PROBE)

    def closing_prefix(self) -> str:
        """Text that closes a chain-of-thought block that the generation prompt opens; empty for none."""
        rendered = self._apply_template(self.messages(_PROBE))
        for marker in self.thinking:
            rest = marker.closed.removeprefix(marker.open)
            for given in range(len(rest) - 1, -1, -1):
                if rendered.endswith(marker.open + rest[:given]):
                    return rest[given:]
            if rendered.rstrip().endswith(marker.open.rstrip()):
                return rest
        return ""

    def _messages(self, prompt: str, system_folded: bool, in_parts: bool) -> list[dict[str, Any]]:
        turns = [("user", prompt)]
        if self.system is not None and system_folded:
            turns = [("user", f"{self.system}\n\n{prompt}")]
        elif self.system is not None:
            turns = [("system", self.system), ("user", prompt)]
        return [message(role, text, in_parts) for role, text in turns]

    def _use_system(self, system: str | None) -> None:
        self.system = system if system and system.strip() else None
        self._system_folded, self._in_parts = self._try_out()
        if self._system_folded:
            log.warning("the chat template takes no system prompt: it is put before the user's message instead")

    def _apply_template(self, messages: list[dict[str, Any]]) -> str:
        return self._apply_to_all([messages])[0]

    def _apply_to_all(self, conversations: Sequence[list[dict[str, Any]]], answering: bool = True) -> list[str]:
        """Each conversation as text. Templates come with models and are programs: they run in a process that is ended
        where they take too much. Raises TemplateFailed."""
        keys = [json.dumps(messages if answering else [messages, "continued"]) for messages in conversations]
        by_key = dict(zip(keys, conversations, strict=True))
        new = [key for key in by_key if key not in self._rendered]
        for part in _parts(new):
            try:
                seconds = limits.SECONDS * math.ceil(len(part) / _IN_TIME)
                texts = in_child(partial(self._render_all, [by_key[key] for key in part], answering), seconds)
            except Exception as error:  # whatever a program raises
                raise TemplateFailed(_unusable(reason(error))) from error
            self._rendered.update(zip(part, texts, strict=True))
        return [self._rendered[key] for key in keys]

    def _render_all(self, conversations: Sequence[list[dict[str, Any]]], answering: bool) -> list[str]:
        return [self._render(messages, answering) for messages in conversations]

    def _render(self, messages: list[dict[str, Any]], answering: bool) -> str:
        text = str(
            self.tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                add_generation_prompt=answering,
                continue_final_message=not answering,
                tokenize=False,
            )
        )
        given = sum(len(str(message["content"])) for message in messages)
        if len(text) > max(_ROOM, 10 * given):
            raise ValueError(f"it makes {len(text)} characters of a conversation of {given}")
        return text

    def _try_out(self) -> tuple[bool, bool]:
        """The first form of a conversation (system folded, content in parts) that is rendered whole."""
        wanted = [_PROBE] if self.system is None else [_PROBE, self.system.strip()]
        problem: TemplateFailed | None = None
        for in_parts in (False, True):
            for folded in (False, True) if self.system is not None else (False,):
                messages = self._messages(_PROBE, folded, in_parts)
                try:
                    rendered = self._apply_template(messages)
                except TemplateFailed as error:
                    if isinstance(error.__cause__, TooMuch):
                        raise
                    problem = problem or error
                    continue
                printed = in_parts and str(messages[-1]["content"]) in rendered
                if all(text in rendered for text in wanted) and not printed:
                    return folded, in_parts
        raise problem or UserError(_unusable("it leaves out the user's message"))


def message(role: str, text: str, in_parts: bool) -> dict[str, Any]:
    """One turn of a conversation, as a text or as a list of parts with one text in it."""
    return {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}


def decode_answers(
    tokenizer: PreTrainedTokenizerBase, answers: Sequence[Sequence[int]], keep_special: bool = False
) -> list[str]:
    """Answers as text. The text of an answer's first tokens is the beginning of the whole answer's text.

    That is why tokenizers' cleaning of spaces, which rewrites text at later tokens, is switched off. A
    character of which only the first bytes are there appears as U+FFFD at the end. ``keep_special`` keeps
    special tokens, some of which mark chains of thought.
    """
    options = {"skip_special_tokens": not keep_special, "clean_up_tokenization_spaces": False}
    return [str(tokenizer.decode(list(answer), **options)) for answer in answers]


def _read_template(given: str) -> str:
    """A template from ``prompts.template``: every Jinja template has a brace, no sensible path has one."""
    if "{" in given:
        return given
    path = path_of(given, "prompts.template")
    if not path.is_file():
        raise UserError(f"prompts.template is {given!r}, which is neither a Jinja template nor a file that can be read")
    return read_text(path, _TEMPLATE_LIMIT, "set prompts.template to a file that holds a Jinja template")


def _unusable(why: str) -> str:
    return f"the chat template cannot render a prompt ({why}); set prompts.template to one that can"


def _parts(keys: Sequence[str]) -> Iterator[list[str]]:
    """Conversations that are rendered together: neither too many nor too long."""
    part: list[str] = []
    size = 0
    for key in keys:
        if part and (len(part) == _AT_ONCE or size + len(key) > _CHARACTERS):
            yield part
            part, size = [], 0
        part.append(key)
        size += len(key)
    if part:
        yield part
