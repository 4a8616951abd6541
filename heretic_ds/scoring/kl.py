"""Divergence of next-token distributions as a scorer. Shapes: K positions of a prompt, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from heretic_ds.ablation import Edit
from heretic_ds.ablation.divergence import first_token_kl, log_probabilities
from heretic_ds.errors import UserError
from heretic_ds.scoring.base import (
    DistributionScorer,
    GivesDistributions,
    MeasureDivergence,
    MeasuresDivergence,
    TokenRows,
)
from heretic_ds.settings import within

__all__ = ["Divergence", "TokenDivergence", "first_token_kl", "log_probabilities"]


class Divergence(DistributionScorer):
    """KL(original || edited) of the next-token distributions of a list of prompts, in nats.

    First-token distributions, or with continuations those after the prompt and after each of its continuation's tokens,
    of which a prompt's divergence is the mean. The reference is the model as it is when this begins; it lies on the
    host, float32, for the prompts that are this process's work, or wherever an engine that measures it keeps it.
    """

    name = "kl"
    combine = "mean"

    def __init__(self) -> None:
        self.reference_KV: dict[int, Tensor] = {}
        """Log-probabilities by place of the prompt."""

    def begin(self, engine: GivesDistributions, prompts: TokenRows, continuations: TokenRows | None = None) -> Self:
        self._engine, self._prompts, self._continuations = engine, prompts, continuations
        self._measure: MeasureDivergence
        if isinstance(engine, MeasuresDivergence):
            self._measure = engine.divergence_from_now(prompts, continuations)
        else:
            engine.distributions(prompts, [None], self._remember, continuations)
            self._measure = self._compare
        return self

    def kept_bytes(self, prompts: int, vocabulary: int) -> int:
        """A float32 for every entry of the vocabulary at every position."""
        return 4 * prompts * (1 + self.answer_tokens) * vocabulary

    def each(self, edits: Sequence[Edit | None]) -> list[list[float]]:
        """The divergence of each prompt under each edit: ``[edit][prompt]``."""
        return self._measure(edits)

    def each_other(self, engine: GivesDistributions, prompts: TokenRows) -> list[float]:
        """The divergence of each prompt for another model, in an engine that lies as the original's did. Raises
        UserError where the distributions are kept elsewhere."""
        if isinstance(engine, MeasuresDivergence):
            raise UserError("evaluate=vllm cannot compare two models; set evaluate=replicated or another placement")
        return engine.distributions(prompts, [None], self._divergences, self._continuations)[0]

    def _compare(self, edits: Sequence[Edit | None]) -> list[list[float]]:
        return self._engine.distributions(self._prompts, edits, self._divergences, self._continuations)

    def _remember(self, prompts: Sequence[int], logits_KV: Sequence[Tensor]) -> list[float]:
        for prompt, each_KV in zip(prompts, logits_KV, strict=True):
            self.reference_KV[prompt] = log_probabilities(each_KV).cpu()
        return [0.0] * len(prompts)

    def _divergences(self, prompts: Sequence[int], logits_KV: Sequence[Tensor]) -> list[float]:
        counts, logits_NV = [len(each) for each in logits_KV], torch.cat(list(logits_KV))
        reference_NV = torch.cat([self.reference_KV[prompt] for prompt in prompts]).to(logits_NV.device)
        parts = first_token_kl(reference_NV, logits_NV).split(counts)
        found: list[float] = torch.stack([part.mean() for part in parts]).tolist()
        return found


class TokenDivergence(Divergence):
    """KL(original || edited) over the first tokens of the original's own answers, teacher-forced, in nats.

    Of a prompt whose answer begins with x_1 ... x_n it is the mean, over i from 1 to n, of the divergence of the
    distributions of x_i, which follow the prompt and x_1 ... x_(i-1); of an answer that ends before, also of the
    distribution of its end. The score is the mean over prompts.
    """

    name = "kl_tokens"

    @dataclass
    class Options(Divergence.Options):
        """How far into answers."""

        tokens: int = within(32, ge=1)
        """Tokens of an answer whose distributions are compared, n; 1: the first-token divergence. No answer has more
        than ``generation.max_new_tokens``."""

    @property
    def answer_tokens(self) -> int:  # type: ignore[override]
        return int(self.options.tokens) - 1  # the last one is only predicted
