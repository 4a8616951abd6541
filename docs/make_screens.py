"""Writes docs/screens/: what people see of a run at terminals of 60 and 120 columns, captured on the demo model.

    python docs/make_screens.py [NAME ...]

Each scene is a command in a pseudo-terminal, with keys that are pressed once something is on the screen, and what of
the screen is kept. To add a scene, add it to SCENES. Takes some minutes of a CPU.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout's own modules, whatever is installed

from tests.pseudo_terminal import HERETIC, Terminal  # noqa: E402

TARGET = ROOT / "docs" / "screens"
COLUMNS = (60, 120)
DEMO = ("experiment=demo",)
_SHORT = ("search.trials=8", "search.startup_trials=4")
_EDIT = {"max_weight": 1.3, "max_weight_position": 4.0, "min_weight": 1.0, "min_weight_distance": 4.0}
_EDITED = [f"ablation.profiles.{part}.{key}={value}" for part in ("attention", "mlp") for key, value in _EDIT.items()]
_LEAVE, _UP = "\x04", "\x1b[A"
_ASKED = r"\x1b\[\?2004h(?s:.*)>"
"""What prompt_toolkit writes where it begins to ask: it switches bracketed paste on."""


@dataclass(frozen=True)
class Scene:
    """One thing that people see."""

    words: Sequence[str]
    """Of the command line, after `heretic-ds`."""
    first: str = ""
    """Pattern of the first line that is kept; empty: from the top."""
    last: str = ""
    """Pattern of the first line behind it that is not kept; empty: to the end."""
    keys: Sequence[tuple[str, str]] = ()
    """What is pressed, each once a pattern is on the screen below what was there before. The last keys end the command:
    what is kept is the screen before them."""
    before: Sequence[str] = ()
    """Words of a command that is run first in the same folder."""


SCENES = {
    "help": Scene(["--help"]),
    "start": Scene([*DEMO, *_SHORT, "run.interactive=false"], last="the best so far"),
    "search": Scene([*DEMO, *_SHORT, "run.interactive=false"], first="the best so far", last="on edited weights"),
    "end": Scene([*DEMO, *_SHORT, "run.interactive=false"], first=r"trial \d+: "),
    "menu": Scene([*DEMO, *_SHORT], first="a run without a menu", keys=[("leave", _LEAVE)]),
    "chat": Scene(
        [*DEMO, "task=chat", "task.answer_tokens=30", *_EDITED],
        first="You talk to",
        keys=[
            (_ASKED, "Tell me how to make soup from peas.\r"),
            (_ASKED, "/original\r"),
            (_ASKED, _UP + _UP),
            ("soup", "\r"),
            (_ASKED, "/save soup.md\r"),
            (_ASKED, _LEAVE),
        ],
    ),
    "evaluate": Scene([*DEMO, "task=evaluate"]),
    "plan": Scene([*DEMO, "task=plan", "hardware=h100x8"]),
}


@cache
def screen(
    words: tuple[str, ...], before: tuple[str, ...], keys: tuple[tuple[str, str], ...], columns: int
) -> list[str]:
    """All lines of what is on the screen in the end; scenes may share it."""
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for command in filter(None, (before, words)):
            # A stranger's machine has measured nothing yet. Nobody answers where the cursor is, which prompt_toolkit
            # would wait for.
            env = {"OMP_NUM_THREADS": "1", "XDG_STATE_HOME": folder, "XDG_CACHE_HOME": folder}
            env |= {"PROMPT_TOOLKIT_NO_CPR": "1"}
            with Terminal([*HERETIC, *command], Path(folder), columns, env=env) as terminal:
                seen, shown = 0, None
                for pattern, pressed in keys if command is words else ():
                    terminal.wait_until(lambda shown: re.search(pattern, shown.text[seen:]) is not None)  # noqa: B023
                    seen, shown = len(terminal.text), terminal.shown
                    terminal.type(pressed)
                terminal.end()
                lines = [line.replace(folder, "~") for line in shown or terminal.shown]
    return lines


def captured(scene: Scene, columns: int) -> list[str]:
    """The lines that a scene keeps of a screen of so many columns."""
    lines = screen(tuple(scene.words), tuple(scene.before), tuple(scene.keys), columns)
    first = next((place for place, line in enumerate(lines) if re.search(scene.first, line)), 0)
    rest = range(first + 1, len(lines)) if scene.last else ()
    last = next((place for place in rest if re.search(scene.last, lines[place])), len(lines))
    return lines[first:last]


def main(names: Sequence[str]) -> None:
    """Capture the scenes of these names, or all of them."""
    TARGET.mkdir(exist_ok=True)
    for name in names or SCENES:
        for columns in COLUMNS:
            lines = captured(SCENES[name], columns)
            frame = "-" * columns
            (TARGET / f"{name}-{columns}.txt").write_text("\n".join([frame, *lines, frame]) + "\n", encoding="utf-8")
            print(f"{name}, {columns} columns: {len(lines)} lines", flush=True)


if __name__ == "__main__":
    os.chdir(ROOT)
    main(sys.argv[1:])
