"""Loads a Hugging Face causal language model: whole, finite, on one device, ready to be edited."""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.quantization_config import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config

from heretic_ds.checkpoint import Checkpoint, TensorFiles, as_if_not_packed, bnb, fill, parameters_on_meta
from heretic_ds.checkpoint.fitness import (
    choose_device,
    dtype_candidates,
    dtype_name,
    first_line,
    first_non_finite,
    forward_problem,
    own_dtype,
    some_names,
)
from heretic_ds.checkpoint.packed import METHODS, unpacked_headers
from heretic_ds.checkpoint.plausible import (
    AUTO_CLASSES,
    NEWER,
    check_headers,
    load_config,
    quantization_of,
    refuse_quantised,
)
from heretic_ds.checkpoint.source import (
    CONFIG_NAME,
    ModelSource,
    TensorInfo,
    read_config,
    read_headers,
    resolve_source,
)
from heretic_ds.checkpoint.tokens import greedy_generation_config, load_processor, load_tokenizer
from heretic_ds.errors import UnfitDtype, UserError
from heretic_ds.foreign.reading import reading
from heretic_ds.memory import release_memory

log = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")

_DEQUANTISED = "%s is quantised with %s: its weights are dequantised, and so will its edited copy be"
_SAFEST = "; set another model.dtype (float32 is the safest) or model.device."


@dataclass(frozen=True)
class ModelChoice:
    """Which model to open, and how; the names of fields are those of the settings ``model.*``, which errors name."""

    path: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    attn_implementation: str | None = None
    quantization: str = bnb.NONE

    @property
    def options(self) -> dict[str, Any]:
        """What transformers' loaders are told of it."""
        attention = {"attn_implementation": self.attn_implementation} if self.attn_implementation else {}
        return {"trust_remote_code": self.trust_remote_code, **attention}


@dataclass
class OpenedModel:
    """All of a model but its weights, which every placement lays out in its own way."""

    choice: ModelChoice
    source: ModelSource
    config: PreTrainedConfig
    headers: Mapping[str, TensorInfo]
    """What the weight files hold, by tensor name; packed weights as if they were not."""
    tokenizer: PreTrainedTokenizerBase
    processor: Any | None
    """Processor of a vision-language wrapper; None for text models."""
    device: torch.device
    quantization: str | None
    """Method by which the checkpoint is quantised; in memory is packed only what ``model.quantization`` asks for."""

    @property
    def in_parts(self) -> bool:
        """Whether parts of the weights can be read by themselves."""
        return bool(self.headers) and (self.quantization is None or self.quantization in METHODS)

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Dtypes to load the weights in, best first."""
        parameters = sum(math.prod(info.shape) for info in self.headers.values())
        return dtype_candidates(self.choice.dtype, own_dtype(self.config, self.headers), self.device, parameters)

    def skeleton(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model without memory for its weights, which are on the meta device; its buffers have their numbers."""
        attention = self.choice.attn_implementation
        advice = "set another model.attn_implementation" if attention else NEWER
        with reading(self.source.folder / CONFIG_NAME, advice, "describes no model here"), parameters_on_meta():
            config = copy.deepcopy(self.config)  # engines write their choices into it
            _forget_packing(config)
            model = _auto_class(config).from_config(config, dtype=dtype or self.dtypes[0], **self.choice.options)
        return self.ready(model)

    def checked_skeleton(self) -> PreTrainedModel:
        """:meth:`skeleton`, with which the headers of the weights were compared. Raises UserError."""
        model = self.skeleton()
        if self.in_parts:
            check_headers(model, self.headers, self.choice.path)
        return model

    def loaded(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> LoadedModel:
        """``model``, whole or its skeleton, with what goes with it; ``dtype`` is that of its weights."""
        return LoadedModel(
            model=model,
            tokenizer=self.tokenizer,
            processor=self.processor,
            source=self.source.folder,
            dtype=dtype or model.dtype,
            model_name=self.source.name,
            revision=self.source.revision,
            is_hub=self.source.is_hub,
            quantization=self.quantization,
        )

    def in_some_dtype(self, load: Callable[[torch.dtype], Loaded]) -> Loaded:
        """What ``load`` gives in the first dtype for which it does not raise :class:`UnfitDtype`.

        Where ranks load together it raises on all of them alike. What it held is free before the next dtype is tried.
        """
        for dtype, following in pairwise(self.dtypes):
            try:
                return load(dtype)
            except UnfitDtype as error:
                reason = str(error).partition(";")[0]  # without advice
            log.warning("%s; loading it in %s instead", reason, dtype_name(following))
            release_memory()  # the error that told of it held, in circles, on to what was loaded
        return load(self.dtypes[-1])

    def check_forward(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Raise UnfitDtype where a first forward of ``model``, loaded in ``dtype``, fails or is not finite."""
        problem = forward_problem(model)
        if problem is not None:
            where = f"in {dtype_name(dtype)} on {self.device}"
            raise UnfitDtype(f"a first forward of {self.choice.path} {where} {problem}{_SAFEST}")

    def empty_model(self, dtype: torch.dtype) -> tuple[PreTrainedModel, Checkpoint]:
        """The model without weights, and where they are."""
        model = self.skeleton(dtype)
        return model, Checkpoint.of(model, TensorFiles(self.source.folder, self.headers), dtype)

    def refuse_quantised(self, phase: str, unpacks: bool = True) -> None:
        """Refuse a checkpoint whose parts mean nothing by themselves, or any quantised one. Raises UserError."""
        refuse_quantised(self.choice.path, self.quantization, phase, unpacks)

    def too_large(self, dtype: torch.dtype, error: Exception) -> UserError:
        """What to say where the device has no memory for the whole model."""
        return UserError(
            f"model.path={self.choice.path} in {dtype_name(dtype)} does not fit on {self.device} "
            f"({first_line(error)}); set model.device=cpu, or a smaller model.dtype."
        )

    def ready(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same model in eval mode, without gradients, decoding greedily."""
        model.requires_grad_(False).eval()
        model.config._name_or_path = self.source.name
        model.generation_config = greedy_generation_config(self.source.folder, model.config, self.tokenizer)
        return model


@dataclass
class LoadedModel:
    """A whole model in memory, with what is needed to prompt it and to write an edited copy of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: Any | None
    """Processor of a vision-language wrapper; None for text models."""
    source: Path
    """Folder of the original checkpoint on this machine."""
    dtype: torch.dtype
    model_name: str
    """Hub id, or the folder's name."""
    revision: str | None = None
    """Commit of a hub model."""
    is_hub: bool = False
    quantization: str | None = None
    """Method by which the checkpoint is quantised; in memory is packed only what ``model.quantization`` asks for."""


def open_model(choice: ModelChoice) -> OpenedModel:
    """Find the model that is chosen and check all that its configuration and file headers can tell.

    Its device becomes the current one of this process.
    Raises UserError for anything wrong with the model or the choice, naming the file or tensor.
    """
    source = resolve_source(choice.path, choice.revision, choice.allow_pickle)
    raw = read_config(source.folder)
    headers = read_headers(source.folder, choice.allow_pickle)
    method = bnb.check_packing(choice.path, choice.quantization, raw, quantization_of(raw), bool(headers))
    bnb.check_installed(choice.path, choice.quantization, method)
    device = choose_device(choice.device)
    if device.type == "cuda":  # kernels that are no operators of PyTorch run there, and its peak of memory is asked for
        torch.cuda.set_device(device)
    opened = OpenedModel(
        choice=choice,
        source=source,
        config=load_config(choice, source, raw, headers),
        headers=as_if_not_packed(source.folder, headers)
        if method == bnb.METHOD
        else unpacked_headers(raw, headers, source.folder),
        device=device,
        tokenizer=load_tokenizer(source.folder, choice.trust_remote_code),
        processor=load_processor(source.folder, choice.trust_remote_code),
        quantization=method,
    )
    if opened.quantization is not None and opened.in_parts:
        log.warning(_DEQUANTISED, choice.path, opened.quantization)
    return opened


def load_weights(opened: OpenedModel) -> LoadedModel:
    """The whole model on its device: finite, complete, in the best dtype that a first forward runs in.

    `dtype=auto` takes the checkpoint's own and falls back where the device cannot run it or a first forward is not
    finite. Raises UserError naming the file or tensor at fault.
    """
    path, own = opened.choice.path, own_dtype(opened.config, opened.headers)

    def load(dtype: torch.dtype) -> PreTrainedModel:
        packed = opened.quantization is not None and opened.in_parts
        model = _unpack_weights(opened, dtype) if packed else _load_weights(opened, dtype)
        tensor = first_non_finite(model)
        if tensor is not None and dtype in (own, torch.float32, torch.float64):
            raise UserError(
                f"model.path={path}: tensor {tensor} holds NaN or infinite numbers; the checkpoint is damaged."
            )
        if tensor is not None:
            raise UnfitDtype(f"{tensor} of {path} is not finite in {dtype_name(dtype)}{_SAFEST}")
        opened.check_forward(model, dtype)
        return model

    return opened.loaded(opened.ready(opened.in_some_dtype(load)))


def _auto_class(config: PreTrainedConfig) -> Any:
    """The auto class that builds the checkpoint's own architecture: no tower of a wrapper is dropped."""
    wanted = (config.architectures or ["none stated"])[0]
    candidates = [auto for auto in AUTO_CLASSES if type(config) in auto._model_mapping]
    for auto in candidates:
        built = auto._model_mapping[type(config)]
        if wanted in [getattr(cls, "__name__", "") for cls in (built if isinstance(built, tuple) else (built,))]:
            return auto
    return candidates[0] if candidates else AutoModelForCausalLM


def _load_weights(opened: OpenedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Weights in `dtype` on the model's device; UserError where some are missing, for those would be left random."""
    choice, source, config, device = opened.choice, opened.source, opened.config, opened.device
    packing = bnb.loading_options(choice.quantization, opened.quantization, dtype, device, opened.skeleton)
    options = choice.options | (_dequantised(choice.path, opened.quantization) if packing is None else packing)
    if device.type != "cpu" and importlib.util.find_spec("accelerate"):
        options["device_map"] = {"": device}  # straight to the device, without a second copy in host memory
    options["use_safetensors"] = None if choice.allow_pickle else True
    with reading(f"model.path={choice.path}", found="cannot be loaded"):
        try:
            model, info = _auto_class(config).from_pretrained(
                source.folder, config=config, dtype=dtype, output_loading_info=True, **options
            )
            model = model.to(device)
        except torch.OutOfMemoryError as error:
            raise opened.too_large(dtype, error) from error
    if info["missing_keys"]:
        raise UserError(
            f"model.path={choice.path}: its weight files lack {some_names(info['missing_keys'])}, "
            f"which {type(model).__name__} needs; the checkpoint is incomplete."
        )
    if info["unexpected_keys"]:
        log.warning("not used by %s: %s", type(model).__name__, some_names(info["unexpected_keys"]))
    if packing is not None:
        bnb.settle(model, choice.path, choice.quantization, dtype)
    if opened.quantization is not None and choice.quantization == bnb.NONE:
        _forget_quantization(model)
    return model


def _unpack_weights(opened: OpenedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Weights in `dtype` on the model's device, of a packed checkpoint, as every placement reads its part of it."""
    model, checkpoint = opened.empty_model(dtype)
    try:
        fill(model, checkpoint, {}, opened.device)
    except torch.OutOfMemoryError as error:
        raise opened.too_large(dtype, error) from error
    return model


def _dequantised(path: str, method: str | None) -> dict[str, Any]:
    """Loading options under which transformers turns a quantised checkpoint into plain tensors."""
    if method is None:
        return {}
    known = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config, "compressed-tensors": CompressedTensorsConfig}
    if method not in known:
        raise UserError(
            f"model.path={path} is quantised with {method}, which cannot be edited; use the unquantised original."
        )
    log.warning(_DEQUANTISED, path, method)
    try:
        return {"quantization_config": known[method](dequantize=True)}
    except ImportError as error:
        raise UserError(f"model.path={path} is quantised with {method}: {first_line(error)}") from error


def _forget_quantization(model: PreTrainedModel) -> None:
    """Make a dequantised model an ordinary one, saved under the names of an unquantised checkpoint."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    # Undoing the conversions of this loading would write tensors under the quantised names. Models do not declare them.
    model._weight_conversions = None  # type: ignore[assignment]
    _forget_packing(model.config)


def _forget_packing(config: PreTrainedConfig) -> None:
    """Let a configuration be that of a model that is not quantised."""
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
