"""Chat and menu as somebody at a terminal meets them: the real command on the demo model, keys in, screen out."""

from __future__ import annotations

import json
import stat
from pathlib import Path

from heretic_ds.demo import demo_prompts
from tests.e2e.conftest import read_results
from tests.e2e.pseudo_terminal import Terminal

UP, CTRL_D, DOWN = "\x1b[A", "\x04", "\x1b[B"
EDIT = {"max_weight": 1.3, "max_weight_position": 4.0, "min_weight": 1.0, "min_weight_distance": 4.0}
EDITED = [
    f"ablation.profiles.{component}.{key}={value}" for component in ("attention", "mlp") for key, value in EDIT.items()
]


def test_chat(tmp_path: Path) -> None:
    """Arrow up recalls, a paste is one message, /original shows two answers, Ctrl-D leaves with status 0."""
    question, other = demo_prompts("target", "eval").read_text().splitlines()[:2]
    words = ["experiment=demo", "task=chat", "run.dir=run", "task.answer_tokens=20", *EDITED]
    with Terminal(words, tmp_path, XDG_STATE_HOME=str(tmp_path / "state")) as terminal:
        terminal.asked(1)
        terminal.send(f"{question}\r")
        terminal.asked(2)
        terminal.send("/original\r")
        terminal.asked(3)
        beside = terminal.text.split("> /original")[1]
        assert "ablation.profiles" in beside and "original" in beside
        terminal.send(UP + UP + "\r")  # past the command
        terminal.asked(4)
        terminal.send(f"\x1b[200~{other}\nPlease.\x1b[201~\r")
        terminal.asked(5)
        terminal.send("/save chat.json\r")
        terminal.asked(6)
        terminal.send(CTRL_D)
        assert terminal.end() == 0
        assert "^[[A" not in terminal.text
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    asked = [message["content"] for message in messages if message["role"] == "user"]
    assert asked == [question, question, f"{other}\nPlease."]
    history = tmp_path / "state" / "heretic-ds" / "chat_history"
    assert question in history.read_text() and stat.S_IMODE(history.stat().st_mode) == 0o600


def test_menu(tmp_path: Path) -> None:
    """The rule's choice is offered, a folder is typed and completed, the edited model is there, Ctrl-D leaves."""
    (tmp_path / "orchard").mkdir()
    words = ["experiment=demo", "run.dir=run", "search.trials=3", "generation.max_new_tokens=10"]
    with Terminal(words, tmp_path, columns=60, XDG_STATE_HOME=str(tmp_path / "state")) as terminal:
        terminal.asked(1)
        assert "(by the rule)" in terminal.text
        terminal.send("\r")
        terminal.asked(2)
        terminal.send(DOWN + UP + "1\r")
        terminal.asked(3)
        terminal.send("orch")
        terminal.wait_until(lambda terminal: "orch" in terminal.text)
        terminal.send("\t")
        terminal.wait_until(lambda terminal: "orchard/" in terminal.text)
        terminal.send("mine")
        terminal.wait_until(lambda terminal: "orchard/mine" in terminal.text)
        terminal.send("\r")
        terminal.asked(4)
        terminal.send("2\r")
        terminal.wait_until(lambda terminal: "You talk to" in terminal.text)
        terminal.asked(5)
        terminal.send(CTRL_D)
        terminal.asked(6)
        terminal.send(CTRL_D)
        assert terminal.end() == 0
    results = read_results(tmp_path / "run")
    assert results["selected"] in results["pareto"] and results["verified"] is not None
    assert (tmp_path / "orchard" / "mine" / "config.json").is_file()
