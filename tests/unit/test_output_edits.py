"""Edits of outputs against edits of weights: the same numbers, for every family, many trials to a batch."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from heretic_ds.ablation import ROW_NORMS, Ablation, Edit, Profile, edit_weight
from heretic_ds.anatomy import find_anatomy
from heretic_ds.edits import experts as expert_edits
from heretic_ds.edits import tables
from heretic_ds.edits.outputs import OutputEdits
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.errors import UserError
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.engine import Runner, RunnerOptions, Traits
from heretic_ds.runner.forward import Forward
from heretic_ds.runner.rows import Row
from heretic_ds.scoring.kl import Divergence
from tests import families
from tests.unit.test_resident import EDIT, LENGTHS, NEW_TOKENS, ablation_for, engine_for, greedy_alone, prompts, state

ONE_BLOCK = Edit(None, {"attention": Profile(0.8, 1.0, 0.8, 0.5)})
"""Leaves the MLP, and every block but the second, as they are."""
STRONG = Edit(0.9, {"attention": Profile(-0.7, 0.3, 1.5, 2.0), "mlp": Profile(1.5, 1.0, 1.2, 1.5)})
EDITS: tuple[Edit | None, ...] = (EDIT, ONE_BLOCK, None, STRONG)
PAD = families.PAD


def last_logits(model, rows, pad_id) -> Tensor:
    """Logits [B, V] of the first answer token of each prompt."""
    return Forward(model, pad_id)([Row(row) for row in rows]).logits_BV


def trial_rows(trials: int) -> list[tuple[int, list[int]]]:
    """Rows (trial, prompt) of one batch in which trials alternate."""
    return [(index % trials, row) for index, row in enumerate(row for row in prompts() for _ in range(2))]


@torch.inference_mode()
def logits_by_weights(model, ablation, edits: Sequence[Edit | None], rows) -> Tensor:
    """Logits of rows (trial, prompt), each with its trial's edit in the weights.

    Every trial runs the whole batch: families that compute parts in float32 round by the batch's composition.
    """
    editor = WeightEditor(model, find_anatomy(model))
    editor.prepare(ablation)
    of_trial = []
    for edit in edits:
        editor.set_edit(edit)
        of_trial.append(last_logits(model, [row for _, row in rows], PAD))
    editor.set_edit(None)
    return torch.stack([of_trial[trial][position] for position, (trial, _) in enumerate(rows)])


@torch.inference_mode()
def logits_by_outputs(model, ablation, edits: Sequence[Edit | None], rows, budget: int | None = None) -> Tensor:
    """The same in one pass."""
    outputs = OutputEdits(model, find_anatomy(model), ablation, budget=budget)
    with outputs.active(edits):
        outputs.assign([trial for trial, _ in rows])
        return last_logits(model, [row for _, row in rows], PAD)


def distance(logits_BV: Tensor, expected_BV: Tensor) -> float:
    """Largest difference of any row, as a part of that row's spread."""
    spread_B = (expected_BV - expected_BV.mean(-1, keepdim=True)).norm(dim=-1)
    return ((logits_BV - expected_BV).norm(dim=-1) / spread_B).max().item()


@pytest.fixture(scope="module", params=families.REQUIRED)
def family(request):
    return request.param, families.build(request.param)


@pytest.mark.parametrize("through_norm", [False, True])
@pytest.mark.parametrize("row_norm", ROW_NORMS)
def test_a_batch_of_trials_equals_edited_weights(family, row_norm, through_norm):
    _, model = family
    ablation = ablation_for(engine_for(model), row_norm, through_norm)
    rows = trial_rows(len(EDITS))
    expected_BV = logits_by_weights(model, ablation, EDITS, rows)
    assert distance(logits_by_outputs(model, ablation, EDITS, rows), expected_BV) < 1e-5
    unedited_BV = last_logits(model, [row for _, row in rows], PAD)
    apart = [(expected_BV[i] - unedited_BV[i]).norm().item() for i, (trial, _) in enumerate(rows) if EDITS[trial]]
    assert min(apart) > 1e-3, "an edit without an effect shows nothing"


@pytest.mark.parametrize("name", families.REQUIRED)
def test_in_float64_the_two_forms_differ_by_rounding_alone(name):
    model = families.build(name, dtype=torch.float64)
    ablation = ablation_for(engine_for(model), "full", through_norm=True)
    rows = trial_rows(len(EDITS))
    try:
        expected_BV = logits_by_weights(model, ablation, EDITS, rows)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"does not run in float64: {error}")
    if expected_BV.dtype != torch.float64:
        pytest.skip(f"computes in {expected_BV.dtype}")
    assert distance(logits_by_outputs(model, ablation, EDITS, rows), expected_BV) < 1e-12


def test_scores_and_answers_of_trials_in_one_pass_equal_those_one_by_one(family):
    name, model = family
    before = state(model)
    engine = engine_for(model, batch_size=4)
    engine.prepare(ablation_for(engine))
    reference = Divergence().begin(engine, prompts())
    together = reference.of(EDITS), engine.generate(prompts(), EDITS)
    compared = 0
    for edit, kl, answers in zip(EDITS, *together, strict=True):
        alone = reference.of([edit])[0]
        assert abs(kl - alone) < 1e-6 + 1e-4 * alone
        for row, answer, expected in zip(prompts(), answers, engine.generate(prompts(), [edit])[0], strict=True):
            if answer != expected:
                engine.apply(edit) if edit else engine.restore()
                assert greedy_alone(model, row, {families.EOS})[1] < 1e-4, name
                engine.restore()
                continue
            compared += 1
    assert compared >= 0.8 * len(EDITS) * len(LENGTHS)
    assert engine.max_edits_per_pass > 1
    engine.restore()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("through_norm", [False, True])
@pytest.mark.parametrize("row_norm", ROW_NORMS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "olmo2", "qwen3_next", "gpt_oss", "deepseek_v3"])
def test_every_writer_by_itself_in_float64(name, row_norm, through_norm):
    """Modules called directly, so that no family's float32 parts hide anything; biases and experts among them."""
    model = families.build(name, dtype=torch.float64)
    anatomy = find_anatomy(model)
    ablation = ablation_for(engine_for(model), row_norm, through_norm)
    editor = WeightEditor(model, anatomy)
    editor.prepare(ablation)
    outputs = OutputEdits(model, anatomy, ablation)
    generator = torch.Generator().manual_seed(5)
    trials = [3, 0, 2, 0, 1]
    for writer in anatomy.writers:
        module = model.get_submodule(writer.module)
        shape = (len(trials), 3, anatomy.width if writer.experts else writer.weight_DK(model).shape[-1])
        given = (torch.randn(shape, generator=generator, dtype=torch.float64),)
        if writer.experts:
            tokens = given[0].flatten(0, 1)
            choice = torch.rand(len(tokens), writer.experts, generator=generator, dtype=torch.float64).topk(2)
            given = (tokens, choice.indices, choice.values)
        with torch.inference_mode(), outputs.active(EDITS):
            outputs.assign(trials)
            found = module(*given).reshape(len(trials), 3, -1)
        for position, trial in enumerate(trials):
            editor.set_edit(EDITS[trial])
            expected = module(*given).reshape(len(trials), 3, -1)
            error = (found[position] - expected[position]).norm() / expected[position].norm()
            assert error < 1e-12, writer.weight
        editor.set_edit(None)


@pytest.mark.parametrize("name", families.REQUIRED)
def test_in_bfloat16_edited_outputs_are_as_exact_as_the_product_allows(name):
    """Each writer's edited output against float32, compared with twice the plain product's own rounding."""
    model = families.build(name, dtype=torch.bfloat16)
    anatomy = find_anatomy(model)
    ablation = ablation_for(engine_for(model))
    outputs = OutputEdits(model, anatomy, ablation)
    for writer in anatomy.writers:
        if writer.experts:  # their product cannot be had by itself
            continue
        module, weight_DK = model.get_submodule(writer.module), writer.weight_DK(model)
        x_RK = torch.randn(256, weight_DK.shape[-1], generator=torch.Generator().manual_seed(0)).bfloat16()
        bias_D = 0.0 if writer.bias is None else model.get_parameter(writer.bias).float()
        v_D = ablation.writer_directions(writer.block, None, EDIT.direction_index)
        strength = EDIT.strength(writer.component, writer.block)
        exact_RD = x_RK.float() @ edit_weight(weight_DK.float(), v_D, strength, "full").T + bias_D
        with torch.inference_mode(), outputs.active([EDIT, None]):
            outputs.assign([0] * len(x_RK))
            edited_RD = module(x_RK)
        plain_RD = x_RK.float() @ weight_DK.float().T + bias_D
        rounding = (module(x_RK).float() - plain_RD).norm() / exact_RD.norm()
        assert (edited_RD.float() - exact_RD).norm() / exact_RD.norm() <= 2 * rounding + 1e-7, writer.weight


def test_writers_that_no_edit_touches_are_left_alone():
    model = families.build("llama")
    outputs = OutputEdits(model, find_anatomy(model), ablation_for(engine_for(model)))
    with outputs.active([ONE_BLOCK, None]):
        hooked = [name for name, module in model.named_modules() if module._forward_hooks]
    assert hooked == ["model.layers.1.self_attn.o_proj"]
    assert not any(module._forward_hooks for module in model.modules())


def test_tables_are_made_once_for_all_passes(monkeypatch):
    """Later passes need neither weights nor sums over ranks."""
    model = families.build("mixtral")
    sums = []

    def reduce(tensor: Tensor) -> Tensor:
        sums.append(tensor.shape)
        return tensor

    outputs = OutputEdits(model, find_anatomy(model), ablation_for(engine_for(model)), reduce)
    for edits in (EDITS, EDITS, EDITS[::-1]):
        with outputs.active(edits):
            pass
    assert len(sums) == 2 * len(find_anatomy(model).writers)  # row norms and overlaps of each


@pytest.mark.parametrize("through_norm", [False, True])
@pytest.mark.parametrize("row_norm", ROW_NORMS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "gemma4_moe"])
def test_without_tables_edits_are_the_same(name, row_norm, through_norm):
    model = families.build(name, layers=4)
    ablation, rows = ablation_for(engine_for(model), row_norm, through_norm), trial_rows(len(EDITS))
    found_BV = logits_by_outputs(model, ablation, EDITS, rows, budget=0)
    assert distance(found_BV, logits_by_outputs(model, ablation, EDITS, rows, budget=2**40)) < 1e-6
    assert distance(found_BV, logits_by_weights(model, ablation, EDITS, rows)) < 1e-5


def test_without_tables_what_a_pass_computes_takes_the_memory_of_the_pass_before():
    """Whatever directions its trials have, however many of them are alike, and whether steps of it are captured."""
    model = families.build("mixtral", layers=4)
    ablation, rows = ablation_for(engine_for(model)), trial_rows(len(EDITS))
    outputs, bytes_held = OutputEdits(model, find_anatomy(model), ablation, budget=0), []
    alike = (EDIT, EDIT, None, EDIT)
    for edits, static in ((alike, True), (EDITS, False), (EDITS[::-1], True), ((EDIT, STRONG), True), (alike, False)):
        expected_BV = logits_by_weights(model, ablation, edits, [(trial % len(edits), row) for trial, row in rows])
        with torch.inference_mode(), outputs.active(edits, static):
            outputs.assign([trial % len(edits) for trial, _ in rows])
            assert distance(last_logits(model, [row for _, row in rows], PAD), expected_BV) < 1e-5
            bytes_held.append(held(outputs))
    assert len(set(bytes_held)) == 1


def held(start: object) -> int:
    """Bytes of the tensors that an object holds, but for those of models."""
    bytes_of, seen, ahead = 0, set(), [start]
    while ahead:
        one = ahead.pop()
        if id(one) in seen or isinstance(one, type | nn.Module):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            bytes_of += one.numel() * one.element_size()
        elif isinstance(one, dict | list | tuple) or type(one).__module__.startswith("heretic_ds"):
            ahead += gc.get_referents(one)
    return bytes_of


def test_edits_of_a_large_model_stay_within_their_budget(monkeypatch):
    """Shapes of Qwen3-235B-A22B, of which each of 8 ranks holds a part: 17 GiB of tables on every one of them."""
    config = Qwen3MoeConfig(
        hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536, vocab_size=151_936,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    anatomy, budget = find_anatomy(model), tables.table_budget(model) // 8
    assert budget == pytest.approx(2.7 * 2**30, rel=0.05)
    directions_LD = torch.nn.functional.normalize(torch.randn(95, 4096, dtype=torch.float64), dim=-1)
    ablation = Ablation(directions_LD, "full", through_norm=False)
    everywhere = Profile(1.0, 50.0, 0.5, 100.0)
    edits = [Edit(50 + 0.3 * trial, {"attention": everywhere, "mlp": everywhere}) for trial in range(13)]

    monkeypatch.setattr(tables, "row_overlaps", lambda weight, norms, units_ND, *more: norms.new_empty(units_ND.shape))
    found = []
    for most in (2**40, budget):
        outputs = OutputEdits(model, anatomy, ablation, budget=most)
        before = held(outputs)
        with outputs.active(edits, static=True):
            found.append((held(outputs) - before, outputs.most_edits))
    (everything, _), (less, most) = found
    vectors = 94 * 128 * 4096 * 4  # one for each expert
    assert everything > 95 * vectors > 17 * 2**30 and most == len(edits)
    of_attention_and_by_trial = everything - 95 * vectors
    assert less - of_attention_and_by_trial == (most + 1) * vectors <= budget < (most + 2) * vectors


@pytest.mark.parametrize("trials", [0, 1, 2, 3])
def test_passes_have_as_many_trials_as_the_budget_holds(trials, monkeypatch):
    """One more vector an expert is its row norms; where not even two trials fit, weights are edited."""
    model = families.build("mixtral", layers=5)
    vectors = tables.bytes_of_vectors(model, [w for w in find_anatomy(model).writers if w.experts])
    assert vectors == 5 * 4 * 32 * 4
    monkeypatch.setattr(tables, "_LEAST_BYTES", (trials + 1) * vectors)
    monkeypatch.setattr(tables, "_SHARE_OF_WEIGHTS", 0.0)
    engine, passes = engine_for(model, batch_size=4), []
    engine.prepare(ablation_for(engine))
    assert engine.max_edits_per_pass == max(1, trials)
    reference, active = Divergence().begin(engine, prompts()), OutputEdits.active
    alone = [reference.of([edit])[0] for edit in EDITS]
    monkeypatch.setattr(
        OutputEdits, "active", lambda self, edits, *more: passes.append(len(edits)) or active(self, edits, *more)
    )
    assert reference.of(EDITS) == pytest.approx(alone, rel=1e-4, abs=1e-6)
    assert passes == {0: [], 1: [], 2: [2, 2], 3: [3]}[trials]
    engine.prepare(ablation_for(engine, "pre"))
    assert engine.max_edits_per_pass > len(EDITS)


class Hoard:
    """Memory that can be done without, once."""

    def __init__(self, full: bool = True) -> None:
        self.full = full

    def evict(self) -> bool:
        full, self.full = self.full, False
        return full

    def rest(self) -> None:
        pass


@pytest.mark.parametrize("hoards", [0, 1])
def test_memory_that_runs_out_while_edits_are_made_ready(hoards, monkeypatch):
    model = families.build("mixtral")
    engine = engine_for(model, batch_size=4)
    engine.prepare(ablation_for(engine))
    reference, failures = Divergence().begin(engine, prompts()), [torch.OutOfMemoryError("CUDA out of memory")]
    alone = [reference.of([edit])[0] for edit in EDITS]
    overlaps = tables.row_overlaps

    def full(*arguments):
        if len(failures) and arguments[0].shape == (32, 48):  # an expert's
            raise failures.pop()
        return overlaps(*arguments)

    monkeypatch.setattr(tables, "row_overlaps", full)
    hoard = Hoard(bool(hoards))
    engine._batches.evictable.append(hoard)
    if not hoards:
        with pytest.raises(UserError, match=r"edits of 4 trials .*; set search\.trials_per_pass below 4$"):
            reference.of(EDITS)
        assert not any(module._forward_hooks for module in model.modules())
    assert reference.of(EDITS) == pytest.approx(alone, rel=1e-4, abs=1e-6)
    assert not hoard.full and not failures


class OtherRanOut(Comm):
    """One of two ranks; memory runs out on the other one whenever :attr:`fails` says so, after this one's part."""

    fails = False

    def attempt(self, work, size=None):
        value, failed = super().attempt(work, size)[1], OtherRanOut.fails
        OtherRanOut.fails = False
        return (False, None) if failed else (True, value)


def test_edits_that_another_rank_had_no_memory_for_are_not_active_twice(monkeypatch):
    """And what ranks make together is made anew on all of them."""
    options, traits = RunnerOptions(NEW_TOKENS, batch_size=4), Traits(graphs=False)
    model = families.build("llama")
    engine = Runner(model, find_anatomy(model), families.tokenizer(), options, OtherRanOut(), traits)
    engine.prepare(ablation_for(engine))
    engine._batches.evictable.append(Hoard())
    reference = Divergence().begin(engine, prompts())
    expected = [reference.of([edit])[0] for edit in EDITS]
    made, overlaps = [], tables.row_overlaps
    monkeypatch.setattr(tables, "row_overlaps", lambda *given: made.append(1) or overlaps(*given))
    monkeypatch.setattr(OtherRanOut, "fails", True)
    assert reference.of(EDITS) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert not OtherRanOut.fails and len(made) == 2 * len(engine.anatomy.writers)


def test_rows_that_do_not_match_the_assigned_ones_are_refused():
    model = families.build("llama")
    outputs = OutputEdits(model, find_anatomy(model), ablation_for(engine_for(model)))
    with torch.inference_mode(), outputs.active(EDITS), pytest.raises(RuntimeError, match="3 outputs of a writer"):
        outputs.assign([0, 1])
        last_logits(model, prompts()[:3], PAD)


def test_slots_of_experts_may_be_edited_in_parts(monkeypatch):
    model = families.build("gpt_oss")
    ablation, rows = ablation_for(engine_for(model)), trial_rows(len(EDITS))
    whole_BV = logits_by_outputs(model, ablation, EDITS, rows)
    monkeypatch.setattr(expert_edits, "_CHUNK_NUMBERS", 7 * 32)
    assert torch.equal(logits_by_outputs(model, ablation, EDITS, rows), whole_BV)


def test_experts_compute_what_they_did_while_no_edit_is_active():
    model = families.build("mixtral")
    before = last_logits(model, prompts(), PAD)
    for _ in range(2):  # a second engine on the same model finds the first one's dispatch
        outputs = OutputEdits(model, find_anatomy(model), ablation_for(engine_for(model)))
        with torch.inference_mode(), outputs.active(EDITS):
            outputs.assign([0, 1, 2, 3, 0])
            assert distance(last_logits(model, prompts(), PAD), before) > 1e-3
    assert torch.equal(last_logits(model, prompts(), PAD), before)
    assert model.config._experts_implementation.count(expert_edits._PREFIX) == 1


@pytest.mark.parametrize("name", sorted(families.UNDISPATCHED_EXPERTS))
def test_where_rows_cannot_have_their_own_edits_weights_are_edited(name, caplog):
    model = families.build(name)
    engine = engine_for(model, batch_size=4)
    with caplog.at_level(logging.INFO, logger="heretic_ds"):
        engine.prepare(ablation_for(engine))
    assert engine.max_edits_per_pass == 1 and "every trial has passes of its own" in caplog.text
    reference = Divergence().begin(engine, prompts())
    together = reference.of(EDITS)
    assert together == [reference.of([edit])[0] for edit in EDITS]
    assert len(engine.generate(prompts(), EDITS)) == len(EDITS)


def test_experts_in_a_list_are_edited_in_their_weights():
    """Each of their layers sees tokens of many prompts, of which it cannot tell whose they are."""
    anatomy = find_anatomy(families.build("llama"))
    listed = dataclasses.replace(anatomy.writers[-1], path="mlp.experts.*.down_proj")
    anatomy = dataclasses.replace(anatomy, writers=(*anatomy.writers[:-1], listed))
    assert "without their order" in str(OutputEdits.obstacle(families.build("llama"), anatomy))
    assert OutputEdits.obstacle(families.build("mixtral"), find_anatomy(families.build("mixtral"))) is None


def test_none_stands_for_the_edit_that_is_applied():
    model = families.build("llama")
    engine = engine_for(model, batch_size=4)
    engine.prepare(ablation_for(engine))
    reference = Divergence().begin(engine, prompts())
    alone = [reference.of([edit])[0] for edit in (EDIT, STRONG)]
    engine.apply(STRONG)
    for edits, expected in (([EDIT, None], alone), ([None, EDIT], alone[::-1]), ([None, None], [alone[1]] * 2)):
        assert reference.of(edits) == pytest.approx(expected, rel=1e-4)


def test_rows_that_run_out_of_memory_lose_no_answer():
    """Some answers are there when memory runs out for the first time, others that began before them are not."""
    model = families.build("llama")
    engine = engine_for(model, batch_size=6)
    engine.prepare(ablation_for(engine))

    def decided(answers):
        return [sum(answer[:4]) % 2 > 0 for answer in answers]

    expected = engine.generate(prompts(), EDITS, decided)
    for allowed in range(5, 12):
        passes = []

        def full(module, args, kwargs, passes=passes, allowed=allowed):
            passes.append(kwargs["input_ids"].shape[0])
            if len(passes) > allowed and passes[-1] > 2:
                raise torch.OutOfMemoryError("pretended")

        engine.batch_sizes["generate"] = 6
        handle = model.get_submodule("model").register_forward_pre_hook(full, with_kwargs=True)
        assert engine.generate(prompts(), EDITS, decided) == expected
        assert engine.batch_sizes["generate"] < 6
        handle.remove()


def test_early_stop_changes_no_verdict_of_any_trial():
    model = families.build("llama")
    engine = engine_for(model, batch_size=6)
    engine.prepare(ablation_for(engine))

    def verdicts(answers):
        return [any(token % 5 == 0 for token in answer) for answer in answers]

    whole = [verdicts(answers) for answers in engine.generate(prompts(), EDITS)]
    stopped = engine.generate(prompts(), EDITS, verdicts)
    assert [verdicts(answers) for answers in stopped] == whole
    assert any(map(any, whole)) and not all(map(all, whole))
    tokens = [
        sum(len(answer) for answers in of_trials for answer in answers)
        for of_trials in (stopped, engine.generate(prompts(), EDITS))
    ]
    assert tokens[0] < tokens[1]
