"""Scorers and their registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heretic_ds.errors import UserError
from heretic_ds.foreign.text import in_one_line
from heretic_ds.scoring.base import DistributionScorer, Scorer
from heretic_ds.scoring.classifier import Classifier
from heretic_ds.scoring.kl import Divergence, TokenDivergence
from heretic_ds.scoring.length import LengthScorer
from heretic_ds.scoring.perplexity import Perplexity
from heretic_ds.scoring.refusals import RefusalScorer
from heretic_ds.scoring.repetition import Repetition
from heretic_ds.settings import ScoringSettings
from heretic_ds.settings.checks import find_class
from heretic_ds.settings.nodes import TARGET, options_of
from heretic_ds.settings.scoring import MAXIMIZE, NONE

__all__ = [
    "SCORERS",
    "AnyScorer",
    "Classifier",
    "DistributionScorer",
    "LengthScorer",
    "Perplexity",
    "RefusalScorer",
    "Repetition",
    "Scorer",
    "TokenDivergence",
    "make_scorers",
    "may_be_screened",
    "refuse_unscreened",
]

AnyScorer = Scorer | DistributionScorer

SCORERS: dict[str, type[AnyScorer]] = {
    scorer.name: scorer for scorer in (RefusalScorer, Classifier, LengthScorer, Repetition, TokenDivergence, Perplexity)
}
"""Scorers that ``scoring.scorers`` can name without their module."""

_RESERVED = (Divergence.name, "kl_first_token", "tokens", "token_repetition")
"""What is measured beside scorers: the search's divergence, and the final scores that answers or tokens have. The final
perplexity is one of these too, but scorers of distributions, which may have this name, are not among final scores."""

_SETTING = "scoring.scorers"
_WITHOUT_LIST = "write a list of names, or of {_target_: name, ...} with settings of their own"


def make_scorers(settings: ScoringSettings) -> list[AnyScorer]:
    """The scorers that ``scoring.scorers`` names, in its order. Raises UserError for what is no scorer."""
    scorers = [_made(given, settings) for given in settings.scorers]
    names = [scorer.name for scorer in scorers]
    for name, given in zip(names, settings.scorers, strict=True):
        if not name:
            raise UserError(f"{_SETTING}: {_target(given)} has no name; give the class a `name`")
        if names.count(name) > 1:
            raise UserError(
                f"{_SETTING} has more than one scorer called {name!r}; name each only once, or call one something else "
                f"by {{{TARGET}: {_target(given)}, name: ...}}"
            )
    for scorer, given in zip(scorers, settings.scorers, strict=True):
        if scorer.name in _RESERVED or (scorer.name == Perplexity.name and isinstance(scorer, Scorer)):
            raise UserError(
                f"{_SETTING}: {scorer.name!r} is the name of a measure that there always is; call the scorer something "
                f"else by {{{TARGET}: {_target(given)}, name: ...}}"
            )
    first = scorers[0] if scorers else None
    if isinstance(first, Scorer) and first.options.prompts not in (None, "target.eval"):
        raise UserError(
            f"{_SETTING} begins with {names[0]!r} on prompts of its own, but the first one is what the search goes by, "
            "on target prompts; set prompts.target.eval, or put another one first"
        )
    if first is not None and first.direction == NONE:
        raise UserError(
            f"{_SETTING} begins with {names[0]!r}, which is only reported (direction: {NONE}), but the first one is "
            "what the search goes by; put another one first"
        )
    return scorers


def may_be_screened(first: AnyScorer) -> bool:
    """Whether edits can be compared by what the original answered: where answers are to become fewer of a kind."""
    return isinstance(first, Scorer) and first.direction != MAXIMIZE


def refuse_unscreened(first: AnyScorer) -> None:
    """Raise UserError where edits cannot be compared by what the original answered: ``search.strategy=screened``."""
    if not may_be_screened(first):
        kind = "is maximised" if isinstance(first, Scorer) else "is of distributions"
        raise UserError(
            f"search.strategy=screened needs a first scorer of answers that is minimised, and {first.name} {kind}; set "
            "search.strategy=direct"
        )


def _made(given: Any, settings: ScoringSettings) -> AnyScorer:
    """The scorer of one entry."""
    kind, own = _kind(_target(given)), given if isinstance(given, Mapping) else {}
    options = options_of(kind.Options, own, f"{_SETTING}.{kind.name}")
    scorer = kind.from_options(settings, options)
    scorer.options = options
    scorer.name, scorer.direction = options.name or kind.name, options.direction or kind.direction
    return scorer


def _target(given: Any) -> str:
    """The name or dotted path in an entry."""
    name = given.get(TARGET) if isinstance(given, Mapping) else given
    if not isinstance(name, str):
        told = in_one_line(str(given), 80)
        raise UserError(f"{_SETTING} holds {told}, which names no scorer; {_WITHOUT_LIST}")
    return name


def _kind(name: str) -> type[AnyScorer]:
    if name in SCORERS:
        return SCORERS[name]
    if not name.rpartition(".")[0]:
        raise UserError(
            f"{_SETTING} has an unknown scorer {name!r}; choose from {', '.join(SCORERS)}, or give the "
            "dotted path of a class, as in my_package.my_module.MyScorer"
        )
    kind: type[AnyScorer] = find_class(name, _SETTING, Scorer, DistributionScorer)
    whole, parts = ((Scorer, ("score", "each")), (DistributionScorer, ("of", "each")))[not issubclass(kind, Scorer)]
    if all(getattr(kind, part) is getattr(whole, part) for part in parts):
        raise UserError(f"{_SETTING}: {name} gives no number; give the class a method `{parts[0]}` or `each`")
    return kind
