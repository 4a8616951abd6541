"""How unlikely a model finds given text. Shapes: K positions of a prompt, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from heretic_ds.ablation import Edit
from heretic_ds.ablation.divergence import log_probabilities
from heretic_ds.scoring.base import DistributionScorer, GivesDistributions, TokenRows
from heretic_ds.settings import within

ANSWERS, TEXT = "answers", "text"


class Perplexity(DistributionScorer):
    """Perplexity of the edited model, teacher-forced on text that it did not write.

    Of a prompt with continuation tokens x_1 ... x_n it is exp(-(1/n) sum over i of ln q(x_i | prompt, x_1 ... x_i-1)),
    where q is the edited model; of a continuation without tokens it is 1. The score is the geometric mean over prompts,
    each of which counts as much as any other, however long.
    """

    name = "perplexity"
    combine = "geometric_mean"

    @dataclass
    class Options(DistributionScorer.Options):
        """On which text."""

        of: str = within(ANSWERS, choices=(ANSWERS, TEXT))
        """``answers``: what the original answers to the prompts. ``text``: the prompts themselves, as plain text
        without a chat template, given their first token."""
        tokens: int = within(32, ge=1)
        """Most tokens of each."""

    @property
    def answer_tokens(self) -> int:  # type: ignore[override]
        return self.options.tokens if self.options.of == ANSWERS else 0

    @property
    def reads_text(self) -> int:  # type: ignore[override]
        return self.options.tokens if self.options.of == TEXT else 0

    def begin(self, engine: GivesDistributions, prompts: TokenRows, continuations: TokenRows | None = None) -> Self:
        self._engine, self._prompts, self._continuations = engine, prompts, continuations or [()] * len(prompts)
        # The last token is only predicted; so these are the rows that a divergence over as many tokens passes over.
        self._passed = [list(tokens)[: self.options.tokens - 1] for tokens in self._continuations]
        return self

    def each(self, edits: Sequence[Edit | None]) -> list[list[float]]:
        """The perplexity of each prompt's continuation under each edit."""
        return _perplexities(self._engine.distributions(self._prompts, edits, self.read, self._passed))

    def each_other(self, engine: GivesDistributions, prompts: TokenRows) -> list[float]:
        """The perplexity of each prompt's continuation for another model."""
        return _perplexities(engine.distributions(prompts, [None], self.read, self._passed))[0]

    def read(self, prompts: Sequence[int], logits_KV: Sequence[Tensor]) -> list[float]:
        """Mean of -ln q over the tokens of each prompt's continuation, in nats."""
        found = []
        for prompt, each_KV in zip(prompts, logits_KV, strict=True):
            tokens = torch.tensor(list(self._continuations[prompt]), dtype=torch.int64, device=each_KV.device)
            logp_K = log_probabilities(each_KV[: len(tokens)]).gather(1, tokens[:, None])[:, 0]
            found.append(-logp_K.double().mean() if len(tokens) else torch.zeros((), dtype=torch.float64))
        return [float(each) for each in torch.stack([each.cpu() for each in found]).tolist()]


def _perplexities(nats: Sequence[Sequence[float]]) -> list[list[float]]:
    """What mean numbers of nats a token come to; beyond the largest number infinite."""
    return [[math.exp(each) if each < 700 else math.inf for each in row] for row in nats]
