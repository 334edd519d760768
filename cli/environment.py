"""How this process shares the machine's cores with others, and whom it tells about its
user; decided before torch and the libraries of Hugging Face are imported.
"""

import logging
import os
import warnings
from typing import Any

from utils import printable

# What says how long a thread that waits for others keeps its core busy.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# A few microseconds: most waits on an idle machine are over by then. libgomp's own
# default is 300 000. See benchmarks/machine.md.
SPINS = 600


# What libraries ask to know whether their loads may be counted elsewhere.
COUNTS = {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}


def tell_nobody() -> None:
    """Has libraries ask no host but for data; the user's environment holds.

    `datasets` asks one to count the loads of local files, too.
    """
    for name, value in COUNTS.items():
        os.environ.setdefault(name, value)


def share_cores() -> None:
    """Has threads that wait for each other soon give their cores away.

    By default OpenMP's threads spin for milliseconds in the barrier behind every
    operation. That is a little faster on an idle machine, and several times slower as
    soon as another process is busy, because a thread spins for one that does not run.
    Anything that the user's environment says about it holds. Call this before torch is
    imported.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # other libraries than libgomp
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


class PrintableRecord(logging.LogRecord):
    """A message of a log, in which what a screen would obey is escaped."""

    def getMessage(self) -> str:
        return printable(super().getMessage())


def print_plainly() -> None:
    """Has logs and warnings, whose texts quote files and data, print them escaped."""
    logging.setLogRecordFactory(PrintableRecord)
    as_usual = warnings.formatwarning

    def escaped(*arguments: Any, **named: Any) -> str:
        return printable(as_usual(*arguments, **named))

    warnings.formatwarning = escaped
