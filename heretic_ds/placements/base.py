"""What a placement is, and what the engines that it builds offer, whatever lies behind them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Optional, Protocol

import torch
from transformers import PreTrainedModel

from heretic_ds.ablation import Ablation, Edit
from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint import bnb
from heretic_ds.checkpoint.open import LoadedModel, load_weights
from heretic_ds.checkpoint.sharing import read_part
from heretic_ds.directions import Captures
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.errors import UserError
from heretic_ds.placements.costs import Cost, Facts, Resources, divisors
from heretic_ds.prompts import TokenRows
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.engine import Runner, RunnerOptions, Traits
from heretic_ds.scoring.base import Decided, GivesDistributions

if TYPE_CHECKING:
    from heretic_ds.job import Job

log = logging.getLogger(__name__)


class Engine(Protocol):
    """One model on its devices."""

    whole: LoadedModel | None
    """The model where it lies whole in this process, so that it can be written or talked to; else None."""

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Rows per batch by phase (``capture``, ``kl``, ``generate``), as set, measured, or halved."""
        ...

    @property
    def batch_bytes(self) -> dict[str, int]:
        """By phase, where a batch size was measured here: what such batches take beside the weights; 0: not asked."""
        ...

    @property
    def degree(self) -> int:
        """Ranks that hold one replica of the model together."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as loaded."""
        ...

    def close(self) -> None:
        """Release the model's memory; the engine is of no use afterwards."""
        ...


class Capturing(Engine, Captures, Protocol):
    """An engine for the original model."""

    def generate(
        self, prompts: TokenRows, edits: Sequence[None], decided: Decided | None = None, at_once: int = 0
    ) -> list[list[list[int]]]:
        """Greedy answers of the original model; see :meth:`Evaluating.generate`.

        With ``at_once``, so many rows are in a batch where its size was not measured yet, which this then leaves open.
        """
        ...


class Evaluating(Engine, GivesDistributions, Protocol):
    """An engine for edited models.

    ``distributions`` and ``generate`` take up to ``max_edits_per_pass`` edits at once and leave the weights as they
    found them, as far as a caller can tell; ``apply`` edits the weights themselves until ``restore``. An edit of None
    stands for the weights as they are.
    """

    max_edits_per_pass: int

    def prepare(self, ablation: Ablation) -> None:
        """Take the directions that every later edit refers to."""
        ...

    def generate(
        self, prompts: TokenRows, edits: Sequence[Edit | None], decided: Decided | None = None
    ) -> list[list[list[int]]]:
        """Greedy answers as token ids, without the end token: ``[edit][prompt][token]``."""
        ...

    def apply(self, edit: Edit) -> None:
        """Edit the weights."""
        ...

    def restore(self) -> None:
        """Bring every weight back, bit for bit."""
        ...


class Placement(ABC):
    """How one replica of the model lies on ranks during one phase: ``conf/<phase>/*.yaml`` name one of these classes.

    A placement refuses options that exclude one another when it is made, before anything is read.
    """

    name: ClassVar[str]
    """What messages and results call it: the name of its files in ``conf/``."""
    phases: ClassVar[frozenset[str]]
    """Those that it serves: ``capture``, whose engine is a :class:`Capturing`, ``evaluate``, an :class:`Evaluating`."""
    whole: ClassVar[bool] = False
    """Whether every rank holds the whole model, so that a replica is one rank."""
    resident: ClassVar[bool] = False
    """Whether its engine holds, on every rank, the model with the modules that transformers gave it."""
    in_process: ClassVar[bool] = True
    """Whether the model lies in the ranks' own processes, where any question can be put to it."""
    burden: ClassVar[int] = 10
    """How much can go wrong with it: of two that take about the same time the planner takes the lower."""
    packs: ClassVar[bool] = False
    """Whether weights may be packed in few bits, as ``model.quantization`` says."""
    graphs: ClassVar[bool] = False
    """Whether steps of decoding may be captured as CUDA graphs: no rank waits for another within them."""

    @dataclass
    class Options:
        """What can be set of every placement."""

        degree: Optional[int] = None  # noqa: UP045 (for the structured config)
        """Ranks per replica; null: as many as the placement can use."""

    options: Options

    def __init__(self, phase: str, options: Options) -> None:
        self.phase, self.options = phase, options
        if self.whole and options.degree not in (None, 1):
            raise UserError(
                f"{phase}.degree is {options.degree}, but a {self.name} model lies on one rank; leave it null"
            )

    def obstacle_to_packing(self, quantization: str) -> str | None:
        """Why weights cannot be held as ``model.quantization`` says; None where they can."""
        if self.packs or quantization == bnb.NONE:
            return None
        return (
            f"model.quantization={quantization} packs whole matrices, of which {self.phase}={self.name} holds parts or "
            f"copies of its own; set {self.phase}=replicated, or model.quantization={bnb.NONE}"
        )

    def layout(self, ranks: int) -> tuple[type[Placement], Options]:
        """All that decides how the model lies, the degree as a number: phases share an engine where it is equal."""
        degree = self.options.degree or (1 if self.whole else ranks)
        return type(self), replace(self.options, degree=degree)

    def check(self, job: Job) -> None:  # noqa: B027 (not every placement has something to refuse)
        """Refuse, before any weight is read, what this placement or this rank's machine cannot serve.

        Raises UserError that says what to set instead.
        """

    @classmethod
    def variants(cls, phase: str, facts: Facts, resources: Resources) -> Sequence[dict[str, Any]]:
        """Options, beside the defaults, that the planner tries out: here every number of ranks that divides theirs."""
        return [{}] if cls.whole else [{"degree": degree} for degree in divisors(resources.ranks) if degree > 1]

    def cost(self, facts: Facts, resources: Resources) -> Cost | None:
        """What a model of these facts takes on these resources, without weights and ranks; None where unknown.

        Raises UserError for a model that :meth:`check` would refuse.
        """
        return None

    @abstractmethod
    def build(self, job: Job) -> Engine:
        """The engine, once :meth:`check` has accepted the job on every rank. Raises UserError, on every rank."""


def load_whole(job: Job) -> LoadedModel:
    """The whole model on every rank's device, read by ranks of one machine together where ``load.share`` says so.

    Every rank calls it. Raises UserError, on every rank, naming the file or tensor at fault.
    """
    world, opened = job.world, job.opened
    if not job.settings.load.share or world.size == 1:
        return world.agree(lambda: load_weights(opened), "reading the weights")
    machine = world.machine()
    if machine.most == 1 or not opened.in_parts or opened.choice.quantization != bnb.NONE:
        why = "there is one rank on each machine" if machine.most == 1 else "weights are quantised or not safetensors"
        log.info("load.share=true does nothing: %s", why)
        return world.agree(lambda: load_weights(opened), "reading the weights")

    def load(dtype: torch.dtype) -> PreTrainedModel:
        place, degree = machine.ranks.index(world.rank), len(machine.ranks)
        model, checkpoint = world.agree(lambda: read_part(opened, dtype, place, degree), "reading the weights")
        checkpoint.exchange(machine.group)
        world.agree(lambda: opened.check_forward(model, dtype))
        return model

    return opened.loaded(opened.in_some_dtype(load))


def runner_of(
    job: Job,
    model: PreTrainedModel,
    comm: Comm,
    traits: Traits,
    anatomy: Anatomy | None = None,
    editor: WeightEditor | None = None,
) -> Runner:
    """The engine over a model that a placement has laid out; ``anatomy`` is the model's where that has changed it."""
    chosen = job.settings.generation
    options = RunnerOptions(chosen.max_new_tokens, chosen.batch_size, chosen.cuda_graphs, chosen.prefill_reuse)
    return Runner(model, anatomy or job.anatomy, job.opened.tokenizer, options, comm, traits, editor)
