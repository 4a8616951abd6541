"""The one door for foreign files: what goes through it, that it is the only one, and what limits hold there."""

from __future__ import annotations

import ast
import errno
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

from heretic_ds.errors import UserError
from heretic_ds.foreign import limits
from heretic_ds.foreign.disk import writing
from heretic_ds.foreign.limits import TooMuch, in_child
from heretic_ds.foreign.reading import (
    NUMBER,
    check_shape,
    loads,
    parse_json,
    path_of,
    read_bytes,
    read_json,
    read_text,
    reading,
)
from heretic_ds.foreign.text import in_one_line, printable
from tests.unit.test_layers import files

# --- the contract ---------------------------------------------------------------------------------

READERS = {
    "open", "read_text", "read_bytes", "safe_open", "load_file", "from_pretrained", "load_dataset", "load_from_disk",
    "read_schema", "read_table", "ParquetFile", "DictReader", "expanduser",
}  # fmt: skip
"""Functions and methods that read files of any kind; ``open`` is one where it may read."""
PARSERS = {"json": {"load", "loads"}, "yaml": {"load", "safe_load"}, "pickle": {"load", "loads"}, "torch": {"load"}}
"""By module, functions that make values of foreign text."""

GUARDS = {"reading", "writing"}
"""What a reader has to be called within; a file of our own is cut within the second."""

OWN = {
    "fingerprint": "its own settings, through JSON and back",
    "launching.nodes": "the pipe to a node that this process started",
    "launching.rank_guard": "the word that this rank left",
    "launching.supervisor": "what this command's own ranks leave, and /proc",
    "memory": "/proc and the system's control groups",
    "placements.vllm.inside.wire": "the socket between two processes of this program",
    "placements.vllm.server": "the answer and the log of a server that this program started",
    "planner.here": "/proc",
    "report.html.page": "its own style and script",
    "search.dashboard": "what this run has written, to make it an artifact",
    "world": "what ranks of one job tell each other",
}
"""Modules that read something else than foreign files, and what."""


def offences(file: Path) -> Iterator[str]:
    """Calls in a file that read, but for those within a guard."""
    tree = ast.parse(file.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and any(isinstance(item.context_expr, ast.Call) and _name(item.context_expr) in GUARDS for item in node.items)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in guarded and _reads(node):
            yield f"line {node.lineno}: {ast.unparse(node.func)}"


def _name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _reads(call: ast.Call) -> bool:
    name = _name(call)
    if isinstance(call.func, ast.Name) and name in ("read_text", "read_bytes"):
        return False  # those of the door
    if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
        parses = name in PARSERS.get(call.func.value.id, ())
    else:
        parses = False
    if name != "open":
        return parses or name in READERS
    given = call.args[1 if isinstance(call.func, ast.Name) else 0 :] + [each.value for each in call.keywords]
    modes = [each.value for each in given if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    if isinstance(call.func, ast.Attribute) and call.args and not modes:
        return False  # the opening of something else: a run folder, a descriptor
    return not modes or "r" in modes[0]


@pytest.mark.parametrize(("name", "file"), files(), ids=lambda value: value if isinstance(value, str) else "")
def test_foreign_files_are_opened_in_one_place(name: str, file: Path) -> None:
    found = [] if name.split(".")[0] == "foreign" else list(offences(file))
    if name in OWN:
        assert found, f"{name} reads nothing any more: take it off the list"
    else:
        assert not found, f"{name}: {found}; call readers within heretic_ds.foreign.reading.reading"


def test_offences_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(
        "import json\n"
        "json.loads(x)\n"
        "p.read_text()\n"
        "p.open()\n"
        "open(p, 'r+b')\n"
        "safe_open(p, framework='pt')\n"
        "with reading(p):\n    safe_open(p)\n    json.loads(p)\n"
        "p.open('w')\nRunFolder.open(p, config)\n"
        "with other(p):\n    T.from_pretrained(p)\n"
    )
    found = [offence.split()[1].rstrip(":") for offence in offences(tmp_path / "wrong.py")]
    assert found == ["2", "3", "4", "5", "6", "13"]


# --- reading --------------------------------------------------------------------------------------


class PanicException(BaseException):
    """As libraries written in Rust raise."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EACCES, "Permission denied"), "Permission denied"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (MemoryError(), "more memory than there is"),
        (IndexError("list index out of range"), "IndexError: list index out of range"),
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError("first\nsecond \x1b[31m"), "first"),
        (PanicException("index out of bounds"), "index out of bounds"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_whatever_a_reader_raises_is_one_sentence(error: BaseException, said: str) -> None:
    with pytest.raises(UserError) as found, reading("the/file", "give another"):
        raise error
    [line] = str(found.value).splitlines()
    assert line.startswith("the/file cannot be read: ") and said in line and line.endswith("; give another")


def test_what_is_no_mistake_of_a_file_passes() -> None:
    for error in (KeyboardInterrupt(), SystemExit(3), UserError("as it is")):
        with pytest.raises(type(error)) as found, reading("x"):
            raise error
        assert found.value is error


def test_sizes_and_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 11)
    assert read_bytes(tmp_path / "large", 11) == b"x" * 11
    with pytest.raises(UserError, match="larger than"):
        read_bytes(tmp_path / "large", 10)
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("pipe", "no ordinary file"), (".", "directory"), ("none", "No such file")):
        with pytest.raises(UserError, match=said):
            read_bytes(tmp_path / name, 10)
    with pytest.raises(UserError, match="no ordinary file"):
        read_bytes(Path("/dev/zero"), 10)
    (tmp_path / "text").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 3\)"):
        read_text(tmp_path / "text")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply|Expecting"),
        ("[" * 500 + "]" * 500, "nested too deeply"),
        ('{"a":' * 300 + "1" + "}" * 300, "nested too deeply"),
        ("1" * 6000, "thousands of digits"),
        ('{"a": 1,}', "line 1, column"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"^here cannot be read as JSON: .*({said}).*; mend it$"):
        parse_json(text, "here", "mend it")


def test_json_that_is_read(tmp_path: Path) -> None:
    assert loads("[" * 99 + "]" * 99) and loads("1") == 1 and loads('"x"') == "x" and loads("null") is None
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(UserError, match="holds a JSON list, where an object is expected"):
        read_json(tmp_path / "a.json")


def test_paths() -> None:
    assert path_of("~", "x") == Path.home() and path_of("nowhere/at/all", "x") == Path("nowhere/at/all")
    for text in ("~nosuchuser/a", "a" * 300, "a\0b"):
        with pytest.raises(UserError, match=r"^run\.dir=.* is no path: ") as found:
            path_of(text, "run.dir")
        assert len(str(found.value)) < 300


def test_shapes() -> None:
    shape = {"trials": [{"index": int, "scores": {str: NUMBER}}], "name": (str, type(None))}
    check_shape({"trials": [{"index": 1, "scores": {"a": 0.5}}], "name": None, "more": [1]}, shape, "f", "go")
    for wrong, place in (
        ([], "f is"),
        ({"trials": {}}, "f.trials is"),
        ({"trials": [3]}, r"f.trials\[0\] is 3"),
        ({"trials": [{"index": True}]}, r"f.trials\[0\].index is true"),
        ({"trials": [{"scores": {"a": "0.5"}}]}, r'f.trials\[0\].scores.a is "0.5"'),
        ({"name": 3}, "f.name is 3"),
    ):
        with pytest.raises(UserError, match=place + ".*; go"):
            check_shape(wrong, shape, "f", "go")


# --- text -----------------------------------------------------------------------------------------


def test_text_becomes_fit_to_print() -> None:
    assert printable("plain\tand\nlines ✓") == "plain\tand\nlines ✓"
    assert printable("\x1b[31mred\x07 \x9b2J \x7f \r") == "␛[31mred␇ \ufffd2J ␡ ␍"
    assert printable("a\u202eb\u2066c\ud800") == "a\ufffdb\ufffdc\ufffd"
    assert in_one_line("a\n b\x1b" + "x" * 999, 20) == "a b␛" + "x" * 13 + "..."


# --- limits ---------------------------------------------------------------------------------------


def test_a_child_gives_back_what_it_made_and_what_it_raised() -> None:
    assert in_child(lambda: {"pid": os.getpid()})["pid"] != os.getpid()
    with pytest.raises(ZeroDivisionError):
        in_child(lambda: 1 / 0)

    class Own(Exception):
        pass

    def fail() -> None:
        raise Own("said\nso")

    with pytest.raises(ValueError, match=r"^said so$"):
        in_child(fail)


def _endless() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (_endless, "took more than 1 s|did not end"),
        (lambda: len("a" * 2**33), "MiB of memory"),
        (lambda: 9**9**9, "took more than 1 s|did not end|memory"),
        (lambda: time.sleep(60), "did not end within 3 s"),
        (lambda: os.kill(os.getpid(), 11), "broke the process"),
        (lambda: "a" * (2**28 + 9), "MiB of text"),
    ],
)
def test_a_child_ends(work, said: str) -> None:
    began, others = time.monotonic(), psutil.Process().children()
    with pytest.raises(TooMuch, match=said):
        in_child(work, seconds=1)
    assert time.monotonic() - began < 20
    assert psutil.Process().children() == others


def _growing() -> None:
    held = []
    while True:
        held.append(b"a" * 2**24)
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("work", "said"),
    [(_endless, "took more than 1 s|did not end"), (_growing, "more than 64 MiB of memory"), (lambda: 1, None)],
)
def test_a_parent_ends_a_child_where_the_kernel_knows_no_limits(
    work, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_KERNEL_LIMITS", False)
    monkeypatch.setattr(limits, "MEMORY", 2**26)
    with nullcontext() if said is None else pytest.raises(TooMuch, match=said):
        assert in_child(work, seconds=1) == 1


def test_recursion_in_a_child_is_an_error_of_its_own() -> None:
    def deep(n: int) -> int:
        return deep(n + 1)

    with pytest.raises(RecursionError):
        in_child(lambda: deep(0))


# --- disks ----------------------------------------------------------------------------------------


def test_what_a_disk_refuses_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=rf"^the disk of {tmp_path} is full: {10**18} bytes .* more than are free"),
        writing(tmp_path, "run.dir", 10**18),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match=r"cannot be written \(Read-only"), writing(tmp_path, "run.dir"):
        raise OSError(errno.EROFS, "Read-only file system")
    with pytest.raises(UserError, match="ulimit -f"), writing(tmp_path / "new" / "er", "run.dir"):
        raise OSError(errno.EFBIG, "File too large")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB, where this machine lets tests mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no disk can be mounted: {error}")
    if done.returncode:
        pytest.skip(f"no disk can be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """A file that leaves so many bytes of a disk free."""
    file = folder / "ballast"
    size = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - leave
    file.write_bytes(b"x" * max(size, 0))
    return file


def test_a_run_folder_on_a_full_disk(small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each file names the folder and what is missing; the log is silent, and whole again once there is room."""
    import logging

    from heretic_ds.run_folder import RunFolder

    logger = logging.getLogger("heretic_ds.of_this_test")
    with RunFolder.open(small_disk / "run", "config", {"a": 1}) as folder:
        folder.attach_log(logger)
        folder.save_results({"trials": []})
        before = folder.results.read_text()
        ballast = fill(small_disk)
        with pytest.raises(UserError, match=rf"the disk of {small_disk / 'run'} is full: \d+ bytes .* are free"):
            folder.save_results({"trials": ["x" * 9000]})
        with pytest.raises(UserError, match=rf"the disk of {small_disk / 'run'} is full"):
            folder.remember(response_prefix="x" * 9000)
        assert folder.results.read_text() == before
        for _ in range(200):
            logger.warning("a line of text that is said while there is no room for it on the disk")
        ballast.unlink()
        logger.warning("there is room")
        assert "there is room" in folder.log.read_text()
    assert capfd.readouterr().err == ""
    assert json.loads(before) == {"trials": []}
