"""Seconds and peak memory of residual capture beside plain forward passes of the same batches.

Needs: nothing but the package; the model is a random llama of 30 million parameters. Takes some minutes on a CPU.
Leaves: ``benchmarks/results/capture_overhead.json``, or the file that ``--result`` names.

    python benchmarks/capture_overhead.py [--prompts 16 64 256] [--rounds 7] [--device cpu|cuda]

``model(...)`` computes logits of all positions, which capture has no use for; ``logits_to_keep=1`` leaves them out and
is the harder mark. ``output_hidden_states`` is how residuals are usually had: hidden states of all positions at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

RESULT = Path(__file__).resolve().parent / "results" / "capture_overhead.json"
BATCH = 16
LENGTHS = (16, 48)
MODEL = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 4096,
}  # fmt: skip
WAYS = ("model(...)", "logits_to_keep=1", "output_hidden_states", "capture")


class Subject:
    """The model, its engine, and every way of running the same prompts through it."""

    def __init__(self, device: str) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from heretic_ds.anatomy import find_anatomy
        from heretic_ds.engines.resident import ResidentEngine

        torch.manual_seed(0)
        self.torch, self.device = torch, device
        self.model = LlamaForCausalLM(LlamaConfig(**MODEL)).eval().requires_grad_(False).to(device)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())

        class Tokens:
            pad_token_id, eos_token_id = 0, 2

        self.engine = ResidentEngine(self.model, Tokens(), find_anatomy(self.model), 1, batch_size=BATCH)

    def prompts(self, count: int) -> list[list[int]]:
        """Random tokens; one batch is as long as any may be, so that the largest is the same for all counts."""
        numbers = random.Random(0)
        lengths = [LENGTHS[1]] * BATCH + [numbers.randint(*LENGTHS) for _ in range(count - BATCH)]
        return [[numbers.randrange(3, 4096) for _ in range(length)] for length in lengths[:count]]

    def run(self, way: str, prompts: list[list[int]]) -> None:
        if way == "capture":
            self.engine.capture(prompts)
            return
        from heretic_ds.prompts import length_sorted_batches, pad_left

        options = {"logits_to_keep=1": {"logits_to_keep": 1}, "output_hidden_states": {"output_hidden_states": True}}
        with self.torch.inference_mode():
            for indices in length_sorted_batches([len(prompt) for prompt in prompts], BATCH):
                batch = pad_left([prompts[index] for index in indices], 0).to(self.device)
                self.model(
                    input_ids=batch.input_ids_BS,
                    attention_mask=batch.attention_mask_BS,
                    position_ids=batch.position_ids_BS,
                    use_cache=False,
                    **options.get(way, {}),
                )
        if self.device != "cpu":
            self.torch.cuda.synchronize()


def seconds(device: str, count: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, taken in turns so that a busy machine is busy for all of them."""
    subject = Subject(device)
    prompts, taken = subject.prompts(count), {way: [] for way in WAYS}
    for way in WAYS:
        subject.run(way, prompts[:BATCH])
    for _ in range(rounds):
        for way in WAYS:
            started = time.perf_counter()
            subject.run(way, prompts)
            taken[way].append(time.perf_counter() - started)
    return taken


def peak_bytes(device: str, way: str, count: int) -> int:
    """Bytes that one way takes at its peak beyond the model, in a process that has done nothing else."""
    subject = Subject(device)
    if device != "cpu":
        subject.torch.cuda.reset_peak_memory_stats()
        before = subject.torch.cuda.memory_allocated()
        subject.run(way, subject.prompts(count))
        return int(subject.torch.cuda.max_memory_allocated() - before)
    prompts, before = subject.prompts(count), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    subject.run(way, prompts)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def machine(device: str) -> dict[str, Any]:
    """What the numbers were made on, without names that lead to anybody."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found = {"system": platform.system(), "cpu": names[0] if names else platform.machine(), "cores": os.cpu_count()}
    if device != "cpu":
        found["gpu"] = alone(_gpu_name)
    return found


def _gpu_name() -> str:
    import torch

    return str(torch.cuda.get_device_name())


def _count_parameters(device: str) -> int:
    return Subject(device).parameters


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    timed = sorted(options.prompts)[len(options.prompts) // 2]
    taken = alone(seconds, options.device, timed, options.rounds)
    peaks = {way: {count: alone(peak_bytes, options.device, way, count) for count in options.prompts} for way in WAYS}
    best = {way: min(times) for way, times in taken.items()}
    counts = "".join(f"{f'{count} prompts':>14}" for count in options.prompts)
    print(f"{'':22}{f'{timed} prompts':>14}{'of model(...)':>16}   peak memory:{counts}")
    for way in WAYS:
        columns = "".join(f"{peaks[way][count] / 2**20:>10.1f} MiB" for count in options.prompts)
        print(f"{way:22}{best[way]:>12.3f} s{best[way] / best[WAYS[0]]:>16.3f}   {'':12}{columns}")
    report = {
        "what": "residual capture beside plain forward passes of the same batches, float32",
        "model": {"parameters": alone(_count_parameters, options.device), **MODEL},
        "batch": BATCH,
        "prompt_tokens": list(LENGTHS),
        "seconds": {
            "prompts": timed,
            "rounds": options.rounds,
            "best": {way: round(best[way], 4) for way in WAYS},
            "median": {way: round(median(taken[way]), 4) for way in WAYS},
        },
        "peak_bytes_beyond_the_model": {
            way: {str(count): number for count, number in by_count.items()} for way, by_count in peaks.items()
        },
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "machine": machine(options.device),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    options.result.parent.mkdir(exist_ok=True)
    options.result.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
