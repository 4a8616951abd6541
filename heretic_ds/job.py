"""What every task starts from: checked settings, prompts, the model's tokenizer and anatomy; its weights come later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from heretic_ds.anatomy import Anatomy, find_anatomy
from heretic_ds.loading import OpenedModel, open_model
from heretic_ds.prompts import ChatFormat, check_lengths, decode_answers, load_prompts
from heretic_ds.scoring import make_scorers
from heretic_ds.scoring.base import Scorer
from heretic_ds.search.objective import PromptSet
from heretic_ds.settings import PromptSource, Settings
from heretic_ds.world import World

KINDS = ("target", "baseline")
PARTS = ("train", "eval")


@dataclass
class Job:
    """One command's inputs. Made before anything is written, so that every mistake in them costs nothing."""

    settings: Settings
    world: World
    opened: OpenedModel
    anatomy: Anatomy
    chat: ChatFormat
    scorers: list[Scorer]
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Prompts by kind and part, such as ``target.train``."""

    @classmethod
    def check(cls, settings: Settings, world: World, with_prompts: bool = True) -> Job:
        """Read prompts, open the model and find its writers. Raises UserError for anything wrong with them."""
        texts = world.decide(lambda: _all_prompts(settings)) if with_prompts else {}
        scorers = world.agree(lambda: make_scorers(settings.scoring))
        world.decide(lambda: open_model(settings.model) and None)  # one rank downloads what all will read
        opened = world.agree(lambda: open_model(settings.model))
        anatomy = world.agree(lambda: find_anatomy(opened.skeleton()))
        chat = world.agree(lambda: ChatFormat(opened.tokenizer, settings.prompts))
        job = cls(settings, world, opened, anatomy, chat, scorers, texts)
        job.check_lengths()
        return job

    def check_lengths(self) -> None:
        """Refuse prompts that leave no room for an answer in the model's context."""
        for name in self.texts:
            rows = self.prompts(name).rows
            check_lengths(rows, self.settings.generation.max_new_tokens, self.opened.config, f"prompts.{name}")

    def prompts(self, name: str) -> PromptSet:
        """Prompts of one kind and part (``target.train``) in the current chat format."""
        texts = self.texts[name]
        return PromptSet(texts, [self.chat.encode(text) for text in texts])

    def text_of(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """Answers' token ids as text."""
        return decode_answers(self.opened.tokenizer, answers)


def _all_prompts(settings: Settings) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for kind in KINDS:
        for part in PARTS:
            source: PromptSource = getattr(getattr(settings.prompts, kind), part)
            texts[f"{kind}.{part}"] = load_prompts(source, f"prompts.{kind}.{part}")
    return texts
