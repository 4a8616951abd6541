"""What an engine leaves behind in its process: functions put back, memory given back."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from heretic_ds.memory import give_back_memory, keep_freed_blocks, peak_of, return_freed_blocks
from heretic_ds.placements.deepspeed import Originals


def resident() -> int:
    """Bytes of memory that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def test_functions_that_were_replaced_are_put_back():
    linear, constructor, forward = torch.nn.functional.linear, torch.empty, nn.Module.apply
    originals = Originals()
    assert originals.replaced() == []
    torch.nn.functional.linear = torch.empty = nn.Module.apply = lambda *args, **kwargs: None
    names = {"torch.nn.functional.linear", "torch.empty", "torch.nn.modules.module.Module.apply"}
    assert set(originals.restore()) == names and originals.replaced() == []
    assert (torch.nn.functional.linear, torch.empty, nn.Module.apply) == (linear, constructor, forward)


def test_originals_know_methods_of_every_kind():
    class Owner:
        @classmethod
        def made(cls) -> str:
            return "class"

        @staticmethod
        def plain() -> str:
            return "static"

        def usual(self) -> str:
            return "method"

    originals = Originals([Owner])
    Owner.made = Owner.plain = Owner.usual = lambda *args: "replaced"
    assert sorted(name.rpartition(".")[2] for name in originals.restore()) == ["made", "plain", "usual"]
    assert (Owner.made(), Owner.plain(), Owner().usual()) == ("class", "static", "method")


def in_a_fresh_process(work: Callable[[], None]) -> None:
    """Run `work` where no other test has left its memory in pieces."""
    process = multiprocessing.get_context("spawn").Process(target=work)
    process.start()
    process.join(120)
    assert process.exitcode == 0


def test_freed_memory_goes_back_to_the_system():
    in_a_fresh_process(freed_memory_goes_back)


def freed_memory_goes_back() -> None:
    """Blocks of a megabyte between others that stay: the C library by itself would keep them."""
    give_back_memory()
    before = resident()
    blocks = [torch.ones(2**18) for _ in range(200)]
    assert resident() - before > 180e6
    kept = blocks[::20]
    del blocks
    give_back_memory()
    assert resident() - before < 40e6 and len(kept) == 10


def test_large_blocks_go_back_at_once_where_that_is_asked_for():
    in_a_fresh_process(large_blocks_go_back_at_once)


def large_blocks_go_back_at_once() -> None:
    blocks = [torch.ones(5 * 2**20) for _ in range(4)]  # 20 MiB each: below what is returned by itself
    del blocks
    return_freed_blocks(at_once=True)
    give_back_memory()
    before = resident()
    for _ in range(4):
        held = [torch.ones(5 * 2**20), torch.ones(1)]
        del held
    assert resident() - before < 8e6


def test_freed_blocks_are_kept_until_they_are_not():
    in_a_fresh_process(freed_blocks_are_kept)


def freed_blocks_are_kept() -> None:
    """Passes' memory stays, is seen when the next pass's need is measured, and goes back in the end."""
    torch.ones(1)
    give_back_memory()
    before = resident()
    keep_freed_blocks()
    for _ in range(2):
        held = [torch.ones(5 * 2**20) for _ in range(4)]
        del held
    assert resident() - before > 70e6
    assert peak_of(lambda: torch.ones(2**22).sum(), torch.device("cpu")) > 15e6
    held = [torch.ones(5 * 2**20) for _ in range(4)]
    del held
    return_freed_blocks(at_once=True)
    give_back_memory()
    assert resident() - before < 8e6
