"""Export: a folder that loads wherever the original did, written at once or not at all."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from heretic_ds.checkpoint.open import LoadedModel, ModelChoice, load_weights, open_model
from heretic_ds.checkpoint.source import read_headers
from heretic_ds.errors import UserError
from heretic_ds.export import target as target_module
from heretic_ds.export.card import CardFacts, model_card
from heretic_ds.export.checkpoint import Beside, export_model, model_bytes
from heretic_ds.export.gguf import convert_to_gguf, find_converter
from heretic_ds.export.manifest import build_manifest
from heretic_ds.export.target import check_export_target, recover_leftovers
from tests import families
from tests.unit.test_loading import edit_json, quantised_gpt_oss


@dataclass(frozen=True)
class StandInProfile:
    max_weight: float = 1.25
    max_weight_position: float = 1.5
    min_weight: float = 0.5
    min_weight_distance: float = 1.0


@dataclass(frozen=True)
class StandInEdit:
    direction_index: float | None = None
    profiles: ClassVar = {"attention": StandInProfile(), "mlp": StandInProfile(max_weight=0.75)}


FACTS = CardFacts(
    edit=StandInEdit(),
    row_norm="full",
    through_norm=False,
    orthogonalize=True,
    winsorize_quantile=0.95,
    writers={"attention": 2, "mlp": 2},
    refusals_before=97,
    refusals_after=3,
    target_prompts=100,
    kl=0.01234,
    baseline_prompts=80,
    prompt_sources={"target.train": "/home/someone/private/weather.txt", "baseline.train": "owner/questions"},
    trial=17,
)
MANIFEST = {"schema": 1, "edit": {"direction_index": None}}


def load(folder: Path) -> LoadedModel:
    return load_weights(open_model(ModelChoice(path=str(folder), device="cpu")))


def change_weights(loaded: LoadedModel) -> None:
    """Stand-in for an edit: every parameter moves."""
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(0.75)


def export(loaded: LoadedModel, target: Path, **options):
    return export_model(loaded, target, "# card\n", MANIFEST, **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = families.save("llama", tmp_path_factory.mktemp("models") / "tiny-llama", dtype=torch.bfloat16)
    generation = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "eos_token_id": [2, 5],
        "pad_token_id": 0,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "LICENSE").write_text("Do as you like.")
    (folder / "USE_POLICY.md").write_text("Be kind.")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: kind\nlicense_link: LICENSE\n---\nA model.")
    (folder / "training.log").write_text("not part of the model")
    return folder


@pytest.fixture
def loaded(base: Path) -> LoadedModel:
    return load(base)


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", families.REQUIRED)
def test_reloaded_parameters_are_bit_equal(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = families.save(family, tmp_path / family, dtype=dtype)
    original = load(folder)
    change_weights(original)
    result = export(original, tmp_path / "out")
    again = load(result.folder).model.state_dict()
    state = original.model.state_dict()
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name
    assert read_headers(folder).keys() == read_headers(result.folder).keys()
    assert result.carried == () and result.tensors == len(read_headers(folder))
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, result.folder))
    assert before == after


def test_experts_keep_their_names_on_disk(tmp_path: Path) -> None:
    loaded = load(families.save("mixtral", tmp_path / "mixtral"))
    change_weights(loaded)
    export(loaded, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    fused = loaded.model.state_dict()["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"], fused[3])


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    loaded = load(families.save("gpt2", tmp_path / "gpt2"))
    export(loaded, tmp_path / "out")
    assert "lm_head.weight" not in read_headers(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_companion_files_are_the_originals(base: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    loaded.tokenizer.pad_token = "<eos>"  # changes in memory are not the user's
    out = export(loaded, tmp_path / "out").folder
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE",
        "USE_POLICY.md",
    ):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert GenerationConfig.from_pretrained(out) == GenerationConfig.from_pretrained(base)
    assert AutoTokenizer.from_pretrained(out).chat_template == families.CHAT_TEMPLATE
    assert not (out / "training.log").exists()
    assert (out / "README.md").read_text() == "# card\n"
    manifest = json.loads((out / "heretic_ds.json").read_text())
    files = manifest.pop("files")
    assert manifest == {**MANIFEST, "carried": []}
    assert files.keys() == names(out) - {"README.md", "heretic_ds.json"}
    assert files["LICENSE"] == sha256(b"Do as you like.").hexdigest()


def test_a_base_without_generation_settings_gets_none(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "copy"))
    (folder / "generation_config.json").unlink()
    out = export(load(folder), tmp_path / "out").folder
    assert not (out / "generation_config.json").exists()


def test_configuration_states_the_dtype_written(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "copy"))
    edit_json(folder / "config.json", dtype=None, torch_dtype="bfloat16", _name_or_path="/home/someone/llama")
    loaded = load_weights(open_model(ModelChoice(path=str(folder), device="cpu", dtype="float32")))
    export(loaded, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float32" and "_name_or_path" not in config
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_a_dequantised_model_is_an_ordinary_one(tmp_path: Path) -> None:
    loaded = load(quantised_gpt_oss(tmp_path / "gpt-oss"))
    change_weights(loaded)
    out = export(loaded, tmp_path / "out").folder
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert "model.layers.0.mlp.experts.down_proj" in read_headers(out)
    again = load(out)
    assert again.quantization is None
    state = again.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.model.state_dict().items())
    assert "dequantised" in model_card(loaded, FACTS) and "dequantised" not in model_card(again, FACTS)


@pytest.mark.parametrize("max_shard_size", [None, "20KB"])
def test_tensors_the_model_does_not_use_are_carried_over(base: Path, tmp_path: Path, max_shard_size) -> None:
    """Heads that predict further tokens, and what else transformers drops; in the files it loads nothing is amiss."""
    folder = Path(shutil.copytree(base, tmp_path / "copy"))
    extra = {"mtp.head.weight": torch.randn(40, 200).bfloat16(), "mtp.steps": torch.arange(3)}
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load(folder)
    change_weights(loaded)
    result = export(loaded, tmp_path / "out", beside=Beside(max_shard_size=max_shard_size))
    assert result.carried == ("mtp.head.weight", "mtp.steps")
    assert json.loads((tmp_path / "out" / "heretic_ds.json").read_text())["carried"] == list(result.carried)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) == 2) == (max_shard_size is None) and read_headers(tmp_path / "out").keys() >= extra.keys()
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(written[name], tensor) for name, tensor in extra.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    state, again = loaded.model.state_dict(), load(tmp_path / "out").model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_names_without_their_prefix_are_not_taken_for_unused(tmp_path: Path) -> None:
    """Checkpoints of a decoder alone, as GPT-2's on the hub."""
    folder = families.save("gpt2", tmp_path / "gpt2")
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    assert "h.0.attn.c_proj.weight" in tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert export(load(folder), tmp_path / "out").carried == ()


def test_everybody_may_read_an_export_whatever_the_umask(base: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        out = export(loaded, tmp_path / "out", beside=Beside(directions=torch.ones(3, 32))).folder
    finally:
        os.umask(before)
    modes = {file.relative_to(out).as_posix(): file.stat().st_mode & 0o777 for file in [out, *out.rglob("*")]}
    assert {"model.safetensors", "config.json", "reproduce/directions.safetensors"} <= modes.keys()
    assert {mode for name, mode in modes.items() if not (out / name).is_dir()} == {0o644}
    assert modes["."] == modes["reproduce"] == 0o755


def test_weight_files_are_as_large_as_is_asked(loaded: LoadedModel, tmp_path: Path) -> None:
    out = export(loaded, tmp_path / "out", beside=Beside(max_shard_size="20KB")).folder
    files = list(out.glob("*.safetensors"))
    assert len(files) > 2 and max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= 20_000
    assert load(out).model.state_dict().keys() == loaded.model.state_dict().keys()


def test_no_path_of_this_machine_is_told(base: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    manifest = build_manifest(
        loaded,
        edit={},
        row_norm="full",
        through_norm=False,
        trial=1,
        scores={},
        verified=None,
        tensors_edited=[],
    )
    export_model(loaded, tmp_path / "out", model_card(loaded, FACTS), manifest)
    for file in (tmp_path / "out").iterdir():
        content = file.read_bytes()
        assert str(base.parent).encode() not in content and b"someone" not in content, file.name


# --- where it may be written ----------------------------------------------------------------------


def test_a_folder_in_use_is_refused(base: Path, tmp_path: Path) -> None:
    assert check_export_target(tmp_path / "new" / "model", overwrite=False) == tmp_path / "new" / "model"
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    check_export_target(tmp_path / "empty", overwrite=False)
    with pytest.raises(UserError, match=r"export\.overwrite=true"):
        check_export_target(base, overwrite=False)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(UserError, match=r"is a file|is not a folder"):
            check_export_target(place, overwrite=True)


def test_overwrite_replaces_models_only(base: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "Documents").mkdir(parents=True)
    with pytest.raises(UserError, match="not the folder of a model"):
        check_export_target(home, overwrite=True)
    (home / "config.json").write_text('{"editor": "dark"}')
    with pytest.raises(UserError, match="not the folder of a model"):
        check_export_target(home, overwrite=True)
    with pytest.raises(UserError, match=r"also holds training\.log"):
        check_export_target(base, overwrite=True)
    copy = Path(shutil.copytree(base, tmp_path / "copy", ignore=shutil.ignore_patterns("training.log")))
    check_export_target(copy, overwrite=True)
    for source in (copy, copy / "inside"):
        with pytest.raises(UserError, match="original model"):
            check_export_target(copy, overwrite=True, source=source)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(UserError, match="written to"):
        check_export_target(tmp_path / "out", overwrite=False)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that takes no files from anybody")
def test_a_folder_that_takes_no_files_is_not_called_full() -> None:
    with pytest.raises(UserError, match="written to"):
        check_export_target(Path("/proc/model"), overwrite=False, needed_bytes=1000)


@pytest.mark.parametrize(
    ("needed", "words"), [(10**6, "need 68.11 MB, but only 2.50 MB"), (2 * 10**9, "need 2.07 GB, but only 0.00 GB")]
)
def test_space_is_told_in_a_unit_that_shows_it(needed: int, words: str, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=words):
        check_export_target(tmp_path / "out", overwrite=False, needed_bytes=needed)


def test_free_space_is_checked_before_writing(loaded: LoadedModel, tmp_path: Path, monkeypatch) -> None:
    size = model_bytes(loaded.model)
    usage = shutil.disk_usage(tmp_path)._replace(free=size // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="free"):
        export(loaded, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_model_bytes_counts_tied_weights_once() -> None:
    model = families.build("gpt2")
    head = model.lm_head.weight
    assert model_bytes(model) == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert model_bytes(model) < sum(t.nbytes for t in model.state_dict().values()) + head.nbytes


# --- all at once or not at all --------------------------------------------------------------------


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_overwriting_leaves_only_the_new_folder(loaded: LoadedModel, tmp_path: Path) -> None:
    first = export(loaded, tmp_path / "out").folder
    (first / "model-00001-of-00002.safetensors").write_text("stale")
    change_weights(loaded)
    export(loaded, tmp_path / "out", overwrite=True)
    assert names(tmp_path) == {"out"} and "model-00001-of-00002.safetensors" not in names(first)
    state = load(first).model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.model.state_dict().items())


def test_an_export_that_lost_tensors_is_not_kept(loaded: LoadedModel, tmp_path: Path, monkeypatch) -> None:
    save = loaded.model.save_pretrained

    def lose_one(folder, **options):
        state = loaded.model.state_dict()
        state.pop("model.layers.1.mlp.down_proj.weight")
        save(folder, state_dict=state, **options)

    monkeypatch.setattr(loaded.model, "save_pretrained", lose_one)
    with pytest.raises(RuntimeError, match="numbers were written"):
        export(loaded, tmp_path / "out")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), OSError("disk full")])
def test_a_failed_export_changes_nothing(loaded: LoadedModel, tmp_path: Path, monkeypatch, error) -> None:
    export(loaded, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def fail(folder, **options):
        (Path(folder) / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(loaded.model, "save_pretrained", fail)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        export(loaded, tmp_path / "out", overwrite=True)
    assert names(tmp_path) == {"out"}
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_failed_rename_puts_the_old_folder_back(loaded: LoadedModel, tmp_path: Path, monkeypatch) -> None:
    export(loaded, tmp_path / "out")
    rename = Path.rename

    def fail_for_partial(self: Path, place):
        if ".partial-" in self.name:
            raise OSError("no")
        return rename(self, place)

    monkeypatch.setattr(Path, "rename", fail_for_partial)
    with pytest.raises(UserError, match="as it was"):
        export(loaded, tmp_path / "out", overwrite=True)
    assert names(tmp_path) == {"out"} and (tmp_path / "out" / "config.json").exists()


def leftover(target: Path, kind: str, pid: int) -> Path:
    folder = target.parent / f".{target.name}.{kind}-{target_module._host()}-{pid}"
    folder.mkdir()
    (folder / "config.json").write_text(kind)
    return folder


def test_leftovers_of_killed_exports(tmp_path: Path) -> None:
    """Killed between the two renames: the old folder comes back. Killed later: it goes."""
    target, dead = tmp_path / "out", 2**22 + 1
    leftover(target, "partial", dead)
    leftover(target, "old", dead)
    mine = leftover(target, "partial", os.getppid())
    other = tmp_path / f".out.partial-elsewhere-{dead}"
    other.mkdir()
    recover_leftovers(target)
    assert names(tmp_path) == {"out", mine.name, other.name}
    assert (target / "config.json").read_text() == "old"
    leftover(target, "old", dead)
    recover_leftovers(target)
    assert names(tmp_path) == {"out", mine.name, other.name}


# --- card -----------------------------------------------------------------------------------------


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_tells_of_several_directions(loaded: LoadedModel) -> None:
    one, several = (model_card(loaded, replace(FACTS, rank=rank, method="som")) for rank in (1, 4))
    assert "4 directions in the residual stream" in several and "their span" in several
    assert "self-organising map" in several and "4 directions" not in one
    assert "medians of the means" in model_card(loaded, replace(FACTS, method="median_of_means"))
    assert "self-organising" not in model_card(loaded, FACTS)


def test_a_card_names_another_scorer(loaded: LoadedModel) -> None:
    card = model_card(loaded, replace(FACTS, scorer="vowels", refusals_before=300.5))
    assert (
        "| vowels, on 100 target prompts | 300.5 | 3 |" in card
        and "`vowels` is the number that the search went by, for less of it." in card
    )
    assert "for more of it" in model_card(loaded, replace(FACTS, scorer="vowels", maximize=True))
    assert "efusals" not in card and "declining phrase" not in card


def test_card_says_what_was_done(loaded: LoadedModel) -> None:
    card = model_card(loaded, FACTS, today=date(2026, 1, 2))
    front = front_matter(card)
    [index] = front.pop("model-index")
    assert index["name"] == "tiny-llama, abliterated"
    measured = {
        metric["type"]: (result["dataset"]["name"], metric["value"])
        for result in index["results"]
        for metric in result["metrics"]
    }
    assert measured == {"refusals": ("prompts", 3), "kl": ("prompts", 0.01234)}
    assert front == {
        "datasets": ["owner/questions"],
        "base_model": "tiny-llama",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "other",
        "license_name": "kind",
        "license_link": "LICENSE",
        "tags": ["abliterated", "directional-ablation", "heretic-ds"],
    }
    for part in (
        "`tiny-llama`", "2 attention, 2 mlp", "| 97 | 3 |", "100 target prompts", "0.0123",
        "80 baseline prompts",
        "| attention | 1.25 | 1.5 | 0.5 | 1 |", "| mlp | 0.75 | 1.5 | 0.5 | 1 |",
        "own direction", "`full`", "0.95",
        "trial 17", "`weather.txt`", "`owner/questions`", "2026-01-02", "responsible",
        "may be missing", "bfloat16", "AutoModelForCausalLM.from_pretrained", "heretic-ds reproduce heretic_ds.json",
        "`LICENSE`", "`USE_POLICY.md`",
    ):  # fmt: skip
        assert part in card, part
    assert "someone" not in card
    single = model_card(loaded, replace(FACTS, edit=StandInEdit(direction_index=7.25), trial=None))
    assert "of block 7.25" in single and "trial 17" not in single


@pytest.mark.parametrize(
    "readme", [None, "# Only a title", "---\nlicense: [", "---\n- a list\n---\n", "---\nlicense: 2025-13-45\n---\n"]
)
def test_a_base_that_states_no_licence(loaded: LoadedModel, tmp_path: Path, readme: str | None) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    card = model_card(replace(loaded, source=tmp_path), FACTS)
    assert "license" not in front_matter(card) and "look there" in card


def test_foreign_text_stays_text(loaded: LoadedModel, tmp_path: Path) -> None:
    """Neither template code nor marks of YAML in a base model's name or card do anything in ours."""
    odd = "{{ 7 * 7 }}{% raw %} {# 'x: y\" ---\n---\n- z"
    flat = odd.replace("\n", " ")
    stated = {"license": "other", "license_name": flat, "license_link": "---"}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(stated)}---\nA model.")
    hub = replace(loaded, source=tmp_path, model_name=odd, is_hub=True)
    card = model_card(hub, replace(FACTS, prompt_sources={"target.train": odd}))
    block = yaml.safe_load(card.removeprefix("---\n").partition("\n---\n")[0])
    assert stated.items() <= block.items() and block["base_model"] == odd
    assert card.count(odd) == 5 and f"`{flat}`" in card and "49" not in card


def test_base_names(loaded: LoadedModel, tmp_path: Path) -> None:
    hub = replace(loaded, model_name="owner/llama", is_hub=True, revision="abc123")
    assert front_matter(model_card(hub, FACTS))["base_model"] == "owner/llama"
    assert "`abc123`" in model_card(hub, FACTS)
    for origin, name in (
        ("owner/origin", "owner/origin"),
        ("/home/someone/x", "tiny-llama"),
        ("", "tiny-llama"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": origin}))
        assert front_matter(model_card(replace(loaded, source=tmp_path), FACTS))["base_model"] == name


@pytest.mark.parametrize(
    ("folder", "front", "name"),
    [
        ("models--owner--llama/snapshots/abc", {}, "owner/llama"),
        ("x", {"model-index": [{"name": "owner/measured"}]}, "owner/measured"),
        ("x", {"model-index": [{"name": "Measured"}]}, "tiny-llama"),
        ("Llama", {"license_link": "https://huggingface.co/owner/llama/blob/main/LICENSE"}, "owner/llama"),
        ("x", {"license_link": "https://huggingface.co/owner/llama/blob/main/LICENSE"}, "tiny-llama"),
        ("x", {"model-index": "none"}, "tiny-llama"),
        ("x", {"model-index": [{"name": ["owner/measured"]}], "license_link": 7}, "tiny-llama"),
        ("x", {"model-index": [{"name": f"owner/{'x' * 300}"}, {"name": "owner/\x1b[31m"}]}, "tiny-llama"),
    ],
)
def test_a_folder_that_tells_the_models_name(loaded: LoadedModel, tmp_path: Path, folder, front, name) -> None:
    source = tmp_path / folder
    source.mkdir(parents=True)
    (source / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\nA model.")
    assert front_matter(model_card(replace(loaded, source=source), FACTS))["base_model"] == name


def test_a_card_that_cannot_be_read_tells_no_name(loaded: LoadedModel, tmp_path: Path) -> None:
    rows = [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    bomb = "\n".join(["a0: &a0 [x]", *rows, "model-index: [{name: *a8}]"])
    for front in ("[" * 3000, f"x: {'y' * 2**17}", bomb):
        (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
        assert front_matter(model_card(replace(loaded, source=tmp_path), FACTS))["base_model"] == "tiny-llama"


def test_manifest(loaded: LoadedModel) -> None:
    manifest = build_manifest(
        loaded,
        edit={"direction_index": 1.5},
        row_norm="pre",
        through_norm=True,
        trial=3,
        scores={"refusals": 2, "kl": 0.01},
        verified={"refusals": 2, "kl": 0.02},
        tensors_edited=["model.layers.0.self_attn.o_proj"],
    )
    assert manifest["schema"] == 1 and manifest["base_model"] == "tiny-llama" and manifest["dtype"] == "bfloat16"
    assert manifest["edit"] == {"direction_index": 1.5} and manifest["verified"]["kl"] == 0.02
    assert manifest["row_norm"] == "pre" and manifest["through_norm"] is True and manifest["trial"] == 3
    assert {"python", "torch", "transformers", "heretic-ds"} <= manifest["versions"].keys()
    json.dumps(manifest)


# --- GGUF -----------------------------------------------------------------------------------------

CONVERTER = """
import pathlib, sys
assert sys.argv[2] == "--outfile" and sys.argv[4:] == ["--outtype", "auto"], sys.argv
if not (pathlib.Path(sys.argv[1]) / "config.json").is_file():
    sys.exit("Model ODD is not supported")
pathlib.Path(sys.argv[3]).write_bytes(b"GGUF")
"""


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch) -> Path:
    """A folder with a stand-in for llama.cpp's converter."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(folder))
    return folder


def test_gguf_by_llama_cpp(loaded: LoadedModel, tmp_path: Path, llama_cpp: Path) -> None:
    out = export(loaded, tmp_path / "out").folder
    file = convert_to_gguf(out, "tiny")
    assert file == out / "tiny.gguf" and file.read_bytes() == b"GGUF" and file.stat().st_mode & 0o777 == 0o644
    (llama_cpp / "convert_hf_to_gguf.py").write_text("raise SystemExit(1)")
    assert convert_to_gguf(out, "tiny") == file  # which is there already
    export(loaded, out, overwrite=True)
    assert not file.exists()
    (llama_cpp / "convert_hf_to_gguf.py").write_text(CONVERTER)
    (out / "config.json").unlink()
    with pytest.raises(UserError, match=r"was written, but llama\.cpp could not convert it to GGUF: Model ODD is not"):
        convert_to_gguf(out, "tiny")
    assert not list(out.glob("*.gguf*"))


def test_how_to_get_llama_cpp_is_said(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"needs llama\.cpp.*brew install llama\.cpp"):
        find_converter()
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(UserError, match="holds no convert_hf_to_gguf"):
        find_converter()
    (tmp_path / "convert_hf_to_gguf.py").write_text("")
    assert find_converter() == tmp_path / "convert_hf_to_gguf.py"
