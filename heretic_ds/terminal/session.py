"""Where questions are typed at a terminal: a line that can be edited, with a history, completion, and paste."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

log = logging.getLogger(__name__)


def history_file() -> Path:
    """Where questions are kept: ``heretic-ds/chat_history`` in the user's folder for state.

    Raises RuntimeError where nobody knows of a home.
    """
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "heretic-ds" / "chat_history"


def open_history() -> History:
    """The questions of earlier chats, in a file that its owner alone can read; where there can be none, of this chat
    alone, which is said."""
    try:
        file = history_file()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.fchmod(handle, 0o600)  # one that was there may have been made otherwise
        os.close(handle)
        return FileHistory(file)
    except (OSError, RuntimeError) as error:
        log.warning("questions are remembered for this chat alone: %s", error)
        return InMemoryHistory()


class CommandCompleter(Completer):
    """Completes the name of a command, and of ``/save`` the path."""

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands, self._paths = commands, PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        typed = document.text_before_cursor
        if typed.startswith("/save "):
            path = typed.removeprefix("/save ").lstrip()
            yield from self._paths.get_completions(Document(path), complete_event)
        elif typed.startswith("/"):
            fitting = (command for command in self._commands if command.startswith(typed))
            yield from (Completion(command, -len(typed)) for command in fitting)


def chat_session(
    commands: Sequence[str], history: History, input: Input | None = None, output: Output | None = None
) -> PromptSession[str]:
    """What reads messages. Enter sends; what is pasted arrives as one message however many lines it has, and Alt-Enter
    begins a line. `input` and `output` stand for the terminal in tests."""
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        history=history,
        completer=CommandCompleter(commands),
        complete_while_typing=False,
        key_bindings=keys,
        enable_suspend=True,
        input=input,
        output=output,
    )
