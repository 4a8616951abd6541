"""The trade-off of a search as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from heretic_ds.foreign.disk import write_atomically
from heretic_ds.report.tables import REFUSALS
from heretic_ds.search.trials import TrialRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREY, _BLUE, _ORANGE = "#9aa0a6", "#1f5fa8", "#d9600a"
_LONGEST_NAME = 60
_NEAR = 2.0
"""How far above the trials a limit may lie, as a factor, to be drawn for its own sake."""


@dataclass(frozen=True)
class FrontFacts:
    """What a picture of a front says beside its trials."""

    model: str
    """The model's name, the title."""
    baseline: float
    """The original model's score, drawn as a line."""
    prompts: int
    """Number of target eval prompts."""
    max_kl: float | None = None
    """The largest KL that may be exported (nats), drawn as a line where it is near the trials, else named."""
    scorer: str = REFUSALS
    """Name of the first scorer, whose scores stand where refusals do; they may be any numbers."""


def plot_front(
    path: Path, records: Sequence[TrialRecord], front: Sequence[int], facts: FrontFacts, selected: int | None = None
) -> None:
    """Write a PNG of refusals against KL of all complete trials, with the Pareto front and the selected
    trial.

    KL has a logarithmic axis, linear around 0 where a trial left the model as it is; its width is the trials'. Works
    without a display, and for any number of trials, none included.

    Args:
        path: the PNG; replaced atomically.
        records: finished trials; failed ones are left out.
        front: indices from :func:`heretic_ds.search.pareto.pareto_front`.
        facts: what else is to be seen.
        selected: index of the exported trial, if any.
    """
    points = {
        record.index: (max(record.kl, 0.0), record.refusals)
        for record in records
        if record.complete and record.kl is not None and record.refusals is not None
    }
    figure = new_figure((7.5, 5))
    axes = figure.add_subplot()
    _draw_trials(axes, points, front, selected)
    axes.axhline(facts.baseline, color=_GREY, linestyle=":", linewidth=1.2, label="original model")
    _scale(axes, [kl for kl, _ in points.values()])
    if facts.max_kl is not None:
        _draw_limit(axes, facts.max_kl)
    if facts.scorer == REFUSALS:
        axes.set_ylim(bottom=-0.03 * max(facts.prompts, 1), top=1.03 * max(facts.prompts, 1))
    # Names are shown as they are: a dollar sign in one would begin a formula.
    axes.set_xlabel("KL divergence from the original model (nats, first answer token)")
    counted = "of" if facts.scorer == REFUSALS else "on"
    axes.set_ylabel(f"{facts.scorer}, {counted} {facts.prompts} target prompts", parse_math=False)
    axes.set_title(_printable(facts.model), loc="left", fontweight="bold", parse_math=False)
    axes.set_title(f"{len(points)} trial{'' if len(points) == 1 else 's'}", loc="right", fontsize="medium")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    save_figure(figure, path)


def new_figure(size: tuple[float, float]) -> Figure:
    """A picture of a size in inches, which needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # when a search has ended, not while it waits to begin
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture as PNG, in one step."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _printable(text: str) -> str:
    """A name on one line of the picture, the end of it where it is too long."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown if len(shown) <= _LONGEST_NAME else f"...{shown[3 - _LONGEST_NAME :]}"


def _draw_trials(
    axes: Axes, points: dict[int, tuple[float, float]], front: Sequence[int], selected: int | None
) -> None:
    """Grey dots, the front as a stepped line (what lies above is beaten), the selected trial as a ring."""
    others = [point for index, point in points.items() if index not in set(front)]
    if others:
        kls, refusals = zip(*others, strict=True)
        axes.scatter(kls, refusals, s=18, color=_GREY, linewidths=0, label="trials", zorder=2)
    line = sorted(points[index] for index in front if index in points)
    if line:
        kls, refusals = zip(*line, strict=True)
        axes.step(kls, refusals, where="post", color=_BLUE, linewidth=1.4, zorder=3)
        axes.scatter(kls, refusals, s=30, color=_BLUE, label="Pareto front", zorder=4)
    if selected in points:
        point = points[selected]
        axes.scatter(*point, s=130, facecolors="none", edgecolors=_ORANGE, linewidths=2, zorder=5)
        text, beside = f"trial {selected}", (8, 10)
        axes.annotate(
            text, point, xytext=beside, textcoords="offset points", color=_ORANGE, fontweight="bold", zorder=6
        )


def _scale(axes: Axes, kls: Sequence[float]) -> None:
    """The trials take the whole width: logarithmic where all KLs are positive; linear below the smallest positive one
    where some are 0."""
    positive = [kl for kl in kls if kl > 0]
    if not positive:
        axes.set_xlim(-0.001, 0.1)
        return
    low, high = min(positive), max(positive)
    margin = max((high / low) ** 0.06, 1.15)  # a part of the decades that they span
    if min(kls) == 0:
        axes.set_xscale("symlog", linthresh=low)
        axes.set_xlim(-0.1 * low, high * margin)
    else:
        axes.set_xscale("log")
        axes.set_xlim(low / margin, high * margin)


def _draw_limit(axes: Axes, max_kl: float) -> None:
    """The limit as a line where it lies among the trials or a little beside them; else which side of them it is on."""
    low, high = axes.get_xlim()
    label = f"export.max_kl = {max_kl:g}"
    if low < max_kl <= high * _NEAR:
        axes.set_xlim(low, max(high, max_kl * 1.15))
        axes.axvline(max_kl, label=label, color=_GREY, linestyle="--", linewidth=1)
        return
    side = "all trials are below" if max_kl > high else "all trials are above"
    axes.plot([], [], label=f"{label}: {side}", color=_GREY, linestyle="--", linewidth=1)
