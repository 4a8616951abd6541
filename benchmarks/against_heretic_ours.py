"""This project as one of the tools of ``against_heretic.py``: a run's own stages, asked for one pass of trials."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from against_heretic_worker import serve
from search_profile import Parts


class Ours:
    """One model in a run of this project's."""

    def __init__(self) -> None:
        self.parts = Parts()
        self._stack = ExitStack()

    def open(self, told: dict[str, Any], row_norm: str, batch_size: int, threads: int) -> dict[str, Any]:
        """Import the package, check the inputs, load the model. A batch size of 0 is found by measuring."""
        import torch

        torch.set_num_threads(threads)
        if told["case"]["device"] == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        from heretic_ds.cli import compose
        from heretic_ds.report.console import console_of, messages_to
        from heretic_ds.stages.measure import find_response_prefix
        from heretic_ds.stages.opening import opened
        from heretic_ds.world import World

        case, world = told["case"], World.join()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        sources = [
            word
            for name, place in told["prompts"].items()
            for word in (f"prompts.{name}.source={place['file']}", f"prompts.{name}.slice=null")
        ]
        settings = compose(
            [
                told["model"], *sources, f"model.dtype={case['dtype']}", f"model.device={case['device']}",
                "prompts.response_prefix=''", f"ablation.row_norm={row_norm}", f"run.dir={folder}/run",
                f"generation.max_new_tokens={case['new_tokens']}", f"generation.batch_size={batch_size}",
                "run.interactive=false",
            ]
        )  # fmt: skip
        settings.scoring.markers, settings.prompts.system = list(told["markers"]), told["system"]
        console = self._stack.enter_context(messages_to(console_of(world)))
        self.run = self._stack.enter_context(opened(settings, world, console))
        find_response_prefix(self.run)
        return {"versions": {name: version(name) for name in ("heretic-ds", "torch", "transformers")}}

    def capture(self) -> None:
        """Directions of the layers, and what all edits share."""
        from heretic_ds.stages.measure import capture_directions

        capture_directions(self.run)

    def original(self) -> dict[str, Any]:
        """What the original model is scored, which every trial is compared with; and how many trials go together."""
        from heretic_ds.stages.measure import measure_original
        from heretic_ds.stages.search import trials_per_pass

        self.objectives = {}
        for early_stop in (False, True):
            self.run.settings.generation.early_stop = early_stop
            self.objectives[early_stop] = measure_original(self.run)
        engine = self.run.engine
        for owner, name, part in (
            (engine, "distributions", "kl"),
            (engine, "generate", "generation"),
            (engine._editor, "set_edit", "edit"),
        ):
            setattr(owner, name, self.parts.timed(part, getattr(owner, name)))
        return {
            "refusals": self.objectives[False].original.refusals,
            "prompts": [len(self.run.job.texts[f"{kind}.eval"]) for kind in ("target", "baseline")],
            "together": trials_per_pass(self.run),
            "batch_sizes": dict(engine.batch_sizes),
        }

    def score(self, edits: list[dict[str, Any]], early_stop: bool = False) -> dict[str, Any]:
        """Scores of edits, in passes of as many as a search on this device takes together."""
        from heretic_ds.ablation import Edit
        from heretic_ds.stages.search import trials_per_pass

        self.parts.clock.clear(), self.parts.processor.clear()
        given, scores = [Edit.from_dict(edit) for edit in edits], []
        most = trials_per_pass(self.run)
        with self.parts.part("rest"):
            for start in range(0, len(given), most):
                scores += self.objectives[early_stop].score(given[start : start + most])
        return {
            "scores": [{"refusals": score.refusals, "kl": score.kl} for score in scores],
            "parts": dict(self.parts.clock),
            "processor_parts": dict(self.parts.processor),
        }

    def answers(self) -> dict[str, Any]:
        """How many tokens the original model's answers to the evaluated target prompts have."""
        rows = self.run.job.prompts("target.eval").rows
        return {"tokens": [len(answer) for answer in self.run.engine.generate(rows, [None])[0]]}

    def memory(self) -> dict[str, int]:
        """Most memory of the device so far."""
        from heretic_ds.memory import peak_memory

        return {"device": peak_memory()["device"]}


def main() -> None:
    tool = Ours()
    with tool._stack:
        serve({name: getattr(tool, name) for name in ("open", "capture", "original", "score", "answers", "memory")})


if __name__ == "__main__":
    main()
