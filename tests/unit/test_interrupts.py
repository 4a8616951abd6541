"""Ctrl-C that comes where Python ignores exceptions, or while something is being closed."""

from __future__ import annotations

import os
import signal
import sys
import time
import weakref

import pytest

from heretic_ds.cli import command
from heretic_ds.cli.interrupts import interrupts_heeded, was_interrupted


class Thing:
    """What a weak reference may point at."""


def interrupted_in_a_callback() -> None:
    """Ctrl-C while a callback of a weak reference runs."""
    thing = Thing()
    kept = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT) or time.sleep(0))
    del thing
    assert kept() is None


def test_an_interrupt_that_a_callback_swallowed_comes_again(capfd: pytest.CaptureFixture[str]) -> None:
    before = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), interrupts_heeded():
        interrupted_in_a_callback()
        time.sleep(20)
    assert sys.unraisablehook is before and capfd.readouterr().err == ""


def test_a_job_in_the_background_is_interrupted_too() -> None:
    """Where a shell had SIGINT ignored, and something else raised the interrupt that was swallowed."""

    def swallowed(_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_heeded():
            thing = Thing()
            kept = weakref.ref(thing, swallowed)
            del thing
            assert kept() is None
            time.sleep(5)
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_ignored_errors_are_told_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda ignored: told.append(ignored.exc_type))
    with interrupts_heeded():
        thing = Thing()
        kept = weakref.ref(thing, lambda _: 1 / 0)
        del thing
        assert kept() is None
    assert told == [ZeroDivisionError]


@pytest.mark.parametrize("within", [KeyboardInterrupt, ValueError])
def test_what_breaks_while_an_interrupt_closes_things_is_an_interrupt(
    within: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> int:
        try:
            raise within
        finally:
            raise AttributeError("half closed")

    monkeypatch.setattr(command, "_run", run)
    assert command.main(["model"]) == (130 if within is KeyboardInterrupt else 1)
    assert (capsys.readouterr().err == "heretic-ds: interrupted\n") is (within is KeyboardInterrupt)


def test_errors_that_nobody_interrupted() -> None:
    assert not was_interrupted(ValueError()) and not was_interrupted(None) and was_interrupted(KeyboardInterrupt())
