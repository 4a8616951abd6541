"""The tokenizer, processor and greedy generation settings that belong to a model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from heretic_ds.checkpoint.source import CONFIG_NAME, GENERATION_NAME, PROCESSOR_FILES, TOKENIZER_FILES
from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import AGAIN, read_json, reading
from heretic_ds.foreign.text import in_one_line

log = logging.getLogger(__name__)

TRUST_HINT = "its files bring Python code of their own; set model.trust_remote_code=true if you trust its author"
_MOST_TOKENS = 2**31
_CONFIG_NAME = "tokenizer_config.json"


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
    file = folder / _CONFIG_NAME
    own_code = not trust_remote_code and file.is_file() and "auto_map" in read_json(file)
    with reading(f"the tokenizer in {folder}", TRUST_HINT if own_code else AGAIN, "cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, padding_side="left")
        if not tokenizer("a b", add_special_tokens=False)["input_ids"]:
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
        with reading(f"the processor in {folder}", "it is not needed here", "cannot be loaded"):
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except UserError as error:
        log.warning("%s", error)
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
    if not all(end is None or (isinstance(end, int) and 0 <= end < _MOST_TOKENS) for end in ends):
        place = file if own is not None else folder / CONFIG_NAME
        raise UserError(f"{place}: eos_token_id is {in_one_line(repr(ends), 60)}; expected numbers of tokens; {AGAIN}")
    ends = [end for end in dict.fromkeys([*ends, tokenizer.eos_token_id]) if end is not None]
    return GenerationConfig(
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
