"""What is measured on the original model: response prefix, directions, its own scores."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from heretic_ds.ablation import behaviour_directions
from heretic_ds.engines.protocol import Ablation
from heretic_ds.errors import UserError
from heretic_ds.prompts import ChatFormat, decode_answers, detect_response_prefix
from heretic_ds.run_folder import write_atomically
from heretic_ds.search.objective import Objective
from heretic_ds.stages.opening import Run, run_dir

log = logging.getLogger(__name__)

_PREFIX_PROMPTS = 100
"""Train prompts of each kind whose answers show the response prefix."""


def find_response_prefix(run: Run) -> None:
    """Settle the text that every answer is made to start with, once for all phases and all later runs."""
    job = run.job
    if run.settings.prompts.response_prefix == "auto":
        prefix = run.folder.measured.get("response_prefix")
        if prefix is None:
            with run.timed("prefix"):
                prefix = detect_response_prefix(job.chat, lambda chat: _answers_until_they_part(run, chat))
            run.folder.remember(response_prefix=prefix, batch_sizes=run.engine.batch_sizes)
        job.chat = job.chat.with_prefix(prefix)
    if job.chat.response_prefix:
        log.info("every answer is made to start with %r", job.chat.response_prefix)
    for name in job.texts:
        job.check_lengths(name)


def _answers_until_they_part(run: Run, chat: ChatFormat) -> list[str]:
    """The original model's answers to train prompts of both kinds, generated until they differ."""
    texts = [text for kind in ("target", "baseline") for text in run.job.texts[f"{kind}.train"][:_PREFIX_PROMPTS]]
    rows = [chat.encode(text) for text in texts]

    def parted(answers: Sequence[Sequence[int]]) -> list[bool]:
        shortest = min(len(answer) for answer in answers)
        return [any(answer[:shortest] != answers[0][:shortest] for answer in answers)] * len(answers)

    answers = run.engine.generate(rows, [None], parted)[0]
    return decode_answers(run.job.loaded.tokenizer, answers, keep_special=True)


def capture_directions(run: Run) -> None:
    """Directions from the mean residuals of the two kinds of train prompts; read back where this run has them."""
    directions_LD = _stored_directions(run, run.folder.directions)
    if directions_LD is None:
        directions_LD = _captured_directions(run)
    _use_directions(run, directions_LD)


def fixed_directions(run: Run) -> None:
    """Directions for an edit that the user names: those of this run or of the model's search where they fit, else
    captured anew."""
    sibling = run_dir(run.settings).with_name(run_dir(run.settings).name.removesuffix("-evaluate"))
    for file in (run.folder.directions, sibling / run.folder.directions.name):
        directions_LD = _stored_directions(run, file)
        if directions_LD is not None:
            log.info("directions are those of %s", file)
            return _use_directions(run, directions_LD)
    return _use_directions(run, _captured_directions(run))


def _use_directions(run: Run, directions_LD: Tensor) -> None:
    ablation = run.settings.ablation
    _compare_with_known(run, directions_LD)
    run.engine.prepare(Ablation(directions_LD, ablation.row_norm, ablation.through_norm))


def _captured_directions(run: Run) -> Tensor:
    direction = run.settings.direction
    with run.timed("capture"):
        target_LD, baseline_LD = (
            run.engine.capture(run.job.prompts(f"{kind}.train").rows, direction.winsorize_quantile)
            for kind in ("target", "baseline")
        )
        directions_LD = behaviour_directions(target_LD, baseline_LD, direction.orthogonalize)
    if not directions_LD.isfinite().all():
        raise UserError("the residuals of the train prompts are not finite; set model.dtype=float32")
    tensors = {"directions": directions_LD, "target_mean": target_LD, "baseline_mean": baseline_LD}
    write_atomically(run.folder.directions, save(tensors, metadata={"fingerprint": _direction_fingerprint(run)}))
    return directions_LD


def _stored_directions(run: Run, file: Path) -> Tensor | None:
    """Directions [L+1, D] of a file made from the same model, prompts and settings; None without one."""
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as tensors:
        fits = (tensors.metadata() or {}).get("fingerprint") == _direction_fingerprint(run)
        return tensors.get_tensor("directions") if fits else None


def _direction_fingerprint(run: Run) -> str:
    """Digest of all that directions depend on: the model's files, the train prompts as put to it, the settings."""
    settings, model = run.settings, run.job.loaded
    facts = {
        "model": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(model.source.iterdir())],
        "dtype": str(model.dtype),
        "rows": [run.job.prompts(f"{kind}.train").rows for kind in ("target", "baseline")],
        "direction": [settings.direction.orthogonalize, settings.direction.winsorize_quantile],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _compare_with_known(run: Run, directions_LD: Tensor) -> None:
    """|cosine| of every block's direction with a direction that is known, such as the one planted in the demo model."""
    if run.settings.direction.compare is None:
        return
    file = Path(run.settings.direction.compare)
    with safe_open(file, framework="pt") as tensors:
        known_D = torch.nn.functional.normalize(tensors.get_tensor("direction").double(), dim=0)
    cosine_L = (directions_LD[1:] @ known_D).abs()
    run.results["known_direction_cosine"] = [round(cosine, 6) for cosine in cosine_L.tolist()]
    blocks = "  ".join(f"{block}: {cosine:.2f}" for block, cosine in enumerate(cosine_L.tolist()))
    log.info("|cosine| with the direction of %s, by block: %s", file.name, blocks)


def measure_original(run: Run) -> Objective:
    """The original model's scores, and the objective that compares edits with it."""
    job, settings = run.job, run.settings
    with run.timed("baseline"):
        objective = Objective(
            run.engine,
            target=job.prompts("target.eval"),
            baseline=job.prompts("baseline.eval"),
            scorers=job.scorers,
            text_of=job.text_of,
            early_stop=settings.generation.early_stop,
            print_answers=settings.scoring.print_answers,
        )
    original = objective.original
    run.results["baseline"] = {"refusals": original.refusals, "scores": dict(original.scores)}
    log.info(
        "the original model: %g of %d target prompts declined",
        original.refusals,
        len(job.texts["target.eval"]),
    )
    run.folder.remember(batch_sizes=run.engine.batch_sizes)
    return objective
