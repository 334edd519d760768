"""Shows where the time of a train step goes, by phase and by operator.

    make profile ARGS="--algorithm mdlm --length 256"

Phases are timed with the device waited for in between; the operator table is from
`torch.profiler`, which also writes a trace for https://ui.perfetto.dev.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import bench, cases, measure, plain  # noqa: E402
from models.device import keep_freed_memory  # noqa: E402
from report import style  # noqa: E402
from utils import register_resolvers  # noqa: E402


class Phases:
    """Seconds of each phase, summed over steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, with its time added to a phase."""

        def call(*args, **kwargs):
            result = []
            elapsed = measure.seconds(
                lambda: result.append(function(*args, **kwargs)), self.device
            )
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
            return result[0]

        return call


def time_phases(step: cases.OurStep, phases: Phases) -> None:
    """Has the parts of a train step timed, in place."""
    parts = [
        ("corrupt", step.model, "corrupt"),
        ("trunk, forward", step.model.backbone, "trunk"),
        ("head and loss, with gradients", step.model, "head_loss"),
        ("trunk, backward", step, "backward"),
        ("clip", step, "clip"),
        ("optimiser", step.optimizer, "step"),
        ("EMA", step.ema, "update"),
    ]
    for phase, owner, name in parts:
        if hasattr(owner, name):  # AR corrupts nothing
            setattr(owner, name, phases.timed(phase, getattr(owner, name)))


def operators(profile: torch.profiler.profile, where: str, rows: int = 15) -> Table:
    """The operators in which most time is spent, their callees not counted."""
    table = Table("operator", "ms", "calls", title=f"operators, {where} time")
    events = profile.key_averages()
    spent = {e.key: getattr(e, f"self_{where}_time_total") / 1000 for e in events}
    calls = {e.key: e.count for e in events}
    for name in sorted(spent, key=spent.get, reverse=True)[:rows]:
        table.add_row(name, f"{spent[name]:.1f}", str(calls[name]))
    return table


def draw(milliseconds: dict[str, float], title: str, stem: str) -> list[str]:
    """Where time goes, as STEM.png and STEM.pdf: a bar for each phase.

    Args:
        milliseconds: Of a step, by phase.
        title: What was timed.
        stem: Local or fsspec.

    Returns:
        The two paths.
    """
    with style.drawing() as pyplot:
        size = (style.WIDTH, 1.2 + 0.32 * len(milliseconds))
        figure = pyplot.figure(figsize=size, layout="constrained")
        (axes,) = style.panels(figure, 1)
        bars = axes.barh(
            list(milliseconds), list(milliseconds.values()), color=style.COLOURS[0]
        )
        axes.bar_label(bars, fmt=" {:.1f}")
        axes.margins(x=0.1)
        axes.invert_yaxis()
        axes.set(xlabel="time of a step (ms), waiting for each phase")
        style.title(figure, "where the time of a train step goes", title)
        return style.save(figure, stem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithm", choices=list(plain.NLL), default="duo_base")
    parser.add_argument("--trace", type=Path, help="where to write the trace")
    parser.add_argument("--picture", help="write the phases as STEM.png and STEM.pdf")
    chosen, argv = parser.parse_known_args()
    args = bench.parse(argv)
    register_resolvers()
    keep_freed_memory()
    model, x0 = cases.build(chosen.algorithm, args)
    step = cases.OurStep(model.train())
    step(x0)
    times = measure.alternate(
        {"step": lambda: step(x0)}, args.torch_device, args.rounds
    )
    with torch.profiler.profile() as profile:
        step(x0)
    phases = Phases(args.torch_device)
    time_phases(step, phases)
    for _ in range(args.rounds):
        step(x0)
    console = Console()
    table = Table("phase", "ms", "share", title=f"train step, {chosen.algorithm}")
    total = sum(phases.seconds.values())
    for name, spent in phases.seconds.items():
        table.add_row(name, f"{1000 * spent / args.rounds:.1f}", f"{spent / total:.0%}")
    table.add_section()
    table.add_row("sum of the phases", f"{1000 * total / args.rounds:.1f}", "")
    table.add_row("a step without waiting", f"{1000 * times['step']:.1f}", "")
    console.print(table)
    if chosen.picture:
        spent_of = {k: 1000 * x / args.rounds for k, x in phases.seconds.items()}
        what = f"{chosen.algorithm}; {args.device}"
        console.print("picture:", *draw(spent_of, what, chosen.picture))
    console.print(operators(profile, "device" if args.device == "cuda" else "cpu"))
    trace = chosen.trace or Path(tempfile.gettempdir()) / f"{chosen.algorithm}.json"
    profile.export_chrome_trace(str(trace))
    console.print(f"trace: {trace}")


if __name__ == "__main__":
    main()
