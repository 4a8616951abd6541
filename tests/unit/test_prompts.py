from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from heretic_ds.errors import UserError
from heretic_ds.prompts import (
    ChatFormat,
    check_lengths,
    decode_answers,
    detect_response_prefix,
    find_response_prefix,
    load_prompts,
    pad_left,
    read_prompts,
)
from heretic_ds.prompts import chat as chat_module
from heretic_ds.settings import PromptSettings, PromptSource, ThinkingMarker
from tests.chat_model import (
    BOS,
    CONTEXT,
    THINK,
    TURN,
    TURN_END,
    build_chat_model,
    build_chat_tokenizer,
    chat_template,
)
from tests.conftest import ComposeSettings

NAME = "prompts.target.train"
PROMPTS = [f"How do I water plant {number}?" for number in range(10)]
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
THINKING = [ThinkingMarker(THINK, EMPTY_THOUGHT), ThinkingMarker("[THINK]", "[THINK][/THINK]")]
# The usual shape: a system role, and nothing that is opened.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|turn_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)

# Sources ----------------------------------------------------------------------------------------------------


def _records() -> list[dict[str, Any]]:
    return [{"text": prompt, "number": number} for number, prompt in enumerate(PROMPTS)]


def _txt(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_bytes(("\ufeff" + "\r\n\r\n".join(PROMPTS) + "\r\n").encode())
    return path


def _jsonl(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in _records()) + "\n\n")
    return path


def _csv(folder: Path) -> Path:
    path = folder / "prompts.CSV"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["number", "text"])
        writer.writeheader()
        writer.writerows(_records())
    return path


def _parquet(folder: Path) -> Path:
    path = folder / "prompts.parquet"
    datasets.Dataset.from_list(_records()).to_parquet(str(path))
    return path


def _saved(folder: Path) -> Path:
    path = folder / "saved"
    datasets.Dataset.from_list(_records()).save_to_disk(str(path))
    return path


def _saved_splits(folder: Path) -> Path:
    path = folder / "saved_splits"
    train, test = (
        datasets.Dataset.from_list(_records()),
        datasets.Dataset.from_list([{"text": "Which soil?"}]),
    )
    datasets.DatasetDict(train=train, test=test).save_to_disk(str(path))
    return path


def _folder(folder: Path) -> Path:
    path = folder / "readable"
    path.mkdir()
    _jsonl(path).rename(path / "train.jsonl")
    (path / "test.jsonl").write_text('{"text": "Which soil?", "number": 1}\n')
    return path


MAKERS = [_txt, _jsonl, _csv, _parquet, _saved, _saved_splits, _folder]
Maker = Callable[[Path], Path]


def _load(source: object, **fields: Any) -> list[str]:
    return load_prompts(PromptSource(str(source), **fields), NAME)


@pytest.mark.parametrize("make", MAKERS)
def test_every_kind_of_source(make: Maker, tmp_path: Path) -> None:
    source = make(tmp_path)
    assert _load(source) == PROMPTS
    assert _load(source, split="train[:4]") == PROMPTS[:4]
    assert _load(source, split="train[20%:-1]", slice="1:400") == PROMPTS[3:9]
    assert _load(source, slice=":2") == PROMPTS[:2]


@pytest.mark.parametrize("make", [_saved_splits, _folder])
def test_splits(make: Maker, tmp_path: Path) -> None:
    source = make(tmp_path)
    assert _load(source, split="test[:100]") == ["Which soil?"]
    with pytest.raises(UserError, match=rf"^{NAME}\.split: .* has no split 'dev'; its splits are: t\w+, t\w+$"):
        _load(source, split="dev[:4]")


@pytest.mark.parametrize("make", [_txt, _jsonl, _csv, _parquet, _saved])
def test_a_source_without_splits_goes_by_the_usual_names(make: Maker, tmp_path: Path) -> None:
    """Replacing a data set's `.source` by a file has to work without replacing its `.split`."""
    source = make(tmp_path)
    assert _load(source, split="test", slice="0:1") == PROMPTS[:1]
    with pytest.raises(UserError, match=r"\.split: .*not divided into splits, so there is no 'dev'"):
        _load(source, split="dev")


@pytest.mark.parametrize("make", [maker for maker in MAKERS if maker is not _txt])
def test_columns(make: Maker, tmp_path: Path) -> None:
    source = make(tmp_path)
    with pytest.raises(UserError, match=rf"^{NAME}\.column: .*no column 'prompt'; its columns are: (text|number), "):
        _load(source, column="prompt")
    if make is not _csv:
        with pytest.raises(UserError, match=rf"^{NAME}\.column: row 2 of .* holds a value of type int in column"):
            _load(source, column="number", slice="2:")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slice": "5:5"}, r"\.slice: '5:5' leaves none of the 10 rows"),
        ({"split": "train[40:]"}, r"\.split: 'train\[40:\]' leaves none of the 10 rows"),
        ({"split": "train[5:]", "slice": "5:"}, r"\.slice: '5:' leaves none of the 5 rows"),
        ({"slice": "4"}, r"\.slice: cannot read the rows in '4'; write start:stop, as in 0:400"),
        ({"slice": "0:4:2"}, r"\.slice: cannot read the rows"),
        ({"slice": "a:b"}, r"\.slice: cannot read the rows"),
        ({"split": "train[:4"}, r"\.split: cannot read 'train\[:4'"),
        ({"split": "train[x:4]"}, r"\.split: cannot read the rows"),
        ({"split": ""}, r"\.split: cannot read ''"),
    ],
)
def test_bad_rows(fields: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{NAME}{message}"):
        _load(_jsonl(tmp_path), **fields)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.txt", b"\n  \n", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text\n", "is empty"),
        ("a.jsonl", b'{"text": " "}', "only blank prompts"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2 of .* is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\\ud83d"}', "row 1 of .* holds half of a surrogate pair"),
        ("a.jsonl", b'["a"]', "line 1 of .* is not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"texts": "b"}', "row 1 of .* holds nothing in column 'text'"),
        ("a.csv", b"number,text\n1\n", "row 0 of .* holds nothing in column 'text'"),
        ("a.txt", b"caf\xe9", "is not UTF-8 text"),
        ("a.parquet", b"nothing of the kind", "is not a Parquet file"),
        (
            "a.doc",
            b"prompt",
            "of no known kind; give a folder or a file ending in .txt, .jsonl, .csv, .parquet",
        ),
    ],
)
def test_bad_files(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=f"^{NAME}[.].*{message}"):
        _load(tmp_path / file)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/prompts.txt", "there is no file no/such/prompts.txt"),
        ("./no_such_folder", "there is no file or folder no_such_folder, and it is no data set id"),
        ("no/such/folder", "there is no file or folder no/such/folder"),
        (
            "somebody/no-such-set",
            "there is no file or folder somebody/no-such-set, and the data set of that id cannot",
        ),
        ("pkg://no_such_package/a.txt", "there is no Python package 'no_such_package'"),
        ("pkg://heretic_ds/no_such.txt", "there is no file .*no_such.txt"),
        ("pkg://heretic_ds/settings/__init__.py", ".*__init__.py is of no known kind"),
        ("???", "no source is set"),
    ],
)
def test_missing_sources(source: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^{NAME}\.source: {message}") as caught:
        _load(source)
    assert "\n" not in str(caught.value)


def _configurations(folder: Path, names: Sequence[str] = ("herbs", "trees")) -> Path:
    for name in names:
        (folder / f"{name}.csv").write_text(f"text\nWhich of the {name}?\n")
    lines = [f"- config_name: {name}\n  data_files: {name}.csv" for name in names]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]))
    return folder


def test_one_of_several_configurations(tmp_path: Path) -> None:
    source = _configurations(tmp_path)
    assert _load(source, subset="trees") == ["Which of the trees?"]
    for subset, named in ((None, "null"), ("shrubs", "'shrubs'")):
        message = rf"^{NAME}\.subset: {named} is none of the configurations of .*: herbs, trees; choose one$"
        with pytest.raises(UserError, match=message):
            _load(source, subset=subset)


def test_many_configurations_are_counted(tmp_path: Path) -> None:
    source = _configurations(tmp_path, [f"bed_{number:02}" for number in range(30)])
    with pytest.raises(UserError, match=r"bed_00, .*, bed_19 and 10 more; choose one$"):
        _load(source)


def test_a_source_without_configurations(tmp_path: Path) -> None:
    for make in (_txt, _saved):
        with pytest.raises(UserError, match=rf"^{NAME}\.subset: .* has no configurations to choose from"):
            _load(make(tmp_path), subset="trees")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{NAME}\.source: the folder .* cannot be read"):
        _load(tmp_path)


def test_a_damaged_saved_data_set(tmp_path: Path) -> None:
    source = _saved(tmp_path)
    next(source.glob("*.arrow")).write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"\.source: the folder .* cannot be read"):
        _load(source)


def test_a_file_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package_of_prompts"
    (package / "inside").mkdir(parents=True)
    (package / "__init__.py").touch()
    _txt(package / "inside")
    monkeypatch.syspath_prepend(tmp_path)
    assert _load("pkg://package_of_prompts/inside/prompts.txt") == PROMPTS


def test_only_line_feeds_end_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\u2028still one\n two\x0c \n", encoding="utf-8")
    assert _load(tmp_path / "a.txt") == ["one\u2028still one", "two"]


def test_blank_prompts_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a "}\n{"text": ""}\n')
    with caplog.at_level(logging.WARNING):
        assert _load(tmp_path / "a.jsonl") == ["a "]
    assert "1 blank prompts left out" in caplog.text


def test_the_default_slice_does_not_cut_what_a_user_names(compose_settings: ComposeSettings, tmp_path: Path) -> None:
    """It belongs to the default data set; one that is given counts, whatever the source is."""
    (tmp_path / "mine.txt").write_text("\n".join(map(str, range(160))))
    (tmp_path / "saved").mkdir()
    sources = [f"prompts.target.eval.source={tmp_path}/mine.txt", f"prompts.target.train.source={tmp_path}/saved"]
    found = compose_settings(*sources, "prompts.baseline.train.source=other/set").prompts
    assert found.target.eval.slice is None and found.target.train.slice is None
    assert len(load_prompts(found.target.eval, "prompts.target.eval")) == 160
    assert found.baseline.train.slice == "0:400"  # another data set of the hub may have any number of rows
    given = compose_settings(*sources, "prompts.target.eval.slice=0:30", "prompts.target.train.slice=:7").prompts
    assert (given.target.eval.slice, given.target.train.slice) == ("0:30", ":7")
    read = read_prompts(given.target.eval, "prompts.target.eval")
    assert (len(read.texts), read.rows) == (30, 160)
    whole = compose_settings("prompts.target.train.slice=null").prompts
    assert whole.target.train.slice is None


def test_shipped_configuration(compose_settings: ComposeSettings) -> None:
    default, demo = compose_settings().prompts, compose_settings("prompts=demo").prompts
    assert default.target.train.slice == "0:400" and default.baseline.eval.slice == "0:100"
    assert demo.baseline.eval.source == "pkg://heretic_ds/demo/prompts/baseline_eval.txt"
    assert demo.target.train.slice is None
    for chosen in (default, demo):
        assert ThinkingMarker(THINK, EMPTY_THOUGHT) in list(chosen.thinking)
        for marker in chosen.thinking:
            assert marker.closed.startswith(marker.open) and len(marker.closed) > len(marker.open)


# Chat formatting --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chat_model(tmp_path_factory.mktemp("chat_model"))


@pytest.fixture(scope="module")
def tokenizer(chat_model: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(chat_model)


def _chat(tokenizer: PreTrainedTokenizerFast, **fields: Any) -> ChatFormat:
    return ChatFormat(tokenizer, PromptSettings(thinking=list(THINKING), **fields))


def test_the_fixture_has_the_habits_of_real_models(chat_model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    index = json.loads((chat_model / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and "lm_head.weight" not in index["weight_map"]
    for file in files:
        with safe_open(chat_model / file, "pt") as tensors:
            assert {
                tensors.get_tensor(key).dtype for key in index["weight_map"] if index["weight_map"][key] == file
            } == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size > len(tokenizer)
    assert isinstance(model.generation_config.eos_token_id, list) and model.generation_config.do_sample
    assert tokenizer.pad_token is None and tokenizer.padding_side == "right"
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert len(tokenizer("🌻", add_special_tokens=False)["input_ids"]) > 1
    assert "tools" in tokenizer.chat_template


def test_a_prompt_is_what_the_template_gives(tokenizer: PreTrainedTokenizerFast) -> None:
    row = _chat(tokenizer).encode(PROMPTS[0])
    messages = [{"role": "user", "content": PROMPTS[0]}]
    assert row == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(row) == f"{BOS}{TURN}user\n{PROMPTS[0]}{TURN_END}\n{TURN}assistant\n{THINK}\n"
    assert row.count(tokenizer.bos_token_id) == 1


def test_a_refused_system_prompt_goes_to_the_user(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        chat = _chat(tokenizer, system="Be brief.")
        rendered = [chat.with_prefix("Sure").render(prompt) for prompt in PROMPTS]
    assert rendered[0].startswith(f"{BOS}{TURN}user\nBe brief.\n\n{PROMPTS[0]}{TURN_END}")
    assert [record.message for record in caplog.records] == [
        "the chat template takes no system prompt: it is put before the user's message instead"
    ]


def test_a_dropped_system_prompt_goes_to_the_user(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{% for m in messages if m.role == 'user' %}[{{ m.content }}]{% endfor %}"
    assert _chat(tokenizer, system="Be brief. ", template=template).render("Hi") == "[Be brief. \n\nHi]"


def test_a_system_prompt_that_is_taken(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    chat = _chat(tokenizer, system="Be brief.", template=PLAIN_TEMPLATE)
    assert chat.render("Hi").startswith(f"{BOS}{TURN}system\nBe brief.{TURN_END}\n{TURN}user\nHi{TURN_END}\n")
    assert not caplog.records


def test_a_template_of_parts(tokenizer: PreTrainedTokenizerFast) -> None:
    """Templates of vision-language models may take only messages made of parts."""
    template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    assert _chat(tokenizer, system="Be brief.", template=template).render("Hi") == "<system>Be brief.<user>Hi"


def test_no_chat_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    bare = build_chat_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match=r"no chat template; set prompts\.template"):
        _chat(bare)
    (tmp_path / "a.jinja").write_text(PLAIN_TEMPLATE)
    assert _chat(bare, template=str(tmp_path / "a.jinja")).encode("Hi") == _chat(bare, template=PLAIN_TEMPLATE).encode(
        "Hi"
    )
    assert bare.chat_template is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no_such.jinja", "prompts.template is 'no_such.jinja', which is neither"),
        ("{% if %}", "cannot render a prompt .*set prompts.template"),
        ("{{ 'Hello' }}", "it leaves out the user's message"),
        ("{{ raise_exception('no') }}", r"cannot render a prompt \(no\)"),
        ("{{ messages[0].content + 1 }}", "cannot render a prompt"),
    ],
)
def test_bad_templates(tokenizer: PreTrainedTokenizerFast, template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _chat(tokenizer, template=template)


def test_the_response_prefix_is_tokenised_with_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """The line breaks at the end of the generation prompt and the start of the prefix make one token."""
    chat = _chat(tokenizer).with_prefix("\n</think>\n\nSure")
    double_line_break = tokenizer.convert_tokens_to_ids("ĊĊ")
    assert chat.encode("Hi").count(double_line_break) == 2
    assert tokenizer.decode(chat.encode("Hi")).endswith(f"{THINK}\n\n</think>\n\nSure")
    separate = _chat(tokenizer).encode("Hi") + tokenizer("\n</think>\n\nSure", add_special_tokens=False)["input_ids"]
    assert chat.encode("Hi") != separate


def test_the_response_prefix_of_the_settings(tokenizer: PreTrainedTokenizerFast) -> None:
    assert _chat(tokenizer, response_prefix="auto").response_prefix == ""
    assert _chat(tokenizer, response_prefix="Sure").render("Hi").endswith("Sure")
    assert ChatFormat(tokenizer, PromptSettings(response_prefix="Sure"), "").response_prefix == ""


# The response prefix ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "prefix"),
    [
        ([], ""),
        (["", " "], ""),
        (["Sure, sow them.", "Sure, plant them."], "Sure,"),
        (["I can help.", "I will."], "I"),
        (["I can help.", "I cannot."], "I"),
        (["I'm here.", "I'll go."], ""),
        (["Hello there.", "Help me."], ""),
        (["**Soil** it", "**Sun** it"], "**"),
        (["Sure.", "", "  "], ""),
        (["Sure! A", "Sure! B", ""], "Sure!"),
        (["Sure.", "Sure. And more."], ""),
        (["The same.", "The same."], ""),
        (["Just one answer."], ""),
        (["Sure:\n\nA", "Sure:\n\nB"], "Sure:\n\n"),
        (["Sure:\n\nA", "Sure:\n- B"], "Sure:"),
        (["10 days", "100 days"], ""),
    ],
)
def test_the_common_prefix(answers: list[str], prefix: str) -> None:
    assert find_response_prefix(answers, THINKING) == prefix


@pytest.mark.parametrize(
    ("answers", "prefix"),
    [
        (["<think>\nOkay, plums", "<think>\nOkay, pears"], EMPTY_THOUGHT),
        (["<think>", "<think>\nSo"], EMPTY_THOUGHT),
        (["\n<think>A", "\n<think>B"], "\n" + EMPTY_THOUGHT),
        (["[THINK]The user", "[THINK]The gardener"], "[THINK][/THINK]"),
        (["<think>\n\n</think>\n\nYes.", "<think>\n\n</think>\n\nNo."], EMPTY_THOUGHT),
        (["<think>\n\n</think>\n\nSure, a", "<think>\n\n</think>\n\nSure, b"], EMPTY_THOUGHT + "Sure,"),
        (["<think>A", "Sure"], ""),
    ],
)
def test_an_opened_chain_of_thought_is_closed(answers: list[str], prefix: str) -> None:
    assert find_response_prefix(answers, THINKING) == prefix


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=12), st.lists(st.text("ab '\n.-é花", max_size=8), min_size=1, max_size=4))
def test_the_prefix_starts_every_answer_and_leaves_something_to_say(start: str, rests: list[str]) -> None:
    answers = [start + rest for rest in rests]
    prefix = find_response_prefix(answers, [])
    for answer in answers:
        assert not answer.strip() or (answer.startswith(prefix) and answer[len(prefix) :].strip())
    assert not prefix.endswith(" ")


def test_a_block_that_the_template_opens_is_closed_first(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = _chat(tokenizer)
    asked: list[str] = []

    def answer(chat: ChatFormat) -> list[str]:
        asked.append(chat.render("Hi"))
        return ["Sure, a.", "Sure, b."]

    assert detect_response_prefix(chat, answer) == "\n</think>\n\nSure,"
    assert len(asked) == 1 and asked[0].endswith(f"{TURN}assistant\n{EMPTY_THOUGHT}")
    assert chat.response_prefix == ""


def test_a_block_that_the_model_opens_is_closed_and_asked_again(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = _chat(tokenizer, template=chat_template(opens_thinking=False))

    def answer(chat: ChatFormat) -> list[str]:
        closed = chat.render("Hi").endswith(EMPTY_THOUGHT)
        return ["Sure, a.", "Sure, b."] if closed else ["<think>\nA", "<think>\nB"]

    assert detect_response_prefix(chat, answer) == EMPTY_THOUGHT + "Sure,"


@pytest.mark.parametrize(
    ("end", "prefix"),
    [
        ("", ""),
        ("<think>", "\n\n</think>\n\n"),
        ("<think>\n", "\n</think>\n\n"),
        (EMPTY_THOUGHT, ""),
        ("[THINK]\n", "[/THINK]"),
    ],
)
def test_what_closes_the_generation_prompt(tokenizer: PreTrainedTokenizerFast, end: str, prefix: str) -> None:
    chat = _chat(tokenizer, template=PLAIN_TEMPLATE + end.replace("\n", "{{ '\\n' }}"))
    assert chat.render("Hi").endswith("assistant\n" + end)
    assert chat.closing_prefix() == prefix


def test_a_marker_that_opens_with_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=re.escape("prompts.thinking has a marker without `open`")):
        ChatFormat(tokenizer, PromptSettings(thinking=[ThinkingMarker("", "x")]))


# Answers ----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_text_of_first_tokens_begins_the_text(tokenizer: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    row = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    text = data.draw(st.sampled_from(["I ca n't , so . It 's", "brûlée 🌻 花园", ""]))
    row = tokenizer(text, add_special_tokens=False)["input_ids"] + row
    whole = decode_answers(tokenizer, [row])[0]
    for part in decode_answers(tokenizer, [row[:length] for length in range(len(row))]):
        assert whole.startswith(part.rstrip("\ufffd"))


def test_cleaning_of_spaces_does_not_rewrite_answers() -> None:
    """Word-level tokenizers with the cleaning switched on would turn `I '` into `I'm` one token later."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "I", "'", "m"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=True)
    assert words.decode([1, 2, 3]) == "I'm"
    assert decode_answers(words, [[1, 2], [1, 2, 3]]) == ["I '", "I ' m"]


def test_special_tokens_of_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    row = tokenizer(f"{TURN}Sure{TURN_END}", add_special_tokens=False)["input_ids"]
    assert decode_answers(tokenizer, [row]) == ["Sure"]
    assert decode_answers(tokenizer, [row], keep_special=True) == [f"{TURN}Sure{TURN_END}"]


# Batches ----------------------------------------------------------------------------------------------------


def test_pad_left() -> None:
    batch = pad_left([[5, 6, 7], [8], [0, 0]], pad_id=0)
    assert batch.input_ids_BS.tolist() == [[5, 6, 7], [0, 0, 8], [0, 0, 0]]
    assert batch.attention_mask_BS.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 1]]
    moved = batch.to("meta")
    for tensor in (moved.input_ids_BS, moved.attention_mask_BS, moved.position_ids_BS):
        assert tensor.dtype == torch.int64 and tensor.device.type == "meta"


def test_padded_rows_give_the_logits_of_single_ones(chat_model: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    chat = _chat(tokenizer)
    rows = [chat.encode(prompt) for prompt in ("Hi", PROMPTS[0], "Which soil do plums need, and how much of it?")]
    batch = pad_left(rows, tokenizer.eos_token_id)
    with torch.inference_mode():
        logits_BV = model(
            batch.input_ids_BS, attention_mask=batch.attention_mask_BS, position_ids=batch.position_ids_BS
        ).logits[:, -1]
        for row, logits_V in zip(rows, logits_BV, strict=True):
            torch.testing.assert_close(logits_V, model(torch.tensor([row])).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_prompts_longer_than_the_context() -> None:
    rows = [[1] * 5, [1] * (CONTEXT - 10), [1]]
    config = LlamaConfig(max_position_embeddings=CONTEXT)
    check_lengths(rows, 10, config, NAME)
    message = (
        rf"^{NAME}: prompt 1 has {CONTEXT - 10} tokens, which with generation.max_new_tokens=11 exceeds the "
        rf"model's context of {CONTEXT}; .*{NAME}\.source, or lower generation.max_new_tokens"
    )
    with pytest.raises(UserError, match=message):
        check_lengths(rows, 11, config, NAME)


@pytest.mark.parametrize(
    ("config", "limited"),
    [
        (GPT2Config(n_positions=8), True),
        (Gemma3Config(text_config={"max_position_embeddings": 8}), True),
        (FalconConfig(max_position_embeddings=8), True),
        (FalconConfig(max_position_embeddings=8, alibi=True), False),
        (BloomConfig(), False),
    ],
)
def test_where_the_context_is_found(config: Any, limited: bool) -> None:
    if limited:
        with pytest.raises(UserError, match="context of 8"):
            check_lengths([[1] * 8], 1, config, NAME)
    else:
        check_lengths([[1] * 10_000], 1, config, NAME)


def test_long_conversations_are_rendered_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process may answer with does not grow with their number."""
    monkeypatch.setattr(chat_module, "_AT_ONCE", 3)
    monkeypatch.setattr(chat_module, "_CHARACTERS", 10)
    assert list(chat_module._parts(["a", "b", "c", "d"])) == [["a", "b", "c"], ["d"]]
    assert list(chat_module._parts(["aaaaaa", "bbbbb", "c" * 20, "d"])) == [["aaaaaa"], ["bbbbb"], ["c" * 20], ["d"]]
    assert list(chat_module._parts([])) == []
