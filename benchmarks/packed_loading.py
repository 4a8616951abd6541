"""FP8 and MXFP4 checkpoints laid out over two ranks, beside one rank and the dequantised checkpoint: memory a rank.

    python benchmarks/packed_loading.py [--result FILE] [--rounds 3] [--only TEXT]

Needs: the package and its tests beside it, two cores, some 3 GB of memory and 2 GB of disk, no GPU and no network. The
models are random, some 350 MB each in bfloat16, and made anew in a temporary folder: a Qwen3-MoE in FP8 with blocks of
128 by 128, and a gpt-oss whose experts are in MXFP4. Each row is a job of its own through DeepSpeed's launcher, one
thread a rank; its files are in the page cache. Leaves ``benchmarks/results/packed_loading.json`` and prints a table.

``transformers`` is its own loading that dequantises, by one process. Scores are the KL divergence of one edit on
prompts of the demo, in bfloat16. With ``--only`` other rows stay as an earlier run left them in the result.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import keep
from placements import _partition, from_ranks

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "packed_loading.json"
MARK = "packed loading figures: "
ROWS = [
    # checkpoint, placement, ranks
    ("plain", "replicated", 1),
    ("plain", "tensor_parallel", 2),
    ("plain", "fsdp", 2),
    ("plain", "pipeline", 2),
    ("packed", "transformers", 1),
    ("packed", "replicated", 1),
    ("packed", "tensor_parallel", 2),
    ("packed", "fsdp", 2),
    ("packed", "pipeline", 2),
]
_FP8_BLOCK = (128, 128)


def make_models(folder: Path, kind: str) -> dict[str, int]:
    """Write a model packed and as it is dequantised; returns the bytes of the weight files of both."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig, Qwen3MoeConfig

    from heretic_ds.checkpoint.open import ModelChoice, load_weights, open_model
    from heretic_ds.demo import demo_model_dir
    from heretic_ds.export.checkpoint import export_model

    sys.path.insert(0, str(ROOT))
    from tests.packed import packed_fp8, packed_mxfp4, rewrite, state_packing

    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 64, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id, "num_experts_per_tok": 4,
    }  # fmt: skip
    config = (
        Qwen3MoeConfig(**shape, moe_intermediate_size=512, num_experts=16)
        if kind == "fp8"
        else GptOssConfig(**shape, intermediate_size=1024, num_local_experts=8)
    )
    packed = folder / "packed"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(packed)
    tokenizer.save_pretrained(packed)

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if kind == "fp8" and name.endswith("_proj.weight"):
                tensors[name], tensors[f"{name}_scale_inv"] = packed_fp8(tensors[name], _FP8_BLOCK)
            elif name.endswith(("gate_up_proj", "down_proj")):
                tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = packed_mxfp4(tensors.pop(name))

    rewrite(packed, pack)
    stated = {"weight_block_size": list(_FP8_BLOCK)} if kind == "fp8" else {}
    state_packing(packed, quant_method=kind, modules_to_not_convert=["lm_head"], **stated)
    loaded = load_weights(open_model(ModelChoice(path=str(packed), device="cpu")))
    export_model(loaded, folder / "plain", "the same, dequantised", {"schema": 1})
    return {
        name: sum(file.stat().st_size for file in (folder / name).glob("*.safetensors")) for name in ("packed", "plain")
    }


def measure(folder: str, placement: str, rounds: int) -> None:
    """What one rank does: lay the model out some times, score an edit; rank 0 prints every rank's figures."""
    import torch

    from heretic_ds.cli import compose
    from heretic_ds.job import Job
    from heretic_ds.memory import give_back_memory, peak_of
    from heretic_ds.placements import build_engine
    from heretic_ds.world import World

    world = World.join()
    chosen = "replicated" if placement == "transformers" else placement
    extra = ["evaluate.parity_check=false"] if placement in ("tensor_parallel", "pipeline") else []
    settings = compose(
        [
            folder, "prompts=demo", f"evaluate={chosen}", "generation.batch_size=16", "model.device=cpu",
            "model.dtype=bfloat16", *extra,
        ]
    )  # fmt: skip
    job = Job.check(settings, world)
    loads: list[dict[str, Any]] = []
    kl = None
    for turn in range(rounds + 1):  # the first pays for what is set up lazily
        found: dict[str, Any] = {}

        def load(found: dict[str, Any] = found) -> None:
            started = time.perf_counter()
            found["engine"] = _by_transformers(folder) if placement == "transformers" else build_engine(job, "evaluate")
            found["seconds"] = time.perf_counter() - started

        give_back_memory()
        world.gather(None)
        found["peak_bytes"] = peak_of(load, torch.device("cpu"))
        engine: Any = found.pop("engine")
        model = engine if placement == "transformers" else engine.model
        parts = [_partition(parameter) for parameter in model.parameters()]
        found["held_bytes"] = sum(part.numel() * part.element_size() for part in parts)
        if placement != "transformers":
            kl = _score(job, engine) if turn == rounds else kl
            engine.close()
        loads += [found] if turn else []
        del engine, model, parts
    ranks = world.gather({"loads": loads, "kl": kl})
    if world.decides:
        print(MARK + json.dumps(ranks), flush=True)
    world.leave()


def _by_transformers(folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

    method = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["quant_method"]
    config = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}[method](dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


def _score(job: Any, engine: Any) -> float:
    """KL divergence of an edit along random directions, on some prompts."""
    import torch

    from heretic_ds.ablation import Ablation, Edit, Profile
    from heretic_ds.scoring.kl import Divergence

    generator = torch.Generator().manual_seed(3)
    shape = (engine.anatomy.n_blocks + 1, engine.anatomy.width)
    directions_LD = torch.randn(shape, generator=generator, dtype=torch.float64)
    engine.prepare(Ablation(torch.nn.functional.normalize(directions_LD, dim=-1), "full", False))
    reference = Divergence().begin(engine, job.prompts("baseline.eval").rows[:16])
    edit = Edit(0.4, {"attention": Profile(1.1, 1.0, 0.4, 3.0), "mlp": Profile(0.9, 0.0, 0.3, 3.0)})
    return float(reference.of([edit])[0])


def summed_up(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds: of the slower rank's seconds, of each rank's bytes."""
    turns = list(zip(*(rank["loads"] for rank in ranks), strict=True))
    seconds = [max(rank["seconds"] for rank in turn) for turn in turns]
    row: dict[str, Any] = {"seconds": round(statistics.median(seconds), 3), "kl": ranks[0]["kl"]}
    row["seconds_of_rounds"] = [round(each, 3) for each in seconds]
    for key in ("held_bytes", "peak_bytes"):
        row[f"{key}_a_rank"] = [round(statistics.median(turn[r][key] for turn in turns)) for r in range(len(ranks))]
    return row


def _place(row: dict[str, Any]) -> int:
    return ROWS.index((row["checkpoint"], row["placement"], row["ranks"]))


def table(models: dict[str, Any]) -> str:
    """The figures as Markdown, of the rank that takes most."""
    lines = [
        "| model | files | placement | ranks | weights a rank MB | peak a rank MB | seconds | KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, model in models.items():
        for row in model["rows"]:
            kl = "-" if row["kl"] is None else f"{row['kl']:.10f}"
            held, peak = (max(row[f"{key}_bytes_a_rank"]) / 1e6 for key in ("held", "peak"))
            lines.append(
                f"| {kind} | {row['checkpoint']}, {model['file_bytes'][row['checkpoint']] / 1e6:.0f} MB | "
                f"{row['placement']} | {row['ranks']} | {held:.0f} | {peak:.0f} | {row['seconds']:.2f} | {kl} |"
            )
    return "\n".join(lines)


def main() -> int:
    if "--rank" in sys.argv:
        folder, placement, rounds = sys.argv[sys.argv.index("--rank") + 1 :]
        measure(folder, placement, int(rounds))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="rows that fit this regular expression")
    options = parser.parse_args()
    models: dict[str, Any] = {}
    if options.only and options.result.exists():
        models = json.loads(options.result.read_text(encoding="utf-8"))["models"]
    for kind in ("fp8", "mxfp4"):
        with tempfile.TemporaryDirectory(prefix="packed_loading_") as folder:
            model = models.setdefault(kind, {"rows": []})
            model["file_bytes"] = make_models(Path(folder), kind)
            for checkpoint, placement, ranks in ROWS:
                if not re.search(options.only, f"{kind} {checkpoint} {placement} {ranks}"):
                    continue
                given = [str(Path(folder) / checkpoint), placement, str(options.rounds)]
                found = summed_up(from_ranks(__file__, ranks, given, MARK, seconds=900))
                row = {"checkpoint": checkpoint, "placement": placement, "ranks": ranks, **found}
                others = [each for each in model["rows"] if _place(each) != _place(row)]
                model["rows"] = sorted([*others, row], key=_place)
                keep(options.result, {"models": models, "rounds": options.rounds, "threads_a_rank": 1})
    print(table(models))
    return 0


if __name__ == "__main__":
    sys.exit(main())
