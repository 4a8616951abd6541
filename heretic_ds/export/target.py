"""The export folder: what may be written where, and how a finished folder takes its place in one step."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import psutil
from safetensors import SafetensorError

from heretic_ds.checkpoint.source import (
    CARD_NAME,
    CODE_FILES,
    CONFIG_NAME,
    GENERATION_NAME,
    LICENCE_FILES,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
)
from heretic_ds.errors import UserError
from heretic_ds.foreign.disk import writing
from heretic_ds.foreign.reading import path_of, read_json
from heretic_ds.foreign.ulimits import limit_reached

MANIFEST_NAME = "heretic_ds.json"
_REPLACEABLE = (
    CONFIG_NAME,
    GENERATION_NAME,
    CARD_NAME,
    MANIFEST_NAME,
    f".{CARD_NAME}.*.tmp",  # of a run that was killed while it added final scores
    f".{MANIFEST_NAME}.*.tmp",
    "additional_chat_templates",
    "adapter",
    "reproduce",
    "*.gguf",
    "adapter_config.json",
    ".gitattributes",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    *TOKENIZER_FILES,
    *PROCESSOR_FILES,
    *LICENCE_FILES,
    *CODE_FILES,
)
"""What a model folder may hold for it to be replaced as a whole."""
_SPARE_BYTES = 64 * 1024**2


def check_export_target(
    target: Path | str, overwrite: bool, *, source: Path | None = None, needed_bytes: int = 0
) -> Path:
    """The resolved export folder, where a model of `needed_bytes` may and can be written; else UserError.

    Creates and removes nothing but the leftovers of this folder's earlier, unfinished exports. `source` is
    the original model's folder, which must not be written over. Meant to be called before a long search, and
    again before writing.
    """
    target = path_of(str(target), "export.dir").resolve()
    recover_leftovers(target)
    if target.exists() and not target.is_dir():
        raise UserError(f"export.dir={target} is a file; expected a folder that is empty or does not exist.")
    if source is not None and (source := source.resolve()) and (source == target or target in source.parents):
        raise UserError(f"export.dir={target} holds the original model itself; choose another folder.")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise UserError(
                f"export.dir={target} exists and is not empty; choose another folder or set export.overwrite=true."
            )
        _check_replaceable(target)
    home = _home(target)
    if not home.is_dir() or not _can_be_written(home):
        raise UserError(f"export.dir={target}: {home} is not a folder that can be written to; choose another folder.")
    free, wanted = shutil.disk_usage(home).free, needed_bytes + _SPARE_BYTES
    if needed_bytes and free < wanted:
        unit, name = (1e9, "GB") if wanted >= 1e9 else (1e6, "MB")
        raise UserError(
            f"export.dir={target}: the model and what goes with it need {wanted / unit:.2f} {name}, but only "
            f"{free / unit:.2f} {name} are free there; free some space or choose a folder on another disk."
        )
    return target


def _home(target: Path) -> Path:
    """The folder that is there already, in which others are made."""
    return next(folder for folder in target.parents if folder.exists())


def _can_be_written(folder: Path) -> bool:
    """Found by trying, with a file that has no name where the system allows: some file systems promise to root what
    they refuse."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)  # which the check of free space words better
    return True


def _check_replaceable(target: Path) -> None:
    """Refuse to replace a folder that holds anything but a model: it may be the user's own work."""
    refusal = f"export.overwrite=true would delete {target}, which"
    config, adapter = target / CONFIG_NAME, target / "adapter_config.json"
    model = config.is_file() and {"model_type", "architectures"} & read_json(config).keys()
    if not model and not (adapter.is_file() and "peft_type" in read_json(adapter)):
        raise UserError(f"{refusal} is not the folder of a model; choose another export.dir.")
    for entry in sorted(target.iterdir()):
        if not any(fnmatch(entry.name, pattern) for pattern in _REPLACEABLE):
            raise UserError(f"{refusal} also holds {entry.name}; move that away or choose another export.dir.")


@contextmanager
def failures_named(target: Path) -> Iterator[None]:
    """Errors of the system inside, while an export to ``target`` is written, become a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the library's own, also where the disk is full
        why = limit_reached(error) or error
        raise UserError(
            f"export.dir={target} could not be written ({why}; {shutil.disk_usage(_home(target)).free} bytes are "
            "free); the folder is as it was."
        ) from error


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends without an error.

    Everybody may read its files, whatever the umask, and they are on disk before the rename; an older `target` is moved
    aside, and deleted only once the new one stands in its place. On an error, or Ctrl-C, the unfinished folder is
    removed and `target` is as it was. After a crash the next export's `recover_leftovers` puts back or removes what is
    left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = _sibling(target, "partial"), _sibling(target, "old")
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # libraries write weights for their owner alone
            _sync(file)
        partial.chmod(0o755)
        _sync(partial)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    if old.exists():
        shutil.rmtree(old)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that is gone when the block ends; what a kill leaves, the next export removes."""
    folder = _sibling(target, "partial")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def recover_leftovers(target: Path) -> None:
    """Clean up after exports to `target` that were killed: put an older folder back, remove unfinished ones.

    Leftovers of processes that still run, or ran on another machine, are left alone, and so is what is no folder.
    """
    if not target.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(partial|old)-{re.escape(_host())}-(\d{{1,9}})")
    for entry in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match is None or entry.is_symlink() or not entry.is_dir():
            continue
        if psutil.pid_exists(pid := int(match[2])) and pid != os.getpid():
            continue  # of this process no other export is under way
        with writing(target.parent, "export.dir"):
            if match[1] == "old" and not target.exists():
                entry.rename(target)
            else:
                shutil.rmtree(entry)


def _sibling(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}-{_host()}-{os.getpid()}"


def _host() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
