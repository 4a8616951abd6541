"""Batch sizes found by measuring, on a clock and with a memory that tests make up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from heretic_ds.errors import UserError
from heretic_ds.prompts import TokenRows
from heretic_ds.runner import batch_sizes
from heretic_ds.runner.batch_sizes import BatchSizing, measure_batch_size


class Machine:
    """Takes ``seconds(n)`` for n rows, and has memory for so many."""

    def __init__(self, seconds: Callable[[int], float], room: int = 1000) -> None:
        self.now, self.runs, self._seconds, self._room = 0.0, list[int](), seconds, room

    def run(self, rows: int) -> None:
        self.runs.append(rows)
        if rows > self._room:
            raise torch.OutOfMemoryError("pretended")
        self.now += self._seconds(rows)

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


def test_ranks_run_alike_and_take_the_first_ones_measure() -> None:
    first, second, told = Machine(lambda n: 0.1 + 0.01 * n), Machine(lambda n: 0.01 * n), list[float]()

    def tell(value: float) -> float:
        told.append(value)
        return value

    found = measure_batch_size(first.run, 64, "capture", tell, clock=lambda: first.now)
    heard, other = iter(told), {"clock": lambda: second.now, "amount": lambda rows: 1.0}
    assert measure_batch_size(second.run, 64, "capture", lambda _: next(heard), **other) == found
    assert second.runs == first.runs and next(heard, None) is None


@pytest.mark.parametrize(("device", "most"), [("cuda", 6), ("cpu", 2)])
def test_on_an_accelerator_batches_of_many_trials_rows_are_measured(device: str, most: int) -> None:
    """They have more rows than there are prompts. On a CPU more rows than that would gain nothing."""
    seen: list[list[int]] = []

    def work(rows: TokenRows) -> None:
        seen.append(list(map(len, rows)))

    sizing = BatchSizing(torch.device(device), 16, starts_late=False, same=lambda value: value)
    assert 1 <= sizing.find("kl", [[5] * 4, [6] * 9], work, trials=3) <= most
    longest = max(seen, key=len)
    assert longest == [9, 9, 9, 4, 4, 4][: len(longest)] if device == "cuda" else longest == [9, 4]
    assert len(longest) >= min(most, 4)  # doubled twice whatever is gained
    seen.clear()
    sizing.find("kl", [[5] * 4, [6] * 9], work, trials=1)
    assert max(seen, key=len) == [9, 4]


def test_where_ranks_cannot_try_again_the_least_of_all_ranks_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every device; and a lack of memory while that is found out ends them all."""
    ran: list[int] = []
    monkeypatch.setattr(batch_sizes, "rows_that_fit", lambda run, most, device: 6)
    for device in ("cpu", "cuda"):
        ran.clear()
        sizing = BatchSizing(torch.device(device), 16, False, lambda value: value, least=lambda rows: rows - 3)
        sizing.find("kl", [[5] * 4] * 12, lambda rows: ran.append(len(rows)), trials=1)
        assert max(ran) == 3

    def full(run: object, most: int, device: object) -> int:
        raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(batch_sizes, "rows_that_fit", full)
    with pytest.raises(torch.OutOfMemoryError):
        sizing.find("kl", [[5] * 4] * 12, lambda rows: None, trials=1)
    alone = BatchSizing(torch.device("cpu"), 16, False, lambda value: value)
    assert 1 <= alone.find("kl", [[5] * 4] * 12, lambda rows: None, trials=1) <= 12
