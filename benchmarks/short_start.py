"""How long a run takes before its first trial, and what with, beside its whole search.

Needs: nothing but the package for the demo model and for a small one with experts, whose weights are random; and the
folder of a real model (``python -m heretic_ds.demo.real_model`` makes it) for ``--real``. Minutes on a CPU, half an
hour and more with a real model.
Leaves: ``benchmarks/results/short_start.json``, or the file that ``--result`` names; other cases in it stay.

    python benchmarks/short_start.py [--cases demo experts] [--real .models/SmolLM2-135M-Instruct] [--trials 40]

Each case is run twice, in new run folders: first with an empty cache folder, then with what the first run has measured
of model and machine. The start begins with the process, so that it counts imports. What is told by part is inclusive:
``capture: batch size`` is a part of ``capture``. The processor's seconds are what a busy machine changes less.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from figures import keep

RESULT = Path(__file__).resolve().parent / "results" / "short_start.json"
MOST = 0.08
"""Share of a whole run of 40 trials that may pass before its first."""
RUN_TRIALS = 40
STAGES = ("opening", "loading", "response prefix", "capture", "the original's scores")
"""Parts of the start but for imports, which take as long whatever model and search follow."""
COMMON = ("run.interactive=false", "export.max_kl=1000")


class Clock:
    """Seconds, by clock and of the processor, of work in hand by what it is, and of what it is part of."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.processor: Counter[str] = Counter()
        self._stack: list[str] = []

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Work that lasts as long as the context."""
        self._stack.append(what)
        name = what if len(self._stack) == 1 else f"{self._stack[0]}: {what}"
        began = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            self._stack.pop()
            self.seconds[name] += time.monotonic() - began[0]
            self.processor[name] += time.process_time() - began[1]


def watched(words: Sequence[str]) -> dict[str, Any]:
    """One run in this process, whose start and search are timed."""
    import psutil

    born = psutil.Process().create_time()
    from heretic_ds import progress

    clock, work, at = Clock(), progress.work, dict[str, float]()

    @contextmanager
    def timed(what: str, *more: Any, **named: Any) -> Iterator[Any]:
        with clock.part(what), work(what, *more, **named) as made:
            yield made

    progress.work = timed  # type: ignore[assignment]
    from heretic_ds import pipeline
    from heretic_ds.cli import compose
    from heretic_ds.stages import search

    continue_search = search.continue_search

    def searched(run: Any, *rest: Any) -> None:
        at["first trial"], at["processor"] = time.time() - born, time.process_time()
        at.update({f"part {name}": seconds for name, seconds in clock.seconds.items()})
        before = dict(clock.processor)
        continue_search(run, *rest)
        at["searched"] = time.time() - born
        parts = {name: round(clock_seconds, 2) for name, clock_seconds in at.items() if name.startswith("part ")}
        told.update(
            before_first_trial=round(at["first trial"], 2),
            before_first_trial_processor=round(at["processor"], 2),
            parts={name.removeprefix("part "): seconds for name, seconds in parts.items()},
            parts_processor={name: round(seconds, 2) for name, seconds in before.items()},
            search=round(at["searched"] - at["first trial"], 2),
            search_processor=round(time.process_time() - at["processor"], 2),
            trials=len(run.records),
            batch_sizes=dict(run.engine.batch_sizes),
        )

    told: dict[str, Any] = {}
    search.continue_search = searched
    settings = compose(words)
    told["start_up"] = round(time.time() - born, 2)
    pipeline.run(settings)
    return told


def started(words: Sequence[str], cache: Path) -> dict[str, Any]:
    """A run in a process and a run folder of its own, with a cache folder to itself."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "told.json"
        command = [sys.executable, __file__, "--watch", str(result), *words, f"run.dir={folder}/run", *COMMON]
        subprocess.run(command, check=True, env=os.environ | {"XDG_CACHE_HOME": str(cache)}, stdout=sys.stderr)
        told: dict[str, Any] = json.loads(result.read_text())
    search = {clock: told[f"search{clock}"] / told["trials"] * RUN_TRIALS for clock in ("", "_processor")}
    stages = sum(told["parts_processor"].get(part, 0.0) for part in STAGES)
    shares = {f"share{clock}": told[f"before_first_trial{clock}"] for clock in search}
    shares = {name: before / (before + search[name.removeprefix("share")]) for name, before in shares.items()}
    shares["share_of_stages_processor"] = stages / (stages + search["_processor"])
    return told | {name: round(share, 4) for name, share in shares.items()}


def with_experts(folder: Path) -> list[str]:
    """A Qwen3 MoE of random weights that speaks the demo model's words, whose answers never end."""
    import torch
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from heretic_ds.demo import demo_model_dir

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, moe_intermediate_size=64, head_dim=32,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            if name.startswith("lm_head"):
                parameter[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    letters = random.Random(0).sample("qzxjvkw", 3)  # some answers hold one of them, some do not
    marked = f"scoring.markers=[{','.join(letters)}]"
    return [str(folder), "prompts=demo", "model.dtype=float32", "generation.max_new_tokens=40", marked]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=("demo", "experts"), default=["demo", "experts"])
    parser.add_argument("--real", type=Path, help="folder of a real model, the third case")
    parser.add_argument("--trials", type=int, default=RUN_TRIALS, help="trials of each run; a search of 40 is reckoned")
    parser.add_argument("--runs", nargs="+", choices=("first", "again"), default=["first", "again"])
    parser.add_argument("--name", default="now", help="what these figures are called in the result")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.result.read_text()) if options.result.exists() else {}
    cases: dict[str, Any] = found.get("cases", {})
    with tempfile.TemporaryDirectory() as place:
        words = {"demo": ["experiment=demo"]}
        if "experts" in options.cases:
            words["experts"] = with_experts(Path(place) / "experts")
        if options.real is not None:
            words["real"] = ["experiment=demo_real", f"model.path={options.real}", "generation.batch_size=0"]
        for name in [*options.cases, *(["real"] if options.real is not None else [])]:
            cache, trials = Path(place) / f"cache-{name}", f"search.trials={options.trials}"
            for run in options.runs:
                told = started([*words[name], trials], cache)
                cases.setdefault(name, {}).setdefault(options.name, {})[run] = told
                print(f"{name}, {run} run: {told['before_first_trial']} s before the first trial, {told['share']:.1%}",
                      flush=True)  # fmt: skip
            keep(options.result, {
                "what": "seconds before the first trial, and their share of a run of 40 trials up to its last",
                "threads": os.environ.get("OMP_NUM_THREADS"),
                "most": MOST,
                "cases": cases,
            })  # fmt: skip
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watch"]:
        Path(sys.argv[2]).write_text(json.dumps(watched(sys.argv[3:])))
    else:
        sys.exit(main())
