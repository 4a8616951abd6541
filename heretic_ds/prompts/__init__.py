"""Prompts: where they come from, how they are put to a chat model, how they are batched."""

from heretic_ds.prompts.batching import (
    Batch,
    PromptSet,
    TokenRows,
    check_lengths,
    context_of,
    pad_left,
    room_for_answers,
)
from heretic_ds.prompts.chat import ChatFormat, decode_answers
from heretic_ds.prompts.own import OwnPrompts, as_text, read_own_prompts
from heretic_ds.prompts.parts import KINDS, PARTS, TEST, TESTS, overlaps, read_all, tell_of_overlaps
from heretic_ds.prompts.prefix import Parting, detect_response_prefix, find_response_prefix, start_apart
from heretic_ds.prompts.sources import Prompts, load_prompts, read_prompts
