"""How a model's parameters are split over the ranks of one replica: a family's plan, read as data.

Plans are those of transformers (a dictionary of module or parameter paths, `*` for a layer's number, to styles), with
rows of our own where it has none. Nothing here communicates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from heretic_ds.anatomy import Anatomy, has_expert_dispatch
from heretic_ds.checkpoint import Shard, split
from heretic_ds.errors import UserError


class CannotSplit(UserError):
    """Why a model cannot be split that way; the placement adds what to choose instead."""


_BACKENDS = {
    "autotp": "llama mistral qwen2 qwen3 gemma2 gemma3 gemma3_text gpt_neox opt mixtral qwen3_moe deepseek_v3",
    "hf_plan": "qwen2_vl llava phi3 olmo2 qwen3_next qwen3_5 qwen3_5_text gpt_oss lfm2",
}
FAMILY_BACKENDS = {family: backend for backend, families in _BACKENDS.items() for family in families.split()}
"""Which backend ``evaluate.backend=auto`` takes for a model type: each row is shown right by the distributed tests."""

_ATTENTION_READERS = {f"model.layers.*.self_attn.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")}

EXTRA_PLANS: dict[str, dict[str, str]] = {
    "gpt_oss": {
        **_ATTENTION_READERS,
        "model.layers.*.self_attn.sinks": "colwise",
        "model.layers.*.self_attn.o_proj": "rowwise",
    },
    "lfm2": {
        **_ATTENTION_READERS,
        "model.layers.*.self_attn.out_proj": "rowwise",
        "model.layers.*.conv.in_proj": "colwise_gather_output",
        "model.layers.*.conv.out_proj": "rowwise_split_input",
        "model.layers.*.feed_forward.w1": "colwise",
        "model.layers.*.feed_forward.w3": "colwise",
        "model.layers.*.feed_forward.w2": "rowwise",
    },
}
"""What transformers' own plans leave out, by model type."""

_NOTHING = frozenset({"replicated_with_grad_allreduce", "mla_kv_a_proj", "moe_tp_experts", "embedding_rowwise"})
"""Styles that ask for nothing here: they concern gradients, or experts and embeddings, split in one way everywhere."""


@dataclass(frozen=True)
class LinearSplit:
    """How one linear layer is split, and what surrounds it."""

    by_inputs: bool
    """Columns of the weight are split and outputs summed over ranks; else rows are, and outputs are a rank's own."""
    whole_input: bool = False
    """Split by inputs: the input arrives whole, and each rank takes its part."""
    whole_output: bool = False
    """Split by outputs: the ranks' outputs are gathered."""


STYLES: dict[str, LinearSplit] = {
    "colwise": LinearSplit(by_inputs=False),
    "colwise_rep": LinearSplit(by_inputs=False, whole_output=True),
    "colwise_gather_output": LinearSplit(by_inputs=False, whole_output=True),
    "rowwise": LinearSplit(by_inputs=True),
    "rowwise_rep": LinearSplit(by_inputs=True, whole_input=True),
    "rowwise_split_input": LinearSplit(by_inputs=True, whole_input=True),
}
"""Styles of linear layers by their names in plans."""


def choose_backend(model: nn.Module, model_type: str, wanted: str) -> str:
    """The backend that serves a model: `wanted`, or for ``auto`` the family's row.

    A family without a row is tried with transformers' plan where it has one. Raises CannotSplit where nothing does.
    """
    if wanted != "auto":
        return wanted
    if model_type in FAMILY_BACKENDS:
        return FAMILY_BACKENDS[model_type]
    if plan_of(model, model_type):
        return "hf_plan"
    raise CannotSplit(
        f"it is not known how to split a {model_type} model: it is no family of DeepSpeed's AutoTP that was shown "
        "right, and transformers has no plan for it"
    )


def plan_of(model: nn.Module, model_type: str) -> dict[str, str]:
    """Paths and styles for this model: transformers' plan and what is added to it."""
    return dict(getattr(model, "tp_plan", None) or {}) | EXTRA_PLANS.get(model_type, {})


def style_of(plan: Mapping[str, str], path: str) -> str | None:
    """The style of a module or parameter by its path, numbers between dots standing for `*`."""
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))


@dataclass(frozen=True)
class Layout:
    """What a plan comes to for one model."""

    linears: Mapping[str, LinearSplit]
    """By module path."""
    parameters: frozenset[str]
    """Lone parameters, one number a head, that are split as the heads are."""


def read_plan(model: nn.Module, anatomy: Anatomy, plan: Mapping[str, str]) -> Layout:
    """The linear layers and lone parameters that `plan` splits; experts and embedding are not among them.

    A writer whose outputs a plan splits, or that it leaves whole, is split by its inputs instead, which are whole
    there: so one form of edit serves every writer. Raises CannotSplit for a style that is not known, or no plan.
    """
    if not plan:
        raise CannotSplit(f"transformers has no parallel plan for {type(model).__name__}")
    writers = {writer.module for writer in anatomy.writers if writer.experts is None}
    experts = tuple(writer.module for writer in anatomy.writers if writer.experts is not None)
    modules = {path: model.get_submodule(path) for path in writers}
    linears = {path: STYLES["rowwise_split_input"] for path, writer in modules.items() if isinstance(writer, nn.Linear)}
    for path, module in model.named_modules():
        style = style_of(plan, path)
        if style is None or style in _NOTHING or path in experts or next(module.parameters(), None) is None:
            continue
        if isinstance(module, nn.Linear) and style in STYLES:
            if path not in writers or not STYLES[style].whole_output:
                linears[path] = STYLES[style]
        else:
            raise CannotSplit(
                f"the parallel plan of {type(model).__name__} splits {path}, a {type(module).__name__}, in the style "
                f"{style!r}; expected one of {', '.join(STYLES)} for a Linear"
            )
    lone = (name for name, parameter in model.named_parameters() if parameter.ndim == 1)
    return Layout(linears, frozenset(name for name in lone if style_of(plan, name) == "colwise"))


def splits_heads(anatomy: Anatomy, layout: Layout) -> bool:
    """Whether some attention output projection is fed by a rank's own heads only."""
    attention = [writer.module for writer in anatomy.writers if writer.component == "attention"]
    return any(path in layout.linears and not layout.linears[path].whole_input for path in attention)


def linear_shards(path: str, linear: nn.Linear, how: LinearSplit, member: int, degree: int) -> dict[str, Shard]:
    """This rank's part of a linear layer; a bias behind a split of inputs stays whole."""
    shards = {f"{path}.weight": split(linear.weight.shape, 1 if how.by_inputs else 0, member, degree)}
    if linear.bias is not None and not how.by_inputs:
        shards[f"{path}.bias"] = split(linear.bias.shape, 0, member, degree)
    return shards


def expert_shards(model: nn.Module, anatomy: Anatomy, member: int, degree: int) -> dict[str, Shard]:
    """This rank's part of all fused experts: of every expert an equal part of its inner width K.

    A gate and an up projection that lie side by side are split each; where they alternate, a contiguous part holds
    pairs of both. The output bias is one rank's alone, because outputs are summed. Raises CannotSplit for experts whose
    forward cannot be told that its outputs are partial sums.
    """
    shards: dict[str, Shard] = {}
    for writer in anatomy.writers:
        if writer.experts is None:
            continue
        experts = model.get_submodule(writer.module)
        if not has_expert_dispatch(experts):
            raise CannotSplit(
                f"{writer.module} ({type(experts).__name__}) holds experts that cannot be split over ranks"
            )
        transposed = writer.layout == "EKD"
        packed, grain = 1, 1
        if experts.has_gate:
            packed, grain = (2, 1) if experts.is_concatenated else (1, 2)
        for attribute, parameter in experts.named_parameters(recurse=False):
            name, shape = f"{writer.module}.{attribute}", tuple(parameter.shape)
            if name == writer.weight:
                shards[name] = split(shape, -2 if transposed else -1, member, degree)
            elif name == writer.bias:
                shards[name] = Shard(shape, zeroed=member != 0)
            else:
                dim = -2 if parameter.ndim == 3 and not transposed else -1
                shards[name] = split(shape, dim, member, degree, packed, grain)
    return shards


def check_heads(model_type: str, config: object, degree: int, setting: str) -> None:
    """Refuse a degree that does not divide the attention heads of a model whose heads are split over ranks."""
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, field, None)
        if isinstance(heads, int) and heads % degree:
            raise CannotSplit(f"{setting}={degree} does not divide the {heads} {field} of this {model_type} model")


def check_degree(anatomy: Anatomy, shards: Mapping[str, Shard], degree: int, widths: Sequence[Sequence[int]]) -> None:
    """Refuse to go on where a writer is not split `degree` ways by its inputs.

    `widths` are, for each rank of the replica, the inner widths K of all writers as they lie in its memory.
    """
    for writer, parts in zip(anatomy.writers, zip(*widths, strict=True), strict=True):
        shard, inner = shards.get(writer.weight), {"DK": 1, "KD": 0, "EDK": 2, "EKD": 1}[writer.layout]
        whole = shard is None or shard.ranges is None or shard.dim != inner
        if shard is None or whole or sum(parts) != shard.shape[inner] or len(parts) != degree:
            raise CannotSplit(f"{writer.weight} could not be split over the {degree} ranks of a replica")
