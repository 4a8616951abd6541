"""Placements over a slow network: two nodes on one machine, in network namespaces, with a link of given rate and delay.

    sudo python benchmarks/two_nodes.py [--result FILE] [--rate 100] [--delay 1] [--width 512] [--tokens 16]

Needs: Linux, root (it makes two network namespaces and removes them), `ip` and `tc` (iproute2), /dev/net/tun; no GPU.
The model is a random llama of some 30 million parameters, made anew in a temporary folder. Each node is one rank with
one thread. Takes some minutes. Leaves ``benchmarks/results/two_nodes.json`` and prints it as a table.

The rate is tc's token bucket at both ends. The delay is this program's: packets pass through it from one namespace to
the other and wait as long as asked for, since not every kernel has tc's `netem`. That takes some of the processor's
time, of every placement alike.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from figures import keep
from placements import MARK, make_model

RESULT = Path(__file__).resolve().parent / "results" / "two_nodes.json"
ROWS = [
    ("replicated", ()),
    ("tensor_parallel", ("parity_check=false",)),
    ("pipeline", ("parity_check=false", "microbatches=1")),
    ("pipeline", ("parity_check=false",)),
    ("fsdp", ()),
]
"""Placement and options."""
NODES = ("hds-node0", "hds-node1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29511
_MTU = 9000
_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001


@contextmanager
def network(rate: float, delay: float) -> Iterator[None]:
    """Two namespaces whose only way to each other has ``rate`` Mbit/s and ``delay`` ms, each way."""
    stop, ends = threading.Event(), []
    try:
        for node, address in zip(NODES, ADDRESSES, strict=True):
            _do("ip", "netns", "add", node)
            name = node.removeprefix("hds-")
            end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            ends.append(end)
            fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22s", name.encode(), _TUN_WITHOUT_HEADER, b""))
            _do("ip", "link", "set", name, "netns", node)
            inside = ("ip", "netns", "exec", node)
            _do(*inside, "ip", "link", "set", "lo", "up")
            _do(*inside, "ip", "addr", "add", f"{address}/24", "dev", name)
            _do(*inside, "ip", "link", "set", name, "mtu", str(_MTU), "txqueuelen", "1000", "up")
            bucket = ("burst", "64kb", "latency", "200ms")
            _do(*inside, "tc", "qdisc", "add", "dev", name, "root", "tbf", "rate", f"{rate}mbit", *bucket)
        relay = threading.Thread(target=_relay, args=(ends, delay / 1000, stop), daemon=True)
        relay.start()
        yield
    finally:
        stop.set()
        for end in ends:
            os.close(end)
        for node in NODES:
            subprocess.run(["ip", "netns", "del", node], capture_output=True)


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()}; this benchmark needs root and iproute2")


def _relay(ends: list[int], delay: float, stop: threading.Event) -> None:
    """Hand packets of each end to the other once they have waited."""
    waiting: tuple[deque[tuple[float, bytes]], ...] = (deque(), deque())
    while not stop.is_set():
        due = min((queue[0][0] for queue in waiting if queue), default=time.monotonic() + 0.1)
        try:
            ready, _, _ = select.select(ends, [], [], max(0.0, due - time.monotonic()))
            for end in ready:
                waiting[ends.index(end)].append((time.monotonic() + delay, os.read(end, _MTU + 64)))
            for place, queue in enumerate(waiting):
                while queue and queue[0][0] <= time.monotonic():
                    os.write(ends[1 - place], queue.popleft()[1])
        except BlockingIOError:
            continue
        except (OSError, ValueError):  # the ends have been closed
            return


def launch(model: Path, row: tuple[str, tuple[str, ...]], tokens: int) -> dict[str, Any]:
    """One row of the table: a job with a rank in each namespace."""
    placement, options = row
    words = [str(model), placement, "1", str(tokens), *options]
    processes = []
    for rank, node in enumerate(NODES):
        environment = {
            **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": "0",
            "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": node.removeprefix("hds-"),
        }  # fmt: skip
        command = [sys.executable, str(Path(__file__).with_name("placements.py")), "--rank", *words]
        inside = ["ip", "netns", "exec", node, *command]
        processes.append(
            subprocess.Popen(inside, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [line.partition(MARK)[2] for line in outputs[0].splitlines() if MARK in line]
    if not lines:
        raise RuntimeError(f"{' '.join(words)} failed:\n{outputs[0][-2000:]}\n{outputs[1][-2000:]}")
    first = json.loads(lines[0])[0]
    names = ("load_seconds", "capture_seconds", "generation_seconds", "generation_tokens")
    return {"placement": placement, "options": list(options), **{name: first[name] for name in names}}


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = ["| placement | load s | capture s | answers s | answer tokens |", "|---|---|---|---|---|"]
    for row in rows:
        options = [option for option in row["options"] if not option.startswith("parity")]
        name = " ".join([row["placement"], *options])
        seconds = " | ".join(f"{row[f'{part}_seconds']:.1f}" for part in ("load", "capture", "generation"))
        lines.append(f"| {name} | {seconds} | {row['generation_tokens']} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--rate", type=float, default=100, help="Mbit/s, each way")
    parser.add_argument("--delay", type=float, default=1, help="milliseconds, each way")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--only", help="placements, with commas between them")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else [row[0] for row in ROWS]
    with tempfile.TemporaryDirectory(prefix="two_nodes_") as folder:
        size = make_model(Path(folder), options.width)
        with network(options.rate, options.delay):
            rows = [launch(Path(folder), row, options.tokens) for row in ROWS if row[0] in wanted]
    print(table(rows))
    link = {"mbit_per_second": options.rate, "delay_ms": options.delay}
    keep(options.result, {"model_bytes": size, "link": link, "rows": rows, "threads_a_rank": 1})
    return 0


if __name__ == "__main__":
    sys.exit(main())
