"""Evaluations as files: what `mode=ppl_eval` writes, what reports read of it and of the
JSON of `mode=sample_eval`, and the processes that make those that are missing.

A file is data of unknown origin: every field that is used has its type checked.
"""

import hashlib
import json
import logging
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from omegaconf import DictConfig
from tqdm.auto import tqdm

from checkpoints import DISTILLED, likelihood, setting
from packing import Fingerprint
from utils import ConfigError, RunStopped, first_line, hydra_quoted, path_exists

log = logging.getLogger(__name__)

MAIN = Path(__file__).parent / "main.py"
NUMBERS = ("nll", "bpd", "ppl")
LARGEST = 1e300  # of a number that is taken for a measurement

# ---------------------------------------------------------------- writing


def check_path(path: Any, key: str) -> None:
    """Refuses what cannot be the path of a file, before it takes hours to find out.

    Raises:
        ConfigError: If it is no text, a folder, or of an unknown kind of store.
    """
    try:
        if isinstance(path, str) and path:
            filesystem, inner = fsspec.core.url_to_fs(path)
            if not filesystem.isdir(inner):
                return
        reason = "give a local or fsspec path of a file"
    except (ValueError, ImportError) as error:
        reason = first_line(error)
    raise ConfigError(f"{key}={path!r} cannot be written: {reason}.")


def origin(
    config: DictConfig, checkpoint: Mapping[str, Any], has_ema: bool
) -> dict[str, Any]:
    """What the evaluated weights are, as plain data; None where a file does not say.

    Args:
        config: The run's config.
        checkpoint: From `checkpoints.read_checkpoint`.
        has_ema: Whether the model took EMA weights from it.
    """
    algo = setting(checkpoint, "algo.name")
    says = checkpoint.get("likelihood")  # a folder may not know
    is_known = isinstance(algo, str) and says in (None, likelihood(algo))
    values = {
        "path": config.eval.checkpoint_path,
        "algo": algo,
        "distilled": algo in DISTILLED if is_known else None,
        "step": checkpoint.get("global_step"),
        "update_teacher_every": setting(checkpoint, "algo.update_teacher_every"),
        "teacher_ema": setting(checkpoint, "algo.teacher_ema"),
        "weights": _weights(config, checkpoint, has_ema),
    }
    plain = (bool, int, str)
    return {key: x if isinstance(x, plain) else None for key, x in values.items()}


def _weights(config: DictConfig, checkpoint: Mapping[str, Any], has_ema: bool) -> Any:
    """EMA or raw; of a Hugging Face folder what it says of itself."""
    if has_ema:
        return "raw" if config.eval.disable_ema else "EMA"
    return checkpoint.get("weights") if "format" in checkpoint else "raw"


def likelihood_record(
    config: DictConfig,
    results: Mapping[str, float],
    fingerprint: Fingerprint,
    expected: Fingerprint | None,
    of_checkpoint: Mapping[str, Any],
    of_documents: Mapping[str, int | None],
) -> dict[str, Any]:
    """The content of `eval.results_path`.

    Args:
        config: The run's config.
        results: nll (nats per token), bpd (bits per token), ppl, and the standard
            error of each under NAME_stderr.
        fingerprint: Of the rows.
        expected: Of the published data set's, where it is known.
        of_checkpoint: From `origin`.
        of_documents: How many the rows' source has, and the published one:
            `documents` and `published_documents`; None: not known.
    """
    names = [*NUMBERS, *(f"{name}_stderr" for name in NUMBERS)]
    data = config.data
    return {
        "mode": "ppl_eval",
        "algo": config.algo.name,
        "seed": config.seed,
        "checkpoint": dict(of_checkpoint),
        "data": {
            "valid": data.valid,
            "tokenizer": data.tokenizer_name_or_path,
            "length": config.model.length,
            "wrap": data.wrap,
            "insert_valid_eos": data.insert_valid_eos,
            "limit_val_batches": config.trainer.limit_val_batches,
            **of_documents,
            **fingerprint._asdict(),
            "expected_sha256": None if expected is None else expected.sha256,
        },
        **{name: _finite(results[name]) for name in names},
    }


def _finite(x: float) -> float | None:
    """JSON has no NaN; below two rows there is no standard error."""
    return x if math.isfinite(x) else None


# ---------------------------------------------------------------- reading


class Evaluation(NamedTuple):
    """One file."""

    path: str
    mode: str  # ppl_eval | sample_eval
    numbers: dict[str, tuple[float, float | None]]  # with standard errors
    settings: dict[str, Any]  # by the names in `FIELDS`
    model: str | None = None  # what the user calls it


_TEXT, _WHOLE, _FLAG = (str,), (int,), (bool,)
_NONE = (type(None),)
_CHECKPOINT = {
    "weights": (("checkpoint", "weights"), _TEXT + _NONE),
    "trained_as": (("checkpoint", "algo"), _TEXT + _NONE),
    "distilled": (("checkpoint", "distilled"), _FLAG + _NONE),
    "step": (("checkpoint", "step"), _WHOLE + _NONE),
    "round_steps": (("checkpoint", "update_teacher_every"), _WHOLE + _NONE),
    "teacher_ema": (("checkpoint", "teacher_ema"), _FLAG + _NONE),
}
# By mode: name -> (where it is, its types).
FIELDS = {
    "ppl_eval": {
        "algo": (("algo",), _TEXT),
        "seed": (("seed",), _WHOLE),
        "checkpoint": (("checkpoint", "path"), _TEXT),
        **_CHECKPOINT,
        "valid": (("data", "valid"), _TEXT),
        "tokenizer": (("data", "tokenizer"), _TEXT),
        "length": (("data", "length"), _WHOLE),
        "wrap": (("data", "wrap"), _FLAG),
        "insert_valid_eos": (("data", "insert_valid_eos"), _FLAG),
        "limit_val_batches": (("data", "limit_val_batches"), (int, float, *_NONE)),
        "documents": (("data", "documents"), _WHOLE + _NONE),
        "published_documents": (("data", "published_documents"), _WHOLE + _NONE),
        "rows": (("data", "rows"), _WHOLE),
        "tokens": (("data", "tokens"), _WHOLE),
        "sha256": (("data", "sha256"), _TEXT),
        "expected_sha256": (("data", "expected_sha256"), _TEXT + _NONE),
    },
    "sample_eval": {
        "algo": (("settings", "algo", "name"), _TEXT),
        "seed": (("settings", "seed"), _WHOLE),
        "checkpoint": (("settings", "eval.checkpoint_path"), _TEXT),
        **_CHECKPOINT,
        "tokenizer": (("settings", "data.tokenizer_name_or_path"), _TEXT),
        "length": (("settings", "model", "length"), _WHOLE),
        "judge": (("settings", "eval.gen_ppl_eval_model_name_or_path"), _TEXT + _NONE),
        "steps": (("settings", "sampling", "steps"), _WHOLE),
        "predictor": (("settings", "sampling", "predictor"), _TEXT),
        "noise_removal": (("settings", "sampling", "noise_removal"), _TEXT + _FLAG),
        "use_float64": (("settings", "sampling", "use_float64"), _FLAG),
        "p_nucleus": (("settings", "sampling", "p_nucleus"), (int, float)),
        "semi_ar": (("settings", "sampling", "semi_ar"), _FLAG),
        "prompt": (("settings", "sampling", "prompt"), _TEXT + _NONE),
        "prompt_file": (("settings", "sampling", "prompt_file"), _TEXT + _NONE),
        "infill": (("settings", "sampling", "infill"), _TEXT + _NONE),
        "samples": (("num_samples",), _WHOLE),
        "complete": (("complete",), _FLAG),
    },
}
# By mode: metric -> its name in the file; a standard error is under NAME_stderr.
METRICS = {
    "ppl_eval": {"ppl": "ppl"},
    "sample_eval": {"ppl": "generative_ppl", "entropy": "entropy"},
}


def read_runs(runs: Sequence[tuple[str | None, str]]) -> list[Evaluation]:
    """The evaluations that `report.runs` names, each once.

    Args:
        runs: (what the user calls the model, or None; file, glob or folder). Folders
            are searched to any depth; other JSON there is passed over. Local or fsspec.

    Raises:
        ConfigError: If an entry leads to no evaluation, or names a file that is none.
    """
    found: dict[str, Evaluation] = {}
    for model, path in runs:
        where = f"report.runs={path!r}"
        here = dict(_evaluations(path, where))
        if not here:
            raise ConfigError(
                f"{where}: no likelihood.json of mode=ppl_eval and no samples.json of "
                "mode=sample_eval is there."
            )
        found |= {key: one._replace(model=model) for key, one in here.items()}
    return list(found.values())


def _evaluations(path: str, where: str) -> Iterator[tuple[str, Evaluation]]:
    filesystem, inner = fsspec.core.url_to_fs(path)
    is_folder = filesystem.isdir(inner)
    pattern = f"{inner.rstrip('/')}/**/*.json" if is_folder else inner
    names = [inner] if filesystem.isfile(inner) else filesystem.glob(pattern)
    for name in sorted(names):
        if filesystem.isdir(name) or (is_folder and ".json.parts/" in name):
            continue
        full = filesystem.unstrip_protocol(name) if "://" in path else name
        try:
            content = _read(full)
        except (OSError, ValueError, RecursionError) as error:
            line = f"{where}: {full} cannot be read ({first_line(error)})."
            if not is_folder:
                raise ConfigError(line) from None
            log.warning("%s Passed over.", line)
            continue
        if mode := _mode(content):
            yield full, evaluation(full, mode, content)
        elif not is_folder:
            raise ConfigError(
                f"{where}: {full} is neither of mode=ppl_eval nor of mode=sample_eval."
            )


def _read(path: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"it holds {name}")

    with fsspec.open(path, "r", encoding="utf-8") as file:
        return json.load(file, parse_constant=refuse)


def _mode(content: Any) -> str | None:
    """The mode that wrote a file's content; None: neither."""
    if not isinstance(content, dict):
        return None
    if content.get("mode") == "ppl_eval":
        return "ppl_eval"
    return "sample_eval" if {"settings", "generated_seqs"} <= content.keys() else None


def evaluation(path: str, mode: str, content: Mapping[str, Any]) -> Evaluation:
    """What reports need of a file's content.

    Raises:
        ConfigError: If a field is missing or of another type.
    """
    settings = {
        name: _field(content, keys, types, path)
        for name, (keys, types) in FIELDS[mode].items()
    }
    numbers = {}
    for metric, name in METRICS[mode].items():
        value = _number(content, name, path)
        if value is not None:
            numbers[metric] = value, _number(content, f"{name}_stderr", path)
    return Evaluation(path, mode, numbers, settings)


def _field(
    content: Any, keys: Sequence[str], types: tuple[type, ...], path: str
) -> Any:
    """The value under nested keys; missing ones are null."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    if type(content) not in types:
        names = " or ".join(kind.__name__ for kind in types if kind not in _NONE)
        value = f"{'.'.join(keys)}={_shown(content)}"
        raise ConfigError(f"{path} is no evaluation: {value} is no {names}.")
    return content


def _number(content: Mapping[str, Any], name: str, path: str) -> float | None:
    value = _field(content, (name,), (int, float, *_NONE), path)
    if value is None:
        return None
    if not 0 <= value < LARGEST:  # 1e999 is read as infinity
        shown = _shown(value)
        raise ConfigError(f"{path} is no evaluation: {name}={shown} is out of range.")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


# ---------------------------------------------------------------- making


class Job(NamedTuple):
    """An evaluation to make, in a process of its own."""

    name: str  # of its folder
    overrides: dict[str, str]  # of the command line
    result: str  # key that takes the path of its file
    checkpoint: str

    def file(self, folder: str) -> str:
        """Its file in a folder; another one for other settings or contents."""
        about = [self.overrides, self.checkpoint]
        if path_exists(self.checkpoint):
            filesystem, inner = fsspec.core.url_to_fs(self.checkpoint)
            info = filesystem.info(inner)
            about += [info.get("size"), str(info.get("mtime"))]
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        return f"{folder}/{self.name}-{digest[:8]}.json"

    def command(self, file: str, run_dir: Path) -> list[str]:
        """The command line that writes its file."""
        pairs = {self.result: file, "hydra.run.dir": str(run_dir), **self.overrides}
        quoted = (f"{key}={_for_hydra(value)}" for key, value in pairs.items())
        return [sys.executable, str(MAIN), *quoted]


_PLAIN = re.compile(r"[\w./:+\-\[\]]*")


def _for_hydra(value: str) -> str:
    """A value as Hydra wants it; one in quotes or brackets is so already."""
    if _PLAIN.fullmatch(value) or value[0] in "'\"[{":
        return value
    return hydra_quoted(value)


def make(jobs: Sequence[Job], folder: str) -> tuple[list[str], list[str]]:
    """Runs the jobs that have no finished file yet, one after the other.

    Args:
        jobs: To be done.
        folder: Where their files go; a stopped report goes on from there.

    Returns:
        The files of those that are done, and a line about each of the others.

    Raises:
        RunStopped: If none could be done, the message is that of the first; or after
            Ctrl-C.
    """
    files, failed, statuses = [], [], []
    for job in (bar := tqdm(jobs, "evaluations")):
        bar.set_postfix_str(job.name)
        file = job.file(folder)
        if not is_finished(file):
            run_dir = Path(os.getcwd()) / "jobs" / Path(file).stem
            try:
                complaint = _run(job.command(file, run_dir), run_dir)
            except KeyboardInterrupt:
                raise RunStopped(
                    f"stopped: {len(files)} of {len(jobs)} evaluations are in "
                    f"{folder}; a report with the same report.path goes on there.",
                    130,
                ) from None
            if complaint:
                statuses.append(complaint[0])
                failed.append(f"{job.name}: {complaint[1]}")
                continue
        files.append(file)
    if failed and not files:
        message = f"{len(failed)} of {len(jobs)} evaluations failed; {failed[0]}"
        raise RunStopped(message, 2 if statuses[0] == 2 else 1)
    return files, failed


def is_finished(file: str) -> bool:
    """Whether a file of `make` is there and whole."""
    if not path_exists(file):
        return False
    content = _read(file)
    return _mode(content) == "ppl_eval" or content.get("complete") is True


def _run(command: list[str], run_dir: Path) -> tuple[int, str] | None:
    """Status and complaint of a process that failed. What it says is in log.txt."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "log.txt"
    with open(path, "w") as file:
        options = {"stdout": file, "stderr": subprocess.STDOUT}
        status = subprocess.run(command, cwd=run_dir, **options, check=False).returncode
    if not status:
        return None
    lines = path.read_text(errors="replace").splitlines()
    said = next((x for x in lines if x.startswith("error: ")), f"status {status}")
    return status, f"{said.removeprefix('error: ')} (log: {path})"
