"""Batch sizes found by measuring, on a clock and with a memory that tests make up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from heretic_ds.errors import UserError
from heretic_ds.runner import batch_sizes
from heretic_ds.runner.batch_sizes import Batches, measure_batch_size
from heretic_ds.runner.comm import ALONE, Comm
from heretic_ds.runner.rows import Row


class Machine:
    """Takes ``seconds(n)`` for n rows, and has memory for so many."""

    def __init__(self, seconds: Callable[[int], float], room: int = 1000) -> None:
        self.now, self.runs, self._seconds, self._room = 0.0, list[int](), seconds, room

    def run(self, rows: int) -> bool:
        self.runs.append(rows)
        self.now += self._seconds(rows)
        return rows <= self._room

    def best(self, most: int = 64) -> int:
        return measure_batch_size(self.run, most, "capture", clock=lambda: self.now)


def test_the_batch_with_the_best_throughput_is_found() -> None:
    assert Machine(lambda n: 0.1 + 0.01 * n).best() == 64  # every row more is worth it
    assert Machine(lambda n: 0.01 * n).best() == 1  # none is
    assert Machine(lambda n: 0.1 + 0.01 * n + (0.2 * (n - 24) if n > 24 else 0)).best() == 24  # no power of two


def test_one_size_that_gains_nothing_does_not_end_it() -> None:
    steps = {1: 1.0, 2: 1.99, 4: 3.0, 8: 5.0, 16: 9.0}
    assert Machine(lambda n: steps.get(n, float(n))).best(16) == 16


def test_a_disturbed_run_does_not_count() -> None:
    machine = Machine(lambda n: 0.01 + 0.001 * n + (1.0 if len(machine.runs) % 4 == 0 else 0.0))
    assert machine.best() == 64


def test_runs_that_take_long_are_few() -> None:
    machine = Machine(lambda n: 1.0 + n)
    machine.best(4)
    assert [machine.runs.count(size) for size in (1, 2, 4)] == [2, 1, 1]


def test_what_does_not_fit_is_not_tried_with_more() -> None:
    machine = Machine(lambda n: 0.1 + 0.01 * n, room=20)
    assert machine.best() == 16
    assert max(machine.runs) == 32
    with pytest.raises(UserError, match="a single prompt does not fit in memory while capture runs"):
        Machine(lambda n: 1.0, room=0).best()


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
    found = measure_batch_size(first.run, 64, "capture", ranks, clock=lambda: first.now)  # type: ignore[arg-type]
    heard = iter(ranks.told)
    ranks.most = ranks.least = lambda value: next(heard)  # type: ignore[method-assign]
    other: dict[str, Any] = {"clock": lambda: second.now, "amount": lambda rows: 1.0}
    assert measure_batch_size(second.run, 64, "capture", ranks, **other) == found  # type: ignore[arg-type]
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
    batches.find(rows_of_lengths(4, 9), "kl", work, trials=3)
    assert 1 <= batches.sizes["kl"] <= most
    longest = max(seen, key=len)
    assert longest == [9, 9, 9, 4, 4, 4][: len(longest)] if device == "cuda" else longest == [9, 4]
    assert len(longest) >= min(most, 4)  # doubled twice whatever is gained
    seen.clear()
    batches_on(device).find(rows_of_lengths(4, 9), "kl", work, trials=1)
    assert max(seen, key=len) == [9, 4]


class ThreeLess(Comm):
    """Another rank has memory for three rows less."""

    def least(self, value: float) -> float:
        return value - 3 if value > 3 else value


def test_the_least_of_all_ranks_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, and on every device where memory that has run out cannot be recovered from."""
    ran: list[int] = []
    monkeypatch.setattr(batch_sizes, "rows_that_fit", lambda run, most, device: 6)
    for device, retries in (("cpu", True), ("cpu", False), ("cuda", False)):
        ran.clear()
        batches_on(device, ThreeLess(), retries).find(
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
        batches_on("cpu", retries=False).find(rows, "kl", full)
    for device in ("cpu", "cuda"):
        alone = batches_on(device)
        alone.find(rows, "kl", full)
        assert 1 <= alone.sizes["kl"] <= 3


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
