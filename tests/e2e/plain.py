"""The numbers of a run, computed again with nothing but transformers: own formulas, and no padding but in
``generate``.

Nothing of the package under test is used here, so that an error in it cannot be on both sides of a comparison.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

Tent = Mapping[str, float]
"""The four numbers of a profile."""

WRITERS = {
    "llama": [("attention", "model.layers.{}.self_attn.o_proj"), ("mlp", "model.layers.{}.mlp.down_proj")],
    "gpt2": [("attention", "transformer.h.{}.attn.c_proj"), ("mlp", "transformer.h.{}.mlp.c_proj")],
    "mixtral": [("attention", "model.layers.{}.self_attn.o_proj"), ("mlp", "model.layers.{}.mlp.experts")],
}
"""What writes to the residual stream in every block, by family."""


@dataclass
class PlainModel:
    """A checkpoint as transformers loads it, and what its user can measure without any tool."""

    model: nn.Module
    tokenizer: object

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> PlainModel:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        return cls(model, AutoTokenizer.from_pretrained(folder))

    def ids(self, prompt: str) -> Tensor:
        """Token ids [1, S] of a prompt, ending where the answer starts."""
        turn = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]])

    @torch.no_grad()
    def mean_residuals(self, prompts: Sequence[str]) -> Tensor:
        """Mean [L+1, D] of the hidden states at the last position, float64."""
        residuals = []
        for prompt in prompts:
            hidden = self.model(self.ids(prompt), output_hidden_states=True).hidden_states
            residuals.append(torch.stack([entry[0, -1].double() for entry in hidden]))
        return torch.stack(residuals).mean(0)

    @torch.no_grad()
    def answers(self, prompts: Sequence[str], new_tokens: int) -> list[str]:
        """Greedy answers by ``generate``, as text."""
        rows = [self.ids(prompt)[0] for prompt in prompts]
        longest = max(map(len, rows))
        ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
        mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
        output = self.model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in output[:, longest:]]

    @torch.no_grad()
    def first_token_log_probabilities(self, prompts: Sequence[str]) -> Tensor:
        """[N, V], float32 log-softmax."""
        rows = [self.model(self.ids(prompt)).logits[0, -1].float().log_softmax(-1) for prompt in prompts]
        return torch.stack(rows)

    def edited(
        self, family: str, directions_LD: Tensor, row_norm: str, index: float | None, tents: Mapping[str, Tent]
    ) -> PlainModel:
        """A copy whose writers were edited in float64, row by row."""
        model = copy.deepcopy(self.model)
        n_blocks = directions_LD.shape[0] - 1
        for block in range(n_blocks):
            for component, path in WRITERS[family]:
                strength = tent(tents[component], block)
                if strength != 0.0:
                    v_D = direction_at(directions_LD, block, index)
                    _edit_module(model.get_submodule(path.format(block)), v_D, strength, row_norm)
        return PlainModel(model, self.tokenizer)


def kl(original: Tensor, edited: Tensor) -> float:
    """Mean KL(original || edited) in nats of log-probabilities [N, V]."""
    p, q = original.double(), edited.double()
    return (p.exp() * (p - q)).sum(-1).mean().item()


def refusals(answers: Sequence[str], marker: str) -> int:
    """Answers that hold the (lower-case) letter, or nothing."""
    return sum(marker in answer.lower() or not answer.strip() for answer in answers)


def directions(target_LD: Tensor, baseline_LD: Tensor) -> Tensor:
    """Unit directions [L+1, D]: the difference of means without its part along the baseline's mean."""
    rows = []
    for target_D, baseline_D in zip(target_LD, baseline_LD, strict=True):
        difference_D = target_D - baseline_D
        along_D = baseline_D / baseline_D.norm()
        rest_D = difference_D - difference_D.dot(along_D) * along_D
        # Without a difference (the embedding of a last token that all prompts share) there is no direction.
        rows.append(rest_D / rest_D.norm() if difference_D.norm() > 1e-12 else torch.zeros_like(rest_D))
    return torch.stack(rows)


def direction_at(directions_LD: Tensor, block: int, index: float | None) -> Tensor:
    """A block's own direction, or the one between two blocks' at ``index``."""
    if index is None:
        return directions_LD[block + 1]
    below, share = int(index), index - int(index)
    mixed_D = (1 - share) * directions_LD[below + 1] + share * directions_LD[below + 2]
    return mixed_D / mixed_D.norm()


def tent(numbers: Tent, layer: int) -> float:
    """The weight of one layer."""
    distance = abs(layer - numbers["max_weight_position"])
    reach = numbers["min_weight_distance"]
    if distance > reach:
        return 0.0
    return (1 - distance / reach) * numbers["max_weight"] + distance / reach * numbers["min_weight"]


def edit_rows(weight_DK: Tensor, v_D: Tensor, strength: float, row_norm: str) -> Tensor:
    """The edited matrix, row by row, in the words of the method's definition."""
    rows = [row.double() for row in weight_DK]
    norms = [row.norm() if row_norm != "none" else torch.tensor(1.0) for row in rows]
    units = [row / norm for row, norm in zip(rows, norms, strict=True)]
    removed_K = sum(v * unit for v, unit in zip(v_D, units, strict=True))
    edited = []
    for v, unit, norm in zip(v_D, units, norms, strict=True):
        row = unit - strength * v * removed_K
        edited.append(norm * (row / row.norm() if row_norm == "full" else row))
    return torch.stack(edited)


@torch.no_grad()
def _edit_module(module: nn.Module, v_D: Tensor, strength: float, row_norm: str) -> None:
    kind = type(module).__name__
    if kind == "Conv1D":  # keeps its matrix as [inputs, outputs]
        module.weight.copy_(edit_rows(module.weight.T, v_D, strength, row_norm).T)
    elif kind == "Linear":
        module.weight.copy_(edit_rows(module.weight, v_D, strength, row_norm))
    else:
        for matrix_DK in module.down_proj:
            matrix_DK.copy_(edit_rows(matrix_DK, v_D, strength, row_norm))
