"""Safetensors files written tensor by tensor: the library's own bytes, whatever they hold."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from heretic_ds.checkpoint.source import STORED_DTYPES
from heretic_ds.export.tensor_file import TensorForm, write_tensors

ODD_NAMES = ('quote" back\\slash', "tab\tline\n\x1f\x7f", "ünïcödé \u2028 \U0001f600", "", "a.b/c")


def forms_of(tensors):
    return {name: TensorForm(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def powers(*shape):
    """Numbers of a dtype that has exponents alone."""
    return torch.randint(-3, 4, shape).float().exp2().to(torch.float8_e8m0fnu)


def every_dtype():
    """Tensors of every dtype, in an order of names that is not that of dtypes; two of each."""
    tensors = {}
    for i, dtype in enumerate(STORED_DTYPES.values()):
        for j in range(2):
            tensors[f"{(7 * i) % 12:02d}.{j}"] = (
                torch.randn(3, 5 + j).mul(10).to(dtype) if dtype != torch.float8_e8m0fnu else powers(3, 5 + j)
            )
    return tensors


@pytest.mark.parametrize("metadata", [{"format": "pt"}, None])
def test_files_are_those_that_the_library_writes(metadata, tmp_path):
    tensors = every_dtype() | {name: torch.randn(2, i) for i, name in enumerate(ODD_NAMES)}
    tensors |= {"scalar": torch.tensor(1.5), "none": torch.empty(4, 0), "halves": torch.randn(7).bfloat16()}
    save_file(tensors, tmp_path / "expected", metadata)
    write_tensors(tmp_path / "written", forms_of(tensors), lambda name: tensors[name].split(2) if tensors[name].dim()
                  else [tensors[name]], metadata)  # fmt: skip
    assert (tmp_path / "written").read_bytes() == (tmp_path / "expected").read_bytes()
    with safe_open(tmp_path / "written", framework="pt") as file:
        assert file.metadata() == metadata and set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found.double(), tensor.double())


def test_further_metadata_is_kept_in_one_order(tmp_path):
    metadata = {"z": "1", "format": "pt", "a": "2"}
    for name, order in (("one", metadata), ("two", dict(reversed(metadata.items())))):
        write_tensors(tmp_path / name, {"x": TensorForm((2,), torch.float32)}, lambda _: [torch.ones(2)], order)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safe_open(tmp_path / "one", framework="pt") as file:
        assert file.metadata() == metadata and torch.equal(file.get_tensor("x"), torch.ones(2))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([torch.ones(3)], "x takes 16 bytes, but 12 were given"),
        ([torch.ones(4), torch.ones(1)], "x takes 16 bytes, but 20 were given"),
        ([torch.ones(4, dtype=torch.int32)], "in torch.int32"),
    ],
    ids=["too few", "too many", "another dtype"],
)
def test_pieces_that_do_not_make_up_a_tensor_are_refused(parts, said, tmp_path):
    with pytest.raises(RuntimeError, match=said):
        write_tensors(tmp_path / "file", {"x": TensorForm((2, 2), torch.float32)}, lambda _: parts)


def test_no_file_is_written_over_and_a_written_one_is_on_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    forms = {"x": TensorForm((2,), torch.float32)}
    write_tensors(tmp_path / "file", forms, lambda _: [torch.ones(2)])
    content = (tmp_path / "file").read_bytes()
    assert synced == [len(content)]
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "file", forms, lambda _: [torch.zeros(2)])
    assert (tmp_path / "file").read_bytes() == content
