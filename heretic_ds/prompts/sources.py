"""Reads lists of prompts from data sets and files; a mistake is one sentence naming the override."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import MISSING

from heretic_ds.checkpoint.fitness import some_names
from heretic_ds.errors import UserError
from heretic_ds.settings import PromptSource

log = logging.getLogger(__name__)

PACKAGE_SCHEME = "pkg://"
# A file or a single saved data set has one unnamed split. It goes by each of the usual names, so that
# replacing the source alone works whichever split the replaced source was read from.
UNNAMED_SPLITS = ("train", "validation", "test", "all")

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPLIT = re.compile(r"(?P<base>[^\[\]]+?)(\[(?P<rows>[^\[\]]*)\])?")
_BOUND = re.compile(r"[+-]?\d+%?")


@dataclass(frozen=True)
class _Rows:
    """Rows of one split: names of the columns, number of rows, and a reader of one column's values."""

    columns: Sequence[str] | None
    """None: there is one column, without a name."""
    count: int
    read: Callable[[str, range], Sequence[Any]]
    of_subset: bool = False
    """Whether the source may have several configurations, of which one was chosen."""


@dataclass(frozen=True)
class _Source:
    """What a source turned out to be."""

    name: str
    """Override prefix, for messages: ``prompts.target.train``."""
    text: str
    """The source as the user gave it."""
    subset: str | None
    """Which of several configurations of a data set."""

    def fail(self, problem: str, field: str = "source", cause: Exception | None = None) -> NoReturn:
        raise UserError(f"{self.name}.{field}: {problem}") from cause


def load_prompts(source: PromptSource, name: str) -> list[str]:
    """The prompts of one source, in the source's order, blank ones left out.

    ``source.source`` is a hub data set id, a folder (saved with ``save_to_disk``, or readable by
    ``load_dataset``), a ``.txt``, ``.jsonl``, ``.csv`` or ``.parquet`` file, or ``pkg://package/path`` for a
    file shipped in a Python package. Rows are counted from 0 and chosen as Python's slices are: by
    ``source.split`` (``train[:400]``, ``test[10%:20%]``) and then, of those, by ``source.slice`` (``0:400``).
    A slice may reach beyond the last row.

    ``name`` is the override prefix that messages name, such as ``prompts.target.train``. Raises UserError.
    """
    origin = _Source(name, source.source, source.subset)
    if source.source in (MISSING, ""):
        origin.fail("no source is set; give a data set id, a folder or a file")
    base, within_split = _parse_split(origin, source.split)
    rows = _open(origin, base)
    if source.subset is not None and not rows.of_subset:
        origin.fail(f"{origin.text} has no configurations to choose from; leave it null", "subset")
    if not rows.count:
        origin.fail(f"{origin.text} is empty; choose one that holds prompts")
    chosen = _cut(origin, "split", source.split, range(rows.count), within_split)
    if source.slice is not None:
        chosen = _cut(origin, "slice", source.slice, chosen, _parse_slice(origin, source.slice))
    if rows.columns is not None and source.column not in rows.columns:
        listed = ", ".join(rows.columns) or "none"
        origin.fail(f"{origin.text} has no column {source.column!r}; its columns are: {listed}", "column")
    return _texts(origin, source.column, chosen, rows.read(source.column, chosen))


def _texts(origin: _Source, column: str, chosen: range, values: Sequence[Any]) -> list[str]:
    """Checks that the values are text, and drops blank ones."""
    for row, value in zip(chosen, values, strict=True):
        if not isinstance(value, str):
            kind = "nothing" if value is None else f"a value of type {type(value).__name__}"
            origin.fail(
                f"row {row} of {origin.text} holds {kind} in column {column!r}; choose a column of texts",
                "column",
            )
        if not _is_unicode(value):
            origin.fail(
                f"row {row} of {origin.text} holds half of a surrogate pair in column {column!r}, "
                "which is no character; mend that row or leave it out",
            )
    prompts = [value for value in values if value.strip()]
    if not prompts:
        origin.fail(f"the chosen rows of {origin.text} hold only blank prompts; choose other rows or another column")
    if len(prompts) < len(values):
        log.warning("%s: %d blank prompts left out", origin.name, len(values) - len(prompts))
    return prompts


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON's escapes can write halves of surrogate pairs, which tokenizers refuse."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# Rows -------------------------------------------------------------------------------------------------------


def _parse_split(origin: _Source, split: str) -> tuple[str, tuple[str, str] | None]:
    """``train[:400]`` as its base name and bounds."""
    match = _SPLIT.fullmatch(split.strip())
    if match is None:
        origin.fail(
            f"cannot read {split!r}; write a split's name, as in train, or with rows, as in train[:400]",
            "split",
        )
    rows = match["rows"]
    return match["base"].strip(), None if rows is None else _bounds(origin, "split", split, rows)


def _parse_slice(origin: _Source, text: str) -> tuple[str, str]:
    return _bounds(origin, "slice", text, text.strip().removeprefix("[").removesuffix("]"))


def _bounds(origin: _Source, field: str, given: str, rows: str) -> tuple[str, str]:
    parts = [part.strip() for part in rows.split(":")]
    if len(parts) != 2 or any(part and not _BOUND.fullmatch(part) for part in parts):
        example = "0:400" if field == "slice" else "train[:400]"
        origin.fail(f"cannot read the rows in {given!r}; write start:stop, as in {example}", field)
    return parts[0], parts[1]


def _cut(origin: _Source, field: str, given: str, rows: range, bounds: tuple[str, str] | None) -> range:
    """The rows within bounds; an empty choice is an error."""

    def bound(text: str) -> int | None:
        if text.endswith("%"):
            return round(len(rows) * int(text[:-1]) / 100)
        return int(text) if text else None

    chosen = rows if bounds is None else rows[bound(bounds[0]) : bound(bounds[1])]
    if not chosen:
        origin.fail(f"{given!r} leaves none of the {len(rows)} rows of {origin.text}", field)
    return chosen


# Sources ----------------------------------------------------------------------------------------------------


def _open(origin: _Source, split: str) -> _Rows:
    if origin.text.startswith(PACKAGE_SCHEME):
        package, _, inside = origin.text.removeprefix(PACKAGE_SCHEME).partition("/")
        try:
            path = Path(str(resources.files(package).joinpath(inside)))
        except (ImportError, ValueError) as error:
            origin.fail(f"there is no Python package {package!r}; write pkg://package/path", cause=error)
        return _open_file(origin, path, split)
    path = Path(origin.text).expanduser()
    if path.suffix.lower() in _READERS and not path.is_dir():
        return _open_file(origin, path, split)
    if path.is_dir():
        return _open_folder(origin, path, split)
    if path.exists():
        origin.fail(f"{path} is of no known kind; give a folder or a file ending in {', '.join(_READERS)}")
    if not _HUB_ID.fullmatch(origin.text) or origin.text.startswith("."):
        origin.fail(f"there is no file or folder {path}, and it is no data set id; check the path")
    return _open_hub(origin, split)


def _open_file(origin: _Source, path: Path, split: str) -> _Rows:
    _check_unnamed_split(origin, split, None)
    if path.suffix.lower() not in _READERS:
        origin.fail(f"{path} is of no known kind; give a file ending in {', '.join(_READERS)}")
    if not path.is_file():
        origin.fail(f"there is no file {path}; check the path")
    try:
        return _READERS[path.suffix.lower()](origin, path)
    except UnicodeDecodeError as error:
        origin.fail(f"{path} is not UTF-8 text; save it as UTF-8", cause=error)
    except OSError as error:
        origin.fail(f"{path} cannot be read: {error.strerror or error}", cause=error)


def _open_folder(origin: _Source, path: Path, split: str) -> _Rows:
    import datasets

    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    kind = f"the folder {path}"
    if saved:
        return _from_datasets(origin, split, kind, lambda: datasets.load_from_disk(str(path)))
    return _of_subset(origin, split, kind, str(path))


def _open_hub(origin: _Source, split: str) -> _Rows:
    kind = f"there is no file or folder {origin.text}, and the data set of that id"
    return _of_subset(origin, split, kind, origin.text)


def _of_subset(origin: _Source, split: str, kind: str, path: str) -> _Rows:
    import datasets

    rows = _from_datasets(origin, split, kind, lambda: datasets.load_dataset(path, origin.subset))
    return dataclasses.replace(rows, of_subset=True)


def _from_datasets(origin: _Source, split: str, kind: str, load: Callable[[], Any]) -> _Rows:
    try:
        loaded = load()
    # Builders, file readers, the hub's client and its transport raise exceptions of their own, with no common
    # base.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "Config name is missing" in reason or f"BuilderConfig {origin.subset!r}" in reason:
            named = some_names(re.findall(r"'([^']+)'", reason.partition("[")[2].partition("]")[0]), shown=20)
            given = "null" if origin.subset is None else repr(origin.subset)
            origin.fail(f"{given} is none of the configurations of {origin.text}: {named}; choose one", "subset", error)
        origin.fail(
            f"{kind} cannot be read: {reason[:300]}; check the name and the network, or give a local file",
            cause=error,
        )
    if isinstance(loaded, dict):
        if split not in loaded:
            origin.fail(f"{origin.text} has no split {split!r}; its splits are: {', '.join(loaded)}", "split")
        loaded = loaded[split]
    else:
        _check_unnamed_split(origin, split, str(loaded.split) if loaded.split else None)
    return _Rows(loaded.column_names, len(loaded), lambda column, rows: list(loaded.select(rows)[column]))


def _check_unnamed_split(origin: _Source, split: str, own: str | None) -> None:
    if split not in (*UNNAMED_SPLITS, own):
        origin.fail(f"{origin.text} is not divided into splits, so there is no {split!r}; write train", "split")


# Files ------------------------------------------------------------------------------------------------------


def _read_txt(origin: _Source, path: Path) -> _Rows:
    # Only line feeds end a prompt: str.splitlines would also break at form feeds and Unicode separators
    # inside one.
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    lines = [line for line in lines if line]
    return _Rows(None, len(lines), lambda _, rows: [lines[row] for row in rows])


def _read_jsonl(origin: _Source, path: Path) -> _Rows:
    records: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            origin.fail(f"line {number} of {path} is not JSON: {error.msg}", cause=error)
        if not isinstance(record, dict):
            origin.fail(f"line {number} of {path} is not a JSON object; write one object a line")
        records.append(record)
    return _from_records(records, list(dict.fromkeys(key for record in records for key in record)))


def _read_csv(origin: _Source, path: Path) -> _Rows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            columns, records = list(reader.fieldnames or ()), list(reader)
        except csv.Error as error:
            origin.fail(f"line {reader.line_num} of {path} is not CSV: {error}", cause=error)
    return _from_records(records, columns)


def _from_records(records: Sequence[dict[str, Any]], columns: Sequence[str]) -> _Rows:
    return _Rows(columns, len(records), lambda column, rows: [records[row].get(column) for row in rows])


def _read_parquet(origin: _Source, path: Path) -> _Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        columns, count = parquet.read_schema(path).names, parquet.read_metadata(path).num_rows
    except pyarrow.ArrowException as error:
        origin.fail(f"{path} is not a Parquet file: {error}", cause=error)

    def read(column: str, rows: range) -> list[Any]:
        table = parquet.read_table(path, columns=[column])
        return table.column(column).slice(rows.start, len(rows)).to_pylist()

    return _Rows(columns, count, read)


_READERS: dict[str, Callable[[_Source, Path], _Rows]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
