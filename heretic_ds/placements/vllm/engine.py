"""The engine whose model lies in vLLM's process: passes are asked for, and come back as numbers."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from heretic_ds.ablation import Ablation, Edit
from heretic_ds.checkpoint.open import LoadedModel
from heretic_ds.errors import UserError
from heretic_ds.placements.vllm.inside.wire import Hangup, Message, packed, unpacked
from heretic_ds.placements.vllm.server import Server
from heretic_ds.prompts import TokenRows
from heretic_ds.runner.engine import MOST_EDITS
from heretic_ds.runner.rows import Row, Stop
from heretic_ds.scoring.base import Decided, MeasureDivergence, ReadLogits
from heretic_ds.world import Replicas, World

T = TypeVar("T")

Work = Callable[[Server, Sequence[Edit | None], dict[str, Any]], list[list[T]]]
"""What a server makes of a pass, from its edits and what every command for passes is told of them: [edit][row]."""


@dataclass(frozen=True)
class Limits:
    """What passes are held to."""

    ends: frozenset[int]
    """Token ids that end an answer."""
    max_new_tokens: int
    max_model_len: int
    """Tokens that the longest row may have, with its answer."""
    rows: int
    """Most rows of a pass."""


class VllmEngine:
    """Evaluates edits in vLLM: of outputs, many at a time, or in the weights. The first rank of a replica has it."""

    def __init__(
        self, world: World, replicas: Replicas, server: Server | None, dtype: torch.dtype, limits: Limits
    ) -> None:
        """``server`` holds a loaded model; None on the other ranks of a replica."""
        self.whole: LoadedModel | None = None
        self._world, self._replicas, self._server, self._limits = world, replicas, server, limits
        self.dtype, self.degree = dtype, replicas.degree
        self.max_edits_per_pass = 1
        self.batch_sizes = {"kl": limits.rows, "generate": limits.rows}
        self.batch_bytes: dict[str, int] = {}  # none of them was measured
        self._applied: Edit | None = None
        self._present: tuple[Edit | None, ...] = (None,)
        """The edit that the weights have now; empty after a change that failed."""
        self._prepared = self._references = 0
        self._unused: list[str] = []
        """Names of references that nothing here can be compared with any more."""

    def prepare(self, ablation: Ablation) -> None:
        """Take the directions that every later edit refers to."""
        form = [ablation.row_norm, ablation.through_norm]
        self._applied, self._present = None, ()
        told = self._everywhere(lambda server: server.ask("prepare", ablation.directions_LRD, form=form).fields)
        self.max_edits_per_pass = MOST_EDITS if told[0]["obstacle"] is None else 1
        self._present = (None,)
        self._prepared += 1

    def distributions(
        self,
        prompts: TokenRows,
        edits: Sequence[Edit | None],
        read: ReadLogits,
        continuations: TokenRows | None = None,
    ) -> list[list[float]]:
        """What ``read`` makes of the next-token logits of each prompt under each edit: [edit][prompt].

        Logits come here row by row, float32, a vocabulary each: for what vLLM's process cannot work out itself.
        """
        own = self._own(len(prompts))
        rows, counts = _whole_rows([prompts[i] for i in own], continuations and [continuations[i] for i in own])

        def work(server: Server, together: Sequence[Edit | None], how: dict[str, Any]) -> list[list[float]]:
            values = [[0.0] * len(own) for _ in together]

            def told(message: Message) -> None:
                trial, index = message.fields["trial"], message.fields["index"]
                logits_KV = message.tensors[0].view(counts[index], -1)
                [values[trial][index]] = read([own[index]], [logits_KV])

            server.ask("logits", *packed(rows), told=told, counts=counts, **how)
            return values

        return self._passes(rows, len(prompts), edits, 1, work)

    def divergence_from_now(self, prompts: TokenRows, continuations: TokenRows | None = None) -> MeasureDivergence:
        """Keep the distributions of the model as it is in vLLM's process, and compare edited ones with them there."""
        own = self._own(len(prompts))
        rows, counts = _whole_rows([prompts[i] for i in own], continuations and [continuations[i] for i in own])
        self._references += 1
        name = str(self._references)

        def keep(server: Server, together: Sequence[Edit | None], how: dict[str, Any]) -> list[list[float]]:
            unused = [self._unused.pop() for _ in range(len(self._unused))]  # to which more may come meanwhile
            server.ask("remember", *packed(rows), counts=counts, name=name, forget=unused, **how)
            return [[0.0] * len(own)]

        def compare(server: Server, together: Sequence[Edit | None], how: dict[str, Any]) -> list[list[float]]:
            found: Tensor = server.ask("divergences", *packed(rows), counts=counts, name=name, **how).tensors[0]
            return found.tolist()

        def measure(edits: Sequence[Edit | None]) -> list[list[float]]:
            return self._passes(rows, len(prompts), edits, 1, compare)

        weakref.finalize(measure, self._unused.append, name)
        self._passes(rows, len(prompts), [None], 1, keep)
        return measure

    def generate(
        self, prompts: TokenRows, edits: Sequence[Edit | None], decided: Decided | None = None
    ) -> list[list[list[int]]]:
        """Greedy answers as token ids, without the end token: [edit][prompt][token]."""
        rows, limit = [prompts[i] for i in self._own(len(prompts))], self._limits.max_new_tokens
        stop = Stop(self._limits.ends, limit, decided)

        def work(server: Server, together: Sequence[Edit | None], how: dict[str, Any]) -> list[list[list[int]]]:
            asked = {"ends": sorted(stop.ends), "limit": limit, "decides": decided is not None, **how}
            answers = [[Row(row, index, trial) for index, row in enumerate(rows)] for trial in range(len(together))]
            hear = _Listener(answers, stop, server)
            given = unpacked(*server.ask("generate", *packed(rows), told=hear, **asked).tensors)
            if decided is None:
                hear.take([row for each in answers for row in each], given)
            return [[row.answer for row in each] for each in answers]

        return self._passes(rows, len(prompts), edits, limit, work)

    def apply(self, edit: Edit) -> None:
        """Edit the weights themselves, until :meth:`restore`."""
        self._applied = edit
        self._set_weights(edit)

    def restore(self) -> None:
        """Bring every weight back, bit for bit."""
        self._applied = None
        self._set_weights(None)

    def digests(self) -> list[str]:
        """A digest of the weights of every one of vLLM's ranks, to tell whether they are the same again."""
        told = self._everywhere(lambda server: server.ask("digest").fields["ranks"])
        return [digest for ranks in told for digest in ranks]

    def close(self) -> None:
        """End vLLM's process; the engine is of no use afterwards."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _set_weights(self, edit: Edit | None) -> None:
        if self._present == (edit,):
            return
        self._present = ()
        self._everywhere(lambda server: server.ask("set_weights", edit=edit and edit.to_dict()).fields)
        self._present = (edit,)

    def _passes(
        self,
        rows: TokenRows,
        n: int,
        edits: Sequence[Edit | None],
        new_tokens: int,
        work: Work[T],
    ) -> list[list[T]]:
        """What passes over this replica's rows give under each edit, with those of the other replicas: [edit][n].

        An edit is one of outputs where that can be, else of the weights, which an edit of None leaves as they are.
        """
        self._world.agree(lambda: self._check_lengths(rows, new_tokens))
        most = max(1, self.max_edits_per_pass)
        groups = [edits[start : start + most] for start in range(0, len(edits), most)]
        return [each for together in groups for each in self._pass(rows, n, together, work)]

    def _pass(self, rows: TokenRows, n: int, edits: Sequence[Edit | None], work: Work[T]) -> list[list[T]]:
        """What one pass gives under each of its edits, which are no more than it can serve."""
        worn = [edit or self._applied for edit in edits]
        outputs = any(edits) and self.max_edits_per_pass > 1
        self._set_weights(None if outputs else worn[0])
        how = {"outputs": outputs, "salts": [self._salt(edit) for edit in worn]}
        how["edits"] = [edit and edit.to_dict() for edit in worn]
        none: list[list[T]] = [[] for _ in edits]
        parts = self._everywhere(lambda server: work(server, edits, how) if rows else none)
        return [_in_order([part[trial] for part in parts], n) for trial in range(len(edits))]

    def _salt(self, edit: Edit | None) -> str:
        """Keeps keys and values that vLLM caches of one model apart from those of another."""
        told = json.dumps([self._prepared, edit and edit.to_dict()])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def _own(self, n: int) -> list[int]:
        """Which prompts are this replica's work."""
        return list(range(self._replicas.index, n, self._replicas.count))

    def _everywhere(self, work: Callable[[Server], T]) -> list[T]:
        """What each replica's server makes of some work, on all ranks; an error of one is raised on all."""
        server = self._server
        done = self._world.agree(lambda: None if server is None else work(server), "waiting for vLLM")
        every = self._world.gather(done)
        return [found for found in every[:: self._replicas.degree] if found is not None]

    def _check_lengths(self, rows: TokenRows, new_tokens: int) -> None:
        longest, most = max(map(len, rows), default=0), self._limits.max_model_len
        if longest + new_tokens > most:
            raise UserError(
                f"a prompt of {longest} tokens and {new_tokens} new ones exceed evaluate.max_model_len={most}; raise it"
            )


class _Listener:
    """Takes the tokens of answers while they are made, and tells which of them need not go on."""

    def __init__(self, answers: Sequence[Sequence[Row]], stop: Stop, server: Server) -> None:
        self._answers, self._stop, self._server = answers, stop, server

    def __call__(self, message: Message) -> None:
        """Answer a step's message with the rows that end by decision."""
        places, tokens, lengths = message.tensors
        rows, given = [self._answers[trial][index] for trial, index in places.tolist()], unpacked(tokens, lengths)
        last = {id(row): tokens[-1] for row, tokens in zip(rows, given, strict=True) if tokens}
        done = [row for row in self.take(rows, given) if len(row.answer) < self._stop.limit]
        ended = [row for row in done if last.get(id(row)) not in self._stop.ends]  # vLLM ends the others by itself
        named = torch.tensor([[row.trial, row.index] for row in ended], dtype=torch.int32).view(-1, 2)
        try:
            self._server.tell("ended", named)
        except Hangup:
            return  # the next message is waited for in vain, which tells why

    def take(self, rows: Sequence[Row], given: Sequence[Sequence[int]]) -> list[Row]:
        """Give rows their tokens, one at a time; returns those that are done then."""
        for place in range(max(map(len, given), default=0)):
            having = [(row, tokens[place]) for row, tokens in zip(rows, given, strict=True) if place < len(tokens)]
            self._stop.note([row for row, _ in having], [token for _, token in having])
        return [row for row in rows if row.done]


def _whole_rows(prompts: TokenRows, continuations: TokenRows | None) -> tuple[list[list[int]], list[int]]:
    """Prompts with their continuations, and at how many of its last positions each is read."""
    given = continuations or [()] * len(prompts)
    return [[*prompt, *more] for prompt, more in zip(prompts, given, strict=True)], [1 + len(more) for more in given]


def _in_order(parts: Sequence[Sequence[T]], n: int) -> list[T]:
    """Results for ``n`` prompts from those of the replicas, each of which had its share."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(n)]
