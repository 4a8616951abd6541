"""The summary of a sweep: a row for every job, written by the jobs, shown by whoever started them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from heretic_ds.foreign.disk import writing
from heretic_ds.foreign.reading import loads, read_text, reading
from heretic_ds.report.console import WIDTH_OF_FILES

FILE_NAME = "summary.jsonl"

failed_jobs = 0
"""Jobs of the last sweep in this process that did not end with status 0."""


def record(hydra: Any, run_dir: str, status: int, objective: tuple[float, float] | None, message: str | None) -> None:
    """Appends a job's row to the sweep's file; `objective` is (refusal rate, KL divergence in nats)."""
    refusal_rate, kl = objective if objective is not None and status == 0 else (None, None)
    row = {
        "job": hydra.job.num,
        "overrides": list(hydra.overrides.task),
        "status": status,
        "refusal_rate": refusal_rate,
        "kl": kl,
        "message": message,
        "run_dir": run_dir,
    }
    folder = Path(hydra.sweep.dir)
    with writing(folder, "hydra.sweep.dir"), (folder / FILE_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


class SweepSummary(Callback):
    """Shows the rows when all jobs have ended, and counts the failed ones; `conf/config.yaml` names it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Forgets the rows of an earlier sweep in the same folder."""
        (Path(config.hydra.sweep.dir) / FILE_NAME).unlink(missing_ok=True)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table."""
        global failed_jobs
        path = Path(config.hydra.sweep.dir) / FILE_NAME
        lines = read_text(path).splitlines() if path.is_file() else []
        with reading(path, "remove it"):
            rows = sorted((loads(line) for line in lines), key=lambda row: row["job"])
        failed_jobs = sum(row["status"] != 0 for row in rows)
        console = Console() if sys.stdout.isatty() else Console(width=WIDTH_OF_FILES)
        console.print(_table(rows, f"{len(rows)} jobs, {failed_jobs} failed; rows in {path}"))


def _table(rows: list[dict[str, Any]], caption: str) -> Table:
    """The rows, without the overrides that all jobs share."""
    shared = set.intersection(*(set(row["overrides"]) for row in rows)) if len(rows) > 1 else set()
    numbers = [Column(name, no_wrap=True) for name in ("refusal rate", "KL (nats)")]
    table = Table("job", "overrides", *numbers, Column("outcome", overflow="fold"), caption=caption)
    for row in rows:
        rate, kl = row["refusal_rate"], row["kl"]
        cells = (
            str(row["job"]),
            " ".join(word for word in row["overrides"] if word not in shared),
            "" if rate is None else f"{rate:.1%}",
            "" if kl is None else f"{kl:.3g}",
            row["run_dir"] if row["status"] == 0 else row["message"],
        )
        table.add_row(*map(Text, cells))  # as Text, so that square brackets in overrides stay
    return table
