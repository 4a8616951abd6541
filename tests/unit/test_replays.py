"""Engines with replayed steps: what `generation.cuda_graphs=false` gives, and why they are given up.

Graphs are stand-ins that do recorded operations again on the same memory, with none of the model's Python.
"""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from torch import nn

from heretic_ds.ablation import ROW_NORMS, Edit, Profile
from heretic_ds.anatomy import find_anatomy
from heretic_ds.edits import tables
from heretic_ds.runner import graphs, replays, slots
from heretic_ds.runner.engine import ResidentEngine
from heretic_ds.runner.replays import Replays, obstacle
from tests import families
from tests.recorded_graphs import Recorder
from tests.unit.test_decoding import prompts, stop_some
from tests.unit.test_resident import ablation_for

NEW_TOKENS = 9


def edit(strength: float, index: float | None = 0.4) -> Edit:
    return Edit(index, {"attention": Profile(strength, 1.0, 0.4, 1.5), "mlp": Profile(0.9, 0.0, 0.3, 0.5)})


EDITS = [[edit(1.1), None, edit(0.7, None)], [edit(0.2), edit(1.4, 0.9)], [edit(1.3)], [edit(0.1), edit(1.4), None]]
"""Of several passes: other edits, fewer of them, one alone (which edits weights), and the first number again."""


def engine_of(model, cuda_graphs, batch_size=7):
    return ResidentEngine(
        model, families.tokenizer(), find_anatomy(model), NEW_TOKENS, batch_size, cuda_graphs=cuda_graphs
    )


def answers_and_kl(model, trials, cuda_graphs, row_norm="full"):
    """Of all passes of `EDITS`, with as many edits each at most."""
    engine = engine_of(model, cuda_graphs)
    engine.prepare(ablation_for(engine, row_norm))
    reference, found = engine.reference(prompts()), []
    answers = []
    for edits in EDITS:
        found += engine.kl(prompts(), reference, edits[:trials])
        answers.append(engine.generate(prompts(), edits[:trials], stop_some))
    engine.restore()
    return answers, found


@pytest.fixture
def recorder(monkeypatch):
    """Stand-ins for graphs, in sizes that tiny batches need several of."""
    recorder = Recorder()
    monkeypatch.setattr(replays, "maker_for", lambda device: recorder)
    monkeypatch.setattr(graphs, "_FEWEST_ROWS", 2)
    monkeypatch.setattr(graphs, "_FEWEST_COLUMNS", 8)
    return recorder


@pytest.mark.parametrize("row_norm", ROW_NORMS)
@pytest.mark.parametrize("trials", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_answers_and_kl_are_those_of_eager_steps(family, trials, row_norm, recorder):
    model = families.build(family)
    answers, kl = answers_and_kl(model, trials, True, row_norm)
    assert recorder.replayed > 20
    replayed = recorder.replayed
    expected, expected_kl = answers_and_kl(model, trials, False, row_norm)
    assert recorder.replayed == replayed
    assert answers == expected
    assert kl == pytest.approx(expected_kl, rel=1e-4, abs=1e-6)
    flat = {tuple(map(tuple, of_trial)) for of_pass in answers for of_trial in of_pass}
    assert len(flat) > trials  # edits make a difference


def test_new_edits_are_seen_by_what_was_captured_before(recorder, monkeypatch):
    """In outputs and in weights; but not where directions are new, or more trials than there is memory for."""
    monkeypatch.setattr(graphs, "_FEWEST_ROWS", 8)
    monkeypatch.setattr(graphs, "_FEWEST_COLUMNS", 64)  # one size of graphs
    model = families.build("qwen3_moe")
    engine = engine_of(model, True)
    engine.prepare(ablation_for(engine))
    first = engine.generate(prompts(), [edit(1.1), edit(0.6), None])
    alone = engine.generate(prompts(), [edit(1.1)])
    assert recorder.made == 2
    for edits in ([edit(0.3), None, edit(1.4)], [edit(0.5), edit(1.0)], [edit(0.8)], [None], [edit(1.1)]):
        engine.generate(prompts(), edits)
    assert engine.generate(prompts(), [edit(1.1), edit(0.6), None]) == first
    assert engine.generate(prompts(), [edit(1.1)]) == alone
    assert recorder.made == 2
    engine.generate(prompts(), [edit(0.1 * number) for number in range(1, 5)])
    assert recorder.made == 3
    engine.prepare(ablation_for(engine, "none"))
    engine.generate(prompts(), [edit(1.1), edit(0.6)])
    assert recorder.made == 4


def test_edits_of_experts_without_tables_are_seen_by_what_was_captured_before(recorder, monkeypatch):
    model = families.build("mixtral", layers=5)
    expected = answers_and_kl(model, 3, False)
    experts = [writer for writer in find_anatomy(model).writers if writer.experts]
    monkeypatch.setattr(tables, "_LEAST_BYTES", 4 * tables.bytes_of_vectors(model, experts))
    monkeypatch.setattr(tables, "_SHARE_OF_WEIGHTS", 0.0)
    assert engine_prepared(model).max_edits_per_pass == 3
    answers, kl = answers_and_kl(model, 3, True)
    assert recorder.replayed > 20
    assert answers == expected[0] and kl == pytest.approx(expected[1], rel=1e-4, abs=1e-6)


def engine_prepared(model):
    engine = engine_of(model, True)
    engine.prepare(ablation_for(engine))
    return engine


def test_steps_captured_with_other_directions_are_not_replayed(recorder):
    model, edits = families.build("llama"), [edit(3.0), edit(2.0, None)]
    engine, eager = engine_of(model, True), engine_of(model, False)
    first = ablation_for(engine, "none")
    answers = []
    for ablation in (first, dataclasses.replace(first, directions_LD=first.directions_LD.flip(-1)), first):
        for each in (engine, eager):
            each.prepare(ablation)
        answers.append(engine.generate(prompts(), edits))
        assert answers[-1] == eager.generate(prompts(), edits)
    assert answers[0] == answers[2] != answers[1] and recorder.replayed > 20


def test_graphs_of_edits_that_got_other_memory_are_dropped(recorder):
    """They are never replayed again; only those without edits of their rows are good for ever."""
    model = families.build("llama")
    engine = engine_of(model, True)
    engine.prepare(ablation_for(engine))
    engine.generate(prompts(), [edit(1.1)])
    for number in range(2, 5):  # more trials in each pass than in any before
        engine.generate(prompts(), [edit(0.3 * one) for one in range(1, number + 1)])
        assert {kind for kind, _, _ in engine._replays.steps()._graphs} == {0, number}


def test_trials_without_any_edit_do_not_get_those_of_a_pass_before(recorder):
    model = families.build("llama")
    engine = engine_of(model, True)
    engine.prepare(ablation_for(engine))
    original = engine.generate(prompts(), [None])[0]
    engine.generate(prompts(), [edit(1.1), edit(0.6)])
    assert engine.generate(prompts(), [None, None]) == [original, original]


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_memory_that_runs_out_while_capturing_halves_rows_twice_before_steps_are_eager(failures, monkeypatch, caplog):
    recorder = Recorder((torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much"),) * failures)
    monkeypatch.setattr(replays, "maker_for", lambda device: recorder)
    model, slots_of = families.build("llama"), []
    reserve = graphs.ReplayedSteps.reserve
    monkeypatch.setattr(
        graphs.ReplayedSteps, "reserve", lambda self, rows, *more: slots_of.append(rows) or reserve(self, rows, *more)
    )
    with caplog.at_level(logging.INFO, logger="heretic_ds"):
        answers, kl = answers_and_kl(model, 3, True)
    said = [record.message for record in caplog.records if "CUDA graphs" in record.message]
    assert (
        said
        == [
            "CUDA graphs of 7 rows: memory ran out while a step was captured; going on with 3",
            "CUDA graphs of 3 rows: memory ran out while a step was captured; going on with 1",
            "decoding without CUDA graphs: memory ran out while a step was captured",
        ][:failures]
    )
    assert slots_of[: failures + 1] == [7, 3, 1][: failures + 1] and max(slots_of[failures:], default=0) <= 3
    assert (answers, kl) == answers_and_kl(model, 3, False) and (recorder.replayed > 20) is (failures < 3)


def test_rows_are_not_halved_any_number_of_times(monkeypatch, caplog):
    monkeypatch.setattr(replays, "_HALVINGS", 1)
    recorder = Recorder((torch.OutOfMemoryError("CUDA out of memory"),) * 2)
    monkeypatch.setattr(replays, "maker_for", lambda device: recorder)
    with caplog.at_level(logging.INFO, logger="heretic_ds"):
        answers_and_kl(families.build("llama"), 3, True)
    assert caplog.text.count("going on with 3") == caplog.text.count("decoding without CUDA graphs") == 1
    assert recorder.replayed == 0


def test_a_step_that_cannot_be_captured_is_not_tried_with_fewer_rows(monkeypatch, caplog):
    """Whatever the model's own code raised."""
    monkeypatch.setattr(replays, "maker_for", lambda device: Recorder((KeyError("full_attention"),)))
    model = families.build("llama")
    with caplog.at_level(logging.INFO, logger="heretic_ds"):
        found = answers_and_kl(model, 3, True)
    assert caplog.text.count("CUDA graphs") == 1
    assert "without CUDA graphs: a step cannot be captured (KeyError: 'full_attention')" in caplog.text
    assert found == answers_and_kl(model, 3, False)


def test_memory_that_a_trial_step_lacks_leaves_eager_steps(recorder, monkeypatch, caplog):
    model = families.build("llama")
    expected = answers_and_kl(model, 3, False)
    monkeypatch.setattr(replays, "probe", lambda model: _raise(torch.OutOfMemoryError("CUDA out of memory")))
    with caplog.at_level(logging.INFO, logger="heretic_ds"):
        assert answers_and_kl(model, 3, True) == expected
    assert caplog.text.count("without CUDA graphs: memory ran out in a trial step") == 1 and recorder.made == 0


def test_a_batch_size_is_measured_in_all_the_memory_there_is(recorder):
    """What slots hold is given back before, and taken again afterwards."""
    model = families.build("llama")
    engine = engine_of(model, True)
    engine.prepare(ablation_for(engine))
    answers = engine.generate(prompts(), [edit(1.1)])
    steps, logits, held = engine._replays.steps(), engine._first_token_logits, []
    assert steps is not None and steps._slots is not None
    engine._first_token_logits = lambda rows: held.append(steps._slots) or logits(rows)
    del engine.batch_sizes["kl"]
    engine.reference(prompts())
    assert held and set(held) == {None} and engine.batch_sizes["kl"] >= 1
    replayed = recorder.replayed
    assert engine.generate(prompts(), [edit(1.1)]) == answers
    assert recorder.replayed > replayed and engine._replays.steps() is steps and steps._slots is not None


def test_memory_that_runs_out_midway_costs_no_answer(recorder, monkeypatch, caplog):
    """Answers that have ended are kept; the others begin anew, fewer at a time, each row with its own trial's edit."""
    model = families.build("llama")
    expected = answers_and_kl(model, 3, False)
    step, count = graphs.ReplayedSteps.step, [0]

    def failing(self, *arguments):
        count[0] += 1
        if count[0] == 11:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *arguments)

    monkeypatch.setattr(graphs.ReplayedSteps, "step", failing)
    with caplog.at_level(logging.INFO, logger="heretic_ds"):
        answers, kl = answers_and_kl(model, 3, True)
    assert (answers, kl) == expected
    assert caplog.text.count("memory ran out beside what replayed steps keep; going on with 3") == 1
    assert count[0] > 30 and "without" not in caplog.text


def test_memory_that_other_phases_lack_is_given_back_before_their_batches_get_smaller(recorder, monkeypatch, caplog):
    model = families.build("llama")
    engine = engine_of(model, True)
    engine.prepare(ablation_for(engine))
    reference = engine.reference(prompts())
    expected = engine.kl(prompts(), reference, [edit(1.1)])
    answers = engine.generate(prompts(), [edit(1.1)])
    logits, failures = engine._first_token_logits, [torch.OutOfMemoryError("CUDA out of memory")]
    monkeypatch.setattr(
        engine, "_first_token_logits", lambda rows: _raise(failures.pop()) if failures else logits(rows)
    )
    with caplog.at_level(logging.INFO, logger="heretic_ds"):
        assert engine.kl(prompts(), reference, [edit(1.1)]) == expected
    assert engine.batch_sizes["kl"] == 7 and "rows in a batch" not in caplog.text
    assert caplog.text.count("memory ran out beside what replayed steps keep") == 1
    replayed = recorder.replayed
    assert engine.generate(prompts(), [edit(1.1)]) == answers and recorder.replayed == replayed
    failures.append(torch.OutOfMemoryError("CUDA out of memory"))
    engine.kl(prompts(), reference, [edit(1.1)])
    assert engine.batch_sizes["kl"] == 3


def _raise(error):
    raise error


def test_memory_is_given_back_at_the_end(recorder):
    model = families.build("llama")
    engine = engine_of(model, True)
    engine.prepare(ablation_for(engine))
    engine.generate(prompts(), [None])
    steps = engine._replays.steps()
    assert steps is not None and steps.slots.rows == 7
    engine.close()
    assert steps._graphs == {} and steps._slots is None


def test_on_a_device_without_graphs_nothing_is_said(caplog):
    with caplog.at_level(logging.INFO, logger="heretic_ds"):
        assert Replays(families.build("llama"), find_anatomy(families.build("llama")), wanted=True).steps() is None
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3_next", "state of their own (LinearAttentionLayer)"),
        ("lfm2", "state of their own (LinearAttentionLayer)"),
        ("bloom", "positions from the mask alone"),
        ("llama4", "layers of chunked_attention"),
    ],
)
def test_models_whose_steps_cannot_be_replayed(family, reason, recorder, caplog):
    model = families.build(family)
    given = Replays(model, find_anatomy(model), wanted=True)
    with caplog.at_level(logging.INFO, logger="heretic_ds"):
        assert given.steps() is None and given.steps() is None
    assert caplog.text.count("decoding without CUDA graphs: ") == 1 and reason in caplog.text


def test_other_reasons_against_it(recorder):
    moe, llama = families.build("mixtral"), families.build("llama")
    assert obstacle(moe, find_anatomy(moe)) is None
    moe.set_experts_implementation("eager")
    assert "experts implementation eager" in str(obstacle(moe, find_anatomy(moe)))
    moe.set_experts_implementation("grouped_mm")
    assert obstacle(moe, find_anatomy(moe)) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replays, "waits_for_groups", lambda device, dtype: dtype == torch.float32)
        assert "waits for the sizes of grouped products of torch.float32" in str(obstacle(moe, find_anatomy(moe)))
        moe.set_experts_implementation("batched_mm")
        assert obstacle(moe, find_anatomy(moe)) is None
    anatomy = find_anatomy(llama)
    llama.config.rope_parameters = {"full_attention": {"rope_type": "dynamic", "rope_theta": 1e4}}
    assert "longest row" in str(obstacle(llama, anatomy))
    llama.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    assert obstacle(llama, anatomy) is None
    llama.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2 takes no mask" in str(obstacle(llama, anatomy))


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "waits"),
    [
        ("cuda:1", torch.bfloat16, (9, 0), False),
        ("cuda:1", torch.bfloat16, (10, 0), False),
        ("cuda:1", torch.bfloat16, (8, 9), True),
        ("cuda:1", torch.float16, (9, 0), True),
        ("cuda:1", torch.float32, (10, 0), True),
        ("cpu", torch.float32, None, False),
    ],
)
def test_grouped_products_that_make_the_host_wait(device, dtype, capability, waits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda asked: {torch.device("cuda:1"): capability}[asked])
    assert replays.waits_for_groups(torch.device(device), dtype) is waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_for_which_slots_are_something_else_is_found_out(dtype, recorder, caplog, monkeypatch):
    """By comparing a step: here one more position is hidden than should be."""
    model = families.build("llama", dtype=dtype)
    assert Replays(model, find_anatomy(model), wanted=True).steps() is not None
    mask = slots.Slots._mask
    monkeypatch.setattr(slots.Slots, "_mask", lambda self, seen_BC: mask(self, seen_BC & (seen_BC.cumsum(-1) > 1)))
    with caplog.at_level(logging.INFO, logger="heretic_ds"):
        assert Replays(model, find_anatomy(model), wanted=True).steps() is None
    assert "a trial step gave other logits" in caplog.text
    monkeypatch.setattr(nn.Module, "__call__", lambda *_, **__: (_ for _ in ()).throw(TypeError("no such\nargument")))
    with caplog.at_level(logging.INFO, logger="heretic_ds"):
        assert Replays(model, find_anatomy(model), wanted=True).steps() is None
    assert "a trial step failed (TypeError: no such)" in caplog.text


@pytest.mark.parametrize("window", [4, 512])
def test_a_model_that_takes_no_masks_by_kind_of_layer_shows_it_in_the_trial_step(window, recorder, caplog, monkeypatch):
    """Also where its window is longer than that step."""
    model = families.build("gemma2")
    for module in (model, *model.modules()):
        for holder in (module, getattr(module, "config", None)):
            if getattr(holder, "sliding_window", None) is not None:
                monkeypatch.setattr(holder, "sliding_window", window)
    assert Replays(model, find_anatomy(model), wanted=True).steps() is not None
    forward = type(model.model).forward

    def one_mask(self, *args, attention_mask=None, **options):
        return forward(self, *args, attention_mask=attention_mask.bool(), **options)

    monkeypatch.setattr(model.model, "forward", one_mask.__get__(model.model))
    with caplog.at_level(logging.INFO, logger="heretic_ds"):
        assert Replays(model, find_anatomy(model), wanted=True).steps() is None
    assert "a trial step failed (AttributeError: 'dict' object has no attribute 'bool')" in caplog.text


def test_the_setting_reaches_the_engine(evaluated):
    for words, over in ((["generation.cuda_graphs=false"], True), ([], False)):
        engine = evaluated(*words)
        assert engine._replays._over is over
        engine.close()
