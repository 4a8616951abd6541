"""The model in vLLM's engine, and the passes over it that the job asks for."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

from .passes import name_of
from .wire import Channel, Message, packed, unpacked

_RUNNER = "vllm.v1.worker.gpu_model_runner.GPUModelRunner", "vllm.v1.worker.cpu_model_runner.CPUModelRunner"
"""Model runners whose batches :class:`heretic_vllm.passes.Steps` reads: vLLM's V1."""

_FIRST_TOKENS = 8
"""Of the row that is tried out."""


class Serving:
    """Carries out the job's commands: each is a method, called with the message that asks for it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._engine: Any = None

    def open(self, message: Message) -> dict[str, Any]:
        """Load the model, and find its writers on every rank."""
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                **message.fields["engine"],
                skip_tokenizer_init=True,
                generation_config="vllm",
                worker_extension_cls="heretic_vllm.extension.Extension",
                enforce_eager=True,  # hooks run
                enable_prefix_caching=True,
                async_scheduling=False,
                disable_log_stats=True,
            )
        )
        ranks = self._on_ranks("open", *message.fields["writers"])
        if ranks[0]["runner"] not in _RUNNER:
            raise RuntimeError(f"vLLM runs {ranks[0]['runner']}, whose batches are not known here")
        self._try_out()
        return {**ranks[0], "weights": [rank["weights"] for rank in ranks]}

    def _try_out(self) -> None:
        """A first pass, for what vLLM notices only then that it cannot serve."""
        how = {"salts": ["first"], "counts": [1], "outputs": False}
        first = Message("logits", how, list(packed([list(range(_FIRST_TOKENS))])))
        for _, _, value in self._read(first, [None], "logits"):
            if not torch.frombuffer(bytearray(value), dtype=torch.float32).isfinite().all():
                raise ValueError("its logits are not finite; another model.dtype may do, float32 is the safest")

    def prepare(self, message: Message) -> dict[str, Any]:
        """Take the directions of all edits to come; says why outputs cannot be edited, where they cannot."""
        [directions_LRD] = message.tensors
        given = directions_LRD.numpy().tobytes(), list(directions_LRD.shape)
        self._set_weights(None)
        return {"obstacle": self._on_ranks("prepare", *given, *message.fields["form"])[0]}

    def set_weights(self, message: Message) -> dict[str, Any]:
        """Edit the weights themselves, or bring them back."""
        self._set_weights(message.fields["edit"])
        return {}

    def digest(self, message: Message) -> dict[str, Any]:
        """A digest of every rank's weights."""
        return {"ranks": self._on_ranks("digest")}

    def remember(self, message: Message) -> dict[str, Any]:
        """Keep the distributions of rows as references, in the worker."""
        for _ in self._read(message, [None], "references"):
            pass
        return {}

    def divergences(self, message: Message) -> tuple[Tensor, dict[str, Any]]:
        """Divergences of rows from their references under each edit: [T, rows], float64."""
        rows, edits = message.tensors[1], message.fields["edits"]
        found = torch.full((len(edits), len(rows)), torch.nan, dtype=torch.float64)
        for trial, index, value in self._read(message, edits, "divergences"):
            [found[trial, index]] = struct.unpack("<d", value)
        return found, {}

    def logits(self, message: Message) -> dict[str, Any]:
        """Send the logits of rows under each edit as passes give them, in messages of their own."""
        for trial, index, value in self._read(message, message.fields["edits"], "logits"):
            logits_KV = torch.frombuffer(bytearray(value), dtype=torch.float32)
            self._channel.send("logits", logits_KV, trial=trial, index=index)
        return {}

    def generate(self, message: Message) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Greedy answers to rows under each edit, with their end tokens: trial after trial, as one tensor.

        Where the job may decide that an answer need not go on, it is sent the tokens of every step, and names the
        rows that end.
        """
        fields, rows = message.fields, unpacked(*message.tensors)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=fields["limit"],
            stop_token_ids=fields["ends"],
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        answers: dict[str, list[int]] = {}

        def on_step(new: dict[str, list[int]]) -> Sequence[str]:
            for name, tokens in new.items():
                answers.setdefault(name, []).extend(tokens)
            return self._decided(new) if fields["decides"] else ()

        self._on_ranks("begin", fields["edits"] if fields["outputs"] else [], None)
        self._pass(rows, fields["salts"], params, on_step)
        ordered = [
            answers.get(name_of(trial, i), []) for trial in range(len(fields["salts"])) for i in range(len(rows))
        ]
        return *packed(ordered), {}

    def _decided(self, new: dict[str, list[int]]) -> Sequence[str]:
        """Rows that the job ends, after it was told of their new tokens."""
        names = list(new)
        places = [list(map(int, name.split("|")[:2])) for name in names]
        tokens, lengths = packed([new[name] for name in names])
        self._channel.send("tokens", torch.tensor(places, dtype=torch.int32), tokens, lengths)
        [ended] = self._channel.receive().tensors
        return [name_of(trial, index) for trial, index in ended.tolist()]

    def _read(
        self, message: Message, edits: Sequence[dict[str, Any] | None], kind: str
    ) -> Iterator[tuple[int, int, bytes]]:
        """What is read of rows, as passes complete them."""
        fields, rows = message.fields, unpacked(*message.tensors)
        counts = fields["counts"]
        reading = {"kind": kind, "lengths": list(map(len, rows)), "counts": counts, "name": fields.get("name", "")}
        reading["forget"] = fields.get("forget", [])
        # What was cached of a row is not computed again, but for the last position.
        params = SamplingParams(
            temperature=0.0, max_tokens=1, detokenize=False, ignore_eos=True, skip_reading_prefix_cache=max(counts) > 1
        )
        self._on_ranks("begin", edits if fields["outputs"] else [], reading)
        found: list[tuple[int, int, bytes]] = []

        def on_step(new: dict[str, list[int]]) -> Sequence[str]:
            for taken in self._on_ranks("taken"):
                found.extend(taken)
            return ()

        for _ in self._steps(rows, fields["salts"], params, on_step):
            yield from found
            found.clear()
        self._on_ranks("end")

    def _pass(self, *what: Any) -> None:
        for _ in self._steps(*what):
            pass
        self._on_ranks("end")

    def _steps(
        self,
        rows: Sequence[Sequence[int]],
        salts: Sequence[str],
        params: SamplingParams,
        on_step: Callable[[dict[str, list[int]]], Sequence[str]],
    ) -> Iterator[None]:
        """Run every row under every trial to its end, step by step; ``on_step`` gets the new tokens of rows, and names
        rows that end before theirs."""
        try:
            for trial, salt in enumerate(salts):
                for index, row in enumerate(rows):
                    self._engine.add_request(
                        name_of(trial, index), {"prompt_token_ids": row, "cache_salt": salt}, params
                    )
            while self._engine.has_unfinished_requests():
                outputs = self._engine.step()
                ended = on_step({out.request_id: list(out.outputs[0].token_ids) for out in outputs if out.outputs})
                if ended:
                    self._engine.abort_request(list(ended))
                yield
        except Exception:
            self._abort(salts, rows)
            raise

    def _abort(self, salts: Sequence[str], rows: Sequence[Sequence[int]]) -> None:
        """Leave nothing of a pass that failed for the next one to run on with."""
        names = [name_of(trial, index) for trial in range(len(salts)) for index in range(len(rows))]
        self._engine.abort_request(names)

    def _set_weights(self, edit: dict[str, Any] | None) -> None:
        self._on_ranks("set_weights", edit)
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM kept keys and values of the weights before: requests are running")

    def _on_ranks(self, command: str, *arguments: Any) -> list[Any]:
        """What each rank's :class:`heretic_vllm.extension.Resident` gives for a command."""
        return self._engine.collective_rpc("heretic", args=(command, *arguments))

    def close(self) -> None:
        """End vLLM's own processes."""
        if self._engine is not None:
            self._engine.engine_core.shutdown()
