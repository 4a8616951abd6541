from __future__ import annotations

import io

import pytest
from rich.console import Console

from heretic_ds.report.tables import agreement_table
from heretic_ds.scoring.agreement import Agreement, agreements


def test_kappa_is_that_of_the_textbook() -> None:
    """Cohen's own kind of example: 20 and 15 agreed on, 5 and 10 not. p = 0.7, e = 0.5 x 0.6 + 0.5 x 0.4 = 0.5."""
    assert Agreement("a", "b", both=20, first_only=5, second_only=10, neither=15).kappa == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("counts", "kappa"),
    [((3, 0, 0, 5), 1.0), ((0, 4, 4, 0), -1.0), ((4, 4, 4, 4), 0.0), ((8, 0, 0, 0), None), ((0, 0, 0, 0), None)],
)
def test_kappa_at_its_ends(counts: tuple[int, int, int, int], kappa: float | None) -> None:
    assert Agreement("a", "b", *counts).kappa == kappa


def test_counts() -> None:
    markers, classifier, third = [1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]
    found = agreements({"markers": markers, "classifier": classifier, "third": third})
    assert found == (
        Agreement("markers", "classifier", both=2, first_only=1, second_only=1, neither=2),
        Agreement("markers", "third", both=0, first_only=3, second_only=0, neither=3),
        Agreement("classifier", "third", both=0, first_only=3, second_only=0, neither=3),
    )
    assert found[0].kappa == pytest.approx(1 / 3)
    assert Agreement.from_dict(found[0].to_dict()) == found[0]
    assert agreements({"markers": markers}) == ()


def test_the_table() -> None:
    out = io.StringIO()
    found = Agreement("refusals", "judge [bold]\x1b", both=20, first_only=5, second_only=10, neither=15)
    Console(file=out, width=80).print(agreement_table(found, "the edited model"), no_wrap=True)
    title, header, first, second = out.getvalue().splitlines()
    assert title == "Agreement on answers of the edited model: Cohen's kappa 0.40" and "\x1b" not in out.getvalue()
    assert header.split("  ")[-1].startswith("not judge [bold]") and first.split() == ["refusals", "20", "5"]
    assert second.split() == ["not", "refusals", "10", "15"]
