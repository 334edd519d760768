"""Whether all of it works on this machine's GPU, and how fast: one command, 8 minutes,
no network.

    make check-gpu
    python benchmarks/check_gpu.py --device cpu --tiny    tries the check itself

Runs the tests marked gpu; of every algorithm of configs/algo a train step and an
evaluation at model=small, L = 1024, bf16, against the formulas of `plain.py`, samples
by every predictor, the largest batch; a compiled step; runs of the command line, one
with FSDP. Every part has a time limit of its own, and one that fails does not end the
others. Writes gpu.md and gpu.json beside this file. docs/gpu.md says what is needed.
"""

import argparse
import csv
import functools
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from benchmarks import bench, cases, measure, plain, plain_sampling  # noqa: E402
from benchmarks.check_page import markdown  # noqa: E402
from benchmarks.parts import (  # noqa: E402
    Failed,
    Note,
    Outcome,
    Part,
    Row,
    one_line,
    run_part,
    run_parts,
)
from models.device import keep_freed_memory  # noqa: E402
from models.flops import train_flops  # noqa: E402
from sampling.registry import SAMPLERS, build_sampler, samplers_of  # noqa: E402
from utils import register_resolvers  # noqa: E402

BUDGET = 460  # seconds of all parts, so that the whole takes less than 480
ALGORITHMS = tuple(sorted(path.stem for path in cases.CONFIGS.glob("algo/*.yaml")))
FIRST = ("mdlm", "duo_base", "ar")  # what matters most is checked first
COMPILED = ("mdlm", "duo_base")
MOST = 2048  # sequences, the largest batch that is tried
PLAIN_NLL = plain.NLL | {case.algorithm: case.nll for case in cases.TRAINING}
TINY = (
    *("--vocab-size", "40", "--length", "16", "--hidden-size", "16", "--blocks", "1"),
    *("--heads", "2", "--batch-size", "2", "--curriculum-batch", "2", "--rounds", "1"),
    *("--sampling-steps", "2", "--sample-batch", "2"),
)


# ---------------------------------------------------------------- an algorithm


def check_algorithm(name: str, args: argparse.Namespace, note: Note) -> None:
    """Speed and memory of a train step, an evaluation, samples; the largest batch last,
    because it takes longest."""
    variants = ("ours", "plain") if name in PLAIN_NLL else ("ours",)
    of_both = [("train step", check_step), ("evaluation", check_evaluation)]
    checks: list[tuple[str, Callable[[], None]]] = [
        *each(of_both, variants, name, args, note),
        ("samples", functools.partial(check_samples, name, args, note)),
        *each([("largest batch", check_largest)], variants, name, args, note),
    ]
    reasons: dict[str, list[str]] = {}
    for what, check in checks:
        try:
            check()
        except torch.OutOfMemoryError as error:
            if not what.endswith("plain"):
                reasons.setdefault(one_line(error), []).append(what)
            note("too_large", {"algorithm": name, "what": what})
        except Exception as error:
            reasons.setdefault(one_line(error), []).append(what)
            traceback.print_exc()
        finally:
            release(args)  # what a failure has left
    if reasons:
        lines = [f"{'; '.join(what)}: {reason}" for reason, what in reasons.items()]
        raise Failed(". ".join(lines))


def each(
    checks: list[tuple[str, Callable[..., None]]],
    variants: tuple[str, ...],
    name: str,
    *rest: Any,
) -> list[tuple[str, Callable[[], None]]]:
    """Checks of every variant, with what they are called."""
    return [
        (f"{what}, {variant}", functools.partial(check, name, variant, *rest))
        for what, check in checks
        for variant in variants
    ]


def make_step(
    name: str, variant: str, args: argparse.Namespace
) -> tuple[Callable[[], object], Any, torch.Tensor]:
    """A train step, its model, its ids."""
    model, x0 = cases.build(name, args, batch_size=batch_of(name, args))
    return cases.update_of(model.train(), x0, variant, PLAIN_NLL.get(name)), model, x0


def batch_of(name: str, args: argparse.Namespace) -> int:
    return args.batch_size if name in plain.NLL else args.curriculum_batch


def check_step(name: str, variant: str, args: argparse.Namespace, note: Note) -> None:
    step, model, x0 = make_step(name, variant, args)
    row: Row = {"algorithm": name, "variant": variant, "batch": len(x0)}
    times = measure.alternate({"step": step}, args.torch_device, args.rounds, 3)
    row["tokens_per_s"] = x0.numel() / times["step"]
    row["ms"] = 1000 * times["step"]
    row["peak_gb"] = measure.peak_memory(step, args.torch_device)["peak"] / 1024
    if name in plain.NLL:
        scored = cases.scored_tokens(name, model, x0)
        tokens = cases.trunk_tokens(name, x0)
        flops = train_flops(model.backbone, tokens, scored, args.length)
        row["mfu"] = flops / times["step"] / 1e12 / args.peak_tflops
    note("train", row)
    weights = torch.stack([p.detach().isfinite().all() for p in model.parameters()])
    if not bool(weights.all()):
        raise Failed("weights are not finite after a few updates")
    del step, model
    release(args)


def check_evaluation(
    name: str, variant: str, args: argparse.Namespace, note: Note
) -> None:
    model, x0 = cases.build(name, args, batch_size=batch_of(name, args))
    step = cases.evaluation_of(model, x0, variant, PLAIN_NLL.get(name))
    times = measure.alternate({"step": step}, args.torch_device, args.rounds, 2)
    row: Row = {"algorithm": name, "variant": variant, "batch": len(x0)}
    row["tokens_per_s"] = x0.numel() / times["step"]
    row["ms"] = 1000 * times["step"]
    note("evaluation", row)
    del step, model
    release(args)


def check_samples(name: str, args: argparse.Namespace, note: Note) -> None:
    """By every predictor that fits, and by the plain way of one."""
    model, _ = cases.build(name, args)
    model.eval()
    if not model.is_autoregressive:  # AR has no steps, and warms up as it goes
        model.generate_samples(args.sample_batch, num_steps=1)
    for predictor in SAMPLERS:
        if not any(sampler.fits(type(model)) for sampler in samplers_of(predictor)):
            continue
        config = cases.compose(f"algo={name}", f"sampling.predictor={predictor}")
        model.sampler = build_sampler(config, type(model))
        draw = functools.partial(model.generate_samples, args.sample_batch)
        note("sampling", sampled(name, predictor, "ours", model, draw, args))
    if name in plain.NLL and not model.is_autoregressive:
        predictor = "analytic" if model.has_score else "ancestral"
        draw = functools.partial(
            plain_sampling.sample, predictor, model, args.sample_batch
        )
        note("sampling", sampled(name, predictor, "plain", model, draw, args))
    del model, draw
    release(args)


def sampled(
    name: str,
    predictor: str,
    variant: str,
    model: Any,
    draw: Callable[..., Any],
    args: argparse.Namespace,
) -> Row:
    """A row of the table of samples; ids of which one is none fail."""
    found: list[Any] = []
    seconds = measure.seconds(
        lambda: found.append(draw(num_steps=args.sampling_steps)), args.torch_device
    )
    tokens = found[0].tokens if variant == "ours" else found[0]
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < model.vocab_size:
        raise Failed(f"{predictor} drew ids that are no tokens")
    row: Row = {"algorithm": name, "predictor": predictor, "variant": variant}
    row |= {"batch": len(tokens), "steps": args.sampling_steps, "seconds": seconds}
    if variant == "ours":
        row["evaluations"] = round(float(found[0].evaluations.float().mean()), 1)
    return row


def check_largest(
    name: str, variant: str, args: argparse.Namespace, note: Note
) -> None:
    """The largest batch that trains, as two smaller ones foretell it, tried."""
    small = max(1, batch_of(name, args) // 4)
    model, _ = cases.build(name, args, batch_size=small)
    update = cases.updater_of(model.train(), variant, PLAIN_NLL.get(name))

    def step(size: int) -> None:
        loader = model.config.loader
        loader.global_batch_size = loader.batch_size = size
        shape = (size, args.length)
        update(torch.randint(args.vocab_size, shape, device=args.device))

    def peak(size: int) -> float:
        return measure.peak_memory(lambda: step(size), args.torch_device)["peak"]

    def fits(size: int) -> bool:
        try:
            step(size)
            step(size)
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad()
            release(args)
        return True

    step(small)  # the state of the optimiser is there
    peaks = peak(small), peak(2 * small)
    release(args)
    slope = max((peaks[1] - peaks[0]) / small, 1e-6)  # MB a sequence
    guess = small + int((total_memory(args) - peaks[0]) / slope)
    most = MOST if args.device == "cuda" else 8  # of a host that gives ever more
    row: Row = {"algorithm": name, "variant": variant}
    note("train", row | {"largest_batch": largest_batch(fits, min(guess, most))})


def total_memory(args: argparse.Namespace) -> float:
    """MB that tensors can have: what is free, and what torch holds."""
    if args.device != "cuda":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    free, _ = torch.cuda.mem_get_info(args.torch_device)
    return (free + torch.cuda.memory_reserved(args.torch_device)) / 2**20


def largest_batch(fits: Callable[[int], bool], guess: int) -> int:
    """A multiple of 8 near the guess, or below 8 any number, that fits; 0: none."""
    guess = max(guess, 1)
    tried = set()
    for share in (1.0, 0.95, 0.9, 0.8, 0.6):
        size = int(guess * share)
        size = size // 8 * 8 or max(size, 1)
        if size not in tried and fits(size):
            return size
        tried.add(size)
    return 0


def release(args: argparse.Namespace) -> None:
    if args.torch_device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- other parts


def check_environment(args: argparse.Namespace, note: Note) -> None:
    """The machine and its versions, as one row."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Failed(
            "no CUDA device is visible; `--device cpu --tiny` tries the check itself"
        )
    peak, source = measure.peak_flops(args.torch_device, args.precision)
    row: Row = measure.environment(args.torch_device)
    row |= {"transformers": transformers.__version__, "os": platform.platform()}
    row |= {"peak_tflops": round(peak, 3), "peak_source": source}
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(args.torch_device)
        row |= {
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 2**30, 1),
            "bf16": torch.cuda.is_bf16_supported(),
        }
    note("environment", row)


def gpu_tests() -> list[str]:
    """Files with tests that are marked gpu; the others may need more packages."""
    files = (ROOT / "tests").rglob("test_*.py")
    return sorted(
        str(file.relative_to(ROOT))
        for file in files
        if re.search(r"^(@|    )?pytest\.mark\.gpu", file.read_text(), re.M)
    )


def check_tests(args: argparse.Namespace, note: Note) -> None:
    options = ("-m", "gpu", "-rf", "-p", "no:cacheprovider", "--tb=line")
    command = [sys.executable, "-m", "pytest", *options, *gpu_tests()]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout[-3000:], flush=True)
    lines = done.stdout.strip().splitlines()
    summary = lines[-1].strip("= ") if lines else "nothing was printed"
    note("tests", {"summary": summary})
    if done.returncode not in (0, 5) or (
        args.device == "cuda" and "passed" not in summary
    ):
        failed = [x for x in lines if x.startswith(("FAILED", "ERROR"))]
        raise Failed("; ".join([summary, *failed[:3]]))


def check_compile(args: argparse.Namespace, note: Note) -> None:
    """A train step with blocks and token loss compiled, beside one without."""
    for name in COMPILED:
        for compiled in (False, True):
            kinds = {**vars(args), "compile": compiled, "loss_compile": compiled}
            start = time.monotonic()
            step, _, x0 = make_step(name, "ours", argparse.Namespace(**kinds))
            step(), measure.synchronize(args.torch_device)
            first = time.monotonic() - start
            times = measure.alternate({"step": step}, args.torch_device, args.rounds, 3)
            row: Row = {"algorithm": name, "compiled": compiled, "batch": len(x0)}
            row |= {"seconds": first, "ms": 1000 * times["step"]}
            row["tokens_per_s"] = x0.numel() / times["step"]
            note("compile", row)
            del step
            release(args)


def check_run(strategy: str, args: argparse.Namespace, note: Note) -> None:
    """Trains by the command line, and goes on from the checkpoint.

    With shards on two devices where there are two, else on one, which runs the same
    code with nothing to send.
    """
    devices = 1
    if strategy == "fsdp":
        devices = min(2, torch.cuda.device_count()) if args.device == "cuda" else 2
    config = (
        *("algo=mdlm", "data=synthetic", f"strategy={strategy}"),
        f"trainer.devices={devices}",
        *(f"model={args.model}", f"model.length={args.length}"),
        *(f"model.hidden_size={args.hidden_size}", f"model.n_blocks={args.blocks}"),
        *(f"model.n_heads={args.heads}", f"trainer.accelerator={args.device}"),
        *(f"trainer.precision={args.precision}", "training.loss_compile=False"),
        f"loader.global_batch_size={args.batch_size}",
        f"loader.eval_global_batch_size={args.batch_size}",
        *("loader.num_workers=0", f"data.num_train={16 * args.batch_size}"),
        *(f"data.num_valid={2 * args.batch_size}", "trainer.val_check_interval=4"),
        *("eval.generate_samples=False", "hydra.run.dir=run"),
    )
    start = time.monotonic()
    row: Row = {"strategy": strategy, "devices": devices}
    with tempfile.TemporaryDirectory() as folder:
        for updates, result in ((4, "trained"), (8, "trained and resumed")):
            main(folder, *config, f"trainer.max_steps={updates}")
            row |= {"result": result, "updates": updates}
            row["seconds"] = time.monotonic() - start
            note("runs", row | {"nll": last_nll(Path(folder))})


def main(folder: str, *overrides: str) -> None:
    """`main.py`, in a folder.

    Raises:
        Failed: With the last line of what it said.
    """
    command = [sys.executable, str(ROOT / "main.py"), *overrides]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    print(done.stdout[-1500:], done.stderr[-1500:], flush=True)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["nothing"]
        raise Failed(f"main.py ended with {done.returncode}: {lines[-1]}")


def last_nll(folder: Path) -> float:
    """What the last validation of a run found, nats a token."""
    logs = sorted(folder.glob("run/csv/*/metrics.csv"))
    with open(logs[-1]) as file:
        found = [float(x) for row in csv.DictReader(file) if (x := row.get("val/nll"))]
    if not found or not math.isfinite(found[-1]):
        raise Failed("val/nll is not finite")
    return found[-1]


# ---------------------------------------------------------------- all of it


def parts_of(args: argparse.Namespace) -> list[Part]:
    """In the order in which they matter, should the time not be enough."""
    order = [*FIRST, *(x for x in ALGORITHMS if x not in FIRST)]
    algorithms = [
        Part(x, functools.partial(check_algorithm, x, args), 50) for x in order
    ]
    parts = [
        Part("tests", functools.partial(check_tests, args), 100),
        *algorithms[:2],
        Part("run", functools.partial(check_run, "ddp", args), 60),
        Part("fsdp", functools.partial(check_run, "fsdp", args), 60),
        Part("compile", functools.partial(check_compile, args), 90),
        *algorithms[2:],
    ]
    names = {part.name for part in parts}
    if unknown := sorted({*args.parts} - names):
        raise SystemExit(f"unknown: {', '.join(unknown)}; parts: {', '.join(names)}.")
    return [part for part in parts if not args.parts or part.name in args.parts]


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of `bench.py` at the sizes of this check, and its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="sizes that measure nothing"
    )
    parser.add_argument("--parts", nargs="+", default=[], help="those alone")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of all")
    parser.add_argument("--output", type=Path, help="folder; here, if nothing is small")
    own = parser.parse_args(argv)
    is_whole = own.device == "cuda" and not own.tiny
    default = HERE if is_whole else ROOT / "outputs" / "check_gpu"
    sizes = ["--rounds", "5", "--curriculum-batch", "8", *(TINY if own.tiny else ())]
    args = bench.parse(
        ["--device", own.device, "--no-compile", "--loss-compile", "False", *sizes]
    )
    for name in ("tiny", "parts", "budget"):
        setattr(args, name, getattr(own, name))
    args.output = own.output or default
    return args


def write(
    args: argparse.Namespace, environment: Row, outcomes: list[Outcome], seconds: float
) -> None:
    """After every part, so that what ends this process leaves the rest."""
    args.output.mkdir(parents=True, exist_ok=True)
    text = markdown(environment, outcomes, seconds)
    (args.output / "gpu.md").write_text(text)
    parts = [outcome._asdict() for outcome in outcomes]
    data = {"environment": environment, "seconds": seconds, "parts": parts}
    (args.output / "gpu.json").write_text(json.dumps(data, indent=1) + "\n")


def check(argv: list[str]) -> int:
    args = parse(argv)
    parts = parts_of(args)
    register_resolvers()
    keep_freed_memory()
    start = time.monotonic()
    first = run_part(
        Part("environment", functools.partial(check_environment, args), 60)
    )
    if first.failure:
        print(first.failure, file=sys.stderr)
        return 2
    (environment,) = first.rows["environment"]
    args.peak_tflops = environment["peak_tflops"]
    outcomes: list[Outcome] = []
    for outcome in run_parts(parts, args.budget - (time.monotonic() - start)):
        outcomes.append(outcome)
        print(f"{outcome.name}: {outcome.failure or 'fine'} ({outcome.seconds:.0f} s)")
        write(args, environment, outcomes, time.monotonic() - start)
    print(f"{args.output / 'gpu.md'}")
    return int(any(outcome.failure for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(check(sys.argv[1:]))
