"""The description of a decoder that everything else works from.

Shapes: D width of the residual stream, K width of a writer's input, E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from heretic_ds.anatomy.packing import is_packed, unpacked
from heretic_ds.anatomy.tables import Component
from heretic_ds.errors import UserError


@dataclass(frozen=True)
class Writer:
    """A weight whose product is added to the residual stream: one matrix, or one tensor holding E experts."""

    block: int
    """Index of the block, 0..L-1."""
    component: Component
    module: str
    """Full module path; for fused experts the module that holds all of them."""
    weight: str
    """Full parameter name."""
    bias: str | None
    """Full parameter name: [D], or [E, D] for experts."""
    layout: str
    """How the weight lies in memory: "DK" (Linear), "KD" (Conv1D), "EDK" or "EKD" (fused experts)."""
    norm: str | None
    """Path of the norm the output passes on its way into the stream, or None."""
    norm_offset: float
    """That norm's gain is `norm_offset + weight`."""
    experts: int | None = None
    """E for fused experts, else None."""
    inner_norm: str | None = None
    """Path of a second norm, of the same kind, between the writer and `norm` (Gemma 4's experts)."""
    path: str = ""
    """Name for people, relative to the block, an expert's index as `*`."""

    def weight_DK(self, model: nn.Module) -> Tensor:
        """The weight as a view with the stream at -2 and the writer's input at -1: [D, K], or [E, D, K].

        The view shares the parameter's memory and is outside autograd: writing into it edits the model. Raises
        UserError where the weight is packed in few bits, of which there is no such view.
        """
        if is_packed(model.get_submodule(self.module)):
            raise UserError(
                f"{self.module} holds its weight in few bits (bitsandbytes), which cannot be edited in place; edit its "
                "outputs, or load the model without quantisation"
            )
        weight = model.get_parameter(self.weight).detach()
        return weight.transpose(-1, -2) if self.layout in ("KD", "EKD") else weight

    def numbers_DK(self, model: nn.Module) -> Tensor:
        """The weight to read and not to write: the view that :meth:`weight_DK` gives, or, where it is packed in few
        bits, the matrix that these stand for, in memory of its own."""
        module = model.get_submodule(self.module)
        return unpacked(module) if is_packed(module) else self.weight_DK(model)

    def norm_gain(self, model: nn.Module) -> Tensor | None:
        """Gain γ [D], float32, with which the writer's output enters the stream; None where no norm follows.

        An RMS norm gives γ∘y / rms(y), so what reaches the stream along v vanishes when W is edited along
        normalise(γ∘v). Two norms in a row multiply their gains: the scalars 1/rms do not turn anything.
        """
        return self.gain_by(lambda name: model.get_parameter(name).detach())

    def gain_by(self, read: Callable[[str], Tensor]) -> Tensor | None:
        """The same, of weights of norms that ``read`` gives by their names."""
        if self.norm is None:
            return None
        gain = self.norm_offset + read(f"{self.norm}.weight").float()
        if self.inner_norm is not None:
            gain = gain * (self.norm_offset + read(f"{self.inner_norm}.weight").float())
        return gain


@dataclass(frozen=True)
class Anatomy:
    """Paths of a decoder's parts, from the model's root, and its writers in the order of the blocks.

    The L+1 residuals are: the first positional argument of block 0 (or its `hidden_states`), the outputs of
    blocks 0..L-2, and the output of `final_norm`. That of `embedding` is not the first: families scale it,
    project it or add positions.
    """

    decoder: str
    """The module with embedding, blocks and final norm; in a vision-language wrapper the text tower."""
    blocks: str
    """The ModuleList of the L blocks."""
    embedding: str
    final_norm: str
    """The module whose output is the last residual: the norm after the last block or, in a decoder that has
    explicitly none, the last block itself."""
    n_blocks: int
    width: int
    writers: tuple[Writer, ...]

    def summary(self) -> str:
        """One line that counts the writers per component and path, for people to check."""
        groups: dict[tuple[str, str, str], list[Writer]] = {}
        for writer in self.writers:
            norm = (writer.norm or "").rpartition(".")[2]
            groups.setdefault((writer.component, writer.path, norm), []).append(writer)
        # A stable sort: attention first, and within a component the order of the blocks.
        parts = [_count(*key, group) for key, group in sorted(groups.items(), key=lambda item: item[0][0])]
        return f"{self.n_blocks} blocks: " + ", ".join(parts)


def _count(component: str, path: str, norm: str, writers: list[Writer]) -> str:
    """E.g. "24 x 64 expert mlp writers (mlp.experts.down_proj)"."""
    number, kind = f"{len(writers)}", component
    if writers[0].experts is not None:
        number, kind = f"{number} x {writers[0].experts}", f"expert {component}"
    elif "*" in path.split("."):
        per_block = Counter(writer.block for writer in writers)
        number, kind = f"{len(per_block)} x {max(per_block.values())}", f"expert {component}"
    return f"{number} {kind} writer{'' if number == '1' else 's'} ({path}{f', then {norm}' if norm else ''})"
