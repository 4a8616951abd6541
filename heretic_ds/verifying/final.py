"""The final scores: what both models were found to do, as ``results.json``, the card and the tables tell it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heretic_ds.placements import Evaluating
from heretic_ds.prompts import KINDS, PromptSet, TokenRows
from heretic_ds.scoring.base import DistributionScorer, Scorer
from heretic_ds.scoring.values import Values, values_of
from heretic_ds.verifying.intervals import CONFIDENCE, Bootstrap, Scored
from heretic_ds.verifying.measures import Answers, Likelihoods, repetition
from heretic_ds.world import World

Measured = dict[str, dict[str, Values | float]]
"""What one model was found to do, by kind of prompts and name of the score; a bare number where a scorer does not tell
what it is made of."""

TOKENS, REPETITION = "tokens", "token_repetition"
KL_FIRST, KL, PERPLEXITY = "kl_first_token", "kl", "perplexity"
"""Names of the scores that there are beside those of the user's scorers."""


@dataclass(frozen=True)
class Question:
    """What both models are asked, and how their answers are scored."""

    scorers: Sequence[Scorer | DistributionScorer]
    """Those that take answers are used; the others have compared edits with the original in memory."""
    text_of: Callable[[TokenRows], list[str]]
    answer_tokens: int
    """Of the longest answer."""
    kl_tokens: int
    """First tokens of the original's answers to baseline prompts, which divergence and perplexity are of."""


@dataclass(frozen=True)
class Original:
    """The original's part, which stays when its weights have gone."""

    scores: Measured
    likelihoods: Likelihoods


def measure_original(engine: Evaluating, prompts: Mapping[str, PromptSet], asked: Question, world: World) -> Original:
    """Everything about the original, whose engine this is; ``prompts`` are by kind. Every rank takes part."""
    answers = {kind: Answers.of(engine, prompts[kind], asked.text_of, asked.answer_tokens) for kind in KINDS}
    likelihoods = Likelihoods([answer[: asked.kl_tokens] for answer in answers["baseline"].rows])
    unlikelihood = likelihoods.of_original(engine, prompts["baseline"].rows, world)
    scores = world.decide(lambda: _of_answers(prompts, answers, asked), "scoring the answers")
    scores["baseline"] |= _perplexity(unlikelihood, likelihoods.answers)
    return Original(scores, likelihoods)


def measure_other(
    engine: Evaluating, prompts: Mapping[str, PromptSet], asked: Question, original: Original, world: World
) -> Measured:
    """Everything about another model, whose engine this is and whose own tokenizer has put the same prompts."""
    answers = {kind: Answers.of(engine, prompts[kind], asked.text_of, asked.answer_tokens) for kind in KINDS}
    first, mean, unlikelihood = original.likelihoods.of_other(engine, prompts["baseline"].rows, world)
    scores = world.decide(lambda: _of_answers(prompts, answers, asked), "scoring the answers")
    likely = {KL_FIRST: Values(tuple(first), "mean"), KL: Values(tuple(mean), "mean")}
    scores["baseline"] |= {**likely, **_perplexity(unlikelihood, original.likelihoods.answers)}
    return scores


def _of_answers(prompts: Mapping[str, PromptSet], answers: Mapping[str, Answers], asked: Question) -> Measured:
    """What scorers say of answers: on rank 0 alone, where a judge lies."""
    found: Measured = {}
    for kind in KINDS:
        texts, given = list(prompts[kind].texts), answers[kind]
        scores: dict[str, Values | float] = {
            scorer.name: values_of(scorer, texts, given.texts) or float(scorer.score(texts, given.texts))
            for scorer in asked.scorers
            if isinstance(scorer, Scorer)
        }
        own: dict[str, Values | float] = {
            TOKENS: Values(tuple(float(len(row)) for row in given.rows), "mean"),
            REPETITION: Values(tuple(map(repetition, given.rows)), "mean"),
        }
        found[kind] = scores | own
    return found


def _perplexity(unlikelihood: Sequence[float], answers: TokenRows) -> dict[str, Values | float]:
    """exp of the mean negative log-likelihood; prompts that the original gave no answer to have none.

    Infinite where a model gives no number for an answer, or one too large: both models' have the same prompts.
    """
    each = tuple(_exp(value) for value, answer in zip(unlikelihood, answers, strict=True) if answer)
    return {PERPLEXITY: Values(each, "geometric_mean")} if each else {}


def _exp(nats: float) -> float:
    try:
        return math.inf if math.isnan(nats) else math.exp(nats)
    except OverflowError:
        return math.inf


def side_by_side(original: Measured, edited: Measured, bootstrap: Bootstrap) -> dict[str, dict[str, Any]]:
    """Scores with their intervals, of the original, the edited model and the change, by kind of prompts and name."""
    return {
        kind: {name: _compared(original[kind].get(name), edited[kind][name], bootstrap) for name in edited[kind]}
        for kind in KINDS
    }


def _compared(before: Values | float | None, after: Values | float, bootstrap: Bootstrap) -> dict[str, Any]:
    """``before`` None: a comparison itself, which the original has no number of."""
    change = None
    if isinstance(before, Values) and isinstance(after, Values):
        change = bootstrap.change(before, after).to_dict()
    return {
        "prompts": len(after.each) if isinstance(after, Values) else None,
        "combine": after.combine if isinstance(after, Values) else None,
        "original": None if before is None else _scored(before, bootstrap),
        "edited": _scored(after, bootstrap),
        "change": change,
    }


def _scored(values: Values | float, bootstrap: Bootstrap) -> dict[str, float | None]:
    if isinstance(values, Values):
        return bootstrap.of(values).to_dict()
    return Scored(values, math.nan, math.nan).to_dict()


def final_results(
    scores: Mapping[str, Any], parts: Mapping[str, Any], asked: Question, bootstrap: Bootstrap, more: Mapping[str, Any]
) -> dict[str, Any]:
    """The entry ``final`` of ``results.json``; ``parts`` tells of each kind which prompts they were, ``more`` what was
    scored and under which settings."""
    return {
        **more,
        "held_out": all(part["part"] == "test" and not part["seen"] for part in parts.values()),
        "prompts": dict(parts),
        "answer_tokens": asked.answer_tokens,
        "kl_tokens": asked.kl_tokens,
        "confidence": CONFIDENCE,
        "resamples": bootstrap.resamples,
        "scores": dict(scores),
    }
