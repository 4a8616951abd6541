"""What the tests of exports that all ranks write run on every rank."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM

from heretic_ds.ablation import Ablation, Edit, Profile
from heretic_ds.anatomy import Anatomy, find_anatomy
from heretic_ds.checkpoint.open import ModelChoice, open_model
from heretic_ds.errors import UserError
from heretic_ds.export.checkpoint import export_model
from heretic_ds.export.streaming import EditedFiles
from heretic_ds.memory import peak_of
from heretic_ds.world import World
from tests import families

EDIT = Edit(0.4, {"attention": Profile(1.1, 1.0, 0.4, 1.5), "mlp": Profile(0.9, 0.0, 0.3, 1.5)})


def random_ablation(anatomy: Anatomy, row_norm: str = "full") -> Ablation:
    """Directions that are the same in every process."""
    generator = torch.Generator().manual_seed(0)
    directions_LD = torch.randn(anatomy.n_blocks + 1, anatomy.width, generator=generator, dtype=torch.float64)
    return Ablation(torch.nn.functional.normalize(directions_LD, dim=-1), row_norm, through_norm=True)


def export(world: World, source: str, target: str, dtype: str = "float32", overwrite: bool = False) -> None:
    """Write the edited copy of a model as all ranks do together."""
    opened = open_model(ModelChoice(path=source, device="cpu"))
    anatomy = find_anatomy(opened.skeleton())
    described, weights = EditedFiles.plan(opened, anatomy, random_ablation(anatomy), EDIT, getattr(torch, dtype))
    export_model(described, target, "card", {"schema": 1}, overwrite, weights, world)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, hidden ones included."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def files_written(world: World, source: str, target: str, dtype: str, blind: tuple[int, ...] = ()) -> list[str]:
    """:func:`export`; the names of the weight files that this rank wrote. ``blind`` ranks do not see rank 0's disk."""
    write, written = EditedFiles.write_file, []

    def noting(self: EditedFiles, folder: Path, file: str) -> None:
        written.append(file)
        write(self, folder, file)

    sees = os.path.isfile

    def sees_on_own_disk(path: Any) -> bool:
        own = world.rank not in blind or not str(path).startswith(str(Path(target).parent))
        return own and sees(path)

    with (
        mock.patch.object(EditedFiles, "write_file", noting),
        mock.patch("os.path.isfile", sees_on_own_disk),
    ):
        export(world, source, target, dtype)
    return written


def failure(world: World, source: str, target: str, where: int, kind: str) -> str:
    """What this rank says of an export for which one rank's disk is full, or in which one rank has a mistake."""
    error = {"full": OSError(errno.ENOSPC, "No space left on device"), "mistake": ValueError("a deliberate mistake")}

    def fail(*args: Any) -> None:
        raise error[kind]

    broken = mock.patch("heretic_ds.export.tensor_file._write", fail)
    try:
        if world.rank == where:
            with broken:
                export(world, source, target, overwrite=True)
        else:
            export(world, source, target, overwrite=True)
    except Exception as found:
        return f"{'user' if isinstance(found, UserError) else 'other'}: {found}"
    return "nothing"


def peak_of_export(world: World, source: str, target: str) -> int:
    """Bytes of memory that an export takes at its peak above what was used before."""
    export(world, source, f"{target}-before")  # what is made once, such as threads, is none of it
    peak = peak_of(lambda: export(world, source, target), torch.device("cpu"))
    assert peak is not None
    return peak


def save_wide(folder: Path, **options: Any) -> int:
    """Write a llama of 200 MB in few, large tensors. Returns the bytes of the largest, a writer's."""
    config = families.REQUIRED["llama"](layers=2, width=256)
    config.intermediate_size = 2**15
    model = AutoModelForCausalLM.from_config(config)
    families.randomise(model)
    model.save_pretrained(folder, **options)
    families.tokenizer().save_pretrained(folder)
    return max(parameter.nbytes for parameter in model.parameters())


if __name__ == "__main__":  # measured in a process of its own
    print(peak_of_export(World(), *sys.argv[1:]))
