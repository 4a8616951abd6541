"""Chat: turns are remembered in the chat template, answers stream, Ctrl-C and full contexts are survived."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from heretic_ds.errors import UserError
from heretic_ds.prompts import ChatFormat
from heretic_ds.settings import PromptSettings
from heretic_ds.terminal import chat as chat_module
from heretic_ds.terminal.chat import Conversation, chat, context_length, stream_answer
from tests import families


@pytest.fixture(scope="module")
def model():
    return families.build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return families.tokenizer()


def chat_format(tokenizer, **settings) -> ChatFormat:
    return ChatFormat(tokenizer, PromptSettings(**{"response_prefix": "", **settings}))


def talk(model, form: ChatFormat, *lines: str | BaseException, max_new_tokens: int = 5) -> str:
    """What is written while `lines` are typed; exceptions among them are raised, and the end is Ctrl-D."""
    typed, written = iter([*lines, EOFError()]), []

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        written.append(f"<{line}>")
        return line

    chat(model, form, max_new_tokens=max_new_tokens, read=read, write=written.append)
    return "".join(written)


def greedy(model, tokenizer, text: str, count: int) -> str:
    """A plain loop over forwards, as a judge."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == families.EOS:
            break
    return tokenizer.decode(ids[len(ids) - _ - 1 :], skip_special_tokens=True)


def test_turns_go_through_the_chat_template(tokenizer) -> None:
    conversation = Conversation(chat_format(tokenizer, system="Be brief.", response_prefix="Well, "))
    conversation.add("When to plant peas?", "in spring.")
    assert tokenizer.decode(conversation.token_ids("And beans?")) == (
        "<bos><|system|>Be brief.<eos><|user|>When to plant peas?<eos><|assistant|>Well, in spring.<eos>"
        "<|user|>And beans?<eos><|assistant|>Well, "
    )
    assert conversation.token_ids("x")[0] == families.BOS and conversation.token_ids("x").count(families.BOS) == 1


def test_templates_without_a_system_role_or_with_parts(tokenizer) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<|{{ m.role }}|>{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}<|assistant|>"
    )
    conversation = Conversation(chat_format(tokenizer, system="Be brief.", template=template))
    conversation.add("Peas?", "Spring.")
    assert tokenizer.decode(conversation.token_ids("Beans?")) == (
        "<|user|>Be brief.\n\nPeas?<|assistant|>Spring.<|user|>Beans?<|assistant|>"
    )


def test_answers_are_greedy_and_remembered(model, tokenizer) -> None:
    form = chat_format(tokenizer)
    first = greedy(model, tokenizer, "<bos><|user|>peas<eos><|assistant|>", 5)
    second = greedy(
        model, tokenizer, f"<bos><|user|>peas<eos><|assistant|>{first}<eos><|user|>beans<eos><|assistant|>", 5
    )
    fresh = greedy(model, tokenizer, "<bos><|user|>beans<eos><|assistant|>", 5)
    assert fresh != second, "the test cannot see whether the first turn is remembered"
    assert f"<peas>{first}\n<><beans>{second}\n" in talk(model, form, "peas", "", "beans")
    assert f"<beans>{fresh}\n" in talk(model, form, "peas", "/clear", "beans")


def test_answers_stream(model, tokenizer) -> None:
    written: list[str] = []
    ids = Conversation(chat_format(tokenizer)).token_ids("peas and beans")
    text, stopped = stream_answer(model, tokenizer, ids, 20, written.append)
    assert text == "".join(written) and not stopped


def test_exit_and_end_of_input(model, tokenizer) -> None:
    form = chat_format(tokenizer)
    assert talk(model, form, "/exit", "never read").endswith("</exit>")
    assert talk(model, form).endswith("\n")
    assert talk(model, form, KeyboardInterrupt()).endswith("\n")


def test_ctrl_c_stops_the_answer_only(model, tokenizer, monkeypatch) -> None:
    """The answer so far is kept, and the next turn works."""
    stepping = copy.deepcopy(model)
    calls = itertools.count()
    forward = stepping.forward

    def interrupted(*args, **kwargs):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(stepping, "forward", interrupted)
    form = chat_format(tokenizer)
    start = greedy(model, tokenizer, "<bos><|user|>peas<eos><|assistant|>", 3)
    follow = greedy(
        model, tokenizer, f"<bos><|user|>peas<eos><|assistant|>{start}<eos><|user|>beans<eos><|assistant|>", 5
    )
    assert f"<peas>{start} [stopped]\n<beans>{follow}\n" in talk(stepping, form, "peas", "beans")


def test_oldest_turns_are_forgotten_when_the_context_is_full(model, tokenizer) -> None:
    assert context_length(model) == 256
    conversation = Conversation(chat_format(tokenizer))
    for number in range(4):
        conversation.add(f"{number}" * 40, "a" * 10)
    ids, dropped = conversation.fit("z", 140)
    assert dropped == 2 and len(ids) <= 140 and [q[0] for q, _ in conversation.turns] == ["2", "3"]
    with pytest.raises(UserError, match="room for 50"):
        conversation.fit("z" * 60, 50)
    text = talk(model, chat_format(tokenizer), *["p" * 100] * 3, "p" * 300, "short")
    assert "its 1 oldest turns are forgotten" in text and "[this message is 304 tokens long" in text


def test_an_answer_never_outgrows_the_context(model, tokenizer) -> None:
    """A quarter of the context is kept free for an answer, which ends where the context does."""
    patient = copy.copy(model)
    patient.generation_config = copy.deepcopy(model.generation_config)
    patient.generation_config.eos_token_id = None
    text = talk(patient, chat_format(tokenizer), "p" * 180, "p" * 190, max_new_tokens=1000)
    answer = text.split(f"<{'p' * 180}>")[1].split("\n")[0]
    assert 40 < len(answer) <= 256 - 184
    assert "[this message is 194 tokens long, but the model's context leaves room for 192" in text


def test_context_length_of_a_silent_configuration() -> None:
    config = SimpleNamespace(n_positions=77)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    assert context_length(model) == 77
    del config.n_positions
    assert context_length(model) is None


def test_piped_input_is_read_without_a_prompt() -> None:
    """Piped lines are read until they end; the prompt is for terminals."""
    code = (
        "from heretic_ds.terminal.chat import read_line\n"
        "try:\n    while True: print(repr(read_line('> ')))\nexcept EOFError: print('end')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="one\ntwo", capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(chat_module.__file__))},
    )  # fmt: skip
    assert done.stdout == "'one'\n'two'\nend\n", done.stderr
