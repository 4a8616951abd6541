"""A model as it can be known without its weights: what a plan is made from."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from heretic_ds.checkpoint import bnb
from heretic_ds.checkpoint.fitness import own_dtype
from heretic_ds.checkpoint.open import ModelChoice, OpenedModel
from heretic_ds.checkpoint.packed import unpacked_headers
from heretic_ds.checkpoint.plausible import load_config, quantization_of
from heretic_ds.checkpoint.source import has_pickled_alone, outline_source, read_config


@dataclass
class Outline(OpenedModel):
    """A model to plan for and not to load: its weight files need not be here, nor need its device.

    Where there are no weight files there are no headers, and its skeleton is all that tells of shapes.
    """

    _skeletons: dict[torch.dtype | None, PreTrainedModel] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, opened: OpenedModel) -> Outline:
        """The same model, whose skeleton is built once and copied for each placement that is asked about it."""
        return cls(**vars(opened))

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Dtypes to load the weights in, best first; a GPU that is elsewhere is taken to run the checkpoint's own."""
        elsewhere = self.device.type == "cuda" and not torch.cuda.is_available()
        if elsewhere and self.choice.dtype == "auto":
            return [own_dtype(self.config, self.headers)]
        return super().dtypes

    def skeleton(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model without memory for its weights: a copy, which whoever asks may take apart, of one that is built
        once, which takes several times as long."""
        if dtype not in self._skeletons:
            self._skeletons[dtype] = super().skeleton(dtype)
        return copy.deepcopy(self._skeletons[dtype])

    def ready(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same model in eval mode and without gradients. It will say nothing, so nothing tells it how."""
        return cast(PreTrainedModel, model.requires_grad_(False).eval())


def outline_model(choice: ModelChoice, device: torch.device) -> Outline:
    """The outline of a model on a device, of this machine or of another. Raises UserError as ``open_model`` does."""
    source, headers = outline_source(choice.path, choice.revision)
    raw = read_config(source.folder)
    known = not has_pickled_alone(source, headers)
    method = bnb.check_packing(choice.path, choice.quantization, raw, quantization_of(raw), known)
    nobody: Any = None  # reads or writes text for it
    return Outline(
        choice=choice,
        source=source,
        config=load_config(choice, source, raw, headers),
        headers=unpacked_headers(raw, headers, source.folder),
        tokenizer=nobody,
        processor=None,
        device=device,
        quantization=method,
    )
