"""A model and a job as facts: from configuration, names and shapes of the checkpoint, and settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint.open import OpenedModel
from heretic_ds.checkpoint.packed import METHODS, stored_bytes
from heretic_ds.placements.costs import Facts, Work
from heretic_ds.settings import AUTO, Settings


def facts_of(
    opened: OpenedModel,
    anatomy: Anatomy,
    settings: Settings,
    lengths: Mapping[str, Sequence[int]] | None = None,
) -> Facts:
    """What placements have to know of a model and what is asked of it.

    ``lengths`` are prompts' lengths in tokens by kind and part (``target.train``); without them usual ones are assumed.
    """
    dtype = opened.dtypes[0]
    return Facts(
        name=opened.source.name,
        model=opened.skeleton(dtype),
        anatomy=anatomy,
        dtype=dtype,
        work=work_of(settings, lengths),
        quantization=opened.quantization,
        stored=stored_bytes(opened.headers) if opened.quantization in METHODS else 0,
        packing=opened.choice.quantization,
        shares_files=settings.load.share,
        here=opened.device,
        merges_experts=any(writer.experts is not None for writer in anatomy.writers) and _apart(opened.headers),
    )


def work_of(settings: Settings, lengths: Mapping[str, Sequence[int]] | None = None) -> Work:
    """What the settings ask of a model."""
    search, generation = settings.search, settings.generation
    given: dict[str, Any] = {
        "new_tokens": generation.max_new_tokens,
        "trials": search.trials,
        "batch": generation.batch_size,
        "row_norm": settings.ablation.row_norm,
        "rank": settings.ablation.rank,
    }
    if search.trials_per_pass != AUTO:
        given["together"] = int(search.trials_per_pass)
    if lengths:
        every = [length for part in lengths.values() for length in part]
        given |= {
            "train_prompts": len(lengths["target.train"]) + len(lengths["baseline.train"]),
            "target_prompts": len(lengths["target.eval"]),
            "baseline_prompts": len(lengths["baseline.eval"]),
            "prompt_tokens": sum(every) / len(every),
            "longest_prompt": max(every),
        }
    return Work(**given)


def _apart(names: Mapping[str, object]) -> bool:
    """Whether a checkpoint keeps each expert by itself, as most do; so it is taken where no file is there to tell."""
    return not names or any(re.search(r"\.experts\.\d+\.", name) for name in names)
