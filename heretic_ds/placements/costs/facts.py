"""What a plan knows of a model and a job: configuration, names and shapes, settings; no weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from heretic_ds.anatomy import Anatomy, Writer
from heretic_ds.checkpoint import bnb
from heretic_ds.checkpoint.packed import METHODS
from heretic_ds.checkpoint.plausible import refuse_quantised
from heretic_ds.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What a job asks of the model."""

    train_prompts: int = 800
    """Prompts of the capture, both kinds together."""
    target_prompts: int = 100
    """Prompts that each trial answers."""
    baseline_prompts: int = 100
    """Prompts whose distributions each trial compares."""
    prompt_tokens: float = 48.0
    """Mean length of a prompt."""
    longest_prompt: int = 128
    new_tokens: int = 100
    """Longest answer."""
    trials: int = 200
    together: int = 0
    """Trials that share a pass; 0: up to 4."""
    batch: int = 0
    """Rows a batch; 0: as many as memory holds."""
    row_norm: str = "full"
    rank: int = 1
    """Directions of an edit."""


class _Known(Generic[T]):
    """A property of :class:`Facts` that is found once for a model, whatever the batch."""

    def __init__(self, find: Callable[[Facts], T]) -> None:
        self._find, self.__doc__ = find, find.__doc__

    def __get__(self, facts: Facts, owner: type) -> T:
        return facts.once(self._find, lambda: self._find(facts))


@dataclass(frozen=True)
class Facts:
    """A model and a job, known from configuration, file headers and a skeleton without memory."""

    name: str
    model: PreTrainedModel = field(repr=False, compare=False)
    """The model on the meta device."""
    anatomy: Anatomy = field(repr=False, compare=False)
    dtype: torch.dtype
    work: Work
    quantization: str | None = None
    """Method by which the files are quantised; but for :data:`METHODS` their parts mean nothing by themselves."""
    stored: int = 0
    """Bytes of the weights as they lie in files, where they are packed; 0: as many as in memory."""
    packing: str = bnb.NONE
    """How weights are packed in memory, as ``model.quantization`` says."""
    merges_experts: bool = False
    """Whether the files hold each expert by itself, so that transformers puts them together while it loads."""
    shares_files: bool = False
    """Whether ranks of a computer that hold the whole model each read a part of the files (``load.share``)."""
    here: torch.device = field(default=torch.device("cpu"), compare=False)
    """The device of this process, whatever machine is asked about."""
    _known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def with_batch(self, rows: int) -> Facts:
        """The same with another number of rows a batch."""
        return replace(self, work=replace(self.work, batch=rows))

    def once(self, key: Any, find: Callable[[], T]) -> T:
        """What ``find`` gives, or the UserError that it raises, found once for this model whatever the batch.

        ``key`` is the caller's own.
        """
        if key not in self._known:
            try:
                self._known[key] = find()
            except UserError as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, UserError):
            raise found
        known: T = found
        return known

    @property
    def in_parts(self) -> bool:
        """Whether parts of the files can be read by themselves, as far as quantisation goes."""
        return self.quantization is None or self.quantization in METHODS

    def refuse_quantised(self, phase: str, unpacks: bool = True) -> None:
        """Refuse files whose parts mean nothing by themselves, or any that are quantised. Raises UserError."""
        refuse_quantised(self.name, self.quantization, phase, unpacks)

    @_Known
    def config(self) -> Any:
        """Of the decoder."""
        return self.model.config.get_text_config(decoder=True)

    @_Known
    def sizes(self) -> Mapping[str, int]:
        """Bytes of every parameter by name, tied ones once."""
        return {name: each.nbytes for name, each in self.model.named_parameters()}

    @_Known
    def weights(self) -> int:
        """Bytes of the whole model."""
        return sum(self.sizes.values())

    @_Known
    def packed(self) -> Mapping[str, int]:
        """Bytes by name of the weights that are packed in few bits, before they are."""
        names = bnb.packed_names(self.model, self.packing, self.here)
        return {name: self.sizes[f"{name}.weight"] for name in names}

    @_Known
    def held(self) -> int:
        """Bytes of the whole model as it is held in memory."""
        packed = sum(self.packed.values())
        return self.weights - packed + math.ceil(packed * bnb.share_held(self.packing) / self.dtype.itemsize)

    @_Known
    def blocks(self) -> tuple[int, ...]:
        """Bytes of each block."""
        children = self.model.get_submodule(self.anatomy.blocks).children()
        return tuple(bytes_of(block) for block in children)

    @_Known
    def embedding(self) -> int:
        """Bytes of the token embedding."""
        return bytes_of(self.model.get_submodule(self.anatomy.embedding))

    @_Known
    def head(self) -> int:
        """Bytes of the output head, which may be the embedding once more."""
        head = self.model.get_output_embeddings()
        return 0 if head is None else bytes_of(head)

    @_Known
    def tied(self) -> bool:
        """Whether embedding and head are one."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_submodule(self.anatomy.embedding)
        return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)

    @_Known
    def largest(self) -> int:
        """Bytes of the largest parameter."""
        return max(self.sizes.values())

    @_Known
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)

    @_Known
    def edited_in_place(self) -> int:
        """Bytes of all weights that write to the stream but those that are packed, of which outputs are edited."""
        packed = {f"{name}.weight" for name in self.packed}
        return sum(self.sizes.get(w.weight, 0) for w in self.anatomy.writers if w.weight not in packed)

    @_Known
    def inner(self) -> int:
        """Width of the widest writer's input, experts left out."""
        widths = [w.weight_DK(self.model).shape[-1] for w in self.anatomy.writers if not _is_expert(w)]
        return max(widths, default=self.anatomy.width)

    @_Known
    def experts(self) -> Experts | None:
        """The experts of the model; None where it has none."""
        found = [writer for writer in self.anatomy.writers if _is_expert(writer)]
        if not found:
            return None
        roots = {_expert_root(writer) for writer in found}
        size = sum(bytes_of(self.model.get_submodule(root)) for root in roots)
        config, blocks = self.config, len({writer.block for writer in found})
        number = found[0].experts or len(found) // blocks
        names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k", "moe_top_k")
        stated = (getattr(config, name, None) for name in names)
        per_token = next((value for value in stated if isinstance(value, int)), 1)
        inner = found[0].weight_DK(self.model).shape[-1]
        return Experts(size, number, min(per_token, number), blocks, inner)

    @_Known
    def dense(self) -> int:
        """Bytes of what every token goes through: all but experts and the embedding, which is looked up."""
        embedding = 0 if self.tied else self.embedding
        return self.weights - embedding - (self.experts.bytes if self.experts else 0)

    @_Known
    def cached(self) -> int:
        """Bytes of keys and values of one token in all blocks."""
        config = self.config
        heads = int(getattr(config, "num_attention_heads", 1))
        width = int(getattr(config, "head_dim", None) or self.anatomy.width // heads)
        each = 2 * width * int(getattr(config, "num_key_value_heads", None) or heads)
        if not self.caches_heads:
            each = config.kv_lora_rank + config.qk_rope_head_dim
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * self.anatomy.n_blocks
        attending = sum("attention" in kind and "linear" not in kind for kind in kinds)
        return each * attending * self.dtype.itemsize

    @_Known
    def caches_heads(self) -> bool:
        """Whether keys and values are kept head by head; else one latent vector a token, of which heads make theirs."""
        return not getattr(self.config, "kv_lora_rank", None)

    @_Known
    def modules(self) -> int:
        """Modules without parts of their own in all blocks, of which each is called once a pass, experts left out."""
        experts = {_expert_root(writer) for writer in self.anatomy.writers if _is_expert(writer)}
        prefix = f"{self.anatomy.blocks}."
        inside = [
            path
            for path, module in self.model.named_modules()
            if path.startswith(prefix) and not any(True for _ in module.children())
        ]
        return sum(not any(path.startswith(f"{root}.") for root in experts) for path in inside)


@dataclass(frozen=True)
class Experts:
    """The experts of all blocks."""

    bytes: int
    number: int
    """Of one block."""
    per_token: int
    """That a token goes through."""
    blocks: int
    """That have experts."""
    inner: int
    """Width of one expert's input to its writer."""

    def touched(self, tokens: float) -> float:
        """Experts of a block that some of so many tokens go to, where they choose evenly."""
        return self.number * (1 - (1 - self.per_token / self.number) ** tokens)


def sum_of(sizes: Mapping[str, int], beginning: str) -> int:
    """Of all whose names begin so."""
    return sum(size for name, size in sizes.items() if name.startswith(beginning))


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def _is_expert(writer: Writer) -> bool:
    return writer.experts is not None or "*" in writer.path.split(".")


def _expert_root(writer: Writer) -> str:
    """The module that holds all experts of a writer's block."""
    if writer.experts is not None:
        return writer.module
    parts = writer.path.split(".")
    return ".".join(writer.module.split(".")[: -(len(parts) - parts.index("*"))])
