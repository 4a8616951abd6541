"""What is measured on the original model: response prefix, directions, its own scores."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from heretic_ds.ablation import Ablation
from heretic_ds.directions import METHODS, Request
from heretic_ds.errors import UserError
from heretic_ds.foreign.disk import write_atomically
from heretic_ds.foreign.reading import reading
from heretic_ds.placements import Capturing
from heretic_ds.prompts import ChatFormat, Parting, decode_answers, detect_response_prefix, start_apart
from heretic_ds.prompts.own import USUAL
from heretic_ds.report.stages import took
from heretic_ds.report.tables import share_in_words
from heretic_ds.search.objective import How, Objective
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

    def texts_of(answers: Sequence[Sequence[int]]) -> list[str]:
        return decode_answers(run.job.opened.tokenizer, answers, keep_special=True)

    parting, found, asked = Parting(lambda answer: texts_of([answer])[0]), list[str](), 0
    for most in _PREFIX_PROMPTS:
        rows = [chat.encode(text) for texts in kinds for text in texts[asked:most]]
        if rows:
            few = _FEW if most < _PREFIX_PROMPTS[-1] else 0  # for all of them measuring is worth it
            answers = engine.generate(rows, [None], parting, few)[0]
            parting.see(answers)
            found += texts_of(answers)
        if start_apart(found):
            break
        asked = most
    return found


def capture_directions(run: Run) -> None:
    """Directions from the residuals of the two kinds of train prompts; read back where this run has them."""
    stored = _stored_directions(run, run.path)
    _use_directions(run, _captured_directions(run) if stored is None else stored)


def fixed_directions(run: Run) -> None:
    """Directions for an edit that the user names: those of this run or of the model's search where they fit, else
    captured anew."""
    search = run.path.with_name(run.path.name.removesuffix("-evaluate"))
    for folder in (run.path, search):
        stored = _stored_directions(run, folder)
        if stored is not None:
            log.info("directions are those of %s", folder)
            return _use_directions(run, stored)
    return _use_directions(run, _captured_directions(run))


def _use_directions(run: Run, ablation: Ablation) -> None:
    _compare_with_known(run, ablation.directions_LRD)
    run.edit_along(ablation)


def _ablation(run: Run, directions: Tensor) -> Ablation:
    return Ablation(directions, run.settings.ablation.row_norm, run.settings.ablation.through_norm)


def _captured_directions(run: Run) -> Ablation:
    settings, anatomy, engine = run.settings, run.job.anatomy, run.lay_out("capture")
    target, baseline = (run.job.prompts(f"{kind}.train").rows for kind in ("target", "baseline"))
    request = Request(
        target, baseline, anatomy.n_blocks + 1, anatomy.width,
        orthogonalize=settings.direction.orthogonalize,
        winsorize_quantile=settings.direction.winsorize_quantile,
        rank=settings.ablation.rank,
        groups=settings.direction.groups,
        folder=run.path,
    )  # fmt: skip
    with run.timed("capture") as work:
        found = METHODS[settings.direction.method]().find(engine, request, run.world)
    if not found.is_finite:
        raise UserError("the residuals of the train prompts are not finite; set model.dtype=float32")
    if not (request.tells_apart and found.is_any):
        raise UserError(
            "the target and baseline train prompts leave the same mean residuals, so there is no direction between "
            "them; change prompts.target.train or prompts.baseline.train"
        )
    ablation = _ablation(run, found.directions_LRD)
    run.remember()  # the batch size, before another layout may take this one's place
    several = f", {ablation.rank} a layer" if ablation.rank > 1 else ""
    prompts = "directions: from %d target and %d baseline prompts%s, %s"
    log.info(prompts, len(target), len(baseline), several, took(work))
    if run.folder is not None:
        tensors = {"directions": ablation.stored, "target_mean": found.target_LD, "baseline_mean": found.baseline_LD}
        write_atomically(run.folder.directions, save(tensors, metadata={"fingerprint": direction_fingerprint(run)}))
    return ablation


def _stored_directions(run: Run, folder: Path) -> Ablation | None:
    """Directions that a run folder holds, where they come from the same model, prompts and settings."""

    def read() -> Tensor | None:
        file, anatomy = folder / "directions.safetensors", run.job.anatomy
        if not file.is_file():
            return None
        advice = "remove it, and it is made anew"
        with reading(file, advice, "is damaged"), safe_open(file, framework="pt") as tensors:
            if (tensors.metadata() or {}).get("fingerprint") != direction_fingerprint(run):
                return None
            directions: Tensor = tensors.get_tensor("directions")
            ablation = _ablation(run, directions)
            if not ablation.fits(anatomy.n_blocks, anatomy.width) or ablation.rank != run.settings.ablation.rank:
                raise UserError(f"{file} holds directions of shape {tuple(directions.shape)}; {advice}")
            return directions

    stored = run.world.decide(read)
    return None if stored is None else _ablation(run, stored)


def _identity(file: Path) -> tuple[str, int, int]:
    """By what a file is known to be the same as before; zeros for a link that leads nowhere, which nothing reads."""
    try:
        found = file.stat()
    except OSError:
        return file.name, 0, 0
    return file.name, found.st_size, found.st_mtime_ns


def direction_fingerprint(run: Run) -> str:
    """Digest of all that directions depend on: the model's files, the train prompts as put to it, the settings."""
    settings, folder = run.settings, run.job.opened.source.folder
    direction, rank = settings.direction, settings.ablation.rank
    facts = {
        "model": [_identity(file) for file in sorted(folder.iterdir())],
        "dtype": settings.model.dtype,
        "rows": [run.job.prompts(f"{kind}.train").rows for kind in ("target", "baseline")],
        "direction": [direction.orthogonalize, direction.winsorize_quantile],
    }
    if settings.model.quantization != "none":
        facts["quantization"] = settings.model.quantization
    if direction.method != "mean_difference":  # whose digests are those of earlier versions
        facts["method"] = [direction.method, direction.groups, rank]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _compare_with_known(run: Run, directions_LRD: Tensor) -> None:
    """Of every block's directions the |cosine|, or the length of what they hold of it where there are several, with a
    direction that is known, such as the one planted in the demo model."""
    known_D, file = run.job.known_direction_D, run.settings.direction.compare
    if known_D is None or file is None:
        return
    held_LR = (directions_LRD[1:] @ known_D).abs()
    held_L = held_LR[:, 0] if held_LR.shape[1] == 1 else held_LR.norm(dim=1)
    run.results["known_direction_cosine"] = [round(held, 6) for held in held_L.tolist()]
    blocks = "  ".join(f"{block}: {held:.2f}" for block, held in enumerate(held_L.tolist()))
    log.info("|cosine| with the direction of %s, by block: %s", Path(file).name, blocks)


def measure_original(run: Run) -> Objective:
    """The original model's scores, and the objective that compares edits with it."""
    job, settings = run.job, run.settings
    engine = run.engine
    with run.timed("baseline") as work:
        usual = {name: job.prompts(name) for name in USUAL}
        objective = Objective(
            engine,
            target=usual["target.eval"],
            baseline=usual["baseline.eval"],
            scorers=job.scorers,
            text_of=job.text_of,
            how=How(settings.generation.early_stop, settings.scoring.print_answers),
            own=job.own_prompts(usual),
            world=run.world,
        )
    run.objective, original = objective, objective.original
    run.results["baseline"] = {"refusals": original.refusals, "scores": dict(original.scores)}
    prompts = len(job.texts["target.eval"])
    told = share_in_words(original.refusals, prompts, run.scorer)
    log.info("the original model: %s, %s", told, took(work))
    run.remember()
    return objective
