"""The geometry of residuals as a table and as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from heretic_ds.geometry.measures import LayerGeometry
from heretic_ds.report.plots import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TARGET, BASELINE, DIRECTION, OTHER = "#d9600a", "#1f5fa8", "#2a7f3f", "#7a4fa3"
"""Colours of the two kinds of prompts, of what is between them, and of a fourth curve."""

COLUMNS = {
    "|t|": "target_norm",
    "|b|": "baseline_norm",
    "|r|": "direction_norm",
    "t·b": "cos_means",
    "t·r": "cos_target_direction",
    "b·r": "cos_baseline_direction",
    "r·next": "cos_next",
    "d'": "separability",
    "right": "accuracy",
    "silh.": "silhouette",
}
"""Headings of the table, in its order, and what stands below them."""

_WIDE = 78
"""Columns of a terminal from which the whole table fits."""
_LEFT_OUT = ("t·r", "b·r", "r·next")
"""What a narrow terminal is not shown."""

LEGEND = (
    "t, b: mean residuals of target and baseline prompts; r = t - b; a·c: cosine; d' and right: target from baseline "
    "prompts along r, each judged without itself; silh.: silhouette. docs/geometry.md has the equations"
)


def layer_name(entry: int) -> str:
    """How an entry of the stream is called: ``embed``, or the number of the block that it leaves."""
    return str(entry - 1) if entry else "embed"


def number_text(name: str, number: float | None) -> str:
    """A number of a layer as tables show it; ``-`` where it is not defined."""
    if number is None:
        return "-"
    if name == "accuracy":
        return f"{number:.0%}"
    return f"{number:.3g}" if name.endswith("_norm") else f"{number:.2f}"


def geometry_table(layers: Sequence[LayerGeometry], width: int) -> Table:
    """One row for every entry of the stream; ``width`` is the terminal's, in columns."""
    shown = {title: name for title, name in COLUMNS.items() if width >= _WIDE or title not in _LEFT_OUT}
    table = Table(
        title="Residuals at the last prompt token", title_justify="left", pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("block", justify="right", no_wrap=True)
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for entry, layer in enumerate(layers):
        cells = [number_text(name, getattr(layer, name)) for name in shown.values()]
        table.add_row(layer_name(entry), *cells)
    table.caption, table.caption_justify = LEGEND, "left"
    return table


def draw_layers(path: Path, layers: Sequence[LayerGeometry], model: str) -> None:
    """Write a PNG with four curves over the layers: norms, cosines, separability, silhouette and accuracy."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure((9, 6), f"Residuals of {_plain(model)}, by layer")
    grid = figure.subplots(2, 2, sharex=True)

    def shown(value: float | None, logarithmic: bool) -> bool:
        return value is not None and (value > 0 or not logarithmic)

    def curves(axes: Axes, title: str, **named: tuple[str, str]) -> None:
        for name, (label, colour) in named.items():
            values = [getattr(layer, name) for layer in layers]
            known = [(entry - 1, value) for entry, value in enumerate(values) if shown(value, title == "length")]
            if known:
                axes.plot(*zip(*known, strict=True), color=colour, label=label, marker=".", linewidth=1.4)
        axes.set_title(title, loc="left", fontsize="medium")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="small")

    curves(
        grid[0][0],
        "length",
        target_norm=("target mean", TARGET),
        baseline_norm=("baseline mean", BASELINE),
        direction_norm=("direction", DIRECTION),
    )
    if grid[0][0].lines:
        grid[0][0].set_yscale("log")
    curves(
        grid[0][1],
        "cosine",
        cos_means=("target and baseline mean", OTHER),
        cos_target_direction=("target mean and direction", TARGET),
        cos_baseline_direction=("baseline mean and direction", BASELINE),
        cos_next=("direction and the next layer's", DIRECTION),
    )
    curves(grid[1][0], "d' along the direction, each prompt judged without itself", separability=("d'", DIRECTION))
    curves(
        grid[1][1],
        "silhouette, and share of prompts on their own side",
        silhouette=("silhouette", OTHER),
        accuracy=("on their own side", DIRECTION),
    )
    for axes in grid[1]:
        axes.set_xlabel("block (-1: the embedding)")
    save_figure(figure, path)


def draw_projections(path: Path, projections: Sequence[dict[str, Any]], method: str, model: str) -> None:
    """Write a PNG with one scatter plot for every block that was projected."""
    across = min(4, max(1, math.ceil(math.sqrt(len(projections)))))
    down = math.ceil(len(projections) / across)
    title = {"pca": "principal components", "pacmap": "PaCMAP"}[method]
    figure = _figure((2.6 * across + 0.4, 2.6 * down + 0.9), f"Residuals of {_plain(model)}, {title}")
    for place, found in enumerate(projections):
        axes = figure.add_subplot(down, across, place + 1)
        for kind, colour in (("baseline", BASELINE), ("target", TARGET)):
            points = found[kind]
            if points:
                x, y = zip(*points, strict=True)
                axes.scatter(x, y, s=9, color=colour, alpha=0.6, linewidths=0, label=kind if place == 0 else None)
        share = "" if found["explained"] is None else f", {sum(found['explained']):.0%} of variance"
        axes.set_title(f"block {found['block']}{share}", loc="left", fontsize="small")
        axes.tick_params(labelleft=False, labelbottom=False, length=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    save_figure(figure, path)


def _figure(size: tuple[float, float], title: str) -> Figure:
    figure = new_figure(size)
    figure.suptitle(title, fontsize="medium")
    return figure


def _plain(name: str) -> str:
    """A name as plain text: a dollar sign would begin a formula, and a control character has no shape."""
    return "".join(sign if sign.isprintable() else "?" for sign in name).replace("$", r"\$")
