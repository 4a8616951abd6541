"""Whether a configuration can be that of the weights beside it: asked before anything is built by it.

A skeleton takes time and memory for every block that a configuration asks for, whatever the weights hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from heretic_ds.checkpoint.conversions import find_sources
from heretic_ds.checkpoint.fitness import some_names
from heretic_ds.checkpoint.packed import METHODS
from heretic_ds.checkpoint.source import CONFIG_NAME, ModelSource, TensorInfo, stated_quantization
from heretic_ds.checkpoint.tokens import TRUST_HINT
from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import check_shape, reading
from heretic_ds.foreign.text import in_one_line

if TYPE_CHECKING:
    from heretic_ds.checkpoint.open import ModelChoice

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_LARGEST = (
    dict.fromkeys(_DEPTHS, 10_000)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 2**16)
    | dict.fromkeys((*_WIDTHS, "intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner"), 2**24)
    | dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), 2**20)
    | {"vocab_size": 2**28, "max_position_embeddings": 2**40, "n_positions": 2**40}
)
"""By name, what no model comes near, by orders of magnitude."""
_ANY_NUMBER = 2**63
_BLOCK = re.compile(r"(.*?)\.(\d+)\.")
_CODE_NAMES = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
"""Fields that may name code on the hub, as ``owner/name``."""
_KINDS: dict[str, Any] = {
    "model_type": str,
    "architectures": [str],
    "auto_map": dict,
    "text_config": dict,
    "quantization_config": dict,
    "dtype": (str, dict),
    "torch_dtype": (str, dict),
}
AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText)
NEWER = "choose another model or a newer transformers"
_OTHER_HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_ADVICE = "download or copy the model again"


def load_config(
    choice: ModelChoice, source: ModelSource, raw: Mapping[str, Any], headers: Mapping[str, TensorInfo]
) -> PreTrainedConfig:
    """The model's configuration, checked to be that of a causal language model that transformers knows, and to fit the
    headers of its weights."""
    check_config(raw, source.folder / CONFIG_NAME, headers, choice.trust_remote_code)
    kind, own_code = raw.get("model_type"), raw.get("auto_map") or {}
    if kind not in CONFIG_MAPPING and "AutoConfig" not in own_code:
        raise UserError(
            f"model.path={choice.path}: its config.json has model_type={kind!r}, an architecture that "
            "this version of transformers does not know; choose another model or a newer transformers."
        )
    if kind not in CONFIG_MAPPING and not choice.trust_remote_code:
        raise UserError(f"model.path={choice.path} cannot be loaded: {TRUST_HINT}.")
    with reading(source.folder / CONFIG_NAME, NEWER, "is not usable"):
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=choice.trust_remote_code)
    architecture = (raw.get("architectures") or ["of no stated architecture"])[0]
    known = any(type(config) in auto._model_mapping for auto in AUTO_CLASSES)
    if not known and "AutoModelForCausalLM" in own_code and not choice.trust_remote_code:
        raise UserError(f"model.path={choice.path} cannot be loaded: {TRUST_HINT}.")
    causal = known or "AutoModelForCausalLM" in own_code
    if not causal or config.is_encoder_decoder or any(head in architecture for head in _OTHER_HEADS):
        raise UserError(
            f"model.path={choice.path} is a {architecture} ({kind}); expected a causal language model, "
            "which continues text."
        )
    return config


def check_config(
    raw: Mapping[str, Any], file: Path, headers: Mapping[str, TensorInfo], trust_remote_code: bool = False
) -> None:
    """Raise UserError where a configuration is malformed, asks for what no model has, or for other than its weights.

    ``raw`` is the content of ``file``; ``headers`` are those of the weights, empty where they are not known.
    """
    _check_kinds(raw, file)
    for name, value in _walk(raw):
        where = f"{file}: {in_one_line(name, 80)} is {in_one_line(json.dumps(value), 60)}"
        last = name.rpartition(".")[2]
        if last in _LARGEST and not _is_count(value, _LARGEST[last]):
            raise UserError(f"{where}; expected a whole number from 0 to {_LARGEST[last]}; {_ADVICE}")
        if isinstance(value, int) and abs(value) >= _ANY_NUMBER:
            raise UserError(f"{where}, which is out of all bounds; {_ADVICE}")
        if last in _CODE_NAMES and "/" in str(value) and not trust_remote_code:
            raise UserError(f"{where}, code on the hub; set model.trust_remote_code=true if you trust its author")
    for part in (raw, raw.get("text_config") or {}):
        _compare(part, file, headers)


def _check_kinds(raw: Mapping[str, Any], file: Path) -> None:
    for part, place in ((raw, f"{file}: "), (raw.get("text_config"), f"{file}: text_config.")):
        for name, kinds in _KINDS.items():
            if isinstance(part, dict) and part.get(name) is not None:
                check_shape(part[name], kinds, place + name, _ADVICE)


def _walk(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a configuration, with its dotted name, those of parts included."""
    for name, value in part.items():
        yield f"{prefix}{name}", value
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{name}.")


def _is_count(value: Any, most: int) -> bool:
    """Whether it is nothing, a whole number within bounds, or one for each block."""
    if isinstance(value, list):
        return len(value) <= _LARGEST[_DEPTHS[0]] and all(_is_count(each, most) for each in value)
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most)


def _compare(part: Mapping[str, Any], file: Path, headers: Mapping[str, TensorInfo]) -> None:
    """Blocks and width of a configuration beside those of the weights."""
    found: dict[str, int] = {}
    for name in headers:
        if match := _BLOCK.match(name):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    blocks, dimensions = max(found.values(), default=0), {size for info in headers.values() for size in info.shape}
    for name in _DEPTHS:
        if blocks and isinstance(asked := part.get(name), int) and asked > blocks:
            raise UserError(f"{file} asks for {asked} blocks ({name}), but its weights hold {blocks}; {_ADVICE}")
    for name in _WIDTHS:
        if dimensions and isinstance(asked := part.get(name), int) and asked not in dimensions:
            raise UserError(f"{file} has {name}={asked}, but no tensor of its weights is as wide; {_ADVICE}")


def quantization_of(raw: Mapping[str, Any]) -> str | None:
    """Quantisation method of a raw configuration; None where it states none, or nothing that could be one, which
    :func:`check_config` refuses."""
    stated = stated_quantization(raw)
    return str(stated.get("quant_method", "unnamed")) if stated else None


def refuse_quantised(path: str, method: str | None, phase: str, unpacks: bool = True) -> None:
    """Refuse files that are quantised by some ``method``: their parts mean nothing by themselves.

    Those that are read here as if they were not are refused where not ``unpacks`` alone. Raises UserError.
    """
    if method is None or (unpacks and method in METHODS):
        return
    if method in METHODS:
        raise UserError(
            f"model.path={path} is quantised with {method}, of which this {phase} reads no weights; "
            f"use the unquantised original, or set {phase}=replicated"
        )
    raise UserError(
        f"model.path={path} is quantised with {method}, and its parts cannot be read by themselves; "
        f"use the unquantised original, or set {phase}=replicated"
    )


def check_headers(skeleton: PreTrainedModel, headers: Mapping[str, TensorInfo], path: str) -> None:
    """Raise UserError that names the tensor where weights, by their headers, lack one or have it in another shape.

    ``skeleton`` is the model as its configuration describes it; ``path`` is what the user called it.
    """
    if not headers:
        return
    sources, _ = find_sources(skeleton, {name: info.shape for name, info in headers.items()})
    together: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        together.setdefault(id(parameter), []).append(name)
    ignored = [re.compile(pattern) for pattern in skeleton._keys_to_ignore_on_load_missing or ()]
    missing = [
        names[0]
        for names in together.values()
        if not any(name in sources or any(pattern.search(name) for pattern in ignored) for name in names)
    ]
    if missing:
        raise UserError(
            f"model.path={path}: its weight files lack {some_names(missing)}, which {type(skeleton).__name__} needs; "
            "the checkpoint is incomplete."
        )
