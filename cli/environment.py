"""How this process shares the machine's cores with others, decided before torch is
imported.
"""

import os

# What says how long a thread that waits for others keeps its core busy.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# A few microseconds: most waits on an idle machine are over by then. libgomp's own
# default is 300 000. See benchmarks/machine.md.
SPINS = 600


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
