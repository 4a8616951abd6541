"""Loading with ``load.share`` on and off: what each of two ranks reads, how long it takes, and its memory.

    python benchmarks/shared_loading.py [--result FILE] [--rounds 3]

Needs: the package, two cores, some 2 GB of memory and 1 GB of disk, no GPU and no network. The models are random, in
bfloat16, and made anew in a temporary folder: a llama of the shape of SmolLM-135M with tied embeddings, and a mixtral
of some 400 MB, whose experts are merged while they are loaded. Each is loaded by two ranks, ``replicated``, on and off
in turns, with its files in the page cache and without them (as far as the system gives their pages up). Leaves
``benchmarks/results/shared_loading.json`` and prints it.

Bytes: what a rank reads by system calls (``rchar``), the most of files that it has mapped at a time, and what storage
gave for it. Ordinary loading maps the files. On a CPU the parts are exchanged through the loopback interface, which
costs more than reading a file from the page cache: no figure here tells what a GPU's links give.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from figures import keep
from placements import from_ranks

RESULT = Path(__file__).resolve().parent / "results" / "shared_loading.json"
MARK = "shared loading figures: "
RANKS = 2


def make_model(folder: Path, kind: str) -> int:
    """Write a model; returns the bytes of its weight files."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

    from heretic_ds.demo import demo_model_dir

    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    if kind == "llama":
        config = LlamaConfig(
            **ends, vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        )  # fmt: skip
    else:
        config = MixtralConfig(
            **ends, vocab_size=32000, hidden_size=768, intermediate_size=1536, num_hidden_layers=5,
            num_attention_heads=12, num_key_value_heads=4, num_local_experts=8,
        )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="200MB")
    tokenizer.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(folder: str, rounds: int) -> None:
    """What one rank does: load in turns; rank 0 prints every rank's figures."""
    from heretic_ds.cli import compose
    from heretic_ds.job import Job
    from heretic_ds.world import World

    world = World.join()
    settings = compose([folder, "model.dtype=bfloat16", "model.device=cpu"])
    job = Job.check(settings, world, with_prompts=False)
    loads: list[dict[str, Any]] = []
    for turn in range(-1, rounds):  # what comes before the first is not kept: it pays for what is set up lazily
        for cached in (True, False):
            for share in (False, True):
                job.settings.load.share = share
                if not cached:
                    world.decide(lambda: _forget(Path(folder)))
                world.gather(None)
                figures = {"share": share, "cached": cached, **_load(job)}
                if turn >= 0:
                    loads.append(figures)
    ranks = world.gather(loads)
    if world.decides:
        print(MARK + json.dumps(ranks), flush=True)
    world.leave()


def _load(job: Any) -> dict[str, Any]:
    """Figures of one loading."""
    from heretic_ds.memory import give_back_memory, peak_of
    from heretic_ds.placements.base import load_whole

    found: dict[str, Any] = {}

    def load() -> None:
        started = time.perf_counter()
        found["model"] = load_whole(job)
        found["seconds"] = time.perf_counter() - started

    give_back_memory()
    before, held = _numbers("io"), _numbers("status")["RssAnon"]
    with _most_mapped() as most:
        found["peak_bytes"] = peak_of(load, job.opened.device)
    after = _numbers("io")
    found["held_bytes"] = 1024 * (_numbers("status")["RssAnon"] - held)
    del found["model"]
    give_back_memory()
    reads = {"read_bytes": after["rchar"] - before["rchar"], "stored_bytes": after["read_bytes"] - before["read_bytes"]}
    return {**found, **reads, "mapped_bytes": 1024 * most[0]}


@contextmanager
def _most_mapped() -> Iterator[list[int]]:
    """The most kilobytes of files that were mapped at a time, beyond those at the start, as the only item of a list."""
    most, over = [0], threading.Event()
    start = _numbers("status")["RssFile"]

    def watch() -> None:
        while not over.wait(0.002):
            most[0] = max(most[0], _numbers("status")["RssFile"] - start)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield most
    over.set()
    watcher.join()


def _numbers(file: str) -> dict[str, int]:
    """The counts in a file of this process's folder in /proc, as they are."""
    lines = (line.split(":") for line in Path("/proc/self", file).read_text().splitlines())
    return {name: int(value.split()[0]) for name, value in lines if value.split() and value.split()[0].isdigit()}


def _forget(folder: Path) -> None:
    """Ask the system to drop the weight files from its page cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def summed_up(ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each way to load: the median over rounds, of the slower rank's seconds, of the larger one's memory."""
    rows = []
    for cached in (True, False):
        for share in (False, True):
            row: dict[str, Any] = {"share": share, "cached": cached}
            turns = [
                turn for turn in zip(*ranks, strict=True) if (turn[0]["share"], turn[0]["cached"]) == (share, cached)
            ]
            row["seconds"] = round(statistics.median(max(rank["seconds"] for rank in turn) for turn in turns), 3)
            row["seconds_of_rounds"] = [round(max(rank["seconds"] for rank in turn), 3) for turn in turns]
            for key in ("read_bytes", "mapped_bytes", "stored_bytes", "peak_bytes", "held_bytes"):
                row[f"{key}_a_rank"] = [
                    round(statistics.median(turn[rank][key] for turn in turns)) for rank in range(len(ranks))
                ]
            rows.append(row)
    return rows


def main() -> int:
    if "--rank" in sys.argv:
        folder, rounds = sys.argv[sys.argv.index("--rank") + 1 :]
        measure(folder, int(rounds))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    models = {}
    for kind in ("llama", "mixtral"):
        with tempfile.TemporaryDirectory(prefix="shared_loading_") as folder:
            size = make_model(Path(folder), kind)
            ranks = from_ranks(__file__, RANKS, [folder, str(options.rounds)], MARK, seconds=900)
            models[kind] = {"file_bytes": size, "loads": summed_up(ranks)}
    keep(options.result, {"models": models, "ranks": RANKS, "rounds": options.rounds, "threads_a_rank": 1})
    print(json.dumps(models, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
