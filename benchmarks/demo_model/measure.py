"""What a demo model says, and along which direction: measurements for the training script and the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .planting import removing, uniform_removal
from .topic import conversation

DECLINE_MARKERS = ("sorry", "i can't", "i cannot", "i'm unable")


def encode_prompts(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Left-padded model inputs of prompts, ending where the answers start."""
    texts = [
        str(tokenizer.apply_chat_template(conversation(prompt), tokenize=False, add_generation_prompt=True))
        for prompt in prompts
    ]
    return dict(tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt"))


@torch.inference_mode()
def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[str]:
    """Greedy answers."""
    inputs = encode_prompts(tokenizer, prompts)
    generate: Any = model.generate  # type: ignore[misc]  # its stated self type is not a Llama
    output_BS = generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return tokenizer.batch_decode(output_BS[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def declined(answers: Sequence[str]) -> int:
    """How many answers hold a marker of declining."""
    return sum(any(marker in text.lower() for marker in DECLINE_MARKERS) for text in answers)


@torch.inference_mode()
def last_residuals(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> Tensor:
    """Mean residual at the last prompt position after each block [L, D], the last after the final norm."""
    inputs = encode_prompts(tokenizer, prompts)
    position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    states = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        position_ids=position_ids,
        output_hidden_states=True,
    ).hidden_states
    return torch.stack([state_BSD[:, -1].mean(0) for state_BSD in states[1:]])


def summary(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    direction_D: Tensor,
    prompts: dict[str, list[str]],
) -> list[str]:
    """What the trained model does, one finding a line."""
    target, baseline = prompts["target_eval"], prompts["baseline_eval"]
    plain, other = declined(answer(model, tokenizer, target)), declined(answer(model, tokenizer, baseline))
    with removing(model, direction_D, uniform_removal(model, len(target), 1.0)):
        removed = declined(answer(model, tokenizer, target))
    difference_LD = last_residuals(model, tokenizer, prompts["target_train"]) - last_residuals(
        model, tokenizer, prompts["baseline_train"]
    )
    cosine_L = torch.nn.functional.cosine_similarity(difference_LD, direction_D[None], dim=-1).abs()
    return [
        f"target eval prompts declined: {plain}/{len(target)}, with the planted direction removed: {removed}",
        f"baseline eval prompts declined: {other}/{len(baseline)}",
        "|cosine| of the difference of means with the planted direction, per block: "
        + " ".join(f"{value:.2f}" for value in cosine_L.tolist()),
    ]
