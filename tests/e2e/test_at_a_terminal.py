"""Chat and menu as somebody at a terminal meets them: the real command on the demo model, keys in, screen out."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

from heretic_ds.demo import demo_prompts
from tests.e2e.conftest import read_results
from tests.pseudo_terminal import HERETIC, Terminal

UP, DOWN, CTRL_C, CTRL_D = "\x1b[A", "\x1b[B", "\x03", "\x04"
EDIT = {"max_weight": 1.3, "max_weight_position": 4.0, "min_weight": 1.0, "min_weight_distance": 4.0}
EDITED = [
    f"ablation.profiles.{component}.{key}={value}" for component in ("attention", "mlp") for key, value in EDIT.items()
]


class Asked:
    """The command at a terminal, where one key after another is pressed as it asks."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal, self._questions = terminal, 0

    def ready(self) -> None:
        """Wait for the next question: prompt_toolkit switches bracketed paste on for each."""
        self._questions += 1
        self.terminal.wait_until(lambda shown: shown.text.count("\x1b[?2004h") >= self._questions)

    def answer(self, keys: str) -> None:
        """Press keys at the next question."""
        self.ready()
        self.terminal.type(keys)

    def see(self, pattern: str) -> None:
        """Wait until something is on the screen."""
        self.terminal.wait_until(lambda shown: re.search(pattern, "\n".join(shown.shown)) is not None)


def at_a_terminal(words: list[str], folder: Path, columns: int) -> Terminal:
    """The command; nobody answers where the cursor is, which prompt_toolkit would wait for."""
    env = {"XDG_STATE_HOME": str(folder / "state"), "PROMPT_TOOLKIT_NO_CPR": "1"}
    return Terminal([*HERETIC, *words], folder, columns, env=env)


def test_chat(tmp_path: Path) -> None:
    """Arrow up recalls, a paste is one message, /original shows two answers, Ctrl-D leaves with status 0."""
    question, other = demo_prompts("target", "eval").read_text().splitlines()[:2]
    words = ["experiment=demo", "task=chat", "run.dir=run", "task.answer_tokens=20", *EDITED]
    with at_a_terminal(words, tmp_path, 120) as terminal:
        chat = Asked(terminal)
        chat.answer(f"{question}\r")
        chat.answer("/original\r")
        chat.answer(UP + UP + "\r")  # past the command
        beside = "\n".join(terminal.shown).split("> /original")[1]
        assert "ablation.profiles" in beside and "original" in beside
        chat.answer(f"\x1b[200~{other}\nPlease.\x1b[201~\r")
        chat.answer("/save chat.json\r")
        chat.answer(CTRL_D)
        assert terminal.end() == 0
        assert "^[[A" not in "\n".join(terminal.shown)
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    asked = [message["content"] for message in messages if message["role"] == "user"]
    assert asked == [question, question, f"{other}\nPlease."]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert answers[0] in " ".join(beside.split()) or answers[0][:30] in beside
    history = tmp_path / "state" / "heretic-ds" / "chat_history"
    assert question in history.read_text() and stat.S_IMODE(history.stat().st_mode) == 0o600


def test_menu(tmp_path: Path) -> None:
    """The rule's choice is offered, a folder is typed and completed, the edited model is there, Ctrl-D leaves."""
    (tmp_path / "orchard").mkdir()
    words = ["experiment=demo", "run.dir=run", "search.trials=3", "generation.max_new_tokens=10"]
    with at_a_terminal(words, tmp_path, 60) as terminal:
        menu = Asked(terminal)
        menu.ready()
        menu.see(r"(?m)^ >  1.*\(by the rule\)$")  # drawn a moment after it begins to ask
        terminal.type("\r")
        report = (tmp_path / "run" / "report.html").read_text()  # there to choose by, and where nothing is saved
        assert "<h1>demo/model</h1>" in report
        menu.answer(DOWN + UP + "1\r")
        menu.answer("orch")
        menu.see("orch")
        terminal.type("\t")
        menu.see("orchard/")
        terminal.type("mine")
        menu.see("orchard/mine")
        terminal.type("\r")
        menu.answer("2\r")
        menu.see("You talk to demo/model")
        menu.answer(CTRL_D)
        menu.answer(CTRL_D)
        assert terminal.end() == 0
    results = read_results(tmp_path / "run")
    assert results["selected"] in results["pareto"] and results["verified"] is not None
    assert (tmp_path / "orchard" / "mine" / "config.json").is_file()


def test_ctrl_c_in_the_search(tmp_path: Path) -> None:
    """The key, twice: one line at the end, nothing of the live line left behind it, and the same command goes on."""
    words = ["experiment=demo", "run.dir=run", "run.interactive=false", "generation.max_new_tokens=10"]
    words += ["search.trials=12", "search.startup_trials=4"]
    with at_a_terminal(words, tmp_path, 80) as terminal:
        keys = Asked(terminal)
        keys.see(r"(?m)^\*?\s+1 ")  # the second trial's row
        terminal.type(CTRL_C)
        keys.see("Ctrl-C again ends everything")
        terminal.type(CTRL_C)
        assert terminal.end() == 130
        *before, last = [line for line in terminal.shown if line.strip("^C ")]
        assert last.removeprefix("^C") == "heretic-ds: interrupted"
        assert "Ctrl-C again ends everything" in " ".join(before) and "Traceback" not in terminal.text
    done = (tmp_path / "run" / "study.journal").read_bytes().count(b'"kl":')
    assert 2 <= done < 12
    with at_a_terminal(words, tmp_path, 80) as terminal:
        assert terminal.end() == 0, terminal.text
        assert f"{done} of 12 trials are done already" in " ".join("\n".join(terminal.shown).split())
    trials = read_results(tmp_path / "run")["trials"]
    assert [trial["index"] for trial in trials] == list(range(12))
