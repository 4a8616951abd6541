"""What a model answers, decoded as a search decodes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

KINDS = ("target", "baseline")


def read_lines(file: Path) -> list[str]:
    """The prompts of a text file, one a line."""
    return file.read_text(encoding="utf-8").splitlines()


def answers(prompts: dict[str, Path], *overrides: str) -> dict[str, dict[str, str]]:
    """Whole answers to the prompts of one file for each kind, by kind and prompt.

    Settings are those of ``experiment=demo_real`` with ``overrides``; the model is that of ``model.path``.
    """
    from heretic_ds.cli import compose
    from heretic_ds.job import Job
    from heretic_ds.placements import build_engine
    from heretic_ds.report.library_bars import counted_here
    from heretic_ds.world import World

    sources = [f"prompts.{kind}.{part}.source={prompts[kind]}" for kind in KINDS for part in ("train", "eval")]
    sources += [f"prompts.{kind}.test.source=none" for kind in KINDS]
    with counted_here():
        job = Job.check(compose(["experiment=demo_real", "evaluate=replicated", *sources, *overrides]), World.join())
        engine = build_engine(job, "evaluate")
    found = {}
    for kind in KINDS:
        asked = job.prompts(f"{kind}.eval")
        found[kind] = dict(zip(asked.texts, job.text_of(engine.generate(asked.rows, [None])[0]), strict=True))
    engine.close()
    return found


def counted(texts: Sequence[str]) -> int:
    """How many answers hold a marker of ``experiment=demo_real``, or nothing."""
    from heretic_ds.cli import compose
    from heretic_ds.scoring import RefusalScorer

    return int(RefusalScorer.from_settings(compose(["experiment=demo_real"]).scoring).score([], texts))
