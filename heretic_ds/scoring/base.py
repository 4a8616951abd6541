"""What a scorer is: a number for a list of answers, or for next-token distributions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Protocol, Self, runtime_checkable

from torch import Tensor

from heretic_ds.ablation import Edit
from heretic_ds.errors import UserError
from heretic_ds.scoring.values import combined
from heretic_ds.settings import ScoringSettings, within
from heretic_ds.settings.scoring import DIRECTIONS, MINIMIZE

TokenRows = Sequence[Sequence[int]]
"""Prompts as token ids, one row each, unpadded, ending where the answer starts."""

Decided = Callable[[Sequence[Sequence[int]]], Sequence[bool]]
"""For each of several answers, given by their first tokens: whether its scores can no longer change."""

ReadLogits = Callable[[Sequence[int], Sequence[Tensor]], Sequence[float]]
"""A number for each row of a batch, from the places of their prompts in the list and their next-token logits [K, V]:
after the prompt, and after each token of its continuation where there is one."""


class GivesDistributions(Protocol):
    """A model that can be asked for next-token logits: an engine."""

    def distributions(
        self,
        prompts: TokenRows,
        edits: Sequence[Edit | None],
        read: ReadLogits,
        continuations: TokenRows | None = None,
    ) -> list[list[float]]:
        """What ``read`` makes of the next-token logits of each prompt under each edit: ``[edit][prompt]``.

        After the prompt alone, or with ``continuations``, one for each prompt, also after each of its tokens.
        """
        ...


MeasureDivergence = Callable[[Sequence[Edit | None]], list[list[float]]]
"""KL(original || edited) in nats of each prompt under each edit: ``[edit][prompt]``."""


@runtime_checkable
class MeasuresDivergence(GivesDistributions, Protocol):
    """An engine whose logits lie in another process, where they are compared: nothing [V] has to leave it."""

    def divergence_from_now(self, prompts: TokenRows, continuations: TokenRows | None = None) -> MeasureDivergence:
        """Remember the next-token distributions that the model as it is gives, for edited ones to be compared with.

        Of continuations a prompt's divergence is the mean over its positions.
        """
        ...


class _Named:
    """What all scorers have. Their class says what they need: answers, or next-token distributions."""

    @dataclass
    class Options:
        """What can be set of every scorer. A class with settings of its own derives its ``Options`` from these."""

        name: Optional[str] = None  # noqa: UP045 (for the structured config)
        """What its scores are called; null: the scorer's own name."""
        direction: Optional[str] = within(None, choices=DIRECTIONS)  # noqa: UP045
        """``minimize`` or ``maximize``: which way is better, and what the search does with the first scorer's number.
        ``none``: it is only reported. null: the scorer's own, ``minimize`` for all that come with this package."""
        prompts: Any = None
        """``target.eval``, ``baseline.eval``, a file or data set, or ``{source: ..., split: ..., ...}`` as below
        ``prompts.target.eval``; null: target prompts for scorers of answers, baseline prompts for those of
        distributions."""

    name: str = ""
    """Unique and not empty."""
    direction: str = MINIMIZE
    """Which way is better: what the search does with the first scorer's number. ``none``: it is only reported."""
    combine: str | None = None
    """How the score comes of the numbers that ``each`` gives, one for every prompt: one of
    :data:`heretic_ds.scoring.values.COMBINE`. None: not known, of a class that gives the score alone."""
    options: Any = Options()
    """An instance of its ``Options``: as given in the settings, or the defaults."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "Options" in vars(cls):
            cls.options = cls.Options()

    @classmethod
    def from_settings(cls, settings: ScoringSettings) -> Self:
        """Builds the scorer. Override to take what it needs from the settings."""
        return cls()

    @classmethod
    def from_options(cls, settings: ScoringSettings, options: Any) -> Self:
        """Builds the scorer with its ``Options``. Override where it has to know them to be built; a class that reads
        :attr:`options` when it scores need not."""
        return cls.from_settings(settings)

    def check(self) -> None:
        """Refuse what cannot work, before any weight of the model is read: on rank 0 alone. Raises UserError."""

    def inputs(self) -> dict[str, Any]:
        """What scores depend on beside the settings, such as the content of files, as JSON values: on rank 0 alone. A
        run folder made with other inputs is refused."""
        return {}


class Scorer(_Named, ABC):
    """Gives answers a number, which the search minimises, or maximises, for the first of ``scoring.scorers``.

    A scorer of your own is a class that Python can import, named in the configuration
    (``scoring.scorers=[refusals,my_package.my_module.Questions]``)::

        class Questions(Scorer):
            name = "questions"
            combine = "sum"

            def each(self, prompts, answers):
                return [float(answer.rstrip().endswith("?")) for answer in answers]

    A class gives ``each`` with ``combine``, or :meth:`score` alone; intervals around a score are drawn from what
    ``each`` gives. It is built without arguments unless it overrides :meth:`from_settings`. Settings of its own are
    fields of a dataclass ``Options`` within it, derived from ``Scorer.Options``: it has them as :attr:`options`, and
    they are given as ``{_target_: my_package.my_module.Questions, threshold: 3}``. Scores are shown in the tables and
    kept in ``results.json`` under the scorer's name. Answers are scored on rank 0 alone, which tells the others;
    ``decided`` is asked wherever answers are made.
    """

    decided: Callable[[str], bool] | None = None
    """May be a method ``decided(partial_answer) -> bool``: whether this answer's part in the score is
    settled, however the answer goes on. Rows on which all scorers have decided stop early, and are scored by
    the text that they have. The whole answer begins with the partial one, except for U+FFFD at its end: the
    first bytes of a character."""
    flags: bool = False
    """Whether ``each`` gives 1 for an answer that shows something and 0 for another: two such scorers of the same
    answers are told how far they agree."""

    def ready(self) -> None:
        """Take what it takes to score answers, such as weights of a model: on rank 0 alone, before the first pass."""

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> float:
        """A finite number for the answers, one to each prompt; a count or a mean, say."""
        return combined(self.each(prompts, answers), self.combine)

    def each(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        """A number for each answer, of which ``combine`` makes the score. Of a class that gives the score alone: the
        score of each answer by itself."""
        pairs = zip(prompts, answers, strict=True)
        return [float(self.score([prompt], [answer])) for prompt, answer in pairs]


class DistributionScorer(_Named, ABC):
    """Gives edits a number from next-token distributions, without an answer: a divergence, a likelihood.

    A class gives :meth:`each` with ``combine``, or :meth:`of` alone.
    """

    answer_tokens: int = 0
    """Of the original's own answers to its prompts: how many of their first tokens it wants as continuations, an answer
    that ends before as many as it has."""
    reads_text: int = 0
    """Where above 0: its prompts are texts, not asked but read as they are. Of each it wants the first token as the
    prompt, and at most so many of those that follow as the continuation."""

    @abstractmethod
    def begin(self, engine: GivesDistributions, prompts: TokenRows, continuations: TokenRows | None = None) -> Self:
        """Take the model as it is for the original; returns the scorer."""

    def kept_bytes(self, prompts: int, vocabulary: int) -> int:
        """Memory of the host, over all ranks, that it keeps of the original for so many prompts."""
        return 0

    def each(self, edits: Sequence[Edit | None]) -> list[list[float]]:
        """A number for each prompt under each edit, ``[edit][prompt]``, of which ``combine`` makes the scores; None
        stands for the weights as they are."""
        raise NotImplementedError(f"{type(self).__name__} gives no numbers by prompt")

    def of(self, edits: Sequence[Edit | None]) -> list[float]:
        """A number for each edit; None stands for the weights as they are."""
        return [combined(values, self.combine) for values in self.each(edits)]

    def each_other(self, engine: GivesDistributions, prompts: TokenRows) -> list[float]:
        """A number for each prompt of another model, in an engine that lies as the original's did; ``prompts`` are the
        same ones as put to it. Raises UserError where that cannot be."""
        raise UserError(f"scoring.scorers: {self.name} cannot compare two models; leave it out")
