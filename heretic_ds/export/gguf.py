"""GGUF files of exported models, made by llama.cpp's own converter where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import path_of

CONVERTER = "convert_hf_to_gguf.py"
_HOW = (
    "install llama.cpp so that its convert_hf_to_gguf.py is on the PATH (`brew install llama.cpp`), or clone "
    "https://github.com/ggml-org/llama.cpp, `pip install -r requirements/requirements-convert_hf_to_gguf.txt` there, "
    "and set the environment variable LLAMA_CPP to that folder"
)


def find_converter() -> Path:
    """llama.cpp's converter: in the folder that ``LLAMA_CPP`` names, else on the PATH.

    Raises UserError that says how to get it.
    """
    folder = os.environ.get("LLAMA_CPP")
    if folder:
        script = path_of(folder, "LLAMA_CPP") / CONVERTER
        if not script.is_file():
            raise UserError(f"export.gguf=true: LLAMA_CPP={folder} holds no {CONVERTER}; {_HOW}")
        return script
    found = shutil.which(CONVERTER)
    if found is None:
        raise UserError(f"export.gguf=true needs llama.cpp, which was not found: {_HOW}")
    return Path(found)


def convert_to_gguf(folder: Path, name: str) -> Path:
    """Convert the model in a folder, in the precision it has; returns the file, which lies there under ``name``.

    A file of that name that is newer than the weights is left as it is. Raises UserError with the converter's last
    words; the model itself is not touched.
    """
    target = folder / f"{name}.gguf"
    weights = max(file.stat().st_mtime_ns for file in folder.glob("*.safetensors"))
    if target.is_file() and target.stat().st_mtime_ns > weights:
        return target
    partial = target.with_suffix(".gguf.partial")
    command = [sys.executable, str(find_converter()), str(folder), "--outfile", str(partial), "--outtype", "auto"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0 or not partial.is_file():
        partial.unlink(missing_ok=True)
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise UserError(f"{folder} was written, but llama.cpp could not convert it to GGUF: {said}")
    partial.chmod(0o644)
    partial.replace(target)
    return target
