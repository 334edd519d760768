"""What a run costs the machine it shares: the seconds until a mistake is refused, and
the speed of training beside other busy processes.

    python benchmarks/bench_machine.py

Start-up is timed as whole processes, beside one that imports all that a run needs
first, as main.py once did. Training is that of the demo, with threads that give their
core away while they wait (ours) and with OpenMP's default (plain), alone and beside
processes that only count. Ours and plain take turns, so that both see the same machine.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAIN = [sys.executable, str(ROOT / "main.py")]
# What main.py imported before it looked at the command line.
PLAIN = (
    "import algo, dataloader, distillation, evaluation.likelihood, evaluation.samples, "
    "checkpoints.export, report.mode, training.callbacks, main; main.main()"
)
COMMANDS = {
    "--help": [],
    "--cfg job": [],
    "unknown key": ["trainer.max_stps=3"],
    "unknown algorithm": ["algo=mdml"],
    "unknown data set": ["data.train=text9"],
    "unknown predictor": ["sampling.predictor=ancestrel"],
    "no such file": ["mode=ppl_eval", "eval.checkpoint_path=none.ckpt"],
}
SPINNING = {"GOMP_SPINCOUNT": "300000"}  # libgomp's own default


def seconds(command: list[str]) -> tuple[float, float]:
    """CPU seconds and seconds of a process whose output nobody reads."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - start


def start_up(repeats: int) -> list[dict]:
    """Medians for each of `COMMANDS`, ours and plain in turn."""
    os.environ["PYTHONPATH"] = str(ROOT)
    rows = []
    for name, overrides in COMMANDS.items():
        words = overrides or name.split()
        pairs = {"ours": MAIN, "plain": [sys.executable, "-c", PLAIN]}
        times: dict[str, list] = {code: [] for code in pairs}
        for _ in range(repeats + 1):  # the first ones fill caches
            for code, command in pairs.items():
                times[code].append(seconds([*command, *words]))
        for code, found in times.items():
            cpu, wall = (statistics.median(x) for x in zip(*found[1:], strict=True))
            rows.append({"command": name, "code": code, "cpu": cpu, "wall": wall})
    return rows


def training(num_busy: int, repeats: int, num_updates: int) -> list[dict]:
    """Updates per second of the demo beside busy processes, ours and plain in turn."""
    counting = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(counting) for _ in range(num_busy)]
    speeds: dict[str, list[float]] = {"ours": [], "plain": []}
    try:
        for _ in range(repeats):
            for code, extra in (("ours", {}), ("plain", SPINNING)):
                done = subprocess.run(
                    [sys.executable, __file__, "--train", str(num_updates)],
                    env=os.environ | extra,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                speeds[code].append(float(done.stdout.splitlines()[-1]))
    finally:
        for process in others:
            process.kill()
    return [
        {"busy": num_busy, "code": code, "speed": statistics.median(x)}
        for code, x in speeds.items()
    ]


def updates_per_second(num_updates: int) -> float:
    """Speed of `main.py experiment=demo_duo`, less the first tenth of the updates."""
    sys.path.insert(0, str(ROOT))
    from cli.environment import share_cores

    share_cores()
    import hydra

    from benchmarks.clock import ends
    from cli.settle import settle
    from main import train
    from utils import register_resolvers

    register_resolvers()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            config = hydra.compose(
                "config",
                [
                    "experiment=demo_duo",
                    "trainer.accelerator=cpu",
                    f"trainer.max_steps={num_updates}",
                    "trainer.limit_val_batches=0",
                    "+trainer.enable_progress_bar=False",
                    "callbacks.checkpoint_every_n_steps.every_n_train_steps=0",
                    "logger=none",
                    "+callbacks.clock._target_=benchmarks.clock.Clock",
                ],
            )
        settle(config)
        train(config)
        os.chdir(ROOT)
    first = max(1, num_updates // 10)
    return (num_updates - first) / (ends[num_updates] - ends[first])


def report(starts: list[dict], speeds: list[dict], output: Path) -> None:
    """Prints both tables and writes them to machine.md and machine.json."""
    lines = [
        "# Starting, and sharing a machine",
        "",
        "## Seconds until a command line is answered",
        "",
        "| command | CPU s, ours | CPU s, plain | s, ours | s, plain |",
        "| --- | --- | --- | --- | --- |",
    ]
    by = {(row["command"], row["code"]): row for row in starts}
    for name in dict.fromkeys(row["command"] for row in starts):
        ours, plain = by[name, "ours"], by[name, "plain"]
        cells = (ours["cpu"], plain["cpu"], ours["wall"], plain["wall"])
        lines.append(f"| {name} | " + " | ".join(f"{x:.2f}" for x in cells) + " |")
    lines += [
        "",
        f"## The demo's updates per second on {os.cpu_count()} cores",
        "",
        "| busy processes beside it | ours | plain | ours, of its idle speed |",
        "| --- | --- | --- | --- |",
    ]
    speed = {(row["busy"], row["code"]): row["speed"] for row in speeds}
    for busy in dict.fromkeys(row["busy"] for row in speeds):
        ours, plain = speed[busy, "ours"], speed[busy, "plain"]
        share = ours / speed[0, "ours"]
        lines.append(f"| {busy} | {ours:.1f} | {plain:.1f} | {share:.0%} |")
    text = "\n".join(lines) + "\n"
    print(text)
    output.mkdir(parents=True, exist_ok=True)
    (output / "machine.md").write_text(text)
    numbers = {"start_up": starts, "training": speeds}
    (output / "machine.json").write_text(json.dumps(numbers, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=60, help="per training run")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks")
    args = parser.parse_args()
    if args.train:
        print(updates_per_second(args.train))
        return
    starts = start_up(args.repeats)
    speeds = [
        row
        for num_busy in args.busy
        for row in training(num_busy, args.repeats, args.updates)
    ]
    report(starts, speeds, args.output)


if __name__ == "__main__":
    main()
