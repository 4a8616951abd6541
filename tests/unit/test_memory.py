"""Batch sizes found by measuring, and work that goes on with fewer rows when memory runs out."""

from __future__ import annotations

import pytest
import torch

from heretic_ds.engines.memory import in_batches, measure_batch_size, with_fewer_rows
from heretic_ds.errors import UserError


class Machine:
    """A clock that moves by what batches cost: `of_size(n)` seconds."""

    def __init__(self, of_size, most: int = 1 << 20) -> None:
        self.now, self.of_size, self.most, self.runs = 0.0, of_size, most, []

    def run(self, size: int) -> None:
        self.runs.append(size)
        if size > self.most:
            raise torch.OutOfMemoryError("pretended")
        self.now += self.of_size(size)

    def best(self, most: int = 512) -> int:
        return measure_batch_size(self.run, most, clock=lambda: self.now)


def test_the_size_with_the_best_throughput_is_taken():
    assert Machine(lambda n: 1.0).best() == 512  # rows cost nothing
    assert Machine(lambda n: float(n)).best() == 1  # rows cost their own time alone
    assert Machine(lambda n: 8.0 + max(0, n - 48) ** 2).best() == 48  # no power of two
    assert Machine(lambda n: 0.0).best(4) == 4  # a clock too coarse to tell


def test_sizes_that_do_not_fit_are_left_out():
    assert Machine(lambda n: 1.0, most=100).best() in (64, 96)


def test_short_runs_are_repeated_and_the_quickest_counts():
    disturbed = iter([0.1, 0.01] + [9.0, 0.01, 0.01, 0.01] * 9)
    machine = Machine(lambda n: next(disturbed))
    assert machine.best(4) == 4
    slow = Machine(lambda n: 60.0)
    slow.best(4)
    assert slow.runs.count(4) == 1


def test_work_goes_on_with_half_the_rows():
    done: list[int] = []
    sizes = {"kl": 8}

    def work(rows: int) -> None:
        while len(done) < 10:
            if rows > 3:
                raise torch.OutOfMemoryError("pretended")
            done.extend(range(len(done), min(10, len(done) + rows)))

    with_fewer_rows(work, sizes, "kl", lambda: 10 - len(done))
    assert done == list(range(10)) and sizes == {"kl": 2}
    with pytest.raises(UserError, match="a single prompt does not fit in memory while kl runs"):
        with_fewer_rows(lambda rows: (_ for _ in ()).throw(MemoryError()), {"kl": 4}, "kl")


def test_a_batch_may_be_cut_short():
    batches = list(in_batches("aaabbc", {"x": 4}, "x", list, lambda batch: batch.count(batch[0])))
    assert batches == [(0, ["a"] * 3), (3, ["b"] * 2), (5, ["c"])]
