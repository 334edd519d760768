"""Whether a change made steps slower: this tree beside another checkout, taking turns.

    git worktree add ../before COMMIT
    python benchmarks/compare.py ../before

Each tree is a process of its own with its own code and benchmarks. The steps are those
of `make bench`: an update and an evaluation of every algorithm, and samples. Prints
and writes compare.md: milliseconds of both, and their ratio. Run it on a machine that
does nothing else.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import IO, cast

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from report.formats import markdown  # noqa: E402

# What runs in a tree: reads the names of steps, answers with seconds.
WORKER = """
import json, sys
from pathlib import Path
sys.path.insert(0, str(Path.cwd()))
from benchmarks import bench, cases, measure
from models.device import keep_freed_memory
from utils import register_resolvers
args = bench.parse(json.loads(sys.argv[1]))
register_resolvers()
keep_freed_memory()
made = {}
def make(section, name):
    if section == "update":
        return cases.train_step(name, "ours", args)
    if section == "evaluation":
        return cases.evaluation(name, "ours", args)
    case = next(x for x in cases.SAMPLING if f"{x.algorithm} {x.predictor}" == name)
    return cases.sampling(case, "ours", args)
print(json.dumps(measure.environment(args.torch_device)), flush=True)
for line in sys.stdin:
    key = tuple(json.loads(line))
    if key not in made:
        made.clear()
        made[key] = make(*key)
        made[key]()
    print(measure.seconds(made[key], args.torch_device), flush=True)
"""
STEPS = [
    *(("update", x) for x in ("ar", "mdlm", "sedd", "d3pm", "duo_base")),
    *(("evaluation", x) for x in ("ar", "mdlm", "sedd", "d3pm", "duo_base")),
    ("sampling", "mdlm ancestral"),
    ("sampling", "duo_base ancestral"),
    ("sampling", "duo_base psi"),
    ("sampling", "ar ancestral"),
]


class Tree:
    """A checkout, and a process that times its steps.

    Args:
        path: Of the checkout.
        words: Options of `bench.py`.
    """

    def __init__(self, path: Path, words: list[str]) -> None:
        command = [sys.executable, "-c", WORKER, json.dumps(words)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=path, stdin=pipe, stdout=pipe, text=True
        )
        self._input = cast(IO[str], self.process.stdin)
        self._output = cast(IO[str], self.process.stdout)
        self.commit = json.loads(self._answer())["commit"]

    def seconds(self, section: str, name: str) -> float:
        """Of one call of a step; the first call of a step is preceded by another."""
        print(json.dumps([section, name]), file=self._input, flush=True)
        return float(self._answer())

    def _answer(self) -> str:
        line = self._output.readline()
        if not line:
            raise SystemExit("a tree's process has ended; its message is above.")
        return line

    def end(self) -> None:
        self.process.communicate()


def compared(before: Tree, after: Tree, rounds: int) -> list[dict]:
    """Rows of every step: seconds of both trees, as the medians of their turns, and
    the median ratio of neighbours in time."""
    rows = []
    for section, name in tqdm(STEPS, "steps"):
        pairs = []
        for index in range(rounds):
            order = (before, after) if index % 2 else (after, before)
            times = {tree: tree.seconds(section, name) for tree in order}
            pairs.append((times[before], times[after]))
        old, new = zip(*pairs, strict=True)
        row = {"step": f"{section}, {name}", "before": statistics.median(old)}
        ratio = statistics.median(b / a for a, b in pairs)
        rows.append(row | {"after": statistics.median(new), "ratio": ratio})
    return rows


def table(rows: list[dict], before: Tree, after: Tree, words: list[str]) -> str:
    lines = [
        "# Steps before and after",
        "",
        f"Commit {before.commit} and commit {after.commit}, in turns"
        + (f", with {' '.join(words)}" if words else "")
        + ". The ratio is the median over pairs of neighbours in time; below 1 the "
        "later commit is faster.",
        "",
    ]
    cells = (
        [
            row["step"],
            *(f"{1000 * row[x]:.0f}" for x in ("before", "after")),
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    )
    lines.append(markdown(["step", "before, ms", "after, ms", "ratio"], cells))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="another checkout")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--output", type=Path, default=HERE)
    args, words = parser.parse_known_args()
    before, after = (Tree(path, words) for path in (args.before, HERE.parent))
    text = table(compared(before, after, args.turns), before, after, words)
    print(text)
    (args.output / "compare.md").write_text(text)
    for one in (before, after):
        one.end()


if __name__ == "__main__":
    main()
