"""An engine as the language model that lm-evaluation-harness asks; imports the harness, so import this when used.

Every rank asks the same questions in the same order, and the engine shares them out and gathers the answers: to the
harness each rank is alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from heretic_ds.errors import UserError
from heretic_ds.placements.base import Evaluating
from heretic_ds.prompts import ChatFormat

DEFAULT_ANSWER_TOKENS = 256
"""Longest answer where a task names none: the harness's own number."""

_Pair = tuple[Any, list[int], list[int]]
"""What a request is known by, its context and the continuation that is scored, as token ids."""


class EngineModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """Log-likelihoods and greedy answers of the weights as they are in an engine.

    Contexts that are too long lose their beginning, as under the harness's own models.
    """

    def __init__(self, engine: Evaluating, chat: ChatFormat, config: Any, answer_tokens: int) -> None:
        """``answer_tokens`` is the longest answer that the engine gives. Raises UserError where it leaves no room."""
        super().__init__()
        self.tokenizer: Any = chat.tokenizer
        self._chat, self._engine, self._most = chat, engine, answer_tokens
        self._given_sizes = dict(engine.batch_sizes)
        self.max_length: int = resolve_max_length(config, chat.tokenizer)
        """Tokens of the longest text."""
        if answer_tokens >= self.max_length:
            raise UserError(
                f"benchmark.tasks: a task wants answers of {answer_tokens} tokens, which leaves no room in the model's "
                f"context of {self.max_length}; leave it out"
            )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """By which the harness would know requests again that it has cached."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; what the tokenizer begins texts with is not put before one that has it already."""
        begun = string.startswith(self.tokenizer.decode(self.prefix_token_id))
        special = False if add_special_tokens is None and begun else add_special_tokens
        given = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model continues."""
        return self._chat.render_conversation(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is what the model would answer) of each (context, continuation)."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood, in nats, of each whole text: windows of the longest length, each token counted once."""
        windows, owners = [], []
        for place, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(place)
        totals = [0.0] * len(requests)
        for place, (found, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[place] += found
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[_Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-likelihood in nats of the continuation, whether it is what the model would answer) of each request.

        Continuations of about one length are asked together, for a pass keeps the logits of as many positions of each
        row as its longest continuation has. Raises UserError for one that cannot be scored.
        """
        if not all(0 < len(continuation) <= self.max_length for _, _, continuation in requests):
            raise UserError(
                "benchmark.tasks: a task has a choice that is no token of its own, or longer than the model's context "
                f"of {self.max_length} tokens; leave that task out"
            )
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for places in _together([len(continuation) for _, _, continuation in requests]):
            wholes = [[*requests[place][1], *requests[place][2]][-(self.max_length + 1) :] for place in places]
            scored = [requests[place][2] for place in places]
            prompts = [whole[: -len(each)] for whole, each in zip(wholes, scored, strict=True)]
            self._measure_anew("kl")
            read = _reader(scored)
            [values] = self._engine.distributions(prompts, [None], read, [each[:-1] for each in scored])
            for place, value in zip(places, values, strict=True):
                found[place] = _unpacked(value)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy answer to each request, up to its stop texts or its number of tokens.

        Raises UserError for tasks that want answers to be drawn at random.
        """
        answers = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(wanted(request.args[1]), []).append(place)
        end = self.tokenizer.decode([self.eot_token_id])
        for (most, until), places in groups.items():
            if most > self._most:
                raise ValueError(f"{most} tokens are asked of an engine whose answers end at {self._most}")
            room = self.max_length - most
            stops = (*until, end)
            rows = [self.tok_encode(requests[place].args[0])[-room:] for place in places]
            self._measure_anew("generate")
            [found] = self._engine.generate(rows, [None], self._ended(most, stops))
            for place, tokens in zip(places, found, strict=True):
                text = self.tokenizer.decode(tokens[:most], skip_special_tokens=True)
                answers[place] = postprocess_generated_text(text, list(stops), None)
        return answers

    def _ended(self, most: int, stops: Sequence[str]) -> Callable[[Sequence[Sequence[int]]], list[bool]]:
        """Whether an answer is as long as it may be, or a stop text stands at its end."""
        # A token has at least a byte as a rule; one more for the character that the tail may cut.
        tail = 2 + max((len(stop.encode()) for stop in stops), default=0)

        def ended(answers: Sequence[Sequence[int]]) -> list[bool]:
            texts = self.tokenizer.batch_decode([answer[-tail:] for answer in answers], skip_special_tokens=True)
            return [
                len(answer) >= most or any(stop in text for stop in stops if stop)
                for answer, text in zip(answers, texts, strict=True)
            ]

        return ended

    def _measure_anew(self, phase: str) -> None:
        """Requests of another length want batches of another size, unless the user gave one."""
        if phase not in self._given_sizes:
            self._engine.batch_sizes.pop(phase, None)


def _together(lengths: Sequence[int]) -> list[list[int]]:
    """Places of lengths, those within a factor of two of each other in one list."""
    groups: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        groups.setdefault(length.bit_length(), []).append(place)
    return [groups[size] for size in sorted(groups)]


def _reader(continuations: Sequence[Sequence[int]]) -> Callable[[Sequence[int], Sequence[Tensor]], list[float]]:
    """Reads a number of each row: log-likelihood and greediness, see :func:`_packed`."""

    def read(places: Sequence[int], logits: Sequence[Tensor]) -> list[float]:
        found = []
        for place, each_KV in zip(places, logits, strict=True):
            token_K1 = torch.tensor(continuations[place], device=each_KV.device)[:, None]
            log_KV = each_KV.float().log_softmax(-1)
            greedy = bool((each_KV.argmax(-1, keepdim=True) == token_K1).all())
            found.append(_packed(log_KV.gather(-1, token_K1).sum().item(), greedy))
        return found

    return read


def _packed(loglikelihood: float, greedy: bool) -> float:
    """Both in the one number that a row may give. A log-likelihood is at most 0, so its sign is free to tell what is
    not greedy; a continuation that is certain, at 0, is greedy."""
    return loglikelihood if greedy else -loglikelihood


def _unpacked(value: float) -> tuple[float, bool]:
    return -abs(value), value <= 0


def wanted(generation: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Most tokens and stop texts of a request. Raises UserError for what is not greedy."""
    given = normalize_gen_kwargs(generation, DEFAULT_ANSWER_TOKENS)
    if given.get("do_sample") and given.get("temperature", 1.0) > 0:
        raise UserError(
            "a task draws its answers at random, where decoding here is greedy; leave it out of benchmark.tasks"
        )
    return int(given["max_gen_toks"]), tuple(given.get("until") or ())
