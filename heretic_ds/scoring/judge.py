"""A model that reads prompt and answer and gives a probability. Shapes: B texts, S positions, C classes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from heretic_ds import progress
from heretic_ds.errors import UserError
from heretic_ds.fingerprint import identities
from heretic_ds.foreign.limits import in_child
from heretic_ds.foreign.reading import path_of, reading
from heretic_ds.foreign.text import in_one_line
from heretic_ds.memory import free_bytes, is_out_of_memory, release_memory
from heretic_ds.scoring.classifier_options import CAUSAL, SEQUENCE, ClassifierOptions

_SETTING = "scoring.scorers.classifier"
_REFUSING = re.compile(r"(?i)refus|reject|declin")
_FIELD = re.compile(r"\{(prompt|answer)\}")
_LIMIT = 2**20
"""Tokens from which on a tokenizer's limit means that it has none."""
_MOST_TOKENS = 8192
"""Of a text whose model names no limit."""
_OFFSET = 2
"""Positions that some families leave out before the first token."""
_SMALL = 8
"""A model that takes one part in so many of the free memory stays there."""


class Judge:
    """One classifier: opened at once, its weights read by :meth:`load`.

    Raises UserError where there is no such model, or one that cannot judge.
    """

    def __init__(self, choice: ClassifierOptions, templates: Mapping[str, str]) -> None:
        """``templates`` say what each kind of model is shown, unless the choice does."""
        self._choice, place = choice, f"{_SETTING}.model={choice.model}"
        folder = path_of(choice.model, f"{_SETTING}.model")
        self._source: Path | str = folder if folder.is_dir() else choice.model
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{place} is a file; give the folder of a model or a hub id")
        self._options: dict[str, Any] = {"revision": choice.revision} if choice.revision else {}
        with reading(place, "give the folder of a model or a hub id", "cannot be opened"):
            self._config = AutoConfig.from_pretrained(self._source, **self._options)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(self._source, **self._options)
        self.kind = choice.kind or _kind_of(self._config, place)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.convert_ids_to_tokens(0)
        self._tokenizer.padding_side = "left" if self.kind == CAUSAL else "right"
        stands_alone = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, self._tokenizer.pad_token_id)
        self._nothing = int(next(token for token in stands_alone if token is not None))
        """What stands for a text without tokens."""
        self._pieces = self._put_to(templates[self.kind] if choice.template is None else choice.template)
        self._most = _most_tokens(self._tokenizer, self._config)
        if len(self._ids({"prompt": "", "answer": ""})) > self._most:
            raise UserError(f"{_SETTING}.template leaves no room in the {self._most} tokens that {choice.model} takes")
        self._replies = self._reply_tokens() if self.kind == CAUSAL else (0, 0)
        self._class = self._label() if self.kind == SEQUENCE else 0
        self.device = _device(choice.device)
        self._batch_size = choice.batch_size
        self._model: PreTrainedModel | None = None
        self._stays = True

    @property
    def about(self) -> str:
        """What it is, in a few words."""
        if self.kind == CAUSAL:
            what = f"{self._choice.yes!r} against {self._choice.no!r} as its next token"
        else:
            what = f"its label {self._config.id2label[self._class]!r}"
        return f"{self._choice.model} on {self.device}, {what}"

    @property
    def identity(self) -> dict[str, str]:
        """Its files, or the commit of a hub model."""
        if isinstance(self._source, Path):
            return identities(self._source)
        return {"commit": str(getattr(self._config, "_commit_hash", None))}

    def load(self) -> None:
        """Read the weights, once. Raises UserError."""
        if self._model is not None:
            return
        place, auto = f"{_SETTING}.model={self._choice.model}", self._auto
        chosen = "float32" if self._choice.dtype == "auto" and self.device.type == "cpu" else self._choice.dtype
        with reading(place, "give another model", "cannot be loaded"), progress.work("loading the classifier"):
            model, info = auto.from_pretrained(
                self._source, config=self._config, dtype=chosen, use_safetensors=True, output_loading_info=True,
                **self._options,
            )  # fmt: skip
        if info["missing_keys"]:
            lacking = ", ".join(sorted(info["missing_keys"])[:3])
            raise UserError(
                f"{place} lacks {in_one_line(lacking)}, so it is no trained {self.kind} model; give another"
            )
        self._model = model.eval()
        self._model.config.pad_token_id = self._tokenizer.pad_token_id
        taken = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
        small = self.device.type == "cpu" or _SMALL * taken <= free_bytes(self.device)
        self._stays = small if self._choice.keep is None else self._choice.keep
        if self._stays:
            with self._there():
                pass

    def probabilities(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The probability for each answer, in [0, 1]."""
        self.load()
        rows = [self._encoded(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        order, found = sorted(range(len(rows)), key=lambda place: len(rows[place])), [0.0] * len(rows)
        with self._there(), progress.work("classifying", len(rows), "answers") as work:
            start = 0
            while start < len(order):
                places = order[start : start + self._batch_size]
                told = self._attempt([rows[place] for place in places])
                if told is None:
                    continue
                for place, each in zip(places, told, strict=True):
                    found[place] = each
                work.advance(len(places))
                start += len(places)
        return found

    def _attempt(self, rows: Sequence[Sequence[int]]) -> list[float] | None:
        """Probabilities of a batch; None where memory ran out, and batches are half as large from now on."""
        try:
            return self._of_batch(rows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            problem = error
        if len(rows) == 1:
            raise UserError(
                f"{_SETTING}: memory ran out on {self.device} over a single answer; set device: cpu, or a smaller model"
            ) from problem
        self._batch_size = len(rows) // 2
        del problem
        release_memory()
        return None

    @torch.inference_mode()
    def _of_batch(self, rows: Sequence[Sequence[int]]) -> list[float]:
        longest, left = max(map(len, rows)), self.kind == CAUSAL
        ids_BS = torch.full((len(rows), longest), self._tokenizer.pad_token_id)
        mask_BS = torch.zeros(len(rows), longest, dtype=torch.int64)
        for row, (ids_S, mask_S) in zip(rows, zip(ids_BS, mask_BS, strict=True), strict=True):
            span = slice(longest - len(row), None) if left else slice(0, len(row))
            ids_S[span], mask_S[span] = torch.tensor(list(row)), 1
        given: dict[str, Any] = {"input_ids": ids_BS, "attention_mask": mask_BS}
        if left:
            given["position_ids"] = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)
        inputs: dict[str, Any] = {name: each.to(self.device) for name, each in given.items() if self._accepts(name)}
        if left and self._accepts("logits_to_keep"):
            inputs["logits_to_keep"] = 1
        if self._accepts("use_cache"):
            inputs["use_cache"] = False
        logits: Tensor = self._loaded(**inputs).logits.float()
        probability_B = self._of_replies(logits[:, -1]) if left else self._of_classes(logits)
        return [float(each) for each in probability_B.tolist()]

    def _of_replies(self, logits_BV: Tensor) -> Tensor:
        """Probability of the one reply where there are only two."""
        yes, no = self._replies
        return torch.sigmoid(logits_BV[:, yes] - logits_BV[:, no])

    def _of_classes(self, logits_BC: Tensor) -> Tensor:
        alone = logits_BC.shape[1] == 1 or getattr(self._config, "problem_type", None) == "multi_label_classification"
        return (torch.sigmoid(logits_BC) if alone else torch.softmax(logits_BC, dim=-1))[:, self._class]

    def _encoded(self, prompt: str, answer: str) -> list[int]:
        """Token ids of what the model is shown. Where that is too long for it the end of the answer is left out, and if
        need be that of the prompt."""
        texts = {"answer": answer, "prompt": prompt}
        ids = self._ids(texts)
        for name in texts:
            tokens = (
                self._tokenizer(texts[name], add_special_tokens=False)["input_ids"] if len(ids) > self._most else []
            )
            while len(ids) > self._most and tokens:
                tokens = tokens[: -(len(ids) - self._most)]
                texts[name] = self._tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""
                ids = self._ids(texts)
        return ids

    def _ids(self, texts: Mapping[str, str]) -> list[int]:
        filled = "".join(texts[name] if name else text for name, text in self._pieces)
        ids: list[int] = self._tokenizer(filled, add_special_tokens=not self._put)["input_ids"]
        return ids or [self._nothing]

    @property
    def _auto(self) -> Any:
        return AutoModelForCausalLM if self.kind == CAUSAL else AutoModelForSequenceClassification

    def _accepts(self, name: str) -> bool:
        return name in inspect.signature(self._loaded.forward).parameters

    @property
    def _loaded(self) -> Any:
        if self._model is None:
            raise RuntimeError("the classifier was not loaded")
        return self._model

    @contextmanager
    def _there(self) -> Iterator[None]:
        """While the context lasts the weights are on the judge's device; unless they stay, on the host afterwards."""
        model = self._loaded
        problem: str | None = None
        try:
            model.to(self.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error)
        if problem is not None:
            model.to("cpu")  # what was moved already
            raise UserError(
                f"{_SETTING}.model={self._choice.model} does not fit on {self.device} beside the model; set "
                f"device: cpu, or a smaller one ({in_one_line(problem, 120)})"
            )
        try:
            yield
        finally:
            if not self._stays:
                model.to("cpu")
                release_memory()

    def _put_to(self, template: str) -> list[tuple[str, str]]:
        """What the model is shown, in pieces: the name of what is filled in and nothing, or nothing and text."""
        text, self._put = template, False
        if self.kind == CAUSAL and getattr(self._tokenizer, "chat_template", None):
            asked = [{"role": "user", "content": template}]
            with reading(
                f"the chat template of {self._choice.model}", "give another model", "cannot render a question"
            ):
                render = self._tokenizer.apply_chat_template
                text = in_child(lambda: str(render(asked, add_generation_prompt=True, tokenize=False)))
            if template.strip() not in text:
                raise UserError(
                    f"the chat template of {self._choice.model} leaves out what it is asked; give another model"
                )
            self._put = True
        parts = _FIELD.split(text)
        return [(part, "") if place % 2 else ("", part) for place, part in enumerate(parts)]

    def _reply_tokens(self) -> tuple[int, int]:
        """The first tokens of the two replies."""
        found = []
        for name in ("yes", "no"):
            text = getattr(self._choice, name)
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise UserError(f"{_SETTING}.{name} is {text!r}, which is no token; give a word")
            found.append(ids[0])
        if found[0] == found[1]:
            raise UserError(
                f"{_SETTING}: {self._choice.yes!r} and {self._choice.no!r} begin with the same token of "
                f"{self._choice.model}; set yes and no to other words"
            )
        return found[0], found[1]

    def _label(self) -> int:
        """The class that counts."""
        names, wanted = {int(at): str(name) for at, name in self._config.id2label.items()}, self._choice.label
        listed = ", ".join(in_one_line(name, 40) for name in names.values())
        if wanted is None:
            found = [at for at, name in names.items() if _REFUSING.search(name)] if len(names) > 1 else list(names)
        else:
            found = [at for at, name in names.items() if wanted in (name, str(at))]
        if len(found) != 1:
            given = "is not set" if wanted is None else f"is {wanted!r}"
            raise UserError(f"{_SETTING}.label {given}; choose one of the labels of {self._choice.model}: {listed}")
        return found[0]


def _kind_of(config: Any, place: str) -> str:
    architectures = config.architectures or []
    if any("SequenceClassification" in name for name in architectures):
        return SEQUENCE
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return CAUSAL
    named = in_one_line(", ".join(architectures) or "no architecture", 80)
    raise UserError(f"{place} is of {named}; set kind to sequence or causal if it is one")


def _most_tokens(tokenizer: Any, config: Any) -> int:
    """Tokens of the longest text that the model takes."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [tokenizer.model_max_length, positions - _OFFSET if isinstance(positions, int) and positions > 0 else None]
    return int(min([_MOST_TOKENS, *(limit for limit in limits if isinstance(limit, int) and 0 < limit < _LIMIT)]))


def _device(given: str) -> torch.device:
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", given) is None:
        raise UserError(f"{_SETTING}.device is {given!r}; choose auto, cpu, cuda or cuda:N")
    there = torch.cuda.is_available()
    if given == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if there else torch.device("cpu")
    if given != "cpu" and (not there or (torch.device(given).index or 0) >= torch.cuda.device_count()):
        raise UserError(f"{_SETTING}.device is {given!r}, which is not there; choose auto or cpu")
    return torch.device(given)
