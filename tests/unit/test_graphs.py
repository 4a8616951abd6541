"""Graphs: the sizes they are made for, what replaying one does, and the real ones where there is a GPU."""

from __future__ import annotations

import contextlib
import inspect
from types import SimpleNamespace

import pytest
import torch

from heretic_ds.engines import graphs
from heretic_ds.engines.graphs import CudaGraphs, ReplayedSteps, column_buckets, read_later, row_buckets
from tests import families
from tests.recorded_graphs import RecordedGraph, Recorder


def test_sizes_halve_down_to_few_rows_and_double_up_to_all_columns():
    assert row_buckets(256) == [256, 128, 64, 32, 16, 8]
    assert row_buckets(100) == [100, 56, 32, 16, 8]
    assert row_buckets(9) == [9, 8] and row_buckets(8) == [8] and row_buckets(1) == [1]
    assert column_buckets(320) == [64, 128, 256, 320]
    assert column_buckets(64) == [64] and column_buckets(128) == [64, 128]


def test_the_smallest_graph_that_holds_all_is_taken():
    steps = ReplayedSteps(families.build("llama"), Recorder)
    with pytest.raises(RuntimeError, match="reserved"):
        steps.rows_for(1)
    steps.reserve(100, 150)
    assert [steps.rows_for(count) for count in (1, 8, 9, 56, 57, 100)] == [8, 8, 16, 56, 100, 100]
    assert [steps.columns_for(count) for count in (1, 64, 65, 150)] == [64, 64, 128, 192]
    memory = steps.slots
    steps.reserve(80, 192)
    assert steps.slots is memory
    steps.reserve(80, 193)
    assert (steps.slots.rows, steps.slots.columns) == (100, 256)
    steps.close()
    with pytest.raises(RuntimeError, match="reserved"):
        steps.rows_for(1)


@torch.inference_mode()
def test_graphs_of_other_edits_are_dropped_and_those_without_edits_stay():
    makers: list[Recorder] = []
    steps = ReplayedSteps(families.build("llama"), lambda: makers.append(Recorder()) or makers[-1])
    steps.reserve(4, 64)
    cache = steps.slots.prompt_cache()
    for layer in cache.layers:
        layer.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))
    steps.slots.join(cache, [3], torch.tensor([5]), [0])
    for kind in (0, 1, 0, 1):
        steps.step(4, 64, kind)
    assert sum(maker.made for maker in makers) == 2
    steps.forget(below=0)
    steps.step(4, 64, 1)
    assert sum(maker.made for maker in makers) == 2
    steps.forget(below=2)
    for kind in (0, 1):
        steps.step(4, 64, kind)
    assert sum(maker.made for maker in makers) == 3
    steps.forget()
    steps.step(4, 64, 1)
    assert sum(maker.made for maker in makers) == 4
    count = len(makers)
    steps.close()
    assert len(makers) > count  # memory that graphs share is not shared with later ones


class TestTheStandIn:
    """What it is worth: it shows the mistakes that a real graph would show."""

    def test_it_reads_what_its_memory_holds_now(self):
        memory, out = torch.tensor([1.0, 2.0]), torch.zeros(2)
        graph = RecordedGraph(lambda: out.copy_((memory * 2).view(2, 1).reshape(-1) + 1))
        memory.copy_(torch.tensor([5.0, 6.0]))
        graph.replay()
        assert out.tolist() == [11, 13]

    def test_it_does_not_see_memory_that_takes_the_place_of_its_own(self):
        held, out = {"memory": torch.tensor([1.0])}, torch.zeros(1)
        graph = RecordedGraph(lambda: out.copy_(held["memory"] + 1))
        held["memory"] = torch.tensor([7.0])
        graph.replay()
        assert out.item() == 2

    def test_it_does_not_run_python_again(self):
        count, out = [0], torch.zeros(1)

        def step():
            count[0] += 1
            out.add_(count[0])

        graph = RecordedGraph(step)
        graph.replay()
        graph.replay()
        assert count == [1] and out.item() == 3

    @pytest.mark.parametrize(
        "step",
        [
            lambda x: x.sum().item(),
            lambda x: x.tolist(),
            lambda x: x[x > 1],
            lambda x: x.nonzero(),
            lambda x: bool((x > 1).any()),
            lambda x: torch.tensor([1]),
        ],
    )
    def test_it_refuses_what_waits_for_the_device(self, step):
        with pytest.raises(RuntimeError, match="not permitted"):
            RecordedGraph(lambda: step(torch.arange(4)))


def test_tokens_are_those_of_the_time_of_asking():
    tokens = torch.tensor([3, 4])
    later = read_later(tokens)
    tokens.fill_(0)
    assert later() == [3, 4]


def test_a_step_warms_up_aside_before_it_is_captured_there(monkeypatch):
    """On stand-ins for CUDA with its signatures: the order of things, and one pool of memory for all graphs."""
    events: list[str] = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream):
        events.append(f"on {stream.name}")
        yield
        events.append(f"off {stream.name}")

    @contextlib.contextmanager
    def capture(cuda_graph, pool, stream, capture_error_mode):
        inspect.signature(torch_graph).bind(cuda_graph, pool, stream, capture_error_mode)
        events.append(f"capture on {stream.name} into {pool}, {capture_error_mode}")
        yield
        events.append("captured")

    torch_graph, graph = torch.cuda.graph, SimpleNamespace(pool=lambda: "pool")
    for name, value in {
        "Stream": lambda device: Stream("aside"), "current_stream": lambda: Stream("main"), "stream": on,
        "graph": capture, "CUDAGraph": lambda: graph, "device": lambda device: contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    make = CudaGraphs(torch.device("cuda:1"))
    assert make(lambda: events.append("step")) is graph
    assert events == [
        "aside waits for main", "on aside", *["step"] * graphs._WARM_UPS, "off aside", "main waits for aside",
        "capture on aside into None, thread_local", "step", "captured",
    ]  # fmt: skip
    make(lambda: None)
    assert "capture on aside into pool, thread_local" in events


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a CUDA device; on a machine with one: python -m pytest tests/unit/test_graphs.py",
)
class TestOnCuda:
    """The real graphs: `python -m pytest tests/unit/test_graphs.py` on a machine with a GPU."""

    @torch.inference_mode()
    def test_a_captured_function_is_done_again_on_the_same_memory(self):
        device = torch.device("cuda", torch.cuda.current_device())
        make, memory, out = CudaGraphs(device), torch.ones(3, device=device), torch.zeros(3, device=device)
        captured = [make(lambda: out.copy_(memory @ memory.diag() + 1)), make(lambda: out.copy_(memory * 3))]
        memory.fill_(4)
        for graph, expected in ((captured[0], 17), (captured[1], 12), (captured[0], 17)):
            graph.replay()
            assert read_later(out)() == [expected] * 3

    @pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen3_moe", "gpt_oss"])
    @pytest.mark.parametrize("trials", [1, 3])
    def test_answers_equal_those_of_eager_steps(self, family, trials, monkeypatch):
        from tests.unit.test_replays import answers_and_kl

        monkeypatch.setattr(graphs, "_FEWEST_ROWS", 2)
        monkeypatch.setattr(graphs, "_FEWEST_COLUMNS", 8)
        replayed, step = [], ReplayedSteps.step
        monkeypatch.setattr(ReplayedSteps, "step", lambda *given: replayed.append(given[1:]) or step(*given))
        model = families.build(family).cuda()
        if family in families.DISPATCHED_EXPERTS:
            model.set_experts_implementation("batched_mm")  # grouped products of float32 ask the host
        answers, kl = answers_and_kl(model, trials, True)
        assert len(replayed) > 20
        expected, expected_kl = answers_and_kl(model, trials, False)
        assert answers == expected
        assert kl == pytest.approx(expected_kl, rel=1e-4, abs=1e-6)
