"""The placement ``kernel_inject``: DeepSpeed-Inference's fused CUDA kernels in the place of the model's blocks.

Each rank holds the whole model and works on prompts of its own. Edits are made in the weights as the kernels read
them, one at a time.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from heretic_ds.engines.injection import op, parity
from heretic_ds.engines.injection.families import Family, find_family, most_tokens, refuse_long
from heretic_ds.engines.injection.inject import Injected, inject
from heretic_ds.engines.protocol import Decided, TokenRows
from heretic_ds.engines.resident import ResidentEngine
from heretic_ds.errors import UserError
from heretic_ds.loading import load_weights
from heretic_ds.settings import PlacementSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from heretic_ds.anatomy import Anatomy
    from heretic_ds.job import Job

log = logging.getLogger(__name__)


def check(job: Job, placement: PlacementSettings, phase: str) -> None:
    """Refuse what this placement cannot serve, before any weights are loaded. Raises UserError."""
    if placement.degree not in (None, 1):
        raise UserError(
            f"{phase}.degree={placement.degree}, but kernel_inject holds the whole model on every rank; leave it null"
        )
    op.refuse_without_cuda(job.opened.device)
    config, name = job.opened.config, f"model.path={job.settings.model.path}"
    find_family(config, job.opened.dtypes[0], name)
    longest = max((len(row) for part in job.texts for row in job.prompts(part).rows), default=0)
    refuse_long(longest + job.settings.generation.max_new_tokens, most_tokens(config))


def build(job: Job, placement: PlacementSettings, phase: str) -> KernelInjectEngine:
    """The engine over a model whose blocks are injected kernels, checked against the model as it was before.

    Raises UserError for models that the kernels do not serve, and where the check fails.
    """
    world, opened, generation = job.world, job.opened, job.settings.generation
    replicas = world.replicas(1, f"{phase}.degree")
    torch.cuda.set_device(opened.device)  # the kernels run on the current device
    world.agree(op.load_kernels, "building the kernels")
    model = world.agree(lambda: load_weights(opened), "reading the weights").model
    family = find_family(model.config, model.dtype, f"model.path={job.settings.model.path}")
    injected = world.agree(lambda: inject_checked(model, job.anatomy, family))
    return KernelInjectEngine(
        model,
        opened.tokenizer,
        injected,
        generation.max_new_tokens,
        generation.batch_size,
        replicas=replicas,
        same=world.same,
    )


def inject_checked(model: PreTrainedModel, anatomy: Anatomy, family: Family) -> Injected:
    """Inject, and refuse to go on where the model then computes something else. Raises UserError."""
    expected = parity.sample(model)
    injected = inject(model, anatomy, family, model.dtype)
    try:
        parity.check(model, injected.adapter, expected)
    except UserError:
        injected.close()
        raise
    return injected


class KernelInjectEngine(ResidentEngine):
    """Passes go through injected kernels, whose workspace has to know beforehand how long answers get."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, injected: Injected, *arguments: Any, **options: Any
    ) -> None:
        super().__init__(model, tokenizer, injected.anatomy, *arguments, **options)
        self._injected = injected

    def _decode(self, rows: TokenRows, max_new_tokens: int, decided: Decided | None) -> list[list[int]]:
        with self._injected.adapter.expecting(max_new_tokens):
            return super()._decode(rows, max_new_tokens, decided)

    def close(self) -> None:
        self._injected.close()
        del self._injected
        super().close()
