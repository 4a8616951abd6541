"""What every task starts from: checked settings, prompts, the model's tokenizer and anatomy; its weights come later."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from heretic_ds.anatomy import Anatomy, find_anatomy
from heretic_ds.checkpoint import bnb
from heretic_ds.checkpoint.open import ModelChoice, OpenedModel, open_model
from heretic_ds.checkpoint.source import local_folder
from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import path_of, reading
from heretic_ds.memory import free_on_host
from heretic_ds.prompts import (
    TESTS,
    ChatFormat,
    OwnPrompts,
    Prompts,
    PromptSet,
    as_text,
    check_lengths,
    context_of,
    decode_answers,
    read_all,
    read_own_prompts,
    tell_of_overlaps,
)
from heretic_ds.scoring import make_scorers, refuse_unscreened
from heretic_ds.scoring.base import DistributionScorer, Scorer
from heretic_ds.settings import AUTO_TEST, Settings
from heretic_ds.settings.search import SCREENED
from heretic_ds.world import World

log = logging.getLogger(__name__)


@dataclass
class Job:
    """One command's inputs. Made before anything is written, so that every mistake in them costs nothing."""

    settings: Settings
    world: World
    opened: OpenedModel
    anatomy: Anatomy
    chat: ChatFormat
    scorers: list[Scorer | DistributionScorer]
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Prompts by kind and part, such as ``target.train``; ``target.test`` only where there are such prompts, and those
    of a scorer's own by ``scoring.`` and its name."""
    known_direction_D: Tensor | None = None
    """The unit direction that ``direction.compare`` names."""
    rows: dict[str, int] = field(default_factory=dict)
    """Rows of the source that each list of prompts was chosen from."""
    own: OwnPrompts = field(default_factory=OwnPrompts)
    """What scorers are given."""

    @cached_property
    def packed(self) -> frozenset[str]:
        """Paths of the modules whose weights are held in few bits."""
        quantization = self.opened.choice.quantization
        if quantization == bnb.NONE:
            return frozenset()
        return frozenset(bnb.packed_names(self.opened.skeleton(), quantization, self.opened.device))

    @property
    def held_as(self) -> str:
        """How weights are held, as ``model.quantization`` says; none where that packs nothing of this model."""
        return self.opened.choice.quantization if self.packed else bnb.NONE

    @classmethod
    def check(cls, settings: Settings, world: World, with_prompts: bool = True) -> Job:
        """Read prompts, open the model and find its writers. Raises UserError for anything wrong with them."""
        local = world.agree(lambda: local_folder(settings.model.path))  # a wrong path, before data sets are downloaded
        found = world.decide(lambda: _all_prompts(settings), "reading the prompts") if with_prompts else {}
        texts, rows = {n: each.texts for n, each in found.items()}, {n: each.rows for n, each in found.items()}
        scorers = world.agree(lambda: _scorers(settings), "making the scorers")
        own = OwnPrompts()
        if with_prompts:
            own = world.decide(lambda: read_own_prompts(scorers), "reading the scorers' prompts")
            world.decide(lambda: _check(scorers), "opening the scorers")
            texts |= {f"scoring.{name}": prompts.texts for name, prompts in own.asked.items()}
        choice = ModelChoice(**asdict(settings.model))
        opening = "downloading the model" if local is None else "opening the model"
        if world.size > 1:
            # One downloads what all will read; a machine with a cache of its own downloads as it opens the model.
            world.decide(lambda: open_model(choice) and None, opening)
            opening = "opening the model"
        opened = world.agree(lambda: open_model(choice), opening)
        anatomy = world.agree(lambda: find_anatomy(opened.checked_skeleton()))
        chat = world.agree(lambda: ChatFormat(opened.tokenizer, settings.prompts))
        known_D = world.agree(lambda: _known_direction(settings.direction.compare, anatomy.width))
        job = cls(settings, world, opened, anatomy, chat, scorers, texts, known_D, rows, own)
        job.check_lengths()
        world.decide(job.check_memory)
        return job

    def inputs(self) -> dict[str, Any]:
        """What only reading the inputs tells of them, for a run to know them again."""
        lists = {name: texts for name, texts in self.texts.items() if name not in TESTS}
        lists |= {f"scoring.{name}": prompts.texts for name, prompts in self.own.read.items()}
        found: dict[str, Any] = {f"{_setting(name)}.digest": _digest(texts) for name, texts in lists.items()}
        for scorer in self.scorers:
            found |= {f"scoring.{scorer.name}.{name}": value for name, value in scorer.inputs().items()}
        found["prompts.chat_template"] = self.template_digest()
        found["model.commit"] = self.opened.source.revision
        return found

    def template_digest(self) -> str:
        """Tells the model's own chat template from others."""
        return _digest(str(self.chat.tokenizer.chat_template))

    def check_lengths(self) -> None:
        """Refuse prompts that leave no room for an answer in the model's context; leave them out of test prompts that
        nobody named. Test prompts are looked at where final scores are taken."""
        final = self.settings.verify.final and self.settings.task.name in ("abliterate", "export")
        names = [name for name in self.texts if final or name not in TESTS]
        self.chat.prepare([text for name in names for text in self.texts[name]])
        for name in names:
            if name in TESTS and getattr(self.settings.prompts, name.partition(".")[0]).test.source == AUTO_TEST:
                self._leave_out_long(name)
            else:
                new_tokens = self.settings.generation.max_new_tokens
                check_lengths(self.prompts(name).rows, new_tokens, self.opened.config, _setting(name))

    def _leave_out_long(self, name: str) -> None:
        """Leave prompts without room for an answer out of a list, and the list out where no prompt is left."""
        texts, context = self.texts[name], context_of(self.opened.config)
        if context is None:
            return
        most = context - self.settings.generation.max_new_tokens
        fit = [text for text, row in zip(texts, self.prompts(name).rows, strict=True) if len(row) <= most]
        if len(fit) == len(texts):
            return
        log.info(
            "prompts.%s: %d of %d prompts are left out: they have no room for generation.max_new_tokens=%d in the "
            "model's context of %d",
            name, len(texts) - len(fit), len(texts), self.settings.generation.max_new_tokens, context,
        )  # fmt: skip
        self.texts[name] = fit
        if not fit:
            del self.texts[name]

    def check_memory(self) -> None:
        """Refuse what scorers would keep on the host where that has no room for it."""
        vocabulary = getattr(self.opened.config.get_text_config(decoder=True), "vocab_size", 0)
        for scorer in self.scorers:
            if isinstance(scorer, DistributionScorer):
                name = self.own.usual.get(scorer.name, f"scoring.{scorer.name}")
                needed, free = scorer.kept_bytes(len(self.texts.get(name, ())), vocabulary), free_on_host()
                if needed > free:
                    raise UserError(
                        f"scoring.scorers: {scorer.name} keeps {needed / 1e9:.1f} GB of the original's distributions, "
                        f"but {free / 1e9:.1f} GB of memory are free; lower its tokens, or give it fewer prompts"
                    )

    def prompts(self, name: str) -> PromptSet:
        """Prompts of one kind and part (``target.train``) in the current chat format."""
        texts = self.texts[name]
        self.chat.prepare(texts)
        return PromptSet(texts, [self.chat.encode(text) for text in texts])

    def own_prompts(self, usual: Mapping[str, PromptSet]) -> dict[str, PromptSet]:
        """What each scorer is given in the current chat format, by name; ``usual`` are the lists that they may name."""
        found: dict[str, PromptSet] = {}
        for scorer in self.scorers:
            listed = self.own.usual.get(scorer.name)
            if isinstance(scorer, DistributionScorer) and scorer.reads_text:
                texts = self.own.read[scorer.name].texts if listed is None else self.texts[listed]
                found[scorer.name] = as_text(texts, scorer.reads_text, self.opened.tokenizer, self.opened.config)
            else:
                found[scorer.name] = self.prompts(f"scoring.{scorer.name}") if listed is None else usual[listed]
        return found

    def text_of(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """Answers' token ids as text."""
        return decode_answers(self.opened.tokenizer, answers)


def _scorers(settings: Settings) -> list[Scorer | DistributionScorer]:
    scorers = make_scorers(settings.scoring)
    if settings.search.strategy == SCREENED and settings.task.name == "abliterate":
        refuse_unscreened(scorers[0])
    return scorers


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _check(scorers: Sequence[Scorer | DistributionScorer]) -> None:
    for scorer in scorers:
        scorer.check()


def _setting(name: str) -> str:
    """The override prefix of a list of prompts."""
    kind, _, rest = name.partition(".")
    return f"scoring.scorers.{rest}.prompts" if kind == "scoring" else f"prompts.{name}"


def _known_direction(file: str | None, width: int) -> Tensor | None:
    if file is None:
        return None
    path, place = path_of(file, "direction.compare"), f"direction.compare={file}"
    with (
        reading(place, "give another one", "is no safetensors file with a tensor `direction`"),
        safe_open(path, framework="pt") as tensors,
    ):
        direction_D = tensors.get_tensor("direction").double()
    if direction_D.shape != (width,):
        raise UserError(
            f"direction.compare={file} holds a direction of shape {tuple(direction_D.shape)}, but the model's residual "
            f"stream is {width} wide"
        )
    return torch.nn.functional.normalize(direction_D, dim=0)


def _all_prompts(settings: Settings) -> dict[str, Prompts]:
    found = read_all(settings.prompts, settings.verify.prompts)
    tell_of_overlaps({name: each.texts for name, each in found.items()})
    return found
