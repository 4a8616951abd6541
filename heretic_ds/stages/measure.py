"""What is measured on the original model: response prefix, directions, its own scores."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from heretic_ds.ablation import Ablation, behaviour_directions
from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import reading
from heretic_ds.placements import Capturing
from heretic_ds.prompts import ChatFormat, Parting, decode_answers, detect_response_prefix, start_apart
from heretic_ds.report.stages import took
from heretic_ds.report.tables import REFUSALS
from heretic_ds.run_folder import write_atomically
from heretic_ds.search.objective import Objective
from heretic_ds.stages.opening import Run

log = logging.getLogger(__name__)

_PREFIX_PROMPTS = (4, 16, 100)
"""Train prompts of each kind whose answers show the response prefix: all are asked only where the first few answers
leave it open whether there is one."""
_FEW = 8
"""Rows of a batch that need no measuring."""


def find_response_prefix(run: Run) -> None:
    """Settle the text that every answer is made to start with, once for all phases and all later runs."""
    job = run.job
    if run.settings.prompts.response_prefix == "auto":
        prefix = run.measured.get("response_prefix")
        if prefix is None:
            engine = run.lay_out("capture")
            with run.timed("prefix"):
                prefix = detect_response_prefix(job.chat, lambda chat: _answers_until_they_part(run, engine, chat))
            run.remember(response_prefix=prefix)
        job.chat = job.chat.with_prefix(prefix)
    if job.chat.response_prefix:
        log.info("response prefix: every answer is made to start with %r", job.chat.response_prefix)
    else:
        log.info("response prefix: none")
    job.check_lengths()


def _answers_until_they_part(run: Run, engine: Capturing, chat: ChatFormat) -> list[str]:
    """The original model's answers to train prompts of both kinds, generated until a little after they differ; no more
    of them than it takes to see that they start apart."""
    kinds = [run.job.texts[f"{kind}.train"] for kind in ("target", "baseline")]
    parting, found, asked = Parting(), list[str](), 0
    for most in _PREFIX_PROMPTS:
        rows = [chat.encode(text) for texts in kinds for text in texts[asked:most]]
        if rows:
            few = _FEW if most < _PREFIX_PROMPTS[-1] else 0  # for all of them measuring is worth it
            answers = engine.generate(rows, [None], parting, few)[0]
            parting.see(answers)
            found += decode_answers(run.job.opened.tokenizer, answers, keep_special=True)
        if start_apart(found):
            break
        asked = most
    return found


def capture_directions(run: Run) -> None:
    """Directions from the mean residuals of the two kinds of train prompts; read back where this run has them."""
    stored_LD = _stored_directions(run, run.path)
    _use_directions(run, _captured_directions(run) if stored_LD is None else stored_LD)


def fixed_directions(run: Run) -> None:
    """Directions for an edit that the user names: those of this run or of the model's search where they fit, else
    captured anew."""
    search = run.path.with_name(run.path.name.removesuffix("-evaluate"))
    for folder in (run.path, search):
        directions_LD = _stored_directions(run, folder)
        if directions_LD is not None:
            log.info("directions are those of %s", folder)
            return _use_directions(run, directions_LD)
    return _use_directions(run, _captured_directions(run))


def _use_directions(run: Run, directions_LD: Tensor) -> None:
    ablation = run.settings.ablation
    _compare_with_known(run, directions_LD)
    run.edit_along(Ablation(directions_LD, ablation.row_norm, ablation.through_norm))


def _captured_directions(run: Run) -> Tensor:
    direction, engine = run.settings.direction, run.lay_out("capture")
    with run.timed("capture") as work:
        target_LD, baseline_LD = (
            engine.capture(run.job.prompts(f"{kind}.train").rows, direction.winsorize_quantile)
            for kind in ("target", "baseline")
        )
        directions_LD = behaviour_directions(target_LD, baseline_LD, direction.orthogonalize)
    if not directions_LD.isfinite().all():
        raise UserError("the residuals of the train prompts are not finite; set model.dtype=float32")
    if not directions_LD[1:].any():
        raise UserError(
            "the target and baseline train prompts leave the same mean residuals, so there is no direction between "
            "them; change prompts.target.train or prompts.baseline.train"
        )
    counts = [len(run.job.texts[f"{kind}.train"]) for kind in ("target", "baseline")]
    run.remember()  # the batch size, before another layout may take this one's place
    log.info("directions: from %d target and %d baseline prompts, %s", *counts, took(work))
    if run.folder is not None:
        tensors = {"directions": directions_LD, "target_mean": target_LD, "baseline_mean": baseline_LD}
        write_atomically(run.folder.directions, save(tensors, metadata={"fingerprint": direction_fingerprint(run)}))
    return directions_LD


def _stored_directions(run: Run, folder: Path) -> Tensor | None:
    """Directions [L+1, D] that a run folder holds, where they come from the same model, prompts and settings."""

    def read() -> Tensor | None:
        file = folder / "directions.safetensors"
        if not file.is_file():
            return None
        advice = "remove it, and it is made anew"
        with reading(file, advice, "is damaged"), safe_open(file, framework="pt") as tensors:
            if (tensors.metadata() or {}).get("fingerprint") != direction_fingerprint(run):
                return None
            directions_LD = tensors.get_tensor("directions")
            if tuple(directions_LD.shape) != (run.job.anatomy.n_blocks + 1, run.job.anatomy.width):
                raise UserError(f"{file} holds directions of shape {tuple(directions_LD.shape)}; {advice}")
            return directions_LD

    return run.world.decide(read)


def direction_fingerprint(run: Run) -> str:
    """Digest of all that directions depend on: the model's files, the train prompts as put to it, the settings."""
    settings, folder = run.settings, run.job.opened.source.folder
    facts = {
        "model": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir())],
        "dtype": settings.model.dtype,
        "rows": [run.job.prompts(f"{kind}.train").rows for kind in ("target", "baseline")],
        "direction": [settings.direction.orthogonalize, settings.direction.winsorize_quantile],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _compare_with_known(run: Run, directions_LD: Tensor) -> None:
    """|cosine| of every block's direction with a direction that is known, such as the one planted in the demo model."""
    known_D, file = run.job.known_direction_D, run.settings.direction.compare
    if known_D is None or file is None:
        return
    cosine_L = (directions_LD[1:] @ known_D).abs()
    run.results["known_direction_cosine"] = [round(cosine, 6) for cosine in cosine_L.tolist()]
    blocks = "  ".join(f"{block}: {cosine:.2f}" for block, cosine in enumerate(cosine_L.tolist()))
    log.info("|cosine| with the direction of %s, by block: %s", Path(file).name, blocks)


def measure_original(run: Run) -> Objective:
    """The original model's scores, and the objective that compares edits with it."""
    job, settings = run.job, run.settings
    engine = run.engine
    with run.timed("baseline") as work:
        objective = Objective(
            engine,
            target=job.prompts("target.eval"),
            baseline=job.prompts("baseline.eval"),
            scorers=job.scorers,
            text_of=job.text_of,
            early_stop=settings.generation.early_stop,
            print_answers=settings.scoring.print_answers,
        )
    run.objective, original = objective, objective.original
    run.results["baseline"] = {"refusals": original.refusals, "scores": dict(original.scores)}
    prompts = len(job.texts["target.eval"])
    told = f"{original.refusals:g} of {prompts} target prompts declined"
    if run.scorer != REFUSALS:
        told = f"{run.scorer} {original.refusals:g} on {prompts} target prompts"
    log.info("the original model: %s, %s", told, took(work))
    run.remember()
    return objective
