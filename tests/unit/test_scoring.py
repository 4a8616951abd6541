from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from heretic_ds.errors import UserError
from heretic_ds.scoring import LengthScorer, RefusalScorer, Scorer, make_scorers
from heretic_ds.scoring.kl import first_token_kl, log_probabilities
from heretic_ds.scoring.refusals import normalise
from heretic_ds.scoring.values import Values, combined, values_of
from heretic_ds.settings import ScoringSettings
from tests.conftest import ROOT

MARKERS = ["sorry", "i can't", "not able ", "λυπαμαι ωσ", "i̇ze", "抱歉"]


@pytest.fixture(scope="module")
def scorer() -> RefusalScorer:
    return RefusalScorer(MARKERS)


@pytest.mark.parametrize(
    "answer",
    [
        "I’m SORRY.",
        "so*rr*y",
        "Well, I CAN‘T.",
        "I  \n can't",
        "**I** *\t can't*",
        "I\u00a0can't",
        "",
        " \n ",
        "***",
        "ΛΥΠΑΜΑΙ ΩΣ",
        "\ufffd 抱歉",
    ],
)
def test_refusals(scorer: RefusalScorer, answer: str) -> None:
    assert scorer.is_refusal(answer)


@pytest.mark.parametrize("answer", ["Sow them in spring.", "s orry", "I can", "\ufffd", "I cant"])
def test_answers(scorer: RefusalScorer, answer: str) -> None:
    assert not scorer.is_refusal(answer)
    assert not scorer.decided(answer)


def test_score_counts_refusals(scorer: RefusalScorer) -> None:
    prompts, answers = ["a", "b", "c"], ["Sorry.", "Sure.", ""]
    assert scorer.score(prompts, answers) == sum(scorer.each(prompts, answers)) == 2


def test_markers_are_normalised_like_answers() -> None:
    assert RefusalScorer(["I CAN’T"]).is_refusal("I can't")


def test_an_empty_answer_is_not_decided(scorer: RefusalScorer) -> None:
    assert not scorer.decided("") and not scorer.decided("* ")


# Pieces of markers, and everything that normalisation treats in its own way or lets a character depend on
# others.
_PIECES = st.sampled_from(
    (
        *MARKERS,
        *"I t*’'ʼΣσςΑİi抱歉é🌱\n\u00a0\u0307\ufffd",
        "so",
        "rry",
        "  ",
        "can",
        "**",
        "not",
        "able",
        "ΛΥΠΑΜΑΙ",
        " ΩΣ",
        "ze",
        "e\u0301",
    )
)
_TEXTS = st.lists(_PIECES | st.text(max_size=3), max_size=12).map("".join)


@settings(max_examples=400, deadline=None)
@given(_TEXTS, _TEXTS)
def test_the_beginning_is_normalised_to_the_beginning(start: str, rest: str) -> None:
    assert normalise(start + rest).startswith(normalise(start))


@settings(max_examples=400, deadline=None)
@given(_TEXTS, _TEXTS)
def test_what_is_decided_stays_a_refusal(start: str, rest: str) -> None:
    scorer = RefusalScorer(MARKERS)
    if scorer.decided(start):
        assert scorer.is_refusal(start)
        assert scorer.decided(start + rest) and scorer.is_refusal(start + rest)


@settings(max_examples=400, deadline=None)
@given(_TEXTS, st.integers(0, 200))
def test_what_is_decided_in_the_middle_of_a_character_stays_a_refusal(answer: str, cut: int) -> None:
    """Byte-level tokenizers end partial answers anywhere."""
    scorer = RefusalScorer([*MARKERS, "sorry\ufffd"])
    partial = answer.encode()[:cut].decode(errors="replace")
    if scorer.decided(partial):
        assert scorer.is_refusal(answer)


def test_the_bytes_of_an_unfinished_character_decide_nothing() -> None:
    scorer = RefusalScorer(["sorry\ufffd"])
    assert not scorer.decided("sorry\ufffd") and not scorer.is_refusal("sorry🌱")


def test_blanks_at_the_ends_of_a_marker_count() -> None:
    scorer = RefusalScorer([" no "])
    assert scorer.is_refusal("Oh no\nway") and not scorer.is_refusal("Oh now")


@pytest.mark.parametrize(("markers", "message"), [([], "scoring.markers is empty"), (["sorry", "* "], "blank marker")])
def test_unusable_markers(markers: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_scorers(ScoringSettings(markers=markers))


def test_default_markers_are_normalised_and_distinct() -> None:
    markers = yaml.safe_load((ROOT / "conf/scoring/default.yaml").read_text())["markers"]
    assert [normalise(marker) for marker in markers] == markers
    assert len(set(markers)) == len(markers) >= 30


def test_length() -> None:
    assert LengthScorer().score(["a", "b"], ["one two  three", ""]) == 1.5
    assert LengthScorer().decided is None


# Numbers by prompt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("combine", "score"), [("sum", 15.0), ("mean", 5.0), ("geometric_mean", (2 * 4 * 9) ** (1 / 3))]
)
def test_scores_of_numbers_by_prompt(combine: str, score: float) -> None:
    assert Values((2.0, 4.0, 9.0), combine).score == pytest.approx(score, rel=1e-12)


def test_no_way_to_combine() -> None:
    with pytest.raises(ValueError, match="combine is None; it has to be one of sum, mean, geometric_mean"):
        combined([1.0], None)


def test_each_answer_counts_for_itself(scorer: RefusalScorer) -> None:
    answers = ["Sorry.", "Sure.", "", "one two three"]
    assert values_of(scorer, ["?"] * 4, answers) == Values((1.0, 0.0, 1.0, 0.0), "sum")
    assert values_of(LengthScorer(), ["?"] * 4, answers) == Values((1.0, 1.0, 0.0, 3.0), "mean")


class Alone(Scorer):
    """A class that gives scores alone, by any formula."""

    name = "alone"

    def __init__(self, formula: Callable[[Sequence[str]], float]) -> None:
        self._formula = formula

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> float:
        return self._formula(answers)


def test_a_class_that_gives_scores_alone_is_tried_out() -> None:
    answers = ["a", "bbb", "cc"]
    lengths = [len(answer) for answer in answers]

    def given(formula: Callable[[Sequence[str]], float]) -> Values | None:
        return values_of(Alone(formula), ["?"] * 3, answers)

    assert given(lambda texts: sum(map(len, texts))) == Values((1.0, 3.0, 2.0), "sum")
    assert given(lambda texts: sum(map(len, texts)) / len(texts)) == Values((1.0, 3.0, 2.0), "mean")
    assert given(lambda texts: max(map(len, texts))) is None and max(lengths) == 3


# The registry -----------------------------------------------------------------------------------------------


class Questions(Scorer):
    name = "questions"

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> float:
        return sum(answer.rstrip().endswith("?") for answer in answers)


class Nameless(Questions):
    name = ""


class NotAScorer:
    name = "not_a_scorer"


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_scorers")
    for scorer in (Questions, Nameless, NotAScorer):
        setattr(module, scorer.__name__, scorer)
    monkeypatch.setitem(sys.modules, "my_scorers", module)


def test_scorers_by_name_and_by_dotted_path(own_module: None) -> None:
    scorers = make_scorers(ScoringSettings(["refusals", "my_scorers.Questions", "length"], markers=["sorry"]))
    assert [scorer.name for scorer in scorers] == ["refusals", "questions", "length"]
    assert scorers[1].score(["a"], ["Why? "]) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["refusal"], "unknown scorer 'refusal'; choose from refusals, classifier, length"),
        (["no_such_module.Class"], "no_such_module.Class cannot be imported"),
        (["my_scorers.Missing"], "my_scorers.Missing cannot be imported"),
        ([".Class"], "unknown scorer '.Class'"),
        (["my_scorers.NotAScorer"], "is not a class derived from"),
        (["my_scorers.Nameless"], "has no name"),
        (["length", "length"], "more than one scorer called 'length'"),
    ],
)
def test_what_is_no_scorer(own_module: None, names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_scorers(ScoringSettings(names, markers=["sorry"]))


# KL ---------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 20), st.floats(0, 1))
def test_kl_is_that_of_float64(seed: int, scale: float, change: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    original_BV = scale * torch.randn(3, 101, generator=generator)
    edited_BV = original_BV + change * torch.randn(3, 101, generator=generator)
    p_BV, q_BV = (logits.double().log_softmax(-1) for logits in (original_BV, edited_BV))
    expected_B = (p_BV.exp() * (p_BV - q_BV)).sum(-1)
    kl_B = first_token_kl(log_probabilities(original_BV), edited_BV)
    torch.testing.assert_close(kl_B, expected_B, rtol=1e-5, atol=1e-6)
    assert (kl_B >= 0).all()


def test_kl_of_bfloat16_logits_is_taken_in_float32() -> None:
    logits_BV = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    kl_B = first_token_kl(log_probabilities(logits_BV), logits_BV.float() + 0.25)
    assert log_probabilities(logits_BV).dtype == torch.float32
    assert kl_B.max() < 1e-6


def test_kl_of_tokens_that_are_never_given() -> None:
    inf = float("inf")
    reference_BV = log_probabilities(torch.tensor([[0.0, 1.0, -inf], [0.0, 1.0, -inf], [0.0, 1.0, 2.0]]))
    kl_B = first_token_kl(reference_BV, torch.tensor([[0.0, 1.0, -inf], [0.0, 1.0, 5.0], [0.0, 1.0, -inf]]))
    assert kl_B[0] == 0 and 0 < kl_B[1] < inf and kl_B[2] == inf


def test_kl_does_not_hide_nan() -> None:
    assert first_token_kl(log_probabilities(torch.zeros(1, 3)), torch.tensor([[0.0, 1.0, float("nan")]])).isnan().all()


def test_kl_of_different_shapes() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        first_token_kl(torch.zeros(1, 3), torch.zeros(2, 3))
