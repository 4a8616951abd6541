"""What a run folder tells about a run, read once for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from heretic_ds.export.final import FinalRow, final_rows
from heretic_ds.foreign.reading import read_json, read_text, reading
from heretic_ds.geometry.measures import of_means
from heretic_ds.search.pareto import pareto_front
from heretic_ds.search.trials import TrialRecord


@dataclass(frozen=True)
class Facts:
    """One run. Texts come from models, prompts and files as they are: whoever shows them escapes them."""

    results: Mapping[str, Any]
    """``results.json``."""
    config: Mapping[str, Any]
    """``config.yaml``; empty where there is none."""
    config_text: str
    scorer: str
    """Name of the scorer that the search minimises."""
    records: Sequence[TrialRecord] = ()
    front: Sequence[int] = ()
    layers: Sequence[Mapping[str, float | None]] = ()
    """Geometry by entry of the stream: of means alone, or of residuals too."""
    projections: Sequence[Mapping[str, Any]] = ()
    method: str = "pca"
    """How residuals were projected."""
    geometry_is_stale: bool = False
    """Whether ``geometry.json`` is of other residuals than the directions."""
    prompts: Mapping[str, int] = field(default_factory=dict)
    """Train prompts by kind, where geometry knows them."""

    @property
    def selected(self) -> TrialRecord | None:
        """The trial that was chosen."""
        return next((record for record in self.records if record.index == self.results.get("selected")), None)

    @property
    def final_rows(self) -> list[FinalRow]:
        """Final scores, in the order of the card."""
        final = self.results.get("final")
        return [] if final is None else list(final_rows(final))

    @property
    def n_blocks(self) -> int:
        """Blocks of the model; 0 where the folder does not tell."""
        return max(0, len(self.layers) - 1)

    def setting(self, key: str, default: Any = None) -> Any:
        """A setting by its dotted name."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value


def read_facts(folder: Path, scorer: str) -> Facts:
    """What the folder holds. Raises UserError where files are missing or damaged."""
    config, results = folder / "config.yaml", read_json(folder / "results.json")
    text = read_text(config) if config.is_file() else ""
    with reading(config):
        settings = yaml.safe_load(text) or {}
    with reading(folder / "results.json"):
        records = [TrialRecord.from_dict(entry) for entry in results["trials"]]
    return Facts(results, settings, text, scorer, records, pareto_front(records), **_geometry(folder))


def _geometry(folder: Path) -> dict[str, Any]:
    """``geometry.json`` where it is of the residuals that the directions were made of; else what the means tell."""
    means, fingerprint = _means(folder / "directions.safetensors")
    file = folder / "geometry.json"
    if not file.is_file():
        return {"layers": means}
    found = read_json(file)
    if fingerprint not in (None, found["asked"]["fingerprint"]):
        return {"layers": means, "geometry_is_stale": True}
    return {
        "layers": found["layers"],
        "projections": found["projections"],
        "method": found["asked"]["projection"],
        "prompts": found["prompts"],
    }


def _means(file: Path) -> tuple[list[dict[str, float | None]], str | None]:
    """Geometry of the means that directions were made of, and what they were made of; nothing without them."""
    if not file.is_file():
        return [], None
    with reading(file), safe_open(file, framework="pt") as tensors:
        if not {"target_mean", "baseline_mean"} <= set(tensors.keys()):
            return [], None
        means = of_means(tensors.get_tensor("target_mean"), tensors.get_tensor("baseline_mean"))
        return means, (tensors.metadata() or {}).get("fingerprint")
