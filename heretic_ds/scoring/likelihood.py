"""How likely an edited model still gives the original's answers: what says of refusals, without generating, where a
count is flat. Shapes: K positions of a prompt, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from heretic_ds.ablation import Edit
from heretic_ds.ablation.divergence import log_probabilities
from heretic_ds.scoring.base import DistributionScorer, GivesDistributions, TokenRows


class RefusalLikelihood(DistributionScorer):
    """How likely the edited model begins its answers as the original did, beside the original itself; mean over
    prompts.

    One pass over each prompt with those tokens after it (teacher-forced), as cheap as one for a KL divergence. For each
    k up to K it takes the probability of the first k tokens in a row, prod_{j <= k} p(t_j | prompt, t_1 ... t_{j-1}),
    as a share of the original's own, at most 1; of a prompt the mean over k. Of the whole row alone, k = K, the number
    says less of edits that leave few refusals: it is as small where the model words its refusal otherwise from the
    second token on as where it answers.
    """

    name = "refusal_likelihood"
    combine = "mean"

    def begin(self, engine: GivesDistributions, prompts: TokenRows, continuations: TokenRows | None = None) -> Self:
        """``continuations`` are the first tokens of the answers, one or more to each prompt."""
        self.get_ready(engine, prompts, continuations)
        engine.distributions(prompts, [None], self.remember, self.continuations)
        return self

    def get_ready(self, engine: GivesDistributions, prompts: TokenRows, continuations: TokenRows | None) -> Self:
        """:meth:`begin` without the original's pass, for those whose pass it is a part of: they :meth:`remember` it."""
        if continuations is None or not all(continuations):
            raise ValueError("a likelihood needs tokens to each prompt")
        self._engine, self._prompts, self._tokens = engine, prompts, continuations
        self.continuations = [tokens[:-1] for tokens in continuations]  # the last one is predicted, not passed over
        self._original_K: dict[int, Tensor] = {}
        """By prompt, on the rank that reads its logits."""
        return self

    def each(self, edits: Sequence[Edit | None]) -> list[list[float]]:
        """For each edit the number of every prompt."""
        return self._engine.distributions(self._prompts, edits, self.read, self.continuations)

    def read(self, prompts: Sequence[int], logits_KV: Sequence[Tensor]) -> list[float]:
        """The number of each prompt, from the logits at the places of its tokens."""
        found = [
            (self._logarithms(prompt, each_KV) - self._original_K[prompt].to(each_KV.device)).clamp(max=0).exp().mean()
            for prompt, each_KV in zip(prompts, logits_KV, strict=True)
        ]
        return torch.stack(found).tolist() if found else []

    def remember(self, prompts: Sequence[int], logits_KV: Sequence[Tensor]) -> list[float]:
        """Take the original's numbers, in a pass over the rows of those in which edits are :meth:`read`."""
        for prompt, each_KV in zip(prompts, logits_KV, strict=True):
            self._original_K[prompt] = self._logarithms(prompt, each_KV).cpu()
        return [0.0] * len(prompts)

    def _logarithms(self, prompt: int, logits_KV: Tensor) -> Tensor:
        """Of the probabilities of the first token, of the first two, and so on [K]."""
        tokens_K1 = torch.tensor(self._tokens[prompt], device=logits_KV.device)[:, None]
        return log_probabilities(logits_KV).gather(1, tokens_K1)[:, 0].cumsum(dim=0)
