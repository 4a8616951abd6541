"""vLLM's process: takes the job's commands from a socket until the job hangs up, or is gone.

``python -m heretic_vllm FOLDER FD``: the folder of its log, which goes with the job, and the number of the socket, both
of which the job's process has made.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback

from heretic_ds.memory import is_out_of_memory

from .wire import Channel, Hangup

_LOOK = 1.0
"""Seconds between two looks at whether the job is still there."""


def main() -> None:
    """Serve."""
    folder, channel = sys.argv[1], Channel(socket.socket(fileno=int(sys.argv[2])))
    threading.Thread(target=_end_with, args=(os.getppid(), folder), daemon=True).start()
    serving, gone = None, False
    try:
        from .serving import Serving

        serving = Serving(channel)
        while True:
            message = channel.receive()
            try:
                given = getattr(serving, message.kind)(message)
            except Hangup:
                raise
            except Exception as error:
                traceback.print_exc()
                channel.send("failed", error=f"{type(error).__name__}: {error}", memory=is_out_of_memory(error))
            else:
                *tensors, fields = given if isinstance(given, tuple) else (given,)
                channel.send("done", *tensors, **fields)
    except Hangup:
        gone = True
    except ImportError as error:
        traceback.print_exc()
        channel.send("failed", error=f"{type(error).__name__}: {error}", memory=False)
    if serving is not None:
        serving.close()
    channel.close()
    sys.stdout.flush()
    if gone:  # perhaps by a signal, without a chance to do this itself
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # vLLM's threads are of no more use, and some wait


def _end_with(parent: int, folder: str) -> None:
    """End this process, and those that it has started, once the job's has ended, and remove the folder."""
    while os.getppid() == parent:
        time.sleep(_LOOK)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
