"""Chat: turns are remembered in the chat template, answers stream, commands do what they say, Ctrl-C and full
contexts are survived."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heretic_ds.errors import UserError
from heretic_ds.prompts import ChatFormat
from heretic_ds.settings import PromptSettings
from heretic_ds.terminal.answering import stream_answer
from heretic_ds.terminal.chat import COMMANDS, Edited, as_command, chat
from heretic_ds.terminal.conversation import Conversation
from heretic_ds.terminal.faces import PlainFace
from tests import families
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def model():
    return families.build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return families.tokenizer()


def chat_format(tokenizer, **settings) -> ChatFormat:
    return ChatFormat(tokenizer, PromptSettings(**{"response_prefix": "", **settings}))


def talk(
    model, form: ChatFormat, *lines: str | BaseException, max_new_tokens: int = 5, edited: Edited | None = None
) -> str:
    """What is written while `lines` are typed; exceptions among them are raised, and the end is Ctrl-D."""
    typed, written = iter([*lines, EOFError()]), []

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        written.append(f"<{line}>")
        return line

    face = PlainFace(read, written.append)
    chat(model, form, max_new_tokens=max_new_tokens, face=face, name="gardener", edited=edited)
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


def test_conversations_of_others_are_rendered_as_the_template_takes_them(tokenizer) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<|{{ m.role }}|>{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    form = chat_format(tokenizer, template=template)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Peas?"},
        {"role": "assistant", "content": "In"},
    ]
    assert form.render_conversation(turns[:2], True) == "<|user|>Be brief.\n\nPeas?<|assistant|>"
    assert form.render_conversation(turns, False) == "<|user|>Be brief.\n\nPeas?<|assistant|>In"
    endless = chat_format(tokenizer, template=template.replace(
        "{% endfor %}{% if add", "{% endfor %}{% if messages|length > 1 %}{{ 'x' * 200000 }}{% endif %}{% if add"
    ))  # fmt: skip
    assert endless.render_conversation(turns[:2], True)
    with pytest.raises(UserError, match="cannot render"):
        endless.render_conversation(turns, True)


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
    assert f"<beans>{fresh}\n" in talk(model, form, "peas", " /clear", "/CLEAR ", "beans")


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
    conversation = Conversation(chat_format(tokenizer))
    for number in range(4):
        conversation.add(f"{number}" * 40, "a" * 10)
    ids, dropped = conversation.fit("z", 140)
    assert dropped == 2 and len(ids) <= 140 and [turn.question[0] for turn in conversation.turns] == ["2", "3"]
    with pytest.raises(UserError, match="room for 50"):
        conversation.fit("z" * 60, 50)
    assert len(conversation.turns) == 2, "a refused message costs turns"
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


def test_piped_input_is_read_without_a_prompt() -> None:
    """Piped lines are read until they end; the prompt is for terminals."""
    code = (
        "from heretic_ds.terminal.faces import read_line\n"
        "try:\n    while True: print(repr(read_line('> ')))\nexcept EOFError: print('end')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="one\ntwo", capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == "'one'\n'two'\nend\n", done.stderr


# Commands


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("peas", (None, "")), ("/clear", ("/clear", "")), ("/Clear ", ("/clear", "")), (" /clear", (None, "")),
        ("/save  a b.md ", ("/save", "a b.md")), ("/system Be\nbrief.", ("/system", "Be\nbrief.")),
        ("/etc/passwd is a file", (None, "")), ("// a comment", (None, "")), ("/", (None, "")),
        ("/foo\nand a second line", (None, "")), ("what is /clear", (None, "")),
    ],
)  # fmt: skip
def test_what_is_a_command(line: str, meant: tuple[str | None, str]) -> None:
    assert as_command(line) == meant


def test_unknown_commands_are_named_with_the_known_ones(model, tokenizer) -> None:
    text = talk(model, chat_format(tokenizer), "/foo bar", "/help")
    [line] = [line for line in text.splitlines() if "/foo is no command" in line]
    assert all(command in line for command in COMMANDS)
    assert all(f"{command} " in text.split("</help>")[1] for command in COMMANDS)


def test_the_system_prompt_is_set_shown_and_taken_away(model, tokenizer) -> None:
    form = chat_format(tokenizer)
    told = greedy(model, tokenizer, "<bos><|system|>Be  brief.<eos><|user|>peas<eos><|assistant|>", 5)
    bare = greedy(model, tokenizer, "<bos><|user|>peas<eos><|assistant|>", 5)
    assert told != bare
    text = talk(model, form, "/system", "/system Be  brief.", "peas", "/system None", "/clear", "peas")
    assert f"<peas>{told}\n" in text and text.endswith(f"<peas>{bare}\n\n")
    assert text.count("[there is no system prompt]") == 2 and "[the system prompt is: Be  brief.]" in text
    refuses = chat_format(tokenizer, template="{{ raise_exception('no') if messages[0].content == 'x' }}"
                                              "{{ messages[0].content }}{{ messages[-1].content }}")  # fmt: skip
    text = talk(model, refuses, "/system x", "/system")
    assert "[the system prompt is: x]" in text  # put before the message, which this template takes


def test_retry_draws_other_answers_which_repeat(model, tokenizer) -> None:
    """The answer is replaced, equal chats give equal answers, and no random numbers of the process are used up."""
    form, state = chat_format(tokenizer), torch.random.get_rng_state()
    first, second = (talk(model, form, "peas", "/retry", "/retry", max_new_tokens=20) for _ in range(2))
    assert first == second and torch.equal(state, torch.random.get_rng_state())
    answers = [part.split("\n")[0] for part in first.replace("</retry>", "<peas>").split("<peas>")[1:]]
    assert len(set(answers)) == 3
    conversation = talk(model, form, "peas", "/retry", "beans", max_new_tokens=20)
    once = greedy_after(model, tokenizer, answers[1], 20)
    assert f"<beans>{once}\n" in conversation
    assert "[nothing was asked yet]" in talk(model, form, "/retry")


def greedy_after(model, tokenizer, answer: str, count: int) -> str:
    """The answer to beans after peas."""
    start = f"<bos><|user|>peas<eos><|assistant|>{answer}<eos><|user|>beans<eos><|assistant|>"
    return greedy(model, tokenizer, start, count)


class Weights:
    """An edit of a model's head that says what was done to it."""

    def __init__(self, model) -> None:
        self.model, self.done = copy.deepcopy(model), []
        self.original = self.model.lm_head.weight.detach().clone()

    def apply(self) -> None:
        self.done.append("apply")
        with torch.no_grad():
            self.model.lm_head.weight.copy_(-self.original)

    def restore(self) -> None:
        self.done.append("restore")
        with torch.no_grad():
            self.model.lm_head.weight.copy_(self.original)

    @property
    def edited(self) -> Edited:
        return Edited("trial 3", self.apply, self.restore)


def test_the_original_answers_the_same_question_with_the_same_weights(model, tokenizer) -> None:
    form, weights = chat_format(tokenizer), Weights(model)
    plain = talk(weights.model, form, "peas", "beans", edited=weights.edited)
    edited = plain.split("<beans>")[1].split("\n")[0]
    first = plain.split("<peas>")[1].split("\n")[0]
    assert plain.startswith("[You talk to gardener, with the edit of trial 3.")
    text = talk(weights.model, form, "peas", "beans", "/original", "seeds", edited=weights.edited)
    original = greedy_after(model, tokenizer, first, 5)
    assert original != edited
    assert f"--- original ---\n{original}\n--- trial 3 ---\n{edited}\n" in text
    talk(weights.model, form, "peas", "/original", edited=weights.edited)
    assert torch.equal(weights.model.lm_head.weight, -weights.original), "the edit is not back"
    assert text.split("<seeds>")[1] == talk(
        weights.model, form, "peas", "beans", "seeds", edited=weights.edited
    ).split("<seeds>")[1]  # fmt: skip
    assert "[nothing was asked yet]" in talk(weights.model, form, "/original", edited=weights.edited)


def test_the_original_alone_says_so(model, tokenizer) -> None:
    text = talk(model, chat_format(tokenizer), "peas", "/original")
    assert (
        text.startswith("[You talk to gardener, as it is, the original.")
        and "[this is the original model already" in text
    )


def test_the_edit_comes_back_after_an_interrupted_comparison(model, tokenizer) -> None:
    weights = Weights(model)
    edited = Edited("trial 3", weights.apply, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    text = talk(weights.model, chat_format(tokenizer), "peas", "/original", "beans", edited=edited)
    assert "[stopped]" in text and "<beans>" in text and weights.done[-1] == "apply"
    talk(weights.model, chat_format(tokenizer), "peas", "/original", edited=edited)
    assert weights.done[-2:] == ["apply", "apply"], "it comes back with the next question only"


def test_a_conversation_is_saved(model, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    form = chat_format(tokenizer, system="Be brief.")
    text = talk(model, form, "/save early.md", "peas", "/save", "/save a chat.md", "/save chat.json", "/save chat.txt",
                "/save chat.json", "/save no/folder.md")  # fmt: skip
    answer = text.split("<peas>")[1].split("\n")[0]
    assert json.loads((tmp_path / "chat.json").read_text()) == {
        "model": "gardener",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "peas"},
            {"role": "assistant", "content": answer},
        ],
    }
    saved = (tmp_path / "a chat.md").read_text()
    assert saved.startswith("# A conversation with gardener\n\n## System prompt\n\nBe brief.\n\n## Question\n\npeas\n")
    assert answer.strip() in saved
    for told in ("nothing was asked yet", "give a file to write to", "chat.txt does not say in what form",
                 "chat.json exists and is left as it is", "no/folder.md cannot be written (No such file"):  # fmt: skip
        assert told in text, told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a chat.md", "chat.json"]
