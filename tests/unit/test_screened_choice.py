"""The benchmark of how a screened search picks: its variants exist, and its figures are what they say."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.conftest import benchmark


@pytest.fixture(scope="module")
def picking() -> ModuleType:
    return benchmark("screened_choice")


@pytest.mark.parametrize("problem", ["analytic", "real"])
def test_every_variant_searches(picking: ModuleType, problem: str) -> None:
    found = picking.compare(problem, 0, trials=2, cost=0.01)
    assert found.keys() == picking.VARIANTS.keys()
    for measures in found.values():
        for share, _ in measures.values():
            assert share >= 1.16 / 2 - 1e-9  # the first of two trials ends after 16 candidates, or more
    assert picking.screened(problem, 0, 1, 0.01, "40 candidates at first")[0] == pytest.approx([1.40])


def test_rows_count_who_was_faster(picking: ModuleType) -> None:
    first, second = list(picking.VARIANTS)[:2]
    problems = [
        {name: {measure: (share, -0.1) for measure in picking.MEASURES} for name in picking.VARIANTS}
        for share in (0.2, 0.4, 1.5)
    ]
    for measure in picking.MEASURES:
        problems[0][second] = {**problems[0][second], measure: (0.1, 0.3)}
        problems[2][second] = {**problems[2][second], measure: (1.6, 0.0)}
    rows = {(row["variant"], row["measure"]): row for row in picking.rows_of(problems)}
    assert rows[first, "linear"]["mean_share"] == 0.7 and rows[first, "linear"]["lower_at_the_end"] == 3
    other = rows[second, "logarithmic"]
    assert (other["median_share"], other["faster"], other["slower"], other["lower_at_the_end"]) == (0.4, 1, 1, 1)
