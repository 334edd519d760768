"""What a signal does outside of training's loop: the process ends soon, in order, with
one line and the signal's status. In the loop `training.callbacks.RunEnd` takes over.
"""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from utils import STOP_SIGNALS, SignalReceived

# What torch says on a rank whose connection to another one has broken.
LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Connection was likely closed"
    r"|remote (process exit|server shutdown)"
)
SECONDS = 20  # that a process has for putting its files in order

# What is there when a mode was stopped; see `what_is_kept`.
KEPT = {
    "train": "checkpoints that were written are as they were",
    "sample_eval": "batches that were drawn are kept",
    "fid_eval": "batches that were drawn are kept",
    "prepare_data": "splits that were packed are kept",
    "report": "evaluations that were finished are kept",
}


def what_is_kept(mode: Any) -> str:
    """The part of a stopped process's line that says what is left of its work."""
    return KEPT.get(str(mode), "nothing was written")


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Has SIGTERM, SIGUSR1 and Ctrl-C raise a `SignalReceived` in the main thread.

    Whatever stands in a `finally` is done; a process that does not get there within 20
    seconds ends all the same, and a second Ctrl-C ends it at once. Processes that are
    forked end by the signal itself.
    """
    owner = os.getpid()
    limits: list[threading.Timer] = []

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        for other in STOP_SIGNALS:
            is_terminal = other == signal.SIGINT
            signal.signal(other, signal.SIG_DFL if is_terminal else signal.SIG_IGN)
        limit = threading.Timer(SECONDS, os._exit, (128 + number,))
        limit.daemon = True
        limit.start()
        limits.append(limit)
        raise SignalReceived(number)

    before = {number: signal.signal(number, end) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for limit in limits:
            limit.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def was_left_alone(error: RuntimeError, num_processes: int) -> bool:
    """Whether an error is only that another process of the run is gone."""
    return num_processes > 1 and LOST.search(str(error)) is not None
