"""What the planner chooses: published shapes of models on the machines of ``conf/hardware/``, as a picture and a table.

    python benchmarks/planner_map.py            plan anew
    python benchmarks/planner_map.py --page     write the table alone, from what was kept

Needs: the package and its tests' models; no weights, no network, no GPU. Takes a minute or more, since models of up to
10^12 parameters are made without memory for their weights. Writes ``docs/parallelism.png``, the table between the marks
of ``docs/hardware.md``, and ``benchmarks/results/planner_map.json``. Seconds and bytes are the planner's, from data
sheets: nothing of it is measured.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
from figures import keep
from matplotlib.patches import Patch, Rectangle
from omegaconf import OmegaConf

from heretic_ds.planner import Plan, machine_of, make_plan, placements_for
from heretic_ds.settings import conf_dir
from tests.planned_models import SHAPES, planned

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "planner_map.json"
PAGE, PICTURE = ROOT / "docs" / "hardware.md", ROOT / "docs" / "parallelism.png"
MARKS = ("<!-- choices, by benchmarks/planner_map.py -->\n", "<!-- end of choices -->\n")
MACHINES = {
    "rtx4090": "1 GPU, 24 GB",
    "rtx4090x2": "2 GPUs, 24 GB, PCIe",
    "h100x8": "8 GPUs, 80 GB, NVLink",
    "h100x8x4": "4 x 8 GPUs, 80 GB",
    "cpu_server": "CPU server, 1 TB",
}
COLOURS = {
    "replicated": "#8fc7a3", "tensor_parallel": "#8db6e0", "pipeline": "#f2c57c", "tensor_pipeline": "#c9a3d9",
    "expert_parallel": "#e79a93", "fsdp": "#b8d8d8", "zero3": "#d8d8a8",
}  # fmt: skip
NOTHING = "#e6e6e6"


def planned_row(model: str, machine: str) -> dict[str, Any]:
    """What is chosen for one model on one machine, and what that takes."""
    described = machine_of(OmegaConf.load(conf_dir() / "hardware" / f"{machine}.yaml"))
    choice = {phase: placements_for(phase) for phase in ("capture", "evaluate")}
    plan: Plan = make_plan(planned(model), described, None, choice)
    row: dict[str, Any] = {"model": model, "machine": machine, "sentence": plan.sentence}
    chosen = plan.chosen["evaluate"]
    if chosen is None or chosen.cost is None:
        return {**row, "placement": None, "smallest_devices": plan.smallest_devices}
    cost = chosen.cost
    return {
        **row,
        "placement": chosen.placement,
        "options": dict(chosen.options),
        "trial_seconds": cost.seconds["trial"],
        "load_seconds": cost.seconds["load"],
        "rank_bytes": sum(cost.bytes.values()) or sum(cost.host.values()),
    }


def words(row: dict[str, Any], line: str = "\n", colon: str = "") -> str:
    """One cell."""
    if row["placement"] is None:
        needed = row["smallest_devices"]
        return f"needs {needed}{line}devices" if needed else "does not fit"
    degrees = " x ".join(str(value) for value in row["options"].values())
    seconds = row["trial_seconds"]
    shown = f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    name = f"{row['placement']} {degrees}".strip()
    return f"{name}{colon}{line}{shown}, {row['rank_bytes'] / 1e9:.0f} GB"


def draw(rows: list[dict[str, Any]]) -> None:
    """The picture."""
    models, machines = list(SHAPES), list(MACHINES)
    figure, axes = plt.subplots(figsize=(12, 0.62 * len(models) + 1.6), dpi=110)
    for row in rows:
        x, y = machines.index(row["machine"]), models.index(row["model"])
        colour = COLOURS.get(row["placement"], NOTHING)
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
        axes.text(x + 0.5, y + 0.5, words(row), ha="center", va="center", fontsize=8)
    axes.set_xlim(0, len(machines))
    axes.set_ylim(len(models), 0)
    axes.set_xticks([x + 0.5 for x in range(len(machines))], list(MACHINES.values()))
    axes.set_yticks([y + 0.5 for y in range(len(models))], models)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    used = [name for name in COLOURS if any(row["placement"] == name for row in rows)]
    legend = [Patch(color=COLOURS[name], label=name) for name in used] + [Patch(color=NOTHING, label="nothing fits")]
    axes.legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=len(legend), frameon=False)
    figure.savefig(PICTURE, bbox_inches="tight")


def table(rows: list[dict[str, Any]]) -> str:
    """The same as Markdown."""
    lines = ["| model | " + " | ".join(MACHINES.values()) + " |", "|---|" + "---|" * len(MACHINES)]
    for model in SHAPES:
        cells = [words(row, line=" ", colon=":") for row in rows if row["model"] == model]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    if sys.argv[1:] == ["--page"]:
        rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    else:
        rows = [planned_row(model, machine) for model in SHAPES for machine in MACHINES]
        keep(RESULT, {"rows": rows})
        draw(rows)
    begin, end = (re.escape(mark) for mark in MARKS)
    page = PAGE.read_text(encoding="utf-8")
    told = f"{MARKS[0]}\n{table(rows)}\n{MARKS[1]}"
    PAGE.write_text(re.sub(f"{begin}.*?{end}", lambda _: told, page, flags=re.DOTALL), encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
