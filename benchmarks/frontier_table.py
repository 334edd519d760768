"""Samplers at the entropy of held-out text, judged without a download:
`make frontier-table`.

Trains DUO, MDLM and AR on the documentation strings of Python's standard library, or
takes checkpoints of them, and draws samples by each sampler with several temperatures
and numbers of steps. The judge is a 5-gram model of the training data.

    python benchmarks/frontier_table.py [--checkpoints duo=FILE ...] [KEY=VALUE ...]

What is finished stays in --folder, and the same command goes on from there. KEY=VALUE
is given to every command.
"""

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.distill_table import MODELS  # noqa: E402
from benchmarks.runs import folder_of, run, table_parser  # noqa: E402

TRAINING = {
    "duo": MODELS["duo"].training,
    "mdlm": MODELS["mdlm"].training,
    "ar": ("experiment=demo", "algo=ar"),
}
TEMPERATURES = "sampling.temperature=0.8,1,1.15"
STEPS = "sampling.steps=8,16,64"
PSI = ("sampling.predictor=psi", "sampling.psi.middle_mode=constant-0.9", STEPS)


class Sampler(NamedTuple):
    model: str
    overrides: tuple[str, ...]


SAMPLERS = {
    "duo-ancestral": Sampler("duo", (STEPS,)),
    "duo-psi": Sampler("duo", PSI),
    # A step and a sweep are two evaluations of the network.
    "duo-gibbs": Sampler(
        "duo",
        (
            "sampling.steps=4,8,32",
            "sampling.corrector=gibbs",
            "sampling.corrector_parallel=8",
            "sampling.corrector_t_min=0.1",
        ),
    ),
    "mdlm-ancestral": Sampler("mdlm", (STEPS,)),
    "mdlm-psi": Sampler("mdlm", PSI),
    "mdlm-confidence": Sampler("mdlm", ("sampling.predictor=confidence", STEPS)),
    # These take about as many evaluations of the network as the steps above.
    "mdlm-entropy_bound": Sampler(
        "mdlm", ("sampling.predictor=entropy_bound", "sampling.gamma=20,8,0")
    ),
    "ar": Sampler("ar", ()),
}


def main() -> None:
    parser = table_parser(__doc__, "frontier-table")
    parser.add_argument(
        "--checkpoints",
        nargs="*",
        default=[],
        metavar="MODEL=FILE",
        help=f"of {', '.join(TRAINING)}; the others are trained",
    )
    args = parser.parse_args()
    given = dict(pair.partition("=")[::2] for pair in args.checkpoints)
    if unknown := given.keys() - TRAINING.keys():
        parser.error(f"--checkpoints: {', '.join(unknown)} is none of {list(TRAINING)}")
    folder = folder_of(args)
    with tqdm(total=len(SAMPLERS), desc="frontier-table") as bar:
        for name, sampler in SAMPLERS.items():
            bar.set_postfix_str(name)
            model, place = sampler.model, folder / "samples" / name
            if model not in given:
                own = f"hydra.run.dir={folder / model}"
                run(folder / model, *TRAINING[model], own, *args.overrides)
                given[model] = str(folder / model / "checkpoints/last.ckpt")
            run(
                place,
                *("-m", f"hydra.sweep.dir={place}", "experiment=demo_samples"),
                *(f"algo={'duo_base' if model == 'duo' else model}", TEMPERATURES),
                "sampling.noise_removal=ancestral",
                f"eval.checkpoint_path={Path(given[model]).absolute()}",
                *(*sampler.overrides, *args.overrides),
            )
            bar.update()
    report = folder / "report"
    run(
        report,
        *("mode=report", "report.table=frontier", f"report.path={report}"),
        f"report.runs=[{folder / 'samples'}]",
    )
    args.output.mkdir(parents=True, exist_ok=True)
    told = [
        f"{model} by `{' '.join(TRAINING[model])}`"
        if str(folder / model) in path
        else f"{model} given"
        for model, path in given.items()
    ]
    title, _, rest = (report / "report.md").read_text().partition("\n\n")
    made = f"Made by `make frontier-table`. Trained on docstrings: {'; '.join(told)}."
    text = "\n\n".join([title, made, rest.replace("(report.png)", "(frontier.png)")])
    (args.output / "frontier.md").write_text(text)
    shutil.copyfile(report / "report.png", args.output / "frontier.png")


if __name__ == "__main__":
    main()
