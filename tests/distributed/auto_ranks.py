"""What tests of ``auto`` run on every rank: a run is opened, and says how the model lies."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rich.console import Console

from heretic_ds.cli import compose
from heretic_ds.errors import UserError
from heretic_ds.stages.opening import opened
from heretic_ds.world import World


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def open_run(world: World, model: str, words: list[str]) -> dict[str, Any]:
    """Open a run, with the model laid out for both phases; placements, what the folder remembers, and what was said.

    A mistake that ends it is returned as ``error``.
    """
    heard, logger = _Heard(), logging.getLogger("heretic_ds")
    logger.addHandler(heard)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with opened(compose([model, *words]), world, Console(quiet=True)) as run:
            run.lay_out("capture")
            run.lay_out("evaluate")
            run.save()
            placed = {phase: run.results["world"][phase] for phase in ("capture", "evaluate")}
            return {"placed": placed, "kept": run.measured.get("placements"), "said": heard.lines}
    except UserError as error:
        return {"error": str(error), "said": heard.lines}
    finally:
        logger.removeHandler(heard)
        logger.setLevel(level)


def prompt_words(folder: Path) -> list[str]:
    """Overrides for a run in this folder, on a few prompts that lie in it."""
    (folder / "prompts.txt").write_text("a\nplum\n")
    names = [f"prompts.{kind}.{part}" for kind in ("target", "baseline") for part in ("train", "eval")]
    values = (f"source={folder}/prompts.txt", "slice=null", "split=train")
    return [*(f"{name}.{value}" for name in names for value in values), "model.device=cpu", f"run.dir={folder}/run"]
