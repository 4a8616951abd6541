"""The tokenizer, processor and greedy generation settings that belong to a model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from heretic_ds.checkpoint.fitness import first_line
from heretic_ds.checkpoint.source import GENERATION_NAME, PROCESSOR_FILES, TOKENIZER_FILES, read_json
from heretic_ds.errors import UserError

log = logging.getLogger(__name__)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has files of a tokenizer, beside chat templates."""
    vocabulary = [pattern for pattern in TOKENIZER_FILES if not pattern.startswith(("chat_template", "additional"))]
    return any(next(folder.glob(pattern), None) for pattern in vocabulary)


def load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the left; UserError where there is none.

    A tokenizer without a padding token gets its end-of-text token for that, else its unknown token, else
    token 0.
    """
    if not has_tokenizer(folder):
        raise UserError(f"{folder} has no tokenizer files; copy the model's tokenizer.json and its config there.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, padding_side="left")
        ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    except Exception as error:  # every backend has exceptions of its own for files it cannot read
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
    if not ids:
        raise UserError(f"the tokenizer in {folder} has no vocabulary; its tokenizer.json or model is missing.")
    if tokenizer.pad_token_id is None:
        fallback = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.pad_token = fallback
        log.info("the tokenizer has no padding token: padding with %r", fallback)
    return tokenizer


def load_processor(folder: Path, trust_remote_code: bool) -> Any | None:
    if not any(next(folder.glob(pattern), None) for pattern in PROCESSOR_FILES):
        return None
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("the model's processor is not needed here and cannot be loaded: %s", first_line(error))
        return None
    return None if isinstance(processor, PreTrainedTokenizerBase) else processor


def greedy_generation_config(
    folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """Greedy decoding that keeps nothing of the model's own settings but the tokens at which answers end."""
    file = folder / GENERATION_NAME
    own = read_json(file).get("eos_token_id") if file.is_file() else None
    ends = own if own is not None else config.get_text_config().eos_token_id
    ends = list(ends) if isinstance(ends, list | tuple) else [ends]
    ends = [end for end in dict.fromkeys([*ends, tokenizer.eos_token_id]) if end is not None]
    return GenerationConfig(
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
