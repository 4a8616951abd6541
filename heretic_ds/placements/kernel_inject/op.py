"""The compiled inference kernels: built by DeepSpeed at first use, or beforehand on another machine."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import torch

from heretic_ds.checkpoint.fitness import first_line
from heretic_ds.errors import UserError
from heretic_ds.placements.deepspeed import load_op

log = logging.getLogger(__name__)

_NAME = "transformer_inference"
_BUILT = "HERETIC_DS_INFERENCE_OP"
"""Environment variable with the path of kernels that were built beforehand."""
_FAILURES = (ImportError, OSError, RuntimeError, ValueError, AssertionError)


def load_kernels() -> None:
    """Have the kernels ready, compiling them where nobody has.

    Raises UserError where they cannot be had, which is mostly for want of the CUDA toolkit's compiler.
    """
    from deepspeed.ops.op_builder import InferenceBuilder
    from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException, OpBuilder

    built = os.environ.get(_BUILT)
    try:
        if built and _NAME not in OpBuilder._loaded_ops:
            OpBuilder._loaded_ops[_NAME] = _module(Path(built))
        load_op(InferenceBuilder())
    except (*_FAILURES, CUDAMismatchException, MissingCUDAException) as error:
        raise UserError(
            f"evaluate=kernel_inject: DeepSpeed's inference kernels cannot be had here ({first_line(error)}); install "
            f"the CUDA toolkit, name a built file in {_BUILT}, or set evaluate=tensor_parallel"
        ) from error


def _module(file: Path) -> object:
    spec = importlib.util.spec_from_file_location(_NAME, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no compiled module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refuse_without_cuda(device: torch.device) -> None:
    """Raise UserError where the kernels have nothing to run on."""
    refuse_other_devices(device.type if torch.version.hip is None else "hip")


def refuse_other_devices(kind: str) -> None:
    """Raise UserError for devices of another kind than CUDA's."""
    if kind != "cuda":
        raise UserError(
            f"evaluate=kernel_inject runs on CUDA devices only, and the model's device is {kind}; "
            "set evaluate=tensor_parallel"
        )
