"""What tests of bitsandbytes share: whether it is here, tiny models that it packs, and files that it has packed."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests import families

PACKED = ("bnb_4bit", "bnb_8bit")
WIDTH = 64
"""All but MLP writers of such models are packed in 4 bits: their 96 inputs are no whole number of blocks."""

needs_bnb = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("bitsandbytes", "accelerate")),
    reason='bitsandbytes is not installed: pip install "heretic-ds[bnb]"',
)


def config(quantization: str) -> BitsAndBytesConfig:
    """What transformers is told to pack as the setting does."""
    if quantization == "bnb_8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def save_packed(source: Path, folder: Path, quantization: str) -> Path:
    """The model of a folder as transformers stores it where bitsandbytes has packed it."""
    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=config(quantization), dtype=torch.float32, device_map={"": "cpu"}
        )
        model.save_pretrained(folder)
        for file in source.glob("*token*"):
            shutil.copyfile(file, folder / file.name)
        for file in source.glob("chat_template*"):
            shutil.copyfile(file, folder / file.name)
    return folder


def tiny(family: str, folder: Path, width: int = WIDTH) -> Path:
    """A saved model whose matrices are wide enough to be packed."""
    return folder if folder.exists() else families.save(family, folder, width=width)
