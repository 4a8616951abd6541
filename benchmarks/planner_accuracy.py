"""The planner beside the truth: memory a rank and order by speed, predicted and measured, for every placement.

    python benchmarks/planner_accuracy.py [--result FILE] [--only TEXT] [--add | --predict] [--work FOLDER]

Needs: the package, no GPU and no network, some 8 GB of memory; the models are random ones of 30 to 400 million
parameters, dense and with experts, made anew in a temporary folder. Takes some 40 minutes: each row is a job of two
ranks of its own, one thread a rank. Leaves ``benchmarks/results/planner_accuracy.json`` and prints it as tables.

Memory is the highest resident set of a rank (VmHWM) with the libraries, which the planner counts as a measured
constant. A job captures, takes reference distributions, runs passes of two edits over distributions and answers, and
edits weights. Speed is the shortest of three runs. Kendall's tau compares the predicted with the measured order of the
placements of one model and phase: the pairs in the same order less the others, over all pairs. Ranks on shared cores
are timed, which other programs disturb.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from figures import keep
from placements import from_ranks

RESULT = Path(__file__).resolve().parent / "results" / "planner_accuracy.json"
MARK = "planner figures: "
RANKS = 2
TRAIN, EVALUATED, NEW_TOKENS, BATCH, EDITS = 32, 24, 12, 16, 2
ASKED = {
    "ranks": RANKS,
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
PLACEMENTS = {
    "replicated": True,
    "tensor_parallel": True,
    "pipeline": True,
    "expert_parallel": True,
    "fsdp": True,
    "zero3": False,
}
"""And whether they evaluate."""


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

    world = World.join()
    machine = machine_here(torch.device("cpu"), world)
    if (
        not placement
    ):  # a job that measures takes memory of its own, so it is one by itself; the others read what it kept
        if world.decides:
            print(MARK + "{}", flush=True)
        world.leave()
        return
    settings = settings_for(folder, placement, evaluates)
    job = Job.check(settings, world)
    peaks, started = {"libraries": peak_memory()["host"]}, time.perf_counter()
    engine = build_engine(job, "evaluate" if evaluates else "capture")
    seconds, peaks["load"] = {"load": time.perf_counter() - started}, peak_memory()["host"]
    rows = [*job.prompts("target.train").rows, *job.prompts("baseline.train").rows]
    seconds["capture"] = _shortest(lambda: engine.capture(rows))
    peaks["capture"] = peak_memory()["host"]
    if evaluates:
        seconds["trial"] = _try_edits(job, engine, peaks) / EDITS
    ranks = world.gather({"peaks": peaks, "seconds": seconds})
    predicted = _predicted(job, machine, placement, evaluates)
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
    evaluates, ranks = PLACEMENTS[placement], measured["ranks"]
    job = Job.check(settings_for(str(folder), placement, evaluates), World())
    predicted = _predicted(job, Machine(**measured["hardware"]), placement, evaluates)
    return row(model, placement, {"ranks": ranks, "predicted": predicted, "machine": measured["hardware"]})


def _predicted(job: Any, machine: Any, placement: str, evaluates: bool) -> dict[str, Any]:
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
        cost = placed[phase].cost(facts, Resources(machine, RANKS))
        if cost is None:
            raise RuntimeError(f"{placement} does not say what it takes")
        told[phase] = asdict(cost)
    return told


def row(model: str, placement: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Predicted and measured side by side."""
    ranks, predicted = figures["ranks"], figures["predicted"]
    peak = max(max(each["peaks"].values()) for each in ranks)
    said = max(sum(cost["bytes"].values()) + sum(cost["host"].values()) for cost in predicted.values())
    phases = {"capture": "capture", "trial": "evaluate"}
    seconds = {
        name: {
            "predicted": predicted[phase]["seconds"][name],
            "measured": max(each["seconds"][name] for each in ranks),
        }
        for name, phase in phases.items()
        if phase in predicted
    }
    return {
        "model": model,
        "placement": placement,
        "predicted_bytes": said,
        "measured_bytes": peak,
        "error": said / peak - 1,
        "seconds": seconds,
        "ranks": ranks,
        "predicted": predicted,
        "hardware": figures["machine"],
    }


def agreeing(pairs: list[tuple[float, float]]) -> list[bool]:
    """Of each two of predicted and measured numbers whether they are in the same order."""
    return [(a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in itertools.combinations(pairs, 2)]


def kendall(agree: list[bool]) -> float | None:
    """Kendall's tau of pairs; None where there are none."""
    return 2 * sum(agree) / len(agree) - 1 if agree else None


def orders(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kendall's tau of each model and phase, and of all pairs that have these in common."""
    found: list[dict[str, Any]] = []
    every: list[bool] = []
    for model in dict.fromkeys(each["model"] for each in rows):
        for phase in ("capture", "trial"):
            mine = [r["seconds"][phase] for r in rows if r["model"] == model and phase in r["seconds"]]
            agree = agreeing([(each["predicted"], each["measured"]) for each in mine])
            every += agree
            found.append({"model": model, "phase": phase, "pairs": len(agree), "tau": kendall(agree)})
    return [*found, {"model": "all", "phase": "both", "pairs": len(every), "tau": kendall(every)}]


def table(rows: list[dict[str, Any]], taus: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    mib = 2**20
    lines = [
        "| model | placement | predicted MiB | measured MiB | error | capture s, predicted | measured "
        "| trial s, predicted | measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        times = [
            f"{each['seconds'][phase][kind]:.2f}" if phase in each["seconds"] else "-"
            for phase in ("capture", "trial")
            for kind in ("predicted", "measured")
        ]
        sizes = (
            f"{each['predicted_bytes'] / mib:.0f} | {each['measured_bytes'] / mib:.0f} | {100 * each['error']:+.1f} %"
        )
        lines.append(f"| {each['model']} | {each['placement']} | {sizes} | {' | '.join(times)} |")
    lines += ["", "| model | phase | pairs | Kendall's tau |", "|---|---|---|---|"]
    for tau in taus:
        shown = "-" if tau["tau"] is None else f"{tau['tau']:.2f}"
        lines.append(f"| {tau['model']} | {tau['phase']} | {tau['pairs']} | {shown} |")
    return "\n".join(lines)


def wanted(only: str) -> list[tuple[str, str]]:
    """Models and placements to measure; experts are shared out where there are some."""
    pairs = [
        (model, placement)
        for model, (kind, _) in MODELS.items()
        for placement in PLACEMENTS
        if placement != "expert_parallel" or kind != "llama"
    ]
    return [pair for pair in pairs if only in " ".join(pair)]


def main() -> int:
    if "--rank" in sys.argv:
        folder, placement, evaluates = sys.argv[sys.argv.index("--rank") + 1 :][:3]
        measure(folder, placement, bool(int(evaluates)))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--only", default="", help="rows whose model and placement hold this text")
    parser.add_argument("--add", action="store_true", help="go on: measure only rows that are not in the file")
    parser.add_argument("--predict", action="store_true", help="measure nothing: predict the file's rows anew")
    parser.add_argument("--work", type=Path, help="folder for models, which are kept and used again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="planner_accuracy_") as made:
        known = options.add or options.predict
        rows: list[dict[str, Any]] = json.loads(options.result.read_text())["rows"] if known else []
        if not options.predict:
            from_ranks(__file__, RANKS, ["", "", "0"], MARK, seconds=300)
        for model, placement in wanted(options.only):
            at = next(
                (n for n, each in enumerate(rows) if (each["model"], each["placement"]) == (model, placement)), None
            )
            if (at is None) is options.predict:
                continue
            folder = (options.work or Path(made)) / model.replace(" ", "_").replace(",", "")
            if not folder.exists():
                make_model(folder, *MODELS[model])
            if at is not None:
                rows[at] = predict_anew(rows[at], folder)
                continue
            arguments = [str(folder), placement, str(int(PLACEMENTS[placement]))]
            rows.append(row(model, placement, from_ranks(__file__, RANKS, arguments, MARK, seconds=900)))
            print(table(rows[-1:], []).splitlines()[2], flush=True)
            keep(options.result, {"asked": ASKED, "rows": rows, "orders": orders(rows), "threads_a_rank": 1})
    rows.sort(key=lambda each: (list(MODELS).index(each["model"]), list(PLACEMENTS).index(each["placement"])))
    keep(options.result, {"asked": ASKED, "rows": rows, "orders": orders(rows), "threads_a_rank": 1})
    print(table(rows, orders(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
