"""Times the train step of every algorithm, ours against `plain.py`, in one run.

    make bench [ARGS="--vocab-size 50257 --length 128 ..."]

Steps of the two alternate, so that a busy machine slows both. Peak memory is that of
a process of its own for each. Writes train_step.md and train_step.json beside this.
"""

import argparse
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import hydra
import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from algo import algorithm_class  # noqa: E402
from benchmarks.plain import NLL, PlainStep  # noqa: E402
from utils import register_resolvers  # noqa: E402


class OurStep:
    """One optimiser update through the library's own loss and EMA."""

    def __init__(self, model) -> None:
        self.model = model.train()
        self.optimizer = model.make_optimizer()
        self.ema = model.make_ema()

    def __call__(self, x0: torch.Tensor) -> float:
        batch = {"input_ids": x0, "attention_mask": torch.ones(x0.shape)}
        loss = self.model.loss(batch).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update(self.model.parameters())
        return loss.item()


def build(name: str, args: argparse.Namespace):
    """A model of the benchmark's size, and a batch."""
    overrides = [
        f"algo={name}",
        "data=synthetic",
        "model=tiny",
        f"model.length={args.length}",
        f"model.hidden_size={args.hidden_size}",
        f"model.n_blocks={args.blocks}",
        "model.dropout=0",
        f"loader.global_batch_size={args.batch_size}",
        "trainer.accelerator=cpu",
    ]
    folder = str(HERE.parent / "configs")
    with hydra.initialize_config_dir(folder, version_base="1.3"):
        config = hydra.compose("config", overrides)
    tokenizer = SizedTokenizer(
        vocab_size=args.vocab_size, mask_token_id=None, bos_token_id=0
    )
    torch.manual_seed(0)
    model = algorithm_class(config)(config, tokenizer)
    return model, torch.randint(args.vocab_size, (args.batch_size, args.length))


class SizedTokenizer(SimpleNamespace):
    def __len__(self) -> int:
        return self.vocab_size


def make_step(name: str, variant: str, args: argparse.Namespace):
    model, x0 = build(name, args)
    step = OurStep(model) if variant == "ours" else PlainStep(name, model.train())
    return lambda: step(x0)


def peak_memory(name: str, variant: str, argv: list[str]) -> float:
    """MB of a fresh process that makes two steps."""
    command = [sys.executable, __file__, *argv, "--memory-of", name, variant]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def own_peak_memory() -> float:
    """Largest resident size of this process so far, MB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; ru_maxrss would count the parent's memory there
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(peak[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def environment() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    register_resolvers()
    if args.memory_of:
        step = make_step(*args.memory_of, args)
        step(), step()
        print(own_peak_memory())
        return
    rows = []
    for name in tqdm(NLL, "algorithms"):
        steps = {
            variant: make_step(name, variant, args) for variant in ("plain", "ours")
        }
        seconds = {variant: [] for variant in steps}
        for index in range(args.steps + 2):
            for variant, step in steps.items():
                start = time.perf_counter()
                step()
                if index >= 2:  # the first two warm up
                    seconds[variant].append(time.perf_counter() - start)
        row = {"algorithm": name}
        for variant, times in seconds.items():
            row[f"{variant}_ms"] = 1000 * statistics.median(times)
            row[f"{variant}_mb"] = peak_memory(name, variant, sys.argv[1:])
        row["speed_ratio"] = row["plain_ms"] / row["ours_ms"]
        row["memory_ratio"] = row["ours_mb"] / row["plain_mb"]
        rows.append(row)
    report(rows, args)


def report(rows: list[dict], args: argparse.Namespace) -> None:
    sizes = ("vocab_size", "length", "batch_size", "hidden_size", "blocks", "steps")
    setting = environment() | {name: getattr(args, name) for name in sizes}
    header = ["algorithm", "plain ms", "ours ms", "speed"]
    header += ["plain MB", "ours MB", "memory"]
    cells = [
        [
            row["algorithm"],
            f"{row['plain_ms']:.0f}",
            f"{row['ours_ms']:.0f}",
            f"{row['speed_ratio']:.2f} x",
            f"{row['plain_mb']:.0f}",
            f"{row['ours_mb']:.0f}",
            f"{row['memory_ratio']:.2f} x",
        ]
        for row in rows
    ]
    table = Table(*header, title="train step, plain eager code against ours")
    for row in cells:
        table.add_row(*row)
    Console().print(table)
    described = ", ".join(f"{key} {value}" for key, value in setting.items())
    lines = ["# Train step, plain eager code against ours", "", described, ""]
    lines += ["| " + " | ".join(row) + " |" for row in [header, ["---"] * 7, *cells]]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "train_step.md").write_text("\n".join(lines) + "\n")
    data = json.dumps({"setting": setting, "rows": rows}, indent=1)
    (args.output / "train_step.json").write_text(data + "\n")


if __name__ == "__main__":
    main()
