"""Tables of the operator, and a range of gamma for a tokenizer.

    python utils.py --vocab_size=50258             writes integral/vocab_50258.npz
    python utils.py --tokenizer=gpt2 --suggest     prints a range, draws alpha(gamma)

No run needs the table: the operator is built to machine precision when it is asked for.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table as RichTable

from integral.tables import Table, build_table, read_table, write_table
from integral.transform import (
    SUGGESTED_ALPHA,
    GammaRange,
    quadrature,
    suggest_gammas,
)
from utils import ConfigError, fail, printable, whole_file

FOLDER = Path(__file__).parent
console = Console(emoji=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        ConfigError: If a value makes no sense.
    """
    description = __doc__.splitlines()[0]
    parser = _Parser("python utils.py", description=description, allow_abbrev=False)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--vocab_size", type=int, help="number of tokens of the model")
    who.add_argument("--tokenizer", help="whose tokens to count: folder, hub id, ...")
    parser.add_argument("--suggest", action="store_true", help="a range and a plot")
    parser.add_argument("--gamma_min", type=float, default=-5.0)
    parser.add_argument("--gamma_max", type=float, default=-1.0)
    parser.add_argument("--log10_num_points", type=int, default=5)
    parser.add_argument("--partition_index", type=int, default=0)
    parser.add_argument("--num_partitions", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write")
    args = parser.parse_args(argv)
    if args.tokenizer is not None:
        args.vocab_size = count_tokens(args.tokenizer)
    if args.vocab_size < 2:
        raise ConfigError(f"--vocab_size={args.vocab_size} is not at least 2.")
    if not args.gamma_min < args.gamma_max:
        raise ConfigError(
            f"--gamma_min={args.gamma_min} is not below --gamma_max={args.gamma_max}."
        )
    if not 1 <= args.log10_num_points <= 7:
        raise ConfigError(
            f"--log10_num_points={args.log10_num_points} is not from 1 to 7."
        )
    if not 0 <= args.partition_index < args.num_partitions:
        raise ConfigError(
            f"--partition_index={args.partition_index} is not from 0 to "
            f"--num_partitions={args.num_partitions} less 1."
        )
    return args


def count_tokens(name: str) -> int:
    """K of a uniform-state model with this tokenizer."""
    from data.tokenizers import get_tokenizer

    return len(
        get_tokenizer(OmegaConf.create({"data": {"tokenizer_name_or_path": name}}))
    )


def main(argv: Sequence[str] | None = None) -> None:
    try:
        args = parse(argv)
        if args.suggest:
            report_suggestion(args.vocab_size, args.folder)
        else:
            write(args)
    except (ConfigError, OSError) as error:
        fail(str(error))
    except ValueError as error:
        fail(f"--gamma_min, --gamma_max: {error}")


def write(args: argparse.Namespace) -> None:
    """Writes a table or a part of it; the last part to come puts them together."""
    K, num_points = args.vocab_size, 10**args.log10_num_points
    gammas = GammaRange(args.gamma_min, args.gamma_max)
    path = args.folder / f"vocab_{K}.npz"
    bounds = np.linspace(0, num_points, args.num_partitions + 1).round().astype(int)
    index = args.partition_index
    rows = slice(bounds[index], bounds[index + 1])
    table = build_table(K, gammas, num_points, rows)
    if args.num_partitions > 1:
        stem = f"{path.stem}.{num_points}_{gammas.low}_{gammas.high}"
        parts = [
            path.with_name(f"{stem}.part{i}of{args.num_partitions}.npy")
            for i in range(args.num_partitions)
        ]
        write_part(parts[index], table)
        if missing := [i for i, part in enumerate(parts) if not part.exists()]:
            say(f"{parts[index]}: part {index}; missing are {missing}")
            return
        table = join_parts(parts, table)
        for part in parts:
            part.unlink(missing_ok=True)
    write_table(path, table)
    read_table(str(path), "the table just written")
    say(f"{path}: {K} tokens, {num_points} gammas from {gammas.low} to {gammas.high}")
    say(f"to use it: algo.curriculum.integral_cache_path={path}")


def write_part(path: Path, table: Table) -> None:
    with whole_file(str(path)) as file:
        np.save(file, np.stack([table.pt, table.grad_pt]))


def join_parts(parts: list[Path], table: Table) -> Table:
    values = np.concatenate([np.load(part) for part in parts], axis=1)
    return table._replace(pt=values[0], grad_pt=values[1])


def report_suggestion(vocab_size: int, folder: Path) -> None:
    """Prints a range of gamma and draws alpha with it."""
    gammas = suggest_gammas(vocab_size)
    low, high = SUGGESTED_ALPHA
    title = f"alpha from {high} down to {low} for {vocab_size} tokens"
    table = RichTable("key", "value", title=title, min_width=len(title) + 2)
    table.add_row("algo.curriculum.gamma_min", f"{gammas.low:.2f}")
    table.add_row("algo.curriculum.gamma_max", f"{gammas.high:.2f}")
    path = folder / f"gamma_{vocab_size}.png"
    draw(vocab_size, gammas, path)
    console.print(table)
    say(f"plot: {path}")
    say("auto for either key means the same.")


def draw(vocab_size: int, gammas: GammaRange, path: Path) -> None:
    """A plot of alpha over gamma, with the suggested range shaded; PNG and PDF."""
    from report import style

    gamma = np.linspace(gammas.low - 2, gammas.high + 2, 400)
    P, _ = quadrature(gamma, vocab_size)
    low, high = SUGGESTED_ALPHA
    shaded = f"shaded: {gammas.low:.2f} to {gammas.high:.2f}, alpha in [{low}, {high}]"
    path.parent.mkdir(parents=True, exist_ok=True)
    with style.drawing() as pyplot:
        figure = pyplot.figure(figsize=(style.WIDTH, 3.6), layout="constrained")
        (axes,) = style.panels(figure, 1)
        axes.plot(gamma, (vocab_size * P - 1) / (vocab_size - 1), color=style.GREY)
        axes.axvspan(*gammas, alpha=0.15, color=style.COLOURS[0])
        axes.set(xlabel="gamma (log of noise to signal)", ylabel="alpha")
        style.title(figure, f"the operator of DUO for {vocab_size} tokens", shaded)
        style.save(figure, str(path.with_suffix("")))


def say(message: str) -> None:
    console.print(printable(message), soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
