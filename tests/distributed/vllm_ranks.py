"""What tests of vLLM run, in one process or on every rank: the same questions to an engine of vLLM and to our own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from heretic_ds.ablation import ROW_NORMS, Ablation, Edit, Profile
from heretic_ds.job import Job
from heretic_ds.scoring.kl import Divergence
from heretic_ds.world import World
from tests import families
from tests.distributed.engines import EDIT, ablation_for, build, job_for

NEW_TOKENS, ROWS, COMMON = 16, 18, 140
HEADS = 32
"""Numbers of a head; vLLM serves no narrower ones."""
OTHER = Edit(None, {"attention": Profile(0.8, 0.0, 0.2, 1.5), "mlp": Profile(1.3, 1.0, 0.1, 2.0)})
MLP_ALONE = Edit(1.0, {"mlp": Profile(0.7, 1.0, 0.7, 3.0)})
EDITS = [EDIT, None, OTHER, MLP_ALONE]
NARROW = frozenset({"qwen3", "gemma2", "gemma3", "mistral"})
"""Families of tests/families.py that name their heads' width."""


def save(family: str, folder: Path) -> Path:
    """A tiny model that vLLM serves."""
    return families.save(family, folder, width=4 * HEADS, head_dim=HEADS if family in NARROW else None)


def prompts(count: int = ROWS) -> list[list[int]]:
    """Rows of unlike lengths that begin alike, by more than the 128 tokens of which vLLM caches blocks on a CPU."""
    generator = torch.Generator().manual_seed(7)
    low, high = len(families.SPECIAL_TOKENS), len(families.VOCABULARY) - 5

    def some(n: int) -> list[int]:
        return torch.randint(low, high, (n,), generator=generator).tolist()

    head = some(COMMON)
    return [head + some(3 + place % 7) for place in range(count)]


def continuations() -> list[list[int]]:
    """A continuation of 1 to 3 tokens for each prompt."""
    return [row[-(1 + place % 3) :] for place, row in enumerate(prompts())]


def job(world: World, folder: str, batch_size: int = 16) -> Job:
    """A job with longer answers than other tests need."""
    made = job_for(world, folder, batch_size=batch_size)
    made.settings.generation.max_new_tokens = NEW_TOKENS
    return made


@contextlib.contextmanager
def vllm(world: World, folder: str, python: str, **options: Any) -> Iterator[Any]:
    """The engine of vLLM over a model."""
    with contextlib.closing(
        build(job(world, folder), "vllm", python=python, **{"kv_cache_gib": 0.25, **options})
    ) as made:
        yield made


def second_of_each(answers: list[list[int]]) -> list[bool]:
    """Ends answers whose second token is even, as a scorer might: at the first look, after four tokens."""
    return [answer[1] % 2 == 0 for answer in answers]


def measure(engine: Any, ablation: Callable[[str, bool], Ablation]) -> dict[str, Any]:
    """Answers, divergences of the first token and of several: of one edit, of several at a time, of edited weights."""
    rows, more = prompts(), continuations()
    engine.prepare(ablation("none", False))
    first, several = Divergence().begin(engine, rows), Divergence().begin(engine, rows, more)

    def of(edits: list[Edit | None]) -> dict[str, Any]:
        return {"answers": engine.generate(rows, edits), "kl": [*first.of(edits), *several.of(edits)]}

    found = {"original": of([None])}
    for mode in ROW_NORMS:
        engine.prepare(ablation(mode, mode == "pre"))
        found[f"{mode}, one"], found[f"{mode}, many"] = of([OTHER]), of(EDITS)
        engine.apply(OTHER)
        found[f"{mode}, in place"], found[f"{mode}, beside one in place"] = of([None]), of([None, EDIT])
        found[f"{mode}, in place again"] = of([None])
        engine.restore()
    engine.prepare(ablation("full", False))
    found["stopped early"] = {"answers": engine.generate(rows, EDITS, second_of_each), "kl": []}
    return found


def most_probable(at: list[int], logits_KV: list[torch.Tensor]) -> list[float]:
    """What a scorer of somebody else's may read: the log-probability of the likeliest last token."""
    return [each_KV[-1].float().log_softmax(-1).max().item() for each_KV in logits_KV]


def everything(world: World, folder: str, python: str, rank: int = 1, **options: Any) -> dict[str, Any]:
    """:func:`measure` of vLLM, what its logits are, and whether its weights are the same at the end."""
    with vllm(world, folder, python, **options) as engine:
        before = engine.digests()
        ablation = ablations(folder, rank)
        found = measure(engine, ablation)
        engine.apply(OTHER)
        edited = engine.digests()
        engine.restore()
        logits = engine.distributions(prompts(), EDITS[:2] if engine.max_edits_per_pass > 1 else [None], most_probable)
        return {
            "measured": found,
            "restored": [one == other for one, other in zip(before, engine.digests(), strict=True)],
            "edited": [one != other for one, other in zip(before, edited, strict=True)],
            "most_edits": engine.max_edits_per_pass,
            "logits": logits[-1],
            "degree": engine.degree,
        }


def ablations(folder: str, rank: int = 1) -> Callable[[str, bool], Ablation]:
    """Random directions that fit a model."""
    anatomy = job_for(World(), folder).anatomy

    class Fits:
        pass

    fits: Any = Fits()
    fits.anatomy = anatomy
    return lambda mode, through_norm: ablation_for(fits, mode, through_norm, rank)


def expected(folder: str, rank: int = 1) -> dict[str, Any]:
    """The same of the model in this process."""
    with contextlib.closing(build(job(World(), folder), "replicated")) as engine:
        found = measure(engine, ablations(folder, rank))
        return {"measured": found, "logits": engine.distributions(prompts(), [None], most_probable)[0]}
