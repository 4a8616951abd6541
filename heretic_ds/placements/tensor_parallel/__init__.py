"""The placement ``tensor_parallel``: each rank of a replica holds a part of every weight, and all run the same passes.

Parts are read from the weight files directly; no rank ever holds the whole model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint import Checkpoint, Shard, fill, split
from heretic_ds.edits.experts import sum_experts_over_ranks
from heretic_ds.edits.weights import WeightEditor, sum_over
from heretic_ds.errors import UserError
from heretic_ds.needs import check_deepspeed
from heretic_ds.placements.base import Placement, runner_of
from heretic_ds.placements.costs import (
    DEEPSPEED,
    READ_BUFFER,
    Cost,
    Facts,
    Resources,
    Use,
    bytes_of,
    estimate,
    largest_streamed,
)
from heretic_ds.placements.tensor_parallel import autotp, hf_plan, planned, sharding
from heretic_ds.placements.tensor_parallel.layers import SplitByOutputs, split_vocabulary
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.engine import Runner, Traits
from heretic_ds.runner.parity import check_split_model, streamed_logits
from heretic_ds.settings import within
from heretic_ds.world import Replicas

if TYPE_CHECKING:
    from heretic_ds.job import Job

log = logging.getLogger(__name__)


class TensorParallel(Placement):
    """Every weight split over the ranks of a replica, which run the same passes; replicas share the prompts."""

    name, phases = "tensor_parallel", frozenset({"capture", "evaluate"})
    burden = 1

    @dataclass
    class Options(Placement.Options):
        """How layers are split, and whether that is checked."""

        backend: str = within("auto", choices=("auto", "autotp", "hf_plan"))
        """Who splits the layers: ``autotp`` (DeepSpeed-Inference), ``hf_plan`` (transformers' plan of the family), or
        ``auto``, the one known to be right for the family."""
        parity_check: bool = True
        """Compare the logits of a few tokens with those of the unsplit model, which one rank computes block by block
        while it reads the weights once more."""

    options: Options

    @property
    def _otherwise(self) -> str:
        return f"choose another {self.phase}.backend or {self.phase}.degree, or set {self.phase}=replicated"

    def check(self, job: Job) -> None:
        """Refuse, before any weight is read, a model that configuration and names alone show not to be splittable."""
        phase, options = self.phase, self.options
        degree = job.world.degree(options.degree, f"{phase}.degree")
        job.opened.refuse_quantised(phase)
        if degree == 1:
            return
        model = job.opened.skeleton()
        check_split(model, job.anatomy, options.backend, degree, f"{phase}.degree", self._otherwise)

    def cost(self, facts: Facts, resources: Resources) -> Cost:
        """A part of everything; two sums over the replica a block, and a gathering of logits."""
        degree = self.options.degree or resources.ranks
        facts.refuse_quantised(self.phase)
        with _advising(self._otherwise):
            sizes = planned.sizes_held(facts, self.options.backend, degree, f"{self.phase}.degree")
        use = Use(
            held=sum(sizes.values()),
            replicas=resources.ranks // degree,
            share=1 / degree,
            caches=1 / degree if facts.caches_heads else 1.0,
            loading=largest_streamed(facts) if self.options.parity_check else READ_BUFFER,
            read_parts=1 / degree,
            exchanges=(planned.exchange_of(facts, degree),),
            reuses=True,
            libraries=DEEPSPEED,
        )
        return estimate(facts, resources, self.phase, use)

    def build(self, job: Job) -> Runner:
        """The engine over a model whose weights are split over the ranks of a replica.

        Raises UserError, on every rank, where the model cannot be split that way.
        """
        world, phase, options = job.world, self.phase, self.options
        comm = Comm.of_replicas(world, options.degree, f"{phase}.degree")
        ranks = comm.shares
        compared = options.parity_check and ranks.degree > 1

        def load(dtype: torch.dtype) -> tuple[PreTrainedModel, Checkpoint, str]:
            model, checkpoint = world.agree(lambda: job.opened.empty_model(dtype))
            backend, shards = "none", dict[str, Shard]()
            if ranks.degree > 1:
                backend, shards = lay_out(
                    model, job.anatomy, checkpoint, ranks, options.backend, f"{phase}.degree", self._otherwise
                )
            world.agree(lambda: fill(model, checkpoint, shards, job.opened.device), "reading the weights")
            if not compared or dtype != job.opened.dtypes[-1]:  # the comparison words better what fails in the last
                comm.agree(lambda: job.opened.check_forward(model, dtype))
            return model, checkpoint, backend

        model, checkpoint, backend = job.opened.in_some_dtype(load)
        held = bytes_of(model) / 2**20
        log.info("this rank holds %.1f MiB of weights (%d ranks a replica, %s)", held, comm.degree, backend)
        if compared:
            skeleton, device = job.opened.skeleton(model.dtype), job.opened.device
            check_split_model(
                comm,
                model,
                lambda rows: streamed_logits(skeleton, job.anatomy, checkpoint, rows, device),
                what=f"{phase}.backend={backend}",
                otherwise=f"choose another {phase}.backend, or {phase}=replicated",
            )
        editor = WeightEditor(model, job.anatomy, sum_over(ranks.inside))
        engine = runner_of(job, model, comm, Traits(self.name), editor=editor)
        if ranks.degree == 1:
            engine.whole = job.opened.loaded(model)
        return engine


def check_split(
    model: PreTrainedModel, anatomy: Anatomy, backend: str, degree: int, setting: str, otherwise: str
) -> None:
    """Refuse an empty model that cannot be split over as many ranks.

    Raises UserError; ``setting`` names their number, and ``otherwise`` says what to choose instead.
    """
    with _advising(otherwise):
        sharding.expert_shards(model, anatomy, 0, degree)
        chosen = sharding.choose_backend(model, model.config.model_type, backend)
        if chosen == "autotp":
            check_deepspeed(f"{setting.partition('.')[0]}=tensor_parallel, whose backend for this model is autotp,")
        _plan(model, anatomy, chosen, degree, setting)


def lay_out(
    model: PreTrainedModel,
    anatomy: Anatomy,
    checkpoint: Checkpoint,
    ranks: Replicas,
    backend: str,
    setting: str,
    otherwise: str,
) -> tuple[str, dict[str, Shard]]:
    """Split an empty model over the ranks of a replica; the backend that did it, and which parts are this rank's.

    Raises UserError as :func:`check_split` does.
    """
    with _advising(otherwise):
        chosen = sharding.choose_backend(model, model.config.model_type, backend)
        return chosen, _lay_out(model, anatomy, checkpoint, ranks, chosen, setting)


@contextmanager
def _advising(otherwise: str) -> Iterator[None]:
    """Add to a reason why the model cannot be split what to choose instead."""
    try:
        yield
    except sharding.CannotSplit as error:
        raise UserError(f"{error}; {otherwise}") from error


def _plan(model: PreTrainedModel, anatomy: Anatomy, backend: str, degree: int, setting: str) -> sharding.Layout | None:
    """The family's plan where it is to be carried out here; UserError where the model's heads do not divide."""
    model_type = model.config.model_type
    layout = None
    if backend == "hf_plan":
        layout = sharding.read_plan(model, anatomy, sharding.plan_of(model, model_type))
    if layout is None or sharding.splits_heads(anatomy, layout):
        sharding.check_heads(model_type, model.config.get_text_config(decoder=True), degree, setting)
    return layout


def _lay_out(
    model: PreTrainedModel, anatomy: Anatomy, checkpoint: Checkpoint, ranks: Replicas, backend: str, setting: str
) -> dict[str, Shard]:
    """Split experts, layers, embedding and head of an empty model; what is split ends without memory."""
    layout = _plan(model, anatomy, backend, ranks.degree, setting)
    shards = sharding.expert_shards(model, anatomy, ranks.member, ranks.degree)
    _shrink(model, shards)  # before DeepSpeed gives memory to whatever it finds
    if layout is None:
        shards |= autotp.lay_out(model, checkpoint.shapes, ranks)
    else:
        shards |= hf_plan.lay_out(model, layout, ranks)
    shards |= _split_embedding(model, anatomy, ranks)
    shards |= _split_head(model, checkpoint, shards, ranks)
    _shrink(model, shards)
    sum_experts_over_ranks(model, anatomy, ranks.inside)
    widths: list[Any] = [None] * ranks.degree
    dist.all_gather_object(widths, [w.weight_DK(model).shape[-1] for w in anatomy.writers], group=ranks.inside)
    sharding.check_degree(anatomy, shards, ranks.degree, widths)
    return shards


def _split_embedding(model: nn.Module, anatomy: Anatomy, ranks: Replicas) -> dict[str, Shard]:
    """Rows of the token embedding for this rank: no plan splits it, and it is a tenth of many models."""
    embedding = model.get_submodule(anatomy.embedding)
    if not isinstance(embedding, nn.Embedding):
        return {}
    split_vocabulary(embedding, ranks)
    shard = split(embedding.weight.shape, 0, ranks.member, ranks.degree)
    return {f"{anatomy.embedding}.weight": shard}


def _split_head(
    model: PreTrainedModel, checkpoint: Checkpoint, shards: Mapping[str, Shard], ranks: Replicas
) -> dict[str, Shard]:
    """Rows of the output head for this rank, where it is tied to the embedding, or nobody has split it yet.

    DeepSpeed splits a tied head by its inputs, apart from the embedding: twice the memory in a large vocabulary.
    """
    head = model.get_output_embeddings()
    path = next((path for path, module in model.named_modules() if module is head), None)
    name = f"{path}.weight"
    if path is None or name not in checkpoint.shapes or (name in shards and name not in checkpoint.tied):
        return {}
    outputs, inputs = checkpoint.shapes[name]
    bias = f"{path}.bias" in checkpoint.shapes
    whole = nn.Linear(inputs, outputs, bias, device="meta", dtype=checkpoint.dtypes[name])
    model.set_submodule(path, SplitByOutputs(whole, ranks, gathered=True).requires_grad_(False))
    return sharding.linear_shards(path, whole, sharding.STYLES["colwise_gather_output"], ranks.member, ranks.degree)


def _shrink(model: nn.Module, shards: Mapping[str, Shard]) -> None:
    """Give split parameters the shape of this rank's part, without memory."""
    for name, shard in shards.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        whole = module.get_parameter(attribute)
        empty = torch.empty(shard.local_shape, dtype=whole.dtype, device="meta")
        module._parameters[attribute] = nn.Parameter(empty, requires_grad=False)
