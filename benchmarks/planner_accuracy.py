"""The planner beside the truth: memory a rank and order by speed, predicted and measured, for every placement.

    python benchmarks/planner_accuracy.py [--result FILE] [--only TEXT] [--untimed] [--add | --predict] [--work FOLDER]

Needs: the package, no GPU and no network, some 10 GB of memory; the models are random ones of 30 to 400 million
parameters, dense and with experts, made anew in a temporary folder. Takes some 75 minutes: each row is a job of two or
four ranks of its own, one thread a rank. Leaves ``benchmarks/results/planner_accuracy.json`` and prints it as tables.

Memory is the highest resident set of a rank (VmHWM) with the libraries, which the planner counts as they are in the
process that plans. A job captures, takes reference distributions, runs passes of two edits over distributions and
answers, and edits weights. Speed is the shortest of three runs. Kendall's tau compares the predicted with the measured
order of the placements of one model and phase, all on two ranks: the pairs in the same order less the others, over all
pairs. Ranks on shared cores are timed, which other programs disturb: ``--untimed`` keeps the bytes alone, which they do
not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from figures import keep
from placements import from_ranks
from planner_rows import orders, row, table

RESULT = Path(__file__).resolve().parent / "results" / "planner_accuracy.json"
MARK = "planner figures: "
RANKS = 2
"""Whose speeds are compared."""
TRAIN, EVALUATED, NEW_TOKENS, BATCH, EDITS = 32, 24, 12, 16, 2
ASKED = {
    "train": TRAIN,
    "evaluated": EVALUATED,
    "new_tokens": NEW_TOKENS,
    "batch": BATCH,
    "edits": EDITS,
}
LONG = 5.0
"""Seconds of a run from which on a second one is the last."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 30M": (
        "llama",
        {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6,
         "num_key_value_heads": 6, "vocab_size": 24576},
    ),
    "llama 135M, tied": (
        "llama",
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True},
    ),
    "llama 400M": (
        "llama",
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 26, "num_attention_heads": 16,
         "num_key_value_heads": 8, "vocab_size": 49152},
    ),
    "qwen3_moe 150M": (
        "qwen3_moe",
        {"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 384, "num_hidden_layers": 12,
         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 16,
         "num_experts_per_tok": 2, "vocab_size": 24576},
    ),
    "mixtral 400M": (
        "mixtral",
        {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 12,
         "num_key_value_heads": 4, "num_local_experts": 8, "vocab_size": 24576},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Placed:
    """On how many ranks a placement is measured, and whether it evaluates."""

    ranks: tuple[int, ...] = (RANKS,)
    evaluates: bool = True


PLACEMENTS = {
    "replicated": Placed(),
    "tensor_parallel": Placed(ranks=(RANKS, 4)),
    "pipeline": Placed(ranks=(RANKS, 4)),
    "tensor_pipeline": Placed(ranks=(4,)),
    "expert_parallel": Placed(),
    "fsdp": Placed(),
    "zero3": Placed(evaluates=False),
}


def make_model(folder: Path, kind: str, shape: dict[str, Any]) -> None:
    """Write a model with random weights and the demo's tokenizer, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from heretic_ds.demo import demo_model_dir

    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    torch.manual_seed(0)
    special = {
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": 512, "dtype": "float32",
    }  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings_for(folder: str, placement: str, evaluates: bool) -> Any:
    """What a rank's job is composed of."""
    from heretic_ds.cli import compose

    phases = ("capture", "evaluate") if evaluates else ("capture",)
    return compose(
        [
            folder, "prompts=demo", *(f"{phase}={placement}" for phase in phases), "model.dtype=float32",
            f"prompts.target.train.slice=0:{TRAIN // 2}", f"prompts.baseline.train.slice=0:{TRAIN // 2}",
            f"prompts.target.eval.slice=0:{EVALUATED}", f"prompts.baseline.eval.slice=0:{EVALUATED}",
            f"generation.max_new_tokens={NEW_TOKENS}", f"generation.batch_size={BATCH}", "model.device=cpu",
            f"search.trials_per_pass={EDITS}",
        ]
    )  # fmt: skip


def measure(folder: str, placement: str, evaluates: bool) -> None:
    """What one rank does; rank 0 prints every rank's figures, and what the planner says of them."""
    import torch

    from heretic_ds.job import Job
    from heretic_ds.memory import peak_memory
    from heretic_ds.placements import build_engine
    from heretic_ds.planner import machine_here
    from heretic_ds.world import World

    world, device = World.join(), torch.device("cpu")
    if not placement:  # what measures takes memory of its own, so it is a job by itself; the others read what it kept
        machine_here(device, world)
        if world.decides:
            print(MARK + "{}", flush=True)
        world.leave()
        return
    settings = settings_for(folder, placement, evaluates)
    job = Job.check(settings, world)
    machine = machine_here(device, world)
    peaks, started = {"libraries": peak_memory()["host"]}, time.perf_counter()
    engine = build_engine(job, "evaluate" if evaluates else "capture")
    seconds, peaks["load"] = {"load": time.perf_counter() - started}, peak_memory()["host"]
    rows = [*job.prompts("target.train").rows, *job.prompts("baseline.train").rows]
    seconds["capture"] = _shortest(lambda: engine.capture(rows))
    peaks["capture"] = peak_memory()["host"]
    if evaluates:
        seconds["trial"] = _try_edits(job, engine, peaks) / EDITS
    ranks = world.gather({"peaks": peaks, "seconds": seconds})
    predicted = _predicted(job, machine, world.size, placement, evaluates)
    if world.decides:
        told = {"ranks": ranks, "predicted": predicted, "machine": asdict(machine)}
        print(MARK + json.dumps(told), flush=True)
    engine.close()
    world.leave()


def _try_edits(job: Any, engine: Any, peaks: dict[str, int]) -> float:
    """Seconds of a pass of trials; weights are edited after it."""
    import torch

    from heretic_ds.ablation import Ablation, Edit, Profile
    from heretic_ds.memory import peak_memory
    from heretic_ds.scoring.kl import Divergence

    blocks, width = job.anatomy.n_blocks, job.anatomy.width
    directions_LD = torch.randn((blocks + 1, width), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    profile = Profile(1.0, 0.8 * blocks, 0.3, 0.3 * blocks)  # as the search draws them: the upper half of the blocks
    edits = [Edit(index * blocks, {"attention": profile, "mlp": profile}) for index in (0.5, 0.7)]
    baseline, target = job.prompts("baseline.eval").rows, job.prompts("target.eval").rows
    reference = Divergence().begin(engine, baseline)
    engine.prepare(Ablation(torch.nn.functional.normalize(directions_LD, dim=-1), "full", False))

    def trials() -> None:
        reference.of(edits)
        engine.generate(target, edits)

    seconds = _shortest(trials)
    peaks["trial"] = peak_memory()["host"]
    everywhere = Profile(
        1.0, 0.6 * blocks, 0.3, 0.7 * blocks
    )  # the widest that a search draws: originals of all writers
    engine.apply(Edit(0.5 * blocks, {"attention": everywhere, "mlp": everywhere}))
    reference.of([None])
    engine.restore()
    peaks["edit"] = peak_memory()["host"]
    return seconds


def _shortest(work: Any) -> float:
    """Seconds of the shortest of three runs, of which the first sets things up; of two where they are long."""
    found: list[float] = []
    while len(found) < 2 or (len(found) < 3 and found[-1] <= LONG):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


def predict_anew(measured: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A row with what the planner says now of what was measured then, on the machine as it was measured then."""
    from heretic_ds.job import Job
    from heretic_ds.placements.costs import Machine
    from heretic_ds.world import World

    model, placement = measured["model"], measured["placement"]
    evaluates, ranks = PLACEMENTS[placement].evaluates, measured["ranks"]
    job = Job.check(settings_for(str(folder), placement, evaluates), World())
    predicted = _predicted(job, Machine(**measured["hardware"]), len(ranks), placement, evaluates)
    return row(model, placement, {"ranks": ranks, "predicted": predicted, "machine": measured["hardware"]})


def _predicted(job: Any, machine: Any, ranks: int, placement: str, evaluates: bool) -> dict[str, Any]:
    """What the planner says of this job, by phase."""
    from heretic_ds.placements import placements_of
    from heretic_ds.placements.costs import Resources
    from heretic_ds.planner import facts_of

    lengths = {name: [len(row) for row in job.prompts(name).rows] for name in job.texts}
    facts = facts_of(job.opened, job.anatomy, job.settings, lengths)
    placed = placements_of(job.settings)
    phases = ("capture", "evaluate") if evaluates else ("capture",)
    told = {}
    for phase in phases:
        cost = placed[phase].cost(facts, Resources(machine, ranks))
        if cost is None:
            raise RuntimeError(f"{placement} does not say what it takes")
        told[phase] = asdict(cost)
    return told


def wanted(only: str) -> list[tuple[str, str, int]]:
    """Models, placements and numbers of ranks to measure; experts are shared out where there are some."""
    rows = [
        (model, placement, ranks)
        for model, (kind, _) in MODELS.items()
        for placement, placed in PLACEMENTS.items()
        for ranks in placed.ranks
        if placement != "expert_parallel" or kind != "llama"
    ]
    return [row for row in rows if only in " ".join(map(str, row))]


def _key(measured: dict[str, Any]) -> tuple[str, str, int]:
    return measured["model"], measured["placement"], len(measured["ranks"])


def measure_rows(options: argparse.Namespace, rows: list[dict[str, Any]], made: Path) -> None:
    """Measure what is wanted and not yet among the rows, or predict anew what is; kept after each."""
    if not options.predict:  # what a job takes that measures the machine is none of the other jobs'
        for ranks in sorted({ranks for _, _, ranks in wanted(options.only)}):
            from_ranks(__file__, ranks, ["", "", "0"], MARK, seconds=300)
    for model, placement, ranks in wanted(options.only):
        at = next((n for n, each in enumerate(rows) if _key(each) == (model, placement, ranks)), None)
        if (at is None) is options.predict:
            continue
        folder = (options.work or made) / model.replace(" ", "_").replace(",", "")
        if not folder.exists():
            make_model(folder, *MODELS[model])
        if at is not None:
            rows[at] = predict_anew(rows[at], folder)
            continue
        arguments = [str(folder), placement, str(int(PLACEMENTS[placement].evaluates))]
        figures = from_ranks(__file__, ranks, arguments, MARK, seconds=900)
        if options.untimed:
            figures["ranks"] = [{**each, "seconds": {}} for each in figures["ranks"]]
        rows.append(row(model, placement, figures))
        print(table(rows[-1:], []).splitlines()[2], flush=True)
        keep_rows(options.result, rows)


def keep_rows(result: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the order of the tables above."""
    order = [list(MODELS), list(PLACEMENTS)]
    rows.sort(key=lambda each: (order[0].index(each["model"]), order[1].index(each["placement"]), len(each["ranks"])))
    keep(result, {"asked": ASKED, "rows": rows, "orders": orders(rows, RANKS), "threads_a_rank": 1})


def main() -> int:
    if "--rank" in sys.argv:
        folder, placement, evaluates = sys.argv[sys.argv.index("--rank") + 1 :][:3]
        measure(folder, placement, bool(int(evaluates)))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--only", default="", help="rows whose model, placement and ranks hold this text")
    parser.add_argument("--untimed", action="store_true", help="keep no seconds of what is measured")
    parser.add_argument("--add", action="store_true", help="go on: measure only rows that are not in the file")
    parser.add_argument("--predict", action="store_true", help="measure nothing: predict the file's rows anew")
    parser.add_argument("--work", type=Path, help="folder for models, which are kept and used again")
    options = parser.parse_args()
    known = options.add or options.predict
    rows: list[dict[str, Any]] = json.loads(options.result.read_text())["rows"] if known else []
    with tempfile.TemporaryDirectory(prefix="planner_accuracy_") as made:
        measure_rows(options, rows, Path(made))
    keep_rows(options.result, rows)
    print(table(rows, orders(rows, RANKS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
