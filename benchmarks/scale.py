"""What a train step costs against size, and a model of it that predicts other sizes,
other numbers of devices, and the published runs.

    make scale-table

Writes scale.md and scale.json. Rates are fitted to the
phases of a step at some sizes, and predict the step of the others; two gloo processes
of one thread each check what is said of several devices. Run it on a machine that does
nothing else.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import bench, cases, measure  # noqa: E402
from benchmarks.profile_step import Phases, time_phases  # noqa: E402
from models.device import keep_freed_memory  # noqa: E402
from models.flops import train_flops  # noqa: E402
from report import formats  # noqa: E402
from utils import register_resolvers  # noqa: E402

# Hidden size, blocks, heads. The rates are fitted to FITTED, the rest is predicted.
SIZES = {
    "128 x 2": (128, 2, 2),
    "256 x 4": (256, 4, 4),
    "384 x 6": (384, 6, 6),
    "512 x 8": (512, 8, 8),
    "768 x 12": (768, 12, 12),
}
FITTED = ("128 x 2", "384 x 6", "512 x 8")
ALGORITHMS = ("ar", "mdlm", "duo_base")
# What is timed of a step: the rate that it is priced by, and its phases.
GROUPS = {
    "forward": ("trunk, forward",),
    "backward": ("trunk, backward",),
    "head": ("head and loss, with gradients",),
    "update": ("clip", "optimiser", "EMA"),
    "corrupt": ("corrupt",),
}


class Work(NamedTuple):
    """What a train step of one device does."""

    forward: float  # FLOP of the trunk
    backward: float  # FLOP of the trunk
    head: float  # FLOP of head and loss, with their gradients
    update: float  # parameters
    corrupt: float  # tokens

    @classmethod
    def of(cls, model, tokens: int, scored: int, length: int) -> "Work":
        trunk = train_flops(model.backbone, tokens, 0, length)
        head = train_flops(model.backbone, 0, scored, length)
        parameters = sum(x.numel() for x in model.parameters())
        return cls(trunk / 3, 2 * trunk / 3, head, parameters, tokens)


class Rates(NamedTuple):
    """Seconds of a unit of each kind of `Work`."""

    forward: float
    backward: float
    head: float
    update: float
    corrupt: float

    @classmethod
    def fitted(cls, rows: list[dict]) -> "Rates":
        """Medians over measured rows: each kind's seconds over its work."""
        return cls(
            *(
                statistics.median(row[f"{kind}_s"] / row["work"][kind] for row in rows)
                for kind in cls._fields
            )
        )

    def step(self, work: Work, exchange: float = 0) -> float:
        """Seconds of a step.

            forward + head + max(backward, exchange) + update + corrupt

        Gradients are exchanged while backward goes on; what is longer counts.
        """
        spent = {kind: getattr(self, kind) * getattr(work, kind) for kind in GROUPS}
        hidden = max(spent["backward"], exchange)
        return sum(spent.values()) - spent["backward"] + hidden


def sized(name: str, size: str, args: argparse.Namespace, batch_size: int):
    hidden_size, blocks, heads = SIZES[size]
    sizes = {"hidden_size": hidden_size, "blocks": blocks, "heads": heads}
    return cases.build(name, args, **sizes, batch_size=batch_size)


def phases_of(name: str, size: str, args: argparse.Namespace, batch_size: int) -> dict:
    """A row: seconds of each group of phases and of the step, and its work.

    The noise is drawn anew for every step; as many tokens have a loss on average as in
    the one that is counted here over many draws.
    """
    model, x0 = sized(name, size, args, batch_size)
    step = cases.OurStep(model.train())
    step(x0)
    whole = [measure.seconds(lambda: step(x0), x0.device) for _ in range(args.rounds)]
    phases = Phases(args.torch_device)
    time_phases(step, phases)
    for _ in range(args.rounds):
        step(x0)
    scored = round(
        statistics.mean(cases.scored_tokens(name, model, x0) for _ in range(50))
    )
    work = Work.of(model, cases.trunk_tokens(name, x0), scored, args.length)
    row = {"algorithm": name, "size": size, "tokens": x0.numel(), "scored": scored}
    for kind, parts in GROUPS.items():
        spent = sum(phases.seconds.get(part, 0.0) for part in parts)
        row[f"{kind}_s"] = spent / args.rounds
    row["step_s"] = statistics.mean(whole)  # the share of scored tokens varies
    return row | {"parameters": int(work.update), "work": work._asdict()}


def memory_of(name: str, size: str, args: argparse.Namespace) -> dict:
    """Bytes of a parameter as they are there, and of a token while a step goes on.

    A token's are those by which the peak grows with the batch, at a batch where the
    trunk's activations are the peak. The vocabulary is small for that: what the head
    takes at once does not grow with the batch.
    """
    row = {"algorithm": name, "size": size}
    args = argparse.Namespace(**{**vars(args), "vocab_size": 64})
    for label, checkpointing in (("plain", False), ("checkpointing", True)):
        peaks = []
        for batch_size in (2 * args.batch_size, 4 * args.batch_size):
            model, x0 = sized(name, size, args, batch_size)
            model.backbone.checkpointing = checkpointing
            step = cases.OurStep(model.train())
            step(x0)
            with measure.LiveTensors() as tensors:
                step(x0)
            peaks.append(tensors.peak)
        tokens = 2 * args.batch_size * args.length
        row[f"{label}_bytes_per_token"] = (peaks[1] - peaks[0]) / tokens
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    held = [*parameters, *gradients]
    held += [x for s in step.optimizer.state.values() for x in s.values()]
    held += list(step.ema.state_dict()["shadow_params"])
    count = sum(p.numel() for p in parameters)
    row["bytes_per_parameter"] = sum(x.nbytes for x in held) / count
    return row


# ---------------------------------------------------------------- several processes


def processes(args: argparse.Namespace) -> list[dict]:
    """Steps of two processes, of one thread each, as measured and as predicted.

    Predicted is half of the batch in each, while the other one does the same, and the
    sum of the gradients after it: gloo sums on the cores that compute, so nothing of it
    is hidden.
    """
    rows = []
    for name in tqdm(args.algorithms, "processes"):
        for size in args.process_sizes:
            times = zip(*bench.spawned(_rank, 2, name, size, args.argv), strict=True)
            alone, exchange, together = map(statistics.mean, times)
            row = {"algorithm": name, "size": size, "alone_s": alone}
            row |= {"exchange_s": exchange, "together_s": together}
            rows.append(row | {"predicted_s": alone + exchange})
    return rows


def _rank(
    rank: int,
    num: int,
    name: str,
    size: str,
    argv: list[str],
    address: str,
    found: list,
) -> None:
    args = parse(argv)
    bench.meet(rank, num, address)
    model, x0 = sized(name, size, args, args.batch_size // 2)
    gradients = torch.zeros(sum(p.numel() for p in model.parameters()))

    def seconds_of(step: Callable[..., object], *inputs: torch.Tensor) -> float:
        torch.distributed.barrier()
        steps = {"step": lambda: step(*inputs)}
        return measure.alternate(steps, x0.device, args.rounds)["step"]

    alone = seconds_of(cases.OurStep(model.train()), x0)
    exchange = seconds_of(torch.distributed.all_reduce, gradients)
    together = seconds_of(cases.OurStep(model, DistributedDataParallel), x0)
    found.append((alone, exchange, together))
    torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- published runs


class Cluster(NamedTuple):
    """GPUs as their makers describe them, and the share of it that runs reach.

    Args:
        devices: N.
        peak: FLOP/s in bfloat16, dense.
        memory: Bytes per second of a device's own memory.
        link: Bytes per second that a device sends while gradients are summed.
    """

    devices: int
    peak: float
    memory: float
    link: float

    def rates(self, use: float) -> Rates:
        """Rates at a share of the peak; an update reads and writes its bytes.

        An update reads weight, gradient, two moments and the average, and writes all
        but the gradient: 36 bytes of a parameter.
        """
        flop = 1 / (use * self.peak)
        return Rates(flop, flop, flop, 36 / self.memory, 0)

    def exchange(self, parameters: float) -> float:
        """Seconds of a ring all-reduce of float32 gradients: 2 (N - 1) / N of them."""
        return 2 * (self.devices - 1) / self.devices * 4 * parameters / self.link


# SXM, as their maker states it: 3.35 TB/s of memory, NVLink of 450 GB/s a way.
H100S = Cluster(8, 989e12, 3.35e12, 450e9)
USES = (0.3, 0.4, 0.5)  # shares of the peak
UPDATES = 1_000_000


def published(args: argparse.Namespace) -> list[dict]:
    """Hours of the published runs: L = 1024, batch 512, 1M updates, on 8 H100."""
    args = argparse.Namespace(**{**vars(args), "model": "small", "length": 1024})
    rows = []
    batch_size = 512 // H100S.devices
    for name in args.algorithms:
        model, _ = sized(name, "768 x 12", args, 1)
        tokens = batch_size * args.length
        scored = {"ar": tokens - batch_size, "mdlm": tokens // 2}.get(name, tokens)
        work = Work.of(model, tokens, scored, args.length)
        exchange = H100S.exchange(work.update)
        hours = {
            f"at_{u}": H100S.rates(u).step(work, exchange) * UPDATES / 3600
            for u in USES
        }
        flop = H100S.devices * (work.forward + work.backward + work.head)
        row = {"algorithm": name, "parameters": int(work.update), "flop": flop}
        rows.append(row | {"exchange_ms": 1000 * exchange} | hours)
    return rows


# ---------------------------------------------------------------- report


def predicted(rows: list[dict]) -> list[dict]:
    """The rates of each algorithm, and each row's step as they predict it."""
    fits = []
    for name in dict.fromkeys(row["algorithm"] for row in rows):
        own = [row for row in rows if row["algorithm"] == name]
        rates = Rates.fitted([row for row in own if row["size"] in FITTED])
        fits.append({"algorithm": name, **rates._asdict()})
        for row in own:
            row["predicted_s"] = rates.step(Work(**row["work"]))
    return fits


def table(rows: list[dict], columns: dict[str, tuple[str, str, float]]) -> list[str]:
    """Markdown: heading -> (key, format, factor)."""
    lines = [
        [
            form.format(row[key] if isinstance(row[key], str) else row[key] * factor)
            for key, form, factor in columns.values()
        ]
        for row in rows
    ]
    return [formats.markdown(list(columns), lines), ""]


NAME = {"algorithm": ("algorithm", "{}", 1), "width x blocks": ("size", "{}", 1)}
MS = "{:.1f}"


def markdown(results: dict, setting: dict) -> str:
    said = ", ".join(f"{key} {value}" for key, value in setting.items())
    lines = ["# What a train step costs against size", "", f"{said}.", ""]
    lines += ["## Phases of a step, ms", ""]
    phases = {kind: (f"{kind}_s", MS, 1000) for kind in GROUPS}
    steps = {"step": ("step_s", MS, 1000), "predicted": ("predicted_s", MS, 1000)}
    millions = {"parameters, millions": ("parameters", "{:.1f}", 1e-6)}
    lines += table(results["phases"], NAME | millions | phases | steps)
    lines += [f"Fitted at {', '.join(FITTED)}; the other steps are predicted.", ""]
    lines += ["## Rates", ""]
    rates = {
        "algorithm": ("algorithm", "{}", 1),
        "forward, s per TFLOP": ("forward", "{:.2f}", 1e12),
        "backward, s per TFLOP": ("backward", "{:.2f}", 1e12),
        "head, s per TFLOP": ("head", "{:.2f}", 1e12),
        "update, ns per parameter": ("update", "{:.2f}", 1e9),
        "corrupt, ns per token": ("corrupt", "{:.0f}", 1e9),
    }
    lines += table(results["rates"], rates)
    lines += ["## Memory in float32, bytes", ""]
    memory = {
        "of a parameter": ("bytes_per_parameter", "{:.1f}", 1),
        "of a token": ("plain_bytes_per_token", "{:,.0f}", 1),
        "of a token, activation checkpointing": (
            "checkpointing_bytes_per_token",
            "{:,.0f}",
            1,
        ),
    }
    lines += table(results["memory"], NAME | memory)
    lines += ["A token's without what the head takes, which is the same for all.", ""]
    lines += ["## Two processes of one thread each, ms", ""]
    together = {
        "half of the batch": ("alone_s", MS, 1000),
        "sum of the gradients": ("exchange_s", MS, 1000),
        "predicted step": ("predicted_s", MS, 1000),
        "measured step": ("together_s", MS, 1000),
    }
    lines += table(results["processes"], NAME | together)
    lines += [f"## The published runs on {H100S.devices} H100, predicted", ""]
    hours = {
        "algorithm": ("algorithm", "{}", 1),
        "parameters, millions": ("parameters", "{:.0f}", 1e-6),
        "TFLOP of an update": ("flop", "{:.0f}", 1e-12),
        "sum of the gradients, ms": ("exchange_ms", "{:.1f}", 1),
        **{
            f"hours at {use:.0%} of the peak": (f"at_{use}", "{:.0f}", 1)
            for use in USES
        },
    }
    return "\n".join([*lines, *table(results["published"], hours)])


# ---------------------------------------------------------------- command line


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--memory-sizes", nargs="+", default=["256 x 4", "512 x 8"])
    parser.add_argument("--process-sizes", nargs="+", default=["128 x 2", "256 x 4"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=50257, help="without mask")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=HERE)
    chosen = parser.parse_args(argv)
    args = bench.parse([])  # a train step's other settings
    vars(args).update(vars(chosen), argv=argv)
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    register_resolvers()
    keep_freed_memory()
    pairs = [(name, size) for name in args.algorithms for size in args.sizes]
    B = args.batch_size
    phases = [phases_of(*pair, args, B) for pair in tqdm(pairs, "phases")]
    pairs = [(name, size) for name in args.algorithms for size in args.memory_sizes]
    memory = [memory_of(*pair, args) for pair in tqdm(pairs, "memory")]
    results = {
        "phases": phases,
        "rates": predicted(phases),
        "memory": memory,
        "processes": processes(args),
        "published": published(args),
    }
    setting = measure.environment(args.torch_device)
    setting |= {"batch size": B, "length": args.length, "vocabulary": args.vocab_size}
    text = markdown(results, setting)
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "scale.md").write_text(text)
    numbers = json.dumps({"setting": setting, **results}, indent=1)
    (args.output / "scale.json").write_text(numbers + "\n")


if __name__ == "__main__":
    main()
