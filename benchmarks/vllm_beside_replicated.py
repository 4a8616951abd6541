"""Speed of answers in vLLM beside those of `evaluate=replicated`, in one run, one thread each, on the CPU.

    python benchmarks/vllm_beside_replicated.py --vllm-python .venv-vllm/bin/python [--tokens 16] [--result FILE]

Needs: the package, an environment with vLLM (`make vllm-env`), no GPU and no network; the models are random ones of 30
and 135 million parameters with the demo's tokenizer, made anew in a temporary folder. Takes some minutes. Leaves
``benchmarks/results/vllm_beside_replicated.json`` and prints it as a table.

Both engines are up at once and take turns; the figure is the better of two turns. Answers are all as long as they may
be. With one trial the model is the original one, with four they share a pass.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from figures import keep
from placements import make_model

RESULT = Path(__file__).resolve().parent / "results" / "vllm_beside_replicated.json"
SHAPES, TURNS = ((64, 1), (256, 1), (64, 4)), 2
"""Prompts and trials of a pass."""
_WARM_UP = 256
"""Prompts of a pass before, which pays for what is set up lazily, and in which `replicated` finds its batch size."""


def make_135m(folder: Path) -> int:
    """A random model of SmolLM-135M's shape; returns its parameters' bytes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from heretic_ds.demo import demo_model_dir

    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def measure(folder: Path, python: str, tokens: int) -> list[dict[str, Any]]:
    """Tokens a second of both engines over one model, by rows and trials."""
    import torch

    from heretic_ds.ablation import Ablation, Edit, Profile
    from heretic_ds.cli import compose
    from heretic_ds.job import Job
    from heretic_ds.placements import build_engine
    from heretic_ds.world import World

    def job(*evaluate: str) -> Job:
        words = [str(folder), "prompts=demo", f"generation.max_new_tokens={tokens}", "model.device=cpu"]
        return Job.check(compose([*words, "model.dtype=float32", *evaluate]), World.join())

    ours = job("evaluate=replicated")
    rows = [row for kind in ("target", "baseline") for row in ours.prompts(f"{kind}.train").rows]
    generator = torch.Generator().manual_seed(0)
    shape = (ours.anatomy.n_blocks + 1, ours.anatomy.width)
    directions_LD = torch.nn.functional.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)
    last = ours.anatomy.n_blocks - 1
    edits = [Edit(None, {"attention": Profile(0.5 + trial / 4, last / 2, 0.1, last)}) for trial in range(4)]
    figures = []
    with contextlib.ExitStack() as stack:
        engines = {}
        for name, made in (("replicated", ours), ("vllm", job("evaluate=vllm", f"evaluate.python={python}"))):
            engines[name] = stack.enter_context(contextlib.closing(build_engine(made, "evaluate")))
            engines[name].prepare(Ablation(directions_LD, "full", False))
        for engine in engines.values():
            engine.generate(rows[:_WARM_UP], [None])
            engine.generate(rows[: _WARM_UP // 4], edits)
        for count, trials in SHAPES:
            asked = [None] if trials == 1 else edits[:trials]
            best, answers = dict.fromkeys(engines, 0.0), {}
            for _ in range(TURNS):
                for name, engine in engines.items():
                    started = time.perf_counter()
                    answers[name] = [answer for each in engine.generate(rows[:count], asked) for answer in each]
                    seconds = time.perf_counter() - started
                    best[name] = max(best[name], sum(map(len, answers[name])) / seconds)
            equal = sum(one == other for one, other in zip(*answers.values(), strict=True))
            figures.append({"rows": count, "trials": trials, "equal": equal, "answers": count * trials, **best})
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    print("| model | rows | trials | replicated tok/s | vllm tok/s | times | answers equal |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="vllm_speed_") as made:
        for name, make in (("30 M", lambda folder: make_model(folder, 512)), ("135 M", make_135m)):
            size = make(Path(made) / name.replace(" ", ""))
            rows = measure(Path(made) / name.replace(" ", ""), options.vllm_python, options.tokens)
            found[name] = {"model_bytes": size, "rows": rows}
            for row in rows:
                times = row["vllm"] / row["replicated"]
                print(
                    f"| {name} | {row['rows']} | {row['trials']} | {row['replicated']:.0f} | {row['vllm']:.0f} | "
                    f"{times:.2f} | {row['equal']} of {row['answers']} |",
                    flush=True,
                )
    keep(options.result, {"tokens": options.tokens, "models": found, "threads": int(os.environ["OMP_NUM_THREADS"])})
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
