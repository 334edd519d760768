"""Files made to run code: none of it runs, wherever a config may name a file.

Every attack is first shown to work on an ordinary unpickler.
"""

import functools
import os
import pickle
import re
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from refusals import refused

import main
from checkpoints.reading import read_checkpoint
from integral.registry import Settings, build_operator
from training.resume import find_checkpoint
from utils import ConfigError

KEY = "training.finetune_path"
HOLE = "@@@@"  # where an attack is put into a file


def text(value: str) -> bytes:
    """Pickle's code that pushes a string."""
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def by_hand(shell: str, python: str, inner: str) -> dict[str, bytes]:
    """Pickle's code of one value, for calls that no pickler would write.

    Args:
        shell: A command that makes the marker.
        python: An expression that does.
        inner: Path of a pickle that does.
    """
    system, of_shell = b"cos\nsystem\n", text(shell) + b"\x85R"
    of_python = text(python) + b"\x85R"
    bound = b"cfunctools\npartial\n" + system + text(shell)
    return {
        "GLOBAL, REDUCE": system + of_shell,
        "STACK_GLOBAL": text("os") + text("system") + b"\x93" + of_shell,
        "INST": b"(" + text(shell) + b"ios\nsystem\n",
        "OBJ": b"(" + system + text(shell) + b"o",
        "partial, REDUCE": bound + b"\x86R)R",
        "partial, NEWOBJ": bound + b"\x86\x81)R",
        "partial, NEWOBJ_EX": bound + b"\x86}\x92)R",
        "eval": b"cbuiltins\neval\n" + of_python,
        "exec of Python 2": b"c__builtin__\nexec\n" + of_python,
        "getattr of a module": b"cbuiltins\ngetattr\ncimportlib\nimport_module\n"
        + (text("os") + b"\x85R" + text("system") + b"\x86R" + of_shell),
        "pickle.loads": b"cpickle\nloads\nC"
        + (bytes([len(inner)]) + inner.encode("latin-1") + b"\x85R"),
        "dropped after": system + of_shell + b"0N",
    }


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def objects(shell: str) -> dict[str, object]:
    """What picklers do write."""
    array = np.empty(2, dtype=object)
    array[:] = Call(os.system, shell)
    return {
        "numpy objects": array,
        "Popen": Call(subprocess.Popen, ["sh", "-c", shell]),
        "partial": Call(functools.partial(os.system, shell)),
        "a device": Call(torch.device, Call(os.popen, shell)),
    }


def attacks(marker: Path) -> dict[str, bytes]:
    shell, python = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    inner = b"cos\nsystem\n" + text(shell) + b"\x85R."
    hand = by_hand(shell, python, inner.decode("latin-1"))
    made = {
        name: re.sub(rb"^\x80.", b"", pickle.dumps(value, 2, fix_imports=False))[:-1]
        for name, value in objects(shell).items()
    }
    return hand | made


NAMES = sorted(attacks(Path("/none")))
CONTENT = {
    "state_dict": {"w": torch.ones(2)},
    "optimizer_states": [{"state": {}, "param_groups": []}],
    "loops": {"fit_loop": {}},
    "global_step": 1,
    "callbacks": {"a": {}},
    "hyper_parameters": {"config": {"a": [1, {}]}},
}
PLACES = {
    "top": lambda content: content.update(x=HOLE),
    "a key": lambda content: content.update({HOLE: 1}),
    "state_dict": lambda content: content["state_dict"].update(w=HOLE),
    "optimizer": lambda content: content["optimizer_states"].append(HOLE),
    "callbacks": lambda content: content["callbacks"]["a"].update(x=HOLE),
    "config": lambda content: content["hyper_parameters"]["config"]["a"].append(HOLE),
}
FORMATS = ("zip", "legacy", "raw")


def hostile(folder: Path, attack: bytes, place="top", kind="zip") -> str:
    """A checkpoint with an attack in it."""
    content = pickle.loads(pickle.dumps(CONTENT))
    PLACES[place](content)
    path, hole = folder / "a.ckpt", text(HOLE)
    if kind == "raw":
        content["state_dict"] = {} if place != "state_dict" else {"w": HOLE}
        path.write_bytes(pickle.dumps(content, 2).replace(hole, attack))
        return str(path)
    torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    if kind == "legacy":
        path.write_bytes(path.read_bytes().replace(hole, attack))
        return str(path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in files.items():
            archive.writestr(name, raw.replace(hole, attack))
    return str(path)


@contextmanager
def ended() -> Iterator[None]:
    """Whatever processes are started inside have ended after it."""
    started, begin = [], subprocess.Popen.__init__

    def begin_and_note(self, *args, **kwargs) -> None:
        begin(self, *args, **kwargs)
        started.append(self)

    with mock.patch.object(subprocess.Popen, "__init__", begin_and_note):
        yield
    for process in started:
        process.wait()


def opened(path: str, marker: Path) -> None:
    """Reads it carelessly, which has to make the marker."""
    with ended():
        try:
            torch.load(path, weights_only=False)
        except Exception:  # after the attack, or no format of torch's
            with open(path, "rb") as file, suppress(Exception):
                pickle.load(file)
    assert marker.exists(), "an attack that does nothing shows nothing"
    marker.unlink()


def check(path: str, marker: Path) -> None:
    opened(path, marker)
    with ended():
        refused(lambda: read_checkpoint(path, KEY), f"{KEY}={path!r} cannot be read")
    assert not marker.exists()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_runs(tmp_path, name, kind):
    marker = tmp_path / "marker"
    check(hostile(tmp_path, attacks(marker)[name], kind=kind), marker)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("place", PLACES)
def test_nothing_runs_anywhere_in_a_file(tmp_path, place, kind):
    marker = tmp_path / "marker"
    attack = attacks(marker)["GLOBAL, REDUCE"]
    check(hostile(tmp_path, attack, place, kind), marker)


TRUSTED = (
    "os.system",
    "posix.system",
    "os.popen",
    "functools.partial",
    "builtins.eval",
    "builtins.exec",
    "__builtin__.exec",
    "builtins.getattr",
    "importlib.import_module",
    "pickle.loads",
    "_pickle.loads",
    "subprocess.Popen",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "_codecs.encode",
    "torch.device",
)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_runs_of_classes_that_are_trusted(tmp_path, name, kind):
    """They are read as records, or refused for another reason."""
    marker = tmp_path / "marker"
    path = hostile(tmp_path, attacks(marker)[name], kind=kind)
    try:
        with ended():
            found = read_checkpoint(path, KEY, TRUSTED).lightning["x"]
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert found is None or type(found).__name__ == "Record"
    assert not marker.exists()


def test_a_trusted_class_is_a_record(tmp_path):
    marker = tmp_path / "marker"
    path = hostile(tmp_path, attacks(marker)["Popen"])
    hint = "checkpointing.trusted_classes=[subprocess.Popen]"
    refused(lambda: read_checkpoint(path, KEY), hint)
    found = read_checkpoint(path, KEY, ["subprocess.Popen"]).lightning["x"]
    command = ["sh", "-c", f"touch {marker}"]
    assert (found.name, found.args) == ("subprocess.Popen", (command,))
    assert not marker.exists()


# ---------------------------------------------------------------- by the config


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def path(tmp_path, marker) -> str:
    return hostile(tmp_path, attacks(marker)["eval"])


def test_resume_path(compose, tmp_path, path, marker):
    key = "checkpointing.resume_ckpt_path"
    save = f"checkpointing.save_dir={tmp_path}/run"
    refused(lambda: find_checkpoint(compose(save, f"{key}={path}")), key, path, "eval")
    assert not marker.exists()


def test_last_checkpoint(compose, tmp_path, path, marker):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    os.rename(path, folder / "last.ckpt")
    config = compose(f"checkpointing.save_dir={tmp_path}")
    refused(lambda: find_checkpoint(config), str(folder), "eval")
    assert not marker.exists()


@pytest.mark.parametrize("mode", ["inspect", "ppl_eval", "sample_eval"])
def test_evaluated_path(compose, tmp_path, path, marker, mode):
    key = "eval.checkpoint_path"
    save = (f"checkpointing.save_dir={tmp_path}", f"mode={mode}")
    config = compose("algo=mdlm", f"{key}={path}", *save)
    config.eval.gen_ppl_eval_model_name_or_path = None
    config.eval.generated_samples_path = f"{tmp_path}/samples.json"
    refused(lambda: main.MODES[mode](config), key, path, "eval")
    assert not marker.exists()


def test_finetune_path(compose, tmp_path, path, marker):
    save = f"checkpointing.save_dir={tmp_path}"
    config = compose("algo=mdlm", f"{KEY}={path}", save)
    refused(lambda: main.train(config), KEY, path, "eval")
    assert not marker.exists()


@pytest.mark.parametrize("name", NAMES)
def test_table_of_the_curriculum(compose, tmp_path, name):
    marker, path = tmp_path / "marker", tmp_path / "table.pkl"
    path.write_bytes(b"\x80\x02" + attacks(marker)[name] + b".")
    key = "algo.curriculum.integral_cache_path"
    config = compose("algo=duo", f"{key}={path}", "algo.curriculum.mode=simple")
    refused(lambda: build_operator(Settings.of(config, 7)), key, str(path))
    assert not marker.exists()
