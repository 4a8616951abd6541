"""What the tests of scorers run on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from heretic_ds.ablation import Edit
from heretic_ds.errors import RankFailed
from heretic_ds.prompts import PromptSet
from heretic_ds.scoring import Scorer, make_scorers
from heretic_ds.search.objective import How, Objective
from heretic_ds.settings import ScoringSettings
from heretic_ds.world import World
from tests import families
from tests.distributed.engines import EDIT, ablation_for, build, job_for, prompts


class Counting(Scorer):
    """Counts letters, and how often it is asked."""

    name, combine = "counting", "sum"

    def __init__(self, fails: bool = False) -> None:
        self.asked, self._fails = 0, fails

    def each(self, prompts: Sequence[str], answers: Sequence[str]) -> list[int]:
        self.asked += 1
        if self._fails and self.asked > 1:
            raise ValueError("no such letter")
        return [sum(map(str.isalpha, answer)) for answer in answers]


def scored(world: World, folder: str, judge: str, placement: str, degree: int | None = None) -> dict[str, Any]:
    """Scores of the original and of two edits, and what this rank had to do for them."""
    rows, counting = prompts(), Counting()
    texts = [f"prompt {place}" for place in range(len(rows))]
    node = {"_target_": "classifier", "model": judge, "device": "cpu", "count": False}
    scorers = make_scorers(ScoringSettings([node, {"_target_": "kl_tokens", "tokens": 3}, "perplexity"], ["a"]))
    options = {} if degree is None else {"degree": degree}
    with contextlib.closing(build(job_for(world, folder), placement, **options)) as engine:
        engine.prepare(ablation_for(engine, "full"))
        asked = PromptSet(texts, rows)
        tokenizer = families.tokenizer()

        def text_of(answers: Sequence[Sequence[int]]) -> list[str]:
            return [tokenizer.decode(list(answer)) for answer in answers]

        objective = Objective(engine, asked, asked, [counting, *scorers], text_of, how=How(values=True), world=world)
        found = [objective.original, *objective.score([EDIT, Edit(None, EDIT.profiles)])]
        values = [each.values["perplexity"].each for each in found]
    judged: Any = scorers[0]
    return {
        "scores": [dict(each.scores) for each in found], "values": values, "asked": counting.asked,
        "loaded": judged._judge is not None,
    }  # fmt: skip


def broken(world: World, folder: str) -> str:
    """What each rank is told of where a scorer fails in the search."""
    rows = prompts()
    asked = PromptSet([str(place) for place in range(len(rows))], rows)
    with contextlib.closing(build(job_for(world, folder), "replicated")) as engine:
        engine.prepare(ablation_for(engine, "full"))
        objective = Objective(engine, asked, asked, [Counting(fails=True)], lambda rows: ["a"] * len(rows), world=world)
        try:
            objective.score([EDIT])
        except (ValueError, RankFailed) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[-1]}"
    return "nothing"
