"""What the records of a run say of its circumstances: ``results.json`` before anything was measured, its settings."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from heretic_ds.checkpoint import bnb
from heretic_ds.export.manifest import package_versions
from heretic_ds.fingerprint import final_fingerprint
from heretic_ds.job import Job
from heretic_ds.placements import placements_of
from heretic_ds.planner.here import describe_device, describe_machine
from heretic_ds.prompts import overlaps
from heretic_ds.report import command_line
from heretic_ds.scoring import DistributionScorer, Scorer
from heretic_ds.settings import Settings

SCHEMA = 1
_PACKAGES = ("deepspeed", "optuna", "numpy")
"""On which a search depends, beside those that an export does."""
_TOLD = ("model", "prompts", "direction", "ablation", "search", "generation", "scoring", "export", "verify")
"""Groups of settings that trackers are told of."""


def begun(job: Job) -> dict[str, Any]:
    """``results.json`` before anything was measured. Every rank takes part: each has a device to tell."""
    settings = job.settings
    return {
        "schema": SCHEMA,
        "task": settings.task.name,
        "model": settings.model.path,
        "command": command_line.typed(),
        "world": {
            "size": job.world.size,
            **{
                phase: {"placement": placement.name, "degree": placement.options.degree}
                for phase, placement in placements_of(settings).items()
            },
        },
        "machine": describe_machine(),
        "devices": job.world.gather(describe_device(job.opened.device)),
        "dtype": str(job.opened.dtypes[0]).removeprefix("torch."),
        "quantization": job.held_as,
        "batch_sizes": {},
        "response_prefix": None,
        "prompts": {f"{kind}_eval": len(job.texts[f"{kind}.eval"]) for kind in ("target", "baseline")},
        "overlaps": overlaps(job.texts),
        "scorers": [_described(job, scorer) for scorer in job.scorers],
        "baseline": None,
        "trials": [],
        "pareto": [],
        "selected": None,
        "verified": None,
        "final": None,
        "timings": dict.fromkeys(("load", "capture", "search", "verify", "export"), 0.0),
        "versions": package_versions((*_PACKAGES, *bnb.packages(settings.model.quantization))),
    }


def held_in_words(job: Job, dtype: str) -> str:
    """In what weights are held in memory: ``bfloat16``, or ``bfloat16, weights in 4 bits by bitsandbytes``."""
    return ", ".join(filter(None, (dtype, bnb.in_words(job.held_as))))


def _described(job: Job, scorer: Scorer | DistributionScorer) -> dict[str, Any]:
    """An entry of ``scorers``: what a number means without the configuration."""
    own, name = job.own, scorer.name
    listed = own.usual.get(name)
    texts = job.texts[listed] if listed else (own.asked.get(name) or own.read[name]).texts
    return {
        "name": name,
        "class": f"{type(scorer).__module__}.{type(scorer).__qualname__}",
        "direction": scorer.direction,
        "combine": scorer.combine,
        "prompts": listed or "own",
        "count": len(texts),
    }


def model_title(job: Job) -> str:
    """What a model is called where people compare runs: its hub id, or its folder; with the folder's own where it is
    only called ``model``, as exports are."""
    name, path = job.opened.source.name, Path(job.settings.model.path.rstrip("/")).absolute()
    return name if name != "model" or path.parent.name == "" else f"{path.parent.name}/{name}"


def in_lines(results: dict[str, Any]) -> list[str]:
    """The circumstances as ``run.log`` has them, beside the start's own words, which tell of devices."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return [
        f"command: {results['command']}",
        f"machine: {machine['os']}, {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.1f} GB"
        f", GPUs: {', '.join(machine['gpus']) or 'none'}" + (f" (CUDA {machine['cuda']})" if machine["cuda"] else ""),
        f"versions: {versions}",
    ]


def parameters(settings: Settings) -> dict[str, str | int | float | bool]:
    """The settings that have a value of their own, by key; lists and what concerns this machine alone are left out."""
    found: dict[str, str | int | float | bool] = {}

    def add(section: Any, prefix: str) -> None:
        for entry in fields(section):
            value, key = getattr(section, entry.name), f"{prefix}.{entry.name}"
            if is_dataclass(value):
                add(value, key)
            elif isinstance(value, str | int | float | bool):
                found[key] = command_line.hide_secrets(value) if isinstance(value, str) else value

    for group in _TOLD:
        add(getattr(settings, group), group)
    return found


def request(settings: Settings, export_dir: Path) -> dict[str, Any]:
    """What a command asks for beyond the settings that a run folder is bound to."""
    form = settings.export.format
    return {
        "task": settings.task.name,
        "trials": settings.search.trials,
        "export": {
            "dir": str(export_dir),
            "trial": settings.export.trial,
            "max_kl": settings.export.max_kl,
            **({"gguf": True} if settings.export.gguf else {}),
            **({} if form == "model" else {"format": form, "adapter_rank": settings.export.adapter_rank}),
        },
        **({"final": final_fingerprint(settings)} if settings.verify.final else {}),
    }
