"""What callbacks take over from a checkpoint of a run that has been moved."""

import os

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from refusals import refused

from training.callback_states import fit_callbacks
from training.callbacks import CheckpointEveryNSteps
from training.resume import KEY
from utils import whole_file


def monitored(folder: str, scores: dict[str, float], mode: str = "min") -> dict:
    """What ModelCheckpoint would say of files in a folder."""
    callback = ModelCheckpoint(folder, monitor="val/nll", mode=mode)
    tensors = {f"{folder}/{name}": torch.tensor(x) for name, x in scores.items()}
    callback.best_k_models = tensors
    order = sorted(tensors, key=lambda path: tensors[path], reverse=mode == "max")
    callback.best_model_path, callback.kth_best_model_path = order[0], order[-1]
    callback.best_model_score = tensors[order[0]]
    callback.kth_value = tensors[order[-1]]
    callback.last_model_path = f"{folder}/last.ckpt"
    return callback.state_dict()


def restored(state: dict, folder: str, mode: str = "min") -> ModelCheckpoint:
    callback = ModelCheckpoint(folder, monitor="val/nll", mode=mode)
    states = {callback.state_key: state}
    fit_callbacks(states, [callback], KEY)
    if callback.state_key in states:
        callback.load_state_dict(states[callback.state_key])
    return callback


def files_in(folder: str, *names: str) -> None:
    for name in names:
        with whole_file(f"{folder}/{name}") as file:
            file.write(b"")


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("place", ["{tmp}/new", "{tmp}/o=l d[1]/x", "memory://new"])
def test_a_run_that_was_moved_keeps_its_best(tmp_path, place, mode):
    new = place.format(tmp=tmp_path)
    files_in(new, "best.ckpt", "last.ckpt")
    found = restored(monitored("/old/run", {"best.ckpt": 0.5}, mode), new, mode)
    path = f"{found.dirpath}/best.ckpt"
    assert found.best_k_models == {path: torch.tensor(0.5)}
    assert found.best_model_path == found.kth_best_model_path == path
    assert found.best_model_score == found.kth_value == 0.5


def test_a_run_that_is_reached_through_a_link(tmp_path):
    files_in(str(tmp_path / "real"), "best.ckpt")
    (tmp_path / "link").symlink_to("real")
    state = monitored(str(tmp_path / "real"), {"best.ckpt": 0.5})
    found = restored(state, str(tmp_path / "link"))
    assert found.best_model_score == 0.5
    assert os.path.samefile(found.best_model_path, tmp_path / "real/best.ckpt")


def test_a_best_one_that_stayed_behind_is_forgotten(tmp_path):
    """In a folder of its own, where a run goes on from a file of another one."""
    found = restored(monitored("/old", {"best.ckpt": 0.5}), str(tmp_path))
    assert (found.best_k_models, found.best_model_path) == ({}, "")
    assert found.best_model_score is None
    assert found.kth_value == float("inf")
    assert found.last_model_path == ""


def test_names_that_lead_out_of_the_folder(tmp_path):
    """They are no files of the run."""
    files_in(str(tmp_path), "secret.txt")
    files_in(str(tmp_path / "run"), "best.ckpt")
    names = {"../secret.txt": 1.0, "..": 2.0, "../x/best.ckpt": 3.0, "": 4.0}
    found = restored(monitored("/old", names), str(tmp_path / "run"))
    assert found.best_k_models == {}


# ---------------------------------------------------------------- hostile states

STRANGE = ("../../home/thesis.tex", "/etc/passwd", "local:///home/x", "x.ckpt", "", 7)
STRANGE += ("round_0.ckpt", "last.ckpt", "best.ckpt", "1-2.ckpt/../x", "1-2.ckpt\n")
STRANGE += (
    "\u0661-\u0662.ckpt",
    "./1-2.ckpt",
    "a\x00b",
    None,
    ["1-2.ckpt"],
    "file:1-2.ckpt",
)


def test_only_names_of_its_own_kind_are_its_files(tmp_path):
    """Whatever a file says; its own names are, in their order."""
    callback = CheckpointEveryNSteps(str(tmp_path))
    callback.load_state_dict({"written": ["0-5.ckpt", *STRANGE, "12-7.ckpt"]})
    assert callback.state_dict() == {"written": ["0-5.ckpt", "12-7.ckpt"]}
    named = CheckpointEveryNSteps(str(tmp_path), auto_insert_metric_name=True)
    named.load_state_dict({"written": ["0-5.ckpt", "epoch=0-step=5.ckpt", *STRANGE]})
    assert named.state_dict() == {"written": ["epoch=0-step=5.ckpt"]}


OTHER_WAYS = (
    "local://{home}/best.ckpt",
    "file://{home}/best.ckpt",
    "{home}/best.ckpt",
    "{run}/../home/best.ckpt",
    "{run}/notes.txt",
    "{run}/last.ckpt",
    "{run}/round_0.ckpt",
    "{run}/0-2.ckpt",
    "{run}/best.ckpt/../notes.txt",
)


@pytest.mark.parametrize("dirpath", ["{run}", "{home}", "/", "", None])
@pytest.mark.parametrize("way", OTHER_WAYS)
def test_no_other_file_is_the_best_one(tmp_path, way, dirpath):
    """Neither outside of the folder, nor inside of it under another name."""
    places = {"home": f"{tmp_path}/home", "run": f"{tmp_path}/run"}
    for folder in places.values():
        files_in(folder, "best.ckpt", "last.ckpt", "round_0.ckpt", "0-2.ckpt")
        files_in(folder, "notes.txt")
    path = way.format(**places)
    callback = ModelCheckpoint(places["run"], "best", "val/nll")
    state = callback.state_dict() | {
        "best_k_models": {path: torch.tensor(1e9)},
        "kth_best_model_path": path,
        "kth_value": torch.tensor(1e9),
        "best_model_path": path,
        "best_model_score": torch.tensor(1e9),
        "last_model_path": path,
        "dirpath": dirpath and dirpath.format(**places),
    }
    states = {callback.state_key: state}
    fit_callbacks(states, [callback], KEY)
    callback.load_state_dict(states.get(callback.state_key, callback.state_dict()))
    own = f"{places['run']}/best.ckpt"
    is_own = way == "{home}/best.ckpt" and dirpath == "{home}"  # a run that was moved
    assert set(callback.best_k_models) == ({own} if is_own else set())
    files = {callback.best_model_path, callback.kth_best_model_path}
    assert files == ({own} if is_own else {""})
    assert callback.last_model_path in ("", own)


MISFITS = {
    "best_k_models": ([], {"x": "y"}, {1: torch.tensor(0.0)}, None),
    "best_model_path": (None, 7, ["x"], "x" * 20_000),
    "kth_best_model_path": (None, {}),
    "kth_value": (None, "x", torch.zeros(2), float("nan")),
    "best_model_score": ("x", torch.zeros(3)),
    "dirpath": (7, ["x"]),
    "last_model_path": (None, 1.5),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, x) for name, values in MISFITS.items() for x in values]
)
def test_a_state_of_another_kind_is_refused(tmp_path, name, value):
    callback = ModelCheckpoint(str(tmp_path), "best", "val/nll")
    states = {callback.state_key: callback.state_dict() | {name: value}}
    refused(lambda: fit_callbacks(states, [callback], KEY), KEY, name)


@pytest.mark.parametrize("state", [{}, {"wait_count": 1}, {"patience": "x"}])
def test_states_of_other_callbacks_have_their_types(state):
    """As a user may add them: what is missing or of another type is refused."""
    callback = EarlyStopping("val/nll")
    good = callback.state_dict() | {"wait_count": 1}
    fit_callbacks({callback.state_key: good}, [callback], KEY)
    bad = {callback.state_key: good | state if "patience" in state else state}
    refused(lambda: fit_callbacks(bad, [callback], KEY), KEY, "EarlyStopping")
