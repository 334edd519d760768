"""An iso-FLOP study of characters on a CPU, without a download: `make isoflop-table`.

Trains MDLM with the low-variance loss and DUO without curriculum on the documentation
strings of Python's standard library, for three budgets and several sizes each, and fits
the best size of each budget.

    python benchmarks/isoflop_table.py [--curves NAME ...] [KEY=VALUE ...]

What is finished stays in --folder, and the same command goes on from there. KEY=VALUE
is given to every run.
"""

import shutil
import sys
from pathlib import Path

from tqdm.auto import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.runs import folder_of, run, table_parser  # noqa: E402

# training.flops -> widths, around the best one, which is smaller for DUO.
SIZES = {"2.5e-7": "12,16,24,32", "5e-7": "16,24,32,48", "1e-6": "16,24,32,48,64"}
SMALLER = {"2.5e-7": "12,16,24", "5e-7": "12,16,24,32,48", "1e-6": "16,24,32"}
CURVES = {
    "mdlm-low_var": (SIZES, ("algo=mdlm", "algo.loss_type=low_var")),
    "duo_base": (SMALLER, ("algo=duo_base",)),
    "mdlm": (SIZES, ("algo=mdlm",)),
}


def main() -> None:
    parser = table_parser(__doc__, "isoflop-table")
    parser.add_argument(
        "--curves", nargs="+", choices=list(CURVES), default=list(CURVES)[:2]
    )
    args = parser.parse_args()
    folder = folder_of(args)
    sweeps = [(name, flops) for flops in SIZES for name in args.curves]
    for name, flops in tqdm(sweeps, "isoflop-table"):
        sizes, chosen = CURVES[name]
        place = folder / f"{name}-{flops}"
        run(
            place,
            *("-m", f"hydra.sweep.dir={place}", "experiment=toy_isoflop"),
            *(*chosen, f"training.flops={flops}"),
            *(f"model.hidden_size={sizes[flops]}", *args.overrides),
        )
    report = folder / "report"
    places = ",".join(str(folder / f"{name}-{flops}") for name, flops in sweeps)
    run(
        report,
        *("mode=report", "report.table=isoflop", f"report.path={report}"),
        f"report.runs=[{places}]",
    )
    args.output.mkdir(parents=True, exist_ok=True)
    title, _, rest = (report / "report.md").read_text().partition("\n\n")
    made = (
        "Made by `make isoflop-table`: `experiment=toy_isoflop`, two blocks, one seed."
    )
    text = "\n\n".join([title, made, rest.replace("(report.png)", "(isoflop.png)")])
    (args.output / "isoflop.md").write_text(text.replace(f"{folder}/", ""))
    shutil.copyfile(report / "report.png", args.output / "isoflop.png")


if __name__ == "__main__":
    main()
