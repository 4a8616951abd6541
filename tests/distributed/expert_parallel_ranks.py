"""What the tests of ``expert_parallel`` run on every rank."""

from __future__ import annotations

import ctypes
import gc
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from heretic_ds.errors import UserError
from heretic_ds.job import Job
from heretic_ds.placements import build_engine
from heretic_ds.placements.deepspeed import Originals
from heretic_ds.runner.engine import Runner
from heretic_ds.scoring.kl import Divergence
from heretic_ds.world import World
from tests.distributed import output_edits_ranks
from tests.distributed.engines import LENGTHS, build, job_for, measure, prompts, target
from tests.distributed.zero3_ranks import STOPS, status


def measure_expert_parallel(world: World, folder: str, degree: int | None, count: int = len(LENGTHS)) -> dict[str, Any]:
    """:func:`measure` on this placement, and what it leaves behind."""
    originals = Originals()
    engine = _engine(world, folder, degree)
    parts = [weakref.ref(part) for part in (*engine.model.parameters(), *engine.model.modules())]
    found = measure(engine, count)
    found["degree"], found["experts"] = engine.degree, _experts(engine)
    engine.close()
    del engine
    gc.collect()
    found["released"] = all(part() is None for part in parts)
    found["replaced"] = originals.replaced()
    return found


def score_together(world: World, folder: str, degree: int | None, tables: bool = True) -> dict[str, Any]:
    """KL and answers of several edits in one pass, in every mode."""
    engine = _engine(world, folder, degree)
    found = output_edits_ranks.score(engine, True, tables)
    engine.close()
    return found


def _engine(world: World, folder: str, degree: int | None, **options: Any) -> Runner:
    job = job_for(world, folder, **options)
    job.settings.evaluate = target("expert_parallel", degree=degree)
    engine = build_engine(job, "evaluate")
    assert isinstance(engine, Runner)
    return engine


def _experts(engine: Runner) -> list[int]:
    """Experts of each block on this rank."""
    return [len(writer.weight_DK(engine.model)) for writer in engine.anatomy.writers if writer.experts is not None]


def refusal(world: World, folder: str, degree: int | None = None, phase: str = "evaluate") -> str:
    """The message with which the placement refuses a model; "accepted" where it does not."""
    job = job_for(world, folder)
    setattr(job.settings, phase, target("expert_parallel", degree=degree))
    try:
        build_engine(job, phase).close()
    except UserError as error:
        return str(error)
    return "accepted"


def refusal_of(world: World, folder: str, mistake: str) -> str:
    """The message that a mistake in the exchange of tokens leads to."""
    from deepspeed.module_inject import auto_ep_layer

    real, calls = auto_ep_layer._AllToAllV.apply, []

    def wrong(group: Any, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        arrived = real(group, x, sent, received)
        calls.append(arrived)
        if mistake == "lost":
            return torch.zeros_like(arrived)
        if mistake == "turned":
            return arrived.flip(0)
        if len(calls) % 2:
            return arrived
        everyone = [torch.empty_like(arrived) for _ in range(world.size)]  # answers, of equally many tokens
        dist.all_gather(everyone, arrived, group=group)
        return everyone[world.rank - 1]

    with mock.patch.object(auto_ep_layer._AllToAllV, "apply", wrong):
        return refusal(world, folder)


def weights_unlike_the_file(world: World, folder: str) -> list[str]:
    """Names of writers' weights that differ from those of a model that transformers loaded."""
    whole = build(job_for(World(), folder), "replicated")
    engine = _engine(world, folder, None)
    unlike = []
    for own, other in zip(engine.anatomy.writers, whole.anatomy.writers, strict=True):
        weight, expected = own.weight_DK(engine.model), other.weight_DK(whole.model)
        if own.experts is not None:
            expected = expected[world.rank * own.experts : (world.rank + 1) * own.experts]
        if not torch.equal(weight, expected):
            unlike.append(own.weight)
    engine.close()
    return unlike


def tokens_sent_elsewhere(world: World, folder: str) -> list[float]:
    """For each block of experts the share of tokens whose experts are others than in the model that transformers
    loads, both in bfloat16."""
    whole = build(job_for(World(), folder, dtype="bfloat16"), "replicated")
    engine = _engine(world, folder, None, dtype="bfloat16")
    generator, found = torch.Generator().manual_seed(0), []
    for name, layer in engine.model.named_modules():
        if hasattr(layer, "tokens_per_expert"):
            hidden_ND = torch.randn(2000, engine.anatomy.width, generator=generator).bfloat16()
            _, expert_NC, _ = layer.router(hidden_ND)
            _, _, expected_NC = whole.model.get_submodule(name).gate(hidden_ND)
            same_N = (expert_NC.sort().values == expected_NC.sort().values).all(-1)
            found.append(1 - same_N.float().mean().item())
    engine.close()
    return found


def memory_of_loading(world: World, folder: str, tiny: str) -> dict[str, int]:
    """Bytes of host memory that loading took at its peak above what was used before, what is held, what stays."""
    _engine(world, tiny, None).close()  # libraries are loaded, threads started
    job = job_for(world, folder)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is used now
    before = status("VmHWM")
    engine = build(job, "expert_parallel", parity_check=False)
    peak = status("VmHWM") - before
    sizes = [parameter.numel() * parameter.element_size() for parameter in engine.model.parameters()]
    engine.capture(prompts(2))
    engine.close()
    del engine
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return {"peak": peak, "held": sum(sizes), "largest": max(sizes), "left": status("VmRSS") - before}


def answers_of_unlike_lengths(world: World, folder: str) -> list[list[int]]:
    """Answers that end at every length, so that ranks wait for each other."""
    engine = _engine(world, folder, None, batch_size=2)
    engine._ends = STOPS
    answers = engine.generate(prompts(), [None])[0]
    engine.close()
    return answers


def answers_of_unlike_lengths_whole(folder: Path) -> list[list[int]]:
    """The same on ``replicated``."""
    engine = build(job_for(World(), str(folder), batch_size=2), "replicated")
    engine._ends = STOPS
    answers = engine.generate(prompts(), [None])[0]
    engine.close()
    return answers


def answers_decided_unequally(world: World, folder: str) -> list[int]:
    """Lengths of answers of which one rank's are decided at once, and the other's never."""
    engine = _engine(world, folder, None)
    engine._ends = frozenset()
    answers = engine.generate(prompts(), [None], lambda started: [world.rank == 0] * len(started))[0]
    engine.close()
    return [len(answer) for answer in answers]


def batch_sizes(world: World, folder: str) -> dict[str, int]:
    """What ranks measure in step."""
    engine = _engine(world, folder, None, batch_size=0)
    engine.capture(prompts())
    Divergence().begin(engine, prompts()).of([None])
    engine.generate(prompts(), [None])
    engine.close()
    return engine.batch_sizes


def most_rows_tried(world: World, folder: str) -> int:
    """Rows of the largest batch that is measured, where one rank's memory has room for fewer than the other's."""
    engine, tried = _engine(world, folder, None, batch_size=0), list[int]()
    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: tried.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    room = mock.Mock(of=lambda rows: rows, rows_within=lambda free: 3 - world.rank)
    with mock.patch("heretic_ds.runner.sizing.sizes.working_memory", lambda run, most, device: room):
        Divergence().begin(engine, prompts())
    engine.close()
    return max(tried)


def captured(world: World, folder: str) -> Tensor:
    """Means from the capture phase, whose engine the evaluation shares or not."""
    job: Job = job_for(world, folder)
    job.settings.capture = target("expert_parallel")
    engine = build_engine(job, "capture")
    means = engine.capture(prompts())
    engine.close()
    return means
