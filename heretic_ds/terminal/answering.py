"""An answer of a model, passed on as it grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from heretic_ds.terminal.text import Write


class AnswerStreamer(TextStreamer):
    """Passes an answer on as it grows, by whole words, and keeps all of it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.write(text)


def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    max_new_tokens: int,
    write: Write,
    seed: int | None = None,
) -> tuple[str, bool]:
    """The answer to `ids`, passed to `write` as it comes, and whether Ctrl-C cut it short.

    The likeliest token at every step, or with a `seed` tokens drawn as the model's own generation settings say: equal
    seeds give equal answers, and the process's random numbers go on as if nothing had been drawn.
    """
    streamer = AnswerStreamer(tokenizer, write)
    inputs = torch.tensor([list(ids)], device=model.device)
    generate: Any = model.generate  # which its class inherits where it can generate at all
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices):
            if seed is not None:
                torch.manual_seed(seed)
            generate(
                inputs=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=seed is not None,
                streamer=streamer,
            )
    except KeyboardInterrupt:
        streamer.end()
        return streamer.text, True
    return streamer.text, False
