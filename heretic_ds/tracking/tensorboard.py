"""TensorBoard: event files in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heretic_ds.tracking.base import RunFacts, Tracker, metrics_of, outcome_of

if TYPE_CHECKING:
    from heretic_ds.search.trials import TrialRecord


class TensorBoard(Tracker):
    """Scalars of every trial, the settings as text, the front as a picture: ``tensorboard --logdir <folder>``."""

    package, extra = "tensorboard", "track"

    def start(self, facts: RunFacts) -> str:
        from torch.utils.tensorboard import SummaryWriter

        # What was written of trials that are told of once more, after a kill, is not shown twice.
        self._writer = SummaryWriter(str(facts.folder), purge_step=facts.told if facts.run else None)
        self._steps = facts.told
        if facts.run is None:
            rows = "\n".join(f"| `{name}` | `{value}` |" for name, value in facts.parameters.items())
            self._writer.add_text("settings", f"    {facts.command}\n\n| key | value |\n|---|---|\n{rows}")
        self._writer.flush()
        return str(facts.folder)

    def trial(self, record: TrialRecord) -> None:
        for name, value in metrics_of(record).items():
            self._writer.add_scalar(name, value, record.index)
        self._writer.flush()
        self._steps = record.index + 1

    def end(self, results: Mapping[str, Any], files: Sequence[Path]) -> None:
        import numpy as np
        from PIL import Image

        for name, value in outcome_of(results).items():
            self._writer.add_scalar(name, value, self._steps)
        for file in files:
            if file.suffix == ".png":
                with Image.open(file) as picture:
                    pixels = np.asarray(picture.convert("RGB"))
                self._writer.add_image(file.stem, pixels, self._steps, dataformats="HWC")
        self._writer.close()

    def interrupted(self) -> None:
        self._writer.close()
