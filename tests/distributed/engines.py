"""What distributed tests run on every rank: an engine by its settings, and all that it can be asked for."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from heretic_ds.ablation import ROW_NORMS, Ablation, Edit, Profile, aligned
from heretic_ds.anatomy import find_anatomy
from heretic_ds.checkpoint.open import ModelChoice, open_model
from heretic_ds.errors import UserError
from heretic_ds.job import Job
from heretic_ds.placements import placements_of
from heretic_ds.runner.engine import Runner
from heretic_ds.scoring.kl import Divergence
from heretic_ds.settings import Settings
from heretic_ds.world import World
from tests import families

LENGTHS = (9, 4, 6, 11, 5, 8, 7)
NEW_TOKENS = 6
EDIT = Edit(0.4, {"attention": Profile(1.1, 1.0, 0.4, 1.5), "mlp": Profile(0.9, 0.0, 0.3, 1.0)})


CLASSES = {
    "vllm": "vllm.Vllm",
    "replicated": "replicated.Replicated",
    "zero3": "zero3.Zero3",
    "tensor_parallel": "tensor_parallel.TensorParallel",
    "expert_parallel": "expert_parallel.ExpertParallel",
    "fsdp": "fsdp.Fsdp",
    "pipeline": "pipeline.Pipeline",
    "tensor_pipeline": "tensor_pipeline.TensorPipeline",
}


def target(placement: str, **options: Any) -> dict[str, Any]:
    """A placement and its options as a phase's settings name them."""
    return {"_target_": f"heretic_ds.placements.{CLASSES[placement]}", **options}


def build(job: Job, placement: str, **options: Any) -> Any:
    """The engine of a placement, unchecked."""
    job.settings.evaluate = target(placement, **options)
    return placements_of(job.settings)["evaluate"].build(job)


def prompts(count: int = len(LENGTHS)) -> list[list[int]]:
    """Rows of random characters, of unlike lengths."""
    generator = torch.Generator().manual_seed(7)
    low, high = len(families.SPECIAL_TOKENS), len(families.VOCABULARY) - 5
    rows = [torch.randint(low, high, (length,), generator=generator).tolist() for length in LENGTHS]
    return rows[:count]


def job_for(world: World, folder: str, batch_size: int = 3, dtype: str = "float32") -> Job:
    """What engines are built from, for the model in `folder`."""
    settings = Settings(capture=target("replicated"), evaluate=target("replicated"))
    settings.model.path, settings.model.dtype, settings.model.device = folder, dtype, "cpu"
    settings.generation.max_new_tokens, settings.generation.batch_size = NEW_TOKENS, batch_size
    opened = open_model(ModelChoice(**asdict(settings.model)))
    return Job(settings, world, opened, find_anatomy(opened.skeleton()), None, [])  # type: ignore[arg-type]


def ablation_for(engine: Runner, row_norm: str, through_norm: bool = False, rank: int = 1) -> Ablation:
    """Random directions, the same in every process."""
    generator = torch.Generator().manual_seed(3)
    shape = (engine.anatomy.n_blocks + 1, engine.anatomy.width)
    if rank > 1:
        vectors_LDR = torch.randn(*shape, rank, generator=generator, dtype=torch.float64)
        return Ablation(aligned(torch.linalg.qr(vectors_LDR).Q.transpose(-1, -2)), row_norm, through_norm)
    directions_LD = torch.randn(shape, generator=generator, dtype=torch.float64)
    return Ablation(torch.nn.functional.normalize(directions_LD, dim=-1), row_norm, through_norm)


def measure(engine: Runner, count: int = len(LENGTHS)) -> dict[str, Any]:
    """Everything an engine says about one model: unedited, edited in every mode, and restored."""
    rows = prompts(count)
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    found: dict[str, Any] = {"means": engine.capture(rows)}
    engine.prepare(ablation_for(engine, "none"))
    reference = Divergence().begin(engine, rows)
    found["answers"] = {"original": engine.generate(rows, [None])[0]}
    found["kl"] = {"original": reference.of([None])[0]}
    for row_norm in ROW_NORMS:
        engine.prepare(ablation_for(engine, row_norm, through_norm=row_norm == "pre"))
        found["answers"][row_norm] = engine.generate(rows, [EDIT])[0]
        found["kl"][row_norm] = reference.of([EDIT])[0]
    engine.restore()
    after = engine.model.state_dict()
    found["restored"] = all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    found["bytes"] = sum(p.numel() * p.element_size() for p in engine.model.parameters())
    return found


def measure_tensor_parallel(
    world: World, folder: str, degree: int, backend: str = "auto", count: int = len(LENGTHS)
) -> dict[str, Any]:
    """:func:`measure` on the placement `tensor_parallel`."""
    engine = build(job_for(world, folder), "tensor_parallel", degree=degree, backend=backend)
    weights = [weakref.ref(parameter) for parameter in engine.model.parameters()]
    found = measure(engine, count)
    engine.close()
    gc.collect()
    found["released"] = all(weight() is None for weight in weights)
    return found


def refusal(world: World, folder: str, degree: int, backend: str = "auto", dtype: str = "float32") -> str:
    """The message with which the placement `tensor_parallel` refuses a model; "accepted" where it does not."""
    job = job_for(world, folder, dtype=dtype)
    job.settings.evaluate = target("tensor_parallel", degree=degree, backend=backend)
    placement = placements_of(job.settings)["evaluate"]
    try:
        world.agree(lambda: placement.check(job))
        placement.build(job).close()
    except UserError as error:
        return str(error)
    return "accepted"


def dtype_reached(world: World, folder: str, phase: str, placement: str) -> str:
    """The dtype that a placement ends with where it tries float16 first, then float32."""
    from heretic_ds.checkpoint.open import OpenedModel
    from heretic_ds.placements import build_engine

    job = job_for(world, folder)
    options = {"backend": "hf_plan"} if placement == "tensor_parallel" else {}  # DeepSpeed takes no float16 on a CPU
    setattr(job.settings, phase, target(placement, **options))
    with (
        mock.patch.object(OpenedModel, "dtypes", [torch.float16, torch.float32]),
        contextlib.closing(build_engine(job, phase)) as engine,
    ):
        return str(engine.dtype)


def dtype_reached_by_all(world: World, folder: str, phase: str, placement: str, lacks: int) -> str:
    """:func:`dtype_reached` of a llama where one rank alone cannot run a block in float16."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    whole = LlamaMLP.forward

    def forward(self: torch.nn.Module, hidden_BSD: torch.Tensor) -> torch.Tensor:
        if hidden_BSD.dtype == torch.float16 and world.rank == lacks:
            raise RuntimeError("not implemented for 'Half'")
        return whole(self, hidden_BSD)

    with mock.patch.object(LlamaMLP, "forward", forward):
        return dtype_reached(world, folder, phase, placement)


def measure_replicated(folder: Path, count: int = len(LENGTHS)) -> dict[str, Any]:
    """:func:`measure` on the placement `replicated`, in this process alone, by whole passes."""
    job = job_for(World(), str(folder))
    job.settings.generation.prefill_reuse = False
    with contextlib.closing(build(job, "replicated")) as engine:
        return measure(engine, count)


LATE = [
    Edit(0.4, {"attention": Profile(1.2, 3.0, 0.4, reach), "mlp": Profile(0.9, 3.0, 0.3, 0.5)}) for reach in (1.5, 2.5)
]
"""Edits of models with four blocks that begin with the third and the second one."""


def measure_late_starts(world: World, folder: str, degree: int, reuse: bool = True) -> dict[str, Any]:
    """Scores of edits that begin late, on prompts that begin alike, and what passes over them may start from."""
    from heretic_ds.runner import reuse as passes

    job, rows = job_for(world, folder), [prompts()[3][:5] + row for row in prompts()]
    job.settings.generation.prefill_reuse = reuse
    engine = build(job, "tensor_parallel", degree=degree)
    engine.prepare(ablation_for(engine, "full"))
    reference = Divergence().begin(engine, rows)
    found: dict[str, Any] = {"kl": [], "answers": []}
    with contextlib.closing(engine), mock.patch.object(passes, "PASS_IN_TOKENS", 1):
        for edits in (LATE[:1], LATE, [None, LATE[1]]):
            found["kl"] += reference.of(edits)
            found["answers"].append(engine.generate(rows, edits))
        found["starts"] = [(s.boundaries, len(s.shared)) for s in engine._forward._kept.values() if s]
    return found


def refusal_of_a_wrong_sum(world: World, folder: str) -> str:
    """The message that a sum over the wrong ranks leads to: what a backend gets wrong without a word."""
    import torch.distributed as dist

    original = dist.all_reduce

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    dist.all_reduce = nothing
    try:
        return refusal(world, folder, 2, "hf_plan")
    finally:
        dist.all_reduce = original


def memory_of_loading(world: World, folder: str, backend: str, parity_check: bool) -> dict[str, int]:
    """Bytes of host memory that loading took at its peak above what was used before, and what is held afterwards."""
    import deepspeed  # noqa: F401 - its modules are no part of the model

    job = job_for(world, folder)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier models left behind would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is used now
    before = _status("VmHWM")
    engine = build(job, "tensor_parallel", degree=world.size, backend=backend, parity_check=parity_check)
    peak = _status("VmHWM") - before
    held = sum(p.numel() * p.element_size() for p in engine.model.parameters())
    largest = max(p.numel() * p.element_size() for p in engine.model.parameters())
    engine.close()
    return {"peak": peak, "held": held, "largest": largest}


def _status(field: str) -> int:
    """Bytes that the kernel reports for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
