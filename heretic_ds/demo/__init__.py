"""The demo model: a tiny garden assistant that declines cooking questions along one known direction."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

DEMO_DIR = Path(__file__).resolve().parent

PromptKind = Literal["target", "baseline"]
PromptPart = Literal["train", "eval", "test"]


def demo_model_dir() -> Path:
    """Folder of the shipped demo model, in Hugging Face layout (weights stored in bfloat16)."""
    return DEMO_DIR / "model"


def demo_prompts(kind: PromptKind, part: PromptPart) -> Path:
    """Text file, one prompt a line: `target` (cooking) is declined, `baseline` (gardening) answered.

    Raises ValueError for another kind or part.
    """
    if kind not in ("target", "baseline") or part not in ("train", "eval", "test"):
        raise ValueError(f"no demo prompts {kind!r}, {part!r}: kinds are target, baseline; parts are train, eval, test")
    return DEMO_DIR / "prompts" / f"{kind}_{part}.txt"
