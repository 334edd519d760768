"""Evaluations as files: what reports read of the JSON of `mode=ppl_eval`, of
`mode=sample_eval` and of `mode=fid_eval`.

A file is data of unknown origin: every field that is used has its type checked.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem

from utils import ConfigError, files_named, filesystem_of, first_line, open_file

log = logging.getLogger(__name__)
NUMBERS = ("nll", "bpd", "ppl")
LARGEST = 1e300  # of a number that is taken for a measurement


# ---------------------------------------------------------------- reading


class Evaluation(NamedTuple):
    """One file."""

    path: str
    mode: str  # ppl_eval | sample_eval | fid_eval
    numbers: dict[str, tuple[float, float | None]]  # with standard errors
    settings: dict[str, Any]  # by the names in `FIELDS`
    model: str | None = None  # what the user calls it


def ngram_judge(order: object) -> str:
    """The name of a judge that needs no download."""
    return f"{order}-gram model of the training data"


_TEXT, _WHOLE, _FLAG = (str,), (int,), (bool,)
_NONE = (type(None),)
_SOME = (int, float, *_NONE)
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
        "measured_rows": (("data", "measured_rows"), _WHOLE + _NONE),
        "measured_tokens": (("data", "measured_tokens"), _WHOLE + _NONE),
        "sha256": (("data", "sha256"), _TEXT),
        "expected_sha256": (("data", "expected_sha256"), _TEXT + _NONE),
        "estimator": (("estimator",), _TEXT + _NONE),
        "block_size": (("block_size",), _WHOLE + _NONE),
        "precision": (("precision",), _TEXT + _NONE),
    },
    "sample_eval": {
        "algo": (("settings", "algo", "name"), _TEXT),
        "seed": (("settings", "seed"), _WHOLE),
        "checkpoint": (("settings", "eval.checkpoint_path"), _TEXT),
        **_CHECKPOINT,
        "tokenizer": (("settings", "data.tokenizer_name_or_path"), _TEXT),
        "length": (("settings", "model", "length"), _WHOLE),
        "block_size": (("settings", "algo", "block_size"), (int, list, *_NONE)),
        "judge": (("settings", "eval.gen_ppl_eval_model_name_or_path"), _TEXT + _NONE),
        "ngram_order": (("settings", "eval.ngram_order"), _WHOLE + _NONE),
        "sampling": (("settings", "sampling"), (dict,)),  # all of it
        "steps": (("settings", "sampling", "steps"), _WHOLE),
        "refine_steps": (("settings", "sampling", "refine_steps"), _WHOLE + _NONE),
        "predictor": (("settings", "sampling", "predictor"), _TEXT),
        "noise_removal": (("settings", "sampling", "noise_removal"), _TEXT + _FLAG),
        "precision": (("settings", "trainer.precision"), (str, int, *_NONE)),
        "draws": (("draws",), _TEXT + _NONE),
        "train": (("data", "train"), _TEXT + _NONE),
        "use_float64": (("settings", "sampling", "use_float64"), _FLAG),
        "p_nucleus": (("settings", "sampling", "p_nucleus"), (int, float)),
        "temperature": (("settings", "sampling", "temperature"), (int, float, *_NONE)),
        "corrector": (("settings", "sampling", "corrector"), _TEXT + _NONE),
        "corrector_steps": (
            ("settings", "sampling", "corrector_steps"),
            _WHOLE + _NONE,
        ),
        "semi_ar": (("settings", "sampling", "semi_ar"), _FLAG),
        "prompt": (("settings", "sampling", "prompt"), _TEXT + _NONE),
        "prompt_file": (("settings", "sampling", "prompt_file"), _TEXT + _NONE),
        "infill": (("settings", "sampling", "infill"), _TEXT + _NONE),
        "evaluations": (("evaluations",), _SOME),
        "samples": (("num_samples",), _WHOLE),
        "held_out_rows": (("held_out", "rows"), _WHOLE + _NONE),
        "held_out_entropy": (("held_out", "entropy"), _SOME),
        "held_out_entropy_stderr": (("held_out", "entropy_stderr"), _SOME),
        "held_out_ngram_ppl": (("held_out", "ngram_ppl"), _SOME),
        "held_out_ngram_ppl_stderr": (("held_out", "ngram_ppl_stderr"), _SOME),
        "complete": (("complete",), _FLAG),
    },
    "fid_eval": {
        "algo": (("algo",), _TEXT),
        "seed": (("seed",), _WHOLE),
        "checkpoint": (("checkpoint", "path"), _TEXT),
        **_CHECKPOINT,
        "dataset": (("data", "train"), _TEXT),
        "length": (("data", "length"), _WHOLE),
        "steps": (("sampling", "steps"), _WHOLE),
        "predictor": (("sampling", "predictor"), _TEXT),
        "refine_steps": (("sampling", "refine_steps"), _WHOLE + _NONE),
        "noise_removal": (("sampling", "noise_removal"), _TEXT + _FLAG),
        "guidance": (("sampling", "guid_weight"), (int, float, *_NONE)),
        "noise": (("sampling", "noise"), _TEXT),
        "global_batch": (("sampling", "global_batch_size"), _WHOLE),
        "images": (("num_images",), _WHOLE),
        "real_images": (("num_real",), _WHOLE),
        "extractor": (("extractor", "sha256"), _TEXT),
    },
}
# By mode: metric -> its name in the file; a standard error is under NAME_stderr.
METRICS = {
    "ppl_eval": {"ppl": "ppl", "bpd": "bpd"},  # the first that there is
    "sample_eval": {
        "ppl": "generative_ppl",
        "ngram_ppl": "ngram_ppl",
        "entropy": "entropy",
    },
    "fid_eval": {"fid": "fid", "inception_score": "inception_score"},
}
STATED = ("ppl_eval", "fid_eval")  # modes whose files say which they are of


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
                f"{where}: no likelihood.json of mode=ppl_eval, no samples.json of "
                "mode=sample_eval and no fid.json of mode=fid_eval is there."
            )
        found |= {key: one._replace(model=model) for key, one in here.items()}
    return list(found.values())


def _evaluations(path: str, where: str) -> Iterator[tuple[str, Evaluation]]:
    filesystem, inner = filesystem_of(path)
    is_folder = filesystem.isdir(inner)
    for name in sorted(_names(filesystem, inner, is_folder)):
        if filesystem.isdir(name) or (is_folder and ".json.parts/" in name):
            continue
        full = filesystem.unstrip_protocol(name) if "://" in path else name
        try:
            content = _read(full)
        except (OSError, ValueError, RecursionError) as error:
            line = f"{where}: {full} cannot be read ({first_line(error)})."
            if not is_folder:
                raise ConfigError(f"{line} Leave it out.") from None
            log.warning("%s Passed over.", line)
            continue
        if mode := _mode(content):
            yield full, evaluation(full, mode, content)
        elif not is_folder:
            raise ConfigError(
                f"{where}: {full} is neither of mode=ppl_eval nor of mode=sample_eval "
                "or mode=fid_eval."
            )


def files_called(name: str, path: str) -> list[str]:
    """Those below a folder that have a name; else the file, or those of a glob."""
    filesystem, inner = filesystem_of(path)
    if filesystem.isdir(inner):
        names = [x for x in filesystem.find(inner) if PurePosixPath(x).name == name]
    else:
        names = [inner] if filesystem.isfile(inner) else filesystem.glob(inner)
    return [filesystem.unstrip_protocol(x) if "://" in path else x for x in names]


def _names(filesystem: Any, inner: str, is_folder: bool) -> list[str]:
    """Files of a folder, the one of that very name, or those that it matches."""
    if is_folder:
        return [name for name in filesystem.find(inner) if name.endswith(".json")]
    if isinstance(filesystem, LocalFileSystem):
        return files_named(inner)
    return [inner] if filesystem.isfile(inner) else filesystem.glob(inner)


def _read(path: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"it holds {name}")

    with open_file(path, "r", encoding="utf-8-sig") as file:
        return json.load(file, parse_constant=refuse)


def _mode(content: Any) -> str | None:
    """The mode that wrote a file's content; None: none of them."""
    if not isinstance(content, dict):
        return None
    if content.get("mode") in STATED:
        return content["mode"]
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
            if mode == "ppl_eval":
                break  # images have no perplexity, but bits per dimension
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
