"""What the tests of ``zero3`` run on every rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from heretic_ds.errors import UserError
from heretic_ds.job import Job
from heretic_ds.memory import give_back_memory
from heretic_ds.placements import build_engine, zero3
from heretic_ds.placements.deepspeed import Originals, start_deepspeed
from heretic_ds.placements.zero3.partitions import Partitions
from heretic_ds.world import World
from tests.distributed.engines import build, job_for, prompts, target

STOPS = frozenset(range(30, 70))
"""Tokens that end an answer: so many that answers end at every length."""


def zero3_job(world: World, folder: str, batch_size: int = 2, dtype: str = "float32", **capture: Any) -> Job:
    job = job_for(world, folder, batch_size, dtype)
    job.settings.capture = target("zero3", **capture)
    job.settings.generation.max_new_tokens = 12
    return job


def capture_and_answer(world: World, folder: str, counts: tuple[int, ...], **options: Any) -> dict[str, Any]:
    """Captured means and answers for the first prompts, so many as each of ``counts`` says."""
    engine = build_engine(zero3_job(world, folder, **options), "capture")
    assert engine.traits.name == "zero3" and not engine.traits.retries
    engine._ends = STOPS
    found: dict[str, Any] = {
        "means": [engine.capture(prompts(count)) for count in counts],
        "answers": [engine.generate(prompts(count), [None])[0] for count in counts],
        "whole": sum(parameter.ds_numel * parameter.element_size() for parameter in engine.model.parameters()),
        "held": sum(p.ds_tensor.numel() * p.element_size() for p in engine.model.parameters()),
        "batch_sizes": dict(engine.batch_sizes),
        "degree": engine.degree,
    }
    engine.close()
    return found


def capture_and_answer_whole(folder: Path, counts: tuple[int, ...], dtype: str = "float32") -> dict[str, Any]:
    """The same on the placement ``replicated``, in this process alone."""
    job = zero3_job(World(), str(folder), batch_size=7, dtype=dtype)
    engine = build(job, "replicated")
    engine._ends = STOPS
    found = {
        "means": [engine.capture(prompts(count)) for count in counts],
        "answers": [engine.generate(prompts(count), [None])[0] for count in counts],
    }
    engine.close()
    return found


def answers_decided_unequally(world: World, folder: str) -> list[list[int]]:
    """Answers of which one rank's are decided at once, and the other's never."""
    engine = build_engine(zero3_job(world, folder, batch_size=4), "capture")
    engine._ends = frozenset()  # type: ignore[attr-defined]
    answers = engine.generate(prompts(7), [None], lambda started: [world.rank == 0] * len(started))[0]
    engine.close()
    return answers


def weights_unlike_the_file(world: World, folder: str) -> list[str]:
    """Names of parameters and buffers that differ from those of a model that transformers loaded."""
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    job = zero3_job(world, folder)
    start_deepspeed()
    partitions = Partitions(job.opened, torch.float32, job.anatomy, zero3.Zero3.Options(), world)
    partitions.load()
    unlike = []
    for name, parameter in partitions.model.named_parameters(remove_duplicate=False):
        parameter.all_gather()
        if not torch.equal(parameter.data, expected.get_parameter(name)):
            unlike.append(name)
        parameter.partition()
    for name, buffer in partitions.model.named_buffers():
        if not torch.equal(buffer, expected.get_buffer(name)):
            unlike.append(name)
    tied = partitions.model.get_input_embeddings().weight is partitions.model.get_output_embeddings().weight
    if tied != expected.config.tie_word_embeddings:
        unlike.append("the tie between the embeddings")
    partitions.release()
    return unlike


def memory_of_an_engine(world: World, folder: str, tiny: str, rounds: int, **options: Any) -> list[dict[str, int]]:
    """Bytes of host memory: the peak of loading above what there was before, and what stays after closing."""
    _use(world, tiny)  # libraries are loaded, threads started
    load, peaks = Partitions.load, []

    def measured(self: Partitions) -> None:
        give_back_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is used now
        before, read = status("VmHWM"), bytes_read()
        load(self)
        sizes = [parameter.ds_numel * parameter.element_size() for parameter in self.model.parameters()]
        found = {"peak": status("VmHWM") - before, "read": bytes_read() - read}
        peaks.append({**found, "held": self.bytes_here, "largest": max(sizes)})

    Partitions.load = measured  # type: ignore[method-assign]
    try:
        for _ in range(rounds):
            give_back_memory()
            before = status("VmRSS")
            _use(world, folder, **options)
            peaks[-1]["left"] = status("VmRSS") - before
    finally:
        Partitions.load = load  # type: ignore[method-assign]
    return peaks


def _use(world: World, folder: str, **options: Any) -> None:
    engine = build_engine(zero3_job(world, folder, **options), "capture")
    engine.capture(prompts(2))
    engine.close()


def status(field: str) -> int:
    """Bytes that the kernel reports for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def bytes_read() -> int:
    """Bytes that this process has read from files."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def functions_left_replaced(world: World, folder: str) -> dict[str, list[str]]:
    """Functions of PyTorch that are others after an engine, and after a library replaced some during its life."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    originals = Originals()
    _use(world, folder)
    found = {"after an engine": originals.replaced()}
    engine = build_engine(zero3_job(world, folder), "capture")
    torch.nn.functional.linear = zero3_linear_wrap
    found["during the second"] = originals.replaced()
    engine.close()
    found["after the second"] = originals.replaced()
    return found


def modules_left_alive(world: World, folder: str) -> int:
    """Modules and parameters of a closed engine that something still refers to."""
    import gc
    import weakref

    engine = build_engine(zero3_job(world, folder), "capture")
    engine.capture(prompts(2))
    known = [weakref.ref(thing) for thing in (*engine.model.modules(), *engine.model.parameters())]  # type: ignore[attr-defined]
    engine.close()
    del engine
    gc.collect()
    return sum(reference() is not None for reference in known)


def refusal(world: World, folder: str, phase: str = "capture", **options: Any) -> str:
    """The message with which the placement refuses; "accepted" where it does not."""
    job = zero3_job(world, folder, **options)
    if phase == "evaluate":
        job.settings.evaluate = target("zero3")
    try:
        build_engine(job, phase).close()
    except UserError as error:
        return str(error)
    return "accepted"


def refusal_of_one_rank(world: World, folder: str) -> str:
    """Every rank's refusal where one rank alone cannot write to its disk."""
    nvme_path = folder if world.rank == 0 else os.path.join(folder, "missing")
    return refusal(world, folder, offload="nvme", nvme_path=nvme_path)


def memory_ran_out(world: World, folder: str) -> str:
    """What an engine says whose forward pass runs out of memory."""
    engine = build_engine(zero3_job(world, folder), "capture")

    def full(module: nn.Module, args: Any) -> None:
        raise torch.OutOfMemoryError("pretended")

    engine.model.register_forward_pre_hook(full)  # type: ignore[attr-defined]
    try:
        engine.capture(prompts(4))
    except UserError as error:
        return str(error)
    finally:
        engine.close()
    return "nothing"


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in one file."""
    return load_file(folder / "model.safetensors")
