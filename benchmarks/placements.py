"""Placements side by side: loading, capture, generation and memory, for every placement and number of ranks.

    python benchmarks/placements.py [--result FILE] [--width 512] [--tokens 16] [--only TEXT]

Needs: the package, no GPU and no network; the models are a random llama and a random mixtral of some 30 million
parameters each with the demo's tokenizer, made anew in a temporary folder. Takes some minutes: each row is a job of its
own through DeepSpeed's launcher, one thread a rank. Leaves ``benchmarks/results/placements.json`` and prints it as a
table.

Ranks share the cores of this machine, so more ranks are no faster here than one; what the table is for is memory, and
what each placement costs beside another.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from figures import keep

RESULT = Path(__file__).resolve().parent / "results" / "placements.json"
MARK = "placement figures: "
ROWS = [
    # model, placement, ranks, whether it also evaluates, options
    ("llama", "replicated", 1, True, ()),
    ("llama", "replicated", 2, True, ()),
    ("llama", "tensor_parallel", 2, True, ()),
    ("llama", "tensor_parallel", 4, True, ("degree=2",)),
    ("llama", "zero3", 1, False, ()),
    ("llama", "zero3", 2, False, ()),
    ("llama", "fsdp", 2, True, ()),
    ("llama", "pipeline", 2, True, ("microbatches=1",)),
    ("llama", "pipeline", 2, True, ("microbatches=2",)),
    ("llama", "pipeline", 2, True, ("microbatches=4",)),
    ("llama", "pipeline", 4, True, ("degree=2",)),
    ("llama", "tensor_pipeline", 4, True, ("tensor_degree=2", "pipeline_degree=2")),
    ("mixtral", "replicated", 1, True, ()),
    ("mixtral", "tensor_parallel", 2, True, ()),
    ("mixtral", "expert_parallel", 2, True, ()),
    ("mixtral", "expert_parallel", 4, True, ()),
    ("mixtral", "zero3", 2, False, ()),
    ("mixtral", "fsdp", 2, True, ()),
    ("mixtral", "pipeline", 2, True, ()),
]


def make_model(folder: Path, width: int, kind: str = "llama") -> int:
    """Write the model; returns its parameters' bytes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

    from heretic_ds.demo import demo_model_dir

    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    torch.manual_seed(0)
    fields = {
        "vocab_size": len(tokenizer), "hidden_size": width, "num_attention_heads": 8, "num_key_value_heads": 8,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": 512,
    }  # fmt: skip
    if kind == "mixtral":
        config = MixtralConfig(**fields, intermediate_size=width, num_hidden_layers=4, num_local_experts=8)
    else:
        config = LlamaConfig(**fields, intermediate_size=11 * width // 4, num_hidden_layers=10)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def measure(model: str, placement: str, evaluates: bool, tokens: int, options: list[str]) -> None:
    """What one rank does: lay the model out, capture, generate; rank 0 prints every rank's figures."""
    from heretic_ds.cli import compose
    from heretic_ds.job import Job
    from heretic_ds.placements import build_engine
    from heretic_ds.world import World

    world = World.join()
    phase = "evaluate" if evaluates else "capture"
    settings = compose(
        [
            model, "prompts=demo", f"{phase}={placement}", *(f"{phase}.{option}" for option in options),
            f"generation.max_new_tokens={tokens}", "generation.batch_size=32", "model.device=cpu",
            "model.dtype=float32",
        ]
    )  # fmt: skip
    job = Job.check(settings, world)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    engine = build_engine(job, phase)
    load, loaded = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = job.prompts("target.train").rows
    capture = _seconds(lambda: engine.capture(rows))
    answers: list[list[int]] = []
    started = time.perf_counter()
    if evaluates:
        answers = engine.generate(rows[:64], [None])[0]
    generation = time.perf_counter() - started
    parts = getattr(engine.model, "parameters", lambda: [])()
    held = sum(_partition(p).numel() * p.element_size() for p in parts)
    figures = {
        "degree": engine.degree,
        "load_seconds": load,
        "capture_seconds": capture,
        "capture_tokens_per_second": sum(map(len, rows)) / capture,
        "generation_seconds": generation,
        "generation_tokens": sum(map(len, answers)),
        "generation_tokens_per_second": sum(map(len, answers)) / generation if evaluates else None,
        "parameter_bytes": held,
        "loading_peak_bytes": (loaded - before) * 1024,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    ranks = world.gather(figures)
    if world.decides:
        print(MARK + json.dumps(ranks), flush=True)
    engine.close()
    world.leave()


def _seconds(work: Callable[[], object]) -> float:
    work()  # the first pass pays for what is set up lazily
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _partition(parameter: Any) -> Any:
    """The part of a parameter that this rank holds, of ZeRO-3's or of FSDP's."""
    return getattr(parameter, "ds_tensor", getattr(parameter, "_local_tensor", parameter))


def _free_port() -> int:
    """One that no other job on this machine has taken."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def from_ranks(script: str, ranks: int, arguments: list[str], mark: str, seconds: int) -> Any:
    """What rank 0 of a job of ``script --rank arguments`` prints behind ``mark``, one thread a rank, on the CPU."""
    command = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--no_local_rank",
        "--master_port", str(_free_port()),
        str(Path(script).resolve()), "--rank", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    lines = [line.partition(mark)[2] for line in done.stdout.splitlines() if mark in line]
    if not lines:
        raise RuntimeError(
            f"{ranks} ranks failed with {' '.join(arguments)}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    return json.loads(lines[0])


def launch(folder: Path, row: tuple[str, str, int, bool, tuple[str, ...]], tokens: int) -> dict[str, Any]:
    """One row of the table, from a job of its own."""
    kind, placement, ranks, evaluates, options = row
    rank_arguments = [str(folder / kind), placement, str(int(evaluates)), str(tokens), *options]
    per_rank = from_ranks(__file__, ranks, rank_arguments, MARK, seconds=900)
    slowest = {name: max(r[name] for r in per_rank) for name in ("load_seconds", "loading_peak_bytes")}
    rates = {name: per_rank[0][name] for name in ("capture_tokens_per_second", "generation_tokens_per_second")}
    held = {name: [r[name] for r in per_rank] for name in ("parameter_bytes", "peak_host_bytes")}
    where = {"model": kind, "placement": placement, "ranks": ranks, "options": list(options)}
    where["ranks_a_replica"] = per_rank[0]["degree"]
    return {**where, **slowest, **rates, **held}


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown; weights and peak are the most that a rank has."""
    mib = 2**20
    lines = [
        "| model | placement | ranks | a replica | load s | capture tok/s | generate tok/s | weights MiB | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        generation = row["generation_tokens_per_second"]
        lines.append(
            f"| {row['model']} | {' '.join([row['placement'], *row['options']])} | {row['ranks']} | "
            f"{row['ranks_a_replica']} | {row['load_seconds']:.1f} | "
            f"{row['capture_tokens_per_second']:.0f} | {'-' if generation is None else f'{generation:.0f}'} | "
            f"{max(row['parameter_bytes']) / mib:.0f} | {max(row['peak_host_bytes']) / mib:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    if "--rank" in sys.argv:
        model, placement, evaluates, tokens, *given = sys.argv[sys.argv.index("--rank") + 1 :]
        measure(model, placement, bool(int(evaluates)), int(tokens), given)
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--only", default="", help="rows that hold this text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="placements_") as folder:
        sizes = {kind: make_model(Path(folder) / kind, options.width, kind) for kind in ("llama", "mixtral")}
        rows: list[dict[str, Any]] = []
        for row in ROWS:
            if options.only in " ".join(map(str, row)):
                rows.append(launch(Path(folder), row, options.tokens))
                keep(options.result, {"model_bytes": sizes, "rows": rows, "threads_a_rank": 1})
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
