"""Chat at a terminal: typing with history, paste and completion; answers as Markdown, side by side, and harmless."""

from __future__ import annotations

import io
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pyte
import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from heretic_ds.terminal.faces import PlainFace, TerminalFace, show_both
from heretic_ds.terminal.markdown import MarkdownStream, as_markdown, finished_blocks
from heretic_ds.terminal.session import CommandCompleter, chat_session, history_file, open_history
from heretic_ds.terminal.text import printable, valid

UP, ALT_ENTER = "\x1b[A", "\x1b\r"
COMMANDS = ["/help", "/save", "/system"]


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe:
        yield pipe


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's folder for state."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


class Screen:
    """A terminal: what rich writes to it, as somebody in front of it sees it."""

    def __init__(self, width: int = 60, height: int = 12) -> None:
        self._file = io.StringIO()
        self._screen = pyte.HistoryScreen(width, height, history=1000, ratio=1)
        self._stream = pyte.Stream(self._screen)
        self._fed = 0
        self.console = Console(file=self._file, force_terminal=True, width=width, height=height, color_system=None)

    @property
    def raw(self) -> str:
        return self._file.getvalue()

    @property
    def lines(self) -> list[str]:
        """What has scrolled away, and what is on the screen."""
        written, self._fed = self.raw[self._fed :], len(self.raw)
        self._stream.feed(written.replace("\n", "\r\n"))
        gone = ["".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top]
        return [line.rstrip() for line in [*gone, *self._screen.display]]

    @property
    def text(self) -> str:
        return "\n".join(self.lines).rstrip()


# Typing


def ask(keys: PipeInput, typed: str, history: object = None) -> str:
    keys.send_text(typed)
    return chat_session(COMMANDS, history or InMemoryHistory(), keys, DummyOutput()).prompt("> ")


def test_arrow_up_brings_the_question_before_back(keys: PipeInput) -> None:
    keys.send_text("peas\r")
    session = chat_session(COMMANDS, InMemoryHistory(), keys, DummyOutput())
    assert session.prompt("> ") == "peas"
    keys.send_text(UP + " and beans\r")
    assert session.prompt("> ") == "peas and beans"


def test_pasted_lines_are_one_message(keys: PipeInput) -> None:
    assert ask(keys, "\x1b[200~peas\r\nand beans\x1b[201~ too\r") == "peas\nand beans too"
    assert ask(keys, f"peas{ALT_ENTER}and beans\r") == "peas\nand beans"


def test_commands_and_paths_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "orchard").mkdir()
    monkeypatch.chdir(tmp_path)
    completer = CommandCompleter(COMMANDS)

    def completed(typed: str) -> list[str]:
        found = completer.get_completions(Document(typed), CompleteEvent())
        return [typed[: len(typed) + each.start_position] + each.text for each in found]

    assert completed("/s") == ["/save", "/system"]
    assert completed("/save orch") == ["/save orchard"]
    assert completed("what is /h") == completed("/system /h") == []


def test_history_is_kept_for_its_owner_alone(keys: PipeInput, state: Path) -> None:
    os.umask(os.umask(0))
    ask(keys, "peas\r", open_history())
    assert history_file() == state / "heretic-ds" / "chat_history"
    assert stat.S_IMODE(history_file().stat().st_mode) == 0o600
    history_file().chmod(0o644)
    assert ask(keys, UP + "\r", open_history()) == "peas"
    assert stat.S_IMODE(history_file().stat().st_mode) == 0o600
    assert stat.S_IMODE(history_file().parent.stat().st_mode) == 0o700


def test_a_chat_without_a_place_for_history_says_so(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    state.write_text("a file in the place of the folder")
    with caplog.at_level(logging.WARNING, "heretic_ds"):
        assert isinstance(open_history(), InMemoryHistory)
    assert "remembered for this chat alone" in caplog.text


# Text


def test_control_characters_are_seen_and_not_obeyed() -> None:
    assert printable("a\x1b[2Jb\r\n\tc\x07\x9b1m\x7f\u202e") == "a␛[2Jb\n\tc␇\ufffd1m␡\ufffd"
    assert printable("Crème 花 🌱 \u200d") == "Crème 花 🌱 \u200d"
    assert valid("cr\udcc3\udca8me \udcff") == "crème \ufffd"


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "`\x1b]0;title\x07`", "&#27;[2J &#x9b;2J &#x202e;", "```\n\x1bc\n```"])
def test_answers_cannot_drive_the_terminal(text: str) -> None:
    screen = Screen()
    with MarkdownStream(screen.console) as stream:
        stream.write(text)
    plain: list[str] = []
    face = PlainFace(write=plain.append)
    assert face.answer(lambda write: (write(text) or text, False)) == text
    face.compare(lambda write: (write(text) or text, False), text, (text, text))
    face.say(text)
    face.list({text: text})
    screen.console.file.write("".join(plain))
    TerminalFace(screen.console, None).list({text: text})
    show_both(screen.console, (text, "b"), (text, text))
    TerminalFace(screen.console, None).say(text)
    body = screen.raw
    for allowed in ("\x1b[?25l", "\x1b[?25h", "\x1b[2K", "\x1b[1A"):  # of rich, which draws the answer anew
        body = body.replace(allowed, "")
    harmful = {chr(code) for code in [*range(0x20), *range(0x7F, 0xA0), 0x202E]} - {"\n", "\r"}
    assert not set(body) & harmful, repr(body)


def test_markup_is_text() -> None:
    screen = Screen()
    TerminalFace(screen.console, None).say("[red]peas[/red] [/]")
    show_both(screen.console, ("[b]a", "b"), ("[red]peas[/x]", "c"))
    assert "[red]peas[/red] [/]" in screen.text and "[b]a" in screen.text and "[red]peas[/x]" in screen.text


# Markdown


ANSWER = """# Peas

Sow them in **spring**,
in rows.

1. Dig.
2. Sow.

| what | when |
|---|---|
| peas | May |

```python
sow("peas")
```

<think>not hidden</think> [a link](http://example.org/x)
"""


def test_an_answer_is_shown_as_markdown_as_it_was_written() -> None:
    screen = Screen(height=40)
    screen.console.print(as_markdown(ANSWER))
    text = screen.text
    assert "**" not in text and "```" not in text and "|---|" not in text
    assert "Sow them in spring,\nin rows." in text, "lines ended elsewhere"
    assert "<think>not hidden</think>" in text and "http://example.org/x" in text
    assert 'sow("peas")' in text


def test_blocks_are_finished_once_another_one_begins() -> None:
    assert finished_blocks("peas\nand beans") == ("", "peas\nand beans")
    assert finished_blocks("peas\n\nbea") == ("", "peas\n\nbea")  # the line may become anything yet
    assert finished_blocks("peas\n\nbeans\n") == ("peas\n", "beans\n")
    assert finished_blocks("```\na\n\nb\n") == ("", "```\na\n\nb\n")
    assert finished_blocks("1. a\n\n   b\n2. c\n\nd\n") == ("1. a\n\n   b\n2. c\n", "d\n")


@pytest.mark.parametrize("height", [12, 200])
def test_a_growing_answer_ends_as_the_whole_one(height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it comes, each line is there once in the end, also where the answer is higher than the screen."""
    monkeypatch.setattr("heretic_ds.terminal.markdown._SECONDS_BETWEEN_DRAWINGS", -1.0)
    long = ANSWER + "\n" + "\n".join(f"- item {number}" for number in range(30)) + "\n\nThe end."
    whole, growing = Screen(height=height), Screen(height=height)
    whole.console.print(as_markdown(long))
    with MarkdownStream(growing.console) as stream:
        for start in range(0, len(long), 7):
            stream.write(long[start : start + 7])
            assert len([line for line in growing.lines if "Sow them" in line]) <= 1
        assert "The end" in growing.text, "an answer is seen before it is complete"
    squeezed = [[line for line in screen.lines if line] for screen in (whole, growing)]
    assert squeezed[0] == squeezed[1]


def test_what_is_finished_is_not_drawn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the rest is not drawn anew at once, since it was a moment ago."""
    screen = Screen()
    with MarkdownStream(screen.console) as stream:
        stream.write("peas\n")
        assert screen.text == "peas"
        monkeypatch.setattr("heretic_ds.terminal.markdown._SECONDS_BETWEEN_DRAWINGS", 1e9)
        stream.write("\nbeans\n")
        assert screen.text == "peas\n\nbeans"


def test_nothing_stays_of_an_answer_that_is_not_kept() -> None:
    screen = Screen()
    with MarkdownStream(screen.console, keep=False) as stream:
        stream.write("peas\n\nbeans\n\nseeds")
        assert "peas" in screen.text
    assert screen.text == ""


def test_two_answers_beside_or_below_each_other() -> None:
    wide, narrow = Screen(width=100), Screen(width=60)
    for screen in (wide, narrow):
        show_both(screen.console, ("original", "trial 3"), ("I can't.", "Sow them in May."))
    heading, answers = wide.lines[:2]
    assert heading.startswith("original") and heading.index("trial 3") == answers.index("Sow") == 50
    assert narrow.text.index("original") < narrow.text.index("I can't.") < narrow.text.index("trial 3")
    assert all(len(line) <= 60 for line in narrow.lines)


def test_a_comparison_shows_both_and_says_that_it_was_stopped() -> None:
    screen = Screen(width=100)
    face = TerminalFace(screen.console, None)

    def answering(write) -> tuple[str, bool]:
        write("I ca")
        return "I ca", True

    face.compare(answering, "Sow them.", ("original", "trial 3"))
    assert screen.text.count("I ca") == 1 and "Sow them." in screen.text and "stopped" in screen.text
