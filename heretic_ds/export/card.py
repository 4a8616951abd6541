"""The model card of an export: what was done to which model, with which numbers, under which licence."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Protocol

import yaml

from heretic_ds.checkpoint.open import LoadedModel
from heretic_ds.checkpoint.source import CARD_NAME, LICENCE_FILES
from heretic_ds.export.manifest import package_versions
from heretic_ds.export.names import public_data_name, public_model_name

log = logging.getLogger(__name__)

_LICENCE_KEYS = ("license", "license_name", "license_link")
_KEPT_KEYS = (*_LICENCE_KEYS, "language", "pipeline_tag")
_ROW_NORMS = {
    "none": "row norms of the weights are left to change",
    "pre": "the projection is computed on row-normalised weights and scaled back",
    "full": "every row of an edited weight keeps its norm",
}


class EditLike(Protocol):
    """What the card reads of an edit: a direction index and, by component, profiles of four numbers."""

    @property
    def direction_index(self) -> float | None: ...
    @property
    def profiles(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class CardFacts:
    """Everything about an export that the loaded model itself does not tell."""

    edit: EditLike
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
    base = public_model_name(loaded)
    kept = _base_front_matter(loaded.source)
    front = {
        "base_model": base,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        **kept,
        "tags": ["abliterated", "directional-ablation", "heretic-ds"],
    }
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {base.rsplit('/', 1)[-1]}, abliterated",
        _what_was_done(loaded, facts, base),
        _numbers(facts),
        _profiles(facts.edit),
        _settings(facts),
        _warning(base),
        _licence(loaded.source, kept, base),
        f"Made on {(today or date.today()).isoformat()} with heretic_ds {package_versions()['heretic-ds']}. "
        "`heretic_ds.json` holds all of this in machine-readable form.",
    ]
    return "\n\n".join(sections) + "\n"


def _what_was_done(loaded: LoadedModel, facts: CardFacts, base: str) -> str:
    revision = f" at revision `{loaded.revision}`" if loaded.revision else ""
    writers = ", ".join(f"{count} {component}" for component, count in facts.writers.items())
    text = (
        f"This is `{base}`{revision} with some of its weights edited by directional ablation: a direction "
        "in the residual stream that mediates declining to answer was estimated from two sets of prompts, "
        "and removed from the weights that write to the stream by orthogonalising them against it (Arditi "
        "et al. 2024, [arXiv 2406.11717](https://arxiv.org/abs/2406.11717)). Nothing was trained, and the "
        f"architecture is unchanged. Edited weight matrices: {writers}. Weights are stored as "
        f"{str(loaded.dtype).removeprefix('torch.')}."
    )
    if loaded.quantization:
        text += (
            f" The base model is quantised ({loaded.quantization}); this copy is not: its weights were "
            "dequantised before the edit, so it is larger, and `quantization_config` was dropped from its "
            "configuration."
        )
    return text


def _numbers(facts: CardFacts) -> str:
    total = facts.target_prompts
    refusals = facts.scorer == "refusals"
    scores = f"refusals, of {total} target prompts" if refusals else f"{facts.scorer}, on {total} target prompts"
    meaning = (
        "Refusals are answers that contain a typical declining phrase, or are empty. "
        if refusals
        else f"`{facts.scorer}` is a scorer of the maker's own; the search looked for a low value of it. "
    )
    return "\n".join(
        [
            "## Measured",
            "",
            "| | original | this model |",
            "|---|---|---|",
            f"| {scores} | {facts.refusals_before:g} | {facts.refusals_after:g} |",
            f"| KL divergence from the original (nats, {facts.baseline_prompts} baseline prompts) | 0 | "
            f"{facts.kl:.3g} |",
            "",
            f"{meaning}The KL divergence is that of the first answer token, averaged over the prompts.",
        ]
    )


def _profiles(edit: EditLike) -> str:
    index = edit.direction_index
    direction = "Every layer uses its own direction." if index is None else f"One direction, of block {index:.4g}."
    rows = [
        f"| {component} | {profile.max_weight:.4g} | {profile.max_weight_position:.4g} | "
        f"{profile.min_weight:.4g} | {profile.min_weight_distance:.4g} |"
        for component, profile in edit.profiles.items()
    ]
    head = ["| component | max weight | at layer | min weight | at distance |", "|---|---|---|---|---|"]
    return "\n".join(["## Edit", "", f"{direction} Ablation weight over the layers:", "", *head, *rows])


def _settings(facts: CardFacts) -> str:
    lines = [f"- row norms `{facts.row_norm}`: {_ROW_NORMS.get(facts.row_norm, 'as this mode does')}"]
    if facts.through_norm:
        lines.append("- directions are mapped through the norm that follows a writer")
    if facts.orthogonalize:
        lines.append("- directions are orthogonal to the baseline prompts' mean residual")
    if facts.winsorize_quantile < 1:
        lines.append(f"- residuals are clamped to their {facts.winsorize_quantile:g} quantile")
    if facts.trial is not None:
        lines.append(f"- trial {facts.trial} of a search over edits")
    lines += [f"- {role} prompts: `{public_data_name(source)}`" for role, source in facts.prompt_sources.items()]
    return "\n".join(["## Settings", "", *lines])


def _warning(base: str) -> str:
    return (
        "## Before you use it\n\nBehaviours that the base model was trained for, declining among them, may "
        f"be missing or weaker, and other abilities may have changed. The safety evaluations of `{base}` do "
        "not hold for this model. Whoever runs or publishes it is responsible for what it is used for, and "
        "for the terms of the base model."
    )


def _licence(source: Path, kept: Mapping[str, Any], base: str) -> str:
    files = sorted({file.name for pattern in LICENCE_FILES for file in source.glob(pattern) if file.is_file()})
    copied = f" Copied from it: {', '.join(f'`{name}`' for name in files)}." if files else ""
    if "license" in kept:
        name = kept.get("license_name", kept["license"])
        return f"## Licence\n\nThat of the base model: {name}.{copied}"
    return f"## Licence\n\nThat of the base model `{base}`, whose files do not state it: look there.{copied}"


def _base_front_matter(source: Path) -> dict[str, Any]:
    """The keys to keep of the front matter of the base model's own card; empty where it has none."""
    card = source / CARD_NAME
    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").lstrip("\ufeff").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        log.warning("the front matter of %s cannot be read, its licence is not carried over: %s", card, error)
        return {}
    if not isinstance(front, dict):
        return {}
    return {key: front[key] for key in _KEPT_KEYS if front.get(key)}
