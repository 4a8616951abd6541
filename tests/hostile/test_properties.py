"""What holds for any file at all: it is read, or refused with one sentence; nothing else is ever raised."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heretic_ds.ablation.edit import Edit
from heretic_ds.checkpoint.plausible import check_config
from heretic_ds.checkpoint.source import read_headers
from heretic_ds.errors import UserError
from heretic_ds.export.card import terms_of
from heretic_ds.launching.nodes import read_hostfile
from heretic_ds.prompts.sources import load_prompts
from heretic_ds.run_folder import finished_results, read_measured, read_results
from heretic_ds.search.study import Search
from heretic_ds.search.trials import TrialScores
from heretic_ds.settings import PromptSource, SearchSettings

quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
)


def settled(read: Callable[[], Any]) -> Any:
    """What a reader gives; None where it refuses, which it has to do in one line."""
    try:
        return read()
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
        return None


@quick
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1) | st.none())
def test_safetensors_files(tmp_path: Path, content: bytes, size: int | None) -> None:
    start = struct.pack("<Q", len(content) if size is None else size)
    (tmp_path / "model.safetensors").write_bytes(start + content)
    settled(lambda: read_headers(tmp_path))


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F9", 3, None]),
        "shape": st.lists(st.integers(-2, 4) | st.just(2**63) | st.none(), max_size=3) | SCALARS,
        "data_offsets": st.lists(st.integers(-1, 64) | st.just(2**64), max_size=3) | SCALARS,
    }
)


@quick
@given(st.dictionaries(st.text(max_size=8), ENTRIES | SCALARS, max_size=3), st.integers(0, 64))
def test_safetensors_headers(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    """Where one is taken, its numbers lie within the file."""
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    for info in (settled(lambda: read_headers(tmp_path)) or {}).values():
        assert 8 + len(text) <= info.begin <= file.stat().st_size
        assert all(side >= 0 for side in info.shape) and math.prod(info.shape) <= 8 * file.stat().st_size


@quick
@given(st.dictionaries(st.text(max_size=8), JSON, max_size=3) | JSON)
def test_index_files(tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert settled(lambda: read_headers(tmp_path)) is None


FIELDS = st.sampled_from(
    ["model_type", "architectures", "auto_map", "num_hidden_layers", "hidden_size", "vocab_size", "text_config",
     "dtype",
     "quantization_config", "attn_implementation", "n_layer", "head_dim"]
)  # fmt: skip


@quick
@given(st.dictionaries(FIELDS | st.text(max_size=10), JSON, max_size=6))
def test_configurations(tmp_path: Path, config: dict[str, Any]) -> None:
    """What passes can be used as what it is taken for."""
    if settled(lambda: check_config(config, tmp_path / "config.json", {}) or True):
        assert isinstance(config.get("model_type") or "", str)
        assert all(isinstance(each, str) for each in config.get("architectures") or [])
        assert (config.get("text_config") or {}).items() is not None
        depth = config.get("num_hidden_layers")
        assert isinstance(depth, list | None) or 0 <= depth <= 10_000


def prompts(file: Path) -> list[str]:
    return load_prompts(PromptSource(source=str(file)), "prompts.target.train")


@quick
@given(st.lists(JSON.map(json.dumps) | st.text(max_size=30), max_size=5))
def test_lines_of_json(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    assert all(text.strip() for text in settled(lambda: prompts(tmp_path / "p.jsonl")) or [])


@quick
@given(st.sampled_from(["p.txt", "p.csv", "p.jsonl", "p.parquet"]), st.binary(max_size=300))
def test_any_file_of_prompts(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    settled(lambda: prompts(tmp_path / name))


@quick
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_files_of_a_run(tmp_path: Path, content: bytes) -> None:
    for name in ("results.json", "measured.json", "fingerprint.json"):
        (tmp_path / name).write_bytes(content)
    settled(lambda: read_results(tmp_path))
    assert isinstance(settled(lambda: read_measured(tmp_path)) or {}, dict)
    assert finished_results(tmp_path, {"a": 1}, {"b": 2}) is None


@quick
@given(st.text(max_size=300) | JSON.map(lambda value: f"license: {json.dumps(value)}"))
def test_cards(tmp_path: Path, front: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n", encoding="utf-8", errors="surrogatepass")
    kept, _ = terms_of(tmp_path / "README.md")
    for value in kept.values():
        for text in value if isinstance(value, list) else [value]:
            assert text.isprintable() and len(text) <= 200


HOSTS = st.text("abz019.-_@;$()`'\"\\ |&<>%:[]{}*?~#\t", max_size=12)


@quick
@given(HOSTS)
def test_hosts(tmp_path: Path, name: str) -> None:
    """A host is a word that neither ssh nor a shell takes for anything else."""
    (tmp_path / "hosts").write_text(f"{name} slots=2\n")
    for host in settled(lambda: read_hostfile(tmp_path / "hosts")) or {}:
        assert not host.startswith("-") and "@-" not in host
        assert not set(host) & set(";$()`'\"\\ |&<>[]{}*?~#\t")


@pytest.mark.parametrize(
    "name",
    ["-oProxyCommand=x", "u@-oX", "a;b", "$(x)", "`x`", "a|b", "a&b", "a>b", "a'b", 'a"b', "a\\b", "@a", "a@", "a@@b",
     ".a", "a..b", "a" * 300, "*", "a\x1b", "ä"],
)  # fmt: skip
def test_no_host(tmp_path: Path, name: str) -> None:
    (tmp_path / "hosts").write_text(f"{name} slots=2\n")
    with pytest.raises(UserError, match="line 1"):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    "name", ["node1", "node-1.cluster.example", "user@node1", "10.0.0.7", "fe80::1%eth0", "N_1", "a.b."]
)
def test_a_host(tmp_path: Path, name: str) -> None:
    (tmp_path / "hosts").write_text(f"{name} slots=2\n")
    assert read_hostfile(tmp_path / "hosts") == {name: 2}


def scores(edit: Edit) -> TrialScores:
    strength = sum(profile.max_weight for profile in edit.profiles.values())
    return TrialScores(round(20 / (1 + strength)), 0.01 * strength, {})


def search(path: Path) -> Search:
    return Search(path, 6, SearchSettings(trials=6, startup_trials=9), baseline_refusals=20, trials_per_pass=1)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Any]]:
    """A journal of six trials, and them."""
    path = tmp_path_factory.mktemp("study") / "study.journal"
    study = search(path)
    while asks := study.ask():
        for ask in asks:
            study.tell(ask, scores(ask.edit), seconds=0.1)
    return path.read_bytes(), study.records


@settings(quick, max_examples=150)
@given(st.data())
def test_journals(tmp_path: Path, journal: tuple[bytes, list[Any]], data: st.DataObject) -> None:
    """However it was damaged: refused, or the trials that it gives are the first ones of the study."""
    content, records = journal
    lines = content.splitlines(keepends=True)
    place = data.draw(st.integers(0, len(lines) - 1))
    other = data.draw(st.integers(0, len(lines) - 1))
    damage = data.draw(st.sampled_from(["cut", "swap", "drop", "twice", "move", "garble"]))
    if damage == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    elif damage == "garble":
        at = data.draw(st.integers(0, len(content) - 1))
        content = content[:at] + data.draw(st.binary(min_size=1, max_size=9)) + content[at:]
    else:
        line = lines.pop(place) if damage != "twice" else lines[place]
        if damage in ("swap", "move", "twice"):
            lines.insert(other, line)
        content = b"".join(lines)
    path = tmp_path / "study.journal"
    path.write_bytes(content)
    found = settled(lambda: search(path).records)
    if found is not None and damage != "garble":  # a digit more is another trial, and valid
        assert [record.to_dict() for record in found] == [record.to_dict() for record in records[: len(found)]]
