"""Batch sizes found by measuring, on a clock and with a memory that tests make up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from heretic_ds.errors import UserError
from heretic_ds.runner.comm import ALONE, Comm
from heretic_ds.runner.rows import Row
from heretic_ds.runner.sizing import Batches, sizes
from heretic_ds.runner.sizing.ladder import Ladder
from heretic_ds.runner.sizing.measure import WorkingMemory, measure_batch_size


class Machine:
    """Takes ``seconds(n)`` for n rows, and has memory for so many."""

    def __init__(self, seconds: Callable[[int], float], room: int = 1000) -> None:
        self.now, self.runs, self._seconds, self._room = 0.0, list[int](), seconds, room

    def run(self, rows: int) -> bool:
        self.runs.append(rows)
        self.now += self._seconds(rows)
        return rows <= self._room

    def best(self, most: int = 64) -> int:
        return measure_batch_size(self.run, most, clock=lambda: self.now)


def test_the_batch_with_the_best_throughput_is_found() -> None:
    assert Machine(lambda n: 0.1 + 0.01 * n).best() == 64  # every row more is worth it
    assert Machine(lambda n: 0.01 * n).best() == 4  # none is, nor costs anything
    assert Machine(lambda n: 0.01 * n * n).best() == 1  # each costs more
    assert Machine(lambda n: 0.02 + 0.01 * n + (0.1 * (n - 2) if n > 2 else 0)).best() == 2
    assert [Machine(lambda n: 0.1 + 0.01 * n).best(most) for most in (1, 2, 3, 5)] == [1, 2, 3, 5]
    assert Machine(lambda n: 0.1 + 0.01 * n + (0.2 * (n - 24) if n > 24 else 0)).best() == 24  # no power of two
    assert Machine(lambda n: 0.1 + 0.01 * n).best(41) == 41


def test_sizes_that_can_gain_nothing_are_not_tried() -> None:
    """Where rows have come to cost as much each as they ever will, and where a few sizes between gained nothing."""
    clear = Machine(lambda n: 0.001 + 0.1 * n)
    assert clear.best(512) in (1, 4) and max(clear.runs) <= 16
    nearly = Machine(lambda n: 0.03 + 0.1 * n)
    assert nearly.best(512) in (4, 16) and max(nearly.runs) == 16
    spilling = Machine(lambda n: 1 + 0.1 * n + (n > 20) * n)
    assert spilling.best(512) in (16, 24) and spilling.runs == [1, 4, 16, 64, 64, 32, 32, 24, 24]


def test_fewer_rows_than_the_first_are_tried_where_more_are_no_gain() -> None:
    ladder = Ladder(64, first=16)
    sizes = []
    while (size := ladder.next) is not None:
        sizes.append(size)
        ladder.note(size, size, 1.0 * max(size, 4) ** 2)
    assert sizes == [16, 64, 64, 4, 1, 8, 8, 6, 6] and ladder.best == 4
    full = Ladder(64, first=16)
    for size, seconds in ((16, math.inf), (4, 1.0), (1, 1.0), (8, 1.5), (12, math.inf)):
        assert full.next == size
        full.note(size, size, seconds)
    assert full.next is None and full.best == 8


def test_what_was_run_before_needs_no_first_run() -> None:
    machine = Machine(lambda n: 1.0 + 0.01 * n)
    measure_batch_size(machine.run, 64, clock=lambda: machine.now, warm=True)
    assert machine.runs == [4, 16, 64]


def test_a_disturbed_run_does_not_count() -> None:
    machine = Machine(lambda n: 0.01 + 0.001 * n + (1.0 if len(machine.runs) % 4 == 0 else 0.0))
    assert machine.best() == 64


def test_runs_that_take_long_are_few() -> None:
    machine = Machine(lambda n: 1.0 + n)
    machine.best(4)
    assert [machine.runs.count(size) for size in (1, 4)] == [2, 1]


def test_a_size_that_gains_nothing_is_tried_once_more() -> None:
    machine = Machine(lambda n: 1.0 + 0.01 * n + 9 * (machine.runs.count(n) == 1 and n in (16, 64)))
    assert machine.best() == 64 and [machine.runs.count(size) for size in (4, 16, 64)] == [1, 2, 2]


def test_what_does_not_fit_is_not_tried_with_more() -> None:
    machine = Machine(lambda n: 1.0 + 0.01 * n, room=20)
    assert 16 <= machine.best() <= 20
    assert max(machine.runs) == 64
    assert Machine(lambda n: 1.0, room=0).best() == 0


class Ranks:
    """Two ranks whose numbers are told one after the other: what the first tells, the second hears."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def most(self, value: float) -> float:
        self.told.append(value)
        return value

    least = most


def test_ranks_run_alike_and_come_to_one_size() -> None:
    first, second, ranks = Machine(lambda n: 0.1 + 0.01 * n), Machine(lambda n: 0.01 * n), Ranks()
    found = measure_batch_size(first.run, 64, ranks, clock=lambda: first.now)  # type: ignore[arg-type]
    heard = iter(ranks.told)
    ranks.most = ranks.least = lambda value: next(heard)  # type: ignore[method-assign]
    other: dict[str, Any] = {"clock": lambda: second.now, "amount": lambda rows: 1.0}
    assert measure_batch_size(second.run, 64, ranks, **other) == found  # type: ignore[arg-type]
    assert second.runs == first.runs and next(heard, None) is None


def batches_on(device: str, comm: Comm = ALONE, retries: bool = True) -> Batches:
    return Batches(comm, torch.device(device), "a_placement", 16, retries)


def rows_of_lengths(*lengths: int) -> list[Row]:
    return [Row([5] * length) for length in lengths]


@pytest.mark.parametrize(("device", "most"), [("cuda", 6), ("cpu", 2)])
def test_on_an_accelerator_batches_of_many_trials_rows_are_measured(device: str, most: int) -> None:
    """They have more rows than there are prompts. On a CPU more rows than that would gain nothing."""
    seen: list[list[int]] = []

    def work(rows: Sequence[Row]) -> None:
        seen.append(list(map(len, rows)))

    batches = batches_on(device)
    batches.measured.find(rows_of_lengths(4, 9), "kl", work, trials=3)
    assert 1 <= batches.sizes["kl"] <= most
    longest = max(seen, key=len)
    assert longest == [9, 9, 9, 4, 4, 4][: len(longest)] if device == "cuda" else longest == [9, 4]
    assert len(longest) >= min(most, 4)  # doubled twice whatever is gained
    seen.clear()
    batches_on(device).measured.find(rows_of_lengths(4, 9), "kl", work, trials=1)
    assert max(seen, key=len) == [9, 4]


class ThreeLess(Comm):
    """Another rank has memory for three rows less."""

    def least(self, value: float) -> float:
        return value - 3 if value > 3 else value


def test_the_least_of_all_ranks_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, and on every device where memory that has run out cannot be recovered from."""
    ran: list[int] = []
    room = WorkingMemory(0.0, 1.0)
    monkeypatch.setattr(sizes, "working_memory", lambda run, most, device: room)
    monkeypatch.setattr(sizes, "free_bytes", lambda device: 10.0)  # for six rows
    for device, retries in (("cpu", True), ("cpu", False), ("cuda", False)):
        ran.clear()
        batches_on(device, ThreeLess(), retries).measured.find(
            rows_of_lengths(*[4] * 12), "kl", lambda rows: ran.append(len(rows))
        )
        assert max(ran) == 3


def test_memory_that_runs_out_while_it_is_measured() -> None:
    """Ends what cannot recover from it; alone, a smaller batch is found."""

    def full(rows: Sequence[Row]) -> None:
        if len(rows) > 3:
            raise torch.OutOfMemoryError("pretended")

    rows = rows_of_lengths(*[4] * 12)
    with pytest.raises(UserError, match=r"memory ran out with 4 rows in a batch \(kl\), from which a_placement cannot"):
        batches_on("cpu", retries=False).measured.find(rows, "kl", full)
    for device in ("cpu", "cuda"):
        alone = batches_on(device)
        alone.measured.find(rows, "kl", full)
        assert 1 <= alone.sizes["kl"] <= 3


class Clocked:
    """Work on batches, by a clock of its own and with memory for some rows; what it gives is the rows' indices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int = 1000, free: float = 1e9) -> None:
        self.now, self.ran, self.room = 0.0, list[int](), room
        for name in ("process_time", "perf_counter"):
            monkeypatch.setattr(sizes.time, name, lambda: self.now)
        monkeypatch.setattr(sizes, "free_bytes", lambda device: free)
        monkeypatch.setattr(sizes, "peak_of", lambda run, device: run() or 100 * self.ran[-1])

    def __call__(self, rows: Sequence[Row]) -> list[int]:
        self.ran.append(len(rows))
        self.now += 1 + 0.01 * sum(map(len, rows))
        if len(rows) > self.room:
            raise torch.OutOfMemoryError("pretended")
        return [row.index for row in rows]


def numbered(count: int) -> list[Row]:
    return [Row([5] * 4, index) for index in range(count)]


@pytest.mark.parametrize("count", [1, 2, 5, 6, 30, 400])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_by_which_a_size_is_measured_are_of_use(
    count: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row is passed once, in its order, and no row for the measuring alone."""
    batches, work = batches_on(device), Clocked(monkeypatch)
    found = [index for _, each in batches.over(numbered(count), "capture", work) for index in each]
    assert found == list(range(count)) and sum(work.ran) == count
    sizes_tried = {1: [1], 2: [1, 1], 5: [1, 1, 3], 6: [1, 1, 4], 30: [1, 1, 4, 16, 8], 400: [1, 1, 4, 16, 64, 256, 58]}
    assert work.ran == sizes_tried[count]
    assert 1 <= batches.sizes["capture"] <= max(work.ran) and "capture" in batches.measured.bytes
    if count == 400:
        assert batches.sizes["capture"] == 256
        assert batches.measured.bytes["capture"] == (25_600 if device == "cpu" else 0)
    settled, more = batches.sizes["capture"], work.ran.copy()
    list(batches.over(numbered(settled + 1), "capture", work))
    assert work.ran == [*more, settled, 1]


def test_measuring_keeps_to_the_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a CPU it is asked before it is taken, whereas an accelerator may say that it has no more."""
    batches, work = batches_on("cpu"), Clocked(monkeypatch, free=2 * 100 * 9)
    list(batches.over(numbered(60), "capture", work))
    assert max(work.ran) == batches.sizes["capture"] == 9
    batches, work = batches_on("cuda"), Clocked(monkeypatch, room=20)
    rows = [index for _, each in batches.over(numbered(200), "capture", work) for index in each]
    assert rows == list(range(200)) and 16 <= batches.sizes["capture"] <= 20
    with pytest.raises(UserError, match="a single prompt does not fit in memory while capture runs"):
        list(batches_on("cuda").over(numbered(9), "capture", Clocked(monkeypatch, room=0)))


def test_passes_like_those_that_were_measured_get_batches_of_as_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    batches, work = batches_on("cpu"), Clocked(monkeypatch)
    monkeypatch.setattr(sizes, "working_memory", lambda run, most, device: run(2) or WorkingMemory(100.0, 100.0))
    list(batches.over(numbered(400), "capture", work))
    work.ran.clear()
    batches.measured.find([Row([5] * 16)] * 90, "kl", work, like="capture")
    assert batches.sizes["kl"] == 256 * 4 // 16 and batches.measured.bytes["kl"] == 6400
    assert work.ran == [2]  # for the memory that they take
    batches.measured.starts_late = True  # about half of a row is computed
    del batches.sizes["kl"]
    batches.measured.find([Row([5] * 16)] * 90, "kl", work, like="capture")
    assert batches.sizes["kl"] == 90
    del batches.sizes["kl"]
    monkeypatch.setattr(sizes, "free_bytes", lambda device: 2 * 700.0)
    batches.measured.find([Row([5] * 16)] * 90, "kl", work, like="capture")
    assert batches.sizes["kl"] == 7


def test_answers_are_measured_only_where_passes_of_as_many_tokens_were_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step has one token of each row; on an accelerator it is nothing like a pass over prompts."""
    for device, rows, sizes_run, best in (
        ("cpu", 90, [2], 90),
        ("cpu", 300, [2, 4, 16, 64, 256], 256),
        ("cuda", 90, [1, 4, 16, 64, 90], 90),
    ):
        batches, work = batches_on(device), Clocked(monkeypatch)
        monkeypatch.setattr(sizes, "working_memory", lambda run, most, device: run(2) or WorkingMemory(100.0, 100.0))
        list(batches.over(numbered(90), "capture", work))
        assert batches.sizes["capture"] * 4 == 256
        work.ran.clear()
        batches.measured.find([Row([5] * 4)] * rows, "generate", work, like="capture", fitting=work)
        assert batches.sizes["generate"] == best and sorted(set(work.ran)) == sizes_run


def test_memory_is_told_by_a_sample_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have the length that they have when their answers end."""
    seen: list[tuple[str, list[int]]] = []
    monkeypatch.setattr(sizes, "working_memory", lambda run, most, device: run(2))
    batches = batches_on("cpu")
    batches.measured.find(
        rows_of_lengths(5, 3),
        "generate",
        lambda rows: seen.append(("timed", [len(row.prompt) for row in rows])),
        fitting=lambda rows: seen.append(("fitted", [len(row.prompt) for row in rows])),
    )
    assert seen[0] == ("fitted", [5 + 16 - sizes.FITTING_TOKENS, 3 + 16 - sizes.FITTING_TOKENS])
    assert {name for name, _ in seen[1:]} == {"timed"}


def test_a_size_for_now_is_not_kept() -> None:
    batches = batches_on("cpu")
    with pytest.raises(KeyError), batches.for_now("generate", 8):
        assert batches.sizes == {"generate": 8}
        raise KeyError
    assert batches.sizes == {}


def test_a_batch_is_never_made_empty() -> None:
    """Also where memory runs out when no row is left."""
    batches, rows = batches_on("cpu"), rows_of_lengths(4, 4)
    batches.sizes["generate"] = 2

    def ends_and_fails(most: int) -> None:
        for row in rows:
            row.done = True
        raise torch.OutOfMemoryError("pretended")

    batches.finish(rows, "generate", ends_and_fails)
    assert batches.sizes["generate"] == 2


def other_that_fails_once() -> Comm:
    """One of two ranks; memory runs out on the other one in the first pass, when this one has done its part."""
    failures = [True]

    class Partner(Comm):
        def attempt(self, work: Callable[[], Any], size: Any = None) -> tuple[bool, Any]:
            value = work()
            return (False, None) if failures and failures.pop() else (True, value)

    partners: Any = object()
    return Partner(partners=partners)


@pytest.mark.parametrize("ended", [1, 3])
def test_ranks_go_on_alike_where_one_had_come_further(ended: int) -> None:
    """A row that has ended here may not have ended on the rank that memory ran out on."""
    batches, rows, seen = batches_on("cpu", other_that_fails_once()), rows_of_lengths(4, 4, 4), list[int]()
    batches.sizes["generate"] = 3

    def answer(most: int) -> None:
        left = [row for row in rows if not row.done]
        seen.append(len(left))
        for row in left[: len(left) if len(seen) > 1 else ended]:
            row.answer, row.done = [7], True

    batches.finish(rows, "generate", answer)
    assert seen == [3, 3] and batches.sizes["generate"] == 1


def test_batches_are_cut_by_their_prompts_whatever_was_answered_before() -> None:
    batches, rows, seen = batches_on("cpu"), rows_of_lengths(6, 5), list[list[int]]()
    batches.sizes["generate"] = 2
    rows[1].answer = [7] * 9

    def cut(lengths: list[int]) -> int:
        seen.append(lengths)
        return len(lengths)

    assert len(list(batches.over(rows, "generate", len, cut))) == 1
    assert seen == [[6, 5]]
