"""Decoding by replayed steps: the answers of one prompt at a time, in few steps that are full, and none captured twice.

Graphs are stand-ins that do recorded operations again on the same memory.
"""

from __future__ import annotations

import pytest
import torch

from heretic_ds.anatomy import find_anatomy
from heretic_ds.runner import graphs, padding, slot_decoding
from heretic_ds.runner.decode import finished_answers
from heretic_ds.runner.graphs import CannotReplay, NoRoom, ReplayedSteps
from heretic_ds.runner.replays import obstacle
from heretic_ds.runner.slot_decoding import replayed_answers
from tests import families
from tests.recorded_graphs import Recorder
from tests.unit.test_decoding import ENDS, LENGTHS, NEW_TOKENS, PAD, expected_of, prompts, stop_some

SERVED = [name for name in families.REQUIRED if name not in ("qwen3_next", "qwen3_5", "lfm2")]


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """So that tiny batches need graphs of several sizes, and prompts begin in several passes."""
    monkeypatch.setattr(graphs, "_FEWEST_ROWS", 2)
    monkeypatch.setattr(graphs, "_FEWEST_COLUMNS", 8)
    monkeypatch.setattr(padding, "PASS_IN_TOKENS", 6)


@pytest.fixture(scope="module", params=SERVED)
def family(request):
    return request.param, families.build(request.param)


def replayed(model, rows, recorder, new_tokens=NEW_TOKENS, decided=None, rows_at_once=5, **options):
    steps = ReplayedSteps(model, lambda: recorder)
    return dict(replayed_answers(model, steps, rows, PAD, ENDS, new_tokens, decided, rows_at_once, **options))


@pytest.mark.parametrize("decided", [None, stop_some])
def test_answers_equal_those_of_one_prompt_at_a_time(family, decided):
    name, model = family
    assert obstacle(model, find_anatomy(model)) is None
    recorder = Recorder()
    answers = replayed(model, prompts(), recorder, decided=decided)
    assert sorted(answers) == list(range(len(LENGTHS)))
    compared = 0
    for index, row in enumerate(prompts()):
        expected, margin = expected_of(model, row, decided)
        if margin > 1e-4:
            assert answers[index] == expected, name
            compared += 1
    assert compared >= len(LENGTHS) // 2
    assert 2 <= recorder.made <= 6 and recorder.replayed > 2 * recorder.made


def stop_most(answers):
    return [answer[0] % 3 > 0 for answer in answers]


def test_freed_slots_are_given_to_the_next_prompts():
    """At most one step more per row than where tokens are waited for, and steps as full."""
    model, rows, new_tokens = families.build("llama"), prompts() * 4, 13
    recorder, sizes = Recorder(), []
    step = ReplayedSteps.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReplayedSteps, "step", lambda self, n, *more: sizes.append(n) or step(self, n, *more))
        answers = replayed(model, rows, recorder, new_tokens, stop_most, rows_at_once=8)
    passes = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    eager = dict(finished_answers(model, rows, PAD, ENDS, new_tokens, stop_most, rows_at_once=8))
    handle.remove()
    assert answers == eager
    eager_sizes = [count for count, length in passes if length == 1]
    assert len(sizes) <= 1.3 * len(eager_sizes)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 8 and sizes[-1] <= 4
    assert sum(sizes) / len(sizes) > 6


def test_a_step_is_always_under_way_when_tokens_are_read(monkeypatch):
    """But for the last one, and those before rows come or move."""
    model, events = families.build("llama"), []
    step = ReplayedSteps.step

    def launched(self, *arguments):
        events.append("step")
        return step(self, *arguments)

    def later(token_B):
        tokens = token_B.tolist()
        return lambda: events.append("read") or tokens

    monkeypatch.setattr(ReplayedSteps, "step", launched)
    monkeypatch.setattr(slot_decoding, "read_later", later)
    answers = replayed(model, prompts()[:4], Recorder(), rows_at_once=4)
    assert all(len(answer) == NEW_TOKENS for answer in answers.values())
    assert events == ["step", *["step", "read"] * (NEW_TOKENS - 2), "read"]


def test_rows_are_announced_in_memory_that_stays(monkeypatch):
    """Whenever they have changed; and prompts before they begin."""
    model, seen = families.build("llama"), []
    steps = ReplayedSteps(model, lambda: Recorder())
    memory: set[int] = set()

    def on_rows(rows, into=None):
        if into is None:
            seen.append(list(rows))
        else:
            memory.add(into.data_ptr())
            assert into.shape == (len(rows),)
            into.copy_(torch.tensor(rows))

    taken = []
    step = ReplayedSteps.step

    def checked(self, rows, *more):
        taken.append((self.slots.trial_R[:rows].tolist(), self.slots.token_R[:rows].tolist()))
        return step(self, rows, *more)

    monkeypatch.setattr(ReplayedSteps, "step", checked)
    answers = dict(
        replayed_answers(model, steps, prompts(), PAD, ENDS, NEW_TOKENS, stop_some, rows_at_once=4, on_rows=on_rows)
    )
    assert len(memory) == 1 and sorted(row for rows in seen for row in rows) == list(range(len(LENGTHS)))
    fed: dict[int, list[int]] = {index: [] for index in answers}
    for rows, tokens in taken:
        for index, token in zip(rows, tokens, strict=True):
            fed[index].append(token)
    for index, answer in answers.items():
        assert fed[index][: len(answer) - 1] == answer[:-1]


def test_a_second_run_needs_no_further_graphs_and_a_larger_one_does():
    model, recorder = families.build("llama"), Recorder()
    steps = ReplayedSteps(model, lambda: recorder)

    def run(rows, at_once):
        return dict(replayed_answers(model, steps, rows, PAD, ENDS, NEW_TOKENS, None, at_once))

    first = run(prompts(), 5)
    made, memory = recorder.made, steps.slots
    assert run(prompts(), 5) == first and recorder.made == made
    assert run(prompts()[:4], 3) == {index: first[index] for index in range(4)}
    assert steps.slots is memory
    made = recorder.made
    run(prompts(), 7)
    assert steps.slots is not memory and recorder.made > made


def test_what_cannot_be_captured_and_memory_that_runs_out_are_told_apart_from_mistakes():
    model = families.build("llama")
    second = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    second.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    for failure, said in (
        (second, "memory ran out while a step was captured"),
        (RuntimeError("operation not permitted when stream is capturing\nmore"), r"\(RuntimeError: .* capturing\)$"),
        (KeyError("full_attention"), r"a step cannot be captured \(KeyError: 'full_attention'\)$"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory ran out while a step was captured"),
    ):
        with pytest.raises(CannotReplay, match=said):
            replayed(model, prompts(), Recorder((failure,)))
    with pytest.raises(NoRoom, match="memory ran out beside"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_decoding._SlotDecoder, "_begin", lambda *_: (_ for _ in ()).throw(MemoryError()))
        replayed(model, prompts(), Recorder())
    with pytest.raises(NoRoom):
        replayed(model, prompts(), Recorder((second,)))
    for stop in (KeyboardInterrupt, SystemExit):
        with pytest.raises(stop):
            replayed(model, prompts(), Recorder((stop(),)))
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_decoding._SlotDecoder, "_begin", lambda *_: (_ for _ in ()).throw(ZeroDivisionError()))
        replayed(model, prompts(), Recorder())
