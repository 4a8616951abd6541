"""What is shown of work in hand: a live line that fits, plain lines in a pipe, and nothing where nobody shows it."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console
from rich.live import Live

from heretic_ds import progress
from heretic_ds.progress import Work
from heretic_ds.report import stages
from heretic_ds.report.console import Speaker
from heretic_ds.report.library_bars import counted_here
from heretic_ds.report.stages import StageProgress, live_line, plain_line
from heretic_ds.stages.start import show_start

NOW = 1000.0


def in_hand(done: float = 100, inner: str = "answers") -> list[Work]:
    """A search of 200 trials that has gone on for 100 s, within a pass of which a third is done."""
    trials = Work("trials", 200, "trials", done, started=NOW - 100)
    trials._first, trials._end = 0.0, time.monotonic() + 240.4
    return [Work("search", started=NOW - 100), trials, Work(inner, 30, "answers", 10, started=NOW - 2)]


def test_work_is_counted_whether_or_not_anybody_looks() -> None:
    with progress.work("capture", 10, "prompts") as work:
        work.advance(4)
    assert work.reached() == 4 and work.seconds_left() is not None


def test_the_pace_tells_the_time_left() -> None:
    work = Work("capture", 100, "prompts", started=time.monotonic() - 10)
    assert work.seconds_left() is None  # nothing is done yet
    work.advance(25)
    assert work.seconds_left() == pytest.approx(30, rel=0.01)
    measured = Work("export", 10, measure=lambda: 5, started=time.monotonic() - 7)
    assert measured.seconds_left() == pytest.approx(7, rel=0.01)
    gone_on = Work("trials", 100, done=50, started=time.monotonic() - 10)
    gone_on.advance(10)
    assert gone_on.seconds_left() == pytest.approx(40, rel=0.01)  # what earlier runs did is no pace of this one
    gone_on.expect(5)
    assert gone_on.seconds_left() == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize("width", [8, 20, 40, 59, 79, 119, 199])
@pytest.mark.parametrize("name", ["search", "the original's scores"])
def test_the_live_line_fits(width: int, name: str) -> None:
    works = in_hand()
    works[0].what = name
    line = live_line(works, width, NOW)
    assert line.cell_len <= width
    if width >= 59:
        assert "100/200" in line.plain and "about 4 min 00 s left" in line.plain and name in line.plain
    if width >= 119:
        assert re.search(rf"{name} · answers 33 % ━+ 100/200 1:40 about", line.plain)


def test_bytes_are_told_in_larger_units() -> None:
    works = [Work("export", started=NOW), Work("files", 2.5e9, "bytes", 1e9, started=NOW)]
    assert "1.0/2.5 GB" in live_line(works, 80, NOW).plain
    assert plain_line(works, NOW) == "export: files, 1.0 of 2.5 GB (0 s so far)"


def test_a_plain_line() -> None:
    assert (
        plain_line(in_hand(), NOW)
        == "search: answers 33 %, 100 of 200 trials, about 4 min 00 s left (1 min 40 s so far)"
    )
    assert plain_line([Work("loading", started=NOW - 7)], NOW) == "loading (7 s so far)"
    assert plain_line([], NOW) == ""


def test_in_a_pipe_a_line_breaks_the_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "FIRST_MINUTE", 0.2)
    out = io.StringIO()
    console = Speaker(file=out, width=40)
    with StageProgress(console), progress.work("capture"):
        time.sleep(0.1)
        assert out.getvalue() == ""
        with progress.work("residuals", 400, "prompts") as work:
            work.advance(120)
            for _ in range(4):  # what is said is as good as a line of progress
                console.print("a message")
                time.sleep(0.1)
            assert "capture" not in out.getvalue()
            time.sleep(0.5)
    told = [line for line in out.getvalue().splitlines() if line != "a message"]
    assert told and all(line.startswith("capture: residuals, 120 of 400 prompts") for line in told)
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()
    time.sleep(0.3)
    assert len(out.getvalue().splitlines()) == len(told) + 4  # nothing is said once the work is done


def test_at_a_terminal_the_line_moves_and_vanishes() -> None:
    out = io.StringIO()
    with StageProgress(Speaker(file=out, force_terminal=True, width=60)) as board, progress.work("capture"):
        time.sleep(0.8)
        assert out.getvalue().count("capture") >= 3
    assert board._live is None and out.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K")


def test_nobody_speaks_on_a_quiet_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "FIRST_MINUTE", 0.05)
    out = io.StringIO()
    with StageProgress(Speaker(file=out, quiet=True)), progress.work("capture"):
        time.sleep(0.2)
    assert out.getvalue() == ""


def test_an_error_takes_the_line_away() -> None:
    board = StageProgress(Console(file=io.StringIO(), force_terminal=True, width=60))
    with pytest.raises(ValueError, match="broken"), board, progress.work("capture"), progress.work("residuals"):
        raise ValueError("broken")
    assert board._live is None and not board._works and not progress._boards


def test_bars_of_transformers_are_work_in_hand() -> None:
    from transformers.utils import logging as transformers_logging

    seen: list[list[tuple[str, float | None, float]]] = []
    with counted_here(), StageProgress(Console(quiet=True)) as board:
        for _ in transformers_logging.tqdm({"a": 1, "b": 2}.items(), desc="Loading weights"):
            seen.append([(work.what, work.total, work.done) for work in board._works])
        with transformers_logging.tqdm(total=3, desc="Writing") as bar:
            bar.update(2)
            bar.set_postfix(anything=1)
            seen.append([(work.what, work.total, work.done) for work in board._works])
        assert not board._works
    assert seen == [[("loading weights", 2, 0)], [("loading weights", 2, 1)], [("writing", 3, 2)]]


def test_downloads_are_counted_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from heretic_ds.checkpoint import downloads

    def snapshot(name: str, revision: str | None, allow_patterns: list[str], tqdm_class: type) -> str:
        transfer = tqdm_class(desc="Downloading bytes", total=0, initial=0, unit="B", unit_scale=True)
        disk = tqdm_class(desc="Reconstructing (incomplete total...)", total=0, initial=0, unit="B", unit_scale=True)
        disk.total += 100
        transfer.update(70)
        disk.update(60)
        for _ in tqdm_class(["file"], desc="Fetching 1 files"):
            [work] = board._works
            assert (work.total, work.reached(), work.unit) == (100, 60, "bytes")
        return "folder"

    monkeypatch.setattr(downloads, "snapshot_download", snapshot)
    with StageProgress(Console(quiet=True)) as board:
        assert str(downloads.fetched("org/name", None, ["*.json"])) == "folder"


def test_names_of_files_reach_no_terminal_raw() -> None:
    facts = {"version": "1", "run": "runs/\x1b[31mred", "target.train": "9 of 9 prompts of \x9b2J.txt"}
    for terminal in (False, True):
        shown = io.StringIO()
        show_start(Console(file=shown, width=120, force_terminal=terminal, color_system=None), facts)
        assert "␛[31mred" in shown.getvalue() and not {"\x1b", "\x9b"} & set(shown.getvalue())


def test_ctrl_c_while_the_line_goes_is_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is taken down once: what comes in its end is what the program ends by."""
    stop = Live.stop

    def interrupted(live: Live) -> None:
        stop(live)
        raise KeyboardInterrupt

    monkeypatch.setattr(Live, "stop", interrupted)
    out = io.StringIO()
    with (
        pytest.raises(KeyboardInterrupt),
        StageProgress(Speaker(file=out, force_terminal=True, width=60)),
        progress.work("capture"),
    ):
        pass
    assert out.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back
