"""What ``time_to_front.py`` measured comes to: seconds to the area of another search, a table, a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"direct": "tab:blue", "screened": "tab:orange", "heretic-llm": "tab:gray"}
CLOCKS = ("search, clock", "search, processor", "run, clock", "run, processor")


def reached(search: Mapping[str, Any], clock: str, measure: str, area: float) -> float | None:
    """Seconds until a search had an area; None where it never had."""
    pairs = zip(search["seconds"][clock], search["area"][measure], strict=True)
    return next((seconds for seconds, found in pairs if found >= area), None)


def at(search: Mapping[str, Any], clock: str, measure: str, seconds: float) -> float:
    """Area that a search had after so many seconds."""
    pairs = zip(search["seconds"][clock], search["area"][measure], strict=True)
    return max((found for each, found in pairs if each <= seconds), default=0.0)


def summary(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """How long ``screened`` takes to where another search ended, as a share of that search's seconds, seed by seed; and
    its area beside the other's when the other ended."""
    rows: list[dict[str, Any]] = []
    for other in (name for name in found if name != "screened" and "screened" in found):
        for measure in ("logarithmic", "linear"):
            for clock in CLOCKS:
                shares, areas = [], []
                for search, theirs in zip(found["screened"], found[other], strict=False):
                    end, area = theirs["seconds"][clock][-1], theirs["area"][measure][-1]
                    seconds = reached(search, clock, measure, area)
                    shares.append(None if seconds is None else round(seconds / end, 3))
                    areas.append([at(search, clock, measure, end), area])
                known = [float("inf") if share is None else share for share in shares]
                median = statistics.median(known)
                rows.append(
                    {
                        "beside": other,
                        "measure": measure,
                        "clock": clock,
                        "shares": shares,
                        "median": None if median == float("inf") else median,
                        "areas_at_equal_seconds": areas,
                    }
                )
    return rows


def table(models: Mapping[str, Any]) -> str:
    """The summary as Markdown: seconds from the start of the search."""
    lines = ["| model | beside | KL | share of its seconds, median | by seed | processor | from the start of the run |"]
    lines.append("|" + "---|" * 7)
    for model, each in models.items():
        rows = {(row["beside"], row["measure"], row["clock"]): row for row in each["summary"]}
        for other, measure in dict.fromkeys(key[:2] for key in rows):
            clock, processor, run = (rows[other, measure, name] for name in CLOCKS[:3])
            seeds = " ".join("-" if share is None else f"{share:.2f}" for share in clock["shares"])
            medians = ["never" if row["median"] is None else f"{row['median']:.2f}" for row in (clock, processor, run)]
            lines.append(f"| {model} | {other} | {measure} | {medians[0]} | {seeds} | {medians[1]} | {medians[2]} |")
    return "\n".join(lines)


def picture(models: Mapping[str, Any], file: Path) -> None:
    """What is not dominated against seconds of the search, a line a search."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(models), figsize=(4.2 * len(models), 6.4), squeeze=False)
    for column, (model, each) in enumerate(models.items()):
        for row, measure in enumerate(("logarithmic", "linear")):
            axis, lows, highs = axes[row][column], [], []
            for strategy, searches in each["searches"].items():
                for number, search in enumerate(searches):
                    seconds, left = search["seconds"]["search, clock"], [1 - area for area in search["area"][measure]]
                    label = strategy if number == 0 else None
                    axis.step(seconds, left, where="post", color=COLOURS[strategy], alpha=0.7, lw=1.2, label=label)
                    lows.append(left[-1]), highs.append(left[len(left) // 8])
            axis.set(title=f"{model}, {measure} KL", xlabel="seconds of search", xscale="log", yscale="log")
            axis.set_ylim(0.9 * min(lows), 1.3 * max(highs))
            axis.legend(loc="lower left", fontsize=8)
        axes[0][0].set_ylabel("area not dominated")
        axes[1][0].set_ylabel("area not dominated")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
