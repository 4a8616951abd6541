"""Runners whose steps are captured: what `generation.cuda_graphs=false` gives, and why they are given up.

Graphs are stand-ins that do recorded operations again on the same memory, with none of the model's Python.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref

import pytest
import torch
from torch import nn

from heretic_ds.ablation import ROW_NORMS, Edit, Profile
from heretic_ds.anatomy import find_anatomy
from heretic_ds.edits import tables
from heretic_ds.runner import decode as decoding
from heretic_ds.runner import graphs, slots
from heretic_ds.runner.comm import PeerRanOut
from heretic_ds.runner.decode import Decoder
from heretic_ds.runner.engine import Runner, RunnerOptions
from heretic_ds.runner.forward import Forward
from heretic_ds.runner.graphs import Graphs
from heretic_ds.runner.sizing.sizes import Sizes
from heretic_ds.scoring.kl import Divergence
from tests import families
from tests.recorded_graphs import Recorder
from tests.unit.test_decode import decoder_of, prompts, stop_some
from tests.unit.test_resident import ablation_for

NEW_TOKENS = 9


def edit(strength: float, index: float | None = 0.4) -> Edit:
    return Edit(index, {"attention": Profile(strength, 1.0, 0.4, 1.5), "mlp": Profile(0.9, 0.0, 0.3, 0.5)})


EDITS = [[edit(1.1), None, edit(0.7, None)], [edit(0.2), edit(1.4, 0.9)], [edit(1.3)], [edit(0.1), edit(1.4), None]]
"""Of several passes: other edits, fewer of them, one alone (which edits weights), and the first number again."""


def engine_of(model, cuda_graphs=True, batch_size=7, row_norm="full") -> Runner:
    options = RunnerOptions(NEW_TOKENS, batch_size, cuda_graphs)
    engine = Runner(model, find_anatomy(model), families.tokenizer(), options)
    engine.prepare(ablation_for(engine, row_norm))
    return engine


def answers_and_kl(model, trials, cuda_graphs, row_norm="full"):
    """Of all passes of `EDITS`, with as many edits each at most."""
    engine = engine_of(model, cuda_graphs, row_norm=row_norm)
    reference, answers, found = Divergence().begin(engine, prompts()), [], []
    for edits in EDITS:
        found += reference.of(edits[:trials])
        answers.append(engine.generate(prompts(), edits[:trials], stop_some))
    engine.restore()
    return answers, found


@pytest.fixture
def recorder(monkeypatch):
    """Stand-ins for graphs, in sizes that tiny batches need several of."""
    recorder = Recorder()
    monkeypatch.setattr(graphs, "makers_for", lambda device: lambda: recorder)
    monkeypatch.setattr(decoding, "_AHEAD", {"cpu": 1})
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
    engine = engine_of(model)
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


def test_steps_captured_with_other_directions_are_not_replayed(recorder):
    model, edits = families.build("llama"), [edit(3.0), edit(2.0, None)]
    engine, eager = engine_of(model), engine_of(model, False)
    first = ablation_for(engine, "none")
    answers = []
    for ablation in (first, dataclasses.replace(first, directions_LRD=first.directions_LRD.flip(-1)), first):
        for each in (engine, eager):
            each.prepare(ablation)
        answers.append(engine.generate(prompts(), edits))
        assert answers[-1] == eager.generate(prompts(), edits)
    assert answers[0] == answers[2] != answers[1] and recorder.replayed > 20


def test_graphs_of_edits_that_got_other_memory_are_dropped(recorder):
    """They are never replayed again; only those without edits of their rows are good for ever."""
    model = families.build("llama")
    engine = engine_of(model)
    engine.generate(prompts(), [edit(1.1)])
    for number in range(2, 5):  # more trials in each pass than in any before
        engine.generate(prompts(), [edit(0.3 * one) for one in range(1, number + 1)])
        assert {kind for kind, _, _ in engine._decoder._graphs._graphs} == {0, number}


def test_trials_without_any_edit_do_not_get_those_of_a_pass_before(recorder):
    model = families.build("llama")
    engine = engine_of(model)
    original = engine.generate(prompts(), [None])[0]
    engine.generate(prompts(), [edit(1.1), edit(0.6)])
    assert engine.generate(prompts(), [None, None]) == [original, original]


@pytest.fixture
def said(caplog):
    """Lines about graphs and batches."""
    caplog.set_level(logging.INFO, logger="heretic_ds")
    return lambda: [line for line in caplog.messages if "CUDA graphs" in line or "batch" in line]


def no_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")


OUT_OF = "out of memory with {} rows in a batch (generate); going on with {}"
GIVEN_UP = "decoding without CUDA graphs: memory ran out beside what captured steps keep"


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_memory_that_runs_out_while_capturing_halves_rows_twice_before_graphs_are_given_up(
    failures, recorder, monkeypatch, said
):
    recorder.failures, model, rows, made = [no_memory()] * failures, families.build("llama"), [], Graphs.__init__
    monkeypatch.setattr(Graphs, "__init__", lambda self, *given: rows.append(given[0].rows) or made(self, *given))
    answers, kl = answers_and_kl(model, 3, True)
    assert said() == [OUT_OF.format(7, 3), OUT_OF.format(3, 1), GIVEN_UP][:failures]
    assert rows == [7, 3, 1][: failures + 1] and (recorder.replayed > 20) is (failures < 3)
    assert (answers, kl) == answers_and_kl(model, 3, False)


@pytest.mark.parametrize(("halvings", "batch_size"), [(1, 7), (2, 3), (2, 2), (2, 1)])
def test_rows_are_not_halved_any_number_of_times_and_one_row_is_not_given_up(
    halvings, batch_size, recorder, monkeypatch, said
):
    monkeypatch.setattr(decoding, "_HALVINGS", halvings)
    model, halved = families.build("llama"), min(halvings, batch_size.bit_length() - 1)
    recorder.failures = [no_memory()] * (halved + 1)
    answers = engine_of(model, batch_size=batch_size).generate(prompts(), [edit(1.1), None])
    sizes = [(batch_size >> times, batch_size >> times + 1) for times in range(halved)]
    assert said() == [*(OUT_OF.format(*size) for size in sizes), GIVEN_UP] and recorder.replayed == 0
    assert answers == engine_of(model, False).generate(prompts(), [edit(1.1), None])


def test_one_last_row_for_which_memory_runs_out_is_answered_without_graphs(recorder, monkeypatch, said):
    """Although there were many in its batch, which could have been halved."""
    model, replay = families.build("llama"), Graphs.replay
    expected = engine_of(model, False).generate(prompts(), [None])
    last, rows, answers_to = expected[0][8], [], Decoder.answers  # of the shortest prompt
    monkeypatch.setattr(
        Decoder, "answers", lambda self, given, *more: rows.extend(given) or answers_to(self, given, *more)
    )
    monkeypatch.setattr(
        Graphs, "replay", lambda *given: _raise(no_memory()) if sum(not r.done for r in rows) == 1 else replay(*given)
    )
    engine = engine_of(model)
    answers = engine.generate(prompts(), [None], lambda given: [answer != last[: len(answer)] for answer in given])
    assert said() == [GIVEN_UP] and engine.batch_sizes["generate"] == 7
    assert answers[0][8] == last and len(last) == NEW_TOKENS and recorder.replayed > 0


def test_a_step_that_cannot_be_captured_is_not_tried_with_fewer_rows(recorder, said):
    """Whatever the model's own code raised."""
    recorder.failures, model = [KeyError("full_attention")], families.build("llama")
    found = answers_and_kl(model, 3, True)
    assert said() == ["decoding without CUDA graphs: a step cannot be captured (KeyError: 'full_attention')"]
    assert found == answers_and_kl(model, 3, False)


def test_memory_that_a_trial_step_lacks_leaves_whole_batches(recorder, monkeypatch, said):
    model = families.build("llama")
    expected = answers_and_kl(model, 3, False)
    monkeypatch.setattr(decoding, "slot_distances", lambda forward: _raise(no_memory()))
    assert answers_and_kl(model, 3, True) == expected and recorder.made == 0
    reason = "memory ran out in a trial step"
    assert said() == [f"answers are decoded batch by batch: {reason}", f"decoding without CUDA graphs: {reason}"]


@pytest.mark.parametrize("error", [no_memory(), PeerRanOut(by_all=True)])
def test_memory_that_a_trial_step_lacks_on_any_rank_is_no_mistake_of_the_model(error, monkeypatch, said):
    """All ranks of the step have to know; one that took it for an answer would leave the others waiting."""
    monkeypatch.setattr(decoding, "slot_distances", lambda forward: _raise(error))
    with pytest.raises(type(error)):
        settled(families.build("llama"))
    assert said() == []


def test_a_batch_size_is_measured_in_all_the_memory_there_is(recorder, monkeypatch):
    """What slots hold is given back before, and taken again afterwards."""
    engine, held, passes = engine_of(families.build("llama")), [], Forward.__call__
    answers = engine.generate(prompts(), [edit(1.1)])
    assert engine._decoder._graphs is not None
    monkeypatch.setattr(
        Forward, "__call__", lambda *given, **more: held.append(engine._decoder._graphs) or passes(*given, **more)
    )
    del engine.batch_sizes["kl"]
    Divergence().begin(engine, prompts())
    assert held and set(held) == {None} and engine.batch_sizes["kl"] >= 1
    replayed = recorder.replayed
    assert engine.generate(prompts(), [edit(1.1)]) == answers
    assert recorder.replayed > replayed and engine._decoder._graphs is not None


def test_no_step_is_captured_while_a_batch_size_is_measured(recorder, monkeypatch):
    """Capturing would be timed, and slots of the largest size that is tried would stay."""
    engine, held, find = engine_of(families.build("llama"), batch_size=0), [], Sizes.find

    def noted(sizes, rows, phase, *more, **known):
        find(sizes, rows, phase, *more, **known)
        held.append((phase, engine._decoder._graphs))

    monkeypatch.setattr(Sizes, "find", noted)
    engine.generate(prompts(), [None])
    assert held == [("generate", None)] and engine.batch_sizes["generate"] >= 1
    assert engine._decoder._graphs is not None and recorder.replayed


def test_memory_that_runs_out_midway_costs_no_answer(recorder, monkeypatch, said):
    """Answers that have ended are kept; the others begin anew, fewer at a time, each row with its own trial's edit."""
    model = families.build("llama")
    expected = answers_and_kl(model, 3, False)
    replay, count = Graphs.replay, [0]

    def failing(self, *arguments):
        count[0] += 1
        if count[0] == 11:
            raise no_memory()
        replay(self, *arguments)

    monkeypatch.setattr(Graphs, "replay", failing)
    assert answers_and_kl(model, 3, True) == expected
    assert said() == [OUT_OF.format(7, 3)] and count[0] > 30


def test_memory_that_other_phases_lack_is_given_back_before_their_batches_get_smaller(recorder, monkeypatch, said):
    engine = engine_of(families.build("llama"))
    reference = Divergence().begin(engine, prompts())
    expected = reference.of([edit(1.1)])
    answers = engine.generate(prompts(), [edit(1.1)])
    passes, failures = Forward.__call__, [no_memory()]
    monkeypatch.setattr(
        Forward, "__call__", lambda *given, **more: _raise(failures.pop()) if failures else passes(*given, **more)
    )
    assert reference.of([edit(1.1)]) == expected
    assert engine.batch_sizes["kl"] == 7 and said() == [GIVEN_UP]
    replayed = recorder.replayed
    assert engine.generate(prompts(), [edit(1.1)]) == answers and recorder.replayed == replayed
    failures.append(no_memory())
    reference.of([edit(1.1)])
    assert engine.batch_sizes["kl"] == 3


def _raise(error):
    raise error


@pytest.mark.parametrize("failing", [False, True])
def test_memory_is_given_back_at_the_end_and_when_a_step_cannot_be_captured(failing, recorder, monkeypatch):
    """Before anything else is asked of the device."""
    kept, freed, made = [], [], Graphs.__init__
    monkeypatch.setattr(
        Graphs, "__init__", lambda self, memory, *more: kept.append(weakref.ref(memory)) or made(self, memory, *more)
    )
    monkeypatch.setattr(decoding, "release_memory", lambda: freed.append(gc.collect() >= 0 and kept[-1]() is None))
    engine, recorder.failures = engine_of(families.build("llama")), [KeyError("mask")] * failing
    engine.generate(prompts(), [None])
    assert freed == [True] * failing and (failing or kept[-1]().rows == 7)
    engine.close()
    assert freed == [True]


def test_on_a_device_without_graphs_nothing_is_said(said):
    engine = engine_of(families.build("llama"))
    engine.generate(prompts(), [None])
    assert not engine._decoder.captures and said() == []


def settled(model) -> Decoder:
    decoder = decoder_of(model)
    decoder.settle(), decoder.settle()
    return decoder


def reasons(said) -> set[str]:
    """Why rows do not lie in slots, and steps are not captured: each said once."""
    lines = said()
    assert [line.partition(": ")[0] for line in lines] == [
        "answers are decoded batch by batch", "decoding without CUDA graphs"
    ]  # fmt: skip
    return {line.partition(": ")[2] for line in lines}


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3_next", "the model's cache has layers with a state of their own (LinearAttentionLayer)"),
        ("lfm2", "the model's cache has layers with a state of their own (LinearAttentionLayer)"),
        ("bloom", "the model takes positions from the mask alone"),
        ("llama4", "the model has layers of chunked_attention"),
    ],
)
def test_models_whose_rows_cannot_lie_in_slots(family, reason, recorder, said):
    decoder = settled(families.build(family))
    assert not decoder.captures and not decoder.moves_rows and reasons(said) == {reason}


def test_other_reasons_against_it(recorder, said):
    moe, llama = families.build("mixtral"), families.build("llama")
    forward, anatomy = Forward(moe, families.PAD), find_anatomy(moe)
    assert graphs.obstacle(forward, anatomy) is None
    moe.set_experts_implementation("eager")
    assert "experts implementation eager" in str(graphs.obstacle(forward, anatomy))
    decoder = settled(moe)
    assert decoder.moves_rows and not decoder.captures and len(said()) == 1
    moe.set_experts_implementation("grouped_mm")
    assert graphs.obstacle(forward, anatomy) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "waits_for_groups", lambda device, dtype: dtype == torch.float32)
        assert "waits for the sizes of grouped products of torch.float32" in str(graphs.obstacle(forward, anatomy))
        moe.set_experts_implementation("batched_mm")
        assert graphs.obstacle(forward, anatomy) is None
    forward = Forward(llama, families.PAD)
    llama.config.rope_parameters = {"full_attention": {"rope_type": "dynamic", "rope_theta": 1e4}}
    assert "longest row" in str(slots.obstacle(forward))
    llama.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    assert slots.obstacle(forward) is None
    llama.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2 takes no mask" in str(slots.obstacle(forward))


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
    assert graphs.waits_for_groups(torch.device(device), dtype) is waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_for_which_slots_are_something_else_is_found_out(dtype, recorder, said, caplog, monkeypatch):
    """By comparing a step: here one more position is hidden than should be."""
    model = families.build("llama", dtype=dtype)
    assert settled(model).captures and said() == []
    mask = slots.Slots._mask
    monkeypatch.setattr(slots.Slots, "_mask", lambda self, seen_BC: mask(self, seen_BC & (seen_BC.cumsum(-1) > 1)))
    assert not settled(model).moves_rows
    assert all(reason.startswith("a trial step gave other logits (off by ") for reason in reasons(said))
    caplog.clear()
    monkeypatch.setattr(nn.Module, "__call__", lambda *_, **__: _raise(TypeError("no such\nargument")))
    assert not settled(model).moves_rows and reasons(said) == {"a trial step failed (TypeError: no such)"}


@pytest.mark.parametrize("window", [4, 512])
def test_a_model_that_takes_no_masks_by_kind_of_layer_shows_it_in_the_trial_step(window, recorder, said, monkeypatch):
    """Also where its window is longer than that step."""
    model = families.build("gemma2")
    for module in (model, *model.modules()):
        for holder in (module, getattr(module, "config", None)):
            if getattr(holder, "sliding_window", None) is not None:
                monkeypatch.setattr(holder, "sliding_window", window)
    assert settled(model).captures
    forward = type(model.model).forward

    def one_mask(self, *args, attention_mask=None, **options):
        return forward(self, *args, attention_mask=attention_mask.bool(), **options)

    monkeypatch.setattr(model.model, "forward", one_mask.__get__(model.model))
    assert not settled(model).moves_rows
    assert reasons(said) == {"a trial step failed (AttributeError: 'dict' object has no attribute 'bool')"}


def test_the_setting_reaches_the_decoder(evaluated, recorder):
    for words, captures in ((["generation.cuda_graphs=false"], False), ([], True)):
        engine = evaluated(*words)
        assert engine._decoder.captures is captures
        engine.close()


def test_edits_of_experts_without_tables_are_seen_by_what_was_captured_before(recorder, monkeypatch):
    model = families.build("mixtral", layers=5)
    expected = answers_and_kl(model, 3, False)
    experts = [writer for writer in find_anatomy(model).writers if writer.experts]
    monkeypatch.setattr(tables, "_LEAST_BYTES", 4 * tables.bytes_of_vectors(model, experts))
    monkeypatch.setattr(tables, "_SHARE_OF_WEIGHTS", 0.0)
    engine = engine_of(model, True)
    engine.prepare(ablation_for(engine))
    assert engine.max_edits_per_pass == 3
    answers, kl = answers_and_kl(model, 3, True)
    assert recorder.replayed > 20
    assert answers == expected[0] and kl == pytest.approx(expected[1], rel=1e-4, abs=1e-6)
