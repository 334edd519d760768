"""Times training, evaluation and sampling of every algorithm, ours against `plain.py`.

    make bench          this machine's CPU, minutes
    make bench-gpu      a CUDA device: model=small, L = 1024, bf16
    make bench ARGS="--sections train --algorithms mdlm --vocab-size 30522"

Both variants run in one process and take turns. Writes <name>.md, <name>.json and
<name>.png beside this file.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import cases, measure, plain, plain_curriculum, report  # noqa: E402
from data.tokenizers import get_tokenizer  # noqa: E402
from dataloader import DataModule  # noqa: E402
from integral.tables import build_table  # noqa: E402
from integral.transform import GammaRange, Spectral  # noqa: E402
from models.device import keep_freed_memory  # noqa: E402
from models.flops import train_flops  # noqa: E402
from sampling.registry import SAMPLERS  # noqa: E402
from utils import register_resolvers  # noqa: E402

VARIANTS = ("plain", "ours")
Maker = Callable[..., Callable[[], object]]
SETTINGS = {  # of the two make targets
    "cpu": {
        "model": "tiny",
        "length": 128,
        "batch_size": 8,
        "hidden_size": 256,
        "blocks": 4,
        "heads": 4,
        "rounds": 5,
        "sampling_steps": 32,
        "sampling_rounds": 2,
        "sample_batch": 2,
        "curriculum_batch": 4,
        "channels": 32,
        "image_levels": 3,
        "res_blocks": 1,
        "image_batch": 4,
        "precision": "32",
    },
    "cuda": {
        "model": "small",
        "length": 1024,
        "batch_size": 32,
        "hidden_size": 768,
        "blocks": 12,
        "heads": 12,
        "rounds": 10,
        "sampling_steps": 32,
        "sampling_rounds": 3,
        "sample_batch": 8,
        "curriculum_batch": 32,
        "channels": 128,
        "image_levels": 4,
        "res_blocks": 2,
        "image_batch": 128,
        "precision": "bf16",
    },
}


# ---------------------------------------------------------------- sections


def compare(
    make: Maker,
    name: str,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Seconds of both variants. A GPU holds one of them at a time."""
    if args.device == "cpu":
        steps = {variant: make(name, variant, args) for variant in VARIANTS}
        return measure.alternate(steps, args.torch_device, args.rounds)
    times = {}
    for variant in VARIANTS:
        step = make(name, variant, args)
        times |= measure.alternate({variant: step}, args.torch_device, args.rounds, 3)
        del step
        torch.cuda.empty_cache()
    return times


def run_train(args: argparse.Namespace) -> list[dict]:
    """Train step: speed, memory in a process of its own, utilisation."""
    peak, source = measure.peak_flops(args.torch_device, args.precision)
    rows = []
    for name in tqdm(args.algorithms, "train"):
        row = {"algorithm": name, "peak_tflops": peak, "peak_source": source}
        times = compare(cases.train_step, name, args)
        model, x0 = cases.build(name, args)
        scored = cases.scored_tokens(name, model, x0)
        tokens = cases.trunk_tokens(name, x0)
        flops = train_flops(model.backbone, tokens, scored, args.length)
        del model
        for variant in VARIANTS:
            row[f"{variant}_ms"] = 1000 * times[variant]
            row[f"{variant}_tokens_per_s"] = x0.numel() / times[variant]
            row[f"{variant}_mfu"] = flops / times[variant] / 1e12 / peak
            memory = in_own_process("memory", name, variant, args)
            row |= {f"{variant}_{key}_mb": value for key, value in memory.items()}
            if args.device == "cuda":
                row[f"{variant}_largest_batch"] = in_own_process(
                    "largest-batch", name, variant, args
                )
        row["speed"] = times["plain"] / times["ours"]
        row["memory"] = row["ours_peak_mb"] / row["plain_peak_mb"]
        row["step_memory"] = row["ours_step_mb"] / row["plain_step_mb"]
        rows.append(row)
    return rows


def run_evaluation(args: argparse.Namespace) -> list[dict]:
    rows = []
    for name in tqdm(args.algorithms, "evaluation"):
        times = compare(cases.evaluation, name, args)
        tokens = args.batch_size * args.length
        row = {f"{v}_tokens_per_s": tokens / times[v] for v in VARIANTS}
        rows.append({"algorithm": name, **row, "speed": times["plain"] / times["ours"]})
    return rows


def run_sampling(args: argparse.Namespace) -> list[dict]:
    """Every predictor: seconds a sequence, memory in a process of its own."""
    rows = []
    chosen = [
        case
        for case in cases.SAMPLING
        if case.algorithm in args.algorithms and case.predictor in args.predictors
    ]
    for case in tqdm(chosen, "sampling"):
        steps = {variant: cases.sampling(case, variant, args) for variant in VARIANTS}
        for variant in VARIANTS:
            cases.sampling(case, variant, args, num_steps=1)()  # warms up
        times = measure.alternate(steps, args.torch_device, args.sampling_rounds, 0)
        batch = case.batch or args.sample_batch
        row = {"algorithm": case.algorithm, "predictor": case.predictor}
        row |= {"batch": batch, "steps": case.num_steps(args)}
        row["length"] = case.length * args.length
        for variant in VARIANTS:
            row[f"{variant}_s_per_sequence"] = times[variant] / batch
            index = str(cases.SAMPLING.index(case))
            memory = in_own_process("sampling-memory", index, variant, args)
            row |= {f"{variant}_{key}_mb": value for key, value in memory.items()}
        row["speed"] = times["plain"] / times["ours"]
        rows.append(row)
    return rows


def run_curriculum(
    args: argparse.Namespace, chosen: tuple = cases.CURRICULUM
) -> list[dict]:
    """Train steps with soft inputs, or those of distillations."""
    rows = []
    for case in tqdm(chosen, "train"):
        index = cases.TRAINING.index(case)
        times = compare(cases.curriculum_step, str(index), args)
        row = {"case": case.label, "batch": args.curriculum_batch}
        for variant in VARIANTS:
            row[f"{variant}_ms"] = 1000 * times[variant]
            memory = in_own_process("curriculum-memory", str(index), variant, args)
            row |= {f"{variant}_{key}_mb": value for key, value in memory.items()}
            if args.device == "cuda":
                row[f"{variant}_largest_batch"] = in_own_process(
                    "curriculum-largest-batch", str(index), variant, args
                )
        row["speed"] = times["plain"] / times["ours"]
        rows.append(row)
    return rows


def run_images(args: argparse.Namespace) -> list[dict]:
    """A U-Net: its train step, its head and loss alone, samples."""
    rows = []
    for name in tqdm(cases.IMAGE_ALGORITHMS, "images"):
        for what, make in IMAGES.items():
            row = {"algorithm": name, "what": what, "batch": args.image_batch}
            times = compare(make, name, args)
            for variant in VARIANTS:
                row[f"{variant}_ms"] = 1000 * times[variant] / args.image_batch
                memory = in_own_process(f"images-{what}", name, variant, args)
                row |= {f"{variant}_{key}_mb": value for key, value in memory.items()}
                if args.device == "cuda" and what == "train step":
                    row[f"{variant}_largest_batch"] = in_own_process(
                        "images-largest-batch", name, variant, args
                    )
            row["speed"] = times["plain"] / times["ours"]
            rows.append(row)
    return rows


IMAGES: dict[str, Maker] = {
    "train step": cases.image_step,
    "head and loss": cases.image_loss,
    "samples": cases.image_samples,
}


def run_integral(args: argparse.Namespace) -> list[dict]:
    """The operator at 1e5 gammas; adaptive quadrature at few of them, extrapolated."""
    rows, gammas, num_points = [], GammaRange(-5, -1), 100_000
    for K in tqdm((35, 30522, 50258, 300_000), "integral"):
        cpu = torch.device("cpu")
        build = lambda K=K: Spectral(K, gammas)  # noqa: E731
        table = lambda K=K: build_table(K, gammas, num_points)  # noqa: E731
        few = np.linspace(*gammas, 40)

        def points(K: int = K, few: np.ndarray = few) -> None:
            for gamma in few:
                plain_curriculum.operator_at(gamma, K)

        steps = {"build": build, "table": table, "points": points}
        times = measure.alternate(steps, cpu, args.rounds)
        per_point = times["points"] / len(few)
        rows.append(
            {
                "vocab_size": K,
                "build_ms": 1000 * times["build"],
                "table_ms": 1000 * times["table"],
                "plain_ms_per_point": 1000 * per_point,
                "plain_s": per_point * num_points,
                "speed": per_point * num_points / times["table"],
            }
        )
    return rows


def run_scaling(args: argparse.Namespace) -> list[dict]:
    """Cost of a train step, and of head and loss alone, along one size at a time."""
    B, L, K = args.batch_size // 2, args.length // 2, args.scaling_vocab_size
    base = {"batch_size": B, "length": L, "vocab_size": K}
    axes = {
        "batch_size": [B // 4, B // 2, B, 2 * B, 4 * B],
        "length": [L // 2, L, 2 * L, 4 * L, 8 * L],
        "vocab_size": [K // 8, K // 4, K // 2, K, 2 * K, 4 * K],
        "loss_tokens": [B * L * 2**power for power in range(6)],
    }
    points = [
        (name, axis, size)
        for name in args.scaling_algorithms
        for axis, sizes in axes.items()
        for size in sizes
    ]
    return [scaling_point(args, base, *p) for p in tqdm(points, "scaling")]


def scaling_point(
    args: argparse.Namespace, base: dict[str, int], name: str, axis: str, size: int
) -> dict:
    make, sizes = cases.train_step, {**base, axis: size}
    if axis == "loss_tokens":
        make, sizes = cases.loss_alone, {**base, "batch_size": size // base["length"]}
    row = {"algorithm": name, "axis": axis, "size": size}
    for variant in VARIANTS:
        try:
            step = make(name, variant, args, **sizes)
            step()
            memory = measure.peak_memory(step, args.torch_device)
            times = measure.alternate({variant: step}, args.torch_device, 3, warmup=0)
        except torch.OutOfMemoryError:
            continue  # the curve ends here
        row[f"{variant}_ms"] = 1000 * times[variant]
        row[f"{variant}_mb"] = memory["step"]
    return row


def run_processes(args: argparse.Namespace) -> list[dict]:
    """Tokens per second of one process and of two under DDP, one thread each."""
    rows = []
    for name in tqdm(args.scaling_algorithms, "processes"):
        one, two = (
            in_own_process(f"processes-{num}", name, "ours", args) for num in (1, 2)
        )
        row = {"one_tokens_per_s": one, "two_tokens_per_s": two}
        rows.append({"algorithm": name, **row, "efficiency": two / (2 * one)})
    return rows


def run_loading(args: argparse.Namespace) -> list[dict]:
    """Tokens per second that the data module delivers, without worker processes."""
    config = cases.compose(
        "data=synthetic",
        "data.vocab_size=256",
        f"model={args.model}",
        f"model.length={args.length}",
        f"loader.global_batch_size={args.batch_size}",
        f"trainer.accelerator={args.device}",
        "loader.num_workers=0",
    )
    data = DataModule(config, get_tokenizer(config), None)
    data.load("train")
    batches = iter(data.train_dataloader())
    next(batches)

    def fetch() -> None:
        for _ in range(20):
            next(batches)

    elapsed = measure.seconds(fetch, args.torch_device)
    return [{"tokens_per_s": 20 * args.batch_size * args.length / elapsed}]


SECTIONS = {
    "train": run_train,
    "evaluation": run_evaluation,
    "sampling": run_sampling,
    "curriculum": run_curriculum,
    "distillation": functools.partial(run_curriculum, chosen=cases.DISTILLATION),
    "images": run_images,
    "integral": run_integral,
    "scaling": run_scaling,
    "processes": run_processes,
    "loading": run_loading,
}


# ---------------------------------------------------------------- own processes


def in_own_process(task: str, name: str, variant: str, args: argparse.Namespace):
    command = [sys.executable, __file__, *args.argv, "--task", task, name, variant]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def own_memory(
    name: str, variant: str, args: argparse.Namespace, make: Maker = cases.train_step
) -> dict[str, float]:
    step = make(name, variant, args)
    step()
    return measure.peak_memory(step, args.torch_device)


def own_sampling_memory(
    index: str, variant: str, args: argparse.Namespace
) -> dict[str, float]:
    """Of a few steps: memory does not depend on their number."""
    step = cases.sampling(cases.SAMPLING[int(index)], variant, args, num_steps=3)
    return measure.peak_memory(step, args.torch_device)


def own_largest_batch(
    name: str, variant: str, args: argparse.Namespace, make: Maker = cases.train_step
) -> int:
    """The largest multiple of 8 that trains without running out of memory."""

    def fits(size: int) -> bool:
        try:
            step = make(name, variant, args, batch_size=size)
            step(), step()
        except torch.OutOfMemoryError:
            return False
        finally:
            step = None
            torch.cuda.empty_cache()
        return True

    low, high = 0, 8
    while fits(high) and high < 2048:
        low, high = high, 2 * high
    while high - low > 8:
        middle = (low + high) // 16 * 8
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def own_processes(num: int, name: str, args: argparse.Namespace) -> float:
    """Tokens per second of `num` gloo processes together, one thread each."""
    return sum(spawned(_rank, num, name, args.argv))


def spawned(function: Callable[..., None], num: int, *inputs: object) -> list:
    """What `num` processes append to a list that all of them share.

    Args:
        function: Called in each with rank, num, the inputs, the address for `meet`,
            and the list.
        num: Of processes.
        inputs: The same for all.
    """
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        found = manager.list()
        address = f"file://{folder}/meet"
        torch.multiprocessing.spawn(function, (num, *inputs, address, found), num)
        return list(found)


def meet(rank: int, num: int, address: str) -> None:
    """Makes this process, of one thread, one of `num` that gloo connects."""
    register_resolvers()
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=num
    )


def _rank(
    rank: int, num: int, name: str, argv: list[str], address: str, speeds: list
) -> None:
    args = parse(argv)
    meet(rank, num, address)
    model, x0 = cases.build(name, args)
    step = cases.OurStep(model.train(), DistributedDataParallel)
    torch.distributed.barrier()
    times = measure.alternate(
        {"ours": lambda: step(x0)}, args.torch_device, args.rounds
    )
    speeds.append(x0.numel() / times["ours"])
    torch.distributed.destroy_process_group()


TASKS = {
    "memory": own_memory,
    "sampling-memory": own_sampling_memory,
    "largest-batch": own_largest_batch,
    "curriculum-memory": functools.partial(own_memory, make=cases.curriculum_step),
    "curriculum-largest-batch": functools.partial(
        own_largest_batch, make=cases.curriculum_step
    ),
    **{
        f"images-{what}": functools.partial(own_memory, make=make)
        for what, make in IMAGES.items()
    },
    "images-largest-batch": functools.partial(own_largest_batch, make=cases.image_step),
    "processes-1": lambda name, variant, args: own_processes(1, name, args),
    "processes-2": lambda name, variant, args: own_processes(2, name, args),
}


# ---------------------------------------------------------------- command line


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(SETTINGS), default="cpu")
    device = parser.parse_known_args(argv)[0].device
    for key, value in SETTINGS[device].items():
        flag = f"--{key.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value)
    parser.add_argument("--vocab-size", type=int, default=50257, help="without mask")
    parser.add_argument("--algorithms", nargs="+", default=list(plain.NLL))
    parser.add_argument("--predictors", nargs="+", default=list(SAMPLERS))
    parser.add_argument("--scaling-algorithms", nargs="+", default=["mdlm", "duo_base"])
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS))
    compiles = argparse.BooleanOptionalAction
    parser.add_argument("--compile", action=compiles, default=device == "cuda")
    parser.add_argument("--loss-compile", default="auto", help="auto, True or False")
    parser.add_argument("--loss-chunk", default="auto", help="auto, a number or null")
    parser.add_argument("--scaling-vocab-size", type=int, default=16384)
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--name", default=device, help="of the files written")
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv = argv
    args.torch_device = torch.device(args.device)
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    register_resolvers()
    keep_freed_memory()
    if args.task:
        task, name, variant = args.task
        print(json.dumps(TASKS[task](name, variant, args)))
        return
    unknown = {*args.algorithms, *args.scaling_algorithms} - {*plain.NLL}
    unknown |= {*args.sections} - {*SECTIONS}
    if unknown:
        raise SystemExit(
            f"unknown: {', '.join(sorted(unknown))}. Algorithms: "
            f"{', '.join(plain.NLL)}; sections: {', '.join(SECTIONS)}."
        )
    results = {name: SECTIONS[name](args) for name in args.sections}
    report.write(results, args, measure.environment(args.torch_device))


if __name__ == "__main__":
    main()
