"""The parts of a run as functions, on a model that is in memory already: ``import heretic_ds as hd`` offers them.

``hd.capture`` finds directions, ``hd.ablated`` and ``hd.apply`` remove one from a model, for a while or for good,
``hd.score`` says what that does, and ``hd.load_run`` reads what a run of the command has found. They take any causal
language model of transformers whose anatomy is known, on one device, and leave it as they found it.

Shapes: L blocks, D width of the residual stream, R directions of an edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heretic_ds.ablation import COMPONENTS, ROW_NORMS, Ablation, Edit, Profile
from heretic_ds.anatomy import Anatomy, find_anatomy, has_expert_dispatch
from heretic_ds.checkpoint.open import ModelChoice, load_weights, open_model
from heretic_ds.conf_files import choice
from heretic_ds.directions import METHODS, Request
from heretic_ds.edits.outputs import OutputEdits
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.errors import UserError
from heretic_ds.prompts import ChatFormat, PromptSet, decode_answers
from heretic_ds.runner.engine import Runner, RunnerOptions
from heretic_ds.scoring import RefusalScorer
from heretic_ds.search.objective import Objective
from heretic_ds.settings import PromptSettings
from heretic_ds.world import World

_EXPERTS = "_experts_implementation"
"""Attribute of configurations by which transformers looks up how experts are computed."""


@dataclass(frozen=True)
class Chat:
    """How prompts are put to a model; all by its chat template."""

    system: str | None = None
    """System prompt."""
    response_prefix: str = ""
    """Text that every answer is made to start with."""
    template: str | None = None
    """A Jinja chat template, or the path of a file that holds one, in the place of the model's own."""

    def form(self, tokenizer: Any) -> ChatFormat:
        """The same for one tokenizer. Raises UserError where it has no chat template that renders a prompt."""
        settings = PromptSettings(system=self.system, response_prefix=self.response_prefix, template=self.template)
        return ChatFormat(tokenizer, settings)


@dataclass(frozen=True)
class ModelEdit:
    """One edit with all it takes to make it: what :func:`ablated`, :func:`apply` and :func:`score` are given."""

    ablation: Ablation
    """Directions, and the form of the edit."""
    edit: Edit
    """Profiles, and which direction."""


@dataclass(frozen=True)
class Directions:
    """What :func:`capture` finds."""

    directions_LD: Tensor
    """Unit directions [L+1, D], float64, on the CPU: of the embedding output, then of the stream after each block.
    Block i uses entry i+1. Of several directions a layer: orthonormal ones, [L+1, R, D]."""
    target_mean_LD: Tensor
    """Mean residuals of the target prompts, [L+1, D]; with ``method="median_of_means"`` that is what they are."""
    baseline_mean_LD: Tensor
    """The same of the baseline prompts."""

    def edit(
        self,
        attention: Profile | float = 1.0,
        mlp: Profile | float = 1.0,
        *,
        direction_index: float | None = None,
        row_norm: str = "full",
        through_norm: bool = False,
    ) -> ModelEdit:
        """An edit along these directions.

        ``attention`` and ``mlp`` are ablation weights: one for all layers (0: no edit), or a profile over them. The
        other arguments are the settings ``ablation.*`` of the command. Raises UserError for a mode that there is not.
        """
        if row_norm not in ROW_NORMS:
            raise UserError(f"row_norm is {row_norm!r}; choose one of {', '.join(ROW_NORMS)}")
        if direction_index is not None and direction_index < 0:
            raise UserError(f"direction_index is {direction_index}; it has to be at least 0, or None")
        last = len(self.directions_LD) - 2
        given = dict(zip(COMPONENTS, (attention, mlp), strict=True))
        profiles = {
            component: profile if isinstance(profile, Profile) else Profile(profile, 0.0, profile, last + 1.0)
            for component, profile in given.items()
        }
        return ModelEdit(Ablation(self.directions_LD, row_norm, through_norm), Edit(direction_index, profiles))


@dataclass(frozen=True)
class Scores:
    """What :func:`score` measures."""

    refusals: float
    """Answers to the target prompts that contain a marker, or are empty."""
    original_refusals: float
    """The same of the model without the edit."""
    kl: float
    """Mean KL divergence of the first answer token from the model without the edit, over the baseline prompts, nats."""
    target_prompts: int
    baseline_prompts: int


def load(
    path: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantization: str = "none",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, from a hub id or a folder: whole, finite, in eval mode, quantised ones dequantised.

    With ``quantization`` of ``bnb_4bit`` or ``bnb_8bit`` its weights are packed by bitsandbytes: :func:`capture`,
    :func:`ablated` and :func:`score` take such a model, :func:`apply` does not. Arguments are the settings ``model.*``
    of the command. Raises UserError for what is wrong with them.
    """
    choice = ModelChoice(path, revision, dtype, device, trust_remote_code, quantization=quantization)
    loaded = load_weights(open_model(choice))
    return loaded.model, loaded.tokenizer


def capture(
    model: PreTrainedModel,
    tokenizer: Any,
    target: Sequence[str],
    baseline: Sequence[str],
    *,
    orthogonalize: bool = True,
    winsorize_quantile: float = 1.0,
    method: str = "mean_difference",
    rank: int = 1,
    groups: int = 9,
    chat: Chat | None = None,
    batch_size: int = 0,
) -> Directions:
    """Directions between the residuals of two kinds of prompts, at the last position of each.

    ``target`` prompts show the behaviour, ``baseline`` prompts do not; ``chat`` says how they are put to the model.
    ``orthogonalize``, ``winsorize_quantile``, ``method`` and ``groups`` are the settings ``direction.*`` of the
    command, ``rank`` is ``ablation.rank``: directions a layer, of which ``method="som"`` finds several. ``batch_size``
    0: measured. Raises UserError for a model without a chat template or of unknown anatomy, and where there is no
    direction between the two.
    """
    if not target or not baseline:
        raise UserError("there have to be target and baseline prompts; give at least one of each")
    _check_method(method, rank, groups)
    form = (chat or Chat()).form(tokenizer)
    with _running(model, tokenizer, RunnerOptions(batch_size=batch_size)) as engine:
        request = Request(
            [form.encode(text) for text in target],
            [form.encode(text) for text in baseline],
            engine.anatomy.n_blocks + 1,
            engine.anatomy.width,
            orthogonalize=orthogonalize,
            winsorize_quantile=winsorize_quantile,
            rank=rank,
            groups=groups,
        )
        found = METHODS[method]().find(engine, request, World())
    if not found.is_finite:
        raise UserError("the residuals of the prompts are not finite; load the model in float32")
    if not (request.tells_apart and found.is_any):
        raise UserError(
            "target and baseline prompts leave the same mean residuals, so there is no direction between them"
        )
    return Directions(Ablation(found.directions_LRD, "none", False).stored, found.target_LD, found.baseline_LD)


def _check_method(method: str, rank: int, groups: int) -> None:
    if method not in METHODS:
        raise UserError(f"method is {method!r}; choose one of {', '.join(METHODS)}")
    for name, number, least in (("rank", rank, 1), ("groups", groups, 3)):
        if number < least:
            raise UserError(f"{name} is {number}; it has to be at least {least}")
    if rank > 1 and not METHODS[method].many:
        raise UserError(f"rank is {rank}, but method={method!r} finds one direction a layer; give rank=1")


@contextmanager
def ablated(model: PreTrainedModel, edit: ModelEdit) -> Iterator[None]:
    """While open, the model computes as if it were edited; its weights stay as they are.

    Hooks edit the outputs of writers, and are gone afterwards. Where the experts of a model cannot be hooked, the
    weights are edited and brought back, bit for bit. Raises UserError for directions of another model.
    """
    with ExitStack() as stack:
        anatomy = _anatomy(model, edit)
        fused: list[Any] = [
            model.get_submodule(writer.module) for writer in anatomy.writers if writer.experts is not None
        ]
        if not all(map(has_expert_dispatch, fused)):
            stack.callback(apply(model, edit))
            yield
            return
        configs: list[Any] = [model.config, model.config.get_text_config(), *(experts.config for experts in fused)]
        for config in configs if fused else ():
            stack.callback(setattr, config, _EXPERTS, getattr(config, _EXPERTS))
        outputs = OutputEdits(model, anatomy, edit.ablation)
        outputs.assign([0])
        stack.enter_context(outputs.active([edit.edit]))
        yield


def apply(model: PreTrainedModel, edit: ModelEdit) -> Callable[[], None]:
    """Edit the model's weights, in place; ``save_pretrained`` then writes the edited model.

    What is returned brings them back, bit for bit: until it is dropped it holds a copy on the host. Raises UserError
    for directions of another model, and for one whose weights bitsandbytes has packed.
    """
    anatomy = _anatomy(model, edit)
    for writer in anatomy.writers:
        if edit.edit.strength(writer.component, writer.block):
            writer.weight_DK(model)  # refuses what is packed, before anything is edited
    editor = WeightEditor(model, anatomy)
    editor.prepare(edit.ablation)
    editor.set_edit(edit.edit)
    return partial(editor.set_edit, None)


def score(
    model: PreTrainedModel,
    tokenizer: Any,
    edit: ModelEdit | None,
    target: Sequence[str],
    baseline: Sequence[str],
    *,
    markers: Sequence[str] | None = None,
    max_new_tokens: int = 100,
    chat: Chat | None = None,
) -> Scores:
    """Refusals among greedy answers to the target prompts, and the KL divergence on the baseline prompts, of an edit,
    or of the model as it is.

    ``markers`` are phrases that mark an answer as a refusal, by default those of the command. Weights are edited for
    the while, and brought back. Raises UserError as :func:`capture` does.
    """
    form, given = (chat or Chat()).form(tokenizer), {"target": target, "baseline": baseline}
    if edit is not None:
        _anatomy(model, edit)
    found = choice("scoring", "default")["markers"] if markers is None else markers
    put = {name: PromptSet(texts, [form.encode(text) for text in texts]) for name, texts in given.items()}
    with _running(model, tokenizer, RunnerOptions(max_new_tokens)) as engine:
        scorers = [RefusalScorer(found)]
        text_of = partial(decode_answers, tokenizer)
        objective = Objective(engine, put["target"], put["baseline"], scorers, text_of)
        scores = objective.original
        if edit is not None:
            engine.prepare(edit.ablation)
            engine.apply(edit.edit)
            [scores] = objective.score([None])
    return Scores(scores.refusals, objective.original.refusals, scores.kl, len(target), len(baseline))


def _anatomy(model: PreTrainedModel, edit: ModelEdit) -> Anatomy:
    """The model's anatomy, once directions are known to be those of a model like it."""
    anatomy = find_anatomy(model)
    if not edit.ablation.fits(anatomy.n_blocks, anatomy.width):
        raise UserError(
            f"the directions have the shape {list(edit.ablation.stored.shape)}, but the model has {anatomy.n_blocks} "
            f"blocks and a residual stream {anatomy.width} wide, which takes {[anatomy.n_blocks + 1, anatomy.width]}; "
            "capture them from this model"
        )
    return anatomy


@contextmanager
def _running(model: PreTrainedModel, tokenizer: Any, options: RunnerOptions) -> Iterator[Runner]:
    """An engine over a user's own model, which is left as it was: its weights, its mode, its experts."""
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ends = SimpleNamespace(pad_token_id=pad, eos_token_id=tokenizer.eos_token_id)
    training = model.training
    model.eval()
    engine = Runner(model, find_anatomy(model), ends, options)
    try:
        yield engine
    finally:
        engine.restore()
        engine.close()
        model.train(training)
