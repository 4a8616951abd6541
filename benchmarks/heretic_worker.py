"""Heretic (PyPI ``heretic-llm``) as the other tool of ``against_heretic.py``: its public classes, asked for one trial.

Runs in an environment of its own (``make bench-setup``), in which this project is not installed. The tool is used as it
comes: settings are its settings, and its methods are timed from outside.
"""

from __future__ import annotations

import gc
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from against_heretic_worker import serve
from search_profile import Parts

PARTS = {
    "reset_model": "edit",
    "abliterate": "edit",
    "get_logprobs_batched": "kl",
    "get_responses_batched": "generation",
}


class Heretic:
    """One model in the tool's hands."""

    def __init__(self) -> None:
        self.parts = Parts()

    def open(self, told: dict[str, Any], row_norm: str, batch_size: int, threads: int) -> dict[str, Any]:
        """Import the tool and load the model."""
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        from heretic.config import DatasetSpecification, QuantizationMethod, RowNormalization, Settings
        from heretic.model import Model

        case = told["case"]

        def data(kind: str, part: str) -> Any:
            place = told["prompts"][f"{kind}.{part}"]
            count = told["counts"][f"{kind}_{part}"]
            return DatasetSpecification(dataset=place["folder"], split=f"{place['split']}[:{count}]", column="text")

        sys.argv = ["heretic"]
        self.settings = Settings(
            model=told["model"],
            seed=0,
            dtypes=[case["dtype"]],
            device_map=case["device"],
            quantization=QuantizationMethod.NONE,
            batch_size=batch_size,
            max_response_length=case["new_tokens"],
            response_prefix="",
            row_normalization=RowNormalization(row_norm),
            refusal_markers=told["markers"],
            system_prompt=told["system"],
            good_prompts=data("baseline", "train"),
            bad_prompts=data("target", "train"),
            good_evaluation_prompts=data("baseline", "eval"),
            bad_evaluation_prompts=data("target", "eval"),
        )
        self.model = Model(self.settings)
        return {"versions": {name: version(name) for name in ("heretic-llm", "torch", "transformers", "peft")}}

    def capture(self) -> None:
        """Directions of the layers: the part of the difference of mean residuals that is orthogonal to the baseline."""
        import torch.nn.functional as functional
        from heretic.utils import load_prompts

        baseline_LD, target_LD = (
            self.model.get_residuals_mean(load_prompts(self.settings, prompts)).double()
            for prompts in (self.settings.good_prompts, self.settings.bad_prompts)
        )
        direction_LD = functional.normalize(target_LD - baseline_LD, dim=-1)
        unit_LD = functional.normalize(baseline_LD, dim=-1)
        direction_LD = direction_LD - (direction_LD * unit_LD).sum(-1, keepdim=True) * unit_LD
        self.directions_LD = functional.normalize(direction_LD, dim=-1).float()

    def original(self) -> dict[str, Any]:
        """What the original model is scored, which every trial is compared with."""
        from heretic.evaluator import Evaluator

        self.evaluator = Evaluator(self.settings, self.model)
        for name, part in PARTS.items():
            setattr(self.model, name, self.parts.timed(part, getattr(self.model, name)))
        prompts = [len(self.evaluator.bad_prompts), len(self.evaluator.good_prompts)]
        return {"refusals": self.evaluator.base_refusals, "prompts": prompts}

    def batches(self, rows: int) -> None:
        """Take batches of that many rows from now on."""
        self.settings.batch_size = rows

    def score(self, edits: list[dict[str, Any]]) -> dict[str, Any]:
        """Scores of edits, one after the other."""
        from heretic.model import AbliterationParameters

        self.parts.clock.clear(), self.parts.processor.clear()
        names = {"mlp" if "mlp" in name else "attention": name for name in self.model.get_abliterable_components()}
        scores = []
        for edit in edits:
            with self.parts.part("rest"):
                profiles = {
                    names[component]: AbliterationParameters(**numbers)
                    for component, numbers in edit["profiles"].items()
                }
                self.model.reset_model()
                self.model.abliterate(self.directions_LD, edit["direction_index"], profiles)
                _, kl, refusals = self.evaluator.get_score()
            scores.append({"refusals": refusals, "kl": float(kl)})
        return {"scores": scores, "parts": dict(self.parts.clock), "processor_parts": dict(self.parts.processor)}

    def answers(self, edit: dict[str, Any] | None = None) -> dict[str, Any]:
        """How many tokens the answers to the evaluated target prompts have."""
        texts = self.model.get_responses_batched(self.evaluator.bad_prompts)
        return {"tokens": [len(self.model.tokenizer.encode(text, add_special_tokens=False)) for text in texts]}

    def memory(self) -> dict[str, int]:
        """Most memory of the device so far."""
        import torch

        gc.collect()
        return {"device": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0}


def main() -> None:
    tool = Heretic()
    names = ("open", "capture", "original", "batches", "score", "answers", "memory")
    serve({name: getattr(tool, name) for name in names})


if __name__ == "__main__":
    main()
