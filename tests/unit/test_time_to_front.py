"""The benchmark of time to a good front: seeds that are added to earlier ones."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from tests.conftest import benchmark

CLOCKS = ("run, clock", "run, processor", "search, clock", "search, processor")


def curve(seconds: float, area: float) -> dict[str, Any]:
    return {
        "seconds": {clock: [seconds] for clock in CLOCKS},
        "area": {"logarithmic": [area], "linear": [area]},
        "scores": [[0.0, 0.1]],
    }


def entry(trials: int, *screened: float) -> dict[str, Any]:
    searches = {"direct": [curve(10.0, 0.5) for _ in screened], "screened": [curve(each, 0.6) for each in screened]}
    return {"trials": trials, "words": [], "searches": searches}


def options(**given: Any) -> Namespace:
    return Namespace(
        **{"add": True, "first_seed": 2, "trials": 24, "words": [], "strategies": ["direct", "screened"], **given}
    )


def test_seeds_are_added_to_those_before_them() -> None:
    front = benchmark("time_to_front")
    models = {"real": entry(24, 1.0, 3.0)}
    together = front.added(front.earlier(models, "real", options()), entry(24, 8.0))
    assert [each["seconds"]["run, clock"] for each in together["searches"]["screened"]] == [[1.0], [3.0], [8.0]]
    row = next(row for row in together["summary"] if row["clock"] == "search, clock")
    assert row["shares"] == [0.1, 0.3, 0.8] and row["median"] == 0.3
    for others in ({"first_seed": 0}, {"add": False}):
        assert front.earlier(models, "real", options(**others)) == {}, "these take the place of others"


@pytest.mark.parametrize(
    "models", [{}, {"real": entry(40, 1.0, 3.0)}, {"real": entry(24, 1.0)}, {"real": entry(24, 1.0, 2.0, 3.0)}]
)
def test_seeds_are_not_added_to_others(models: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="real: there are no 2 searches"):
        benchmark("time_to_front").earlier(models, "real", options())
