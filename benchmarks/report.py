"""Writes a benchmark's numbers: tables on screen and in markdown, curves, JSON."""

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from report import style

# Columns of the cost of a train step, as those of TABLES.
STEP_COSTS = [
    ("case", "case", "{}"),
    ("B", "batch", "{}"),
    ("plain ms", "plain_ms", "{:.0f}"),
    ("ours ms", "ours_ms", "{:.0f}"),
    ("speed", "speed", "{:.1f} x"),
    ("plain, step MB", "plain_step_mb", "{:.0f}"),
    ("ours, step MB", "ours_step_mb", "{:.0f}"),
    ("plain MB", "plain_peak_mb", "{:.0f}"),
    ("ours MB", "ours_peak_mb", "{:.0f}"),
    ("plain largest batch", "plain_largest_batch", "{}"),
    ("ours largest batch", "ours_largest_batch", "{}"),
]

# Tables: title, the section of its rows, and columns as (heading, key, format).
TABLES = {
    "train": (
        "train step, speed",
        "train",
        [
            ("algorithm", "algorithm", "{}"),
            ("plain ms", "plain_ms", "{:.0f}"),
            ("ours ms", "ours_ms", "{:.0f}"),
            ("speed", "speed", "{:.2f} x"),
            ("plain tokens/s", "plain_tokens_per_s", "{:.0f}"),
            ("ours tokens/s", "ours_tokens_per_s", "{:.0f}"),
            ("plain use", "plain_mfu", "{:.0%}"),
            ("ours use", "ours_mfu", "{:.0%}"),
        ],
    ),
    "memory": (
        "train step, peak memory in MB",
        "train",
        [
            ("algorithm", "algorithm", "{}"),
            ("plain", "plain_peak_mb", "{:.0f}"),
            ("ours", "ours_peak_mb", "{:.0f}"),
            ("ours / plain", "memory", "{:.2f}"),
            ("plain, step", "plain_step_mb", "{:.0f}"),
            ("ours, step", "ours_step_mb", "{:.0f}"),
            ("ours / plain, step", "step_memory", "{:.2f}"),
            ("plain largest batch", "plain_largest_batch", "{}"),
            ("ours largest batch", "ours_largest_batch", "{}"),
        ],
    ),
    "evaluation": (
        "evaluation, tokens per second",
        "evaluation",
        [
            ("algorithm", "algorithm", "{}"),
            ("plain", "plain_tokens_per_s", "{:.0f}"),
            ("ours", "ours_tokens_per_s", "{:.0f}"),
            ("speed", "speed", "{:.2f} x"),
        ],
    ),
    "sampling": (
        "sampling, seconds per sequence",
        "sampling",
        [
            ("algorithm", "algorithm", "{}"),
            ("predictor", "predictor", "{}"),
            ("B", "batch", "{}"),
            ("L", "length", "{}"),
            ("steps", "steps", "{}"),
            ("plain s", "plain_s_per_sequence", "{:.3f}"),
            ("ours s", "ours_s_per_sequence", "{:.3f}"),
            ("speed", "speed", "{:.1f} x"),
        ],
    ),
    "sampling_memory": (
        "sampling, peak memory in MB",
        "sampling",
        [
            ("algorithm", "algorithm", "{}"),
            ("predictor", "predictor", "{}"),
            ("B", "batch", "{}"),
            ("L", "length", "{}"),
            ("plain, step", "plain_step_mb", "{:.0f}"),
            ("ours, step", "ours_step_mb", "{:.0f}"),
            ("plain", "plain_peak_mb", "{:.0f}"),
            ("ours", "ours_peak_mb", "{:.0f}"),
        ],
    ),
    "curriculum": (
        "soft inputs, train step",
        "curriculum",
        STEP_COSTS,
    ),
    "distillation": (
        "distillation, train step",
        "distillation",
        STEP_COSTS,
    ),
    "images": (
        "images of 32 x 32 pixels, U-Net without classes, per image",
        "images",
        [
            ("algorithm", "algorithm", "{}"),
            ("what", "what", "{}"),
            *STEP_COSTS[1:],
        ],
    ),
    "integral": (
        "the operator at 100 000 gammas (plain: adaptive quadrature, extrapolated "
        "from 40 points)",
        "integral",
        [
            ("K", "vocab_size", "{}"),
            ("ours, build ms", "build_ms", "{:.1f}"),
            ("ours, 1e5 points ms", "table_ms", "{:.0f}"),
            ("plain, ms per point", "plain_ms_per_point", "{:.2f}"),
            ("plain, 1e5 points s", "plain_s", "{:.0f}"),
            ("speed", "speed", "{:.0f} x"),
        ],
    ),
    "scaling": (
        "cost against size (B and L half of the above, but for the axis)",
        "scaling",
        [
            ("algorithm", "algorithm", "{}"),
            ("axis", "axis", "{}"),
            ("size", "size", "{}"),
            ("plain ms", "plain_ms", "{:.0f}"),
            ("ours ms", "ours_ms", "{:.0f}"),
            ("plain MB", "plain_mb", "{:.0f}"),
            ("ours MB", "ours_mb", "{:.0f}"),
        ],
    ),
    "processes": (
        "one and two gloo processes, one thread each, train step, tokens per second",
        "processes",
        [
            ("algorithm", "algorithm", "{}"),
            ("one", "one_tokens_per_s", "{:.0f}"),
            ("two", "two_tokens_per_s", "{:.0f}"),
            ("two / (2 x one)", "efficiency", "{:.0%}"),
        ],
    ),
    "loading": (
        "data loading, no worker processes",
        "loading",
        [("tokens per second", "tokens_per_s", "{:.0f}")],
    ),
}

NOTES = """\
`plain` is `plain.py`: dense, eager formulas, torch's default AdamW. `use` is the
arithmetic that a step needs over what the machine could do in that time. Memory is of
a process of its own: `plain` and `ours` all of it (on CUDA, all tensors), libraries,
weights, optimiser state and EMA included; `step` the tensors that a step adds to these.
"""


SIZES = (
    *("model", "length", "batch_size", "hidden_size", "blocks", "vocab_size"),
    *("precision", "compile", "loss_chunk", "sampling_steps", "rounds"),
    *("curriculum_batch", "image_batch", "channels", "image_levels", "res_blocks"),
)


def write(
    results: dict[str, list[dict[str, Any]]],
    args: argparse.Namespace,
    environment: dict[str, str],
) -> None:
    """Prints and saves what `bench.py` measured; other sections stay as they were."""
    setting = environment | {name: getattr(args, name) for name in SIZES}
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"{args.name}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    settings = before.get("settings", {}) | dict.fromkeys(results, setting)
    every = before.get("results", {}) | results
    lines = [f"# Benchmarks: {args.name}", "", described(setting), "", NOTES]
    for title, section, columns in TABLES.values():
        rows = every.get(section)
        if not rows:
            continue
        columns = [c for c in columns if any(c[1] in row for row in rows)]
        header = [heading for heading, *_ in columns]
        cells = [
            [form.format(row[key]) if key in row else "-" for _, key, form in columns]
            for row in rows
        ]
        if section in results:
            table = Table(*header, title=title)
            for row in cells:
                table.add_row(*row)
            Console().print(table)
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        other = settings[section].items() - setting.items()
        if other:
            lines += [f"Measured with {described(dict(sorted(other)))}.", ""]
        if any(key == "ours_mfu" for _, key, _ in columns):
            peak = "{peak_tflops:.3g} TFLOP/s ({peak_source})".format(**rows[0])
            lines += [f"The machine could do {peak}.", ""]
        rule = ["---"] * len(header)
        lines += ["| " + " | ".join(row) + " |" for row in [header, rule, *cells]]
        lines += [""]
    if every.get("scaling"):
        plot(every["scaling"], args)
        lines += [f"![cost against size]({args.name}.png)", ""]
    markdown = "\n".join(lines).rstrip() + "\n"
    (args.output / f"{args.name}.md").write_text(markdown)
    data = {"setting": setting, "settings": settings, "results": every}
    file.write_text(json.dumps(data, indent=1) + "\n")


def described(setting: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items())


def plot(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Time to the left, memory to the right, one row an axis, both logarithmic."""
    names = {
        "batch_size": "B, whole step",
        "length": "L, whole step",
        "vocab_size": "K, whole step",
        "loss_tokens": "B L, head and loss alone",
    }
    units = {"ms": "time (ms)", "mb": "memory that a step adds (MB)"}
    algorithms = dict.fromkeys(row["algorithm"] for row in rows)
    looks = style.looks(algorithms)
    with style.drawing() as pyplot:
        figure = pyplot.figure(figsize=(style.WIDTH, 11), layout="constrained")
        grid = style.panels(figure, len(names) * len(units))
        places = ((axis, unit) for axis in names for unit in units)
        for axes, (axis, unit) in zip(grid, places, strict=True):
            every: list[float] = []
            for algorithm in algorithms:
                own = [
                    r for r in rows if (r["algorithm"], r["axis"]) == (algorithm, axis)
                ]
                for variant in ("plain", "ours"):
                    key = f"{variant}_{unit}"
                    points = [(r["size"], max(r[key], 0.1)) for r in own if key in r]
                    x, y = zip(*points, strict=True) if points else ((), ())
                    draw = style.published if variant == "plain" else style.points
                    draw(axes, x, y, looks[algorithm])
                    every += y
            axes.set_ylabel(units[unit])
            style.numbers_axis(axes, "y", every)
            sizes = [r["size"] for r in rows if r["axis"] == axis]
            style.steps_axis(axes, sizes, names[axis])
        style.title(figure, f"cost of a train step against size: {args.name}")
        style.legend(figure, looks, [style.PLAIN])
        args.output.mkdir(parents=True, exist_ok=True)
        style.save(figure, str(args.output / args.name))
