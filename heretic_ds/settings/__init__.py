"""Every setting as a typed, documented structured config; :mod:`heretic_ds.settings.checks` checks their values.

The YAML files under ``conf/`` choose values; the dataclasses here give the schema: names, types, defaults, bounds,
and a docstring below each field from which the configuration reference in ``docs/`` is generated.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from heretic_ds.conf_files import conf_dir as conf_dir
from heretic_ds.settings.benchmark import BenchmarkSettings
from heretic_ds.settings.directions import AblationSettings as AblationSettings
from heretic_ds.settings.directions import DirectionSettings as DirectionSettings
from heretic_ds.settings.directions import ProfileSettings as ProfileSettings
from heretic_ds.settings.export import ExportSettings as ExportSettings
from heretic_ds.settings.fields import within as within
from heretic_ds.settings.scoring import ScoringSettings as ScoringSettings
from heretic_ds.settings.search import AUTO as AUTO
from heretic_ds.settings.search import SearchSettings as SearchSettings
from heretic_ds.settings.tracking import TrackingSettings
from heretic_ds.settings.verifying import AUTO_TEST as AUTO_TEST
from heretic_ds.settings.verifying import VerifySettings as VerifySettings

TASKS = ("abliterate", "evaluate", "export", "upload", "chat", "plan", "geometry", "benchmark")
PHASES = ("capture", "evaluate")
"""Phases in which the model is laid out, each by a placement of its own."""

FREE_GROUPS = (*PHASES, "hardware")
"""Groups whose keys are checked by those who read them: the placement that is chosen, the planner."""

SCHEMA_NAME = "settings_schema"


@dataclass
class TaskSettings:
    """What one command does."""

    name: str = within("abliterate", choices=TASKS)
    """``abliterate`` (search, verify, export), ``evaluate`` (score the model, edited or not), ``export`` (write a trial
    of an earlier run), ``upload`` (write that to the hub), ``chat`` (talk to the model, edited or not), ``plan`` (say
    what it takes), ``geometry`` (measure and draw the residuals that directions are made of) or ``benchmark`` (ask the
    original and the exported model what benchmarks ask)."""
    answer_tokens: int = within(1024, ge=1)
    """Longest answer of ``task=chat``, in tokens."""
    against: Optional[str] = None
    """For ``task=evaluate``: hub id or folder of the original that the model is compared with; also written
    ``evaluate.against``."""
    projection: str = within("pca", choices=("pca", "pacmap"))
    """How ``task=geometry`` draws residuals on a plane; ``pacmap`` needs the extra ``report``."""
    blocks: list[int] = field(default_factory=list)
    """Blocks whose residuals ``task=geometry`` draws; empty: twelve, evenly spread."""


@dataclass
class ModelSettings:
    """The model to work on."""

    path: str = MISSING
    """Hub id or local folder of a Hugging Face causal language model."""
    revision: Optional[str] = None
    """Branch, tag or commit of a hub model."""
    dtype: str = within("auto", choices=("auto", "float32", "bfloat16", "float16"))
    """``auto`` (the checkpoint's own, with fallbacks where the hardware cannot run it), ``float32``,
    ``bfloat16`` or ``float16``."""
    device: str = "auto"
    """``auto`` (CUDA where there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""
    allow_pickle: bool = False
    """Whether weights that are there as pickled ``.bin`` files alone are read, by PyTorch's restricted unpickler."""
    attn_implementation: Optional[str] = None
    """Attention implementation passed to transformers (``eager``, ``sdpa``, ...); null leaves its choice."""
    quantization: str = within("none", choices=("none", "bnb_4bit", "bnb_8bit"))
    """How weights are held in memory while directions are captured and edits are searched: ``bnb_4bit`` and
    ``bnb_8bit`` pack them by bitsandbytes, under ``capture=replicated evaluate=replicated`` alone. The edited model is
    made from the original's own files. ``none``: as they are; what is quantised in the files is dequantised."""


@dataclass
class LoadSettings:
    """How ranks read the weights."""

    share: bool = False
    """Ranks of one machine that hold the whole model each read their part of the files, and exchange the parts on the
    device; else each reads everything."""


@dataclass
class PromptSource:
    """Where one list of prompts comes from."""

    source: str = MISSING
    """Hub data set id, folder of a saved data set, or a ``.txt`` (one prompt a line), ``.jsonl``, ``.csv`` or
    ``.parquet`` file."""
    subset: Optional[str] = None
    """Configuration of a data set that has several."""
    split: str = "train"
    """Split of a data set; ``train[:400]`` works too, quoted as Hydra's grammar needs."""
    slice: Optional[str] = None
    """``start:stop`` rows to keep, counted from 0; shell-safe alternative to a sliced split. The default cuts data sets
    of the hub alone: a file or folder is used whole unless a slice is given."""
    column: str = "text"
    """Column that holds the prompt; ignored for ``.txt`` files."""


@dataclass
class HeldOutSource(PromptSource):
    """Where prompts come from that nothing is chosen by."""

    source: str = AUTO_TEST
    """As for the other parts; or ``auto``: rows behind those that eval and train take, of the same data sets, where
    there are any (other keys of this part then count for nothing); or ``none``: eval prompts stand in."""


@dataclass
class PromptPair:
    """Prompts of one kind."""

    train: PromptSource = field(default_factory=PromptSource)
    """Prompts from which directions are computed."""
    eval: PromptSource = field(default_factory=PromptSource)
    """Prompts on which edits are scored."""
    test: HeldOutSource = field(default_factory=HeldOutSource)
    """Prompts that only the final scores are taken on."""


@dataclass
class ThinkingMarker:
    """How one family of models opens its chain of thought, and the text that closes it at once."""

    open: str = MISSING
    """Text with which an answer opens a chain-of-thought block."""
    closed: str = MISSING
    """Text that stands for the opened and immediately closed block."""


@dataclass
class PromptSettings:
    """The two kinds of prompts and how they are put to the model."""

    target: PromptPair = field(default_factory=PromptPair)
    """Prompts that show the behaviour."""
    baseline: PromptPair = field(default_factory=PromptPair)
    """Prompts that do not."""
    system: Optional[str] = None
    """System prompt; null for none."""
    response_prefix: str = "auto"
    """Text every answer is made to start with. ``auto``: the common prefix of the original model's answers;
    an opened chain-of-thought block is closed first. Empty: none."""
    template: Optional[str] = None
    """Jinja chat template, or the path of a file that holds one, for a model that ships none."""
    thinking: list[ThinkingMarker] = field(default_factory=list)
    """Chain-of-thought markers that ``response_prefix=auto`` closes."""


@dataclass
class GenerationSettings:
    """How answers are generated; decoding is always greedy."""

    max_new_tokens: int = within(100, ge=1)
    """Longest answer, in tokens."""
    batch_size: int = within(0, ge=0)
    """Rows per batch; 0: found by measuring."""
    early_stop: bool = True
    """Stop a row as soon as every scorer has decided on it."""
    prefill_reuse: bool = True
    """Passes of edited models over prompts leave out the blocks before the first edited one, and pass once over the
    tokens that all prompts begin with, where placement and model allow it."""
    cuda_graphs: bool = True
    """On CUDA, capture steps of decoding as graphs and replay them, where placement and model allow it; elsewhere steps
    are launched one operation at a time, and the log says why."""


@dataclass
class RunSettings:
    """The folder a run works in."""

    dir: Optional[str] = None
    """Run folder; null: ``runs/<model name>`` (``runs/<model name>-evaluate`` for ``task=evaluate``)."""
    interactive: Optional[bool] = None
    """Whether ``abliterate`` ends with a menu; null: at a terminal."""
    launch: Optional[str] = None
    """Ranks that the command starts by itself, on this machine: a whole number, or ``auto``, one for every GPU where
    there are several. null: none; a launcher starts them. ``task=chat`` and ``task=plan`` take one process."""


@dataclass
class ReportSettings:
    """What a search leaves to look at."""

    html: bool = True
    """Write ``report.html`` in the run folder: scores, front, history, profiles, geometry and answers on one page."""


@dataclass
class PlanSettings:
    """What ``task=plan`` gives beside its tables."""

    json: Optional[str] = None
    """File to write the plan to, as JSON; null: none."""


@dataclass
class Settings:
    """The whole configuration."""

    task: TaskSettings = field(default_factory=TaskSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    load: LoadSettings = field(default_factory=LoadSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    capture: dict[str, Any] = field(default_factory=dict)
    """How one replica of the model lies on ranks while residuals are captured: ``_target_``, the class of a placement,
    and its options."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """The same while edits are evaluated."""
    hardware: dict[str, Any] = field(default_factory=dict)
    """The machine that ``task=plan`` and ``auto`` reckon with, one of ``conf/hardware/``; of ``hardware=local`` what is
    not given is measured."""
    plan: PlanSettings = field(default_factory=PlanSettings)
    direction: DirectionSettings = field(default_factory=DirectionSettings)
    ablation: AblationSettings = field(default_factory=AblationSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    scoring: ScoringSettings = field(default_factory=ScoringSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    benchmark: BenchmarkSettings = field(default_factory=BenchmarkSettings)
    verify: VerifySettings = field(default_factory=VerifySettings)
    run: RunSettings = field(default_factory=RunSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)


def register_schemas() -> None:
    """Registers the schema that ``conf/config.yaml`` starts from, and two resolvers.

    ``${package_file:path}`` gives the path of a file that is shipped inside this package, such as the demo model.
    ``${of_hub:source,rows}`` gives the rows where the source is a data set of the hub, and null where it lies on this
    machine: what cuts a public data set to a usual size must not cut what a user names in its place.
    """
    schema = OmegaConf.structured(Settings)
    for group in FREE_GROUPS:
        OmegaConf.set_struct(schema[group], False)
    ConfigStore.instance().store(name=SCHEMA_NAME, node=schema)
    package = Path(__file__).resolve().parent.parent
    OmegaConf.register_new_resolver("package_file", lambda path: str(package / path), replace=True)
    OmegaConf.register_new_resolver("of_hub", _of_hub, replace=True)


def _of_hub(source: str, rows: str) -> str | None:
    here = source.startswith(("~", ".", "/")) or os.path.exists(source)
    return None if "://" in source or here else rows
