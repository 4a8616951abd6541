"""The menu's questions at a terminal: keys go in through a pipe that prompt_toolkit takes for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from questionary import Question

from heretic_ds.terminal import asking
from heretic_ds.terminal.asking import Keys, Lines

pytestmark = pytest.mark.timeout(30)  # a key that is not taken is waited for

UP, DOWN, CTRL_C, CTRL_D = "\x1b[A", "\x1b[B", "\x03", "\x04"
FRUIT = ["apples", "pears", "plums"]
MANY = [f"fruit {number}" for number in range(1, 41)]


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe:
        yield pipe


@pytest.fixture
def asker(keys: PipeInput) -> Keys:
    return Keys(keys, DummyOutput())


@pytest.mark.parametrize(
    ("typed", "position"),
    [
        ("\r", 1), (DOWN + "\r", 2), (UP + "\r", 0), (UP * 2 + "\r", 2), ("1\r", 0), ("3\r", 2), ("31\r", 0),
        ("9\r", 1), ("0\r", 1), ("x3j\r", 2), ("\x1b[5~3\r", 2),
    ],
)  # fmt: skip
def test_a_choice_by_arrows_and_numbers(asker: Keys, keys: PipeInput, typed: str, position: int) -> None:
    """What is no number of a choice does nothing, and Enter alone takes the default."""
    keys.send_text(typed)
    assert asker.pick("which", FRUIT, 1) == position


@pytest.mark.parametrize(("typed", "number"), [("12", 12), ("40", 40), ("41", 1), ("405", 5), ("2" + DOWN + "1", 1)])
def test_numbers_of_two_digits(asker: Keys, keys: PipeInput, typed: str, number: int) -> None:
    """A digit goes on with the number before it where that makes one; after an arrow key it begins another."""
    keys.send_text(typed + "\r")
    assert asker.pick("which", MANY, 6) == number - 1


def test_whole_numbers(asker: Keys, keys: PipeInput) -> None:
    keys.send_text("\r")
    assert asker.number("how many", 20) == 20
    keys.send_text("0\r")
    assert asker.number("how many", 20) == 0
    keys.send_text("-1\r\x7f\x7f7\r")  # refused, taken back, and mended
    assert asker.number("how many", 20) == 7


def test_a_folder(asker: Keys, keys: PipeInput) -> None:
    keys.send_text("orchard/apples\r")
    assert asker.folder("folder", "elsewhere") == "orchard/apples"
    keys.send_text("\r")
    assert asker.folder("folder", "elsewhere") == "elsewhere"


def test_a_line_of_text(asker: Keys, keys: PipeInput) -> None:
    keys.send_text("me/mine \r")
    assert asker.text("repository", "tiny") == "me/mine"
    keys.send_text("\r")
    assert asker.text("repository", "tiny") == "tiny"


def test_folders_are_completed_and_files_are_not(
    asker: Keys, keys: PipeInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "orchard" / "apples").mkdir(parents=True)
    (tmp_path / "organ.txt").touch()
    monkeypatch.chdir(tmp_path)
    asked: list[Question] = []
    monkeypatch.setattr(Question, "unsafe_ask", lambda question: asked.append(question) or "")
    asker.folder("folder", "elsewhere")
    completer = asked[0].application.current_buffer.completer
    found = [completer.get_completions(Document(typed), CompleteEvent()) for typed in ("or", "orchard/")]
    assert [[completion.text for completion in each] for each in found] == [["chard/"], ["apples/"]]


@pytest.mark.parametrize(("key", "error"), [(CTRL_C, KeyboardInterrupt), (CTRL_D, EOFError)])
@pytest.mark.parametrize(
    "ask",
    [
        lambda asker: asker.pick("which", FRUIT, 0),
        lambda asker: asker.number("how many", 1),
        lambda asker: asker.folder("folder", "x"),
    ],
    ids=["pick", "number", "folder"],
)
def test_leaving(
    asker: Keys, keys: PipeInput, ask: Callable[[Keys], object], key: str, error: type[BaseException]
) -> None:
    keys.send_text(key)
    with pytest.raises(error):
        ask(asker)


def test_keys_need_a_terminal_on_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    class End:
        def __init__(self, terminal: bool) -> None:
            self.isatty = lambda: terminal

    for stdin, stdout, term, expected in [
        (True, True, "xterm", Keys), (False, True, "xterm", Lines), (True, False, "xterm", Lines),
        (True, True, "dumb", Lines),
    ]:  # fmt: skip
        monkeypatch.setattr(asking.sys, "stdin", End(stdin))
        monkeypatch.setattr(asking.sys, "stdout", End(stdout))
        monkeypatch.setenv("TERM", term)
        assert type(asking.asker_at(Console())) is expected
