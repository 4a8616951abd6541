"""What every task starts from: checked inputs, a loaded model, its anatomy, its prompts as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from heretic_ds.ablation import Edit, Profile
from heretic_ds.anatomy import Anatomy, find_anatomy
from heretic_ds.engines import Engine, build_engine
from heretic_ds.loading import LoadedModel, load_model
from heretic_ds.prompts import ChatFormat, check_lengths, decode_answers, load_prompts
from heretic_ds.scoring import make_scorers
from heretic_ds.scoring.base import Scorer
from heretic_ds.search.objective import PromptSet
from heretic_ds.settings import PromptSource, Settings

KINDS = ("target", "baseline")
PARTS = ("train", "eval")


@dataclass
class Job:
    """One command's inputs. Made before anything is written, so that every mistake in them costs nothing."""

    settings: Settings
    loaded: LoadedModel
    anatomy: Anatomy
    chat: ChatFormat
    scorers: list[Scorer]
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Prompts by kind and part, such as ``target.train``."""

    @classmethod
    def check(cls, settings: Settings, with_prompts: bool = True) -> Job:
        """Read prompts, load the model and find its writers. Raises UserError for anything wrong with them."""
        texts: dict[str, list[str]] = {}
        for kind in KINDS if with_prompts else ():
            for part in PARTS:
                source: PromptSource = getattr(getattr(settings.prompts, kind), part)
                texts[f"{kind}.{part}"] = load_prompts(source, f"prompts.{kind}.{part}")
        scorers = make_scorers(settings.scoring)
        loaded = load_model(settings.model)
        anatomy = find_anatomy(loaded.model)
        job = cls(settings, loaded, anatomy, ChatFormat(loaded.tokenizer, settings.prompts), scorers, texts)
        for name in texts:
            job.check_lengths(name)
        return job

    def check_lengths(self, name: str) -> None:
        """Refuse prompts that leave no room for an answer in the model's context."""
        check_lengths(
            self.prompts(name).rows,
            self.settings.generation.max_new_tokens,
            self.loaded.model.config,
            f"prompts.{name}",
        )

    def engine(self, measured: dict[str, int]) -> Engine:
        """The model on the placement that the settings name; ``measured`` holds the batch sizes known already."""
        return build_engine(self.settings, self.loaded, self.anatomy, measured)

    def prompts(self, name: str, most: int | None = None) -> PromptSet:
        """Prompts of one kind and part (``target.train``), at most ``most``, in the current chat format."""
        texts = self.texts[name][:most]
        return PromptSet(texts, [self.chat.encode(text) for text in texts])

    def text_of(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """Answers' token ids as text."""
        return decode_answers(self.loaded.tokenizer, answers)

    def fixed_edit(self) -> Edit | None:
        """The edit that ``ablation.*`` gives, or None."""
        ablation = self.settings.ablation
        profiles = {
            component: Profile(given.max_weight, given.max_weight_position, given.min_weight, given.min_weight_distance)
            for component, given in (
                ("attention", ablation.profiles.attention),
                ("mlp", ablation.profiles.mlp),
            )
            if given.max_weight is not None
        }
        return Edit(ablation.direction_index, profiles) if profiles else None
