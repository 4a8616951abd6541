"""A conversation: its turns, the token ids that put them to a model, and the file it is saved to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from heretic_ds.errors import UserError
from heretic_ds.prompts.chat import ChatFormat, message
from heretic_ds.terminal.text import printable


@dataclass(frozen=True)
class Turn:
    """One question with its answer."""

    question: str
    answer: str
    """Response prefix included: it is part of what the model has said."""
    seed: int | None = None
    """What the answer was drawn with; None for the likeliest one, token by token."""


class Conversation:
    """The turns so far, and the token ids that put them to the model.

    The first turn is the chat format's own, with its system prompt; later ones follow its shape.
    """

    def __init__(self, chat_format: ChatFormat) -> None:
        self.format = chat_format
        self.turns: list[Turn] = []
        """Oldest first."""

    def token_ids(self, question: str) -> list[int]:
        """All turns and `question` as token ids, ending where the answer starts, response prefix included."""
        questions = [turn.question for turn in self.turns] + [question]
        messages = self.format.messages(questions[0])
        in_parts = not isinstance(messages[-1]["content"], str)
        for turn, following in zip(self.turns, questions[1:], strict=True):
            messages += [message("assistant", turn.answer, in_parts), message("user", following, in_parts)]
        text = self.format._apply_template(messages) + self.format.response_prefix
        ids: list[int] = self.format.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def add(self, question: str, answer: str, seed: int | None = None) -> None:
        """Remember a turn; `answer` is what followed the response prefix."""
        self.turns.append(Turn(question, self.format.response_prefix + answer, seed))

    def fit(self, question: str, room: int | None) -> tuple[list[int], int]:
        """Token ids within `room` (None: any number) and how many of the oldest turns were dropped for that.

        Raises UserError where `question` alone is too long; then nothing is dropped.
        """
        kept = list(self.turns)
        while True:
            ids = self.token_ids(question)
            if room is None or len(ids) <= room:
                return ids, len(kept) - len(self.turns)
            if not self.turns:
                self.turns = kept
                raise UserError(
                    f"this message is {len(ids)} tokens long, but the model's context leaves room for "
                    f"{room}; shorten it."
                )
            del self.turns[0]

    def before_last(self) -> Conversation:
        """The conversation as it was when the last question was asked."""
        earlier = Conversation(self.format)
        earlier.turns = self.turns[:-1]
        return earlier

    def save(self, file: Path, speaker: str) -> None:
        """Write the conversation with `speaker` as Markdown (``.md``) or JSON (``.json``), by the file's suffix.

        Raises UserError for another suffix, and where the file is there already or cannot be written.
        """
        writers = {".md": self._as_markdown, ".json": self._as_json}
        if (write := writers.get(file.suffix.lower())) is None:
            raise UserError(f"{file} does not say in what form to save; end its name with .md or .json")
        try:
            with file.open("x", encoding="utf-8") as opened:
                opened.write(write(speaker))
        except FileExistsError:
            raise UserError(f"{file} exists and is left as it is; give another name, or remove it") from None
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error.strerror}); give another name") from error

    def _as_markdown(self, speaker: str) -> str:
        parts = [f"# A conversation with {speaker}"]
        if self.format.system is not None:
            parts += ["## System prompt", self.format.system]
        for turn in self.turns:
            parts += ["## Question", turn.question, "## Answer", turn.answer.strip()]
        return printable("\n\n".join(parts)) + "\n"

    def _as_json(self, speaker: str) -> str:
        system = [] if self.format.system is None else [message("system", self.format.system, False)]
        turns = [
            message(role, text, False)
            for turn in self.turns
            for role, text in (("user", turn.question), ("assistant", turn.answer))
        ]
        return json.dumps({"model": speaker, "messages": system + turns}, indent=1, ensure_ascii=False) + "\n"
