"""Tables, lines, progress and the plot, as text and as pixels."""

from __future__ import annotations

import io
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread
from rich.console import Console

from heretic_ds.ablation.edit import Edit
from heretic_ds.ablation.profile import Profile
from heretic_ds.report.plots import FrontFacts, plot_front
from heretic_ds.report.progress import SearchProgress
from heretic_ds.report.stages import StageProgress, duration
from heretic_ds.report.tables import TrialTable, pareto_table, trial_line
from heretic_ds.search.trials import TrialRecord

ATTENTION, MLP = Profile(1.2, 14.25, 0.4, 6.1), Profile(0.0, 10.0, 0.0, 3.0)


def record(index: int, refusals: float | None, kl: float | None, direction: float | None = None) -> TrialRecord:
    state = "complete" if kl is not None else "failed"
    edit = Edit(direction, {"attention": ATTENTION, "mlp": MLP})
    return TrialRecord(index, index, state, edit, refusals, kl, {}, 2.5)


def test_trial_line_is_one_line_with_all_numbers() -> None:
    line = trial_line(record(7, 3, 0.01234, direction=11.5), total=200, prompts=100)
    assert line == (
        "trial   7  refusals   3/100  KL 0.0123    2.5 s  global 11.50  "
        "attention 1.20 at 14.2, to 0.40 within 6.1  mlp not edited"
    )
    assert trial_line(record(12, None, None), total=40, prompts=10) == "trial 12  failed  2.5 s"


WIDTHS = [60, 80, 120, 200]


def widest(index: int = 199) -> TrialRecord:
    """A trial whose numbers are as long as they get in 200 trials of a model of 99 layers."""
    profile = Profile(1.25, 88.25, 0.75, 61.5)
    edit = Edit(77.125, {"attention": profile, "mlp": profile})
    return TrialRecord(index, index, "complete", edit, 100, 1.234e-05, {}, 1234.5)


def lines_of(renderable: object, width: int) -> list[str]:
    """As a terminal of so many columns shows it."""
    out = io.StringIO()
    Console(file=out, width=width).print(renderable, no_wrap=True)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_trials_fit_and_line_up_and_cut_no_number(width: int) -> None:
    table = TrialTable(width, total=200, prompts=100)
    rows = [table.row(widest(), marked=True), table.row(record(7, 3, 0.01234)), table.row(record(12, None, None))]
    lines = [line for row in (table.header(), *rows) for line in lines_of(row, width)]
    assert len(lines) == 4 and max(map(len, lines)) <= width and "…" not in "".join(lines)
    header, long, usual, failed = lines
    assert long.split()[:5] == ["*", "199", "100/100", "1.23e-05", "1234"]  # 1234.5 rounds to even
    assert usual.split()[:6] == ["7", "3/100", "0.0123", "2.5", "per", "layer"] and "global 77.1" in long
    assert failed.split() == ["12", "failed", "-", "2.5"]
    for name in ("refusals", "KL"):  # right below the name's end
        end = header.index(name) + len(name)
        assert all(line[end - 1] != " " and line[end : end + 1] in ("", " ") for line in (long, usual))
    shown = {60: "a1.25@88 m1.25@88", 80: "attn 1.25@88.2", 120: "mlp 1.25@88.2 to 0.75 in 61.5"}
    assert shown.get(width, "mlp 1.25 at 88.2, to 0.75 within 61.5") in long


def test_a_name_that_is_long_and_a_score_that_is_no_count() -> None:
    table = TrialTable(60, total=5000, prompts=100, scorer="questions_at_the_end")
    lines = [*lines_of(table.header(), 60), *lines_of(table.row(record(4321, 1234567.0, 12.5)), 60)]
    assert max(map(len, lines)) <= 60 and "questions_at_the" in lines[0] and "4321" in lines[1]
    assert "1.23457e+06" in lines[1] and "12.5" in lines[1]


@pytest.mark.parametrize("width", WIDTHS)
def test_pareto_table_names_original_front_and_selected(width: int) -> None:
    records = [record(0, 40, 0.0), record(1, 2, 1.234e-05, direction=3.25), record(2, 60, 0.2)]
    lines = lines_of(pareto_table(records, [1, 0], 97, 100, selected=1, width=width), width)
    assert len(lines) == 6 and max(map(len, lines)) <= width
    assert lines[1].split()[:3] == ["trial", "refusals", "KL"]
    assert lines[2].split()[:3] == ["-", "97/100", "0"] and "the original" in lines[2]
    assert lines[3].split()[:6] == ["*", "1", "2/100", "1.23e-05", "2.5", "global"]
    assert lines[4].split()[:5] == ["0", "40/100", "0", "2.5", "per"]
    assert lines[5] == "* selected"
    assert len(lines_of(pareto_table([], front=[], baseline_refusals=97, prompts=100), width)) == 3


def test_another_scorer_goes_by_its_name(tmp_path: Path) -> None:
    records = [record(0, 250.5, 0.01)]
    line = trial_line(records[0], total=20, prompts=100, scorer="vowels")
    assert line.startswith("trial  0  vowels 250.5  KL 0.01 ")
    out = io.StringIO()
    Console(file=out, width=140).print(pareto_table(records, [0], 300, 100, scorer="vowels"))
    with SearchProgress(Console(file=out, width=40), total=4, earlier=[], prompts=100, scorer="vowels") as progress:
        progress.update(records[0])
    assert out.getvalue().count("vowels") == 2 and "300" in out.getvalue()
    assert "refusals" not in out.getvalue() and "/100" not in out.getvalue()
    plot_front(tmp_path / "pareto.png", records, [0], FrontFacts("model", 300, 100, scorer="vowels"), selected=0)
    assert colour_share(tmp_path / "pareto.png", 0xD9, 0x60, 0x0A) > 0  # in sight, above the number of prompts


def test_progress_without_a_terminal_is_plain_lines() -> None:
    out = io.StringIO()
    earlier = [record(0, 5, 0.1)]
    with SearchProgress(Console(file=out, width=40), total=4, earlier=earlier, prompts=10) as progress:
        for index, refusals, seconds in ((1, 5, 100.0), (2, 0, 50.0), (3, None, 2.5)):
            kl = None if refusals is None else 0.1
            progress.update(replace(record(index, refusals, kl), seconds=seconds))
    lines = out.getvalue().splitlines()
    assert len(lines) == 3 and "\x1b" not in out.getvalue() and "\r" not in out.getvalue()
    assert lines[0].endswith("(2 of 4 done, about 3 min 20 s left)")
    assert lines[1].endswith("(3 of 4 done, about 1 min 15 s left)")
    assert lines[2] == "trial 3  failed  2.5 s  (4 of 4 done)"


def at_a_terminal(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """What a search of three trials writes: a good one, a worse one, a better one."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, color_system="standard")
    with StageProgress(console), SearchProgress(console, total=3, earlier=[], prompts=10) as progress:
        for index, refusals, kl in ((0, 5, 0.1), (1, 6, 0.2), (2, 0, 0.1)):
            progress.update(replace(record(index, refusals, kl), seconds=30.0))
            time.sleep(0.3)
        assert progress.time_left() == ""
    return out.getvalue()


def test_progress_at_a_terminal_is_rows_below_a_header_and_marks_the_best_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = at_a_terminal(monkeypatch)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    rows = [line.strip().split()[:3] for line in re.split(r"[\r\n]+", text) if "10 " in line and "trials" not in line]
    assert [row for row in rows if "/10" in "".join(row)] == [
        ["*", "0", "5/10"],
        ["1", "6/10", "0.2"],
        ["*", "2", "0/10"],
    ]
    assert text.count("refusals") == 1 and "1/3" in text and "about 1 min 00 s left" in text
    assert "\x1b[1;32m" in written  # bold and green


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    written = at_a_terminal(monkeypatch, NO_COLOR="1")
    styles = set(re.findall(r"\x1b\[([0-9;]*)m", written))
    assert styles <= {"", "0", "1", "2", "22"}, styles


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def colour_share(path: Path, red: int, green: int, blue: int) -> float:
    pixels = imread(path)[..., :3]
    wanted = abs(pixels - [red / 255, green / 255, blue / 255]).max(axis=-1) < 0.02
    return float(wanted.mean())


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record(0, 5, 0.02)],
        [record(0, 5, 0.0)],
        [record(0, 5, 0.0), record(1, 0, 0.0), record(2, None, None)],
        [record(0, 60, 0.0), record(1, 3, 1e-5), record(2, 0, 0.7), record(3, 9, 12.0)],
    ],
)
def test_plot_works_for_any_trials(tmp_path: Path, records: list[TrialRecord]) -> None:
    complete = [one.index for one in records if one.complete]
    front = complete[:1]
    selected = front[0] if front else None
    plot_front(tmp_path / "pareto.png", records, front, FrontFacts("model", 97, 100, 0.1), selected=selected)
    assert imread(tmp_path / "pareto.png").shape[:2] == (750, 1125)
    assert (colour_share(tmp_path / "pareto.png", 0xD9, 0x60, 0x0A) > 0) == bool(complete)
    assert (colour_share(tmp_path / "pareto.png", 0x1F, 0x5F, 0xA8) > 0) == bool(complete)
    assert [file.name for file in tmp_path.iterdir()] == ["pareto.png"]


def columns_of(path: Path, red: int, green: int, blue: int) -> tuple[float, float]:
    """The first and the last column with a colour, as shares of the picture's width."""
    pixels = imread(path)[..., :3]
    columns = (abs(pixels - [red / 255, green / 255, blue / 255]).max(axis=-1) < 0.02).any(axis=0).nonzero()[0]
    return float(columns[0]) / pixels.shape[1], float(columns[-1]) / pixels.shape[1]


@pytest.mark.parametrize("max_kl", [0.1, 1e-4, 1e-9, None])
def test_trials_take_the_width_of_the_picture(tmp_path: Path, max_kl: float | None) -> None:
    """Wherever the limit lies: at 0.1 it once left a third of the width to a demo's trials, of 3e-5 to 3e-4 nats."""
    records = [record(0, 60, 2.8e-5), record(1, 3, 1e-4), record(2, 0, 3.05e-4)]
    plot_front(tmp_path / "pareto.png", records, [0, 1, 2], FrontFacts("model", 67, 67, max_kl))
    left, right = columns_of(tmp_path / "pareto.png", 0x1F, 0x5F, 0xA8)
    assert left < 0.2 and right > 0.9


def test_the_picture_names_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    draw = Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **how: titles.append(text) or draw(self, text, **how))
    plot_front(tmp_path / "pareto.png", [record(0, 5, 0.02)], [0], FrontFacts("some/$\\frac{$ \x1b[31mmodel", 9, 9))
    assert titles == ["some/$\\frac{$  [31mmodel", "1 trial"]  # not read as a formula, which would not be one
    plot_front(tmp_path / "pareto.png", [], [], FrontFacts("m" * 200, 9, 9))
    assert titles[2] == "..." + "m" * 57
