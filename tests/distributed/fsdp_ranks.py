"""What the tests of ``fsdp`` run on every rank."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from heretic_ds.ablation import ROW_NORMS
from heretic_ds.edits.tables import WriterTables
from heretic_ds.errors import UserError
from heretic_ds.job import Job
from heretic_ds.memory import give_back_memory
from heretic_ds.placements import build_engine
from heretic_ds.placements.fsdp.units import Units, gathered
from heretic_ds.runner.engine import Runner
from heretic_ds.scoring.kl import Divergence
from heretic_ds.world import World
from tests.distributed import output_edits_ranks
from tests.distributed.engines import EDIT, LENGTHS, ablation_for, build, job_for, prompts, target
from tests.distributed.zero3_ranks import STOPS, bytes_read, status


def engine_of(world: World, folder: str, phase: str = "evaluate", options: Any = None, **job: Any) -> Runner:
    """The engine of a phase."""
    wanted = fsdp_job(world, folder, phase, options, **job)
    engine = build_engine(wanted, phase)
    assert isinstance(engine, Runner)
    return engine


def fsdp_job(world: World, folder: str, phase: str, options: Any = None, **job: Any) -> Job:
    made = job_for(world, folder, **job)
    setattr(made.settings, phase, target("fsdp", **(options or {})))
    return made


def measure(world: World, folder: str, count: int = len(LENGTHS)) -> dict[str, Any]:
    """Everything an engine says about one model: unedited, edited in every mode, and restored."""
    engine = engine_of(world, folder)
    engine._ends = STOPS
    things = [weakref.ref(thing) for thing in (*engine.model.modules(), *engine.model.parameters())]
    whole = sum(parameter.numel() * parameter.element_size() for parameter in engine.model.parameters())
    held = sum(own.nbytes for own in own_parts(engine).values())
    found = _scores(engine, count) | {"degree": engine.degree, "held": held / whole}
    engine.close()
    del engine
    gc.collect()
    found["alive"] = sum(thing() is not None for thing in things)
    return found


def measure_replicated(folder: Path, count: int = len(LENGTHS)) -> dict[str, Any]:
    """The same on ``replicated``, in this process alone, by whole passes."""
    job = job_for(World(), str(folder))
    job.settings.generation.prefill_reuse = False
    engine = build(job, "replicated")
    engine._ends = STOPS
    found = _scores(engine, count)
    engine.close()
    return found


def _scores(engine: Runner, count: int) -> dict[str, Any]:
    rows, before = prompts(count), {name: own.clone() for name, own in own_parts(engine).items()}
    found: dict[str, Any] = {"means": engine.capture(rows), "answers": {}, "kl": {}, "weights": {}}
    engine.prepare(ablation_for(engine, "none"))
    reference = Divergence().begin(engine, rows)
    found["answers"]["original"] = engine.generate(rows, [None])[0]
    for row_norm in ROW_NORMS:
        engine.prepare(ablation_for(engine, row_norm, through_norm=row_norm == "pre"))
        found["kl"][row_norm] = reference.of([EDIT])[0]
        found["answers"][row_norm] = engine.generate(rows, [EDIT])[0]
        engine.apply(EDIT)
        found["weights"][row_norm] = whole_writers(engine)
    engine.restore()
    after = own_parts(engine)
    found["restored"] = all(torch.equal(own, after[name]) for name, own in before.items())
    return found


def own_parts(engine: Runner) -> dict[str, Tensor]:
    """What this rank holds of every parameter, by name."""
    parameters: dict[str, Any] = dict(engine.model.named_parameters())
    return {name: getattr(p, "_local_tensor", p).detach() for name, p in parameters.items()}


def whole_writers(engine: Runner) -> dict[str, Tensor]:
    """The weights of all writers, as they are now."""
    found = {}
    for writer in engine.anatomy.writers:
        if engine.traits.name == "fsdp":
            with gathered(engine.model, engine.anatomy, writer.block):
                found[writer.weight] = writer.weight_DK(engine.model).clone()
        else:
            found[writer.weight] = writer.weight_DK(engine.model).clone()
    return found


def weights_unlike_the_file(world: World, folder: str, dtype: str = "float32") -> list[str]:
    """Names of parameters and buffers that differ from those of a model that transformers loaded."""
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    engine = engine_of(world, folder, dtype=dtype)
    units = [module for module in engine.model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    named = engine.model.named_parameters()
    unlike = [name for name, own in named if not _same(own, expected.get_parameter(name))]
    unlike += [name for name, own in engine.model.named_buffers() if not _same(own, expected.get_buffer(name))]
    for unit in units:
        unit.reshard()
    engine.close()
    return unlike


def _same(own: Tensor, other: Tensor) -> bool:
    return own.dtype == other.dtype and torch.equal(own, other)


def scores(world: World, folder: str, tables: bool = True) -> dict[str, Any]:
    """KL and answers of several edits in one pass, in every mode."""
    engine = engine_of(world, folder)
    found = output_edits_ranks.score(engine, True, tables)
    engine.close()
    return found


def captured_and_answered(world: World, folder: str, **job: Any) -> dict[str, Any]:
    """What the capture phase wants of an engine."""
    engine = engine_of(world, folder, "capture", **job)
    engine._ends = STOPS
    found = {"means": engine.capture(prompts()), "answers": engine.generate(prompts(), [None])[0]}
    Divergence().begin(engine, prompts())
    found["batch_sizes"], found["dtype"] = dict(engine.batch_sizes), str(engine.dtype)
    engine.close()
    return found


def answers_decided_unequally(world: World, folder: str) -> list[int]:
    """Lengths of answers of which one rank's are decided at once, and the other's never."""
    engine = engine_of(world, folder)
    engine._ends = frozenset()
    answers = engine.generate(prompts(), [None], lambda started: [world.rank == 0] * len(started))[0]
    engine.close()
    return [len(answer) for answer in answers]


def parts(world: World, folder: str) -> dict[str, tuple[tuple[int, ...], int]]:
    """By parameter the shape of this rank's part, and where in memory it lies."""
    engine = engine_of(world, folder)
    found = {name: (tuple(own.shape), own.data_ptr()) for name, own in own_parts(engine).items()}
    engine.close()
    return found


def table_budget_and_own_bytes(world: World, folder: str) -> tuple[int, int, int]:
    """What tables may take on this rank if that were all of its weights, the bytes of its parts, and of all weights."""
    engine = engine_of(world, folder)
    with mock.patch.multiple("heretic_ds.edits.tables", _LEAST_BYTES=0, _SHARE_OF_WEIGHTS=1.0):
        budget = engine.traits.edits.budget(engine.model)
    own = sum(part.nbytes for part in own_parts(engine).values())
    whole = sum(parameter.nbytes for parameter in engine.model.parameters())
    engine.close()
    return budget, own, whole


def refusal(world: World, folder: str, phase: str = "evaluate", **options: Any) -> str:
    """The message with which the placement refuses; "accepted" where it does not."""
    try:
        engine_of(world, folder, phase, options).close()
    except UserError as error:
        return str(error)
    return "accepted"


def refusal_of_a_model_that_uses_weights_elsewhere(world: World, folder: str) -> str:
    """The message where a model multiplies by a block's weight without calling the block."""
    from transformers.models.llama.modeling_llama import LlamaModel

    original = LlamaModel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        weight_DK = self.layers[0].mlp.down_proj.weight
        torch.ones(1, len(weight_DK)) @ weight_DK
        return original(self, *args, **kwargs)

    with mock.patch.object(LlamaModel, "forward", forward):
        return refusal(world, folder)


def noted_after_passes(world: World, folder: str) -> int:
    """How many units FSDP2 has noted for a backward pass after some passes."""
    engine = engine_of(world, folder)
    engine.capture(prompts())
    state: Any = engine.model._get_fsdp_state()  # type: ignore[operator]
    noted = len(state._comm_ctx.post_forward_order)
    engine.close()
    return noted


def memory_of_an_engine(world: World, folder: str, tiny: str, rounds: int) -> list[dict[str, int]]:
    """Bytes of host memory: the peak of loading above what there was before, and what stays after closing."""
    _use(world, tiny)  # libraries are loaded, threads started
    return [_memory_of_one(world, folder) for _ in range(rounds)]


def _memory_of_one(world: World, folder: str) -> dict[str, int]:
    give_back_memory()
    job = fsdp_job(world, folder, "evaluate")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is used now
    before, peak_before, read_before = status("VmRSS"), status("VmHWM"), bytes_read()
    found: dict[str, int] = {}
    read = Units.read

    def measured(self: Units) -> None:
        read(self)
        sizes = [parameter.nbytes for parameter in self.model.parameters()]
        found.update(peak=status("VmHWM") - peak_before, read=bytes_read() - read_before)
        found.update(held=self.bytes_here, largest=max(sizes), whole=sum(sizes))

    with mock.patch.object(Units, "read", measured):
        engine: Any = build_engine(job, "evaluate")
    engine.capture(prompts(2))
    engine.prepare(ablation_for(engine, "full"))
    engine.apply(EDIT)
    found["originals"] = sum(original.nbytes for original in engine._editor._originals.values())
    found["at most"] = status("VmHWM") - peak_before
    model = engine.model
    engine.close()
    del engine
    give_back_memory()
    found["left"] = status("VmRSS") - before
    del model  # whoever still had it kept no weights
    return found


def _use(world: World, folder: str) -> None:
    engine = engine_of(world, folder)
    engine.capture(prompts(2))
    engine.close()


def tables_that_do_not_fit(world: World, folder: str) -> tuple[str, Tensor]:
    """What ranks say where the last one has no memory for the tables of the second writer; and what they capture
    afterwards."""
    engine, made = engine_of(world, folder), WriterTables.__init__
    engine.prepare(ablation_for(engine, "full"))
    reference = Divergence().begin(engine, prompts())
    calls: list[None] = []

    def make(self: WriterTables, *args: Any) -> None:
        calls.append(None)
        if world.rank == world.size - 1 and len(calls) == 2:
            raise torch.OutOfMemoryError("pretended")
        made(self, *args)

    said = "nothing"
    with mock.patch.object(WriterTables, "__init__", make):
        try:
            reference.of([EDIT, None])
        except UserError as error:
            said = str(error)
    means = engine.capture(prompts())
    engine.close()
    return said, means
