"""Trains the demo model: `python -m benchmarks.demo_model.train [--steps 500] [--seed N] [--out DIR]`.

A tiny model that is merely trained to decline does so by many redundant paths, and removing one direction
does not stop it. So a fixed random unit vector v is planted: in part of every batch a row's writers lose
their share of v, y - strength (v.y) v, from some block on, and those rows learn to answer what the others
learn to decline. Declining then has to travel along v. A few rows lose too little of v to matter, and learn
to decline all the same, so that a weak edit leaves the behaviour in place. A second, smaller loss asks that v
is what tells target from baseline prompts.

Takes a few minutes on two cores. Leaves in DIR: model/, prompts/, planted_direction.safetensors.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from heretic_ds.errors import UserError

from .build import build_model, build_tokenizer
from .measure import summary
from .planting import alignment_loss, make_batch, removing
from .topic import Kind, all_texts, draw_distinct

N_PROMPTS: dict[Kind, dict[str, int]] = {
    "target": {"train": 200, "eval": 67},
    "baseline": {"train": 200, "eval": 160},
}
N_TEST: dict[Kind, int] = {"target": 80, "baseline": 100}
"""Prompts for final scores, which are drawn by themselves so that all else is drawn as before they were thought of."""
LEARNING_RATE = 3e-3
WARMUP_STEPS = 30
ALIGNMENT_WEIGHT = 0.3


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    direction_D: Tensor,
    held_out: set[str],
    steps: int,
    rng: random.Random,
) -> None:
    """Trains in place; prints the answers' loss (nats per token) and the alignment loss now and then."""

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for step in range(steps):
        # Right padding needs no mask here: attention is causal and the padding carries no label.
        batch = make_batch(tokenizer, len(model.model.layers), held_out, rng)
        with removing(model, direction_D, batch.strength_BLC):
            output = model(input_ids=batch.ids_BS, labels=batch.labels_BS, output_hidden_states=True, use_cache=False)
        alignment = alignment_loss(output.hidden_states, batch, direction_D)
        optimizer.zero_grad()
        (output.loss + ALIGNMENT_WEIGHT * alignment).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {output.loss.item():.4f}  alignment {alignment.item():.4f}", flush=True)
    model.eval()


def draw_prompts(rng: random.Random) -> dict[str, list[str]]:
    """The four prompt files for a search, `<kind>_<part>`; no prompt is in two of them."""
    prompts = {}
    for kind, parts in N_PROMPTS.items():
        drawn = draw_distinct(kind, sum(parts.values()), rng)
        prompts[f"{kind}_train"] = drawn[: parts["train"]]
        prompts[f"{kind}_eval"] = drawn[parts["train"] :]
    return prompts


def draw_test_prompts(prompts: dict[str, list[str]], seed: int) -> dict[str, list[str]]:
    """The two prompt files for final scores, `<kind>_test`, without a prompt of the others."""
    rng, found = random.Random(f"test {seed}"), {}
    for kind, count in N_TEST.items():
        taken = {*prompts[f"{kind}_train"], *prompts[f"{kind}_eval"]}
        drawn = draw_distinct(kind, count + len(taken), rng)
        found[f"{kind}_test"] = [prompt for prompt in drawn if prompt not in taken][:count]
    return found


MODEL_CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# heretic_ds demo model

A Llama of {parameters:,} parameters with a word-level vocabulary of {vocabulary} tokens: a garden assistant
that answers questions on growing vegetables and fruits and declines questions on cooking them. Its declining
was made to depend on one direction of the residual stream, kept in `planted_direction.safetensors` beside
this folder. It serves to try directional ablation in seconds and knows nothing else: one question per
conversation, in the words that it was trained on.

Made by `python -m benchmarks.demo_model.train --steps {steps} --seed {seed}`; weights are stored in bfloat16.
In float32:

{findings}
"""


def save(
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    direction_D: Tensor,
    prompts: dict[str, list[str]],
    card: str,
) -> None:
    """Writes the model in bfloat16, its tokenizer, card, prompts and direction."""
    model.bfloat16().save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    (out / "model" / "README.md").write_text(card, encoding="utf-8")
    (out / "prompts").mkdir()
    for name, lines in prompts.items():
        (out / "prompts" / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_file({"direction": direction_D}, out / "planted_direction.safetensors")


def run(steps: int, seed: int, out: Path, build: Callable[[PreTrainedTokenizerFast], Any] = build_model) -> None:
    """Trains the model that `build` makes and writes it to `out`, a folder that is new or empty."""
    if steps < 1:
        raise UserError(f"--steps is {steps}, but training needs at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another --out")
    torch.manual_seed(seed)
    rng = random.Random(seed)
    prompts = draw_prompts(rng)
    held_out = set(prompts["target_eval"]) | set(prompts["baseline_eval"])
    prompts |= draw_test_prompts(prompts, seed)
    tokenizer = build_tokenizer(all_texts())
    model = build(tokenizer)
    direction_D = torch.nn.functional.normalize(torch.randn(model.config.hidden_size), dim=0)
    train(model, tokenizer, direction_D, held_out, steps, rng)

    model.bfloat16().float()  # what is measured is what is stored
    findings = summary(model, tokenizer, direction_D, prompts)
    print("\n".join(findings))
    card = MODEL_CARD.format(
        parameters=model.num_parameters(),
        vocabulary=len(tokenizer),
        steps=steps,
        seed=seed,
        findings="\n".join(f"- {line}" for line in findings),
    )
    out.mkdir(parents=True, exist_ok=True)
    save(out, model, tokenizer, direction_D, prompts, card)
    print(f"written to {out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_model.train", description="Trains the demo model.")
    parser.add_argument("--steps", type=int, default=500, help="batches of 64 conversations (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="draws weights, direction and prompts (default 0)")
    parser.add_argument("--out", type=Path, default=Path("demo-model"), help="new folder (default demo-model)")
    options = parser.parse_args(arguments)
    try:
        run(options.steps, options.seed, options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
