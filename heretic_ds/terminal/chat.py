"""Talks to a model in the terminal: answers appear token by token, and the conversation is remembered."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from heretic_ds.errors import UserError
from heretic_ds.prompts.chat import ChatFormat, message

HELP = "Ctrl-C stops an answer; /clear forgets the conversation; /exit or Ctrl-D leaves."
EXIT, CLEAR = "/exit", "/clear"


class Conversation:
    """The turns so far, and the token ids that put them to the model.

    The first turn is the chat format's own, with its system prompt; later ones follow its shape.
    """

    def __init__(self, chat_format: ChatFormat) -> None:
        self.format = chat_format
        self.turns: list[tuple[str, str]] = []
        """Questions with their answers, oldest first."""

    def token_ids(self, question: str) -> list[int]:
        """All turns and `question` as token ids, ending where the answer starts, response prefix included."""
        questions = [asked for asked, _ in self.turns] + [question]
        answers = [answer for _, answer in self.turns]
        messages = self.format.messages(questions[0])
        in_parts = not isinstance(messages[-1]["content"], str)
        for answer, following in zip(answers, questions[1:], strict=True):
            messages += [message("assistant", answer, in_parts), message("user", following, in_parts)]
        text = self.format._apply_template(messages) + self.format.response_prefix
        ids: list[int] = self.format.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def add(self, question: str, answer: str) -> None:
        """Remember a turn. The response prefix is part of what the model has said."""
        self.turns.append((question, self.format.response_prefix + answer))

    def fit(self, question: str, room: int | None) -> tuple[list[int], int]:
        """Token ids within `room` (None: any number) and how many of the oldest turns were dropped for that.

        Raises UserError where `question` alone is too long.
        """
        dropped = 0
        while True:
            ids = self.token_ids(question)
            if room is None or len(ids) <= room:
                return ids, dropped
            if not self.turns:
                raise UserError(
                    f"this message is {len(ids)} tokens long, but the model's context leaves room for "
                    f"{room}; shorten it."
                )
            del self.turns[0]
            dropped += 1


class AnswerStreamer(TextStreamer):
    """Passes an answer on as it grows, by whole words, and keeps all of it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.write(text)


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens a model can attend to, as its configuration says; None where it says nothing."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(length := getattr(config, name, None), int):
            return length
    return None


def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    max_new_tokens: int,
    write: Callable[[str], None],
) -> tuple[str, bool]:
    """The greedy answer to `ids`, passed to `write` as it comes, and whether Ctrl-C cut it short."""
    streamer = AnswerStreamer(tokenizer, write)
    inputs = torch.tensor([ids], device=model.device)
    generate: Any = model.generate  # which its class inherits where it can generate at all
    try:
        with torch.inference_mode():
            generate(
                inputs=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=streamer,
            )
    except KeyboardInterrupt:
        streamer.end()
        return streamer.text, True
    return streamer.text, False


def read_line(prompt: str) -> str:
    """A line from the terminal, asked for with `prompt`, or from a pipe, unasked. EOFError at its end."""
    return input(prompt if sys.stdin.isatty() else "")


write_text: Callable[[str], None] = partial(print, end="", flush=True)
"""Writes to standard output, at once."""


def chat(
    model: PreTrainedModel,
    chat_format: ChatFormat,
    *,
    max_new_tokens: int,
    read: Callable[[str], str] = read_line,
    write: Callable[[str], None] = write_text,
) -> None:
    """Answer the lines that `read` gives until it raises EOFError or gives `/exit`.

    Where the conversation outgrows the model's context its oldest turns are forgotten, and this is said.
    Ctrl-C during an answer stops the answer, which is remembered as far as it came; at the prompt it leaves.
    """
    conversation = Conversation(chat_format)
    length = context_length(model)
    write(HELP + "\n")
    while True:
        try:
            line = read("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if line == EXIT:
            return
        if line == CLEAR:
            conversation = Conversation(chat_format)
        elif line:
            _take_turn(model, conversation, line, length, max_new_tokens, write)


def _take_turn(
    model: PreTrainedModel,
    conversation: Conversation,
    line: str,
    length: int | None,
    max_new_tokens: int,
    write: Callable[[str], None],
) -> None:
    # At least a quarter of the context is left for the answer, however long answers may be.
    room = None if length is None else length - min(max_new_tokens, length // 4)
    try:
        ids, dropped = conversation.fit(line, room)
    except UserError as error:
        write(f"[{error}]\n")
        return
    if dropped:
        write(f"[the conversation outgrew the model's context: its {dropped} oldest turns are forgotten]\n")
    if length is not None:
        max_new_tokens = min(max_new_tokens, length - len(ids))
    answer, stopped = stream_answer(model, conversation.format.tokenizer, ids, max_new_tokens, write)
    write(" [stopped]\n" if stopped else "\n")
    conversation.add(line, answer)
