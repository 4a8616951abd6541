"""The model in stages beside the whole one: after padded rows, and after one more token of each over their caches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heretic_ds.checkpoint import Checkpoint
from heretic_ds.placements.pipeline.stage import StagedForward
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.parity import check, sample_rows, streamed_logits, tried
from heretic_ds.runner.rows import Row

if TYPE_CHECKING:
    from heretic_ds.job import Job


def check_stages(job: Job, comm: Comm, forward: StagedForward, checkpoint: Checkpoint, what: str, phase: str) -> None:
    """Compare logits with those of the unsplit model, which rank 0 computes block by block.

    The step counts: of some families the decoder, of others the blocks are told what a cache holds, and a stage that
    misses it still gives the right logits after a prompt. All ranks call it; ``what`` names the choice. Raises
    UserError where the logits are another model's.
    """
    model, device, otherwise = forward.model, job.opened.device, f"set {phase}=tensor_parallel or {phase}=replicated"
    prompts = sample_rows(model.config.get_text_config(decoder=True).vocab_size)
    longer = [[*row, row[0]] for row in prompts]
    skeleton = job.opened.skeleton(model.dtype)

    def reference() -> Tensor:
        return streamed_logits(skeleton, job.anatomy, checkpoint, [*prompts, *longer], device)

    reference_BV = job.world.decide(reference, "running the unsplit model")

    def logits() -> Tensor:
        cache = forward.own_cache()
        begun = forward([Row(prompt) for prompt in prompts], cache)
        token_B = torch.tensor([row[-1] for row in longer], device=device)
        return torch.cat([begun.logits_BV, forward.step(begun, token_B, cache)])

    logits_BV = comm.agree(lambda: tried(logits, model, what, otherwise))
    knows = forward.knows_logits
    job.world.agree(lambda: check(logits_BV, reference_BV, model.dtype, what, otherwise) if knows else None)
