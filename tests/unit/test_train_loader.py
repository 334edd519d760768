"""The training batches from any position of an epoch, and the workers' end."""

import os
import re
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.rows import TokenRows
from dataloader import EpochOrder, TrainLoader

ROOT = Path(__file__).parents[2]
NUM_ROWS = 23  # not a multiple of any batch


class Counted(TokenRows):
    """Notes which rows were fetched."""

    def __init__(self, num_rows: int = NUM_ROWS) -> None:
        super().__init__(np.arange(3 * num_rows).reshape(num_rows, 3))
        self.fetched = []

    def __getitems__(self, indices):
        self.fetched += indices
        return super().__getitems__(indices)


def loader(
    *, rows=None, rank=0, world_size=1, workers=0, seed=1, batch=2, accumulate=1
):
    rows = rows or Counted()
    order = EpochOrder(len(rows), batch, rank, world_size, seed, accumulate)
    options = {"num_workers": workers, "persistent_workers": True} if workers else {}
    return TrainLoader(rows, order, collate_fn=lambda x: x, **options)


def epoch(source: TrainLoader, number: int | None = None) -> list[list[int]]:
    """The batches of an epoch, each row by its number."""
    if number is not None:
        source.order.set_epoch(number)
    return [(batch["input_ids"][:, 0] // 3).tolist() for batch in source]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restart_is_the_tail_of_the_epoch(workers):
    """At every position, after which the next epoch is a whole one."""
    source = loader(workers=workers)
    whole, following = epoch(source, 4), epoch(source, 5)
    assert len(whole) == NUM_ROWS // 2
    for position in range(len(whole)):
        source.load_state_dict({"epoch": 4, "rows": 2 * position})
        assert epoch(source) == whole[position:]
        assert epoch(source, 5) == following


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_counts_what_was_handed_out(workers):
    """Not what workers have fetched ahead; a loader of another process takes it up."""
    source, other = loader(workers=workers), loader(workers=workers)
    whole = epoch(source, 2)
    iterator = iter(source)
    for count in range(len(whole)):
        next(iterator)
        state = source.state_dict()
        assert state == {"epoch": 2, "rows": 2 * (count + 1)}
    list(iterator)
    other.load_state_dict({"epoch": 2, "rows": 6})
    iterator = iter(other)
    next(iterator)
    assert other.state_dict() == {"epoch": 2, "rows": 8}


def test_the_end_of_an_epoch_is_the_start_of_the_next():
    source = loader()
    following = epoch(source, 8)
    source.load_state_dict({"epoch": 7, "rows": 22})
    assert source.order.epoch == 8
    assert epoch(source) == following


def test_nothing_before_the_position_is_fetched():
    """So that it costs the same at every position."""
    rows = Counted()
    source = loader(rows=rows)
    whole = epoch(source, 0)
    rows.fetched.clear()
    source.load_state_dict({"epoch": 0, "rows": 20})
    assert rows.fetched == []
    assert epoch(source) == whole[10:]
    assert rows.fetched == whole[10]


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 3),
    st.integers(0, 30),
)
def test_position_is_a_function_of_seed_epoch_and_rank(
    world_size, batch, accumulate, number, seed
):
    """Ranks together see the rows of one rank with larger batches; whole updates."""
    same = {"seed": seed, "accumulate": accumulate}
    one = loader(batch=batch * world_size, **same)
    ranks = [
        epoch(loader(rank=r, world_size=world_size, batch=batch, **same), number)
        for r in range(world_size)
    ]
    joined = [list(chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert joined == epoch(one, number)
    assert len(joined) == NUM_ROWS // (batch * world_size * accumulate) * accumulate
    rows = list(chain(*joined))
    assert len(set(rows)) == len(rows)


def test_seed_and_epoch_change_the_order():
    orders = [epoch(loader(seed=s), e) for s in (1, 2) for e in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    torch.manual_seed(9)  # global states do not
    np.random.seed(9)
    assert epoch(loader(seed=1), 0) == orders[0]


def test_ranks_and_batches_of_another_run():
    """The state is in rows: two ranks go on where one was."""
    one = loader(batch=4)
    whole = epoch(one, 3)
    iterator = iter(one)
    next(iterator)
    ranks = [loader(rank=r, world_size=2, batch=2) for r in range(2)]
    for source in ranks:
        source.load_state_dict(one.state_dict())
    tails = zip(*map(epoch, ranks), strict=True)
    assert [a + b for a, b in tails] == whole[1:]


# ---------------------------------------------------------------- workers

# Processes with the workers of a real run, forked one after another. Each shows its
# workers' ids, waits, and ends in its own way with its iterators still open.
SCRIPT = """
import multiprocessing, os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests/support"]
from tiny import compose
from dataloader import DataModule
from data.tokenizers import get_tokenizer

def live(end):
    config = compose("data.num_train=4000", "loader.num_workers=2")
    data = DataModule(config, get_tokenizer(config), None)
    batches, valid = iter(data.train_dataloader()), iter(data.val_dataloader())
    for source in (batches, valid):  # one of each worker: all of them have begun
        next(source), next(source)
    print(*(x.pid for x in multiprocessing.active_children()), flush=True)
    sys.stdin.readline()
    for _ in range(50):
        next(batches)
    print("went on", flush=True)
    exec(end, globals() | dict(kept=(batches, valid)))

for end in {ends!r}:
    pid = os.fork()
    if pid == 0:
        live(end)
        break
    status = os.waitpid(pid, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
ENDS = {"": 0, "raise RuntimeError('a')": 1, "sys.exit(7)": 7}


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_workers_outlast_signals_but_not_their_process():
    """However it ends; a worker that ignored SIGTERM to the end would be waited for."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(root=str(ROOT), ends=list(ENDS))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for status in ENDS.values():
        workers = [int(x) for x in process.stdout.readline().split()]
        assert len(workers) == 4
        for pid in workers:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.kill(pid, number)
        time.sleep(0.05)  # for them to arrive
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "went on\n"
        start = time.monotonic()
        assert process.stdout.readline() == f"{status}\n"
        assert time.monotonic() - start < 5  # at once, but for a busy machine
        assert not any(is_alive(pid) for pid in workers)
    process.communicate()


def is_alive(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z"


# ---------------------------------------------------------------- Lightning

# Names with an underscore in front belong to Lightning, others may change as well.
PRIVATE = re.compile(
    r"\b(trainer|fit_loop|epoch_loop|val_loop|strategy|loop|_?fetcher)\._(?!target_)[a-z]\w*"
    r"|_combined_loader|_data_fetcher|_checkpoint_connector|_callback_connector"
)


def test_no_private_names_of_lightning():
    files = [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]
    assert len(files) > 20
    found = [
        f"{path.name}: {match[0]}"
        for path in files
        for match in PRIVATE.finditer(path.read_text())
    ]
    assert found == []
    assert PRIVATE.search("trainer._run()")
    assert PRIVATE.search("self.trainer.fit_loop._combined_loader")
