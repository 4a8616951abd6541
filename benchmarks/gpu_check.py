"""Placements on a GPU: first whether they compute the same, then how fast they are.

Needs: a CUDA device; for ``kernel_inject`` DeepSpeed's kernels, either the CUDA toolkit to build them or a built file
named in HERETIC_DS_INFERENCE_OP; disk for a random llama (16 GB for the shape 8b), written once into ``--folder``.
Takes some minutes beside building the kernels. Leaves ``benchmarks/results/gpu_check.json``, or ``--result``.

    python benchmarks/gpu_check.py [--shape 8b|1b|tiny] [--folder FOLDER] [--only parity speed zero3]

Every measurement runs in a process of its own, so that one which dies, as a wrong kernel can make it, costs itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import keep

RESULT = Path(__file__).resolve().parent / "results" / "gpu_check.json"
SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip
PLACEMENTS = ("replicated", "tensor_parallel", "kernel_inject")
DTYPES = ("float32", "bfloat16", "float16")
BATCHES = (1, 8, 32, 128)
PROMPTS, PROMPT_WORDS, NEW_TOKENS = 128, 64, 64
MOST_SECONDS = 3600
"""What a measurement may take before it is given up."""
DEVICE_BUDGET = 0.4
"""Device memory that the capture with offload may use, as a part of the weights' own size."""
WORDS = 500
EDIT = {
    "direction_index": None,
    "profiles": {
        part: {"max_weight": 1.0, "max_weight_position": 1.0, "min_weight": 0.5, "min_weight_distance": 1e3}
        for part in ("attention", "mlp")
    },
}


@dataclass(frozen=True)
class Stage:
    """One measurement."""

    kind: str
    placement: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.kind} {self.placement} {self.dtype}"


def stages(kinds: list[str]) -> list[Stage]:
    """All measurements in order: parity before speed, and what the others are compared with first."""
    of_kind = {
        "parity": [Stage("parity", placement, dtype) for placement in PLACEMENTS for dtype in DTYPES],
        "speed": [Stage("speed", placement, "bfloat16") for placement in PLACEMENTS],
        "zero3": [Stage("zero3", "zero3", "bfloat16")],
    }
    return [stage for kind in of_kind if kind in kinds for stage in of_kind[kind]]


def rounds(all_stages: list[Stage], at_once: int) -> list[list[Stage]]:
    """Measurements that run side by side: parity that has its reference already; whatever is timed runs alone."""
    alone = [stage for stage in all_stages if stage.kind != "parity"]
    parities = [stage for stage in all_stages if stage.kind == "parity"]
    later = parities[1:]
    beside = [later[at : at + at_once] for at in range(0, len(later), at_once)]
    return [*([parity] for parity in parities[:1]), *beside, *([stage] for stage in alone)]


def make_model(folder: Path, shape: str, device: str) -> None:
    """Write a random llama with a tokenizer of numbered words, and prompts made of them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # gains of 1 would hide a norm that is left out
                parameter.add_(torch.rand_like(parameter) - 0.5)
    model.save_pretrained(folder)
    words = ["<pad>", "<bos>", "<eos>", *(f"w{number}" for number in range(WORDS - 3))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    numbers = torch.randint(3, WORDS - 3, (PROMPTS, PROMPT_WORDS), generator=torch.Generator().manual_seed(1)).tolist()
    lines = [" ".join(f"w{number}" for number in row[: PROMPT_WORDS - i % 8]) for i, row in enumerate(numbers)]
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n")


def model_in(folder: Path, shape: str) -> Path:
    """The folder of the model of a shape, which is written where it is not there yet."""
    import torch

    model = folder.resolve() / shape
    if not (model / "prompts.txt").is_file():
        model.mkdir(parents=True, exist_ok=True)
        make_model(model, shape, "cuda")
        torch.cuda.empty_cache()
    return model


def engine_of(folder: Path, placement: str, dtype: str, phase: str, *overrides: str) -> tuple[Any, list[list[int]]]:
    """The engine of a placement as a run would build it, and the prompts."""
    from heretic_ds.cli import compose
    from heretic_ds.job import Job
    from heretic_ds.placements import build_engine
    from heretic_ds.world import World

    parts = [
        f"prompts.{kind}.{part}.source={folder}/prompts.txt"
        for kind in ("target", "baseline")
        for part in ("train", "eval")
    ]
    words = [str(folder), f"{phase}={placement}", f"model.dtype={dtype}", f"generation.max_new_tokens={NEW_TOKENS}"]
    job = Job.check(compose([*words, "generation.batch_size=16", *parts, *overrides]), World.join())
    return build_engine(job, phase), job.prompts("target.eval").rows


def parity(folder: Path, placement: str, dtype: str) -> dict[str, Any]:
    """Teacher-forced logits, captured means, and the KL of one edit, beside those of ``replicated`` in float32.

    That one leaves its own numbers in the folder for the others.
    """
    import torch

    from heretic_ds.ablation import Ablation, Edit
    from heretic_ds.placements.kernel_inject import parity as forced
    from heretic_ds.scoring.kl import Divergence

    engine, rows = engine_of(folder, placement, dtype, "evaluate")
    file = folder / "reference.pt"
    means_LD = engine.capture(rows[:32])
    generator = torch.Generator().manual_seed(2)
    directions_LD = torch.nn.functional.normalize(torch.randn(means_LD.shape, generator=generator).double(), dim=-1)
    engine.prepare(Ablation(directions_LD, "full", False))
    before = {writer.weight: writer.weight_DK(engine.model).cpu().clone() for writer in engine.anatomy.writers[:4]}
    original = Divergence().begin(engine, rows[:32])
    kl = original.of([Edit.from_dict(EDIT)])[0]
    engine.restore()
    restored = all(torch.equal(w.weight_DK(engine.model).cpu(), before[w.weight]) for w in engine.anatomy.writers[:4])
    if placement == "replicated" and dtype == "float32":
        torch.save({"sample": forced.sample(engine.model), "means": means_LD, "kl": kl}, file)
    expected = torch.load(file, weights_only=False)
    means_error = (means_LD - expected["means"]).norm(dim=-1) / expected["means"].norm(dim=-1)
    error = forced.error_of(engine.model, engine.traits.decoding, expected["sample"])
    return {
        "right": restored and error <= forced.tolerance(engine.dtype),
        "logits_error_of_spread": error,
        "means_error": means_error.max().item(),
        "kl_of_an_edit": kl,
        "kl_error": abs(kl - expected["kl"]) / expected["kl"],
        "restored_bit_for_bit": restored,
    }


def speed(folder: Path, placement: str, dtype: str) -> dict[str, Any]:
    """Seconds for each step of decoding, by rows in the batch; prompts included, after a first run."""
    import torch

    engine, rows = engine_of(folder, placement, dtype, "evaluate")
    engine._ends = frozenset()  # every answer is as long as it may be
    result = {}
    for batch in BATCHES:
        engine.batch_sizes["generate"] = batch
        for _ in range(2):
            _wait(torch)
            started = time.perf_counter()
            answers = engine.generate(rows[:batch], [None])[0]
            _wait(torch)
            seconds = time.perf_counter() - started
        tokens = sum(len(answer) for answer in answers)
        result[str(batch)] = {"seconds_per_step": seconds / NEW_TOKENS, "tokens_per_second": tokens / seconds}
    return {"prompt_words": PROMPT_WORDS, "new_tokens": NEW_TOKENS, "by_rows": result, **_memory(torch)}


def zero3(folder: Path, placement: str, dtype: str) -> dict[str, Any]:
    """Residuals captured with weights in host memory, on a device that is not allowed to hold them all."""
    import torch

    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    tables = 1 if config.get("tie_word_embeddings") else 2  # embedding and head, which offload leaves there
    outside = 2 * tables * config["vocab_size"] * config["hidden_size"]
    budget = max(int(DEVICE_BUDGET * size), 1 << 30)
    if outside > budget / 2:  # a small model with many words: nothing could be gathered beside these
        budget = outside + int(DEVICE_BUDGET * (size - outside))
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(budget / torch.cuda.get_device_properties(0).total_memory)
    offload = "cpu" if torch.cuda.is_available() else "none"
    engine, rows = engine_of(folder, placement, dtype, "capture", f"capture.offload={offload}")
    started = time.perf_counter()
    means_LD = engine.capture(rows[:32])
    seconds, expected_LD = (
        time.perf_counter() - started,
        torch.load(folder / "reference.pt", weights_only=False)["means"],
    )
    error = ((means_LD - expected_LD).norm(dim=-1) / expected_LD.norm(dim=-1)).max().item()
    return {
        "weights_bytes": size,
        "device_budget_bytes": budget,
        "offload": offload,
        "seconds": seconds,
        "tokens_per_second": sum(len(row) for row in rows[:32]) / seconds,
        "means_error": error,
        **_memory(torch),
    }


KINDS: dict[str, Callable[[Path, str, str], dict[str, Any]]] = {"parity": parity, "speed": speed, "zero3": zero3}


def _wait(torch: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _memory(torch: Any) -> dict[str, Any]:
    return {"peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0}


def run_apart(stage: Stage, folder: Path, script: str = __file__) -> dict[str, Any]:
    """The numbers of one measurement of a script, or ``{"error": ...}`` with the last line that its process left; the
    folder keeps what it said of errors."""
    command = [sys.executable, script, "--folder", str(folder), "--stage", stage.kind, stage.placement, stage.dtype]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired as ended:
        _keep(folder, stage, ended.stderr or b"")
        return {"error": f"not done after {MOST_SECONDS} s", "seconds_in_all": round(time.perf_counter() - started, 1)}
    taken = {"seconds_in_all": round(time.perf_counter() - started, 1)}
    for line in reversed(done.stdout.splitlines()):
        if done.returncode == 0 and line.startswith("{"):
            return json.loads(line) | taken
    _keep(folder, stage, done.stderr.encode())
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"error": lines[-1] if lines else f"exit status {done.returncode}"} | taken


def _keep(folder: Path, stage: Stage, said: bytes) -> None:
    if folder.is_dir():
        (folder / f"{stage.name}.log").write_bytes(said)


def write(result: Path, shape: str, found: dict[str, dict[str, Any]]) -> None:
    """Keep what was found; measurements of an earlier run of the same shape stay where they were not made again."""
    earlier = json.loads(result.read_text()) if result.is_file() else {}
    kept = earlier.get("measurements", {}) if earlier.get("shape") == shape else {}
    report = {
        "what": "placements on one GPU: errors beside replicated in float32, then speed",
        "shape": shape,
        "model": SHAPES[shape],
        "measurements": kept | found,
    }
    keep(result, report, gpu=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "gpu_check")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--at-once", type=int, default=1, help="parity measurements side by side; speed is taken alone")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--stage", nargs=3, metavar=("KIND", "PLACEMENT", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stage:
        kind, placement, dtype = options.stage
        print(json.dumps(KINDS[kind](options.folder, placement, dtype)))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device, and this machine has none that PyTorch can use", file=sys.stderr)
        return 2
    folder = model_in(options.folder, options.shape)
    failed: list[str] = []
    for together in rounds(stages(options.only), options.at_once):
        # The speed of what is wrong is no figure.
        due = [s for s in together if s.kind != "speed" or s.placement not in {name.split()[1] for name in failed}]
        with ThreadPoolExecutor(options.at_once) as pool:
            measured = list(pool.map(lambda stage: run_apart(stage, folder), due))
        for stage, found in zip(due, measured, strict=True):
            print(f"{stage.name}: {json.dumps(found)}", flush=True)
            write(options.result, options.shape, {stage.name: found})
            if not found.get("right", "error" not in found):
                failed.append(stage.name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
