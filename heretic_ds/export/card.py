"""The model card of an export: what was done to which model, with which numbers, under which licence."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from heretic_ds.ablation import Edit
from heretic_ds.checkpoint.open import LoadedModel
from heretic_ds.checkpoint.source import CARD_NAME, LICENCE_FILES
from heretic_ds.errors import UserError
from heretic_ds.export.manifest import package_versions, public_data_name, public_model_name
from heretic_ds.foreign.reading import MEBIBYTE, read_text, reading

log = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_name("card.md.j2")
_CARD_LIMIT, _FRONT_LIMIT = 4 * MEBIBYTE, 2**16
_MOST_VALUES, _LONGEST_VALUE = 200, 200
_KEPT_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")


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
    scorer: str = "refusals"
    """Name of the first scorer, whose scores `refusals_before` and `refusals_after` are."""


def model_card(loaded: LoadedModel, facts: CardFacts, today: date | None = None) -> str:
    """The text of the export's README.md: front matter for the hub, then plain words for people."""
    base, source = public_model_name(loaded), loaded.source
    front = ModelCardData(
        base_model=base,
        base_model_relation="finetune",
        library_name="transformers",
        tags=["abliterated", "directional-ablation", "heretic-ds"],
        **terms_of(source / CARD_NAME)[0],
    )
    card = ModelCard.from_template(
        front,
        str(_TEMPLATE),
        loaded=loaded,
        facts=facts,
        title=base.rsplit("/", 1)[-1],
        dtype=str(loaded.dtype).removeprefix("torch."),
        prompt_sources={role: public_data_name(name) for role, name in facts.prompt_sources.items()},
        licence_files=sorted({file.name for each in LICENCE_FILES for file in source.glob(each) if file.is_file()}),
        today=(today or date.today()).isoformat(),
        version=package_versions()["heretic-ds"],
    )
    return str(card)


def terms_of(card: Path) -> tuple[dict[str, Any], str | None]:
    """What is carried over of the front matter of the base model's own card, and why something is not.

    A card is text by anybody: what is not a short text in one line is left out, and never in the way of an export.
    """
    if not card.is_file():
        return {}, None
    try:
        front = _front_matter(card)
    except UserError as error:
        return {}, str(error)
    stated = {key: front[key] for key in _KEPT_KEYS if front.get(key)}
    kept = {key: value for key, value in stated.items() if _is_plain(value)}
    dropped = [key for key in stated if key not in kept]
    return kept, f"{card} has no plain text as its {', '.join(dropped)}" if dropped else None


def warn_of_terms(folder: Path) -> None:
    """Say, before a long search, that a model's licence will not be in the card of its edited copy."""
    _, problem = terms_of(folder / CARD_NAME)
    if problem is not None:
        log.warning("%s: it is not carried over to the edited model's card", problem)


def _front_matter(card: Path) -> dict[str, Any]:
    with reading(card, "its licence is unknown", "has a front matter that cannot be read"):
        block = REGEX_YAML_BLOCK.search(read_text(card, _CARD_LIMIT, encoding="utf-8-sig", errors="replace"))
        if block is not None and len(block[2]) > _FRONT_LIMIT:
            raise UserError(f"{card} has a front matter of {len(block[2])} characters")
        front = yaml.safe_load(block[2]) if block else None
    return front if isinstance(front, dict) else {}


def _is_plain(value: object) -> bool:
    """A short text in one line, or a list of such."""
    if isinstance(value, list):
        return len(value) <= _MOST_VALUES and all(isinstance(each, str) and _is_plain(each) for each in value)
    return isinstance(value, str) and len(value) <= _LONGEST_VALUE and value.isprintable() and bool(value.strip())
