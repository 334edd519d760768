"""Mamba's selective scan: ours beside loops over the sequence, forward and backward.

    python benchmarks/bench_scan.py

Writes scan.md and scan.json. `loop` is the recurrence as one writes it down, which cuts
a step out of its inputs at a time; the gradient of each cut is as long as the sequence.
`unbound` cuts all steps at once, which is as fast as such a loop gets. Both are left to
autograd. All take turns on the same inputs; memory is what a forward and a backward
pass take at most beside them. Run it on a machine that does nothing else.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import measure  # noqa: E402
from models.scan import selective_scan  # noqa: E402


def loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence, step by step; arguments as for `selective_scan`."""
    h = x.new_zeros(len(x), *A.shape)
    ys = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        h = torch.exp(step * A) * h + step * x[:, t, :, None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(dim=-1))
    return torch.stack(ys, dim=1)


def unbound(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The same with its inputs cut beforehand."""
    h = x.new_zeros(len(x), *A.shape)
    ys = []
    steps = (tensor.unbind(1) for tensor in (dt, dt * x, B, C))
    for dt_t, u, B_t, C_t in zip(*steps, strict=True):
        h = torch.exp(dt_t[..., None] * A) * h + u[..., None] * B_t[:, None]
        ys.append((h * C_t[:, None]).sum(dim=-1))
    return torch.stack(ys, dim=1)


SCANS: dict[str, Callable[..., Tensor]] = {
    "ours": selective_scan,
    "unbound": unbound,
    "loop": loop,
}


def inputs(args: argparse.Namespace, length: int) -> list[Tensor]:
    """Random ones of the sizes asked for, with decays as a network begins with."""
    torch.manual_seed(0)
    batch, channels, states = args.batch_size, args.channels, args.states
    shape = (batch, length, channels)
    rates = torch.arange(1.0, states + 1).repeat(channels, 1)
    steps = F.softplus(torch.randn(shape) - 4)
    B, C = torch.randn(2, batch, length, states)
    found = (torch.randn(shape), steps, -rates, B, C)
    return [x.to(args.device).requires_grad_() for x in found]


def measured(scan: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, float]:
    """Milliseconds of a forward and of a backward pass."""
    device, held = tensors[0].device, []
    forward = measure.seconds(lambda: held.append(scan(*tensors)), device)
    probe = torch.ones_like(held[0])
    backward = measure.seconds(
        lambda: torch.autograd.grad(held[0], tensors, probe), device
    )
    return {"forward_ms": 1000 * forward, "backward_ms": 1000 * backward}


def rows_of(args: argparse.Namespace, length: int) -> list[dict]:
    """Medians of all scans at a length, in turn, and what each takes of memory."""
    tensors = inputs(args, length)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in args.scans}
    for index in range(args.rounds + 1):  # the first one fills caches
        for name in args.scans:
            found = measured(SCANS[name], tensors)
            if index:
                times[name].append(found)
    rows = []
    for name, several in times.items():
        row = {
            key: statistics.median(found[key] for found in several)
            for key in ("forward_ms", "backward_ms")
        }
        memory = measure.peak_memory(
            lambda name=name: measured(SCANS[name], tensors), tensors[0].device
        )
        rows.append({"scan": name, "length": length, **row, "step_mb": memory["step"]})
    return rows


def total(row: dict) -> float:
    return row["forward_ms"] + row["backward_ms"]


def report(rows: list[dict], setting: dict, output: Path) -> None:
    """Prints the table and writes it to scan.md and scan.json."""
    said = ", ".join(f"{key} {value}" for key, value in setting.items())
    lines = [
        "# The selective scan beside loops over the sequence",
        "",
        f"{said}.",
        "",
        "| L | scan | forward, ms | backward, ms | MB | ours is faster by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    ours = {row["length"]: total(row) for row in rows if row["scan"] == "ours"}
    for row in rows:
        cells = (row["forward_ms"], row["backward_ms"], row["step_mb"])
        times = total(row) / ours[row["length"]] if row["length"] in ours else None
        faster = "-" if times is None or row["scan"] == "ours" else f"{times:.1f}"
        numbers = " | ".join(f"{x:.1f}" for x in cells)
        lines.append(f"| {row['length']} | {row['scan']} | {numbers} | {faster} |")
    text = "\n".join(lines) + "\n"
    print(text)
    output.mkdir(parents=True, exist_ok=True)
    (output / "scan.md").write_text(text)
    numbers = json.dumps({"setting": setting, "rows": rows}, indent=1)
    (output / "scan.json").write_text(numbers + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lengths = [128, 256, 512, 1024, 2048, 4096]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--channels", type=int, default=1024, help="of tiny-dimamba")
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scans", nargs="+", default=list(SCANS), choices=list(SCANS))
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    rows = [
        row for length in tqdm(args.lengths, "scan") for row in rows_of(args, length)
    ]
    setting = {
        "channels": args.channels,
        "states": args.states,
        "batch": args.batch_size,
        "threads": torch.get_num_threads(),
        "device": str(args.device),
        "torch": torch.__version__,
    }
    report(rows, setting, args.output)


if __name__ == "__main__":
    main()
