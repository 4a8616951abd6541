"""Reads lists of prompts from data sets and files; a mistake is one sentence naming the override.

Files are not left to ``datasets``, whose readers guess types: of texts that look like dates they make dates, of ``NA``
and ``None`` in a ``.csv`` nothing, and numbers of digits. They keep a byte order mark, take ``["a"]`` for a row, and
say "in row 1" of whichever line is wrong. 100,000 lines take them 0.9 s (0.15 s here), and their import 0.4 s.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import MISSING

from heretic_ds.checkpoint.fitness import some_names
from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import MEBIBYTE, loads, path_of, read_bytes, read_text, reading
from heretic_ds.foreign.text import in_one_line
from heretic_ds.settings import PromptSource

log = logging.getLogger(__name__)

_LIMIT = 1024 * MEBIBYTE
"""Bytes of the largest file of prompts that is read."""

MOST_BEHIND = 1000
"""Rows behind the chosen ones that are looked at."""

PACKAGE_SCHEME = "pkg://"
# A file or a single saved data set has one unnamed split. It goes by each of the usual names, so that
# replacing the source alone works whichever split the replaced source was read from.
UNNAMED_SPLITS = ("train", "validation", "test", "all")

_HUB_ID = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")
_SPLIT = re.compile(r"(?P<base>[^\[\]]+?)(\[(?P<rows>[^\[\]]*)\])?")
_ROWS = re.compile(r"\s*(?P<start>[+-]?\d{1,18}%?|)\s*:\s*(?P<stop>[+-]?\d{1,18}%?|)\s*")


@dataclass(frozen=True)
class Prompts:
    """What a source holds for a run."""

    texts: list[str]
    rows: int
    """Of the source's split, of which the texts are those that were asked for."""
    behind: list[str] = field(default_factory=list)
    """Usable texts of the rows that follow those, at most :data:`MOST_BEHIND` of them."""


_Found = tuple[Sequence[str], Sequence[Any]]
"""Names of the columns, and the asked one's value for each row: anything where there is no such column."""


@dataclass(frozen=True)
class _Source:
    """A source and the override prefix that messages about it name, such as ``prompts.target.train``."""

    name: str
    given: PromptSource

    @property
    def text(self) -> str:
        return self.given.source

    def fail(self, problem: str, field: str = "source", cause: BaseException | None = None) -> NoReturn:
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
    return read_prompts(source, name).texts


def read_prompts(source: PromptSource, name: str) -> Prompts:
    """:func:`load_prompts`, with how many rows there are to choose from."""
    origin = _Source(name, source)
    if source.source in (MISSING, ""):
        origin.fail("no source is set; give a data set id, a folder or a file")
    match = _SPLIT.fullmatch(source.split.strip())
    if match is None:
        origin.fail(
            f"cannot read {in_one_line(repr(source.split), 80)}; write a split's name, as in train, or with rows, as "
            "in train[:400]",
            "split",
        )
    within_split = _bounds(origin, "split", source.split, match["rows"])
    given = source.slice
    within_slice = _bounds(origin, "slice", given, given and given.strip().removeprefix("[").removesuffix("]"))
    columns, values = _open(origin, match["base"].strip())
    if not len(values):
        origin.fail(f"{origin.text} is empty; choose one that holds prompts")
    chosen = _cut(origin, "split", range(len(values)), within_split)
    chosen = _cut(origin, "slice", chosen, within_slice)
    if source.column not in columns:
        listed = in_one_line(", ".join(columns)) or "none"
        origin.fail(f"{origin.text} has no column {source.column!r}; its columns are: {listed}", "column")
    with reading(origin.text):  # data sets read their files when they are asked
        wanted = list(values[chosen.start : chosen.stop])
        behind = list(values[chosen.stop : chosen.stop + MOST_BEHIND])
    return Prompts(_texts(origin, chosen, wanted), len(values), [text for text in behind if _is_prompt(text)])


def _texts(origin: _Source, chosen: range, values: Sequence[Any]) -> list[str]:
    """Checks that the values are text, and drops blank ones."""
    for row, value in zip(chosen, values, strict=True):
        place = f"row {row} of {origin.text} holds"
        if not isinstance(value, str):
            kind = "nothing" if value is None else f"a value of type {type(value).__name__}"
            origin.fail(f"{place} {kind} in column {origin.given.column!r}; choose a column of texts", "column")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # JSON's escapes can write halves, which tokenizers refuse
            origin.fail(
                f"{place} half of a surrogate pair in column {origin.given.column!r}, "
                "which is no character; mend that row or leave it out",
            )
    prompts = [value for value in values if value.strip()]
    if not prompts:
        origin.fail(f"the chosen rows of {origin.text} hold only blank prompts; choose other rows or another column")
    if len(prompts) < len(values):
        log.warning("%s: %d blank prompts left out", origin.name, len(values) - len(prompts))
    return prompts


def _is_prompt(value: Any) -> bool:
    """Whether a value that nobody asked for may be a prompt."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


def _bounds(origin: _Source, field: str, given: str | None, rows: str | None) -> re.Match[str]:
    """Start and stop in ``rows``, a part of what was ``given`` for a field; None: all rows."""
    match = _ROWS.fullmatch(":" if rows is None else rows)
    if match is None:
        example = "0:400" if field == "slice" else "train[:400]"
        origin.fail(f"cannot read the rows in {in_one_line(repr(given), 80)}; write start:stop, as in {example}", field)
    return match


def _cut(origin: _Source, field: str, rows: range, bounds: re.Match[str]) -> range:
    """The rows within bounds; an empty choice is an error."""

    def bound(text: str) -> int | None:
        if text.endswith("%"):
            return round(len(rows) * int(text[:-1]) / 100)
        return int(text) if text else None

    chosen = rows[bound(bounds["start"]) : bound(bounds["stop"])]
    if not chosen:
        given = getattr(origin.given, field)
        origin.fail(f"{given!r} leaves none of the {len(rows)} rows of {origin.text}", field)
    return chosen


def _open(origin: _Source, split: str) -> _Found:
    """The split of that name, wherever it is."""
    packaged = origin.text.startswith(PACKAGE_SCHEME)
    path = _in_package(origin) if packaged else path_of(origin.text, f"{origin.name}.source")
    folder = path.is_dir() and not packaged
    file = packaged or (path.suffix.lower() in _READERS and not folder)
    saved = folder and any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if origin.given.subset is not None and (file or saved):
        origin.fail(f"{origin.text} has no configurations to choose from; leave it null", "subset")
    if file:
        _check_unnamed_split(origin, split)
        return _open_file(origin, path)
    kind = f"the folder {path}"
    if not folder:
        if path.exists():
            origin.fail(f"{path} is of no known kind; give a folder or a file ending in {', '.join(_READERS)}")
        if not _HUB_ID.fullmatch(origin.text):
            origin.fail(f"there is no file or folder {path}, and it is no data set id; check the path")
        kind = f"there is no file or folder {origin.text}, and the data set of that id"
    import datasets

    try:
        with reading(kind):
            if saved:
                loaded = datasets.load_from_disk(str(path))
            else:
                loaded = datasets.load_dataset(str(path) if folder else origin.text, origin.given.subset)
    except UserError as error:
        _explain(origin, kind, error.__cause__ or error)
    if not isinstance(loaded, dict):
        _check_unnamed_split(origin, split, str(loaded.split))
    elif split in loaded:
        loaded = loaded[split]
    else:
        origin.fail(f"{origin.text} has no split {split!r}; its splits are: {', '.join(loaded)}", "split")
    there = origin.given.column in loaded.column_names
    return loaded.column_names, loaded[origin.given.column] if there else range(len(loaded))


def _explain(origin: _Source, kind: str, error: BaseException) -> NoReturn:
    """Say why ``datasets`` gave nothing."""
    told, subset = " ".join(str(error).split()) or type(error).__name__, origin.given.subset
    if "Config name is missing" in told or f"BuilderConfig {subset!r}" in told:
        named = some_names(re.findall(r"'([^']+)'", told.partition("[")[2].partition("]")[0]), shown=20)
        given = "null" if subset is None else repr(subset)
        origin.fail(f"{given} is none of the configurations of {origin.text}: {named}; choose one", "subset", error)
    advice = "check the name and the network, or give a local file"
    origin.fail(f"{kind} cannot be read: {told[:300]}; {advice}", cause=error)


def _in_package(origin: _Source) -> Path:
    package, _, inside = origin.text.removeprefix(PACKAGE_SCHEME).partition("/")
    try:
        return Path(str(resources.files(package).joinpath(inside)))
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        origin.fail(f"there is no Python package {package!r}; write pkg://package/path", cause=error)


def _check_unnamed_split(origin: _Source, split: str, own: str | None = None) -> None:
    if split not in (*UNNAMED_SPLITS, own):
        origin.fail(f"{origin.text} is not divided into splits, so there is no {split!r}; write train", "split")


def _open_file(origin: _Source, path: Path) -> _Found:
    read = _READERS.get(path.suffix.lower())
    if read is None:
        origin.fail(f"{path} is of no known kind; give a file ending in {', '.join(_READERS)}")
    if not path.is_file():
        origin.fail(f"there is no file {path}; check the path")
    try:
        with reading(path):
            return read(origin, path)
    except UserError as error:
        if str(error).startswith(f"{origin.name}."):
            raise
        cause = error.__cause__
        if isinstance(cause, UnicodeDecodeError):
            origin.fail(f"{path} is not UTF-8 text (byte {cause.start}); save it as UTF-8", cause=cause)
        origin.fail(str(error), cause=cause)


def _lines(path: Path) -> list[str]:
    text = read_text(path, _LIMIT, "give another file", encoding="utf-8-sig")
    # Only line feeds end a line: str.splitlines would also break at form feeds and Unicode separators inside one.
    return [line.strip() for line in text.split("\n")]


@dataclass
class _Line:
    """The line of a file that is being read."""

    path: Path
    number: int = 0

    def __str__(self) -> str:
        return f"line {self.number} of {self.path}"


def _read_txt(origin: _Source, path: Path) -> _Found:
    return [origin.given.column], [line for line in _lines(path) if line]


def _read_jsonl(origin: _Source, path: Path) -> _Found:
    records: list[dict[str, Any]] = []
    place, lines = _Line(path), _lines(path)
    with reading(place, "mend that line", "is not JSON"):
        for place.number, line in enumerate(lines, start=1):
            if not line:
                continue
            record = loads(line)
            if not isinstance(record, dict):
                origin.fail(f"{place} is not a JSON object; write one object a line")
            records.append(record)
    return list(dict.fromkeys(chain(*records))), [record.get(origin.given.column) for record in records]


def _read_csv(origin: _Source, path: Path) -> _Found:
    with reading(path, "give another file"):
        text = read_bytes(path, _LIMIT, "give another file").decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            names = list(reader.fieldnames or ())
            _check_unambiguous(origin, path, names)
            return names, [record.get(origin.given.column) for record in reader]
        except csv.Error as error:
            origin.fail(f"line {reader.line_num} of {path} is not CSV: {error}", cause=error)


def _read_parquet(origin: _Source, path: Path) -> _Found:
    from pyarrow import parquet

    column = origin.given.column
    with reading(path, "give another file", "is not a Parquet file, or is damaged"):
        if path.stat().st_size > _LIMIT:
            raise UserError(f"{path} is larger than {_LIMIT // MEBIBYTE} MiB, the most that is read; give another file")
        columns = parquet.read_schema(path).names
        _check_unambiguous(origin, path, columns)
        table = parquet.ParquetFile(path).read([column] if column in columns else [])
        return columns, table[column].to_pylist() if column in columns else range(table.num_rows)


def _check_unambiguous(origin: _Source, path: Path, columns: Sequence[str]) -> None:
    column = origin.given.column
    if columns.count(column) > 1:
        origin.fail(f"{path} has {columns.count(column)} columns called {column!r}; name each only once", "column")


_READERS: dict[str, Callable[[_Source, Path], _Found]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
