"""Hostile prompts, settings that name files, and run folders that something else has changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import torch
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import save_file

from tests.hostile.cases_model import DEEP, DIGITS, all_of, instead, written
from tests.hostile.harness import Case, Place, Spoil

# --- prompts --------------------------------------------------------------------------------------

SOURCE = "prompts.target.train.source"


def _file(name: str, content: str | bytes, said: str, title: str, **given: Any) -> Case:
    settings = {SOURCE: name, **{f"prompts.target.train.{key}": value for key, value in given.items()}}
    return Case(f"prompts_{title}", written(name, content), said, settings)


def _parquet(title: str, said: str, table: Any, spoil: Callable[[bytes], bytes] = bytes, **given: Any) -> Case:
    def make(place: Place) -> None:
        file = place.root / "p.parquet"
        parquet.write_table(table(), file)
        file.write_bytes(spoil(file.read_bytes()))

    settings = {SOURCE: "p.parquet", **{f"prompts.target.train.{key}": value for key, value in given.items()}}
    return Case(f"parquet_{title}", make, said, settings)


def _texts() -> pyarrow.Table:
    return pyarrow.table({"text": [f"cook plums, {n}" for n in range(200)]})


def _bad_text() -> pyarrow.Table:
    data = pyarrow.array([b"\xff\xfe"] * 8, pyarrow.binary())
    return pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 8, data.buffers())})


def _twice() -> pyarrow.Table:
    column = pyarrow.array(["a", "b"])
    return pyarrow.Table.from_arrays([column, column], names=["text", "text"])


def prompt_cases() -> list[Case]:
    lines = [
        ("cut", '{"text"', "line 2 of p.jsonl is not JSON"),
        ("list", "[1]", "line 2 of p.jsonl is not a JSON object"),
        ("number", "3", "line 2 of p.jsonl is not a JSON object"),
        ("null", "null", "line 2 of p.jsonl is not a JSON object"),
        ("deep", DEEP, "line 2 of p.jsonl is not JSON: it is nested too deeply"),
        ("deep_closed", '{"text": ' + "[" * 300 + "]" * 300 + "}", "nested too deeply"),
        ("digits", '{"text": ' + DIGITS + "}", "thousands of digits"),
        ("surrogate", '{"text": "\\ud800"}', "half of a surrogate pair"),
        ("nothing", '{"text": null}', "holds nothing in column"),
        ("number_value", '{"text": 3}', "a value of type int"),
        ("list_value", '{"text": ["a"]}', "a value of type list"),
        ("other_column", '{"other": "a"}', "holds nothing"),
        ("zeros", "\0\0\0", "line 2 of p.jsonl is not JSON"),
    ]
    splits = [
        "train[",
        "train[5:2]",
        "[:5]",
        "train[a:b]",
        f"train[:{DIGITS}]",
        "train[::2]",
        "other",
        "",
        "train[:0%]",
    ]
    sources = [
        ("nowhere", "nowhere.txt", "there is no file"),
        ("folder", "model", ""),
        ("no_user", "~nosuchuser/a.txt", "is no path"),
        ("long_name", "a" * 300 + ".txt", "is no path"),
        ("zero", "a\0.txt", "is no path"),
        ("suffix", "target.train.exe", ""),
        ("package", "pkg://nowhere/a.txt", "no Python package"),
        ("no_package", "pkg:///a.txt", "no Python package"),
        ("dotted_package", "pkg://../a.txt", ""),
        ("package_alone", "pkg://heretic_ds", ""),
        ("empty", "", "no source is set"),
        ("hub", "owner/nothing-of-the-kind", "check the name and the network"),
        ("odd", "a b\x1b[31m?*", "no data set id"),
    ]
    return [
        _file("p.txt", "", "is empty", "empty"),
        _file("p.txt", "\n \n\t\n", "is empty", "blank"),
        _file("p.txt", b"caf\xe9\n", "not UTF-8", "latin"),
        _file("p.txt", b"\xff\xfea\0", "not UTF-8", "utf16"),
        *(_file("p.jsonl", f'{{"text": "cook"}}\n{line}\n', said, f"line_{name}") for name, line, said in lines),
        _file("p.jsonl", "", "is empty", "jsonl_empty"),
        _file("p.csv", "text,text\na,b\n", "2 columns called 'text'", "csv_twice"),
        _file("p.csv", "text\n" + "x" * 200_000 + "\n", "is not CSV", "csv_long"),
        _file("p.csv", "a\x1b[31m,b\n1,2\n", "its columns are: a␛[31m, b", "csv_escape"),
        _file("p.csv", "text\n", "is empty", "csv_header"),
        _file("p.csv", b"text\n\xff\n", "not UTF-8", "csv_latin"),
        _file("p.csv", ",".join(f"c{n}" for n in range(5000)) + "\n1\n", "has no column", "csv_many"),
        _file("p.csv", "other,text\nonly\n", "holds nothing", "csv_short"),
        _file("p.parquet", "nothing of the kind", "is not a Parquet file", "parquet_text"),
        _file("p.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", "is not a Parquet file", "parquet_zeros"),
        _file("p.parquet", "", "is not a Parquet file", "parquet_empty"),
        _parquet("cut", "is not a Parquet file", _texts, lambda data: data[:-20]),
        _parquet("pages", "p.parquet", _texts, lambda data: data[:8] + bytes(len(data[8:60])) + data[60:]),
        _parquet("bad_text", "UTF-8", _bad_text),
        _parquet("twice", "2 columns called 'text'", _twice),
        _parquet("numbers", "a value of type int", lambda: pyarrow.table({"text": [1, 2]})),
        _parquet("nothing", "holds nothing", lambda: pyarrow.table({"text": ["a", None]})),
        _parquet("no_rows", "is empty", lambda: pyarrow.table({"text": pyarrow.array([], pyarrow.string())})),
        _parquet("other", "has no column", lambda: pyarrow.table({"other\x1b": ["a"]})),
        Case("prompts_pipe", instead("p.txt", os.mkfifo), "there is no file", {SOURCE: "p.txt"}),
        Case(
            "prompts_endless",
            instead("p.txt", lambda f: f.symlink_to("/dev/zero")),
            "there is no file",
            {SOURCE: "p.txt"},
        ),
        Case("prompts_huge", _huge("p.txt"), "larger than 1024 MiB", {SOURCE: "p.txt"}),
        *(
            Case(f"saved_set_{name}", all_of(_folder("set"), written(f"set/{name}", text)), "set", {SOURCE: "set"})
            for name in ("dataset_dict.json", "state.json")
            for text in ("[]",)
        ),
        Case("folder_of_nothing", _folder("set"), "set", {SOURCE: "set"}),
        *(Case(f"source_{name}", None, said, {SOURCE: source}) for name, source, said in sources),
        *(
            Case(f"split_{number}", None, "prompts.target.train.split", {"prompts.target.train.split": split})
            for number, split in enumerate(splits)
        ),
        *(
            Case(f"slice_{number}", None, "prompts.target.train.slice", {"prompts.target.train.slice": rows})
            for number, rows in enumerate(("a:b", "5", "9:9", f":{DIGITS}", "1:2:3", ":-100"))
        ),
        Case(
            "column",
            None,
            "has no column" if False else "",
            {"prompts.target.train.column": "x", SOURCE: "model/config.json"},
        ),
    ]


def _folder(name: str) -> Spoil:
    return lambda place: (place.root / name).mkdir()


def _huge(name: str) -> Spoil:
    def spoil(place: Place) -> None:
        with (place.root / name).open("wb") as file:
            file.truncate(2**30 + 1)

    return spoil


# --- settings that name files ---------------------------------------------------------------------


def path_cases() -> list[Case]:
    def compare(tensors: dict[str, torch.Tensor]) -> Spoil:
        return lambda place: save_file(tensors, place.root / "d.safetensors")

    known = {"direction.compare": "d.safetensors"}
    return [
        Case("model_nowhere", None, "there is no such folder", {"model.path": "no/such/folder"}),
        Case("model_file", None, "is a file", {"model.path": "target.train.txt"}),
        Case("model_no_user", None, "is no path", {"model.path": "~nosuchuser/m"}),
        Case("model_long_name", None, "is no path", {"model.path": "m" * 300}),
        Case("model_zero", None, "is no path", {"model.path": "m\0"}),
        Case("model_escape", None, "", {"model.path": "m\x1b]0;title\x07"}),
        Case("model_is_its_parent", None, "config.json", {"model.path": "."}),
        Case("run_no_user", None, "is no path", {"run.dir": "~nosuchuser/r"}),
        Case("run_long_name", None, "is no path", {"run.dir": "r" * 300}),
        Case("run_file", None, "target.train.txt is not a folder", {"run.dir": "target.train.txt"}),
        Case("run_below_a_file", None, "target.train.txt", {"run.dir": "target.train.txt/run"}),
        Case("run_is_the_model", None, "is not a run folder", {"run.dir": "model", "export.dir": "out"}),
        Case("run_on_proc", None, "", {"run.dir": "/proc/run", "export.dir": "out"}),
        Case("export_no_user", None, "is no path", {"export.dir": "~nosuchuser/e"}),
        Case("export_long_name", None, "is no path", {"export.dir": "e" * 300}),
        Case("export_file", None, "is a file", {"export.dir": "target.train.txt"}),
        Case("export_is_the_model", None, "", {"export.dir": "model"}),
        Case("export_on_proc", None, "/proc", {"export.dir": "/proc/model"}),
        Case("kernel_setting", None, "code on the hub", {"model.attn_implementation": "evil/kernel"}),
        Case("attention_setting", None, "", {"model.attn_implementation": "nonsense"}),
        Case("compare_nowhere", None, "direction.compare", {"direction.compare": "nowhere"}),
        Case("compare_no_user", None, "is no path", {"direction.compare": "~nosuchuser/d"}),
        Case("compare_garbage", written("d.safetensors", "x"), "is no safetensors file", known),
        Case("compare_other", compare({"other": torch.ones(32)}), "is no safetensors file", known),
        Case("compare_narrow", compare({"direction": torch.ones(3)}), "is 32 wide", known),
        Case("scorer_nowhere", None, "cannot be imported", {"scoring.scorers": ["nowhere.Class"]}),
        Case("scorer_wrong", None, "is not a class derived", {"scoring.scorers": ["json.JSONDecoder"]}),
        Case(
            "scorer_broken",
            written("broken_scorer.py", "1 / 0"),
            "ZeroDivision",
            {"scoring.scorers": ["broken_scorer.A"]},
        ),
        Case(
            "scorer_syntax",
            written("odd_scorer.py", "def"),
            "cannot be imported",
            {"scoring.scorers": ["odd_scorer.A"]},
        ),
    ]


# --- run folders ----------------------------------------------------------------------------------

_BAD: list[tuple[str, str | bytes, str]] = [
    ("list", "[]", "holds a JSON list"),
    ("null", "null", "holds a JSON NoneType"),
    ("empty", "", "cannot be read as JSON"),
    ("number", "3", "holds a JSON int"),
    ("cut", '{"a": ', "cannot be read as JSON"),
    ("deep", DEEP, "nested too deeply"),
    ("digits", '{"a": ' + DIGITS + "}", "thousands of digits"),
    ("latin", b"\xff", "not UTF-8"),
    ("zeros", b"\0" * 50, "cannot be read as JSON"),
]

_MEASURED: list[dict[str, Any]] = [
    {"batch_sizes": []}, {"batch_sizes": {"a": 3}}, {"batch_sizes": {"a": {"b": "c"}}}, {"response_prefix": 3},
    {"response_prefix": None}, {"trials_per_pass": "x"}, {"placements": []}, {"placements": {"chosen": [1]}},
    {"run_id": 7},
]  # fmt: skip

_RESULTS: list[dict[str, Any]] = [
    {"trials": {}}, {"trials": [3]}, {"trials": [{"index": "x"}]}, {"timings": []}, {"timings": {"load": "x"}},
    {"selected": "x"}, {"verified": 3}, {"pareto": {}}, {"prompts": []},
]  # fmt: skip


def _lines(change: Callable[[list[bytes]], list[bytes]]) -> Spoil:
    def spoil(place: Place) -> None:
        file = place.run / "study.journal"
        file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))

    return spoil


def _trials(lines: list[bytes]) -> list[int]:
    return [number for number, line in enumerate(lines) if json.loads(line)["op_code"] == 4]


def _swapped(lines: list[bytes]) -> list[bytes]:
    first, second = _trials(lines)
    lines[first], lines[second] = lines[second], lines[first]
    return lines


def _without_a_trial(lines: list[bytes]) -> list[bytes]:
    del lines[_trials(lines)[0]]
    return lines


def _twice_a_trial(lines: list[bytes]) -> list[bytes]:
    return [*lines, lines[_trials(lines)[1]]]


def _directions(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(place: Place) -> None:
        file = place.run / "directions.safetensors"
        with safe_open(file, framework="pt") as stored:
            tensors, metadata = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118
        change(tensors)
        save_file(tensors, file, metadata=metadata)

    return spoil


def run_folder_cases() -> list[Case]:
    def after(name: str, spoil: Spoil, said: str, **given: Any) -> Case:
        return Case(name, spoil, said, given, after_run=True)

    damage: list[tuple[str, Callable[[list[bytes]], list[bytes]]]] = [
        ("first_line", lambda lines: lines[1:]),
        ("first_two_swapped", lambda lines: [lines[1], lines[0], *lines[2:]]),
        ("trials_swapped", _swapped),
        ("trial_lacking", _without_a_trial),
        ("trial_twice", _twice_a_trial),
        ("garbage", lambda lines: [*lines[:2], b"no record\n", *lines[2:]]),
        ("blank_line", lambda lines: [*lines[:2], b"\n", *lines[2:]]),
        ("list", lambda lines: [*lines[:2], b"[]\n", *lines[2:]]),
        ("unknown_code", lambda lines: [*lines[:2], b'{"op_code": 99}\n', *lines[2:]]),
        ("odd_code", lambda lines: [*lines[:2], b'{"op_code": [4]}\n', *lines[2:]]),
        ("no_code", lambda lines: [*lines[:2], b"{}\n", *lines[2:]]),
        ("no_trial", lambda lines: [*lines[:2], b'{"op_code": 4, "worker_id": "x"}\n', *lines[2:]]),
        ("deep", lambda lines: [*lines[:2], DEEP.encode() + b"\n", *lines[2:]]),
        ("digits", lambda lines: [*lines[:2], b'{"op_code": ' + DIGITS.encode() + b"}\n", *lines[2:]]),
        ("latin", lambda lines: [*lines[:2], b'{"a": "\xff"}\n', *lines[2:]]),
        ("zeros", lambda lines: [*lines[:2], b"\0" * 20 + b"\n", *lines[2:]]),
        ("cut_inside", lambda lines: [*lines[:2], lines[2][:30], *lines[3:]]),
    ]
    half = {"index": 1, "state": "complete"}
    odd = {**half, "profiles": 3}
    return [
        *(after(f"measured_{name}", written("run/measured.json", text), "measured.json") for name, text, _ in _BAD),
        *(after(f"fingerprint_{n}", written("run/fingerprint.json", text), said) for n, text, said in _BAD),
        *(after(f"results_{name}", written("run/results.json", text), said) for name, text, said in _BAD),
        *(
            after(f"measured_{'_'.join(change)}_{n}", _edited("run/measured.json", change), "run/measured.json.")
            for n, change in enumerate(_MEASURED)
        ),
        *(
            after(f"results_{'_'.join(change)}_{n}", _edited("run/results.json", change), "run/results.json.")
            for n, change in enumerate(_RESULTS)
        ),
        *(after(f"journal_{name}", _lines(change), "study.journal") for name, change in damage),
        after("journal_is_a_folder", instead("run/study.journal", Path.mkdir), "study.journal"),
        *(
            after(
                f"directions_{name}", written("run/directions.safetensors", data), "directions.safetensors is damaged"
            )
            for name, data in (("empty", b""), ("garbage", b"x" * 99), ("zeros", b"\0" * 99))
        ),
        after("directions_shape", _directions(lambda d: d.update(directions=torch.ones(2, 2))), "of shape (2, 2)"),
        after("directions_lacking", _directions(lambda d: d.pop("directions")), "directions.safetensors is damaged"),
        after("other_settings", lambda place: None, "search.seed was 0, is now 5", **{"search.seed": 5}),
        after("other_prompts", written("target.eval.txt", "cook kale\nbake kale\n"), "prompts.target.eval.content was"),
        after("lock_is_a_folder", instead("run/.lock", Path.mkdir), "run"),
        Case("run_of_another", all_of(_folder("run"), written("run/notes.txt", "mine")), "is not a run folder"),
        after("export_without_trials", written("run/results.json", "{}"), "holds no trials", **_EXPORT),
        after(
            "export_of_none", lambda place: None, "no finished trial of that number", **(_EXPORT | {"export.trial": 9})
        ),
        after("export_half_a_trial", _edited("run/results.json", {"trials": [half]}), "not whole", **_EXPORT),
        after("export_odd_trial", _edited("run/results.json", {"trials": [odd]}), "profiles is 3", **_EXPORT),
    ]


_EXPORT: dict[str, Any] = {"task.name": "export", "export.trial": 1, "export.dir": "out"}


def _edited(name: str, changes: dict[str, Any]) -> Spoil:
    return lambda place: place.edit(name, **changes)
