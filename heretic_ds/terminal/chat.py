"""Talks to a model: answers appear token by token, the conversation is remembered, commands begin with a slash."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import path_of
from heretic_ds.prompts.batching import context_of
from heretic_ds.prompts.chat import ChatFormat
from heretic_ds.terminal.answering import stream_answer
from heretic_ds.terminal.conversation import Conversation
from heretic_ds.terminal.faces import Answering, Face
from heretic_ds.terminal.text import Write, valid

COMMANDS = {
    "/help": "list the commands",
    "/clear": "forget the conversation",
    "/system": "TEXT: set the system prompt; none takes it away, without TEXT it is shown",
    "/retry": "another answer to the last question, drawn at random",
    "/original": "put the last question to the original model too, and show both answers",
    "/save": "PATH: write the conversation to a new .md or .json file",
    "/exit": "leave, as Ctrl-D does",
}
"""What can be typed instead of a message."""

_COMMAND = re.compile(r"(/[A-Za-z]+)(?:\s+(.*))?", re.DOTALL)
_NO_SYSTEM = "none"


@dataclass(frozen=True)
class Edited:
    """The edit that the model wears while it is talked to. One set of weights serves it and the original."""

    name: str
    """What it is called: ``trial 17``."""
    apply: Callable[[], object]
    """Edits the weights; nothing is done where they are edited already."""
    restore: Callable[[], object]
    """Brings the original weights back, bit for bit."""


def chat(
    model: PreTrainedModel,
    chat_format: ChatFormat,
    *,
    max_new_tokens: int,
    face: Face,
    name: str = "model",
    edited: Edited | None = None,
) -> None:
    """Answer the messages that `face` reads until it raises EOFError or KeyboardInterrupt, or reads ``/exit``.

    Where the conversation outgrows the model's context its oldest turns are forgotten, and this is said.
    Ctrl-C during an answer stops the answer, which is remembered as far as it came; at the prompt it leaves. `edited`
    is the edit that the model is talked to with (None: the original is talked to), and `name` the model's.
    """
    talk = _Chat(model, chat_format, max_new_tokens, face, name, edited)
    how = "as it is, the original" if edited is None else f"with the edit of {edited.name}"
    face.say(f"You talk to {name}, {how}. Ctrl-C stops an answer, /help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = valid(face.read())
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if not talk.take(line):
                return
        except UserError as error:
            face.say(str(error))
        except KeyboardInterrupt:  # not during an answer, which ends by itself
            face.say("stopped")


class _Chat:
    def __init__(
        self,
        model: PreTrainedModel,
        chat_format: ChatFormat,
        max_new_tokens: int,
        face: Face,
        name: str,
        edited: Edited | None,
    ) -> None:
        self.model, self.face, self.name, self.edited = model, face, name, edited
        self.conversation = Conversation(chat_format)
        self.max_new_tokens, self.length = max_new_tokens, context_of(model.config)
        # At least a quarter of the context is left for the answer, however long answers may be.
        self.room = None if self.length is None else self.length - min(max_new_tokens, self.length // 4)

    def take(self, line: str) -> bool:
        """Do what was typed; returns whether the chat goes on. Raises UserError for what the user can mend."""
        name, rest = as_command(line)
        if name is None:
            if message := line.strip():
                self.answer(message)
            return True
        if name == "/exit":
            return False
        {
            "/help": self.help,
            "/clear": self.clear,
            "/system": lambda: self.system(rest),
            "/retry": self.retry,
            "/original": self.original,
            "/save": lambda: self.save(rest),
        }[name]()
        return True

    def answer(self, question: str, seed: int | None = None) -> None:
        """Answer a question, and remember both."""
        if self.edited is not None:
            self.edited.apply()  # for a change of weights may have been interrupted
        ids, dropped = self.conversation.fit(question, self.room)
        if dropped:
            self.face.say(f"the conversation outgrew the model's context: its {dropped} oldest turns are forgotten")
        self.conversation.add(question, self.face.answer(self.answering(ids, seed)), seed)

    def answering(self, ids: Sequence[int], seed: int | None) -> Answering:
        """What answers `ids` within the model's context."""
        limit = self.max_new_tokens if self.length is None else min(self.max_new_tokens, self.length - len(ids))
        tokenizer = self.conversation.format.tokenizer

        def give(write: Write) -> tuple[str, bool]:
            return stream_answer(self.model, tokenizer, ids, limit, write, seed)

        return give

    def help(self) -> None:
        self.face.list(COMMANDS)
        self.face.say("A message that begins with such a word is sent as it is after a space.")

    def clear(self) -> None:
        self.conversation = Conversation(self.conversation.format)
        self.face.say("the conversation is forgotten")

    def system(self, text: str) -> None:
        """Set the system prompt of the conversation, which goes on, or show it."""
        if text:
            given = None if text.lower() == _NO_SYSTEM else text
            self.conversation.format = self.conversation.format.with_system(given)
        now = self.conversation.format.system
        self.face.say(f"the system prompt is: {now}" if now else "there is no system prompt")

    def retry(self) -> None:
        """Another answer to the last question in the place of the one there is."""
        self.need_a_turn()
        last = self.conversation.turns.pop()
        try:
            self.answer(last.question, (last.seed or 0) + 1)
        except BaseException:
            self.conversation.turns.append(last)
            raise

    def original(self) -> None:
        """The original model's answer to the last question beside the edited one's, drawn alike."""
        if self.edited is None:
            raise UserError("this is the original model already; export.trial=N on the command line chooses an edit")
        self.need_a_turn()
        last, earlier = self.conversation.turns[-1], self.conversation.before_last()
        ids, _ = earlier.fit(last.question, self.room)
        try:
            self.edited.restore()
            answer = last.answer.removeprefix(self.conversation.format.response_prefix)
            self.face.compare(self.answering(ids, last.seed), answer, ("original", self.edited.name))
        finally:
            self.edited.apply()

    def save(self, path: str) -> None:
        if not path:
            raise UserError("give a file to write to: /save chat.md, or /save chat.json")
        self.need_a_turn()
        file = path_of(path, "/save")
        self.conversation.save(file, self.name if self.edited is None else f"{self.name}, {self.edited.name}")
        self.face.say(f"the conversation is in {file}")

    def need_a_turn(self) -> None:
        """Raise UserError where nothing was asked yet."""
        if not self.conversation.turns:
            raise UserError("nothing was asked yet")


def as_command(line: str) -> tuple[str | None, str]:
    """The command in a line and what follows it; None for a message.

    A message may begin with a slash where no command of one word could be meant: a path, a comment, several lines.
    Raises UserError for a command that does not exist.
    """
    match = _COMMAND.fullmatch(line.rstrip())
    if match is None:
        return None, ""
    name, rest = match[1].lower(), (match[2] or "").strip()
    if name in COMMANDS:
        return name, rest
    if "\n" in line.strip():
        return None, ""
    raise UserError(f"{match[1]} is no command; there are {', '.join(COMMANDS)}. A space before it sends it as it is")
