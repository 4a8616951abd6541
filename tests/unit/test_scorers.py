"""Scorers with known answers worked out by hand, and what the objective makes of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from heretic_ds.ablation import Edit
from heretic_ds.errors import UserError
from heretic_ds.prompts import PromptSet, as_text, read_own_prompts
from heretic_ds.scoring import (
    SCORERS,
    DistributionScorer,
    LengthScorer,
    Perplexity,
    RefusalScorer,
    Repetition,
    Scorer,
    TokenDivergence,
    make_scorers,
)
from heretic_ds.scoring.agreement import Agreement
from heretic_ds.scoring.repetition import repeated
from heretic_ds.scoring.values import Values, values_of
from heretic_ds.search.objective import How, Objective
from heretic_ds.settings import ScoringSettings
from tests import families
from tests.unit.test_resident import EDIT, ablation_for, alone, engine_for, prompts

EDITED = Edit(None, {})


def made(*entries: Any, markers: Sequence[str] = ("sorry",)) -> list[Any]:
    return list(make_scorers(ScoringSettings(list(entries), list(markers))))


# Repetition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("a b a b a b", 2, 1 - 2 / 5),  # ab ba ab ba ab
        ("a b a b a b", 3, 1 - 2 / 4),  # aba bab aba bab
        ("a b a b a b", 1, 1 - 2 / 6),
        ("No no\nNO  no", 1, 0.75),
        ("one two three", 4, 0.0),
        ("one two three four", 4, 0.0),
        ("", 1, 0.0),
        ("好好好好", 1, 0.75),
        ("ดี ดี", 2, 1 - 2 / 3),  # two characters each: ดี ีด ดี
    ],
)
def test_repetition(text: str, n: int, share: float) -> None:
    assert repeated(text, n) == pytest.approx(share, abs=1e-12)


def test_repetition_is_the_mean_over_answers() -> None:
    [scorer] = made({"_target_": "repetition", "n": 2})
    assert scorer.score(["p"] * 2, ["a b a b a b", "a b c"]) == pytest.approx(0.3)
    assert values_of(scorer, ["p"] * 2, ["a b a b a b", "a b c"]) == Values((pytest.approx(0.6), 0.0), "mean")  # type: ignore[arg-type]
    assert Repetition().options.n == 4 and Repetition().decided is None


# Over distributions -----------------------------------------------------------------------------------------


class Distributions:
    """An engine of two prompts whose next-token probabilities are given: by model, prompt and position."""

    ANSWERS = ((0, 1), ())
    """What the original answers."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.original = [[[0.5, 0.5], [0.5, 0.5], [0.2, 0.8]], [[0.5, 0.5]]]
        self.edited = [[[0.5, 0.5], [0.25, 0.75], [0.2, 0.8]], [[0.5, 0.5]]]

    def distributions(self, rows: Any, edits: Any, read: Any, more: Any = None) -> list[list[float]]:
        more = more or [()] * len(rows)
        self.asked.append((list(rows), [list(each) for each in more]))
        return [list(read([0, 1], [self._logits(edit, place, len(more[place])) for place in (0, 1)])) for edit in edits]

    def _logits(self, edit: Any, place: int, tokens: int) -> Tensor:
        given = self.original if edit is None else self.edited
        return torch.tensor(given[place][: 1 + tokens]).log() + 3.0  # a softmax takes no notice

    def generate(self, rows: Any, edits: Any, decided: Any = None) -> list[list[list[int]]]:
        return [[list(answer) for answer in self.ANSWERS] for _ in edits]


def test_divergence_over_tokens_is_the_mean_over_positions() -> None:
    """Of the first prompt 0, (ln 2 + ln 2/3) / 2, 0; of the second, which has no answer, 0."""
    scorer = TokenDivergence().begin(Distributions(), [[7], [8]], [[0, 1], []])  # type: ignore[arg-type]
    at_second = 0.5 * math.log(4 / 3)
    assert scorer.each([EDITED, None]) == [[pytest.approx(at_second / 3, rel=1e-5), 0.0], [0.0, 0.0]]
    assert scorer.of([EDITED]) == [pytest.approx(at_second / 6, rel=1e-5)]
    assert (scorer.combine, scorer.answer_tokens, scorer.reads_text) == ("mean", 31, 0)


def test_perplexity_is_that_of_the_continuation() -> None:
    """Of tokens 0 and 1 at probabilities 0.5 and 0.75: (8/3)^(1/2); none counts for a prompt without an answer."""
    scorer = Perplexity().begin(Distributions(), [[7], [8]], [[0, 1], []])  # type: ignore[arg-type]
    assert scorer.each([EDITED, None]) == [
        [pytest.approx(math.sqrt(8 / 3), rel=1e-6), 1.0],
        [pytest.approx(2.0, rel=1e-6), 1.0],
    ]
    assert scorer.of([EDITED, None]) == pytest.approx([(8 / 3) ** 0.25, 2**0.5], rel=1e-6)
    assert scorer.combine == "geometric_mean"


def test_what_the_original_answers_is_what_follows_prompts() -> None:
    """Each scorer gets as many tokens of its answers as it wants, which are generated once."""
    engine = Distributions()
    scorers = made("length", {"_target_": "kl_tokens", "tokens": 2}, {"_target_": "perplexity", "tokens": 2})
    baseline = PromptSet(["b", "c"], [[7], [8]])
    objective = Objective(engine, baseline, baseline, scorers, lambda rows: ["x" for _ in rows], how=How(values=True))  # type: ignore[arg-type]
    # The last token is only predicted: both pass over the same rows.
    assert engine.asked == [([[7], [8]], more) for more in ([[], []], [[0], []], [[0], []])]
    [scores] = objective.score([EDITED])
    assert scores.kl == 0.0
    assert scores.scores["kl_tokens"] == pytest.approx(0.5 * math.log(4 / 3) / 4, rel=1e-5)
    assert scores.scores["perplexity"] == pytest.approx((8 / 3) ** 0.25, rel=1e-6)
    assert scores.values["perplexity"].score == scores.scores["perplexity"]
    assert objective.original.scores["kl_tokens"] == 0.0 == objective.original.values["kl"].score
    assert list(scores.scores) == ["length", "kl_tokens", "perplexity"]


def test_perplexity_on_a_model_is_that_of_every_position_by_itself() -> None:
    """Many edits in one pass, rows of several lengths in a batch, and one edit after another."""
    model = families.build("llama").double()
    engine = engine_for(model, batch_size=2)
    engine.prepare(ablation_for(engine))
    given, edits = prompts(), [EDIT, None, Edit(None, EDIT.profiles)]
    generator = torch.Generator().manual_seed(5)
    more = [torch.randint(8, 40, (count,), generator=generator).tolist() for count in (5, 1, 3, 2, 7)]
    scorer, expected = Perplexity().begin(engine, given, more), []
    for edit in edits:
        engine.restore() if edit is None else engine.apply(edit)
        expected.append([])
        for row, rest in zip(given, more, strict=True):
            logits = [alone(model, [*row, *rest[:at]])[1].log_softmax(-1)[token] for at, token in enumerate(rest)]
            expected[-1].append(math.exp(-sum(map(float, logits)) / len(rest)))
    engine.restore()
    for found, right in zip(scorer.each(edits), expected, strict=True):
        assert found == pytest.approx(right, rel=1e-5)
    assert scorer.each([edits[2]])[0] == pytest.approx(expected[2], rel=1e-5)
    assert abs(expected[0][0] - expected[1][0]) > 1e-3 * expected[0][0]


def test_a_model_that_never_gives_a_token_is_infinitely_surprised() -> None:
    engine = Distributions()
    engine.original[0][0] = [1.0, 0.0]
    assert Perplexity().begin(engine, [[7], [8]], [[1, 0], []]).of([None]) == [math.inf]  # type: ignore[arg-type]


# Settings of their own --------------------------------------------------------------------------------------


def test_settings_of_their_own() -> None:
    first, second, third = made(
        "refusals",
        {"_target_": "refusals", "name": "apologies", "markers": ["my apologies"], "direction": "none"},
        {"_target_": "kl_tokens", "tokens": 8},
    )
    assert (first.name, first.direction, second.name, second.direction) == ("refusals", "minimize", "apologies", "none")
    answers = ["Sorry.", "My apologies.", "Well."]
    assert list(first.each(["p"] * 3, answers)) == [1, 0, 0] and list(second.each(["p"] * 3, answers)) == [0, 1, 0]
    assert third.answer_tokens == 7 and TokenDivergence().answer_tokens == 31


class Above(Scorer):
    """A scorer of somebody's own, with settings."""

    name = "above"

    @dataclass
    class Options(Scorer.Options):
        """Of somebody's own."""

        words: int = 2

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> float:
        return sum(len(answer.split()) > self.options.words for answer in answers)


class Silent(Scorer):
    name = "silent"


class Quiet(DistributionScorer):
    name = "quiet"

    def begin(self, engine: Any, prompts: Any, continuations: Any = None) -> Quiet:
        return self


class Kl(Above):
    name = "kl"


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_scorers")
    for scorer in (Above, Silent, Quiet, Kl):
        setattr(module, scorer.__name__, scorer)
    monkeypatch.setitem(sys.modules, "my_scorers", module)


def test_settings_of_a_class_of_ones_own(own_module: None) -> None:
    usual, other = made("my_scorers.Above", {"_target_": "my_scorers.Above", "name": "long", "words": 0})
    assert usual.score(["p"] * 2, ["a b c", "a"]) == 1 and other.score(["p"] * 2, ["a b c", "a"]) == 2
    assert values_of(other, ["p"] * 2, ["a b c", "a"]) == Values((1.0, 1.0), "sum")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [{"name": "x"}],
            r"scoring.scorers holds \{'name': 'x'\}, which names no scorer; write a list of names, or of",
        ),
        ([3], "scoring.scorers holds 3, which names no scorer"),
        ([["refusals"]], r"holds \['refusals'\], which names no scorer"),
        ([{"_target_": "repetition", "m": 2}], "scoring.scorers.repetition has no setting m; it has name, direction"),
        ([{"_target_": "repetition", "n": 0}], "scoring.scorers.repetition.n is 0; it has to be at least 1"),
        ([{"_target_": "repetition", "n": "two"}], "repetition.n=two does not fit: .* takes a whole number"),
        ([{"_target_": "length", "direction": "down"}], "direction is 'down'; choose one of minimize, maximize, none"),
        ([{"_target_": "length", "direction": "none"}, "refusals"], "begins with 'length', which is only reported"),
        ([{"_target_": "refusals", "prompts": "baseline.eval"}], "begins with 'refusals' on prompts of its own"),
        (
            ["refusals", {"_target_": "refusals"}],
            "more than one scorer called 'refusals'; name each only once, or call",
        ),
        (["refusals", {"_target_": "length", "name": "kl"}], "'kl' is the name of a measure that there always is"),
        (["refusals", {"_target_": "length", "name": "tokens"}], "'tokens' is the name of a measure"),
        (["refusals", {"_target_": "length", "name": "perplexity"}], "'perplexity' is the name of a measure"),
        ([{"_target_": "perplexity", "of": "x"}], "perplexity.of is 'x'; choose one of answers, text"),
        (["my_scorers.Silent"], "my_scorers.Silent gives no number; give the class a method `score` or `each`"),
        (["my_scorers.Quiet"], "my_scorers.Quiet gives no number; give the class a method `of` or `each`"),
        (["my_scorers.Kl"], "'kl' is the name of a measure"),
    ],
)
def test_what_is_refused(own_module: None, entries: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        made(*entries)
    assert "\n" not in str(refused.value)


def test_numbers_by_prompt_are_not_those_of_a_class_that_gives_another_score() -> None:
    """One that overrides the score of a class that tells them."""

    class Squared(RefusalScorer):
        def score(self, prompts: Sequence[str], answers: Sequence[str]) -> float:
            return sum(map(self.is_refusal, answers)) ** 2

    assert values_of(Squared(["sorry"]), ["p"] * 2, ["sorry", "sorry"]) is None


# Prompts of their own ---------------------------------------------------------------------------------------


def test_prompts_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("one\ntwo\nthree\n")
    file, text = str(tmp_path / "few.txt"), "perplexity"
    scorers = made(
        "refusals",
        {"_target_": "length", "prompts": "baseline.eval"},
        {"_target_": "repetition", "prompts": file},
        "kl_tokens",
        {"_target_": text, "of": "text", "prompts": {"source": file, "slice": "1:3"}},
    )
    own = read_own_prompts(scorers)
    assert own.usual == {"refusals": "target.eval", "length": "baseline.eval", "kl_tokens": "baseline.eval"}
    assert own.asked["repetition"].texts == ["one", "two", "three"] and own.read[text].texts == ["two", "three"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "scoring.scorers.length.prompts is 3; give target.eval or baseline.eval, a file, or {source: ...}"),
        ({"source": "x", "rows": "1"}, "scoring.scorers.length.prompts has no setting rows; it has source, subset"),
        ({"slice": "0:1"}, "scoring.scorers.length.prompts.source is not set"),
        ("nowhere.txt", "scoring.scorers.length.prompts.source: there is no file"),
    ],
)
def test_prompts_that_are_refused(given: Any, message: str) -> None:
    with pytest.raises(UserError) as refused:
        read_own_prompts(made("refusals", {"_target_": "length", "prompts": given}))
    assert str(refused.value).startswith(message)


def test_texts_are_read_as_they_are() -> None:
    tokenizer, config = families.tokenizer(), families.build("llama").config
    found = as_text(["abcdef", "b"], 3, tokenizer, config)
    ids = tokenizer("abcdef")["input_ids"]
    assert found.rows == [ids[:1], tokenizer("b")["input_ids"]] and found.continuations == [ids[1:4], []]
    assert len(as_text(["x" * 999], 999, tokenizer, config).continuations[0]) == 255  # type: ignore[index]


class Answering:
    """Answers prompts with themselves, as many tokens as their number."""

    def __init__(self) -> None:
        self.generated: list[Any] = []

    def distributions(self, rows: Any, edits: Any, read: Any, more: Any = None) -> list[list[float]]:
        return [[0.5] * len(rows) for _ in edits]

    def generate(self, rows: Any, edits: Any, decided: Any = None) -> list[list[list[int]]]:
        self.generated.append((rows, len(edits), decided is not None))
        return [[[row[0]] * row[0] for row in rows] for _ in edits]


def test_scorers_with_prompts_of_their_own_get_the_answers_to_these() -> None:
    """And where they need whole answers, other prompts' rows may still stop early."""
    target, baseline = PromptSet(["t", "u"], [[1], [2]]), PromptSet(["b"], [[3]])
    engine, scorers = Answering(), [RefusalScorer(["w w"]), LengthScorer()]
    own = {"refusals": target, "length": baseline}
    objective = Objective(engine, target, baseline, scorers, texts_of, own=own)  # type: ignore[arg-type]
    assert engine.generated == [(target.rows, 1, True), (baseline.rows, 1, False)]
    assert objective.original.scores == {"refusals": 1, "length": 3.0}
    assert [each.scores for each in objective.score([EDITED, None])] == [{"refusals": 1, "length": 3.0}] * 2
    assert engine.generated[2:] == [(target.rows, 2, True), (baseline.rows, 2, False)]
    assert objective.examples(2)[0]["prompt"] == "t"


def texts_of(answers: Sequence[Sequence[int]]) -> list[str]:
    return [" ".join("w" for _ in answer) for answer in answers]


def test_agreement_of_scorers_that_flag_the_same_answers() -> None:
    target, other = PromptSet(["t", "u", "v"], [[1], [2], [3]]), PromptSet(["b"], [[3]])
    names = ("refusals", "two", "elsewhere")
    scorers = [RefusalScorer(["w w w"]), RefusalScorer(["w w"]), RefusalScorer(["w"])]
    for scorer, name in zip(scorers, names, strict=True):
        scorer.name = name
    objective = Objective(Answering(), target, other, scorers, texts_of, own={"elsewhere": other})  # type: ignore[arg-type]
    assert objective.original.agreements == (Agreement("refusals", "two", 1, 0, 1, 1),)


def test_every_scorer_says_how_its_score_comes_about() -> None:
    """By a class of the registry, and no two are called alike."""
    assert all(kind.combine for kind in SCORERS.values()) and len(SCORERS) == 6
    assert [kind.name for kind in SCORERS.values()] == list(SCORERS)
