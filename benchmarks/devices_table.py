"""Whether training depends on the number of devices: `make devices-table`.

Every algorithm of configs/algo makes a few updates of a tiny network without dropout as
one process, as two, as two nodes, with accumulated gradients and row by row. The table
shows by how much the final weights and the numbers of the last validation differ from
those of one process. All of it is float32: what is left is the order of additions.

    python benchmarks/devices_table.py [--algorithms NAME,NAME] [KEY=VALUE ...]

The row of --by-command is started as docs/training.md says, by `python main.py` and
torchrun; the processes of the others are forked from this one, which has imported what
they need, and are told their places as torchrun tells them. KEY=VALUE is given to every
run.
"""

import argparse
import csv
import gc
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from report.formats import markdown  # noqa: E402

LIMIT = 1e-5  # of a difference between final weights
ROWS = 8  # of an update
BASE = (
    "data=synthetic",
    "data.num_train=96",
    "data.num_valid=21",  # two devices do not have equally many
    "model=tiny",
    "model.length=16",
    "model.n_blocks=1",
    "model.n_heads=2",
    "model.hidden_size=32",
    "model.cond_dim=16",
    "model.dropout=0",
    f"loader.global_batch_size={ROWS}",
    f"loader.eval_global_batch_size={ROWS}",
    "loader.num_workers=0",
    "lr_scheduler.num_warmup_steps=5",
    "training.loss_precision=float32",
    "training.ema=0.9",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "trainer.log_every_n_steps=1",
    "eval.generate_samples=False",
    "+trainer.enable_progress_bar=False",
    "callbacks=[checkpoint_every_n_steps]",
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=0",  # the last alone
)
ONE_UPDATE = ("trainer.max_steps=1", "trainer.val_check_interval=1")
# What makes a short run of an algorithm see all that it does.
OWN = {
    "mdlm, blocks of 4": ("algo=mdlm", "algo.block_size=4"),
    "duo": ("algo.curriculum.start=10", "algo.curriculum.end=20"),
    "distillation": ("algo.T=16", "algo.update_teacher_every=10"),
    "sdtt": (
        "algo.orig_num_sampling_steps=16",
        "algo.min_num_sampling_steps=4",
        "algo.grow_dt_every=10",
    ),
    "dimo": ("algo.aux_lr=1e-3",),
}
TEACHERS = {"distillation": "duo_base", "sdtt": "mdlm", "dimo": "mdlm"}
ONE = "1 process"
FIRST = "first update"  # what training changes: how large a difference could be


class Devices(NamedTuple):
    """A column of the table: how the rows of an update are split."""

    nodes: int
    processes: int  # of a node
    rows: int  # of a micro-batch

    @property
    def overrides(self) -> list[str]:
        return [
            f"trainer.num_nodes={self.nodes}",
            f"trainer.devices={self.processes}",
            f"loader.batch_size={self.rows}",
            f"loader.eval_batch_size={self.rows}",
        ]


COLUMNS = {
    ONE: Devices(1, 1, ROWS),
    "2 processes": Devices(1, 2, ROWS // 2),
    "2 nodes": Devices(2, 1, ROWS // 2),
    "accumulation 4": Devices(1, 1, ROWS // 4),
    "micro-batch 1": Devices(1, 1, 1),
    FIRST: Devices(1, 1, ROWS),
}


class Difference(NamedTuple):
    """Of a run from that of one process, the largest ones."""

    weights: float
    numbers: float  # of the last validation: nats; of those above 1 in parts of them


# ---------------------------------------------------------------- runs


def argv_of(
    name: str, devices: Devices, folder: Path, more: Sequence[str]
) -> list[str]:
    """The words of a run behind `main.py`."""
    own = OWN.get(name, ())
    chosen = () if any(x.startswith("algo=") for x in own) else (f"algo={name}",)
    argv = [*chosen, *BASE, *own, *devices.overrides]
    if name in TEACHERS:
        teacher = folder.parents[1] / ONE / TEACHERS[name]
        argv += [f"training.finetune_path='{teacher}/checkpoints/last.ckpt'"]
    return [*argv, f"hydra.run.dir='{folder}'", *more]


def run_by_command(devices: Devices, argv: list[str], log: Path) -> list[int]:
    """Starts the nodes of a run as a user does; the status of each."""
    command = [sys.executable, str(ROOT / "main.py")]
    if devices.nodes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run"]
        launcher += [f"--nnodes={devices.nodes}", "--master-addr=127.0.0.1"]
        launcher += [f"--nproc-per-node={devices.processes}"]
        launcher += [f"--master-port={free_port()}"]
        command = [*launcher, "--node-rank={rank}", command[1]]
    started = []
    for rank in range(devices.nodes):
        words = [word.format(rank=rank) for word in command]
        with open(f"{log}.{rank}", "w") as file:
            started.append(subprocess.Popen([*words, *argv], stdout=file, stderr=file))
    return [process.wait() for process in started]


def run_by_fork(devices: Devices, argv: list[str], log: Path) -> list[int]:
    """The same in forks of this process, told their places as torchrun does."""
    number = devices.nodes * devices.processes
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(devices.processes)}
    children = []
    for rank in range(number):
        node, local = divmod(rank, devices.processes)
        ranks = {"RANK": rank, "LOCAL_RANK": local, "GROUP_RANK": node}
        env = {name: str(value) for name, value in ranks.items()} | place
        child = os.fork()
        if not child:
            become_main(argv, env if number > 1 else {}, f"{log}.{rank}")
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def become_main(argv: list[str], env: dict[str, str], log: str) -> NoReturn:
    """Turns this process into `python main.py`, and ends it."""
    status = 1
    try:
        os.environ.update(env)
        if env:
            os.environ |= {"TORCHELASTIC_RUN_ID": "table"}
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.argv = [str(ROOT / "main.py"), *argv]
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def train(
    name: str, column: str, top: Path, more: Sequence[str], is_fork: bool
) -> Path:
    """A run of the table; its folder."""
    devices, folder = COLUMNS[column], top / column / name
    folder.mkdir(parents=True)
    log = folder / "said"
    start = run_by_fork if is_fork else run_by_command
    statuses = start(devices, argv_of(name, devices, folder, more), log)
    if any(statuses):
        said = "\n".join(x.read_text()[-2000:] for x in sorted(folder.glob("said.*")))
        sys.exit(f"{name}, {column}: {statuses}\n{said}")
    return folder


# ---------------------------------------------------------------- differences


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint: the network's, and their averages."""
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    found = dict(checkpoint["state_dict"])
    averages = (checkpoint.get("ema") or {}).get("shadow_params", ())
    return found | {f"average {i}": x for i, x in enumerate(averages)}


def numbers_of(folder: Path) -> dict[str, float]:
    """Of the last validation, by their names in the log."""
    with open(folder / "csv" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("val/")]
    found = {name: [row[name] for row in rows if row[name]] for name in names}
    return {name: float(values[-1]) for name, values in found.items() if values}


def largest(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest difference of two runs' tensors or numbers of the same names."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"only one of two runs has {ours.keys() ^ theirs.keys()}")
    pairs = (
        [torch.as_tensor(x[name], dtype=torch.float64) for x in (ours, theirs)]
        for name in ours
    )
    return max(float((x - y).abs().max()) for x, y in pairs)


def difference(one: Path, other: Path) -> Difference:
    """By how much a run differs from that of one process."""
    theirs, ours = numbers_of(one), numbers_of(other)
    sizes = {name: max(1.0, abs(x)) for name, x in theirs.items()}
    return Difference(
        largest(weights_of(other), weights_of(one)),
        largest(*({k: x / sizes[k] for k, x in of.items()} for of in (ours, theirs))),
    )


# ---------------------------------------------------------------- the report


def report(
    found: dict[str, dict[str, Difference]], about: dict[str, str], output: Path
) -> str:
    """Writes devices.md.

    Args:
        found: By algorithm and column.
        about: What the table was made with.
        output: Its folder.

    Returns:
        The text.
    """
    columns = [name for name in COLUMNS if name != ONE]
    numbers = "Numbers of the last validation, those above 1 in parts of themselves"
    parts = {"Final weights and their averages": "weights", numbers: "numbers"}
    lines = [
        "# One training on any number of devices",
        "",
        f"Made by `make devices-table` in {about['minutes']} minutes with torch "
        f"{torch.__version__}, commit {about['commit']}: {about['steps']} updates of "
        f"{ROWS} rows by a network of one block, float32, no dropout, each "
        f"algorithm as one process with {ROWS} rows at a time and as the columns say. "
        "Two nodes are two launchers of torchrun. Cells are the largest difference of "
        "any weight, or any number, from those of one process; equal to rounding is "
        f"what does not exceed {LIMIT:.0e}. The column `{FIRST}` is the difference "
        "between one process after the first and after the last update.",
    ]
    for title, field in parts.items():
        rows = (
            [name, *(f"{getattr(cells[x], field):.1e}" for x in columns)]
            for name, cells in found.items()
        )
        lines += ["", f"## {title}", "", markdown(["algorithm", *columns], rows)]
    above = [
        f"{name}, {column}"
        for name, cells in found.items()
        for column, one in cells.items()
        if one.weights > LIMIT and column != FIRST
    ]
    verdict = f"above it: {'; '.join(above)}" if above else "no cell is above it"
    lines += ["", f"Of weights {verdict}.", ""]
    text = "\n".join(lines)
    output.mkdir(parents=True, exist_ok=True)
    (output / "devices.md").write_text(text)
    return text


def names_of(asked: str) -> list[str]:
    """Algorithms of the table, teachers before those that need them."""
    every = [x.stem for x in sorted((ROOT / "configs" / "algo").glob("*.yaml"))]
    names = asked.split(",") if asked else [*every, *(x for x in OWN if x not in every)]
    teachers = [TEACHERS[x] for x in names if x in TEACHERS]
    return list(dict.fromkeys([*teachers, *names]))


def measure(
    names: Sequence[str], by_command: str, top: Path, more: Sequence[str]
) -> Iterator[dict[str, dict[str, Difference]]]:
    """The cells of the table, with one more row each time.

    Args:
        names: Of algorithms, as `names_of` gives them.
        by_command: The one whose runs are started as a user does.
        top: Folder of the runs, which must not be there.
        more: Overrides of every run.
    """
    found: dict[str, dict[str, Difference]] = {}
    with tqdm(total=len(names) * len(COLUMNS), desc="devices-table") as bar:
        for name in names:
            folders = {}
            for column in COLUMNS:
                bar.set_postfix_str(f"{name}, {column}")
                own = (*more, *ONE_UPDATE) if column == FIRST else more
                is_fork = name != by_command or column == FIRST
                folders[column] = train(name, column, top, own, is_fork)
                bar.update()
            one = folders.pop(ONE)
            found[name] = {x: difference(one, y) for x, y in folders.items()}
            yield found


def prepare() -> None:
    """Imports what runs need, for those that are forked."""
    import algo  # noqa: F401
    import distillation  # noqa: F401
    import main  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    gc.freeze()


def run_all() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--algorithms", default="", help="names with commas between")
    parser.add_argument("--by-command", default="mdlm", help="whose runs are commands")
    parser.add_argument("--steps", type=int, default=30, help="updates")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks")
    args = parser.parse_args()
    prepare()
    begun = time.monotonic()
    last = (
        f"trainer.max_steps={args.steps}",
        f"trainer.val_check_interval={args.steps}",
    )
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout
    about = {"commit": commit.strip(), "steps": str(args.steps)}
    with tempfile.TemporaryDirectory(prefix="devices-table-") as folder:
        more = (*last, *args.overrides)
        names = names_of(args.algorithms)
        for found in measure(names, args.by_command, Path(folder), more):
            about["minutes"] = f"{(time.monotonic() - begun) / 60:.0f}"
            text = report(found, about, args.output)
    print(text)


if __name__ == "__main__":
    run_all()
