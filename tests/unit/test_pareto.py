"""The Pareto front and the choice, against definitions written out."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from heretic_ds.ablation.edit import Edit
from heretic_ds.search.pareto import candidates, closest, pareto_front
from heretic_ds.search.trials import TrialRecord


def record(index: int, refusals: float | None, kl: float | None, state: str = "complete") -> TrialRecord:
    return TrialRecord(index, 0, state, Edit(None, {}), refusals, kl, {}, 1.0)


def beats(one: TrialRecord, other: TrialRecord) -> bool:
    a, b = (one.refusals, one.kl), (other.refusals, other.kl)
    if a == b:
        return one.index < other.index
    return a[0] <= b[0] and a[1] <= b[1]  # type: ignore[operator]


records_strategy = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.01, 0.02, 0.1, 0.3]), st.booleans()), max_size=25
).map(lambda rows: [record(i, r, kl, "complete" if ok else "failed") for i, (r, kl, ok) in enumerate(rows)])


@given(records_strategy, st.randoms())
@settings(max_examples=200, deadline=None)
def test_front_is_what_nothing_beats(records: list[TrialRecord], shuffle: object) -> None:
    complete = [one for one in records if one.complete]
    expected = {one.index for one in complete if not any(beats(o, one) for o in complete if o is not one)}
    shuffle.shuffle(records)  # type: ignore[attr-defined]
    front = pareto_front(records)
    assert len(front) == len(set(front)) and set(front) == expected
    by_index = {one.index: one for one in records}
    refusals = [by_index[i].refusals or 0 for i in front]
    assert refusals == sorted(refusals)


def test_front_uses_raw_numbers_and_keeps_the_first_of_equals() -> None:
    records = [
        record(0, 5, 0.002),
        record(1, 5, 0.001),
        record(2, 5, 0.001),
        record(3, 0, 0.5),
        record(4, 9, 0.002),
    ]
    assert pareto_front(records) == [3, 1]
    assert pareto_front([]) == []
    assert pareto_front([record(0, None, None, "failed")]) == []


def test_more_may_be_better() -> None:
    numbers = [(5, 0.002), (9, 0.3), (9, 0.2), (2, 0.001), (4, 0.05)]
    records = [replace(record(at, *each), maximize=True) for at, each in enumerate(numbers)]
    assert pareto_front(records) == [2, 0, 3]
    assert [one.index for one in candidates(records, max_kl=0.1)] == [0, 4, 3]
    assert TrialRecord.from_dict(records[2].to_dict()) == records[2]


def test_candidates_come_in_the_order_of_trying() -> None:
    records = [
        record(0, 3, 0.05), record(1, 1, 0.1), record(2, 1, 0.09), record(3, 0, 0.1001), record(4, 1, 0.09),
        record(5, 0, 0.0, "failed"),
    ]  # fmt: skip
    assert [one.index for one in candidates(records, max_kl=0.1)] == [2, 4, 1, 0]
    assert candidates(records, max_kl=0.01) == []


def test_closest_names_the_lowest_kl() -> None:
    records = [record(0, 0, 0.5), record(1, 4, 0.3), record(2, 2, 0.3), record(3, 0, 0.1, "failed")]
    assert closest(records) is records[2]
    assert closest([records[3]]) is None
