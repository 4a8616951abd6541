"""Decoding with rows that come and go: the same answers as one prompt at a time, and full batches."""

from __future__ import annotations

import pytest
import torch

from heretic_ds.runner import decode as decoding
from heretic_ds.runner import padding
from heretic_ds.runner.caches import Padded, RoomyLayer, StartedLayer, new_cache, takes_rows
from heretic_ds.runner.decode import decode, finished_answers
from heretic_ds.runner.padding import batches_of, first_cut
from tests import families
from tests.unit.test_resident import greedy_alone

ENDS = {families.EOS}
PAD = families.PAD
NEW_TOKENS = 7
LENGTHS = (9, 4, 6, 11, 5, 3, 8, 12, 2, 7, 10, 4)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    low, high = len(families.SPECIAL_TOKENS), len(families.VOCABULARY) - 5
    return [torch.randint(low, high, (length,), generator=generator).tolist() for length in LENGTHS]


def stop_some(answers):
    """Ends about half of the rows, by their first token alone."""
    return [answer[0] % 2 == 0 for answer in answers]


def expected_of(model, row, decided):
    """The answer to one prompt by whole forward passes, cut where `decided` ends it, and its smallest margin."""
    answer, margin = greedy_alone(model, row, ENDS, NEW_TOKENS)
    if decided and len(answer) >= 4 and decided([answer[:4]])[0]:
        answer = answer[:4]
    return answer, margin


@pytest.fixture(scope="module", params=families.REQUIRED)
def family(request):
    return request.param, families.build(request.param)


class Watched:
    """A model's forward passes: how many rows each had."""

    def __init__(self, model) -> None:
        self.rows: list[tuple[int, int]] = []
        self._handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs) -> None:
        self.rows.append(tuple(kwargs["input_ids"].shape))

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._handle.remove()


@pytest.mark.parametrize("decided", [None, stop_some])
def test_answers_equal_those_of_one_prompt_at_a_time(family, decided, monkeypatch):
    """Few rows at once, so that rows join, leave, and shrink the batch while others are in flight."""
    name, model = family
    monkeypatch.setattr(padding, "PASS_IN_TOKENS", 6)  # so that prompts begin in several batches
    announced: list[list[int]] = []
    answers = dict(
        finished_answers(
            model, prompts(), PAD, ENDS, NEW_TOKENS, decided, rows_at_once=5,
            on_rows=lambda rows: announced.append(list(rows)),
        )
    )  # fmt: skip
    assert sorted(answers) == list(range(len(LENGTHS)))
    compared = 0
    for index, row in enumerate(prompts()):
        expected, margin = expected_of(model, row, decided)
        if margin > 1e-4:
            assert answers[index] == expected, name
            compared += 1
    assert compared >= len(LENGTHS) // 2
    assert max(map(len, announced)) <= 5


def test_announced_rows_are_those_of_every_pass(family, monkeypatch):
    _, model = family
    monkeypatch.setattr(padding, "PASS_IN_TOKENS", 6)
    announced: list[list[int]] = []
    seen: list[tuple[list[int], list[int]]] = []

    def note(module, args, kwargs):
        seen.append((announced[-1], kwargs["input_ids"][:, -1].tolist()))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        answers = dict(
            finished_answers(
                model, prompts(), PAD, ENDS, NEW_TOKENS, stop_some, rows_at_once=4,
                on_rows=lambda rows: announced.append(list(rows)),
            )
        )  # fmt: skip
    finally:
        handle.remove()
    known = {index: [row[-1], *answers[index]] for index, row in enumerate(prompts())}
    assert all(len(rows) == len(tokens) for rows, tokens in seen)
    fed: dict[int, list[int]] = {index: [] for index in known}
    for rows, tokens in seen:
        for index, token in zip(rows, tokens, strict=True):
            fed[index].append(token)
    for index, tokens in known.items():
        # A row that has ended may be fed on until it leaves, but no row is ever fed another row's tokens.
        assert fed[index][: len(tokens) - 1] == tokens[:-1]


def test_freed_rows_are_given_to_the_next_prompts():
    """With a cache that takes rows every step but the last ones runs at least three quarters full."""
    model = families.build("llama")

    def stop_most(answers):
        return [answer[0] % 3 > 0 for answer in answers]

    with Watched(model) as watched:
        refilled = dict(finished_answers(model, prompts() * 4, PAD, ENDS, 13, stop_most, rows_at_once=8))
    steps = [rows for rows, length in watched.rows if length == 1]
    with Watched(model) as watched:
        alone: list[list[int]] = []
        for start in range(0, 4 * len(LENGTHS), 8):
            alone += decode(model, (prompts() * 4)[start : start + 8], PAD, ENDS, 13, stop_most)
    assert [refilled[index] for index in range(len(alone))] == alone
    assert len(steps) < 0.8 * sum(length == 1 for _, length in watched.rows)
    assert max(steps) == 8 and sum(steps) / len(steps) > 6


def test_which_caches_take_rows():
    assert takes_rows(new_cache(families.build("llama"), roomy=True))
    for name in ("mistral", "gemma2", "qwen3_next", "lfm2"):
        assert not takes_rows(new_cache(families.build(name), roomy=True)), name


def test_a_roomy_layer_holds_what_a_growing_one_does(monkeypatch):
    monkeypatch.setattr("heretic_ds.runner.caches._ROOM", 3)
    from transformers.cache_utils import DynamicLayer

    roomy, plain = RoomyLayer(), DynamicLayer()
    keep = torch.tensor([2, 0])
    for step, length in enumerate((4, 1, 1, 1, 1, 1, 2, 1)):
        rows = 3 if step < 5 else 2
        if step == 5:
            roomy.reorder_cache(keep)
            plain.reorder_cache(keep)
        keys, values = torch.randn(rows, 2, length, 4), torch.randn(rows, 2, length, 5)
        for found, expected in zip(roomy.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(found, expected)
        assert roomy.get_seq_length() == plain.get_seq_length()


@pytest.mark.parametrize("joined", [False, True])
def test_a_roomy_layer_shrinks_in_its_memory(joined, monkeypatch):
    monkeypatch.setattr("heretic_ds.runner.caches._ROOM", 3)
    layer, states = RoomyLayer(), [torch.randn(5, 2, 6, 4) for _ in range(2)]
    layer.update(*states)
    if joined:  # memory without room
        layer.hold((states[0].clone(), states[1].clone()), states[0].shape[2])
    memory = layer.keys.untyped_storage().data_ptr()
    for moved, holes, rows, order, width in (
        ([4], [1], 4, [0, 4, 2, 3], 5),
        ([], [], 2, [0, 1], 6),
        ([1], [0], 1, [1], 3),
    ):
        layer.shrink(torch.tensor(moved, dtype=torch.int64), torch.tensor(holes, dtype=torch.int64), rows, width)
        states = [each[order][:, :, -width:] for each in states]
        assert torch.equal(layer.keys, states[0]) and torch.equal(layer.values, states[1])
        assert layer.keys.untyped_storage().data_ptr() == memory  # most rows stay where they are
        new = [torch.randn(rows, 2, 1, 4) for _ in range(2)]
        layer.update(*new)
        states = [torch.cat([each, one], dim=2) for each, one in zip(states, new, strict=True)]
        assert torch.equal(layer.keys, states[0]) and torch.equal(layer.values, states[1])
        memory = layer.keys.untyped_storage().data_ptr()


@pytest.mark.parametrize("trials", [1, 3])
def test_a_started_layer_holds_padding_then_what_rows_share(trials):
    lengths, longest = (3, 1, 2), 3
    shared_BHPK = tuple(100.0 * (one + 1) + torch.arange(2.0).expand(trials, 2, 2)[..., None] for one in range(2))
    if trials > 1:  # of every row another trial's
        shared_BHPK = tuple(each + 10 * torch.arange(3.0).view(3, 1, 1, 1) for each in shared_BHPK)
    paddings = [longest - length for length in lengths]
    layer = StartedLayer(
        shared_BHPK, None if trials == 1 else torch.arange(3), Padded.of(paddings, 2, torch.device("cpu"))
    )
    assert layer.get_seq_length() == 2 and layer.get_mask_sizes(3) == (5, 0) and not layer.is_initialized
    new_BHSK = (torch.arange(3.0) - torch.tensor(paddings)[:, None])[:, None, :, None].expand(3, 2, 3, 1)
    for which, held in enumerate(layer.update(new_BHSK, new_BHSK + 0.5)):
        for row, before in enumerate(paddings):
            first = 100 * (which + 1) + (10 * row if trials > 1 else 0)
            expected = [first, first + 1, *(new + 0.5 * which for new in range(lengths[row]))]
            assert held[row, 1, before:, 0].tolist() == expected
            assert held[row].isfinite().all()
    roomy = RoomyLayer()
    roomy.hold(layer.memory, 5)
    assert torch.equal(roomy.keys, layer.keys)
    assert roomy.update(new_BHSK[:, :, :1], new_BHSK[:, :, :1])[0].data_ptr() == layer.memory[0].data_ptr()


def test_batches_are_cut_where_padding_costs_more_than_a_pass():
    assert first_cut([]) == 0
    assert first_cut([9]) == 1
    assert first_cut([30] * 50) == 50
    assert first_cut([100] + [10] * 3) == 1  # 3 x 90 tokens of padding
    assert first_cut([12] + [10] * 20) == 21  # 20 x 2
    lengths = sorted(int(x) for x in torch.randint(5, 200, (64,), generator=torch.Generator().manual_seed(1)))[::-1]
    batches = batches_of(lengths)
    assert [i for batch in batches for i in batch] == list(range(64))
    padded = sum(len(batch) * lengths[batch.start] for batch in batches)
    assert padded + padding.PASS_IN_TOKENS * (len(batches) - 1) < 64 * lengths[0]


def test_questions_are_asked_at_each_answers_own_length(monkeypatch):
    """So that how far an answer gets before it is decided does not depend on who shares its batch."""
    model = families.build("llama")
    lengths: set[int] = set()

    def decided(answers):
        lengths.update(map(len, answers))
        return [False] * len(answers)

    list(finished_answers(model, prompts(), PAD, ENDS, NEW_TOKENS, decided, rows_at_once=3))
    assert lengths == {decoding._DECIDE_EVERY}


@pytest.mark.parametrize("most", [4, 6, 8])
def test_answers_have_no_more_tokens_than_asked_for(most):
    """Also where they are full when the scorers are asked, who then have no say."""
    model, asked = families.build("llama"), []

    def undecided(answers):
        asked.extend(map(len, answers))
        return [False] * len(answers)

    for rows_at_once in (None, 5):
        answers = dict(finished_answers(model, prompts(), PAD, (), most, undecided, rows_at_once=rows_at_once))
        assert {len(answer) for answer in answers.values()} == {most}
        assert answers == dict(finished_answers(model, prompts(), PAD, (), most, rows_at_once=rows_at_once))
    assert all(length < most for length in asked) and (asked or most == 4)


@pytest.mark.parametrize(("stopped", "left"), [(1, 8), (2, 6)])
def test_rows_leave_a_batch_once_a_quarter_of_it_has_stopped(stopped, left):
    """Earlier they would be moved about too often, and later too much would be computed for nothing."""
    model, rows = families.build("llama"), [prompts()[0]] * 8
    with Watched(model) as watched:
        decode(model, rows, PAD, (), 8, lambda answers: [at < stopped for at in range(len(answers))])
    assert watched.rows == [(8, len(rows[0])), *[(8, 1)] * 3, *[(left, 1)] * 4]
    with Watched(model) as watched:  # and then are the next prompts'
        verdicts = [[at < stopped for at in range(8)]]
        dict(
            finished_answers(
                model, rows * 2, PAD, (), 8,
                lambda answers: verdicts.pop() if verdicts else [False] * len(answers), rows_at_once=8,
            )
        )  # fmt: skip
    assert watched.rows[4] == ((2, len(rows[0])) if stopped == 2 else (8, 1))
    assert watched.rows[5] == (8, 1)
