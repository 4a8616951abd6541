"""``heretic-ds reproduce``: an export made again from its manifest, and compared with it file by file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from heretic_ds.ablation import Ablation, Edit
from heretic_ds.anatomy import find_anatomy
from heretic_ds.checkpoint.open import LoadedModel, ModelChoice, OpenedModel, load_weights, open_model
from heretic_ds.checkpoint.source import CARD_NAME, is_hub_id
from heretic_ds.edits.adapters import make_adapter
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.errors import UserError
from heretic_ds.export.adapter import resident_writer, stored_writer
from heretic_ds.export.checkpoint import Beside, export_adapter, export_model
from heretic_ds.export.manifest import package_versions
from heretic_ds.export.reproduce import Comparison, Recipe, compare
from heretic_ds.export.streaming import EditedFiles
from heretic_ds.export.target import MANIFEST_NAME, check_export_target
from heretic_ds.foreign.libraries import quiet_libraries
from heretic_ds.foreign.reading import path_of, read_json, read_text
from heretic_ds.report.console import console_of, messages_to
from heretic_ds.report.library_bars import counted_here
from heretic_ds.report.stages import StageProgress
from heretic_ds.world import World

log = logging.getLogger(__name__)

_SWITCHES = ("model.trust_remote_code", "model.allow_pickle", "export.overwrite")
OPTIONS = ("model.path", "model.revision", "model.device", *_SWITCHES[:2], "export.dir", _SWITCHES[2])
USAGE = "heretic-ds reproduce <heretic_ds.json, or the folder that holds it> [model.path=...] [export.dir=...]"


def reproduce(words: Sequence[str]) -> bool:
    """Make an export again and say which files are the same, byte for byte. Returns whether all are.

    Raises UserError for words that cannot be read, and for what the export takes and is not there.
    """
    path, options = _parsed(words)
    recipe = Recipe.read(path)
    with quiet_libraries(), messages_to(console_of(World())) as console, counted_here(), StageProgress(console):
        target = _target(path, recipe, options)
        opened = open_model(_model(recipe, options))
        if opened.device.type == "cpu" and recipe.manifest["how"]["device"] == "cpu":
            torch.set_num_threads(recipe.manifest["how"]["threads"])
        log.info("%s is made again from %s, in %s", recipe.folder, opened.source.name, target)
        _export(recipe, opened, target, options.get("export.overwrite") == "true")
        found = compare(recipe.manifest, read_json(target / MANIFEST_NAME))
        _tell(recipe, found, opened)
    return found.same


def _parsed(words: Sequence[str]) -> tuple[Path, dict[str, str]]:
    bare = [word for word in words if "=" not in word]
    if len(bare) != 1:
        raise UserError(f"reproduce takes one export; the usage is: {USAGE}")
    options = dict(word.split("=", 1) for word in words if "=" in word)
    unknown = [key for key in options if key not in OPTIONS]
    if unknown:
        raise UserError(f"reproduce takes no {unknown[0]}; it knows {', '.join(OPTIONS)}")
    for key in _SWITCHES:
        if options.get(key, "true") not in ("true", "false"):
            raise UserError(f"{key} is {options[key]!r}; it takes true or false")
    return path_of(bare[0], "export"), options


def _target(path: Path, recipe: Recipe, options: Mapping[str, str]) -> Path:
    """Where the export is made again: beside nothing of the first one."""
    folder = path_of(options.get("export.dir") or f"{recipe.folder.resolve().name}-reproduced", "export.dir")
    if folder.resolve() == recipe.folder.resolve():
        raise UserError(f"export.dir={folder} is the export that is to be made again; choose another folder")
    return check_export_target(folder, options.get("export.overwrite") == "true")


def _model(recipe: Recipe, options: Mapping[str, str]) -> ModelChoice:
    manifest, given = recipe.manifest, options.get("model.path")
    name = str(given or manifest["base_model"])
    if given is None and not ("/" in name and is_hub_id(name)):
        raise UserError(
            f"the export was made from {name}, which is no hub id; say where that model is: model.path=<folder>"
        )
    revision = options.get("model.revision") or (manifest.get("revision") if given is None else None)
    wanted = "cuda" if manifest["how"]["device"] == "cuda" and torch.cuda.is_available() else "cpu"
    return ModelChoice(
        path=name,
        revision=revision,
        dtype=str(manifest["dtype"]),
        device=options.get("model.device", wanted),
        trust_remote_code=options.get("model.trust_remote_code") == "true",
        allow_pickle=options.get("model.allow_pickle") == "true",
    )


def _export(recipe: Recipe, opened: OpenedModel, target: Path, overwrite: bool) -> None:
    manifest, how = recipe.manifest, recipe.manifest["how"]
    ablation = Ablation(recipe.directions, manifest["row_norm"], manifest["through_norm"])
    edit, form = Edit.from_dict(manifest["edit"]), manifest["format"]
    dtype = getattr(torch, manifest["dtype"])
    anatomy = find_anatomy(opened.skeleton(dtype))
    if not ablation.fits(anatomy.n_blocks, anatomy.width):
        raise UserError(f"{opened.source.name} is not the model that the export was made from: its shapes differ")
    weights, adapter = None, None
    if how["from_files"]:
        loaded, weights = EditedFiles.plan(opened, anatomy, ablation, edit, dtype, how["max_shard_size"])
        read: Any = partial(stored_writer, opened.empty_model(dtype)[1])
    else:
        loaded = load_weights(opened)
        read = partial(resident_writer, loaded.model)
    if form != "model":
        adapter = make_adapter(anatomy, ablation, edit, read, how["adapter_rank"])
    beside = Beside(adapter, how["max_shard_size"], ablation.stored)
    content = {**manifest, "versions": package_versions(), "reproduced": True}
    card = _card(recipe, loaded)
    if form == "adapter":
        export_adapter(loaded, target, card, content, overwrite, beside=beside)
        return
    if weights is None:
        editor = WeightEditor(loaded.model, anatomy)
        editor.prepare(ablation)
        editor.set_edit(edit)
    export_model(loaded, target, card, content, overwrite, weights, beside=beside)


def _card(recipe: Recipe, loaded: LoadedModel) -> str:
    """The first export's card, where it is there; it tells of the same model."""
    file = recipe.folder / CARD_NAME
    return read_text(file) if file.is_file() else f"# {loaded.model_name}, abliterated\n"


def _tell(recipe: Recipe, found: Comparison, opened: OpenedModel) -> None:
    for name, (then, now) in found.versions.items():
        log.info("version of %s: %s then, %s now", name, then, now)
    for what, names in (("differs", found.different), ("was not made", found.missing), ("is new", found.added)):
        for name in names:
            log.warning("%s %s", name, what)
    if found.same:
        log.info("all %d files are the same, byte for byte", len(found.equal))
        return
    how = recipe.manifest["how"]
    here = f"{opened.device.type} with {torch.get_num_threads()} threads"
    log.warning(
        "%d of %d files are the same; the export was written on %s with %d threads, this one on %s",
        len(found.equal), len(recipe.manifest["files"]), how["device"], how["threads"], here,
    )  # fmt: skip
