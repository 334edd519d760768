"""Runs a script of scripts/ with a Python that writes down what it was asked to do."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from nursery import ROOT
from omegaconf import DictConfig, OmegaConf

from utils import hydra_quoted

FOLDER = ROOT / "scripts"
TABLE = OmegaConf.to_container(
    OmegaConf.load(ROOT / "tests" / "script_overrides.yaml"), resolve=False
)
PATHS = {path for path in FOLDER.rglob("*.sh") if path.read_text().startswith("#!")}
SCRIPTS = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in PATHS)
ZERO_SHOT = [name for name in SCRIPTS if name.startswith("zero_shot")]
OVER_STEPS = [name for name in SCRIPTS if name.startswith("eval_distill")]
SINGLE = [name for name in SCRIPTS if name not in ZERO_SHOT + OVER_STEPS]
IMAGES = [name for name in SCRIPTS if "cifar10" in name]

RECORDER = """#!/bin/sh
{ for word; do printf '%s\\0' "$word"; done; printf '\\036'; } >> "$RECORD"
exit ${STATUS:-0}
"""
SRUN = """#!/bin/sh
printf '%s ' "$@" >> "$RECORD.srun"
while case $1 in -*) true ;; *) false ;; esac; do shift; done
exec "$@"
"""


def path_of(script: str) -> Path:
    return FOLDER / f"{script}.sh"


def placeholders(text: str) -> set[str]:
    """Variables in overrides of the table, `data` of the loop left out."""
    return set(re.findall(r"\$(\w+)", text)) - {"data"}


def variables(script: str) -> dict[str, str]:
    """Those with a default."""
    return TABLE[script].get("variables", {})


def required(script: str) -> list[str]:
    """Variables without a default."""
    names = placeholders(TABLE[script]["overrides"])
    return sorted(names - variables(script).keys())


def has_mode(script: str, mode: str) -> bool:
    return parsed(TABLE[script]["overrides"].split()).get("mode", "train") == mode


def parsed(words: list[str]) -> dict[str, str]:
    """Key -> value of overrides, as Hydra reads them; + and the like stay."""
    overrides = OverridesParser.create().parse_overrides(words)
    assert len(overrides) == len(words)
    given = (x.input_line.partition("=")[0] for x in overrides)
    return {key: str(x.value()) for key, x in zip(given, overrides, strict=True)}


def listed(script: str, values: dict[str, str]) -> dict[str, str]:
    """Key -> value of a script's overrides in the table, its variables filled in."""
    found = {}
    for key, text in parsed(TABLE[script]["overrides"].split()).items():
        for name in sorted(values, key=len, reverse=True):
            text = text.replace(f"${name}", values[name])
        found[key] = text
    return found


def published(script: str, values: dict[str, str]) -> list[str]:
    """The words of the command in the table, as main.py takes them.

    Any wandb key among them asks for the logger wandb beside the usual one.

    Args:
        script: Name of it.
        values: Of all its variables.
    """
    found = listed(script, values)
    if found.get("mode") == "sample_eval":  # the default of the published code
        found = {"eval.gen_ppl_eval_model_name_or_path": "gpt2-large"} | found
    words = [f"{key}={_for_hydra(value)}" for key, value in found.items()]
    has_wandb = any(key.lstrip("+").startswith("wandb.") for key in found)
    return words + ["logger=[csv,wandb]"] * has_wandb


def _for_hydra(value: str) -> str:
    return value if re.fullmatch(r"[\w.+/-]*", value) else hydra_quoted(value)


def resolved(config: DictConfig) -> dict:
    """All values of a config, those made of others filled in."""
    return OmegaConf.to_container(config, resolve=True)


def filled(given: dict[str, str], config: DictConfig) -> dict[str, str]:
    """Values of a command line with ${KEY} filled in from the config it composes."""
    both = OmegaConf.create(OmegaConf.to_container(config) | {"given_": dict(given)})
    return dict(both.given_)


class Recorded:
    """What a script did.

    Args:
        done: The process of the script.
        record: File of the recorder.
    """

    def __init__(self, done: subprocess.CompletedProcess, record: Path) -> None:
        self.status, self.said = done.returncode, done.stderr
        self.calls = list(_calls(record))
        srun = Path(f"{record}.srun")
        self.srun = srun.read_text() if srun.exists() else ""

    def overrides(self) -> list[str]:
        """Of the only call."""
        assert self.status == 0, self.said
        (call,) = self.calls
        return call


def _calls(record: Path) -> Iterator[list[str]]:
    """The overrides of every call of main.py."""
    text = record.read_text() if record.exists() else ""
    for call in text.split("\036")[:-1]:
        flag, program, *overrides = call.split("\0")[:-1]
        assert (flag, program) == ("-u", str(ROOT / "main.py"))
        yield overrides


def record(
    path: Path, *arguments: str, folder: Path, cwd: Path | None = None, **env: str
) -> Recorded:
    """Runs a script with nothing of this process's environment.

    Args:
        path: Of the script, or of a copy of it.
        arguments: Of the script.
        folder: Scratch, for the programs in the place of python and srun.
        cwd: Where it is run; `folder` by default.
        env: Variables.
    """
    bin_dir = folder / "bin"
    bin_dir.mkdir(exist_ok=True)
    for name, text in {"recorder": RECORDER, "srun": SRUN}.items():
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    record = folder / "record"
    for old in (record, Path(f"{record}.srun")):
        old.unlink(missing_ok=True)
    base = {
        "PATH": f"{bin_dir}:/usr/local/bin:/usr/bin:/bin",
        "HOME": os.environ.get("HOME", "/"),
        "RECORD": str(record),
        "PYTHON": "recorder",
        "DUO_ENV": os.devnull,  # not what a user of this checkout has
    }
    done = subprocess.run(
        ["bash", str(path), *arguments],
        cwd=cwd or folder,
        env=base | env,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return Recorded(done, record)
