"""What two tools' trials come to: seconds, scores, aims, a table, a picture, a file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

THEIRS, OURS, STOPPING = "heretic", "heretic_ds", "heretic_ds, early stop"
TOOLS = (THEIRS, OURS, STOPPING)
PARTS = ("edit", "kl", "generation")
COLUMNS = (
    "model", "edits, batches", "tool", "s/trial", "edit", "KL", "answers", "processor s", "trials/h", "ratio",
    "capture s", "load s", "peak MiB",
)  # fmt: skip
RATIOS = {OURS: "same_tokens_clock", STOPPING: "early_stop_clock"}
SAME_KL = 1e-4
"""Nats between the two tools' KL of one edit, up to which they agree."""


def summary(replies: Sequence[dict[str, Any]], together: int) -> dict[str, Any]:
    """Seconds per trial from the replies to requests of ``together`` edits each: medians over the turns, since what
    else a machine does comes in bursts. Trials an hour are those of all turns: edits differ in what they cost."""

    def median(values: Sequence[float]) -> float:
        return round(statistics.median(values) / together, 4)

    clock, processor = ([reply[key] for reply in replies] for key in ("seconds", "processor_seconds"))
    parts = {
        part: {
            kind: median([reply["result"][name].get(part, 0.0) for reply in replies])
            for kind, name in (("clock", "parts"), ("processor", "processor_parts"))
        }
        for part in PARTS
    }
    return {
        "seconds_per_trial": median(clock),
        "processor_seconds_per_trial": median(processor),
        "parts": parts,
        "trials_per_hour": round(3600 * together * len(clock) / sum(clock), 1),
        "trials": together * len(replies),
        "seconds": [round(seconds / together, 4) for seconds in clock],
        "processor_seconds": [round(seconds / together, 4) for seconds in processor],
    }


def agreement(found: dict[str, list[dict[str, float]]], row_norm: str) -> dict[str, Any]:
    """How far the scores of the same edits are apart; ``full`` is exact in one tool, of rank 3 in the other."""
    pairs = list(zip(found[THEIRS], found[OURS], strict=True))
    refusals = [abs(theirs["refusals"] - ours["refusals"]) for theirs, ours in pairs]
    kls = [abs(theirs["kl"] - ours["kl"]) for theirs, ours in pairs]
    stopped = all(
        a["refusals"] == b["refusals"] and abs(a["kl"] - b["kl"]) <= 1e-6 + 1e-4 * a["kl"]
        for a, b in zip(found[OURS], found[STOPPING], strict=True)
    )
    return {
        "edits": len(pairs),
        "refusals_equal": sum(difference == 0 for difference in refusals),
        "largest_difference_of_refusals": max(refusals),
        "largest_difference_of_kl": max(kls),
        "largest_kl": max(theirs["kl"] for theirs, _ in pairs),
        "agrees": None if row_norm == "full" else not any(refusals) and max(kls) <= SAME_KL,
        "early_stop_changes_nothing": stopped,
        "scores": found,
    }


def ratios(cell: dict[str, Any]) -> dict[str, float]:
    """How many times as many trials an hour, by the clock and by the processor's time of all turns, and how much of
    the memory."""
    theirs = cell["tools"][THEIRS]
    found = {}
    for tool, name in ((OURS, "same_tokens"), (STOPPING, "early_stop")):
        ours = cell["tools"][tool]
        for key, kind in (("seconds", "clock"), ("processor_seconds", "processor")):
            found[f"{name}_{kind}"] = round(sum(theirs[key]) / sum(ours[key]), 2)
    found["peak_memory"] = round(cell["peak_bytes"][OURS] / cell["peak_bytes"][THEIRS], 3)
    return found


def aims(case: str, measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at for a model, and what was found."""
    wanted = {"demo": ("early_stop_clock", 10.0), "135m": ("same_tokens_clock", 1.2), "8b": ("early_stop_clock", 10.0)}
    rows = []
    if case in wanted:
        key, least = wanted[case]
        for name, cell in measured.items():
            if cell["row_norm"] == "full":
                found = cell["ratios"][key]
                rows.append({"aim": f"{key}, {name}", "at least": least, "found": found, "met": found >= least})
    most = max(cell["ratios"]["peak_memory"] for cell in measured.values())
    rows.append({"aim": "peak memory, ours / theirs", "at most": 1.0, "found": most, "met": most <= 1.0})
    wrong = [name for name, cell in measured.items() if cell["agreement"]["agrees"] is False]
    rows.append({"aim": "equal scores for none and pre", "different": wrong, "met": not wrong})
    return rows


def table(cases: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown, side by side."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for case, of_case in cases.items():
        for name, cell in of_case["cells"].items():
            for tool in TOOLS:
                figures, owner = cell["tools"][tool], THEIRS if tool == THEIRS else OURS
                parts = " | ".join(f"{figures['parts'][part]['clock']:.3f}" for part in PARTS)
                ratio = "" if tool == THEIRS else f"{cell['ratios'][RATIOS[tool]]:.2f}"
                stages = " | ".join(f"{cell['stages'][owner][stage]['seconds']:.1f}" for stage in ("capture", "open"))
                lines.append(
                    f"| {case} | {name} | {tool} | {figures['seconds_per_trial']:.3f} | {parts} | "
                    f"{figures['processor_seconds_per_trial']:.3f} | {figures['trials_per_hour']:.0f} | {ratio} | "
                    f"{stages} | {cell['peak_bytes'][owner] / 2**20:.0f} |"
                )
    return "\n".join(lines)


def plot(cases: dict[str, dict[str, Any]], target: Path) -> None:
    """Seconds per trial by part, one panel a model: the default edit, in batches of each tool's own best size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(cases) + 1, 3.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (case, of_case) in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases.items(), strict=True):
        cell = list(of_case["cells"].values())[-1]
        below = [0.0] * len(TOOLS)
        for part, colour in zip(PARTS, ("#9aa0a6", "#1f5fa8", "#d9600a"), strict=True):
            heights = [cell["tools"][tool]["parts"][part]["clock"] for tool in TOOLS]
            axes.bar(range(len(TOOLS)), heights, bottom=below, color=colour, label=part.replace("kl", "KL"))
            below = [a + b for a, b in zip(below, heights, strict=True)]
        for position, tool in enumerate(TOOLS):
            rate = f"{cell['tools'][tool]['trials_per_hour']:.0f}/h"
            axes.text(position, below[position], rate, ha="center", va="bottom")
        axes.set_xticks(range(len(TOOLS)), [tool.replace(", ", ",\n") for tool in TOOLS], fontsize=8)
        axes.set_title(f"{case} ({of_case['threads']} thread{'s' * (of_case['threads'] > 1)})")
        axes.margins(y=0.12)
    figure.axes[0].set_ylabel("seconds per trial")
    figure.axes[0].legend(frameon=False)
    figure.savefig(target)


def write(result: Path, found: dict[str, dict[str, Any]], order: list[str]) -> dict[str, dict[str, Any]]:
    """Keep what was found; models that were not measured anew stay as they were. Returns all, in
    order."""
    earlier = json.loads(result.read_text()) if result.is_file() else {}
    kept: dict[str, dict[str, Any]] = earlier.get("cases", {}) | found
    report = {
        "what": "seconds per trial, memory and scores of heretic-llm and heretic_ds, taking turns in one run",
        "ratios": "theirs / ours, of all turns together; above 1 this project does more trials an hour",
        "cases": {name: kept[name] for name in sorted(kept, key=order.index)},
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(report, indent=1) + "\n")
    plot(report["cases"], result.with_suffix(".png"))
    return report["cases"]
