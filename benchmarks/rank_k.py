"""Processor seconds of edits along four directions beside those along one, in turns in one process, on the CPU.

    python benchmarks/rank_k.py [--rounds 7] [--rank 4] [--result FILE]

Needs: the package; the models are random ones with the demo's tokenizer: a llama of 30 million parameters, and a
mixture of experts. Takes some minutes. Leaves ``benchmarks/results/rank_k.json``, or the file that ``--result`` names.

Four ways of using an edit of all writers, ``ablation.row_norm=full``: weights edited and brought back; four trials' KL
in one pass (outputs edited); four trials' answers of 8 tokens in one pass; and one trial as a search takes it, on
weights: edit, KL, answers. Processor time counts, since other programs' work should not; the figure is the median over
rounds of the ratio of two neighbouring turns, whose order changes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from figures import keep
from placements import make_model

RESULT = Path(__file__).resolve().parent / "results" / "rank_k.json"
MODELS = {"llama, 30 M": ("llama", 512), "mixtral, 8 experts": ("mixtral", 384)}
PROMPTS, TOKENS, TRIALS = 16, 8, 4


def ways(engine: Any, rows: list[list[int]]) -> dict[str, Callable[[], object]]:
    """What is timed, by name; outputs are edited where several trials are given, else weights."""
    from heretic_ds.ablation import Edit, Profile
    from heretic_ds.scoring.kl import Divergence

    last = engine.anatomy.n_blocks - 1
    whole = [Profile(0.6 + trial / 10, last / 2, 0.3, last + 1.0) for trial in range(TRIALS)]
    edits = [Edit(0.5 + trial, {"attention": each, "mlp": each}) for trial, each in enumerate(whole)]
    reference = Divergence().begin(engine, rows)

    def on_weights() -> None:
        engine.apply(edits[0])
        engine.restore()

    def trial() -> None:
        engine.apply(edits[0])
        reference.of([None])
        engine.generate(rows, [None])
        engine.restore()

    return {
        "weights edited and brought back": on_weights,
        f"KL, {TRIALS} trials a pass": lambda: reference.of(edits),
        f"answers, {TRIALS} trials a pass": lambda: engine.generate(rows, edits),
        "one trial on weights": trial,
    }


def measure(kind: str, width: int, rank: int, rounds: int) -> dict[str, Any]:
    """Seconds and ratios of one model."""
    import torch

    from heretic_ds.ablation import Ablation, aligned
    from heretic_ds.cli import compose
    from heretic_ds.job import Job
    from heretic_ds.placements import build_engine
    from heretic_ds.world import World

    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        make_model(Path(folder), width, kind)
        words = [folder, "prompts=demo", "evaluate=replicated", f"generation.max_new_tokens={TOKENS}"]
        words += ["generation.batch_size=64", "model.device=cpu", "model.dtype=float32"]
        job = Job.check(compose(words), World.join())
        rows = job.prompts("target.train").rows[:PROMPTS]
        shape, used = (job.anatomy.n_blocks + 1, job.anatomy.width), {}
        for directions in (1, rank):
            vectors_LDR = torch.randn(*shape, directions, generator=torch.Generator().manual_seed(0)).double()
            bases_LRD = aligned(torch.linalg.qr(vectors_LDR).Q.transpose(-1, -2))
            engine: Any = stack.enter_context(contextlib.closing(build_engine(job, "evaluate")))
            engine.prepare(Ablation(bases_LRD, "full", False))
            engine.max_edits_per_pass = max(TRIALS, engine.max_edits_per_pass)
            used[directions] = ways(engine, rows)
        return {name: _in_turns(used[1][name], used[rank][name], rounds) for name in used[1]}


def _in_turns(one: Callable[[], object], several: Callable[[], object], rounds: int) -> dict[str, Any]:
    seconds: list[list[float]] = [[], []]
    for round_ in range(rounds + 1):
        for place in (0, 1) if round_ % 2 else (1, 0):
            before = time.process_time()
            (one, several)[place]()
            if round_:  # the first warms up
                seconds[place].append(time.process_time() - before)
    ratios = sorted(k / one for one, k in zip(*seconds, strict=True))
    found = {"rank 1": median(seconds[0]), "rank k": median(seconds[1])}
    found |= {"ratio": median(ratios), "ratio_least": ratios[0], "ratio_most": ratios[-1]}
    return {name: round(number, 4) for name, number in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    found = {}
    for name, (kind, width) in MODELS.items():
        found[name] = measure(kind, width, options.rank, options.rounds)
        for way, figures in found[name].items():
            told = f"{figures['rank 1']:8.3f} {figures['rank k']:8.3f} s   x {figures['ratio']:.3f}"
            print(f"{name:20} {way:34} {told}", flush=True)
    keep(options.result, {"rank": options.rank, "rounds": options.rounds, "processor_seconds": found})


if __name__ == "__main__":
    main()
