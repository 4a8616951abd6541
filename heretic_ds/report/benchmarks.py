"""Benchmark scores of two models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from heretic_ds.foreign.text import in_one_line
from heretic_ds.harness.asking import Score, difference

LEGEND = "± one standard error; of a difference: of the same questions' own differences. docs/benchmarks.md says more"


def benchmark_table(scores: Mapping[str, Sequence[Score]], told: int = 40) -> Table:
    """A row for each score, a column for each model, their difference where there are two; ``told`` is the most that a
    task's name takes. Tasks of a group are left out where the group has the same score of its own."""
    table = Table(title="Benchmarks", title_justify="left", pad_edge=False, padding=(0, 1, 0, 0), caption=LEGEND)
    table.caption_justify = "left"
    table.add_column("task")
    for heading in (*scores, *(["difference"] if len(scores) > 1 else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    columns = [{score.key: score for score in column} for column in scores.values()]
    for key, first in columns[0].items():
        if (first.group, first.metric, first.filter) in columns[0]:
            continue
        found = [column[key] for column in columns if key in column]
        row = [_number(each.value, each.error) for each in found]
        if len(found) == len(columns) > 1:
            change, error = difference(*found)
            row.append(_number(change, error, "+"))
        table.add_row(Text(in_one_line(_title(first), told)), *row)
    return table


def _title(score: Score) -> str:
    how = "" if score.filter == "none" else f", {score.filter}"
    return f"{score.task} ({score.metric}{how}, n={score.questions})"


def _number(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4g}" if error is None else f"{value:{sign}.4f} ± {error:.4f}"
