"""Graphs: the sizes they are made for, what replaying one does, and the real ones where there is a GPU."""

from __future__ import annotations

import contextlib
import warnings
from types import SimpleNamespace

import pytest
import torch

from heretic_ds import memory
from heretic_ds.runner import graphs
from heretic_ds.runner.decode import read_later
from heretic_ds.runner.graphs import CudaGraphs, Graphs, column_buckets, row_buckets
from heretic_ds.runner.slots import Slots
from tests import families
from tests.recorded_graphs import Recorder
from tests.unit.test_decode import decoder_of
from tests.unit.test_slots import join, slots_of


def test_sizes_halve_down_to_few_rows_and_double_up_to_all_columns():
    assert row_buckets(256) == [256, 128, 64, 32, 16, 8]
    assert row_buckets(100) == [100, 56, 32, 16, 8]
    assert row_buckets(9) == [9, 8] and row_buckets(8) == [8] and row_buckets(1) == [1]
    assert column_buckets(320) == [64, 128, 256, 320]
    assert column_buckets(64) == [64] and column_buckets(128) == [64, 128]


def test_the_smallest_graph_that_holds_all_is_taken():
    made = Graphs(slots_of(families.build("llama"), 100, 192), Recorder)
    assert [made.pad(count, 1)[0] for count in (1, 8, 9, 56, 57, 100)] == [8, 8, 16, 56, 100, 100]
    assert [made.pad(1, count)[1] for count in (1, 64, 65, 150)] == [64, 64, 128, 192]


def test_slots_are_made_anew_where_they_have_to_be_larger(monkeypatch):
    """In both ways at least as large as before, and in the place of those."""
    monkeypatch.setattr(graphs, "makers_for", lambda device: Recorder)
    decoder = decoder_of(families.build("llama"))
    held = decoder._reserved(100, 150)
    assert (held.slots.rows, held.slots.columns) == (100, 192)
    assert decoder._reserved(80, 192) is held
    larger = decoder._reserved(80, 193)
    assert (larger.slots.rows, larger.slots.columns) == (100, 256) and decoder._graphs is larger


@torch.inference_mode()
def test_graphs_of_other_edits_are_dropped_and_those_without_edits_stay():
    makers: list[Recorder] = []
    slots = slots_of(model := families.build("llama"), 4, 64)
    steps = Graphs(slots, lambda: makers.append(Recorder()) or makers[-1])
    join(model, slots, [[5, 6, 7]], [0])
    for edits in (0, 1, 0, 1):
        steps.replay(4, 64, edits)
    assert sum(maker.made for maker in makers) == 2
    steps.forget(below=0)
    steps.replay(4, 64, 1)
    assert sum(maker.made for maker in makers) == 2
    steps.forget(below=2)
    for edits in (0, 1):
        steps.replay(4, 64, edits)
    assert sum(maker.made for maker in makers) == 3
    steps.forget()
    steps.replay(4, 64, 1)
    assert sum(maker.made for maker in makers) == 4 and len(makers) == 1
    del steps._graphs[0, 4, 64]
    steps.forget()
    assert len(makers) == 2  # memory that graphs share is not shared with later ones


class TestTheStandIn:
    """What it is worth: it shows the mistakes that a real graph would show."""

    def test_it_reads_what_its_memory_holds_now(self):
        memory, out = torch.tensor([1.0, 2.0]), torch.zeros(2)
        graph = Recorder()(lambda: out.copy_((memory * 2).view(2, 1).reshape(-1) + 1))
        memory.copy_(torch.tensor([5.0, 6.0]))
        graph.replay()
        assert out.tolist() == [11, 13]

    def test_it_does_not_see_memory_that_takes_the_place_of_its_own(self):
        held, out = {"memory": torch.tensor([1.0])}, torch.zeros(1)
        graph = Recorder()(lambda: out.copy_(held["memory"] + 1))
        held["memory"] = torch.tensor([7.0])
        graph.replay()
        assert out.item() == 2

    def test_it_does_not_run_python_again(self):
        count, out = [0], torch.zeros(1)

        def step():
            count[0] += 1
            out.add_(count[0])

        graph = Recorder()(step)
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
            Recorder()(lambda: step(torch.arange(4)))


def test_tokens_are_those_of_the_time_of_asking():
    tokens = torch.tensor([3, 4])
    later = read_later(tokens)
    tokens.fill_(0)
    assert later() == [3, 4]


class Cuda:
    """Stand-ins for what :class:`CudaGraphs` needs of CUDA, on which PyTorch's own context of a capture runs; and what
    happens to them."""

    def __init__(self, monkeypatch):
        self.events: list[str] = []
        self.current, self.mode, self.error_at_end, self.warned = "main", 0, "", False
        cuda = self

        class Stream:
            def __init__(self, name):
                self.name = name

            def wait_stream(self, other):
                cuda.events.append(f"{self.name} waits for {other.name}")

        class On:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                self.before, cuda.current = cuda.current, self.stream.name

            def __exit__(self, *error):
                cuda.current = self.before

        class CUDAGraph:
            def capture_begin(self, pool=None, **options):
                assert options["capture_error_mode"] == "thread_local"
                cuda.events.append(f"capture on {cuda.current} into {pool}")

            def capture_end(self):
                if cuda.error_at_end:
                    raise RuntimeError(cuda.error_at_end)
                cuda.events.append("captured")

            def pool(self):
                return "pool"

        for name, value in {
            "Stream": lambda device: Stream("aside"), "current_stream": lambda: Stream(cuda.current), "stream": On,
            "CUDAGraph": CUDAGraph, "device": lambda device: contextlib.nullcontext(), "synchronize": lambda: None,
            "empty_cache": lambda: None, "get_sync_debug_mode": lambda: cuda.mode, "set_sync_debug_mode": self.set_mode,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        monkeypatch.setattr(memory, "_captures", {"failed": False})

    def set_mode(self, mode):
        if not self.warned:  # as PyTorch does
            warnings.warn("a prototype feature", stacklevel=1)
        self.warned = True
        self.mode = {"error": 2}.get(mode, mode)

    def step(self):
        self.events.append(f"step on {self.current}, mode {self.mode}")


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


@pytest.mark.filterwarnings("error:a prototype feature")
@pytest.mark.parametrize("mode", [0, 1])
def test_a_step_warms_up_aside_before_it_is_captured_there(cuda, mode):
    """The order of things, the last warm-up without waiting, and one pool of memory for all graphs."""
    cuda.mode = mode
    make = CudaGraphs(torch.device("cuda:1"))
    assert isinstance(make(cuda.step), torch.cuda.CUDAGraph)
    assert cuda.events == [
        "aside waits for main", f"step on aside, mode {mode}", "step on aside, mode 2", "main waits for aside",
        "capture on aside into None", f"step on aside, mode {mode}", "captured",
    ]  # fmt: skip
    make(lambda: None)
    assert "capture on aside into pool" in cuda.events
    assert (cuda.current, cuda.mode, memory._captures["failed"]) == ("main", mode, False)


def test_a_host_that_would_wait_is_found_out_before_anything_is_captured(cuda):
    def waits():
        cuda.step()
        if cuda.mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        CudaGraphs(torch.device("cuda:1"))(waits)
    assert cuda.events[-1] == "main waits for aside" and not any("capture" in event for event in cuda.events)
    assert (cuda.current, cuda.mode, memory._captures["failed"]) == ("main", 0, False)


@pytest.mark.parametrize("failure", [RuntimeError("not permitted"), KeyError("mask"), KeyboardInterrupt()])
def test_after_a_capture_that_fails_the_stream_is_the_one_before(cuda, failure, monkeypatch):
    """Although PyTorch's own context does not get that far; and an allocator that gives nothing back is no error."""
    cuda.error_at_end = "operation failed due to a previous error during capture"
    calls = []

    def step():
        calls.append(None)
        if len(calls) > graphs._WARM_UPS:
            raise failure

    def refused():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    make = CudaGraphs(torch.device("cuda:1"))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="ASSERT"):
        patch.setattr(torch.cuda, "empty_cache", refused)
        memory.release_memory()  # nothing has failed yet
    with pytest.raises(RuntimeError, match="previous error") as raised:
        make(step)
    assert raised.value.__context__ is failure
    assert cuda.current == "main" and memory._captures["failed"]
    monkeypatch.setattr(torch.cuda, "empty_cache", refused)
    memory.release_memory()


def test_tokens_are_waited_for_on_their_own_device(monkeypatch):
    """Which need not be the current one, whose streams may have nothing to do."""
    done = []

    class Event:
        def record(self, stream=None):
            done.append(f"recorded on {stream}")

        def synchronize(self):
            done.append("waited")

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory, **options: empty(*sizes, **options))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other, non_blocking: self.fill_(7))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"the stream of {device}")
    tokens = SimpleNamespace(device=torch.device("cuda:1"), shape=(2,), dtype=torch.int64)
    later = read_later(tokens)  # type: ignore[arg-type]
    assert done == ["recorded on the stream of cuda:1"]
    assert later() == [7, 7] and done[1:] == ["waited"]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a CUDA device; on a machine with one: make test-cuda",
)
class TestOnCuda:
    """The real graphs: `make test-cuda` on a machine with a GPU."""

    @torch.inference_mode()
    def test_a_captured_function_is_done_again_on_the_same_memory(self):
        device = torch.device("cuda", torch.cuda.current_device())
        make, memory, out = CudaGraphs(device), torch.ones(3, device=device), torch.zeros(3, device=device)
        captured = [make(lambda: out.copy_(memory @ memory.diag() + 1)), make(lambda: out.copy_(memory * 3))]
        memory.fill_(4)
        for graph, expected in ((captured[0], 17), (captured[1], 12), (captured[0], 17)):
            graph.replay()
            assert read_later(out)() == [expected] * 3

    @pytest.mark.parametrize("call", range(1, graphs._WARM_UPS + 2))
    def test_a_host_that_waits_within_a_step_leaves_eager_steps_as_they_were(self, call, monkeypatch, caplog):
        """In any but the last warm-up it may; in the last it is refused; and in the capture itself it breaks that."""
        from tests.unit.test_captured_steps import answers_and_kl

        model, calls = families.build("llama").cuda(), [0]
        expected = answers_and_kl(model, 3, False)
        stream, answer = torch.cuda.current_stream(), Slots.answer

        def waits(slots, *sizes):
            answer(slots, *sizes)
            calls[0] += 1
            if calls[0] == call:
                slots.next_R.sum().item()

        monkeypatch.setattr(Slots, "answer", waits)
        with caplog.at_level("WARNING", logger="heretic_ds"):
            answers, kl = answers_and_kl(model, 3, True)
        assert answers == expected[0] and kl == pytest.approx(expected[1], rel=1e-4, abs=1e-6)
        assert ("a step cannot be captured" in caplog.text) is (call >= graphs._WARM_UPS)
        assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
        assert torch.cuda.get_sync_debug_mode() == 0
        memory.release_memory()

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices; the command is the same")
    @torch.inference_mode()
    def test_tokens_of_a_device_that_is_not_the_current_one(self):
        device = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
        square, tokens = torch.ones(4096, 4096, device=device), torch.zeros(3, dtype=torch.int64, device=device)
        for _ in range(50):
            square = square @ square / 4096
        tokens.copy_(square[0, :3] + 4)
        assert read_later(tokens)() == [5, 5, 5]

    @pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen3_moe", "gpt_oss"])
    @pytest.mark.parametrize("trials", [1, 3])
    def test_answers_equal_those_of_eager_steps(self, family, trials, monkeypatch):
        from tests.unit.test_captured_steps import answers_and_kl

        monkeypatch.setattr(graphs, "_FEWEST_ROWS", 2)
        monkeypatch.setattr(graphs, "_FEWEST_COLUMNS", 8)
        replayed, replay = [], Graphs.replay
        monkeypatch.setattr(Graphs, "replay", lambda *given: replayed.append(given[1:]) or replay(*given))
        model = families.build(family).cuda()
        if family in families.DISPATCHED_EXPERTS:
            model.set_experts_implementation("batched_mm")  # grouped products of float32 ask the host
        answers, kl = answers_and_kl(model, trials, True)
        assert len(replayed) > 20
        expected, expected_kl = answers_and_kl(model, trials, False)
        assert answers == expected
        assert kl == pytest.approx(expected_kl, rel=1e-4, abs=1e-6)
