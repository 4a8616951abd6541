"""What ``planner_accuracy.py`` makes of its figures: rows of predicted and measured numbers, orders, tables."""

from __future__ import annotations

import itertools
from typing import Any


def row(model: str, placement: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Predicted and measured side by side; no seconds where none were kept."""
    ranks, predicted = figures["ranks"], figures["predicted"]
    peak = max(max(each["peaks"].values()) for each in ranks)
    said = max(sum(cost["bytes"].values()) + sum(cost["host"].values()) for cost in predicted.values())
    phases = {"capture": "capture", "trial": "evaluate"}
    seconds = {
        name: {
            "predicted": predicted[phase]["seconds"][name],
            "measured": max(each["seconds"][name] for each in ranks),
        }
        for name, phase in phases.items()
        if phase in predicted and name in ranks[0]["seconds"]
    }
    return {
        "model": model,
        "placement": placement,
        "predicted_bytes": said,
        "measured_bytes": peak,
        "error": said / peak - 1,
        "seconds": seconds,
        "ranks": ranks,
        "predicted": predicted,
        "hardware": figures["machine"],
    }


def agreeing(pairs: list[tuple[float, float]]) -> list[bool]:
    """Of each two of predicted and measured numbers whether they are in the same order."""
    return [(a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in itertools.combinations(pairs, 2)]


def kendall(agree: list[bool]) -> float | None:
    """Kendall's tau of pairs; None where there are none."""
    return 2 * sum(agree) / len(agree) - 1 if agree else None


def orders(rows: list[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
    """Kendall's tau of each model and phase on so many ranks, and of all pairs that have these in common."""
    rows = [each for each in rows if len(each["ranks"]) == ranks]
    found: list[dict[str, Any]] = []
    every: list[bool] = []
    for model in dict.fromkeys(each["model"] for each in rows):
        for phase in ("capture", "trial"):
            mine = [r["seconds"][phase] for r in rows if r["model"] == model and phase in r["seconds"]]
            agree = agreeing([(each["predicted"], each["measured"]) for each in mine])
            every += agree
            found.append({"model": model, "phase": phase, "pairs": len(agree), "tau": kendall(agree)})
    return [*found, {"model": "all", "phase": "both", "pairs": len(every), "tau": kendall(every)}]


def table(rows: list[dict[str, Any]], taus: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    mib = 2**20
    lines = [
        "| model | placement | ranks | predicted MiB | measured MiB | error | capture s, predicted | measured "
        "| trial s, predicted | measured |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        times = [
            f"{each['seconds'][phase][kind]:.2f}" if phase in each["seconds"] else "-"
            for phase in ("capture", "trial")
            for kind in ("predicted", "measured")
        ]
        sizes = (
            f"{each['predicted_bytes'] / mib:.0f} | {each['measured_bytes'] / mib:.0f} | {100 * each['error']:+.1f} %"
        )
        placed = f"{each['placement']} | {len(each['ranks'])}"
        lines.append(f"| {each['model']} | {placed} | {sizes} | {' | '.join(times)} |")
    lines += ["", "| model | phase | pairs | Kendall's tau |", "|---|---|---|---|"]
    for tau in taus:
        shown = "-" if tau["tau"] is None else f"{tau['tau']:.2f}"
        lines.append(f"| {tau['model']} | {tau['phase']} | {tau['pairs']} | {shown} |")
    return "\n".join(lines)
