"""Final scores: intervals against known cases, what is measured of one model, which prompts are held out."""

from __future__ import annotations

import io
import json
import logging
import math
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from heretic_ds.errors import UserError
from heretic_ds.export.final import final_rows, number_text, range_text
from heretic_ds.export.target import MANIFEST_NAME
from heretic_ds.prompts import Prompts, overlaps, read_all, tell_of_overlaps
from heretic_ds.prompts.parts import held_out_rows
from heretic_ds.report.final import final_table
from heretic_ds.scoring.values import Values
from heretic_ds.settings import HeldOutSource, PromptPair, PromptSettings, PromptSource, Settings
from heretic_ds.stages.sharing import rescoring
from heretic_ds.verifying.final import _perplexity, final_results, side_by_side
from heretic_ds.verifying.intervals import Bootstrap, Scored
from heretic_ds.verifying.measures import Likelihoods, repetition
from heretic_ds.world import World

# Intervals --------------------------------------------------------------------------------------------------


def counted(ones: int, n: int) -> Values:
    return Values((1.0,) * ones + (0.0,) * (n - ones), "sum")


def test_of_a_count_it_is_the_binomial_one() -> None:
    """A sample of 100 prompts, of which 30 say yes, has 21 to 39 of them: quantiles of Binomial(100, 0.3)."""
    found = Bootstrap(20_000).of(counted(30, 100))
    assert found.score == 30 and abs(found.low - 21) <= 1 and abs(found.high - 39) <= 1


def test_of_a_mean_it_is_the_normal_one() -> None:
    """1.96 standard errors on both sides."""
    each = np.random.default_rng(3).normal(5, 2, 400)
    found = Bootstrap(10_000).of(Values(tuple(each), "mean"))
    error = each.std() / 20
    assert found.score == pytest.approx(each.mean())
    assert found.low == pytest.approx(each.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(each.mean() + 1.96 * error, abs=0.1 * error)


def test_of_a_geometric_mean_it_is_that_of_the_logarithms() -> None:
    each = np.random.default_rng(4).uniform(1, 9, 50)
    plain = Bootstrap().of(Values(tuple(np.log(each)), "mean"))
    found = Bootstrap().of(Values(tuple(each), "geometric_mean"))
    for name in ("score", "low", "high"):
        assert getattr(found, name) == pytest.approx(math.exp(getattr(plain, name)))


def test_it_holds_the_truth_as_often_as_it_says() -> None:
    """Of 300 samples of 60 numbers with mean 1 (exponential, skewed) the interval holds 1 in nearly 95 of a hundred."""
    draw = np.random.default_rng(5)
    found = [Bootstrap(500, seed).of(Values(tuple(draw.exponential(1, 60)), "mean")) for seed in range(300)]
    assert 0.88 <= sum(each.low <= 1 <= each.high for each in found) / 300 <= 0.98


@pytest.mark.parametrize(("n", "most"), [(10, 3.085), (100, 3.62), (1, 0.975)])
def test_where_all_prompts_agree_it_is_the_exact_one(n: int, most: float) -> None:
    """Clopper and Pearson: 0 of 10 may be up to 30.85 %, 0 of 100 up to 3.62 %."""
    none, every = Bootstrap().of(counted(0, n)), Bootstrap().of(counted(n, n))
    assert (none.score, none.low) == (0, 0) and none.high == pytest.approx(most, abs=0.005)
    assert (every.score, every.high) == (n, n) and every.low == pytest.approx(n - most, abs=0.005)
    change = Bootstrap().change(counted(n, n), counted(0, n))
    assert (change.score, change.low) == (-n, -n) and change.high == pytest.approx(most - n, abs=0.005)
    still = Bootstrap().change(counted(n, n), counted(n, n))
    assert still.low == pytest.approx(-most, abs=0.005) and still.high == pytest.approx(most, abs=0.005)


def test_ends_of_a_count_are_never_narrower_than_exact() -> None:
    """Clopper and Pearson: 1 of 80 may be up to 6.769 %, 5 of 20 between 8.657 and 49.105 %."""
    found = [Bootstrap().of(counted(ones, 80)) for ones in range(81)]
    assert found[1].high == pytest.approx(80 * 0.06769, abs=0.005) and found[79].low == 80 - found[1].high
    five = Bootstrap().of(counted(5, 20))
    assert five.low <= 20 * 0.08657 + 1e-3 and five.high >= 20 * 0.49105 - 1e-3
    for name in ("low", "high"):
        ends = [getattr(each, name) for each in found]
        assert ends == sorted(ends)


def test_a_mean_of_equal_numbers_has_no_width() -> None:
    assert Bootstrap().of(Values((2.5,) * 8, "mean")) == Scored(2.5, 2.5, 2.5)
    assert Bootstrap().of(Values((0.0,) * 8, "mean")) == Scored(0.0, 0.0, 0.0)


def test_a_change_is_of_the_same_prompts() -> None:
    """Prompts differ much from each other, and the two models little: the change is known far better than either."""
    before = np.random.default_rng(6).normal(100, 30, 80)
    after = before + np.random.default_rng(7).normal(2, 1, 80)
    one, other = (Values(tuple(each), "mean") for each in (before, after))
    change = Bootstrap().change(one, other)
    assert change.high - change.low < 0.5 and change.score == pytest.approx((after - before).mean())
    assert Bootstrap().of(other).high - Bootstrap().of(other).low > 10


def test_it_can_be_repeated() -> None:
    values = Values(tuple(np.random.default_rng(8).normal(size=30)), "mean")
    assert Bootstrap(300, 1).of(values) == Bootstrap(300, 1).of(values) != Bootstrap(300, 2).of(values)


def test_many_prompts_are_drawn_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = Values(tuple(np.random.default_rng(9).normal(size=70)), "mean")
    at_once = Bootstrap(100).of(values)
    monkeypatch.setattr("heretic_ds.verifying.intervals._AT_ONCE", 700)
    assert Bootstrap(100).of(values) == at_once


def test_scores_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        Bootstrap().change(counted(1, 3), counted(1, 4))
    with pytest.raises(ValueError, match="no prompts"):
        Bootstrap().of(Values((), "sum"))


# What is measured -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "share"),
    [([], 0), ([1, 2, 3], 0), ([1, 2, 3, 4, 5], 0), ([1, 2, 3, 4] * 2, 1 / 5), ([7] * 13, 9 / 10)],
)
def test_repetition(answer: list[int], share: float) -> None:
    assert repetition(answer) == pytest.approx(share)


class Engine:
    """Gives random logits [K, 6] of its own; those of the last prompt twice, as where replicas have equal shares."""

    def __init__(self, seed: int, lengths: list[int]) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = [torch.randn(length, 6, generator=generator) for length in lengths]
        self.continuations: Any = None

    def distributions(self, prompts: Any, edits: Any, read: Any, continuations: Any = None) -> Any:
        assert edits == [None]
        self.continuations = continuations
        assert [1 + len(each) for each in continuations] == [len(each) for each in self.logits]
        places = [*range(len(prompts)), len(prompts) - 1]
        return [read(places, [self.logits[place] for place in places])[: len(prompts)]]


def test_likelihoods_of_the_originals_own_answers() -> None:
    answers = [[3, 1, 5], [2], []]
    original, other = (Engine(seed, [3, 1, 1]) for seed in (1, 2))
    likelihoods = Likelihoods(answers)
    own = likelihoods.of_original(original, [[9]] * 3, World())  # type: ignore[arg-type]
    assert original.continuations == [[3, 1], [], []]
    first, mean, unlikelihood = likelihoods.of_other(other, [[9]] * 3, World())  # type: ignore[arg-type]

    for place, answer in enumerate(answers):
        p, q = (torch.log_softmax(engine.logits[place].double(), -1) for engine in (original, other))
        kl = (p.exp() * (p - q)).sum(-1)
        assert first[place] == pytest.approx(kl[0].item(), rel=1e-5)
        assert mean[place] == pytest.approx(kl.mean().item(), rel=1e-5)
        for found, logp in ((own, p), (unlikelihood, q)):
            expected = -sum(logp[at, token].item() for at, token in enumerate(answer)) / max(len(answer), 1)
            assert found[place] == pytest.approx(expected, rel=1e-5) if answer else math.isnan(found[place])


def test_perplexity_of_a_broken_model_is_of_the_same_prompts() -> None:
    """No answer: no perplexity. No number, or one too large: without bounds, which JSON has as null."""
    answers = [[3, 1], [], [2]]
    before = _perplexity([0.5, math.nan, 0.1], answers)["perplexity"]
    for bad in (800.0, math.nan):
        after = _perplexity([0.5, math.nan, bad], answers)["perplexity"]
        assert isinstance(before, Values) and isinstance(after, Values)
        assert after.each == (math.exp(0.5), math.inf)
        both = {"target": {}, "baseline": {"perplexity": before}}, {"target": {}, "baseline": {"perplexity": after}}
        found = side_by_side(*both, Bootstrap(100))["baseline"]["perplexity"]
        assert found["edited"]["score"] is None and found["change"]["score"] is None and found["prompts"] == 2
        json.dumps(found, allow_nan=False)


def test_ranks_find_a_part_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that sees no logits tells nothing, and of two that saw one prompt the first counts."""
    parts = [{1: (0.1, 0.2, 0.3)}, {}, {0: (1.0, 2.0, 3.0), 1: (9.0, 9.0, 9.0)}]
    world = SimpleNamespace(gather=lambda told: parts)
    engine = SimpleNamespace(distributions=lambda *given: None)
    found = Likelihoods([[1], [1]]).of_other(engine, [[0], [0]], world)  # type: ignore[arg-type]
    assert found == ([1.0, 0.1], [2.0, 0.2], [3.0, 0.3])


@pytest.mark.parametrize("at_fault", ["original", "export"])
def test_a_run_ends_well_where_such_answers_cannot_be_had_of_the_original(
    at_fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """What an export does wrong is an error all the same."""

    def refuse(*given: Any) -> Any:
        raise UserError(f"the {at_fault} is at fault")

    answers = SimpleNamespace(generation=SimpleNamespace(max_new_tokens=5))
    job = SimpleNamespace(scorers=[], text_of=None, settings=answers)
    laid_out = nullcontext(SimpleNamespace(batch_sizes={}))
    monkeypatch.setattr(rescoring, "_asked", lambda run: {})
    monkeypatch.setattr(rescoring, "_with_longer_answers", lambda job: job)
    monkeypatch.setattr(rescoring, "_unpacked_where_it_fits", lambda job: job)
    monkeypatch.setattr(rescoring, "_prompts", lambda job: {})
    monkeypatch.setattr(rescoring, "measure_original", lambda *given: SimpleNamespace(scores={}))
    monkeypatch.setattr(rescoring, "_laid_out", refuse if at_fault == "original" else lambda *given: laid_out)
    monkeypatch.setattr(rescoring, "_measured", refuse)
    (tmp_path / MANIFEST_NAME).write_text("{}")
    run: Any = SimpleNamespace(
        job=job, results={}, settings=Settings(), world=World(), timed=lambda name: nullcontext(), close=lambda: None
    )
    exported: Any = SimpleNamespace(folder=tmp_path)
    if at_fault == "export":
        with pytest.raises(UserError, match="the export is at fault"):
            rescoring.final_scores(run, exported)
        return
    rescoring.final_scores(run, exported)
    assert run.results["final"] is None
    said = "no final scores: the original is at fault; lower verify.answer_tokens, or set verify.final=false"
    assert said in caplog.text


# Prompts that are held out ----------------------------------------------------------------------------------


def source_of(folder: Path, name: str, rows: range | list[int], cut: str | None = None) -> PromptSource:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": f"{name} {row}"}) + "\n" for row in rows))
    return PromptSource(source=str(file), slice=cut)


def prompts_of(target: PromptPair, folder: Path) -> PromptSettings:
    plain = source_of(folder, "plain", range(4))
    return PromptSettings(target=target, baseline=PromptPair(plain, plain, HeldOutSource("none")))


def test_rows_behind_the_others_are_held_out(tmp_path: Path) -> None:
    train, evaluated = source_of(tmp_path, "a", range(9), "0:4"), source_of(tmp_path, "b", range(8), "2:5")
    found = read_all(prompts_of(PromptPair(train, evaluated), tmp_path), 100)
    assert found["target.test"].texts == ["b 5", "b 6", "b 7", *(f"a {row}" for row in range(4, 9))]
    assert found["target.test"].rows == 8 and "baseline.test" not in found
    few = read_all(prompts_of(PromptPair(train, evaluated), tmp_path), 2)["target.test"]
    assert (few.texts, few.rows) == (["b 5", "b 6"], 8)


def test_rows_that_are_behind_one_part_and_in_the_other_are_not(tmp_path: Path) -> None:
    whole = source_of(tmp_path, "a", [*range(9), 1, 7])
    train, evaluated = (PromptSource(whole.source, slice=cut) for cut in ("0:3", "3:6"))
    found = read_all(prompts_of(PromptPair(train, evaluated), tmp_path), 100)
    assert found["target.test"].texts == ["a 6", "a 7", "a 8"]


def test_other_white_space_and_case_make_no_other_prompt() -> None:
    found = held_out_rows(Prompts(["a b"], 3, ["C"]), Prompts(["d"], 3, ["A  b", "c", "D ", "e"]), 100)
    assert found is not None and found.texts == ["c", "e"]


def test_prompts_that_were_seen_are_not_held_out() -> None:
    asked = SimpleNamespace(answer_tokens=1, kl_tokens=1)
    for seen, part, held in ((0, "test", True), (1, "test", False), (0, "eval", False)):
        parts = {"target": {"part": "test", "seen": 0}, "baseline": {"part": part, "seen": seen}}
        assert final_results({}, parts, asked, Bootstrap(), {})["held_out"] is held  # type: ignore[arg-type]


def test_files_that_are_used_whole_leave_none(tmp_path: Path) -> None:
    train, evaluated = source_of(tmp_path, "a", range(5)), source_of(tmp_path, "b", range(5))
    assert "target.test" not in read_all(prompts_of(PromptPair(train, evaluated), tmp_path), 100)
    given = HeldOutSource(source_of(tmp_path, "c", range(3)).source)
    found = read_all(prompts_of(PromptPair(train, evaluated, given), tmp_path), 100)
    assert found["target.test"].texts == ["c 0", "c 1", "c 2"]
    given.source = "nowhere.txt"
    with pytest.raises(UserError, match=r"prompts\.target\.test\.source"):
        read_all(prompts_of(PromptPair(train, evaluated, given), tmp_path), 100)


def test_overlaps_of_any_two_lists(caplog: pytest.LogCaptureFixture) -> None:
    texts = {
        "target.train": ["a", "b"], "target.eval": ["c", " B "], "target.test": ["c", "d", "a"],
        "baseline.train": ["x"], "baseline.eval": ["y", "a"],
    }  # fmt: skip
    assert overlaps(texts) == {
        "target.train, target.eval": 1, "target.train, target.test": 1, "target.eval, target.test": 1,
        "target.train, baseline.eval": 1, "target.test, baseline.eval": 1,
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        tell_of_overlaps(texts)
    assert "prompts.target: 1 of 2 eval prompts are train prompts too, on which edits do better" in caplog.messages
    assert "prompts.target: 1 of 3 test prompts are eval prompts too, so they were not held back" in caplog.messages
    assert "prompts.baseline.eval: 1 of 2 prompts are in prompts.target.train too" in caplog.messages


# What people read -------------------------------------------------------------------------------------------


def some_final() -> dict[str, Any]:
    original: Any = {
        "target": {"refusals": counted(80, 80), "tokens": Values((9.0, 11.0), "mean"), "mine": 3.5},
        "baseline": {"refusals": counted(1, 100), "perplexity": Values((1.1, 1.2), "geometric_mean")},
    }
    edited: Any = {
        "target": {"refusals": counted(3, 80), "tokens": Values((12.0, 20.0), "mean"), "mine": 4.5},
        "baseline": {
            "refusals": counted(0, 100), "perplexity": Values((1.2, 1.4), "geometric_mean"),
            "kl_first_token": Values((0.01, 0.02), "mean"), "kl": Values((0.1, 0.3), "mean"),
        },
    }  # fmt: skip
    return {
        "form": "model",
        "held_out": False,
        "prompts": {
            "target": {"part": "test", "prompts": 80, "seen": 0},
            "baseline": {"part": "eval", "prompts": 100, "seen": 100},
        },
        "answer_tokens": 256,
        "kl_tokens": 32,
        "confidence": 0.95,
        "resamples": 2000,
        "scores": side_by_side(original, edited, Bootstrap(200)),
    }


def test_both_models_beside_each_other() -> None:
    final = some_final()
    scores = final["scores"]
    json.dumps(final, allow_nan=False)
    assert scores["target"]["refusals"]["change"]["score"] == -77
    assert scores["target"]["refusals"]["edited"]["low"] <= 3 <= scores["target"]["refusals"]["edited"]["high"]
    assert scores["target"]["mine"] == {
        "prompts": None, "combine": None, "change": None,
        "original": {"score": 3.5, "low": None, "high": None}, "edited": {"score": 4.5, "low": None, "high": None},
    }  # fmt: skip
    assert scores["baseline"]["kl"]["original"] is None and scores["baseline"]["kl"]["change"] is None
    rows = list(final_rows(final))
    assert [row.name for row in rows] == [
        "refusals", "mine", "tokens", "refusals", "kl_first_token", "kl", "perplexity",
    ]  # fmt: skip
    assert rows[5].label == "KL divergence, 32 tokens" and rows[1].prompts == 80


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(final_table(some_final(), width))
    told = console.export_text()
    lines = told.splitlines()
    assert all(len(line) <= width for line in lines) and "…" not in told
    assert "80 target prompts (test)" in told and "100 baseline prompts (eval)" in told
    [line] = [line for line in lines if line.startswith("KL, 32 tokens")]
    assert re.split(r" to |\.\.| +", line) == ["KL,", "32", "tokens", "-", "0.2", "0.1", "0.3"]


def test_numbers() -> None:
    assert [number_text(value) for value in (None, 0.00123456, 12.345, 1234.5)] == ["-", "0.00123", "12.3", "1234"]
    assert number_text(1234.0, counts=True) == "1234" and number_text(2.375, counts=True) == "2.4"
    assert range_text({"score": 1, "low": None, "high": None}) == ""
