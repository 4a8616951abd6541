"""Decoding: the same answers as one prompt at a time, in few steps that are full, none of which is captured twice.

Graphs are stand-ins that do recorded operations again on the same memory.
"""

from __future__ import annotations

import functools

import pytest
import torch

from heretic_ds.anatomy import find_anatomy
from heretic_ds.runner import decode as decoding
from heretic_ds.runner import graphs, slots
from heretic_ds.runner import rows as rows_module
from heretic_ds.runner.decode import Decoder, shrinking
from heretic_ds.runner.forward import Forward
from heretic_ds.runner.graphs import Graphs
from heretic_ds.runner.rows import Row, Stop, batches_of, first_cut
from tests import families
from tests.recorded_graphs import Recorder
from tests.unit.test_resident import greedy_alone

ENDS = {families.EOS}
NEW_TOKENS = 7
LENGTHS = (9, 4, 6, 11, 5, 3, 8, 12, 2, 7, 10, 4)
WAYS = ("batches", "slots", "captured")
SERVED = [name for name in families.REQUIRED if name not in ("qwen3_next", "qwen3_5", "lfm2")]
"""By slots; the others' caches hold more than keys and values."""


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    low, high = len(families.SPECIAL_TOKENS), len(families.VOCABULARY) - 5
    return [torch.randint(low, high, (length,), generator=generator).tolist() for length in LENGTHS]


def stop_some(answers):
    """Ends about half of the rows, by their first token alone."""
    return [answer[0] % 2 == 0 for answer in answers]


def stop_most(answers):
    return [answer[0] % 3 > 0 for answer in answers]


def expected_of(model, row, decided):
    """The answer to one prompt by whole forward passes, cut where `decided` ends it, and its smallest margin."""
    answer, margin = greedy_alone(model, row, ENDS, NEW_TOKENS)
    if decided and len(answer) >= 4 and decided([answer[:4]])[0]:
        answer = answer[:4]
    return answer, margin


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    """Sizes of which tiny batches need several, prompts that begin in several passes, and a step under way while tokens
    are read, as on CUDA."""
    recorder = Recorder()
    for module, name, value in (
        (graphs, "_FEWEST_ROWS", 2), (graphs, "_FEWEST_COLUMNS", 8), (rows_module, "PASS_IN_TOKENS", 6),
        (decoding, "_AHEAD", {"cpu": 1}), (graphs, "makers_for", lambda device: lambda: recorder),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    return recorder


def decoder_of(model, captured=True, edits=None) -> Decoder:
    forward = Forward(model, families.PAD)
    forward.edits = edits
    return Decoder(forward, find_anatomy(model), cuda_graphs=captured)


def answers_of(model, way, given=None, most=5, stop=None, edits=None):
    """Answers to prompts, whose numbers, from 1 on, are their rows' trials."""
    rows = [Row(prompt, index, index + 1) for index, prompt in enumerate(given or prompts())]
    stop, decoder = stop or Stop(ENDS, NEW_TOKENS), decoder_of(model, way == "captured", edits)
    if way == "batches":
        for start in range(0, len(rows), most):
            shrinking(decoder._forward, rows[start : start + most], stop)
    else:
        ended = list(decoder.answers(rows, stop, most))
        assert sorted(row.index for row in ended) == list(range(len(rows)))
    assert all(row.done for row in rows)
    return [row.answer for row in rows]


model_of = functools.cache(families.build)


class Watched:
    """A model's forward passes: how many rows and columns each had."""

    def __init__(self, model) -> None:
        self.shapes: list[tuple[int, int]] = []
        self._handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._handle.remove()

    @property
    def steps(self) -> list[int]:
        """Rows of each step."""
        return [rows for rows, length in self.shapes if length == 1]


class Told:
    """Edits that only note whose rows come."""

    def __init__(self) -> None:
        self.trials: list[list[int]] = []
        self.begun: list[list[int]] = []
        self.memory: set[int] = set()

    def assign(self, trials, into=None) -> None:
        self.trials.append(list(trials))
        if into is None:
            self.begun.append(list(trials))
        else:
            self.memory.add(into.data_ptr())
            assert into.shape == (len(trials),)
            into.copy_(torch.tensor(trials))


@pytest.mark.parametrize("decided", [None, stop_some])
@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name in families.REQUIRED for way in (WAYS if name in SERVED else WAYS[:1])]
)
def test_answers_equal_those_of_one_prompt_at_a_time(name, way, decided, recorder):
    """Few rows at once, so that rows join, leave, and move while others are in flight."""
    model = model_of(name)
    told = Told()
    answers = answers_of(model, way, stop=Stop(ENDS, NEW_TOKENS, decided), edits=told)
    compared = 0
    for row, answer in zip(prompts(), answers, strict=True):
        expected, margin = expected_of(model, row, decided)
        if margin > 1e-4:
            assert answer == expected
            compared += 1
    assert compared >= len(LENGTHS) // 2
    assert max(map(len, told.trials)) <= 5
    forward = Forward(model, families.PAD)
    assert (slots.obstacle(forward) is None) is (name in SERVED)
    if way == "captured":
        assert graphs.obstacle(forward, find_anatomy(model)) is None
        assert 2 <= recorder.made <= 6 and recorder.replayed > 2 * recorder.made


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, way) for name in ("llama", "gemma2") for way in WAYS), ("qwen3_next", "batches"), ("bloom", "batches")],
)
def test_edits_are_told_the_trials_of_every_pass(name, way, monkeypatch):
    """Captured steps find them in memory that stays; prompts are told before they begin."""
    model, told, seen, replay = families.build(name), Told(), [], Graphs.replay

    def note(module, args, kwargs):
        if not replaying:
            seen.append((told.trials[-1], kwargs["input_ids"][:, -1].tolist()))

    def replayed(self, rows, *more):
        seen.append((self.slots.trial_R[:rows].tolist(), self.slots.token_R[:rows].tolist()))
        replaying.append(True)
        replay(self, rows, *more)
        replaying.clear()

    replaying: list[bool] = []
    monkeypatch.setattr(Graphs, "replay", replayed)
    model.register_forward_pre_hook(note, with_kwargs=True)
    answers = answers_of(model, way, most=4, stop=Stop(ENDS, NEW_TOKENS, stop_some), edits=told)
    fed: dict[int, list[int]] = {trial: [] for trial in range(len(LENGTHS) + 1)}
    for trials, tokens in seen:
        for trial, token in zip(trials, tokens, strict=True):
            fed[trial].append(token)
    for trial, (row, answer) in enumerate(zip(prompts(), answers, strict=True), 1):
        # A row that has ended may be fed on until it leaves, but no row is ever fed another row's tokens.
        assert fed[trial][: len(answer)] == [row[-1], *answer][:-1] or not answer
    assert len(told.memory) == (way == "captured")
    if way == "captured":
        assert sorted(trial for trials in told.begun for trial in trials) == list(range(1, len(LENGTHS) + 1))


def test_freed_rows_are_given_to_the_next_prompts(monkeypatch):
    """Every step but the last ones runs at least three quarters full."""
    model, given, stop = families.build("llama"), prompts() * 4, Stop(ENDS, 13, stop_most)
    with Watched(model) as batches:
        expected = answers_of(model, "batches", given, 8, stop)
    monkeypatch.setattr(decoding, "_AHEAD", {})
    with Watched(model) as refilled:
        assert answers_of(model, "slots", given, 8, stop) == expected
    steps = refilled.steps
    assert len(steps) < 0.8 * len(batches.steps)
    assert max(steps) == 8 and sum(steps) / len(steps) > 6
    # Captured: at most one step more per row than where tokens are waited for, and steps as full.
    sizes, replay = [], Graphs.replay
    monkeypatch.setattr(decoding, "_AHEAD", {"cpu": 1})
    monkeypatch.setattr(Graphs, "replay", lambda self, n, *more: sizes.append(n) or replay(self, n, *more))
    assert answers_of(model, "captured", given, 8, stop) == expected
    assert len(sizes) <= 1.3 * len(steps)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 8 and sizes[-1] <= 4
    assert sum(sizes) / len(sizes) > 6


@pytest.mark.parametrize("way", ["slots", "captured"])
def test_a_step_is_under_way_whenever_tokens_are_read(way, monkeypatch):
    """But for the last one, and those before rows come or move."""
    events, advance = [], slots.Slots.advance

    def later(token_B):
        tokens = token_B.tolist()
        return lambda: events.append("read") or tokens

    monkeypatch.setattr(slots.Slots, "advance", lambda self, rows: events.append("step") or advance(self, rows))
    monkeypatch.setattr(decoding, "read_later", later)
    answers = answers_of(families.build("llama"), way, prompts()[:4], most=4)
    assert all(len(answer) == NEW_TOKENS for answer in answers)
    assert events == ["step", *["step", "read"] * (NEW_TOKENS - 2), "read"]


def test_batches_are_cut_where_padding_costs_more_than_a_pass(monkeypatch):
    monkeypatch.undo()
    assert first_cut([]) == 0
    assert first_cut([9]) == 1
    assert first_cut([30] * 50) == 50
    assert first_cut([100] + [10] * 3) == 1  # 3 x 90 tokens of padding
    assert first_cut([12] + [10] * 20) == 21  # 20 x 2
    lengths = sorted(int(x) for x in torch.randint(5, 200, (64,), generator=torch.Generator().manual_seed(1)))[::-1]
    batches = batches_of(lengths)
    assert [i for batch in batches for i in batch] == list(range(64))
    padded = sum(len(batch) * lengths[batch.start] for batch in batches)
    assert padded + rows_module.PASS_IN_TOKENS * (len(batches) - 1) < 64 * lengths[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("most", [4, 6, 8])
def test_answers_have_no_more_tokens_than_asked_for(most, way):
    """Also where they are full when the scorers are asked, who then have no say. They are asked at each answer's own
    length, so that how far it gets before it is decided does not depend on who shares its batch."""
    model, asked = families.build("llama"), []

    def undecided(answers):
        asked.extend(map(len, answers))
        return [False] * len(answers)

    for at_once in (len(LENGTHS), 3):
        answers = answers_of(model, way, most=at_once, stop=Stop((), most, undecided))
        assert {len(answer) for answer in answers} == {most}
        assert answers == answers_of(model, way, most=at_once, stop=Stop((), most))
    assert set(asked) == set(range(rows_module._DECIDE_EVERY, most, rows_module._DECIDE_EVERY))


@pytest.mark.parametrize(("stopped", "left"), [(1, 8), (2, 6)])
def test_rows_leave_a_batch_once_a_quarter_of_it_has_stopped(stopped, left, monkeypatch):
    """Earlier they would be moved about too often, and later too much would be computed for nothing."""
    monkeypatch.setattr(decoding, "_AHEAD", {})
    model, given = families.build("llama"), [prompts()[0]] * 8

    def shapes(way, given):
        verdicts = [[at < stopped for at in range(8)]]
        decided = lambda answers: verdicts.pop() if verdicts else [False] * len(answers)  # noqa: E731
        with Watched(model) as watched:
            answers_of(model, way, given, 8, Stop((), 8, decided))
        return watched.shapes

    for way in ("batches", "slots"):
        assert shapes(way, given) == [(8, len(given[0])), *[(8, 1)] * 3, *[(left, 1)] * 4]
    found = shapes("slots", given * 2)  # and then are the next prompts'
    assert found[4] == ((2, len(given[0])) if stopped == 2 else (8, 1)) and found[5] == (8, 1)


def test_a_second_run_needs_no_further_graphs_and_a_larger_one_does(recorder):
    decoder = decoder_of(families.build("llama"))

    def run(given, at_once):
        rows = [Row(prompt) for prompt in given]
        list(decoder.answers(rows, Stop(ENDS, NEW_TOKENS), at_once))
        return [row.answer for row in rows]

    first = run(prompts(), 5)
    made, memory = recorder.made, decoder._graphs.slots
    assert run(prompts(), 5) == first and recorder.made == made
    assert run(prompts()[:4], 3) == first[:4]
    assert decoder._graphs.slots is memory
    made = recorder.made
    assert run(prompts(), 7) == first
    assert decoder._graphs.slots is not memory and recorder.made > made


def test_what_cannot_be_captured_and_memory_that_runs_out_are_told_apart_from_mistakes(recorder, caplog):
    model = families.build("llama")
    expected = answers_of(model, "slots")
    second = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    second.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    for failure in (second, torch.OutOfMemoryError("CUDA out of memory")):
        recorder.failures = [failure]
        with pytest.raises(torch.OutOfMemoryError, match="memory ran out while a step was captured"):
            answers_of(model, "captured")
    assert caplog.text == ""
    for failure, said in (
        (
            RuntimeError("operation not permitted when stream is capturing\nmore"),
            "RuntimeError: operation not permitted",
        ),
        (KeyError("full_attention"), "KeyError: 'full_attention')\n"),
    ):
        recorder.failures = [failure]
        assert answers_of(model, "captured") == expected
        assert f"without CUDA graphs: a step cannot be captured ({said}" in caplog.text and "more" not in caplog.text
    for mistake in (KeyboardInterrupt, SystemExit):
        recorder.failures = [mistake()]
        with pytest.raises(mistake):
            answers_of(model, "captured")
    for raised in (ZeroDivisionError, MemoryError):
        with pytest.raises(raised), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Forward, "__call__", lambda *_, **__: (_ for _ in ()).throw(raised()))  # noqa: B023
            answers_of(model, "captured")
