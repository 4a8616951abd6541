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
from heretic_ds.export.manifest import package_versions, public_data_name, public_model_name

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
    scorer: str = "refusals"
    """Name of the first scorer, whose scores `refusals_before` and `refusals_after` are."""
    form: str = "model"
    """What the folder holds: `model`, `adapter`, or `both`."""
    adapter: AdapterFacts | None = None
    """Of the adapter, where there is one."""


def model_card(loaded: LoadedModel, facts: CardFacts, today: date | None = None) -> str:
    """The text of the export's README.md: front matter for the hub, then plain words for people."""
    base, source = public_model_name(loaded), loaded.source
    front = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if facts.form == "adapter" else "finetune",
        library_name="peft" if facts.form == "adapter" else "transformers",
        tags=["abliterated", "directional-ablation", "heretic-ds"],
        **_base_front_matter(source / CARD_NAME),
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


def _base_front_matter(card: Path) -> dict[str, Any]:
    """The keys to keep of the front matter of the base model's own card; empty where it has none."""
    block = REGEX_YAML_BLOCK.search(card.read_text("utf-8-sig", "replace") if card.is_file() else "")
    try:
        front = yaml.safe_load(block[2]) if block else None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        log.warning("the front matter of %s cannot be read, its licence is not carried over: %s", card, error)
        front = None
    return {key: front[key] for key in _KEPT_KEYS if front.get(key)} if isinstance(front, dict) else {}
