"""Sampling block by block beside whole rows and left to right: time and memory a token.

    python benchmarks/block_sampling.py

Writes block_sampling.md and block_sampling.json. All networks have the same size and
random weights, and draw rows of L tokens in as many steps as there are tokens: L for
whole rows, L' for each block of L'. `no cache` shows the network all clean tokens at
every evaluation. The samplers take turns. Run it on a machine that does nothing else.
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
from utils import register_resolvers  # noqa: E402


def settings_of(
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


def rows_of(args: argparse.Namespace, length: int) -> list[dict]:
    """Median time, memory and evaluations of every way to draw rows of a length."""
    device, draws, found = torch.device(args.device), {}, {}
    evaluations: dict[str, float] = {}
    for name, way, overrides, num_steps in settings_of(args, length):
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
    return list(found.values())


def drawing(model, batch_size: int, num_steps: int) -> Callable[[], float]:
    """Draws a batch, the same each time; how often the network saw a sequence."""

    def draw() -> float:
        generator = torch.Generator(model.device).manual_seed(0)
        samples = model.generate_samples(batch_size, generator, num_steps)
        return float(samples.evaluations.float().mean())

    return draw


def report(rows: list[dict], setting: dict, output: Path) -> None:
    """Prints the table and writes it to block_sampling.md and .json."""
    said = ", ".join(f"{key} {value}" for key, value in setting.items())
    lines = [
        "# Sampling block by block beside whole rows and left to right",
        "",
        f"{said}.",
        "",
        "| L | algorithm | way | ms a token | network evaluations a sequence | MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['length']} | {row['algorithm']} | {row['way']} | "
        f"{row['ms_a_token']:.3f} | {row['evaluations']:.0f} | {row['step_mb']:.1f} |"
        for row in rows
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    output.mkdir(parents=True, exist_ok=True)
    (output / "block_sampling.md").write_text(text)
    numbers = json.dumps({"setting": setting, "rows": rows}, indent=1)
    (output / "block_sampling.json").write_text(numbers + "\n")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    algorithms = ["mdlm", "duo_base"]
    parser.add_argument("--algorithms", nargs="+", default=algorithms)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--uncached", action="store_true", help="and without the cache")
    parser.add_argument("--batch-size", type=int, default=4)
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
    rows = [row for x in tqdm(args.lengths, "lengths") for row in rows_of(args, x)]
    setting = {
        "hidden size": args.hidden_size,
        "blocks of the network": args.blocks,
        "K": args.vocab_size,
        "batch": args.batch_size,
        "precision": args.precision,
        **measure.environment(torch.device(args.device)),
    }
    report(rows, setting, args.output)


if __name__ == "__main__":
    main()
