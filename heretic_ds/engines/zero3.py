"""The placement ``zero3``: every parameter cut over all ranks by DeepSpeed ZeRO-3, gathered for the moment of its use.

Each rank works on prompts of its own. All ranks have to run equally many forward passes, since every one of them
gathers: shares are padded to one length, batches have one size, and answers are decoded in step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from heretic_ds.ablation import Edit
from heretic_ds.anatomy import Anatomy
from heretic_ds.engines.capture import tapped
from heretic_ds.engines.decoding import decode
from heretic_ds.engines.headroom import rows_that_fit
from heretic_ds.engines.memory import is_out_of_memory
from heretic_ds.engines.offload import check_offload, offload_section, remove_swap_files
from heretic_ds.engines.protocol import Ablation, Decided, TokenRows
from heretic_ds.engines.release import Originals, give_back_memory, return_freed_blocks
from heretic_ds.engines.resident import ResidentEngine
from heretic_ds.engines.weights import WeightEditor
from heretic_ds.engines.zero3_loading import load_partitions
from heretic_ds.errors import UserError
from heretic_ds.model_fitness import dtype_name, forward_problem
from heretic_ds.settings import CaptureSettings
from heretic_ds.sharded_loading import Checkpoint, TensorFiles
from heretic_ds.world import World

if TYPE_CHECKING:
    from heretic_ds.job import Job
    from heretic_ds.loading import OpenedModel

log = logging.getLogger(__name__)

_NO_EDITS = "weights that zero3 has cut into parts cannot be edited; choose another placement for evaluate"


def build(job: Job, placement: CaptureSettings, phase: str) -> Zero3Engine:
    """The engine over a model that no rank reads or holds whole.

    Raises UserError, on every rank, for settings that this placement or this machine cannot serve.
    """
    world, opened = job.world, job.opened
    if phase != "capture":
        raise UserError(f"{phase}=zero3: {_NO_EDITS}")
    if placement.degree not in (None, world.size):
        raise UserError(
            f"capture.degree={placement.degree} with capture=zero3 and {world.size} ranks: zero3 cuts the model over "
            "all ranks; leave capture.degree null"
        )
    if opened.quantization is not None:
        raise UserError(
            f"capture=zero3 cannot read a checkpoint that is quantised with {opened.quantization}; use the unquantised "
            "original, or capture=replicated"
        )
    _prepare_deepspeed(opened.device)
    world.agree(lambda: check_offload(placement, opened.device))
    return Zero3Engine(_in_some_dtype(opened, job.anatomy, placement, world), job)


def _prepare_deepspeed(device: torch.device) -> None:
    """Start DeepSpeed over the ranks that there are, or over this one process alone."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != device.type:
        raise UserError(
            f"model.device={device.type}, but DeepSpeed runs on {get_accelerator().device_name()} here; "
            f"set DS_ACCELERATOR={device.type} in the environment, or model.device=auto"
        )
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False)


def _in_some_dtype(opened: OpenedModel, anatomy: Anatomy, capture: CaptureSettings, world: World) -> Partitions:
    """The model in the first dtype whose weights and first forward are finite."""
    problem = ""
    for dtype in opened.dtypes:
        if problem:
            log.warning("%s; loading it in %s instead", problem, dtype_name(dtype))
        partitions = Partitions(opened, dtype, anatomy, capture, world)
        try:
            partitions.load()
        except UserError as error:
            problem = str(error)
        else:
            found = forward_problem(partitions.model)
            if found is None:
                return partitions
            problem = f"a first forward of {opened.settings.path} in {dtype_name(dtype)} {found}"
        partitions.release()
    raise UserError(f"{problem}; set another model.dtype (float32 is the safest)")


class Partitions:
    """A model cut over all ranks, and all that has to be undone to be rid of it."""

    def __init__(
        self,
        opened: OpenedModel,
        dtype: torch.dtype,
        anatomy: Anatomy,
        capture: CaptureSettings,
        world: World,
    ) -> None:
        """The model without numbers, and DeepSpeed's layout for it."""
        import deepspeed

        self._originals = Originals()
        return_freed_blocks(at_once=True)
        self._opened, self._dtype, self._anatomy, self._world = opened, dtype, anatomy, world
        self._hooks: Any = None
        self.model = opened.skeleton(dtype)
        self.config = deepspeed_config(capture, self.model, anatomy, dtype, world.size)
        self._init = deepspeed.zero.Init(config_dict_or_path=self.config)

    def load(self) -> None:
        """Read this rank's part of every parameter, and let DeepSpeed gather each where it is used.

        Raises UserError, on every rank, where a weight file is at fault on any of them.
        """
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.utils import set_z3_leaf_module
        from deepspeed.utils.timer import NoopTimer

        self._world.agree(self._read)
        for part in gathered_at_once(self.model, self._anatomy):
            set_z3_leaf_module(part, True)
        zero = self.config["zero_optimization"]
        self._hooks = DeepSpeedZeRoOffload(
            self.model,
            timers=NoopTimer(),
            ds_config=self.config,
            prefetch_bucket_size=zero["stage3_prefetch_bucket_size"],
            max_reuse_distance=zero["stage3_max_reuse_distance"],
            max_live_parameters=zero["stage3_max_live_parameters"],
            param_persistence_threshold=zero["stage3_param_persistence_threshold"],
            offload_param_config=self._init_offload(),
        )
        for hook in self._hooks.backward_hooks:  # nothing is trained here
            hook.remove()

    def _init_offload(self) -> Any:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        return DeepSpeedZeroConfig(**self.config["zero_optimization"]).offload_param  # None without an offload

    def _read(self) -> None:
        files = TensorFiles(self._opened.source.folder, self._opened.headers)
        try:
            checkpoint = Checkpoint.of(self.model, files, self._dtype)
            load_partitions(self.model, checkpoint, self._init, self._world.rank, self._world.size)
        finally:
            files.close()

    @property
    def bytes_here(self) -> int:
        """Memory of this rank's parts."""
        parts = [getattr(parameter, "ds_tensor", None) for parameter in self.model.parameters()]
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def release(self) -> None:
        """Give all memory back, close what was opened and undo what DeepSpeed did to this process.

        Hooks, closures and two tables that outlive every engine refer to the parameters in circles: each part is let go
        of by itself, so that memory does not depend on when the circles are collected.
        """
        if self._hooks is not None:
            self._hooks.destroy()
        for parameter in self.model.parameters():
            if hasattr(parameter, "ds_tensor"):
                parameter.ds_tensor = None
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        if self._init.param_swapper is not None:
            remove_swap_files(self._init.param_swapper)
        _forget_modules()
        self._originals.restore()
        del self.model, self._init, self._hooks
        return_freed_blocks(at_once=False)
        give_back_memory()


def _forget_modules() -> None:
    """Empty DeepSpeed's stack of running modules, whose bottom is the model, and its table of what to release."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    for function in vars(PartitionedParameterCoordinator).values():
        while function is not None:
            if hasattr(function, "cache_clear"):
                function.cache_clear()
            function = getattr(function, "__wrapped__", None)


def deepspeed_config(
    capture: CaptureSettings, skeleton: nn.Module, anatomy: Anatomy, dtype: torch.dtype, ranks: int
) -> dict[str, Any]:
    """DeepSpeed's own configuration for these settings."""
    parts = max(len(list(part.parameters())) for part in gathered_at_once(skeleton, anatomy))
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_optimization": {
            "stage": 3,
            "memory_efficient_linear": False,  # it replaces functional.linear for the sake of gradients
            "stage3_prefetch_bucket_size": capture.prefetch_bucket_size,
            "stage3_param_persistence_threshold": capture.param_persistence_threshold,
            "stage3_max_live_parameters": capture.max_live_parameters,
            "stage3_max_reuse_distance": capture.max_reuse_distance,
            **offload_section(capture, skeleton, parts, ranks),
        },
    }


def gathered_at_once(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """The parts of every block, such as its attention and its MLP: modules whose weights are gathered together.

    Gathered module by module, a rank without a token for an expert would not take part in gathering that expert, and a
    convolution whose weight another module reads would not be gathered at all. Few large gathers are faster, too.
    """
    parts: list[nn.Module] = []
    for block in model.get_submodule(anatomy.blocks).children():
        children = list(block.children())
        listed = any(isinstance(child, nn.ModuleList | nn.ModuleDict) for child in children)  # never called as such
        parts += [block] if listed else children
    return [part for part in parts if any(True for _ in part.parameters())]


class _NoEditor(WeightEditor):
    """Partitioned weights are only read."""

    def prepare(self, ablation: Ablation) -> None:
        raise UserError(_NO_EDITS)

    def wear(self, edit: Edit | None) -> None:
        if edit is not None:
            raise UserError(_NO_EDITS)


class Zero3Engine(ResidentEngine):
    """Captures residuals and generates with the original weights; edits are refused."""

    max_edits_per_pass = 0

    def __init__(self, partitions: Partitions, job: Job) -> None:
        generation, world = job.settings.generation, job.world
        super().__init__(
            partitions.model,
            job.opened.tokenizer,
            job.anatomy,
            generation.max_new_tokens,
            generation.batch_size,
            editor=_NoEditor(partitions.model, job.anatomy),
            replicas=world.replicas(1, "capture.degree"),  # of the prompts: every rank has its own
            same=world.same,
        )
        self.partitions, self._world = partitions, world

    @property
    def degree(self) -> int:
        return self._world.size

    def close(self) -> None:
        del self.model, self._editor
        self.partitions.release()

    def _residuals(self, decoder: nn.Module, rows: TokenRows) -> Tensor:
        with tapped(self.model, self.anatomy) as taps, self._in_step(rows):
            self._first_token_logits(rows)  # DeepSpeed counts forward passes of the whole model
            return taps.take()

    def _decode(self, rows: TokenRows, max_new_tokens: int, decided: Decided | None) -> list[list[int]]:
        with self._in_step(rows):
            return decode(self.model, rows, self._pad_id, self._ends, max_new_tokens, decided, self._anyone)

    def _anyone(self, going: bool) -> bool:
        """Whether any rank's rows go on."""
        return self._replicas.total(torch.tensor(float(going))).item() > 0

    @contextmanager
    def _in_step(self, rows: Sequence[Any]) -> Iterator[None]:
        """A rank that ran out of memory cannot try again by itself: the others wait for its part of the weights."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"memory ran out with {len(rows)} rows in a batch, from which zero3 cannot recover; "
                f"set generation.batch_size below {len(rows)}"
            ) from error

    def _most_rows(self, longest: TokenRows, work: Callable[[TokenRows], Any]) -> int:
        most = super()._most_rows(longest, work)
        fitting = rows_that_fit(lambda n: work(longest[:n]), most, next(self.model.parameters()).device)
        return min(self._world.gather(fitting))
