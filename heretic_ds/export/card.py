"""The model card of an export: what was done to which model, with which numbers, under which licence."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from heretic_ds.ablation import Edit
from heretic_ds.checkpoint import bnb
from heretic_ds.checkpoint.open import LoadedModel
from heretic_ds.checkpoint.source import CARD_NAME, LICENCE_FILES, is_hub_id
from heretic_ds.errors import UserError
from heretic_ds.export.final import final_rows, number_text, range_text
from heretic_ds.export.manifest import front_matter, is_plain, package_versions, public_data_name, public_model_name

log = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_name("card.md.j2")
_KEPT_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter is, and what the original scores with it."""

    rank: int
    exact: bool
    """Whether it is the edit and nothing less."""
    error: float
    """Part of the edit that it leaves out: ‖ΔW - BA‖ / ‖ΔW‖ over all edited weights (Frobenius)."""
    largest_error: float
    """The same of the one weight with the largest."""
    refusals: float | None
    """None where the adapter itself was not scored, since it is exact."""
    kl: float | None


@dataclass(frozen=True)
class CardFacts:
    """Everything about an export that the loaded model itself does not tell."""

    edit: Edit
    row_norm: str
    through_norm: bool
    orthogonalize: bool
    winsorize_quantile: float
    writers: Mapping[str, int]
    """Edited weight matrices by component."""
    refusals_before: float
    refusals_after: float
    target_prompts: int
    """Prompts that refusals were counted on."""
    kl: float
    """Mean KL divergence of the first answer token from the original, nats."""
    baseline_prompts: int
    """Prompts that the KL divergence was measured on."""
    prompt_sources: Mapping[str, str]
    """Prompt sources as configured, by role, e.g. `target.train`."""
    trial: int | None = None
    rank: int = 1
    """Directions that the edit removes in each layer."""
    method: str = "mean_difference"
    """How they were found, as `direction.method` says."""
    scorer: str = "refusals"
    """Name of the first scorer, whose scores `refusals_before` and `refusals_after` are."""
    maximize: bool = False
    """Whether more of it is better."""
    form: str = "model"
    """What the folder holds: `model`, `adapter`, or `both`."""
    quantization: str = "none"
    """How weights were held while the edit was searched and scored, as ``model.quantization`` says."""
    adapter: AdapterFacts | None = None
    """Of the adapter, where there is one."""
    final: Mapping[str, Any] | None = None
    """Final scores, as ``results.json`` has them, where the export was scored once more."""


def model_card(loaded: LoadedModel, facts: CardFacts, today: date | None = None) -> str:
    """The text of the export's README.md: front matter for the hub, then plain words for people."""
    base, source = public_model_name(loaded), loaded.source
    title = base.rsplit("/", 1)[-1]
    data_sets = {role: public_data_name(name) for role, name in facts.prompt_sources.items()}
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if facts.form == "adapter" else "finetune",
        library_name="peft" if facts.form == "adapter" else "transformers",
        tags=["abliterated", "directional-ablation", "heretic-ds"],
        datasets=sorted({name for name in data_sets.values() if "/" in name and is_hub_id(name)}) or None,
        model_name=f"{title}, abliterated",
        eval_results=_results(facts, data_sets),
        **terms_of(source / CARD_NAME)[0],
    )
    card = ModelCard.from_template(
        data,
        str(_TEMPLATE),
        loaded=loaded,
        facts=facts,
        packed=bnb.in_words(facts.quantization),
        packed_finally=bnb.in_words((facts.final or {}).get("quantization", bnb.NONE)),
        title=title,
        final_rows=list(final_rows(facts.final)) if facts.final else [],
        number_text=number_text,
        range_text=range_text,
        dtype=str(loaded.dtype).removeprefix("torch."),
        prompt_sources=data_sets,
        licence_files=sorted({file.name for each in LICENCE_FILES for file in source.glob(each) if file.is_file()}),
        today=(today or date.today()).isoformat(),
        version=package_versions()["heretic-ds"],
    )
    return str(card)


def _results(facts: CardFacts, data_sets: Mapping[str, str]) -> list[EvalResult]:
    """What was measured, in the hub's form of results."""
    target, baseline = (data_sets.get(f"{kind}.eval", "") for kind in ("target", "baseline"))
    measured: Iterable[tuple[str, str, str, float]] = (
        (target, f"{facts.scorer} ({facts.target_prompts} target prompts)", facts.scorer, facts.refusals_after),
        (baseline, f"KL divergence from the original ({facts.baseline_prompts} baseline prompts)", "kl", facts.kl),
    )
    if facts.final is not None:
        measured = _final_results(facts.final, data_sets)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=source if is_hub_id(source) and "/" in source else "prompts",
            dataset_name=source or "prompts",
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for source, name, kind, value in measured
    ]


def _final_results(final: Mapping[str, Any], data_sets: Mapping[str, str]) -> Iterator[tuple[str, str, str, float]]:
    """Source, name, kind and number of every final score that there is."""
    for row in final_rows(final):
        asked, edited = final["prompts"][row.kind], row.edited
        part = asked["part"]
        if edited["score"] is None:
            continue
        held = "held-out " if part == "test" and not asked["seen"] else ""
        name = f"{row.label} ({row.prompts} {held}{row.kind} prompts)"
        yield data_sets.get(f"{row.kind}.{part}", ""), name, row.name, edited["score"]


def terms_of(card: Path) -> tuple[dict[str, Any], str | None]:
    """What is carried over of the front matter of the base model's own card, and why something is not.

    A card is text by anybody: what is not a short text in one line is left out, and never in the way of an export.
    """
    try:
        front = front_matter(card)
    except UserError as error:
        return {}, str(error)
    stated = {key: front[key] for key in _KEPT_KEYS if front.get(key)}
    kept = {key: value for key, value in stated.items() if is_plain(value)}
    dropped = [key for key in stated if key not in kept]
    return kept, f"{card} has no plain text as its {', '.join(dropped)}" if dropped else None


def warn_of_terms(folder: Path) -> None:
    """Say, before a long search, that a model's licence will not be in the card of its edited copy."""
    _, problem = terms_of(folder / CARD_NAME)
    if problem is not None:
        log.warning("%s: it is not carried over to the edited model's card", problem)
