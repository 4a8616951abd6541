"""Messages between the job and vLLM's process: a name, JSON, and raw tensors. Nothing in them is code."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LENGTH = struct.Struct("<Q")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.int32)}
"""What tensors of messages may be."""


class Hangup(ConnectionError):
    """The other process has gone."""


@dataclass(frozen=True)
class Message:
    """One message as it was received."""

    kind: str
    fields: dict[str, Any]
    tensors: list[Tensor]


class Channel:
    """One end of a connected pair of sockets."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, kind: str, *tensors: Tensor, **fields: Any) -> None:
        """Send a message. Raises Hangup."""
        bodies = [tensor.detach().cpu().contiguous() for tensor in tensors]
        described = [(str(body.dtype).removeprefix("torch."), list(body.shape)) for body in bodies]
        header = json.dumps({"kind": kind, "fields": fields, "tensors": described}).encode()
        try:
            self._end.sendall(_LENGTH.pack(len(header)) + header)
            for body in bodies:
                if body.numel():
                    self._end.sendall(_bytes_of(body))
        except OSError as error:
            raise Hangup(str(error)) from error

    def receive(self) -> Message:
        """The next message. Raises Hangup."""
        [length] = _LENGTH.unpack(self._exactly(_LENGTH.size))
        header = json.loads(self._exactly(length))
        tensors = [self._tensor(_DTYPES[name], shape) for name, shape in header["tensors"]]
        return Message(header["kind"], header["fields"], tensors)

    def close(self) -> None:
        """Hang up."""
        self._end.close()

    def _tensor(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        tensor = torch.empty(list(shape), dtype=dtype)
        if tensor.numel():
            self._into(_bytes_of(tensor))
        return tensor

    def _exactly(self, length: int) -> bytearray:
        read = bytearray(length)
        self._into(memoryview(read))
        return read

    def _into(self, view: memoryview) -> None:
        while view:
            try:
                count = self._end.recv_into(view)
            except OSError as error:
                raise Hangup(str(error)) from error
            if count == 0:
                raise Hangup("the connection was closed")
            view = view[count:]


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory on the host."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def packed(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of whole numbers as one tensor, one row after another, and their lengths."""
    numbers = [number for row in rows for number in row]
    return torch.tensor(numbers, dtype=torch.int32), torch.tensor([len(row) for row in rows], dtype=torch.int32)


def unpacked(numbers: Tensor, lengths: Tensor) -> list[list[int]]:
    """The inverse of :func:`packed`."""
    return [part.tolist() for part in numbers.split(lengths.tolist())]
