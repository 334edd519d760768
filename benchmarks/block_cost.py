"""What blocks cost: a train step and sampling beside whole rows and left to right.

    make block-cost

Writes block_cost.md and block_cost.json. All networks have the same size and random
weights. A train step is an update of the library: forward, backward, clipping, AdamW,
EMA. Samplers draw rows of L tokens in as many steps as there are tokens: L for whole
rows, L' for each block of L'; `no cache` shows the network all clean tokens at every
evaluation. Whatever has the same L takes turns. Run it on a machine that does nothing
else.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import cases, measure  # noqa: E402
from report.formats import markdown  # noqa: E402
from utils import register_resolvers  # noqa: E402

# ---------------------------------------------------------------- training


def trainings(
    args: argparse.Namespace, length: int
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Algorithm, what it is called and overrides of every train step."""
    yield "ar", "left to right", ()
    for name in args.algorithms:
        yield name, "whole rows", ()
        for size in args.sizes:
            if size < length:
                yield name, f"L' = {size}", (f"algo.block_size={size}",)


def training_rows(args: argparse.Namespace, length: int) -> list[dict]:
    """Median time of an update, and what it takes for tensors, at a length."""
    device, steps, found = torch.device(args.device), {}, {}
    batch_size = max(1, args.tokens // length)
    for name, way, overrides in trainings(args, length):
        sizes = {"length": length, "batch_size": batch_size}
        model, x0 = cases.build(name, args, *overrides, **sizes)
        key = f"{name} {way}"
        update = cases.OurStep(model.train())
        steps[key] = lambda update=update, x0=x0: update(x0)
        found[key] = {"algorithm": name, "way": way, "length": length}
    seconds = measure.alternate(steps, device, args.rounds)
    for key, step in steps.items():
        memory = measure.peak_memory(step, device)["step"]
        found[key] |= {
            "ms_a_token": 1000 * seconds[key] / (batch_size * length),
            "step_mb": memory,
        }
    return relative(list(found.values()))


def relative(rows: list[dict]) -> list[dict]:
    """Rows with their time over that of whole rows of the same algorithm and length;
    without one, as for AR, there is none."""
    whole = {
        (row["algorithm"], row["length"]): row["ms_a_token"]
        for row in rows
        if row["way"] == "whole rows"
    }
    for row in rows:
        plain = whole.get((row["algorithm"], row["length"]))
        row["ratio"] = None if plain is None else row["ms_a_token"] / plain
    return rows


# ---------------------------------------------------------------- sampling


def samplings(
    args: argparse.Namespace, length: int
) -> Iterator[tuple[str, str, tuple[str, ...], int]]:
    """Algorithm, what it is called, overrides and steps of every way to draw a row."""
    yield "ar", "left to right, cache", (), 1
    for name in args.algorithms:
        yield name, "whole rows", (), length
        for size in args.sizes:
            if size < length:
                blocks = f"algo.block_size={size}"
                yield name, f"L' = {size}, cache", (blocks,), size
                if args.uncached:
                    uncached = (blocks, "sampling.block_cache=False")
                    yield name, f"L' = {size}, no cache", uncached, size


def sampling_rows(args: argparse.Namespace, length: int) -> list[dict]:
    """Median time, memory and evaluations of every way to draw rows of a length."""
    device, draws, found = torch.device(args.device), {}, {}
    evaluations: dict[str, float] = {}
    for name, way, overrides, num_steps in samplings(args, length):
        model, _ = cases.build(name, args, *overrides, length=length)
        key = f"{name} {way}"
        draw = drawing(model.eval(), args.batch_size, num_steps)
        draws[key] = lambda key=key, draw=draw: evaluations.update({key: draw()})
        found[key] = {"algorithm": name, "way": way, "length": length}
    seconds = measure.alternate(draws, device, args.rounds)
    for key, draw in draws.items():
        memory = measure.peak_memory(draw, device)["step"]
        found[key] |= {
            "ms_a_token": 1000 * seconds[key] / (args.batch_size * length),
            "evaluations": evaluations[key],
            "step_mb": memory,
        }
    return relative(list(found.values()))


def drawing(model, batch_size: int, num_steps: int) -> Callable[[], float]:
    """Draws a batch, the same each time; how often the network saw a sequence."""

    def draw() -> float:
        generator = torch.Generator(model.device).manual_seed(0)
        samples = model.generate_samples(batch_size, generator, num_steps)
        return float(samples.evaluations.float().mean())

    return draw


# ---------------------------------------------------------------- the table


def table(rows: list[dict]) -> str:
    """Markdown; evaluations are those of samples."""
    head = ["L", "algorithm", "way", "ms a token", "ratio", "MB"]
    lines = [
        [
            *(str(row["length"]), row["algorithm"], row["way"]),
            f"{row['ms_a_token']:.3f}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            f"{row['step_mb']:.1f}",
        ]
        for row in rows
    ]
    if "evaluations" in rows[0]:
        head.insert(-1, "evaluations")
        for line, row in zip(lines, rows, strict=True):
            line.insert(-1, f"{row['evaluations']:.0f}")
    return markdown(head, lines)


def report(
    training: list[dict], sampling: list[dict], setting: dict, output: Path
) -> None:
    """Prints the tables and writes them to block_cost.md and .json."""
    said = ", ".join(f"{key} {value}" for key, value in setting.items())
    lines = [
        "# What blocks cost",
        "",
        f"Made by `make block-cost`: {said}. MB are what the tensors of a step take at",
        "most, beyond weights, gradients, moments and averages. The ratio is the time",
        "over that of whole rows of the same algorithm and length.",
        "",
        "## An update",
        "",
        table(training),
        "",
        "## A sample",
        "",
        "Evaluations are of the network, for each sequence.",
        "",
        table(sampling),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    output.mkdir(parents=True, exist_ok=True)
    (output / "block_cost.md").write_text(text)
    numbers = {"setting": setting, "training": training, "sampling": sampling}
    (output / "block_cost.json").write_text(json.dumps(numbers, indent=1) + "\n")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    algorithms = ["mdlm", "duo_base"]
    parser.add_argument("--algorithms", nargs="+", default=algorithms)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--uncached", action="store_true", help="and without the cache")
    parser.add_argument("--batch-size", type=int, default=4, help="of samples")
    parser.add_argument("--tokens", type=int, default=2048, help="of an update")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4, help="of the network")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32", choices=["32", "bf16"])
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args(words)
    vars(args).update(
        model="tiny", compile=False, loss_compile=False, loss_chunk="auto"
    )
    register_resolvers()
    training, sampling = [], []
    for length in tqdm(args.lengths, "lengths"):
        training += training_rows(args, length)
        sampling += sampling_rows(args, length)
    setting = {
        "hidden size": args.hidden_size,
        "blocks of the network": args.blocks,
        "K": args.vocab_size,
        "tokens of an update": args.tokens,
        "samples of a batch": args.batch_size,
        "precision": args.precision,
        **measure.environment(torch.device(args.device)),
    }
    report(training, sampling, setting, args.output)


if __name__ == "__main__":
    main()
