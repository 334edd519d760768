"""Runs of main.py that a table is made of, and the command line of such a table."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def table_parser(doc: str, name: str) -> argparse.ArgumentParser:
    """What every such table can be told.

    Args:
        doc: Of the module that makes it.
        name: Of the make target, and of the folder of its runs.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "outputs" / name, help="of runs"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--anew", action="store_true", help="nothing of before is used")
    return parser


def folder_of(args: argparse.Namespace) -> Path:
    """Where the runs are; emptied if nothing of before is to be used."""
    folder: Path = args.folder.absolute()
    if args.anew:
        shutil.rmtree(folder, ignore_errors=True)
    return folder


def run(folder: Path, *overrides: str) -> None:
    """main.py, in a folder, unless it has ended there before; its output in log.txt."""
    done, asked = folder / "done.json", json.dumps(overrides)
    if done.exists() and done.read_text() == asked:
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "main.py"), *overrides]
    with open(folder / "log.txt", "w") as log:
        status = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT
        ).returncode
    if status:
        lines = (folder / "log.txt").read_text().splitlines()
        errors = [x for x in lines if x.startswith("error: ")] or lines[-20:]
        sys.exit("\n".join([*errors, f"{folder}/log.txt has all of it."]))
    done.write_text(asked)
