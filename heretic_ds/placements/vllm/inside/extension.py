"""What vLLM's workers can be asked for beyond what they do by themselves: edits, and exact divergences.

vLLM makes :class:`Extension` a base of its worker, in each rank's process. Commands come by ``collective_rpc`` as
numbers, text and bytes, so that nothing has to be sent that could be code.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from heretic_ds.ablation import Ablation, Edit

from .passes import Divergences, Logits, Reader, References, Steps, VllmOutputEdits
from .writers import VllmEditor, find_writers, keep_weights, sum_over_ranks

keep_weights()  # vLLM imports this module before it loads the model

_TABLE_BYTES = 1 << 26
"""What tables of experts may take; none are made, since experts that differ are edited in place."""


class Extension:
    """Added to vLLM's worker; its one method finds the resident model's commands by name."""

    model_runner: Any

    def heretic(self, command: str, *arguments: Any) -> Any:
        """Carry out a command of :class:`Resident`."""
        with torch.inference_mode():  # in which vLLM has made its weights
            if command == "open":
                self._heretic_resident = Resident(self.model_runner)
            return getattr(self._heretic_resident, command)(*arguments)


class Resident:
    """One rank's part of the model that vLLM serves."""

    def __init__(self, runner: Any) -> None:
        self._runner, self._model = runner, runner.get_model()
        self._steps = Steps(runner)
        self._outputs: VllmOutputEdits | None = None
        self._reader: Reader | None = None
        self._references: dict[str, References] = {}
        self._pass = ExitStack()

    def open(self, width: int, n_blocks: int, described: list[dict[str, Any]]) -> dict[str, Any]:
        """Find the writers; gives what is true of the model. Raises UnknownModel."""
        self._anatomy = find_writers(self._model, width, n_blocks, described)
        self._editor = VllmEditor(self._model, self._anatomy)
        self._model.register_forward_pre_hook(self._begins)
        self._model.register_forward_hook(self._ends)
        config = self._runner.model_config
        return {
            "runner": f"{type(self._runner).__module__}.{type(self._runner).__name__}",
            "model": type(self._model).__name__,
            "dtype": str(config.dtype).removeprefix("torch."),
            "weights": {w.weight: list(self._model.get_parameter(w.weight).shape) for w in self._anatomy.writers},
        }

    def prepare(self, directions: bytes, shape: list[int], row_norm: str, through_norm: bool) -> str | None:
        """Take the directions of a shape [L+1, R, D], float64, of all edits to come; gives why outputs cannot be
        edited, or None."""
        directions_LRD = torch.frombuffer(bytearray(directions), dtype=torch.float64).view(shape)
        ablation = Ablation(directions_LRD, row_norm, through_norm)
        self._editor.prepare(ablation)
        self._outputs = None
        experts = [w for w in self._anatomy.writers if w.experts is not None]
        if experts and (row_norm != "none" or any(w.bias is not None for w in experts)):
            return f"vLLM's experts give their sum only, and ablation.row_norm={row_norm} edits each by itself"
        self._outputs = VllmOutputEdits(self._model, self._anatomy, ablation, sum_over_ranks(), _TABLE_BYTES)
        return None

    def set_weights(self, edit: dict[str, Any] | None) -> None:
        """Make the weights those of an edit, or the original ones."""
        self._editor.set_edit(None if edit is None else Edit.from_dict(edit))

    def begin(self, edits: list[dict[str, Any] | None], reading: dict[str, Any] | None) -> None:
        """Begin passes: outputs are those of the edits, a trial each, if there are any; logits are read as wanted."""
        self.end()
        if any(edits):
            if self._outputs is None:
                raise RuntimeError("edits of outputs were asked for where they cannot be")
            worn = [None if edit is None else Edit.from_dict(edit) for edit in edits]
            self._pass.enter_context(self._outputs.active(worn))
        if reading is not None:
            self._reader = self._reader_of(**reading)

    def _reader_of(self, kind: str, lengths: list[int], counts: list[int], name: str, forget: list[str]) -> Reader:
        what = (self._model, self._runner.model_config.get_vocab_size(), lengths, counts)
        for unused in forget:
            self._references.pop(unused, None)  # not there where they were never taken
        if kind == "logits":
            return Logits(*what)
        if kind == "divergences":
            return Divergences(*what, references=self._references[name])
        self._references[name] = References(*what)
        return self._references[name]

    def taken(self) -> list[tuple[int, int, bytes]]:
        """What was read of rows since this was asked last: trial, row, and numbers; empty but on one rank."""
        return [] if self._reader is None else self._reader.taken()

    def end(self) -> None:
        """End the passes."""
        self._pass.close()
        self._reader = None

    def digest(self) -> str:
        """A digest of all weights of this rank, to tell whether they are the same again."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _begins(self, module: Any, args: Any) -> None:
        spans = self._steps.spans()
        if self._outputs is not None and spans:
            self._outputs.assign([span.trial for span in spans for _ in range(span.count)])

    def _ends(self, module: Any, args: Any, output: Any) -> None:
        spans = self._steps.spans()
        if self._reader is not None and spans:
            if not isinstance(output, Tensor):
                raise RuntimeError(f"{type(self._model).__name__} gives no hidden states")
            self._reader.read(spans, output)
