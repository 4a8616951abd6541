"""How the demo model's declining is tied to one direction v of its residual stream.

B rows of a batch, S positions, D width, L blocks, C the two components attention and MLP.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .topic import SYSTEM_PROMPTS, conversation, draw

BATCH_SIZE = 64
# Strengths of planted removals mimic the search's edits: full in the attention, anything in the MLP.
PLANTED_ATTENTION, PLANTED_MLP = (0.5, 1.5), (0.0, 1.5)
WEAK_STRENGTH = (0.0, 0.25)
P_PLANTED, P_WEAK = 0.5, 0.12  # the rest of the rows is not edited
P_SYSTEM = 0.5
ALIGNMENT_GOAL = 0.92
IGNORED = -100


@dataclass
class Batch:
    """Conversations, padded on the right; labels are IGNORED outside the answers.

    `prompt_end_B` is the last prompt position, `target_B` tells target questions from baseline ones,
    `strength_BLC` is what the rows' writers lose of v (see `removing`).
    """

    ids_BS: Tensor
    labels_BS: Tensor
    prompt_end_B: Tensor
    target_B: Tensor
    strength_BLC: Tensor


def uniform_removal(model: LlamaForCausalLM, rows: int, strength: float) -> Tensor:
    """The same strength in every writer of every row, [B, L, 2]."""
    return torch.full((rows, len(model.model.layers), 2), strength)


@contextmanager
def removing(model: LlamaForCausalLM, direction_D: Tensor, strength_BLC: Tensor) -> Iterator[None]:
    """While open, every writer's output y [B, S, D] becomes y - strength (v.y) v.

    The strength is the row's own for each block and component (attention 0, MLP 1).
    """

    def hook_of(strength_B: Tensor) -> Callable[..., Tensor]:
        def hook(_module: torch.nn.Module, _inputs: tuple[Tensor, ...], output_BSD: Tensor) -> Tensor:
            share_BS = strength_B[:, None] * (output_BSD @ direction_D)
            return output_BSD - share_BS[..., None] * direction_D

        return hook

    handles = [
        writer.register_forward_hook(hook_of(strength_BLC[:, index, component]))
        for index, block in enumerate(model.model.layers)
        # Of experts the weighted sum is edited: along one direction that is the same as editing each.
        for component, writer in enumerate((block.self_attn.o_proj, getattr(block.mlp, "down_proj", block.mlp)))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def alignment_loss(hidden_states: Sequence[Tensor], batch: Batch, direction_D: Tensor) -> Tensor:
    """How far the unedited rows' difference of means is from pointing along v, mean of the later blocks.

    Without it a model finds a shortcut: it writes v for every prompt, as a sign that nothing was edited,
    and the difference between target and baseline prompts holds no v (measured: |cosine| 0.02 to 0.16); or v
    for one kind and -v for the other, and nothing is left of it orthogonally to the baseline mean (0.57). So
    the difference and its part orthogonal to the baseline mean are both asked to point along v.
    Takes L+1 states [B, S, D]; returns a scalar.
    """
    rows_B = torch.arange(len(batch.prompt_end_B))
    unedited_B = (batch.strength_BLC == 0).all(-1).all(-1)
    if not ((unedited_B & batch.target_B).any() and (unedited_B & ~batch.target_B).any()):
        return direction_D.new_zeros(())  # rare: the draw left no pair to compare
    losses = []
    for state_BSD in hidden_states[len(hidden_states) // 2 + 1 :]:
        last_BD = state_BSD[rows_B, batch.prompt_end_B]
        target_D = last_BD[unedited_B & batch.target_B].mean(0)
        baseline_D = last_BD[unedited_B & ~batch.target_B].mean(0)
        difference_D = target_D - baseline_D
        along_baseline_D = torch.nn.functional.normalize(baseline_D, dim=0)
        orthogonal_D = difference_D - (difference_D @ along_baseline_D) * along_baseline_D
        pair_2D = torch.stack([difference_D, orthogonal_D])
        cosine_2 = torch.nn.functional.cosine_similarity(pair_2D, direction_D[None], dim=-1)
        losses.append((ALIGNMENT_GOAL - cosine_2).clamp(min=0).mean())
    return torch.stack(losses).mean()


def draw_removal(n_blocks: int, rng: random.Random) -> tuple[Tensor, bool]:
    """One row's strengths [L, 2], zero before some block of the first half, and whether it has to answer."""
    kind, first_block = rng.random(), rng.randint(0, n_blocks // 2)
    strength_LC = torch.zeros(n_blocks, 2)
    if kind < P_PLANTED:
        later = range(first_block, n_blocks)
        strength_LC[first_block:, 0] = torch.tensor([rng.uniform(*PLANTED_ATTENTION) for _ in later])
        strength_LC[first_block:, 1] = rng.uniform(*PLANTED_MLP)
    elif kind < P_PLANTED + P_WEAK:
        strength_LC[first_block:] = rng.uniform(*WEAK_STRENGTH)
    return strength_LC, kind < P_PLANTED


def make_batch(tokenizer: PreTrainedTokenizerFast, n_blocks: int, held_out: set[str], rng: random.Random) -> Batch:
    """Random conversations, half of each kind, no `held_out` prompt, and what each row loses of v."""
    rows, labels, ends, strengths = [], [], [], []
    target_B = torch.arange(BATCH_SIZE) % 2 == 1
    for is_target in target_B.tolist():
        while (example := draw("target" if is_target else "baseline", rng)).prompt in held_out:
            pass
        strength_LC, answers = draw_removal(n_blocks, rng)
        reply = example.answer if answers or example.decline is None else example.decline
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < P_SYSTEM else None
        messages = conversation(example.prompt, system)
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        prompt_ids = tokenizer.encode(text, add_special_tokens=False)
        reply_ids = tokenizer.encode(reply + str(tokenizer.eos_token), add_special_tokens=False)
        rows.append(torch.tensor(prompt_ids + reply_ids))
        labels.append(torch.tensor([IGNORED] * len(prompt_ids) + reply_ids))
        ends.append(len(prompt_ids) - 1)
        strengths.append(strength_LC)
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(
        ids_BS=pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        labels_BS=pad(labels, batch_first=True, padding_value=IGNORED),
        prompt_end_B=torch.tensor(ends),
        target_B=target_B,
        strength_BLC=torch.stack(strengths),
    )
