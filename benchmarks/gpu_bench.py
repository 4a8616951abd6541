"""How fast a search is on a GPU, with and without CUDA graphs, and how near its decode step is to the device's limit.

Needs: a CUDA device with room for the model (16 GB of weights for the shape 8b) and its batches; disk for the random
llama, written once into ``--folder``, which ``gpu_check.py`` shares. Takes about half an hour for the shape 8b.
Leaves ``benchmarks/results/gpu_bench.json``, or ``--result``.

    python benchmarks/gpu_bench.py [--shape 8b|1b|tiny] [--folder FOLDER] [--only device step search]

The step's limit (its roofline) is the larger of two times: for the bytes it has to move (all weights but the
embedding's unused rows, and the keys and values of every row) at the rate of a large copy, and for its operations at
the rate of a large matrix product; both rates are measured first. All answers have the same number of tokens, so that a
trial's work is known. Every measurement runs in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import gpu_check  # noqa: E402
from figures import keep  # noqa: E402
from gpu_check import DTYPES, PROMPT_WORDS, SHAPES, Stage, engine_of, run_apart  # noqa: E402

RESULT = HERE / "results" / "gpu_bench.json"
DTYPE = DTYPES[1]
ROWS = (1, 8, 32, 128, 256)
NEW_TOKENS = 100
STEPS = (20, 84)
"""Tokens of the two runs whose difference is a step's time: what both do beside steps cancels out."""
TIMES = 3
"""Runs of each kind; the quickest counts for a step, the middle one for trials."""
COPY_BYTES, MATRIX = 1 << 30, 8192
KINDS_OF_STEPS = {"graphs": "true", "eager": "false"}


def stages(kinds: list[str]) -> list[Stage]:
    """All measurements in order: the device's rates first, by which steps are judged."""
    of_kind = {
        "device": [Stage("device", "rates", DTYPE)],
        "step": [Stage("step", steps, DTYPE) for steps in KINDS_OF_STEPS],
        "search": [
            Stage("search", f"{steps}-{together}", DTYPE) for together in ("auto", "1") for steps in KINDS_OF_STEPS
        ],
    }
    return [stage for kind in of_kind if kind in kinds for stage in of_kind[kind]]


def device(folder: Path, what: str, dtype: str, copied: int = COPY_BYTES, matrix: int = MATRIX) -> dict[str, Any]:
    """Bytes a second, read and written, of a large copy, and operations a second of a large matrix product."""
    import torch

    place, kind = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype)
    source, target = (torch.zeros(copied, dtype=torch.uint8, device=place) for _ in range(2))
    left, right = (torch.randn(matrix, matrix, device=place).to(kind) for _ in range(2))
    copy = min(_seconds(lambda: target.copy_(source)) for _ in range(10))
    product = min(_seconds(lambda: left @ right) for _ in range(10))
    return {"bytes_per_second": 2 * copied / copy, "operations_per_second": 2 * matrix**3 / product}


def limit(shape: dict[str, int], rows: int, position: float, rates: dict[str, float]) -> dict[str, float]:
    """What a step of ``rows`` rows at a mean position has to move and compute in 16 bits, and for how long at best."""
    width, blocks, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    head, pairs = width // heads, shape["num_key_value_heads"] * (width // heads)
    in_block = 2 * width * width + 2 * width * pairs + 3 * width * shape["intermediate_size"]
    weights = blocks * in_block + width * shape["vocab_size"]
    moved = 2 * (weights + rows * width + rows * position * blocks * 2 * pairs)
    computed = rows * (2 * weights + 4 * blocks * heads * head * position)
    seconds = max(moved / rates["bytes_per_second"], computed / rates["operations_per_second"])
    return {"bytes": moved, "operations": computed, "milliseconds": 1e3 * seconds}


def step(folder: Path, steps: str, dtype: str) -> dict[str, Any]:
    """Milliseconds of a step of decoding by rows in the batch, all answers of the same length."""
    engine, rows = _engine(folder, dtype, steps)
    found: dict[str, Any] = {}
    for count in ROWS:
        engine.batch_sizes["generate"] = count
        prompts = (rows * math.ceil(count / len(rows)))[:count]

        def run(tokens: int, prompts: list[list[int]] = prompts) -> float:
            _answer_up_to(engine, tokens)
            return _seconds(lambda: engine.generate(prompts, [None]))

        run(STEPS[1])  # memory is taken, and graphs are captured, before anything counts
        few, many = (min(run(tokens) for _ in range(TIMES)) for tokens in STEPS)
        found[str(count)] = {"milliseconds": 1e3 * (many - few) / (STEPS[1] - STEPS[0])}
    return {"replayed": engine._decoder.captures, "by_rows": found, **gpu_check._memory(_torch())}


def search(folder: Path, what: str, dtype: str) -> dict[str, Any]:
    """Trials an hour: KL and answers of as many edits as a pass takes, the batch sizes found by measuring."""
    import torch

    from heretic_ds.ablation import Ablation, Edit
    from heretic_ds.scoring.kl import Divergence
    from heretic_ds.stages.search import MOST_TRIALS

    steps, together = what.split("-")
    engine, rows = _engine(folder, dtype, steps)
    generator = torch.Generator().manual_seed(2)
    shape = (engine.anatomy.n_blocks + 1, engine.anatomy.width)
    directions_LD = torch.nn.functional.normalize(torch.randn(shape, generator=generator).double(), dim=-1)
    engine.prepare(Ablation(directions_LD, "full", False))
    rows = rows[:100]
    reference = Divergence().begin(engine, rows)
    engine.generate(rows, [None])
    # The rule of search.trials_per_pass=auto on a GPU.
    most = max(1, min(MOST_TRIALS, math.ceil(engine.batch_sizes["generate"] / len(rows))))
    trials = most if together == "auto" else 1
    numbers = iter(range(10**6))

    def once() -> None:
        edits = [Edit.from_dict(_edit(next(numbers))) for _ in range(trials)]
        reference.of(edits)
        engine.generate(rows, edits)

    once()
    seconds = statistics.median(_seconds(once) for _ in range(TIMES)) / trials
    return {
        "trials_per_pass": trials,
        "seconds_per_trial": seconds,
        "trials_per_hour": 3600 / seconds,
        "replayed": engine._decoder.captures,
        "batch_sizes": dict(engine.batch_sizes),
        "prompts": len(rows),
        "new_tokens": NEW_TOKENS,
        **gpu_check._memory(torch),
    }


def _edit(number: int) -> dict[str, Any]:
    """Another edit of all blocks for every number."""
    profile = gpu_check.EDIT["profiles"]["attention"] | {"max_weight": 0.8 + 0.7 * (number % 97) / 97}  # type: ignore[index]
    return {"direction_index": None, "profiles": {part: profile for part in ("attention", "mlp")}}


def _engine(folder: Path, dtype: str, steps: str) -> tuple[Any, list[list[int]]]:
    """The engine that a run would use; every answer is as long as it may be."""
    overrides = f"generation.cuda_graphs={KINDS_OF_STEPS[steps]}", "generation.batch_size=0"
    engine, rows = engine_of(folder, "replicated", dtype, "evaluate", *overrides)
    engine._ends = frozenset()
    _answer_up_to(engine, NEW_TOKENS)
    return engine, rows


def _answer_up_to(engine: Any, tokens: int) -> None:
    engine._options = dataclasses.replace(engine._options, max_new_tokens=tokens)


def _torch() -> Any:
    import torch

    return torch


def _seconds(work: Callable[[], object]) -> float:
    gpu_check._wait(_torch())
    started = time.perf_counter()
    work()
    gpu_check._wait(_torch())
    return time.perf_counter() - started


KINDS: dict[str, Callable[[Path, str, str], dict[str, Any]]] = {"device": device, "step": step, "search": search}


def judged(shape: dict[str, int], found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Put a step's limit beside its time, in place; gives a line to print for each, and for each kind of search."""
    rates = found.get(Stage("device", "rates", DTYPE).name, {})
    for name, measured in found.items():
        for rows, each in measured.get("by_rows", {}).items():
            if "bytes_per_second" in rates:
                each["limit"] = limit(shape, int(rows), PROMPT_WORDS + sum(STEPS) / 2, rates)
                each["times_limit"] = each["milliseconds"] / each["limit"]["milliseconds"]
                yield (
                    f"{name}, {rows} rows: {each['milliseconds']:.2f} ms a step, "
                    f"{each['times_limit']:.2f} times its limit of {each['limit']['milliseconds']:.2f} ms"
                )
        if "trials_per_hour" in measured:
            yield (
                f"{name}: {measured['trials_per_hour']:.0f} trials an hour, "
                f"{measured['trials_per_pass']} a pass, rows in a batch {measured['batch_sizes']['generate']}"
            )


def write(result: Path, shape: str, found: dict[str, dict[str, Any]]) -> None:
    """Keep what was found so far."""
    report = {
        "what": "steps of decoding beside their limit, and trials an hour, on one GPU",
        "shape": shape,
        "model": SHAPES[shape],
        "measurements": found,
    }
    keep(result, report, gpu=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "gpu_check")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--stage", nargs=3, metavar=("KIND", "WHAT", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stage:
        kind, what, dtype = options.stage
        print(json.dumps(KINDS[kind](options.folder, what, dtype)))
        return 0
    if not _torch().cuda.is_available():
        print("gpu-bench needs a CUDA device, and this machine has none that PyTorch can use", file=sys.stderr)
        return 2
    folder = gpu_check.model_in(options.folder, options.shape)
    found: dict[str, dict[str, Any]] = {}
    for stage in stages(options.only):
        found[stage.name] = run_apart(stage, folder, __file__)
        print(f"{stage.name}: {json.dumps(found[stage.name])}", flush=True)
        write(options.result, options.shape, found)
    print("\n".join(judged(SHAPES[options.shape], found)))  # also adds the limits
    write(options.result, options.shape, found)
    failed = [name for name, measured in found.items() if "error" in measured]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
