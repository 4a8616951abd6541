"""What a run's scores depend on, so that runs with other scores never share a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from heretic_ds.foreign.reading import path_of, reading
from heretic_ds.settings import Settings
from heretic_ds.settings.nodes import TARGET
from heretic_ds.settings.search import DIRECT, SCREENED

_SAMPLED_BYTES = 65536
_TOLD = 60
"""Characters of a value that are told."""

_SCORE_SETTINGS = (
    "model.path",
    "model.revision",
    "model.dtype",
    "model.quantization",
    "prompts",
    "direction",
    "ablation.rank",
    "ablation.row_norm",
    "ablation.through_norm",
    "search.seed",
    "search.startup_trials",
    "search.kl_target",
    "generation.max_new_tokens",
    "scoring.scorers",
    "scoring.markers",
)
"""Settings on which a trial's edit or scores depend. The rest may change from run to run in one folder."""

LATER = {"model.quantization": "none", "direction.method": "mean_difference", "direction.groups": 9, "ablation.rank": 1}
"""Settings that came after the first run folders, and the values that change nothing: only others count."""


_FINAL_SETTINGS = ("prompts.target.test", "prompts.baseline.test", "verify")
"""Settings on which final scores alone depend."""


_SPEED = ("device", "batch_size", "keep")
"""Settings of the built-in classifier that say where and how fast it works, and not what it gives."""

_CLASSIFIER = ("classifier", "heretic_ds.scoring.Classifier", "heretic_ds.scoring.classifier.Classifier")


_BEFORE = {"search.strategy": DIRECT, "search.candidates": 0}
"""What versions did that had no such setting."""


def fingerprint(settings: Settings, **more: Any) -> dict[str, Any]:
    """What a run's scores depend on, as flat ``group.key`` -> JSON value; runs may share a folder if equal.

    Beside the settings themselves: identities of a local model's files and of prompt files, so that a model
    trained anew under the same name is told from the old one. ``more`` adds what is known only once inputs are read:
    digests of all prompts and of the chat template, the commit of a hub model. A fixed edit does not count: any number
    of edits may be evaluated in one folder.
    """
    evaluating = settings.task.name == "evaluate"
    flat: dict[str, Any] = {"task.name": "evaluate" if evaluating else "abliterate"}
    if settings.task.against is not None:
        flat["task.against"] = settings.task.against
    given = _given(settings, _SCORE_SETTINGS)
    flat |= {key: value for key, value in given.items() if not key.startswith(_FINAL_SETTINGS)}
    for key, default in LATER.items():
        if flat[key] == default or (key == "direction.groups" and settings.direction.method != "median_of_means"):
            del flat[key]
    screened = settings.search.strategy == SCREENED
    strategy = SCREENED if screened else DIRECT  # one that was left open is settled before a search
    flat |= {"search.strategy": strategy, "search.candidates": screened * settings.search.candidates}
    model = path_of(settings.model.path, "model.path")
    if model.is_dir():
        flat["model.path"] = str(model.resolve())
        flat["model.files"] = identities(model)
    _add_files(flat)
    flat.update(more)
    return json.loads(json.dumps(flat))


def final_fingerprint(settings: Settings) -> dict[str, Any]:
    """What final scores depend on beside what :func:`fingerprint` tells, in the same form."""
    flat = _given(settings, _FINAL_SETTINGS)
    _add_files(flat)
    return json.loads(json.dumps(flat))


def _what_scores(scorer: Any) -> Any:
    """An entry of ``scoring.scorers`` as far as scores depend on it."""
    if not isinstance(scorer, dict) or scorer.get(TARGET) not in _CLASSIFIER:
        return scorer
    return {name: value for name, value in scorer.items() if name not in _SPEED}


def completed(stored: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint of an earlier version with what that version did where a setting of today is missing."""
    return {**{key: value for key, value in _BEFORE.items() if key in current}, **stored}


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One phrase for every key with different values, naming both."""
    phrases = []
    for key in sorted({*stored, *current}):
        before, now = stored.get(key), current.get(key)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            phrases += differences(
                {f"{key}.{name}": value for name, value in before.items()},
                {f"{key}.{name}": value for name, value in now.items()},
            )
        elif _short(before) == _short(now):
            phrases.append(f"{key} has other content")
        else:
            phrases.append(f"{key} was {_short(before)}, is now {_short(now)}")
    return phrases


def _given(settings: Settings, keys: Sequence[str]) -> dict[str, Any]:
    """The values of settings, and of all that groups hold, by key."""
    flat: dict[str, Any] = {}
    for key in keys:
        value: Any = attrgetter(key)(settings)
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if key == "scoring.scorers":
            value = [_what_scores(each) for each in value]
        _flatten(key, value, flat)
    return flat


def _add_files(flat: dict[str, Any]) -> None:
    """Add a digest of what prompt sources and a chat template hold, where they are files."""
    sources = [name for name in flat if name.startswith("prompts.") and name.endswith(".source")]
    for key in (*sources, *({"prompts.template"} & flat.keys())):
        given = str(flat[key] or "")
        if key not in sources and "{" in given:  # a template itself has a brace
            continue
        file = path_of(given, key)
        if file.is_file():
            flat[key] = str(file.resolve())
            with reading(file, "give another one"), file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            flat[f"{key.removesuffix('.source')}.content"] = digest[:16]


def _flatten(key: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _flatten(f"{key}.{name}", inner, into)
    else:
        into[key] = value


def identities(folder: Path) -> dict[str, str]:
    """What a checkpoint's files are known again by, by name."""
    return {file.name: _identity(file) for file in _model_files(folder)}


def _model_files(folder: Path) -> list[Path]:
    """Files that decide what a checkpoint computes: weights, configuration, tokenizer, code."""
    kinds = {".safetensors", ".bin", ".json", ".model", ".jinja", ".txt", ".py"}
    return sorted(file for file in folder.iterdir() if file.suffix in kinds and file.is_file())


def _identity(file: Path) -> str:
    """Size and a digest of both ends: enough to tell two checkpoints apart without reading gigabytes."""
    size = file.stat().st_size
    with reading(file), file.open("rb") as stream:
        ends = stream.read(_SAMPLED_BYTES)
        stream.seek(max(size - _SAMPLED_BYTES, 0))
        ends += stream.read(_SAMPLED_BYTES)
    return f"{size} bytes, {hashlib.sha256(ends).hexdigest()[:12]}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _TOLD else f"{text[: _TOLD - 3]}..."
