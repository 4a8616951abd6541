"""Models whose declining was planted as the demo's was, with other seeds and shapes: what a search was not tuned on.

    python benchmarks/planted_models.py [--name deep experts] [--folder .models/planted]

Takes some five minutes a model on a core, once: a folder that is there is kept. Leaves ``<folder>/<name>/`` with
model/, prompts/ and planted_direction.safetensors, as ``python -m benchmarks.demo_model.train`` does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FOLDER = Path(__file__).resolve().parent.parent / ".models" / "planted"


@dataclass(frozen=True)
class Planted:
    """One model."""

    build: Callable[[Any], Any]
    """Makes the untrained model of a tokenizer."""
    seed: int
    """Draws weights, direction and prompts."""
    steps: int = 500


def _llama(tokenizer: Any) -> Any:
    """A Llama that is deeper and narrower than the demo's."""
    from benchmarks.demo_model.build import build_model

    return build_model(tokenizer, n_layers=10, width=96)


def _mixtral(tokenizer: Any) -> Any:
    """A Mixtral of eight blocks with four experts, two of them for each token; transformers fuses their weights."""
    from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM

    from benchmarks.demo_model.build import CONTEXT_LENGTH

    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = MixtralConfig(
        vocab_size=-(-len(tokenizer) // 16) * 16, hidden_size=96, intermediate_size=96, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=CONTEXT_LENGTH, tie_word_embeddings=False, sliding_window=None, **ids,
    )  # fmt: skip
    model = MixtralForCausalLM(config).float()
    model.generation_config = GenerationConfig(max_new_tokens=40, do_sample=False, **ids)
    return model


MODELS = {"deep": Planted(_llama, seed=11), "experts": Planted(_mixtral, seed=12)}


def folder_of(name: str, folder: Path = FOLDER) -> Path:
    """Where a model lies, trained now if it is not there."""
    from benchmarks.demo_model.train import run

    made = folder / name
    if not made.is_dir():
        planted = MODELS[name]
        unfinished = folder / f".{name}.unfinished"
        if unfinished.exists():
            raise SystemExit(f"{unfinished} is being made, or was left unfinished; remove it to make the model anew")
        run(planted.steps, planted.seed, unfinished, planted.build)
        unfinished.rename(made)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    for name in options.name:
        print(folder_of(name, options.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
