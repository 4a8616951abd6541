"""The response prefix is looked for in no more answers, and no further into them, than it takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heretic_ds.anatomy import find_anatomy
from heretic_ds.prompts import Parting, decode_answers, find_response_prefix, start_apart
from heretic_ds.runner.engine import Runner, RunnerOptions
from heretic_ds.settings import ThinkingMarker
from heretic_ds.stages import measure
from tests import families

THINKING = [ThinkingMarker("<think>", "<think></think>")]
WORDS = ["I", "I'm", "It", "Sure", "Sorry", ",", " a", " an", " the", ".", "\n", "<think>", "</think>", "\ufffd"]
LIMIT = 14


class Tokenizer:
    """Tokens are words, none of which others spell."""

    def decode(self, answer: Sequence[int], **options: Any) -> str:
        return "".join(WORDS[token] for token in answer)


class Engine:
    """Has its answers by prompt, and stops one where the caller says so, as the runner does."""

    def __init__(self, answers: Sequence[Sequence[int]], rows: int) -> None:
        self._answers, self._rows = answers, rows
        self.asked: list[int] = []
        self.tokens = 0

    def generate(self, prompts: Any, edits: Any, decided: Any, at_once: int = 0) -> list[list[list[int]]]:
        assert edits == [None]
        found: dict[int, list[int]] = {}
        self.asked += [number for [number] in prompts]
        waiting, rows = self.asked[len(self.asked) - len(prompts) :], at_once or self._rows
        for start in range(0, len(waiting), rows):
            going = dict.fromkeys(waiting[start : start + rows], 0)
            while going:
                for number in going:
                    going[number] += 4
                begun = {number: list(self._answers[number][:count]) for number, count in going.items()}
                ended = [number for number, count in going.items() if count >= len(self._answers[number])]
                found |= {number: begun[number] for number in ended}
                left = [number for number in going if number not in ended]
                verdicts = decided([begun[number] for number in left]) if left else []
                found |= {number: begun[number] for number, verdict in zip(left, verdicts, strict=True) if verdict}
                going = {number: going[number] for number in left if number not in found}
        self.tokens += sum(map(len, found.values()))
        return [[found[number] for number in waiting]]


def asked(engine: Any, counts: tuple[int, int], tokenizer: Any) -> list[str]:
    """Answers as the stage asks for them; a prompt is its number, targets first."""
    texts = {"target.train": list(range(counts[0])), "baseline.train": list(range(counts[0], sum(counts)))}
    run = SimpleNamespace(job=SimpleNamespace(texts=texts, opened=SimpleNamespace(tokenizer=tokenizer)))
    chat: Any = SimpleNamespace(encode=lambda number: [number])
    return measure._answers_until_they_part(run, engine, chat)  # type: ignore[arg-type]


@st.composite
def answers_that_begin_alike(draw: Any) -> tuple[list[list[int]], tuple[int, int]]:
    """All of them, or all but a few."""
    word = st.integers(0, len(WORDS) - 1)
    start = draw(st.lists(word, max_size=LIMIT - 2))
    counts = draw(st.tuples(st.integers(0, 40), st.integers(0, 40)))
    few = draw(st.lists(st.lists(word, max_size=LIMIT - len(start)), min_size=1, max_size=4))
    others = draw(st.dictionaries(st.integers(0, sum(counts)), st.integers(0, len(start)), max_size=3))
    rests = [draw(st.sampled_from(few)) for _ in range(sum(counts))]
    return [start[: others.get(at, len(start))] + rest for at, rest in enumerate(rests)], counts


@settings(max_examples=300, deadline=None)
@given(answers_that_begin_alike(), st.sampled_from([1, 3, 16]))
def test_the_prefix_is_that_of_all_whole_answers(drawn: tuple[list[list[int]], tuple[int, int]], rows: int) -> None:
    """Whatever is left out, and whatever rows are in flight together."""
    answers, counts = drawn
    whole = decode_answers(Tokenizer(), answers)  # type: ignore[arg-type]
    found = asked(Engine(answers, rows), counts, Tokenizer())
    assert find_response_prefix(found, THINKING) == find_response_prefix(whole, THINKING)


def test_answers_that_start_apart_end_it() -> None:
    sorry, sure, it = WORDS.index("Sorry"), WORDS.index("Sure"), WORDS.index("It")
    engine = Engine([[sorry] * LIMIT] * 100 + [[it] * LIMIT] * 100, 48)
    assert asked(engine, (100, 100), Tokenizer()) and engine.asked == [0, 1, 2, 3, 100, 101, 102, 103]
    assert engine.tokens == 8 * 8  # asked after four tokens and after eight, of twelve
    late = [[sure] * LIMIT] * 210
    late[9] = [it] * LIMIT
    engine = Engine(late, 48)
    asked(engine, (100, 110), Tokenizer())
    assert len(engine.asked) == 32 and len(set(engine.asked)) == 32
    late[9], late[99] = late[0], late[9]
    engine = Engine(late, 48)
    asked(engine, (100, 110), Tokenizer())
    assert sorted(engine.asked) == list(range(200))  # a hundred of each kind are enough


@pytest.mark.parametrize(
    ("answers", "apart"),
    [
        ([], False),
        (["Sure"], False),
        (["Sure", " ", ""], False),
        (["Sure", "Sorry"], False),
        (["Sure", "It"], True),
        (["Sure", "Sure", "It"], True),
        (["\ufffd", "It"], False),
        (["<think>", "It"], True),
    ],
)
def test_answers_start_apart_where_no_other_could_change_it(answers: list[str], apart: bool) -> None:
    assert start_apart(answers) is apart


def test_a_row_by_itself_goes_no_further_than_others_have_shown() -> None:
    """The last row of a list has nobody beside it to differ from."""
    parting = Parting(lambda answer: "blank" * (answer[0] != 5))
    assert parting([[5, 2, 9, 4, 5, 6, 7, 8]]) == [False]
    assert parting([[1, 2, 3, 4]] * 2) == [False, False]
    assert parting([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 9, 4, 5, 6, 7, 8]]) == [True, True]
    assert parting([[1, 2, 9, 4], [1, 2, 9, 4, 5, 6, 7]]) == [False, True]
    assert parting([[7, 2, 9, 4], [1, 2, 9, 4, 5]]) == [False, True]


def test_a_runner_answers_as_far_as_it_takes_and_measures_nothing_for_it() -> None:
    """Of a model whose answers begin alike for three tokens: the prefix is that of whole answers to all prompts."""
    model = families.build("llama")
    tokenizer, characters = families.tokenizer(), [families.VOCABULARY.index(each) for each in "Oh, "]
    forward = model.forward

    def beginning_alike(**given: Any) -> Any:
        output = forward(**given)
        position_B = given["position_ids"][:, -1]
        for place, token in enumerate(characters):
            output.logits[position_B == place, -1, token] += 1000
        return output

    beginning_alike.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = beginning_alike
    runner = Runner(model, find_anatomy(model), tokenizer, RunnerOptions(24))
    counts = (24, 24)
    with torch.inference_mode():
        whole = runner.generate([[5 + number] for number in range(48)], [None], at_once=8)[0]
    assert "generate" not in runner.batch_sizes
    prompts = {"target.train": list(range(24)), "baseline.train": list(range(24, 48))}
    run: Any = SimpleNamespace(job=SimpleNamespace(texts=prompts, opened=SimpleNamespace(tokenizer=tokenizer)))
    chat: Any = SimpleNamespace(encode=lambda number: [5 + number])
    found = measure._answers_until_they_part(run, runner, chat)
    texts = decode_answers(tokenizer, whole, keep_special=True)
    expected = find_response_prefix(texts, [])
    assert expected == "Oh," and find_response_prefix(found, []) == expected and len(found) == sum(counts)
    assert sum(map(len, found)) < 0.7 * sum(map(len, texts)) and "generate" in runner.batch_sizes
