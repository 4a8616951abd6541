"""Seconds and peak memory of residual capture beside plain forward passes of the same batches.

Needs: Linux, and nothing but the package; the model is a random llama of 30 million parameters. Takes some minutes.
Leaves: ``benchmarks/results/capture_overhead.json``, or the file that ``--result`` names.

    python benchmarks/capture_overhead.py [--prompts 16 64 256] [--rounds 7] [--device cpu|cuda]

``model(...)`` computes logits of all positions, which capture has no use for; ``logits_to_keep=1`` leaves them out and
is the harder mark. ``output_hidden_states`` is how residuals are usually had: hidden states of all positions at once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from figures import keep

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
        from heretic_ds.runner.engine import Runner, RunnerOptions

        torch.manual_seed(0)
        self.torch, self.device = torch, device
        self.model = LlamaForCausalLM(LlamaConfig(**MODEL)).eval().requires_grad_(False).to(device)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())

        class Tokens:
            pad_token_id, eos_token_id = 0, 2

        self.engine = Runner(self.model, find_anatomy(self.model), Tokens(), RunnerOptions(1, BATCH))

    def prompts(self, count: int) -> list[list[int]]:
        """Random tokens; one batch is as long as any may be, so that the largest is the same for all counts."""
        numbers = random.Random(0)
        lengths = [LENGTHS[1]] * BATCH + [numbers.randint(*LENGTHS) for _ in range(count - BATCH)]
        return [[numbers.randrange(3, 4096) for _ in range(length)] for length in lengths[:count]]

    def run(self, way: str, prompts: list[list[int]]) -> None:
        if way == "capture":
            self.engine.capture(prompts)
            return
        from heretic_ds.prompts import pad_left

        options = {"logits_to_keep=1": {"logits_to_keep": 1}, "output_hidden_states": {"output_hidden_states": True}}
        with self.torch.inference_mode():
            longest_first = sorted(prompts, key=len, reverse=True)
            for start in range(0, len(longest_first), BATCH):
                batch = pad_left(longest_first[start : start + BATCH], 0).to(self.device)
                self.model(
                    input_ids=batch.input_ids_BS,
                    attention_mask=batch.attention_mask_BS,
                    position_ids=batch.position_ids_BS,
                    use_cache=False,
                    **options.get(way, {}),
                )
        if self.device != "cpu":
            self.torch.cuda.synchronize()


def seconds(device: str, count: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each way by the clock, and of this process's processor time, which a busy machine changes less.

    The ways take turns, so that the machine is as busy for one as for another.
    """
    subject = Subject(device)
    prompts = subject.prompts(count)
    taken: dict[str, dict[str, list[float]]] = {kind: {way: [] for way in WAYS} for kind in ("clock", "processor")}
    for way in WAYS:
        subject.run(way, prompts[:BATCH])
    for _ in range(rounds):
        for way in WAYS:
            started, started_processor = time.perf_counter(), time.process_time()
            subject.run(way, prompts)
            taken["clock"][way].append(time.perf_counter() - started)
            taken["processor"][way].append(time.process_time() - started_processor)
    return taken


def peak_bytes(device: str, way: str, count: int) -> int:
    """Bytes that one way takes at its peak beyond the model, in a process that has done nothing else."""
    subject = Subject(device)
    if device != "cpu":
        subject.torch.cuda.reset_peak_memory_stats()
        before = subject.torch.cuda.memory_allocated()
        subject.run(way, subject.prompts(count))
        return int(subject.torch.cuda.max_memory_allocated() - before)
    prompts = subject.prompts(count)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far: that of building the model
    before = _resident("VmRSS")
    subject.run(way, prompts)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) * 1024


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _count_parameters(device: str) -> int:
    return Subject(device).parameters


def rounded(numbers: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {kind: {way: round(number, 4) for way, number in ways.items()} for kind, ways in numbers.items()}


def show(best: dict[str, dict[str, float]], peaks: dict[str, dict[int, int]], timed: int, prompts: list[int]) -> None:
    """The ways side by side."""
    counts = "".join(f"{f'{count} prompts':>14}" for count in prompts)
    print(f"best of {timed} prompts{'clock':>11}{'processor':>14}{'of model(...)':>16}   peak memory:{counts}")
    for way in WAYS:
        share = best["processor"][way] / best["processor"][WAYS[0]]
        columns = "".join(f"{peaks[way][count] / 2**20:>10.1f} MiB" for count in prompts)
        times = f"{best['clock'][way]:>9.3f} s{best['processor'][way]:>12.3f} s"
        print(f"{way:22}{times}{share:>16.3f}   {'':12}{columns}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    timed = sorted(options.prompts)[len(options.prompts) // 2]
    taken = alone(seconds, options.device, timed, options.rounds)
    # The allocator gives every tensor back at once, so that peaks are those of the work and not of its habits.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    peaks = {way: {count: alone(peak_bytes, options.device, way, count) for count in options.prompts} for way in WAYS}
    best = {kind: {way: min(times) for way, times in ways.items()} for kind, ways in taken.items()}
    show(best, peaks, timed, options.prompts)
    report = {
        "what": "residual capture beside plain forward passes of the same batches, float32",
        "model": {"parameters": alone(_count_parameters, options.device), **MODEL},
        "batch": BATCH,
        "prompt_tokens": list(LENGTHS),
        "seconds": {
            "prompts": timed,
            "rounds": options.rounds,
            "best": rounded(best),
            "median": rounded({kind: {way: median(ways[way]) for way in WAYS} for kind, ways in taken.items()}),
            "capture_to_model": round(best["processor"]["capture"] / best["processor"][WAYS[0]], 3),
        },
        "peak_bytes_beyond_the_model": {
            way: {str(count): number for count, number in by_count.items()} for way, by_count in peaks.items()
        },
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
    }
    keep(options.result, report, gpu=options.device != "cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
