"""The menu: what typed answers lead to, and that no answer breaks it."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from heretic_ds.errors import SearchFailed, UserError
from heretic_ds.terminal.asking import Lines
from heretic_ds.terminal.front import about_the_rule, most_moved
from heretic_ds.terminal.menu import MORE_TRIALS, MenuActions, run_menu


@dataclass
class Trial:
    index: int
    refusals: float | None = 3
    kl: float | None = 0.01
    complete: bool = True
    maximize: bool = False

    @property
    def aim(self) -> float | None:
        return self.refusals


class Session:
    """Plays typed answers to the menu and records what it did; exceptions among the answers are raised."""

    def __init__(self, *answers: str | BaseException, fail: BaseException | None = None, max_kl: float = 0.1) -> None:
        self.answers, self.fail = list(answers), fail
        self.done: list[tuple] = []
        self.records, self.front = [Trial(4), Trial(7, 0, 0.0625), Trial(9, 1, 0.09)], [7, 4]
        self.questions: list[str] = []
        self.output = io.StringIO()
        console = Console(file=self.output, width=120)
        actions = MenuActions(
            self.save, self.chat, self.more_trials, self.upload, "runs/tiny/model", "tiny-abliterated", max_kl=max_kl
        )
        run_menu(actions, self.records, self.front, Lines(self.ask, console), console)
        assert not self.answers, "the menu left before all answers were used"

    @property
    def text(self) -> str:
        return self.output.getvalue()

    def ask(self, question: str) -> str:
        self.questions.append(question)
        answer = self.answers.pop(0) if self.answers else EOFError()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def act(self, *what) -> None:
        self.done.append(what)
        if self.fail:
            raise self.fail

    def save(self, index: int, folder: str) -> None:
        self.act("save", index, folder)

    def chat(self, index: int) -> None:
        self.act("chat", index)

    def upload(self, index: int, folder: str, repository: str, private: bool) -> None:
        self.act("upload", index, folder, repository, private)

    def more_trials(self, count: int):
        self.act("more", count)
        return [*self.records, Trial(12, 0, 0.002)], [12]


def test_front_is_shown_in_its_order() -> None:
    text = Session("4").text
    assert text.index("1  trial 7: 0 refusals, KL 0.0625") < text.index("2  trial 4: 3 refusals, KL 0.01")
    assert "trial 9" not in text and "3  run more trials" in text and "4  leave" in text


def test_save_chat_and_back() -> None:
    session = Session("1", "1", "", "1", " elsewhere ", "2", "4", "2", "2", "4", "4")
    assert session.done == [
        ("save", 7, "runs/tiny/model"), ("save", 7, "elsewhere"), ("chat", 7), ("chat", 4),
    ]  # fmt: skip


def test_upload_asks_for_folder_repository_and_who_sees_it() -> None:
    session = Session("1", "3", "", "", "", "3", "elsewhere", "me/mine", "2", "4", "4")
    assert session.done == [
        ("upload", 7, "runs/tiny/model", "tiny-abliterated", True), ("upload", 7, "elsewhere", "me/mine", False),
    ]  # fmt: skip
    assert "1  private: you alone can see it" in session.text


def test_questions_survive_a_console_that_reads_markup() -> None:
    """Text in square brackets would vanish where the caller asks through rich."""
    session = Session("1", "1", "", "4", "3", "2", "4")
    assert any("runs/tiny/model" in question for question in session.questions)
    assert not any("[" in question for question in session.questions)


def test_more_trials_bring_a_new_front() -> None:
    session = Session("3", "20", "1", "2", "4", "3")
    assert session.done == [("more", 20), ("chat", 12)]
    assert Session("3", "0", "4").done == []


def test_enter_alone_takes_the_default_that_was_said() -> None:
    """The rule's choice, saving, its folder, and so many trials."""
    session = Session("", "", "", "4", "3", "", "3")
    assert session.done == [("save", 7, "runs/tiny/model"), ("more", MORE_TRIALS)]
    assert [question.split(", or ")[1] for question in session.questions] == [
        "Enter for 1: ", "Enter for 1: ", "Enter for runs/tiny/model: ", "Enter for 1: ", "Enter for 1: ",
        f"Enter for {MORE_TRIALS}: ", "Enter for 1: ",
    ]  # fmt: skip


def test_the_rule_and_what_a_kl_means_are_said() -> None:
    text = " ".join(Session("4").text.split())
    assert "would choose trial 7: the fewest refusals with a KL of at most 0.1 (export.max_kl)" in text
    assert "KL of 0.0625 means that at most 18 % of the probability of an answer's first token moved" in text
    assert "1  trial 7: 0 refusals, KL 0.0625 (by the rule)" in Session("4").text
    session = Session("", "2", "4", "4", max_kl=0.02)
    assert session.done == [("chat", 4)] and "2  trial 4: 3 refusals, KL 0.01 (by the rule)" in session.text
    none = Session("", "4", "3", max_kl=0.001)
    assert none.done == [("more", 4)] and "the closest is trial 4. Its KL of 0.01 means" in " ".join(none.text.split())
    assert "by the rule" not in none.text and about_the_rule([], 0.1) == ""


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=2, max_size=6))
def test_no_more_probability_moves_than_is_said(pairs: list[tuple[float, float]]) -> None:
    """The bound holds for any two distributions, in percent as it is printed."""
    sums = [math.fsum(column) for column in zip(*pairs, strict=True)]
    p, q = ([value / total for value in column] for column, total in zip(zip(*pairs, strict=True), sums, strict=True))
    moved = math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    kl = max(0.0, math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    said = about_the_rule([Trial(0, 0, kl)], 10.0).split("at most ")[2].split(" %")[0]
    assert moved <= most_moved(kl) + 1e-7 and 100 * most_moved(kl) <= float(said) + 1e-7


@pytest.mark.parametrize("nonsense", ["0", "5", "-1", "x", "1.5", "²", "1 2", "[/red]"])
def test_bad_input_asks_again(nonsense: str) -> None:
    session = Session(nonsense, "2", nonsense.replace("0", "x"), "2", "4", "4")
    assert session.done == [("chat", 4)]
    assert "expected a whole number from 1 to 4" in session.text


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [[], ["1"], ["1", "1"], ["1", "3", ""], ["1", "3", "", ""], ["3"]])
def test_end_of_input_leaves_from_everywhere(before: list[str], end: BaseException) -> None:
    assert Session(*before, end).done == []


@pytest.mark.parametrize("error", [UserError("export.dir=x [is] full"), SearchFailed("nothing found")])
def test_errors_are_shown_and_the_menu_goes_on(error: Exception) -> None:
    session = Session("1", "1", "", "2", "4", "3", "5", "4", fail=error)
    assert session.done == [("save", 7, "runs/tiny/model"), ("chat", 7), ("more", 5)]
    assert session.text.count(str(error)) == 3


def test_ctrl_c_in_an_action_comes_back_to_the_menu() -> None:
    assert Session("1", "1", "", "4", "4", fail=KeyboardInterrupt()).done == [("save", 7, "runs/tiny/model")]


def test_other_errors_are_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        Session("1", "2", fail=ZeroDivisionError())


def test_an_empty_front_still_offers_more_trials() -> None:
    output = io.StringIO()
    answers = iter(["2"])
    actions = MenuActions(
        lambda i, d: None, lambda i: None, lambda n: ([], []), lambda *given: None, default_dir="x", default_repo="y"
    )
    console = Console(file=output)
    run_menu(actions, [], [], Lines(lambda question: next(answers), console), console)
    assert "1  run more trials" in output.getvalue()
