"""Divergence of next-token distributions. Shapes: B positions, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def log_probabilities(logits_BV: Tensor) -> Tensor:
    """Log-softmax [B, V] over the vocabulary, in float32, whatever the model's dtype."""
    return torch.log_softmax(logits_BV, dim=-1, dtype=torch.float32)


def first_token_kl(reference_logp_BV: Tensor, logits_BV: Tensor) -> Tensor:
    """KL(original || edited) [B] in nats: sum over v of p_v (ln p_v - ln q_v).

    ``reference_logp_BV`` holds the original's :func:`log_probabilities`, ``logits_BV`` the edited model's
    logits. Tokens that the original never gives (ln p = -inf, as for masked vocabulary) add nothing; one that
    only the edited model never gives makes the divergence infinite. Summed in float64; rounding below zero is
    cut off.
    """
    if reference_logp_BV.shape != logits_BV.shape:
        raise ValueError(
            f"reference {tuple(reference_logp_BV.shape)} and logits {tuple(logits_BV.shape)} differ in shape"
        )
    reference_logp_BV = reference_logp_BV.float()
    gap_BV = reference_logp_BV - log_probabilities(logits_BV)
    p_BV = reference_logp_BV.exp()
    terms_BV = torch.where(p_BV == 0, 0.0, p_BV * gap_BV)
    return terms_BV.sum(dim=-1, dtype=torch.float64).clamp(min=0)
